"""The ends of the spectrum, each value with its residual and its estimated error.

Eigenpairs by Lanczos with full re-orthogonalisation (`krylov`), restarted where memory ends. The
start is the gradient with some noise, where the operator has one: gradients lie largely in the
space of the outlying eigenvectors (Gur-Ari et al. 2018), which saves a third of the products.

A Krylov space grown from one vector cannot see the second copy of a multiple eigenvalue, and is
slow to find an eigenvector that the start hardly contains, while its residuals look converged. So a
found set counts only after a fresh random direction, orthogonal to everything so far, has been
followed until it is unlikely that a missed eigenvalue would not have shown (`confirmation`): two to
five products where the wanted values stand out, more where they do not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llp.landscape.confirmation import Confirmation
from llp.landscape.krylov import Array, KrylovBasis, LinearOperator, session

EARLY = 3.0
"""A set is followed up once its errors are within this factor of what is wanted, since the products
in between are of use for both. With 10 the set often moves once more and is followed up twice:
21 instead of 16 products for five values of ResNet-20."""

Which = Literal["magnitude", "largest", "smallest"]


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric operator.

    Attributes:
        values: `[k]` float64 on the CPU, in the order asked for (`magnitude`, `largest`: falling;
            `smallest`: rising).
        vectors: Unit columns `[P, k]` in the operator's dtype and on its device.
        residuals: `|H v - value v|` `[k]`; an eigenvalue lies within this of each value.
        bounds: Estimated error of each value `[k]`, `min(r, r^2 / gap)` with residual r and the gap
            to the other values that were found. Much smaller than the residual, but no proof: the
            gap is an estimate.
        converged: Whether the tolerance was met and the set held while a fresh direction was
            followed.
        num_confirming: Products in which a fresh random direction was followed.
        num_products: Products spent, of which one each for every vector of a warm start.
        num_gradients: Gradients over all data spent, on graphs and on the start.
        num_forwards: Forward passes over all data spent.
        seconds: Wall-clock time.
        confidence: A missed eigenvalue at least as far out as the last value, a further copy of one
            that was found for example, would have shown with this chance. 1 where the
            whole space was seen, 0 where nothing was looked for or the tolerance was not met, NaN
            where it is not known.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bounds: Tensor
    converged: bool
    num_confirming: int
    num_products: int
    num_gradients: int
    num_forwards: int
    seconds: float
    confidence: float = math.nan


def top_eigenpairs(
    op: LinearOperator,
    k: int = 5,
    which: Which = "magnitude",
    tolerance: float = 1e-3,
    *,
    accuracy: Literal["values", "vectors"] = "values",
    start: Tensor | Eigenpairs | None = None,
    generator: torch.Generator | None = None,
    max_products: int | None = None,
    block_size: int | None = None,
    confidence: float = 0.9,
    confirm_products: int = 12,
    max_basis_bytes: int = 2**31,
) -> Eigenpairs:
    """The `k` eigenpairs of `op` at one end of its spectrum, or largest by magnitude.

    A value is accepted when its estimated error is at most `tolerance * |value|`, or rounding error
    (`100 eps |H|`). When `max_products` runs out the best estimates are returned with
    `converged=False` and their true residuals.

    Args:
        op: Symmetric operator, for example `hessian(...)`, or a matrix.
        k: Pairs wanted; no more than P are returned.
        which: `magnitude`, `largest` or `smallest` (both algebraic).
        tolerance: Relative error, > 0.
        accuracy: Of what: `values` stops on the estimated error of the values, `vectors` on the
            residual, which takes some more products.
        start: Vectors to begin with, `[P, m]` or earlier eigenpairs, of an earlier checkpoint for
            example. They go in as a block, with a random vector beside them.
        generator: CPU generator of the random vectors; default: seed 0.
        max_products: Budget of products; default `max(100, 20 k)`.
        block_size: Vectors multiplied at once; default: those of `start`, then one by one, which
            takes the fewest products.
        confidence: Wanted chance c that a missed eigenvalue would have shown, in [0, 1); once one
            has shown, `1 - (1 - c)^2`. 0 trusts the residuals.
        confirm_products: Products spent on it at most; what was reached then is in the result.
        max_basis_bytes: Memory of the basis; beyond it the basis is restarted.

    Raises:
        ValueError: An argument is out of its range.
        FloatingPointError: A product is not finite.

    >>> op = torch.diag(torch.tensor([3.0, -5.0, 1.0, 0.5]))
    >>> top_eigenpairs(op, k=2).values.round(decimals=4)
    tensor([-5.,  3.], dtype=torch.float64)
    """
    if not 0 <= confidence < 1:
        raise ValueError(f"confidence must be at least 0 and below 1, not {confidence:g}")
    if k < 1 or confirm_products < 0 or (block_size is not None and block_size < 1):
        raise ValueError("k and block_size must be at least 1, confirm_products at least 0")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, not {tolerance:g}")
    if which not in ("magnitude", "largest", "smallest"):
        raise ValueError(f"which must be magnitude, largest or smallest, not {which!r}")
    started, spent = time.perf_counter(), counters(op)
    size = int(op.shape[0])
    k = min(k, size)
    given = start.vectors if isinstance(start, Eigenpairs) else start
    if given is not None and (given.ndim != 2 or given.shape[0] != size):
        raise ValueError(f"start must have shape [{size}, m], not {tuple(given.shape)}")
    first = (0 if given is None else given.shape[1] + 1) or block_size or 1
    budget = max(100, 20 * k, 2 * first) if max_products is None else max_products
    room = max_basis_bytes // (torch.finfo(op.dtype).bits // 8 * size)
    most = confirm_products if confidence > 0 else 0
    least = 2 * k + 2 * max(block_size or 1, first) + 4 + most
    capacity = min(size, max(least, min(budget + first + 4, room)))
    basis = KrylovBasis(op, generator or torch.Generator().manual_seed(0), capacity=capacity)
    search = _Search(basis, which, k, tolerance, accuracy, confidence, most)
    with session(op):
        _seed(basis, op, given, block_size or 1)
        width = first
        while basis.num_products < budget and not search.converged:
            full = basis.size >= basis.capacity - width - most and not search.following
            if full and basis.capacity < size:
                basis.compress(order(basis.ritz()[0], which)[: max(k + 2, (capacity - most) // 2)])
            if not basis.waiting and not basis.add_random():
                break
            several = 1 if search.following else width
            basis.advance(min(several, budget - basis.num_products))
            width = block_size or 1
            search.look()
    values, coordinates, residuals = basis.ritz()
    chosen = order(values, which)[:k]
    costs = counters(op)
    return Eigenpairs(
        values=torch.from_numpy(values[chosen]),
        vectors=basis.vectors(coordinates[:, chosen]),
        residuals=torch.from_numpy(residuals[chosen]),
        bounds=torch.from_numpy(error_bounds(values, residuals)[chosen]),
        converged=search.converged,
        confidence=search.confidence if search.converged else 0.0,
        num_confirming=search.num_confirming,
        num_products=basis.num_products,
        num_gradients=costs[0] - spent[0],
        num_forwards=costs[1] - spent[1],
        seconds=time.perf_counter() - started,
    )


def error_bounds(values: Array, residuals: Array) -> Array:
    """Estimated errors `min(r, r^2 / gap)` of Ritz values (Parlett 1998, theorem 11.7.1).

    The gap is the distance to the nearest other value less that one's residual, so it is 0, and the
    bound the residual, where a neighbour could be the same eigenvalue.
    """
    if len(values) < 2:
        return residuals
    distances = np.abs(values[:, None] - values[None, :]) - residuals[None, :]
    np.fill_diagonal(distances, np.inf)
    gaps = np.maximum(distances.min(axis=1), 1e-300)
    bounds: Array = np.minimum(residuals, residuals**2 / gaps)
    return bounds


def order(values: Array, which: Which) -> Array:
    """The places of the values, the most wanted first."""
    if which == "magnitude":
        return np.argsort(-np.abs(values), kind="stable")
    return np.argsort(values if which == "smallest" else -values, kind="stable")


def counters(op: LinearOperator) -> tuple[int, int]:
    """Gradients and forward passes an operator has spent; zeros for a matrix."""
    return int(getattr(op, "num_gradients", 0)), int(getattr(op, "num_forwards", 0))


def _seed(basis: KrylovBasis, op: LinearOperator, given: Tensor | None, width: int) -> None:
    if given is not None:
        for vector in given.T:
            basis.add(vector)
        basis.add_random()
        return
    hint: Callable[[], Tensor | None] | None = getattr(op, "hint", None)
    found = hint() if hint is not None else None
    if found is not None and bool(torch.isfinite(found).all()) and float(found.norm()) > 0:
        basis.add_random(mixed_with=found)
        width -= 1
    for _ in range(width):
        basis.add_random()


class _Search:
    """What is wanted of a basis, whether it is there, and what to look at next."""

    def __init__(
        self,
        basis: KrylovBasis,
        which: Which,
        k: int,
        tolerance: float,
        accuracy: str,
        confidence: float,
        most: int,
    ) -> None:
        self._basis = basis
        self._which = which
        self._k = k
        self._tolerance = tolerance
        self._accuracy = accuracy
        self._chance = 1 - confidence
        self._chance_of_more = self._chance**2
        self._most = most
        self._found: tuple[Array, Array] | None = None
        self._chain: Confirmation | None = None
        self.following = False
        self.converged = False
        self.num_confirming = 0
        self.confidence = 0.0

    def look(self) -> None:
        """Judges the basis after some products, and orders what waits."""
        basis = self._basis
        if self.following and self._chain is not None:
            self._chain.note()
        values, coordinates, residuals = basis.ritz()
        if len(values) < self._k:
            return
        places = order(values, self._which)
        chosen = places[: self._k]
        proven = self._accuracy == "vectors" or len(values) == self._k
        errors = residuals if proven else error_bounds(values, residuals)
        floor = 100 * torch.finfo(basis.rows.dtype).eps * basis.scale
        limits = np.maximum(self._tolerance * np.abs(values[chosen]), floor)
        open_pairs = chosen[errors[chosen] > limits]
        if basis.size == basis.rows.shape[1] and not basis.waiting:
            self.converged = not len(open_pairs)
            self.confidence = 1.0
            return
        near = bool((errors[chosen] <= EARLY * limits).all())
        if self._most and self._moved(values[chosen]):
            self._found, self.following = None, False
            self._chance = self._chance_of_more
        if self._most and near and self._found is None:
            basis.mark()  # a copy may have grown from rounding errors in what waits
            self._chain = Confirmation(basis)
            self._found = (values[chosen], 2 * limits + errors[chosen])
            self.following = self._chain.started
            if self.following:
                return
        if self.following and self._chain is not None:
            self.confidence = 1 - self._hidden(values[chosen[-1]])
            done = self._chain.broken or self._chain.num_products >= self._most
            if not done and 1 - self.confidence > self._chance:
                return
            self.following = False
            self.num_confirming = self._chain.num_products
        if not len(open_pairs):
            open_pairs = self._rivals(values, residuals, places, limits[-1])
        if len(open_pairs):
            basis.focus(coordinates[:, open_pairs])
        elif not (self._most and basis.take_marked()):
            if self._chain is not None:
                self.confidence = 1 - self._hidden(values[chosen[-1]])
            self.converged = True

    def _moved(self, values: Array) -> bool:
        """Whether the set is another one than when it was followed up."""
        return self._found is not None and bool(
            (np.abs(values - self._found[0]) > self._found[1]).any()
        )

    def _hidden(self, value: float) -> float:
        """The chance with which an eigenvalue of that size would have stayed hidden."""
        assert self._chain is not None
        if self._which == "magnitude":
            return max(self._chain.chance(abs(value)), self._chain.chance(-abs(value)))
        return self._chain.chance(value)

    def _rivals(self, values: Array, residuals: Array, places: Array, limit: float) -> Array:
        """The best pair that was not chosen, where it may yet overtake one that was."""
        if len(places) == self._k:
            return places[:0]
        last, rival = places[self._k - 1], places[self._k]
        reach = residuals[rival] - limit
        if self._which == "magnitude":
            overtakes = abs(values[rival]) + reach > abs(values[last])
        elif self._which == "largest":
            overtakes = values[rival] + reach > values[last]
        else:
            overtakes = values[rival] - reach < values[last]
        return places[self._k : self._k + 1] if overtakes else places[:0]
