"""What is known of a batch of partial learning curves, in numbers that have no unit.

A *batch* is the curves of one search, so they are evidence about each other: where the metric
started, how fast it falls here, which level nobody has passed. Inside, lower is better, positions
are positive and a missing point is NaN. A value `y` is described by its *height*

    (y - best seen in the batch) / (median first value - best seen in the batch),

so 1 is where training starts and 0 the best so far; heights above 1 go on as `1 + log(height)`,
because a diverging loss may be any power of ten. The *anchor* of a curve is its last height, its
*pace* the size of the change to be expected (how much it moved over the second half of what was
seen, its noise, a power law's next step), and the *share* the part of the way that has been seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]

LOOK_BACK = (0.9, 0.75, 0.5, 0.35, 0.2, 0.1)
"""Parts of what was seen at which a curve is looked at again."""
EXPONENTS = (0.0, 0.3, 0.7, 1.5)
"""Exponents of the power laws `c + a t^-b` that are fitted to every curve; 0 is `c - a log t`."""
LONGEST_STEP = 2.0
"""No power law is followed further than this many heights."""
RESOLUTION = 1e-3
"""Height differences below this are on the linear part of the features' asinh scale."""


@dataclass(frozen=True)
class Curves:
    """Partial curves of one search, lower is better, the points that were seen at the left.

    Attributes:
        positions: [num_curves, width], positive and increasing along a row; NaN where unseen.
        values: [num_curves, width], finite; NaN where unseen.
        num_seen: [num_curves], points seen, at least 1.
        horizon: [num_curves], where the forecast is wanted, in units of `positions`.
        schedule_remaining: [num_curves], share of the learning rate's decay that is still to come
            between the last point and the horizon, in [0, 1]; NaN where unknown.
    """

    positions: Floats
    values: Floats
    num_seen: NDArray[np.int64]
    horizon: Floats
    schedule_remaining: Floats

    def __len__(self) -> int:
        return len(self.values)

    @property
    def last_position(self) -> Floats:
        """[num_curves], position of the last point."""
        return self.positions[np.arange(len(self)), self.num_seen - 1]

    @property
    def last_value(self) -> Floats:
        """[num_curves], value of the last point."""
        return self.values[np.arange(len(self)), self.num_seen - 1]

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Curves:
        """Some of the curves."""
        return Curves(
            self.positions[chosen],
            self.values[chosen],
            self.num_seen[chosen],
            self.horizon[chosen],
            self.schedule_remaining[chosen],
        )

    def until(self, limit: Floats) -> Curves:
        """The points at or before `limit` [num_curves]; of every curve at least the first."""
        kept = self.positions <= limit[:, None] * (1 + 1e-9)
        kept[:, 0] = True
        return compact(
            np.where(kept, self.positions, np.nan),
            np.where(kept, self.values, np.nan),
            self.horizon,
            self.schedule_remaining,
        )


def compact(
    positions: Floats, values: Floats, horizon: Floats, schedule_remaining: Floats | None = None
) -> Curves:
    """Curves [num_curves, num_points] with gaps (NaN), as `Curves`; every row needs a point."""
    seen = np.isfinite(values) & np.isfinite(positions)
    order = np.argsort(np.where(seen, positions, np.inf), axis=1, kind="stable")
    width = max(1, int(seen.sum(axis=1).max(initial=1)))
    seen = np.take_along_axis(seen, order, axis=1)[:, :width]
    if schedule_remaining is None:
        schedule_remaining = np.full(len(values), np.nan)
    return Curves(
        np.where(seen, np.take_along_axis(positions, order, axis=1)[:, :width], np.nan),
        np.where(seen, np.take_along_axis(values, order, axis=1)[:, :width], np.nan),
        seen.sum(axis=1),
        horizon,
        schedule_remaining,
    )


@dataclass(frozen=True)
class Unit:
    """The batch's own unit of the metric: `value = best + span * height`."""

    best: float
    span: float

    def height(self, values: ArrayLike) -> Floats:
        """Values as heights, logarithmic above 1."""
        raw = (np.asarray(values, dtype=float) - self.best) / self.span
        return np.asarray(np.where(raw > 1, 1 + np.log(np.maximum(raw, 1)), raw))

    def value(self, heights: ArrayLike) -> Floats:
        """Heights as values; the inverse of `height`, finite."""
        high = np.asarray(heights, dtype=float)
        raw = np.where(high > 1, np.exp(np.clip(high - 1, 0, 600)), high)
        return self.best + self.span * raw

    def log_slope(self, heights: ArrayLike) -> Floats:
        """Log of d value / d height."""
        return np.asarray(np.log(self.span) + np.maximum(np.asarray(heights, dtype=float) - 1, 0))


def unit_of(curves: Curves) -> Unit:
    """The unit in which the curves are described.

    Where the start is no landmark, as the curves begin near their best or rise, the span is the
    median distance from it, then the spread over the batch, then the size of the values.
    """
    first = curves.values[:, 0]
    start, best = float(np.median(first)), float(np.nanmin(curves.values))
    distance = np.abs(curves.values - start)
    for span in (
        max(start - best, float(np.nanmedian(distance))),
        float(np.nanmax(distance)),
        float(np.nanmax(np.abs(curves.values))),
    ):
        if span > 1e-300:
            return Unit(best, span)
    return Unit(best, 1.0)


@dataclass(frozen=True)
class Description:
    """A batch as the prior sees it.

    Attributes:
        features: [num_curves, num_features], in the order of `names`.
        names: What the features are.
        anchor: [num_curves], last height.
        pace: [num_curves], size of the change to be expected, in heights; positive.
        highest: [num_curves], highest height seen.
        noise: [num_curves], standard deviation of a single point about its neighbours, in heights.
        unit: The batch's unit.
    """

    features: Floats
    names: tuple[str, ...]
    anchor: Floats
    pace: Floats
    highest: Floats
    noise: Floats
    unit: Unit


def describe(curves: Curves) -> Description:
    """The features of every curve of the batch."""
    unit = unit_of(curves)
    rows, last = np.arange(len(curves)), curves.num_seen - 1
    seen = np.arange(curves.values.shape[1]) <= last[:, None]
    heights = unit.height(curves.values)
    filled = np.where(seen, heights, 0.0)
    part = np.where(seen, curves.positions / curves.last_position[:, None], 0.0)
    ahead = np.maximum(curves.horizon / curves.last_position, 1.0)
    anchor, first = heights[rows, last], heights[:, 0]

    looks = [_height_at(heights, part, seen, last, place) for place in LOOK_BACK]
    recent = part >= 0.8
    tail = (filled * recent).sum(axis=1) / recent.sum(axis=1)
    low = np.where(seen, heights, np.inf).min(axis=1)
    highest = np.where(seen, heights, -np.inf).max(axis=1)
    spread = highest - low
    noise = _noise(heights)
    steps, residuals = _power_law_steps(filled, part, seen, ahead)
    fit = -np.minimum(curves.num_seen, 12) * np.log(residuals + 1e-5)
    weight = np.exp(fit - fit.max(axis=0))
    mixed = (weight * steps).sum(axis=0) / weight.sum(axis=0)
    half = looks[LOOK_BACK.index(0.5)]
    moved = np.abs(anchor - half)
    pace = np.sqrt(moved**2 + noise**2 + mixed**2 / 4 + (0.02 * spread) ** 2 + 1e-8)
    pace = np.minimum(pace, LONGEST_STEP)

    named: dict[str, Floats] = {
        "share": np.clip(1 / ahead, 1e-6, 1),
        "log ahead": np.log(ahead),
        "log points": np.log(curves.num_seen),
        "log points at the end": np.log(curves.num_seen * ahead),
        "anchor": anchor,
        "lowest": np.minimum(low, 1),
        "first": first,
        "tail": tail,
        "above lowest": _fine(anchor - low),
        "above tail": _fine(anchor - tail),
        "above first": _fine(anchor - first),
    }
    for place, look in zip(LOOK_BACK, looks, strict=True):
        named[f"change since {place}"] = anchor - look
        named[f"fine change since {place}"] = _fine(anchor - look)
    for name, size in (("noise", noise), ("spread", spread), ("moved", moved), ("pace", pace)):
        named[f"log {name}"] = np.log(size + 1e-5)
    for exponent, step in zip(EXPONENTS, steps, strict=True):
        named[f"power law {exponent}"] = _fine(step)
    named["power laws"] = _fine(mixed)
    named["log residual"] = np.log(residuals.min(axis=0) + 1e-5)
    for name, change in (
        ("power law 0.3", steps[1] / 5),
        ("power law 1.5", steps[3] / 5),
        ("power laws", mixed / 5),
        ("above tail", anchor - tail),
        ("above lowest", anchor - low),
        ("change 0.5 to 0.9", looks[0] - half),
        ("change since 0.9", anchor - looks[0]),
    ):
        named[f"{name} in paces"] = change / pace
    named |= _among_peers(anchor, half - anchor)
    known = np.isfinite(curves.schedule_remaining)
    named["schedule known"] = known.astype(float)
    named["schedule remaining"] = np.where(known, curves.schedule_remaining, 0.0)
    return Description(
        np.stack(list(named.values()), axis=1), tuple(named), anchor, pace, highest, noise, unit
    )


def _fine(change: Floats) -> Floats:
    """Heights on a scale that is linear below the resolution and logarithmic above."""
    return np.asarray(np.arcsinh(change / RESOLUTION))


def _height_at(
    heights: Floats,
    part: Floats,
    seen: NDArray[np.bool_],
    last: NDArray[np.int64],
    place: float,
) -> Floats:
    """The height when `place` of what was seen had passed, interpolated."""
    rows = np.arange(len(heights))
    before = np.maximum((seen & (part <= place + 1e-12)).sum(axis=1) - 1, 0)
    after = np.minimum(before + 1, last)
    left, right = part[rows, before], part[rows, after]
    gap = right - left
    share = np.where(gap > 0, np.clip((place - left) / np.where(gap > 0, gap, 1), 0, 1), 0)
    return np.asarray(heights[rows, before] * (1 - share) + heights[rows, after] * share)


def _noise(heights: Floats) -> Floats:
    """Spread of a point about its neighbours, from second differences; 0 with under 3 points."""
    bend = np.abs(heights[:, 2:] - 2 * heights[:, 1:-1] + heights[:, :-2])
    known = np.isfinite(bend)
    roots = np.where(known, bend, 0.0) ** 0.5  # a mean of roots, as one spike must not rule
    return np.asarray((roots.sum(axis=1) / np.maximum(known.sum(axis=1), 1)) ** 2 / 1.8)


def _power_law_steps(
    filled: Floats, part: Floats, seen: NDArray[np.bool_], ahead: Floats
) -> tuple[Floats, Floats]:
    """What each power law adds to the last height by the horizon, and its residuals.

    Least squares with weight `sqrt(part)`, as the end of the curve matters more than its start, and
    a small ridge on the slope.

    Returns:
        Steps and root mean square residuals, each [num_exponents, num_curves].
    """
    weight = np.where(seen, np.sqrt(part), 0.0)
    total = weight.sum(axis=1)
    log_part = np.log(np.where(seen, np.maximum(part, 1e-12), 1.0))
    mean = (weight * filled).sum(axis=1) / total
    centred = np.where(seen, filled - mean[:, None], 0.0)
    steps, residuals = [], []
    for exponent in EXPONENTS:
        basis = -log_part if exponent == 0 else np.exp(-exponent * log_part)
        basis = np.where(seen, basis, 0.0)
        basis = np.where(seen, basis - ((weight * basis).sum(axis=1) / total)[:, None], 0.0)
        square = (weight * basis**2).sum(axis=1)
        slope = (weight * basis * centred).sum(axis=1) / (square + 1e-3 * total + 1e-9)
        left = centred - slope[:, None] * basis
        residuals.append(np.sqrt((weight * left**2).sum(axis=1) / total))
        steps.append(slope * (-np.log(ahead) if exponent == 0 else ahead**-exponent - 1))
    return np.clip(steps, -LONGEST_STEP, LONGEST_STEP), np.array(residuals)


def _among_peers(anchor: Floats, gained: Floats) -> dict[str, Floats]:
    """Where a curve stands in its batch, and what the batch is like."""
    num = len(anchor)
    low, early, middle, late = np.quantile(anchor, [0.02, 0.1, 0.5, 0.9])
    same = {
        "batch spread below": early - low,
        "batch middle": middle - low,
        "batch spread": late - low,
        "batch at the start": float(np.mean(anchor > 0.97)),
        "log batch": np.log(num) / 4,
    }
    for level, gain in zip((0.1, 0.5, 0.9), np.quantile(gained, [0.1, 0.5, 0.9]), strict=True):
        same[f"batch gain {level}"] = float(np.arcsinh(gain / 1e-2))
    return {
        "rank": (rankdata(anchor) - 0.5) / num,
        "above the best": anchor - low,
        "above the early": anchor - early,
        "above the middle": anchor - middle,
        **{name: np.full(num, value) for name, value in same.items()},
    }
