"""A fine grid from a part of its cells by bicubic splines, with the error measured, not assumed.

The cells evaluated are those where chosen rows and columns of the fine grid cross. The rows stand
closer together towards the border, where a spline has neighbours on one side only and a loss is
steepest: on ResNet-20 that makes the largest error three to six times smaller than equal distances
do. The error is taken on cells that the spline has not seen and that were evaluated exactly;
afterwards these cells hold their exact values too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import RectBivariateSpline

from llp.landscape.plain import Plain

Array = np.ndarray[Any, Any]

_CROWDING = 0.7
"""Share of the Chebyshev spacing in the spacing of the rows; the rest is equal distances."""


@dataclass(frozen=True)
class InterpolationError(Plain):
    """How wrong the interpolated losses are, on cells held out.

    Attributes:
        max_error: Largest absolute error on them.
        rms_error: Root mean square error on them.
        value_range: Largest minus smallest loss known exactly.
        max_relative: `max_error / value_range`; 0 for a flat surface.
        rms_relative: `rms_error / value_range`.
        num_held_out: Cells held out.
        num_evaluated: Cells evaluated in all; the others are interpolated.
    """

    max_error: float
    rms_error: float
    value_range: float
    max_relative: float
    rms_relative: float
    num_held_out: int
    num_evaluated: int


def rows_to_evaluate(num_rows: int, count: int) -> Array:
    """Which of the rows of a fine grid are evaluated, `count` of them, ends included.

    >>> rows_to_evaluate(25, 11).tolist()
    [0, 1, 3, 6, 9, 12, 15, 18, 21, 23, 24]
    """
    count = min(count, num_rows)
    even = np.linspace(0.0, 1.0, count)
    spread = (1 - _CROWDING) * even + _CROWDING * (1 - np.cos(np.pi * even)) / 2
    rows = np.rint(spread * (num_rows - 1)).astype(int)
    for index in range(1, count):
        rows[index] = max(rows[index], rows[index - 1] + 1)
    for index in range(count):
        rows[index] = min(rows[index], num_rows - count + index)
    chosen: Array = rows
    return chosen


def cells_to_hold_out(
    x: Array, y: Array, rows: Array, columns: Array, count: int, seed: int
) -> Array:
    """Cells `[h, 2]` that are not where the chosen rows and columns cross, at random.

    The cell of the model itself is always evaluated: here, if it is not there.
    """
    crossing = np.zeros((len(x), len(y)), dtype=bool)
    crossing[np.ix_(rows, columns)] = True
    free = np.argwhere(~crossing)
    generator = np.random.default_rng(seed)
    picked = free[generator.choice(len(free), size=min(count, len(free)), replace=False)]
    is_centre = (x[free[:, 0]] == 0.0) & (y[free[:, 1]] == 0.0)
    chosen: Array = np.unique(np.concatenate([picked, free[is_centre]]), axis=0)
    return chosen


def interpolated(
    x: Array, y: Array, rows: Array, columns: Array, known: Array, held_out: Array, checked: Array
) -> tuple[Array, Array, InterpolationError]:
    """Values `[n, m, c]` on the whole grid, which cells are exact `[n, m]`, and the error.

    Args:
        x: Coordinates `[n]`.
        y: Coordinates `[m]`.
        rows: Rows evaluated `[k]`, rising.
        columns: Columns evaluated `[l]`, rising.
        known: Exact values `[k, l, c]` where they cross; the loss comes first. Values of `c` that
            are not finite stay NaN elsewhere.
        held_out: Cells `[h, 2]` that were evaluated as well.
        checked: Their exact values `[h, c]`.
    """
    values = np.full((len(x), len(y), known.shape[2]), np.nan)
    for column in range(known.shape[2]):
        if np.isfinite(known[..., column]).all():
            spline = RectBivariateSpline(
                x[rows],
                y[columns],
                known[..., column],
                kx=min(3, len(rows) - 1),
                ky=min(3, len(columns) - 1),
                s=0,
            )
            values[..., column] = spline(x, y)
    cells = (held_out[:, 0], held_out[:, 1])
    errors = np.abs(values[cells][:, 0] - checked[:, 0])
    span = float(np.ptp(np.concatenate([known[..., 0].ravel(), checked[:, 0]])))
    exact = np.zeros((len(x), len(y)), dtype=bool)
    for where, what in ((np.ix_(rows, columns), known), (cells, checked)):
        values[where], exact[where] = what, True
    largest, rms = float(errors.max()), float(np.sqrt((errors**2).mean()))
    error = InterpolationError(
        max_error=largest,
        rms_error=rms,
        value_range=span,
        max_relative=largest / span if span else 0.0,
        rms_relative=rms / span if span else 0.0,
        num_held_out=len(held_out),
        num_evaluated=int(exact.sum()),
    )
    return values, exact, error
