"""From a caller's arrays to curves: shapes, positions, horizons and ranges are checked."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from llp.probing.curve_features import Curves, Floats, compact

MAX_FINISHED = 200
"""More finished curves than these add nothing that is worth the time."""


def matrix(curves: ArrayLike, name: str) -> Floats:
    """Curves as an array [num_curves, num_points], at least one point wide."""
    try:
        values = np.asarray(curves, dtype=float)
    except ValueError:
        raise ValueError(
            f"{name} must be numbers [num_curves, num_points]; fill up short rows with NaN"
        ) from None
    if values.ndim != 2:
        raise ValueError(f"{name} must be [num_curves, num_points], got shape {values.shape}")
    if values.shape[1] == 0:
        values = np.full((len(values), 1), np.nan)
    return values


def parse_positions(
    positions: ArrayLike | None, horizon: ArrayLike, shape: tuple[int, ...]
) -> tuple[Floats, Floats]:
    """Positions [num_curves, num_points], all positive, and horizons [num_curves]."""
    if positions is None:
        places = np.arange(1, shape[1] + 1, dtype=float)
    else:
        places = np.asarray(positions, dtype=float)
        if places.ndim == 1 and len(places) > shape[1]:
            places = places[: shape[1]]  # `finished` may be longer than the curves
    try:
        places = np.array(np.broadcast_to(places, shape))
        ends = np.array(np.broadcast_to(np.asarray(horizon, dtype=float), (shape[0],)))
    except ValueError:
        raise ValueError(
            f"positions {places.shape} and horizon {np.shape(horizon)} do not fit curves {shape}"
        ) from None
    if not np.isfinite(ends).all():
        raise ValueError("the horizon must be finite")
    known = np.unique(places[np.isfinite(places)])
    if len(known) and known[0] <= 0:
        gap = float(np.diff(known).min()) if len(known) > 1 else 1.0
        places, ends = places - known[0] + gap, ends - known[0] + gap
    if (ends <= 0).any():
        raise ValueError("the horizon must not lie before the first position")
    return places, ends


def parse_finished(
    finished: ArrayLike | tuple[ArrayLike, ArrayLike] | None,
    positions: ArrayLike | None,
    horizon: ArrayLike,
) -> tuple[Floats, Floats, Floats]:
    """Finished curves with their positions and horizons."""
    if finished is None:
        return np.empty((0, 1)), np.empty((0, 1)), np.empty(0)
    row: ArrayLike | None = positions
    curves: ArrayLike = finished  # type: ignore[assignment]
    own = isinstance(finished, tuple) and len(finished) == 2 and np.ndim(finished[0]) == 2
    if own:
        curves, row = cast(tuple[ArrayLike, ArrayLike], finished)
    elif isinstance(finished, list | tuple) and not finished:
        return np.empty((0, 1)), np.empty((0, 1)), np.empty(0)
    old = matrix(curves, "finished")
    if positions is not None and not own:
        row = _positions_of_all(positions, old.shape[1])
    end = np.asarray(horizon, dtype=float)
    if end.ndim and row is not None and len(old):
        known = np.isfinite(old) & np.isfinite(np.broadcast_to(np.asarray(row, float), old.shape))
        end = np.where(known, np.broadcast_to(np.asarray(row, float), old.shape), -np.inf).max(1)
        old, end = old[np.isfinite(end)], end[np.isfinite(end)]
    elif end.ndim:
        end = end.max(initial=1)
    places, ends = parse_positions(row, end, old.shape)
    if len(old) > MAX_FINISHED:
        kept = np.linspace(0, len(old) - 1, MAX_FINISHED).astype(int)
        old, places, ends = old[kept], places[kept], ends[kept]
    return old, places, ends


def _positions_of_all(positions: ArrayLike, width: int) -> Floats:
    """One row of positions for finished curves of `width` points, from those of the open curves.

    Equally spaced positions go on as they are.
    """
    places = np.asarray(positions, dtype=float)
    if places.ndim > 1:
        rows = np.ma.masked_invalid(places)
        if not len(rows) or (rows != rows[0]).any() or rows.mask.all(axis=0).any():
            raise ValueError(
                "finished needs its own positions, as a pair (values, positions), where every "
                "curve has its own"
            )
        places = np.asarray(rows.max(axis=0))
    if len(places) < width:
        steps = np.diff(places)
        step = steps[0] if len(steps) else places[0]
        if not np.allclose(steps, step, rtol=1e-6):
            raise ValueError(
                f"finished has {width} points and positions only {len(places)}; give the finished "
                "curves their own, as a pair (values, positions)"
            )
        places = np.append(places, places[-1] + step * np.arange(1, width - len(places) + 1))
    return places


def remaining_at_end(schedule_remaining: ArrayLike | None, values: Floats) -> Floats:
    """[num_curves], the share of the schedule to come at the last point seen; NaN where unknown."""
    if schedule_remaining is None:
        return np.full(len(values), np.nan)
    given = np.asarray(schedule_remaining, dtype=float)
    if given.ndim == 2 and given.shape == values.shape:
        known = np.isfinite(values)
        last = known.shape[1] - 1 - known[:, ::-1].argmax(axis=1)
        given = given[np.arange(len(values)), last]
    try:
        return np.asarray(np.clip(np.broadcast_to(given, (len(values),)), 0.0, 1.0))
    except ValueError:
        raise ValueError(
            f"schedule_remaining {given.shape} does not fit curves {values.shape}"
        ) from None


def completed(values: Floats, places: Floats, ends: Floats, sign: float) -> Curves | None:
    """The finished curves that reach the horizon."""
    usable = np.isfinite(values) & np.isfinite(places) & (places <= ends[:, None] * (1 + 1e-9))
    reached = np.where(usable, places, 0).max(axis=1, initial=0) >= ends * (1 - 1e-9)
    reached &= ~np.isinf(values).any(axis=1)
    if not reached.any():
        return None
    return compact(places[reached], np.where(usable, sign * values, np.nan)[reached], ends[reached])


def metric_range(
    bounds: tuple[float, float] | None, higher_is_better: bool, values: Floats, old: Floats
) -> tuple[float, float]:
    """The metric's range as given, or as far as its values show it."""
    if bounds is not None:
        return bounds
    known = np.concatenate([array[np.isfinite(array)] for array in (values, old)])
    if not len(known) or known.min() < 0:
        return (-np.inf, np.inf)
    return (0.0, 1.0 if higher_is_better and known.max() <= 1 else np.inf)
