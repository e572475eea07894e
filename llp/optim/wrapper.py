"""What optimizers around another optimizer share, and how several gradients make one step.

A training loop needs to know two things about an optimizer, and most optimizers say neither:

- `num_gradients` (default 1): gradients that go into a step. Between two of them the loop calls
  `move()`, which takes the weights to where the next one is wanted; after the last it calls
  `step()`, which makes the step from where the weights were. If it gives the step up in between
  (an overflow under loss scaling, an error), `abandon()` puts the weights back.
- `same_batch` (default True): whether these gradients are of the same batch (SAM) or each of a
  batch of its own (Entropy-SGD). With batches of their own the last step of an epoch may get fewer.

Only the first gradient of a step is taken at the weights themselves, so only it may update
batch-norm statistics: `statistics_frozen` for the others.

`step(closure)` does the same for loops that work as torch's documentation shows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim import Optimizer


class Wrapper(Optimizer):
    """An optimizer that changes the gradients and leaves the step itself to `base`.

    Parameter groups and state are those of `base` (the same objects), so that learning-rate
    schedules act on both. The state dictionary is that of `base` with the wrapper's own state under
    `wrapper`.

    Args:
        base: Makes the step.
        defaults: Options of the wrapper that a parameter group may override.
    """

    num_gradients: int = 1
    same_batch: bool = True

    def __init__(self, base: Optimizer, defaults: dict[str, Any] | None = None) -> None:
        self.base = base
        super().__init__(base.param_groups, {**base.defaults, **(defaults or {})})
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def move(self) -> None:
        """Goes to where the next gradient of this step is wanted; uses those in place now."""
        raise NotImplementedError(f"{type(self).__name__} takes one gradient a step")

    def abandon(self) -> None:
        """Puts the weights back without a step; nothing happens when none was begun."""

    def _finish(self) -> None:
        """The step itself, from the gradients in place now."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes the step; with a closure, takes all gradients of the step with it first.

        Args:
            closure: Computes the loss with new gradients in place, and returns it. Batch-norm
                statistics are the caller's business then; see `statistics_frozen`.

        Returns:
            The closure's first loss, which is the one at the weights; None without a closure.
        """
        if closure is None:
            self._finish()
            return None
        first = None
        try:
            for index in range(self.num_gradients):
                if index:
                    self.move()
                with torch.enable_grad():
                    loss = closure()
                first = loss if index == 0 else first
            self._finish()
        finally:
            self.abandon()
        return first

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer`; the group is added to `base` too."""
        if self.__dict__.get("param_groups") is self.base.param_groups:
            for name, default in self.defaults.items():
                param_group.setdefault(name, default)
            self.base.add_param_group(param_group)
        else:  # called by the constructor
            super().add_param_group(param_group)

    def own_state(self) -> dict[str, Any]:
        """What the wrapper itself carries from step to step: tensors, numbers and containers."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Puts back what `own_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """The state of `base`, and the wrapper's own under `wrapper`."""
        return {**self.base.state_dict(), "wrapper": self.own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned.

        Raises:
            ValueError: It is of other parameters, or of another kind of optimizer.
        """
        if "wrapper" not in state_dict:
            raise ValueError(f"the state is not of a {type(self).__name__}: it has no 'wrapper'")
        inner = {key: value for key, value in state_dict.items() if key != "wrapper"}
        self.base.load_state_dict(inner)
        self._share()
        self.load_own_state(state_dict["wrapper"])

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`."""
        return attributes(self)

    def parameters_with_gradient(self) -> list[Tensor]:
        """Those that take part in this step, in the order of the groups."""
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


def attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What `copy` and `pickle` need of an optimizer that has more than groups and state.

    Hooks, and what schedules make of `step`, are left out, as torch does.
    """
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name != "step" and not name.startswith("_optimizer_")
    }


def gradients_per_step(optimizer: Optimizer) -> tuple[int, bool]:
    """`num_gradients` and `same_batch` of any optimizer; (1, True) of one that does not say."""
    count = int(getattr(optimizer, "num_gradients", 1))
    return count, count == 1 or bool(getattr(optimizer, "same_batch", True))


class Copies:
    """Copies of tensors, in memory that is kept for the next time.

    Asking for the memory of 65 tensors takes longer on the host than all else in a move of SAM.
    """

    def __init__(self) -> None:
        self._of: list[Tensor] = []
        self._copies: list[Tensor] = []

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of `tensors`, good until the next call."""
        same = len(tensors) == len(self._of)
        if not same or any(a is not b for a, b in zip(tensors, self._of, strict=True)):
            self._of, self._copies = tensors, [torch.empty_like(tensor) for tensor in tensors]
        put_back(self._copies, tensors)
        return self._copies


def put_back(tensors: list[Tensor], copies: list[Tensor]) -> None:
    """Writes `copies` into `tensors`, bit by bit."""
    if tensors:
        torch._foreach_copy_(tensors, copies)


def as_matrix(tensor: Tensor) -> Tensor:
    """`tensor` as `[rows, columns]`: the first dimension, and all others in the order of memory.

    A view wherever the tensor is dense, `channels_last` convolutions included. A vector is one
    column, and so is a matrix of a single row.

    >>> as_matrix(torch.zeros(4, 3, 2, 2)).shape, as_matrix(torch.zeros(5)).shape
    (torch.Size([4, 12]), torch.Size([5, 1]))
    """
    shape, strides = tensor.shape, tensor.stride()
    if len(shape) < 2 or shape[0] == 1:
        return tensor.reshape(-1, 1)
    columns = _dense_columns(shape, strides)
    if columns:  # one call in place of two or three
        return tensor.as_strided((shape[0], columns), (columns, 1))
    return tensor.permute(_by_memory(strides)).reshape(shape[0], -1)


def like_matrix(matrix: Tensor, tensor: Tensor) -> Tensor:
    """`matrix`, in the arrangement of `as_matrix(tensor)`, in the shape of `tensor`."""
    shape = tensor.shape
    if len(shape) < 2 or shape[0] == 1 or tensor.is_contiguous():
        return matrix.reshape(shape)
    order = _by_memory(tensor.stride())
    return matrix.reshape([shape[k] for k in order]).permute(_inverse(order))


@functools.cache
def _dense_columns(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Columns of the matrix that the memory of a tensor is, row by row; 0 if it is none."""
    expected = 1
    for k in reversed(_by_memory(strides)):
        if shape[k] > 1 and strides[k] != expected:
            return 0
        expected *= shape[k]
    return expected // shape[0]


@functools.cache
def _by_memory(strides: tuple[int, ...]) -> tuple[int, ...]:
    """0, and the other dimensions, slowest in memory first; ties keep their order."""
    return (0, *sorted(range(1, len(strides)), key=lambda k: -strides[k]))


@functools.cache
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """The modules of `model` that `statistics_frozen` holds still."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    ]


@torch.no_grad()
def estimate_statistics(
    model: nn.Module, batches: Iterable[Any], device: torch.device | None = None
) -> int:
    """Batch-norm statistics of `model` anew: the plain mean over `batches`, in training mode.

    The numbers, to the bit, and the training mode afterwards are those of
    `torch.optim.swa_utils.update_bn`. That one lets every layer ask the GPU for the number of
    batches in every batch: an epoch of it on CIFAR-10 took 38 to 115 s on an H200 shared by ten
    trainings, beside 13 s for an epoch of training.

    Args:
        model: Its statistics are written; without batch norm nothing is read.
        batches: Inputs, or tuples of which the first is the inputs.
        device: Where the inputs go; default: they stay where they are.

    Returns:
        Examples that went through the network.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    if not layers:
        return 0
    momenta, was_training = [layer.momentum for layer in layers], model.training
    for layer in layers:
        layer.reset_running_stats()
    model.train()
    num_examples = 0
    try:
        for number, batch in enumerate(batches, start=1):
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            for layer in layers:
                layer.momentum = 1.0 / number
            model(inputs if device is None else inputs.to(device))
            num_examples += len(inputs)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.train(was_training)
    return num_examples


@contextlib.contextmanager
def statistics_frozen(modules: Iterable[BatchNorm]) -> Iterator[None]:
    """Batch norm normalises by the batch as in training, without updating running statistics.

    Args:
        modules: See `batch_norms`.
    """
    # Past `Module.__setattr__`, which is 20 times as slow and would be called twice for each.
    switches = [vars(module) for module in modules]
    for switch in switches:
        switch["track_running_stats"] = False
    try:
        yield
    finally:
        for switch in switches:
            switch["track_running_stats"] = True


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all `tensors` together, on the device of the first."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    norms = torch._foreach_norm(tensors)
    if len(kinds) > 1 or tensors[0].dtype in (torch.float16, torch.bfloat16):
        norms = tuple(norm.to(tensors[0].device, torch.float32) for norm in norms)
    found: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return found
