"""Units that have stopped working: dead, saturated, dormant; and sizes of weights and gradients.

An *activation site* is one call of an activation in a forward pass, of a module (`nn.ReLU`) or a
function (`functional.relu`, `torch.tanh`, `tensor.sigmoid()`); a module called twice has two.
Its units are the entries of its output along dimension 1 (a convolution's channels), or along the
last one for `[examples, tokens, units]`. Over all examples and positions a unit is

- *dead*: a ReLU or ReLU6 that is never above 0. Activations that leak have no dead units.
- *saturated*: always within `margin` of a bounded activation's limit (sigmoid 0 and 1, tanh,
  softsign and hardtanh +-1, ELU and SELU their lower limit, ReLU6 its upper one).
- *dormant*: its mean size is at most `threshold` times the mean over the site's units (Sokar et al.
  2023, definition 3.1). This one also speaks for LeakyReLU, GELU and SiLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llp.landscape.evaluation import Array
from llp.landscape.parameters import evaluation_state, exact_arithmetic, trainable, unflatten
from llp.landscape.passes import Batches, LossFunction, gradient, iterate
from llp.landscape.plain import Plain

_SELU_LIMIT = -1.0507009873554805 * 1.6732632423543772

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "relu": (functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    "relu6": (functional.relu6,),
    "leaky_relu": (functional.leaky_relu, functional.leaky_relu_),
    "elu": (functional.elu, functional.elu_),
    "selu": (functional.selu, functional.selu_, torch.selu, torch.selu_),
    "gelu": (functional.gelu,),
    "silu": (functional.silu,),
    "mish": (functional.mish,),
    "softplus": (functional.softplus,),
    "sigmoid": (
        torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, functional.sigmoid,
        torch.special.expit,
    ),
    "tanh": (torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, functional.tanh),
    "softsign": (functional.softsign,),
    "hardtanh": (functional.hardtanh, functional.hardtanh_),
}  # fmt: skip
_KINDS = {function: kind for kind, functions in _FUNCTIONS.items() for function in functions}


@dataclass(frozen=True)
class UnitActivity(Plain):
    """What the units of one activation site do on the data.

    Attributes:
        name: Module in which the activation is called, with `#2` for its second call.
        activation: `relu`, `tanh`, ...
        num_units: Units.
        num_dead: Units that are never above 0 (ReLU and ReLU6 only).
        num_saturated: Units that are always at a limit.
        num_dormant: Units whose score is at most the threshold.
        dormant_ratio: `num_dormant / num_units`.
        mean_size: Mean absolute output of each unit `[units]`.
        active_share: Share of the examples and positions where each unit is above 0 `[units]`.
        score: `mean_size` over its mean over the units `[units]`; 0 when all are 0.
    """

    name: str
    activation: str
    num_units: int
    num_dead: int
    num_saturated: int
    num_dormant: int
    dormant_ratio: float
    mean_size: Array
    active_share: Array
    score: Array


@dataclass(frozen=True)
class LayerSize(Plain):
    """How large one parameter and its gradient are.

    Attributes:
        name: Of the parameter.
        mean_absolute_weight: Mean of `|w|`.
        weight_norm: Euclidean norm.
        gradient_norm: Euclidean norm of the gradient of the mean loss over the data.
        num_weights: Entries.
    """

    name: str
    mean_absolute_weight: float
    weight_norm: float
    gradient_norm: float
    num_weights: int


def unit_activity(
    model: nn.Module, batches: Batches, *, threshold: float = 0.1, margin: float = 0.01
) -> tuple[UnitActivity, ...]:
    """Dead, saturated and dormant units at every activation site, in the order of the calls.

    Args:
        model: Left bit-identical; runs in eval mode.
        batches: Re-iterable of `(inputs, targets)`.
        threshold: Dormant at or below this score, from 0 to below 1.
        margin: Saturated within this of a limit, > 0.

    Raises:
        ValueError: No activation was called, or an argument is out of its range.
    """
    if not 0 <= threshold < 1 or not margin > 0:
        raise ValueError("threshold must be in [0, 1) and margin above 0")
    sites: dict[str, _Site] = {}
    device = trainable(model)[0].device
    with (
        evaluation_state(model),
        exact_arithmetic(device),
        torch.no_grad(),
        _paths(model) as path,
    ):
        for inputs, _, _ in iterate(batches, device):
            with _Listener(path, sites, margin):
                model(inputs)
    if not sites:
        raise ValueError(f"{type(model).__name__} called no activation that is known here")
    return tuple(site.result(name, threshold) for name, site in sites.items())


def layer_sizes(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> tuple[LayerSize, ...]:
    """Mean |w|, norm and gradient norm of every trainable parameter."""
    parameters = trainable(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with evaluation_state(model), exact_arithmetic(parameters[0].device):
        total = gradient(model, loss_fn, batches).total
    return tuple(
        LayerSize(
            name=name,
            mean_absolute_weight=float(parameter.detach().double().abs().mean()),
            weight_norm=float(parameter.detach().double().norm()),
            gradient_norm=float(slope.double().norm()),
            num_weights=parameter.numel(),
        )
        for name, parameter, slope in zip(
            names, parameters, unflatten(total, parameters), strict=True
        )
    )


@dataclass
class _Site:
    """Running sums of one site; the tensors stay on the device."""

    activation: str
    count: int = 0
    sizes: Tensor = field(default_factory=lambda: torch.zeros(()))
    active: Tensor = field(default_factory=lambda: torch.zeros(()))
    limited: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, output: Tensor, limits: tuple[float | None, float | None], margin: float) -> None:
        units = _units_last(output)
        sums = units.double().abs().sum(0), (units > 0).sum(0), _at_limit(units, limits, margin)
        if not self.count:
            self.sizes, self.active, self.limited = sums
        else:
            self.sizes, self.active = self.sizes + sums[0], self.active + sums[1]
            self.limited = self.limited & sums[2]
        self.count += len(units)

    def result(self, name: str, threshold: float) -> UnitActivity:
        mean_size: Array = (self.sizes / self.count).cpu().numpy()
        average = float(mean_size.mean())
        score = mean_size / average if average > 0 else np.zeros_like(mean_size)
        dormant = int((score <= threshold).sum())
        cut = self.activation in ("relu", "relu6")
        return UnitActivity(
            name=name,
            activation=self.activation,
            num_units=len(mean_size),
            num_dead=int((self.active == 0).sum()) if cut else 0,
            num_saturated=int(self.limited.sum()),
            num_dormant=dormant,
            dormant_ratio=dormant / len(mean_size),
            mean_size=mean_size,
            active_share=(self.active.double() / self.count).cpu().numpy(),
            score=score,
        )


class _Listener(TorchFunctionMode):
    """Sees every activation that is called, whether by a module or by the model's own code."""

    def __init__(self, path: Callable[[], str], sites: dict[str, _Site], margin: float) -> None:
        super().__init__()
        self._path = path
        self._sites = sites
        self._margin = margin
        self._calls: dict[str, int] = {}
        self._inside = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        kind = _KINDS.get(func)
        if kind is None or self._inside:
            return func(*args, **options)
        self._inside = True  # functional.relu calls torch.relu
        try:
            output = func(*args, **options)
        finally:
            self._inside = False
        if isinstance(output, Tensor) and output.ndim >= 2:
            where = self._path()
            self._calls[where] = number = self._calls.get(where, 0) + 1
            name = where if number == 1 else f"{where}#{number}"
            site = self._sites.setdefault(name, _Site(kind))
            site.add(output, _limits(kind, func, args, options), self._margin)
        return output


@contextmanager
def _paths(model: nn.Module) -> Iterator[Callable[[], str]]:
    """A function that says which module is running."""
    stack = [""]
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda _m, _i, name=name: stack.append(name))
        )
        handles.append(
            module.register_forward_hook(
                lambda _m, _i, _o: (stack.pop(), None)[1], always_call=True
            )
        )
    try:
        yield lambda: stack[-1]
    finally:
        for handle in handles:
            handle.remove()


def _units_last(output: Tensor) -> Tensor:
    """`[examples and positions, units]`."""
    if output.ndim == 2:
        return output
    if output.ndim == 3:
        return output.reshape(-1, output.shape[-1])
    return output.movedim(1, -1).reshape(-1, output.shape[1])


def _limits(
    kind: str, func: Any, args: Any, options: dict[str, Any]
) -> tuple[float | None, float | None]:
    """Lower and upper limit of an activation's output; the zero of a ReLU counts as death."""
    if kind == "elu":
        return -float(options.get("alpha", args[1] if len(args) > 1 else 1.0)), None
    if kind == "hardtanh":
        low = options.get("min_val", args[1] if len(args) > 1 else -1.0)
        high = options.get("max_val", args[2] if len(args) > 2 else 1.0)
        return float(low), float(high)
    table: dict[str, tuple[float | None, float | None]] = {
        "sigmoid": (0.0, 1.0),
        "tanh": (-1.0, 1.0),
        "softsign": (-1.0, 1.0),
        "selu": (_SELU_LIMIT, None),
        "relu6": (None, 6.0),
    }
    return table.get(kind, (None, None))


def _at_limit(units: Tensor, limits: tuple[float | None, float | None], margin: float) -> Tensor:
    """Units that are within `margin` of a limit everywhere."""
    low, high = (math.nan if limit is None else limit for limit in limits)
    return (((units - low).abs() <= margin) | ((units - high).abs() <= margin)).all(0)
