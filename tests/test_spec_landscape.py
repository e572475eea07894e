"""Landscape files: every wrong thing is said with its place, and every right one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llp.errors import SpecError
from llp.spec.landscape import LandscapeSpec, load_landscape

GOOD = """\
source: {train: true}
experiment:
  dataset: {name: digits}
  model: {name: mlp, options: {width: 8}}
  training: {epochs: 3}
surfaces: {directions: [random, hessian], resolution: 7}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "landscape.yaml"
    path.write_text(text)
    return path


def told(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_landscape(write(folder, text), overrides)
    return [str(problem) for problem in caught.value.problems]


def test_a_file_is_read_with_its_experiment(tmp_path: Path) -> None:
    spec = load_landscape(write(tmp_path, GOOD))
    assert spec.surfaces.directions == ["random", "hessian"]
    assert spec.surfaces.resolution == 7
    assert spec.training is not None
    assert (spec.training.dataset.name, spec.training.model.options) == ("digits", {"width": 8})
    assert spec.training.training.epochs == 3
    assert spec.spectrum.num_eigenvalues == 5  # untouched sections keep their defaults


def test_options_alone_are_enough(tmp_path: Path) -> None:
    spec = load_landscape(
        None,
        [
            "source.train=true",
            "experiment.dataset.name=digits",
            "experiment.model.name=mlp",
            "sharpness.measures=[sam, {name: asam, rho: 1.0}]",
        ],
    )
    assert spec.sharpness.named() == [("sam", {}), ("asam", {"rho": 1.0})]


def test_an_experiment_file_can_be_named_and_overridden(tmp_path: Path) -> None:
    experiment = tmp_path / "mine.yaml"
    experiment.write_text(
        "name: mine\ndataset: {name: digits}\nmodel: {name: mlp}\n"
        "search_space: {learning_rate: [0.1, 0.2]}\n"
    )
    spec = load_landscape(
        {"source": {"checkpoint": "w.pt"}},
        [f"experiment={experiment}", "experiment.training.epochs=7"],
    )
    assert spec.training is not None
    assert (spec.training.name, spec.training.training.epochs) == ("mine", 7)


@pytest.mark.parametrize(
    ("line", "replacement", "place", "words"),
    [
        ("resolution: 7", "resolutoin: 7", ":6:43", "did you mean 'resolution'"),
        ("resolution: 7", "resolution: 1", ":6:55", "at least 2, not 1"),
        ("resolution: 7", "resolution: many", ":6:55", "a whole number"),
        ("[random, hessian]", "[random, hesian]", ":6:33", "did you mean 'hessian'"),
        ("resolution: 7", "extent: 0", ":6:51", "above 0"),
        ("resolution: 7", "extent: [2, 1]", ":6:51", "must rise, not [2, 1]"),
        ("resolution: 7", "robust: [adam]", ":6:52", "not among surfaces.directions"),
        ("name: mlp,", "name: mpl,", ":4:17", "did you mean 'mlp'"),
        ("epochs: 3", "epochs: 0", ":5:22", "at least 1"),
        ("{train: true}", "{train: true, study: a}", ":1:", "give one of study, checkpoint"),
        ("{train: true}", "{}", ":1:", "none of them is given"),
        ("{train: true}", "{study: a}", ":2:1", "a study has its own experiment"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(
    tmp_path: Path, line: str, replacement: str, place: str, words: str
) -> None:
    assert line in GOOD
    problems = told(tmp_path, GOOD.replace(line, replacement))
    assert any(f"landscape.yaml{place}" in text and words in text for text in problems), problems


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("analyses=[spectra]", "did you mean 'spectrum'"),
        ("analyses=[spectrum, spectrum]", "listed twice"),
        ("sharpness.measures=[sharp]", "unknown sharpness measure 'sharp'"),
        ("sharpness.measures=[{rho: 1}]", "missing key 'name'"),
        ("sharpness.measures=[{name: sam, sigma: 1}]", "has no option 'sigma'"),
        ("smoothness.steps=[0]", "leads nowhere"),
        ("analyses=[connectivity]", "source.num_runs: 2"),
        ("experiment.training.optimizer=sdg", "did you mean 'sgd'"),
        ("nonsense", "not of the form path.to.key=VALUE"),
        ("source.trial.x=1", "is a single value"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, override: str, words: str) -> None:
    text = (
        GOOD + "  \n"
        if not override.startswith("source.trial")
        else GOOD.replace("{train: true}", "{study: a, trial: best}").replace("experiment:", "x:")
    )
    problems = told(tmp_path, text, (override,))
    assert any("--set" in text and words in text for text in problems), problems


def test_problems_of_a_named_experiment_point_into_its_file(tmp_path: Path) -> None:
    experiment = tmp_path / "mine.yaml"
    experiment.write_text("dataset: {name: digits}\nmodel: {name: mpl}\n")
    problems = told(tmp_path, f"source: {{train: true}}\nexperiment: {experiment}\n")
    assert problems == [
        f"{experiment}:2:15 experiment.model.name: unknown model 'mpl'; did you mean 'mlp'?"
    ]


def test_a_checkpoint_needs_an_experiment() -> None:
    with pytest.raises(SpecError, match=r"names dataset and model"):
        load_landscape(None, ["source.checkpoint=w.pt"])


def test_a_secret_is_refused_without_being_repeated(tmp_path: Path) -> None:
    problems = told(tmp_path, GOOD, ("output.folder=s3://me:hunter2@bucket",))
    assert any("credentials" in text for text in problems)
    assert not any("hunter2" in text for text in problems)


def leaves(model: Any, path: str = "") -> list[str]:
    found = []
    for name, info in model.model_fields.items():
        inner = info.annotation
        here = f"{path}{name}"
        if hasattr(inner, "model_fields"):
            found += leaves(inner, f"{here}.")
        else:
            assert info.description, here
            found.append(here)
    return found


def test_every_key_is_described_and_read_somewhere() -> None:
    """A setting that nothing reads would be a promise that nobody keeps."""
    keys = leaves(LandscapeSpec)
    assert len(keys) > 60
    root = Path(__file__).resolve().parent.parent / "llp"
    files = [*root.glob("analyses/*.py"), root / "analysis.py", root / "spec" / "landscape.py"]
    files += [*(root / "reporting").glob("landscape*.py"), root / "analyses" / "own_training.py"]
    code = {path: path.read_text() for path in files}
    whole = {"connectivity", "directions", "surfaces"}  # sections read by model_dump
    for key in keys:
        section, _, name = key.rpartition(".")
        if name == "version":
            continue
        readers = [path for path, text in code.items() if f".{name}" in text]
        assert readers or section in whole, f"nothing reads {key}"
