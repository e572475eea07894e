"""The commented experiment file that `llp init` writes, filled in for a dataset."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from importlib import resources
from typing import Any

from llp.errors import SpecError, unknown

_SMALL: dict[str, Any] = {
    "validation": 0.15,
    "model": "convnet",
    "width": 16,
    "epochs": 20,
    "augmentation": "[]",
    "low": "1e-2",
    "high": "1.0",
    "batch_sizes": "[16, 32, 64]",
    "ratio": "0.05",
    "num_trials": 48,
    "fractions": "[0.1, 0.3, 1.0]",
    "measured": 6,
    "seeds": 3,
    "gpus": 0,
}
_IMAGES: dict[str, Any] = {
    **_SMALL,
    "validation": 0.1,
    "width": 32,
    "batch_sizes": "[64, 128, 256]",
    "ratio": "0.01",
    "num_trials": 32,
    "fractions": "[0.1, 0.33, 1.0]",
    "seeds": 2,
    "gpus": 0.25,
}
_CIFAR: dict[str, Any] = {
    **_IMAGES,
    "model": "resnet20",
    "width": 16,
    "augmentation": "[flip, crop]",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "digits": {**_SMALL, "dataset": "digits"},
    "synthetic": {**_SMALL, "dataset": "synthetic"},
    "mnist": {**_IMAGES, "dataset": "mnist"},
    "fashion_mnist": {**_IMAGES, "dataset": "fashion_mnist"},
    "cifar10": {**_CIFAR, "dataset": "cifar10"},
    "cifar10_small_cnn": {**_IMAGES, "dataset": "cifar10", "augmentation": "[flip, crop]"},
    "cifar100": {**_CIFAR, "dataset": "cifar100"},
    "cifar100_small_cnn": {**_IMAGES, "dataset": "cifar100", "augmentation": "[flip, crop]"},
}
"""Preset -> what it puts into the template."""


def init_template(name: str, preset: str | None = None) -> str:
    """A commented experiment file called `name` that loads and checks as it is.

    Args:
        name: Of the experiment; characters a name may not hold become `-`.
        preset: A key of `PRESETS`; by default `name` where that is one, else `digits`.

    Raises:
        SpecError: No such preset; the message has the nearest.
    """
    chosen = preset or (name if name in PRESETS else "digits")
    if chosen not in PRESETS:
        raise SpecError(unknown("preset", chosen, PRESETS))
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:64] or "experiment"
    text = resources.files("llp.spec").joinpath("templates/experiment.yaml").read_text("utf-8")
    filled = string.Template(text).substitute(PRESETS[chosen], name=safe, file=f"{safe}.yaml")
    return "\n".join(map(_aligned, filled.splitlines())) + "\n"


def _aligned(line: str) -> str:
    """`line` with its comment in the same column as the others, where the value leaves room."""
    value, hash_, comment = line.partition("  #")
    if not hash_ or not value.strip():
        return line
    return f"{value.rstrip():<36} #{comment}"
