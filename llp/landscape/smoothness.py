"""How well the gradient describes the loss some way along it (Santurkar et al. 2018, section 3).

From the weights `theta` with gradient `g`, points `theta + step * g` are looked at, downhill
(negative steps) and uphill:

- *loss Lipschitzness*: `|L(theta + step g) - L(theta)| / |step g|`, its largest value, and the
  range of the losses met.
- *gradient predictiveness*: `|g(theta + step g) - g|`, its range, and its cosine with `g`.
- *effective beta*: `|g(theta + step g) - g| / |step g|`, its largest value; for a quadratic
  `|A g| / |g|` at every step.

Other directions than the gradient can be given, and are then taken with the length of the gradient.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from llp.landscape.directions import Directions
from llp.landscape.evaluation import Array
from llp.landscape.parameters import evaluation_state, exact_arithmetic, perturbed, trainable
from llp.landscape.passes import Batches, LossFunction, gradient
from llp.landscape.plain import Plain


@dataclass(frozen=True)
class Smoothness(Plain):
    """Losses and gradients along the gradient, or along other directions.

    Attributes:
        steps: Step sizes `[n]`, downhill ones negative, rising.
        loss: At each step `[d, n]`, one row for each direction.
        gradient_change: `|g(step) - g|` `[d, n]`.
        gradient_cosine: Cosine of `g(step)` with `g` `[d, n]`.
        distance: `|step d|` `[d, n]`.
        base_loss: Loss at the weights.
        gradient_norm: `|g|`.
        loss_lipschitz: Largest change of the loss per distance.
        loss_range: Largest minus smallest loss met.
        gradient_predictiveness: Largest change of the gradient.
        effective_beta: Largest change of the gradient per distance, over all steps.
        effective_beta_downhill: The same over the negative steps; NaN without any.
        effective_beta_uphill: The same over the positive steps; NaN without any.
        num_gradients: Gradients of the whole data spent.
        seconds: Wall-clock time.
    """

    steps: Array
    loss: Array
    gradient_change: Array
    gradient_cosine: Array
    distance: Array
    base_loss: float
    gradient_norm: float
    loss_lipschitz: float
    loss_range: float
    gradient_predictiveness: float
    effective_beta: float
    effective_beta_downhill: float
    effective_beta_uphill: float
    num_gradients: int
    seconds: float


def smoothness(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    steps: Sequence[float] = (1e-4, 1e-3, 1e-2),
    both_signs: bool = True,
    directions: Directions | None = None,
) -> Smoothness:
    """Losses and gradients at `theta + step g`.

    Args:
        model: Left bit-identical; runs in eval mode.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        steps: Step sizes along `g`, not 0; negative ones are downhill.
        both_signs: Also take each step the other way.
        directions: Rows to follow instead of `g`, each with the length of `g`.

    Raises:
        ValueError: No step, a step of 0 or a gradient of 0.
    """
    sizes = sorted({float(step) for step in steps} | {-float(s) for s in steps if both_signs})
    if not sizes or 0.0 in sizes or not np.isfinite(sizes).all():
        raise ValueError("steps must be finite numbers other than 0")
    started = time.perf_counter()
    with evaluation_state(model), exact_arithmetic(trainable(model)[0].device):
        here = gradient(model, loss_fn, batches)
        slope, base = here.total.double(), here.losses.mean
        norm = float(slope.norm())
        if norm == 0.0:
            raise ValueError("the gradient is 0: there is no way up or down")
        rows = slope[None] if directions is None else _of_length(directions.vectors, norm)
        found = [
            [_at(model, loss_fn, batches, row * size, slope) for size in sizes] for row in rows
        ]
    values = np.asarray(found, dtype=np.float64)
    loss, change, cosine = values[..., 0], values[..., 1], values[..., 2]
    distance = np.abs(np.asarray(sizes))[None] * rows.norm(dim=1).cpu().numpy()[:, None]
    beta = change / distance
    signs = np.asarray(sizes)
    return Smoothness(
        steps=signs,
        loss=loss,
        gradient_change=change,
        gradient_cosine=cosine,
        distance=distance,
        base_loss=base,
        gradient_norm=norm,
        loss_lipschitz=float((np.abs(loss - base) / distance).max()),
        loss_range=float(max(loss.max(), base) - min(loss.min(), base)),
        gradient_predictiveness=float(change.max()),
        effective_beta=float(beta.max()),
        effective_beta_downhill=_largest(beta[:, signs < 0]),
        effective_beta_uphill=_largest(beta[:, signs > 0]),
        num_gradients=1 + loss.size,
        seconds=time.perf_counter() - started,
    )


def _at(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, step: Tensor, slope: Tensor
) -> tuple[float, float, float]:
    """Loss there, change of the gradient, cosine of the gradients."""
    with perturbed(model, step):
        there = gradient(model, loss_fn, batches)
    other = there.total.double()
    cosine = torch.nn.functional.cosine_similarity(other, slope, dim=0)
    return there.losses.mean, float((other - slope).norm()), float(cosine)


def _of_length(rows: Tensor, norm: float) -> Tensor:
    wide = rows.double()
    scaled: Tensor = wide * (norm / wide.norm(dim=1, keepdim=True))
    return scaled


def _largest(values: Array) -> float:
    return float(values.max()) if values.size else float("nan")
