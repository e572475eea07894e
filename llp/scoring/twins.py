"""Trials that are in more than one table: counted once, or noise would earn weight.

A twin of a finished trial among the trials that a weight is tested on gives the answer away: any
column that tells trials apart then predicts results.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd

from llp.scoring.roles import Roles

DIGITS = 10
"""Numbers are compared to so many digits: files do not keep the last ones."""


def without_twins(
    table: pd.DataFrame, roles: Roles, earlier: Sequence[tuple[pd.DataFrame, Roles]]
) -> pd.DataFrame:
    """The rows of `table` that are in none of the `earlier` tables.

    A row is a twin when it equals another in all columns that both tables have a role for. Rows
    that are alike within one table stay.

    Args:
        table: Has the columns that `roles` names.
        roles: Of `table`.
        earlier: Tables with their roles.
    """
    keep = np.ones(len(table), dtype=bool)
    for other, other_roles in earlier:
        have = set(other_roles.columns)
        present = {str(name) for name in other.columns}
        # The target of the table to be ranked may be new there, and all missing.
        shared = [name for name in roles.columns if name in have and name in present]
        if roles.primary not in shared or (roles.target and roles.target not in shared):
            continue
        seen = set(_keys(other, shared))
        keep &= np.array([key not in seen for key in _keys(table, shared)], dtype=bool)
    return table if keep.all() else table[keep]


def twins_sentence(count: int) -> str:
    """What is said about rows that were left out; empty for none."""
    if not count:
        return ""
    one = count == 1
    return (
        f" {count} row{'s' * (not one)} {'is' if one else 'are'} in an earlier table already and "
        f"count{'s' * one} once."
    )


def _keys(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple[Hashable, ...]]:
    table = table.rename(columns=str)
    return list(zip(*([_plain(v) for v in table[name].tolist()] for name in columns), strict=True))


def _plain(value: object) -> str:
    """A value as text: equal numbers are equal whatever their type, all missing values are."""
    if value is None or value is pd.NA or value is pd.NaT:
        return "nan"
    try:
        return f"{float(value):.{DIGITS}g}"  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return repr(value)
