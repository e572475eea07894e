"""Runs jobs on Ray Tune; the only place that imports `ray.tune`.

A Tune trial is one *job* (one configuration on one rung, one measurement, one full training), not
one configuration. Promotion is then a new job, nothing is ever paused, Tune's concurrency limit
counts what really runs, and Tune needs no state of its own: which job comes next is asked of a
`JobSource`, which answers from the ledger. Tune brings placement, GPUs and fractions of them, actor
reuse, failure detection and clusters.

Workers run `JobTrainable`, a class trainable that is reused from job to job. Tune reuses actors
only for trainables with `save_checkpoint` and `load_checkpoint`; otherwise it silently starts a new
process for each (about 20 times slower on short jobs).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import traceback
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from llp.errors import EnvironmentProblem
from llp.protocols import Objective, Report
from llp.records import (
    CurvePoint,
    FlatnessProfile,
    Job,
    JobEnd,
    Observation,
    StopDecision,
    Verification,
    from_plain,
    to_plain,
)

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
"""How often the size of the cluster is asked for."""

REPORTS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (CurvePoint, FlatnessProfile, Verification, Observation)
}


class JobSource(Protocol):
    """Decides what runs and is told what happened; lives in the driver, writes the ledger."""

    def next_job(self) -> Job | Literal["wait", "done"]:
        """The next job for a free worker. Must not answer `wait` when nothing is running."""
        ...

    def on_report(self, job: Job, report: Report) -> StopDecision | None:
        """Takes a report into account; a decision with `stop` ends the job."""
        ...

    def on_end(self, job: Job, end: JobEnd) -> None:
        """Takes the end of a job into account, a lost worker (`failed`) included."""
        ...


@dataclass(frozen=True)
class Resources:
    """What one job gets, and how many run at once.

    Attributes:
        cpus: CPUs a job, also the number of its threads.
        gpus: GPUs a job; a fraction shares one.
        max_concurrent: Jobs at once; None for as many as fit.
    """

    cpus: float = 1
    gpus: float = 0
    max_concurrent: int | None = None


class JobTrainable(tune.Trainable):
    """A worker process: takes a job, works on it step by step, takes the next."""

    _work: Generator[Report, None, JobEnd] | None = None

    def setup(
        self,
        config: dict[str, Any],
        objective: Objective | None = None,
        seconds_limit: float | None = None,
    ) -> None:
        """Takes the first job. The objective comes through Ray's object store, once a worker."""
        assert objective is not None
        self._objective = objective
        self._seconds_limit = seconds_limit
        self._worker = worker_name()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next job in the same process."""
        self._close()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._job = from_plain(Job, config["job"])
        self._work = None  # started in `step`, so that a failure there is an outcome
        self._samples_seen = 0
        self._seconds = 0.0

    def step(self) -> dict[str, Any]:
        """Works on until there is something worth reporting."""
        reports: list[dict[str, Any]] = []
        end: JobEnd | None = None
        try:
            if self._work is None:
                self._work = iter(self._objective(self._job))  # type: ignore[assignment]
            pending = False  # a point that is not the last: worth a round trip
            while not pending:
                report = next(self._work)  # type: ignore[arg-type]
                reports.append({"type": type(report).__name__, "value": to_plain(report)})
                if isinstance(report, CurvePoint):
                    self._samples_seen, self._seconds = report.samples_seen, report.seconds
                    # The last epoch is reported together with the end, in one round trip.
                    pending = report.epoch < self._job.rung.epochs
                    end = self._over_time() if pending else None
        except StopIteration as stop:
            end = stop.value
        except EnvironmentProblem as problem:
            # A full disk is not the configuration's fault: the driver ends the search, and what
            # ran is run again by `llp resume`.
            # Not `done`: what is raised about a trial that is done, Tune logs and forgets.
            return {"reports": reports, "end": None, "problem": str(problem), "done": False}
        except Exception:  # noqa: BLE001  a bug in a user's model or dataset is an outcome
            end = self._ended("failed", failure=traceback.format_exc())
        if end is not None:
            self._close()
        return {
            "reports": reports,
            "end": None if end is None else to_plain(end),
            "worker": self._worker,
            "done": end is not None,
        }

    def _over_time(self) -> JobEnd | None:
        if self._seconds_limit is None or self._job.kind != "probe":
            return None
        if self._seconds <= self._seconds_limit:
            return None
        return self._ended("stopped", stopped_by="time_limit")

    def _ended(self, outcome: Literal["failed", "stopped"], **why: str) -> JobEnd:
        return JobEnd(
            self._job.job_id,
            self._job.trial.trial_id,
            outcome,
            samples_seen=self._samples_seen,
            seconds=self._seconds,
            **why,  # type: ignore[arg-type]
        )

    def _close(self) -> None:
        if self._work is not None:
            self._work.close()
        self._work = None

    def cleanup(self) -> None:
        """Ends the job when the worker is taken away."""
        self._close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: jobs write their own durable checkpoints (see `training.checkpoint`)."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load; present so that Tune reuses the actor."""


class _Room:
    """How many jobs may run at once: as many as fit on the nodes that are there at the moment.

    Nodes of a cluster may join late and get lost.
    """

    def __init__(self, resources: Resources, wait_for_nodes: float) -> None:
        self._resources = resources
        deadline = time.monotonic() + wait_for_nodes
        while True:
            try:
                self._fitting = _fitting(resources)
                break
            except EnvironmentProblem:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
        self._looked = time.monotonic()

    def size(self) -> int:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            with contextlib.suppress(EnvironmentProblem):  # all are gone: others may come
                self._fitting = _fitting(self._resources)
        return min(self._fitting, self._resources.max_concurrent or self._fitting)


class _Board:
    """The driver's side: hands jobs of a `JobSource` to Tune and Tune's news to the source."""

    def __init__(self, source: JobSource, room: _Room) -> None:
        self.source = source
        self.room = room
        self.jobs: dict[str, Job] = {}  # Tune's trial id -> the job it works on
        self.error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its arguments for a restore that the ledger makes unnecessary."""
        return {}

    def suggest(self, tune_id: str) -> Job | Literal["wait", "done"]:
        if self.error is not None:
            raise self.error
        if len(self.jobs) >= self.room.size():
            return "wait"
        with self._kept():
            job = self.source.next_job()
        if isinstance(job, Job):
            self.jobs[tune_id] = job
        return job

    def take(self, tune_id: str, result: dict[str, Any]) -> bool:
        """Passes on what a worker said; True when the job should stop now."""
        job = self.jobs.get(tune_id)
        if job is None:
            return True
        for item in result.get("reports") or ():
            report = from_plain(REPORTS[item["type"]], item["value"])
            with self._kept():
                verdict = self.source.on_report(job, report)
            if verdict is not None and verdict.stop and isinstance(report, CurvePoint):
                self._finish(tune_id, _stopped(job, report, verdict, result["worker"]))
                return True
        if result.get("problem"):
            self.error = EnvironmentProblem(result["problem"])
            raise self.error
        if result.get("end"):
            end = replace(from_plain(JobEnd, result["end"]), worker=result["worker"])
            self._finish(tune_id, end)
            return True
        return False

    def lose(self, tune_id: str, reason: str) -> None:
        """A worker died or could not be reached."""
        job = self.jobs.get(tune_id)
        if job is not None and self.error is None:
            end = JobEnd(job.job_id, job.trial.trial_id, "failed", failure=reason)
            self._finish(tune_id, end)

    def _finish(self, tune_id: str, end: JobEnd) -> None:
        job = self.jobs.pop(tune_id)
        with self._kept():
            self.source.on_end(job, end)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Keeps what the source raises: Tune would turn it into a `TuneError` with a text."""
        try:
            yield
        except BaseException as error:
            self.error = error
            raise


def _stopped(job: Job, point: CurvePoint, verdict: StopDecision, worker: str) -> JobEnd:
    return JobEnd(
        job.job_id,
        job.trial.trial_id,
        "stopped",
        stopped_by=verdict.reason,
        samples_seen=point.samples_seen,
        seconds=point.seconds,
        worker=worker,
    )


class _BoardSearcher(Searcher):
    """Tune asks this for the next trial; it answers with the next job."""

    def __init__(self, board: _Board) -> None:
        super().__init__(metric="reports", mode="max")
        self._board = board

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        job = self._board.suggest(trial_id)
        if job == "done":
            return str(Searcher.FINISHED)
        return None if job == "wait" else {"job": to_plain(job)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the scheduler has passed the result on, and knows why an error happened."""

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text("{}")  # the ledger is the state

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""


class _BoardScheduler(FIFOScheduler):
    """Passes every result to the board and stops what the board says."""

    def __init__(self, board: _Board) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._board = board

    def on_trial_result(
        self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        over = self._board.take(trial.trial_id, result)
        return str(TrialScheduler.STOP if over else TrialScheduler.CONTINUE)

    def on_trial_complete(
        self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]
    ) -> None:
        # A result with `done` comes here without passing `on_trial_result`.
        self._board.take(trial.trial_id, trial.last_result)

    def on_trial_error(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        signs = (RayActorError.__name__, "actor died", "is unavailable")
        if not text or any(sign in text for sign in signs):
            reason = f"the worker process died (killed, no memory, crashed, node lost)\n{text}"
        else:
            reason = f"the worker could not start or run the job\n{text}"
        self._board.lose(trial.trial_id, reason)


def run_jobs(
    source: JobSource,
    objective: Objective,
    *,
    resources: Resources,
    folder: Path,
    seconds_limit: float | None = None,
    wait_for_nodes: float = 0.0,
) -> None:
    """Runs jobs until the source says `done`.

    Args:
        source: Decides and records; called in this process only.
        objective: Sent to every worker once.
        resources: Per job.
        folder: Where Tune may keep its files.
        seconds_limit: Wall-clock limit of a probe; it then ends as stopped by `time_limit`.
        wait_for_nodes: Seconds that a cluster may take to have room for one job.

    Raises:
        EnvironmentProblem: The cluster can never fit one job.
    """
    board = _Board(source, _Room(resources, wait_for_nodes))
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
        TUNE_GLOBAL_CHECKPOINT_S="3600",
        TUNE_WARN_THRESHOLD_S="30",
        TUNE_MAX_PENDING_TRIALS_PG=str(max(board.room.size(), 64)),  # the board has the say
        TUNE_PRINT_ALL_TRIAL_ERRORS="0",
        RAY_AIR_NEW_OUTPUT="0",
    )
    trainable = tune.with_resources(
        tune.with_parameters(
            JobTrainable,
            objective=objective,
            seconds_limit=seconds_limit,
        ),
        {"cpu": resources.cpus, "gpu": resources.gpus},
    )
    with _quiet():
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=_BoardSearcher(board),
                scheduler=_BoardScheduler(board),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"jobs-{uuid.uuid4().hex[:8]}",
                storage_path=str(folder.resolve()),
                verbose=0,
                log_to_file=False,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        try:
            tuner.fit()
        except BaseException:
            if board.error is not None:
                raise board.error from None
            raise
        if board.error is not None:
            raise board.error


def _fitting(resources: Resources) -> int:
    """How many jobs fit on the cluster at once."""
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    if resources.gpus > 0 and gpus < min(resources.gpus, 1):
        raise EnvironmentProblem(
            f"resources.gpus_per_trial is {resources.gpus:g} but Ray sees {gpus:g} GPUs; "
            "run `llp doctor`, or set resources.gpus_per_trial=0 to run on the CPU"
        )
    if resources.cpus > cpus or resources.gpus > gpus:
        raise EnvironmentProblem(
            f"one trial asks for {resources.cpus:g} CPUs and {resources.gpus:g} GPUs, "
            f"the Ray cluster has {cpus:g} and {gpus:g}; lower resources.cpus_per_trial"
        )
    fit = int(cpus / resources.cpus + 1e-9)
    if resources.gpus > 0:
        share = resources.gpus
        # A trial's fraction lies on one GPU: two GPUs hold four trials of 0.4, not five.
        fit = min(fit, int(1 / share + 1e-9) * int(gpus) if share < 1 else int(gpus / share + 1e-9))
    return max(1, fit)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune warns about things that are on purpose here; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


@contextlib.contextmanager
def ray_session(
    *,
    address: str | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_bytes: int | None = None,
) -> Iterator[None]:
    """A connection to Ray for the time of the block: a cluster's, or one of our own.

    Without an address a local Ray is started on loopback, even when some other cluster runs on this
    machine (`ray.init()` alone would attach to whatever it finds), and shut down afterwards. A
    connection that exists already is used and left open.

    Raises:
        EnvironmentProblem: Ray cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "_node_ip_address": "127.0.0.1",
        }
        if object_store_bytes is not None:
            options["object_store_memory"] = object_store_bytes
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except Exception as error:  # of a start that takes too long Ray raises no narrower class
        what = "start Ray on this machine" if address is None else f"reach Ray at {address}"
        raise EnvironmentProblem(f"cannot {what}: {error}; run `llp doctor`") from error
    try:
        yield
    finally:
        ray.shutdown()


def hostname() -> str:
    """Name of this machine, for the ledger."""
    return socket.gethostname()


def worker_name() -> str:
    """This worker process in words: its host, its pid, and the GPUs that Ray gave it."""
    gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
    with_gpus = f" gpu {','.join(gpus)}" if gpus else ""
    return f"{hostname()} pid {os.getpid()}{with_gpus}"
