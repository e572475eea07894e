"""The peers of the curvature benchmark, each behind one small interface that counts its products.

A peer that cannot be imported is left out and named in the output. PyHessian 0.1 calls `torch.eig`,
which torch no longer has, in its density; it is given one here, so that it can be timed at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class PyHessian:
    """PyHessian with the whole data as one batch, its fastest mode (the graph is kept)."""

    name = "PyHessian"

    def __init__(self, model: Any, loss_fn: Any, inputs: Tensor, targets: Tensor) -> None:
        import pyhessian

        model.zero_grad()
        self._module = pyhessian.hessian
        cuda = inputs.is_cuda
        self._own = pyhessian.hessian(model, loss_fn, data=(inputs, targets), cuda=cuda)
        self._loader = pyhessian.hessian(model, loss_fn, dataloader=[(inputs, targets)], cuda=cuda)
        self.count = 0

    def product(self, vector: Tensor) -> None:
        """By the call it uses for several batches, which is what a data set needs."""
        parts = vector.split([p.numel() for p in self._loader.params])
        rows = [part.view_as(p) for part, p in zip(parts, self._loader.params, strict=True)]
        self._loader.dataloader_hv_product(rows)

    def top(self, k: int) -> np.ndarray:
        """Its power iteration at the tolerance asked for."""
        with self._counting():
            values, _ = self._own.eigenvalues(maxIter=100, tol=1e-3, top_n=k)
        return np.array(values)

    def density(self, num_probes: int, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights."""
        torch.eig = _eig  # type: ignore[attr-defined]
        with self._counting():
            nodes, weights = self._own.density(iter=num_steps, n_v=num_probes)
        return np.array(nodes), np.array(weights)

    def _counting(self) -> Any:
        return _Counting(self)


class _Counting:
    def __init__(self, peer: PyHessian) -> None:
        from pyhessian import hessian as module

        self._peer, self._module = peer, sys.modules[module.__module__]

    def __enter__(self) -> None:
        own = self._own = self._module.hessian_vector_product

        def counted(*arguments: Any) -> Any:
            self._peer.count += 1
            return own(*arguments)

        self._module.hessian_vector_product = counted

    def __exit__(self, *_: object) -> None:
        self._module.hessian_vector_product = self._own


def _eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


class HessianEigenthings:
    """hessian-eigenthings; its Lanczos is given the number of steps that turns out right."""

    name = "hessian-eigenthings"

    def __init__(self, model: Any, loss_fn: Any, inputs: Tensor, targets: Tensor) -> None:
        from hessian_eigenthings.loss_fns.standard import supervised_loss
        from hessian_eigenthings.operators.hessian import HessianOperator

        self._op = HessianOperator(model, [(inputs, targets)], supervised_loss(loss_fn))
        self.count = 0
        multiply = self._op.matvec

        def counted(vector: Tensor) -> Tensor:
            self.count += 1
            return multiply(vector)

        self._op.matvec = counted

    def product(self, vector: Tensor) -> None:
        """One product."""
        self._op.matvec(vector)

    def steps_needed(self, k: int, reached: Callable[[np.ndarray], bool], which: str = "LM") -> int:
        """The fewest steps, in twos, after which it has what is asked; not part of any time."""
        for steps in range(max(2, k), 200, 2):
            if reached(self.top(k, steps, which)):
                return steps
        raise RuntimeError("hessian-eigenthings did not reach the tolerance in 200 steps")

    def top(self, k: int, steps: int, which: str = "LM") -> np.ndarray:
        """Its Lanczos."""
        from hessian_eigenthings.algorithms.lanczos import lanczos

        found = lanczos(self._op, k=k, max_iter=steps, which=which, seed=0, reorthogonalize=True)
        return found.eigenvalues.double().numpy()

    def density(self, num_probes: int, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights."""
        from hessian_eigenthings.algorithms.spectral_density import spectral_density

        found = spectral_density(
            self._op, num_runs=num_probes, lanczos_steps=num_steps, num_grid_points=1000, seed=0
        )
        return found.raw_eigenvalues.double().numpy(), found.raw_weights.double().numpy()

    def trace(self, num_products: int) -> float:
        """Its Hutchinson."""
        from hessian_eigenthings.algorithms.trace import hutchinson

        return hutchinson(self._op, num_samples=num_products, seed=0).estimate


class Curvlinops:
    """curvlinops, with SciPy's `eigsh` for eigenvalues, as its documentation has it."""

    name = "curvlinops"

    def __init__(self, model: Any, loss_fn: Any, inputs: Tensor, targets: Tensor) -> None:
        from curvlinops import HessianLinearOperator

        model.eval()
        loss = torch.nn.CrossEntropyLoss()
        self._op = HessianLinearOperator(
            model,
            loss,
            list(model.parameters()),
            [(inputs, targets)],
            check_deterministic=False,
        )
        self.count = 0

    def product(self, vector: Tensor) -> None:
        """One product."""
        self._op @ vector

    def block(self, vectors: Tensor) -> None:
        """One block of products."""
        self._op @ vectors

    def top(self, k: int, which: str = "LM") -> np.ndarray:
        """`eigsh` at the tolerance asked for."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        inner = self._op.to_scipy()

        def counted(vector: np.ndarray) -> np.ndarray:
            self.count += 1
            return inner @ vector

        op = LinearOperator(inner.shape, matvec=counted, dtype=inner.dtype)
        start = np.random.default_rng(0).normal(size=inner.shape[0])
        found = eigsh(op, k=k, which=which, tol=1e-3, return_eigenvectors=False, v0=start)
        return np.array(sorted(found, key=lambda x: -abs(x)))

    def density(self, num_probes: int, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights, chain by chain."""
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        nodes, weights = [], []
        for _ in range(num_probes):
            values, vectors = fast_lanczos(self._op, num_steps)
            nodes.append(values.double().numpy())
            weights.append(vectors[0].double().numpy() ** 2)
        self.count += num_probes * num_steps
        return np.array(nodes), np.array(weights)

    def trace(self, num_products: int) -> float:
        """Its Hutchinson, which multiplies a block."""
        from curvlinops import hutchinson_trace

        return float(hutchinson_trace(self._op, num_products))


PEERS = (PyHessian, HessianEigenthings, Curvlinops)


def made(model: Any, loss_fn: Any, inputs: Tensor, targets: Tensor) -> tuple[dict[str, Any], list]:
    """The peers that can be imported by name, and what is wrong with the others."""
    found, missing = {}, []
    for peer in PEERS:
        try:
            found[peer.name] = peer(model, loss_fn, inputs, targets)
        except ImportError as error:
            missing.append(f"{peer.name}: {error}")
    return found, missing
