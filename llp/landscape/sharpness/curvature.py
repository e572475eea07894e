"""Sharpness from second derivatives that does not depend on how layers are scaled.

*Adaptive trace*: `sum_i |theta_i| H_ii |theta_i|`, the trace of the Hessian in coordinates relative
to the weights; the mean rise under multiplicative noise is `sigma^2 / 2` times it.
*Relative flatness* (Petzka et al. 2021, definition 3): for the weights W `[outputs, inputs]` of one
layer `sum_{s,s'} <w_s, w_s'> tr H_{s,s'}`, with `w_s` the weights of output s and `H_{s,s'}` the
block of second derivatives between those of s and s'.

Both are traces of `B' H B` for a linear B (`diag |theta|`; `M -> L M` with `L L' = W W'`), so
Hutchinson's estimator gives value and error.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llp.landscape.hessian import hessian
from llp.landscape.parameters import flatten, trainable
from llp.landscape.passes import Batches, Estimate, LossFunction
from llp.landscape.traces import trace


def adaptive_trace(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    relative_error: float = 0.05,
    num_probes: int | None = None,
    max_probes: int = 200,
    generator: torch.Generator | None = None,
) -> Estimate:
    """`sum_i |theta_i| H_ii |theta_i|`, unchanged by rescaling layers of a ReLU network.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        relative_error: Half-width of the confidence interval over the value at which to stop.
        num_probes: Use exactly this many probes instead.
        max_probes: Stop here at the latest.
        generator: CPU generator of the probes; default: seed 0.
    """
    started = time.perf_counter()
    op = hessian(model, loss_fn, batches)
    scaled = _Scaled(op, flatten(trainable(model)).abs())
    found = trace(
        scaled,
        relative_error,
        num_probes=num_probes,
        max_probes=max_probes,
        generator=generator,
    )
    return replace(found, num_gradients=op.num_gradients, seconds=time.perf_counter() - started)


def relative_flatness(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    layer: str | None = None,
    relative_error: float = 0.05,
    num_probes: int | None = None,
    max_probes: int = 200,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The relative flatness of one linear layer; smaller is flatter.

    Exact, with a standard error of 0, when that takes no more products than `max_probes`.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        layer: Name of a linear layer; default: the last one, whose inputs are the features.
        relative_error: Half-width of the confidence interval over the value at which to stop.
        num_probes: Use exactly this many probes instead.
        max_probes: Stop here at the latest.
        generator: CPU generator of the probes; default: seed 0.

    Raises:
        ValueError: There is no such linear layer, or its weight is frozen.
    """
    started = time.perf_counter()
    name, weight = _weight(model, layer)
    op = hessian(model, loss_fn, batches, parameters=[name])
    relative = _Relative(op, _factor(weight.detach()), weight.shape[1])
    if num_probes is None and relative.shape[0] <= max_probes:
        basis = torch.eye(relative.shape[0], dtype=op.dtype, device=op.device)
        found = Estimate(
            value=float((relative @ basis).diagonal().double().sum()),
            standard_error=0.0,
            num_examples=op.num_examples,
            num_products=op.num_products,
        )
    else:
        found = trace(
            relative,
            relative_error,
            num_probes=num_probes,
            max_probes=max_probes,
            generator=generator,
        )
    return replace(found, num_gradients=op.num_gradients, seconds=time.perf_counter() - started)


class _Scaled:
    """`D H D` for a diagonal D `[P]`."""

    def __init__(self, op: Any, scales: Tensor) -> None:
        self._op = op
        self._scales = scales
        self.shape = op.shape
        self.dtype = op.dtype
        self.device = op.device
        self.session = op.session

    @property
    def num_examples(self) -> int:
        return int(self._op.num_examples)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        scales = self._scales if vectors.ndim == 1 else self._scales[:, None]
        product: Tensor = (self._op @ (vectors * scales)) * scales
        return product


class _Relative:
    """`B' H B` with `B: M -> L M`, on flat M `[rank * inputs]`."""

    def __init__(self, op: Any, factor: Tensor, num_inputs: int) -> None:
        self._op = op
        self._factor = factor
        self._num_inputs = num_inputs
        size = factor.shape[1] * num_inputs
        self.shape = (size, size)
        self.dtype = op.dtype
        self.device = op.device
        self.session = op.session

    @property
    def num_examples(self) -> int:
        return int(self._op.num_examples)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        block = vectors if vectors.ndim == 2 else vectors[:, None]
        count = block.shape[1]
        inner = block.to(self._factor).reshape(self._factor.shape[1], self._num_inputs * count)
        lifted = (self._factor @ inner).reshape(-1, count)
        product = (self._op @ lifted).reshape(self._factor.shape[0], self._num_inputs * count)
        back: Tensor = (self._factor.T @ product).reshape(-1, count)
        return back if vectors.ndim == 2 else back[:, 0]


def _factor(weight: Tensor) -> Tensor:
    """`L` `[outputs, rank]` with `L L' = W W'`: W itself or its thin left singular factor."""
    if weight.shape[1] <= weight.shape[0]:
        return weight.clone()
    left, values, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    factor: Tensor = (left * values).to(weight)
    return factor


def _weight(model: nn.Module, layer: str | None) -> tuple[str, Tensor]:
    """The full name of the layer's weight, and the weight."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linear or (layer is not None and layer not in linear):
        raise ValueError(f"no linear layer is called {layer!r}; there are {sorted(linear)}")
    name = list(linear)[-1] if layer is None else layer
    return f"{name}.weight" if name else "weight", linear[name].weight
