"""Hyperparameters as a small, sensible set of regressors.

Positive numbers that span a factor of 10 or more enter as logarithms; every number with a square;
the learning rate as the effective one, learning_rate / (1 - momentum) / batch_size, as far as those
are searched. Categories enter as indicators. An inactive or missing value becomes the mean.
All columns are standardised over the pooled studies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from llp.scoring.ranks import Array

MAX_CATEGORIES = 12


def basis(tables: Sequence[pd.DataFrame], columns: Sequence[str]) -> tuple[list[Array], list[str]]:
    """One matrix [rows, p] per table, and the names of the p regressors.

    Columns that no table holds, that are constant, or that look like identifiers (text with more
    than 12 values, nearly all distinct) give none.
    """
    sizes = np.cumsum([len(table) for table in tables])[:-1]
    pooled = {
        name: pd.concat(
            [
                table[name] if name in table else pd.Series(np.nan, index=table.index)
                for table in tables
            ],
            ignore_index=True,
        )
        for name in columns
        if any(name in table for table in tables)
    }
    regressors: dict[str, Array] = {}
    numeric = {}
    for name, values in pooled.items():
        number = _as_number(values)
        if number is None:
            regressors |= _categories(name, values)
        else:
            numeric[name] = _log_if_wide(number)
    numeric = _effective_rate(numeric, pooled)
    for name, number in numeric.items():
        linear = _standardised(number)
        if linear is None:
            continue
        regressors[name] = linear
        if len(np.unique(number[np.isfinite(number)])) > 2:
            square = _standardised(np.where(np.isfinite(number), linear**2, np.nan))
            if square is not None:
                regressors[f"{name}^2"] = square
    total = sum(len(table) for table in tables)
    matrix = np.stack(list(regressors.values()), axis=1) if regressors else np.zeros((total, 0))
    return np.split(matrix, sizes), list(regressors)


def _as_number(values: pd.Series) -> Array | None:
    """Floats when every present value is a number (or a bool), else None."""
    present = values.notna()
    number = pd.to_numeric(values, errors="coerce")
    if number[present].isna().any():
        return None
    out = np.asarray(number.to_numpy(dtype=np.float64, na_value=np.nan))
    return np.where(np.isfinite(out), out, np.nan)


def _log_if_wide(number: Array) -> Array:
    positive = number[number > 0]
    if len(positive) == 0 or np.nanmin(number) < 0 or positive.max() < 10 * positive.min():
        return number
    floor = positive.min() / 10 if (number == 0).any() else positive.min()
    return np.asarray(np.log10(np.where(np.isnan(number), np.nan, np.maximum(number, floor))))


def _effective_rate(numeric: dict[str, Array], pooled: dict[str, pd.Series]) -> dict[str, Array]:
    if "learning_rate" not in numeric:
        return numeric
    raw = _as_number(pooled["learning_rate"])
    if raw is None or not (np.isfinite(raw) & (raw > 0)).any() or (raw <= 0).any():
        return numeric
    rate = np.log10(raw)
    for name in ("momentum", "batch_size"):
        other = _as_number(pooled[name]) if name in numeric else None
        if other is not None:
            divisor = 1 - other if name == "momentum" else other
            usable = np.isfinite(divisor) & (divisor > 0)
            rate = rate - np.log10(np.where(usable, divisor, 1.0))
    return {**numeric, "learning_rate": rate}


def _categories(name: str, values: pd.Series) -> dict[str, Array]:
    text = values.astype(str).where(values.notna())
    counts = text.value_counts()
    if len(counts) > MAX_CATEGORIES and len(counts) > 0.5 * text.notna().sum():
        return {}
    kept = sorted(sorted(counts.index, key=lambda c: (-counts[c], c))[:MAX_CATEGORIES])
    out = {}
    for category in kept:
        column = _standardised(np.asarray((text == category).to_numpy(dtype=np.float64)))
        if column is not None:
            out[f"{name}={category}"] = column
    return out


def _standardised(number: Array) -> Array | None:
    finite = number[np.isfinite(number)]
    if len(finite) < 2:
        return None
    scale = finite.std()
    if not np.isfinite(scale) or scale <= 1e-12 * max(1.0, float(np.abs(finite).max())):
        return None
    return np.where(np.isfinite(number), (number - finite.mean()) / scale, 0.0)
