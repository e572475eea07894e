"""Average-case sharpness: the mean rise of the loss under Gaussian noise on the weights.

Noise proportional to each weight ("multiplicative", as in Jiang et al. 2020, appendix C) does not
change when layers are rescaled; additive noise does. On a quadratic the mean rise is
`sigma^2 / 2 * sum H_ii theta_i^2` and `sigma^2 / 2 * tr H`.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from llp.landscape.parameters import (
    evaluation_state,
    exact_arithmetic,
    flatten,
    perturbed,
    trainable,
)
from llp.landscape.passes import Batches, Estimate, LossFunction, batch_losses


def noise(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    sigma: float = 0.05,
    num_draws: int = 8,
    relative: bool = True,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The mean of `L(theta + d) - L(theta)` over noise `d`, each draw used as `+d` and `-d`.

    The pair cancels the slope: one draw is `(L(theta + d) + L(theta - d)) / 2 - L(theta)`. The same
    seed gives the same draws to every model of that many parameters (common random numbers), so
    differences between models are less noisy than either value.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        sigma: Standard deviation of the noise, > 0; relative to each weight when `relative`.
        num_draws: Pairs; two forward passes each. The standard error is over them.
        relative: `d = sigma |theta| z` instead of `d = sigma z`.
        generator: CPU generator of the draws; default: seed 0.

    Raises:
        ValueError: `sigma` is not above 0 or `num_draws` is below 1.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, not {sigma:g}")
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, not {num_draws}")
    started = time.perf_counter()
    generator = generator or torch.Generator().manual_seed(0)
    parameters = trainable(model)
    with evaluation_state(model), exact_arithmetic(parameters[0].device):
        base = batch_losses(model, loss_fn, batches)
        weights = flatten(parameters)
        rises = []
        for _ in range(num_draws):
            draw = torch.randn(len(weights), generator=generator).to(weights).mul_(sigma)
            step = draw * weights.abs() if relative else draw
            rises.append(_even_rise(model, loss_fn, batches, step, base.mean))
    samples = torch.tensor(rises, dtype=torch.float64)
    spread = float(samples.std()) if num_draws > 1 else math.nan
    return Estimate(
        value=float(samples.mean()),
        standard_error=spread / math.sqrt(num_draws),
        num_examples=base.num_examples,
        num_forwards=1 + 2 * num_draws,
        seconds=time.perf_counter() - started,
    )


def _even_rise(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, step: Tensor, base: float
) -> float:
    with perturbed(model, step):
        plus = batch_losses(model, loss_fn, batches).mean
    with perturbed(model, -step):
        minus = batch_losses(model, loss_fn, batches).mean
    return (plus + minus) / 2 - base
