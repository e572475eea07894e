"""The norm of the gradient of the whole loss: how far from stationary the weights are."""

from __future__ import annotations

import time

from torch import nn

from llp.landscape.parameters import evaluation_state, exact_arithmetic, trainable
from llp.landscape.passes import (
    Batches,
    Estimate,
    Gradient,
    LossFunction,
    gradient,
    weighted_standard_error,
)


def gradient_norm(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, *, known: Gradient | None = None
) -> Estimate:
    """`|g|` of the mean loss over all batches.

    The standard error is over up to 8 groups of batches, by the delta method: `|g|` is the weighted
    mean of the groups' gradients projected on `g / |g|`. It does not include the upward bias that
    noise gives to a norm. With `known`, the gradient at these weights on these batches, nothing is
    computed anew.
    """
    started = time.perf_counter()
    with evaluation_state(model), exact_arithmetic(trainable(model)[0].device):
        slope = gradient(model, loss_fn, batches) if known is None else known
    norm = slope.total.norm()
    projections = (slope.groups @ (slope.total / norm.clamp_min(1e-30))).double().cpu()
    return Estimate(
        value=float(norm),
        standard_error=weighted_standard_error(projections, slope.group_weights),
        num_examples=slope.losses.num_examples,
        num_gradients=1 if known is None else 0,
        seconds=time.perf_counter() - started,
    )
