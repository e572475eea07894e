"""Everything about a spectrum from one Krylov set: density, trace, both ends, largest eigenpairs.

The chains of a spectral density hold more than the density. Their first moments are Hutchinson's
trace and the Frobenius norm, their outer Ritz values the ends of the spectrum, and Ritz vectors of
several chains together, orthonormalised, give the largest eigenpairs with residuals and, because
the chains started independently, every copy of a multiple one. Only where the trace is not known
well enough are further probes spent, on what the eigenpairs leave of the matrix.

Quantities, with weights w and nodes of the density (Yao et al. 2020; Ghorbani et al. 2019):
- negative fraction: share of the eigenvalues below -threshold;
- `re`: `|lambda_min / lambda_max|`;
- `khn`: `sum (|lambda| w)^n` over the negative nodes over that of the positive ones, n = 1/2.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Unpack

import torch
from scipy import stats
from torch import Tensor, nn

from llp.landscape.chains import Chains, Quadrature
from llp.landscape.density import (
    SpectralDensity,
    chains_that_fit,
    orthogonality,
    signs,
    stacked,
    standard_errors,
    steps_that_fit,
)
from llp.landscape.hessian import hessian
from llp.landscape.krylov import LinearOperator, session
from llp.landscape.passes import Batches, LossFunction
from llp.landscape.pool import End, Pool
from llp.landscape.products import CurvatureOptions
from llp.landscape.spectrum import Eigenpairs, counters
from llp.landscape.traces import TraceEstimate, trace

ZERO = 100.0
"""Eigenvalues within this many epsilons of the largest count as zero."""


@dataclass(frozen=True)
class Quantity:
    """A number with its standard error over probes; NaN where there is none."""

    value: float
    standard_error: float = math.nan


@dataclass(frozen=True)
class SpectrumReport:
    """What one Krylov set says about a symmetric operator.

    Attributes:
        density: The spectral density.
        trace: The trace.
        eigenpairs: The largest by magnitude.
        largest: Algebraically.
        smallest: Algebraically.
        negative_fraction: Share of negative eigenvalues.
        zero_fraction: Share of eigenvalues that are zero to rounding, as far as the chains resolve
            them: zeros among many small eigenvalues count with those.
        negative_mass: Sum of the negative eigenvalues.
        positive_mass: Sum of the positive eigenvalues.
        frobenius_norm: `sqrt(sum lambda^2)`.
        re: `|smallest / largest|`.
        khn: Negative over positive nodes, each `(|lambda| w)^(1/2)`.
        top_trace_share: Sum of `eigenpairs` over the trace.
        condition_of_top: `|lambda_1 / lambda_k|` of `eigenpairs`.
        condition_of_mean: `|lambda_1|` over the mean of `|lambda|`.
        num_examples: Examples the operator is an average over; 0 for a matrix.
        num_products: Products spent on all of it.
        num_gradients: Gradients over all data spent.
        num_forwards: Forward passes over all data spent.
        seconds: Wall-clock time.
    """

    density: SpectralDensity
    trace: TraceEstimate
    eigenpairs: Eigenpairs
    largest: End
    smallest: End
    negative_fraction: Quantity
    zero_fraction: Quantity
    negative_mass: Quantity
    positive_mass: Quantity
    frobenius_norm: Quantity
    re: float
    khn: Quantity
    top_trace_share: float
    condition_of_top: float
    condition_of_mean: float
    num_examples: int
    num_products: int
    num_gradients: int
    num_forwards: int
    seconds: float


def report(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    k: int = 5,
    num_probes: int = 6,
    num_steps: int = 80,
    trace_error: float | None = 0.02,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
    max_basis_bytes: int = 2**32,
    **options: Unpack[CurvatureOptions],
) -> SpectrumReport:
    """The spectrum of the Hessian of the loss over `batches`; see `spectrum_report`.

    `options` are those of `hessian`.
    """
    return spectrum_report(
        hessian(model, loss_fn, batches, **options),
        k=k,
        num_probes=num_probes,
        num_steps=num_steps,
        trace_error=trace_error,
        tolerance=tolerance,
        generator=generator,
        max_basis_bytes=max_basis_bytes,
    )


def spectrum_report(
    op: LinearOperator,
    *,
    k: int = 5,
    num_probes: int = 6,
    num_steps: int = 80,
    trace_error: float | None = 0.02,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
    max_basis_bytes: int = 2**32,
) -> SpectrumReport:
    """Density, trace, both ends and the `k` largest eigenpairs of `op` from one Krylov set.

    Takes `num_probes * num_steps` products, and some more where the trace needs them.

    Args:
        op: Symmetric operator, or a matrix.
        k: Eigenpairs wanted, by magnitude.
        num_probes: Independent chains; at least 2 for standard errors.
        num_steps: Steps of each; fewer where not even one chain fits the memory.
        trace_error: Wanted half-width of the trace's 95 % interval over its size; None takes what
            the chains give.
        tolerance: Relative error at which an eigenpair counts as converged.
        generator: CPU generator of the starts; default: seed 0.
        max_basis_bytes: Memory of the chains; they follow one another where they do not fit.

    Raises:
        ValueError: An argument is out of its range, or three vectors do not fit the memory.

    >>> found = spectrum_report(torch.diag(torch.tensor([4.0, 2.0, 0.0, -1.0])), k=1)
    >>> round(found.largest.value, 3), round(found.smallest.value, 3), round(found.re, 3)
    (4.0, -1.0, 0.25)
    """
    if k < 1 or num_probes < 1 or num_steps < 1:
        raise ValueError("k, num_probes and num_steps must be at least 1")
    started, spent = time.perf_counter(), counters(op)
    generator = generator or torch.Generator().manual_seed(0)
    size = int(op.shape[0])
    k = min(k, size)
    num_steps = min(num_steps, size, steps_that_fit(op, max_basis_bytes))
    if num_steps < 2 <= size:
        raise ValueError(f"max_basis_bytes={max_basis_bytes:,} does not hold three vectors")
    together = chains_that_fit(op, num_steps, max_basis_bytes)
    pool = Pool(k)
    quadratures: list[Quadrature] = []
    products, worst = 0, 0.0
    with session(op):
        while len(quadratures) < num_probes:
            starts = signs(op, min(together, num_probes - len(quadratures)), generator)
            chains = Chains(op, starts, num_steps)
            while not chains.finished:
                chains.advance()
            products += chains.num_products
            worst = max(worst, orthogonality(chains))
            for chain in range(chains.num_chains):
                quadratures.append(chains.quadrature(chain))
                places = pool.wanted(quadratures[-1].nodes)
                pool.add(*chains.ritz_vectors(chain, places))
            del chains
        costs = counters(op)
        nodes, weights = stacked(quadratures)
        density = SpectralDensity(
            nodes=nodes,
            weights=weights,
            size=size,
            orthogonality=worst,
            num_products=products,
            num_gradients=costs[0] - spent[0],
            num_forwards=costs[1] - spent[1],
            seconds=time.perf_counter() - started,
        )
        pairs = pool.eigenpairs(density, tolerance, confirming=products - num_steps)
        total = _trace(op, density, pool, trace_error, generator)
    costs = counters(op)
    return _derived(
        density=density,
        total=total,
        pairs=pairs,
        pool=pool,
        num_examples=int(getattr(op, "num_examples", 0)),
        num_products=products + total.num_products,
        num_gradients=costs[0] - spent[0],
        num_forwards=costs[1] - spent[1],
        seconds=time.perf_counter() - started,
        epsilon=torch.finfo(op.dtype).eps,
    )


def _trace(
    op: LinearOperator,
    density: SpectralDensity,
    pool: Pool,
    trace_error: float | None,
    generator: torch.Generator,
) -> TraceEstimate:
    """From the chains' first moments or, where those are too uncertain, from further probes."""
    moments = density.expectation_samples(density.nodes) * density.size
    known = trace_from_samples(moments, num_examples=int(getattr(op, "num_examples", 0)))
    if trace_error is None or known.half_width <= trace_error * abs(known.value):
        return known
    assert pool.vectors is not None
    deflated = Eigenpairs(
        values=torch.from_numpy(pool.values),
        vectors=pool.vectors.T,
        residuals=torch.from_numpy(pool.residuals),
        bounds=torch.from_numpy(pool.residuals),
        converged=True,
        num_confirming=0,
        num_products=0,
        num_gradients=0,
        num_forwards=0,
        seconds=0.0,
    )
    return trace(
        op,
        trace_error,
        deflate=deflated,
        max_probes=max(16, density.num_products // 6),
        generator=generator,
    )


def trace_from_samples(samples: Tensor, *, num_examples: int) -> TraceEstimate:
    """The mean of independent estimates, with Student's 95 % interval."""
    count = len(samples)
    error = float(standard_errors(samples))
    quantile = float(stats.t.ppf(0.975, count - 1)) if count > 1 else math.nan
    return TraceEstimate(
        value=float(samples.mean()),
        standard_error=error,
        num_examples=num_examples,
        num_probes=count,
        half_width=quantile * error,
    )


def _derived(
    *,
    density: SpectralDensity,
    total: TraceEstimate,
    pairs: Eigenpairs,
    pool: Pool,
    num_examples: int,
    num_products: int,
    num_gradients: int,
    num_forwards: int,
    seconds: float,
    epsilon: float,
) -> SpectrumReport:
    nodes, weights, size = density.nodes, density.weights, density.size
    largest, smallest = pool.end(-1), pool.end(0)
    top = max(abs(largest.value), abs(smallest.value))
    negative, positive = nodes < -ZERO * epsilon * top, nodes > ZERO * epsilon * top

    def mean(values: Tensor) -> Quantity:
        samples = density.expectation_samples(values)
        return Quantity(float(samples.mean()), float(standard_errors(samples)))

    def scaled(quantity: Quantity) -> Quantity:
        return Quantity(quantity.value * size, quantity.standard_error * size)

    roots = (nodes.abs() * weights).sqrt()
    below, above = (roots * negative).sum(1), (roots * positive).sum(1)
    ratios = below / above.clamp_min(1e-300)
    second = mean(nodes**2)
    frobenius = math.sqrt(max(0.0, second.value) * size)
    slope = size / (2 * frobenius) if frobenius > 0 else math.nan
    size_mean = float(density.expectation_samples(nodes.abs()).mean())
    last = abs(float(pairs.values[-1]))
    return SpectrumReport(
        density=density,
        trace=total,
        eigenpairs=pairs,
        largest=largest,
        smallest=smallest,
        negative_fraction=mean(negative.double()),
        zero_fraction=mean((~negative & ~positive).double()),
        negative_mass=scaled(mean(nodes * negative)),
        positive_mass=scaled(mean(nodes * positive)),
        frobenius_norm=Quantity(frobenius, second.standard_error * slope),
        re=abs(smallest.value / largest.value) if largest.value else math.nan,
        khn=Quantity(float(ratios.mean()), float(standard_errors(ratios))),
        top_trace_share=float(pairs.values.sum()) / total.value if total.value else math.nan,
        condition_of_top=abs(float(pairs.values[0])) / last if last else math.inf,
        condition_of_mean=top / size_mean if size_mean else math.nan,
        num_examples=num_examples,
        num_products=num_products,
        num_gradients=num_gradients,
        num_forwards=num_forwards,
        seconds=seconds,
    )
