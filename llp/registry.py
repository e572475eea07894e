"""The tables of names a YAML file may use, and how a name becomes a Python object.

A row is a name, the place of the code (`module:attribute`, imported only when used), what it is in
one line, and the options with their defaults. Adding something of our own is one file and one row.
Packages outside add rows through entry points (`[project.entry-points."llp.models"]` and so on),
and a YAML file may name `my_package:build_model` directly.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from llp.errors import SpecError, unknown


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        target: `module:attribute`.
        summary: One line for `llp list`.
        options: Option -> default. For models and datasets these are keyword arguments of the
            target; for optimizers they are hyperparameters beside `learning_rate` and
            `weight_decay`.
    """

    target: str
    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)


DATASETS: dict[str, Entry] = {
    "digits": Entry(
        "llp.workloads.datasets:digits",
        "scikit-learn's 1,797 handwritten digits, 1x8x8, 10 classes; embedded, no download",
    ),
    "synthetic": Entry(
        "llp.workloads.datasets:synthetic",
        "learnable random images: class prototypes plus noise and shifts; disjoint test",
        {
            "num_train": 2000,
            "num_test": 1000,
            "num_classes": 10,
            "image_size": 16,
            "channels": 3,
            "noise": 0.6,
        },
    ),
    "cifar10": Entry("llp.workloads.datasets:cifar10", "CIFAR-10, 3x32x32, 10 classes"),
    "cifar100": Entry("llp.workloads.datasets:cifar100", "CIFAR-100, 3x32x32, 100 classes"),
    "fashion_mnist": Entry(
        "llp.workloads.datasets:fashion_mnist", "Fashion-MNIST, 1x28x28, 10 classes"
    ),
    "mnist": Entry("llp.workloads.datasets:mnist", "MNIST, 1x28x28, 10 classes"),
    "image_folder": Entry(
        "llp.workloads.datasets:image_folder",
        "a folder with train/ and test/, one sub-folder of images per class",
        {"image_size": 64},
    ),
}

_CONV = {"width": 32, "dropout": 0.0}
MODELS: dict[str, Entry] = {
    "mlp": Entry(
        "llp.workloads.models:mlp",
        "fully connected network",
        {"width": 256, "depth": 2, "dropout": 0.0},
    ),
    "simple_cnn": Entry(
        "llp.workloads.models:simple_cnn", "three 3x3 convolutions without batch norm", _CONV
    ),
    "convnet": Entry(
        "llp.workloads.models:convnet", "three convolution + batch-norm blocks", _CONV
    ),
    "resnet20": Entry("llp.workloads.models:resnet20", "ResNet-20 for 32x32 images", {"width": 16}),
    "resnet18": Entry(
        "llp.workloads.models:resnet18", "ResNet-18 with the 32x32 stem", {"width": 64}
    ),
    "resnet34": Entry(
        "llp.workloads.models:resnet34", "ResNet-34 with the 32x32 stem", {"width": 64}
    ),
    "resnet50": Entry(
        "llp.workloads.models:resnet50", "ResNet-50 with the 32x32 stem", {"width": 64}
    ),
    "vgg11": Entry("llp.workloads.models:vgg11", "VGG-11", {"dropout": 0.0}),
    "vgg11_bn": Entry("llp.workloads.models:vgg11_bn", "VGG-11 with batch norm", {"dropout": 0.0}),
    "vgg16": Entry("llp.workloads.models:vgg16", "VGG-16", {"dropout": 0.0}),
    "vgg16_bn": Entry("llp.workloads.models:vgg16_bn", "VGG-16 with batch norm", {"dropout": 0.0}),
    "wide_resnet": Entry(
        "llp.workloads.models:wide_resnet",
        "wide residual network WRN-depth-widen_factor",
        {"depth": 16, "widen_factor": 4, "dropout": 0.0},
    ),
}

OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry(
        "llp.optim:sgd", "stochastic gradient descent", {"momentum": 0.9, "nesterov": False}
    ),
    "adam": Entry(
        "llp.optim:adam", "Adam, L2 weight decay", {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    ),
    "adamw": Entry(
        "llp.optim:adamw",
        "Adam with decoupled weight decay",
        {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    ),
}

SCHEDULES: dict[str, Entry] = {
    "constant": Entry("llp.training.schedules:constant", "the same learning rate after warm-up"),
    "cosine": Entry("llp.training.schedules:cosine", "half a cosine to zero after warm-up"),
    "one_cycle": Entry("llp.training.schedules:one_cycle", "linear up for 30 %, then cosine down"),
    "step": Entry("llp.training.schedules:step", "divided by 10 at 50 % and at 75 %"),
}

AUGMENTATIONS: dict[str, Entry] = {
    "flip": Entry("llp.workloads.augment:flip", "horizontal flip with probability 1/2"),
    "crop": Entry("llp.workloads.augment:crop", "random crop after padding by 1/8 of the side"),
    "cutout": Entry("llp.workloads.augment:cutout", "one square of 1/4 of the side set to zero"),
}

SCHEDULERS: dict[str, Entry] = {
    "asha": Entry("llp.probing.promotion:Asha", "asynchronous successive halving with promotion"),
    "hyperband": Entry("llp.probing.promotion:Hyperband", "exact Hyperband brackets"),
    "median": Entry("llp.probing.promotion:Median", "up a rung while not worse than the median"),
    "fifo": Entry("llp.probing.promotion:Fifo", "no early stopping: every trial on the top rung"),
}

SEARCHERS: dict[str, Entry] = {
    "random": Entry("llp.spec.domains:RandomSearch", "independent draws"),
    "tpe": Entry("llp.cluster.searchers:tpe", "tree-structured Parzen estimator (Optuna)"),
    "gp": Entry("llp.cluster.searchers:gp", "Gaussian process (Optuna)"),
    "grid": Entry("llp.spec.domains:GridSearch", "every combination of the listed values"),
}

STOP_RULES: dict[str, Entry] = {
    "power_law": Entry(
        "llp.probing.stopping:PowerLaw",
        "stops when the forecast of the rung's end is clearly below what would be promoted",
        {"min_points": 4, "confidence": 0.95, "min_finished": 2, "min_spread": 0.005},
    ),
    "plateau": Entry(
        "llp.probing.stopping:Plateau",
        "stops when the validation loss has not improved for a share of the rung",
        {"patience_fraction": 0.5, "min_points": 4},
    ),
}

METRICS: dict[str, Entry] = {
    "sam_sharpness": Entry("llp.flatness.metrics:sam_sharpness", "loss rise at radius rho (SAM)"),
    "asam_sharpness": Entry(
        "llp.flatness.metrics:asam_sharpness", "loss rise, element-wise adaptive (ASAM)"
    ),
    "noise_sharpness": Entry(
        "llp.flatness.metrics:noise_sharpness", "mean loss rise under relative Gaussian noise"
    ),
    "gradient_norm": Entry("llp.flatness.metrics:gradient_norm", "norm of the full gradient"),
    "hessian_eigenvalues": Entry(
        "llp.flatness.metrics:hessian_eigenvalues", "top Hessian eigenvalues with residuals"
    ),
    "hessian_trace": Entry(
        "llp.flatness.metrics:hessian_trace", "Hutchinson estimate of the trace"
    ),
    "swa_gain": Entry(
        "llp.flatness.refinements:swa_gain",
        "validation gain of a short stochastic-weight-averaging continuation",
    ),
}

PRESETS: dict[str, Entry] = {
    "calibrated": Entry("llp.scoring.score:score", "weights earned on finished trials"),
    "validation": Entry("llp.scoring.score:score", "validation accuracy alone"),
    "llp": Entry("llp.scoring.score:score", "validation accuracy - 0.1 x sharpness"),
}

TABLES: dict[str, dict[str, Entry]] = {
    "datasets": DATASETS,
    "models": MODELS,
    "optimizers": OPTIMIZERS,
    "schedules": SCHEDULES,
    "augmentations": AUGMENTATIONS,
    "schedulers": SCHEDULERS,
    "searchers": SEARCHERS,
    "stop_rules": STOP_RULES,
    "metrics": METRICS,
    "presets": PRESETS,
}


GIVEN = {"root", "download", "channels", "image_size", "num_classes"} | {
    "parameters",
    "learning_rate",
    "weight_decay",
}
"""Arguments that `llp` passes itself, so that they are no options."""


def entries(table: str) -> dict[str, Entry]:
    """The rows of `table`, with those that installed packages add as `llp.<table>` entry points."""
    return {**_from_packages(table), **TABLES[table]}


@functools.cache
def _from_packages(table: str) -> dict[str, Entry]:
    """Rows of installed packages; kept, because looking takes milliseconds and jobs ask often."""
    return {
        point.name: Entry(point.value, f"from {point.value}")
        for point in entry_points(group=f"llp.{table}")
    }


def find(table: str, name: str) -> Entry:
    """The row called `name`, or one made up for `module:attribute`.

    Raises:
        SpecError: No such name; the message names the nearest.
    """
    rows = entries(table)
    if name in rows:
        return rows[name]
    if ":" in name:
        return Entry(name, "named in the experiment file")
    raise SpecError(unknown(table.removesuffix("s").replace("_", " "), name, rows))


def load(table: str, name: str) -> Any:
    """The Python object behind `name`.

    Raises:
        SpecError: Unknown name, or its module cannot be imported.
    """
    target = find(table, name).target
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{table}: cannot load '{target}': {error}") from error
    except Exception as error:
        # A user's module may raise anything while it is imported.
        reason = f"{type(error).__name__}: {error}"
        raise SpecError(f"{table}: cannot load '{target}': {reason}") from error


def options(table: str, name: str) -> dict[str, Any]:
    """Option -> default of `name`; for code outside our tables, read from its signature.

    Every named parameter counts as an option, except those that `llp` gives itself: `root` and
    `download` of datasets, `channels`, `image_size` and `num_classes` of models, `parameters`,
    `learning_rate` and `weight_decay` of optimizers. The default is None where there is none.
    """
    entry = find(table, name)
    if entry.options or name in TABLES[table]:
        return dict(entry.options)
    parameters = inspect.signature(load(table, name)).parameters.values()
    return {
        p.name: None if p.default is p.empty else p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in GIVEN
    }
