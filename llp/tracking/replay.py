"""From the events of a ledger to the `SearchResult` they tell of. A pure function.

A job may appear several times: it was retried after a failure, or its driver was killed and a
second one ran it again from its last checkpoint. A point at an epoch that was already reported
therefore replaces that point and all later ones of the job, and the examples trained twice are
counted as spent. (A resumed job that only repeats what the ledger has writes nothing, so work that
a kill of the driver made it do again, at most a snapshot interval, is not counted.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llp.records import (
    CheckpointRef,
    Cost,
    CurvePoint,
    Decision,
    EarlierStudies,
    FlatnessProfile,
    JobEnd,
    LearningCurve,
    ParetoFront,
    ProxyScore,
    RaceLook,
    RankCorrelation,
    Rung,
    ScoreReport,
    SearchResult,
    StopAudit,
    TieBreak,
    TieChoice,
    Trial,
    TrialResult,
    Verification,
    from_plain,
)

NOT_FINISHED = "not finished"
"""`TrialResult.stopped_by` of a trial that still has, or awaits, a job."""


def result_from_events(
    events: Iterable[Mapping[str, Any]], *, running: bool = False
) -> SearchResult:
    """The study that `events` tell of.

    Args:
        events: The ledger from its first line on, in order.
        running: Whether a driver holds the study's lock; tells `running` from `interrupted`.

    Raises:
        ValueError: There is no `study` event.
    """
    replay = Replay()
    for event in events:
        replay.take(event)
    return replay.result(running)


@dataclass
class _Job:
    kind: str
    rung: int
    points: dict[int, CurvePoint] = field(default_factory=dict)
    ended: bool = False
    accounted: int = 0  # examples of ended attempts, and of work that a kill made worthless
    base: int = 0  # position in the job at which the present attempt began

    def add(self, point: CurvePoint) -> None:
        repeated = [epoch for epoch in self.points if epoch >= point.epoch]
        kept = max((p.samples_seen for e, p in self.points.items() if e < point.epoch), default=0)
        if self.ended:
            self.base = kept
        elif repeated:
            self.accounted += self.points[max(repeated)].samples_seen - kept
        for epoch in repeated:
            del self.points[epoch]
        self.points[point.epoch] = point
        self.ended = False

    def end(self, samples_seen: int) -> None:
        # A lost worker cannot say what it spent; its points do.
        self.accounted += max(samples_seen, self._in_flight())
        self.ended = True

    def _in_flight(self) -> int:
        if self.ended:
            return 0
        last = max((point.samples_seen for point in self.points.values()), default=0)
        return max(0, last - self.base)

    def spent(self) -> int:
        """Training examples that went through this job, in all its attempts."""
        return self.accounted + self._in_flight()


@dataclass
class _TrialState:
    trial: Trial
    pending: bool = True
    last_end: JobEnd | None = None
    last_rung: int = 0
    checkpoint: CheckpointRef | None = None
    checkpoint_rung: int = 0
    seconds: float = 0.0


class Replay:
    """What is known of a study after the events taken so far.

    Args:
        keep_curves: False keeps only the last point of each job that ended well, for readers that
            need outcomes and must stay small; the curves of `result` are then incomplete.
    """

    def __init__(self, *, keep_curves: bool = True) -> None:
        self.keep_curves = keep_curves
        self.header: Mapping[str, Any] | None = None
        self.environment: Mapping[str, Any] = {}
        self.told_by = "probe"
        self.rungs: tuple[Rung, ...] = ()
        self.trials: dict[str, _TrialState] = {}
        self.jobs: dict[str, _Job] = {}
        self.jobs_of: dict[str, list[str]] = {}
        self.decisions: list[Decision] = []
        self.profiles: dict[str, FlatnessProfile] = {}
        self.verifications: dict[tuple[str, int], Verification] = {}
        self.race: dict[int, RaceLook] = {}
        self.fronts: dict[int, ParetoFront] = {}
        self.proxies: dict[str, ProxyScore] = {}
        self.earlier: EarlierStudies | None = None
        self.score_report: ScoreReport | None = None
        self.stop_audit: StopAudit | None = None
        self.ranks: dict[tuple[int, int], RankCorrelation] = {}
        self.tie_break: TieBreak | None = None
        self.tie_choices: list[TieChoice] = []
        self.seconds: dict[str, float] = {}
        self.open_phase: tuple[str, float] | None = None
        self.terminal: Mapping[str, Any] | None = None
        self.started = self.last_time = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        """Takes in the next event; kinds it does not know are passed over."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)
        self.started = self.started or float(event["time"])
        self.last_time = float(event["time"])

    def _on_study(self, event: Mapping[str, Any]) -> None:
        self.header = event
        self.environment = event.get("environment", {})
        self.rungs = tuple(from_plain(Rung, rung) for rung in event.get("rungs", ()))
        if event.get("kind") == "training":  # has no probes: its full trainings are its curves
            self.told_by = "verify"

    def _on_opened(self, event: Mapping[str, Any]) -> None:
        self._close_phase()
        self.terminal = None

    def _on_phase(self, event: Mapping[str, Any]) -> None:
        name = str(event["name"])
        if event["status"] == "start":
            self._close_phase()
            self.open_phase = (name, float(event["time"]))
        else:
            self.open_phase = None
            self.seconds[name] = self.seconds.get(name, 0.0) + float(event["seconds"] or 0.0)

    def _close_phase(self) -> None:
        """Counts a phase that a kill ended up to the last sign of life."""
        if self.open_phase is not None:
            name, since = self.open_phase
            self.seconds[name] = self.seconds.get(name, 0.0) + max(0.0, self.last_time - since)
            self.open_phase = None

    def _on_trial(self, event: Mapping[str, Any]) -> None:
        trial = from_plain(Trial, event["trial"])
        self.trials.setdefault(trial.trial_id, _TrialState(trial))

    def _on_job(self, event: Mapping[str, Any]) -> None:
        job = event["job"]
        trial_id = str(job["trial"]["trial_id"])
        self._job(job["job_id"], trial_id, job["kind"], int(job["rung"]["rung"]))
        if job["kind"] == self.told_by and trial_id in self.trials:
            self.trials[trial_id].pending = True

    def _job(self, job_id: str, trial_id: str, kind: str, rung: int) -> _Job:
        if job_id not in self.jobs:
            self.jobs[job_id] = _Job(kind, rung)
            self.jobs_of.setdefault(trial_id, []).append(job_id)
        return self.jobs[job_id]

    def _on_point(self, event: Mapping[str, Any]) -> None:
        point = from_plain(CurvePoint, event["point"])
        self._job(event["job_id"], event["trial_id"], event["kind"], point.rung).add(point)

    def _on_decision(self, event: Mapping[str, Any]) -> None:
        decision = from_plain(Decision, event["decision"])
        self.decisions.append(decision)
        if decision.kind in {"promote", "retry"} and decision.trial_id in self.trials:
            self.trials[decision.trial_id].pending = True

    def _on_job_end(self, event: Mapping[str, Any]) -> None:
        end = from_plain(JobEnd, event["end"])
        kind, rung = str(event["kind"]), int(event["rung"])
        job = self._job(end.job_id, end.trial_id, kind, rung)
        job.end(end.samples_seen)
        if not self.keep_curves and end.outcome in {"completed", "stopped"} and job.points:
            job.points = dict([max(job.points.items())])
        state = self.trials.get(end.trial_id)
        if kind != self.told_by or state is None:
            return
        state.pending = False
        state.last_end, state.last_rung = end, rung
        state.seconds += end.seconds
        if end.outcome == "completed" and end.checkpoint and rung >= state.checkpoint_rung:
            state.checkpoint, state.checkpoint_rung = end.checkpoint, rung

    def _on_profile(self, event: Mapping[str, Any]) -> None:
        profile = from_plain(FlatnessProfile, event["profile"])
        self.profiles[profile.trial_id] = profile

    def _on_verification(self, event: Mapping[str, Any]) -> None:
        verification = from_plain(Verification, event["verification"])
        self.verifications[verification.trial_id, verification.seed] = verification

    def _on_race(self, event: Mapping[str, Any]) -> None:
        found = from_plain(RaceLook, event["look"])
        self.race[found.num_seeds] = found

    def _on_proxy(self, event: Mapping[str, Any]) -> None:
        self.proxies[str(event["trial_id"])] = from_plain(ProxyScore, event["proxy"])

    def _on_warm_start(self, event: Mapping[str, Any]) -> None:
        if "studies" in event:  # since it is written
            self.earlier = from_plain(EarlierStudies, event["studies"])

    def _on_front(self, event: Mapping[str, Any]) -> None:
        found = from_plain(ParetoFront, event["front"])
        self.fronts[found.rung] = found

    def _on_scores(self, event: Mapping[str, Any]) -> None:
        self.score_report = from_plain(ScoreReport, event["score_report"])

    def _on_stop_audit(self, event: Mapping[str, Any]) -> None:
        self.stop_audit = from_plain(StopAudit, event["stop_audit"])

    def _on_tie_break(self, event: Mapping[str, Any]) -> None:
        self.tie_break = from_plain(TieBreak, event["tie_break"])

    def _on_tie(self, event: Mapping[str, Any]) -> None:
        self.tie_choices.append(from_plain(TieChoice, event["choice"]))

    def _on_rank_correlations(self, event: Mapping[str, Any]) -> None:
        for pair in event["rank_correlations"]:
            self.ranks[pair["lower"], pair["higher"]] = from_plain(RankCorrelation, pair)

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.terminal = event

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        self.terminal = event

    def trial_result(self, trial_id: str) -> TrialResult:
        """Everything known of one trial."""
        state = self.trials[trial_id]
        jobs = [self.jobs[job_id] for job_id in self.jobs_of.get(trial_id, ())]
        probes = sorted((job for job in jobs if job.kind == self.told_by), key=lambda job: job.rung)
        end = state.last_end
        top = max((rung.rung for rung in self.rungs), default=0)
        if state.pending or end is None:
            stopped_by = NOT_FINISHED
        elif end.outcome == "stopped":
            stopped_by = end.stopped_by
        else:
            unfinished = end.outcome == "completed" and state.last_rung < top
            stopped_by = f"rung {state.last_rung}" if unfinished else ""
        return TrialResult(
            trial=state.trial,
            curves=tuple(
                LearningCurve(trial_id, job.rung, tuple(job.points.values())) for job in probes
            ),
            outcome=end.outcome if end is not None else "stopped",
            stopped_by=stopped_by,
            failure=end.failure if end is not None else "",
            checkpoint=state.checkpoint,
            samples_seen=sum(job.spent() for job in probes),
            seconds=state.seconds,
        )

    def cost(self) -> Cost:
        """What was spent so far."""
        spent = {"probe": 0, "measure": 0, "verify": 0}
        for job in self.jobs.values():
            spent[job.kind] += job.spent()
        return Cost(
            tier1=spent["probe"],
            tier2=spent["measure"],
            verification=spent["verify"],
            full_search=len(self.trials) * self._full_training(),
            seconds=dict(self.seconds),
        )

    def _full_training(self) -> int:
        """Examples seen by one full training: epochs of the recipe times training images."""
        assert self.header is not None
        num_train = self.header.get("num_train")
        if num_train is None and self.rungs:
            top = self.rungs[-1]
            num_train = round(top.num_examples / top.data_fraction)
        epochs = self.header.get("spec", {}).get("training", {}).get("epochs", 0)
        return int(num_train or 0) * int(epochs)

    def result(self, running: bool) -> SearchResult:
        """The study so far; closes an open phase, so call it once and last."""
        if self.header is None:
            raise ValueError("there is no `study` event")
        self._close_phase()
        status: Literal["running", "interrupted", "finished", "failed"]
        terminal = self.terminal or {}
        if terminal.get("event") == "finished":
            status = "finished"
        elif terminal.get("event") == "failed":
            status = "failed"
        else:
            status = "running" if running else "interrupted"
        reason = terminal.get("winner_reason") or terminal.get("reason") or ""
        return SearchResult(
            study_id=str(self.header["study_id"]),
            spec_digest=str(self.header["spec_digest"]),
            spec=self.header["spec"],
            status=status,
            rungs=self.rungs,
            trials=tuple(self.trial_result(trial_id) for trial_id in self.trials),
            decisions=tuple(self.decisions),
            profiles=tuple(self.profiles.values()),
            score_report=self.score_report,
            verifications=tuple(self.verifications.values()),
            winner=terminal.get("winner"),
            winner_reason=str(reason),
            cost=self.cost(),
            environment=self.environment,
            started=self.started,
            finished=self.last_time,
            race=tuple(self.race.values()),
            fronts=tuple(self.fronts.values()),
            proxies=dict(self.proxies),
            stop_audit=self.stop_audit,
            rank_correlations=tuple(self.ranks[pair] for pair in sorted(self.ranks)),
            tie_break=self.tie_break,
            tie_choices=tuple(self.tie_choices),
            earlier=self.earlier,
        )
