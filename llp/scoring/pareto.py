"""Several objectives at once: which configurations no other one beats, and how much they cover.

All objectives are minimised. A point *dominates* another when it is no worse in any objective and
better in one. The *front* are the points that nothing dominates. The *hypervolume* is the volume
that is dominated by the front and lies below a reference point: larger is better, and it only grows
when a point is added.

Exact hypervolume by slicing along the last objective (Fonseca, Paquete, Lopez-Ibanez, CEC 2006, in
its simplest form): O(n log n) for two objectives, O(n^2 log n) for three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llp.records import ParetoFront


def pareto_front(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points nothing dominates, [n]; equal points stay together, NaN is never on the front.

    Args:
        points: Objectives to minimise, [n, m].
    """
    values = np.asarray(points, dtype=float)
    on_front = ~np.isnan(values).any(axis=1)
    for i in np.flatnonzero(on_front):
        others = values[~np.isnan(values).any(axis=1)]
        dominated = (others <= values[i]).all(axis=1) & (others < values[i]).any(axis=1)
        on_front[i] = not dominated.any()
    return np.asarray(on_front, dtype=bool)


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Volume between the points and `reference`; points that are not below it add nothing.

    Args:
        points: Objectives to minimise, [n, m], m >= 1.
        reference: Upper corner, [m].

    >>> hypervolume([[1, 2], [2, 1]], (3, 3))
    3.0
    """
    corner = np.asarray(reference, dtype=float)
    values = np.asarray(points, dtype=float).reshape(-1, len(corner))
    below = values[(values < corner).all(axis=1)]
    return _volume(below[pareto_front(below)], corner) if len(below) else 0.0


def _volume(front: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    if len(corner) == 1:
        return float(corner[0] - front.min())
    order = front[np.argsort(front[:, -1], kind="stable")]
    edges = np.append(order[:, -1], corner[-1])
    total = 0.0
    for k in range(len(order)):
        height = float(edges[k + 1] - edges[k])
        if height > 0:
            slab = order[: k + 1, :-1]
            total += height * _volume(slab[pareto_front(slab)], corner[:-1])
    return total


def front_of(
    names: Sequence[str], values: Mapping[str, Mapping[str, float]], *, rung: int
) -> ParetoFront:
    """The front of the trials in `values`, and the share of the box of all trials that it covers.

    The box lies between the best and the worst finite value of each objective; an objective in
    which all are equal counts as no axis. 1 would be one trial that is the best in everything; the
    share compares only within one study.

    Args:
        names: Objectives, all minimised.
        values: Trial id -> objective -> value; NaN for what is not known.
        rung: Where the values come from; 0 for full trainings.
    """
    trials = list(values)
    points = np.array([[values[t].get(name, math.nan) for name in names] for t in trials])
    points = points.reshape(len(trials), len(names)).astype(float)
    front = pareto_front(points)
    known = points[~np.isnan(points).any(axis=1)]
    covered = math.nan
    if len(known):
        low, high = known.min(axis=0), known.max(axis=0)
        axes = high > low
        if axes.any():
            scaled = (known[:, axes] - low[axes]) / (high[axes] - low[axes])
            covered = hypervolume(scaled, [1.0] * int(axes.sum()))
    first = [name for name, on in zip(trials, front, strict=True) if on]
    first.sort(key=lambda name: (values[name].get(names[0], math.nan), name))
    return ParetoFront(
        names=tuple(names),
        rung=rung,
        values={t: {name: float(values[t].get(name, math.nan)) for name in names} for t in trials},
        front=tuple(first),
        covered=covered,
    )
