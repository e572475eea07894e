"""Losses and accuracies on lines and planes through a model's weights.

`loss[i, j]` belongs to `theta + x[i] d1 + y[j] d2`: the first index runs along the first direction.
(Pictures want rows along y; `Surface.mesh` gives arrays in that convention, transposed once.)
The grid is symmetric with an exact 0 in the middle when the resolution is odd, and the value there
is the model's own loss to the bit.

A grid can be evaluated elsewhere: `evaluate_chunks(evaluate, chunks)` is given a picklable callable
on coordinates and a list of them, and yields `(index, values)` in any order, as a process pool or a
cluster would. With a `store` (any mutable mapping, for example `FileStore`) every finished chunk is
kept, and a repeated call computes only what is missing.

    landscape.surface(model, loss_fn, batches, resolution=25)              # 625 exact losses
    landscape.surface(model, loss_fn, batches, resolution=25, coarse=11)   # 137, and an error
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from llp.landscape import directions as direction_makers
from llp.landscape.chunks import Chunks, EvaluateChunks, Store
from llp.landscape.directions import Directions
from llp.landscape.evaluation import Array, Metric, Strategy
from llp.landscape.interpolation import (
    InterpolationError,
    cells_to_hold_out,
    interpolated,
    rows_to_evaluate,
)
from llp.landscape.passes import Batches, LossFunction
from llp.landscape.plain import Plain

Extent = float | tuple[float, float]


@dataclass(frozen=True)
class Line(Plain):
    """Losses along one direction.

    Attributes:
        x: Coordinates `[n]`.
        loss: At each `[n]`, as computed: neither capped nor repaired.
        metric: The metric (accuracy unless given) `[n]`, or None.
        robust: The loss in the worst point of a ball around each `[n]`, or None.
        base_loss: Loss of the model as it is.
        base_metric: Its metric; NaN for none.
        label: What the direction is.
        norm: Euclidean length of the direction, so that `x * norm` is a distance.
        num_forwards: Losses of the whole data spent.
        num_gradients: Gradients of the whole data spent.
        seconds: Wall-clock time.
    """

    x: Array
    loss: Array
    metric: Array | None
    robust: Array | None
    base_loss: float
    base_metric: float
    label: str
    norm: float
    num_forwards: int
    num_gradients: int
    seconds: float


@dataclass(frozen=True)
class Surface(Plain):
    """Losses on a plane.

    Attributes:
        x: Coordinates along the first direction `[n]`.
        y: Coordinates along the second `[m]`.
        loss: `[n, m]`, first index along the first direction; neither capped nor repaired.
        metric: The metric (accuracy unless given) `[n, m]`, or None.
        robust: The loss in the worst point of a ball around each `[n, m]`, or None.
        exact: Which cells were evaluated; the others are interpolated `[n, m]`.
        interpolation: Its error on cells held out, or None when every cell is exact.
        base_loss: Loss of the model as it is; the centre cell, to the bit.
        base_metric: Its metric; NaN for none.
        loss_cap: What `mesh` cuts the losses at, or None.
        labels: What the directions are.
        norms: Euclidean lengths of the directions, so that `x * norm` is a distance.
        cosine: Absolute cosine between the directions.
        normalization: Scales that the directions were given.
        kind: Kind of the directions.
        rho: Radius of the ball of `robust`, 0 for none.
        strategy: How the points were evaluated here; `outside` when not here.
        num_forwards: Losses of the whole data spent.
        num_gradients: Gradients of the whole data spent.
        seconds: Wall-clock time.
    """

    x: Array
    y: Array
    loss: Array
    metric: Array | None
    robust: Array | None
    exact: Array
    interpolation: InterpolationError | None
    base_loss: float
    base_metric: float
    loss_cap: float | None
    labels: tuple[str, ...]
    norms: tuple[float, ...]
    cosine: float
    normalization: str
    kind: str
    rho: float
    strategy: str
    num_forwards: int
    num_gradients: int
    seconds: float

    def mesh(
        self, what: Literal["loss", "metric", "robust"] = "loss"
    ) -> tuple[Array, Array, Array]:
        """X, Y, Z `[m, n]` for plotting: x runs along columns, y along rows; capped, for losses."""
        values = getattr(self, what)
        if values is None:
            raise ValueError(f"this surface has no {what}")
        across, along = np.meshgrid(self.x, self.y)
        flipped = values.T.copy()
        if self.loss_cap is not None and what != "metric":
            flipped = np.minimum(flipped, self.loss_cap)
        return across, along, flipped


def line(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    direction: Directions | Sequence[Tensor] | Tensor | str | None = None,
    extent: Extent = 1.0,
    resolution: int = 51,
    metric: Metric | Literal["auto"] | None = "auto",
    rho: float = 0.0,
    robust: Literal["ascent", "first_order"] = "ascent",
    statistics: Batches | None = None,
    strategy: Strategy = "auto",
    chunk_size: int | None = None,
    evaluate_chunks: EvaluateChunks | None = None,
    store: Store | None = None,
) -> Line:
    """Losses along a line through the weights; the arguments are those of `surface`.

    Args:
        model: Left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        direction: As in `surface`; its first row is taken; default: one random filter-normalised
            direction.
        extent: Half-length, or `(from, to)`; `(0, 1)` along `between(model, other)` joins two
            checkpoints.
        resolution: Points, at least 2.
        metric: As in `surface`.
        rho: As in `surface`.
        robust: As in `surface`.
        statistics: As in `surface`.
        strategy: As in `surface`.
        chunk_size: As in `surface`.
        evaluate_chunks: As in `surface`.
        store: As in `surface`.
    """
    started = time.perf_counter()
    chosen = direction_makers.taken(model, direction, 1)
    task = Chunks(
        model, loss_fn, batches, chosen.vectors[:1], metric, rho, robust, statistics, strategy,
        chunk_size, evaluate_chunks, store,
    )  # fmt: skip
    x = axis(extent, resolution)
    values = task.values(x[:, None])
    return Line(
        x=x,
        loss=values[:, 0],
        metric=values[:, 1] if task.evaluator.metric else None,
        robust=values[:, 2] if rho else None,
        base_loss=task.base_loss,
        base_metric=task.base_metric,
        label=chosen.labels[0],
        norm=chosen.norms[0],
        num_forwards=task.num_forwards(len(x)),
        num_gradients=len(x) if rho else 0,
        seconds=time.perf_counter() - started,
    )


def surface(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    directions: Directions | Sequence[Tensor] | Tensor | str | None = None,
    extent: Extent | tuple[Extent, Extent] = 1.0,
    resolution: int | tuple[int, int] = 25,
    metric: Metric | Literal["auto"] | None = "auto",
    coarse: int | None = None,
    num_held_out: int = 16,
    seed: int = 0,
    loss_cap: float | None = None,
    rho: float = 0.0,
    robust: Literal["ascent", "first_order"] = "ascent",
    statistics: Batches | None = None,
    strategy: Strategy = "auto",
    chunk_size: int | None = None,
    evaluate_chunks: EvaluateChunks | None = None,
    store: Store | None = None,
) -> Surface:
    """Losses on the plane `theta + x d1 + y d2`.

    Args:
        model: Left bit-identical; runs in eval mode, also for the robust loss.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`; read once for every chunk of points.
        directions: Two rows, as `Directions`, a sequence of flat vectors `[P]` or a tensor
            `[2, P]`, which are taken as they are; default, and `"random"`: two random
            filter-normalised ones, seed 0.
        extent: Half-width of the plane, `(from, to)`, or two of these, one for each direction.
        resolution: Points along each direction, at least 2; odd puts one on the model itself.
        metric: `metric(outputs, targets)`, a mean over the batch; `auto` is accuracy where the
            targets are class numbers.
        coarse: Evaluate only this many points along each direction (at least 4), closer together
            towards the border, and interpolate the others by bicubic splines; the error is measured
            on held-out points. On networks 11 of 25 gave errors below 1 % of the range.
        num_held_out: How many.
        seed: Which ones.
        loss_cap: Losses above are cut in `mesh`; the stored losses are not changed.
        rho: Also measure the robust loss in a ball of this radius; costs a gradient at each point.
        robust: `ascent`, the larger loss before and after one SAM step, or `first_order`,
            `loss + rho |gradient|`; neither is below the loss.
        statistics: Estimate batch normalisation anew on these batches at each point.
        strategy: `loop`, `channels_last`, `vmap`, or `auto`, see `evaluation.PointEvaluator`.
        chunk_size: Points evaluated, and stored, together; default: all at once, but 64 with a
            store or somebody else who evaluates.
        evaluate_chunks: `f(evaluate, chunks)` that yields `(index, evaluate(chunks[index]))` in any
            order; default: one after the other, here.
        store: Where finished chunks are kept, and looked up before they are computed.

    Raises:
        ValueError: An argument is out of its range.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> found = surface(model, nn.functional.mse_loss, data, resolution=5)
    >>> found.loss[2, 2] == found.base_loss
    np.True_
    """
    started = time.perf_counter()
    chosen = direction_makers.taken(model, directions)
    if len(chosen) < 2:
        raise ValueError(f"a surface needs two directions, not {len(chosen)}")
    both = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    extents = _pair(extent)
    x, y = axis(extents[0], both[0]), axis(extents[1], both[1])
    task = Chunks(
        model, loss_fn, batches, chosen.vectors[:2], metric, rho, robust, statistics, strategy,
        chunk_size, evaluate_chunks, store,
    )  # fmt: skip
    if coarse is None or (coarse >= len(x) and coarse >= len(y)):
        grid = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1)
        values = task.values(grid.reshape(-1, 2)).reshape(len(x), len(y), 3)
        exact, error, spent = np.ones((len(x), len(y)), dtype=bool), None, len(x) * len(y)
    else:
        values, exact, error, spent = _coarse(task, x, y, coarse, num_held_out, seed)
    return Surface(
        x=x,
        y=y,
        loss=values[..., 0],
        metric=values[..., 1] if task.evaluator.metric else None,
        robust=values[..., 2] if rho else None,
        exact=exact,
        interpolation=error,
        base_loss=task.base_loss,
        base_metric=task.base_metric,
        loss_cap=loss_cap,
        labels=chosen.labels[:2],
        norms=chosen.norms[:2],
        cosine=chosen.cosine,
        normalization=chosen.normalization,
        kind=chosen.kind,
        rho=rho,
        strategy="outside" if evaluate_chunks else task.evaluator.used,
        num_forwards=task.num_forwards(spent),
        num_gradients=spent if rho else 0,
        seconds=time.perf_counter() - started,
    )


def axis(extent: Extent, resolution: int) -> Array:
    """Equidistant coordinates `[n]`; a symmetric extent gives a symmetric axis with an exact 0.

    So does any other whose points meet 0 up to rounding.

    >>> axis(1.0, 5).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2, not {resolution}")
    low, high = extent if isinstance(extent, tuple) else (-extent, extent)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"extent must be a positive number or (from, to), not {extent}")
    if low == -high:
        last = resolution - 1
        points: Array = high * ((2 * np.arange(resolution) - last) / last)
        return points
    points = np.linspace(low, high, resolution)
    points[np.abs(points) < 1e-9 * (high - low)] = 0.0
    return points


def _coarse(
    task: Chunks, x: Array, y: Array, coarse: int, num_held_out: int, seed: int
) -> tuple[Array, Array, InterpolationError | None, int]:
    """The fine grid from a coarse one: values, which are exact, the error, points evaluated."""
    if coarse < 4 or num_held_out < 1:
        raise ValueError("coarse must be at least 4 and num_held_out at least 1")
    rows, columns = rows_to_evaluate(len(x), coarse), rows_to_evaluate(len(y), coarse)
    held_out = cells_to_hold_out(x, y, rows, columns, num_held_out, seed)
    grid = np.stack(np.meshgrid(x[rows], y[columns], indexing="ij"), axis=-1).reshape(-1, 2)
    extra = np.stack([x[held_out[:, 0]], y[held_out[:, 1]]], axis=1)
    found = task.values(np.concatenate([grid, extra]))
    known = found[: len(grid)].reshape(len(rows), len(columns), 3)
    checked = found[len(grid) :]
    if not np.isfinite(known[..., 0]).all():
        fine = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2)
        values = task.values(fine).reshape(len(x), len(y), 3)
        return values, np.ones((len(x), len(y)), dtype=bool), None, len(found) + len(fine)
    values, exact, error = interpolated(x, y, rows, columns, known, held_out, checked)
    return values, exact, error, len(found)


def _pair(extent: Extent | tuple[Extent, Extent]) -> tuple[Extent, Extent]:
    """Two extents from one or two; `(a, b)` of numbers is one `(from, to)` for both."""
    if isinstance(extent, tuple) and any(isinstance(part, tuple) for part in extent):
        first, second = extent
        return first, second
    single: Any = extent
    return single, single
