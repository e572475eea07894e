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

_BASE: dict[str, Any] = {
    "base": "sgd",  # the optimizer around which another is; None below: its own default
    "momentum": None,
    "nesterov": None,
    "beta1": None,
    "beta2": None,
    "epsilon": None,
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
    "muon": Entry(
        "llp.optim.muon:muon",
        "orthogonalised momentum on hidden matrices, AdamW on the rest",
        {
            "momentum": 0.95,
            "nesterov": True,
            "newton_schulz_steps": 5,
            "beta1": 0.9,
            "beta2": 0.999,
            "epsilon": 1e-8,
        },
    ),
    "sam": Entry(
        "llp.optim.sam:sam",
        "sharpness-aware minimization: the gradient at the worst point nearby",
        {"rho": 0.05, **_BASE},
    ),
    "asam": Entry(
        "llp.optim.sam:asam",
        "SAM in a ball that scales with the weights",
        {"rho": 0.5, "eta": 0.01, **_BASE},
    ),
    "entropy_sgd": Entry(
        "llp.optim.entropy_sgd:entropy_sgd",
        "down the local entropy: a chain of Langevin steps estimates each gradient",
        {
            "inner_steps": 5,
            "gamma": 3.0,
            "gamma_growth": 1e-4,
            "inner_learning_rate": 0.1,
            "noise": 1e-4,
            "mean_weight": 0.25,
            **_BASE,
        },
    ),
    "talt": Entry(
        "llp.optim.talt:talt",
        "damps steep directions and speeds up along valleys, both found in recent gradients",
        {
            "smoothing_factor": 0.5,
            "valley_strength": 1.0,
            "projection_dimension": 32,
            "num_directions": 4,
            "decay": 0.9,
            "update_interval": 10,
            "min_size": 1024,
            **_BASE,
        },
    ),
}

SEVERAL_GRADIENTS = ("asam", "entropy_sgd", "sam")
"""Rows of `OPTIMIZERS` that take several gradients a step, and so cannot be the base of another."""

AVERAGINGS: dict[str, Entry] = {
    "none": Entry("llp.optim.averaging:none", "the weights themselves"),
    "swa": Entry(
        "llp.optim.averaging:swa",
        "stochastic weight averaging at a constant learning rate over the last part",
        {"swa_start": 0.75, "swa_learning_rate": 0.5, "swa_averages": 32},
    ),
    "ema": Entry(
        "llp.optim.averaging:ema",
        "exponential moving average of the weights",
        {"ema_decay": 0.999},
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

CORRUPTIONS: dict[str, Entry] = {
    "gaussian_noise": Entry("llp.workloads.corruptions:gaussian_noise", "noise on every pixel"),
    "gaussian_blur": Entry("llp.workloads.corruptions:gaussian_blur", "Gaussian blur"),
    "contrast": Entry("llp.workloads.corruptions:contrast", "less contrast"),
    "brightness": Entry("llp.workloads.corruptions:brightness", "all channels brighter"),
    "jpeg": Entry("llp.workloads.corruptions:jpeg", "JPEG at lower quality"),
    "pixelate": Entry("llp.workloads.corruptions:pixelate", "coarse pixels"),
    "shift": Entry("llp.workloads.corruptions:shift", "moved, the border repeated"),
}

SCHEDULERS: dict[str, Entry] = {
    "asha": Entry("llp.probing.promotion:Asha", "asynchronous successive halving with promotion"),
    "hyperband": Entry("llp.probing.promotion:Hyperband", "exact Hyperband brackets"),
    "median": Entry("llp.probing.promotion:Median", "up a rung while not worse than the median"),
    "freeze_thaw": Entry(
        "llp.probing.freeze_thaw:FreezeThaw",
        "the largest expected improvement per cost goes on, by forecasts of the full result",
        {"wave": 27, "least_gain": 3.0, "budget": 0.0, "cost": "samples"},
    ),
    "pasha": Entry(
        "llp.probing.growth:Pasha", "ASHA whose top rung grows only while rungs disagree"
    ),
    "fifo": Entry("llp.probing.promotion:Fifo", "no early stopping: every trial on the top rung"),
}

SEARCHERS: dict[str, Entry] = {
    "random": Entry("llp.spec.domains:RandomSearch", "independent draws"),
    "tpe": Entry("llp.cluster.searchers:tpe", "tree-structured Parzen estimator (Optuna)"),
    "gp": Entry("llp.cluster.searchers:gp", "Gaussian process (Optuna)"),
    "grid": Entry("llp.spec.domains:GridSearch", "every combination of the listed values"),
}

PROXIES: dict[str, Entry] = {
    "gradient_norm": Entry(
        "llp.training.proxies:gradient_norm", "norm of the gradient before the first step"
    ),
    "activation_diversity": Entry(
        "llp.training.proxies:activation_diversity",
        "how differently images set the rectifiers (NASWOT)",
    ),
    "jacobian_spectrum": Entry(
        "llp.training.proxies:jacobian_spectrum",
        "how different the input gradients of images are (jacob_cov)",
    ),
}

STOP_RULES: dict[str, Entry] = {
    "power_law": Entry(
        "llp.probing.stopping:PowerLaw",
        "stops when the forecast of the rung's end is clearly below what would be promoted",
        {"min_points": 4, "confidence": 0.95, "min_finished": 2, "min_spread": 0.005},
    ),
    "forecast": Entry(
        "llp.probing.stopping:CurveForecast",
        "stops when the fitted, corrected forecast gives promotion a probability below delta",
        {
            "delta": 0.05,
            "min_points": 4,
            "min_finished": 4,
            "min_correlation": 0.5,
            "margin": 0.005,
            "prior": "",
        },
    ),
    "plateau": Entry(
        "llp.probing.stopping:Plateau",
        "stops when the validation loss has not improved for a share of the rung",
        {"patience_fraction": 0.5, "min_points": 4},
    ),
    "divergence": Entry(
        "llp.probing.stopping:Divergence",
        "stops when the training loss has blown up, or is back where it began",
        {"factor": 3.0, "patience": 2, "learned": 0.8},
    ),
}

SEARCH_RULES: dict[str, Entry] = {
    "time": Entry(
        "llp.probing.search_stopping:Time", "ends tier 1 after so many seconds", {"seconds": 0.0}
    ),
    "cost": Entry(
        "llp.probing.search_stopping:Samples",
        "ends tier 1 when its jobs have seen so many training examples",
        {"samples": 0.0},
    ),
    "target": Entry(
        "llp.probing.search_stopping:Target",
        "ends tier 1 when a trial ends the highest rung with this validation accuracy",
        {"accuracy": 0.0},
    ),
    "no_gain": Entry(
        "llp.probing.search_stopping:NoGain",
        "ends tier 1 when probably nothing to come beats the best by more than a margin",
        {"margin": 0.002, "delta": 0.05, "min_finished": 2, "min_trials": 8},
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
    "adaptive_trace": Entry(
        "llp.flatness.metrics:adaptive_trace", "sum of w^2 H_ii, free of layer scales"
    ),
    "noise_sigma": Entry(
        "llp.flatness.metrics:noise_sigma",
        "relative Gaussian noise at which the loss has risen by a fixed amount",
    ),
    "calibration_error": Entry(
        "llp.flatness.confidence:calibration_error", "expected calibration error (free)"
    ),
    "mean_entropy": Entry("llp.flatness.confidence:mean_entropy", "entropy of predictions (free)"),
    "confidence_gap": Entry(
        "llp.flatness.confidence:confidence_gap", "mean confidence minus accuracy (free)"
    ),
    "swa_gain": Entry(
        "llp.flatness.refinements:swa_gain",
        "validation gain of a short stochastic-weight-averaging continuation",
    ),
    "sam_gain": Entry(
        "llp.flatness.refinements:sam_gain", "validation gain of a short continuation with SAM"
    ),
    "entropy_sgd_gain": Entry(
        "llp.flatness.refinements:entropy_sgd_gain",
        "validation gain of a short continuation with Entropy-SGD",
    ),
}

PRESETS: dict[str, Entry] = {
    "calibrated": Entry("llp.scoring.score:score", "weights earned on finished trials"),
    "validation": Entry("llp.scoring.score:score", "validation accuracy alone"),
    "llp": Entry("llp.scoring.score:score", "validation accuracy - 0.1 x sharpness"),
}

CALLBACKS: dict[str, Entry] = {
    "curvature": Entry(
        "llp.flatness.tracking:Curvature",
        "top Hessian eigenvalues, trace and gradient norm every few epochs",
        {
            "every": 5,
            "jobs": "all",
            "num_eigenvalues": 2,
            "num_examples": 256,
            "batch_size": 256,
            "tolerance": 0.01,
            "num_probes": 4,
        },
    ),
    "checkpoints": Entry(
        "llp.training.callbacks:Checkpoints",
        "keeps the weights every few epochs",
        {"every": 1, "jobs": "all", "optimizer": False},
    ),
    "optimizer_log": Entry(
        "llp.training.optimizer_log:OptimizerLog",
        "keeps what the optimizer noted (TALT: valleys, spectra, norms) for its pictures",
        {"every": 1_000_000, "jobs": "verify"},
    ),
}

SHARPNESS_MEASURES: dict[str, Entry] = {
    "sam": Entry("llp.landscape.sharpness:sam", "rise one SAM step uphill", {"rho": 0.05}),
    "asam": Entry(
        "llp.landscape.sharpness:asam", "rise one ASAM step uphill", {"rho": 0.5, "eta": 0.0}
    ),
    "m_sharpness": Entry(
        "llp.landscape.sharpness:m_sharpness",
        "mean over groups of m examples of SAM's rise on each",
        {"m": 128, "rho": 0.05, "adaptive": False},
    ),
    "worst_case": Entry(
        "llp.landscape.sharpness:worst_case",
        "largest rise in a ball, by projected ascent",
        {"rho": 0.05, "norm": "l2", "adaptive": False, "num_steps": 20, "num_restarts": 1},
    ),
    "epsilon_box": Entry(
        "llp.landscape.sharpness:epsilon_box",
        "Keskar's largest rise in a box, in percent of 1 + loss",
        {"epsilon": 1e-3, "num_steps": 20, "num_restarts": 1},
    ),
    "noise": Entry(
        "llp.landscape.sharpness:noise",
        "mean rise under Gaussian noise, relative to each weight or not",
        {"sigma": 0.05, "num_draws": 8, "relative": True},
    ),
    "noise_sigma": Entry(
        "llp.landscape.sharpness:noise_sigma",
        "noise at which the loss has risen by `rise`; larger is flatter",
        {"rise": 0.1, "num_draws": 8, "relative": True},
    ),
    "local_entropy": Entry(
        "llp.landscape.sharpness:local_entropy",
        "log volume of low loss around the weights; hundreds of gradients",
        {"gamma": 1e3, "temperature": 1.0, "num_chains": 4, "num_nodes": 6, "num_steps": 20},
    ),
    "gradient_norm": Entry("llp.landscape.sharpness:gradient_norm", "norm of the full gradient"),
    "adaptive_trace": Entry(
        "llp.landscape.sharpness:adaptive_trace",
        "sum of |w| H |w|, free of layer scales",
        {"relative_error": 0.05, "max_probes": 200},
    ),
    "relative_flatness": Entry(
        "llp.landscape.sharpness:relative_flatness",
        "relative flatness of the last linear layer, free of layer scales",
        {"layer": "", "relative_error": 0.05, "max_probes": 200},
    ),
}

ANALYSES: dict[str, Entry] = {
    "spectrum": Entry(
        "llp.analyses.spectrum:spectrum", "both ends of the Hessian's spectrum, trace, density"
    ),
    "sharpness": Entry("llp.analyses.sharpness:sharpness", "rises of the loss near the weights"),
    "lines": Entry("llp.analyses.planes:lines", "loss and accuracy along lines"),
    "surfaces": Entry("llp.analyses.planes:surfaces", "loss and accuracy on planes"),
    "trajectory": Entry(
        "llp.analyses.trajectory:trajectory", "the path of the training in its main plane"
    ),
    "connectivity": Entry(
        "llp.analyses.connectivity:connectivity", "barrier and curve to an independent training"
    ),
    "ranks": Entry(
        "llp.analyses.depth:depth", "ranks of weights and features, dead and dormant units"
    ),
    "smoothness": Entry(
        "llp.analyses.smoothness:smoothness", "loss and gradient some way along the gradient"
    ),
    "confidence": Entry(
        "llp.analyses.confidence:confidence", "calibration error, confidence against accuracy"
    ),
    "jacobian": Entry(
        "llp.analyses.jacobian:jacobian", "rank of the Jacobian of layers by a part of the input"
    ),
}

TABLES: dict[str, dict[str, Entry]] = {
    "datasets": DATASETS,
    "models": MODELS,
    "optimizers": OPTIMIZERS,
    "averagings": AVERAGINGS,
    "schedules": SCHEDULES,
    "augmentations": AUGMENTATIONS,
    "corruptions": CORRUPTIONS,
    "schedulers": SCHEDULERS,
    "searchers": SEARCHERS,
    "proxies": PROXIES,
    "stop_rules": STOP_RULES,
    "search_rules": SEARCH_RULES,
    "metrics": METRICS,
    "presets": PRESETS,
    "callbacks": CALLBACKS,
    "sharpness_measures": SHARPNESS_MEASURES,
    "analyses": ANALYSES,
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
    `learning_rate` and `weight_decay` of optimizers, `model` and `num_steps` of averagings. The
    default is None where there is none.
    """
    entry = find(table, name)
    if entry.options or name in TABLES[table]:
        return dict(entry.options)
    parameters = inspect.signature(load(table, name)).parameters.values()
    return {
        p.name: None if p.default is p.empty else p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in GIVEN
        and not (table == "averagings" and p.name in ("model", "num_steps"))
    }
