"""The trace of an operator, stopped by a confidence interval.

Four estimators, unbiased for a given number of products, all with probes `w` of random signs:
- `hutchinson` (1990): the mean of `w' H w`. Best where no few eigenvalues dominate.
- `hutch++` (Meyer et al. 2021): the trace on the range of a sketch exactly, Hutchinson on the rest.
  Better where few eigenvalues hold most of the Frobenius norm. The sketch grows as long as it is
  predicted to spare more probes than it costs (Persson et al. 2022, section 3).
- `xtrace` (Epperly et al. 2024, section 2.1): the same with every probe in both roles, by leaving
  one out; best where few products are needed at all.
- `deflated`: `hutch++` with eigenpairs that are known already, which cost nothing then.
The first eight products are a pilot: they are Hutchinson's samples, and each of them projected on
the others tells how much of the Frobenius norm a sketch would take away. What is predicted to be
cheapest goes on.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from llp.landscape.estimators import Estimator, Hutchinson, Probes, XTrace, extended, inner
from llp.landscape.krylov import LinearOperator, session
from llp.landscape.passes import Estimate
from llp.landscape.spectrum import Eigenpairs, counters

Method = Literal["auto", "hutchinson", "hutch++", "xtrace", "deflated"]

PILOT = 8
"""Products of the pilot, and columns by which a sketch grows."""

SPREAD_QUANTILE = 0.25
"""While it may still go on, the spread is taken as large as in three of four samples: stopping at
the first interval that is small enough favours samples with too small a spread."""


@dataclass(frozen=True)
class TraceEstimate(Estimate):
    """An estimated trace; its standard error is over probe vectors.

    Attributes:
        num_probes: Probes, or groups of probes, that the standard error is over.
        converged: Whether the asked error was met; True when none was asked.
        method: The estimator used.
        half_width: Of the confidence interval around `value`.
    """

    num_probes: int = 0
    converged: bool = True
    method: str = "hutchinson"
    half_width: float = math.nan


def trace(
    op: LinearOperator,
    relative_error: float | None = 0.01,
    *,
    absolute_error: float = 0.0,
    confidence: float = 0.95,
    method: Method = "auto",
    deflate: Eigenpairs | Tensor | None = None,
    num_probes: int | None = None,
    max_probes: int = 1000,
    generator: torch.Generator | None = None,
    max_basis_bytes: int = 2**31,
) -> TraceEstimate:
    """The trace of `op`, to a wanted error with a wanted confidence.

    Without `num_probes` it stops when the half-width of the confidence interval (Student's t) is at
    most `relative_error * |value|` or `absolute_error`. A trace near 0 beside the Frobenius norm
    cannot have a small relative error; then `max_probes` ends it, with `converged=False`.

    Args:
        op: Symmetric operator, or a matrix.
        relative_error: Wanted half-width over |trace|; ignored when `num_probes` is given.
        absolute_error: Half-width that is good enough in any case.
        confidence: Of the interval, in (0, 1).
        method: The estimator; `auto` lets the pilot decide, or is `deflated` where `deflate` is
            given.
        deflate: Eigenpairs known already, or vectors `[P, m]` (one product each).
        num_probes: Spend exactly this many products, at least 1; by Hutchinson where `method` is
            `auto`.
        max_probes: Spend at most this many products.
        generator: CPU generator of the probes; default: seed 0.
        max_basis_bytes: Memory of a sketch.

    Raises:
        ValueError: An argument is out of its range.

    >>> trace(torch.diag(torch.tensor([3.0, -5.0, 1.0])), num_probes=2).value
    -1.0
    """
    if num_probes is None and (relative_error is None or not relative_error > 0):
        raise ValueError("give num_probes, or a relative_error above 0")
    if (num_probes is not None and num_probes < 1) or max_probes < 1:
        raise ValueError("num_probes and max_probes must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence:g}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    if method == "deflated" and deflate is None:
        raise ValueError("method='deflated' needs deflate=")
    started, spent = time.perf_counter(), counters(op)
    probes = Probes(op, generator or torch.Generator().manual_seed(0))
    goal = _Goal(
        relative_error=relative_error or 0.0,
        absolute_error=absolute_error,
        confidence=confidence,
        max_products=max_probes if num_probes is None else num_probes,
        widest=max_basis_bytes // (3 * int(op.shape[0]) * torch.finfo(op.dtype).bits // 8),
    )
    with session(op):
        if deflate is not None:
            estimator: Estimator = _deflated(probes, deflate)
        elif num_probes is not None:
            estimator = _fixed(probes, goal, method)
        else:
            estimator = _chosen(probes, goal, method)
        if num_probes is None:
            _go_on(estimator, probes, goal)
        else:
            estimator.extend(num_probes - probes.num_products)
    value, error, count = estimator.estimate()
    half_width = goal.half_width(error, count, open_end=num_probes is None)
    costs = counters(op)
    return TraceEstimate(
        value=value,
        standard_error=error,
        num_examples=int(getattr(op, "num_examples", 0)),
        num_products=probes.num_products,
        num_gradients=costs[0] - spent[0],
        num_forwards=costs[1] - spent[1],
        seconds=time.perf_counter() - started,
        num_probes=count,
        converged=num_probes is not None or half_width <= goal.target(value),
        method=estimator.name,
        half_width=half_width,
    )


@dataclass(frozen=True)
class _Goal:
    """When to stop, and how wide a sketch may become."""

    relative_error: float
    absolute_error: float
    confidence: float
    max_products: int
    widest: int

    def target(self, value: float) -> float:
        return max(self.relative_error * abs(value), self.absolute_error)

    def half_width(self, error: float, count: int, *, open_end: bool) -> float:
        """Of the interval; wider by the uncertainty of the spread while sampling may stop early."""
        if count < 2:
            return math.nan
        quantile = float(stats.t.ppf((1 + self.confidence) / 2, count - 1))
        if open_end:
            quantile *= math.sqrt((count - 1) / stats.chi2.ppf(SPREAD_QUANTILE, count - 1))
        return quantile * error

    def probes_for(self, frobenius_squared: float, target: float) -> float:
        """Hutchinson probes for a matrix of that norm, whose diagonal is not known."""
        quantile = float(stats.norm.ppf((1 + self.confidence) / 2))
        return 2 * max(0.0, frobenius_squared) * (quantile / max(target, 1e-300)) ** 2


def _fixed(probes: Probes, goal: _Goal, method: str) -> Estimator:
    """The estimator for a given number of products."""
    if method == "xtrace" and goal.max_products > 1:
        return XTrace(probes)
    if method == "hutch++" and goal.max_products > 2:
        width = max(1, min(goal.max_products // 3, goal.widest))
        _, images = probes.multiplied(width)
        return _Sketch(probes, images).rest()
    return Hutchinson(probes)


def _chosen(probes: Probes, goal: _Goal, method: str) -> Estimator:
    """The estimator that is asked for or predicted to need the fewest products."""
    if method == "hutchinson" or min(goal.widest, goal.max_products) < 2 * PILOT:
        return Hutchinson(probes)
    drawn, images = probes.multiplied(PILOT)
    pilot = Hutchinson(probes)
    pilot.take(drawn, images)
    value, error, count = pilot.estimate()
    target = goal.target(value)
    width = goal.half_width(error, count, open_end=True)
    if method == "auto":
        if width <= target:
            return pilot
        rest = _left_out(images)
        plain = (width / max(target, 1e-300)) ** 2 * PILOT - PILOT
        after = goal.probes_for(rest, target)
        costs = {
            "hutchinson": plain,
            "hutch++": PILOT + max(PILOT, after),
            "xtrace": max(PILOT, 2 * after - PILOT),
        }
        method = min(costs, key=lambda name: costs[name])
        if method == "hutchinson":
            return pilot
    if method == "xtrace":
        estimator = XTrace(probes)
        estimator.take(drawn, images)
        return estimator
    return _Sketch(probes, images).grown(goal, target)


def _left_out(images: Tensor) -> float:
    """Mean squared distance of each image from the span of the others.

    That is what a sketch of one image fewer leaves of the squared Frobenius norm.
    """
    gram = inner(images, images)
    distances = []
    for number in range(len(gram)):
        others = np.delete(np.arange(len(gram)), number)
        along = gram[others, number]
        inverse = np.linalg.pinv(gram[np.ix_(others, others)], rcond=1e-10, hermitian=True)
        distances.append(max(0.0, gram[number, number] - along @ inverse @ along))
    return float(np.mean(distances))


class _Sketch:
    """A basis of the range of some images `H w`, with its products."""

    def __init__(self, probes: Probes, images: Tensor) -> None:
        self._probes = probes
        self._basis = images[:, :0]
        self._products = images[:, :0]
        self._upper = np.zeros((0, 0))
        self.add(images)

    def add(self, images: Tensor) -> None:
        """Puts the images into the basis; one product for each."""
        basis, self._upper = extended([self._basis], self._upper, images)
        self._basis = torch.cat([self._basis, basis], 1)
        self._products = torch.cat([self._products, self._probes.times(basis)], 1)

    def grown(self, goal: _Goal, target: float) -> Hutchinson:
        """The estimator, after widening the sketch while that is predicted to spare products.

        New images, before they are added, are samples of what the sketch leaves of the matrix; the
        last ones, which are not added, are samples of the estimator.
        """
        before = math.inf
        while True:
            if self._probes.num_products + 2 * PILOT > goal.max_products:
                return self.rest()
            drawn, images = self._probes.multiplied(PILOT)
            left = images - self._basis @ (self._basis.T @ images)
            after = goal.probes_for(float(left.double().norm() ** 2) / PILOT, target)
            ratio = after / before if math.isfinite(before) else 0.5
            if after * (1 - ratio) <= PILOT or self._basis.shape[1] + PILOT > goal.widest:
                return self.rest(drawn, images)
            self.add(images)
            before = after

    def rest(self, drawn: Tensor | None = None, images: Tensor | None = None) -> Hutchinson:
        """Exact on the sketch, sampling on its complement; probes with their images are samples."""
        known = float((self._basis.double() * self._products.double()).sum())
        estimator = Hutchinson(self._probes, self._basis, known, "hutch++")
        if drawn is not None and images is not None:
            within = self._basis.T @ drawn
            outside = drawn - self._basis @ within
            estimator.take(outside, images - self._products @ within)
        return estimator


def _deflated(probes: Probes, deflate: Eigenpairs | Tensor) -> Hutchinson:
    if isinstance(deflate, Eigenpairs):
        vectors = deflate.vectors.to(device=probes.op.device, dtype=probes.op.dtype)
        return Hutchinson(probes, vectors, float(deflate.values.sum()), "deflated")
    given = deflate.to(device=probes.op.device, dtype=probes.op.dtype)
    basis, _ = extended([], np.zeros((0, 0)), given)
    known = float((basis.double() * probes.times(basis).double()).sum())
    return Hutchinson(probes, basis, known, "deflated")


def _go_on(estimator: Estimator, probes: Probes, goal: _Goal) -> None:
    """Extends the estimator until the interval is small enough or the budget is spent."""
    paired = isinstance(estimator, XTrace)
    count = PILOT if paired else estimator.estimate()[2]
    if count < 2:
        estimator.extend(min(PILOT, max(1, goal.max_products - probes.num_products)))
    while True:
        value, error, count = estimator.estimate()
        width, target = goal.half_width(error, count, open_end=True), goal.target(value)
        left = goal.max_products - probes.num_products
        if width <= target or left < 1 + paired or not math.isfinite(value):
            return
        # As many as the present spread calls for, at most doubling, so that it settles.
        spent = probes.num_products if paired else count
        wanted = spent * (width / max(target, 1e-300)) ** 2
        estimator.extend(int(min(max(wanted - spent, 4), spent, left)))
