"""What tier 1 knows at a moment: a fold over the ledger's events, and nothing else.

Every choice of tier 1 is a function of this state, so replaying the ledger gives every choice
again, and a resumed search goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llp.probing.standings import Standings
from llp.records import (
    CurvePoint,
    Decision,
    FlatnessProfile,
    Job,
    JobEnd,
    LearningCurve,
    TieChoice,
    Trial,
    from_plain,
)

WORST = (-math.inf, -math.inf)
"""Rank key of a trial that has no usable result."""


def rank_key(point: CurvePoint | None) -> tuple[float, float]:
    """Sort key of a result, larger is better: validation accuracy, ties by lower validation loss.

    NaN counts as worst.
    """
    if point is None or math.isnan(point.validation_accuracy):
        return WORST
    loss = point.validation_loss
    return (point.validation_accuracy, -math.inf if math.isnan(loss) else -loss)


@dataclass
class SearchState:
    """The fold. `apply` is the only thing that changes it.

    Attributes:
        trials: Trial id -> trial, in order of suggestion.
        running: Job id -> job, in order of issue.
        orphans: Jobs that were running when their driver or worker was lost, in order of issue.
        issued: Job id -> the latest issue of the job.
        ends: (trial id, rung) -> how the trial's probe on that rung ended.
        points: Job id -> epoch -> point, of every kind of job.
        failures: Job id -> number of failed attempts.
        memory_failures: Job id -> how many of those ran out of memory.
        promoted: (trial id, rung) of every recorded promotion into that rung.
        stops: Job id -> recorded stop decision.
        operations: Trial id -> multiply-adds of a forward pass of its network, where recorded.
        audits: Job id -> recorded audit (a stop not carried out) and the epoch it came at.
        announced: Trial id -> the decision to start it; the trial itself is the next line.
        completed: Rung -> trials that completed it, in order of their end.
        stops_off: The decision after which no rule stops by forecast, if any.
        ended: The decision that ended tier 1 early, if any.
        tie_profiles: (trial id, rung) -> what was measured to settle a tie at the cut of the rung.
        ties: (bracket, rung) -> how the tie at its cut was settled.
        seconds: Time between the ledger's lines so far, without the time when no driver ran.
        number: Trial id -> its place in the order of suggestion.
        touched: (trial id, rung) of every probe that an event was about, in order of the events.
        last_end: (trial id, rung) -> where in `touched` its latest end is.
    """

    trials: dict[str, Trial] = field(default_factory=dict)
    running: dict[str, Job] = field(default_factory=dict)
    orphans: dict[str, Job] = field(default_factory=dict)
    issued: dict[str, Job] = field(default_factory=dict)
    ends: dict[tuple[str, int], JobEnd] = field(default_factory=dict)
    points: dict[str, dict[int, CurvePoint]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    memory_failures: dict[str, int] = field(default_factory=dict)
    promoted: set[tuple[str, int]] = field(default_factory=set)
    stops: dict[str, Decision] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)
    audits: dict[str, tuple[Decision, int]] = field(default_factory=dict)
    announced: dict[str, Decision] = field(default_factory=dict)
    completed: dict[int, list[str]] = field(default_factory=dict)
    stops_off: Decision | None = None
    ended: Decision | None = None
    tie_profiles: dict[tuple[str, int], FlatnessProfile] = field(default_factory=dict)
    ties: dict[tuple[int, int], TieChoice] = field(default_factory=dict)
    seconds: float = 0.0
    _last_time: float = sys.float_info.max
    number: dict[str, int] = field(default_factory=dict)
    touched: list[tuple[str, int]] = field(default_factory=list)
    last_end: dict[tuple[str, int], int] = field(default_factory=dict)
    _standings: dict[int, Standings] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_events(cls, events: Iterable[Mapping[str, Any]]) -> SearchState:
        """The state after `events`."""
        state = cls()
        for event in events:
            state.apply(event)
        return state

    def apply(self, event: Mapping[str, Any]) -> None:
        """Takes one ledger event into account; events about other things are ignored."""
        kind, time = event["event"], float(event.get("time", self._last_time))
        if kind != "opened":
            self.seconds += max(0.0, time - self._last_time)
        self._last_time = time
        if kind == "opened":
            self.orphans.update(self.running)
            self.touched += [(j.trial.trial_id, j.rung.rung) for j in self.running.values()]
            self.running.clear()
        elif kind == "trial":
            trial = from_plain(Trial, event["trial"])
            self.number.setdefault(trial.trial_id, len(self.number))
            self.trials[trial.trial_id] = trial
        elif kind == "operations":
            self.operations[event["trial_id"]] = float(event["operations"])
        elif kind == "decision":
            decision = from_plain(Decision, event["decision"])
            if decision.kind == "new":
                self.announced[decision.trial_id] = decision
            elif decision.kind == "promote":
                self.promoted.add((decision.trial_id, decision.rung))
                self.touched.append((decision.trial_id, decision.rung))
            elif decision.kind == "stop":
                self.stops[probe_id(decision.trial_id, decision.rung)] = decision
            elif decision.kind == "audit":
                job_id = probe_id(decision.trial_id, decision.rung)
                self.audits[job_id] = (decision, max(self.points.get(job_id, {0: None})))
            elif decision.kind == "stops_off":
                self.stops_off = decision
            elif decision.kind == "end":
                self.ended = decision
        elif kind == "job" and event["job"]["kind"] == "probe":
            job = from_plain(Job, event["job"])
            self.orphans.pop(job.job_id, None)
            self.running[job.job_id] = self.issued[job.job_id] = job
            self.touched.append((job.trial.trial_id, job.rung.rung))
        elif kind == "point":
            point = from_plain(CurvePoint, event["point"])
            points = self.points.setdefault(event["job_id"], {})
            for epoch in [e for e in points if e >= point.epoch]:
                del points[epoch]  # the job was run again from an earlier epoch
            points[point.epoch] = point
        elif kind == "tie_profile":
            profile = from_plain(FlatnessProfile, event["profile"])
            self.tie_profiles[profile.trial_id, int(event["rung"])] = profile
        elif kind == "tie":
            choice = from_plain(TieChoice, event["choice"])
            self.ties[choice.bracket, choice.rung] = choice
        elif kind == "job_end" and event["kind"] == "probe":
            self._end(from_plain(JobEnd, event["end"]), int(event["rung"]))

    def _end(self, end: JobEnd, rung: int) -> None:
        job = self.running.pop(end.job_id, None) or self.orphans.pop(end.job_id, None)
        if end.outcome in ("failed", "out_of_memory"):
            self.failures[end.job_id] = self.failures.get(end.job_id, 0) + 1
            if end.outcome == "out_of_memory":
                self.memory_failures[end.job_id] = self.memory_failures.get(end.job_id, 0) + 1
            if job is not None:
                self.orphans[end.job_id] = job
        # a retried job counts when it really ended
        before = self.ends.pop((end.trial_id, rung), None)
        if end.outcome == "completed" and (before is None or before.outcome != "completed"):
            self.completed.setdefault(rung, []).append(end.trial_id)
        self.ends[end.trial_id, rung] = end
        self.last_end[end.trial_id, rung] = len(self.touched)
        self.touched.append((end.trial_id, rung))

    def standings(self, max_failures: int) -> Standings:
        """The results of every rung in order, up to date."""
        found = self._standings.get(max_failures)
        if found is None:
            found = self._standings[max_failures] = Standings(self, max_failures)
        found.update()
        return found

    def curve(self, trial_id: str, rung: int, *, up_to: int | None = None) -> LearningCurve:
        """The points of a trial on a rung in order of epoch, none after `up_to`."""
        points = self.points.get(probe_id(trial_id, rung), {})
        return LearningCurve(
            trial_id,
            rung,
            tuple(points[e] for e in sorted(points) if up_to is None or e <= up_to),
        )

    def is_over(self, trial_id: str, rung: int, *, max_failures: int) -> bool:
        """Whether the trial's probe on `rung` has ended and will not be tried again."""
        end = self.ends.get((trial_id, rung))
        if end is None:
            return False
        if end.job_id in self.running:
            return False
        return end.job_id not in self.orphans or not self.may_retry(end.job_id, max_failures)

    def may_retry(self, job_id: str, max_failures: int) -> bool:
        """Whether a job that ended badly gets another attempt; out of memory gets only one."""
        return (
            self.failures.get(job_id, 0) <= max_failures
            and self.memory_failures.get(job_id, 0) <= 1
        )

    def result(self, trial_id: str, rung: int) -> tuple[float, float]:
        """Rank key of a trial on a rung; WORST unless the rung was completed."""
        end = self.ends.get((trial_id, rung))
        if end is None or end.outcome != "completed":
            return WORST
        points = self.points.get(end.job_id, {})
        return rank_key(points[max(points)]) if points else WORST

    def ended_curves(self, rung: int) -> list[LearningCurve]:
        """Curves of the jobs that ended on `rung`, in order of their end; failures left out.

        Those of stopped and diverged jobs are shorter than those of completed ones.
        """
        return [
            self.curve(trial_id, at)
            for (trial_id, at), end in self.ends.items()
            if at == rung and end.outcome in ("completed", "stopped", "diverged")
        ]


def probe_id(trial_id: str, rung: int) -> str:
    """Job id of a trial's probe on a rung."""
    return f"{trial_id}-r{rung}"
