"""`llp landscape` as a user types it: options, progress, answers, exit codes, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_runs import make_study
from conftest import ROOT
from study_runs import environment, signals_itself
from typer.testing import CliRunner

from llp import cli, landscape_progress
from llp.landscape_progress import Progress
from llp.reporting.landscape_page import read_results
from llp.spec.landscape import LandscapeSpec

TRAIN = [
    "--train",
    *("--dataset", "digits"),
    *("--model", "mlp"),
    *("--set", "experiment.dataset.max_train_examples=200"),
    *("--set", "experiment.model.options={width: 8, depth: 1}"),
    *("--epochs", "3"),
]
SMALL = [
    *("--examples", "60"),
    *("--resolution", "5"),
    *("--set", "lines.resolution=5"),
    *("--set", "spectrum.num_probes=4"),
    *("--set", "spectrum.num_steps=12"),
    *("--set", "sharpness.measures=[sam]"),
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def llp(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["landscape", *arguments])
    assert result.exit_code == code, result.output
    return result


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> LandscapeSpec:
    """The settings that the options mean."""
    found: list[LandscapeSpec] = []

    def analyse(spec: LandscapeSpec, **_: Any) -> Any:
        found.append(spec)
        raise KeyboardInterrupt

    import llp.analysis

    monkeypatch.setattr(llp.analysis, "analyse", analyse)
    CliRunner().invoke(cli.app, ["landscape", *arguments])
    return found[0]


def test_train_and_analyse_in_one_go_says_what_counts(place: Path) -> None:
    result = llp(*TRAIN, *SMALL, "--only", "sharpness,lines", "--pictures", "png")
    assert "SAM sharpness" in result.stdout
    [folder] = (place / "llp_landscapes").iterdir()
    assert folder.name.startswith("digits-mlp-")
    assert str(folder.relative_to(place) / "index.html") in result.stdout
    assert "line/from_start" in result.stderr
    names = {path.suffix for path in (folder / "pictures").iterdir()}
    assert names == {".png"}
    again = llp(*TRAIN, *SMALL, "--only", "sharpness,lines", "--pictures", "png")
    assert again.stderr.count("there already") >= 4
    assert again.stdout == result.stdout


def test_json_lines_carry_every_number(place: Path) -> None:
    result = llp(*TRAIN, *SMALL, "--only", "sharpness", "--json", "--quiet", "--out", "here")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"] for line in lines][:2] == ["folder", "training"]
    values = lines[-1]["values"]
    assert lines[-1]["event"] == "result"
    assert values == read_results(place / "here")[0]["values"]
    assert result.stderr == ""


def test_a_trial_of_a_study_by_its_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_study(place / "llp_studies")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llp", "landscape", "--study", "my study"])
    result = llp("--study", "study", *SMALL, "--only", "sharpness")
    folder = place / "llp_studies" / "study" / "landscape" / "t001"
    assert (folder / "index.html").is_file()
    assert "t001-v0 of study" in result.stderr
    command = read_results(folder)[0]["environment"]["command"]
    assert command == "llp landscape --study 'my study'"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--resolution", "9"], {"surfaces.resolution": 9}),
        (["--extent", "0.5"], {"surfaces.extent": 0.5, "lines.extent": 0.5}),
        (["--coarse", "6"], {"surfaces.coarse": 6}),
        (["--normalization", "layer"], {"directions.normalization": "layer"}),
        (["--directions", "hessian, random"], {"surfaces.directions": ["hessian", "random"]}),
        (["--robust"], {"surfaces.robust": ["random"]}),
        (
            ["--robust", "--directions", "hessian"],
            {"surfaces.robust": ["hessian"], "surfaces.directions": ["hessian"]},
        ),
        (["--loss-cap", "3"], {"surfaces.loss_cap": 3.0}),
        (["--eigenvalues", "3"], {"spectrum.num_eigenvalues": 3}),
        (["--tolerance", "0.01"], {"spectrum.tolerance": 0.01}),
        (["--examples", "32"], {"data.num_examples": 32}),
        (["--batch-size", "16"], {"data.batch_size": 16}),
        (["--split", "validation"], {"data.split": "validation"}),
        (["--seed", "4"], {"seed": 4}),
        (["--device", "cpu"], {"device": "cpu"}),
        (["--workers", "2"], {"workers.num_workers": 2}),
        (["--gpus-per-worker", "0.5"], {"workers.gpus_per_worker": 0.5}),
        (["--out", "x"], {"output.folder": "x"}),
        (["--pictures", "none"], {"output.pictures": []}),
        (["--pictures", "svg"], {"output.pictures": ["svg"]}),
        (["--only", "ranks,lines"], {"analyses": ["ranks", "lines"]}),
        (["--runs", "2"], {"source.num_runs": 2}),
        (["--learning-rate", "0.3"], {"experiment.training.learning_rate": 0.3}),
        (["--optimizer", "adam"], {"experiment.training.optimizer": "adam"}),
        (["--resolution", "9", "--set", "surfaces.resolution=11"], {"surfaces.resolution": 11}),
    ],
)
def test_every_option_is_a_value_of_a_landscape_file(
    monkeypatch: pytest.MonkeyPatch, options: list[str], expected: dict[str, Any]
) -> None:
    plain = asked(monkeypatch, *TRAIN).model_dump(mode="json")
    given = asked(monkeypatch, *TRAIN, *options).model_dump(mode="json")
    assert {key: _at(given, key) for key in expected} == expected
    changed = {key for key in _leaves(given) if _at(given, key) != _at(plain, key)}
    assert changed <= set(expected), "an option changed something else"


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _leaves(values: Any, path: str = "") -> set[str]:
    if isinstance(values, dict) and values:
        return {leaf for k, v in values.items() for leaf in _leaves(v, f"{path}.{k}")}
    return {path.lstrip(".")}


def test_without_leaves_analyses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = asked(monkeypatch, *TRAIN, "--without", "connectivity,ranks")
    assert spec.analyses == [
        *("spectrum", "sharpness", "lines", "surfaces", "trajectory", "smoothness", "confidence")
    ]


def test_a_file_with_options_on_top(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "mine.yaml").write_text(
        "source: {train: true}\n"
        "experiment: {dataset: {name: digits}, model: {name: mlp}}\n"
        "surfaces: {resolution: 7, coarse: 5}\n"
    )
    spec = asked(monkeypatch, "mine.yaml", "--resolution", "9", "--epochs", "4")
    assert (spec.surfaces.resolution, spec.surfaces.coarse) == (9, 5)
    assert spec.training is not None
    assert spec.training.training.epochs == 4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give one of study, checkpoint and train"),
        (["--train"], 2, "needs an experiment that names dataset and model"),
        (["--train", "--dataset", "digts", "--model", "mlp"], 2, "did you mean 'digits'"),
        ([*TRAIN, "--only", "spectra"], 2, "did you mean 'spectrum'"),
        ([*TRAIN, "--without", "spectra"], 2, "did you mean 'spectrum'"),
        ([*TRAIN, "--resolution", "1"], 2, "must be at least 2, not 1"),
        ([*TRAIN, "--directions", "hesian"], 2, "did you mean 'hessian'"),
        ([*TRAIN, "--pictures", "jpg"], 2, "unknown value 'jpg'"),
        ([*TRAIN, "--device", "cuda:9"], 4, "GPUs"),
        (["--study", "nothing"], 4, "no study 'nothing'"),
        (["--checkpoint", "no.pt", "--dataset", "digits", "--model", "mlp"], 4, "does not exist"),
        (["missing.yaml"], 2, "no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(arguments: list[str], code: int, words: str) -> None:
    result = llp(*arguments, code=code)
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_help_names_every_group_of_options() -> None:
    text = llp("--help").stdout
    for words in ("--study", "--checkpoint", "--train", "--directions", "--workers", "--set"):
        assert words in text


def test_progress_on_a_terminal_writes_over_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Terminal:
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(landscape_progress.sys, "stderr", Terminal())
    shown = Progress(json=False, quiet=False)
    part = {"event": "part", "part": "surface/random", "place": "1/2"}
    shown({**part, "status": "start"})
    shown({"event": "progress", "part": "surface/random", "done": 30, "total": 60})
    shown({**part, "status": "end", "seconds": 3.0})
    text = "".join(written)
    assert "\r\x1b[K[1/2] surface/random: 30 of 60, about" in text
    assert text.endswith("\r\x1b[K[1/2] surface/random: 3.0 s\n")


# In processes of their own


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llp.cli", "landscape", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_goes_on_and_ends_with_the_same_results(place: Path, how: int) -> None:
    options = [*TRAIN, "--examples", "60", "--resolution", "41", "--runs", "2"]
    options += ["--set", "spectrum.num_steps=12", "--pictures", "none"]
    whole = start(*options, "--out", "whole")
    assert whole.wait(timeout=1200) == 0, whole.communicate()[1]
    parts = place / "cut" / "parts"
    chunks = parts / "surface-random.chunks"
    words = ("llp.cli", "landscape", *options, "--out", "cut")
    cut = subprocess.run(
        signals_itself(signal.Signals(how).name, f"chunks={chunks}", 2, *words),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert cut.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), cut.stderr
    assert len(list(chunks.glob("*.npy"))) == 2
    done = {path.stem: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert "sharpness-sam" in done
    assert "surface-random" not in done
    again = start(*options, "--out", "cut")
    assert again.wait(timeout=1200) == 0, again.communicate()[1]
    after = {path.stem: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert {name: after[name] for name in done} == done  # nothing finished was made again
    first, second = (read_results(place / name) for name in ("whole", "cut"))
    assert first[1].keys() == second[1].keys()
    for key, array in first[1].items():
        if not key.startswith("spectrum"):
            np.testing.assert_array_equal(array, second[1][key], err_msg=key)


@pytest.mark.slow
def test_points_on_ray_workers_are_those_of_this_process(place: Path) -> None:
    options = [*TRAIN, "--examples", "60", "--resolution", "9", "--pictures", "none"]
    options += ["--only", "surfaces,lines", "--directions", "random", "--robust"]
    for name, more in (("here", []), ("there", ["--workers", "2"])):
        process = start(*options, *more, "--out", name)
        assert process.wait(timeout=1200) == 0, process.communicate()[1]
    here, there = (read_results(place / name)[1] for name in ("here", "there"))
    for key in here:
        assert here[key] == pytest.approx(there[key], rel=1e-6), key
    values = read_results(place / "there")[0]["values"]
    assert values["surface/random/strategy"] == "outside"
    centre = there["surface/random/loss"][4, 4]
    assert float(centre) == values["surface/random/base_loss"]  # to the bit, wherever it ran
