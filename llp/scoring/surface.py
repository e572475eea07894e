"""A smooth function of the hyperparameters: its covariance, its features, and smoothed signals.

    k(x, x') = 1/2 sum_d w_d exp(-|x_d - x'_d|^2 / 2) + 1/2 exp(-sum_d w_d |x_d - x'_d|^2)

Half of the variance is a sum of effects of single hyperparameters, half is free (interactions,
cliffs). The relevances w (sum 1) are learnt from the *probes*, of which there are many, not from
the few finished trials: what moves the signals of a probe is likely to move the result. They are
the most probable ones (type-II maximum likelihood, by gradients).

Features come from a pivoted Cholesky factor, k(x, x') = phi(x) phi(x')' up to a small remainder, so
that a function with this covariance is a linear model with unit prior variance.

A *smoothed* signal is what the probes of all other trials of the study say about a trial's
configuration: the leave-one-out prediction of a Gaussian process fitted to the signal. Averaging
over neighbours takes out the noise of a single probe without any finished trial.

Source: C. Rasmussen and C. Williams, Gaussian Processes for Machine Learning, 2006, chapters 2, 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from llp.scoring.ranks import Array

MAX_SMOOTHED = 500
"""Probes that a smoothed signal is fitted to; others are predicted from these."""
MAX_LEARNT = 200
"""Probes that relevances and noise are learnt from."""
SPREAD = 2.0
"""Prior standard deviation of a relevance's logarithm."""
EVEN = 0.2
"""Part of the relevances that is spread evenly: none rules a hyperparameter out."""
LEAST_NOISE, MOST_NOISE, MAX_STEPS = 0.02, 20.0, 25
MAX_FEATURES = 100
MIN_SMOOTHED = 8


def covariance(a: Sequence[Array], b: Sequence[Array], relevance: Array) -> Array:
    """k(x, x') of all pairs, shape [len(a), len(b)]; `a` and `b` hold one block per dimension."""
    single, squared = 0.0, 0.0
    for x, y, weight in zip(a, b, relevance, strict=True):
        distance = _squared_distance(x, y)
        single = single + weight * np.exp(-distance / 2)
        squared = squared + weight * distance
    return np.asarray(0.5 * single + 0.5 * np.exp(-np.asarray(squared)))


def _squared_distance(a: Array, b: Array) -> Array:
    cross = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
    return np.asarray(np.maximum(cross, 0.0))


def features(blocks: Sequence[Array], relevance: Array, first: Sequence[int] = ()) -> Array:
    """phi, shape [rows, p], p <= 100: pivoted Cholesky of the covariance of all rows.

    Args:
        blocks: One [rows, k] array per dimension.
        relevance: One weight per dimension.
        first: Rows that become pivots before others (the finished trials).
    """
    num = len(blocks[0]) if blocks else 0
    left = np.ones(num)
    columns: list[Array] = []
    wanted = list(first[: MAX_FEATURES // 2])
    while len(columns) < min(MAX_FEATURES, num):
        pivot = wanted.pop(0) if wanted else int(left.argmax())
        if left[pivot] < 1e-6:
            if wanted:
                continue
            break
        own = [block[pivot : pivot + 1] for block in blocks]
        column = covariance(blocks, own, relevance)[:, 0]
        for other in columns:
            column = column - other * other[pivot]
        column = column / np.sqrt(left[pivot])
        columns.append(column)
        left = np.maximum(left - column**2, 0.0)
        if left.sum() < 1e-4 * num and not wanted:
            break
    return np.stack(columns, axis=1) if columns else np.zeros((num, 0))


def smoothed(
    blocks: Mapping[str, Array],
    signal: Array,
    rng: np.random.Generator,
    relevance: Array | None = None,
) -> tuple[Array, Array]:
    """The smoothed signal [n] (mean of the signal where nothing can be learnt), and relevances [d].

    Args:
        blocks: Hyperparameter -> coordinates [n, k].
        signal: Shape [n], finite.
        rng: For the trials to fit to, where there are more than 500, and 200 to learn from.
        relevance: Known from elsewhere; none: learnt here.
    """
    num, dims = len(signal), len(blocks)
    equal = np.full(dims, 1.0 / max(1, dims)) if relevance is None else relevance
    rows = _some(num, MAX_SMOOTHED, rng)
    middle = float(signal[rows].mean()) if num else 0.0
    variance = float(signal[rows].var()) if num else 0.0
    if dims == 0 or len(rows) < MIN_SMOOTHED or variance < 1e-12:
        return np.full(num, middle), equal
    arrays = list(blocks.values())
    few = rows if len(rows) <= MAX_LEARNT else rows[_some(len(rows), MAX_LEARNT, rng)]
    weights, noise = _learnt([block[few] for block in arrays], signal[few], relevance)
    own = [block[rows] for block in arrays]
    between = covariance(arrays, own, weights)
    inverse = np.linalg.inv(between[rows] + noise * np.eye(len(rows)))
    alpha = inverse @ (signal[rows] - middle)
    out = between @ alpha + middle
    # Leave-one-out in closed form: y_i - alpha_i / (K^-1)_ii.
    out[rows] = signal[rows] - alpha / np.diag(inverse)
    return out, (1 - EVEN) * weights + EVEN * equal if relevance is None else relevance


def _some(num: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    if num <= most:
        return np.arange(num)
    return np.asarray(np.sort(rng.choice(num, most, replace=False)))


def _learnt(blocks: Sequence[Array], signal: Array, relevance: Array | None) -> tuple[Array, float]:
    """Relevances [d] and variance of the noise over that of the signal, most probable ones.

    L-BFGS on the negative log evidence; logarithms of relevances are normal around their mean with
    standard deviation 2. A given relevance stays as it is.
    """
    num, dims = len(signal), len(blocks)
    if np.ptp(signal) < 1e-9:
        return (np.full(dims, 1.0 / dims) if relevance is None else relevance), 1.0
    squared = np.stack([_squared_distance(block, block) for block in blocks])
    single = np.exp(-squared / 2)
    variance = float(signal.var())
    y = (signal - signal.mean()) / np.sqrt(variance)

    def unpacked(free: Array) -> tuple[Array, float]:
        weights = np.exp(free[:dims] - free[:dims].max())
        return weights / weights.sum(), float(np.exp(free[dims]))

    def loss(free: Array) -> tuple[float, Array]:
        weights, noise = unpacked(free)
        if relevance is not None:
            weights = relevance
        product = np.exp(-np.tensordot(weights, squared, 1))
        matrix = 0.5 * np.tensordot(weights, single, 1) + 0.5 * product
        matrix[np.diag_indices(num)] += noise
        root = np.linalg.inv(np.linalg.cholesky(matrix))
        inverse = root.T @ root
        alpha = inverse @ y
        value = 0.5 * float(y @ alpha) - float(np.log(np.diag(root)).sum())
        slope = 0.5 * (inverse - np.outer(alpha, alpha))
        gradient = np.zeros(dims + 1)
        gradient[dims] = noise * np.trace(slope)
        if relevance is None:
            each = 0.5 * (
                np.tensordot(single, slope, 2) - np.tensordot(squared, slope * product, 2)
            )
            off = free[:dims] - free[:dims].mean()
            value += 0.5 * float(off @ off) / SPREAD**2
            gradient[:dims] = weights * (each - weights @ each) + off / SPREAD**2
        return value, gradient

    bounds = [(-5.0, 5.0)] * dims + [(np.log(LEAST_NOISE), np.log(MOST_NOISE))]
    start = np.array([0.0] * dims + [np.log(0.3)])
    options = {"maxiter": MAX_STEPS}
    best = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    weights, noise = unpacked(best.x)
    return weights if relevance is None else relevance, noise
