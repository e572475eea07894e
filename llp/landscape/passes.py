"""Passes over the data: losses and gradients, batch by batch, weighted by batch size.

`batches` is any re-iterable of `(inputs, targets)` and `loss_fn(outputs, targets)` a mean over the
batch, so the loss of the data set is the size-weighted mean of the batch losses, also when the last
batch is smaller. Gradients are summed in groups of batches, which gives a standard error without
keeping one gradient per batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llp.landscape.parameters import flatten, trainable

Batches = Iterable[tuple[Any, Any]]
LossFunction = Callable[[Any, Any], Tensor]

NUM_GROUPS = 8
"""At most this many partial gradients are kept: memory 8 P, at least 7 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A number about the landscape with its uncertainty and its cost.

    Attributes:
        value: The estimate.
        standard_error: Of the estimate; what it is taken over is said by the function. NaN when
            there is only one sample of it.
        num_examples: Examples it was computed on.
        num_products: Hessian-vector products spent.
        num_gradients: Gradients of the whole data spent.
        num_forwards: Losses of the whole data spent.
        seconds: Wall-clock time.
    """

    value: float
    standard_error: float
    num_examples: int
    num_products: int = 0
    num_gradients: int = 0
    num_forwards: int = 0
    seconds: float = 0.0

    @property
    def gradient_equivalents(self) -> float:
        """Cost in gradients: a forward pass is a third of one, a Hessian product two."""
        return self.num_gradients + self.num_forwards / 3 + 2 * self.num_products


@dataclass(frozen=True)
class BatchLosses:
    """Mean loss `[B]` (float64) of each batch, and the batch sizes."""

    values: Tensor
    sizes: tuple[int, ...]

    @property
    def num_examples(self) -> int:
        """Examples in all batches."""
        return sum(self.sizes)

    @property
    def weights(self) -> Tensor:
        """Share of the examples in each batch `[B]`, float64."""
        return torch.tensor(self.sizes, dtype=torch.float64) / self.num_examples

    @property
    def mean(self) -> float:
        """The loss of the data set."""
        return float(self.weights @ self.values)


def weighted_standard_error(values: Tensor, weights: Tensor) -> float:
    """Standard error of `sum w x` for independent `x` `[B]` and weights `[B]` that sum to one.

    `sqrt(B / (B - 1) * sum w^2 (x - mean)^2)`, which is `s / sqrt(B)` for equal weights; NaN for
    B = 1.
    """
    count = len(values)
    if count < 2:
        return math.nan
    deviations = values - weights @ values
    return math.sqrt(count / (count - 1) * float((weights**2 * deviations**2).sum()))


def iterate(batches: Batches, device: torch.device) -> Iterator[tuple[Any, Any, int]]:
    """`(inputs, targets, number of examples)` on `device`.

    Raises:
        TypeError: `batches` is an iterator, which could be read only once, or a bare `(X, Y)`.
        ValueError: `batches` is empty.
    """
    iterator = iter(batches)
    if iterator is batches:
        raise TypeError(
            "batches can be read only once; give a list of (inputs, targets) or a DataLoader"
        )
    one = batches[0] if isinstance(batches, list | tuple) and batches else batches
    if isinstance(one, Tensor):
        raise TypeError("batches are pairs of (inputs, targets); for a single one give [(X, Y)]")
    count = 0
    for inputs, targets in iterator:
        count += 1
        size = num_examples(targets)
        if size == 0:
            raise ValueError(f"batch {count} is empty")
        yield _to(inputs, device), _to(targets, device), size
    if count == 0:
        raise ValueError("batches is empty")


def num_examples(targets: Any) -> int:
    """Length of the first tensor found in `targets`; 1 for a scalar."""
    if isinstance(targets, Tensor):
        return int(targets.shape[0]) if targets.ndim else 1
    if isinstance(targets, dict):
        return num_examples(next(iter(targets.values())))
    if isinstance(targets, list | tuple):
        return num_examples(targets[0])
    raise TypeError(f"targets must hold tensors, not {type(targets).__name__}")


def mean_loss(model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any) -> Tensor:
    """The scalar loss of one batch.

    Raises:
        ValueError: `loss_fn` returned something else than a scalar.
    """
    return scalar(loss_fn(model(inputs), targets))


def scalar(loss: Tensor) -> Tensor:
    """`loss` itself.

    Raises:
        ValueError: It is no scalar.
    """
    if loss.ndim:
        raise ValueError(f"loss_fn must return a scalar mean, not shape {tuple(loss.shape)}")
    return loss


@torch.no_grad()
def batch_losses(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> BatchLosses:
    """The loss of every batch. The caller has put the model in its evaluation state."""
    device = trainable(model)[0].device
    values: list[Tensor] = []
    sizes: list[int] = []
    for inputs, targets, size in iterate(batches, device):
        values.append(mean_loss(model, loss_fn, inputs, targets).double())
        sizes.append(size)
    return BatchLosses(torch.stack(values).cpu(), tuple(sizes))


@dataclass(frozen=True)
class Gradient:
    """The gradient of the loss of the data set, and of groups of batches.

    Attributes:
        total: Gradient `[P]`.
        groups: Mean gradients of the groups `[G, P]`.
        group_weights: Share of the examples in each group `[G]`, float64.
        losses: Batch losses from the same passes.
    """

    total: Tensor
    groups: Tensor
    group_weights: Tensor
    losses: BatchLosses


def gradient(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> Gradient:
    """The gradient over all batches. The caller has put the model in its evaluation state.

    Batch i goes to group i mod 8, so groups are of equal size up to one batch.
    """
    parameters = trainable(model)
    sums: list[Tensor] = []
    group_sizes: list[int] = []
    values: list[Tensor] = []
    sizes: list[int] = []
    with torch.enable_grad():
        for inputs, targets, size in iterate(batches, parameters[0].device):
            loss = mean_loss(model, loss_fn, inputs, targets)
            part = flatten(
                torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            ).mul_(size)
            if len(sums) < NUM_GROUPS:
                sums.append(part)
                group_sizes.append(size)
            else:
                group = len(sizes) % NUM_GROUPS
                sums[group] += part
                group_sizes[group] += size
            values.append(loss.detach().double())
            sizes.append(size)
    losses = BatchLosses(torch.stack(values).cpu(), tuple(sizes))
    stacked = torch.stack(sums)
    total = stacked.sum(0) / losses.num_examples
    counts = torch.tensor(group_sizes, dtype=torch.float64)
    groups = stacked.div_(counts.to(stacked)[:, None])
    return Gradient(total, groups, counts / losses.num_examples, losses)


def value_and_gradient(
    model: nn.Module, loss_fn: LossFunction, batches: Batches
) -> tuple[BatchLosses, Tensor]:
    """Batch losses and the gradient `[P]` over all batches, in the memory of two gradients.

    The caller has put the model in its evaluation state.
    """
    parameters = trainable(model)
    total: Tensor | None = None
    values: list[Tensor] = []
    sizes: list[int] = []
    with torch.enable_grad():
        for inputs, targets, size in iterate(batches, parameters[0].device):
            loss = mean_loss(model, loss_fn, inputs, targets)
            part = flatten(
                torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            ).mul_(size)
            total = part if total is None else total.add_(part)
            values.append(loss.detach().double())
            sizes.append(size)
    assert total is not None
    losses = BatchLosses(torch.stack(values).cpu(), tuple(sizes))
    return losses, total.div_(losses.num_examples)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(item, device) for item in value)
    return value
