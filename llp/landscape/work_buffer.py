"""The parameters of a model on one buffer that is filled anew for every point.

A point `base + sum c d` then costs two or three vector operations however many parameters there
are, and the parameters' own storage is never written. Every parameter begins at an aligned place
with the strides it had, so that kernels take the path they would have taken; or, where that is
asked for, with its channels last, which is faster for convolutions on most machines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llp.landscape.parameters import trainable, unflatten

_ALIGNMENT = 512
"""Bytes. What CUDA's allocator gives; kernels may choose another path for less."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class WorkBuffer:
    """One buffer for all parameters, each aligned and strided as the original is.

    Args:
        parameters: What the buffer has to hold.
        channels_last: Give parameters of four or five dimensions that memory format.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, channels_last: bool = False) -> None:
        self._like = list(parameters)
        self._channels_last = channels_last
        unit = _ALIGNMENT // parameters[0].element_size()
        self._starts: list[int] = []
        end = 0
        for parameter in parameters:
            self._starts.append(end)
            end += -(-parameter.numel() // unit) * unit
        self._size = end

    def empty(self) -> Tensor:
        """A new buffer of zeros."""
        return torch.zeros(self._size, dtype=self._like[0].dtype, device=self._like[0].device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """`buffer` as tensors shaped like the parameters."""
        return [
            buffer.as_strided(parameter.shape, self._strides(parameter), start)
            for start, parameter in zip(self._starts, self._like, strict=True)
        ]

    def filled(self, tensors: Sequence[Tensor]) -> Tensor:
        """A new buffer that holds `tensors`."""
        buffer = self.empty()
        for view, tensor in zip(self.views(buffer), tensors, strict=True):
            view.copy_(tensor.detach())
        return buffer

    def _strides(self, parameter: Tensor) -> tuple[int, ...]:
        if self._channels_last and parameter.ndim in _CHANNELS_LAST:
            shaped = torch.empty(
                parameter.shape, device="meta", memory_format=_CHANNELS_LAST[parameter.ndim]
            )
            return shaped.stride()
        if _dense(parameter):
            return parameter.stride()
        return torch.empty(parameter.shape, device="meta").stride()


class Mover:
    """Puts the parameters of a model wherever they should be along some directions.

    Attributes:
        layout: How the buffer is divided.
        work: The buffer on which the parameters are.
    """

    def __init__(self, layout: WorkBuffer, base: Tensor, rows: Sequence[Tensor]) -> None:
        self.layout = layout
        self.work = base.clone()
        self._base = base
        self._rows = rows

    def go(self, move: Sequence[float]) -> None:
        """To `base + sum c d`; exactly to the base when all are zero."""
        steps = [(row, c) for row, c in zip(self._rows, move, strict=True) if c != 0.0]
        if not steps:
            self.work.copy_(self._base)
            return
        row, c = steps[0]
        torch.add(self._base, row, alpha=c, out=self.work)
        for row, c in steps[1:]:
            self.work.add_(row, alpha=c)


@contextlib.contextmanager
def moving(model: nn.Module, vectors: Tensor, *, channels_last: bool = False) -> Iterator[Mover]:
    """The model's parameters on a work buffer; afterwards on their own storage again.

    Args:
        model: Its trainable parameters move.
        vectors: Directions `[d, P]`.
        channels_last: Memory format of the moving parameters.
    """
    parameters = trainable(model)
    layout = WorkBuffer(parameters, channels_last=channels_last)
    rows = [layout.filled(unflatten(row, parameters)) for row in vectors]
    mover = Mover(layout, layout.filled(parameters), rows)
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter, view in zip(parameters, layout.views(mover.work), strict=True):
            parameter.data = view
        yield mover
    finally:
        for parameter, original in zip(parameters, kept, strict=True):
            parameter.data = original


def with_channels_last(value: Any) -> Any:
    """The floating-point images in `value` with their channels last, other things as they are."""
    if isinstance(value, Tensor):
        if value.ndim in _CHANNELS_LAST and value.is_floating_point():
            return value.contiguous(memory_format=_CHANNELS_LAST[value.ndim])
        return value
    if isinstance(value, dict):
        return {key: with_channels_last(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_channels_last(item) for item in value)
    return value


def _dense(tensor: Tensor) -> bool:
    """Whether the strides use exactly `numel` elements, as contiguous and channels-last ones do."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() == 1 + sum((size - 1) * step for size, step in steps)
