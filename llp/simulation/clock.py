"""The virtual clock: workers that train by looking values up.

All steps of a training take as long as they cost. What a search has spent is the cost of all steps
that were trained, whoever trained them; time is what the slowest worker took.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from llp.simulation.tasks import Floats, Task


@dataclass(frozen=True)
class Assignment:
    """Train configuration `row` from step `first` to step `last` (0-based, both included).

    Attributes:
        row: Row of the task's table.
        first: First step to train.
        last: Last step to train.
        key: What the contender knows the assignment by.
    """

    row: int
    first: int
    last: int
    key: str = ""


class Contender(Protocol):
    """A search method: hands out assignments, hears of every step.

    Attributes:
        trains_diverged: Whether it goes on with a configuration that has diverged, as a search
            without early stopping does.
    """

    trains_diverged: bool

    def next(self) -> Assignment | Literal["wait", "done"]:
        """What a free worker should do."""
        ...

    def report(self, assignment: Assignment, step: int, value: float) -> bool:
        """Takes the value after a step; True ends the assignment there."""
        ...

    def end(self, assignment: Assignment, outcome: Literal["completed", "stopped"]) -> None:
        """Takes note that a worker is free again."""
        ...


@dataclass
class Trace:
    """What a search did, step by step in order of time.

    Attributes:
        cost: Full trainings spent so far.
        time: Of the clock, in full trainings.
        row: Configuration.
        step: Step that was reached.
        num_decisions: How often the method was asked for work.
    """

    cost: list[float] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    num_decisions: int = 0

    def regret(self, task: Task, budgets: Floats, *, partial: bool = False) -> Floats:
        """[num_budgets], regret of the best result after so much cost; 1 before the first.

        Args:
            task: What was searched.
            budgets: In full trainings.
            partial: Count values of trainings that did not end, as though weights were used as
                they are; otherwise only full trainings are results.
        """
        if not self.cost:
            return np.ones(len(budgets))
        steps = np.array(self.step)
        found = task.regret(task.values[np.array(self.row), steps])
        if not partial:
            found = np.where(steps == task.num_steps - 1, found, 1.0)
        best = np.minimum.accumulate(found)
        place = np.searchsorted(np.array(self.cost), budgets + 1e-9, side="right") - 1
        return np.where(place >= 0, best[np.maximum(place, 0)], 1.0)


def run(task: Task, contender: Contender, *, budget: float, workers: int = 1) -> Trace:
    """Runs a search until its budget in full trainings is spent or it has nothing left to do.

    A configuration that diverges ends there, unless the method never looks. Ties in time go to the
    worker that began first.
    """
    trace = Trace()
    queue: list[tuple[float, int, int, Assignment]] = []
    spent, now, ticket, free = 0.0, 0.0, 0, workers
    over = False
    while True:
        while free and not over:
            step = contender.next()
            trace.num_decisions += 1
            if step == "done":
                over = True
            if isinstance(step, str):
                break
            ticket, free = ticket + 1, free - 1
            price = _price(task, step, step.first)
            heapq.heappush(queue, (now + price, ticket, step.first, step))
        if not queue:
            return trace
        now, number, place, assignment = heapq.heappop(queue)
        spent += _price(task, assignment, place)
        value = float(task.values[assignment.row, place])
        trace.cost.append(spent)
        trace.time.append(now)
        trace.row.append(assignment.row)
        trace.step.append(place)
        if spent >= budget - 1e-9:
            return trace
        stop = contender.report(assignment, place, value)
        stop = stop or not (math.isfinite(value) or contender.trains_diverged)
        if stop or place >= assignment.last:
            contender.end(assignment, "stopped" if stop else "completed")
            free, over = free + 1, False
        else:
            after = _next(task, assignment, place)
            price = _price(task, assignment, after)
            heapq.heappush(queue, (now + price, number, after, assignment))


def _next(task: Task, assignment: Assignment, place: int) -> int:
    """The step after `place`; where every step is a training of its own, the last one at once."""
    return assignment.last if task.restarts else place + 1


def _price(task: Task, assignment: Assignment, place: int) -> float:
    """Cost of training step `place`."""
    if task.restarts:
        return float(task.cost[place])
    return float(task.cost[place] - (task.cost[place - 1] if place else 0.0))
