"""Sharpness-aware minimization: gradients taken at the worst point nearby.

`theta' = theta + rho * g / |g|` with `g` the batch gradient at `theta`; the step is then made from
`theta` with the gradient at `theta'`. Foret et al., "Sharpness-Aware Minimization for Efficiently
Improving Generalization", ICLR 2021, equations 2 and 3; rho = 0.05 is the paper's choice for CIFAR.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn


class SharpnessAware:
    """Replaces the gradients of a model by those at `theta'`; any optimizer then makes the step.

    Weights come back bit-identical, and batch-norm statistics are not updated at `theta'`.

    Args:
        model: Its parameters with a gradient are moved, all together in one ball.
        rho: Radius in the Euclidean norm, above 0.

    Raises:
        ValueError: `rho` is not above 0.
    """

    def __init__(self, model: nn.Module, *, rho: float = 0.05) -> None:
        if not rho > 0:
            raise ValueError(f"rho must be above 0, not {rho}")
        self.model, self.rho = model, rho

    def __call__(self, recompute: Callable[[], None]) -> None:
        """Calls `recompute`, which puts new gradients in place, with the weights at `theta'`."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        saved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            scale = self.rho / (nn.utils.get_total_norm(gradients) + 1e-12)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient * scale.to(gradient.dtype))
        try:
            with _statistics_frozen(self.model):
                recompute()
        finally:
            with torch.no_grad():
                for parameter, before in zip(parameters, saved, strict=True):
                    parameter.copy_(before)


@contextlib.contextmanager
def _statistics_frozen(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch as in training, without updating running statistics."""
    tracking = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
