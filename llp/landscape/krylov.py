"""A Krylov basis that may be fed several starting vectors, and its Rayleigh-Ritz values.

Every product `H q_j` is split exactly into the basis and one new direction (Gram-Schmidt, repeated
until nothing cancels: two passes in practice). The coefficients are kept in float64, so the
residual of a Ritz pair is known without another product:
`|H x - theta x| = |C y - theta y|` with `x = Q y` and `H Q = Q C` (Saad 2011, section 6.3).
Basis vectors whose product is not computed yet wait in a queue; a full basis is compressed to its
best Ritz vectors (thick restart, Wu and Simon 2000).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class LinearOperator(Protocol):
    """A symmetric operator on flat vectors; `Hessian` is one."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with `[P]` or `[P, K]`."""
        ...


class KrylovBasis:
    """An orthonormal basis (rows of `[capacity, P]`) with the coefficients of its products.

    Attributes:
        size: Basis vectors so far.
        num_products: Products so far.
        waiting: Indices whose product is not computed yet; the left end goes first. What a product
            adds goes there too, so a chain is followed until another is put in front of it.
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

    @property
    def scale(self) -> float:
        """Largest coefficient so far, a lower bound of the norm of H."""
        return float(np.abs(self._coefficients[: self.size, : self.size]).max(initial=0.0))

    def add_random(self) -> bool:
        """Adds a Gaussian direction at the end of the queue; False when there is no room for one.

        There is none when the basis spans the whole space or its storage is full.
        """
        for _ in range(3):
            if self.size >= min(self.capacity, self._op.shape[0]):
                return False
            vector = torch.randn(
                self._op.shape[0], generator=self._generator, dtype=torch.float64
            ).to(self._rows)
            remainder, _ = self._split(vector)
            if self._append(remainder, float(vector.norm()), first=False):
                return True
        return False

    def fork(self) -> None:
        """Mixes a random direction into the vector at the front of the queue.

        The front `t` and a new direction `f` become `.8 t + .6 f` at the front and `.6 t - .8 f` at
        the end. `f` alone in front would not do: rounding errors may have grown the missed copy of
        an eigenvector inside `t`, and everything in front is orthogonal to what waits behind.
        """
        if not self.add_random() or len(self.waiting) < 2:
            return
        front, back = self.waiting[0], self.waiting[-1]
        tail, fresh = self._rows[front].clone(), self._rows[back].clone()
        self._rows[front], self._rows[back] = 0.8 * tail + 0.6 * fresh, 0.6 * tail - 0.8 * fresh
        links = self._coefficients[front].copy()
        self._coefficients[front], self._coefficients[back] = 0.8 * links, 0.6 * links

    def advance(self, count: int) -> None:
        """Computes the products of the next `count` waiting vectors and adds what they span.

        Raises:
            FloatingPointError: A product is not finite.
        """
        chosen = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        block = self._rows[chosen]
        products = (self._op @ block[0])[None] if len(chosen) == 1 else (self._op @ block.T).T
        self.num_products += len(chosen)
        for index, product in zip(chosen, products, strict=True):
            if not bool(torch.isfinite(product).all()):
                raise FloatingPointError("a Hessian product is not finite")
            remainder, coefficients = self._split(product)
            self._coefficients[: self.size, index] = coefficients
            self._done.append(index)
            norm = float(remainder.norm())
            if self._append(remainder, max(float(product.norm()), self.scale), first=True):
                self._coefficients[self.size - 1, index] = norm

    def ritz(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Ritz values `[m]` ascending, coordinates `[m, m]`, residual norms `[m]` (float64)."""
        columns = self._coefficients[: self.size][:, self._done]
        square = columns[self._done]
        values, coordinates = np.linalg.eigh((square + square.T) / 2)
        remainder = columns @ coordinates
        remainder[self._done] -= coordinates * values
        return values, coordinates, np.linalg.norm(remainder, axis=0)

    def focus(self, coordinates: np.ndarray[Any, Any]) -> None:
        """Puts the waiting vectors first on which the residuals of these pairs depend most."""
        waiting = list(self.waiting)
        links = self._coefficients[np.ix_(waiting, self._done)] @ coordinates
        order = np.argsort(-np.linalg.norm(links, axis=1), kind="stable")
        self.waiting = deque(waiting[i] for i in order)

    def vectors(self, coordinates: np.ndarray[Any, Any]) -> Tensor:
        """Unit vectors `[P, k]` from coordinates `[m, k]`."""
        mixing = torch.from_numpy(np.ascontiguousarray(coordinates)).to(self._rows)
        vectors: Tensor = self._rows[self._done].T @ mixing
        norms: Tensor = vectors.norm(dim=0)
        return vectors / norms

    def compress(self, chosen: np.ndarray[Any, Any]) -> None:
        """Keeps the Ritz pairs `chosen` (indices into `ritz`) and the waiting directions."""
        values, coordinates, _ = self.ritz()
        kept = coordinates[:, chosen]
        waiting = list(self.waiting)
        rows = torch.cat([self.vectors(kept).T, self._rows[waiting]])
        links = self._coefficients[np.ix_(waiting, self._done)] @ kept
        count = len(chosen)
        self.size = len(rows)
        self._rows[: self.size] = rows
        self._coefficients[:] = 0.0
        self._coefficients[np.arange(count), np.arange(count)] = values[chosen]
        self._coefficients[count : self.size, :count] = links
        self._done = list(range(count))
        self.waiting = deque(range(count, self.size))

    def _split(self, vector: Tensor) -> tuple[Tensor, np.ndarray[Any, Any]]:
        """The part of `vector` outside the basis, and its coefficients in the basis."""
        basis: Tensor = self._rows[: self.size]
        remainder = vector.clone()
        coefficients = np.zeros(self.size)
        before = float(remainder.norm())
        for passes in range(4):
            if not self.size:
                break
            part = basis @ remainder
            remainder -= basis.T @ part
            coefficients += part.double().cpu().numpy()
            after = float(remainder.norm())
            if passes and after > 0.5 * before:
                break
            before = after
        return remainder, coefficients

    def _append(self, remainder: Tensor, reference: float, *, first: bool) -> bool:
        """Appends the direction unless it is rounding error of a vector of norm `reference`."""
        norm = float(remainder.norm())
        if (
            norm <= 20 * self._epsilon * reference
            or not np.isfinite(norm)
            or self.size >= min(self.capacity, self._op.shape[0])
        ):
            return False
        self._rows[self.size] = remainder / norm
        queue: Callable[[int], None] = self.waiting.appendleft if first else self.waiting.append
        queue(self.size)
        self.size += 1
        return True
