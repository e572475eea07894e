"""Training from Python functions shares the loop, and so the promises, of the experiment file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_support import (
    drive,
    equal,
    make_job,
    make_spec,
    numbers,
    objective,
    split,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from llp.records import Rung, Verification
from llp.spec.schema import TrainingSpec
from llp.training import jobs
from llp.training.python_objective import CallableObjective, ExampleBatches

TRAINING = TrainingSpec(batch_size=16, warmup_fraction=0.05)


def model_fn(config: dict[str, Any]) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, int(config.get("width", 16))), nn.ReLU(), nn.Linear(16, 3)
    )


def optimizer_fn(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config.get("learning_rate", 0.05), momentum=0.9)


def pair(count: int, seed: int) -> tuple[Tensor, Tensor]:
    examples = split(count, seed)
    return torch.from_numpy(examples.images) / 255.0, torch.from_numpy(examples.labels)


def dataset_fn() -> tuple[Any, ...]:
    return pair(61, 0), pair(20, 1), pair(30, 2)


class Listed(Dataset[Any]):
    """A map-style dataset without labels in sight."""

    def __init__(self, count: int, seed: int) -> None:
        self.inputs, self.labels = pair(count, seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], int(self.labels[index])


def make(folder: Path, **changes: Any) -> CallableObjective:
    values: dict[str, Any] = {
        "model_fn": model_fn,
        "dataset_fn": dataset_fn,
        "criterion": nn.CrossEntropyLoss(),
        "optimizer_fn": optimizer_fn,
        "folder": folder,
        "training": TRAINING,
        "device": "cpu",
    }
    return CallableObjective(**{**values, **changes})


def test_a_probe_and_a_verification_run_to_their_ends(tmp_path: Path) -> None:
    work = make(tmp_path)
    points, end = drive(work, make_job())
    assert (end.outcome, end.samples_seen, len(points)) == ("completed", 132, 4)
    assert points[-1].train_loss < points[0].train_loss
    reports, end = drive(work, make_job(kind="verify", job_id="v", rung=Rung(2, 1.0, 5, 6)))
    assert (end.samples_seen, reports[0].rung, reports[0].data_fraction) == (6 * 61, 2, 1.0)
    assert isinstance(reports[-1], Verification)
    assert reports[-1].num_test_examples == 30
    assert reports[-1].test_accuracy > 0.8
    assert work.num_train_examples() == 61


@pytest.mark.parametrize(
    "form",
    [
        lambda: (Listed(61, 0), Listed(20, 1)),
        lambda: (TensorDataset(*pair(61, 0)), TensorDataset(*pair(20, 1))),
        lambda: [tuple(t.numpy() for t in pair(61, 0)), tuple(t.numpy() for t in pair(20, 1))],
        lambda: [list(pair(61, 0)), [t.numpy() for t in pair(20, 1)]],
    ],
)
def test_every_form_of_dataset_gives_the_same_bits(tmp_path: Path, form: Any) -> None:
    expected, _ = drive(make(tmp_path / "pair"), make_job())
    found, _ = drive(make(tmp_path / "form", dataset_fn=form), make_job())
    assert numbers(found) == numbers(expected)
    assert equal(weights(tmp_path / "pair"), weights(tmp_path / "form"))


def test_it_trains_as_the_experiment_file_does(tmp_path: Path) -> None:
    """The same network on the same data through both seams gives curves of the same kind."""
    hyperparameters = {"learning_rate": 0.05}
    mine, _ = drive(make(tmp_path), make_job(hyperparameters, rung=Rung(1, 1.0, 61, 8)))
    files, _ = drive(
        objective(tmp_path, make_spec(training={"weight_decay": 0.0})),
        make_job(hyperparameters, rung=Rung(1, 1.0, 61, 8)),
    )
    assert [p.learning_rate for p in mine] == [p.learning_rate for p in files]
    assert [p.samples_seen for p in mine] == [p.samples_seen for p in files]


def test_the_functions_get_the_configuration(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def spying_model(config: dict[str, Any]) -> nn.Module:
        seen.append(config)
        return model_fn({})

    hyperparameters = {"learning_rate": 0.1, "batch_size": 20, "anything": "else"}
    _, end = drive(make(tmp_path, model_fn=spying_model), make_job(hyperparameters))
    assert end.outcome == "completed"
    assert seen == [hyperparameters]


def test_the_dataset_is_made_once(tmp_path: Path) -> None:
    calls = []

    def counting() -> tuple[Any, ...]:
        calls.append(1)
        return dataset_fn()

    work = make(tmp_path, dataset_fn=counting)
    for index in range(3):
        drive(work, make_job(job_id=f"j{index}"))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_counts_its_examples_whether_it_is_a_tuple_or_a_list(
    tmp_path: Path, kind: Any
) -> None:
    work = make(tmp_path, dataset_fn=lambda: (kind(pair(61, 0)), kind(pair(20, 1))))
    assert work.num_train_examples() == 61
    assert len(work._order()) == 61
    batches = ExampleBatches(kind(pair(9, 0)), batch_size=4, device=torch.device("cpu"))
    assert batches.num_examples == 9


def test_subsets_are_nested_and_balanced(tmp_path: Path) -> None:
    work = make(tmp_path, dataset_fn=lambda: (Listed(61, 0), Listed(20, 1)))
    order = work._order()
    labels = Listed(61, 0).labels.numpy()
    for size in (3, 12, 30, 61):
        counts = np.bincount(labels[order[:size]], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert sorted(order) == list(range(61))


def test_regression_needs_its_own_hits_and_then_works(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator)
    data = (inputs, inputs.sum(1, keepdim=True))
    values: dict[str, Any] = {
        "model_fn": lambda config: nn.Linear(5, 1),
        "dataset_fn": lambda: (data, data, data),
        "criterion": functional.mse_loss,
    }
    job = make_job(rung=Rung(1, 1.0, 40, 6))
    _, end = drive(make(tmp_path, **values), job)
    assert end.outcome == "failed"
    assert "pass your own num_correct" in end.failure
    within = make(tmp_path, **values, num_correct=lambda o, t: ((o - t).abs() < 0.5).sum())
    points, end = drive(within, job)
    assert end.outcome == "completed"
    assert points[-1].validation_loss < points[0].validation_loss
    assert 0 <= points[-1].validation_accuracy <= 1


def test_resumed_job_equals_uninterrupted_job(tmp_path: Path) -> None:
    expected, _ = drive(make(tmp_path / "whole"), make_job())
    generator = make(tmp_path / "cut", checkpoint_seconds=0.0)(make_job())
    next(generator)
    next(generator)
    generator.close()
    assert jobs.partial_path(tmp_path / "cut", "t000-r1").exists()
    found, _ = drive(make(tmp_path / "cut"), make_job(attempt=1))
    assert numbers(found) == numbers(expected)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_without_a_test_split_a_verification_says_so(tmp_path: Path) -> None:
    work = make(tmp_path, dataset_fn=lambda: dataset_fn()[:2])
    _, end = drive(work, make_job(kind="verify"))
    assert end.outcome == "failed"
    assert "needs a test split" in end.failure


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: (pair(5, 0),), "must return (train, validation)"),
        (lambda: ((pair(5, 0)[0], pair(4, 0)[1]), pair(5, 0)), "of one length"),
        (lambda: ([*pair(5, 0), *pair(5, 0)], pair(5, 0)), "of one length"),
    ],
)
def test_data_of_the_wrong_shape_is_named(tmp_path: Path, data: Any, words: str) -> None:
    _, end = drive(make(tmp_path, dataset_fn=data), make_job(rung=Rung(1, 1.0, 4, 1)))
    assert end.outcome == "failed"
    assert words in end.failure


@pytest.mark.parametrize(
    ("count", "size", "lengths"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (3, 1, [1, 1, 1]), (8, 4, [4, 4])],
)
def test_batches_use_every_example_once(count: int, size: int, lengths: list[int]) -> None:
    data = (torch.arange(count), torch.arange(count))
    batches = ExampleBatches(
        data, batch_size=size, device=torch.device("cpu"), shuffle=True, seed=1
    )
    found = list(batches.epoch(2))
    assert [len(x) for x, _ in found] == lengths
    assert len(batches) == len(lengths)
    assert sorted(int(i) for x, _ in found for i in x) == list(range(count))
    assert [y.tolist() for _, y in batches.epoch(2, start=1)] == [y.tolist() for _, y in found[1:]]
    if count > 4:
        assert [y.tolist() for _, y in batches.epoch(3)] != [y.tolist() for _, y in found]
