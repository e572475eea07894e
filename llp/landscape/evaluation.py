"""Losses and accuracies at many points `theta + sum_k c_k d_k` around one model.

The parameters move on a work buffer (`work_buffer`); the originals are never written. A batch is
read once for a whole chunk of points, so nothing is loaded, augmented or copied to the device point
by point, and results stay on the device until the chunk is done. The point 0 is always evaluated
with the model as it is, so it has the model's own loss to the bit.

On a CPU points are looped over, with the channels of convolutions last in single precision, which
spares the library the same reordering at every point. Stacking the weights of several points
(`vmap`) loses there: it turns a convolution into a grouped one. On a GPU a timed probe decides.

The evaluator is a plain callable on coordinates that can be pickled, so that somebody else can
spread chunks over processes or machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from llp.landscape import batch_statistics
from llp.landscape.functional import functional_call
from llp.landscape.parameters import (
    evaluation_state,
    exact_arithmetic,
    flatten,
    trainable,
    unflatten,
)
from llp.landscape.passes import Batches, BatchLosses, LossFunction, iterate
from llp.landscape.work_buffer import WorkBuffer, moving, with_channels_last

Metric = Callable[[Any, Any], Tensor]
Strategy = Literal["auto", "loop", "channels_last", "vmap"]
Array = np.ndarray[Any, Any]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of examples whose largest output is the target, classes along dimension 1."""
    return (outputs.argmax(1) == targets).double().mean()


def has_accuracy(outputs: Any, targets: Any) -> bool:
    """Whether `accuracy` means something: class numbers as targets and one output per class."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and not targets.is_floating_point()
        and not targets.is_complex()
        and outputs.ndim >= 2
        and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    )


@dataclass(frozen=True)
class PointValues:
    """What was found at m points: `loss` `[m]`, and `metric` and `robust` where asked for."""

    loss: Array
    metric: Array | None = None
    robust: Array | None = None

    def rows(self) -> Array:
        """One row for each point: loss, metric, robust loss; NaN where not asked for."""
        empty = np.full_like(self.loss, np.nan)
        return np.stack(
            [
                self.loss,
                empty if self.metric is None else self.metric,
                empty if self.robust is None else self.robust,
            ],
            axis=1,
        )


class PointEvaluator:
    """Losses of a model at coordinates `[m, d]` along directions `[d, P]`.

    Args:
        model: Left bit-identical after every call.
        loss_fn: A mean over the batch.
        batches: Re-iterable of `(inputs, targets)`.
        vectors: Directions `[d, P]`.
        metric: `metric(outputs, targets)`, a mean over the batch; None measures only the loss.
        strategy: `loop` over points, `channels_last` for a loop in that memory format, `vmap` over
            stacked points, or `auto`: on a CPU `channels_last` for a single-precision model with
            convolutions that gives the same outputs in it, else `loop`; on a GPU a timed probe.
        statistics: Batches on which batch normalisation is estimated anew at every point.
        rho: Radius of the ball in which the robust loss is taken; 0 for none.
        robust: `ascent` takes the larger of the losses before and after one step of length `rho`
            up the gradient; `first_order` is `loss + rho |gradient|`. Neither is ever below the
            loss.

    Raises:
        ValueError: An unknown strategy, a negative `rho`, or `vmap` together with what it cannot.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Batches,
        vectors: Tensor,
        *,
        metric: Metric | None = None,
        strategy: Strategy = "auto",
        statistics: Batches | None = None,
        rho: float = 0.0,
        robust: Literal["ascent", "first_order"] = "ascent",
    ) -> None:
        if strategy not in get_args(Strategy):
            raise ValueError(f"strategy must be one of {get_args(Strategy)}, not {strategy!r}")
        if rho < 0:
            raise ValueError(f"rho must not be negative, not {rho:g}")
        if robust not in ("ascent", "first_order"):
            raise ValueError(f"robust must be ascent or first_order, not {robust!r}")
        self._alone = rho > 0 or (statistics is not None and bool(batch_statistics.layers(model)))
        if strategy in ("vmap", "channels_last") and self._alone:
            raise ValueError(
                f"{strategy} evaluates neither robust losses nor new batch statistics; use auto"
            )
        self.model = model
        self.loss_fn = loss_fn
        self.batches = batches
        self.vectors = vectors
        self.metric = metric
        self.strategy: Strategy = strategy
        self.statistics = statistics
        self.rho = rho
        self.robust = robust
        self.probe_seconds: dict[str, float] = {}
        self._how = (
            "alone" if self._alone else {"vmap": "vmap 8", "auto": ""}.get(strategy, strategy)
        )

    def to(self, device: torch.device | str) -> PointEvaluator:
        """The same on another device, for a worker that has one of its own; moves the model."""
        self.model.to(device)
        self.vectors = self.vectors.to(device)
        return self

    def __call__(self, coordinates: Array) -> Array:
        """Rows `[m, 3]` of loss, metric and robust loss at coordinates `[m, d]`, float64.

        Non-finite values are returned as they are.

        Raises:
            ValueError: The coordinates have another number of columns than there are directions.
        """
        points = np.atleast_2d(np.asarray(coordinates, dtype=np.float64))
        if points.shape[1] != len(self.vectors):
            raise ValueError(
                f"expected coordinates [m, {len(self.vectors)}], not shape {points.shape}"
            )
        self.prepare()
        with evaluation_state(self.model), exact_arithmetic(trainable(self.model)[0].device):
            if self._alone:
                return self._one_by_one(points).rows()
            centre = ~points.any(axis=1)
            if self._how == "loop" or centre.all():
                return self._looped(points).rows()
            rows = np.empty((len(points), 3))
            rows[~centre] = self._moved(points[~centre], self._how).rows()
            if centre.any():
                rows[centre] = self._looped(points[centre][:1]).rows()
            return rows

    @property
    def used(self) -> str:
        """How points are evaluated: `loop`, `channels_last`, `vmap K`, or `alone`.

        `alone` is a loop over points that each need gradients or new statistics; empty before
        `prepare` or the first call.
        """
        return self._how

    def prepare(self) -> None:
        """Decides how points are evaluated, so that copies of this evaluator do the same."""
        if self._how:
            return
        device = trainable(self.model)[0].device
        with evaluation_state(self.model), exact_arithmetic(device):
            other = ["channels_last"] if self._runs_with_channels_last() else []
            if device.type == "cuda":
                self._how = self._fastest(["loop", *other, "vmap 4", "vmap 16"])
            else:
                self._how = [*other, "loop"][0]

    def at_base(self) -> tuple[float, float]:
        """Loss and metric (NaN for none) of the model as it is, its parameters untouched."""
        with evaluation_state(self.model), exact_arithmetic(trainable(self.model)[0].device):
            values = self._means(*self._here())
        return float(values[0]), float(values[1])

    def _moved(self, points: Array, how: str) -> PointValues:
        if how.startswith("vmap"):
            return self._stacked(points, int(how.split()[1]))
        return self._looped(points, channels_last=how == "channels_last")

    def _fastest(self, ways: Sequence[str]) -> str:
        """By timing a few points on the first batch each way, on a GPU."""
        points = np.random.default_rng(0).normal(scale=1e-3, size=(16, len(self.vectors)))
        inputs, targets, _ = next(iterate(self.batches, self.vectors.device))
        batches, self.batches = self.batches, [(inputs, targets)]
        try:
            for how in ways:
                count = int(how.split()[1]) if how.startswith("vmap") else 4
                try:
                    seconds = _timed(partial(self._moved, points[:count], how))
                except (RuntimeError, ValueError, NotImplementedError):
                    if how == "loop":
                        raise
                    continue  # cannot be vectorised or laid out anew, or does not fit
                self.probe_seconds[how] = seconds / count
        finally:
            self.batches = batches
        return min(self.probe_seconds, key=self.probe_seconds.__getitem__)

    def _runs_with_channels_last(self) -> bool:
        """Whether there are convolutions for it, and the outputs stay the same."""
        parameters = trainable(self.model)
        convolutions = [m for m in self.model.modules() if isinstance(m, _ConvNd)]
        if not any(module.weight.ndim in (4, 5) for module in convolutions) or (
            parameters[0].dtype == torch.float64  # no library for it on a CPU
            and not parameters[0].is_cuda
        ):
            return False
        inputs, _, _ = next(iterate(self.batches, parameters[0].device))
        with torch.no_grad():
            expected = self.model(inputs)
            try:
                with moving(self.model, self.vectors, channels_last=True):
                    found = self.model(with_channels_last(inputs))
            except RuntimeError:  # `view` of a tensor that is laid out otherwise
                return False
        return (
            isinstance(found, Tensor)
            and found.shape == expected.shape
            and torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        )

    def _looped(self, points: Array, channels_last: bool = False) -> PointValues:
        results, sizes = [], []
        moves = points.tolist()
        with (
            moving(self.model, self.vectors, channels_last=channels_last) as mover,
            torch.no_grad(),
        ):
            for inputs, targets, size in iterate(self.batches, mover.work.device):
                if channels_last:
                    inputs = with_channels_last(inputs)
                losses, metrics = [], []
                for move in moves:
                    mover.go(move)
                    outputs = self.model(inputs)
                    losses.append(_scalar(self.loss_fn(outputs, targets)))
                    if self.metric is not None:
                        metrics.append(self.metric(outputs, targets))
                results.append(_rows(losses, metrics))
                sizes.append(size)
        return self._values(self._means(torch.stack(results, dim=2), sizes))

    def _stacked(self, points: Array, count: int) -> PointValues:
        """`count` points at once."""
        named = dict(self.model.named_parameters())
        names = [name for name, parameter in named.items() if parameter.requires_grad]
        like = [named[name] for name in names]
        base = flatten(like)

        def at(vector: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
            weights = dict(zip(names, unflatten(vector, like), strict=True))
            outputs = functional_call(self.model, weights, (inputs,))
            loss = _scalar(self.loss_fn(outputs, targets)).double()
            if self.metric is None:
                return loss, torch.full_like(loss, torch.nan)
            return loss, self.metric(outputs, targets).double()

        many = torch.func.vmap(at, in_dims=(0, None, None))
        results, sizes = [], []
        coordinates = torch.from_numpy(points).to(self.vectors)
        with torch.no_grad():
            for inputs, targets, size in iterate(self.batches, base.device):
                parts = []
                for chunk in torch.split(coordinates, count):
                    places = torch.addmm(base.expand(len(chunk), -1), chunk, self.vectors)
                    parts.append(torch.stack(many(places, inputs, targets)))
                results.append(torch.cat(parts, dim=1))
                sizes.append(size)
        return self._values(self._means(torch.stack(results, dim=2), sizes))

    def _one_by_one(self, points: Array) -> PointValues:
        """With what needs all batches at one point: new batch statistics, gradients."""
        found, robust = [], []
        sizes: list[int] = []
        with moving(self.model, self.vectors) as mover:
            for move in points.tolist():
                mover.go(move)
                if self.statistics is not None:
                    batch_statistics.reestimate(self.model, self.statistics)
                slope = mover.layout.empty() if self.rho else None
                here, sizes = self._here(mover.layout, slope)
                found.append(here)
                if slope is not None and self.robust == "first_order":
                    robust.append(slope.norm().double())
                elif slope is not None:
                    norm = slope.norm()
                    scale = torch.where(norm > 0, self.rho / norm, 0.0)
                    mover.work.add_(slope * scale)
                    robust.append(self._here()[0][0])
        values = self._means(torch.stack(found, dim=1), sizes)
        if not self.rho:
            return self._values(values)
        if self.robust == "first_order":
            return self._values(values, values[0] + self.rho * torch.stack(robust).cpu().numpy())
        moved = self._means(torch.stack(robust)[None], sizes)[0]
        return self._values(values, np.fmax(values[0], moved))

    def _here(
        self, layout: WorkBuffer | None = None, slope: Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        """Loss and metric of every batch `[2, B]` where the parameters are now.

        Fills `slope` with the gradient over all batches when it is given.
        """
        parameters = trainable(self.model)
        found, sizes = [], []
        with torch.set_grad_enabled(slope is not None):
            for inputs, targets, size in iterate(self.batches, parameters[0].device):
                outputs = self.model(inputs)
                loss = _scalar(self.loss_fn(outputs, targets))
                with torch.no_grad():
                    if slope is not None and layout is not None:
                        grads = torch.autograd.grad(
                            loss, parameters, allow_unused=True, materialize_grads=True
                        )
                        torch._foreach_add_(layout.views(slope), list(grads), alpha=float(size))
                    row = torch.full((2,), torch.nan, dtype=torch.float64, device=loss.device)
                    row[0] = loss
                    if self.metric is not None:
                        row[1] = self.metric(outputs, targets)
                found.append(row)
                sizes.append(size)
        if slope is not None:
            slope.div_(sum(sizes))
        return torch.stack(found, dim=1), sizes

    @staticmethod
    def _means(results: Tensor, sizes: Sequence[int]) -> Array:
        """Means over the last dimension as `BatchLosses.mean` takes them, to the bit."""
        rows = results.cpu()
        if len(sizes) == 1:
            return rows[..., 0].numpy()
        weights = BatchLosses(rows, tuple(sizes)).weights
        means = [float(weights @ row) for row in rows.reshape(-1, len(sizes))]
        return np.asarray(means).reshape(rows.shape[:-1])

    def _values(self, found: Array, robust: Array | None = None) -> PointValues:
        return PointValues(found[0], None if self.metric is None else found[1], robust)


def _rows(losses: Sequence[Tensor], metrics: Sequence[Tensor]) -> Tensor:
    """Losses and metrics of points `[2, m]`, float64."""
    loss_row = torch.stack(list(losses)).double()
    if not metrics:
        return torch.stack([loss_row, torch.full_like(loss_row, torch.nan)])
    return torch.stack([loss_row, torch.stack(list(metrics)).double()])


def _scalar(loss: Tensor) -> Tensor:
    if loss.ndim:
        raise ValueError(f"loss_fn must return a scalar mean, not shape {tuple(loss.shape)}")
    return loss


def _timed(call: Callable[[], Any]) -> float:
    """Seconds of the second of two calls, on a GPU."""
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started
