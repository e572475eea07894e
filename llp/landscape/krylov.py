"""A Krylov basis that may be fed several starting vectors, and its Rayleigh-Ritz values.

Every product `H q_j` is split exactly into the basis and one new direction (Gram-Schmidt in two
passes, a third where even more cancels). The coefficients are kept in float64, so the residual of a
Ritz pair is known without another product:
`|H x - theta x| = |C y - theta y|` with `x = Q y` and `H Q = Q C` (Saad 2011, section 6.3).
Basis vectors whose product is not computed yet wait in a queue; a full basis is compressed to its
best Ritz vectors (thick restart, Wu and Simon 2000).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

SLICE_ENTRIES = 2**24
"""Entries of a vector that are mixed at once where a basis is overwritten in place."""


class LinearOperator(Protocol):
    """A symmetric operator on flat vectors; what `hessian` returns is one, and so is a matrix."""

    @property
    def shape(self) -> Any:
        """`(P, P)`."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its products."""
        ...

    @property
    def device(self) -> torch.device:
        """Of its products."""
        ...

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with `[P]` or `[P, K]`."""
        ...


@contextlib.contextmanager
def session(op: LinearOperator) -> Iterator[None]:
    """One evaluation state around many products, for operators that have such a thing."""
    own = getattr(op, "session", None)
    with own() if own is not None else contextlib.nullcontext():
        yield


class KrylovBasis:
    """An orthonormal basis (rows of `[capacity, P]`) with the coefficients of its products.

    Attributes:
        size: Basis vectors so far.
        num_products: Products so far.
        waiting: Indices whose product is not computed yet; the left end goes first. What a product
            adds goes there too, so a chain is followed until another is put in front of it.
        marked: Indices that waited when `mark` was called; those still waiting are to be seen.
    """

    def __init__(self, op: LinearOperator, generator: torch.Generator, *, capacity: int) -> None:
        self._op = op
        self._generator = generator
        self._rows = torch.empty(capacity, op.shape[0], dtype=op.dtype, device=op.device)
        self._coefficients = np.zeros((capacity, capacity))
        self._done: list[int] = []
        self._epsilon = torch.finfo(op.dtype).eps
        self.capacity = capacity
        self.size = 0
        self.num_products = 0
        self.waiting: deque[int] = deque()
        self.marked: set[int] = set()

    @property
    def scale(self) -> float:
        """Largest coefficient so far, a lower bound of the norm of H."""
        return float(np.abs(self._coefficients[: self.size, : self.size]).max(initial=0.0))

    @property
    def rows(self) -> Tensor:
        """The basis `[size, P]`."""
        return self._rows[: self.size]

    def add(self, vector: Tensor) -> bool:
        """Adds the part of `vector` outside the basis at the end of the queue, if there is any."""
        if self._full():
            return False
        remainder, _, before, after = self._split(vector.to(self._rows))
        return self._append(remainder, after, before, first=False)

    def add_random(self, mixed_with: Tensor | None = None) -> bool:
        """Adds a Gaussian direction at the end of the queue; False when there is no room for one.

        There is none when the basis spans the whole space or its storage is full. A direction that
        is to be mixed in gets the same length as the random one.
        """
        for _ in range(3):
            vector = torch.randn(
                self._op.shape[0], generator=self._generator, dtype=torch.float64
            ).to(self._rows)
            if mixed_with is not None:
                vector += mixed_with * (vector.norm() / mixed_with.norm())
            if self.add(vector):
                return True
            if self._full():
                return False
        return False

    def mark(self) -> None:
        """Remembers what waits now."""
        self.marked = set(self.waiting)

    def take_marked(self) -> bool:
        """Puts the longest waiting marked vector first; False when none is left."""
        for index in self.waiting:
            if index in self.marked:
                self.waiting.remove(index)
                self.waiting.appendleft(index)
                return True
        return False

    def coefficient(self, row: int, column: int) -> float:
        """`q_row . H q_column`."""
        return float(self._coefficients[row, column])

    def advance(self, count: int) -> None:
        """Computes the products of the next `count` waiting vectors and adds what they span.

        Raises:
            FloatingPointError: A product is not finite.
        """
        chosen = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        if len(chosen) == 1:
            products = (self._op @ self._rows[chosen[0]])[None]
        else:
            products = (self._op @ self._rows[chosen].T).T
        self.num_products += len(chosen)
        added = []
        for index, product in zip(chosen, products, strict=True):
            remainder, coefficients, before, after = self._split(product)
            if not np.isfinite(before):
                raise FloatingPointError("a Hessian product is not finite")
            self._coefficients[: self.size, index] = coefficients
            self._done.append(index)
            if self._append(remainder, after, max(before, self.scale), first=True):
                self._coefficients[self.size - 1, index] = after
                added.append(self.waiting.popleft())
        self.waiting.extendleft(reversed(added))

    def ritz(self) -> tuple[Array, Array, Array]:
        """Ritz values `[m]` ascending, coordinates `[m, m]`, residual norms `[m]` (float64)."""
        columns = self._coefficients[: self.size][:, self._done]
        square = columns[self._done]
        values, coordinates = np.linalg.eigh((square + square.T) / 2)
        remainder = columns @ coordinates
        remainder[self._done] -= coordinates * values
        return values, coordinates, np.linalg.norm(remainder, axis=0)

    def focus(self, coordinates: Array) -> None:
        """Puts the waiting vectors first on which the residuals of these pairs depend most."""
        waiting = list(self.waiting)
        links = self._coefficients[np.ix_(waiting, self._done)] @ coordinates
        order = np.argsort(-np.linalg.norm(links, axis=1), kind="stable")
        self.waiting = deque(waiting[i] for i in order)

    def vectors(self, coordinates: Array) -> Tensor:
        """Unit vectors `[P, k]` from coordinates `[m, k]`."""
        mixing = torch.from_numpy(np.ascontiguousarray(coordinates.T)).to(self._rows)
        rows = torch.zeros(len(mixing), self._op.shape[0], dtype=mixing.dtype, device=mixing.device)
        for place, index in enumerate(self._done):  # no copy of the basis
            rows.addr_(mixing[:, place], self._rows[index])
        rows /= rows.norm(dim=1, keepdim=True)
        return rows.T

    def compress(self, chosen: Array) -> None:
        """Keeps the Ritz pairs `chosen` (indices into `ritz`) and the waiting directions."""
        values, coordinates, _ = self.ritz()
        kept = coordinates[:, chosen]
        waiting = list(self.waiting)
        links = self._coefficients[np.ix_(waiting, self._done)] @ kept
        mixing = np.zeros((len(chosen) + len(waiting), self.size))
        mixing[: len(chosen), self._done] = kept.T
        mixing[np.arange(len(chosen), len(mixing)), waiting] = 1.0
        matrix = torch.from_numpy(mixing).to(self._rows)
        step = max(1, SLICE_ENTRIES // self.size)
        for start in range(0, self._op.shape[0], step):
            part = self._rows[: self.size, start : start + step]
            self._rows[: len(mixing), start : start + step] = matrix @ part
        count, self.size = len(chosen), len(mixing)
        self._rows[:count] /= self._rows[:count].norm(dim=1, keepdim=True)
        self._coefficients[:] = 0.0
        self._coefficients[np.arange(count), np.arange(count)] = values[chosen]
        self._coefficients[count : self.size, :count] = links
        self._done = list(range(count))
        self.waiting = deque(range(count, self.size))
        self.marked = {count + i for i, old in enumerate(waiting) if old in self.marked}

    def _full(self) -> bool:
        return self.size >= min(self.capacity, int(self._op.shape[0]))

    def _split(self, vector: Tensor) -> tuple[Tensor, Array, float, float]:
        """The part of `vector` outside the basis, its coefficients, its norm before and after."""
        remainder = vector.clone()
        if not self.size:
            norm = float(remainder.norm())
            return remainder, np.zeros(0), norm, norm
        basis = self.rows
        norms = [remainder.norm()]
        total = torch.zeros(self.size, dtype=torch.float64, device=remainder.device)
        for _ in range(2):
            part = basis @ remainder
            remainder -= basis.T @ part
            total += part
            norms.append(remainder.norm())
        read = torch.cat([total, torch.stack(norms).double()]).cpu().numpy()  # one wait per vector
        coefficients, (before, once, twice) = read[: self.size], read[self.size :]
        for _ in range(2):
            if not twice <= 0.5 * once:
                break
            part = basis @ remainder
            remainder -= basis.T @ part
            coefficients = coefficients + part.double().cpu().numpy()
            once, twice = twice, float(remainder.norm())
        return remainder, coefficients, float(before), float(twice)

    def _append(self, remainder: Tensor, norm: float, reference: float, *, first: bool) -> bool:
        """Appends the direction unless it is rounding error of a vector of norm `reference`."""
        if norm <= 20 * self._epsilon * reference or not np.isfinite(norm) or self._full():
            return False
        self._rows[self.size] = remainder / norm
        if first:
            self.waiting.appendleft(self.size)
        else:
            self.waiting.append(self.size)
        self.size += 1
        return True
