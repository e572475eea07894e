"""The driver's side of a study: the ledger, what it adds up to, and where jobs come from.

A *source* hands out jobs and is told what happened (`cluster.ray_tune.JobSource`). Everything it
learns goes to the ledger first and only then into the state its next choice is made from, so that
the choice is a function of the ledger and survives a kill between any two lines.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from llp.probing.promotion import DONE, WAIT, NewTrial, Scheduler
from llp.probing.rung_correlation import is_due, rank_correlations
from llp.probing.rung_scale import on_lowest_rung
from llp.probing.search_stopping import SearchPlan, SearchRule
from llp.probing.state import SearchState, probe_id
from llp.probing.ties import TieAtCut, settle
from llp.probing.verdicts import StopPolicy
from llp.protocols import Report, StopRule
from llp.records import (
    CheckpointRef,
    CurvePoint,
    Decision,
    FlatnessProfile,
    HyperparameterValue,
    Job,
    JobEnd,
    Observation,
    RankCorrelation,
    Rung,
    SearchResult,
    StopDecision,
    TieBreak,
    Trial,
    from_plain,
    to_plain,
)
from llp.tracking.ledger import Ledger
from llp.tracking.replay import result_from_events

logger = logging.getLogger(__name__)

OnEvent = Callable[[dict[str, Any]], None]
HOPELESS = 3
"""Trials that fail for good before any succeeds, after which a search gives up."""


class ConfigurationSource(Protocol):
    """Where hyperparameters come from; asked in order, a pure function of what it was told."""

    num_points: int | None

    def suggest(self, index: int) -> dict[str, HyperparameterValue]:
        """The configuration of trial `index`."""
        ...


class JobSource(Protocol):
    """Hands out jobs and is told what happened, as `cluster.ray_tune` wants it."""

    def next_job(self) -> Job | Literal["wait", "done"]:
        """The next job for a free worker."""
        ...

    def on_report(self, job: Job, report: Report) -> StopDecision | None:
        """Takes a report into account."""
        ...

    def on_end(self, job: Job, end: JobEnd) -> None:
        """Takes the end of a job into account."""
        ...


class Study:
    """A study folder that this process drives.

    Args:
        ledger: Open for writing.
        on_event: Called with every event, the replayed ones first.
    """

    def __init__(self, ledger: Ledger, on_event: OnEvent | None = None) -> None:
        self.ledger = ledger
        self.state = SearchState()
        self.history: list[dict[str, Any]] = []
        self.observed: dict[tuple[str, str, int], Mapping[str, float]] = {}
        self.ranks: dict[tuple[int, int], RankCorrelation] = {}
        self._listeners: list[OnEvent] = [on_event] if on_event else []
        for event in ledger.events():
            self._take(event)

    @property
    def header(self) -> dict[str, Any]:
        """The `study` event."""
        return self.history[0]

    def record(self, event: str, **payload: Any) -> None:
        """Writes one event durably, then takes it into account."""
        self.record_all([(event, payload)])

    def record_all(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Writes several events with one fsync, then takes them into account."""
        for line in self.ledger.append_many(events):
            self._take(line)

    def listen(self, listener: OnEvent) -> None:
        """Calls `listener` with every past event, then with every new one."""
        for event in self.history:
            listener(event)
        self._listeners.append(listener)

    def _take(self, event: dict[str, Any]) -> None:
        self.history.append(event)
        self.state.apply(event)
        if event["event"] == "observation":
            found = from_plain(Observation, event["observation"])
            self.observed[found.job_id, found.callback, found.epoch] = found.values
        elif event["event"] == "rank_correlations":
            for pair in event["rank_correlations"]:
                self.ranks[pair["lower"], pair["higher"]] = from_plain(RankCorrelation, pair)
        for listener in self._listeners:
            listener(event)

    def result(self) -> SearchResult:
        """The study so far."""
        return result_from_events(self.history, running=True)


def derived_seed(seed: int, *path: int) -> int:
    """A seed below 2^31 for one use, independent of those of other paths."""
    state = np.random.SeedSequence([seed, *path]).generate_state(1)
    return int(state[0] & 0x7FFFFFFF)


def full_training_seeds(seed: int, count: int) -> list[int]:
    """The seeds of the full trainings of a study, the same for every configuration."""
    return [derived_seed(seed, 2, number) for number in range(count)]


TieValues = Callable[
    [Sequence[FlatnessProfile], Mapping[str, CurvePoint], Mapping[str, float], float],
    Mapping[str, float],
]
"""Profiles, last points, weights and largest training accuracy -> value of each tied trial."""


def _no_values(
    profiles: Sequence[FlatnessProfile],
    points: Mapping[str, CurvePoint],
    weights: Mapping[str, float],
    best: float,
) -> Mapping[str, float]:
    return {}


def _no_costs(hyperparameters: Mapping[str, HyperparameterValue]) -> Mapping[str, float]:
    return {}


def _no_operations(hyperparameters: Mapping[str, HyperparameterValue]) -> float:
    return 0.0


@dataclass
class ProbeSource:
    """Tier 1 as a source of jobs: asks the scheduler, the searcher and the stop rules.

    Attributes:
        study: Where everything is recorded.
        scheduler: Chooses between new trials and promotions.
        searcher: Gives hyperparameters.
        rungs: The ladder.
        stop_rules: Asked after every point of a job.
        search_rules: Asked whether tier 1 should end.
        audit_share: Share of the samples spent on jobs that a rule would have stopped.
        seed: Of the study.
        warm: Whether a promotion starts from the weights of the rung below.
        report_every: Epochs between two points of a job.
        num_kept: Trials that go on from the highest rung, to tier 2 and verification.
        model_costs: Size of the network of a configuration, for those who ask for it.
        operations: Multiply-adds of that network, for schedulers that count them.
        tie_break: What ties at promotions are settled by; None: not at all.
        tie_values: The calibrated contribution of tier 2 of tied trials.
    """

    study: Study
    scheduler: Scheduler
    searcher: ConfigurationSource
    rungs: Sequence[Rung]
    stop_rules: Sequence[StopRule] = ()
    search_rules: Sequence[SearchRule] = ()
    audit_share: float = 0.0
    seed: int = 0
    warm: bool = False
    report_every: int = 1
    num_kept: int = 1
    model_costs: Callable[[Mapping[str, HyperparameterValue]], Mapping[str, float]] = _no_costs
    operations: Callable[[Mapping[str, HyperparameterValue]], float] = _no_operations
    tie_break: TieBreak | None = None
    tie_values: TieValues = _no_values

    def __post_init__(self) -> None:
        self._policy = StopPolicy(self.stop_rules, self.search_rules, self.audit_share, self.seed)
        self._plan = SearchPlan(
            self.rungs, self.scheduler.num_trials, self.report_every, self.scheduler.max_failures
        )
        self._live = self._whole = False
        self._measuring: dict[tuple[int, int], ListedSource] = {}
        self._replayed = SearchState()
        self.study.listen(self._follow_searcher)
        self._live = True
        for job in list(self.study.state.orphans.values()):
            decision = self.study.state.stops.get(job.job_id)
            if decision is not None:  # killed between the verdict and the end it led to
                self._end_stopped(job, decision)
        for rung in sorted(self.study.state.completed):  # killed between an end and what it led to
            self._measure_ranks(rung)

    def _follow_searcher(self, event: dict[str, Any]) -> None:
        """Keeps the searcher's state a function of the ledger, in the order of its lines."""
        state = self.study.state
        if not self._live:
            state = self._replayed
            state.apply(event)
        if event["event"] == "trial" and not self._live:
            trial = from_plain(Trial, event["trial"])
            again = self.searcher.suggest(int(trial.trial_id[1:]))
            if again != dict(trial.hyperparameters):
                logger.warning(
                    "the searcher now suggests %s for %s, the ledger has %s; the ledger counts",
                    again,
                    trial.trial_id,
                    dict(trial.hyperparameters),
                )
        elif event["event"] == "job_end" and event["kind"] == "probe":
            trial_id, rung = event["end"]["trial_id"], int(event["rung"])
            tell = getattr(self.searcher, "tell", None)
            over = state.is_over(trial_id, rung, max_failures=self.scheduler.max_failures)
            if tell is None or not over or rung != self._first_rung(state.trials[trial_id]):
                return
            accuracy = on_lowest_rung(state, trial_id, rung)
            told: tuple[Any, ...] = (accuracy if math.isfinite(accuracy) else None,)
            several = bool(getattr(self.searcher, "objectives", ()))
            if several and math.isfinite(accuracy):  # the network of a failed one may not exist
                told = (*told, self._costs(state, trial_id, rung))
            tell(int(trial_id[1:]), *told)

    def _costs(self, state: SearchState, trial_id: str, rung: int) -> dict[str, float]:
        """What a searcher with several objectives is told beside the accuracy."""
        points = state.curve(trial_id, rung).points
        samples = points[-1].samples_seen if points else 0
        measured = self.model_costs(state.trials[trial_id].hyperparameters)
        seconds = points[-1].seconds / samples if samples else math.nan
        return {**measured, "seconds": seconds}

    def _first_rung(self, trial: Trial) -> int:
        return self.scheduler.brackets()[trial.bracket].first_rung

    def _is_over(self, trial_id: str, rung: int) -> bool:
        return self.study.state.is_over(trial_id, rung, max_failures=self.scheduler.max_failures)

    def next_job(self) -> Job | Literal["wait", "done"]:
        """The next probe, decided and recorded."""
        state = self.study.state
        busy = bool(state.running) or any(one.running for one in self._measuring.values())
        if self._hopeless():
            return WAIT if busy else DONE
        self._end_search()
        if state.ended is not None:
            return WAIT if busy else DONE
        if not self._whole:  # later steps are written whole by this process
            left_over = self._half_written()
            if left_over is not None:
                return left_over
            self._whole = True
        step = self.scheduler.next_step(state)
        while isinstance(step, TieAtCut):
            measuring = self._measure_tie(step)
            if measuring is not None:
                return measuring
            step = self.scheduler.next_step(state)
        if step == DONE and busy:
            return WAIT
        if step in (WAIT, DONE):
            return step
        if isinstance(step, NewTrial):
            decision = Decision("new", f"t{len(state.trials):03d}", step.rung, step.reason)
            return self._start(step.bracket, decision, [("decision", {"decision": decision})])
        assert isinstance(step, Decision)
        job = self._job(state.trials[step.trial_id], step.rung)
        self.study.record_all([("decision", {"decision": step}), ("job", {"job": job})])
        return job

    def _measure_tie(self, tie: TieAtCut) -> Job | Literal["wait"] | None:
        """The next measurement of a tie; None once it is settled and recorded."""
        assert self.tie_break is not None
        state, at = self.study.state, (tie.bracket, tie.rung)
        names = [place[3] for place in tie.tied]
        if at not in self._measuring:
            jobs = [self._tie_job(state.trials[name], tie.rung) for name in names]
            self._measuring[at] = ListedSource(
                self.study, jobs, max_failures=self.scheduler.max_failures, record_as="tie_profile"
            )
        job = self._measuring[at].next_job()
        if job != DONE:
            return job
        known = [(name, tie.rung) for name in names]
        values = self.tie_values(
            [state.tie_profiles[key] for key in known if key in state.tie_profiles],
            {name: state.curve(name, rung).points[-1] for name, rung in known},
            self.tie_break.weights,
            self._best_fit(tie.rung),
        )
        self.study.record("tie", choice=settle(tie, values))
        return None

    def _tie_job(self, trial: Trial, rung: int) -> Job:
        assert self.tie_break is not None
        return Job(
            job_id=f"{trial.trial_id}-t{rung}",
            kind="measure",
            trial=trial,
            rung=self.rungs[rung - 1],
            seed=trial.seed,
            start_from=self.study.state.ends[trial.trial_id, rung].checkpoint,
            metrics=self.tie_break.metrics,
        )

    def _best_fit(self, rung: int) -> float:
        """The largest training accuracy at the end of a rung."""
        state = self.study.state
        ends = [state.curve(name, rung).points[-1] for name in state.completed.get(rung, ())]
        return max((p.train_accuracy for p in ends if not math.isnan(p.train_accuracy)), default=0)

    def _start(
        self, bracket: int, decision: Decision, before: list[tuple[str, Mapping[str, Any]]]
    ) -> Job:
        index = int(decision.trial_id[1:])
        trial = Trial(
            trial_id=decision.trial_id,
            hyperparameters=self.searcher.suggest(index),
            seed=derived_seed(self.seed, 1, index),
            bracket=bracket,
        )
        job = self._job(trial, decision.rung)
        lines = list(before)
        if getattr(self.scheduler, "cost", "") == "operations":  # before the trial they are of
            lines += self._operations_of(trial)
        lines.append(("trial", {"trial": trial}))
        noted = getattr(self.searcher, "noted", None)
        if noted is not None and index in noted:
            lines.append(("proxy", {"trial_id": trial.trial_id, "proxy": noted[index]}))
        self.study.record_all([*lines, ("job", {"job": job})])
        return job

    def _operations_of(self, trial: Trial) -> list[tuple[str, Mapping[str, Any]]]:
        """What its network takes; nothing when that cannot be built, which its worker will find."""
        try:
            operations = self.operations(trial.hyperparameters)
        except Exception as error:  # noqa: BLE001 - networks raise anything
            logger.warning(
                "the operations of %s cannot be counted, it is taken for average: %s: %s; %s",
                trial.trial_id,
                type(error).__name__,
                error,
                dict(trial.hyperparameters),
            )
            return []
        found = {"trial_id": trial.trial_id, "operations": operations}
        return [("operations", found)] if operations else []

    def _half_written(self) -> Job | None:
        """Goes on with a step of which a kill let only the first lines reach the disk."""
        state = self.study.state
        for trial_id, decision in state.announced.items():
            if trial_id not in state.trials:
                number = self.scheduler.bracket_of(int(trial_id[1:]), decision.rung)
                return self._start(number, decision, [])
        started = [(trial_id, self._first_rung(trial)) for trial_id, trial in state.trials.items()]
        for trial_id, rung in [*started, *sorted(state.promoted)]:
            if probe_id(trial_id, rung) not in state.issued:
                job = self._job(state.trials[trial_id], rung)
                self.study.record("job", job=job)
                return job
        return None

    def _job(self, trial: Trial, rung: int) -> Job:
        state = self.study.state
        job_id = probe_id(trial.trial_id, rung)
        before = state.issued.get(job_id)
        return Job(
            job_id=job_id,
            kind="probe",
            trial=trial,
            rung=self.rungs[rung - 1],
            seed=trial.seed,
            attempt=0 if before is None else before.attempt + 1,
            start_from=self._weights_below(trial, rung) if self.warm else None,
            micro_batch_divisor=4 ** state.memory_failures.get(job_id, 0),
        )

    def _weights_below(self, trial: Trial, rung: int) -> CheckpointRef | None:
        end = self.study.state.ends.get((trial.trial_id, rung - 1))
        return end.checkpoint if end is not None else None

    def _hopeless(self) -> bool:
        if len(self.study.state.failures) < HOPELESS:
            return False
        ends = self.study.state.ends
        failed = {t for (t, r), e in ends.items() if e.outcome == "failed" and self._is_over(t, r)}
        return len(failed) >= HOPELESS and len(failed) == len({t for t, _ in ends})

    def on_report(self, job: Job, report: Report) -> StopDecision | None:
        """Records a point and asks the stop rules about the curve up to it.

        Of the points that a resumed job repeats only the last is asked about again: a kill may have
        come between it and the verdict.
        """
        if job.kind == "measure":
            return self._measuring[job.trial.bracket, job.rung.rung].on_report(job, report)
        if isinstance(report, Observation):
            record_observation(self.study, report)
            return None
        assert isinstance(report, CurvePoint)
        state = self.study.state
        record_point(self.study, job, report)
        if report.epoch < max(state.points[job.job_id]):
            return None
        self._end_search()
        keep = self.keep_fraction(job.trial, job.rung.rung)
        found = self._policy.about_job(state, job, self._plan, keep)
        if found is None:
            return None
        decision, verdict = found
        self.study.record("decision", decision=decision)
        return verdict if verdict.stop else None

    def _end_search(self) -> None:
        """Ends tier 1 when a rule says so; jobs that lost their worker end with it."""
        state = self.study.state
        decision = self._policy.about_search(state, self._plan)
        if decision is not None:
            self.study.record("decision", decision=decision)
        if state.ended is None:
            return
        for job in list(state.orphans.values()):
            if state.may_retry(job.job_id, self.scheduler.max_failures):
                rung = job.rung.rung
                self._end_stopped(
                    job, Decision("stop", job.trial.trial_id, rung, state.ended.reason)
                )

    def keep_fraction(self, trial: Trial, rung: int) -> float:
        """Share of the trials on a rung of the trial's bracket that go on."""
        sizes = self.scheduler.sizes()[trial.bracket]
        kept = sizes.get(rung + 1, self.num_kept)
        return min(1.0, kept / sizes[rung])

    def on_end(self, job: Job, end: JobEnd) -> None:
        """Records how a probe, or a measurement of a tie, ended."""
        if job.kind == "measure":
            self._measuring[job.trial.bracket, job.rung.rung].on_end(job, end)
            return
        record_end(self.study, job, end)
        if job.job_id in self.study.state.audits:
            self.study.record("stop_audit", stop_audit=self._policy.audit(self.study.state))
        if end.outcome == "completed":
            self._measure_ranks(job.rung.rung)

    def _measure_ranks(self, rung: int) -> None:
        """Records how the rungs below order the trials of `rung`, and what follows from it."""
        state = self.study.state
        if not is_due(state, rung):
            return
        found = rank_correlations(state, rung)
        known = self.study.ranks
        new = [c for c in found if to_plain(known.get((c.lower, c.higher))) != to_plain(c)]
        if new:
            self.study.record("rank_correlations", rank_correlations=new)
        decision = self._policy.about_ranks(state, found)
        if decision is not None:
            self.study.record("decision", decision=decision)

    def _end_stopped(self, job: Job, decision: Decision) -> None:
        curve = self.study.state.curve(job.trial.trial_id, job.rung.rung).points
        end = JobEnd(
            job.job_id,
            job.trial.trial_id,
            "stopped",
            stopped_by=decision.reason.partition(":")[0],
            samples_seen=curve[-1].samples_seen if curve else 0,
            seconds=curve[-1].seconds if curve else 0.0,
        )
        record_end(self.study, job, end)


class ListedSource:
    """A fixed list of jobs, each tried until it succeeds or fails too often.

    Args:
        study: Where everything is recorded; jobs that ended there already are not run again.
        jobs: In the order in which they start.
        max_failures: Retries of each.
        record_as: Name of the line that a profile becomes.
    """

    def __init__(
        self,
        study: Study,
        jobs: Sequence[Job],
        *,
        max_failures: int = 2,
        record_as: Literal["profile", "tie_profile"] = "profile",
    ) -> None:
        self.study = study
        self._record_as = record_as
        self._max_failures = max_failures
        self._failures = {job.job_id: 0 for job in jobs}
        self._memory_failures = {job.job_id: 0 for job in jobs}
        self._attempts = {job.job_id: 0 for job in jobs}
        self._running: set[str] = set()
        over: set[str] = set()
        for event in study.history:
            if event["event"] == "job" and event["job"]["job_id"] in self._attempts:
                self._attempts[event["job"]["job_id"]] += 1
            elif event["event"] == "job_end" and event["end"]["job_id"] in self._failures:
                end = from_plain(JobEnd, event["end"])
                if self._settled(end):
                    over.add(end.job_id)
        self._todo = [job for job in jobs if job.job_id not in over]

    def _settled(self, end: JobEnd) -> bool:
        if end.outcome not in ("failed", "out_of_memory"):
            return True
        self._failures[end.job_id] += 1
        self._memory_failures[end.job_id] += end.outcome == "out_of_memory"
        return (
            self._failures[end.job_id] > self._max_failures or self._memory_failures[end.job_id] > 1
        )

    @property
    def running(self) -> int:
        """Jobs that have begun and not ended."""
        return len(self._running)

    def next_job(self) -> Job | Literal["wait", "done"]:
        """The next job of the list."""
        if not self._todo:
            return WAIT if self._running else DONE
        listed = self._todo.pop(0)
        job = replace(
            listed,
            attempt=self._attempts[listed.job_id],
            micro_batch_divisor=4 ** self._memory_failures[listed.job_id],
        )
        self._attempts[job.job_id] += 1
        self._running.add(job.job_id)
        self.study.record("job", job=job)
        return job

    def on_report(self, job: Job, report: Report) -> StopDecision | None:
        """Records a point, a profile or a verification; never stops a job."""
        if isinstance(report, CurvePoint):
            record_point(self.study, job, report)
        elif isinstance(report, Observation):
            record_observation(self.study, report)
        elif isinstance(report, FlatnessProfile):
            at = {"rung": job.rung.rung} if self._record_as == "tie_profile" else {}
            self.study.record(self._record_as, **at, profile=report)
        else:
            self.study.record("verification", job_id=job.job_id, verification=report)
        return None

    def on_end(self, job: Job, end: JobEnd) -> None:
        """Records the end; a job that may be tried again goes back to the front of the list."""
        self._running.discard(job.job_id)
        record_end(self.study, job, end)
        if not self._settled(end):
            self._todo.insert(0, job)


class PhasedSource:
    """Sources one after the other, on the same workers; the next starts when one says `done`.

    Args:
        study: Where the phases are recorded.
        phases: Name and maker of each source; made when its turn comes.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        study: Study,
        phases: Sequence[tuple[str, Callable[[], JobSource]]],
        clock: Callable[[], float],
    ) -> None:
        self.study = study
        self._left = list(phases)
        self._clock = clock
        self._name = ""
        self._started = 0.0
        self._current: JobSource | None = None

    def next_job(self) -> Job | Literal["wait", "done"]:
        """The next job of the current phase, or of the next."""
        while True:
            if self._current is None:
                if not self._left:
                    return DONE
                self._name, make = self._left.pop(0)
                self._started = self._clock()
                self.study.record("phase", name=self._name, status="start", seconds=0.0)
                self._current = make()
            job = self._current.next_job()
            if job != DONE:
                return job
            self._current = None
            seconds = self._clock() - self._started
            self.study.record("phase", name=self._name, status="end", seconds=seconds)

    def on_report(self, job: Job, report: Report) -> StopDecision | None:
        """Passes a report to the current phase."""
        assert self._current is not None
        return self._current.on_report(job, report)

    def on_end(self, job: Job, end: JobEnd) -> None:
        """Passes an end to the current phase."""
        assert self._current is not None
        self._current.on_end(job, end)


def measure_jobs(study: Study, chosen: Iterable[str]) -> list[Job]:
    """One `measure` job for each trial of `chosen`, at its checkpoint of the highest rung."""
    rungs = {rung.rung: rung for rung in study.result().rungs}
    jobs = []
    for trial_id in chosen:
        trial = study.state.trials[trial_id]
        number = max(r for (t, r), e in study.state.ends.items() if t == trial_id and e.checkpoint)
        jobs.append(
            Job(
                job_id=f"{trial_id}-m",
                kind="measure",
                trial=trial,
                rung=rungs[number],
                seed=trial.seed,
                start_from=study.state.ends[trial_id, number].checkpoint,
            )
        )
    return jobs


def record_point(study: Study, job: Job, point: CurvePoint) -> None:
    """Writes a `point` event, unless a resumed job repeats what the ledger has."""
    known = study.state.points.get(job.job_id, {}).get(point.epoch)
    if known is not None and same_point(known, point):
        return
    study.record(
        "point", job_id=job.job_id, trial_id=job.trial.trial_id, kind=job.kind, point=point
    )


def record_observation(study: Study, found: Observation) -> None:
    """Writes an `observation` event, unless a resumed job repeats what the ledger has."""
    key = (found.job_id, found.callback, found.epoch)
    if to_plain(study.observed.get(key)) != to_plain(found.values):
        study.record("observation", observation=found)


def record_end(study: Study, job: Job, end: JobEnd) -> None:
    """Writes a `job_end` event."""
    study.record("job_end", kind=job.kind, rung=job.rung.rung, attempt=job.attempt, end=end)


def same_point(a: CurvePoint, b: CurvePoint) -> bool:
    """Whether two points tell of the same training, seconds aside; NaN equals NaN."""
    fields = ("epoch", "samples_seen", "train_loss", "validation_loss", "validation_accuracy")
    return all(
        getattr(a, f) == getattr(b, f) or (math.isnan(getattr(a, f)) and math.isnan(getattr(b, f)))
        for f in fields
    )
