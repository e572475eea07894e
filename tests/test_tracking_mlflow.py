"""MLflow as a copy of the ledger: complete, without duplicates, however often it is shipped."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from study_runs import environment, signals_itself

from llp.errors import EnvironmentProblem, TrackingError
from llp.protocols import Tracker
from llp.tracking.ledger import Ledger, read_events
from llp.tracking.links import read_state
from llp.tracking.mlflow_tracker import MlflowTracker, ServerNotAnswering
from llp.tracking.shipper import main, ship, start_shipper, tracking_target, wait_shipper
from llp.tracking.ui import base_url, start_ui, stop_ui
from tests.make_study import HOSTILE, make_events, write_study

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SQLite file for all tests here: making its tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def uri(database: Path) -> Iterator[str]:
    level = logging.getLogger("alembic").level
    yield f"sqlite:///{database}"
    logging.getLogger("alembic").setLevel(level)


def runs_of(uri: str, experiment: str) -> dict[str, Any]:
    """All runs of an experiment by name, and a failure when a name is there twice."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    runs = list(client.search_runs([found.experiment_id], max_results=1000))
    names = [run.info.run_name for run in runs]
    assert len(names) == len(set(names)), "a run was made twice"
    return {run.info.run_name: run for run in runs}


def num_runs(uri: str, experiment: str) -> int:
    """Runs of an experiment, straight from the database."""
    query = "SELECT count(*) FROM runs JOIN experiments AS e USING (experiment_id) WHERE e.name = ?"
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        (found,) = connection.execute(query, [experiment]).fetchone()
    return int(found)


def snapshot(uri: str, experiment: str) -> dict[str, Any]:
    """Everything MLflow holds for an experiment except ids that differ from run to run."""
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        rows = {}
        for name, run in runs_of(uri, experiment).items():
            query = "SELECT key, step, timestamp, value FROM metrics WHERE run_uuid = ?"
            metrics = sorted(connection.execute(query, [run.info.run_id]).fetchall())
            tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
            info = (run.info.status, run.info.start_time, run.info.end_time)
            datasets = [d.dataset.to_dictionary() for d in run.inputs.dataset_inputs]
            rows[name] = (info, run.data.params, tags, metrics, datasets)
        return rows


@pytest.fixture(scope="session")
def shipped(database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """A made-up study that was shipped whole in one go: URI, experiment, folder."""
    folder = write_study(tmp_path_factory.mktemp("whole") / "whole", make_events(12, resumed=True))
    uri = f"sqlite:///{database}"
    done = ship(folder, uri, "whole")
    assert (done.num_runs, done.ended) == (13, True)
    return uri, "whole", folder


def test_one_parent_and_one_child_per_trial(shipped: tuple[str, str, Path]) -> None:
    uri, experiment, folder = shipped
    events = list(read_events(folder))
    runs = runs_of(uri, experiment)
    parent = runs.pop(events[0]["study_id"])
    assert set(runs) == {e["trial"]["trial_id"] for e in events if e["event"] == "trial"}
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["llp.kind"] == "trial"
        assert run.data.tags["llp.study_id"] == events[0]["study_id"]
        assert run.data.tags["llp.git_commit"] == events[0]["environment"]["git_commit"]
    assert parent.data.tags["llp.kind"] == "study"
    assert parent.data.tags["llp.winner"] == events[-1]["winner"]
    assert parent.data.params["training.batch_size"] == "64"
    assert {name: run.info.status for name, run in runs.items() if name in {"t001", "t006"}} == {
        "t001": "FAILED",
        "t006": "FAILED",
    }
    others = {run.info.status for name, run in runs.items() if name not in {"t001", "t006"}}
    assert others == {"FINISHED"}


def test_metric_history_is_the_curve_of_the_ledger(shipped: tuple[str, str, Path]) -> None:
    uri, experiment, folder = shipped
    client, events = MlflowClient(uri), list(read_events(folder))
    runs = runs_of(uri, experiment)
    top = max(
        (e["point"]["rung"], e["trial_id"])
        for e in events
        if e["event"] == "point" and e["kind"] == "probe"
    )[1]
    points = {
        (e["point"]["rung"], e["point"]["epoch"]): e["point"]["validation_accuracy"]
        for e in events
        if e["event"] == "point" and e["trial_id"] == top and e["kind"] == "probe"
    }
    history = client.get_metric_history(runs[top].info.run_id, "tier1/validation_accuracy")
    assert [metric.value for metric in history] == [points[place] for place in sorted(points)]
    assert [metric.step for metric in history] == list(range(1, 19))


def test_scores_sort_the_trials_as_the_printed_link_does(shipped: tuple[str, str, Path]) -> None:
    uri, _, folder = shipped
    state = read_state(folder)
    assert state is not None
    report = next(e["score_report"] for e in read_events(folder) if e["event"] == "scores")
    expected = sorted(report["scores"], key=lambda score: -score["value"])
    runs = MlflowClient(uri).search_runs(
        [state.experiment_id],
        filter_string=f"tags.`llp.study_id` = '{state.study_id}' and tags.`llp.kind` = 'trial'",
        order_by=["metrics.`final/score` DESC"],
    )
    assert [run.info.run_name for run in runs][: len(expected)] == [
        score["trial_id"] for score in expected
    ]
    assert len(runs) == 12


def test_spec_and_report_and_dataset_are_with_the_parent(shipped: tuple[str, str, Path]) -> None:
    uri, experiment, folder = shipped
    parent = runs_of(uri, experiment)["made-up-0123abcd"]
    files = {file.path for file in MlflowClient(uri).list_artifacts(parent.info.run_id)}
    assert files == {"spec.yaml", "report.html"}
    location = parent.info.artifact_uri.removeprefix("file://")
    assert Path(location, "spec.yaml").read_bytes() == (folder / "spec.yaml").read_bytes()
    (entry,) = parent.inputs.dataset_inputs
    assert entry.dataset.name == "digits"
    assert json.loads(entry.dataset.profile)["num_rows"] == 1200


def test_shipping_again_changes_nothing(shipped: tuple[str, str, Path]) -> None:
    uri, experiment, folder = shipped
    before = snapshot(uri, experiment)
    assert sum(len(row[3]) for row in before.values()) > 800
    assert ship(folder, uri, experiment).ended
    assert snapshot(uri, experiment) == before
    ship(folder, uri, experiment, rebuild=True)
    assert snapshot(uri, experiment) == before
    (folder / "mlflow_sync.json").unlink()
    ship(folder, uri, experiment)
    assert snapshot(uri, experiment) == before
    (folder / "mlflow_sync.json").write_text("{torn")
    ship(folder, uri, experiment)
    assert snapshot(uri, experiment) == before


def test_shipping_piece_by_piece_equals_shipping_at_once(
    shipped: tuple[str, str, Path], tmp_path: Path
) -> None:
    uri, experiment, folder = shipped
    events = list(read_events(folder))
    other = tmp_path / "pieces"
    for end in (1, 40, 41, 170, len(events)):
        write_study(other, events[:end])
        ship(other, uri, "pieces")
    assert snapshot(uri, "pieces") == snapshot(uri, experiment)


def test_new_tracker_completes_what_an_exception_cut_short(
    shipped: tuple[str, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, experiment, folder = shipped
    events = list(read_events(folder))
    other = write_study(tmp_path / "cut", events)
    real = MlflowClient.log_batch
    calls = 0

    def failing(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise MlflowException("database is locked")
        return real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    tracker = MlflowTracker(uri, "cut", other)
    assert isinstance(tracker, Tracker)
    with pytest.raises(ServerNotAnswering, match="database is locked"):
        tracker.write(events)
    assert read_state(other) is None, "nothing is marked as shipped before it is"
    while True:  # the same tracker goes on where it was
        try:
            tracker.write([])
            break
        except ServerNotAnswering:
            continue
    del tracker
    monkeypatch.undo()
    ship(other, uri, "cut")  # and a new one finds the rest
    assert snapshot(uri, "cut") == snapshot(uri, experiment)


def test_killed_shipper_leaves_no_gap_and_no_duplicate(
    shipped: tuple[str, str, Path], tmp_path: Path
) -> None:
    uri, _, _ = shipped
    events = make_events(24, seed=2)
    killed = write_study(tmp_path / "killed", events)
    words = ("llp.tracking.shipper", str(killed), "--uri", uri, "--experiment", "killed")
    command = signals_itself("SIGKILL", "mlflow:MlflowClient.create_run", 5, *words)
    done = subprocess.run(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    assert num_runs(uri, "killed") == 5, "the kill was to fall in the middle"
    ship(killed, uri, "killed")
    whole = write_study(tmp_path / "not-killed", events)
    ship(whole, uri, "not-killed")
    assert snapshot(uri, "killed") == snapshot(uri, "not-killed")


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000, 200_000, 500_000])
def test_shipper_killed_while_mlflow_makes_its_tables_does_no_harm(
    tmp_path: Path, size: int
) -> None:
    folder = write_study(tmp_path / "s", make_events(1))
    making = tmp_path / ".mlflow.db.making"
    words = ("llp.tracking.shipper", str(folder))
    command = signals_itself("SIGKILL", f"database={making}", size, *words)
    done = subprocess.run(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    assert making.exists(), "the kill was to fall into the making of the tables"
    assert not (tmp_path / "mlflow.db").exists()
    assert ship(folder).num_runs == 2
    assert sorted(path.name for path in tmp_path.glob(".mlflow.db.*")) == [".mlflow.db.lock"]


def test_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", make_events(1))
    (tmp_path / "mlflow.db").write_text("certainly not a database" * 100)
    with pytest.raises(TrackingError, match=r"mlflow\.db does not answer.*not a database"):
        ship(folder, give_up_after=0.0)


def test_deleted_parent_is_made_again(uri: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", make_events(2))
    ship(folder, uri, "deleted")
    client = MlflowClient(uri)
    client.delete_run(runs_of(uri, "deleted")["made-up-0123abcd"].info.run_id)
    ship(folder, uri, "deleted")
    runs = runs_of(uri, "deleted")
    assert len(runs) == 3
    parent = runs["made-up-0123abcd"].info.run_id
    assert {run.data.tags.get("mlflow.parentRunId", parent) for run in runs.values()} == {parent}


def test_two_studies_of_the_same_name_are_kept_apart(uri: str, tmp_path: Path) -> None:
    for number in (1, 2):
        events = make_events(2)
        for event in events:
            event["time"] += 1000 * number
        ship(write_study(tmp_path / f"{number}" / "same", events), uri, "same name")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("same name")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2 * 3


def test_hostile_names_arrive_as_text(uri: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", make_events(2, hostile=HOSTILE))
    ship(folder, uri, "llp/hostile <b>&")
    runs = runs_of(uri, "llp/hostile <b>&")
    assert len(runs) == 3
    values = runs["t001"].data.params.values()
    assert any("<script>alert('x')</script>" in value for value in values)


def test_running_trials_of_an_interrupted_study_are_killed_and_revived(
    uri: str, tmp_path: Path
) -> None:
    events = make_events(8)
    middle = next(n for n, e in enumerate(events) if e["event"] == "point") + 3
    folder = write_study(tmp_path / "s", events[:middle])
    with Ledger.open(folder):  # a driver is at work
        ship(folder, uri, "revived")
        assert {run.info.status for run in runs_of(uri, "revived").values()} == {"RUNNING"}
    assert not ship(folder, uri, "revived").ended
    assert {run.info.status for run in runs_of(uri, "revived").values()} == {"KILLED"}
    write_study(folder, events)
    ship(folder, uri, "revived")
    assert {run.info.status for run in runs_of(uri, "revived").values()} == {"FINISHED", "FAILED"}


# -- behind a running search ----------------------------------------------------------------------


def test_background_process_follows_the_study_to_its_end(uri: str, tmp_path: Path) -> None:
    events = make_events(8)
    events[0]["spec"]["tracking"] = {"mlflow": True, "uri": uri, "experiment": "followed"}
    folder = write_study(tmp_path / "s", events[:30])
    assert tracking_target(folder) == (uri, "followed")
    with Ledger.open(folder) as ledger:
        process = start_shipper(folder)
        for event in events[30:]:
            payload = {k: v for k, v in event.items() if k not in {"seq", "time", "event"}}
            ledger.append_many([(event["event"], payload)])
        assert wait_shipper(process, 60)
    assert len(runs_of(uri, "followed")) == 9
    state = read_state(folder)
    assert state is not None
    assert (state.complete, state.last_seq) == (True, len(events) - 1)
    log = (folder / "mlflow.log").read_text()
    assert "shipped" in log
    assert "View run" not in log


def test_follower_ends_when_no_driver_has_the_study_any_more(uri: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", make_events(2)[:9])
    ledger = Ledger.open(folder)  # as the driver that then fails without a last word
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            ledger.close()
        return False

    shipped = ship(folder, uri, "left", follow=True, stop_when=look, interval=0.01)
    assert (looks, shipped.ended) == (2, False)
    assert {run.info.status for run in runs_of(uri, "left").values()} == {"KILLED"}


def test_background_process_ends_soon_after_its_driver_was_killed(uri: str, tmp_path: Path) -> None:
    events = make_events(8)[:30]
    events[0]["spec"]["tracking"] = {"uri": uri, "experiment": "orphan"}
    folder = write_study(tmp_path / "s", events)
    code = """
import sys, time
from llp.tracking.shipper import start_shipper
print(start_shipper(sys.argv[1]).pid, flush=True)
time.sleep(600)
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    shipper = int(driver.stdout.readline())
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 600
    while _alive(shipper) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(shipper)
    assert {run.info.status for run in runs_of(uri, "orphan").values()} == {
        "FAILED",  # t001, which had diverged by then
        "KILLED",
    }


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_second_shipper_is_refused_while_one_is_at_work(uri: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", make_events(1))
    code = """
import sys
from llp.tracking.lock import FileLock
from pathlib import Path
lock = FileLock.acquire(Path(sys.argv[1]), busy="")
print("locked", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "mlflow_sync.lock")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(TrackingError, match=f"already being shipped.*{other.pid}"):
            ship(folder, uri, "refused")
    finally:
        other.kill()
        other.communicate()


# -- servers that are not there -------------------------------------------------------------------


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_server_that_does_not_answer_is_named(
    tmp_path: Path, free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_study(tmp_path / "s", make_events(1))
    nowhere = f"http://127.0.0.1:{free_port}"
    with pytest.raises(TrackingError, match=nowhere) as caught:
        ship(folder, nowhere, "x", give_up_after=1.0)
    assert f"llp sync {folder}`" in str(caught.value)
    assert caught.value.exit_code == 5
    assert main([str(folder), "--uri", nowhere, "--give-up-after", "0"]) == 5
    assert any(nowhere in record.getMessage() for record in caplog.records)


def test_database_in_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", make_events(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match=r"sqlite:///.*file/mlflow\.db"):
        ship(folder, f"sqlite:///{tmp_path}/file/mlflow.db", "x", give_up_after=0.0)


@pytest.mark.slow
def test_server_with_a_page_gets_the_same_as_the_database(
    shipped: tuple[str, str, Path], database: Path, tmp_path: Path, free_port: int
) -> None:
    uri, experiment, folder = shipped
    server = start_ui(uri, port=free_port)
    try:
        url = base_url("127.0.0.1", free_port)
        with urllib.request.urlopen(f"{url}/", timeout=120) as page:
            assert b"<html" in page.read().lower()
        other = write_study(tmp_path / "served", list(read_events(folder)))
        assert ship(other, url, "served").num_runs == 13
        ship(other, url, "served", rebuild=True)
        parent = runs_of(url, "served")["made-up-0123abcd"]
        files = MlflowClient(url).list_artifacts(parent.info.run_id)
        assert {file.path for file in files} == {"spec.yaml", "report.html"}
        with pytest.raises(EnvironmentProblem, match=f"port {free_port}"):
            start_ui(uri, port=free_port)
    finally:
        stop_ui(server)
    assert snapshot(uri, "served") == snapshot(uri, experiment)
    assert os.path.exists(database)
