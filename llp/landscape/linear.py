"""A linear layer whose second derivative is made for blocks of vectors.

PyTorch differentiates a linear layer's gradient by matrix products with the saved input and
weight, which require gradients themselves. Under `torch.func.vmap` that makes `matmul` copy the
block into one matrix first (it spares a third differentiation a larger tensor), a quarter of a
block product of a small network. Nobody differentiates a third time here, so the saved tensors are
detached. A network of three layers, blocks of 16: .72 gradients a vector instead of 1.04.

Tried and left: the block's dimension second, beside the columns of the matrix, so that one large
product serves the whole block. As an autograd function with a rule for vmap it costs 60
microseconds a call (1.23 gradients); through functorch's private functions .83.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear(
    func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """`func(input, weight, bias)` twice differentiable; None where it had better run as it is."""
    if weight.ndim != 2 or input.is_complex() or input.dtype != weight.dtype:
        return None
    if not (input.requires_grad or weight.requires_grad):
        return None
    result: Tensor = _Linear.apply(func, input, weight, bias)
    return result


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _backward(slope: Tensor, input: Tensor, weight: Tensor, mask: tuple[bool, ...]) -> Parts:
    rows = _rows(slope)
    return (
        slope @ weight if mask[0] else None,
        rows.T @ _rows(input) if mask[1] else None,
        rows.sum(0) if mask[2] else None,
    )


class _Linear(torch.autograd.Function):
    """A linear layer whose backward pass is `_Backward`."""

    @staticmethod
    def forward(
        ctx: Any, func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        return func(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        mask = tuple(ctx.needs_input_grad[1:])
        if torch.is_grad_enabled():
            return (None, *_Backward.apply(slope, input, weight, mask))
        return (None, *_backward(slope, input.detach(), weight.detach(), mask))


class _Backward(torch.autograd.Function):
    """The gradients of a linear layer as a function of its slope, input and weight."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, slope: Tensor, input: Tensor, weight: Tensor, mask: tuple[bool, ...]
    ) -> Parts:
        ctx.save_for_backward(slope, input, weight)
        ctx.set_materialize_grads(False)
        return _backward(slope, input, weight, mask)

    @staticmethod
    def backward(
        ctx: Any, of_input: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        slope, input, weight = (tensor.detach() for tensor in ctx.saved_tensors)
        needs_slope, needs_input, needs_weight = ctx.needs_input_grad[:3]
        for_slope = for_input = for_weight = None
        if needs_slope:
            terms = []
            if of_weight is not None:
                terms.append(input @ of_weight.T)
            if of_input is not None:
                terms.append(of_input @ weight.T)
            if of_bias is not None:
                terms.append(of_bias.expand(slope.shape))
            for term in terms:
                for_slope = term if for_slope is None else for_slope + term
        if needs_input and of_weight is not None:
            for_input = slope @ of_weight
        if needs_weight and of_input is not None:
            for_weight = _rows(slope).T @ _rows(of_input)
        return for_slope, for_input, for_weight, None
