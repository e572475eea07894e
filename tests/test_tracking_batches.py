"""A batch in MLflow: one run for every training under one for the batch, whatever happens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from batch_ledgers import make_ledger
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from llp import batch, batch_command
from llp.batch_results import BatchResult
from llp.cli import app
from llp.errors import TrackingError
from llp.spec.batch import Batch, load_batch
from llp.tracking import shipper
from llp.tracking.batch_rows import BatchRows
from llp.tracking.ledger import Ledger, read_events
from llp.tracking.links import study_link
from llp.tracking.mlflow_tracker import MlflowTracker
from llp.tracking.rows import STUDY
from llp.tracking.shipper import ship, tracking_target

TEXT = """\
version: 1
name: made_up
base: digits
defaults: {seeds: 2, training: {epochs: 3}}
runs:
  sgd: {grid: {learning_rate: [0.03, 0.1, 0.3]}, choose: {}}
  sam: {parameters: {optimizer: sam, learning_rate: 0.1}}
ablation: {sam: {momentum: 0}}
"""
LEVELS = {"sgd": 0.9, "sam": 0.95}
BAD = ("sam-s1",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("batch")
    return make_ledger(folder, text=TEXT, levels=LEVELS, bad=BAD)


def told(made: Batch, event: str) -> list[Mapping[str, Any]]:
    return [found for found in read_events(made.folder) if found["event"] == event]


def test_every_training_is_a_row_with_its_curve_and_results(made: Batch) -> None:
    rows = BatchRows()
    for event in read_events(made.folder):
        rows.take(event)
    jobs = {event["job"]["job_id"]: event["job"] for event in told(made, "job")}
    assert rows.rows.keys() == {STUDY, *jobs}
    for job_id, job in jobs.items():
        row, config = rows.rows[job_id], job["trial"]["hyperparameters"]
        assert {name: row.params[name] for name in config} == {
            name: str(value) for name, value in config.items()
        }
        assert row.params["seed"] == str(job["seed"])
        assert row.params["run"] == job["trial"]["trial_id"].partition(".")[0]
        values = {(name, step): value for name, value, _, step in row.metrics}
        points = [e["point"] for e in told(made, "point") if e["job_id"] == job_id]
        for point in points:
            got = values["training/validation_accuracy", point["epoch"]]
            assert got == point["validation_accuracy"]
        tested = [
            e["verification"]["test_accuracy"]
            for e in told(made, "verification")
            if e["job_id"] == job_id
        ]
        assert [v for (name, _), v in values.items() if name == "final/test_accuracy"] == tested
        assert row.status == ("FAILED" if job_id in BAD else "FINISHED")
        assert (("final/validation_accuracy", 0) in values) == (job_id not in BAD)
    assert "nan" in rows.rows["sam-s1"].tags["llp.failure"]
    chosen = {k: row.tags["llp.chosen"] for k, row in rows.rows.items() if "llp.chosen" in row.tags}
    assert chosen == {"sgd.k000-t0": "false", "sgd.k001-t0": "true", "sgd.k002-t0": "false"}
    log_rate = float(rows.rows["sgd-s0"].params["log10_learning_rate"])
    assert log_rate == pytest.approx(math.log10(0.1))


def test_the_parent_has_means_counts_and_cost(made: Batch) -> None:
    rows = BatchRows()
    for event in read_events(made.folder):
        rows.take(event)
    values = {name: value for name, value, *_ in rows.rows[STUDY].metrics}
    of_sgd = [
        event["verification"]["test_accuracy"]
        for event in told(made, "verification")
        if event["verification"]["trial_id"] == "sgd"
    ]
    assert len(of_sgd) == 2
    assert values["test_accuracy/sgd"] == pytest.approx(fmean(of_sgd))
    ends = [event["end"] for event in told(made, "job_end")]
    assert values["num_trainings/diverged"] == 1
    assert values["num_trainings/completed"] == len(ends) - 1
    assert values["cost/samples_seen"] == sum(end["samples_seen"] for end in ends)
    assert rows.rows[STUDY].status == "FINISHED"


def test_nothing_is_lost_when_mlflow_is_down_and_nothing_is_sent_twice(
    made: Batch, tmp_path: Path
) -> None:
    (tmp_path / "a file").write_text("no database")
    with pytest.raises(TrackingError, match=f"llp sync {made.folder}`"):
        ship(made.folder, f"sqlite:///{tmp_path / 'a file' / 'mlflow.db'}", give_up_after=0.0)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert tracking_target(made.folder)[1] == "llp/made_up"
    events = list(read_events(made.folder))
    tracker = MlflowTracker(uri, "llp/made_up", made.folder)
    tracker.write(events[: len(events) // 2])  # a shipper that was killed half-way
    for rebuild in (False, True):
        shipped = ship(made.folder, uri, rebuild=rebuild)
        client = MlflowClient(uri)
        runs = list(client.search_runs([shipped.experiment_id], max_results=1000))
        names = sorted(run.info.run_name for run in runs)
        jobs = [event["job"]["job_id"] for event in told(made, "job")]
        assert names == sorted(["made_up", *jobs])
        assert shipped.ended
    (parent,) = [run for run in runs if run.data.tags["llp.kind"] == "batch"]
    children = [run for run in runs if run.data.tags["llp.kind"] == "training"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    (best,) = [run for run in children if run.info.run_name == "sgd-s0"]
    history = client.get_metric_history(best.info.run_id, "training/validation_accuracy")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (e["point"]["epoch"], e["point"]["validation_accuracy"])
        for e in told(made, "point")
        if e["job_id"] == "sgd-s0"
    ]
    link = study_link(made.folder, "http://mlflow")
    assert link is not None
    assert "training" in link
    assert "test_accuracy" in link


def test_llp_sync_takes_a_batch(made: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ship(folder: Path, *, rebuild: bool) -> shipper.Shipped:
        asked.append((folder, rebuild))
        return shipper.Shipped("sqlite://", "llp/made_up", "1", 9, 4, True)

    monkeypatch.setattr(shipper, "ship", ship)
    done = CliRunner().invoke(app, ["sync", str(made.folder), "--rebuild"])
    assert done.exit_code == 0, done.stderr
    assert asked == [(made.folder, True)]
    assert "4 runs with 9 events of made_up are in experiment llp/made_up" in done.stdout


def test_runs_added_later_make_the_finished_parent_run_again(tmp_path: Path) -> None:
    made = make_ledger(tmp_path, text=TEXT, levels=LEVELS)
    with Ledger.open(made.folder) as ledger:
        ledger.append("opened", host="h", pid=1)
    rows = BatchRows()
    for event in read_events(made.folder):
        rows.take(event)
    assert not rows.terminal
    assert rows.rows[STUDY].status == "RUNNING"
    rows.interrupt()
    assert rows.rows[STUDY].status == "KILLED"


def test_the_command_says_when_mlflow_has_not_got_all_of_it(
    made: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = BatchResult(made.folder, Path("page"), Path("table"), "answer", {"completed": 1})
    monkeypatch.setattr(batch, "run", lambda *_, **__: result)
    monkeypatch.setattr(batch, "datasets", lambda _: {})
    monkeypatch.setattr(batch, "plan", lambda *_: [])
    monkeypatch.setattr(batch_command, "_command", lambda: "llp batch")
    (tmp_path / "made_up.yaml").write_text(TEXT)
    line = ["batch", str(tmp_path / "made_up.yaml"), f"--set=defaults.output.root={tmp_path}"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 5
    assert f"llp sync {tmp_path / 'made_up'}" in done.stderr
    done = CliRunner().invoke(app, [*line, "--set=defaults.tracking.mlflow=false"])
    assert done.exit_code == 0, done.stderr


def test_tracking_is_the_same_for_all_runs(tmp_path: Path) -> None:
    file = tmp_path / "b.yaml"
    file.write_text(TEXT.replace("seeds: 2", "seeds: 2, tracking: {experiment: mine}"))
    assert load_batch(file).tracking.experiment == "mine"
    assert load_batch(file).tracking.mlflow
