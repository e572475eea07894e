"""The statistics behind TALT, of all tensors of a device at once.

Tensors of one shape are stacked when their gradients are read and changed (`_Shape`); what is kept
of them has the same small size whatever their shape and is stacked over all of them
(`TensorStatistics`). A step of ResNet-20 is some 60 launches on a GPU instead of thousands, and
waits for none of them.
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
from llp.optim.wrapper import as_matrix, like_matrix

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
    """The tensors of one shape: where they are in the statistics, and their projections."""

    def __init__(
        self,
        members: Sequence[tuple[int, Tensor]],
        first: int,
        dimension: int,
        generator: torch.Generator,
    ) -> None:
        self.numbers = [number for number, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.range = slice(first, first + len(members))
        device = self.parameters[0].device
        self.rows, self.columns = as_matrix(self.parameters[0]).shape
        self.down = SparseProjection(self.rows, dimension, generator=generator, device=device)
        self.across = SparseProjection(self.columns, COLUMNS, generator=generator, device=device)
        self._stack: Tensor | None = None  # the gradients and their projection, within a step
        self._reduced: Tensor | None = None
        self._gradients: list[Tensor | None] = []
        self._views: list[Tensor | None] = []  # of the gradients, as matrices

    def take(self, sketch: Tensor) -> list[bool]:
        """Reads the gradients, writes their projection into `sketch`; which of them are there.

        Sparse ones go to the base optimizer as they are.
        """
        found = [parameter.grad for parameter in self.parameters]
        self._gradients = [None if g is None or g.is_sparse else g for g in found]
        present = [gradient is not None for gradient in self._gradients]
        own = sketch[self.range, : self.down.dimension, : self.across.dimension]
        if not any(present):
            own.zero_()
            return present
        self._views = [None if g is None else as_matrix(g) for g in self._gradients]
        matrices = [
            torch.zeros(self.rows, self.columns, device=own.device) if view is None else view
            for view in self._views
        ]
        self._stack = torch.stack(matrices).float()
        self._reduced = self.down.rows(self._stack)
        self.across.columns(self._reduced, own)
        return present

    def change(self, transform: Tensor) -> None:
        """Adds `P^T T P G` to the gradients, with `transform` `[tensors, rows, rows]`."""
        stack, reduced = self._stack, self._reduced
        if stack is None or reduced is None:
            return
        own = transform[self.range, : self.down.dimension, : self.down.dimension]
        if self.down.exact:
            changed = torch.baddbmm(stack, own, reduced)
        else:
            changed = self.down.add_back(stack, torch.bmm(own, reduced))
        gradients, values = [], []
        parts = zip(self._gradients, self._views, changed.unbind(0), strict=True)
        for gradient, view, value in parts:
            if gradient is None or view is None:
                continue
            if view.data_ptr() == gradient.data_ptr():
                gradients.append(view)
                values.append(value)
            else:  # the matrix was a copy
                gradients.append(gradient)
                values.append(like_matrix(value, gradient))
        torch._foreach_copy_(gradients, values)

    def forget(self) -> None:
        """Lets go of the gradients."""
        self._stack, self._reduced = None, None
        self._gradients, self._views = [], []


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
        members: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for number, parameter in parameters:
            size = tuple(as_matrix(parameter).shape)
            members.setdefault(size, []).append((number, parameter))
        self.shapes: list[_Shape] = []
        for group in members.values():
            first = self.shapes[-1].range.stop if self.shapes else 0
            self.shapes.append(_Shape(group, first, options.projection_dimension, generator))
        self.numbers = [number for shape in self.shapes for number in shape.numbers]
        count, device = len(self.numbers), parameters[0][1].device
        rows = max(shape.down.dimension for shape in self.shapes)
        columns = max(shape.across.dimension for shape in self.shapes)
        steep = min(options.num_directions, rows - 1)
        self._root = torch.ones(count, rows, 1, device=device)  # of the bucket sizes
        own_rows, own_columns = torch.zeros(count), torch.zeros(count)
        for shape in self.shapes:
            own_rows[shape.range] = float(shape.down.dimension)
            own_columns[shape.range] = float(shape.across.dimension)
            sizes = shape.down.bucket_sizes.sqrt().unsqueeze(1)
            self._root[shape.range, : shape.down.dimension] = sizes
        allowed = torch.arange(steep) < (own_rows - 1).unsqueeze(1)  # one is left for the valley
        inside = torch.arange(rows) < own_rows.unsqueeze(1)
        start = random_start(count, rows, steep + 1, generator) * inside.unsqueeze(2)
        self._allowed = allowed.float().to(device)
        self._others = (own_rows - allowed.sum(1)).to(device)
        self._noise = (noise_edge(own_rows - allowed.sum(1), own_columns) / own_columns).to(device)
        self._sketch = torch.zeros(count, rows, columns, device=device)
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
        present = [here for shape in self.shapes for here in shape.take(self._sketch)]
        weights = self.covariance.update(self._sketch, None if all(present) else present)
        self.oscillation.update(self._sketch, weights)
        self.persistence.update(self.basis[:, :, :-1], self._sketch, weights)
        seen = self._update() if update else None
        if self.num_updates:
            lifted = self.basis / self._root  # P^T of it is orthonormal
            transform = torch.bmm(lifted * self.extra.unsqueeze(1), lifted.mT)
            for shape in self.shapes:
                shape.change(transform)
        for shape in self.shapes:
            shape.forget()
        return seen

    def _update(self) -> Tensor:
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
        ratio = torch.where(values > rest, (rest + ridge) / (values + ridge), 1.0)
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
        persistence = mean_square / (mean_square + variance).clamp(min=1e-37)
        table = torch.stack([strength, cosine, persistence, *self._effect()], 1)
        return torch.cat([table, functional.pad(values, (0, options.num_directions - steep))], 1)

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

    def _effect(self) -> tuple[Tensor, Tensor, Tensor]:
        """Norm of the last gradient, of the changed one, and their cosine, from the projection."""
        sketch, kept = self._sketch, self._sketch / self._root
        square = sketch.square().sum((1, 2))
        change = self.basis @ (self.extra.unsqueeze(2) * (self.basis.mT @ kept))
        product = square + (kept * change).sum((1, 2))
        changed = (2 * product - square + change.square().sum((1, 2))).clamp(min=0)
        cosine = product / (square * changed).sqrt().clamp(min=1e-37)
        return square.sqrt(), changed.sqrt(), cosine

    @property
    def bytes(self) -> int:
        """Memory of everything that stays from step to step."""
        signs = [s.signs for shape in self.shapes for s in (shape.down, shape.across)]
        sizes = [s.bucket_sizes for shape in self.shapes for s in (shape.down, shape.across)]
        fixed = [self._root, self._allowed, self._others, self._noise, self._sketch]
        return nbytes(self.state(), signs, sizes, fixed)

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
