"""How TALT reads and changes gradients: few launches for many tensors, little memory for large.

Gradients are matrices `[rows, columns]`. They are reduced to a *sketch*: their rows to at most
`projection_dimension` numbers, and their columns to at most `COLUMNS`, by sparse projections. The
change, `G + V (S - I) V^T G`, is made to the whole gradient. On a GPU a launch costs the host more
than small tensors cost the device, so tensors are taken together where that is possible:

- `Alike`: tensors with one number of columns and few rows, in one matrix with all their rows. Their
  columns are reduced in one product, and V is kept for all rows of each.
- `Tall`: tensors of one shape with many rows. Rows are reduced first, and V is never made: what is
  kept for them does not grow beyond a sign for every row and every column.

A tensor without a gradient, or with a sparse one, is left alone; where a whole shape has none,
nothing is computed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from llp.optim.talt_parts import SparseProjection
from llp.optim.wrapper import as_matrix, like_matrix

COLUMNS = 8
"""Columns that a gradient is reduced to before statistics are taken."""

TALL = 4
"""Rows of a tensor, in units of those that they are reduced to, above which it is tall."""

DENSE = 16
"""Columns are reduced in one product with a dense map where there are this many times as many rows
as the map has columns: it takes a sixteenth of the memory of the gradients then, or less."""

Changes = tuple[list[Tensor], list[Tensor]]
"""Tensors to write to, and what."""


class Gradients:
    """The gradients of some parameters, within one step."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._found: list[Tensor | None] = []
        self._matrices: list[Tensor | None] = []

    def read(self) -> list[bool]:
        """Which of them are there, and dense."""
        found = [parameter.grad for parameter in self.parameters]
        self._found = [None if g is None or g.is_sparse else g for g in found]
        self._matrices = [None if g is None else as_matrix(g) for g in self._found]
        return [gradient is not None for gradient in self._found]

    def matrices(self, first: int, last: int) -> list[Tensor]:
        """Those from `first` to before `last`; zeros for one that is not there."""
        return [
            torch.zeros_like(as_matrix(self.parameters[k])) if matrix is None else matrix
            for k, matrix in enumerate(self._matrices[first:last], start=first)
        ]

    def changes(self, first: int, values: Sequence[Tensor]) -> Changes:
        """Where matrices belong, from gradient `first` on, and they in the arrangement there."""
        targets, written = [], []
        for k, value in enumerate(values, start=first):
            gradient, matrix = self._found[k], self._matrices[k]
            if gradient is None or matrix is None:
                continue
            if matrix.data_ptr() == gradient.data_ptr():
                targets.append(matrix)
                written.append(value)
            else:  # the matrix was a copy
                targets.append(gradient)
                written.append(like_matrix(value, gradient))
        return targets, written

    def forget(self) -> None:
        """Lets go of them."""
        self._found, self._matrices = [], []


class Shape:
    """Tensors of one shape.

    Attributes:
        numbers: Of the parameters.
        parameters: The tensors.
        range: Their places in the statistics.
        down: Map of their rows.
        columns: Of each.
        num_rows: Of all together.
    """

    def __init__(
        self, members: Sequence[tuple[int, Tensor]], first: int, down: SparseProjection
    ) -> None:
        self.numbers = [number for number, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.range = slice(first, first + len(members))
        self.down = down
        self.columns = as_matrix(self.parameters[0]).shape[1]
        self.num_rows = len(members) * down.size


class Alike:
    """Shapes with one number of columns and few rows; see the head of this file.

    Args:
        shapes: With successive places in the statistics.
        across: Map of their columns.

    Attributes:
        num_rows: Of all tensors together.
        num_reduced: Columns that theirs are reduced to.
    """

    def __init__(self, shapes: Sequence[Shape], across: SparseProjection) -> None:
        self.shapes, self.num_reduced = list(shapes), across.dimension
        self.num_rows = sum(shape.num_rows for shape in shapes)
        self._gradients = Gradients([p for shape in shapes for p in shape.parameters])
        dense = not across.exact and self.num_rows >= DENSE * across.dimension
        self._across = across.matrix().mT.contiguous() if dense else across
        ends = list(accumulate((len(shape.numbers) for shape in shapes), initial=0))
        self._places = list(pairwise(ends))  # of each shape's gradients among all
        self._sizes = [shape.num_rows for shape in shapes]
        self._directions: list[tuple[Tensor, Tensor]] = []  # of each shape: V (S - I), V^T
        self._rows: list[Tensor | None] = []  # of each shape, within a step

    def take(self, reduced: Tensor) -> list[bool]:
        """Reads the gradients and writes their rows, with few columns, to `reduced`."""
        present = self._gradients.read()
        if all(any(present[a:b]) for a, b in self._places):
            rows = torch.cat(self._gradients.matrices(0, len(present))).float()
            self._rows = list(torch.split(rows, self._sizes))
            self._reduce(rows, reduced)
            return present
        self._rows = []
        for (a, b), part in zip(self._places, torch.split(reduced, self._sizes), strict=True):
            if any(present[a:b]):
                rows = torch.cat(self._gradients.matrices(a, b)).float()
                self._reduce(rows, part)
                self._rows.append(rows)
            else:
                part.zero_()
                self._rows.append(None)
        return present

    def _reduce(self, rows: Tensor, out: Tensor) -> None:
        if isinstance(self._across, Tensor):
            torch.mm(rows, self._across, out=out)
        else:
            write_columns(self._across.columns(rows), out)

    def direct(self, basis: Tensor, scaled: Tensor) -> None:
        """Sets V and V (S - I), from `D^(-1/2) W` and the same times S - I, `[count, rows, n]`.

        They are lifted to the rows of the tensors here, not at every step.
        """
        self._directions = []
        for shape in self.shapes:
            own = shape.range, slice(shape.down.dimension)
            self._directions.append((shape.down.lift(scaled[own]), shape.down.lift(basis[own]).mT))

    def change(self) -> Changes:
        """What the gradients are to be changed to."""
        targets: list[Tensor] = []
        values: list[Tensor] = []
        parts = zip(self._places, self._directions, self._rows, strict=True)
        for (first, last), (scaled, turned), rows in parts:
            if rows is None:
                continue
            stack = rows.view(last - first, -1, rows.shape[1])
            stack.baddbmm_(scaled, torch.bmm(turned, stack))
            there, changed = self._gradients.changes(first, stack.unbind(0))
            targets += there
            values += changed
        return targets, values

    def forget(self) -> None:
        """Lets go of the gradients."""
        self._gradients.forget()
        self._rows = []

    @property
    def kept(self) -> list[Tensor]:
        """What stays from step to step; `basis` and `scaled` of `direct` may be among it."""
        across, maps = self._across, [shape.down for shape in self.shapes]
        kept = [tensor for pair in self._directions for tensor in pair]
        if isinstance(across, Tensor):
            kept.append(across)
        else:
            maps.append(across)
        return kept + [tensor for each in maps for tensor in (each.signs, each.bucket_sizes)]


class Tall:
    """Tensors of one shape with many rows; see the head of this file.

    Args:
        shape: The tensors.
        across: Map of their columns.

    Attributes:
        num_reduced: Columns that theirs are reduced to.
    """

    def __init__(self, shape: Shape, across: SparseProjection) -> None:
        self.shape, self._across, self.num_reduced = shape, across, across.dimension
        self._gradients = Gradients(shape.parameters)
        self._basis, self._scaled = torch.empty(0), torch.empty(0)
        self._stack: Tensor | None = None  # the gradients and their projection, within a step
        self._reduced: Tensor | None = None

    def take(self, sketch: Tensor) -> list[bool]:
        """Reads the gradients and writes their sketch, `[count, dimension, columns]`."""
        present = self._gradients.read()
        if not any(present):
            sketch.zero_()
            return present
        self._stack = torch.stack(self._gradients.matrices(0, len(present))).float()
        self._reduced = self.shape.down.rows(self._stack)
        narrow = self._across.columns(self._reduced.flatten(0, 1))
        write_columns(narrow.view(*self._reduced.shape[:2], -1), sketch)
        return present

    def direct(self, basis: Tensor, scaled: Tensor) -> None:
        """Sets `D^(-1/2) W` and the same times S - I, `[count, rows, n]`."""
        self._basis, self._scaled = basis[self.shape.range], scaled[self.shape.range]

    def change(self) -> Changes:
        """What the gradients are to be changed to."""
        if self._stack is None or self._reduced is None:
            return [], []
        along = torch.bmm(self._basis.mT, self._reduced)
        changed = self.shape.down.add_back(self._stack, torch.bmm(self._scaled, along))
        return self._gradients.changes(0, changed.unbind(0))

    def forget(self) -> None:
        """Lets go of the gradients."""
        self._gradients.forget()
        self._stack, self._reduced = None, None

    @property
    def kept(self) -> list[Tensor]:
        """What stays from step to step; `basis` and `scaled` of `direct` may be among it."""
        maps = [each for m in (self.shape.down, self._across) for each in (m.signs, m.bucket_sizes)]
        return [*maps, self._basis, self._scaled]


def write_columns(values: Tensor, out: Tensor) -> None:
    """Writes `values` into the first columns of `out`, and zeros into the others."""
    num = values.shape[-1]
    out[..., :num].copy_(values)
    if num < out.shape[-1]:
        out[..., num:].zero_()


def grouped(
    parameters: Sequence[tuple[int, Tensor]], dimension: int, generator: torch.Generator
) -> tuple[list[Alike], list[Tall]]:
    """The tensors, by number, with the maps that reduce them.

    Args:
        parameters: Numbers and tensors, of one device.
        dimension: Rows they are reduced to.
        generator: Of the maps.
    """
    device = parameters[0][1].device
    members: dict[int, dict[int, list[tuple[int, Tensor]]]] = {}
    for number, parameter in parameters:
        size, width = as_matrix(parameter).shape
        members.setdefault(width, {}).setdefault(size, []).append((number, parameter))
    alike: list[Alike] = []
    tall: list[Tall] = []
    first = 0
    for many in (False, True):
        for width, by_rows in members.items():
            shapes = []
            for size, these in by_rows.items():
                if (size > TALL * dimension) == many:
                    down = SparseProjection(size, dimension, generator=generator, device=device)
                    shapes.append(Shape(these, first, down))
                    first += len(these)
            if not shapes:
                continue
            across = SparseProjection(width, COLUMNS, generator=generator, device=device)
            if many:
                tall += [Tall(shape, across) for shape in shapes]
            else:
                alike.append(Alike(shapes, across))
    return alike, tall
