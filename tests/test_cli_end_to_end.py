"""The commands one after the other on a real study, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from study_runs import environment, signals_itself

from llp.tracking.ledger import load_study, read_events

pytestmark = pytest.mark.slow

SMALL = {
    "name": "small",
    "dataset": {"name": "digits"},
    "model": {"name": "mlp", "options": {"width": 16, "depth": 1}},
    "training": {"epochs": 3, "batch_size": 64},
    "search_space": {"learning_rate": {"type": "loguniform", "low": 0.01, "high": 0.5}},
    "tier1": {"num_trials": 4, "data_fractions": [0.3, 1.0], "reduction_factor": 2},
    "tier2": {"top_k": 1, "metrics": ["sam_sharpness"], "refinements": [], "num_examples": 64},
    "verification": {"top_k": 1, "num_seeds": 1},
    "resources": {"num_cpus": 1, "max_concurrent": 1},
    "tracking": {"mlflow": False},
}


def run(folder, command):
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=1200
    )


def llp(folder, *arguments, code=0):
    done = run(folder, [sys.executable, "-m", "llp.cli", *arguments])
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def write(folder, **changes):
    (folder / "small.yaml").write_text(json.dumps({**SMALL, **changes}), encoding="utf-8")


def test_from_a_file_to_a_winner_and_everything_one_can_ask_of_it(tmp_path):
    write(tmp_path)
    assert "the file is good" in llp(tmp_path, "check", "small.yaml")[0]
    out, _ = llp(tmp_path, "search", "small.yaml", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    winner = rows[-1]["result"]["winner"]
    assert [row["seq"] for row in rows[:-1]] == list(range(len(rows) - 1))
    assert f"winner {winner}" in llp(tmp_path, "resume")[0]
    assert "finished" in llp(tmp_path, "status")[0]
    assert llp(tmp_path, "show", "winner")[0].startswith(winner)
    assert llp(tmp_path, "export", "--format", "csv")[0].count(".csv") >= 2
    page = llp(tmp_path, "report")[0].strip()
    assert (tmp_path / page).stat().st_size > 1000
    _, err = llp(tmp_path, "search", "small.yaml", code=4)
    assert "exists already" in err


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_the_study_and_the_printed_line_goes_on_with_it(tmp_path, sent):
    write(tmp_path, tier1={**SMALL["tier1"], "num_trials": 30})
    ledger = tmp_path / "llp_studies" / "mine" / "ledger.jsonl"
    words = ("llp.cli", "search", "small.yaml", "--study", "mine")
    stopped = run(tmp_path, signals_itself(sent, f"ledger={ledger}", 40, *words))
    assert stopped.returncode == 130, stopped.stderr
    line = stopped.stderr.strip().splitlines()[-1].split()
    assert line == ["llp", "resume", "mine"]
    log = [*read_events(ledger.parent)]
    assert log[-1]["event"] != "finished"
    before = [e["end"]["job_id"] for e in log if e["event"] == "job_end"]
    assert len(before) >= 3
    llp(tmp_path, *line[1:])
    after = [e["end"]["job_id"] for e in read_events(ledger.parent) if e["event"] == "job_end"]
    assert after[: len(before)] == before
    assert len(set(after)) == len(after)
    assert load_study(ledger.parent).winner


NET = """
from torch import nn

def build(*, channels, image_size, num_classes, hidden=4):
    pixels = channels * image_size**2
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )
"""

DATA = """
import numpy as np

def load(num_train=120):
    generator = np.random.default_rng(0)
    labels = np.arange(num_train + 60) % 3
    images = generator.integers(0, 60, (len(labels), 1, 4, 4)).astype(np.uint8)
    images[np.arange(len(labels)), 0, labels, labels] = 255
    return images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]
"""


def test_a_network_and_images_of_the_current_folder_are_searched(tmp_path):
    (tmp_path / "my_net.py").write_text(NET, encoding="utf-8")
    (tmp_path / "my_data.py").write_text(DATA, encoding="utf-8")
    write(
        tmp_path,
        dataset={"name": "my_data:load", "options": {"num_train": 90}},
        model={"name": "my_net:build"},
        search_space={**SMALL["search_space"], "hidden": [2, 16]},
    )
    script = Path(sys.executable).with_name("llp")
    if not script.is_file():
        pytest.skip("llp is not installed beside this Python: no console script")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [script, "search", "small.yaml", "--study", "mine"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
        env=outside,
    )
    assert done.returncode == 0, done.stderr
    result = load_study(tmp_path / "llp_studies" / "mine")
    assert f"winner {result.winner}" in done.stdout
    assert all(trial.outcome in ("completed", "stopped") for trial in result.trials)
    assert {trial.trial.hyperparameters["hidden"] for trial in result.trials} <= {2, 16}
    assert [run.num_test_examples for run in result.verifications] == [60]
