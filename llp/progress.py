"""How far a search is: one state made from ledger events; `display` prints it.

`ProgressState` is a reducer: it depends on the events it was given and on nothing else (no clock,
no files), so a resumed study, whose events are replayed first, shows the same counts as one that
ran through.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llp import registry
from llp.records import EarlierStudies, from_plain


@dataclass
class JobView:
    """One job as the display knows it.

    Attributes:
        kind: `probe`, `measure` (of tier 2), `tie` (measured in tier 1, for a promotion) or
            `verify`.
        trial_id: Its trial.
        rung: Its rung.
        data_fraction: Share of the training set in use.
        running: On a worker now.
        outcome: How its last attempt ended; empty before.
        stopped_by: Reason word of a stop.
        accuracy: Last validation accuracy of this attempt, NaN before the first.
        seconds: Length of the last attempt.
    """

    kind: str
    trial_id: str
    rung: int
    data_fraction: float
    running: bool = True
    outcome: str = ""
    stopped_by: str = ""
    accuracy: float = math.nan
    seconds: float = 0.0
    _samples: dict[int, int] = field(default_factory=dict)  # epoch -> samples seen
    _settled: int = 0  # by attempts that ended, and by work that a kill made worthless
    _base: int = 0  # where the present attempt took the job up

    def point(self, epoch: int, samples: int) -> None:
        """Takes in a point; points from `epoch` on that an earlier driver made are done again."""
        again = [at for at in self._samples if at >= epoch]
        kept = max((seen for at, seen in self._samples.items() if at < epoch), default=0)
        if self.outcome:
            self._base = kept
        elif again:
            self._settled += self._samples[max(again)] - kept
        for at in again:
            del self._samples[at]
        self._samples[epoch] = samples
        self.outcome = ""

    def end(self, samples: int) -> None:
        """Takes in the end of an attempt that saw `samples` training examples."""
        self._settled += max(samples, self.in_flight)
        self.running = False

    @property
    def in_flight(self) -> int:
        """Training examples seen by the attempt that has not ended."""
        return 0 if self.outcome else max(max(self._samples.values(), default=0) - self._base, 0)

    @property
    def samples(self) -> int:
        """Training examples seen by this job in all its attempts, lost work included."""
        return self._settled + self.in_flight


@dataclass(frozen=True)
class Best:
    """The best trial so far: by score once scored, by validation accuracy before."""

    trial_id: str
    accuracy: float
    data_fraction: float
    hyperparameters: Mapping[str, Any]
    score: float = math.nan


@dataclass
class ProgressState:
    """A study so far, as a function of its ledger events.

    Attributes:
        study_id: Name of the study.
        spec: The spec as plain data.
        rungs: The ladder as plain data, lowest first.
        num_train: Training images at a data fraction of 1.
        num_trials: Configurations to probe; a grid may have fewer than were asked for.
        expected_on: Rung -> probes on it when nothing fails or is stopped early.
        trials: Trial id -> hyperparameters, in order of suggestion.
        jobs: Job id -> what is known of it.
        phases: Phase -> `start` or `end`.
        tests: Trial id -> verified test accuracies, one per seed.
        scores: Scored trials, best first, as (trial id, value).
        status: `running`, `finished` or `failed`; whoever knows better may set `interrupted`.
        winner: Trial id once finished.
        failure: Why the study failed.
        early_stopping: Why rules that stop by forecast went off, if they did.
        earlier: What was taken from earlier studies; None without a warm start.
        mlflow: What MLflow is doing, in words, when the display has to say so.
    """

    study_id: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)
    rungs: Sequence[Mapping[str, Any]] = ()
    num_train: int = 0
    num_trials: int = 0
    expected_on: dict[int, int] = field(default_factory=dict)
    trials: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    jobs: dict[str, JobView] = field(default_factory=dict)
    phases: dict[str, str] = field(default_factory=dict)
    tests: dict[str, list[float]] = field(default_factory=dict)
    scores: list[tuple[str, float]] = field(default_factory=list)
    status: str = "running"
    winner: str = ""
    failure: str = ""
    early_stopping: str = ""
    earlier: EarlierStudies | None = None
    mlflow: str = ""
    _earlier_seconds: float = 0.0
    _session_start: float = 0.0
    _workers: int = 1  # most jobs that ran at once under this driver
    _last: float = 0.0

    def update(self, event: Mapping[str, Any]) -> None:
        """Takes in one ledger event; unknown events change nothing."""
        before = self._last
        if event.get("time") is not None:
            self._last = max(before, float(event["time"]))
        name = event.get("event")
        if name == "study":
            self._begin(event)
        elif name == "opened":
            self._open(before)
        elif name == "phase":
            self.phases[str(event.get("name"))] = str(event.get("status"))
        elif name == "decision" and event["decision"]["kind"] == "stops_off":
            self.early_stopping = str(event["decision"]["reason"])
        elif name == "warm_start" and "studies" in event:
            self.earlier = from_plain(EarlierStudies, event["studies"])
        elif name == "trial":
            self.trials[event["trial"]["trial_id"]] = event["trial"]["hyperparameters"]
        elif name == "job":
            self._start(event["job"])
        elif name == "point" and event["job_id"] in self.jobs:
            job, point = self.jobs[event["job_id"]], event["point"]
            job.point(point["epoch"], point["samples_seen"])
            job.accuracy = number_of(point["validation_accuracy"])
        elif name == "job_end" and event["end"]["job_id"] in self.jobs:
            job, end = self.jobs[event["end"]["job_id"]], event["end"]
            job.end(end["samples_seen"])
            job.outcome, job.stopped_by = end["outcome"], end["stopped_by"]
            job.seconds = number_of(end["seconds"])
        elif name == "verification":
            result = event["verification"]
            self.tests.setdefault(result["trial_id"], []).append(number_of(result["test_accuracy"]))
        elif name == "scores":
            rows = event["score_report"]["scores"]
            self.scores = [(row["trial_id"], number_of(row["value"])) for row in rows]
        elif name == "finished":
            self.status, self.winner = "finished", str(event.get("winner") or "")
            if self.section("tracking").get("mlflow"):
                self.mlflow = "being sent the last of it (waits a minute at most)"
        elif name == "failed":
            self.status, self.failure = "failed", str(event.get("reason", ""))

    def _begin(self, event: Mapping[str, Any]) -> None:
        self.study_id = str(event["study_id"])
        self.spec, self.rungs = event["spec"], event["rungs"]
        top = self.rungs[-1]
        self.num_train = int(
            event.get("num_train") or round(top["num_examples"] / top["data_fraction"])
        )
        self._session_start = self._last
        tier1 = self.section("tier1")
        self.num_trials = int(event.get("num_trials") or tier1.get("num_trials", 0))
        asked = event.get("jobs_per_rung") or self._scheduled(tier1)
        self.expected_on = {
            rung["rung"]: int(asked.get(str(rung["rung"]), 0)) for rung in self.rungs
        }

    def _scheduled(self, tier1: Mapping[str, Any]) -> dict[str, int]:
        """`jobs_per_rung` of ledgers that do not have it yet."""
        make = registry.load("schedulers", str(tier1.get("scheduler", "asha")))
        scheduler = make(
            num_trials=self.num_trials,
            num_rungs=len(self.rungs),
            reduction_factor=int(tier1.get("reduction_factor", 3)),
        )
        jobs: Counter[str] = Counter()
        for sizes in scheduler.sizes():
            jobs.update({str(rung): size for rung, size in sizes.items()})
        return jobs

    def _open(self, before: float) -> None:
        """A driver took over: what ran under the last one is lost, and so is the time between."""
        if self._session_start:
            self._earlier_seconds += max(before - self._session_start, 0.0)
        self._session_start = self._last
        for job in self.jobs.values():
            job.running = False
        self._workers, self.status = 1, "running"

    def _start(self, job: Mapping[str, Any]) -> None:
        tie = job["kind"] == "measure" and job.get("metrics")  # those of tier 2 name none
        view = self.jobs.setdefault(
            job["job_id"],
            JobView(
                kind="tie" if tie else job["kind"],
                trial_id=job["trial"]["trial_id"],
                rung=job["rung"]["rung"],
                data_fraction=job["rung"]["data_fraction"],
            ),
        )
        view.running, view.accuracy = True, math.nan
        self._workers = max(self._workers, sum(other.running for other in self.jobs.values()))

    # What follows is computed from the facts above whenever it is asked for.

    def of(self, kind: str) -> list[JobView]:
        """The jobs of one kind, in the order they were handed out."""
        return [job for job in self.jobs.values() if job.kind == kind]

    def counts(self, kind: str, rung: int | None = None) -> tuple[int, int]:
        """How many jobs of `kind` (on `rung`) have ended, and how many are on a worker now."""
        jobs = [job for job in self.of(kind) if rung is None or job.rung == rung]
        running = sum(job.running for job in jobs) if self.status == "running" else 0
        return sum(bool(job.outcome) and not job.running for job in jobs), running

    @property
    def samples_spent(self) -> int:
        """Training examples seen so far, in all phases, failed attempts included."""
        return sum(job.samples for job in self.jobs.values())

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the spec, empty where there is none."""
        found = self.spec.get(name)
        return found if isinstance(found, Mapping) else {}

    def expected(self, kind: str) -> int:
        """Jobs of `kind` in all: those asked for until its phase ends, then those there were."""
        phase = {"measure": "tier2", "verify": "verify"}.get(kind, "tier1")
        if self.phases.get(phase) == "end":
            return len(self.of(kind))
        if kind == "probe":
            return sum(self.expected_on.values())
        asked = self.section({"measure": "tier2", "verify": "verification"}[kind])
        each = self.verification_seeds if kind == "verify" else 1
        planned = min(int(asked.get("top_k", 0)), self.num_trials) * each
        return max(planned, len(self.of(kind)))  # a race goes on as long as it must

    @property
    def verification_seeds(self) -> int:
        """Full trainings of each configuration that is verified."""
        return int(self.section("verification").get("num_seeds", 1))

    @property
    def samples_verification(self) -> int:
        """Training examples of one full training."""
        epochs = self.section("verification").get("epochs") or self._full_epochs
        return self.num_train * int(epochs)

    @property
    def samples_planned(self) -> int:
        """Training examples of tier 1 and verification when nothing is stopped early."""
        probes = sum(self.expected_on[rung] * cost for rung, cost in self._rung_costs().items())
        return probes + self.expected("verify") * self.samples_verification

    @property
    def samples_full_search(self) -> int:
        """Training examples of training every configuration fully once."""
        return self.num_trials * self.num_train * self._full_epochs

    @property
    def _full_epochs(self) -> int:
        return int(self.section("training").get("epochs", 0))

    def _rung_costs(self) -> dict[int, int]:
        return {rung["rung"]: rung["num_examples"] * rung["epochs"] for rung in self.rungs}

    def elapsed(self, now: float | None = None) -> float:
        """Seconds a driver has been at work, pauses between drivers left out."""
        if not self._session_start:
            return 0.0
        until = self._last if now is None or self.status != "running" else now
        return self._earlier_seconds + max(until - self._session_start, 0.0)

    def remaining(self) -> float | None:
        """Seconds still needed, or None before a job has ended.

        Jobs to come are taken to last as long as those that ended on their rung; where there is
        none yet, as long per sample as on the highest rung that has one, which is too long. Tier 2
        counts from its first measurement on; what measures ties in tier 1 is not foreseen.
        """
        ended: dict[int, list[JobView]] = {}
        for job in [*self.of("probe"), *self.of("verify")]:
            if job.outcome and not job.running:
                ended.setdefault(job.rung, []).append(job)
        if self.status != "running" or not ended:
            return None
        full = len(self.rungs) + 1
        costs = {**self._rung_costs(), full: self.samples_verification}
        each = {}
        for rung, cost in costs.items():
            jobs = ended.get(rung) or ended[max((r for r in ended if r < rung), default=min(ended))]
            seconds = sum(job.seconds for job in jobs)
            samples = max(sum(job.samples for job in jobs), 1)
            each[rung] = seconds / len(jobs) if rung in ended else seconds / samples * cost
        wanted = {} if self.phases.get("tier1") == "end" else dict(self.expected_on)
        wanted[full] = self.expected("verify")
        total = sum(
            max(count - len(ended.get(rung, ())), 0) * each[rung] for rung, count in wanted.items()
        )
        for job in self.jobs.values():
            if job.running and job.kind in ("probe", "verify"):
                total -= min(job.in_flight / max(costs[job.rung], 1), 1) * each[job.rung]
        measured = [job.seconds for job in self.of("measure") if not job.running]
        if measured and self.phases.get("tier2") != "end":
            missing = max(self.expected("measure") - len(measured), 0)
            total += missing * sum(measured) / len(measured)
        return max(total, 0.0) / self._workers

    def endings(self) -> dict[str, Counter[str]]:
        """Outcome -> reason -> number of trials, for trials whose tier 1 is over."""
        last: dict[str, JobView] = {}
        for job in self.of("probe"):
            last[job.trial_id] = job
        counts: dict[str, Counter[str]] = {}
        for job in last.values():
            if job.running or not job.outcome:
                continue
            if job.outcome != "completed":
                counts.setdefault(job.outcome, Counter())[job.stopped_by] += 1
            elif job.rung < len(self.rungs) and self.phases.get("tier1") == "end":
                counts.setdefault("stopped", Counter())[f"after rung {job.rung}"] += 1
        return counts

    @property
    def best(self) -> Best | None:
        """The best trial so far, or None before the first evaluation."""
        probes = [job for job in self.of("probe") if not math.isnan(job.accuracy)]
        usable = [job for job in probes if job.outcome == "completed"]
        usable = usable or [job for job in probes if job.outcome in ("", "stopped")]
        first = self.winner or (self.scores[0][0] if self.scores else "")
        if not usable:
            return None
        top = max(usable, key=lambda job: (job.trial_id == first, job.accuracy, job.rung))
        if top.trial_id == first:
            top = max((job for job in usable if job.trial_id == first), key=lambda job: job.rung)
        return Best(
            trial_id=top.trial_id,
            accuracy=top.accuracy,
            data_fraction=top.data_fraction,
            hyperparameters=self.trials.get(top.trial_id, {}),
            score=dict(self.scores).get(top.trial_id, math.nan),
        )


def number_of(value: Any) -> float:
    """A number of the ledger, where a missing or non-finite one is null, as a float."""
    return math.nan if value is None else float(value)
