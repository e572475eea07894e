"""Several Lanczos chains that advance together, one block product per step.

Each chain starts from its own vector and keeps its own basis, re-orthogonalised in full and in two
passes, so that an isolated eigenvalue appears once per chain. The chains are independent samples:
averages over them have standard errors. The tridiagonal coefficients are kept in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llp.landscape.krylov import Array, LinearOperator


@dataclass(frozen=True)
class Quadrature:
    """What one chain says of the spectrum, seen from its start `v`.

    Attributes:
        nodes: Ritz values `[m]`, ascending.
        weights: `(v . y)^2` for the Ritz vectors y `[m]`; they sum to 1.
        coordinates: Of the Ritz vectors in the chain's basis `[m, m]`.
        residuals: `|H y - theta y|` `[m]`.
    """

    nodes: Array
    weights: Array
    coordinates: Array
    residuals: Array


class Chains:
    """Lanczos chains; call `advance` once per step.

    Attributes:
        num_chains: Chains.
        num_steps: Steps so far.
        num_products: Products so far; chains whose space was exhausted take none.
        basis: `[num_chains, capacity, P]`; row j of a chain is its j-th vector.
        lengths: Vectors of each chain whose product is known.
    """

    def __init__(self, op: LinearOperator, starts: Tensor, capacity: int) -> None:
        self._op = op
        size = int(op.shape[0])
        self.num_chains = len(starts)
        self._capacity = min(capacity, size)
        self.basis = torch.empty(
            self.num_chains, self._capacity + 1, size, dtype=op.dtype, device=op.device
        )
        unit = starts / starts.norm(dim=1, keepdim=True)
        self.basis[:, 0] = unit
        self._diagonal = np.zeros((self.num_chains, self._capacity))
        self._beside = np.zeros((self.num_chains, self._capacity))
        self._active = list(range(self.num_chains))
        self.lengths = [0] * self.num_chains
        self.num_steps = 0
        self.num_products = 0

    @property
    def finished(self) -> bool:
        """Whether every chain has exhausted its space or its storage."""
        return not self._active or self.num_steps >= self._capacity

    def advance(self) -> None:
        """One product for every chain that is not exhausted.

        Raises:
            FloatingPointError: A product is not finite.
        """
        step, active = self.num_steps, self._active
        newest = self.basis[active, step]
        images = (self._op @ newest.T).T.contiguous()
        self.num_products += len(active)
        before = images.norm(dim=1)
        heads = []
        for place, chain in enumerate(active):  # both passes of a chain while its basis is cached
            rows, image = self.basis[chain, : step + 1], images[place]
            for _ in range(2):
                part = rows @ image
                image.addmv_(rows.T, part, alpha=-1)
                heads.append(part[step])
        diagonal = torch.stack(heads).double().view(-1, 2).sum(1)
        after = images.norm(dim=1)
        read = torch.stack([diagonal, before.double(), after.double()]).cpu().numpy()
        if not np.isfinite(read).all():
            raise FloatingPointError("a Hessian product is not finite")
        epsilon = torch.finfo(images.dtype).eps
        going = []
        for place, chain in enumerate(active):
            self._diagonal[chain, step] = read[0, place]
            self.lengths[chain] = step + 1
            scale = max(read[1, place], float(np.abs(self._diagonal[chain]).max()))
            if read[2, place] > 20 * epsilon * scale:
                self._beside[chain, step] = read[2, place]
                self.basis[chain, step + 1] = images[place] / after[place]
                going.append(chain)
        self._active = going if step + 1 < self.basis.shape[2] else []
        self.num_steps += 1

    def quadrature(self, chain: int, length: int | None = None) -> Quadrature:
        """The quadrature of a chain, as it was after `length` steps."""
        count = min(self.lengths[chain], length or self.lengths[chain])
        beside = self._beside[chain, :count]
        matrix = np.diag(self._diagonal[chain, :count])
        matrix += np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
        nodes, coordinates = np.linalg.eigh(matrix)
        weights = coordinates[0] ** 2
        residuals = np.abs(coordinates[-1]) * beside[-1]
        return Quadrature(nodes, weights / weights.sum(), coordinates, residuals)

    def ritz_vectors(self, chain: int, places: Array) -> tuple[Tensor, Tensor]:
        """Ritz vectors `[k, P]` of a chain and their products with H, without a new product."""
        found = self.quadrature(chain)
        count = self.lengths[chain]
        mixing = torch.from_numpy(np.ascontiguousarray(found.coordinates[:, places].T))
        vectors = mixing.to(self.basis) @ self.basis[chain, :count]
        images = vectors * torch.from_numpy(found.nodes[places]).to(self.basis)[:, None]
        beyond = self._beside[chain, count - 1]
        if beyond > 0:
            last = torch.from_numpy(found.coordinates[-1, places] * beyond).to(self.basis)
            images += last[:, None] * self.basis[chain, count]
        return vectors, images
