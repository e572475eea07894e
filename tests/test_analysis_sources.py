"""Whose landscape it is: trials, jobs and checkpoints are found, wrong ones told by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_runs import make_study, mean_loss, run, settings, subject_of
from torch import nn

from llp.analyses.checkpoints import fitted, weights_in
from llp.analyses.sources import results_folder
from llp.errors import CheckpointError, EnvironmentProblem, SpecError, StudyError
from llp.spec.landscape import load_landscape
from llp.training.checkpoint import load
from llp.training.devices import choose_device
from llp.workloads import models


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study: three trials, the winner t001 verified with two seeds and watched."""
    root = tmp_path_factory.mktemp("studies")
    rows = [{"name": "checkpoints", "jobs": "verify"}, {"name": "curvature", "every": 2}]
    return make_study(root, callbacks=rows)


def of_study(folder: Path, tmp_path: Path, **source: Any) -> Any:
    full = {"study": folder.name, "root": str(folder.parent), **source}
    return settings(tmp_path, source=full, experiment=None)


def same(model: nn.Module, path: Path) -> bool:
    state = load(path)["model"]
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_best_is_the_winner_and_its_first_full_training(study: Path, tmp_path: Path) -> None:
    subject = subject_of(of_study(study, tmp_path), tmp_path)
    assert subject.title == "t001-v0 of study"
    assert same(subject.model, study / "checkpoints" / "t001-v0.pt")
    assert subject.other is not None
    assert subject.other.path.name == "t001-v1.pt"
    assert [weights.epoch for weights in subject.path] == [1, 2, -1]
    assert [point.epoch for point in subject.curve] == [1, 2, 3]
    assert [seen.epoch for seen in subject.observations] == [2, 3]


def test_a_trial_that_was_not_verified_is_taken_from_its_highest_rung(
    study: Path, tmp_path: Path
) -> None:
    subject = subject_of(of_study(study, tmp_path, trial="t000"), tmp_path)
    jobs = sorted(path.stem for path in (study / "checkpoints").glob("t000-r*.pt"))
    assert same(subject.model, study / "checkpoints" / f"{jobs[-1]}.pt")
    assert subject.other is None
    assert subject.path == ()


def test_a_job_can_be_named(study: Path, tmp_path: Path) -> None:
    subject = subject_of(of_study(study, tmp_path, job="t001-r1"), tmp_path)
    assert same(subject.model, study / "checkpoints" / "t001-r1.pt")


def test_results_go_into_the_study_under_the_name_of_the_trial(study: Path, tmp_path: Path) -> None:
    spec = load_landscape({"source": {"study": study.name, "root": str(study.parent)}})
    assert results_folder(spec) == study / "landscape" / "t001"
    named = load_landscape(
        {"source": {"study": study.name, "root": str(study.parent), "job": "t001-r1"}}
    )
    assert results_folder(named) == study / "landscape" / "t001-r1"


def test_a_whole_landscape_of_a_studys_trial(study: Path, tmp_path: Path) -> None:
    outcome = run(
        tmp_path,
        source={"study": study.name, "root": str(study.parent)},
        experiment=None,
    )
    assert outcome.missing == {}
    assert "connectivity" in outcome.computed  # between the two seeds of the verification
    assert "surface/trajectory" in outcome.computed
    assert outcome.values["connectivity/other"] == "t001-v1"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"study": "studie"}, "did you mean 'study'"),
        ({"trial": "t009"}, "did you mean 't00"),
        ({"trial": "wiener"}, "unknown trial 'wiener'"),
        ({"job": "t001-r9"}, "no finished job 't001-r9' with weights; t001 has: t001-r1"),
        ({"job": "t009-r1"}, "unknown trial 't009'"),
    ],
)
def test_a_wrong_study_trial_or_job_is_told(
    study: Path, tmp_path: Path, source: dict[str, str], words: str
) -> None:
    with pytest.raises(StudyError, match=words):
        subject_of(of_study(study, tmp_path, **source), tmp_path)


def test_weights_that_are_gone_are_told(study: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    (copy / "checkpoints" / "t001-v0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"t001-v0.pt of t001-v0 does not exist any more"):
        subject_of(of_study(copy, tmp_path), tmp_path)


# Checkpoints


def of_file(path: Path, tmp_path: Path, *overrides: str, **source: Any) -> Any:
    return settings(tmp_path, *overrides, source={"checkpoint": str(path), **source})


def test_a_checkpoint_of_this_package_brings_its_hyperparameters(
    study: Path, tmp_path: Path
) -> None:
    path = study / "checkpoints" / "t001-v0.pt"
    spec = of_file(path, tmp_path, "experiment.model.options={depth: 1}")
    width = load(path)["hyperparameters"]["width"]
    subject = subject_of(spec, tmp_path)
    assert subject.model[1].out_features == width  # type: ignore[index,union-attr]
    assert same(subject.model, path)
    by_study = subject_of(of_study(study, tmp_path), tmp_path)
    assert mean_loss(subject.model, subject.batches) == mean_loss(by_study.model, by_study.batches)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "module.", "_orig_mod.module."])
def test_checkpoints_of_other_scripts_are_understood(tmp_path: Path, wrap: str) -> None:
    model = models.build("mlp", {"width": 8, "depth": 1}, channels=1, image_size=8, num_classes=10)
    state = dict(model.state_dict())
    if wrap.endswith("."):
        state = {f"{wrap}{name}": tensor for name, tensor in state.items()}
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": state, "epoch": 3} if wrap != "plain" else state, path)
    subject = subject_of(of_file(path, tmp_path), tmp_path)
    for mine, theirs in zip(subject.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_first_tensor_that_does_not_fit_is_named(study: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    wide = models.build("mlp", {"width": 16, "depth": 1}, channels=1, image_size=8, num_classes=10)
    torch.save(wide.state_dict(), path)
    with pytest.raises(CheckpointError) as caught:
        subject_of(of_file(path, tmp_path), tmp_path)
    text = str(caught.value)
    assert "1.weight is [16, 64] in the file and [8, 64] in the network (and 2 more)" in text


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"bias \[3\] is missing in the file"):
        fitted(model, {"weight": torch.zeros(3, 2)}, tmp_path)
    extra = {**model.state_dict(), "scale": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"scale \[1\] is only in the file"):
        fitted(model, extra, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"not a checkpoint", "cannot be read as plain tensors"),
        ({"epoch": 3}, "holds no weights"),
        (nn.Linear(2, 2), "cannot be read as plain tensors"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        subject_of(of_file(path, tmp_path), tmp_path)


def test_a_second_checkpoint_must_be_there_and_fit(study: Path, tmp_path: Path) -> None:
    path = study / "checkpoints" / "t001-v0.pt"
    options = "experiment.model.options={depth: 1}"
    with pytest.raises(CheckpointError, match=r"gone.pt does not exist"):
        subject_of(of_file(path, tmp_path, options, other="gone.pt"), tmp_path)
    other = tmp_path / "wide.pt"
    wide = {"width": 16, "depth": 1}
    model = models.build("mlp", wide, channels=1, image_size=8, num_classes=10)
    torch.save(model.state_dict(), other)
    with pytest.raises(CheckpointError, match=r"wide.pt does not fit the network mlp: 1.weight"):
        run(
            tmp_path,
            options,
            "analyses=[connectivity]",
            source={"checkpoint": str(path), "other": str(other)},
        )


def test_earlier_checkpoints_make_a_trajectory(study: Path, tmp_path: Path) -> None:
    folder = study / "checkpoints"
    earlier = [str(folder / f"t001-v0-e00{epoch}.pt") for epoch in (1, 2)]
    outcome = run(
        tmp_path,
        "experiment.model.options={depth: 1}",
        "analyses=[trajectory]",
        source={"checkpoint": str(folder / "t001-v0.pt"), "checkpoints": earlier},
    )
    assert outcome.computed == ("trajectory",)


def test_weights_in_prefers_named_holders() -> None:
    state = {"model": {"a": torch.ones(1)}, "optimizer": {"b": torch.zeros(1)}}
    assert list(weights_in(state, Path("x"))) == ["a"]


# Devices


def test_a_gpu_that_is_not_there_is_told() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert choose_device("auto").type == "cpu"
    with pytest.raises(EnvironmentProblem, match="CUDA sees 0 GPUs"):
        choose_device("cuda:3")


def test_a_device_that_does_not_exist_is_told() -> None:
    with pytest.raises(SpecError, match="choose auto, cpu, cuda"):
        choose_device("gpu")
