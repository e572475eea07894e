"""Submitting to a cluster: every mood of its job server ends in one message and one exit code."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT
from fake_job_server import FakeCluster, serving
from make_study import make_events, write_study
from ray._raylet import AuthenticationTokenLoader, Config
from study_runs import TINY
from typer.testing import CliRunner

from llp import cli, cluster_commands, doctor, pipeline
from llp.cluster import access, following, jobs, ray_tune, submission
from llp.errors import EnvironmentProblem, SpecError
from llp.records import Job, Rung, Trial
from llp.spec import digest, load_spec
from llp.worker import StudyObjective
from llp.workloads import load as load_data

TOKEN = "0123456789abcdef-not-for-print"


@pytest.fixture(autouse=True)
def ray_mode():
    """Whatever a test sets: afterwards Ray's mode in this process is that of the environment."""
    yield
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an experiment, away from the tokens and addresses of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith("RAY_A"):
            monkeypatch.delenv(name)
    Config.initialize("")  # a Ray started in this process keeps mode and token
    AuthenticationTokenLoader.instance().reset_cache()
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.02)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def cluster(place, monkeypatch):
    """A job server that wants the token which this process has."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serving(FakeCluster(TOKEN)) as fake:
        yield fake


@pytest.fixture
def study(place):
    """The id of the study that `submit` is about."""
    return f"tiny-{digest(load_spec('tiny.yaml'))[:8]}"


def run(*arguments):
    """One command; what it says never holds the token."""
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert TOKEN not in result.output
    return result


def submit(cluster, *arguments, root="/shared/studies"):
    where = ["--address", cluster.address, "--set", f"output.root={root}"]
    return run("submit", "tiny.yaml", *where, *arguments)


def sent_files(cluster):
    """Name -> text of everything in the one package that was sent."""
    (package,) = cluster.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


# What is sent


def test_only_the_experiment_travels_and_it_is_the_one_that_was_meant(cluster, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "made-up-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    result = submit(cluster, "--set", "tier1.num_trials=9", "--driver-cpus", "2")
    spec = load_spec("tiny.yaml", ["tier1.num_trials=9"])
    name = f"tiny-{digest(spec)[:8]}"
    assert result.exit_code == 0
    assert result.stdout == name + "\n"
    (job,) = cluster.jobs.values()
    assert job.submission_id == name
    assert job.metadata["llp_study"] == name
    assert job.metadata["llp_root"] == "/shared/studies"
    assert job.request["entrypoint_num_cpus"] == 2
    assert set(job.runtime_env["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S", "OMP_NUM_THREADS"}
    files = sent_files(cluster)
    assert set(files) == {".llp_job/experiment.yaml", ".llp_job/start.sh"}
    Path("arrived.yaml").write_text(files[".llp_job/experiment.yaml"])
    arrived = load_spec("arrived.yaml")
    assert digest(arrived) == digest(spec)
    assert arrived.output.root == "/shared/studies"
    everything = json.dumps([job.plain(), files])
    assert "made-up-secret" not in everything
    assert TOKEN not in everything


def test_the_command_goes_on_with_the_study_and_uses_the_cluster_it_runs_on(cluster):
    submit(cluster, "--study", "mine")
    words = cluster.jobs["mine"].entrypoint.split()
    assert words[:3] == ["exec", "sh", ".llp_job/start.sh"]
    assert words[3:] == [
        *("search", "experiment.yaml", "--study", "mine", "--resume"),
        *("--set", "resources.address=auto"),
    ]


def test_own_code_travels_with_its_folder_but_neither_ignored_nor_private_files(cluster, place):
    source = "def load():\n    raise AssertionError('only the cluster reads the images')\n"
    (place / "my_data_here.py").write_text(source)
    (place / ".gitignore").write_text("big.bin\n")
    (place / "big.bin").write_bytes(b"0" * 1000)
    (place / ".env").write_text("PASSWORD=made-up")
    (place / "home" / ".ray").mkdir(parents=True)
    (place / "home" / ".ray" / "auth_token").write_text(TOKEN)
    named = re.sub(r"(?m)^dataset: .*$", 'dataset: {name: "my_data_here:load"}', TINY)
    (place / "tiny.yaml").write_text(named)
    sys.path.insert(0, str(place))
    try:
        result = submit(cluster)
    finally:
        sys.path.remove(str(place))
    assert result.exit_code == 0
    assert f"sending {place}" in result.stderr
    assert "MiB" in result.stderr
    files = sent_files(cluster)
    assert files["my_data_here.py"] == source
    assert {"big.bin", ".env", "home/.ray/auth_token"}.isdisjoint(files)
    assert "yes" in files[".llp_job/start.sh"].split("cd /")[0]  # stays in its folder


def test_paths_that_vanish_with_the_job_are_refused_with_their_line(cluster):
    result = run(
        *("submit", "tiny.yaml", "--address", cluster.address),
        *("--set", "dataset.root=images", "--set", "tracking.uri=sqlite:///runs.db"),
        *("--set", 'searcher.warm_start.studies=["old/mine-1", "mlflow:sqlite:///m.db#x", "ok"]'),
        *("--set", "searcher.warm_start.meta={collection: llp_studies}"),
        *("--set", "tier2.tie_break=earned", "--set", "tier2.calibration=c.json"),
    )
    assert result.exit_code == 2
    assert "tiny.yaml:15:1 output.root: 'llp_studies' is relative" in result.stderr
    assert "dataset.root: 'images' is relative" in result.stderr
    assert "tracking.uri: 'sqlite:///runs.db' is a file in the job's temporary" in result.stderr
    assert "warm_start.studies.0: 'old/mine-1' is relative" in result.stderr
    assert "warm_start.studies.1: 'mlflow:sqlite:///m.db#x' is relative" in result.stderr
    assert "warm_start.studies.2" not in result.stderr
    assert "warm_start.meta.collection: 'llp_studies' is relative" in result.stderr
    assert "tier2.calibration: 'c.json' is relative" in result.stderr
    assert cluster.requests == []


@pytest.mark.parametrize(
    "override",
    [
        "dataset.options.source=https://me:made-up-pw@host/x",
        "dataset.options.source=postgresql://me:1/made-up/pw@host/x",
        "dataset.options.password=made-up-pw",
        "output.root=s3://bucket/x?secret_key=made-up-pw",
        "name=ghp_madeuppw0123456789abcdefghij",
    ],
)
def test_what_looks_like_a_secret_is_refused_and_not_repeated(cluster, override):
    result = submit(cluster, "--set", override)
    assert result.exit_code == 2
    assert "would end up in ledger, report and logs" in result.stderr
    assert re.sub("[^a-z]", "", result.output).count("madeuppw") == 0
    assert cluster.requests == []


@pytest.mark.parametrize(
    "line",
    [
        "tracking: {uri: 'https://me:made-up-pw@host:5000'}",
        "dataset: {name: synthetic, options: {secret_key: made-up-pw}}",
        "name: hf_madeuppw0123456789abcdefghij",
    ],
)
def test_the_line_that_holds_a_secret_is_shown_without_it(cluster, place, line):
    key = line.split(":")[0]
    kept = [row for row in TINY.splitlines() if not row.startswith(f"{key}:")]
    (place / "tiny.yaml").write_text("\n".join([*kept, line]) + "\n")
    result = submit(cluster)
    assert result.exit_code == 2
    assert f"tiny.yaml:{len(kept) + 1}:" in result.stderr
    assert "***" in result.stderr
    assert re.sub("[^a-z]", "", result.output).count("madeuppw") == 0


def test_what_resume_sends_holds_no_secret_either(cluster):
    secret = ["--set", "tracking.uri=http://me:made-up-pw@host:5000"]
    where = ["--root", "/shared", "--address", cluster.address]
    result = run("resume", "s", *where, *secret)
    assert result.exit_code == 2
    assert "--set tracking.uri: credentials in a URL" in result.stderr
    assert "made-up-pw" not in result.output
    assert cluster.requests == []


def test_options_of_a_cluster_without_one_are_refused(place, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    result = run("resume", "s", "--follow")
    assert result.exit_code == 2
    assert "--follow is of a job of a cluster: it needs --address" in result.stderr


def test_ordinary_experiments_hold_nothing_that_looks_like_a_secret():
    for path in sorted((ROOT / "search_spaces").glob("*.yaml")):
        load_spec(path)


def test_a_file_with_errors_is_refused_before_anybody_is_asked(cluster, place):
    (place / "tiny.yaml").write_text(TINY.replace("learning_rate: 0.1", "learning_rat: 0.1"))
    result = submit(cluster)
    assert result.exit_code == 2
    assert "did you mean 'learning_rate'?" in result.stderr
    assert cluster.requests == []


# Which Python


def under_a_raylet(place, python, *arguments, path="/usr/bin:/bin"):
    """Runs start.sh as a job finds it, below a process that looks like Ray's raylet."""
    prepared = submission.Submission("s", ("x",), "/shared")
    with submission.packed(prepared) as package:
        shutil.unpack_archive(package, place / "job")
    call = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[2:]))"
    script = ["sh", ".llp_job/start.sh", *arguments]
    return subprocess.run(
        [sys.executable, "-c", call, f"--python_worker_command={python} -u worker.py", *script],
        cwd=place / "job",
        env={"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_job_runs_with_the_python_of_ray_not_with_the_one_on_the_path(place):
    done = under_a_raylet(place, sys.executable, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("llp ")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_the_python_of_ray_may_lie_in_a_folder_with_a_space(place):
    (place / "my venv").mkdir()
    python = place / "my venv" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = under_a_raylet(place, f'"{python}"', "--version")
    assert done.stdout.startswith("llp ")


def test_a_cluster_without_llp_says_so(place):
    (place / "bin").mkdir()
    for tool in ("sh", "tr", "sed", "uname"):
        (place / "bin" / tool).symlink_to(shutil.which(tool))
    done = under_a_raylet(place, "/nowhere/python", "--version", path=str(place / "bin"))
    assert done.returncode == 4
    assert "(/nowhere/python) on" in done.stderr
    assert "has no llp" in done.stderr


# Ends


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, ""),
        ({"status": "FAILED", "driver_exit_code": 3}, 3, "exit code 3"),
        ({"status": "FAILED", "driver_exit_code": 2}, 2, "exit code 2"),
        ({"status": "FAILED", "driver_exit_code": 5}, 5, "llp resume"),
        ({"status": "FAILED", "driver_exit_code": -9}, 137, "SIGKILL"),
        ({"status": "FAILED", "driver_exit_code": 137}, 137, "SIGKILL"),
        ({"status": "FAILED", "driver_exit_code": -15}, 143, "SIGTERM"),
        ({"status": "FAILED", "driver_exit_code": 130}, 130, "was interrupted"),
        ({"status": "STOPPED"}, 130, "was stopped"),
        ({"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED"}, 4, "node its driver ran"),
        ({"status": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILURE"}, 4, "could not unpack"),
        ({"status": "FAILED", "message": "odd\nthing"}, 4, "failed: odd;"),
    ],
)
def test_the_end_of_the_job_is_the_end_of_its_follower(cluster, outcome, code, words):
    cluster.outcome = {**outcome, "log": "line one\nline two\n"}
    result = submit(cluster, "--follow", "--study", "s")
    assert result.exit_code == code
    assert result.stdout == "s\nline one\nline two\n"
    assert words in result.stderr
    resumable = code not in (0, 2, 3)
    hint = f"llp resume s --root /shared/studies --address {cluster.address}"
    assert (hint in result.stderr) == resumable
    again = run("jobs", "status", "s", "--wait", "--address", cluster.address)
    assert again.exit_code == code
    assert again.stdout == ""
    log = run("jobs", "logs", "s", "--follow", "--address", cluster.address)
    assert (log.exit_code, log.stdout) == (code, "line one\nline two\n")


def test_a_job_whose_log_died_with_its_node_still_ends_its_follower(cluster):
    cluster.logs_lost = True
    cluster.add("s", status="FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED")
    result = run("jobs", "logs", "s", "--follow", "--address", cluster.address)
    assert result.exit_code == 4
    assert "the rest of the log of s cannot be read" in result.stderr
    assert "the node its driver ran on died" in result.stderr
    assert "llp resume s" in result.stderr


def test_json_lines_tell_what_was_submitted_and_how_it_ended(cluster):
    cluster.outcome = {"status": "FAILED", "driver_exit_code": 3, "log": "words\n"}
    result = submit(cluster, "--follow", "--json", "--study", "s")
    first, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert (first["event"], first["action"], first["job"]["attempt"]) == (
        *("submission", "submitted"),
        1,
    )
    assert (last["event"], last["exit_code"], last["job"]["state"]) == ("job", 3, "FAILED")
    assert "words" in result.stderr


# Again


def test_a_job_of_somebody_else_is_not_taken_for_the_study(cluster):
    other = {"llp_study": "", "llp_attempt": "two"}
    cluster.add("s", status="SUCCEEDED", driver_exit_code=0, metadata=other)
    result = submit(cluster, "--study", "s")
    assert result.exit_code == 4
    assert "another job called s, which is not of this study" in result.stderr
    assert run("jobs", "status", "s", "--address", cluster.address).exit_code == 0


def test_a_repeat_attaches_to_what_runs(cluster, study):
    job = cluster.add(study, status="RUNNING", log="so far\n")
    result = submit(cluster)
    assert (result.exit_code, result.stdout) == (0, f"{study}\n")
    assert "is running already" in result.stderr
    job.on_read = lambda: job.become(status="SUCCEEDED", driver_exit_code=0)
    result = submit(cluster, "--follow")
    assert (result.exit_code, result.stdout) == (0, f"{study}\nso far\n")
    assert "attaching to it" in result.stderr
    assert cluster.posted() == 0


def test_a_repeat_of_what_has_succeeded_says_so(cluster, study):
    cluster.add(study, status="SUCCEEDED", driver_exit_code=0)
    result = submit(cluster, "--follow")
    assert result.exit_code == 0
    assert f"has succeeded already, its study is in /shared/{study}" in result.stderr
    assert cluster.posted() == 0


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_a_repeat_of_what_failed_is_a_further_attempt_at_the_same_study(cluster, study, status):
    cluster.add(study, status="FAILED", driver_exit_code=1)
    cluster.add(f"{study}--2", status=status)
    result = submit(cluster, "--follow")
    assert (result.exit_code, result.stdout) == (0, f"{study}--3\n")
    assert f"{study}--3 goes on with the same study" in result.stderr
    job = cluster.jobs[f"{study}--3"]
    assert f"--study {study} --resume" in job.entrypoint
    assert job.metadata["llp_attempt"] == "3"


def test_two_who_submit_at_once_get_one_job(cluster, study):
    cluster.add(study, status="RUNNING")
    cluster.hidden.add(study)  # submitted by the other after we looked
    result = submit(cluster)
    assert (result.exit_code, result.stdout) == (0, f"{study}\n")
    assert "is running already" in result.stderr
    assert list(cluster.jobs) == [study]


def test_a_name_that_another_experiment_has_is_refused(cluster):
    cluster.add("mine", status="FAILED", metadata={"llp_digest": "f" * 64})
    result = submit(cluster, "--study", "mine")
    assert result.exit_code == 4
    assert "of another experiment" in result.stderr
    assert cluster.posted() == 0


def test_resume_sends_an_attempt_that_needs_only_the_name_and_the_root(cluster):
    cluster.add("s", status="FAILED", driver_exit_code=-9)
    result = run("resume", "s", "--root", "/shared", "--address", cluster.address, "--follow")
    assert (result.exit_code, result.stdout) == (0, "s--2\n")
    words = cluster.jobs["s--2"].entrypoint.split()
    assert words[3:] == ["resume", "s", "--root", "/shared", "--set", "resources.address=auto"]
    assert set(sent_files(cluster)) == {".llp_job/start.sh"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["s"], "'llp_studies' is relative"), (["--root", "/shared"], "which study?")],
)
def test_resume_on_a_cluster_wants_a_name_and_an_absolute_root(cluster, arguments, words):
    result = run("resume", *arguments, "--address", cluster.address)
    assert result.exit_code == 2
    assert words in result.stderr
    assert cluster.requests == []


# Tokens and addresses


def test_without_a_token_the_message_says_how_to_give_one(cluster, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    result = submit(cluster)
    assert result.exit_code == 4
    assert f"the cluster at {cluster.address} wants a token: set RAY_AUTH_TOKEN" in result.stderr
    assert "Traceback" not in result.output


def test_a_wrong_token_is_said_to_be_wrong_and_where_it_came_from(cluster, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    wrong = Path("wrong-token")
    wrong.write_text("made-up-wrong-token\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    result = run("jobs", "list", "--address", cluster.address)
    assert result.exit_code == 4
    assert "the token is wrong" in result.stderr
    assert "from wrong-token" in result.stderr
    assert "made-up-wrong-token" not in result.output


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "/nope"}, "RAY_AUTH_TOKEN_PATH names /nope: No such file"),
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE=token, but there is no token"),
        ({"RAY_AUTH_TOKEN_PATH": "/dev/null"}, "the file is empty"),
    ],
)
def test_a_token_that_cannot_be_read_is_told_before_anybody_is_asked(
    cluster, monkeypatch, environment, words
):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = submit(cluster)
    assert result.exit_code == 4
    assert words in result.stderr
    assert cluster.requests == []


def test_tokens_are_looked_for_in_the_order_of_ray(tmp_path):
    home, file = tmp_path / "home", tmp_path / "token"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("of-home\n")
    file.write_text("of-file")
    environment = {"RAY_AUTH_TOKEN": "of-variable", "RAY_AUTH_TOKEN_PATH": str(file)}
    found = []
    for name in ("", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
        found.append(access.find_token(environment, home).value)
    assert found == ["of-variable", "of-file", "of-home"]
    assert access.find_token({"RAY_AUTH_MODE": "disabled"}, home).value == ""
    assert "of-home" not in repr(access.find_token({}, home))


def test_a_cluster_elsewhere_without_a_token_is_refused_and_never_sees_ours(place, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serving(FakeCluster()) as open_cluster:
        where = ["--address", open_cluster.elsewhere]
        result = run("jobs", "list", *where)
        assert result.exit_code == 4
        assert "anyone who reaches it can run code there" in result.stderr
        assert [given for _, _, given in open_cluster.requests] == [""]
        result = run("jobs", "list", *where, "--insecure")
        assert result.exit_code == 0
        assert "--insecure" in result.stderr
        assert {given for _, _, given in open_cluster.requests} == {""}
        assert run("jobs", "list", "--address", open_cluster.address).exit_code == 0


@pytest.fixture
def token_mode(place, monkeypatch):
    """A process in which Ray itself was told to use tokens, and has one where there is one."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    Config.initialize("")
    monkeypatch.delenv("RAY_AUTH_MODE")


@pytest.mark.parametrize("kept", [TOKEN, ""])  # with none, Ray raises when it looks for one
def test_a_token_that_ray_keeps_in_this_process_is_not_sent(token_mode, monkeypatch, kept):
    monkeypatch.setenv("RAY_AUTH_TOKEN", kept)
    with serving(FakeCluster()) as open_cluster:
        where = ["--address", open_cluster.elsewhere, "--insecure"]
        assert run("jobs", "list", *where).exit_code == 0
        assert {given for _, _, given in open_cluster.requests} == {""}


def test_a_cluster_elsewhere_with_a_token_is_taken(cluster):
    assert run("jobs", "list", "--address", cluster.elsewhere).exit_code == 0


def test_the_address_comes_from_the_option_before_the_environment(cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert run("jobs", "list", "--address", cluster.address).exit_code == 0
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.address)
    assert run("jobs", "list").exit_code == 0
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.address.removeprefix("http://"))
    assert run("jobs", "list").exit_code == 0
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the cluster, not of its job server
    result = run("jobs", "list")
    assert result.exit_code == 4
    assert "which cluster?" in result.stderr


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://", "http://me:pw1@host:1"])
def test_what_is_no_address_of_a_job_server_is_refused(place, address):
    result = run("jobs", "list", "--address", address)
    assert result.exit_code == 2
    assert "RAY_AUTH_TOKEN" in result.stderr or "http://HOST:8265" in result.stderr
    assert "pw1" not in result.output


def test_a_page_that_is_no_job_server_is_told_apart(cluster):
    cluster.is_ray = False
    result = run("jobs", "list", "--address", cluster.address)
    assert result.exit_code == 4
    assert "answers, but not as a Ray job server does" in result.stderr


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Clock:
    """Stands for the module `time`: a pause takes no time, but counts; the first may do something.

    So a refused connection is tried again on a machine of any speed.
    """

    def __init__(self, at_first_pause=lambda: None):
        self.now, self.at_first_pause = 0.0, at_first_pause

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        then, self.at_first_pause = self.at_first_pause, lambda: None
        then()
        self.now += seconds


def test_a_dead_address_ends_with_one_message(place, monkeypatch):
    monkeypatch.setattr(jobs, "time", Clock())
    monkeypatch.setattr(jobs, "REFUSED_SECONDS", 0.3)
    address = f"http://127.0.0.1:{free_port()}"
    result = run("jobs", "list", "--address", address)
    assert result.exit_code == 4
    assert result.stderr.splitlines() == [
        f"{address} does not answer: nothing listens there; trying again for 0 s",
        f"error: {address} does not answer: nothing listens there",
    ]


def test_a_cluster_that_is_just_starting_is_waited_for(place, monkeypatch):
    port, fake = free_port(), FakeCluster()
    with ExitStack() as stack:
        clock = Clock(at_first_pause=lambda: stack.enter_context(serving(fake, port)))
        monkeypatch.setattr(jobs, "time", clock)
        result = run("jobs", "list", "--address", f"http://127.0.0.1:{port}")
    assert result.exit_code == 0
    assert "trying again" in result.stderr


def test_a_submission_is_tried_again_while_no_agent_is_up(cluster):
    cluster.no_agent = 2
    result = submit(cluster, "--follow")
    assert result.exit_code == 0
    assert cluster.posted() == 3
    assert result.stderr.count("trying again") == 1


def test_an_agent_that_never_comes_up_is_given_up(cluster, monkeypatch):
    monkeypatch.setattr(jobs, "time", Clock())
    monkeypatch.setattr(jobs, "NO_AGENT_SECONDS", 0.3)
    cluster.no_agent = 10**6
    result = submit(cluster)
    assert result.exit_code == 4
    assert "no agent that could take a job yet" in result.stderr


# Following


def test_a_job_that_waits_for_room_is_left_queued_when_time_is_up(cluster, monkeypatch):
    monkeypatch.setattr(following, "PENDING_SECONDS", 0.1)
    cluster.outcome = {"status": "PENDING", "message": "It may be waiting for resources (CPUs)"}
    result = submit(cluster, "--follow", "--study", "s", "--start-timeout", "0.5")
    assert result.exit_code == 4
    assert result.stderr.count("s waits:") == 1
    assert "stays queued" in result.stderr
    assert f"llp jobs stop s --address {cluster.address}" in result.stderr
    assert cluster.jobs["s"].status == "PENDING"


def test_a_job_that_waits_starts_by_itself(cluster, monkeypatch):
    polls = itertools.count()

    def poll():
        if next(polls) == 5:
            cluster.jobs["s"].become(status="SUCCEEDED", driver_exit_code=0, log="x\n")

    cluster.outcome = {"status": "PENDING", "on_poll": poll}
    result = submit(cluster, "--follow", "--study", "s")
    assert (result.exit_code, result.stdout) == (0, "s\nx\n")


def test_a_connection_that_breaks_is_taken_up_again_without_repeating_a_line(cluster):
    log = "".join(f"line {k}\n" for k in range(30))
    job = cluster.add("s", status="RUNNING", log=log)
    job.on_read = lambda: job.become(status="SUCCEEDED", driver_exit_code=0)
    cluster.broken_tails = 2
    result = run("jobs", "logs", "s", "--follow", "--address", cluster.address)
    assert (result.exit_code, result.stdout) == (0, log)
    assert "trying to reach it again" in result.stderr


def test_a_connection_that_is_lost_for_good_says_how_to_attach(place, monkeypatch):
    monkeypatch.setattr(following, "LOST_SECONDS", 0.2)
    monkeypatch.setattr(jobs, "REFUSED_SECONDS", 0.1)
    with ExitStack() as stack:
        fake = stack.enter_context(serving(FakeCluster()))
        closing = threading.Thread(target=stack.close)
        fake.add("s", status="RUNNING", log="so far\n", on_read=closing.start)
        result = run("jobs", "logs", "s", "--follow", "--address", fake.address)
        closing.join()
    assert (result.exit_code, result.stdout) == (4, "so far\n")
    assert f"llp jobs logs s --follow --address {fake.address}" in result.stderr


def test_ctrl_c_leaves_the_job_running_and_says_how_to_attach(cluster, place):
    cluster.add("s", status="RUNNING", log="so far\n")
    follower = subprocess.Popen(
        [
            *(sys.executable, "-m", "llp.cli", "jobs", "logs", "s", "--follow"),
            *("--address", cluster.address),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background may ignore Ctrl-C, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert follower.stdout.readline() == "so far\n"
    follower.send_signal(signal.SIGINT)
    _, words = follower.communicate(timeout=300)
    assert follower.returncode == 130
    assert "s goes on without you" in words
    assert f"llp jobs logs s --follow --address {cluster.address}" in words
    assert "Traceback" not in words
    assert cluster.jobs["s"].status == "RUNNING"


def test_a_cluster_that_was_started_anew_has_forgotten_the_job(cluster):
    def forget():
        cluster.jobs.pop("s").status = "FAILED"  # which ends the open connection

    cluster.add("s", status="RUNNING", log="so far\n", on_read=forget)
    result = run("jobs", "logs", "s", "--follow", "--address", cluster.address)
    assert result.exit_code == 4
    assert "no longer knows s" in result.stderr


# Looking


def test_list_status_logs_and_stop(cluster):
    cluster.add("s", status="FAILED", driver_exit_code=-9, start_time=1_700_000_000_000)
    cluster.add("s--2", status="RUNNING", log="words\n", start_time=1_700_000_100_000)
    cluster.add("longer-name", status="PENDING", start_time=1_700_000_200_000)
    where = ["--address", cluster.address]
    listed = run("jobs", "list", *where).stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [
        *(["s", "failed"], ["s--2", "running"], ["longer-name", "pending"]),
    ]
    assert listed[0].endswith("exit code 137")
    rows = [json.loads(line) for line in run("jobs", "list", "--json", *where).stdout.splitlines()]
    assert [row["job"]["job_id"] for row in rows] == ["s", "s--2", "longer-name"]
    shown = run("jobs", "status", "s", *where).stdout
    assert "job       s--2\n" in shown  # the newest attempt at the study
    assert "attempt   2\n" in shown
    assert "study     /shared/s\n" in shown
    assert run("jobs", "logs", "s", *where).stdout == "words\n"
    stopped = run("jobs", "stop", "s", *where)
    assert stopped.exit_code == 0
    assert "s--2 was stopped" in stopped.stderr
    assert "llp resume s --root /shared --address" in stopped.stderr
    assert "has ended already" in run("jobs", "stop", "s", *where).stderr
    missing = run("jobs", "status", "longer-nam", *where)
    assert missing.exit_code == 4
    assert "did you mean 'longer-name'?" in missing.stderr


def test_the_newest_job_of_a_study_is_the_one_that_started_last(cluster):
    study = {"llp_study": "s", "llp_root": "/shared"}
    for name, attempt, start in (("s--3", "3", 1_700_000_000_000), ("s", "1", 1_700_000_100_000)):
        cluster.add(name, status="STOPPED", start_time=start)
        cluster.jobs[name].metadata = {**study, "llp_attempt": attempt}
    shown = run("jobs", "status", "s", "--address", cluster.address).stdout
    assert "job       s\n" in shown


def test_stopping_what_is_queued_says_that_it_will_end_when_it_starts(cluster, monkeypatch):
    monkeypatch.setattr(cluster_commands, "QUEUED_SECONDS", 0.0)
    cluster.add("s", status="PENDING")
    result = run("jobs", "stop", "s", "--address", cluster.address)
    assert result.exit_code == 0
    assert "ends it the moment its driver could start" in result.stderr


# The other side


def probe():
    rung = Rung(rung=1, data_fraction=1.0, num_examples=8, epochs=1)
    return Job("t000-r1", "probe", Trial("t000", {}, seed=0), rung, seed=0)


@pytest.mark.parametrize("there", ["nothing", "another study"])
def test_a_worker_that_does_not_see_the_study_folder_says_which_node_and_folder(place, there):
    folder = write_study(place / "studies" / "s", make_events())
    spec = load_spec("tiny.yaml")
    objective = StudyObjective(spec, load_data(spec.dataset, seed=0), folder)
    arrived = pickle.loads(pickle.dumps(objective))  # as Ray brings it to the other node
    shutil.rmtree(folder)
    if there == "another study":
        write_study(folder, make_events(study_id="other-00000000"))
    with pytest.raises(EnvironmentProblem) as caught:
        arrived(probe())
    assert socket.gethostname() in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "on storage that all nodes see" in str(caught.value)


def test_the_driver_needs_no_gpu_of_its_own_when_a_cluster_gives_them_to_trials(place, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    overrides = ["resources.address=auto", "resources.gpus_per_trial=0.5"]
    assert pipeline._driver_device(load_spec("tiny.yaml", overrides)) == "cpu"
    with pytest.raises(EnvironmentProblem, match="CUDA sees no GPU"):
        pipeline._driver_device(load_spec("tiny.yaml", overrides[1:]))


def test_as_many_jobs_run_as_fit_on_the_nodes_that_are_there(monkeypatch):
    nodes = {}
    monkeypatch.setattr(ray_tune.ray, "cluster_resources", lambda: dict(nodes))
    monkeypatch.setattr(ray_tune, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(ray_tune.time, "sleep", lambda _: nodes.update(CPU=2.0))
    with pytest.raises(EnvironmentProblem):
        ray_tune._Room(ray_tune.Resources(cpus=1), wait_for_nodes=0.0)
    room = ray_tune._Room(ray_tune.Resources(cpus=1, max_concurrent=5), wait_for_nodes=60.0)
    sizes = [room.size()]
    for cpus in (4.0, 0.0, 9.0, 3.0):  # one joins, all are lost, many join, some are lost
        nodes.update(CPU=cpus)
        sizes.append(room.size())
    assert sizes == [2, 4, 4, 5, 3]


def test_search_with_resume_returns_a_finished_study_as_it_is(place):
    spec = load_spec("tiny.yaml", [f"output.root={place}"])
    events = make_events(study_id="s")
    events[0] = {**events[0], "spec": spec.model_dump(mode="json"), "spec_digest": digest(spec)}
    folder = write_study(place / "s", events)
    before = (folder / "ledger.jsonl").read_bytes()
    result = pipeline.search(spec, study_id="s", resume=True)
    assert (result.study_id, result.status) == ("s", "finished")
    assert (folder / "ledger.jsonl").read_bytes() == before


def test_doctor_warns_of_a_token_that_others_can_read(tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("x")
    token.chmod(0o644)
    check = doctor.ray_token({}, tmp_path)
    assert (check.status, check.todo) == ("warn", f"chmod 600 {token}")
    token.chmod(0o600)
    assert doctor.ray_token({}, tmp_path).status == "ok"
    check = doctor.ray_token({"RAY_AUTH_TOKEN_PATH": "/nope"}, tmp_path)
    assert (check.status, check.found) == (
        "fail",
        "RAY_AUTH_TOKEN_PATH names /nope, which is no file",
    )


def test_names_of_studies_are_names_of_folders():
    with pytest.raises(SpecError):
        submission.of_resume("../x", "/shared")
    assert submission.of_resume("/shared/x", "elsewhere").root == "/shared"
