"""Rules that end tier 1 as a whole before its scheduler is done.

A rule is a pure function of the ledger's state. When one says stop, nothing new starts, what runs
is stopped at its next report, and the search goes on with measuring and verifying what it has.

- *time* and *cost*: a budget is spent;
- *target*: a trial completed the highest rung with the accuracy asked for;
- *no_gain*: it is improbable that anything still to come beats the best trial so far by more than a
  margin. Every trial that may still reach the highest rung is forecast along both of its axes, its
  rung's curve and from rung to rung (`chances_of_trials`); configurations not yet drawn compare as
  exchangeable ones do (`chance_of_new`). Trials are taken for independent, which errs to the side
  of going on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from llp.probing.forecasts import Forecast
from llp.probing.learning_curves import extrapolate_full
from llp.probing.state import WORST, SearchState, probe_id
from llp.probing.stopping import complete, forecast_of
from llp.records import Interval, Rung, StopDecision

CONTINUE = StopDecision(stop=False)
MIN_PAIRS = 3
"""Trials that must have completed a rung and the highest before their own factors are used."""
LEAST_SPREAD = 0.05
"""Least standard deviation of the log of those factors; few may agree by chance."""
LEAST_ERROR = 1e-3


@dataclass(frozen=True)
class SearchPlan:
    """What a rule knows of a search besides its ledger.

    Attributes:
        rungs: The ladder.
        num_trials: Configurations that the scheduler will try.
        report_every: Epochs between two points of a job.
        max_failures: Retries of a job that failed.
    """

    rungs: Sequence[Rung]
    num_trials: int
    report_every: int = 1
    max_failures: int = 2

    def num_points(self, rung: int) -> int:
        """Points of a complete curve on a rung."""
        return math.ceil(self.rungs[rung - 1].epochs / self.report_every)


class SearchRule(Protocol):
    """Decides whether tier 1 should end. A pure function of its arguments."""

    name: str

    def decide(self, state: SearchState, plan: SearchPlan) -> StopDecision:
        """The verdict now; asked whenever a worker is free and after every point."""
        ...


@dataclass(frozen=True)
class Time:
    """Ends tier 1 after so many seconds, the time when no driver ran left out.

    Attributes:
        seconds: The budget.
    """

    seconds: float = 0.0
    name: str = "time"

    def __post_init__(self) -> None:
        _positive("seconds", self.seconds)

    def decide(self, state: SearchState, plan: SearchPlan) -> StopDecision:
        """Whether the time is over."""
        if state.seconds < self.seconds:
            return CONTINUE
        detail = f"{state.seconds:.0f} s have passed, the budget is {self.seconds:g} s"
        return StopDecision(True, self.name, detail=detail)


@dataclass(frozen=True)
class Samples:
    """Ends tier 1 when its jobs have seen so many training examples.

    Attributes:
        samples: The budget; exceeded by at most what the running jobs do between two reports.
    """

    samples: float = 0.0
    name: str = "cost"

    def __post_init__(self) -> None:
        _positive("samples", self.samples)

    def decide(self, state: SearchState, plan: SearchPlan) -> StopDecision:
        """Whether the budget is spent."""
        spent = spent_samples(state)
        if spent < self.samples:
            return CONTINUE
        detail = f"{spent:,} samples seen, the budget is {self.samples:,.0f}"
        return StopDecision(True, self.name, detail=detail)


@dataclass(frozen=True)
class Target:
    """Ends tier 1 when a trial has reached an accuracy.

    Attributes:
        accuracy: Validation accuracy at the end of the highest rung, in (0, 1].
    """

    accuracy: float = 0.0
    name: str = "target"

    def __post_init__(self) -> None:
        if not 0 < self.accuracy <= 1:
            raise ValueError(f"accuracy must lie in (0, 1], not {self.accuracy}")

    def decide(self, state: SearchState, plan: SearchPlan) -> StopDecision:
        """Whether the best completed trial is good enough."""
        best = best_completed(state, plan)
        if best is None or best[1] < self.accuracy:
            return CONTINUE
        detail = f"{best[0]} reached accuracy {best[1]:.4f}, the target is {self.accuracy:g}"
        return StopDecision(True, self.name, Interval(best[1], best[1]), detail)


@dataclass(frozen=True)
class NoGain:
    """Ends tier 1 when probably nothing to come beats the best by more than a margin.

    Attributes:
        margin: Gain in validation accuracy that would be worth going on.
        delta: Probability of such a gain below which the search ends, in (0, 0.5).
        min_finished: Trials that must have completed the highest rung; at least 2.
        min_trials: Trials that must have ended on any rung, as new configurations are judged by
            them; at least 4.
    """

    margin: float = 0.002
    delta: float = 0.05
    min_finished: int = 2
    min_trials: int = 8
    name: str = "no_gain"

    def __post_init__(self) -> None:
        if not 0 < self.delta < 0.5:
            raise ValueError(f"delta must lie in (0, 0.5), not {self.delta}")
        if not self.margin >= 0:
            raise ValueError(f"margin must not be negative, and is {self.margin}")

    def decide(self, state: SearchState, plan: SearchPlan) -> StopDecision:
        """Whether going on is worth it."""
        top = len(plan.rungs)
        done = [t for t, r in state.ends if r == top and state.result(t, r) != WORST]
        over = {t for t, _ in state.ends}
        best = best_completed(state, plan)
        if best is None or len(done) < max(self.min_finished, 2):
            return CONTINUE
        if len(over) < max(self.min_trials, 4):
            return CONTINUE
        goal = best[1] + self.margin
        chance = 0.0 if goal >= 1 else chance_of_better(state, plan, goal)
        if not chance < self.delta:
            return CONTINUE
        return StopDecision(
            True,
            self.name,
            Interval(best[1], min(goal, 1.0), 1 - self.delta),
            f"anything beats {best[0]} ({best[1]:.4f}) by more than {self.margin:g} with "
            f"probability {chance:.3f}, below {self.delta:g}",
        )


def best_completed(state: SearchState, plan: SearchPlan) -> tuple[str, float] | None:
    """Trial id and accuracy of the best result on the highest rung so far."""
    top = len(plan.rungs)
    found = [(state.result(t, r), t) for t, r in state.ends if r == top]
    found = [one for one in found if one[0] != WORST]
    if not found:
        return None
    key, trial_id = max(found, key=lambda one: one[0])
    return trial_id, key[0]


def spent_samples(state: SearchState) -> int:
    """Training examples that the probes have seen."""
    return sum(points[max(points)].samples_seen for points in state.points.values() if points)


def chance_of_better(state: SearchState, plan: SearchPlan, goal: float) -> float:
    """Probability that a trial to come ends the highest rung with more accuracy than `goal`.

    Trials that have completed it, were stopped, diverged or failed for good are over. Of the
    others each has its own chance, see `chances_of_trials`; a configuration not yet drawn has that
    of `chance_of_new`.
    """
    open_trials = [t for t in state.trials if not _is_out(state, plan, t)]
    shown = [t for t in open_trials if any(state.points.get(probe_id(t, r)) for r in _rungs(plan))]
    num_new = max(0, plan.num_trials - len(state.trials)) + len(open_trials) - len(shown)
    chances = chances_of_trials(state, plan, shown, goal) if shown else np.empty(0)
    missed = float(np.log1p(-np.minimum(chances, 1 - 1e-12)).sum())
    if num_new:
        missed += num_new * math.log1p(-min(chance_of_new(state, plan, goal), 1 - 1e-12))
    return -math.expm1(missed)


def chances_of_trials(
    state: SearchState, plan: SearchPlan, trials: Sequence[str], goal: float
) -> NDArray[np.float64]:
    """[num_trials], probability that each would end the highest rung above `goal`.

    Along training, its newest rung is forecast to its end. From there to the highest rung, the
    error is multiplied by a factor whose logarithm has the Student distribution that the factors
    of the search's own trials suggest, `mean + t_{n-1} sd sqrt(1 + 1/n)`; with fewer than
    `MIN_PAIRS` of them both steps are left to the prior (`forecast_ends`).
    """
    top = len(plan.rungs)
    by_prior = forecast_ends(state, plan, trials).probability_better_than(goal)[: len(trials)]
    found: NDArray[np.float64] = np.where(np.isnan(by_prior), 1.0, by_prior)
    finals = {t: 1 - state.result(t, top)[0] for t, r in state.ends if r == top}
    for row, trial_id in enumerate(trials):
        rung = max(r for r in _rungs(plan) if state.points.get(probe_id(trial_id, r)))
        if rung == top:
            continue
        pairs = [
            (1 - state.result(t, rung)[0], final)
            for t, final in finals.items()
            if math.isfinite(final) and state.result(t, rung) != WORST
        ]
        if len(pairs) < MIN_PAIRS:
            continue
        factors = np.log([max(b, LEAST_ERROR) / max(a, LEAST_ERROR) for a, b in pairs])
        spread = max(float(factors.std(ddof=1)), LEAST_SPREAD) * math.sqrt(1 + 1 / len(pairs))
        heads = _heads(state, plan, trial_id, rung)
        needed = np.log(max(1 - goal, LEAST_ERROR) / np.maximum(heads, LEAST_ERROR))
        score = (needed - factors.mean()) / spread
        found[row] = float(stats.t.cdf(score, len(pairs) - 1).mean())
    return found


def chance_of_new(state: SearchState, plan: SearchPlan, goal: float) -> float:
    """Probability that a configuration not yet drawn would beat `goal`.

    Configurations are exchangeable, so the next of n is the best with probability 1 / (n + 1); by
    how much is taken for exponential, with the mean by which the better quarter of the results on
    the lowest rung exceed the rest. The margin is that of `goal` over the best on the highest rung.
    """
    best = best_completed(state, plan)
    lowest = min((r for _, r in state.ends), default=1)
    results = [state.result(t, r) for t, r in state.ends if r == lowest]
    ranked = sorted((key[0] for key in results if key != WORST), reverse=True)
    if best is None or len(ranked) < 4:
        return 1.0
    num = max(2, len(ranked) // 4)
    scale = max(float(np.mean(ranked[:num])) - ranked[num], 1e-6)
    return math.exp(-max(0.0, goal - best[1]) / scale) / (len(results) + 1)


def _heads(state: SearchState, plan: SearchPlan, trial_id: str, rung: int) -> NDArray[np.float64]:
    """Errors at the end of a rung, equally probable."""
    result = state.result(trial_id, rung)
    if result != WORST:
        return np.array([1 - result[0]])
    curve = state.curve(trial_id, rung)
    num_points = plan.num_points(rung)
    errors = 1 - np.array([point.validation_accuracy for point in curve.points])
    ended = complete(state.ended_curves(rung), num_points)
    made = forecast_of(errors, curve, ended, num_points)
    return made.quantile(np.arange(1, 20) / 20)[:, 0]


def _rungs(plan: SearchPlan) -> range:
    return range(1, len(plan.rungs) + 1)


def forecast_ends(state: SearchState, plan: SearchPlan, trials: Sequence[str]) -> Forecast:
    """Forecast of validation accuracy at the end of the highest rung: of `trials`, then of others.

    All trials of the search are evidence (`learning_curves.extrapolate_full`).
    """
    rungs = _rungs(plan)
    trials = [*trials, *(t for t in state.trials if t not in set(trials))]
    width = max(plan.num_points(rung) for rung in rungs)
    curves = np.full((len(trials), len(plan.rungs), width), np.nan)
    for row, trial_id in enumerate(trials):
        for rung in rungs:
            points = state.curve(trial_id, rung).points
            seen = [point.validation_accuracy for point in points][:width]
            curves[row, rung - 1, : len(seen)] = seen
    sizes = [float(rung.num_examples) * rung.epochs for rung in plan.rungs]
    return extrapolate_full(
        curves,
        sizes=sizes,
        full_size=sizes[-1],
        horizon=[plan.num_points(rung) for rung in rungs],
        higher_is_better=True,
        bounds=(0.0, 1.0),
    )


def _is_out(state: SearchState, plan: SearchPlan, trial_id: str) -> bool:
    """Whether a trial cannot bring a new result on the highest rung."""
    at = [rung for t, rung in state.ends if t == trial_id]
    if not at:
        return False
    last = max(at)
    if not state.is_over(trial_id, last, max_failures=plan.max_failures):
        return False
    return last == len(plan.rungs) or state.result(trial_id, last) == WORST


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, not {value}")
