"""Ritz pairs of several Krylov spaces put together, without a new product.

Each space gives its outer Ritz vectors with their products. Rayleigh-Ritz on all of them finds
every copy of a multiple eigenvalue that the spaces see from different sides, and true residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llp.landscape.density import SpectralDensity
from llp.landscape.krylov import Array
from llp.landscape.spectrum import Eigenpairs, error_bounds, order


@dataclass(frozen=True)
class End:
    """An extreme eigenvalue with its residual `|H v - value v|` and its unit vector v `[P]`."""

    value: float
    residual: float
    vector: Tensor


class Pool:
    """The outer Ritz pairs of all chains so far, with their products, as one orthonormal set."""

    def __init__(self, k: int) -> None:
        self._k = k
        self.values: Array = np.zeros(0)
        self.residuals: Array = np.zeros(0)
        self.vectors: Tensor | None = None
        self._images: Tensor | None = None

    def wanted(self, nodes: Array) -> Array:
        """The places of the largest by magnitude, and of a few at both ends."""
        count = len(nodes)
        ends = [*range(min(2, count)), *range(max(0, count - 2), count)]
        return np.unique([*order(nodes, "magnitude")[: self._k + 2], *ends])

    def add(self, vectors: Tensor, images: Tensor) -> None:
        """Rayleigh-Ritz on what is there and these rows `[m, P]` with their products."""
        if self.vectors is not None and self._images is not None:
            vectors = torch.cat([self.vectors, vectors])
            images = torch.cat([self._images, images])
        gram, core = _gram(vectors, vectors), _gram(vectors, images)
        lengths, directions = np.linalg.eigh(gram)
        epsilon = torch.finfo(vectors.dtype).eps
        kept = lengths > 10 * epsilon * lengths[-1]  # closer than that it is rounding error
        white = directions[:, kept] / np.sqrt(lengths[kept])
        values, rotation = np.linalg.eigh(white.T @ ((core + core.T) / 2) @ white)
        places = self.wanted(values)
        mixing = torch.from_numpy(np.ascontiguousarray((white @ rotation[:, places]).T))
        mixing = mixing.to(vectors)
        self.vectors, self._images = mixing @ vectors, mixing @ images
        self.values = values[places]
        limit = torch.from_numpy(self.values).to(vectors)[:, None]
        self.residuals = (self._images - limit * self.vectors).double().norm(dim=1).cpu().numpy()

    def eigenpairs(self, density: SpectralDensity, tolerance: float, confirming: int) -> Eigenpairs:
        """The k largest by magnitude."""
        assert self.vectors is not None
        chosen = order(self.values, "magnitude")[: self._k]
        bounds = error_bounds(self.values, self.residuals)[chosen]
        values = self.values[chosen]
        floor = 100 * torch.finfo(self.vectors.dtype).eps * np.abs(self.values).max()
        limits = np.maximum(tolerance * np.abs(values), floor)
        return Eigenpairs(
            values=torch.from_numpy(values),
            vectors=self.vectors[torch.from_numpy(chosen.copy())].T,
            residuals=torch.from_numpy(self.residuals[chosen]),
            bounds=torch.from_numpy(bounds),
            converged=bool((bounds <= limits).all()),
            num_confirming=confirming,
            num_products=density.num_products,
            num_gradients=density.num_gradients,
            num_forwards=density.num_forwards,
            seconds=density.seconds,
        )

    def end(self, place: int) -> End:
        """The smallest (0) or the largest (-1)."""
        assert self.vectors is not None
        vector = self.vectors[place].clone()
        return End(float(self.values[place]), float(self.residuals[place]), vector)


def _gram(first: Tensor, second: Tensor) -> Array:
    """`first second'` of rows in float64, slice by slice."""
    total = np.zeros((len(first), len(second)))
    step = max(1, 2**24 // (len(first) + len(second)))
    for start in range(0, first.shape[1], step):
        part = slice(start, start + step)
        total += (first[:, part].double() @ second[:, part].double().T).cpu().numpy()
    return total
