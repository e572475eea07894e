"""Who stands where: the results of every rung in order, kept sorted while the ledger grows.

A choice of a scheduler needs places ("third of 40 on rung 2"), never the whole list sorted anew. A
`Standings` follows a `SearchState`: it looks only at the probes that events touched since it last
looked, so that a choice among 10,000 trials takes microseconds. It holds nothing that is not in the
state, and is the same whenever it is asked.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llp.records import TieChoice, Trial

if TYPE_CHECKING:
    from llp.probing.state import SearchState

Place = tuple[float, float, int, str]
"""Sort key of a result, best first: minus accuracy, loss, number of the trial, its id."""


@dataclass
class RungStandings:
    """One rung of one bracket.

    Attributes:
        ranked: Every trial whose probe on the rung is over, best first; ties in order of
            suggestion. A probe without a usable result comes last.
        waiting: Those of them with a usable result that have not been promoted from here.
        num_promoted: Trials promoted into this rung.
    """

    ranked: list[Place] = field(default_factory=list)
    waiting: list[Place] = field(default_factory=list)
    num_promoted: int = 0

    @property
    def num_over(self) -> int:
        """Probes that are over."""
        return len(self.ranked)

    def place(self, place: Place) -> int:
        """1-based position among all that are over."""
        return bisect.bisect_left(self.ranked, place) + 1


class Standings:
    """The standings of a search.

    Args:
        state: What is followed.
        max_failures: Retries of a job; decides when a failed probe is over.
    """

    def __init__(self, state: SearchState, max_failures: int) -> None:
        self._state = state
        self._max_failures = max_failures
        self._seen = 0
        self._rungs: dict[tuple[int, int], RungStandings] = {}
        self._placed: dict[tuple[str, int], tuple[Place, bool]] = {}
        self._promoted: set[tuple[str, int]] = set()
        self._so_far: dict[int, list[tuple[float, float]]] = {}
        self.passed_median: deque[tuple[str, int, int]] = deque()
        """(trial id, rung, number of results) of every usable result that was not worse than the
        median of its rung when it came, in that order."""
        self.memo: dict[object, object] = {}
        """What a scheduler decided since anything changed, by scheduler and number of trials."""
        self.kept: dict[object, tuple[object, Any]] = {}
        """Results by what they are of, with all that they depend on: used while that is equal."""

    def update(self) -> None:
        """Takes in what happened since the last call."""
        touched = self._state.touched
        if self._seen < len(touched):
            self.memo.clear()
        while self._seen < len(touched):
            self._touch(self._seen, *touched[self._seen])
            self._seen += 1

    def rung(self, bracket: int, rung: int) -> RungStandings:
        """One rung of one bracket; empty when nothing happened there."""
        found = self._rungs.get((bracket, rung))
        if found is None:
            found = self._rungs[bracket, rung] = RungStandings()
        return found

    @property
    def ties(self) -> dict[tuple[int, int], TieChoice]:
        """(bracket, rung) -> how a tie at its cut was settled."""
        return self._state.ties

    def __iter__(self) -> Iterator[tuple[tuple[int, int], RungStandings]]:
        return iter(self._rungs.items())

    def is_over(self, trial_id: str, rung: int) -> bool:
        """Whether the probe has ended and will not be tried again."""
        return (trial_id, rung) in self._placed

    def _touch(self, number: int, trial_id: str, rung: int) -> None:
        state = self._state
        trial = state.trials.get(trial_id)
        if trial is None:
            return
        if (trial_id, rung) in state.promoted and (trial_id, rung) not in self._promoted:
            self._promoted.add((trial_id, rung))
            self.rung(trial.bracket, rung).num_promoted += 1
            self._place(trial, rung - 1)
        self._place(trial, rung)
        if number == state.last_end.get((trial_id, rung)) and self.is_over(trial_id, rung):
            self._compare(trial_id, rung)

    def _place(self, trial: Trial, rung: int) -> None:
        state, key = self._state, (trial.trial_id, rung)
        here = self.rung(trial.bracket, rung)
        before = self._placed.pop(key, None)
        if before is not None:
            place, waiting = before
            del here.ranked[bisect.bisect_left(here.ranked, place)]
            if waiting:
                del here.waiting[bisect.bisect_left(here.waiting, place)]
        over = state.is_over(trial.trial_id, rung, max_failures=self._max_failures)
        if over:
            accuracy, loss = state.result(trial.trial_id, rung)
            place = (-accuracy, -loss, state.number[trial.trial_id], trial.trial_id)
            usable = accuracy != float("-inf")
            waiting = usable and (trial.trial_id, rung + 1) not in state.promoted
            self._placed[key] = (place, waiting)
            bisect.insort(here.ranked, place)
            if waiting:
                bisect.insort(here.waiting, place)

    def _compare(self, trial_id: str, rung: int) -> None:
        result = self._state.result(trial_id, rung)
        so_far = self._so_far.setdefault(rung, [])
        bisect.insort(so_far, result)
        if result[0] != float("-inf") and result >= so_far[len(so_far) // 2]:
            self.passed_median.append((trial_id, rung, len(so_far)))
