"""The data an operator is defined on: the same in every pass, weighted by size, put together.

A Krylov method asks for tens of products of *one* matrix. A loader that shuffles or augments gives
another matrix each time, and nothing in the result shows it. So a loader's batches are read once
before the first product and compared, byte by byte, with those of the first pass that counts.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llp.landscape.passes import Batches, LossFunction, iterate

Reduction = Literal["auto", "mean", "sum"]


class NotRepeatableError(ValueError):
    """Two passes over the data, or two losses of the same data, are not the same."""


@dataclass(frozen=True)
class Batch:
    """Some examples on the operator's device.

    Attributes:
        inputs: For the model.
        targets: For the loss.
        size: Examples.
    """

    inputs: Any
    targets: Any
    size: int


class Data:
    """Batches that are checked, weighted and put together.

    Attributes:
        reduction: `mean` or `sum`; `auto` until the first batch was seen.
        fused_examples: Consecutive batches are put together up to this many examples; 0 leaves
            them as they are.
        group: Process group over which the examples are spread, or None.
    """

    def __init__(
        self,
        batches: Batches,
        device: torch.device,
        *,
        reduction: Reduction,
        check: bool,
        group: Any = None,
    ) -> None:
        if reduction not in ("auto", "mean", "sum"):
            raise ValueError(f"reduction must be auto, mean or sum, not {reduction!r}")
        self._batches = batches
        self._device = device
        self.reduction: Reduction = reduction
        self.fused_examples = 0
        self.group = group
        self._sizes: list[int] | None = None
        self._total = 0
        self._marks: list[Any] | None = None
        self._check = check and not isinstance(batches, list | tuple)
        self._compared = not self._check

    @property
    def num_examples(self) -> int:
        """Examples in all batches, of all processes."""
        self.survey()
        return self._total

    @property
    def num_local(self) -> int:
        """Examples in this process's batches."""
        self.survey()
        return sum(self._sizes or [])

    def survey(self) -> None:
        """Reads the batches once, for their sizes and their fingerprints."""
        if self._sizes is not None:
            return
        sizes, marks = [], []
        for inputs, targets, size in self._raw():
            sizes.append(size)
            if self._check:
                marks.append(fingerprint((inputs, targets)))
        total = sum(sizes)
        if self.group is not None:
            from torch import distributed

            count = torch.tensor(total, device=self._device)
            distributed.all_reduce(count, group=self.group)
            total = int(count)
            if total == 0:
                raise ValueError("batches is empty in every process")
        self._sizes, self._marks, self._total = sizes, marks, total

    def __iter__(self) -> Iterator[Batch]:
        """The batches, put together where that was asked for."""
        self.survey()
        waiting: list[Batch] = []
        for batch in self._checked():
            count = sum(one.size for one in waiting)
            if waiting and (count + batch.size > self.fused_examples):
                yield from self.together(waiting)
                waiting = []
            waiting.append(batch)
        if waiting:
            yield from self.together(waiting)

    def together(self, batches: list[Batch]) -> list[Batch]:
        """The batches as one, or as they are where their tensors do not fit together."""
        if len(batches) == 1:
            return batches
        inputs = _concatenated([batch.inputs for batch in batches])
        targets = _concatenated([batch.targets for batch in batches])
        if inputs is None or targets is None:
            return batches
        size = sum(batch.size for batch in batches)
        return [Batch(inputs, targets, size)]

    def weight(self, size: int) -> float:
        """The weight of a batch of this size."""
        return 1.0 if self.reduction == "sum" else size / self.num_examples

    def _checked(self) -> Iterator[Batch]:
        compare, marks = not self._compared, self._marks or []
        number = -1
        for number, (inputs, targets, size) in enumerate(self._raw()):
            assert self._sizes is not None
            known = number < len(self._sizes) and size == self._sizes[number]
            if not known or (compare and fingerprint((inputs, targets)) != marks[number]):
                raise NotRepeatableError(
                    f"batch {number + 1} is another one in a second pass over `batches`: the "
                    "loader shuffles or augments, so there is no one matrix to multiply with; "
                    "give a loader with shuffle=False and fixed transforms, or list(loader)"
                )
            yield Batch(inputs, targets, size)
        if number + 1 < len(self._sizes or []):
            raise NotRepeatableError("a second pass over `batches` has fewer batches")
        self._compared = True

    def _raw(self) -> Iterator[tuple[Any, Any, int]]:
        try:
            yield from iterate(self._batches, self._device)
        except ValueError as error:
            if self.group is None or str(error) != "batches is empty":
                raise


def fingerprint(value: Any) -> Any:
    """A short value that changes when a byte of any tensor in `value` does."""
    if isinstance(value, Tensor):
        content = value.detach().reshape(-1).contiguous()
        if content.device.type == "cpu":
            octets: Any = content.view(torch.uint8).numpy() if content.numel() else b""
            return (str(value.dtype), tuple(value.shape), zlib.crc32(octets))
        numbers = content.view(torch.uint8).to(torch.int64)
        places = torch.arange(len(numbers), device=numbers.device) * 2654435761 + 1
        return (str(value.dtype), tuple(value.shape), int((numbers * places).sum()))
    if isinstance(value, dict):
        return tuple((key, fingerprint(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(fingerprint(item) for item in value)
    return repr(value)


def _concatenated(values: list[Any]) -> Any:
    """Along the first dimension; None where that is not possible."""
    first = values[0]
    if isinstance(first, Tensor):
        if not all(isinstance(value, Tensor) and value.ndim for value in values):
            return None
        kinds = {(value.shape[1:], value.dtype) for value in values}
        return torch.cat(values) if len(kinds) == 1 else None
    if isinstance(first, dict):
        parts = {key: _concatenated([value[key] for value in values]) for key in first}
        return None if any(part is None for part in parts.values()) else parts
    if type(first) in (list, tuple):
        items = [_concatenated([value[i] for value in values]) for i in range(len(first))]
        return None if any(item is None for item in items) else type(first)(items)
    return None


@torch.no_grad()
def detected_reduction(loss_fn: LossFunction, outputs: Any, targets: Any) -> Literal["mean", "sum"]:
    """Whether `loss_fn` is a mean or a sum over the batch: a sum doubles with the batch.

    A loss says so itself by its attribute `reduction`, as the modules of `torch.nn` do. Anything
    that is neither, or that cannot be doubled, counts as a mean.
    """
    said = getattr(loss_fn, "reduction", None)
    if said == "sum":
        return "sum"
    if said == "mean":
        return "mean"
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return "mean"
    if not (outputs.ndim and targets.ndim and len(outputs) == len(targets)):
        return "mean"
    once = loss_fn(outputs, targets).double()
    if once.ndim:
        return "mean"  # refused by name where it is used
    twice = loss_fn(torch.cat([outputs, outputs]), torch.cat([targets, targets])).double()
    is_sum = bool((twice - 2 * once).abs() <= 1e-3 * twice.abs()) and float(once) != 0.0
    return "sum" if is_sum else "mean"


def random_state(device: torch.device) -> tuple[Any, ...]:
    """What changes when a network draws random numbers."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    numbers: Any = np.random.get_state()
    return torch.get_rng_state(), cuda, numbers[1].tobytes(), numbers[2], random.getstate()


def same_random_state(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn in between."""
    tensors = zip(first[:2], second[:2], strict=True)
    return first[2:] == second[2:] and all(a is None or torch.equal(a, b) for a, b in tensors)


def fuses_exactly(
    whole: Batch, parts: list[Batch], loss: Callable[[Batch], Tensor], dtype: torch.dtype
) -> bool:
    """Whether the weighted loss of batches put together is the sum of theirs.

    It is not where the network mixes examples, or where the loss is no plain mean over them.
    """
    with torch.no_grad():
        expected, found = sum(float(loss(part)) for part in parts), float(loss(whole))
    scale = max(abs(expected), abs(found), 1e-30)
    return abs(found - expected) <= 1e3 * torch.finfo(dtype).eps * scale
