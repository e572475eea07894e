"""The parts a page is built from: figures with their readings and tables, grouped in sections.

The partials in `templates/macros.html` render these records; any page can use them.
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from llp.reporting import formats
from llp.reporting.tables import Column, Table


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a sample of the mark, and what it means.

    Attributes:
        label: What it means.
        role: Colour role of the palette.
        mark: `line`, `dashed`, `dotted`, `bar`, `ring`, or a marker of `palette.MARKERS`.
        hatch: Number of the hatch in `palette.HATCHES`, for bars.
    """

    label: str
    role: str
    mark: str = "line"
    hatch: int = 0


@dataclass(frozen=True)
class Data:
    """A table under a figure, folded away unless `shown`."""

    title: str
    table: Table
    shown: bool = False
    sortable: bool = False


@dataclass(frozen=True)
class Exhibit:
    """One figure, or several small ones, with its reading and its data.

    Attributes:
        key: Unique on the page.
        title: Heading; empty when the section's own is enough.
        reading: One sentence made from the numbers.
        svgs: Inline SVG; none when there is nothing to draw.
        legend: What the marks mean.
        data: Tables.
        note: How to read it, and what it cannot show.
        wide: Draw at full width, scrolling sideways on a narrow screen.
    """

    key: str
    title: str
    reading: str
    svgs: tuple[Markup, ...] = ()
    legend: tuple[Key, ...] = ()
    data: tuple[Data, ...] = ()
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """One section: a heading, a line on what it is about, and its exhibits."""

    key: str
    title: str
    lead: str
    exhibits: tuple[Exhibit, ...]


def drawn(*svgs: str) -> tuple[Markup, ...]:
    """Trusts what `svg.inline` made; matplotlib and ElementTree have escaped every text in it."""
    return tuple(Markup(svg) for svg in svgs)


def whole(key: str, label: str) -> Column:
    """A column of whole numbers."""
    return Column(key, label, formats.count)


def share(key: str, label: str) -> Column:
    """A column of shares in percent."""
    return Column(key, label, formats.percent)


def signed(key: str, label: str) -> Column:
    """A column of numbers with their sign."""
    return Column(key, label, formats.signed)


def seconds(key: str, label: str) -> Column:
    """A column of durations."""
    return Column(key, label, formats.duration)
