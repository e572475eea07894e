"""What callbacks saw goes to the ledger once and to MLflow at its step, and decides nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_driver import RUNGS, kinds, make_study, probes, reopen, run_to_the_end, work

from llp.cluster.ray_tune import REPORTS
from llp.driver import ListedSource
from llp.records import Job, Observation, Trial, from_plain, to_plain
from llp.reporting.runs import full_trainings
from llp.tracking.ledger import load_study
from llp.tracking.mlflow_rows import Rows


def observation(job_id: str, epoch: int = 2, **changes: object) -> Observation:
    values = {"eigenvalue_1": 10.0 + epoch, "trace": math.nan}
    found = Observation("curvature", job_id, job_id.partition("-")[0], epoch, 50 * epoch, values)
    return Observation(**{**vars(found), **changes})  # type: ignore[arg-type]


def test_an_observation_crosses_a_process_boundary_unchanged() -> None:
    seen = observation("t000-r1", note="x")
    back = from_plain(REPORTS[type(seen).__name__], to_plain(seen))
    assert back.values["eigenvalue_1"] == 12.0
    assert math.isnan(back.values["trace"])
    assert {k: v for k, v in vars(back).items() if k != "values"} == {
        k: v for k, v in vars(seen).items() if k != "values"
    }


def test_an_observation_is_written_once_however_often_it_is_reported(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    source = probes(study)
    job = source.next_job()
    assert isinstance(job, Job)
    for _ in range(2):  # a resumed job says again what it said before
        assert source.on_report(job, observation(job.job_id)) is None
    study = reopen(study)
    again = probes(study)
    again.on_report(job, observation(job.job_id))
    assert kinds(study)["observation"] == 1
    again.on_report(job, observation(job.job_id, values={"eigenvalue_1": 1.0}))
    again.on_report(job, observation(job.job_id, epoch=4))
    assert kinds(study)["observation"] == 3
    study.ledger.close()
    assert load_study(tmp_path / "study").status == "interrupted"  # readers pass over it


def test_observations_change_no_decision(tmp_path: Path) -> None:
    plain = make_study(tmp_path / "plain")
    run_to_the_end(probes(plain))
    watched = make_study(tmp_path / "watched")
    source = probes(watched)
    while isinstance(job := source.next_job(), Job):
        source.on_report(job, observation(job.job_id, epoch=1))
        work(source, job)
    decisions = [
        [event["decision"] for event in study.history if event["event"] == "decision"]
        for study in (plain, watched)
    ]
    assert decisions[0] == decisions[1]
    assert kinds(watched)["observation"] > 6


def test_mlflow_gets_them_at_the_step_of_the_curve_they_belong_to(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    source = probes(study, num_trials=3)
    run_to_the_end(source)
    trial = Trial("t000", dict(study.state.trials["t000"].hyperparameters), 0)
    full = ListedSource(study, [Job("t000-v0", "verify", trial, RUNGS[1], seed=77)])
    job = full.next_job()
    assert isinstance(job, Job)
    promoted = next(
        event["job"]["job_id"]
        for event in study.history
        if event["event"] == "job" and event["job"]["rung"]["rung"] == 2
    )
    for job_id in ("t000-r1", promoted, "t000-v0"):
        full.on_report(job, observation(job_id))
    work(full, job)
    rows = Rows()
    for event in study.history:
        rows.take(event)
    found = {
        (key, name, step): value
        for key, row in rows.rows.items()
        for name, value, _, step in row.metrics
        if name.startswith("curvature/")
    }
    assert found == {
        ("t000", "curvature/eigenvalue_1", 2): 12.0,
        (promoted.partition("-")[0], "curvature/eigenvalue_1", 6 + 2): 12.0,
        ("t000", "curvature/eigenvalue_1_seed_77", 2): 12.0,
    }  # and no NaN


def test_a_full_training_knows_what_was_observed(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    run_to_the_end(probes(study, num_trials=3))
    trial = Trial("t000", {"x": 0.5}, 0)
    full = ListedSource(study, [Job("t000-v0", "verify", trial, RUNGS[1], seed=77)])
    job = full.next_job()
    assert isinstance(job, Job)
    for epoch in (2, 4, 2):
        full.on_report(job, observation("t000-v0", epoch=epoch))
    work(full, job)
    [training] = full_trainings(study.history)
    assert [seen.epoch for seen in training.observations] == [2, 4]
    assert training.observations[0].values["eigenvalue_1"] == pytest.approx(12.0)
