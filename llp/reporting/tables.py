"""DataFrames as tables of text cells with sort keys, ready for the template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from llp.reporting import formats

MAX_ROWS = 500  # keeps a page of a thousand trials under 2 MB; the ledger has every row


@dataclass(frozen=True)
class Column:
    """One column: the frame's column, the heading, and how a value is written."""

    key: str
    label: str
    format: Callable[[Any], str] = formats.number
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A value as shown, and as sorted (empty sorts last)."""

    text: str
    sort: str


@dataclass(frozen=True)
class Table:
    """A table as shown.

    Attributes:
        columns: Headings.
        rows: Cells, in the order shown when no script runs.
        omitted: Rows left out because there are more than `MAX_ROWS`.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    omitted: int = 0


def finite(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows of `frame` in which all of `columns` are finite numbers."""
    keep = [all(map(formats.is_number, row)) for row in frame[list(columns)].to_numpy().tolist()]
    return frame[pd.Series(keep, index=frame.index, dtype=bool)]


def text(key: str, label: str) -> Column:
    """A column of words."""
    return Column(key, label, lambda value: formats.clean(formats.number(value)), numeric=False)


def table(frame: pd.DataFrame, columns: Sequence[Column], *, limit: int = MAX_ROWS) -> Table:
    """The first `limit` rows of `frame`; a column the frame does not have is left out."""
    present = [column for column in columns if column.key in frame.columns]
    records = frame.head(limit).to_dict("records")
    rows = tuple(tuple(_cell(record[c.key], c) for c in present) for record in records)
    return Table(tuple(present), rows, max(len(frame) - limit, 0))


def _cell(value: Any, column: Column) -> Cell:
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        value = None
    if value is None:
        return Cell(formats.MISSING, "")
    shown = column.format(value)
    if formats.is_number(value):
        return Cell(shown, repr(float(value)))
    return Cell(shown, formats.clean(value).lower())
