"""Optimizers by name: one row of `registry.OPTIMIZERS`, one function of one signature.

Every row is `row(parameters, *, learning_rate, weight_decay, **options) -> Optimizer`. The words
are those of the experiment file; here they become torch's `lr`, `betas` and `eps`. To add an
optimizer, write such a function in a file of this room and a row in the table (or a
`llp.optimizers` entry point); `tests/test_optim_rows.py` then runs it through the same life cycle
as all others. One that takes several gradients a step, or wraps another, is a `wrapper.Wrapper`.

Weight decay acts on every parameter, biases and normalisation layers included, which is torch's
default. Pass parameter groups with their own `weight_decay` to change that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from llp import registry
from llp.errors import SpecError, unknown
from llp.optim.wrapper import gradients_per_step

Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]
"""Tensors, or parameter groups as torch takes them (`{"params": [...], "lr": ...}`)."""


def build(
    name: str, parameters: Parameters, *, learning_rate: float, weight_decay: float, **options: Any
) -> Optimizer:
    """The optimizer called `name` over `parameters`.

    Args:
        name: A row of `registry.OPTIMIZERS`, an entry point, or `my_package:my_optimizer`.
        parameters: Tensors or parameter groups; those that need no gradient are left alone.
        learning_rate: Peak learning rate, above 0.
        weight_decay: At least 0; L2 for `sgd` and `adam`, decoupled for `adamw`.
        options: Of this optimizer only; see `registry.options("optimizers", name)`.

    Raises:
        SpecError: Unknown name or option, or a value out of range.
    """
    known = registry.options("optimizers", name)
    for option in options:
        if option not in known:
            raise SpecError(f"optimizer '{name}': {unknown('option', option, known)}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise SpecError(
            f"optimizer '{name}': learning_rate must be finite and above 0, not {learning_rate!r}"
        )
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise SpecError(
            f"optimizer '{name}': weight_decay must be finite and at least 0, not {weight_decay!r}"
        )
    groups = _listed(parameters)
    if not groups:
        raise SpecError(f"optimizer '{name}': the model has no parameters to train")
    row = registry.load("optimizers", name)
    try:
        optimizer = row(groups, learning_rate=learning_rate, weight_decay=weight_decay, **options)
    except (ValueError, TypeError) as error:
        raise SpecError(f"optimizer '{name}' with {options or 'its defaults'}: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise SpecError(f"optimizer '{name}' made a {type(optimizer).__name__}, not an Optimizer")
    return optimizer


def around(
    base: str,
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    **options: Any,
) -> Optimizer:
    """The optimizer `base`, for one that wraps it.

    Args:
        base: A row that takes one gradient a step.
        parameters: See `build`.
        learning_rate: Of `base`.
        weight_decay: Of `base`.
        options: Of `base`; None stands for its default.

    Raises:
        SpecError: `base` is unknown, takes several gradients, or does not take an option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    optimizer = build(
        base, parameters, learning_rate=learning_rate, weight_decay=weight_decay, **given
    )
    if gradients_per_step(optimizer)[0] != 1:
        raise SpecError(
            f"base '{base}' takes several gradients a step itself; choose one that takes one, "
            "such as sgd or adamw"
        )
    return optimizer


def sgd(
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent: `v = momentum*v + g + weight_decay*w; w -= learning_rate*v`.

    Args:
        parameters: See `build`.
        learning_rate: Above 0.
        weight_decay: L2 penalty, at least 0.
        momentum: In [0, 1).
        nesterov: Nesterov momentum (Sutskever et al., 2013, section 2); needs `momentum` > 0.

    Raises:
        ValueError: A value out of range.
    """
    _between(momentum=momentum)
    groups = _listed(parameters)
    return SGD(
        groups,
        lr=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        fused=_fused(groups),
    )


def adam(
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> Optimizer:
    """Adam with bias correction (Kingma & Ba, 2015, algorithm 1); weight decay is added to `g`.

    Args:
        parameters: See `build`.
        learning_rate: Above 0.
        weight_decay: L2 penalty, at least 0.
        beta1: Decay of the mean of the gradients, in [0, 1).
        beta2: Decay of the mean of their squares, in [0, 1).
        epsilon: Added to the denominator, above 0.

    Raises:
        ValueError: A value out of range.
    """
    _between(beta1=beta1, beta2=beta2)
    groups = _listed(parameters)
    return Adam(
        groups,
        lr=learning_rate,
        weight_decay=weight_decay,
        betas=(beta1, beta2),
        eps=_positive(epsilon),
        fused=_fused(groups),
    )


def adamw(
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> Optimizer:
    """Adam with decoupled weight decay, `w -= learning_rate * weight_decay * w`.

    Source: Loshchilov & Hutter, 2019, algorithm 2. Arguments as `adam`.

    Raises:
        ValueError: A value out of range.
    """
    _between(beta1=beta1, beta2=beta2)
    groups = _listed(parameters)
    return AdamW(
        groups,
        lr=learning_rate,
        weight_decay=weight_decay,
        betas=(beta1, beta2),
        eps=_positive(epsilon),
        fused=_fused(groups),
    )


def _between(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), not {value!r}")


def _positive(epsilon: float) -> float:
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be finite and above 0, not {epsilon!r}")
    return epsilon


def _listed(parameters: Parameters) -> list[Any]:
    # Generators can be read once only, and `_fused` has to look too.
    def inside(group: dict[str, Any]) -> dict[str, Any]:
        tensors = group["params"]
        return {**group, "params": [tensors] if isinstance(tensors, Tensor) else [*tensors]}

    return [inside(item) if isinstance(item, dict) else item for item in parameters]


def _fused(groups: list[Any]) -> bool:
    # One kernel for all tensors: on one CPU core a step of a small MLP took 48 us fused against
    # 120 us in a loop (SGD), 107 against 341 us (AdamW). CPU and CUDA have it, other devices vary.
    tensors: list[Tensor] = []
    for item in groups:
        tensors += item["params"] if isinstance(item, dict) else [item]
    return all(
        t.device.type in {"cpu", "cuda"} and torch.is_floating_point(t) and not t.is_sparse
        for t in tensors
    )


__all__ = ["Parameters", "adam", "adamw", "around", "build", "sgd"]
