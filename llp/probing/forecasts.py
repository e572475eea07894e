"""Forecasts as values: quantile tables with what is asked of them.

A *table* holds a distribution as its quantiles at `curve_prior.LEVELS`, [num_curves, num_levels].
Between two levels the logit of the distribution function is linear, and beyond the outermost it
goes on in line, so that there is always a density.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from llp.probing.curve_features import Floats
from llp.probing.curve_prior import LEVELS, LOGITS


@dataclass(frozen=True)
class Forecast:
    """The distribution of each curve's result at the horizon.

    Rows of curves of which nothing is known, themselves or their peers, are NaN.

    Attributes:
        costs: [num_curves, num_levels], quantiles at `curve_prior.LEVELS` of the result, its sign
            changed where higher is better; strictly increasing along a row, not yet clipped.
        bounds: The metric's range, in its own unit.
        higher_is_better: Whether higher values of the metric are better.
    """

    costs: Floats
    bounds: tuple[float, float] = (-np.inf, np.inf)
    higher_is_better: bool = False

    def __len__(self) -> int:
        return len(self.costs)

    @property
    def mean(self) -> Floats:
        """[num_curves], the point forecast: the mean of the middle fifth of the distribution.

        The plain mean of a forecast that has divergence in its tail says more about that tail than
        about the curve: on curves of tasks left out, its absolute error is a third larger.
        """
        middle = (LEVELS > 0.395) & (LEVELS < 0.605)
        return np.asarray(self._metric(self.costs[:, middle]).mean(axis=1))

    @property
    def median(self) -> Floats:
        """[num_curves]."""
        return np.asarray(self.quantile([0.5])[0])

    def quantile(self, levels: ArrayLike) -> Floats:
        """[num_levels, num_curves], quantiles of the metric, within its range.

        Args:
            levels: Between 0 and 1, exclusive.

        Raises:
            ValueError: A level is outside (0, 1).
        """
        wanted = np.atleast_1d(np.asarray(levels, dtype=float))
        if not ((wanted > 0) & (wanted < 1)).all():
            raise ValueError(f"quantile levels must lie between 0 and 1, got {wanted.tolist()}")
        logits = np.log(wanted) - np.log1p(-wanted)
        wanted = -logits if self.higher_is_better else logits
        return np.asarray(self._metric(at_logits(self.costs, wanted)).T)

    def probability_better_than(self, value: ArrayLike) -> Floats:
        """[num_curves], probability that the result is better than `value` (one, or per curve)."""
        limit = np.broadcast_to(np.asarray(value, dtype=float), (len(self),))
        sign = -1.0 if self.higher_is_better else 1.0
        best, worst = self.bounds[::-1] if self.higher_is_better else self.bounds
        cost = sign * limit
        found = expit(logit_below(self.costs, cost)[0])
        found = np.where(cost <= sign * best, 0.0, np.where(cost > sign * worst, 1.0, found))
        return np.where(np.isnan(limit) | np.isnan(self.costs[:, 0]), np.nan, found)

    def log_density(self, values: ArrayLike) -> Floats:
        """[num_curves], log density of results [num_curves], per unit of the metric."""
        sign = -1.0 if self.higher_is_better else 1.0
        logit, slope = logit_below(self.costs, sign * np.asarray(values, dtype=float))
        return np.asarray(-np.logaddexp(0, -logit) - np.logaddexp(0, logit) + np.log(slope))

    def _metric(self, costs: Floats) -> Floats:
        return np.clip(-costs if self.higher_is_better else costs, *self.bounds)


def at_logits(table: Floats, logits: Floats) -> Floats:
    """[num_curves, num_wanted], quantiles at logits of levels; beyond the table's ends in line."""
    left = np.clip(np.searchsorted(LOGITS, logits) - 1, 0, len(LOGITS) - 2)
    step = (logits - LOGITS[left]) / (LOGITS[left + 1] - LOGITS[left])
    return np.asarray(table[:, left] * (1 - step) + table[:, left + 1] * step)


def logit_below(table: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Logit of the probability below `values` [num_curves], and its slope; the inverse."""
    rows = np.arange(len(table))
    left = np.clip((table < values[:, None]).sum(axis=1) - 1, 0, table.shape[1] - 2)
    start, gap = table[rows, left], table[rows, left + 1] - table[rows, left]
    slope = (LOGITS[left + 1] - LOGITS[left]) / gap
    return LOGITS[left] + (values - start) * slope, slope


def pooled(tables: Floats) -> Floats:
    """The quantile table of an equal mixture of tables [num_tables, num_levels]."""
    tables = tables[np.isfinite(tables).all(axis=1)]
    if not len(tables):
        return np.full(len(LEVELS), np.nan)
    edges = np.concatenate([[0.0], (LEVELS[1:] + LEVELS[:-1]) / 2, [1.0]])
    weights = np.tile(np.diff(edges), len(tables)) / len(tables)
    flat = tables.ravel()
    order = np.argsort(flat, kind="stable")
    return np.interp(LEVELS, np.cumsum(weights[order]) - weights[order] / 2, flat[order])
