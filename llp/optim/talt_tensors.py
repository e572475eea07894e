"""The statistics behind TALT, of all tensors of a device at once.

Gradients are read and reduced together where they have as many columns (`_Columns`), and changed
together where they have the same shape (`_Shape`); what is kept of them has the same small size
whatever their shape and is stacked over all of them (`TensorStatistics`). On a GPU a launch costs
the host more than these little tensors cost the device, so what counts is how few there are: with
ResNet-20 some 30 a step, and 170 more where the directions are found anew. The host waits for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from llp.optim.talt_parts import (
    IncrementalCovariance,
    Oscillation,
    Persistence,
    SparseProjection,
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
from llp.optim.wrapper import as_matrix, like_matrix, put_back

COLUMNS = 8
"""Columns that a gradient is reduced to (a sparse projection too) before statistics are taken."""

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


class _Shape:
    """The tensors of one shape: where they are in the statistics, and the map of their rows.

    Attributes:
        numbers: Of the parameters.
        parameters: The tensors.
        range: Theirs in the statistics.
        down: Map of the rows.
    """

    def __init__(
        self, members: Sequence[tuple[int, Tensor]], first: int, down: SparseProjection
    ) -> None:
        self.numbers = [number for number, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.range = slice(first, first + len(members))
        self.down = down
        self.num_rows = len(members) * down.size
        self._scaled, self._turned = torch.empty(0), torch.empty(0)

    def direct(self, basis: Tensor, scaled: Tensor) -> None:
        """Sets V and V (S - I) of `change`, from `D^(-1/2) W` and the same times S - I.

        They are lifted to the rows of the tensors once, not at every step.
        """
        own = self.range, slice(self.down.dimension)
        self._turned, self._scaled = self.down.lift(basis[own]).mT, self.down.lift(scaled[own])

    def change(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Changes the gradients in `rows`, all below each other, to `G + V (S - I) V^T G`."""
        stack = rows.view(len(self.numbers), self.down.size, -1)
        return stack.baddbmm_(self._scaled, torch.bmm(self._turned, stack)).unbind(0)

    @property
    def bytes(self) -> int:
        """Memory of what stays from step to step."""
        return nbytes(self.down.signs, self.down.bucket_sizes, self._scaled, self._turned)


class _Columns:
    """The shapes with one number of columns, which go through one map."""

    def __init__(self, shapes: Sequence[_Shape], across: SparseProjection) -> None:
        self.shapes = shapes
        self.num_rows = sum(shape.num_rows for shape in shapes)
        self.num_reduced = across.dimension
        self._across = None if across.exact else across.matrix().mT.contiguous()
        self._rows: Tensor | None = None  # the gradients, within a step
        self._gradients: list[Tensor | None] = []
        self._views: list[Tensor | None] = []  # of the gradients, as matrices

    def take(self, reduced: Tensor) -> list[bool]:
        """Reads the gradients, writes their rows, reduced, into `reduced`; which of them are there.

        Sparse ones go to the base optimizer as they are.
        """
        parameters = [parameter for shape in self.shapes for parameter in shape.parameters]
        found = [parameter.grad for parameter in parameters]
        self._gradients = [None if g is None or g.is_sparse else g for g in found]
        self._views = [None if g is None else as_matrix(g) for g in self._gradients]
        matrices = [
            torch.zeros(as_matrix(parameter).shape, device=parameter.device)
            if view is None
            else view
            for view, parameter in zip(self._views, parameters, strict=True)
        ]
        self._rows = torch.cat(matrices).float()
        if self._across is None:
            reduced.zero_()[:, : self.num_reduced] = self._rows
        else:
            torch.mm(self._rows, self._across, out=reduced)
        return [gradient is not None for gradient in self._gradients]

    def change(self) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients that are there, and what they are changed to."""
        rows = self._rows
        targets: list[Tensor] = []
        values: list[Tensor] = []
        if rows is None:
            return targets, values
        parts = torch.split(rows, [shape.num_rows for shape in self.shapes])
        changed = [
            value
            for shape, part in zip(self.shapes, parts, strict=True)
            for value in shape.change(part)
        ]
        for gradient, view, value in zip(self._gradients, self._views, changed, strict=True):
            if gradient is None or view is None:
                continue
            if view.data_ptr() == gradient.data_ptr():
                targets.append(view)
                values.append(value)
            else:  # the matrix was a copy
                targets.append(gradient)
                values.append(like_matrix(value, gradient))
        return targets, values

    def forget(self) -> None:
        """Lets go of the gradients."""
        self._rows, self._gradients, self._views = None, [], []

    @property
    def bytes(self) -> int:
        """Memory of what stays from step to step, that of the shapes left out."""
        return nbytes(self._across)


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
        members: dict[int, dict[int, list[tuple[int, Tensor]]]] = {}
        for number, parameter in parameters:
            size, width = as_matrix(parameter).shape
            members.setdefault(width, {}).setdefault(size, []).append((number, parameter))
        device, first = parameters[0][1].device, 0
        self.columns: list[_Columns] = []
        for width, by_rows in members.items():
            shapes = []
            for size, alike in by_rows.items():
                down = SparseProjection(
                    size, options.projection_dimension, generator=generator, device=device
                )
                shapes.append(_Shape(alike, first, down))
                first += len(alike)
            across = SparseProjection(width, COLUMNS, generator=generator, device=device)
            self.columns.append(_Columns(shapes, across))
        self.shapes = [shape for group in self.columns for shape in group.shapes]
        self.numbers = [number for shape in self.shapes for number in shape.numbers]
        count = len(self.numbers)
        rows = max(shape.down.dimension for shape in self.shapes)
        columns = max(group.num_reduced for group in self.columns)
        maps = [shape.down for shape in self.shapes for _ in shape.numbers]
        self._down = StackedProjection(maps, rows, device)
        steep = min(options.num_directions, rows - 1)
        self._root = torch.ones(count, rows, 1, device=device)  # of the bucket sizes
        own_rows, own_columns = torch.zeros(count), torch.zeros(count)
        for group in self.columns:
            for shape in group.shapes:
                own_rows[shape.range] = float(shape.down.dimension)
                own_columns[shape.range] = float(group.num_reduced)
                sizes = shape.down.bucket_sizes.sqrt().unsqueeze(1)
                self._root[shape.range, : shape.down.dimension] = sizes
        allowed = torch.arange(steep) < (own_rows - 1).unsqueeze(1)  # one is left for the valley
        inside = torch.arange(rows) < own_rows.unsqueeze(1)
        start = random_start(count, rows, steep + 1, generator) * inside.unsqueeze(2)
        start[:, :, :steep] *= allowed.unsqueeze(1)
        self._allowed = allowed.float().to(device)
        self._others = (own_rows - allowed.sum(1)).to(device)
        self._noise = (noise_edge(own_rows - allowed.sum(1), own_columns) / own_columns).to(device)
        self._num_rows, self._num_columns = [group.num_rows for group in self.columns], columns
        self.covariance = IncrementalCovariance(
            count, rows, columns, decay=options.decay, device=device
        )
        self.oscillation = Oscillation(count, rows, columns, device)
        self.persistence = Persistence(count, steep, columns, device)
        self.basis = start.to(device)
        self.extra = torch.zeros(count, steep + 1, device=device)
        self.num_updates = 0

    def change(self, *, update: bool) -> Tensor | None:
        """Takes in the gradients and changes them in place.

        Args:
            update: Whether to find the directions anew first.

        Returns:
            At an update, `[count, 6 + directions]`: what `talt.LOGGED` names, and eigenvalues.
        """
        reduced = torch.empty(sum(self._num_rows), self._num_columns, device=self.extra.device)
        parts = zip(self.columns, torch.split(reduced, self._num_rows), strict=True)
        present = [here for group, part in parts for here in group.take(part)]
        sketch = self._down(reduced)
        weights = self.covariance.update(sketch, None if all(present) else present)
        self.oscillation.update(sketch, weights)
        self.persistence.update(self.basis[:, :, :-1], sketch, weights)
        seen = self._update(sketch) if update else None
        if self.num_updates:
            changes = [group.change() for group in self.columns]
            put_back(
                [target for targets, _ in changes for target in targets],
                [value for _, values in changes for value in values],
            )
        for group in self.columns:
            group.forget()
        return seen

    def _update(self, sketch: Tensor) -> Tensor:
        """New directions and their S; a row of the log for every tensor."""
        options, steep = self.options, self._allowed.shape[1]
        matrices = self.covariance.covariance()
        concentration = on_device(self.covariance.concentration, matrices)
        pairs = power_iteration(matrices, self.basis[:, :, :steep], iterations=ITERATIONS)
        vectors = pairs.vectors * self._allowed.unsqueeze(1)
        values = pairs.values * self._allowed
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
        for shape in self.shapes:
            shape.direct(lifted, scaled)

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
        parts = sum(group.bytes for group in self.columns) + sum(s.bytes for s in self.shapes)
        return nbytes(self.state(), fixed) + parts + self._down.bytes

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
        self.covariance.load(state["covariance"])
        self.persistence.load(state["persistence"])
        self.oscillation.mean.copy_(state["unit_mean"])
        self.basis = state["basis"].to(self.extra, copy=True)
        self.extra = state["extra"].to(self.extra, copy=True)
        self.num_updates = state["num_updates"]
        if self.num_updates:
            self._direct()
