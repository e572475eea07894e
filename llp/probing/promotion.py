"""Who gets the next unit of budget: ASHA, Hyperband, the median rule and plain FIFO.

Each scheduler is a pure function `next_step(state)` of the ledger's state. It is asked whenever a
worker is free and answers with a new trial, a promotion, a retry, `WAIT` (something that is running
must end first) or `DONE`.

Hyperband's brackets begin one after the other, the next as soon as nothing can be promoted in those
before; so one worker does them in the paper's order, and many never wait between them.

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
import functools
import itertools
from dataclasses import dataclass
from typing import Literal

from llp.probing.budgets import Bracket, fill_brackets, hyperband_brackets, rung_sizes
from llp.probing.standings import Place, Standings
from llp.probing.state import SearchState
from llp.probing.ties import TieAtCut, clear, tie_at_cut
from llp.records import Decision


@dataclass(frozen=True)
class NewTrial:
    """Suggest a new configuration and start it on `rung`."""

    bracket: int
    rung: int
    reason: str = ""


WAIT: Literal["wait"] = "wait"
DONE: Literal["done"] = "done"
Step = NewTrial | Decision | TieAtCut | Literal["wait", "done"]


@dataclass(frozen=True)
class Scheduler:
    """Halving within brackets; the base of every scheduler here.

    Attributes:
        num_trials: Configurations to try.
        num_rungs: Rungs of the ladder.
        reduction_factor: eta; one in eta goes on.
        max_failures: Retries of a job that failed or lost its worker.
        eager: Promote on incomplete rungs and before new trials start.
        costs: Cost of a job on each rung, in any unit; by default the top rung's is 1 and every
            rung below takes 1/eta of the one above.
        warm: Whether a promoted trial goes on from the weights of the rung below.
        tie_images: Validation images; above 0, ties at a cut are settled first (file `ties`), and
            until a rung is complete only trials that no tie can reach go on from it.

    Raises:
        ValueError: A number is out of range, or there is not one cost for each rung.
    """

    num_trials: int
    num_rungs: int
    reduction_factor: int = 3
    max_failures: int = 2
    eager: bool = False
    costs: tuple[float, ...] = ()
    warm: bool = False
    tie_images: int = 0

    def __post_init__(self) -> None:
        if self.num_trials < 1 or self.num_rungs < 1 or self.reduction_factor < 2:
            raise ValueError(
                "a scheduler needs at least 1 trial, 1 rung and a reduction_factor of 2, got "
                f"{self.num_trials}, {self.num_rungs} and {self.reduction_factor}"
            )
        if self.costs and (len(self.costs) != self.num_rungs or min(self.costs) <= 0):
            raise ValueError(
                f"costs must be {self.num_rungs} positive numbers, one for each rung, got "
                f"{list(self.costs)}"
            )

    def rung_costs(self) -> list[float]:
        """Cost of a job on each rung, in full jobs of the top rung."""
        if self.costs:
            return [cost / self.costs[-1] for cost in self.costs]
        return [self.reduction_factor ** (k + 1 - self.num_rungs) for k in range(self.num_rungs)]

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
            early = self._promotion(state, eager=True)
            if early is not None:
                return early
        start = self._start(len(state.trials))
        if start is not None:  # a bracket ends, as far as it can, before the next begins
            earlier = self._promotion(state, eager=False, brackets=start.bracket)
            return earlier or start
        certain = self._promotion(state, eager=False)
        if certain is not None:
            return certain
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
        number = bisect.bisect_right(self._starts, num_started) - 1
        if num_started >= self.num_trials or number >= len(self._layout):
            return None
        bracket, done = self._layout[number], num_started - self._starts[number]
        place = f"number {done + 1} of {bracket.size} on rung {bracket.first_rung}"
        return NewTrial(number, bracket.first_rung, place)

    @functools.cached_property
    def _layout(self) -> list[Bracket]:
        return self.brackets()

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Number of trials before each bracket."""
        return [0, *itertools.accumulate(bracket.size for bracket in self._layout)][:-1]

    @functools.cached_property
    def _sizes(self) -> list[dict[int, int]]:
        return self.sizes()

    def bracket_of(self, index: int, rung: int) -> int:
        """The bracket of trial number `index`, which starts on `rung`."""
        return bisect.bisect_right(self._starts, index) - 1

    def _promotion(
        self, state: SearchState, *, eager: bool, brackets: int | None = None
    ) -> Decision | TieAtCut | None:
        """The promotion to make now, if any: of the first bracket, highest rung, best trial.

        Only the first `brackets` are looked at, by default all.
        """
        standings = state.standings(self.max_failures)
        for number, sizes in enumerate(self._sizes[:brackets]):
            if self._starts[number] >= len(state.trials):
                return None  # no later bracket has begun
            found = self._within(standings, number, sizes, eager=eager)
            if found is not None:
                return found
        return None

    def _within(
        self, standings: Standings, number: int, sizes: dict[int, int], *, eager: bool
    ) -> Decision | TieAtCut | None:
        """The promotion to make in one bracket.

        `to_come` counts the results that a rung may still get; a trial is certain to be among the
        best when it would be with all of them ahead of it.
        """
        found: Decision | TieAtCut | None = None
        rungs = sorted(sizes)
        to_come = sizes[rungs[0]] - standings.rung(number, rungs[0]).num_over
        for rung in rungs[:-1]:
            here, above = standings.rung(number, rung), standings.rung(number, rung + 1)
            quota = here.num_over // self.reduction_factor if eager else sizes[rung + 1]
            if here.waiting and (eager or above.num_promoted < quota):
                best = self._next(standings, number, rung, quota, to_come)
                if isinstance(best, TieAtCut):
                    found = best
                elif best is not None:
                    position = here.place(best)
                    certain = not eager and to_come == 0
                    if certain or position + (0 if eager else to_come) <= quota:
                        reason = _reason(position, here.num_over, rung, quota)
                        if self.tie_images and position > quota:
                            reason += "; tied at the cut, and ahead by tier 2"
                        found = Decision("promote", best[3], rung + 1, reason)
            to_come = min(
                max(sizes[rung + 1], above.num_promoted),
                above.num_promoted + len(here.waiting) + to_come,
            )
            to_come -= above.num_over
        return found

    def _next(
        self, standings: Standings, number: int, rung: int, quota: int, to_come: int
    ) -> Place | TieAtCut | None:
        """The trial that goes on next, or a tie to settle first; None: no one before more is known.

        A trial goes on from an incomplete rung only if it is clear of the best that may be passed
        over in the end, which is at least the one at place `quota + 1 - to_come` now.
        """
        here = standings.rung(number, rung)
        best = here.waiting[0]
        if not self.tie_images:
            return best
        if to_come > 0:
            rival = quota - to_come
            if 0 <= rival < len(here.ranked) and here.place(best) <= rival:
                return best if clear(best, here.ranked[rival], self.tie_images) else None
            return best
        settled = standings.ties.get((number, rung))
        if settled is None:
            tie = tie_at_cut(here.ranked, quota, self.tie_images, bracket=number, rung=rung)
            return tie or best
        out = settled.passed_over
        return next((place for place in here.waiting if place[3] not in out), None)


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
        upward = self._promotion(state, eager=False)
        if upward is not None:
            return upward
        return self._start(len(state.trials)) or (WAIT if state.running else DONE)

    def _promotion(
        self,
        state: SearchState,
        *,
        eager: bool,
        brackets: int | None = None,
    ) -> Decision | TieAtCut | None:
        standings = state.standings(self.max_failures)
        passed = standings.passed_median
        while passed and (
            passed[0][1] >= self.num_rungs or (passed[0][0], passed[0][1] + 1) in state.promoted
        ):
            passed.popleft()
        if passed:
            trial_id, rung, num = passed[0]
            reason = f"not below the median of {num} results on rung {rung}"
            return Decision("promote", trial_id, rung + 1, reason)
        return None


class Fifo(Scheduler):
    """No early stopping: every trial is trained on the top rung only, in order."""

    def brackets(self) -> list[Bracket]:
        """One bracket that starts at the top."""
        return [Bracket(self.num_rungs, self.num_trials)]
