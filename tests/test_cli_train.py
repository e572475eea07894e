"""`llp train` from the outside: options, file, trial of a study, kill -9, pages, exit codes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from analysis_runs import make_study
from study_runs import killed_at, llp
from typer.testing import CliRunner, Result

from llp.cli import app
from llp.full_training import read_training
from llp.spec.single import load_training, to_training_yaml
from llp.training import checkpoint

SMALL = (
    "--dataset",
    "synthetic",
    "--model",
    "mlp",
    "--set",
    "num_train=400",
    "--set",
    "image_size=8",
    "--no-mlflow",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def answer(stdout: str) -> Any:
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert lines[-1]["event"] == "result"
    return lines[-1]["result"]


def test_options_file_and_dry_run_say_the_same(here: Path) -> None:
    options = ("--optimizer", "talt", "--epochs", "3", "--lr", "0.05", "--set", "decay=0.8")
    shown = call("train", *SMALL, *options, "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    (here / "run.yaml").write_text(shown.stdout)
    again = call("train", "run.yaml", "--dry-run")
    assert again.stdout == shown.stdout
    spec = load_training(here / "run.yaml")
    assert spec.training.optimizer_options == {"decay": 0.8}
    assert spec.training.best_weights == "keep"
    assert to_training_yaml(spec) == shown.stdout


@pytest.mark.slow
def test_a_training_killed_with_9_goes_on_to_the_same_bits_and_is_then_only_read(
    tmp_path: Path,
) -> None:
    options = (*SMALL, "--optimizer", "talt", "--epochs", "40", "--seeds", "2", "--quiet")
    whole = llp("train", *options, "--json", "--study", "whole", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    ledger = tmp_path / "llp_studies" / "killed" / "ledger.jsonl"
    again = ("train", *options, "--study", "killed", "--snapshot-seconds", "0.01")
    killed_at(ledger, 20, *again, folder=tmp_path)
    assert read_training(ledger.parent).status == "interrupted"
    killed_at(ledger, 70, *again, folder=tmp_path)
    done = llp("resume", "killed", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr

    first, second = answer(whole.stdout), answer(done.stdout)
    for a, b in zip(first["seeds"], second["seeds"], strict=True):
        for name in ("seed", "test_accuracy", "test_loss", "best_epoch", "samples_seen"):
            assert a[name] == b[name], name
        curves = [[p["train_loss"] for p in seed["curve"]] for seed in (a, b)]
        assert curves[0] == curves[1]
    for name in ("t000-v0.pt", "t000-v1.pt", "t000-v0-best.pt"):
        states = [
            checkpoint.load(tmp_path / "llp_studies" / study / "checkpoints" / name)["model"]
            for study in ("whole", "killed")
        ]
        assert all(bool((states[0][key] == states[1][key]).all()) for key in states[0])
    before = ledger.read_bytes()
    read = llp("train", *options, "--study", "killed", folder=tmp_path)
    assert read.returncode == 0
    assert "test" in read.stdout
    assert ledger.read_bytes() == before


def test_pages_results_and_the_other_commands_know_a_training(here: Path) -> None:
    extra = ("--epochs", "2", "--checkpoint-every", "1", "--study", "one")
    done = call("train", *SMALL, *extra)
    assert done.exit_code == 0, done.stderr
    folder = here / "llp_studies" / "one"
    for name in ("report.html", "test.html", "log.html", "log.txt", "training.json"):
        assert (folder / name).stat().st_size > 500, name
    page = (folder / "report.html").read_text()
    assert "test accuracy of mlp on synthetic with sgd" in page
    assert "winner" not in page.partition("</head>")[2]
    assert 'href="test.html"' in page
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["t000-v0-best.pt", "t000-v0-e001.pt", "t000-v0-e002.pt", "t000-v0.pt"]
    (folder / "report.html").unlink()
    for command in (("status",), ("show", "best"), ("report",), ("export",), ("list", "studies")):
        told = call(*command)
        assert told.exit_code == 0, told.stderr
    assert (folder / "report.html").is_file()


def in_readme() -> list[str]:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    section = text.partition("## One training")[2].partition("\n## ")[0]
    said = re.findall(r"`(llp train [^`]*--[^`]*)`|^(llp train [^#\n]*)", section, re.MULTILINE)
    return [one or other.strip() for one, other in said]


@pytest.mark.parametrize("command", [c for c in in_readme() if "FILE" not in c])
def test_every_command_of_the_readme_is_understood(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "run.yaml").write_text("dataset: {name: digits}\nmodel: {name: mlp}\n")
    if "--from mine" in command:
        make_study(here / "llp_studies", name="mine")
    done = call(*shlex.split(command)[1:], "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "training:" in done.stdout


def test_the_readme_has_the_commands() -> None:
    assert len(in_readme()) >= 9


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--set", "smothing_factor=1", "--optimizer", "talt"), 2, "'smoothing_factor'"),
        (("--optimizer", "tlat"), 2, "did you mean 'talt'"),
        (("--epochs", "0"), 2, "epochs"),
        (("missing.yaml",), 2, "no such file"),
        (("--trial", "best"), 2, "name its study with --from"),
        (("--from", "nothing"), 4, "no study 'nothing'"),
        (("--device", "cuda"), 4, "sees 0 GPUs"),
        (("--learning-rate", "1e9", "--epochs", "3"), 3, "diverged"),
    ],
)
def test_what_goes_wrong_has_its_exit_code(
    arguments: tuple[str, ...], code: int, message: str, here: Path
) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = call("train", *SMALL, *arguments)
    assert done.exit_code == code, done.stderr
    assert message in done.stderr
    if code == 2:
        assert not (here / "llp_studies").exists()


@pytest.mark.slow
def test_a_trial_of_a_study_is_trained_as_its_verification_was(tmp_path: Path) -> None:
    from study_runs import TINY

    (tmp_path / "tiny.yaml").write_text(TINY)
    search = llp("search", "tiny.yaml", "--study", "tiny", "--json", "-q", folder=tmp_path)
    assert search.returncode == 0, search.stderr
    found = answer(search.stdout)
    done = llp("train", "--from", "tiny", "--seeds", "2", "--json", "-q", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    tested = [v for v in found["verifications"] if v["trial_id"] == found["winner"]]
    accuracies = {v["seed"]: v["test_accuracy"] for v in tested}
    assert accuracies == {s["seed"]: s["test_accuracy"] for s in answer(done.stdout)["seeds"]}
    shutil.rmtree(tmp_path / "llp_studies")
