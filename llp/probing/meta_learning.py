"""Meta-learned warm start: which configurations to try first, from many finished studies.

Each study gives a surrogate: a Gaussian process on its configurations (unit cube) and the normal
scores of their ranks, so that studies of different difficulty count alike. The first `count`
configurations are a greedy portfolio, a set that is judged by its best: each next one is what adds
most to the best expected score, averaged over the studies, so that they cover each other's
failures.

All studies weigh alike. Weights from features of dataset and model (size, classes, balance, pixel
statistics, accuracy of cheap classifiers) were measured and made nothing better, although near
datasets do rank configurations alike: `tests/benchmarks/meta.py` keeps both.

Wistuba, Schilling, Schmidt-Thieme, "Sequential model-free hyperparameter tuning", ICDM 2015; Feurer
et al., "Auto-Sklearn 2.0: hands-free AutoML via meta-learning", JMLR 2022, section 3.2 (portfolio).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import norm, rankdata

Floats = NDArray[np.float64]
LENGTHS = (0.15, 0.3, 0.6, 1.2)
"""Length scales of the surrogate, in root mean squared distance per coordinate."""
NOISES = (0.05, 0.2, 0.5, 1.0)
"""Noise variances by the variance of the function."""
MIN_TRIALS = 5
"""A study with fewer says too little."""


@dataclass(frozen=True)
class PastStudy:
    """A finished study as numbers.

    Attributes:
        configurations: [num_trials, num_coordinates], in the unit cube.
        quality: [num_trials], larger is better; only their order counts. -inf: failed.
    """

    configurations: Floats
    quality: Floats


def propose(studies: Sequence[PastStudy], candidates: Floats, count: int) -> list[int]:
    """The candidates to try first, in order.

    Args:
        studies: At least one.
        candidates: [num_candidates, num_coordinates].
        count: How many; fewer when there are fewer candidates.

    Raises:
        ValueError: No study, or one with fewer than `MIN_TRIALS` trials.
    """
    if not studies:
        raise ValueError("no studies")
    if min(len(study.quality) for study in studies) < MIN_TRIALS:
        raise ValueError(f"a study has fewer than {MIN_TRIALS} trials")
    expected = np.stack(
        [
            surrogate_mean(study.configurations, normal_scores(study.quality), candidates)
            for study in studies
        ]
    )
    return portfolio(expected, np.full(len(studies), 1 / len(studies)), count)


def normal_scores(quality: Floats) -> Floats:
    """Ranks as quantiles of the standard normal distribution, larger is better; ties share one."""
    return np.asarray(norm.ppf((rankdata(quality) - 0.5) / len(quality)), dtype=np.float64)


def surrogate_mean(known: Floats, values: Floats, at: Floats) -> Floats:
    """Posterior mean at `at` of a Gaussian process with a Matern 5/2 kernel.

    Length scale and noise are those of highest marginal likelihood on a small grid, the variance of
    the function is its closed form there (Rasmussen & Williams, 2006, section 5.4.1).

    Args:
        known: [num_trials, num_coordinates].
        values: [num_trials], of mean 0.
        at: [num_points, num_coordinates].
    """
    size = len(values)
    distances = _distances(known, known)
    best, chosen = -np.inf, None
    for length in LENGTHS:
        kernel = _matern(distances / length)
        for noise in NOISES:
            factor = cho_factor(kernel + noise * np.eye(size), lower=True)
            weights = cho_solve(factor, values)
            variance = max(float(values @ weights) / size, 1e-12)
            fit = -0.5 * size * np.log(variance) - float(np.log(np.diag(factor[0])).sum())
            if fit > best:
                best, chosen = fit, (length, weights)
    assert chosen is not None
    length, weights = chosen
    return np.asarray(_matern(_distances(at, known) / length) @ weights, dtype=np.float64)


def portfolio(expected: Floats, weights: Floats, count: int) -> list[int]:
    """Candidates that, chosen greedily, raise the weighted mean of the best expected value most.

    Greedy choice reaches at least 1 - 1/e of what the best set adds (Nemhauser, Wolsey, Fisher,
    1978). Equals go by the candidate's own weighted mean, then by its place.

    Args:
        expected: [num_studies, num_candidates], larger is better.
        weights: [num_studies], not negative.
        count: Size of the portfolio; at most all candidates are chosen.
    """
    alone = weights @ expected
    reached = np.full(len(expected), -np.inf)
    chosen: list[int] = []
    for _ in range(min(count, expected.shape[1])):
        gained = weights @ np.maximum(reached[:, None], expected)
        left = np.setdiff1d(np.arange(expected.shape[1]), chosen)
        order = np.lexsort((left, -alone[left], -np.round(gained[left], 12)))
        chosen.append(int(left[order[0]]))
        reached = np.maximum(reached, expected[:, chosen[-1]])
    return chosen


def _distances(a: Floats, b: Floats) -> Floats:
    squares = ((a[:, None] - b[None]) ** 2).mean(axis=-1)
    return np.asarray(np.sqrt(squares), dtype=np.float64)


def _matern(scaled: Floats) -> Floats:
    root = np.sqrt(5.0) * scaled
    return np.asarray((1 + root + root**2 / 3) * np.exp(-root), dtype=np.float64)
