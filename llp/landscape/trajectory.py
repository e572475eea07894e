"""The path of a training run in the plane in which it moved most, with its true losses beside it.

Principal components of the checkpoints (Lorch 2016; Li et al. 2018, section 7): the plane through
the last checkpoint spanned by the directions of largest variance. Two components often hold most of
the variance even for a random walk, and the loss *on the plane* under a projected checkpoint is not
the loss *of* that checkpoint. So every point of the path carries its true loss and its distance
from the plane; a picture without them misleads.

    path = landscape.trajectory(model, loss_fn, batches, checkpoints)
    landscape.surface(model, loss_fn, batches, directions=path.directions, extent=path.extent())
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from llp.landscape import directions as direction_makers
from llp.landscape.chunks import chosen_metric
from llp.landscape.directions import Directions, Weights, weights_of
from llp.landscape.evaluation import Array, Metric, PointEvaluator
from llp.landscape.parameters import evaluation_state, flatten, trainable, unflatten
from llp.landscape.passes import Batches, LossFunction
from llp.landscape.plain import Plain

_COLUMNS = 2**20
"""Weights that are held in float64 at once while the Gram matrix is summed."""


@dataclass(frozen=True)
class PrincipalComponents(Plain):
    """Principal components of a set of checkpoints.

    Attributes:
        vectors: Orthonormal rows `[d, P]`, largest variance first.
        explained: Share of the variance along each `[d]`.
        singular_values: Of the centred checkpoints, all of them `[T]`, falling.
    """

    vectors: Tensor
    explained: tuple[float, ...]
    singular_values: Array


@dataclass(frozen=True)
class Trajectory(Plain):
    """A training path projected to a plane through the model.

    Attributes:
        directions: Two orthonormal principal directions; `values` are their shares of the variance.
        coordinates: Of every checkpoint in the plane `[T, 2]`; the model itself is the origin.
        out_of_plane: Distance of every checkpoint from the plane `[T]`.
        distance: Distance of every checkpoint from the model `[T]`.
        loss: The true loss of every checkpoint `[T]`, with its own buffers.
        metric: Its true metric `[T]`, or None.
        plane_loss: The loss on the plane under every checkpoint `[T]`, with the model's buffers.
        explained: Share of the variance along each direction.
        num_forwards: Losses of the whole data spent.
        seconds: Wall-clock time.
    """

    directions: Directions
    coordinates: Array
    out_of_plane: Array
    distance: Array
    loss: Array
    metric: Array | None
    plane_loss: Array
    explained: tuple[float, ...]
    num_forwards: int
    seconds: float

    def extent(self, margin: float = 0.15) -> tuple[tuple[float, float], tuple[float, float]]:
        """`(from, to)` along both directions that holds the whole path, for `surface`."""
        found = []
        for column in self.coordinates.T:
            low, high = min(0.0, float(column.min())), max(0.0, float(column.max()))
            room = margin * max(high - low, 1e-12)
            found.append((low - room, high + room))
        return found[0], found[1]


def principal_components(
    model: nn.Module, checkpoints: Sequence[Weights], count: int = 2
) -> PrincipalComponents:
    """The `count` directions of largest variance among the checkpoints.

    By the eigenvectors of the T x T Gram matrix of the centred checkpoints, summed in float64 over
    blocks of weights; memory is that of the checkpoints. The sign is the one that gives the first
    checkpoint a coordinate that is not negative.

    Raises:
        ValueError: Fewer than `count + 1` checkpoints, or all of them are the same.
    """
    if count < 1 or len(checkpoints) < count + 1:
        raise ValueError(
            f"{count} components need at least {count + 1} checkpoints, not {len(checkpoints)}"
        )
    rows = [weights_of(model, each).cpu() for each in checkpoints]
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block in _centred_blocks(rows):
        gram += block @ block.T
    values, mixing = torch.linalg.eigh(gram)
    values, mixing = values.flip(0).clamp_min(0.0), mixing.flip(1)
    if not float(values[count - 1]) > 1e-13 * float(gram.trace()):
        raise ValueError(f"the checkpoints do not span {count} directions")
    scaled = mixing[:, :count] / values[:count].sqrt()
    scaled = scaled * torch.where(mixing[0, :count] < 0, -1.0, 1.0)
    vectors = torch.cat([scaled.T @ block for block in _centred_blocks(rows)], dim=1)
    basis, turns = torch.linalg.qr(vectors.T)
    vectors = basis.T * torch.where(turns.diagonal() < 0, -1.0, 1.0).to(vectors)[:, None]
    return PrincipalComponents(
        vectors=vectors,
        explained=tuple((values[:count] / values.sum()).tolist()),
        singular_values=values.sqrt().numpy(),
    )


def pca_directions(model: nn.Module, checkpoints: Sequence[Weights], count: int = 2) -> Directions:
    """The principal components of the checkpoints as unit directions through the model."""
    found = principal_components(model, checkpoints, count)
    return direction_makers.make(
        model,
        found.vectors,
        kind="trajectory",
        labels=[
            f"component {index + 1} ({share:.1%} of the variance)"
            for index, share in enumerate(found.explained)
        ],
        values=found.explained,
    )


def trajectory(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    checkpoints: Sequence[Weights],
    *,
    directions: Directions | None = None,
    metric: Metric | Literal["auto"] | None = "auto",
) -> Trajectory:
    """The path of the checkpoints in a plane through `model`, usually the last of them.

    Args:
        model: Origin of the plane; left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        checkpoints: Models, state dicts or flat vectors in the order of training. Buffers (running
            statistics) of models and state dicts are used for their true losses.
        directions: The plane, two orthogonal rows of any length; default: the principal components
            of the checkpoints.
        metric: As in `surface`.

    Raises:
        ValueError: Too few checkpoints, or directions that are not orthogonal.
    """
    started = time.perf_counter()
    plane = directions or pca_directions(model, checkpoints)
    if len(plane) < 2 or plane.cosine > 1e-3:
        raise ValueError("a path is projected on two orthogonal directions")
    rows = plane.vectors[:2].double()
    origin = flatten(trainable(model))
    lengths = (rows**2).sum(1)
    coordinates, away, distance = [], [], []
    for each in checkpoints:
        step = (weights_of(model, each).to(origin) - origin).double()
        place = (rows @ step) / lengths
        coordinates.append(place.cpu())
        away.append(float((step - place @ rows).norm()))
        distance.append(float(step.norm()))
    points = torch.stack(coordinates).numpy()
    measure = chosen_metric(model, batches, metric)
    evaluator = PointEvaluator(model, loss_fn, batches, plane.vectors[:2], metric=measure)
    true = np.asarray([_true(evaluator, model, each) for each in checkpoints])
    return Trajectory(
        directions=plane,
        coordinates=points,
        out_of_plane=np.asarray(away),
        distance=np.asarray(distance),
        loss=true[:, 0],
        metric=None if measure is None else true[:, 1],
        plane_loss=evaluator(points)[:, 0],
        explained=plane.values,
        num_forwards=2 * len(points),
        seconds=time.perf_counter() - started,
    )


def _true(evaluator: PointEvaluator, model: nn.Module, weights: Weights) -> tuple[float, float]:
    """Loss and metric of a checkpoint with its own buffers."""
    parameters = trainable(model)
    kept = [parameter.data for parameter in parameters]
    with evaluation_state(model):
        try:
            vector = weights_of(model, weights).to(parameters[0])
            for parameter, part in zip(parameters, unflatten(vector, parameters), strict=True):
                parameter.data = part.clone()
            buffers = _buffers(weights)
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            return evaluator.at_base()
        finally:
            for parameter, original in zip(parameters, kept, strict=True):
                parameter.data = original


def _buffers(weights: Weights) -> Mapping[str, Tensor]:
    if isinstance(weights, nn.Module):
        return dict(weights.named_buffers())
    return weights if isinstance(weights, Mapping) else {}


def _centred_blocks(rows: Sequence[Tensor]) -> Iterator[Any]:
    """The checkpoints minus their mean, `[T, columns]` in float64, a block of weights at a time."""
    for start in range(0, len(rows[0]), _COLUMNS):
        block = torch.stack([row[start : start + _COLUMNS].double() for row in rows])
        yield block - block.mean(0)
