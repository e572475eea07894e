"""Every command of `llp` as a user types it: what it prints, where, and its exit code."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import make_dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT
from make_study import HOSTILE, RUNGS, make_events, make_spec, write_study
from typer.testing import CliRunner

import llp
from llp import cli, errors, shell, views
from llp.registry import TABLES
from llp.tracking import ledger, links

STUDY = "made-up-0123abcd"
COMMANDS = (
    *("search", "check", "resume", "status", "show", "list", "doctor"),
    *("export", "report", "ui", "sync", "init", "schema"),
)


def record(**values):
    """A frozen dataclass with these values, as the pipeline would return one."""
    return make_dataclass("Record", list(values), frozen=True)(**values)


def sync_state(**values):
    """What is known of the study in MLflow."""
    known = {"uri": "sqlite:///x.db", "experiment": "llp/made-up", "experiment_id": "7"}
    return links.SyncState(**{**known, "study_id": STUDY, "study_key": "key", **values})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def study(place):
    """A finished study in the default place; the newest of two."""
    old = make_events(num_trials=8, study_id="older-11111111")
    write_study(place / "llp_studies" / "older-11111111", old)
    newer = [{**event, "time": event["time"] + 1000} for event in make_events()]
    return write_study(place / "llp_studies" / STUDY, newer)


@pytest.fixture
def street(place, monkeypatch):
    """The pipeline replaced by one that does what a test tells it to.

    `street.act` is called with `on_event` and its value is the result of `search` and `resume`;
    `street.calls` holds the arguments.
    """
    events = make_events()
    fake = SimpleNamespace(calls=[], events=events, synced=True)

    def play(on_event):
        for event in fake.events:
            on_event(event)
        folder = write_study(place / "llp_studies" / STUDY, fake.events)
        links.write_state(folder, sync_state(complete=fake.synced))
        return ledger.load_study(folder)

    fake.act = play
    fake.plan = plan = record(
        rungs=RUNGS,
        num_trials=12,
        num_train=1200,
        num_validation=200,
        num_test=360,
        num_classes=10,
        jobs_per_rung={1: 12, 2: 4, 3: 1},
        samples_tier1=24480,
        samples_tier2=0,
        samples_verification=38400,
        samples_full_search=115200,
        left_out=(),
        earlier=None,
        ties=None,
        left_out_of_ties={},
    )
    pipeline = ModuleType("llp.pipeline")

    def search(spec, **options):
        fake.calls.append(options)
        return fake.act(options["on_event"])

    def resume(folder, **options):
        fake.calls.append({"folder": folder, **options})
        return fake.act(options["on_event"])

    pipeline.search, pipeline.resume = search, resume
    drawn = {"parameters": 777, "batch_size": 32, "device": "cpu"}
    drawn |= {"seconds": 0.25, "evaluation_seconds": 0.1}
    report = record(plan=plan, model_parameters=12345, batch_seconds=0.01, batch={"sampled": drawn})
    pipeline.plan = lambda spec: fake.plan
    pipeline.check = lambda spec: report
    pipeline.report = lambda folder: folder / "report.html"
    monkeypatch.setitem(sys.modules, "llp.pipeline", pipeline)
    monkeypatch.setattr(llp, "pipeline", pipeline, raising=False)
    return fake


@pytest.fixture
def run():
    runner = CliRunner()

    def invoke(*arguments):
        return runner.invoke(cli.app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def file(place):
    """An experiment file on disk."""
    path = place / "made-up.yaml"
    path.write_text(json.dumps(make_spec()), encoding="utf-8")
    return path


def strict(text):
    """The JSON objects of `text`, one a line; bare NaN and Infinity are refused."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# Help


def test_help_lists_every_command_and_every_exit_code(run):
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.output
    for code in (0, 1, 2, 3, 4, 5, 130):
        assert f"{code} " in result.output.split("Exit codes")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from llp.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'torchvision', 'ray', 'pandas', 'numpy', 'scipy', 'sklearn', 'mlflow',"
        " 'optuna', 'pydantic', 'matplotlib', 'ruamel.yaml', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.strip() == "[]"
    assert "search" in done.stdout


def test_looking_at_studies_needs_neither_torch_nor_ray(study):
    code = (
        "import sys\n"
        "from llp.cli import app\n"
        "for line in (['status'], ['list', 'studies'], ['list', 'models'], ['show', 'best']):\n"
        "    try:\n        app(line)\n    except SystemExit as end:\n        assert not end.code\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'pandas'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.strip() == "[]"


def test_version(run, monkeypatch):
    monkeypatch.setattr(cli, "__version__", "9.8.7")
    assert run("--version").output == "llp 9.8.7\n"


# Searching


def test_search_ends_with_winner_certainty_cost_and_where_to_look(run, street, file):
    result = run("search", file)
    assert result.exit_code == 0
    winner = street.events[-1]["winner"]
    assert f"winner {winner}" in result.stdout
    hyperparameters = next(
        event["trial"]["hyperparameters"]
        for event in street.events
        if event["event"] == "trial" and event["trial"]["trial_id"] == winner
    )
    for name, value in hyperparameters.items():
        assert f"  {name}: {value}" in result.stdout
    for part in ("accuracy", "how sure", "cost", "report.html", "llp ui", "2 full trainings"):
        assert part in result.stdout
    assert "winner" not in result.stderr
    lines = result.stdout.splitlines()
    assert lines == [line.rstrip() for line in lines]


def test_the_current_folder_is_importable_as_with_python_m(place, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "app", lambda: seen.append(list(sys.path)))
    for path in (["/somewhere"], ["", "/somewhere"]):
        monkeypatch.setattr(sys, "path", list(path))
        cli.main()
    assert seen == [[str(place), "/somewhere"], ["", "/somewhere"]]


def test_search_hands_on_study_name_and_command(run, street, file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llp", "search", "my file.yaml"])
    run("search", file, "--study", "mine")
    assert street.calls[0]["study_id"] == "mine"
    assert street.calls[0]["command"] == "llp search 'my file.yaml'"


def test_json_puts_events_and_result_on_stdout_and_people_on_stderr(run, street, file):
    result = run("search", file, "--json")
    rows = strict(result.stdout)
    assert [row["event"] for row in rows[:-1]] == [event["event"] for event in street.events]
    assert rows[-1]["event"] == "result"
    assert rows[-1]["result"]["winner"] == street.events[-1]["winner"]
    assert "winner" in result.stderr


def test_quiet_prints_only_the_result(run, street, file):
    result = run("search", file, "--quiet")
    assert result.stderr == ""
    assert result.stdout.startswith("winner")


def test_dry_run_and_check_print_the_plan_and_search_nothing(run, street, file):
    dry, checked = run("search", file, "--dry-run"), run("check", file)
    for result in (dry, checked):
        assert result.exit_code == 0
        for part in ("1,200 training", "rung", "10 %", "24.5 thousand", "54.6 %"):
            assert part in result.stdout
    assert "12,345 parameters" in checked.stdout
    assert "0.25 s for 32 images and 777 parameters" in checked.stdout
    evaluations = 6 * (12 + 4 + 1) + 38400 // 1200
    seconds = ((24480 + 38400) * 0.25 + evaluations * 200 * 0.1) / 32
    assert f"{seconds // 60:.0f} min {seconds % 60:.0f} s on one worker" in checked.stdout
    assert street.calls == []
    assert strict(run("check", file, "--json").stdout)[0]["check"]["model_parameters"] == 12345


def test_a_search_that_costs_more_than_full_training_says_so(run, street, file):
    assert "saves nothing" not in run("search", file, "--dry-run").stdout
    street.plan = replace(street.plan, samples_full_search=60000)
    assert "saves nothing" in run("search", file, "--dry-run").stdout


def test_an_override_reaches_the_spec(run, street, file):
    result = run("search", file, "--dry-run", "--set", "verification.num_seeds=7")
    assert "2 configurations, 7 seeds each" in result.stdout


def test_resume_takes_the_newest_study_by_default(run, study, street):
    assert run("resume", "--quiet").exit_code == 0
    assert run("resume", "older-11111111", "--quiet").exit_code == 0
    assert [call["folder"].name for call in street.calls] == [STUDY, "older-11111111"]


@pytest.mark.parametrize("root", ["llp_studies", "else where"])
def test_an_interrupt_prints_how_to_go_on(run, street, file, root):
    def act(on_event):
        for event in street.events[:20]:
            on_event(event)
        raise KeyboardInterrupt

    street.act = act
    result = run("search", file, "--set", f"output.root={root}")
    assert result.exit_code == 130
    line = result.stderr.strip().splitlines()[-1].strip()
    assert line == f"llp resume {STUDY}" + ("" if root == "llp_studies" else " --root 'else where'")


FAILURES = [
    (errors.SpecError("model: no such thing"), 2, "no such thing"),
    (errors.DataError("data/train.parquet is truncated"), 2, "data/train.parquet is truncated"),
    (errors.NoTrialSucceeded("all 12 trials diverged"), 3, "all 12 trials diverged"),
    (errors.StudyError("locked by process 7 on host h"), 4, "locked by process 7 on host h"),
    (errors.EnvironmentProblem("no GPU here"), 4, "no GPU here"),
    (errors.CheckpointError("t1-r1.pt was altered"), 4, "t1-r1.pt was altered"),
    (OSError(errno.ENOSPC, "No space left on device", "x/ledger.jsonl"), 4, "x/ledger.jsonl"),
    (errors.TrackingError("MLflow does not answer"), 5, "MLflow does not answer"),
]


@pytest.mark.parametrize(("error", "code", "words"), FAILURES, ids=lambda value: str(value)[:20])
def test_each_failure_is_one_message_and_its_exit_code(run, street, file, error, code, words):
    def act(on_event):
        raise error

    street.act = act
    result = run("search", file)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_adds_the_traceback_and_keeps_the_exit_code(run, street, file):
    def act(on_event):
        raise errors.EnvironmentProblem("no GPU here")

    street.act = act
    result = run("--debug", "search", file)
    assert result.exit_code == 4
    assert "Traceback" in result.stderr


def test_a_bug_keeps_its_traceback_and_asks_for_a_report(run, street, file):
    def act(on_event):
        raise ZeroDivisionError("oops")

    street.act = act
    result = run("search", file)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exception.__notes__ == [shell.BUG]


def test_a_winner_that_mlflow_has_not_heard_of_is_shown_with_exit_code_5(run, street, file):
    play = street.act

    def act(on_event):
        play(on_event)
        raise errors.TrackingError("MLflow does not answer; llp sync later")

    street.act = act
    result = run("search", file)
    assert result.exit_code == 5
    assert f"winner {street.events[-1]['winner']}" in result.stdout
    assert "llp sync" in result.stderr


@pytest.mark.parametrize(
    ("setting", "code"), [("tracking.mlflow=true", 5), ("tracking.mlflow=false", 0)]
)
def test_a_shipper_that_did_not_get_through_is_exit_5(run, street, file, setting, code):
    street.synced = False
    result = run("search", file, "--set", setting)
    assert result.exit_code == code
    assert f"winner {street.events[-1]['winner']}" in result.stdout
    assert ("llp sync" in result.stderr) == (code == 5)


def test_a_search_without_a_winner_ends_with_3(run, street, file):
    street.events = make_events()
    street.events[-1]["winner"] = None
    result = run("search", file)
    assert result.exit_code == 3
    assert "no trial" in result.stderr


def test_an_unknown_command_or_option_is_bad_input(run):
    assert run("serach").exit_code == 2
    assert "search" in run("serach").output
    assert run("status", "--nope").exit_code == 2


# Looking


def test_status_of_the_newest_and_of_a_named_study(run, study):
    assert STUDY in run("status").stdout
    assert "older-11111111" in run("status", "older-11111111").stdout
    row = strict(run("status", "--json").stdout)[0]
    assert (row["study_id"], row["status"]) == (STUDY, "finished")


def test_status_of_an_interrupted_study_says_how_to_go_on(run, place):
    write_study(place / "llp_studies" / STUDY, make_events(until="tier1"))
    result = run("status")
    assert "interrupted" in result.stdout
    assert f"llp resume llp_studies/{STUDY}" in result.stderr


def test_no_study_and_an_unknown_study_are_explained(run, place):
    empty = run("status")
    assert (empty.exit_code, "llp search" in empty.stderr) == (4, True)
    write_study(place / "llp_studies" / STUDY, make_events())
    wrong = run("status", "made-up-0123abcx")
    assert wrong.exit_code == 4
    assert f"did you mean '{STUDY}'?" in wrong.stderr


def test_show_best_has_curve_measurements_contributions_and_reasons(run, study):
    events = make_events()
    winner = events[-1]["winner"]
    text = run("show", "best").stdout
    assert text.startswith(f"{winner}  completed")
    for part in ("val. accuracy", "hessian_trace", "sam_sharpness", "promote", "  1000\n"):
        assert part in text
    reasons = [
        event["decision"]["reason"]
        for event in events
        if event["event"] == "decision" and event["decision"]["trial_id"] == winner
    ]
    assert all(reason in text for reason in reasons)
    assert run("show", STUDY, "winner").stdout == text
    assert run("show", "older-11111111", STUDY, "winner").exit_code == 2


def test_a_finished_study_says_when_mlflow_lacks_something(run, study):
    assert f"llp sync llp_studies/{STUDY}" in run("status").stdout
    links.write_state(study, sync_state(complete=True))
    assert "mlflow" not in run("status").stdout


def test_show_prints_few_points_of_a_long_curve_and_says_so(run, place):
    events = make_events()
    points = [event for event in events if event["event"] == "point"]
    first = [event for event in points if event["job_id"] == points[0]["job_id"]]
    write_study(place / "llp_studies" / STUDY, events)
    text = run("show", first[0]["trial_id"]).stdout
    epochs = [line.split()[3] for line in text.splitlines() if line.startswith("1 ")]
    assert (epochs[0], epochs[-1]) == ("1", str(first[-1]["point"]["epoch"]))
    assert len(epochs) == views.CURVE_POINTS < len(first)
    assert "all: --json" in text


def test_show_a_failure_with_its_traceback_and_a_stop_with_its_forecast(run, study):
    assert "RuntimeError: shapes do not match" in run("show", "t006").stdout
    assert "below the 0.7000 that would be promoted" in run("show", STUDY, "t003").stdout


def test_show_json_is_strict_and_complete(run, study):
    row = strict(run("show", "t001", "--json").stdout)[0]
    assert row["trial"]["outcome"] == "diverged"
    assert row["trial"]["curves"][0]["points"][-1]["train_loss"] is None


def test_show_an_unknown_trial_offers_the_known(run, study):
    result = run("show", "t0007")
    assert result.exit_code == 4
    assert "did you mean 't007'" in result.stderr


def test_hostile_names_cannot_steer_the_terminal(run, place):
    write_study(place / "llp_studies" / STUDY, make_events(hostile=HOSTILE + "\x1b[2J"))
    for arguments in (["status"], ["show", "t006"], ["show", "best"]):
        text = run(*arguments).output
        assert not any(letter in text for letter in "\x1b\x00\x07‮")


@pytest.mark.parametrize("table", list(TABLES))
def test_list_shows_every_row_of_every_table(run, table):
    text = run("list", table).stdout
    rows = strict(run("list", table, "--json").stdout)
    assert [row["name"] for row in rows] == list(TABLES[table])
    assert all(name in text for name in TABLES[table])


def test_list_studies_shows_the_damaged_too(run, study, place):
    (place / "llp_studies" / "broken").mkdir()
    (place / "llp_studies" / "broken" / "ledger.jsonl").write_text("not json\n")
    result = run("list", "studies")
    assert result.exit_code == 0
    assert STUDY in result.stdout
    assert "older-11111111" in result.stdout
    assert "damaged" in result.stdout
    assert "ledger.jsonl:1" in result.stderr
    assert len(strict(run("list", "studies", "--json").stdout)) == 3


def test_doctor_exits_4_only_when_a_check_fails(run, place, monkeypatch):
    from llp import doctor

    found = [doctor.Check("A", "ok", "fine"), doctor.Check("B", "warn", "slow", "do this")]
    monkeypatch.setattr(doctor, "examine", lambda root, spec: iter(found))
    result = run("doctor")
    assert result.exit_code == 0
    assert "do: do this" in result.stdout
    found.append(doctor.Check("C", "fail", "missing", "install it"))
    assert run("doctor").exit_code == 4
    assert [row["check"]["status"] for row in strict(run("doctor", "--json").stdout)] == [
        "ok",
        "warn",
        "fail",
    ]


# Using what was found


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_export_writes_tables_and_prints_where(run, study, place, format):
    result = run("export", "--format", format, "--out", place / "tables")
    assert result.exit_code == 0, result.output
    paths = result.stdout.split()
    assert paths
    assert all(os.path.getsize(path) for path in paths)


def test_options_of_a_report_matrix_are_named_beside_a_study(run, study):
    done = run("report", STUDY, "--only", "x", "--json")
    assert done.exit_code == 2
    assert "Invalid value for --only, --json" in done.output


def test_report_prints_its_path(run, study, street):
    assert run("report").stdout.strip() == f"llp_studies/{STUDY}/report.html"


def test_ui_prints_the_link_of_a_server_and_starts_nothing(run, place):
    events = make_events()
    events[0]["spec"]["tracking"]["uri"] = "http://mlflow.example:5000"
    folder = write_study(place / "llp_studies" / STUDY, events)
    links.write_state(folder, sync_state(uri="http://mlflow.example:5000"))
    result = run("ui")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == links.study_link(folder)


def test_ui_refuses_a_taken_port_and_names_another(run, study):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("ui", "--port", taken.getsockname()[1])
    assert result.exit_code == 4
    assert "choose another with --port" in result.stderr


def test_ui_ends_the_page_it_started(run, study, monkeypatch):
    from llp.tracking import ui

    ended = []

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(ui, "start_ui", lambda uri, port: SimpleNamespace(wait=interrupted))
    monkeypatch.setattr(ui, "stop_ui", ended.append)
    result = run("ui", "--port", "5123")
    assert result.exit_code == 0
    assert result.stdout.startswith("http://127.0.0.1:5123")
    assert len(ended) == 1


def test_sync_says_what_arrived_and_an_mlflow_that_is_gone_is_exit_5(run, study, monkeypatch):
    from llp.tracking import shipper

    asked = []

    def ship(folder, rebuild):
        asked.append(rebuild)
        return shipper.Shipped("sqlite:///x.db", "llp/made-up", "1", 99, 13, True)

    monkeypatch.setattr(shipper, "ship", ship)
    assert "13 runs with 99 events" in run("sync", "--rebuild").stdout
    assert asked == [True]

    def gone(folder, rebuild):
        raise errors.TrackingError("MLflow at http://x does not answer")

    monkeypatch.setattr(shipper, "ship", gone)
    result = run("sync")
    assert (result.exit_code, result.stdout) == (5, "")
    assert "does not answer" in result.stderr


def test_init_writes_a_file_that_loads_and_refuses_to_overwrite(run, place):
    from llp.spec import load_spec

    result = run("init", "mine")
    assert result.exit_code == 0, result.output
    assert load_spec("mine.yaml").name
    before = (place / "mine.yaml").read_text()
    again = run("init", "mine")
    assert again.exit_code == 2
    assert "mine.yaml exists already" in again.stderr
    assert (place / "mine.yaml").read_text() == before


def test_schema_is_json_that_describes_every_section(run):
    described = json.loads(run("schema").stdout)
    assert {"dataset", "model", "search_space", "tier1"} <= set(described["properties"])
