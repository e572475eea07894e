"""Posteriors of the result at the top rung, for trials that have ended a rung.

All trials that are compared at a rung have been seen equally long there, so their forecasts
(`learning_curves.extrapolate`) are made as one batch and are evidence about each other. Trials that
have finished correct the forecasts of the others, as `finished` does there. A batch is computed
once and kept until one of its trials changes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from llp.probing.curve_prior import LEVELS, Prior
from llp.probing.learning_curves import extrapolate
from llp.probing.standings import Standings
from llp.probing.state import SearchState, probe_id
from llp.records import Interval

CANDIDATES = 32
"""Trials of a rung that are forecast, best first; they are each other's context."""
WAITING = 8
"""The best of those that wait are forecast even where they are not among the best of the rung."""
_WEIGHTS = np.diff(np.concatenate([[0.0], (LEVELS[1:] + LEVELS[:-1]) / 2, [1.0]]))
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RungPosterior:
    """What the results on one rung say about the top rung.

    Attributes:
        trial_ids: The best of the rung, best first.
        mean: [num_trials], expected accuracy at the top rung.
        table: [num_trials, num_levels], quantiles at `curve_prior.LEVELS` of minus the accuracy,
            within the metric's range.
        low: [num_trials], 5 % quantile of the accuracy.
        high: [num_trials], 95 % quantile.
        start: Median accuracy of their first points.
    """

    trial_ids: tuple[str, ...]
    mean: Floats
    table: Floats
    low: Floats
    high: Floats
    start: float

    def place(self, trial_id: str) -> int:
        """0-based place of a trial."""
        return self._places[trial_id]

    def mean_of(self, trial_id: str) -> float:
        """Expected accuracy of a trial."""
        return float(self.mean[self.place(trial_id)])

    def interval(self, trial_id: str) -> Interval:
        """90 % interval of a trial's accuracy."""
        place = self.place(trial_id)
        return Interval(float(self.low[place]), float(self.high[place]), 0.9)

    def improvement(self, accuracy: float) -> Floats:
        """[num_trials], expected excess of the result over an accuracy.

        Whoever is better on the rung does not get less: forecasts of curves of a few points are
        noisier than their order (Spearman with the final order, 27 configurations, 4 % of the
        training, mean of six TaskSet tasks: .56 and .77), so the excesses are replaced by their
        least-squares fit that does not increase along the rung.
        """
        excess = np.maximum(-self.table - accuracy, 0.0) @ _WEIGHTS
        return np.asarray(isotonic_regression(excess, increasing=False).x)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {trial_id: place for place, trial_id in enumerate(self.trial_ids)}


def rung_posterior(
    state: SearchState,
    standings: Standings,
    rung: int,
    *,
    costs: list[float],
    warm: bool,
    prior: Prior | None,
) -> RungPosterior | None:
    """The posterior of the best trials of a rung; None when there is no usable result.

    Args:
        state: Of the search.
        standings: Of the state.
        rung: 1 is the lowest.
        costs: Of a job on each rung.
        warm: Whether a promotion goes on where the rung below ended; then curves are cost along
            training, otherwise results against the cost of a rung.
        prior: Of learning curves; None for the one that is shipped.
    """
    top = len(costs)
    here = standings.rung(0, rung)
    places = sorted({*here.ranked[:CANDIDATES], *here.waiting[:WAITING]})
    chosen = tuple(place[3] for place in places if place[0] < math.inf)
    if not chosen:
        return None
    ended = [p[3] for p in standings.rung(0, top).ranked[:CANDIDATES] if p[0] < math.inf]
    over = tuple(sorted(ended)) if rung < top else ()
    key = ("posterior", rung, id(prior))
    kept = standings.kept.get(key)
    if kept is not None and kept[0] == (chosen, over):
        return kept[1]  # type: ignore[no-any-return]
    positions, values = _lines(state, chosen, rung, costs, warm)
    finished = None
    if over:
        old_positions, old = _lines(state, over, top, costs, warm)
        finished = (old, old_positions)
    forecast = extrapolate(
        values,
        positions=positions,
        horizon=math.fsum(costs) if warm else costs[-1],
        finished=finished,
        higher_is_better=True,
        prior=prior,
    )
    low, high = forecast.quantile([0.05, 0.95])
    mean, (least, most) = np.asarray(forecast.mean), forecast.bounds
    table = np.clip(forecast.costs, -most, -least)
    found = RungPosterior(chosen, mean, table, low, high, float(np.median(values[:, 0])))
    standings.kept[key] = ((chosen, over), found)
    return found


def _lines(
    state: SearchState, trial_ids: tuple[str, ...], rung: int, costs: list[float], warm: bool
) -> tuple[Floats, Floats]:
    """Positions and accuracies [num_trials, num_points] of trials up to a rung."""
    lines = [_line(state, trial_id, rung, costs, warm) for trial_id in trial_ids]
    width = max(len(line) for line in lines)
    table = np.full((len(lines), width, 2), np.nan)
    for row, line in zip(table, lines, strict=True):
        row[: len(line)] = line
    return table[:, :, 0], table[:, :, 1]


def _line(
    state: SearchState, trial_id: str, rung: int, costs: list[float], warm: bool
) -> list[tuple[float, float]]:
    """Positions and accuracies. Warm, every point; cold, the ends of the rungs."""
    line, before = [], 0.0
    for k in range(1, rung + 1):
        job_id = probe_id(trial_id, k)
        points, job = state.points.get(job_id, {}), state.issued.get(job_id)
        if not points or job is None:
            continue
        last = max(points)
        for epoch in sorted(points) if warm else (last,):
            share = min(1.0, epoch / job.rung.epochs) if epoch != last else 1.0
            accuracy = points[epoch].validation_accuracy
            if math.isfinite(accuracy):
                line.append((before + share * costs[k - 1], accuracy))
        before += costs[k - 1] if warm else 0.0
    return line
