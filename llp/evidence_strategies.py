"""Ways of spending equal compute, replayed on configurations that were all trained fully.

Nothing is trained here: the full trainings of an evidence run have the validation accuracy after
every epoch, so whatever a strategy would have seen is known. Costs are in full trainings.

- *rank, then verify*: rank by a score of the probe, train the best few fully, take the best by
  validation accuracy.
- *successive halving* over the epochs of the full training: the best third goes on (reduction
  factor 3), from the shortest first rung that spends no more than the compute given.
- *short trainings, then verify*: everybody for two epochs of the full schedule, then as above.
- *random*: as many full trainings as the compute allows.

A draw is a random three quarters of the configurations with one of the seeds, the same for all
strategies, so that differences are paired. The truth is the mean test accuracy over all seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llp.records import Interval
from llp.reporting.evidence_rows import Strategy

NUM_DRAWS = 300
SHARE = 0.75
REDUCTION_FACTOR = 3
SHORT_EPOCHS = 2
VERIFIED = 3
LEVEL = 0.9

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """What is known of n configurations that were all trained fully.

    Attributes:
        curves: Validation accuracy `[n, seeds, epochs]`; NaN from where a training diverged.
        truth: Test accuracy `[n]`, mean over seeds; a configuration without one has the lowest.
        scores: Name -> score `[n]` by which a strategy ranks after the probe; higher is better.
        probe_cost: Of one probe, in full trainings.
        metrics_cost: Of measuring one configuration, in full trainings.
        with_metrics: The scores that need the metrics.
    """

    curves: Array
    truth: Array
    scores: dict[str, Array]
    probe_cost: float
    metrics_cost: float
    with_metrics: frozenset[str]


def compare(trained: Trained, *, seed: int = 0) -> tuple[Strategy, ...]:
    """All strategies, those that rank by a score first; the compute given is the first one's."""
    rng = np.random.default_rng(seed)
    num, num_seeds, _ = trained.curves.shape
    size = max(2, round(SHARE * num))
    regrets: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for number in range(NUM_DRAWS):
        chosen = rng.choice(num, size, replace=False)
        curves = trained.curves[chosen, number % num_seeds]
        truth = trained.truth[chosen]
        for name, (pick, cost) in _all(trained, chosen, curves, rng).items():
            regrets.setdefault(name, []).append(100 * float(truth.max() - truth[pick]))
            costs.setdefault(name, []).append(cost)
    first = np.array(next(iter(regrets.values())))
    found = []
    for name, values in regrets.items():
        margins = np.array(values) - first
        low, high = np.quantile(margins, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found.append(
            Strategy(
                name=name,
                cost=float(np.mean(costs[name])),
                regret=float(np.mean(values)),
                worse_by=float(margins.mean()),
                interval=Interval(float(low), float(high), LEVEL),
            )
        )
    return tuple(found)


def _all(
    trained: Trained, chosen: NDArray[np.int64], curves: Array, rng: np.random.Generator
) -> dict[str, tuple[int, float]]:
    """Strategy -> place in `chosen` of its choice, and its cost."""
    num, epochs = curves.shape
    found: dict[str, tuple[int, float]] = {}
    for name, score in trained.scores.items():
        metrics = trained.metrics_cost if name in trained.with_metrics else 0.0
        pick = verify(score[chosen], curves[:, -1], VERIFIED)
        found[f"probe, rank by {name}, verify {VERIFIED}"] = (
            pick,
            num * (trained.probe_cost + metrics) + VERIFIED,
        )
    compute = next(iter(found.values()))[1]
    rungs = halving_rungs(num, epochs, compute)
    found["successive halving, equal compute"] = (
        successive_halving(curves, rungs),
        halving_cost(num, epochs, rungs),
    )
    short = min(SHORT_EPOCHS, epochs)
    seen = curves[:, short - 1]
    start = num * short / epochs
    label = f"{short} epochs for everyone, then verify {VERIFIED}"
    found[label] = (verify(seen, curves[:, -1], VERIFIED), start + VERIFIED)
    more = max(1, int(compute - start))
    found[f"{short} epochs for everyone, then verify, equal compute"] = (
        verify(seen, curves[:, -1], more),
        start + more,
    )
    tried = rng.permutation(num)[: max(1, int(compute))]
    found["random, equal compute"] = (int(tried[best(curves[tried, -1])]), float(len(tried)))
    return found


def best(values: Array) -> int:
    """Place of the highest value; NaN is the lowest."""
    return int(np.argmax(np.where(np.isnan(values), -np.inf, values)))


def verify(scores: Array, final: Array, count: int) -> int:
    """Place of the best `final` among the `count` best `scores`."""
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")[:count]
    return int(order[best(final[order])])


def halving_rungs(num: int, epochs: int, compute: float) -> tuple[int, ...]:
    """Epochs of the rungs of the costliest halving within `compute`, or of the cheapest there is.

    >>> halving_rungs(27, 27, 4.0)
    (1, 3, 9, 27)
    """
    ladders = []
    for start in range(1, epochs + 1):
        rungs, rung = [], start
        while rung < epochs:
            rungs.append(rung)
            rung *= REDUCTION_FACTOR
        ladders.append((*rungs, epochs))
    affordable = [r for r in ladders if halving_cost(num, epochs, r) <= compute]
    if affordable:
        return max(affordable, key=lambda r: halving_cost(num, epochs, r))
    return min(ladders, key=lambda r: halving_cost(num, epochs, r))


def halving_cost(num: int, epochs: int, rungs: Sequence[int]) -> float:
    """Full trainings that successive halving takes; each rung goes on from the one below.

    >>> round(halving_cost(9, 9, (1, 3, 9)), 3)
    2.333
    """
    total, below, left = 0.0, 0, num
    for rung in rungs:
        total += left * (rung - below) / epochs
        below, left = rung, max(1, left // REDUCTION_FACTOR)
    return total


def successive_halving(curves: Array, rungs: Sequence[int]) -> int:
    """Place of what is best on the highest rung."""
    left = np.arange(len(curves))
    for rung in rungs[:-1]:
        seen = curves[left, rung - 1]
        order = np.argsort(-np.where(np.isnan(seen), -np.inf, seen), kind="stable")
        left = left[order[: max(1, len(left) // REDUCTION_FACTOR)]]
    return int(left[best(curves[left, rungs[-1] - 1])])
