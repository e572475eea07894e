"""How well rankings agree with finished trials: tau, regret, and gains with their intervals.

All comparisons are made within studies: a ranking of one study's trials says nothing about those of
another. Taus of several studies are averaged by their numbers of finished trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from llp.records import Interval
from llp.scoring.ranks import Array, pair_means, regret, tau, tau_interval

LEVEL = 0.9


@dataclass(frozen=True)
class Gain:
    """Cross-validated gain in tau of one ranking over another.

    Attributes:
        value: Mean gain.
        interval: Two-sided 90 %; its lower end is the one-sided 95 % limit.
        shuffled: Mean gain of the same block shuffled over trials; NaN for h.
    """

    value: float
    interval: Interval
    shuffled: float = float("nan")


@dataclass(frozen=True)
class Ranking:
    """How well one way of ranking agrees with the target.

    Attributes:
        name: `validation`, `T1`, `T1+h`, `T1+T2`, `T1+h+T2`, `T1+h+shuffled T2`.
        tau: Kendall's tau-b with the target; mean over studies.
        interval: 90 % bootstrap interval over trials.
        regret_at_1: Best target minus target of the first-ranked, in percentage points of a
            fraction or in the target's own unit; mean over studies.
        regret_at_5: The same for the best of the first five.
        num_trials: Trials compared.
    """

    name: str
    tau: float
    interval: Interval
    regret_at_1: float
    regret_at_5: float
    num_trials: int


def ranking(
    name: str, scores: Array, target: Array, study: NDArray[np.int64], *, seed: int = 0
) -> Ranking:
    """The agreement of `scores` with `target`, both [m], within the studies of `study` [m]."""
    taus, halves, ones, fives, counts = [], [], [], [], []
    for rows in _studies(study, minimum=2):
        one = tau(scores[rows], target[rows])
        if np.isnan(one):
            continue
        interval = tau_interval(scores[rows], target[rows], level=LEVEL, seed=seed)
        taus.append(one)
        halves.append((one - interval.low, interval.high - one))
        ones.append(regret(scores[rows], target[rows], 1))
        fives.append(regret(scores[rows], target[rows], 5))
        counts.append(len(rows))
    if not taus:
        nan = float("nan")
        return Ranking(name, nan, Interval(-1.0, 1.0, LEVEL), nan, nan, len(scores))
    weight = np.array(counts) / sum(counts)
    middle = float(weight @ np.array(taus))
    low, high = np.sqrt((weight**2) @ (np.array(halves) ** 2))
    return Ranking(
        name,
        middle,
        Interval(max(-1.0, middle - float(low)), min(1.0, middle + float(high)), LEVEL),
        float(np.mean(ones)),
        float(np.mean(fives)),
        len(scores),
    )


def gain(new: Array, old: Array, target: Array, study: NDArray[np.int64]) -> Gain:
    """Gain in tau-a of `new` over `old`, with the normal interval of the U-statistic."""
    items = [
        pair_means(new[rows], target[rows]) - pair_means(old[rows], target[rows])
        for rows in _studies(study, minimum=2)
    ]
    if not items:
        return Gain(0.0, Interval(-1.0, 1.0, LEVEL))
    item = np.concatenate(items)
    # Pairs share trials: the variance of a mean over pairs is 4 times that over trials.
    half = -float(ndtri((1 - LEVEL) / 2)) * 2 * float(item.std(ddof=1)) / np.sqrt(len(item))
    value = float(item.mean())
    return Gain(value, Interval(value - half, value + half, LEVEL))


def effective_studies(counts: Sequence[int]) -> float:
    """Effective number of studies behind a pooled estimate, (sum m)^2 / sum m^2 (Kish 1965).

    >>> effective_studies([30, 30]), effective_studies([])
    (2.0, 0.0)
    """
    total = float(sum(counts))
    return total**2 / sum(count**2 for count in counts) if total else 0.0


def _studies(study: NDArray[np.int64], *, minimum: int) -> list[NDArray[np.int64]]:
    rows = [np.flatnonzero(study == number) for number in np.unique(study)]
    return [own for own in rows if len(own) >= minimum]
