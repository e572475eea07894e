"""Who gets the next unit of budget: ASHA, Hyperband, the median rule and plain FIFO.

Each scheduler is a pure function `next_step(state)` of the ledger's state. It is asked whenever a
worker is free and answers with a new trial, a promotion, a retry, `WAIT` (something that is running
must end first) or `DONE`.

ASHA here fills the lowest rung with new configurations first and then promotes without a barrier,
but only those whose place among the `floor(N / eta)` that go on is certain, whatever the jobs that
are still running or to come bring. So a worker waits only for the last stragglers of a rung, no
promotion is ever regretted, and which trials are promoted depends neither on the number of workers
nor on the order in which they finish. With `eager_promotion` it is the rule of Li et al., MLSys
2020, Algorithm 2: promote whenever a trial is in the top `1/eta` of what has finished so far,
before any new trial starts; early mistakes are then part of the price.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Literal

from llp.probing.budgets import Bracket, fill_brackets, hyperband_brackets, rung_sizes
from llp.probing.state import WORST, SearchState
from llp.records import Decision


@dataclass(frozen=True)
class NewTrial:
    """Suggest a new configuration and start it on `rung`."""

    bracket: int
    rung: int
    reason: str = ""


WAIT: Literal["wait"] = "wait"
DONE: Literal["done"] = "done"
Step = NewTrial | Decision | Literal["wait", "done"]


@dataclass(frozen=True)
class Scheduler:
    """Halving within brackets; the base of every scheduler here.

    Attributes:
        num_trials: Configurations to try.
        num_rungs: Rungs of the ladder.
        reduction_factor: eta; one in eta goes on.
        max_failures: Retries of a job that failed or lost its worker.
        eager: Promote on incomplete rungs and before new trials start.
    """

    num_trials: int
    num_rungs: int
    reduction_factor: int = 3
    max_failures: int = 2
    eager: bool = False

    def brackets(self) -> list[Bracket]:
        """The brackets, in the order in which trials are assigned to them."""
        return [Bracket(1, self.num_trials)]

    def sizes(self) -> list[dict[int, int]]:
        """Per bracket: rung -> number of trials that reach it when nothing fails or is stopped."""
        return [rung_sizes(b, self.num_rungs, self.reduction_factor) for b in self.brackets()]

    def next_step(self, state: SearchState) -> Step:
        """What a free worker should do next."""
        retry = self._retry(state)
        if retry is not None:
            return retry
        if self.eager:
            early = self._promotions(state, eager=True)
            if early:
                return early[0]
        start = self._start(len(state.trials))
        if start is not None:
            return start
        certain = self._promotions(state, eager=False)
        if certain:
            return certain[0]
        return WAIT if state.running else DONE

    def _retry(self, state: SearchState) -> Decision | None:
        for job in state.orphans.values():
            if state.may_retry(job.job_id, self.max_failures):
                failures = state.failures.get(job.job_id, 0)
                reason = f"attempt {failures + 1} after a failure" if failures else "worker lost"
                return Decision("retry", job.trial.trial_id, job.rung.rung, reason)
        return None

    def _start(self, num_started: int) -> NewTrial | None:
        """The place of the next new trial, or None when all have started."""
        for number, bracket in enumerate(self.brackets()):
            if num_started < bracket.size:
                place = f"number {num_started + 1} of {bracket.size} on rung {bracket.first_rung}"
                return NewTrial(number, bracket.first_rung, place)
            num_started -= bracket.size
        return None

    def _promotions(self, state: SearchState, *, eager: bool) -> list[Decision]:
        """The promotions that may be made now, highest rung first, then best first."""
        decisions: list[Decision] = []
        for number, sizes in enumerate(self.sizes()):
            members = [t for t, trial in state.trials.items() if trial.bracket == number]
            to_come = 0
            by_rung: list[list[Decision]] = []
            for rung in sorted(sizes)[:-1]:
                over = [
                    t for t in members if state.is_over(t, rung, max_failures=self.max_failures)
                ]
                if rung == min(sizes):
                    to_come = sizes[rung] - len(over)
                ranked = sorted(over, key=lambda t, r=rung: state.result(t, r), reverse=True)  # type: ignore[misc]
                waiting = [
                    (position, t)
                    for position, t in enumerate(ranked, start=1)
                    if (t, rung + 1) not in state.promoted and state.result(t, rung) != WORST
                ]
                num_promoted = sum((t, rung + 1) in state.promoted for t in members)
                quota = len(over) // self.reduction_factor if eager else sizes[rung + 1]
                slack = 0 if eager else to_come
                by_rung.append(
                    [
                        Decision("promote", t, rung + 1, _reason(position, len(over), rung, quota))
                        for position, t in waiting
                        if position + slack <= quota or (not eager and to_come == 0)
                    ][: None if eager else max(0, quota - num_promoted)]
                )
                arrived = sum(
                    state.is_over(t, rung + 1, max_failures=self.max_failures) for t in members
                )
                to_come = min(
                    max(sizes[rung + 1], num_promoted), num_promoted + len(waiting) + to_come
                )
                to_come -= arrived
            decisions += [d for group in reversed(by_rung) for d in group]
        return decisions


def _reason(position: int, num_over: int, rung: int, quota: int) -> str:
    return f"place {position} of {num_over} on rung {rung}, {quota} go on"


class Asha(Scheduler):
    """Asynchronous successive halving with promotion; one bracket from the lowest rung."""


class Hyperband(Scheduler):
    """Hyperband's exact brackets, in order, until `num_trials` are assigned."""

    def brackets(self) -> list[Bracket]:
        """The brackets of Li et al. 2018, repeated or cut to `num_trials`."""
        return fill_brackets(
            hyperband_brackets(self.num_rungs, self.reduction_factor), self.num_trials
        )


class Median(Scheduler):
    """A trial goes up a rung while its result is not worse than the median so far on its rung.

    Golovin et al., "Google Vizier", KDD 2017, section 3.2.2, with results per rung in place of
    running averages. Depth first: a trial goes on before a new one starts.
    """

    def sizes(self) -> list[dict[int, int]]:
        """Every trial may reach every rung."""
        return [dict.fromkeys(range(1, self.num_rungs + 1), self.num_trials)]

    def next_step(self, state: SearchState) -> Step:
        """What a free worker should do next."""
        retry = self._retry(state)
        if retry is not None:
            return retry
        upward = self._promotions(state, eager=False)
        if upward:
            return upward[0]
        return self._start(len(state.trials)) or (WAIT if state.running else DONE)

    def _promotions(self, state: SearchState, *, eager: bool) -> list[Decision]:
        decisions = []
        seen: dict[int, list[tuple[float, float]]] = {}
        for (trial_id, rung), _ in state.ends.items():
            if not state.is_over(trial_id, rung, max_failures=self.max_failures):
                continue
            result = state.result(trial_id, rung)
            results = seen.setdefault(rung, [])
            bisect.insort(results, result)
            if rung == self.num_rungs or result == WORST:
                continue
            if result >= results[len(results) // 2] and (
                (trial_id, rung + 1) not in state.promoted
            ):
                reason = f"not below the median of {len(results)} results on rung {rung}"
                decisions.append(Decision("promote", trial_id, rung + 1, reason))
        return decisions


class Fifo(Scheduler):
    """No early stopping: every trial is trained on the top rung only, in order."""

    def brackets(self) -> list[Bracket]:
        """One bracket that starts at the top."""
        return [Bracket(self.num_rungs, self.num_trials)]
