"""Searches submitted to a real Ray cluster that wants a token: followed, killed, stopped, resumed.

The cluster is a head node without CPUs and worker nodes of one CPU each, all processes of this
machine; its PATH has no Python that knows Ray, as on most clusters.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from halting import halted_at_work
from ray_cluster import ray_cluster
from study_runs import TINY, events

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """A head and one worker."""
    with ray_cluster(head_cpus=0) as running:
        running.add_worker("w1", num_cpus=1)
        yield running


@pytest.fixture
def client(cluster, tmp_path_factory):
    """Runs commands that know the address, the token and where studies go."""
    return Client(cluster, tmp_path_factory.mktemp("client"))


class Client:
    """A machine from which searches are submitted."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.studies = cluster.folder / "studies"
        self.studies.mkdir(exist_ok=True)
        (folder / "tiny.yaml").write_text(TINY)

    def start(self, *arguments, **environment):
        """Starts one command."""
        command = [sys.executable, "-m", "llp.cli", *arguments]
        return subprocess.Popen(
            [*command, "--address", self.cluster.address],
            cwd=self.folder,
            env=self.cluster.client_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, timeout=900, **environment):
        """Runs one command to its end: exit code, standard output, standard error."""
        process = self.start(*arguments, **environment)
        try:
            out, words = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert "Traceback" not in words, words
        return process.returncode, out, words

    def submission(self, study, *arguments):
        """Arguments that submit the tiny search under a name, and follow it."""
        where = ["--set", f"output.root={self.studies}", "--study", study]
        return ["submit", "tiny.yaml", "--follow", *where, *arguments]

    def ledger(self, study):
        """Its file."""
        return self.studies / study / "ledger.jsonl"

    def wait_for_lines(self, study, number, timeout=600):
        """Until the search has got so far."""
        ledger, deadline = self.ledger(study), time.monotonic() + timeout
        while not (ledger.exists() and ledger.read_bytes().count(b"\n") >= number):
            assert time.monotonic() < deadline, f"{ledger} did not reach {number} lines"
            time.sleep(0.005)

    def driver(self, study):
        """Process id of its driver."""
        return json.loads((self.studies / study / "lock").read_text())["pid"]


def decisions(log):
    """What was decided, in order; retries of lost jobs are the only addition of a kill."""
    made = [event["decision"] for event in log if event["event"] == "decision"]
    return [decision for decision in made if decision["kind"] != "retry"]


def jobs_completed(log):
    """Job id -> how often it ended with a result."""
    ends = [event["end"] for event in log if event["event"] == "job_end"]
    return Counter(end["job_id"] for end in ends if end["outcome"] != "failed")


def num_running(ledger):
    """Jobs that have begun and not ended."""
    kinds = Counter(event["event"] for event in events(ledger))
    return kinds["job"] - kinds["job_end"]


def on_its_way(process, number):
    """Whether a signal has been sent to a process that is halted and cannot take it yet."""
    status = Path(f"/proc/{process}/status").read_text()
    pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
    return bool(pending >> (number - 1) & 1)


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """A search that nothing disturbed: what its follower saw."""
    client = Client(cluster, tmp_path_factory.mktemp("whole"))
    return client.run(*client.submission("whole"))


def test_a_search_is_submitted_followed_and_found_again(client, whole):
    code, out, words = whole
    assert code == 0, words
    assert out.startswith("whole\n")
    assert "winner t" in out
    log = events(client.ledger("whole"))
    assert log[-1]["event"] == "finished"
    _, described = client.cluster.get("/api/jobs/whole")
    _, logged = client.cluster.get("/api/jobs/whole/logs")
    secret = client.cluster.token.encode()
    for text in (described, logged, client.ledger("whole").read_bytes()):
        assert secret not in text
    assert out == "whole\n" + json.loads(logged)["logs"]
    code, out, words = client.run(*client.submission("whole"))
    assert (code, out) == (0, "whole\n")
    assert "has succeeded already" in words
    shown = json.loads(client.run("jobs", "status", "whole", "--json")[1])["job"]
    assert (shown["state"], shown["exit_code"], shown["attempt"]) == ("SUCCEEDED", 0, 1)
    assert shown["root"] == str(client.studies)


def test_no_token_and_a_wrong_one_are_one_message_each(client):
    code, _, words = client.run("jobs", "list", RAY_AUTH_TOKEN="")
    assert code == 4
    assert "wants a token" in words
    code, _, words = client.run(*client.submission("never"), RAY_AUTH_TOKEN="made-up")
    assert code == 4
    assert "the token is wrong" in words
    assert not client.ledger("never").exists()


def test_a_driver_killed_from_outside_loses_nothing(client, whole):
    follower = client.start(*client.submission("killed"))
    client.wait_for_lines("killed", 50)
    os.kill(client.driver("killed"), signal.SIGKILL)
    out, words = follower.communicate(timeout=600)
    assert follower.returncode == 128 + signal.SIGKILL, (out, words)
    assert "killed from outside by signal 9" in words
    assert f"llp resume killed --root {client.studies} --address" in words
    before = events(client.ledger("killed"))
    assert before[-1]["event"] != "finished"
    assert jobs_completed(before)
    code, out, words = client.run(*client.submission("killed"))
    assert code == 0, words
    assert out.startswith("killed--2\n")
    assert "killed--2 goes on with the same study" in words
    log = events(client.ledger("killed"))
    assert log[: len(before)] == before
    assert set(jobs_completed(log).values()) == {1}  # nothing ran twice to its end
    assert len({event["pid"] for event in log if event["event"] == "opened"}) == 2
    assert decisions(log) == decisions(events(client.ledger("whole")))


def test_a_stopped_job_can_be_resumed_on_the_cluster(client):
    follower = client.start(*client.submission("stopped"))
    client.wait_for_lines("stopped", 40)
    driver = client.driver("stopped")
    os.kill(driver, signal.SIGSTOP)  # so that it does not finish before it is stopped
    try:
        other = client.start(*client.submission("stopped"))
        assert other.stdout.readline() == "stopped\n"
        stopping = client.start("jobs", "stop", "stopped")
        deadline = time.monotonic() + 600
        while not on_its_way(driver, signal.SIGTERM):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(driver, signal.SIGCONT)
    _, words = stopping.communicate(timeout=600)
    assert stopping.returncode == 0
    assert "stopped was stopped" in words
    for process in (follower, other):
        out, words = process.communicate(timeout=600)
        assert process.returncode == 130, words
        assert "everything that finished is saved" in out  # it ended by itself, in time
    assert "attaching to it" in words
    assert events(client.ledger("stopped"))[-1]["event"] != "finished"
    root = ["--root", str(client.studies)]
    code, out, words = client.run("resume", "stopped", *root, "--follow")
    assert code == 0, words
    assert out.startswith("stopped--2\n")
    log = events(client.ledger("stopped"))
    assert log[-1]["event"] == "finished"
    assert set(jobs_completed(log).values()) == {1}


NET = """\
import torch


def build_model(channels, image_size, num_classes, width=8):
    inputs = channels * image_size**2
    hidden = torch.nn.Linear(inputs, width), torch.nn.ReLU()
    return torch.nn.Sequential(torch.nn.Flatten(), *hidden, torch.nn.Linear(width, num_classes))
"""


def test_own_modules_arrive_at_the_driver_and_at_the_workers(client):
    (client.folder / "my_net_here.py").write_text(NET)
    model = re.sub(r"(?m)^model: .*$", 'model: {name: "my_net_here:build_model"}', TINY)
    (client.folder / "tiny.yaml").write_text(model)
    code, out, words = client.run(*client.submission("own", "--set", "tier1.num_trials=4"))
    assert code == 0, (out, words)
    assert f"sending {client.folder}" in words
    assert events(client.ledger("own"))[-1]["event"] == "finished"


def test_a_driver_that_finds_no_room_stays_queued(client):
    code, out, words = client.run(
        *client.submission("queued", "--driver-cpus", "7", "--start-timeout", "14")
    )
    assert (code, out) == (4, "queued\n")
    assert words.count("queued waits:") == 1
    assert "stays queued" in words
    shown = json.loads(client.run("jobs", "status", "queued", "--json")[1])["job"]
    assert shown["state"] == "PENDING"
    code, _, words = client.run("jobs", "stop", "queued")
    assert code == 0
    assert "ends it the moment its driver could start" in words
    assert not client.ledger("queued").exists()


def test_a_node_that_dies_costs_a_retry_and_its_place_is_taken_by_one_that_joins(client):
    follower = client.start(*client.submission("lost"))
    client.wait_for_lines("lost", 60)
    assert halted_at_work(
        lambda: client.cluster.trainers("w1"), going_on=lambda: follower.poll() is None
    )
    client.cluster.add_worker("w2", num_cpus=1)
    assert num_running(client.ledger("lost")) == 1
    client.cluster.lose("w1")
    out, words = follower.communicate(timeout=900)
    assert follower.returncode == 0, (out, words)
    log = events(client.ledger("lost"))
    assert log[-1]["event"] == "finished"
    assert set(jobs_completed(log).values()) == {1}
    ends = [event["end"] for event in log if event["event"] == "job_end"]
    (lost,) = [end["failure"] for end in ends if end["outcome"] == "failed"]
    assert "the worker process died" in lost
