"""Searches that are killed at random moments, and what is asked of them afterwards.

The search is small (a synthetic dataset, a tiny network), but every epoch takes at least
`EPOCH_SECONDS`, so that a job lasts several intervals between snapshots. A training callback writes
every epoch that any process finished into a file: two lines for the same epoch of the same job are
work that was done again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from halting import halted_at_work, name_of
from ray_cluster import RayCluster
from study_runs import environment, events

CHECKPOINT_SECONDS = 0.6
EPOCH_SECONDS = 0.05
NUM_LINES = 650
"""About how many lines the ledger has when nobody kills anything."""

EXPERIMENT = """\
version: 1
name: kills
dataset: {name: synthetic, options: {num_train: 200, num_test: 100, num_classes: 4, image_size: 8}}
model: {name: mlp, options: {width: 8, depth: 1}}
training: {epochs: 24, batch_size: 32, learning_rate: 0.1, callbacks: [{name: "kill_watch:Watch"}]}
search_space:
  learning_rate: {type: loguniform, low: 1e-4, high: 1}
  momentum: {type: uniform, low: 0.0, high: 0.95}
searcher: {name: tpe, num_startup_trials: 4}
tier1: {num_trials: 12, data_fractions: [0.2, 0.5, 1.0], reduction_factor: 3, max_failures: 20}
tier2: {top_k: 1, metrics: [gradient_norm], refinements: [], num_examples: 64}
verification: {top_k: 3, num_seeds: 2, race: true, max_seeds: 3, margin: 0.0}
tracking: {mlflow: false}
output: {report: false}
"""

WATCH = f'''\
import json, os, time

class Watch:
    """Writes every finished epoch into a file and takes its time."""

    def __init__(self, *, every: int = 1, jobs: str = "all"):
        self.every, self.jobs = every, jobs

    def __call__(self, moment):
        time.sleep({EPOCH_SECONDS})
        line = [moment.job.job_id, moment.epoch, time.time(), os.getpid()]
        with open(moment.folder / "epochs.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")

    def state(self):
        return {{}}

    def restore(self, state):
        pass
'''

DRIVER = f"""\
import sys
from llp.training.objective import TrainingObjective
TrainingObjective.__init__.__kwdefaults__["checkpoint_seconds"] = {CHECKPOINT_SECONDS}
from llp.cli import main
sys.argv = ["llp", *sys.argv[1:]]
main()
"""


def prepare(folder: Path) -> None:
    """Writes the experiment, the callback and the driver with its short snapshot interval."""
    (folder / "kills.yaml").write_text(EXPERIMENT)
    (folder / "kill_watch.py").write_text(WATCH)
    (folder / "driver.py").write_text(DRIVER)


def start_driver(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts the command line with the short interval, in a session of its own."""
    path = os.pathsep.join([environment()["PYTHONPATH"], str(folder)])
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "driver.py", *arguments],
            cwd=folder,
            env=environment(PYTHONPATH=path),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def num_lines(path: Path) -> int:
    """Lines in a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def trainers(driver: int) -> list[psutil.Process]:
    """The processes that a driver's Ray started and that train."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(driver).children(recursive=True)
        return [process for process in children if "Trainable" in name_of(process)]
    return []


@dataclass
class Killed:
    """A search, and when what was killed.

    Attributes:
        folder: The study folder.
        lines: Lines of the ledger at each kill.
        exit_code: Of the last driver.
        log: The ledger.
    """

    folder: Path
    lines: list[int] = field(default_factory=list)
    exit_code: int = -1
    log: list[dict[str, Any]] = field(default_factory=list)


class Search:
    """A search with a driver that is started again whenever it was killed."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        prepare(folder)
        self.folder, self.name, self.options = folder, name, options
        self.study = folder / "llp_studies" / name
        self.ledger = self.study / "ledger.jsonl"
        self.driver = start_driver(folder, "search", "kills.yaml", "--study", name, *options)

    def resume(self) -> None:
        """Starts the driver again, from the file when there is nothing to resume yet."""
        if num_lines(self.ledger):
            self.driver = start_driver(self.folder, "resume", self.name, *self.options)
        else:
            self.driver = start_driver(
                self.folder, "search", "kills.yaml", "--study", self.name, *self.options
            )

    def wait_for_lines(self, number: int, seconds: float = 900) -> bool:
        """Until the ledger has so many lines; False when the search ended before."""
        deadline = time.monotonic() + seconds
        while num_lines(self.ledger) < number:
            if self.driver.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "driver.log").read_text()[-3000:])
            time.sleep(0.01)
        return True

    def moment(self, chance: random.Random, after: int, num: int) -> bool:
        """Until a random moment after the ledger had `after` lines; False when it ended before.

        `num` such moments are spread over the whole search.
        """
        most = round(2 * NUM_LINES / (num + 1))
        if not self.wait_for_lines(after + chance.randint(1, most)):
            return False
        time.sleep(chance.uniform(0, 0.4))
        return self.driver.poll() is None

    def end(self, lines: list[int], seconds: float = 1200) -> Killed:
        """Waits for the end of the search."""
        code = self.driver.wait(timeout=seconds)
        if code != 0:
            raise RuntimeError((self.folder / "driver.log").read_text()[-3000:])
        return Killed(self.study, lines, code, events(self.ledger))


def kill_driver(folder: Path, name: str, num: int, chance: random.Random) -> Killed:
    """One worker; the driver is killed `num` times."""
    search = Search(folder, name, "--set", "resources.num_cpus=1")
    lines: list[int] = []
    before = 0
    while len(lines) < num and search.moment(chance, before, num):
        os.kill(search.driver.pid, signal.SIGKILL)
        search.driver.wait()
        before = num_lines(search.ledger)
        lines.append(before)
        search.resume()
    return search.end(lines)


def kill_worker(folder: Path, name: str, num: int, chance: random.Random) -> Killed:
    """One worker at a time; its process is killed `num` times while it has a job."""
    search = Search(folder, name, "--set", "resources.num_cpus=1")
    lines: list[int] = []
    before = 0
    while len(lines) < num and search.moment(chance, before, num):
        busy = halted_at_work(
            lambda: trainers(search.driver.pid), going_on=lambda: search.driver.poll() is None
        )
        if busy is None:
            break
        before = num_lines(search.ledger)
        lines.append(before)
        busy.kill()
    return search.end(lines)


def kill_node(folder: Path, name: str, num: int, chance: random.Random) -> Killed:
    """Two nodes of one worker each; a node is killed `num` times and another one joins."""
    cluster = RayCluster(head_cpus=0)
    try:
        cluster.environment["PYTHONPATH"] += os.pathsep + str(folder)
        for number in range(2):
            cluster.add_worker(f"node{number}")
        options = ("--set", f"resources.address=127.0.0.1:{cluster.gcs}")
        os.environ["RAY_AUTH_MODE"] = "disabled"
        search = Search(folder, name, *options)
        lines: list[int] = []
        before, started = 0, 2
        while len(lines) < num and search.moment(chance, before, num):
            nodes = [name for name in cluster.nodes if name != "head"]
            busy = halted_at_work(
                lambda nodes=nodes: [p for name in nodes for p in cluster.trainers(name)],
                going_on=lambda: search.driver.poll() is None,
            )
            if busy is None:
                break
            doomed = next(name for name in nodes if busy in cluster.processes(name))
            cluster.lose(doomed)
            cluster.nodes.pop(doomed).wait()
            lines.append(num_lines(search.ledger))
            cluster._start(f"node{started}", f"--address=127.0.0.1:{cluster.gcs}", num_cpus=1)
            started += 1
            before = num_lines(search.ledger)
        return search.end(lines)
    finally:
        cluster.stop()


def undisturbed(folder: Path, name: str) -> Killed:
    """The same search with one worker, left in peace."""
    return Search(folder, name, "--set", "resources.num_cpus=1").end([])


def completed_twice(log: list[dict[str, Any]]) -> list[str]:
    """Jobs that were completed more than once."""
    ends = Counter(
        e["end"]["job_id"]
        for e in log
        if e["event"] == "job_end" and e["end"]["outcome"] in ("completed", "stopped", "diverged")
    )
    return [job_id for job_id, times in ends.items() if times > 1]


def redone(folder: Path) -> list[tuple[float, float]]:
    """For every time that a job went on: seconds of work done again, and what one interval allows.

    The work is that of the epochs that were finished before and again afterwards. Allowed is the
    interval between snapshots and the longest epoch of the job: a snapshot is taken after the first
    step at which it is due, and the file counts whole epochs.
    """
    runs: dict[str, list[list[tuple[int, float]]]] = {}
    for line in (folder / "epochs.jsonl").read_text().splitlines():
        job_id, epoch, moment, _ = json.loads(line)
        parts = runs.setdefault(job_id, [])
        if not parts or epoch <= parts[-1][-1][0]:
            parts.append([])
        parts[-1].append((epoch, moment))
    found = []
    for parts in runs.values():
        for i, again in enumerate(parts[1:], start=1):
            earlier = dict(parts[i - 1])
            steps = sorted(earlier.values())
            gaps = [b - a for a, b in itertools.pairwise(steps)]
            longest = max(gaps, default=EPOCH_SECONDS)
            repeated = [epoch for epoch, _ in again if epoch in earlier]
            since = earlier.get(min(repeated) - 1, earlier[min(repeated)] - longest)
            work = earlier[max(repeated)] - since
            found.append((work, CHECKPOINT_SECONDS + 2 * longest))
    return found
