"""Worst-case sharpness by one step of gradient ascent: SAM, and ASAM which ignores layer scales.

SAM (Foret et al. 2021, section 2): `L(theta + rho g / |g|) - L(theta)`.
ASAM (Kwon et al. 2021, section 3): the ball `|T^-1 e| <= rho` with `T = diag(|theta| + eta)`, whose
first-order maximiser is `e = rho T^2 g / |T g|`.

The standard error of both is over batches: the rises of the batch losses at the *same* step, as
independent samples of the rise. It says how well these examples stand for others; the step itself
was chosen on all of them and is taken as given.
"""

from __future__ import annotations

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
from llp.landscape.passes import (
    Batches,
    BatchLosses,
    Estimate,
    Gradient,
    LossFunction,
    batch_losses,
    value_and_gradient,
    weighted_standard_error,
)


def sam(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    rho: float = 0.05,
    known: Gradient | None = None,
) -> Estimate:
    """The rise of the loss one SAM step of length `rho` uphill; 0 where the gradient is 0.

    On a quadratic it is `rho |g| + rho^2 / 2 * g' H g / |g|^2`. Changes when layers are rescaled.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        rho: Radius, > 0.
        known: The gradient at these weights on these batches, where it was taken already; it is not
            taken again then.

    Raises:
        ValueError: `rho` is not above 0.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> data = [(torch.ones(1, 1), torch.zeros(1, 1))]
    >>> round(sam(model, nn.functional.mse_loss, data, rho=0.5).value, 4)
    2.25
    """
    return _rise(model, loss_fn, batches, rho, lambda: None, known)


def asam(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    rho: float = 0.5,
    eta: float = 0.0,
    known: Gradient | None = None,
) -> Estimate:
    """The rise of the loss one ASAM step uphill; unchanged by rescaling layers of a ReLU network.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        rho: Radius relative to the weights, > 0. Kwon et al. use 0.5 to 2, ten times SAM's.
        eta: Added to `|theta|`, >= 0. The optimizer's .01 breaks the invariance, so it is 0 here.
        known: As in `sam`.

    Raises:
        ValueError: `rho` is not above 0 or `eta` is negative.
    """
    if eta < 0:
        raise ValueError(f"eta must not be negative, not {eta:g}")
    scales = lambda: flatten(trainable(model)).abs().add_(eta)  # noqa: E731  read in eval mode
    return _rise(model, loss_fn, batches, rho, scales, known)


def _rise(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    rho: float,
    scales: Callable[[], Tensor | None],
    known: Gradient | None,
) -> Estimate:
    if not rho > 0:
        raise ValueError(f"rho must be above 0, not {rho:g}")
    started = time.perf_counter()
    with evaluation_state(model), exact_arithmetic(trainable(model)[0].device):
        rises = rises_uphill(model, loss_fn, batches, rho, scales(), known)
    return Estimate(
        value=rises.mean,
        standard_error=weighted_standard_error(rises.values, rises.weights),
        num_examples=rises.num_examples,
        num_gradients=1 if known is None else 0,
        num_forwards=1,
        seconds=time.perf_counter() - started,
    )


def rises_uphill(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    rho: float,
    scales: Tensor | None,
    known: Gradient | None = None,
) -> BatchLosses:
    """The rises of the batch losses one step uphill.

    The step is SAM's without scales and ASAM's with `scales` `[P]`. The caller has put the model in
    its evaluation state.
    """
    if known is None:
        losses, slope = value_and_gradient(model, loss_fn, batches)
    else:
        losses, slope = known.losses, known.total
    with perturbed(model, _ascent(slope, rho, scales)):
        moved = batch_losses(model, loss_fn, batches)
    return BatchLosses(moved.values - losses.values, moved.sizes)


def _ascent(slope: Tensor, rho: float, scales: Tensor | None) -> Tensor:
    scaled = slope if scales is None else slope * scales
    norm = scaled.norm()
    if float(norm) == 0.0:
        return torch.zeros_like(slope)
    direction: Tensor = scaled if scales is None else scaled * scales
    step: Tensor = direction * (rho / norm)
    return step
