"""Budgets: the rungs of the ladder, Hyperband's brackets, and what a search will cost.

A budget is an integer rung 1..R; a rung stands for a data fraction and a number of epochs, and its
cost is counted in samples seen. With a fixed number of trials the size of every rung is known in
advance: `N_{k+1} = max(1, floor(N_k / eta))`, so the cost of a search in which nothing is stopped
early is known before it starts.

Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization", JMLR 2018,
Algorithm 1; Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llp.records import Rung


def ladder(data_fractions: Sequence[float], epochs: Sequence[int], num_train: int) -> list[Rung]:
    """The rungs for a training set of `num_train` images.

    Args:
        data_fractions: Share of the training set per rung, in (0, 1], not decreasing.
        epochs: Epochs per rung, as many as fractions.
        num_train: Training images (validation excluded).

    >>> [rung.samples_seen for rung in ladder([0.1, 1.0], [5, 5], 1000)]
    [500, 5000]
    """
    return [
        Rung(k, fraction, max(1, round(fraction * num_train)), length)
        for k, (fraction, length) in enumerate(zip(data_fractions, epochs, strict=True), start=1)
    ]


@dataclass(frozen=True)
class Bracket:
    """A group of trials that are halved among themselves.

    Attributes:
        first_rung: Rung on which its trials start.
        size: Number of trials that start in it.
    """

    first_rung: int
    size: int


def hyperband_brackets(num_rungs: int, reduction_factor: int) -> list[Bracket]:
    """Hyperband's brackets over integer rungs, most aggressive first.

    With `s` halvings left a bracket starts `ceil((s_max + 1) / (s + 1) * eta^s)` trials on rung
    `num_rungs - s`, where `s_max + 1 = num_rungs`.

    >>> [(b.size, b.first_rung) for b in hyperband_brackets(5, 3)]
    [(81, 1), (34, 2), (15, 3), (8, 4), (5, 5)]
    """
    return [
        Bracket(
            first_rung=num_rungs - s,
            size=math.ceil(num_rungs / (s + 1) * reduction_factor**s - 1e-9),
        )
        for s in range(num_rungs - 1, -1, -1)
    ]


def fill_brackets(brackets: Sequence[Bracket], num_trials: int) -> list[Bracket]:
    """`brackets` repeated in order until they hold exactly `num_trials`; the last may be cut.

    >>> fill_brackets([Bracket(1, 3), Bracket(2, 2)], 6)
    [Bracket(first_rung=1, size=3), Bracket(first_rung=2, size=2), Bracket(first_rung=1, size=1)]
    """
    filled: list[Bracket] = []
    left = num_trials
    while left > 0:
        for bracket in brackets:
            if left > 0:
                filled.append(Bracket(bracket.first_rung, min(bracket.size, left)))
                left -= filled[-1].size
    return filled


def rung_sizes(bracket: Bracket, num_rungs: int, reduction_factor: int) -> dict[int, int]:
    """Rung -> number of trials of `bracket` that reach it when none fails or is stopped.

    At least one trial goes on, so that every bracket produces a result on the top rung.

    >>> rung_sizes(Bracket(1, 20), 3, 3)
    {1: 20, 2: 6, 3: 2}
    """
    sizes = {bracket.first_rung: bracket.size}
    for rung in range(bracket.first_rung + 1, num_rungs + 1):
        sizes[rung] = max(1, sizes[rung - 1] // reduction_factor)
    return sizes
