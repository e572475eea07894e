"""Small real pieces that the tests of the training room share: data, a spec, and a driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llp.records import CurvePoint, Job, JobEnd, Rung, Trial
from llp.spec.schema import Spec
from llp.training.objective import JobObjective, TrainingObjective
from llp.workloads.images import ImageData, Split

HERE = __name__
NUM_TRAIN, NUM_VALIDATION, NUM_TEST, CLASSES = 61, 20, 30, 3


def split(count: int, seed: int) -> Split:
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    prototypes = np.random.default_rng(99).integers(0, 255, (CLASSES, 1, 8, 8))
    noise = generator.normal(0, 30, (count, 1, 8, 8))
    return Split(np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8), labels)


def image_data(**changes: Any) -> ImageData:
    values: dict[str, Any] = {
        "name": "tiny",
        "train": split(NUM_TRAIN, 0),
        "validation": split(NUM_VALIDATION, 1),
        "test": split(NUM_TEST, 2),
        "class_names": ("a", "b", "c"),
        "mean": (0.5,),
        "std": (0.3,),
        "source": "made up",
        "digest": "0" * 64,
    }
    return ImageData(**{**values, **changes})


def make_spec(**sections: Any) -> Spec:
    training = {"epochs": 4, "batch_size": 16, "learning_rate": 0.05}
    return Spec.model_validate(
        {
            "name": "test",
            "dataset": {"name": "digits"},
            "model": {"name": "mlp", "options": {"width": 16, "depth": 1}},
            "search_space": {"learning_rate": {"type": "loguniform", "low": 1e-3, "high": 1}},
            **sections,
            "training": {**training, **sections.get("training", {})},
        }
    )


def make_job(hyperparameters: dict[str, Any] | None = None, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "job_id": "t000-r1",
        "kind": "probe",
        "trial": Trial("t000", hyperparameters or {}, seed=5),
        "rung": Rung(1, 0.5, 33, 4),
        "seed": 5,
    }
    return Job(**{**values, **changes})


def objective(folder: Path, spec: Spec | None = None, **options: Any) -> TrainingObjective:
    data = options.pop("data", None) or image_data()
    return TrainingObjective(spec or make_spec(), data, folder, "cpu", **options)


def drive(work: JobObjective, job: Job) -> tuple[list[Any], JobEnd]:
    """All reports of a job, and its end."""
    generator, reports = work(job), []
    while True:
        try:
            reports.append(next(generator))
        except StopIteration as stop:
            return reports, stop.value


def numbers(reports: list[Any]) -> list[tuple[Any, ...]]:
    """What must be the same to the bit: everything but the seconds."""
    return [
        tuple(v for k, v in vars(report).items() if k != "seconds")
        for report in reports
        if isinstance(report, CurvePoint)
    ]


def weights(folder: Path, job_id: str = "t000-r1") -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoints" / f"{job_id}.pt", weights_only=True)
    model: dict[str, torch.Tensor] = state["model"]
    return model


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Failing(nn.Module):
    """A network that raises `error` in its `after`-th training step."""

    def __init__(self, error: BaseException, after: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
        self.error, self.left = error, after

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.left -= 1
            if self.left < 0:
                raise self.error
        output: torch.Tensor = self.inner(images)
        return output


def broken(*, channels: int, image_size: int, num_classes: int, after: int = 0) -> nn.Module:
    return Failing(KeyError("a bug in the user's network"), after)


def hungry(*, channels: int, image_size: int, num_classes: int, after: int = 0) -> nn.Module:
    return Failing(RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), after)


def greedy(*, channels: int, image_size: int, num_classes: int) -> nn.Module:
    torch.empty(2**60, dtype=torch.uint8)
    return nn.Flatten()


class Boundless(nn.Module):
    """A network that asks the device for more than any has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        held = [torch.zeros(2**36, dtype=torch.uint8, device=images.device) for _ in range(64)]
        output: torch.Tensor = self.inner(images.flatten(1)) + len(held)
        return output


def boundless(*, channels: int, image_size: int, num_classes: int) -> nn.Module:
    return Boundless()


def interrupted(*, channels: int, image_size: int, num_classes: int) -> nn.Module:
    return Failing(KeyboardInterrupt(), 1)


def five_classes(*, channels: int, image_size: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, 5))


def noisy(*, channels: int, image_size: int, num_classes: int, width: int = 8) -> nn.Module:
    """Batch norm, dropout and their state: everything that a resumed job could get wrong."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


class Untouchable(Split):
    """A test split that must not be read, or that counts how often it is."""

    def __init__(self, allowed: int = 0) -> None:
        real = split(NUM_TEST, 2)
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "reads", [])
        object.__setattr__(self, "allowed", allowed)

    def __getattribute__(self, name: str) -> Any:
        if name == "images":
            reads = object.__getattribute__(self, "reads")
            reads.append(1)
            if object.__getattribute__(self, "allowed") == 0:
                raise AssertionError("the test split was read")
            return object.__getattribute__(self, "real").images
        if name == "labels":
            return object.__getattribute__(self, "real").labels
        return object.__getattribute__(self, name)
