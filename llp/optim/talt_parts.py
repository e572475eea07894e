"""The parts of TALT: sparse random projection, incremental covariance, power iteration, valleys.

Every part works on `count` independent problems at once, along the first dimension, because a
network has many tensors and a launch for each would cost more than the arithmetic. None of them
looks at a value on the host, so none waits for a GPU, unless its docstring says so.

Words: an *exponential weighting* with decay `beta` gives the sample of `i` steps ago the weight
`beta^i`, divided by the sum of the weights (the *mass*), so that early estimates are not biased
towards zero. The *concentration* is the sum of the squared weights: 1 for a single sample, and
`1 / n` for the mean of `n` samples with equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class SparseProjection:
    """A random map from `size` to `dimension` numbers with one +-1 in every column.

    Number `j` is added to, or subtracted from, bucket `j mod dimension`; the signs are random. So
    `E |P x|^2 = |x|^2` (pairs of numbers in a bucket cancel in expectation), and `P P^T = D` is
    diagonal: the sizes of the buckets. That makes `D^(-1/2) P` a map with orthonormal rows, and its
    transpose a way back that distorts no length. Where `size <= dimension` nothing is mixed and all
    is exact. Costs four bytes per input number.

    Charikar, Chen & Farach-Colton, "Finding frequent items in data streams", 2002 (count sketch).

    Args:
        size: Numbers that go in, at least 1.
        dimension: Numbers that come out at most; fewer when there are fewer to begin with.
        generator: Of the signs; on the CPU, so that every device gets the same map.
        device: Where the signs are wanted.

    Attributes:
        dimension: Numbers that come out.
        bucket_sizes: `[dimension]`, the diagonal of D.
    """

    def __init__(
        self,
        size: int,
        dimension: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1 or dimension < 1:
            raise ValueError(f"size and dimension must be at least 1, not {size}, {dimension}")
        self.size, self.dimension = size, min(size, dimension)
        self.rounds = -(-size // self.dimension)
        signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        self._missing = self.rounds * self.dimension - size
        self.signs = functional.pad(signs, (0, self._missing)).to(device)
        positions = torch.arange(size) % self.dimension
        self.bucket_sizes = torch.bincount(positions, minlength=self.dimension).float().to(device)

    @property
    def exact(self) -> bool:
        """Whether nothing is mixed: as many numbers come out as go in."""
        return self.dimension == self.size

    def rows(self, matrices: Tensor) -> Tensor:
        """`P G` for `matrices` `[count, size, n]`: `[count, dimension, n]`."""
        if self.exact:
            return matrices
        if self._missing:
            matrices = functional.pad(matrices, (0, 0, 0, self._missing))
        signed = matrices * self.signs.unsqueeze(1)
        return signed.view(len(matrices), self.rounds, self.dimension, -1).sum(1)

    def columns(self, rows: Tensor) -> Tensor:
        """`G P^T` for the rows of matrices, `[n, size]`: `[n, dimension]`."""
        if self.exact:
            return rows
        if self._missing:
            rows = functional.pad(rows, (0, self._missing))
        return (rows * self.signs).view(len(rows), self.rounds, self.dimension).sum(1)

    def add_back(self, matrices: Tensor, projected: Tensor) -> Tensor:
        """`G + P^T Z` for `matrices` `[count, size, n]` and `projected` `[count, dimension, n]`."""
        if self.exact:
            return matrices + projected
        count, _, n = matrices.shape
        if self._missing:
            matrices = functional.pad(matrices, (0, 0, 0, self._missing))
        blocks = matrices.view(count, self.rounds, self.dimension, n)
        signs = self.signs.view(self.rounds, self.dimension, 1)
        return torch.addcmul(blocks, projected.unsqueeze(1), signs).flatten(1, 2)[:, : self.size]

    def lift(self, vectors: Tensor) -> Tensor:
        """`P^T V` for `vectors` `[count, dimension, n]`: `[count, size, n]`."""
        if self.exact:
            return vectors
        signs = self.signs.view(self.rounds, self.dimension, 1)
        return (vectors.unsqueeze(1) * signs).flatten(1, 2)[:, : self.size]

    def matrix(self) -> Tensor:
        """P as a dense matrix `[dimension, size]`."""
        if self.exact:
            return torch.eye(self.size, device=self.signs.device)
        blocks = torch.diag_embed(self.signs.view(self.rounds, self.dimension))
        return blocks.permute(1, 0, 2).flatten(1)[:, : self.size]


class StackedProjection:
    """`P_i G_i` for many maps and matrices of as many sizes, in one launch on a GPU.

    Costs eight bytes per row of the matrices, and four per row of the result.

    Args:
        maps: The map of each matrix.
        rows: Of each result, at least the largest `dimension`; the rows past a map's are zero.
        device: Where the matrices are.
    """

    def __init__(
        self, maps: Sequence[SparseProjection], rows: int, device: torch.device | str = "cpu"
    ) -> None:
        self.rows = rows
        members, signs, sizes, first = [], [], [], 0
        for own in maps:
            order = torch.arange(own.rounds * own.dimension).view(own.rounds, -1).mT.flatten()
            order = order[order < own.size]  # bucket by bucket
            members.append(order + first)
            chosen = own.signs.cpu()[order]
            signs.append(chosen.abs() if own.exact else chosen)  # an exact map is the identity
            sizes.append(functional.pad(own.bucket_sizes.cpu().long(), (0, rows - own.dimension)))
            first += own.size
        self._members = torch.cat(members).int().to(device)
        self._signs = torch.cat(signs).to(device)
        ends = torch.cat(sizes).cumsum(0)
        self._offsets = functional.pad(ends, (1, 0)).int().to(device)

    def __call__(self, matrices: Tensor) -> Tensor:
        """`[maps, rows, n]` for all matrices, one below the other: `[sum of sizes, n]`."""
        found = torch.embedding_bag(
            matrices,
            self._members,
            self._offsets,
            mode=0,  # sum
            per_sample_weights=self._signs,
            include_last_offset=True,
        )[0]
        return found.view(-1, self.rows, matrices.shape[1])

    @property
    def kept(self) -> list[Tensor]:
        """All it keeps."""
        return [self._members, self._signs, self._offsets]


class IncrementalCovariance:
    """Exponentially weighted mean and covariance of matrices that come one by one.

    Equal, up to rounding, to the weighted mean and the unbiased weighted covariance of the whole
    series at once, `sum w_i (y_i - mu)(y_i - mu)^T / (1 - sum w_i^2)`, summed over the columns of a
    matrix. The update is West's (1979), which does not subtract large numbers.

    The weights are known on the host: they depend on which series had a sample, on nothing else.

    Args:
        count: Independent series.
        rows: Of a matrix; the covariance is `[rows, rows]`.
        columns: Of a matrix.
        decay: In [0, 1).
        device: Where the state lives.
        dtype: Of the state.

    Attributes:
        mean: `[count, rows, columns]`.
    """

    def __init__(
        self,
        count: int,
        rows: int,
        columns: int = 1,
        *,
        decay: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay!r}")
        self.decay = decay
        self.mean = torch.zeros(count, rows, columns, device=device, dtype=dtype)
        self._biased = torch.zeros(count, rows, rows, device=device, dtype=dtype)
        self._mass = [0.0] * count
        self._square_mass = [0.0] * count

    def update(self, matrices: Tensor, present: Sequence[bool] | None = None) -> list[float]:
        """Takes in `matrices` `[count, rows, columns]`.

        Args:
            matrices: One sample of every series.
            present: Which series have a sample; the others are left as they were. None: all.

        Returns:
            The normalised weight that each new sample got; 0 for none.
        """
        gain, decay, square = 1 - self.decay, self.decay, self.decay**2
        present = present or [True] * len(self._mass)
        self._mass = [
            decay * m + gain if here else m for m, here in zip(self._mass, present, strict=True)
        ]
        self._square_mass = [
            square * s + gain**2 if here else s
            for s, here in zip(self._square_mass, present, strict=True)
        ]
        weights = [gain / m if here else 0.0 for m, here in zip(self._mass, present, strict=True)]
        off = matrices - self.mean
        weight = spread(weights, off)
        if isinstance(weight, float):
            self.mean.add_(off, alpha=weight)
            self._biased.baddbmm_(off, off.mT, beta=1 - weight, alpha=weight * (1 - weight))
        else:
            step = off * weight.view(-1, 1, 1)
            self.mean.add_(step)
            self._biased.baddbmm_(step, off.mT).mul_((1 - weight).view(-1, 1, 1))
        return weights

    @property
    def concentration(self) -> list[float]:
        """Sum of the squared weights of each series; 1 before the first sample."""
        pairs = zip(self._mass, self._square_mass, strict=True)
        return [square / mass**2 if mass else 1.0 for mass, square in pairs]

    def covariance(self) -> Tensor:
        """`[count, rows, rows]`; zero until there are two samples."""
        scale = spread([1 / max(1 - s, 1e-6) for s in self.concentration], self._biased)
        return self._biased * (scale if isinstance(scale, float) else scale.view(-1, 1, 1))

    def state(self) -> dict[str, Any]:
        """All there is, for `load`."""
        return {
            "mean": self.mean,
            "biased": self._biased,
            "mass": list(self._mass),
            "square_mass": list(self._square_mass),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state` returned."""
        self.mean.copy_(state["mean"])
        self._biased.copy_(state["biased"])
        self._mass, self._square_mass = list(state["mass"]), list(state["square_mass"])


def spread(values: Sequence[float], like: Tensor) -> float | Tensor:
    """`values` as one number where they are all the same, else as a tensor beside `like`.

    The copy to a GPU does not wait for it.
    """
    if min(values) == max(values):
        return float(values[0])
    return on_device(values, like)


def on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """`values` as a tensor of the device and type of `like`, without waiting for the device."""
    if like.device.type != "cuda":
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    host = torch.tensor(values, dtype=like.dtype, pin_memory=True)
    return host.to(like.device, non_blocking=True)


class Eigenpairs(NamedTuple):
    """Eigenpairs of `count` symmetric matrices `A`.

    Attributes:
        values: `[count, num]`, Rayleigh quotients.
        vectors: `[count, n, num]`, orthonormal columns.
        residuals: `[count, num]`, `|A v - value v|`.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor

    def converged(self, tolerance: float) -> Tensor:
        """`[count, num]`: whether the residual is at most `tolerance` times the largest value."""
        return self.residuals <= tolerance * self.values.amax(1, keepdim=True).abs()


SHIFT = 1e-3
"""Added to a matrix, in units of its trace, while vectors are sought: eigenvectors stay the same,
and no image is so small that it is but rounding."""


def power_iteration(
    matrices: Tensor, start: Tensor, *, iterations: int = 100, tolerance: float | None = None
) -> Eigenpairs:
    """The dominant eigenpairs of positive semidefinite matrices, by power iteration with deflation.

    All vectors are multiplied by the matrix together; then each is made orthogonal to those before
    it, which takes these out of the matrix for the ones that follow, and normalised. Convergence
    brings the values in descending order.

    Args:
        matrices: `[count, n, n]`, symmetric, positive semidefinite.
        start: `[count, n, num]`, columns to begin with (one of zeros stays one, and one that
            depends on those before it becomes one); last time's make a few iterations enough.
        iterations: At most.
        tolerance: Stop when all have converged to this relative residual. This looks at the
            residuals on the host after every iteration; None never looks.

    Returns:
        The pairs with their residuals, by which the caller decides what to use.
    """
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1).clamp(min=1e-37)
    scaled = matrices / trace
    shifted = scaled.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(SHIFT)
    vectors = start
    for _ in range(max(iterations, 1)):
        vectors = orthonormal(torch.bmm(shifted, vectors))
        if tolerance is not None and bool(_pairs(scaled, vectors).converged(tolerance).all()):
            break
    # One Newton-Schulz step takes the rounding out of what is orthonormal already.
    vectors = torch.baddbmm(vectors, vectors, torch.bmm(vectors.mT, vectors), beta=1.5, alpha=-0.5)
    found = _pairs(scaled, vectors)
    scale = trace.squeeze(2)
    return Eigenpairs(found.values * scale, found.vectors, found.residuals * scale)


def _pairs(matrices: Tensor, vectors: Tensor) -> Eigenpairs:
    images = torch.bmm(matrices, vectors)
    values = (vectors * images).sum(1)
    rest = torch.addcmul(images, vectors, values.unsqueeze(1), value=-1)
    return Eigenpairs(values, vectors, torch.linalg.vector_norm(rest, dim=1))


DEPENDENT = 1e-12
"""Square of the share of a column, off those before it, that is but rounding."""


def orthonormal(vectors: Tensor) -> Tensor:
    """What Gram-Schmidt makes of the columns of `vectors` `[count, n, num]`, in their order.

    By the Cholesky factor of their products, in float64: a few launches on a GPU, and not five for
    every column. A column of zeros stays one, and one that depends on those before it but for the
    rounding of float32 is left with a length of a few hundredths; up to a condition of some 1e3 the
    others are as exact as float32 is.
    """
    exact = vectors.double()
    products = torch.bmm(exact.mT, exact)
    products.diagonal(dim1=1, dim2=2).mul_(1 + DEPENDENT).add_(1e-90)
    factor, _ = torch.linalg.cholesky_ex(products)
    found: Tensor = torch.linalg.solve_triangular(factor.mT, exact, upper=True, left=False)
    return found.to(vectors.dtype)


def orthogonal_to(found: Tensor, v: Tensor) -> Tensor:
    """`v` `[count, n, m]` less its part in the span of the columns of `found`.

    These are orthonormal, or zero. Done twice, for the rounding.
    """
    v = torch.baddbmm(v, found, torch.bmm(found.mT, v), alpha=-1)
    return v.baddbmm_(found, torch.bmm(found.mT, v), alpha=-1)


def dominant_direction(matrices: Tensor, *, iterations: int) -> Tensor:
    """The first left singular vectors `[count, n, 1]` of `matrices` `[count, n, m]`.

    Power iteration on `G G^T` from the sum of the columns; zero for a matrix of zeros.
    """
    size = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    units = matrices / size.clamp(min=1e-37)
    v = units.sum(2, keepdim=True)
    for _ in range(iterations):
        v = torch.bmm(units, torch.bmm(units.mT, v))
    length: Tensor = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    directions: Tensor = v / length.clamp(min=1e-37)
    return directions


def ridge_for_condition(largest: Tensor, rest: Tensor, max_condition: float) -> Tensor:
    """The least `d >= 0` with `(largest + d) / (rest + d) <= max_condition`.

    Regularisation that follows the conditioning: nothing is added where the matrix is sound.
    """
    return ((largest - max_condition * rest) / (max_condition - 1)).clamp(min=0)


class Oscillation:
    """How much recent gradients point in one direction: their mean pairwise cosine.

    Kept as the exponentially weighted mean `h` of the gradients at length 1. The weighted mean of
    the cosines over all pairs of different steps is `(|h|^2 - s) / (1 - s)` with `s` the
    concentration: no gradient has to be kept. 1 for a straight descent, about 0 for noise, below 0
    for a gradient that turns back and forth.
    """

    def __init__(self, count: int, rows: int, columns: int, device: torch.device | str) -> None:
        self.mean = torch.zeros(count, rows, columns, dtype=torch.float32, device=device)

    def update(self, matrices: Tensor, weights: Sequence[float]) -> None:
        """Takes in a gradient of each; for `weights` see `IncrementalCovariance.update`."""
        length = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
        units = matrices / length.clamp(min=1e-37)
        weight = spread(weights, units)
        self.mean.lerp_(units, weight if isinstance(weight, float) else weight.view(-1, 1, 1))

    def cosine(self, concentration: Tensor) -> Tensor:
        """`[count]`, the mean pairwise cosine; 0 where there are no pairs yet."""
        square = self.mean.square().sum((1, 2))
        return ((square - concentration) / (1 - concentration).clamp(min=1e-6)).clamp(-1, 1)


class Persistence:
    """Whether the gradient along given directions keeps its sign from one step to the next.

    The correlation of the coefficients at successive steps, not centred: 1 for a drift (also one
    that fades), 0 for noise, -1 for a swing to and fro.

    Attributes:
        pair: `[count, directions, 2, columns]`, coefficients before the last step and at it.
        moments: `[count, directions, 3]`, means of before * now, of now^2 and of before^2.
        seen: Which series have had a step.
    """

    def __init__(
        self, count: int, directions: int, columns: int, device: torch.device | str
    ) -> None:
        shape = count, directions
        self.pair = torch.zeros(*shape, 2, columns, dtype=torch.float32, device=device)
        self._record = torch.zeros(*shape, 6, dtype=torch.float32, device=device)
        self.seen = [False] * count

    @property
    def moments(self) -> Tensor:
        """See the class."""
        return self._record[:, :, :3]

    def update(self, basis: Tensor, matrices: Tensor, weights: Sequence[float]) -> None:
        """Takes in the coefficients of `matrices` along `basis`.

        Args:
            basis: `[count, rows, directions]`.
            matrices: `[count, rows, columns]`.
            weights: See `IncrementalCovariance.update`; 0 leaves a series as it was.
        """
        before, now = self.pair.unbind(2)
        if min(weights) > 0:
            before.copy_(now)
            torch.bmm(basis.mT, matrices, out=now)
        else:
            present = on_device([float(w > 0) for w in weights], matrices).view(-1, 1, 1)
            before.lerp_(now, present)
            now.lerp_(basis.mT @ matrices, present)
        products = self._record[:, :, 3:]  # at this step, of what `moments` are means of
        products[:, :, 2].copy_(products[:, :, 1])
        torch.sum(self.pair * now.unsqueeze(2), 3, out=products[:, :, :2])
        # The first step has none before it; counted, it would pull the correlation down.
        weight = spread(
            [w if seen else 0.0 for w, seen in zip(weights, self.seen, strict=True)], matrices
        )
        self.moments.lerp_(products, weight if isinstance(weight, float) else weight.view(-1, 1, 1))
        self.seen = [seen or w > 0 for w, seen in zip(weights, self.seen, strict=True)]

    def turn(self, rotation: Tensor) -> None:
        """Goes over to other directions, given as `[count, new, old]` cosines with the old ones.

        What was known along an old direction is handed on in proportion to the squared cosine.
        """
        self.pair = torch.bmm(rotation, self.pair.flatten(2)).view_as(self.pair)
        self._record = torch.bmm(rotation.square(), self._record)

    def correlation(self) -> Tensor:
        """`[count, directions]` in [-1, 1]; 0 where nothing is known."""
        product, now, before = self.moments.unbind(2)
        scale = (now * before).clamp(min=0).sqrt()
        return (product / scale.clamp(min=1e-37)).clamp(-1, 1)

    def state(self) -> dict[str, Any]:
        """All there is, for `load`."""
        return {"pair": self.pair, "record": self._record, "seen": list(self.seen)}

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state` returned."""
        self.pair = state["pair"].to(self.pair, copy=True)
        self._record = state["record"].to(self.pair, copy=True)
        self.seen = list(state["seen"])


MEAN_ENERGY = 0.5
"""Gradients oscillate where less than half of their energy is in their mean."""

SURPRISE = 2.6
"""Three standard deviations (1.27) above the mean (-1.2) of the Tracy-Widom law."""


def noise_edge(rows: Tensor, columns: Tensor) -> Tensor:
    """What the largest eigenvalue of `G G^T` hardly exceeds, for `G` of standard normal numbers.

    Johnstone, 2001, theorem 1.1: `(sqrt(rows) + sqrt(columns))^2` and fluctuations after Tracy and
    Widom, of which `SURPRISE` are allowed.
    """
    root = rows.sqrt() + columns.sqrt()
    return root**2 + SURPRISE * root * (rows**-0.5 + columns**-0.5) ** (1 / 3)


def valley(
    cosine: Tensor,
    mean_square: Tensor,
    variance: Tensor,
    concentration: Tensor,
    noise: Tensor,
) -> Tensor:
    """`[count]`, how much of a valley it is, in [0, 1]; 0 for none.

    A valley is where the gradients oscillate *and* their mean keeps a direction. They oscillate
    when `cosine`, the share of their energy that is in their mean (`Oscillation`), is below one
    half. The mean along its dominant direction persists when its square is more than noise would
    show there, `concentration * noise * variance`. The strength is the share of the energy along
    that direction that the mean has beyond this, times `1 - cosine`. Nothing in it depends on the
    scale of the gradient, and no number is to be chosen.

    Args:
        cosine: `[count]`, mean pairwise cosine.
        mean_square: `[count]`, square of the mean along its dominant direction.
        variance: `[count]`, of the gradient along it, summed over columns.
        concentration: `[count]`, of the weighting behind the mean.
        noise: `[count]` or one number: `noise_edge` of the matrix in which the direction was
            chosen, by its columns.
    """
    signal = (mean_square - concentration * noise * variance).clamp(min=0)
    share = signal / (signal + variance).clamp(min=1e-37)
    return share * (1 - cosine.clamp(min=0)) * (cosine < MEAN_ENERGY)


def nbytes(*values: Any) -> int:
    """Bytes of the memory behind all tensors in the nested `values`, what they share counted once.

    A view keeps all of the tensor that it is of.
    """
    storages: dict[int, int] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return sum(storages.values())


def random_start(count: int, rows: int, num: int, generator: torch.Generator) -> Tensor:
    """`[count, rows, num]` orthonormal columns to begin a power iteration with."""
    drawn = torch.randn(count, rows, num, generator=generator, dtype=torch.float32)
    return torch.linalg.qr(drawn).Q if num <= rows else drawn / math.sqrt(rows)
