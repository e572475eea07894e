"""Worst-case sharpness: the largest rise of the loss in a ball or box around the weights.

`worst_case`: the ball `|d / s| <= rho` in the Euclidean or the largest-entry norm, with `s = 1` or,
adaptively, `s = |theta|`. `epsilon_box`: Keskar et al. 2017, section 2.2, the box
`|d_i| <= epsilon (|theta_i| + 1)` and the rise as a percentage of `1 + L`.

The maximum is sought by projected gradient ascent with momentum and a step size that is halved when
progress stops, upon which the search goes back to the best point found and continues from there
(APGD, Croce and Hein 2020, algorithm 1). The first search starts uphill from the weights, so its
result is never below SAM's; the others start at random points. What is returned is the largest rise
seen, a lower bound of the maximum.

The standard error is over batches at the step found, which is taken as given, as for `sam`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from llp.landscape.parameters import (
    evaluation_state,
    exact_arithmetic,
    flatten,
    perturbed,
    trainable,
)
from llp.landscape.passes import (
    Batches,
    BatchLosses,
    Estimate,
    LossFunction,
    value_and_gradient,
    weighted_standard_error,
)

Norm = Literal["l2", "linf"]

_MOMENTUM = 0.25
_IMPROVING = 0.75
"""Share of the steps that must have raised the loss for the step size to stay."""


def worst_case(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    rho: float = 0.05,
    norm: Norm = "l2",
    adaptive: bool = False,
    num_steps: int = 20,
    num_restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The largest rise of the loss found in a ball of radius `rho`; at least 0 and at least SAM's.

    On a quadratic and for `l2` it is the solution of the trust-region problem; at a stationary
    point `rho^2 / 2` times the largest eigenvalue.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        rho: Radius, > 0; relative to each weight when `adaptive`.
        norm: `l2`, or `linf` for a box.
        adaptive: Ball of `d / |theta|`, which rescaling the layers of a ReLU network leaves as
            it is.
        num_steps: Gradients for each search, at least 2.
        num_restarts: Further searches from random points of the ball.
        generator: CPU generator of these points; default: seed 0.

    Raises:
        ValueError: An argument is out of its range.
    """
    return _search(
        model, loss_fn, batches, rho, norm, "weights" if adaptive else "none", num_steps,
        num_restarts, generator,
    )[0]  # fmt: skip


def epsilon_box(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    epsilon: float = 1e-3,
    num_steps: int = 20,
    num_restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Keskar's sharpness `100 (max L(theta + d) - L) / (1 + L)` over `|d_i| <= epsilon (|theta_i| + 1)`.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch, not negative.
        batches: Re-iterable of `(inputs, targets)`.
        epsilon: Half-width of the box, > 0; the paper uses 1e-3 and 5e-4.
        num_steps: Gradients for each search, at least 2.
        num_restarts: Further searches from random points of the box.
        generator: CPU generator of these points; default: seed 0.

    Raises:
        ValueError: An argument is out of its range, or the loss is not above -1.
    """  # noqa: E501
    found, base = _search(
        model, loss_fn, batches, epsilon, "linf", "one_plus_weights", num_steps, num_restarts,
        generator,
    )  # fmt: skip
    if not base > -1:
        raise ValueError(f"epsilon_box divides by 1 + loss; the loss is {base:g}")
    scale = 100 / (1 + base)
    return replace(found, value=scale * found.value, standard_error=scale * found.standard_error)


@dataclass
class Place:
    """A point of the ball in coordinates `d / s`, and what was found there."""

    point: Tensor
    losses: BatchLosses
    slope: Tensor

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self.losses.mean


class Ball:
    """The ball, with the loss on it.

    Attributes:
        num_gradients: Losses and gradients taken so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Batches,
        rho: float,
        norm: Norm,
        scales: Tensor | None,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._batches = batches
        self._scales = scales
        self.rho = rho
        self.norm = norm
        self.num_gradients = 0

    def place(self, point: Tensor) -> Place:
        """Loss and gradient at a point."""
        step = point if self._scales is None else point * self._scales
        with perturbed(self._model, step):
            losses, slope = value_and_gradient(self._model, self._loss_fn, self._batches)
        self.num_gradients += 1
        return Place(point, losses, slope if self._scales is None else slope * self._scales)

    def project(self, point: Tensor) -> Tensor:
        """The nearest point of the ball."""
        if self.norm == "linf":
            return point.clamp(-self.rho, self.rho)
        inside: Tensor = point * (self.rho / point.norm()).clamp(max=1.0)
        return inside

    def uphill(self, slope: Tensor, size: float) -> Tensor:
        """The step of length `size` along which a linear loss rises most; 0 for no slope."""
        if self.norm == "linf":
            return size * slope.sign()
        norm = slope.norm()
        return slope * torch.where(norm > 0, size / norm, 0.0)

    def random(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """A random point: uniform in the box, on the sphere."""
        draw = torch.randn(len(like), generator=generator)
        if self.norm == "linf":
            draw = torch.rand(len(like), generator=generator) * 2 - 1
            return (draw * self.rho).to(like)
        scaled: Tensor = draw * (self.rho / draw.norm())
        return scaled.to(like)


def ascend(ball: Ball, start: Place, num_steps: int) -> Place:
    """The best place found in `num_steps` gradients from `start`."""
    size = 2 * ball.rho
    best, here = start, start
    before: Tensor | None = None  # none at the start and after going back
    improved, best_at_check, size_at_check = 0, start.loss, size
    checks = _checkpoints(num_steps)
    last_check = 0
    for number in range(1, num_steps + 1):
        aim = ball.project(here.point + ball.uphill(here.slope, size))
        if before is not None:
            past, ahead = here.point - before, aim - here.point
            aim = ball.project(here.point + (1 - _MOMENTUM) * ahead + _MOMENTUM * past)
        before, was = here.point, here.loss
        here = ball.place(aim)
        improved += here.loss > was
        if here.loss > best.loss:
            best = here
        if not bool(torch.isfinite(here.slope).all()):
            here, before, size = best, None, size / 2
            if best is start or not bool(torch.isfinite(best.slope).all()):
                return best
        if number in checks:
            stalled = improved < _IMPROVING * (number - last_check)
            stuck = size == size_at_check and best.loss == best_at_check
            size_at_check, best_at_check, improved, last_check = size, best.loss, 0, number
            if stalled or stuck:
                size /= 2
                here, before = best, None
    return best


def _checkpoints(num_steps: int) -> set[int]:
    """After which steps progress is judged (Croce and Hein 2020, section 3.2)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * num_steps) for share in shares[1:]}


def _search(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    rho: float,
    norm: Norm,
    scaling: Literal["none", "weights", "one_plus_weights"],
    num_steps: int,
    num_restarts: int,
    generator: torch.Generator | None,
) -> tuple[Estimate, float]:
    """The estimate of the largest rise, and the loss at the weights."""
    if not rho > 0:
        raise ValueError(f"the radius must be above 0, not {rho:g}")
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm must be l2 or linf, not {norm!r}")
    if num_steps < 2 or num_restarts < 0:
        raise ValueError("num_steps must be at least 2 and num_restarts at least 0")
    started = time.perf_counter()
    generator = generator or torch.Generator().manual_seed(0)
    with evaluation_state(model), exact_arithmetic(trainable(model)[0].device):
        weights = flatten(trainable(model))
        scales = None
        if scaling != "none":
            scales = weights.abs() + (1.0 if scaling == "one_plus_weights" else 0.0)
        ball = Ball(model, loss_fn, batches, rho, norm, scales)
        base = ball.place(torch.zeros_like(weights))
        best = ascend(ball, base, num_steps)
        for _ in range(num_restarts):
            start = ball.place(ball.random(weights, generator))
            other = ascend(ball, start, num_steps - 1)
            best = other if other.loss > best.loss else best
    rises = best.losses.values - base.losses.values
    shares = base.losses.weights
    estimate = Estimate(
        value=float(shares @ rises),
        standard_error=weighted_standard_error(rises, shares),
        num_examples=base.losses.num_examples,
        num_gradients=ball.num_gradients,
        seconds=time.perf_counter() - started,
    )
    return estimate, base.loss
