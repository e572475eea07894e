"""The measurements of tier 2: one row of `registry.METRICS`, one function `row(context)`.

Thin: the numbers are made in `llp.landscape`, here they get a name, a believed direction and their
options from the experiment. `higher_is_better` is None where the direction must be learnt: the raw
Hessian and the gradient norm follow the learning rate more than they follow generalization.
"""

from __future__ import annotations

import math
import time

from torch import Tensor

from llp import landscape
from llp.flatness.context import MetricContext
from llp.records import Measurement
from llp.spec.schema import Tier2Spec

ASAM_FACTOR = 10
"""ASAM's radius over SAM's; Kwon et al. (2021, section 5) use .5 against .05 on CIFAR-10."""

RISE_TOLERANCE = 0.1
"""The rise is met to this share of it, the level to half of that: less than the pairs vary."""

SIGMA_START = 0.2
"""First level looked at; digits and CIFAR networks after a probe have theirs between .05 and 1."""

GAINS = {"swa_gain": 1, "sam_gain": 2, "entropy_sgd_gain": 1}
"""Refinements, and how many gradients each takes of an example in an epoch."""

GRAPH = 1.0
"""Gradients that the graph of the Hessian costs."""

EIGENVALUE_TOLERANCE = 0.01
"""Relative residual asked for; the confirmation that follows brings it near 1e-5 anyway."""


def sam_sharpness(context: MetricContext) -> list[Measurement]:
    """`landscape.sharpness.sam` at `rho`; standard error over batches."""
    estimate = landscape.sharpness.sam(
        context.model,
        context.loss_fn,
        context.batches,
        rho=context.options.rho,
        known=context.gradient(),
    )
    return [context.measurement("sam_sharpness", estimate, higher_is_better=False)]


def asam_sharpness(context: MetricContext) -> list[Measurement]:
    """`landscape.sharpness.asam` at `10 rho`; standard error over batches."""
    estimate = landscape.sharpness.asam(
        context.model,
        context.loss_fn,
        context.batches,
        rho=ASAM_FACTOR * context.options.rho,
        known=context.gradient(),
    )
    return [context.measurement("asam_sharpness", estimate, higher_is_better=False)]


def noise_sharpness(context: MetricContext) -> list[Measurement]:
    """`landscape.sharpness.noise`, relative, at `sigma`; standard error over antithetic pairs."""
    estimate = landscape.sharpness.noise(
        context.model,
        context.loss_fn,
        context.batches,
        sigma=context.options.sigma,
        num_draws=context.options.num_draws,
        generator=context.generator("noise_sharpness"),
        known=context.base().losses,
    )
    return [context.measurement("noise_sharpness", estimate, higher_is_better=False)]


def noise_sigma(context: MetricContext) -> list[Measurement]:
    """The multiplicative noise at which the loss has risen by `rise`; larger is flatter.

    `landscape.sharpness.noise_sigma`; standard error over the antithetic pairs.

    Raises:
        ValueError: The loss does not rise enough at any level up to 10.
    """
    estimate = landscape.sharpness.noise_sigma(
        context.model,
        context.loss_fn,
        context.batches,
        rise=context.options.rise,
        num_draws=context.options.num_draws,
        tolerance=RISE_TOLERANCE,
        start=SIGMA_START,
        generator=context.generator("noise_sharpness"),
        known=context.base().losses,
    )
    return [context.measurement("noise_sigma", estimate, higher_is_better=True)]


def gradient_norm(context: MetricContext) -> list[Measurement]:
    """`landscape.sharpness.gradient_norm`; standard error over batches."""
    estimate = landscape.sharpness.gradient_norm(
        context.model, context.loss_fn, context.batches, known=context.gradient()
    )
    return [context.measurement("gradient_norm", estimate)]


def hessian_eigenvalues(context: MetricContext) -> list[Measurement]:
    """The `num_eigenvalues` largest by magnitude, with their signs; residuals in the notes.

    A series `hessian_eigenvalue_1`, ...; the standard error over examples is not known (NaN). With
    a budget Lanczos ends where that does, and the note says whether it had converged.
    """
    num = context.options.num_eigenvalues
    most = max(100, 20 * num)
    if math.isfinite(context.left):
        most = min(most, max(num, int((context.left - GRAPH) / 2)))
    with context.counted_hessian() as op:
        pairs = landscape.top_eigenpairs(
            op,
            k=num,
            tolerance=EIGENVALUE_TOLERANCE,
            max_products=most,
            generator=context.generator("hessian_eigenvalues"),
        )
    state = "" if pairs.converged else ", not converged"
    return [
        Measurement(
            name=name,
            value=float(value),
            standard_error=math.nan,
            higher_is_better=None,
            num_examples=context.num_examples,
            seconds=pairs.seconds / len(pairs.values),
            note=f"residual {float(residual):.1e} after {pairs.num_products} products{state}",
        )
        for name, value, residual in zip(
            measured_names("hessian_eigenvalues", context.options),
            pairs.values,
            pairs.residuals,
            strict=False,  # a network may have fewer parameters than eigenvalues asked for
        )
    ]


def hessian_trace(context: MetricContext) -> list[Measurement]:
    """Hutchinson's estimate from `num_probes` probes; standard error over probes."""
    started = time.perf_counter()
    return [_mean(context, "hessian_trace", context.sign_products().trace, started, None)]


def adaptive_trace(context: MetricContext) -> list[Measurement]:
    """`sum_i theta_i^2 H_ii`, unchanged by rescaling the layers of a ReLU network.

    From the products of `hessian_trace`: `(theta^2 z)' H z` has this mean for random signs z, as
    `(theta z)' H (theta z)` of `landscape.sharpness.adaptive_trace` has; standard error over
    probes.
    """
    started = time.perf_counter()
    return [_mean(context, "adaptive_trace", context.sign_products().adaptive, started, False)]


def _mean(
    context: MetricContext, name: str, samples: Tensor, started: float, better: bool | None
) -> Measurement:
    count = len(samples)
    return Measurement(
        name=name,
        value=float(samples.mean()),
        standard_error=float(samples.std()) / math.sqrt(count) if count > 1 else math.nan,
        higher_is_better=better,
        num_examples=context.num_examples,
        seconds=time.perf_counter() - started,
        note=f"{count} probes",
    )


def measured_names(row: str, options: Tier2Spec) -> list[str]:
    """The `Measurement.name`s that a row of `registry.METRICS` produces.

    >>> measured_names("hessian_eigenvalues", Tier2Spec(num_eigenvalues=2))
    ['hessian_eigenvalue_1', 'hessian_eigenvalue_2']
    """
    if row == "hessian_eigenvalues":
        return [f"hessian_eigenvalue_{i + 1}" for i in range(options.num_eigenvalues)]
    if row in GAINS:
        return [row, f"{row}_loss"]
    return [row]
