"""Average-case sharpness: the mean rise of the loss under Gaussian noise on the weights.

Noise proportional to each weight ("multiplicative", as in Jiang et al. 2020, appendix C) does not
change when layers are rescaled; additive noise does. On a quadratic the mean rise is
`sigma^2 / 2 * sum H_ii theta_i^2` and `sigma^2 / 2 * tr H`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llp.landscape.parameters import (
    evaluation_state,
    exact_arithmetic,
    flatten,
    perturbed,
    trainable,
)
from llp.landscape.passes import Batches, BatchLosses, Estimate, LossFunction, batch_losses


def noise(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    sigma: float = 0.05,
    num_draws: int = 8,
    relative: bool = True,
    generator: torch.Generator | None = None,
    known: BatchLosses | None = None,
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
        known: The losses at these weights on these batches; they are not computed again then.

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
        base = batch_losses(model, loss_fn, batches) if known is None else known
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
        num_forwards=(known is None) + 2 * num_draws,
        seconds=time.perf_counter() - started,
    )


def noise_sigma(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    rise: float = 0.1,
    num_draws: int = 8,
    relative: bool = True,
    tolerance: float = 0.01,
    start: float = 0.05,
    max_sigma: float = 10.0,
    generator: torch.Generator | None = None,
    known: BatchLosses | None = None,
) -> Estimate:
    """The noise level at which the loss has risen by `rise` on average; larger is flatter.

    `1 / sigma^2` is the PAC-Bayes flatness of Jiang et al. 2020, appendix C. The level is bracketed
    and then closed in on with the same draws at every level (common random numbers), so the search
    sees a smooth function. On a quadratic `sigma = sqrt(2 rise / tr H)` for additive noise.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        rise: Wanted mean rise of the loss, > 0.
        num_draws: Antithetic pairs; the standard error is over them, by the delta method.
        relative: Noise proportional to each weight.
        tolerance: The rise is met to this share of it.
        start: First level looked at.
        max_sigma: Beyond this level the search gives up.
        generator: CPU generator of the draws; default: seed 0.
        known: As in `noise`.

    Raises:
        ValueError: An argument is out of its range, or the loss does not rise enough up to
            `max_sigma`.
    """
    if not (rise > 0 and tolerance > 0 and 0 < start <= max_sigma):
        raise ValueError("rise, tolerance and start must be above 0, start at most max_sigma")
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, not {num_draws}")
    started = time.perf_counter()
    generator = generator or torch.Generator().manual_seed(0)
    state = generator.get_state()
    levels: list[float] = []
    parameters = trainable(model)
    with evaluation_state(model), exact_arithmetic(parameters[0].device):
        base = batch_losses(model, loss_fn, batches) if known is None else known
        weights = flatten(parameters)

        def rises(sigma: float) -> Tensor:
            """The rise of every pair at one level, always with the same draws."""
            generator.set_state(state)
            levels.append(sigma)
            found = []
            for _ in range(num_draws):
                draw = torch.randn(len(weights), generator=generator).to(weights).mul_(sigma)
                step = draw * weights.abs() if relative else draw
                found.append(_even_rise(model, loss_fn, batches, step, base.mean))
            return torch.tensor(found, dtype=torch.float64)

        sigma, samples, slope = _level(rises, rise, tolerance, start, max_sigma)
    spread = float(samples.std()) / math.sqrt(num_draws) if num_draws > 1 else math.nan
    return Estimate(
        value=sigma,
        standard_error=spread / slope,
        num_examples=base.num_examples,
        num_forwards=(known is None) + 2 * num_draws * len(levels),
        seconds=time.perf_counter() - started,
    )


def _level(
    rises: Callable[[float], Tensor],
    wanted: float,
    tolerance: float,
    start: float,
    max_sigma: float,
) -> tuple[float, Tensor, float]:
    """The level with the wanted mean rise, the rises there, and their slope in the level."""
    low, low_rise = 0.0, 0.0
    high, high_rise = math.inf, math.inf
    sigma = start
    seen: list[tuple[float, float]] = []
    for _ in range(100):
        samples = rises(sigma)
        mean = float(samples.mean())
        if abs(mean - wanted) <= tolerance * wanted:
            return sigma, samples, _slope(sigma, mean, seen)
        seen.append((sigma, mean))
        if mean < wanted:  # a level that blows the loss up is above, not below
            low, low_rise = sigma, mean
        else:
            high, high_rise = sigma, mean
        sigma = _between(low, low_rise, high, high_rise, wanted, max_sigma)
    raise ValueError(f"the mean rise jumps past {wanted:g} near sigma {sigma:g}")


def _slope(sigma: float, mean: float, seen: list[tuple[float, float]]) -> float:
    """Slope of the mean rise, as a power of the level through the nearest other level."""
    usable = [(s, m) for s, m in seen if math.isfinite(m) and m > 0 and m != mean]
    if not usable:
        return 2 * mean / sigma
    other, its_mean = min(usable, key=lambda pair: abs(math.log(pair[0] / sigma)))
    power = math.log(its_mean / mean) / math.log(other / sigma)
    return (power if power > 0 else 2) * mean / sigma


def _between(
    low: float, low_rise: float, high: float, high_rise: float, wanted: float, max_sigma: float
) -> float:
    """The next level: as if the rise were a quadratic, kept well inside the bracket."""
    if math.isinf(high):
        if low >= max_sigma:
            raise ValueError(f"the loss rises only by {low_rise:g} at sigma {low:g}")
        guess = 1.1 * low * math.sqrt(wanted / low_rise) if low_rise > 0 else 4 * low
        return min(max(guess, 1.1 * low), 4 * low, max_sigma)
    if not math.isfinite(high_rise):
        return (low + high) / 2
    if low == 0.0:
        return max(0.95 * high * math.sqrt(wanted / high_rise), 0.05 * high)
    share = (wanted - low_rise) / (high_rise - low_rise)
    square = low**2 + share * (high**2 - low**2)
    return min(max(math.sqrt(square), low + 0.05 * (high - low)), high - 0.05 * (high - low))


def _even_rise(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, step: Tensor, base: float
) -> float:
    with perturbed(model, step):
        plus = batch_losses(model, loss_fn, batches).mean
    with perturbed(model, -step):
        minus = batch_losses(model, loss_fn, batches).mean
    return (plus + minus) / 2 - base
