"""m-sharpness: SAM's rise taken on small groups of examples instead of on all of them at once.

Foret et al. 2021, section 4.1: the ascent step is chosen anew for every group of m examples, and
the rises are averaged. Smaller groups see steeper directions, and m-sharpness with small m was
found to go with generalisation better. With m as large as the data it is SAM's sharpness.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llp.landscape.parameters import evaluation_state, exact_arithmetic, flatten, trainable
from llp.landscape.passes import (
    Batches,
    BatchLosses,
    Estimate,
    LossFunction,
    iterate,
    weighted_standard_error,
)
from llp.landscape.sharpness.ascent import rises_uphill


def m_sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    m: int = 128,
    rho: float = 0.05,
    adaptive: bool = False,
) -> Estimate:
    """The mean over groups of `m` examples of the rise one SAM step uphill on that group.

    The standard error is over groups; over batches when there is only one group. Groups are made of
    consecutive examples, across batches where needed; the last one may be smaller and counts for
    less.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        m: Examples of a group, at least 1.
        rho: Radius, > 0.
        adaptive: ASAM's step, which ignores the scales of layers, instead of SAM's.

    Raises:
        ValueError: `m` or `rho` is out of its range.
    """
    if m < 1:
        raise ValueError(f"m must be at least 1, not {m}")
    if not rho > 0:
        raise ValueError(f"rho must be above 0, not {rho:g}")
    started = time.perf_counter()
    device = trainable(model)[0].device
    found = []
    with evaluation_state(model), exact_arithmetic(device):
        scales = flatten(trainable(model)).abs() if adaptive else None
        for group in groups_of(m, batches, device):
            found.append(rises_uphill(model, loss_fn, group, rho, scales))
    means = torch.tensor([each.mean for each in found], dtype=torch.float64)
    rises = BatchLosses(means, tuple(each.num_examples for each in found))
    spread = rises if len(found) > 1 else found[0]
    return Estimate(
        value=rises.mean,
        standard_error=weighted_standard_error(spread.values, spread.weights),
        num_examples=rises.num_examples,
        num_gradients=1,
        num_forwards=1,
        seconds=time.perf_counter() - started,
    )


def groups_of(m: int, batches: Batches, device: torch.device) -> Iterator[list[tuple[Any, Any]]]:
    """Lists of batches that hold `m` examples together; the last list may hold fewer."""
    group: list[tuple[Any, Any]] = []
    room = m
    for inputs, targets, size in iterate(batches, device):
        start = 0
        while start < size:
            stop = min(size, start + room)
            whole = start == 0 and stop == size
            group.append(
                (inputs, targets)
                if whole
                else (_slice(inputs, start, stop), _slice(targets, start, stop))
            )
            room -= stop - start
            start = stop
            if room == 0:
                yield group
                group, room = [], m
    if group:
        yield group


def _slice(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop]
    if isinstance(value, dict):
        return {key: _slice(item, start, stop) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_slice(item, start, stop) for item in value)
    return value
