"""Columns of foreign tables as numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def numbers(column: pd.Series) -> NDArray[np.float64]:
    """A column as floats, shape [rows]; what is not a number is NaN, true is 1."""
    try:
        values = pd.to_numeric(column, errors="coerce")
        return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError):  # lists, dates and the like in an object column
        return np.array([_number(value) for value in column])


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return float("nan")
