"""The statistics behind TALT, of all tensors of a device at once.

What is kept of a tensor has the same small size whatever its shape, and is stacked over all of
them (`TensorStatistics`); `talt_gradients` makes it from the gradients. With ResNet-20 that is some
35 launches a step on a GPU, and 200 more where the directions are found anew. The host waits for
none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from llp.optim.talt_gradients import COLUMNS, Alike, Tall, grouped
from llp.optim.talt_parts import (
    IncrementalCovariance,
    Oscillation,
    Persistence,
    StackedProjection,
    dominant_direction,
    nbytes,
    noise_edge,
    on_device,
    orthogonal_to,
    power_iteration,
    random_start,
    ridge_for_condition,
    valley,
)
from llp.optim.wrapper import put_back

MAX_CONDITION = 100.0
"""Of the covariance, after the ridge: no direction shrinks by more than its root, 10."""

ITERATIONS = 3
"""Of the power iteration at each update, from the vectors of the last one."""

TOLERANCE = 0.1
"""Residual, relative to the largest eigenvalue, above which a direction is left alone."""

NOTHING = 1e-4
"""Share of the mean below which what is left of it off the steep directions is rounding."""


class Options(NamedTuple):
    """Those of `talt.Talt` that statistics need."""

    smoothing_factor: float
    valley_strength: float
    projection_dimension: int
    num_directions: int
    decay: float


class TensorStatistics:
    """What TALT knows of the tensors of one device, and what it does to their gradients.

    Args:
        parameters: Numbers and tensors that take part.
        options: Of the optimizer.
        generator: Of projections and first directions.

    Attributes:
        numbers: Of the parameters, in the order of the statistics.
        basis: `[count, rows, directions + 1]`, orthonormal: the steep directions, then that of the
            valley; zero where a tensor has too few rows.
        extra: `[count, directions + 1]`, the diagonal of S - I.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[int, Tensor]],
        options: Options,
        generator: torch.Generator,
    ) -> None:
        self.options = options
        self._alike, self._tall = grouped(parameters, options.projection_dimension, generator)
        self._groups: list[Alike | Tall] = [*self._alike, *self._tall]
        self.shapes = [shape for group in self._alike for shape in group.shapes]
        maps = [shape.down for shape in self.shapes for _ in shape.numbers]
        self.shapes += [group.shape for group in self._tall]
        self.numbers = [number for shape in self.shapes for number in shape.numbers]
        count, device = len(self.numbers), parameters[0][1].device
        rows = max(shape.down.dimension for shape in self.shapes)
        columns = max(group.num_reduced for group in self._groups)
        self._down = StackedProjection(maps, rows, device) if maps else None
        self._num_rows = [group.num_rows for group in self._alike]
        self._sketched = rows, columns
        steep = min(options.num_directions, rows - 1)
        self._root = torch.ones(count, rows, 1, dtype=torch.float32, device=device)
        own_rows, own_columns = torch.zeros(2, count, dtype=torch.float32)
        for shape in self.shapes:
            own_rows[shape.range] = float(shape.down.dimension)
            own_columns[shape.range] = float(min(shape.columns, COLUMNS))
            sizes = shape.down.bucket_sizes.sqrt().unsqueeze(1)
            self._root[shape.range, : shape.down.dimension] = sizes
        allowed = torch.arange(steep) < (own_rows - 1).unsqueeze(1)  # one is left for the valley
        inside = torch.arange(rows) < own_rows.unsqueeze(1)
        start = random_start(count, rows, steep + 1, generator) * inside.unsqueeze(2)
        start[:, :, :steep] *= allowed.unsqueeze(1)
        self._allowed = allowed.float().to(device)
        self._others = (own_rows - allowed.sum(1)).to(device)
        self._noise = (noise_edge(own_rows - allowed.sum(1), own_columns) / own_columns).to(device)
        self.covariance = IncrementalCovariance(
            count, rows, columns, decay=options.decay, device=device
        )
        self.oscillation = Oscillation(count, rows, columns, device)
        self.persistence = Persistence(count, steep, columns, device)
        self.basis = start.to(device)
        self.extra = self._root.new_zeros(count, steep + 1)
        self.num_updates = 0

    def change(self, *, update: bool) -> Tensor | None:
        """Takes in the gradients and changes them in place.

        Args:
            update: Whether to find the directions anew first.

        Returns:
            At an update, `[count, 6 + directions]`: what `talt.LOGGED` names, and eigenvalues.
        """
        sketch, present = self._take()
        weights = self.covariance.update(sketch, None if all(present) else present)
        self.oscillation.update(sketch, weights)
        self.persistence.update(self.basis[:, :, :-1], sketch, weights)
        seen = self._update(sketch) if update else None
        if self.num_updates:
            changes = [group.change() for group in self._groups]
            put_back(
                [target for targets, _ in changes for target in targets],
                [value for _, values in changes for value in values],
            )
        for group in self._groups:
            group.forget()
        return seen

    def _take(self) -> tuple[Tensor, list[bool]]:
        """The gradients, reduced, `[count, rows, columns]`, and which of them are there."""
        rows, columns = self._sketched
        sketches: list[Tensor] = []
        present: list[bool] = []
        if self._down is not None:
            reduced = self._root.new_empty(sum(self._num_rows), columns)
            for group, part in zip(self._alike, torch.split(reduced, self._num_rows), strict=True):
                present += group.take(part)
            sketches.append(self._down(reduced))
        for tall in self._tall:
            sketch = self._root.new_empty(len(tall.shape.numbers), rows, columns)
            present += tall.take(sketch)
            sketches.append(sketch)
        return sketches[0] if len(sketches) == 1 else torch.cat(sketches), present

    def _update(self, sketch: Tensor) -> Tensor:
        """New directions and their S; a row of the log for every tensor."""
        options, steep = self.options, self._allowed.shape[1]
        matrices = self.covariance.covariance()
        concentration = on_device(self.covariance.concentration, matrices)
        pairs = power_iteration(matrices, self.basis[:, :, :steep], iterations=ITERATIONS)
        vectors = pairs.vectors * self._allowed.unsqueeze(1)
        values = pairs.values.clamp(min=0) * self._allowed
        trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
        rest = ((trace - values.sum(1)).clamp(min=0) / self._others).unsqueeze(1)

        self.persistence.turn(vectors.mT @ self.basis[:, :, :steep])
        correlation = self.persistence.correlation()
        ridge = ridge_for_condition(values.amax(1, keepdim=True), rest, MAX_CONDITION)
        ridge.clamp_(min=1e-37)  # a ratio of 1 where there is nothing
        ratio = ((rest + ridge) / (values + ridge)).clamp(max=1)
        shrink = ratio ** (options.smoothing_factor / 2) - 1
        usable = pairs.converged(TOLERANCE) & (self._allowed > 0)
        damped = torch.where(usable, (1 - correlation.clamp(min=0)) * shrink, 0.0)

        along, mean_square = self._lasting(vectors)
        variance = (along * (matrices @ along)).sum((1, 2)).maximum(rest.squeeze(1))
        cosine = self.oscillation.cosine(concentration)
        strength = valley(cosine, mean_square, variance, concentration, self._noise)
        self.basis = torch.cat([vectors, along], 2)
        self.extra = torch.cat([damped, (options.valley_strength * strength).unsqueeze(1)], 1)
        self.num_updates += 1
        self._direct()
        persistence = mean_square / (mean_square + variance).clamp(min=1e-37)
        table = torch.stack([strength, cosine, persistence, *self._effect(sketch)], 1)
        return torch.cat([table, functional.pad(values, (0, options.num_directions - steep))], 1)

    def _direct(self) -> None:
        lifted = self.basis / self._root  # P^T of it is orthonormal
        scaled = lifted * self.extra.unsqueeze(1)
        for group in self._groups:
            group.direct(lifted, scaled)

    def _lasting(self, steep: Tensor) -> tuple[Tensor, Tensor]:
        """The direction `[count, rows, 1]` of the mean off the steep ones; the mean's square there.

        Zero where the mean has nothing there but rounding.
        """
        mean = self.covariance.mean
        off = orthogonal_to(steep, mean)
        along = orthogonal_to(steep, dominant_direction(off, iterations=ITERATIONS))
        size = torch.linalg.vector_norm(along, dim=1, keepdim=True)
        share = torch.linalg.vector_norm(off, dim=(1, 2), keepdim=True)
        whole = torch.linalg.vector_norm(mean, dim=(1, 2), keepdim=True)
        real = (share > NOTHING * whole) & (size > 0.5)
        along = torch.where(real, along / size.clamp(min=0.5), 0.0)
        return along, (along.mT @ mean).square().sum((1, 2))

    def _effect(self, sketch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm of a gradient, of the changed one, and their cosine, from the projection."""
        kept = sketch / self._root
        norm = torch.linalg.vector_norm(sketch, dim=(1, 2))
        change = self.basis @ (self.extra.unsqueeze(2) * (self.basis.mT @ kept))
        size = torch.linalg.vector_norm(change, dim=(1, 2))
        square, inner = norm.square(), (kept * change).sum((1, 2))
        product = square + inner
        changed = (product + inner).addcmul_(size, size).clamp_(min=0).sqrt_()
        cosine = product / (norm * changed).clamp_(min=1e-37)
        return norm, changed, cosine

    @property
    def bytes(self) -> int:
        """Memory of everything that stays from step to step."""
        fixed = [self._root, self._allowed, self._others, self._noise]
        kept = [tensor for group in self._groups for tensor in group.kept]
        maps = [] if self._down is None else self._down.kept
        return nbytes(self.state(), fixed, kept, maps)

    def state(self) -> dict[str, Any]:
        """All there is but the projections, which the seed gives again."""
        return {
            "numbers": self.numbers,
            "covariance": self.covariance.state(),
            "unit_mean": self.oscillation.mean,
            "persistence": self.persistence.state(),
            "basis": self.basis,
            "extra": self.extra,
            "num_updates": self.num_updates,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state` returned.

        Raises:
            ValueError: It is of other tensors, or was kept with other options.
        """
        if state["numbers"] != self.numbers or state["basis"].shape != self.basis.shape:
            raise ValueError(
                "the state of TALT is of other tensors, or was kept with other options"
            )
        if "record" not in state["persistence"]:
            raise ValueError("the state of TALT was kept by another version of it")
        self.covariance.load(state["covariance"])
        self.persistence.load(state["persistence"])
        self.oscillation.mean.copy_(state["unit_mean"])
        self.basis = state["basis"].to(self.extra, copy=True)
        self.extra = state["extra"].to(self.extra, copy=True)
        self.num_updates = state["num_updates"]
        if self.num_updates:
            self._direct()
