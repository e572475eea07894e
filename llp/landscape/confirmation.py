"""Whether an eigenvalue was missed: a random direction is followed outside everything found.

A Krylov space grown from one vector holds one copy of a multiple eigenvalue and may hardly hold an
eigenvector that its start hardly contains, while its residuals look converged. So a fresh random
direction f, orthogonal to the basis Q, is followed by Lanczos with `A = (I - QQ') H (I - QQ')`.

What that shows can be said in numbers. An eigenvector u of H with value x that is orthogonal to Q
is one of A too, and every polynomial p has `(u.f) p(x) = u.p(A)f`, so
`(u.f)^2 <= 1 / S(x)`, `S(x) = sum_j p_j(x)^2`, over the orthonormal polynomials of the chain (the
Christoffel function; Szego 1939, theorem 3.41.1). But `(u.f)^2` is beta(1/2, (N - 1)/2) distributed
for a random direction in N dimensions. The chance of a draw below `1 / S(x)` is therefore the
chance with which an eigenvalue x could have stayed hidden; it falls by a constant factor with every
product as long as nothing is there, and stops to fall where something is.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from llp.landscape.krylov import KrylovBasis


class Confirmation:
    """A chain from a fresh random direction; `note` after each product of the basis.

    Attributes:
        started: Whether there was room for a direction.
        broken: Whether the chain has exhausted its space.
    """

    def __init__(self, basis: KrylovBasis) -> None:
        self._basis = basis
        self._dimensions = int(basis.rows.shape[1]) - basis.size
        self.started = basis.add_random()
        self.broken = not self.started
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        if self.started:
            basis.waiting.rotate(1)
            self._newest = basis.waiting[0]

    @property
    def num_products(self) -> int:
        """Products of the chain."""
        return len(self._diagonal)

    def note(self) -> None:
        """Takes in what the basis did with the chain's newest vector."""
        if self.broken:
            return
        basis, newest = self._basis, self._newest
        self._diagonal.append(basis.coefficient(newest, newest))
        following = basis.size - 1
        if following != newest and basis.waiting and basis.waiting[0] == following:
            self._beside.append(basis.coefficient(following, newest))
            self._newest = following
        else:
            self._beside.append(0.0)
            self.broken = True

    def chance(self, value: float) -> float:
        """The chance that an eigenvalue `value` outside the basis would not have shown so far."""
        if self._dimensions < 2 or not self._diagonal:
            return 0.0 if self._diagonal else 1.0
        floor = 1e-300 + np.finfo(np.float64).eps * max(1e-30, abs(value))
        before, here, total = 0.0, 1.0, 1.0
        for number, (along, beside) in enumerate(zip(self._diagonal, self._beside, strict=True)):
            last = self._beside[number - 1] if number else 0.0
            before, here = here, ((value - along) * here - last * before) / max(beside, floor)
            total += here**2
            if total > 1e200:
                break
        share = 1.0 / total
        return float(stats.beta.cdf(share, 0.5, (self._dimensions - 1) / 2))
