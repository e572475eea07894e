"""Our schedulers in a simulated search: the driver's own code, with a ledger in memory.

Nothing is decided here. `driver.ProbeSource` asks the scheduler, hears of every point and asks the
stop rules, as in a search on Ray; only the ledger is a list and the training a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from llp import registry
from llp.driver import ProbeSource, Study
from llp.probing.promotion import Scheduler
from llp.protocols import StopRule
from llp.records import CurvePoint, HyperparameterValue, Job, JobEnd, Rung, to_plain
from llp.simulation.clock import Assignment
from llp.simulation.tasks import Task

LEAST_STEP = 2
"""First step a rung may end at: the first evaluation of a table is often from before training."""


class MemoryLedger:
    """A ledger that is a list."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def events(self) -> list[dict[str, Any]]:
        """All events so far, in order."""
        return list(self.lines)

    def append_many(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Takes events; nothing is written."""
        lines = [{"event": event, **to_plain(dict(payload))} for event, payload in events]
        self.lines += lines
        return lines


class RowsInOrder:
    """Configurations in a given order, as a searcher."""

    num_points: int | None = None

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = rows

    def suggest(self, index: int) -> dict[str, HyperparameterValue]:
        """The row of trial `index`."""
        return {"row": int(self._rows[index])}


def ladder_steps(num_steps: int, factor: float) -> list[int]:
    """Numbers of steps at which rungs end, each `factor` times the one below.

    >>> ladder_steps(51, 3)
    [2, 6, 17, 51]
    """
    ends = [num_steps]
    while ends[0] / factor >= LEAST_STEP - 0.5 and ends[0] > LEAST_STEP:
        ends.insert(0, max(LEAST_STEP, round(num_steps / factor ** len(ends))))
        if ends[0] == ends[1]:
            return ends[1:]
    return ends


def doubling_steps(num_steps: int) -> list[int]:
    """The ladder of freeze-thaw: twice as many steps on every rung.

    >>> doubling_steps(51)
    [2, 4, 8, 16, 32, 51]
    """
    ends = [LEAST_STEP]
    while ends[-1] * 8 <= num_steps * 3:
        ends.append(ends[-1] * 2)
    return [*ends, num_steps] if num_steps > LEAST_STEP else [num_steps]


class OwnContender:
    """A row of `registry.SCHEDULERS`.

    Args:
        task: What is searched.
        name: Of the scheduler.
        rows: Configurations in the order in which they are suggested.
        reduction_factor: eta of the scheduler, and of the ladder unless it is freeze-thaw's, which
            doubles.
        warm: A promotion goes on where the rung below ended; otherwise it starts again.
        budget: For schedulers that plan with one.
        eager: Promote on incomplete rungs.
        stop_rules: Asked after every point.
        options: Of the scheduler.
    """

    def __init__(
        self,
        task: Task,
        name: str,
        rows: Sequence[int],
        *,
        reduction_factor: int = 3,
        warm: bool = True,
        budget: float = 0.0,
        eager: bool = False,
        stop_rules: Sequence[StopRule] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._task, self._warm = task, warm and not task.restarts
        self.trains_diverged = name == "fifo"
        known = registry.options("schedulers", name)
        doubling = "wave" in known
        ends = (
            doubling_steps(task.num_steps)
            if doubling
            else ladder_steps(task.num_steps, reduction_factor)
        )
        self._ends = [end - 1 for end in ends]
        lengths = np.diff([0, *ends]) if self._warm else np.array(ends)
        shares = task.cost[self._ends]
        costs = np.diff([0.0, *shares]) if self._warm else shares
        given = dict(options or {})
        if "budget" in known and budget:
            given.setdefault("budget", max(budget, float(costs.sum() / costs[-1])))
            given["budget"] = float(given["budget"]) / float(costs[-1])
        scheduler: Scheduler = registry.load("schedulers", name)(
            num_trials=len(rows),
            num_rungs=len(ends),
            reduction_factor=reduction_factor,
            eager=eager,
            costs=tuple(float(cost) for cost in costs),
            warm=self._warm,
            **given,
        )
        self.study = Study(MemoryLedger())  # type: ignore[arg-type]  # has what a study uses
        self.source = ProbeSource(
            self.study,
            scheduler=scheduler,
            searcher=RowsInOrder(rows),
            rungs=[
                Rung(k, float(shares[k - 1]), 1, int(length))
                for k, length in enumerate(lengths, start=1)
            ],
            stop_rules=stop_rules,
        )
        self._jobs: dict[str, Job] = {}

    def next(self) -> Assignment | Literal["wait", "done"]:
        """The next probe of the driver."""
        job = self.source.next_job()
        if isinstance(job, str):
            return job
        self._jobs[job.job_id] = job
        number = job.rung.rung
        last = self._ends[number - 1]
        first = 0
        if self._task.restarts:
            first = last
        elif self._warm and (job.trial.trial_id, number) in self.study.state.promoted:
            first = self._ends[number - 2] + 1
        return Assignment(int(job.trial.hyperparameters["row"]), first, last, job.job_id)

    def report(self, assignment: Assignment, step: int, value: float) -> bool:
        """A point for the driver; accuracies are the values with their sign changed."""
        job = self._jobs[assignment.key]
        epoch = job.rung.epochs if self._task.restarts else step - assignment.first + 1
        start = self._task.scale[1]
        accuracy = -min(value, start) if value == value else value
        point = CurvePoint(
            job.rung.rung, job.rung.data_fraction, epoch, epoch, 0.0, 0.0, 0.0, accuracy, 0.0
        )
        verdict = self.source.on_report(job, point)
        return verdict is not None and verdict.stop

    def end(self, assignment: Assignment, outcome: Literal["completed", "stopped"]) -> None:
        """The end of a probe for the driver."""
        job = self._jobs.pop(assignment.key)
        points = self.study.state.points.get(job.job_id, {})
        last = points[max(points)].validation_accuracy if points else float("nan")
        ended = "diverged" if last != last else outcome
        self.source.on_end(
            job,
            JobEnd(
                job.job_id,
                job.trial.trial_id,
                ended,
                stopped_by="rule" if ended == "stopped" else "",
            ),
        )
