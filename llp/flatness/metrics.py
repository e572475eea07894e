"""The measurements of tier 2: one row of `registry.METRICS`, one function `row(context)`.

Thin: the numbers are made in `llp.landscape`, here they get a name, a believed direction and their
options from the experiment. `higher_is_better` is None where the direction must be learnt: the raw
Hessian and the gradient norm follow the learning rate more than they follow generalization.
"""

from __future__ import annotations

import math

from llp import landscape
from llp.flatness.context import MetricContext
from llp.records import Measurement
from llp.spec.schema import Tier2Spec

ASAM_FACTOR = 10
"""ASAM's radius over SAM's; Kwon et al. (2021, section 5) use .5 against .05 on CIFAR-10."""

EIGENVALUE_TOLERANCE = 0.01
"""Relative residual asked for; the confirmation that follows brings it near 1e-5 anyway."""


def sam_sharpness(context: MetricContext) -> list[Measurement]:
    """`landscape.sharpness.sam` at `rho`; standard error over batches."""
    estimate = landscape.sharpness.sam(
        context.model, context.loss_fn, context.batches, rho=context.options.rho
    )
    return [context.measurement("sam_sharpness", estimate, higher_is_better=False)]


def asam_sharpness(context: MetricContext) -> list[Measurement]:
    """`landscape.sharpness.asam` at `10 rho`; standard error over batches."""
    estimate = landscape.sharpness.asam(
        context.model, context.loss_fn, context.batches, rho=ASAM_FACTOR * context.options.rho
    )
    return [context.measurement("asam_sharpness", estimate, higher_is_better=False)]


def noise_sharpness(context: MetricContext) -> list[Measurement]:
    """`landscape.sharpness.noise`, relative, at `sigma`; standard error over 8 antithetic pairs."""
    estimate = landscape.sharpness.noise(
        context.model,
        context.loss_fn,
        context.batches,
        sigma=context.options.sigma,
        generator=context.generator("noise_sharpness"),
    )
    return [context.measurement("noise_sharpness", estimate, higher_is_better=False)]


def gradient_norm(context: MetricContext) -> list[Measurement]:
    """`landscape.sharpness.gradient_norm`; standard error over batches."""
    estimate = landscape.sharpness.gradient_norm(context.model, context.loss_fn, context.batches)
    return [context.measurement("gradient_norm", estimate)]


def hessian_eigenvalues(context: MetricContext) -> list[Measurement]:
    """The `num_eigenvalues` largest by magnitude, with their signs; residuals in the notes.

    A series `hessian_eigenvalue_1`, ...; the standard error over examples is not known (NaN).
    """
    op = context.hessian
    before = op.gradient_equivalents
    pairs = landscape.top_eigenpairs(
        op,
        k=context.options.num_eigenvalues,
        tolerance=EIGENVALUE_TOLERANCE,
        generator=context.generator("hessian_eigenvalues"),
    )
    context.spent.gradient_equivalents += op.gradient_equivalents - before
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
    op = context.hessian
    before = op.num_gradients
    estimate = landscape.trace(
        op, num_probes=context.options.num_probes, generator=context.generator("hessian_trace")
    )
    context.spent.gradient_equivalents += op.num_gradients - before
    note = f"{estimate.num_probes} probes"
    return [context.measurement("hessian_trace", estimate, note=note)]


def measured_names(row: str, options: Tier2Spec) -> list[str]:
    """The `Measurement.name`s that a row of `registry.METRICS` produces.

    >>> measured_names("hessian_eigenvalues", Tier2Spec(num_eigenvalues=2))
    ['hessian_eigenvalue_1', 'hessian_eigenvalue_2']
    """
    if row == "hessian_eigenvalues":
        return [f"hessian_eigenvalue_{i + 1}" for i in range(options.num_eigenvalues)]
    if row == "swa_gain":
        return ["swa_gain", "swa_gain_loss"]
    return [row]


def estimated_samples(options: Tier2Spec, num_examples: int) -> int:
    """About what measuring one trial costs, in training examples, for a prediction of the cost.

    A forward pass counts a third of a gradient, a Hessian product two; Lanczos takes about six
    products an eigenvalue. Refinements count their training examples.

    Args:
        options: The `tier2` section.
        num_examples: Training images of the highest rung.
    """
    equivalents = {
        "sam_sharpness": 5 / 3,
        "asam_sharpness": 5 / 3,
        "noise_sharpness": 17 / 3,
        "gradient_norm": 1.0,
        "hessian_eigenvalues": 2.0 * 6 * options.num_eigenvalues,
        "hessian_trace": 2.0 * options.num_probes,
    }
    measured = min(options.num_examples, num_examples)
    metrics = sum(equivalents.get(name, 1.0) for name in options.metrics)
    refined = len(options.refinements) * options.refinement_epochs * num_examples
    return round(metrics * measured) + refined
