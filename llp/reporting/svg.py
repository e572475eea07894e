"""Matplotlib figures as small, themable, accessible SVG that can stand inside an HTML page.

Several SVGs on one page share one name space of ids and styles, and matplotlib repeats both. So
`inline` keeps only the ids something refers to, puts the figure's key before them, drops metadata,
namespaces and the global style sheet, rounds coordinates, and turns the palette's colours into CSS
variables, so that one drawing serves light, dark and print. Text stays text: it can be searched,
selected and read aloud.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llp.reporting import formats
from llp.reporting.palette import LIGHT

PANEL = (3.3, 2.35)  # inches; small multiples, readable at 400 px without scrolling
BARS = 4.7  # inches wide; fits 400 px as well
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llp",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "axes.edgecolor": LIGHT["faint"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.6,
    "axes.unicode_minus": True,
}
_ROLES = {colour: role for role, colour in LIGHT.items()}
_COLOUR = re.compile("|".join(_ROLES))
_REFERENCE = re.compile(r"#([\w.-]+)")
_DECIMAL = re.compile(r"-?\d+\.\d+")
_FONT_SIZE = re.compile(r"([\d.]+)px")


class _Percent(Formatter):
    """Shares in percent, with as few decimals as tell all ticks apart from their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self._ticks: list[float] = []

    def set_locs(self, locs: list[float]) -> None:
        self._ticks = [float(tick) for tick in locs]

    def __call__(self, x: float, pos: int | None = None) -> str:
        ticks = [100 * tick for tick in self._ticks]
        exact = (d for d in (0, 1, 2) if all(abs(round(t, d) - t) < 1e-6 for t in ticks))
        return formats.percent(x, next(exact, 3))


@contextmanager
def drawing() -> Iterator[None]:
    """The page's plot style while a figure is made; the user's matplotlib settings come back."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def canvas(
    size: tuple[float, float] = PANEL,
    *,
    left: float = 0.46,
    right: float = 0.14,
    bottom: float = 0.24,
    top: float = 0.24,
) -> tuple[Figure, Axes]:
    """An empty figure of `size` inches with one pair of axes inside these margins, in inches.

    Margins are given and not fitted: matplotlib's layout engines draw everything twice, and measure
    a font that the reader's browser may not have.
    """
    figure = Figure(figsize=size)
    width, height = size
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure, figure.add_subplot()


def label_width(labels: Iterable[str]) -> float:
    """Room in inches for the longest of `labels` at the usual size, with a gap."""
    font = FontProperties(family=_STYLE["font.family"], size=_STYLE["ytick.labelsize"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        widths = [
            TextToPath().get_text_width_height_descent(label, font, ismath=False)[0]
            for label in labels
        ]
    return 0.14 + max(widths, default=0.0) / 72


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """Makes the `x` or `y` axis logarithmic over `[low, high]`, labelled in plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    decades = high / low
    if decades < 30:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades >= 4 else "all"))
    else:
        axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: formats.number(value)))
    axis.set_minor_locator(NullLocator())


def percent_axis(axes: Axes, which: str = "y") -> None:
    """Labels the axis of a share in [0, 1] in percent."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(MaxNLocator(nbins=5))
    axis.set_major_formatter(_Percent())


def inline(figure: Figure, *, key: str, title: str, description: str = "") -> str:
    """`figure` as one `<svg>` element; every id in it starts with `key`.

    Args:
        figure: What to draw, made inside `drawing()`.
        key: Unique on the page: letters, digits and hyphens.
        title: Short name, for the `<title>` element.
        description: What a reader should see in it, for screen readers.

    Returns:
        Markup without namespaces, metadata, external references or fixed size.
    """
    return embedded(rendered(figure), key=key, title=title, description=description)


def rendered(figure: Figure) -> str:
    """`figure` as a whole SVG file, the same for the same drawing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return formats.UNPRINTABLE.sub("\ufffd", buffer.getvalue().decode("utf-8"))


def embedded(drawn: str, *, key: str, title: str, description: str = "") -> str:
    """What `inline` makes of a figure that was `rendered` already."""
    root = ElementTree.fromstring(drawn)
    used = set(_references(root))
    for parent in root.iter():
        for child in list(parent):
            if _tag(child) in {"metadata", "style"}:
                parent.remove(child)
    for element in root.iter():
        _simplify(element, key, used)
    label = formats.clean(f"{title}. {description}" if description else title)
    width = root.get("viewBox", "0 0 1 1").split()[2]
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "class": "plot",
        "style": f"--width:{float(width):.0f}",
        "role": "img",
        "aria-label": label,
    }
    heading = ElementTree.Element("title")
    heading.text = formats.clean(title)
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def _references(root: ElementTree.Element) -> Iterator[str]:
    for element in root.iter():
        for name, value in element.attrib.items():
            if name != "id" and ("url(#" in value or _local(name) == "href"):
                yield from _REFERENCE.findall(value)


def _simplify(element: ElementTree.Element, key: str, used: set[str]) -> None:
    element.tag = _tag(element)
    element.tail = None
    if element.tag != "text" and element.tag != "tspan":
        element.text = None
    attributes = {}
    for name, value in element.attrib.items():
        name = _local(name)
        if name == "id":
            if value not in used:
                continue
            value = f"{key}-{value}"
        elif name == "style":
            value = _restyle(value)
        elif name in {"d", "x", "y", "width", "height", "transform", "points"}:
            value = _DECIMAL.sub(_rounded, value)
            value = " ".join(value.split())
        if "url(#" in value or name == "href":
            value = _REFERENCE.sub(
                lambda match: f"#{key}-{match[1]}" if match[1] in used else match[0], value
            )
        attributes[name] = value
    for name in ("fill", "stroke"):  # hatches carry their colour as an attribute
        if attributes.get(name) in _ROLES:
            colour = _restyle(f"{name}:{attributes.pop(name)}")
            attributes["style"] = ";".join(filter(None, [attributes.get("style"), colour]))
    element.attrib = attributes


def _restyle(style: str) -> str:
    kept = []
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":  # the family is the page's; keep the size
            size = _FONT_SIZE.search(value)
            kept.append(f"font-size:{size[1]}px" if size else "")
        elif name and name != "font-family":
            kept.append(f"{name}:{value}")
    return _COLOUR.sub(lambda match: f"var(--{_ROLES[match[0]]})", ";".join(filter(None, kept)))


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _tag(element: ElementTree.Element) -> str:
    return _local(str(element.tag))


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]
