"""Running statistics of batch normalisation, estimated anew for weights that were never trained.

Weights between two trained networks, or far out on a plane, do not fit the running mean and
variance of the weights they came from; the loss then shows a barrier that is none (Izmailov et al.
2018, section 3.2; Garipov et al. 2018, appendix A.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from llp.landscape.parameters import trainable
from llp.landscape.passes import Batches, iterate


def layers(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisation layers that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Batches) -> None:
    """Writes the size-weighted means of the batch statistics at the present weights.

    Only the normalisation layers run in training mode (dropout stays off). Changes the model's
    buffers: call it inside `evaluation_state`. Does nothing when there is no such layer.
    """
    found = layers(model)
    if not found:
        return
    with _averaging(found):
        seen = 0
        for inputs, _, size in iterate(batches, trainable(model)[0].device):
            seen += size
            for layer in found:
                layer.momentum = size / seen
            model(inputs)


@contextlib.contextmanager
def _averaging(found: list[_BatchNorm]) -> Iterator[None]:
    before = [(layer.momentum, layer.training) for layer in found]
    try:
        for layer in found:
            layer.reset_running_stats()
            layer.train()
        yield
    finally:
        for layer, (momentum, training) in zip(found, before, strict=True):
            layer.momentum, layer.training = momentum, training
