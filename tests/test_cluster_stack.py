"""A submitted search on a cluster of real processes: nodes die in the middle and nothing is lost.

What `docker/compose.yaml` starts in containers is started here as processes (see `cluster_stack`):
PostgreSQL, MLflow with accounts, a Ray head and nodes in token mode. A search is submitted with
`llp submit`, a worker process and then a whole node are killed, another node joins; the end is
compared with the same search on this machine, left in peace.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cluster_stack import PATIENCE, ROOT, Stack, wait_until
from halting import halted_at_work
from study_runs import events, llp
from test_pipeline_resume import check_replay

pytestmark = pytest.mark.slow

# Random configurations and no stop rules: then nothing that is decided depends on which of several
# workers was faster, and two runs can be compared to the last bit.
EXPERIMENT = """\
version: 1
name: stack
dataset: {name: synthetic, options: {num_train: 4000, num_test: 400, num_classes: 4, image_size: 8}}
model: {name: mlp, options: {width: 64, depth: 2}}
training: {epochs: 12, batch_size: 16, learning_rate: 0.1}
search_space:
  learning_rate: {type: loguniform, low: 1e-4, high: 1}
  momentum: {type: uniform, low: 0.0, high: 0.95}
tier1: {num_trials: 12, data_fractions: [0.2, 0.5, 1.0], reduction_factor: 3, stop_rules: []}
tier2: {top_k: 2, metrics: [sam_sharpness, gradient_norm], refinements: [], num_examples: 64}
verification: {top_k: 2, num_seeds: 2}
"""
STUDY = "stack-1"


@dataclass
class Searched:
    """What came of it.

    Attributes:
        stack: Still running.
        root: Folder of study folders.
        log: The ledger of the submitted study.
        whole: The ledger of the same search, undisturbed.
        exit_code: Of `llp submit --follow`.
        output: What it wrote.
        killed: What was killed, and after how many lines of the ledger.
        figures: For people.
    """

    stack: Stack
    root: Path
    log: list[dict[str, Any]]
    whole: list[dict[str, Any]]
    exit_code: int
    output: str
    killed: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    pytest.importorskip(
        "psycopg2", reason="psycopg2 is not installed (it is in the `cluster` extra)"
    )
    # A short path for Ray's sockets, and one that the user `postgres` may walk through.
    folder = Path(tempfile.mkdtemp(prefix="llp-st-"))
    folder.chmod(0o711)
    for name in ("client", "home", "studies"):
        (folder / name).mkdir()
    made = Stack(folder)
    try:
        made.start_mlflow(made.start_postgres())
        made.start_head()
        made.start_node()
        made.start_node()
        yield made
    except BaseException:
        for log in sorted(made.logs.iterdir()):
            print(f"--- {log.name}\n{log.read_text()[-2000:]}")
        raise
    finally:
        made.stop()
        left = made.left_behind()
        shutil.rmtree(folder, ignore_errors=True)
        assert not left


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict[str, Any]]:
    """The same search on this machine alone."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "stack.yaml").write_text(EXPERIMENT)
    quiet = ["--set", "tracking.mlflow=false", "--set", "output.report=false"]
    words = ["search", "stack.yaml", "--study", "whole", *quiet]
    done = llp(*words, folder=folder, timeout=2400)
    assert done.returncode == 0, done.stderr
    return events(folder / "llp_studies" / "whole" / "ledger.jsonl")


@pytest.fixture(scope="module")
def searched(stack, whole) -> Searched:
    root, client = stack.folder / "studies", stack.folder / "client"
    (client / "stack.yaml").write_text(EXPERIMENT)
    ledger = root / STUDY / "ledger.jsonl"
    killed: dict[str, int] = {}

    def lines() -> int:
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    def wait_for_lines(number: int) -> None:
        wait_until(
            lambda: lines() >= number or submit.poll() is not None,
            f"{number} lines of the ledger",
            3 * PATIENCE,
        )
        assert submit.poll() is None, (stack.logs / "submit.log").read_text()[-3000:]

    started = time.monotonic()
    submit = stack.start_llp("submit", *submit_words(stack))
    wait_for_lines(2)
    first_line = time.monotonic() - started
    total = len(whole)

    def going_on() -> bool:
        assert submit.poll() is None, (stack.logs / "submit.log").read_text()[-3000:]
        return True

    def lost() -> int:
        return sum(e["event"] == "job_end" and failed(e) for e in events(ledger))

    # What is killed has been halted at a job: killed between two jobs it would cost nothing. Either
    # node will do: the other may have no process for a while, because Tune ends idle ones.
    def at_work() -> psutil.Process:
        found = halted_at_work(lambda: stack.trial_processes(1, 2), going_on=going_on)
        assert found is not None
        return found

    wait_for_lines(int(0.15 * total))
    worker = at_work()
    killed["worker process"] = lines()
    worker.kill()
    wait_until(lambda: going_on() and lost(), "the ledger knows of the loss", PATIENCE)

    wait_for_lines(int(0.35 * total))
    worker = at_work()
    doomed = 1 if worker in stack.trial_processes(1) else 2
    killed["node"] = lines()
    num_processes = stack.kill_node(doomed)
    replacement = stack.start_node()

    on_replacement: set[int] = set()
    while submit.poll() is None:
        on_replacement |= {process.pid for process in stack.trial_processes(replacement)}
        time.sleep(0.2)
        assert time.monotonic() - started < 2400
    exit_code = submit.returncode
    log = events(ledger)
    figures = {
        "seconds": {
            **stack.seconds,
            "submit to the first ledger line": round(first_line, 1),
            "submit to the verified winner": round(time.monotonic() - started, 1),
        },
        "ledger lines": {"submitted": len(log), "undisturbed": total},
        "killed at line": killed,
        "processes of the killed node": num_processes,
        "lost jobs": {
            f"{e['end']['job_id']} attempt {e['attempt']}": e["end"]["failure"].split("\n")[0]
            for e in log
            if e["event"] == "job_end" and failed(e)
        },
        "longest silence of the ledger, seconds": round(
            max(after["time"] - before["time"] for before, after in itertools.pairwise(log)), 1
        ),
        "jobs done by the replacement": sum(
            e["event"] == "job_end" and _pid(e["end"]["worker"]) in on_replacement for e in log
        ),
    }
    output = (stack.logs / "submit.log").read_text()
    return Searched(stack, root, log, whole, exit_code, output, killed, figures)


def submit_words(stack: Stack) -> list[str]:
    return [
        *("submit", "stack.yaml", "--address", stack.address, "--study", STUDY, "--follow"),
        *("--set", f"output.root={stack.folder / 'studies'}"),
        *("--set", f"tracking.uri={stack.tracking_uri}"),
    ]


def _pid(worker: str) -> int | None:
    """The process id in a ledger's words for a worker: `host pid 123`."""
    found = re.search(r"pid (\d+)", worker)
    return int(found[1]) if found else None


def failed(event: dict[str, Any]) -> bool:
    return bool(event["end"]["outcome"] == "failed")


def results(log: list[dict[str, Any]]) -> dict[str, dict[int, tuple[float, ...]]]:
    """Job -> epoch -> what was measured there, seconds aside; a retried epoch counts once."""
    found: dict[str, dict[int, tuple[float, ...]]] = {}
    for event in log:
        if event["event"] == "point":
            point = event["point"]
            found.setdefault(event["job_id"], {})[point["epoch"]] = tuple(
                point[name]
                for name in (
                    "samples_seen",
                    "train_loss",
                    "validation_loss",
                    "validation_accuracy",
                )
            )
    return found


def test_the_submitted_search_ends_with_a_verified_winner(searched, capsys):
    with capsys.disabled():
        print("\n" + json.dumps(searched.figures, indent=2))
    assert searched.exit_code == 0, searched.output[-3000:]
    assert searched.log[-1]["event"] == "finished"
    winner = searched.log[-1]["winner"]
    assert f"winner {winner}" in searched.output
    verified = Counter(
        e["verification"]["trial_id"] for e in searched.log if e["event"] == "verification"
    )
    assert verified[winner] == 2
    assert (searched.root / STUDY / "report.html").stat().st_size > 10_000


def test_a_worker_and_a_node_were_really_lost(searched):
    assert 0 < searched.killed["worker process"] < searched.killed["node"] < len(searched.log) - 1
    lost = [e["end"] for e in searched.log if e["event"] == "job_end" and failed(e)]
    assert len(lost) >= 2
    assert all("worker process died" in end["failure"] for end in lost), lost
    completed = {
        e["end"]["job_id"]
        for e in searched.log
        if e["event"] == "job_end" and e["end"]["outcome"] == "completed"
    }
    assert {end["job_id"] for end in lost} <= completed, "each was run again, to its end"
    assert not [1 for e in searched.whole if e["event"] == "job_end" and failed(e)]


def test_every_trial_is_in_the_ledger_once_and_nothing_finished_ran_again(searched):
    new = Counter(
        e["decision"]["trial_id"]
        for e in searched.log
        if e["event"] == "decision" and e["decision"]["kind"] == "new"
    )
    assert new == {f"t{number:03d}": 1 for number in range(12)}
    for log in (searched.log, searched.whole):
        completed = Counter(
            e["end"]["job_id"]
            for e in log
            if e["event"] == "job_end" and e["end"]["outcome"] == "completed"
        )
        assert set(completed.values()) == {1}
    assert [e["seq"] for e in searched.log] == list(range(len(searched.log)))


def test_every_decision_follows_again_from_the_ledger(searched):
    assert check_replay(searched.log) >= 12


def test_the_end_is_that_of_the_undisturbed_search(searched):
    assert results(searched.log) == results(searched.whole)
    ends = [log[-1] for log in (searched.log, searched.whole)]
    assert ends[0]["winner"] == ends[1]["winner"]
    accuracies = [
        sorted(
            (v["trial_id"], v["seed"], v["test_accuracy"])
            for v in (e["verification"] for e in log if e["event"] == "verification")
        )
        for log in (searched.log, searched.whole)
    ]
    assert accuracies[0] == accuracies[1]


def test_mlflow_has_every_trial_for_those_who_may_see_it(searched):
    stack = searched.stack
    right = stack.secrets["mlflow_admin_password"]
    path, body = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=llp/stack", None
    assert stack.mlflow(path)[0] == 401
    assert stack.mlflow(path, user="admin", password="password1234")[0] == 401
    assert stack.mlflow(path, user="admin", password=right, host="evil.example")[0] == 403
    status, answer = stack.mlflow(path, user="admin", password=right, host="mlflow:5000")
    assert status == 200, "the name that the compose file gives the server is let in"
    body = {"experiment_ids": [answer["experiment"]["experiment_id"]], "max_results": 100}
    status, answer = stack.mlflow(
        "/api/2.0/mlflow/runs/search", body=body, user="admin", password=right
    )
    assert status == 200
    kinds = Counter()
    for run in answer["runs"]:
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        kinds[tags["llp.kind"]] += 1
        assert run["info"]["status"] == "FINISHED", tags
        assert tags["llp.study_id"] == STUDY
    assert kinds == {"study": 1, "trial": 12}


def test_ray_lets_nobody_in_without_the_token(searched):
    stack = searched.stack
    assert stack.ray("/api/jobs/", token="")[0] == 401
    assert stack.ray("/api/jobs/", token="0" * 64)[0] == 403
    wait_until(lambda: stack.node_healthy("head") == 0, "the health check needs no token", 60)


def test_no_secret_is_anywhere(searched):
    stack = searched.stack
    status, jobs = stack.ray("/api/jobs/")
    assert status == 200
    texts = {
        "the jobs as Ray tells them": json.dumps(jobs),
        "what llp submit wrote": searched.output,
    }
    for path in [*searched.root.rglob("*"), *stack.logs.rglob("*")]:
        if path.is_file():
            texts[str(path)] = path.read_bytes().decode("utf-8", "replace")
    ray_logs = [p for p in (stack.folder / "ray").glob("session_2*/logs/**/*") if p.is_file()]
    assert len(ray_logs) > 10
    for path in ray_logs:
        texts[str(path)] = path.read_bytes().decode("utf-8", "replace")
    for process in psutil.process_iter(["cmdline"]):
        texts[f"command line of {process.pid}"] = " ".join(process.info["cmdline"] or [])
    secrets = stack.secrets
    assert len(secrets) == 6
    found = {
        place: name for place, text in texts.items() for name in secrets if secrets[name] in text
    }
    assert found == {}
    token_file = stack.folder / "secrets" / "ray_token"
    assert secrets["ray_token"] in token_file.read_text(), "the search would have found it"


def test_submitting_again_finds_the_work_done(searched):
    before = (searched.root / STUDY / "ledger.jsonl").read_bytes()
    again = searched.stack.llp(*submit_words(searched.stack))
    assert again.returncode == 0, again.stderr
    assert "succeeded already" in again.stderr
    assert (searched.root / STUDY / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["report", "resume"])
def test_the_job_specs_run_on_the_cluster(searched, name, tmp_path):
    stack, page = searched.stack, searched.root / STUDY / "report.html"
    text = (ROOT / "jobs" / f"{name}.yaml").read_text()
    text = text.replace("cifar10-1", STUDY).replace("/studies", str(searched.root))
    (tmp_path / f"{name}.yaml").write_text(text)
    before = page.stat().st_mtime_ns
    sent = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "submit.py"), str(tmp_path / f"{name}.yaml")],
        env={**stack.environment(), "RAY_API_SERVER_ADDRESS": stack.address},
        capture_output=True,
        text=True,
    )
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.split()[-1]

    def ended() -> Any:
        status, answer = stack.ray(f"/api/jobs/{job}")
        return answer if status == 200 and answer["status"] in ("SUCCEEDED", "FAILED") else None

    answer = wait_until(ended, f"{name}.yaml")
    assert answer["status"] == "SUCCEEDED", answer["message"]
    assert answer["driver_exit_code"] == 0
    assert (page.stat().st_mtime_ns > before) == (name == "report")
    assert yaml.safe_load(text)["entrypoint"].strip() == answer["entrypoint"]
    _, logs = stack.ray(f"/api/jobs/{job}/logs")
    assert (str(page) if name == "report" else f"winner {searched.log[-1]['winner']}") in logs[
        "logs"
    ]


def test_a_stopped_node_gives_its_work_back(searched):
    """The compose file stops containers by SIGTERM; a drained node ends by itself."""
    stack = searched.stack
    node, address = stack.nodes[-1], f"127.0.0.{len(stack.nodes) + 1}"
    assert address in stack.alive()
    os.kill(node.pid, signal.SIGTERM)
    assert node.wait(PATIENCE) is not None
    # The other nodes are still told of: an answer, and not the lack of one.
    wait_until(lambda: (alive := stack.alive()) and address not in alive, "the head knows")
