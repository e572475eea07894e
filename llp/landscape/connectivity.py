"""Whether two trained networks are joined by a path of low loss.

*Barrier*: the largest rise of the loss above the straight line between the two end losses (Frankle
et al. 2020; Entezari et al. 2022, definition 2.1); 0 when nothing lies above it, as for any convex
loss. Along the straight segment it is `linear_barrier`.
*Curve*: a path trained to have low loss on average, with its ends fixed (Garipov et al. 2018,
section 3): a Bezier curve or a polygonal chain whose bends are the parameters. Any `nn.Module`
works, through `functional_call`; no layer is rewritten.
Batch normalisation is estimated anew at every point between the ends when `statistics` are given;
the ends keep their own, so that their losses are those of the two models to the bit.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from llp.landscape import batch_statistics
from llp.landscape.chunks import chosen_metric
from llp.landscape.directions import weights_of
from llp.landscape.evaluation import Array, Metric, PointEvaluator
from llp.landscape.functional import functional_call
from llp.landscape.parameters import evaluation_state, flatten, trainable, unflatten
from llp.landscape.passes import Batches, LossFunction, iterate
from llp.landscape.plain import Plain

Kind = Literal["bezier", "chain"]


@dataclass(frozen=True)
class Curve:
    """A path in weight space.

    Attributes:
        points: Control points `[K, P]`; the first and the last are the ends.
        kind: `bezier` (of degree K - 1) or `chain` (straight pieces of equal share of `t`).
    """

    points: Tensor
    kind: Kind

    def weights(self, t: float) -> list[float]:
        """Shares of the control points in the point at `t` in [0, 1]; they sum to one."""
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"t must be from 0 to 1, not {t:g}")
        last = len(self.points) - 1
        if self.kind == "bezier":
            return [math.comb(last, k) * (1 - t) ** (last - k) * t**k for k in range(last + 1)]
        return [max(0.0, 1.0 - abs(t * last - k)) for k in range(last + 1)]

    def at(self, t: float) -> Tensor:
        """The flat weights `[P]` at `t`; at 0 and 1 the ends, to the bit."""
        return _mix(self.weights(t), list(self.points))

    def derivative(self, t: float) -> Tensor:
        """`d/dt` of the flat weights `[P]`; for a chain the piece after `t` (the last one at 1)."""
        last = len(self.points) - 1
        steps = last * (self.points[1:] - self.points[:-1])
        if self.kind == "chain":
            return steps[min(int(t * last), last - 1)]
        return Curve(steps, "bezier").at(t) if last > 1 else steps[0]

    def length(self, num_pieces: int = 200) -> float:
        """Euclidean length; exact for a chain, by Simpson's rule for a Bezier curve."""
        if self.kind == "chain" or len(self.points) == 2:
            return float((self.points[1:] - self.points[:-1]).double().norm(dim=1).sum())
        count = 2 * max(1, num_pieces // 2)
        speeds = [float(self.derivative(k / count).double().norm()) for k in range(count + 1)]
        return (speeds[0] + speeds[-1] + 4 * sum(speeds[1:-1:2]) + 2 * sum(speeds[2:-1:2])) / (
            3 * count
        )


@dataclass(frozen=True)
class Path(Plain):
    """Losses along a path between two models.

    Attributes:
        t: Positions `[n]` from 0 to 1.
        loss: At each `[n]`.
        metric: The metric (accuracy unless given) at each `[n]`, or None.
        barrier: Largest rise above the straight line between the end losses.
        barrier_at: Where it is.
        mean_loss: Average of the loss over `t`.
        length: Euclidean length of the path.
        chord: Distance between the ends.
        kind: `linear`, `bezier` or `chain`.
        num_forwards: Losses of the whole data spent.
        seconds: Wall-clock time.
    """

    t: Array
    loss: Array
    metric: Array | None
    barrier: float
    barrier_at: float
    mean_loss: float
    length: float
    chord: float
    kind: str
    num_forwards: int
    seconds: float


@dataclass(frozen=True)
class Connection:
    """A trained curve with its losses.

    Attributes:
        curve: The path itself.
        path: Its losses.
        training_losses: Mean loss of every epoch of its training.
    """

    curve: Curve
    path: Path
    training_losses: tuple[float, ...]


def linear_barrier(
    first: nn.Module,
    second: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    num_points: int = 25,
    statistics: Batches | None = None,
    metric: Metric | Literal["auto"] | None = "auto",
) -> Path:
    """Losses on the straight segment between two models, and the barrier on it.

    Args:
        first: Where t = 0; left bit-identical.
        second: Where t = 1, of the same shape; left bit-identical.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        num_points: Points, the ends included, at least 2.
        statistics: Batches on which batch normalisation is estimated anew between the ends;
            without them its buffers are interpolated.
        metric: As in `surface`.
    """
    start = flatten(trainable(first))
    line = Curve(torch.stack([start, weights_of(first, second).to(start)]), "chain")
    found = along(
        line, first, second, loss_fn, batches,
        num_points=num_points, statistics=statistics, metric=metric,
    )  # fmt: skip
    return Path(**{**_fields(found), "kind": "linear"})


def connect(
    first: nn.Module,
    second: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    training: Batches | None = None,
    kind: Kind = "bezier",
    num_bends: int = 1,
    num_epochs: int = 20,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    num_points: int = 25,
    statistics: Batches | None = None,
    metric: Metric | Literal["auto"] | None = "auto",
    on_epoch: Callable[[int, float], None] | None = None,
) -> Connection:
    """A curve of low loss between two models, found by training its bends.

    Every step draws one `t` uniformly in [0, 1] and follows the gradient of the batch's loss there
    with respect to the bends, by SGD with momentum and a cosine schedule (Garipov et al. 2018,
    section 3.3). The bends start on the straight segment. Layers are in training mode, so batch
    normalisation uses each batch's own statistics. Both models are left bit-identical.

    Args:
        first: Where t = 0.
        second: Where t = 1.
        loss_fn: A mean over the batch.
        batches: What the losses along the curve are measured on.
        training: What the curve is trained on; default `batches`.
        kind: `bezier` or `chain`.
        num_bends: Trained points, at least 1.
        num_epochs: Passes over `training`, at least 1.
        learning_rate: Of the start of the schedule, > 0.
        momentum: From 0 to below 1.
        weight_decay: On the weights at `t`.
        generator: CPU generator of `t`; default: seed 0.
        num_points: As in `linear_barrier`.
        statistics: As in `linear_barrier`; default `training` when there is batch normalisation.
        metric: As in `surface`.
        on_epoch: Called with the epoch's number and its mean loss.

    Raises:
        ValueError: An argument is out of its range, or the models differ in shape.
        FloatingPointError: The training diverged.
    """
    if num_bends < 1 or num_epochs < 1:
        raise ValueError("num_bends and num_epochs must be at least 1")
    if not learning_rate > 0 or not 0 <= momentum < 1 or weight_decay < 0:
        raise ValueError("learning_rate must be above 0, momentum in [0, 1), weight_decay >= 0")
    if kind not in ("bezier", "chain"):
        raise ValueError(f"kind must be bezier or chain, not {kind!r}")
    data = batches if training is None else training
    start = flatten(trainable(first))
    end = weights_of(first, second).to(start)
    shares = np.linspace(0.0, 1.0, num_bends + 2)[1:-1].tolist()
    bends = torch.stack([torch.lerp(start, end, share) for share in shares]).requires_grad_()
    generator = generator or torch.Generator().manual_seed(0)
    with evaluation_state(first):  # puts the random states back, which dropout uses
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        losses = _train(
            copy.deepcopy(first), loss_fn, data, kind, start, bends, end, num_epochs,
            learning_rate, momentum, weight_decay, generator, on_epoch,
        )  # fmt: skip
    curve = Curve(torch.cat([start[None], bends.detach(), end[None]]), kind)
    path = along(
        curve, first, second, loss_fn, batches, num_points=num_points, metric=metric,
        statistics=data if statistics is None else statistics,
    )  # fmt: skip
    return Connection(curve, path, tuple(losses))


def along(
    curve: Curve,
    first: nn.Module,
    second: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    num_points: int = 25,
    statistics: Batches | None = None,
    metric: Metric | Literal["auto"] | None = "auto",
) -> Path:
    """Losses along any curve between two models; the arguments are those of `linear_barrier`."""
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, not {num_points}")
    started = time.perf_counter()
    measure = chosen_metric(first, batches, metric)
    positions = [index / (num_points - 1) for index in range(num_points)]
    found = []
    for t in positions:
        if t in (0.0, 1.0):
            model = second if t == 1.0 else first
            found.append(_measured(model, loss_fn, batches, measure))
        else:
            found.append(_between(curve, t, first, second, loss_fn, batches, statistics, measure))
    values = np.asarray(found)
    places, loss = np.asarray(positions), values[:, 0]
    rises = loss - ((1 - places) * loss[0] + places * loss[-1])
    rises[[0, -1]] = 0.0
    broken = ~np.isfinite(rises)
    highest = int(np.argmax(broken if broken.any() else rises))
    return Path(
        t=places,
        loss=loss,
        metric=None if measure is None else values[:, 1],
        barrier=float(rises[highest]),
        barrier_at=float(places[highest]),
        mean_loss=float(np.trapezoid(loss, places)),
        length=curve.length(),
        chord=float((curve.points[-1] - curve.points[0]).double().norm()),
        kind=curve.kind,
        num_forwards=num_points,
        seconds=time.perf_counter() - started,
    )


def _measured(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, metric: Metric | None
) -> tuple[float, float]:
    none = flatten(trainable(model))[None][:0]
    return PointEvaluator(model, loss_fn, batches, none, metric=metric).at_base()


def _between(
    curve: Curve,
    t: float,
    first: nn.Module,
    second: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    statistics: Batches | None,
    metric: Metric | None,
) -> tuple[float, float]:
    """Loss and metric at a point inside; buffers interpolated, then estimated anew if asked for."""
    parameters = trainable(first)
    others = dict(second.named_buffers())
    kept = [parameter.data for parameter in parameters]
    with evaluation_state(first):
        try:
            point = unflatten(curve.at(t), parameters)
            for parameter, part in zip(parameters, point, strict=True):
                parameter.data = part.clone()
            for name, buffer in first.named_buffers():
                if name in others and buffer.is_floating_point():
                    buffer.copy_(torch.lerp(buffer, others[name].to(buffer), t))
            if statistics is not None:
                batch_statistics.reestimate(first, statistics)
            return _measured(first, loss_fn, batches, metric)
        finally:
            for parameter, original in zip(parameters, kept, strict=True):
                parameter.data = original


def _train(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    kind: Kind,
    start: Tensor,
    bends: Tensor,
    end: Tensor,
    num_epochs: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
    on_epoch: Callable[[int, float], None] | None,
) -> list[float]:
    """Trains `bends` in place; `model` is a copy whose buffers may change."""
    like = trainable(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model.train()
    optimizer = torch.optim.SGD([bends], lr=learning_rate, momentum=momentum)
    shape = Curve(torch.zeros(len(bends) + 2, 0), kind)
    losses: list[float] = []
    for epoch in range(num_epochs):
        total = torch.zeros((), dtype=torch.float64, device=bends.device)
        count = 0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * epoch / num_epochs)) / 2
        for inputs, targets, size in iterate(batches, bends.device):
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            point = _mix(shape.weights(t), [start, *bends.unbind(), end])
            weights = dict(zip(names, unflatten(point, like), strict=True))
            loss = loss_fn(functional_call(model, weights, (inputs,)), targets)
            objective = loss + weight_decay / 2 * (point @ point) if weight_decay else loss
            optimizer.zero_grad()
            objective.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += size * loss.detach()
            count += size
        losses.append(float(total) / count)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the curve diverged in epoch {epoch + 1}; use a smaller learning_rate than "
                f"{learning_rate:g}"
            )
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    return losses


def _mix(shares: Iterable[float], points: list[Tensor]) -> Tensor:
    """`sum share * point`, leaving out shares of 0, so that an end is itself to the bit."""
    used = [(share, point) for share, point in zip(shares, points, strict=True) if share]
    if len(used) == 1 and used[0][0] == 1.0:
        return used[0][1].clone()
    total = used[0][0] * used[0][1]
    for share, point in used[1:]:
        total = total + share * point
    return total


def _fields(path: Path) -> dict[str, Any]:
    return {name: getattr(path, name) for name in path.__dataclass_fields__}
