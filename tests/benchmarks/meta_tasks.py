"""Small data sets that share one search space, for `meta.py`: loaders, and a table of trainings.

Digits with fewer images, fewer classes, wrong labels or spoilt pixels; two tabular sets of
scikit-learn written as square images; synthetic images; and, where `../shared/data` has CIFAR,
parts of it shrunk to 8 x 8. All is trained by the project's own objective with the MLP.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llp.records import HyperparameterValue, Trial
from llp.spec import Spec
from llp.spec.domains import RandomSearch
from llp.training.full import full_job, run_here
from llp.training.objective import TrainingObjective
from llp.workloads.corruptions import corrupt
from llp.workloads.datasets import cifar10, cifar100, digits, load, split_validation

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
EPOCHS = 8
NUM_CONFIGURATIONS = 150
SEED = 0
SPACE: dict[str, Any] = {
    "learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1.0},
    "weight_decay": {"type": "loguniform", "low": 1e-6, "high": 1e-1},
    "optimizer": ["sgd", "adamw"],
    "batch_size": [16, 32, 64, 128],
    "width": {"type": "integer", "low": 16, "high": 256, "log": True},
    "dropout": {"type": "uniform", "low": 0.0, "high": 0.5},
}

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def digits_variant(
    *, classes: int = 10, parity: bool = False, spoilt: str = "", severity: int = 5
) -> Arrays:
    """Digits below `classes`, or odd against even, with one corruption in both splits."""
    raw = digits()
    found: list[NDArray[Any]] = []
    for images, labels in (
        (raw.train_images, raw.train_labels),
        (raw.test_images, raw.test_labels),
    ):
        kept = np.flatnonzero(labels < classes)
        pixels, names = np.asarray(images)[kept], np.asarray(labels)[kept]
        if spoilt:
            pixels = corrupt(pixels, spoilt, severity, seed=SEED)
        found += [pixels, names % 2 if parity else names]
    return found[0], found[1], found[2], found[3]


def tabular(*, name: str) -> Arrays:
    """A table of scikit-learn: features scaled to 0..255, the rest of the square is 0."""
    from sklearn import datasets

    table = getattr(datasets, f"load_{name}")()
    low, high = table.data.min(axis=0), table.data.max(axis=0)
    side = 8  # the smallest that the MLP takes
    images = np.zeros((len(table.data), side * side), dtype=np.uint8)
    images[:, : table.data.shape[1]] = np.rint(255 * (table.data - low) / (high - low))
    images = images.reshape(-1, 1, side, side)
    labels = table.target.astype(np.int64)
    train, test = split_validation(labels, fraction=0.2, seed=SEED)
    return images[train], labels[train], images[test], labels[test]


@lru_cache(maxsize=2)
def _shrunk(name: str, limit: int) -> Arrays:
    raw = {"cifar10": cifar10, "cifar100": cifar100}[name](root=DATA)
    found: list[NDArray[Any]] = []
    for images, labels, size in (
        (raw.train_images, raw.train_labels, limit),
        (raw.test_images, raw.test_labels, 200),
    ):
        pixels = images.pixels(np.arange(size)) if hasattr(images, "pixels") else images[:size]
        small = np.asarray(pixels, dtype=np.float64).reshape(size, 3, 8, 4, 8, 4).mean(axis=(3, 5))
        found += [np.rint(small).astype(np.uint8), np.asarray(labels)[:size].astype(np.int64)]
    return found[0], found[1], found[2], found[3]


def cifar_small(*, name: str, grey: bool = False, keep: list[int] | None = None) -> Arrays:
    """The first images of CIFAR as 8 x 8; with `keep`, those of some classes."""
    arrays = _shrunk(name, 2000 if keep is None else 8000)
    found: list[NDArray[Any]] = []
    for pixels, labels in (arrays[:2], arrays[2:]):
        if keep is not None:
            kept = np.isin(labels, keep)
            pixels, labels = pixels[kept], np.searchsorted(keep, labels[kept])
        if grey:
            pixels = np.rint(pixels.mean(axis=1, keepdims=True)).astype(np.uint8)
        found += [pixels, labels]
    return found[0], found[1], found[2], found[3]


def tasks() -> dict[str, dict[str, Any]]:
    """Task -> `dataset` section of an experiment."""
    own = "meta_tasks:digits_variant"
    images = {"channels": 3, "image_size": 8, "num_train": 1500, "num_test": 100}
    found: dict[str, dict[str, Any]] = {
        "digits": {"name": "digits"},
        "digits_300": {"name": "digits", "max_train_examples": 300},
        "digits_100": {"name": "digits", "max_train_examples": 100},
        "digits_wrong_20": {"name": "digits", "label_noise": 0.2},
        "digits_wrong_40": {"name": "digits", "label_noise": 0.4},
        "digits_noise": {"name": own, "options": {"spoilt": "gaussian_noise"}},
        "digits_blur": {"name": own, "options": {"spoilt": "gaussian_blur"}},
        "digits_contrast": {"name": own, "options": {"spoilt": "contrast"}},
        "digits_parity": {"name": own, "options": {"parity": True}},
        "digits_below_5": {"name": own, "options": {"classes": 5}},
        "breast_cancer": {"name": "meta_tasks:tabular", "options": {"name": "breast_cancer"}},
        "wine": {"name": "meta_tasks:tabular", "options": {"name": "wine"}},
        "synthetic": {"name": "synthetic", "options": {**images, "noise": 1.0}},
        "synthetic_hard": {"name": "synthetic", "options": {**images, "noise": 3.0}},
        "synthetic_2": {"name": "synthetic", "options": {**images, "noise": 3.0, "num_classes": 2}},
        "synthetic_20": {
            "name": "synthetic",
            "options": {**images, "noise": 1.5, "num_classes": 20},
        },
    }
    if (DATA / "cifar10_train.parquet").exists():
        small = "meta_tasks:cifar_small"
        ten: dict[str, Any] = {"name": "cifar10"}
        found |= {
            "cifar10": {"name": small, "options": ten},
            "cifar10_grey": {"name": small, "options": {**ten, "grey": True}},
            "cifar10_wrong_30": {"name": small, "options": ten, "label_noise": 0.3},
            "cifar_ship_truck": {"name": small, "options": {**ten, "keep": [8, 9]}},
            "cifar_animals": {"name": small, "options": {**ten, "keep": [2, 3, 4, 5, 6, 7]}},
            "cifar100": {"name": small, "options": {"name": "cifar100"}},
        }
    return found


DEEP = "@deep"
"""At the end of a task's name: eight hidden layers instead of two, whose best values differ."""
DEEP_TASKS = ("digits_parity", "wine", "breast_cancer", "synthetic")


def experiment(name: str) -> Spec:
    """The experiment of a task; `NAME@deep` has the deep network."""
    dataset = tasks()[name.removesuffix(DEEP)]
    return Spec.model_validate(
        {
            "version": 1,
            "name": "meta",
            "dataset": {"validation_fraction": 0.3, **dataset},
            "model": {"name": "mlp", "options": {"depth": 8 if name.endswith(DEEP) else 2}},
            "training": {"epochs": EPOCHS},
            "search_space": SPACE,
        }
    )


def configurations(num: int) -> list[dict[str, HyperparameterValue]]:
    """The configurations of every task, the same for all."""
    search = RandomSearch(experiment("digits").search_space, (), SEED)
    return [search.suggest(index) for index in range(num)]


def train_table(name: str, num: int, folder: Path) -> pd.DataFrame:
    """Every configuration trained fully: task, number, hyperparameters, error, loss, seconds."""
    spec = experiment(name)
    data = load(spec.dataset, SEED)
    objective = TrainingObjective(spec, data, folder, "cpu", threads=1, read_test=False)
    rows = []
    for number, values in enumerate(configurations(num)):
        points: list[Any] = []
        job = full_job(
            spec, Trial(f"t{number}", values, SEED), 0, seed=number, num_train=len(data.train)
        )
        end = run_here(objective, job, partial(_keep, points))
        finite = bool(points) and end.outcome == "completed"
        rows.append(
            {
                "task": name,
                "number": number,
                **values,
                "error": 1 - points[-1].validation_accuracy if finite else np.nan,
                "loss": points[-1].validation_loss if finite else np.nan,
                "outcome": end.outcome,
            }
        )
    return pd.DataFrame(rows)


def _keep(points: list[Any], report: Any) -> None:
    if hasattr(report, "validation_accuracy") and hasattr(report, "epoch"):
        points.append(report)
