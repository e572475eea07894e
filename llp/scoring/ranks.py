"""Ranks and what is made of them: normal scores, Kendall's tau with an interval, and regret.

Normal scores follow Blom: rank r of n becomes the normal quantile of (r - 3/8) / (n + 1/4), ties
sharing their mean rank. They make a signal comparable across studies and immune to any monotone
transformation. Tau is tau-b (ties corrected).

Source: G. Blom, Statistical Estimates and Transformed Beta-Variables, 1958; M. Kendall, Biometrika
1945 (tau-b).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import kendalltau, rankdata
from threadpoolctl import threadpool_limits

from llp.records import Interval

Array = NDArray[np.float64]


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which linear algebra uses one thread.

    The matrices here are small: on two busy cores more threads took ten times the CPU time.
    """
    with threadpool_limits(limits=1):
        yield


def normal_scores(values: Array, band: NDArray[np.int64] | None = None) -> Array:
    """Normal scores of the ranks of `values` along the last axis, higher value = higher score.

    With `band`, ranks are lexicographic: everything in a lower band number comes before everything
    in a higher one, whatever its value. NaN shares the worst rank.

    Args:
        values: Shape [..., n].
        band: Shape [n], 0 = best.

    >>> normal_scores(np.array([1.0, np.nan, 3.0])).round(2).tolist()
    [0.0, -0.87, 0.87]
    """
    num = values.shape[-1]
    if num == 0:
        return np.zeros(values.shape)
    key = np.where(np.isnan(values), -np.inf, values)
    if band is not None and np.ptp(band) > 0:
        key = rankdata(key, axis=-1) / (num + 1.0) - band
        key = np.where(np.isnan(values), -np.inf, key)
    ranks = rankdata(key, axis=-1)
    return np.asarray(ndtri((ranks - 0.375) / (num + 0.25)), dtype=np.float64)


def tau(scores: Array, target: Array) -> float:
    """Kendall's tau-b of `scores` with `target`; NaN when either is constant or n < 2."""
    if len(scores) < 2:
        return float("nan")
    return float(kendalltau(scores, target).statistic)


def tau_interval(
    scores: Array, target: Array, *, level: float = 0.9, num_draws: int = 1000, seed: int = 0
) -> Interval:
    """Bootstrap interval of tau-b over trials.

    Over 400 trials the normal interval of the U-statistic stands in for the bootstrap. When fewer
    than half of the resamples have a tau at all (3 trials, constant ranks) it is [-1, 1].
    """
    num = len(scores)
    if num < 3 or np.isnan(tau(scores, target)):
        return Interval(-1.0, 1.0, level)
    if num > 400:
        items = pair_means(scores, target)
        half = -float(ndtri((1 - level) / 2)) * 2 * items.std() / np.sqrt(num)
        middle = tau(scores, target)
        return Interval(max(-1.0, middle - half), min(1.0, middle + half), level)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num, np.full(num, 1 / num), size=num_draws).astype(np.float64)
    signs_x = np.sign(scores[:, None] - scores[None, :])
    signs_y = np.sign(target[:, None] - target[None, :])

    def pairs(matrix: Array) -> Array:
        return np.asarray(((counts @ matrix) * counts).sum(axis=1), dtype=np.float64)

    scale = np.sqrt(pairs(np.abs(signs_x)) * pairs(np.abs(signs_y)))
    usable = scale > 0
    if usable.mean() < 0.5:
        return Interval(-1.0, 1.0, level)
    draws = pairs(signs_x * signs_y)[usable] / scale[usable]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def pair_means(scores: Array, target: Array) -> Array:
    """Per trial, the mean concordance (+1, 0, -1) with every other trial; their mean is tau-a."""
    num = len(scores)
    means = np.empty(num)
    for start in range(0, num, 500):
        rows = slice(start, start + 500)
        concordant = np.sign(scores[rows, None] - scores[None, :]) * np.sign(
            target[rows, None] - target[None, :]
        )
        means[rows] = concordant.sum(axis=1) / max(1, num - 1)
    return means


def regret(scores: Array, target: Array, top: int) -> float:
    """Best target minus the best among the `top` ranked first by `scores`, in percentage points.

    Targets are fractions in [0, 1]; for targets beyond that the unit is the target's own. Scores
    that tie at the cut are resolved by their order.

    >>> regret(np.array([3.0, 2.0, 1.0]), np.array([0.90, 0.91, 0.5]), 1)
    1.0
    """
    if len(scores) == 0:
        return float("nan")
    first = np.argsort(-scores, kind="stable")[:top]
    unit = 100.0 if np.abs(target).max() <= 1 else 1.0
    return round(float(unit * (target.max() - target[first].max())), 10)
