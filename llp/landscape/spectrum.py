"""The ends of the Hessian's spectrum, each value with its residual, and its trace with its error.

Eigenpairs by Lanczos with full re-orthogonalisation (`krylov`). A Krylov space grown from one
vector cannot see the second copy of a multiple eigenvalue and is slow to part a near-degenerate
pair, while its residuals look converged; so a found set counts only after a fresh random direction,
orthogonal to everything so far, has been followed for some products without changing it.
The trace by Hutchinson's estimator (1990), stopped by a confidence interval.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from llp.landscape.krylov import KrylovBasis, LinearOperator
from llp.landscape.passes import Estimate

Which = Literal["magnitude", "largest", "smallest"]


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric operator.

    Attributes:
        values: `[k]` float64 on the CPU, in the order asked for (`magnitude`, `largest`: falling;
            `smallest`: rising).
        vectors: Unit columns `[P, k]` in the operator's dtype and on its device.
        residuals: `|H v - value v|` `[k]`; an eigenvalue lies within this of each value.
        converged: Whether every residual met the tolerance and the confirmation was passed.
        num_products: Hessian-vector products spent.
        seconds: Wall-clock time.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    num_products: int
    seconds: float


@dataclass(frozen=True)
class TraceEstimate(Estimate):
    """An estimated trace; its standard error is over probe vectors.

    Attributes:
        num_probes: Probe vectors used, one product each.
        converged: Whether the asked relative error was met; True when none was asked.
    """

    num_probes: int = 0
    converged: bool = True


def top_eigenpairs(
    op: LinearOperator,
    k: int = 5,
    which: Which = "magnitude",
    tolerance: float = 1e-3,
    *,
    generator: torch.Generator | None = None,
    max_products: int | None = None,
    block_size: int = 1,
    confirm_products: int = 6,
    max_basis_bytes: int = 2**31,
) -> Eigenpairs:
    """The `k` eigenpairs of `op` at one end of its spectrum, or largest by magnitude.

    A value is accepted when `|H v - value v| <= tolerance * |value|`, or when the residual is
    rounding error (`100 eps |H|`). When `max_products` runs out the best estimates are returned
    with `converged=False` and their true residuals.

    Args:
        op: Symmetric operator, for example `hessian(...)`.
        k: Pairs wanted; no more than P are returned.
        which: `magnitude`, `largest` or `smallest` (both algebraic).
        tolerance: Relative residual, > 0.
        generator: CPU generator of the starting vectors; default: seed 0.
        max_products: Budget of products; default `max(100, 20 k)`.
        block_size: Starting vectors, and products made at once.
        confirm_products: Products spent on looking for a missed copy; 0 trusts the residuals.
        max_basis_bytes: Memory of the basis; beyond it the basis is restarted.

    Raises:
        ValueError: An argument is out of its range.
        FloatingPointError: A product is not finite.

    >>> op = torch.diag(torch.tensor([3.0, -5.0, 1.0, 0.5]))
    >>> top_eigenpairs(op, k=2).values.round(decimals=4)
    tensor([-5.,  3.], dtype=torch.float64)
    """
    if k < 1 or block_size < 1 or confirm_products < 0:
        raise ValueError("k and block_size must be at least 1, confirm_products at least 0")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, not {tolerance:g}")
    if which not in ("magnitude", "largest", "smallest"):
        raise ValueError(f"which must be magnitude, largest or smallest, not {which!r}")
    started = time.perf_counter()
    size = op.shape[0]
    k = min(k, size)
    budget = max(100, 20 * k) if max_products is None else max_products
    element = torch.finfo(op.dtype).bits // 8
    smallest_basis = 2 * k + 2 * block_size + 4
    capacity = min(
        size, max(smallest_basis, min(budget + block_size + 4, max_basis_bytes // (element * size)))
    )
    basis = KrylovBasis(op, generator or torch.Generator().manual_seed(0), capacity=capacity)
    for _ in range(block_size):
        basis.add_random()
    found: _Found | None = None
    converged = False
    with _session(op):
        while basis.num_products < budget:
            basis.advance(min(block_size, budget - basis.num_products))
            values, coordinates, residuals = basis.ritz()
            if len(values) >= k:
                chosen = _order(values, which)[:k]
                floor = 100 * torch.finfo(op.dtype).eps * basis.scale
                limits = np.maximum(tolerance * np.abs(values[chosen]), floor)
                open_pairs = chosen[residuals[chosen] > limits]
                settled = not len(open_pairs)
                complete = basis.size == size and not basis.waiting
                if settled and (complete or confirm_products == 0):
                    converged = True
                    break
                if settled and found is not None and found.agrees(values[chosen], limits):
                    left = confirm_products - (basis.num_products - found.num_products)
                    if left <= 0 and not found.unseen:
                        converged = True
                        break
                    if left <= found.unseen > 0:  # what waited when the search was forked
                        basis.waiting.rotate(1)
                        found.unseen -= 1
                elif settled:
                    basis.fork()
                    found = _Found(values[chosen], basis.num_products, len(basis.waiting) - 1)
                else:  # what was found has moved: finish it, then confirm again
                    found = None
                    basis.focus(coordinates[:, open_pairs])
            if basis.size >= basis.capacity - block_size and basis.capacity < size:
                basis.compress(_order(basis.ritz()[0], which)[: max(k + 2, capacity // 2)])
            if not basis.waiting and not basis.add_random():
                break
    values, coordinates, residuals = basis.ritz()
    chosen = _order(values, which)[:k]
    return Eigenpairs(
        values=torch.from_numpy(values[chosen]),
        vectors=basis.vectors(coordinates[:, chosen]),
        residuals=torch.from_numpy(residuals[chosen]),
        converged=converged,
        num_products=basis.num_products,
        seconds=time.perf_counter() - started,
    )


def trace(
    op: LinearOperator,
    relative_error: float | None = 0.01,
    *,
    num_probes: int | None = None,
    max_probes: int = 1000,
    generator: torch.Generator | None = None,
    level: float = 0.95,
) -> TraceEstimate:
    """The trace of `op` by Hutchinson's estimator with Rademacher probes `v`: mean of `v' H v`.

    Unbiased, with variance `2 (|H|_F^2 - sum H_ii^2)` per probe: exact for a diagonal operator.
    Without `num_probes` it stops when the half-width of the confidence interval (Student's t at
    `level`) is at most `relative_error` times the estimate, after at least 8 probes.

    Args:
        op: Square operator.
        relative_error: Wanted half-width over |trace|; ignored when `num_probes` is given.
        num_probes: Use exactly this many probes, at least 1.
        max_probes: Stop here at the latest.
        generator: CPU generator of the probes; default: seed 0.
        level: Confidence of the interval.

    Raises:
        ValueError: An argument is out of its range.

    >>> trace(torch.diag(torch.tensor([3.0, -5.0, 1.0])), num_probes=2).value
    -1.0
    """
    if num_probes is None and (relative_error is None or not relative_error > 0):
        raise ValueError("give num_probes, or a relative_error above 0")
    if (num_probes is not None and num_probes < 1) or max_probes < 1:
        raise ValueError("num_probes and max_probes must be at least 1")
    started = time.perf_counter()
    generator = generator or torch.Generator().manual_seed(0)
    samples: list[float] = []
    wanted = num_probes if num_probes is not None else min(8, max_probes)
    converged = True
    with _session(op):
        while True:
            while len(samples) < wanted:
                samples += _probe(op, min(8, wanted - len(samples)), generator)
            value = float(np.mean(samples))
            count = len(samples)
            error = float(np.std(samples, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
            if num_probes is not None or relative_error is None:
                break
            half_width = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
            converged = half_width <= relative_error * abs(value)
            if converged or count >= max_probes or not math.isfinite(value):
                break
            # As many as the present spread calls for, at most doubling, so that it settles.
            needed = count * (half_width / max(relative_error * abs(value), 1e-300)) ** 2
            wanted = min(max_probes, int(min(max(needed, count + 4), 2 * count)))
    return TraceEstimate(
        value=value,
        standard_error=error,
        num_examples=int(getattr(op, "num_examples", 0)),
        num_products=len(samples),
        seconds=time.perf_counter() - started,
        num_probes=len(samples),
        converged=converged,
    )


@dataclass
class _Found:
    """A converged set that waits for its confirmation, and directions still to be looked at."""

    values: np.ndarray[Any, Any]
    num_products: int
    unseen: int

    def agrees(self, values: np.ndarray[Any, Any], limits: np.ndarray[Any, Any]) -> bool:
        return bool((np.abs(values - self.values) <= 2 * limits).all())


def _order(values: np.ndarray[Any, Any], which: Which) -> np.ndarray[Any, Any]:
    if which == "magnitude":
        return np.argsort(-np.abs(values), kind="stable")
    return np.argsort(values if which == "smallest" else -values, kind="stable")


def _probe(op: LinearOperator, count: int, generator: torch.Generator) -> list[float]:
    signs = torch.randint(0, 2, (count, op.shape[0]), generator=generator, dtype=torch.int8)
    probes = (2 * signs - 1).to(device=op.device, dtype=op.dtype).T
    products = op @ probes
    return [float(x) for x in (probes.double() * products.double()).sum(0).cpu()]


@contextlib.contextmanager
def _session(op: LinearOperator) -> Iterator[None]:
    """One evaluation state around many products, for operators that have such a thing."""
    session = getattr(op, "session", None)
    with session() if session is not None else contextlib.nullcontext():
        yield
