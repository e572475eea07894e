"""Hyperparameters as coordinates in which distances between configurations mean something.

Positive numbers that span a factor of 10 or more enter as logarithms; the learning rate as the
effective one, learning_rate / (1 - momentum) / batch_size, as far as those are searched. Categories
enter as indicators. An inactive or missing value becomes the mean, with an indicator beside it.
Numbers are standardised over the pooled studies and cut at three standard deviations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from llp.scoring.ranks import Array

MAX_CATEGORIES = 12
CATEGORY_DISTANCE = 1.7
"""Distance between two categories, in standard deviations of a number."""
LEARNING_RATES = ("learning_rate", "lr", "init_lr", "learning_rate_init", "base_lr", "initial_lr")
MOMENTA = ("momentum", "sgd_momentum")
BATCH_SIZES = ("batch_size", "batchsize", "bs", "train_batch_size")


def coordinates(
    tables: Sequence[pd.DataFrame], columns: Sequence[str]
) -> tuple[list[dict[str, Array]], list[str]]:
    """Per table, hyperparameter -> its coordinates [rows, k]; and the names of those that vary.

    Columns that no table holds, that are constant, or that look like identifiers (text with more
    than 12 values, nearly all distinct) give none.
    """
    sizes = np.cumsum([len(table) for table in tables])[:-1]
    pooled = {
        name: pd.concat(
            [_column(table, name) for table in tables],
            ignore_index=True,
        )
        for name in columns
        if any(name in table for table in tables)
    }
    numeric: dict[str, Array] = {}
    blocks: dict[str, Array] = {}
    for name, values in pooled.items():
        number = as_number(values)
        if number is None:
            block = _categories(values)
            if block is not None:
                blocks[name] = block
        else:
            numeric[name] = _log_if_wide(number)
    numeric = _effective_rate(numeric, pooled)
    for name, number in numeric.items():
        block = _standardised(number)
        if block is not None:
            blocks[name] = block
    names = [name for name in pooled if name in blocks]
    parts = {name: np.split(blocks[name], sizes) for name in names}
    return [{name: parts[name][i] for name in names} for i in range(len(tables))], names


def basis(tables: Sequence[pd.DataFrame], columns: Sequence[str]) -> tuple[list[Array], list[str]]:
    """A quadratic basis: one matrix [rows, p] per table, and the names of the p regressors.

    The coordinates, and the square of every number; each column has mean 0 and variance 1 over the
    pooled studies.
    """
    blocks, names = coordinates(tables, columns)
    sizes = np.cumsum([len(table) for table in tables])[:-1]
    matrix: dict[str, Array] = {}
    for name in names:
        block = np.concatenate([own[name] for own in blocks])
        for k in range(block.shape[1]):
            matrix[name if k == 0 else f"{name}.{k}"] = block[:, k]
        if len(np.unique(block[:, 0])) > 2:
            matrix[f"{name}^2"] = block[:, 0] ** 2
    scaled = {name: x - x.mean() for name, x in matrix.items() if np.ptp(x) > 1e-12}
    regressors = [x / x.std() for x in scaled.values()]
    total = sum(len(table) for table in tables)
    pooled = np.stack(regressors, axis=1) if regressors else np.zeros((total, 0))
    return np.split(pooled, sizes), list(scaled)


def as_number(values: pd.Series) -> Array | None:
    """Floats when every present value is a number (or a bool), else None; infinite becomes NaN."""
    present = values.notna()
    try:
        number = pd.to_numeric(values, errors="coerce")
        out = np.asarray(number.to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError):
        return None
    if np.isnan(out[present.to_numpy()]).any():
        return None
    return np.where(np.isfinite(out), out, np.nan)


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table:
        return pd.Series(np.nan, index=table.index, dtype=object)
    return table[name].astype(object)


def _log_if_wide(number: Array) -> Array:
    positive = number[number > 0]
    if len(positive) == 0 or np.nanmin(number) < 0 or positive.max() < 10 * positive.min():
        return number
    floor = positive.min() / 10 if (number == 0).any() else positive.min()
    with np.errstate(invalid="ignore"):
        return np.asarray(np.log10(np.maximum(number, max(floor, np.finfo(float).tiny))))


def _named(numeric: dict[str, Array], names: Sequence[str]) -> str | None:
    """The column whose name, without a prefix such as `hp.`, is one of `names`."""
    for column in numeric:
        if column.lower().replace("/", ".").rsplit(".", 1)[-1] in names:
            return column
    return None


def _effective_rate(numeric: dict[str, Array], pooled: dict[str, pd.Series]) -> dict[str, Array]:
    rate_column = _named(numeric, LEARNING_RATES)
    raw = as_number(pooled[rate_column]) if rate_column is not None else None
    if rate_column is None or raw is None:
        return numeric
    if not (np.isfinite(raw) & (raw > 0)).any() or (raw <= 0).any():
        return numeric
    rate = np.log10(raw)
    for names in (MOMENTA, BATCH_SIZES):
        column = _named(numeric, names)
        other = as_number(pooled[column]) if column is not None else None
        if other is not None:
            divisor = 1 - other if names is MOMENTA else other
            usable = np.isfinite(divisor) & (divisor > 0)
            if usable.any():
                middle = float(np.median(divisor[usable]))
                rate = rate - np.log10(np.where(usable, divisor, middle))
    return {**numeric, rate_column: rate}


def _categories(values: pd.Series) -> Array | None:
    text = values.astype(str).where(values.notna())
    counts = text.value_counts()
    if len(counts) < 1 or (len(counts) > MAX_CATEGORIES and len(counts) > 0.5 * text.notna().sum()):
        return None
    kept = sorted(sorted(counts.index, key=lambda c: (-counts[c], c))[:MAX_CATEGORIES])
    block = np.stack([(text == category).to_numpy(dtype=np.float64) for category in kept], axis=1)
    if (block == block[0]).all():
        return None
    return np.asarray(block * CATEGORY_DISTANCE / np.sqrt(2))


def _standardised(number: Array) -> Array | None:
    known = np.isfinite(number)
    finite = number[known]
    if len(finite) == 0:
        return None
    scale = float(finite.std())
    varies = np.isfinite(scale) and scale > 1e-12 * max(1.0, float(np.abs(finite).max()))
    columns = []
    if varies:
        with np.errstate(invalid="ignore"):
            columns.append(np.where(known, (number - finite.mean()) / scale, 0.0).clip(-3, 3))
    if not known.all():
        columns.append(known * 1.0)
    return np.stack(columns, axis=1) if columns else None
