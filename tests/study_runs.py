"""Helpers for tests that run whole studies in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

TINY = """\
version: 1
name: tiny
dataset: {name: synthetic, options: {num_train: 400, num_test: 200, num_classes: 4, image_size: 8}}
model: {name: mlp, options: {width: 16, depth: 1}}
training: {epochs: 6, batch_size: 32, learning_rate: 0.1}
search_space:
  learning_rate: {type: loguniform, low: 1e-4, high: 1}
  momentum: {type: uniform, low: 0.0, high: 0.95}
searcher: {name: tpe, num_startup_trials: 4}
tier1: {num_trials: 12, data_fractions: [0.2, 0.5, 1.0], reduction_factor: 3}
tier2: {top_k: 2, metrics: [sam_sharpness, gradient_norm], refinements: [], num_examples: 64}
verification: {top_k: 2, num_seeds: 2}
resources: {num_cpus: 1, max_concurrent: 1}
tracking: {mlflow: false}
output: {report: false}
"""


def environment(**extra: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_raylet_start_wait_time_s": "120",
        **extra,
    }


def llp(*arguments: str, folder: Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Runs one command of the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "llp.cli", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    """Starts one command in a process group of its own."""
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llp.cli", *arguments],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def signals_itself(sent: str, where: str, count: int, *words: str) -> list[str]:
    """A command that runs the module `words[0]` and signals itself at a point (see `dying.py`)."""
    return [sys.executable, str(ROOT / "tests" / "dying.py"), sent, where, str(count), *words]


def killed_at(
    ledger: Path, num_lines: int, *arguments: str, folder: Path, timeout: float = 900
) -> None:
    """Runs one command, which dies by SIGKILL the moment its ledger has `num_lines` lines."""
    done = subprocess.run(
        signals_itself("SIGKILL", f"ledger={ledger}", num_lines, "llp.cli", *arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == -signal.SIGKILL, f"{arguments} ended: {done.stderr[-3000:]}"
    assert ledger.read_bytes().count(b"\n") >= num_lines


def events(ledger: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; a torn last one is left out."""
    return [json.loads(line) for line in ledger.read_bytes().split(b"\n")[:-1]]
