"""Ray Tune as the engine: reused actors, outcomes as values, lost workers, stop decisions."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from ray import cloudpickle

from llp.cluster.ray_tune import Resources, ray_session, run_jobs
from llp.errors import EnvironmentProblem
from llp.records import CurvePoint, Job, JobEnd, Rung, StopDecision, Trial, Verification


class Toy:
    """Reports its process id as the training loss; `behaviour` is a hyperparameter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, job: Job) -> Iterator[Any]:
        behaviour = job.trial.hyperparameters["behaviour"]
        for epoch in range(1, job.rung.epochs + 1):
            if behaviour == "full":
                raise EnvironmentProblem("disk full while writing checkpoints/x.pt")
            if behaviour == "raise":
                raise ValueError("a bug in the user's model")
            if behaviour == "die" and job.attempt == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            yield CurvePoint(1, 1.0, epoch, epoch * 10, os.getpid(), 0.5, 0.5, 0.5, epoch * 1.0)
        if behaviour == "verify":
            yield Verification(job.trial.trial_id, 0, 0.9, 0.1, 0.9, 0.1, 100, 10, 1.0)
        outcome = "diverged" if behaviour == "diverge" else "completed"
        return JobEnd(job.job_id, job.trial.trial_id, outcome, samples_seen=10 * job.rung.epochs)


class Listed:
    """A source that hands out a fixed list of jobs and retries lost ones once."""

    def __init__(self, behaviours: list[str], epochs: int = 3, stop_at: int | None = None) -> None:
        self.todo = [
            Job(f"j{i}", "probe", Trial(f"t{i}", {"behaviour": b}, i), Rung(1, 1.0, 10, epochs), i)
            for i, b in enumerate(behaviours)
        ]
        self.running: set[str] = set()
        self.most_at_once = 0
        self.reports: list[tuple[str, Any]] = []
        self.ends: list[tuple[Job, JobEnd]] = []
        self.stop_at = stop_at

    def next_job(self) -> Job | Literal["wait", "done"]:
        if self.todo:
            job = self.todo.pop(0)
            self.running.add(job.job_id)
            self.most_at_once = max(self.most_at_once, len(self.running))
            return job
        return "wait" if self.running else "done"

    def on_report(self, job: Job, report: Any) -> StopDecision | None:
        self.reports.append((job.job_id, report))
        if self.stop_at is not None and report.epoch == self.stop_at:
            return StopDecision(True, "because")
        return None

    def on_end(self, job: Job, end: JobEnd) -> None:
        self.running.discard(job.job_id)
        self.ends.append((job, end))
        if end.outcome == "failed" and "died" in end.failure and job.attempt == 0:
            again = Job(job.job_id, job.kind, job.trial, job.rung, job.seed, attempt=1)
            self.todo.append(again)


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    with ray_session(num_cpus=2, num_gpus=0, object_store_bytes=100 * 2**20):
        yield


ONE_CPU = Resources(cpus=1)


def run(source: Listed, folder: Path, resources: Resources = ONE_CPU, **options: Any) -> None:
    run_jobs(source, Toy(folder), resources=resources, folder=folder, **options)


def test_workers_are_reused_from_job_to_job(tmp_path):
    for most, num_jobs in ((1, 6), (2, 12)):
        source = Listed(["fine"] * num_jobs)
        run(source, tmp_path, Resources(cpus=1, max_concurrent=most))
        assert Counter(end.outcome for _, end in source.ends) == {"completed": num_jobs}
        processes = {int(report.train_loss) for _, report in source.reports}
        # Of two jobs that end at once, before the next is there, Tune keeps one process only.
        allowed = 1 if most == 1 else num_jobs // 2
        assert len(processes) <= allowed, "a new process for every job: actors are not reused"
        assert source.most_at_once == most


def test_every_report_arrives_once_and_in_order(tmp_path):
    source = Listed(["fine"] * 4, epochs=5)
    run(source, tmp_path)
    for job_id in ("j0", "j1", "j2", "j3"):
        assert [r.epoch for j, r in source.reports if j == job_id] == [1, 2, 3, 4, 5]


def test_outcomes_are_values(tmp_path):
    source = Listed(["raise", "diverge", "verify", "fine"])
    run(source, tmp_path)
    ends = {job.job_id: end for job, end in source.ends}
    assert ends["j0"].outcome == "failed"
    assert "a bug in the user's model" in ends["j0"].failure
    assert ends["j1"].outcome == "diverged"
    assert ends["j2"].outcome == ends["j3"].outcome == "completed"
    assert [type(r) for j, r in source.reports if j == "j2"][-1] is Verification


def test_the_ledger_is_told_which_process_did_a_job_also_a_stopped_one(tmp_path):
    for stop_at in (None, 2):
        source = Listed(["fine"] * 3, stop_at=stop_at)
        run(source, tmp_path)
        pids = {job_id: int(report.train_loss) for job_id, report in source.reports}
        workers = {job.job_id: end.worker for job, end in source.ends}
        assert workers == {job: f"{socket.gethostname()} pid {pid}" for job, pid in pids.items()}


def test_a_killed_worker_is_reported_and_the_rest_goes_on(tmp_path):
    source = Listed(["fine", "die", "fine", "fine"])
    run(source, tmp_path)
    outcomes = [(job.job_id, job.attempt, end.outcome) for job, end in source.ends]
    assert ("j1", 0, "failed") in outcomes
    assert ("j1", 1, "completed") in outcomes
    assert sum(outcome == "completed" for _, _, outcome in outcomes) == 4


def test_a_stop_decision_ends_the_job_there(tmp_path):
    source = Listed(["fine"] * 3, epochs=50, stop_at=2)
    run(source, tmp_path)
    assert {end.outcome for _, end in source.ends} == {"stopped"}
    assert {end.stopped_by for _, end in source.ends} == {"because"}
    assert {end.samples_seen for _, end in source.ends} == {20}
    assert max(report.epoch for _, report in source.reports) == 2


def test_the_time_limit_is_a_stop(tmp_path):
    source = Listed(["fine"], epochs=50)
    run(source, tmp_path, seconds_limit=3.5)
    assert [(e.outcome, e.stopped_by, e.samples_seen) for _, e in source.ends] == [
        ("stopped", "time_limit", 40)
    ]


def test_the_time_limit_spares_full_trainings_and_jobs_that_are_done(tmp_path):
    source = Listed(["fine", "fine"], epochs=5)
    source.todo[1] = dataclasses.replace(source.todo[1], kind="verify")
    run(source, tmp_path, seconds_limit=4.5)
    ends = {job.kind: end.outcome for job, end in source.ends}
    assert ends == {"probe": "completed", "verify": "completed"}


def test_a_full_disk_ends_the_search_and_fails_no_trial(tmp_path):
    source = Listed(["full", "full"])
    with pytest.raises(EnvironmentProblem, match="disk full"):
        run(source, tmp_path)
    assert source.ends == []


def test_asking_for_a_gpu_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(EnvironmentProblem, match="Ray sees 0 GPUs"):
        run_jobs(Listed(["fine"]), Toy(tmp_path), resources=Resources(gpus=0.5), folder=tmp_path)


def test_more_cpus_than_there_are_is_refused_at_once(tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"lower resources\.cpus_per_trial"):
        run_jobs(Listed(["fine"]), Toy(tmp_path), resources=Resources(cpus=64), folder=tmp_path)
