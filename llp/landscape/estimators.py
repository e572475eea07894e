"""Estimators of a trace that grow product by product, each with an honest standard error."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llp.landscape.krylov import Array, LinearOperator

BLOCK_BYTES = 2**28
"""Memory of the probes that are multiplied at once."""

NUM_GROUPS = 20
"""Groups of the jackknife: enough degrees of freedom, and few recomputations."""


class Estimator(Protocol):
    """An estimate that more products improve.

    Attributes:
        name: Of the method.
    """

    name: str

    def extend(self, products: int) -> None:
        """Spends at most this many products, and at least one probe's worth."""
        ...

    def estimate(self) -> tuple[float, float, int]:
        """Value, standard error (NaN for one probe) and the samples that it is over."""
        ...


class Probes:
    """Random signs, their products, and how many there were.

    Attributes:
        op: The operator.
        num_products: Products so far.
    """

    def __init__(self, op: LinearOperator, generator: torch.Generator) -> None:
        self.op = op
        self._generator = generator
        self.num_products = 0

    def drawn(self, count: int) -> Tensor:
        """New probes `[P, count]`."""
        size = int(self.op.shape[0])
        signs = torch.randint(0, 2, (count, size), generator=self._generator, dtype=torch.int8)
        return (2 * signs - 1).to(device=self.op.device, dtype=self.op.dtype).T

    def times(self, vectors: Tensor) -> Tensor:
        """The products with `[P, K]`."""
        self.num_products += vectors.shape[1]
        return self.op @ vectors

    def multiplied(self, count: int) -> tuple[Tensor, Tensor]:
        """New probes `[P, count]` and their products."""
        probes = self.drawn(count)
        return probes, self.times(probes)

    def block(self) -> int:
        """Probes that are multiplied at once."""
        size = int(self.op.shape[0]) * torch.finfo(self.op.dtype).bits // 8
        return int(max(1, min(64, BLOCK_BYTES // size)))


class Hutchinson:
    """The mean of `w' H w`, on the complement of `basis` where there is one.

    Args:
        probes: Where they come from.
        basis: Orthonormal columns `[P, r]` that do not depend on the probes to come.
        known: The trace of H on `basis`.
        name: Of the method.
    """

    def __init__(
        self,
        probes: Probes,
        basis: Tensor | None = None,
        known: float = 0.0,
        name: str = "hutchinson",
    ) -> None:
        self.name = name
        self._probes = probes
        self._basis = basis
        self._known = known
        self._samples: list[float] = []

    def extend(self, products: int) -> None:
        """One product per probe."""
        left = max(1, products)
        while left > 0:
            drawn = self._probes.drawn(min(left, self._probes.block()))
            if self._basis is not None:
                for _ in range(2):
                    drawn = drawn - self._basis @ (self._basis.T @ drawn)
            self.take(drawn, self._probes.times(drawn))
            left -= drawn.shape[1]

    def take(self, vectors: Tensor, products: Tensor) -> None:
        """Samples from vectors whose products are known."""
        self._samples += (vectors.double() * products.double()).sum(0).cpu().tolist()

    def estimate(self) -> tuple[float, float, int]:
        """Sample mean and standard error."""
        count = len(self._samples)
        if not count:
            return self._known, math.nan, 0
        value = self._known + float(np.mean(self._samples))
        error = float(np.std(self._samples, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
        return value, error, count


class XTrace:
    """Every probe both in the sketch and, against the sketch of the others, as a sample.

    The samples share their sketches, so their spread is too small an error; the standard error is
    a jackknife over groups of probes, on average no smaller than the truth (Efron and Stein 1981).
    """

    name = "xtrace"

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._drawn: list[Tensor] = []
        self._basis: list[Tensor] = []
        self._products: list[Tensor] = []
        self._upper = np.zeros((0, 0))
        self._samples: list[float] = []

    def extend(self, products: int) -> None:
        """Two products per probe."""
        left = max(1, products // 2)
        while left > 0:
            count = min(left, self._probes.block())
            self.take(*self._probes.multiplied(count))
            left -= count

    def take(self, drawn: Tensor, images: Tensor) -> None:
        """Adds probes whose products are known; their part of the basis is multiplied."""
        self._samples += (drawn.double() * images.double()).sum(0).cpu().tolist()
        basis, self._upper = extended(self._basis, self._upper, images)
        self._drawn.append(drawn)
        self._basis.append(basis)
        self._products.append(self._probes.times(basis))

    def estimate(self) -> tuple[float, float, int]:
        """The mean over probes, and its jackknife error over groups."""
        drawn, basis = torch.cat(self._drawn, 1), torch.cat(self._basis, 1)
        products = torch.cat(self._products, 1)
        core = inner(basis, products)
        small = _Small(
            (core + core.T) / 2,
            self._upper,
            inner(basis, drawn),
            inner(products, drawn),
            np.array(self._samples),
            100 * torch.finfo(basis.dtype).eps,
        )
        count = len(self._samples)
        everything = np.arange(count)
        value = small.estimate(everything)
        groups = np.array_split(everything, min(count, NUM_GROUPS))
        if len(groups) < 2:
            return value, math.nan, count
        without = np.array([small.estimate(np.setdiff1d(everything, each)) for each in groups])
        spread = float(((without - without.mean()) ** 2).sum())
        return value, math.sqrt((len(groups) - 1) / len(groups) * spread), len(groups)


class _Small:
    """XTrace (Epperly et al. 2024, section 2.1) in the coordinates of a basis Q of the images HW.

    Args:
        core: `Q' H Q`.
        upper: `Q' H W`.
        within: `Q' W`.
        crossed: `Q' H W` as it comes from the products with Q.
        samples: `w' H w`.
        tolerance: Relative size of rounding errors.
    """

    def __init__(
        self,
        core: Array,
        upper: Array,
        within: Array,
        crossed: Array,
        samples: Array,
        tolerance: float,
    ) -> None:
        self._core = core
        self._upper = upper
        self._within = within
        self._crossed = crossed
        self._samples = samples
        self._tolerance = tolerance

    def estimate(self, chosen: Array) -> float:
        """From the probes `chosen` alone."""
        images = self._upper[:, chosen]
        lengths = np.linalg.norm(images, axis=0)
        if lengths.max(initial=0.0) == 0.0:
            return float(self._samples[chosen].mean())
        images = images / np.maximum(lengths, self._tolerance * lengths.max())
        left, sizes, right = np.linalg.svd(images, full_matrices=False)
        kept = sizes > self._tolerance * sizes[0]
        basis, right = left[:, kept], right[kept]
        core = basis.T @ self._core @ basis
        within = basis.T @ self._within[:, chosen]
        crossed = basis.T @ self._crossed[:, chosen]
        # Column i: what of the span is lost without image i; nothing where the others span it.
        lost = right / sizes[kept][:, None]
        needed = (right**2).sum(0) > 1 - 1e-6
        norms = np.linalg.norm(lost, axis=0)
        lost = np.where(needed, lost / np.maximum(norms, 1e-300), 0.0)
        inside = within - lost * (lost * within).sum(0)
        estimates = (
            np.trace(core)
            - (lost * (core @ lost)).sum(0)
            + self._samples[chosen]
            - 2 * (inside * crossed).sum(0)
            + (inside * (core @ inside)).sum(0)
        )
        return float(estimates.mean())


def inner(left: Tensor, right: Tensor) -> Array:
    """`left' right` in float64, slice by slice along P."""
    total = np.zeros((left.shape[1], right.shape[1]))
    step = max(1, 2**24 // max(1, left.shape[1] + right.shape[1]))
    for start in range(0, left.shape[0], step):
        part = slice(start, start + step)
        total += (left[part].double().T @ right[part].double()).cpu().numpy()
    return total


def extended(basis: list[Tensor], upper: Array, images: Tensor) -> tuple[Tensor, Array]:
    """New orthonormal columns for the images, and R of `images = basis R` for all so far.

    An image that lies in the span of the others gives a zero column.
    """
    old = torch.cat(basis, 1) if basis else images[:, :0]
    width, count = old.shape[1], images.shape[1]
    grown = np.zeros((width + count, width + count))
    grown[:width, :width] = upper
    columns = torch.zeros_like(images)
    epsilon = torch.finfo(images.dtype).eps
    for number in range(count):
        column = images[:, number].clone()
        before = float(column.norm())
        for _ in range(2):
            for part, offset in ((old, 0), (columns[:, :number], width)):
                if part.shape[1]:
                    along = part.T @ column
                    column -= part @ along
                    grown[offset : offset + len(along), width + number] += (
                        along.double().cpu().numpy()
                    )
        norm = float(column.norm())
        if norm > 20 * epsilon * before:
            columns[:, number] = column / norm
            grown[width + number, width + number] = norm
    return columns, grown
