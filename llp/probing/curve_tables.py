"""Complete learning curves of finished tasks: what the prior is fitted on and judged by.

A *table* holds the curves of one task from one source. `Example`s are made from it the way a search
meets them: a random subset of the curves as the batch, cut at random shares, some thinned. To stand
for the tasks that are not in any table, a batch may be warped as a whole, along training
(`(t / T)^a`) and in height (`h^b`), and `simulated` draws whole tasks from a parametric family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from llp.probing.curve_features import Floats, compact, describe

WARP = 0.3
"""Standard deviation of the logs of the warps' exponents."""
WARPED_SHARE = 0.7
LARGEST_SHARE = 0.98


@dataclass(frozen=True)
class CurveTable:
    """The curves of one task, lower is better.

    Attributes:
        source: Where they come from; tasks of one source are akin.
        task: Name of the task; all tables of one task are left out together.
        positions: [num_curves, num_points], increasing; NaN where there is no point.
        values: [num_curves, num_points]; NaN where there is no point.
        horizon: [num_curves], position of the result.
        schedule_remaining: [num_curves, num_points], share of the learning rate's decay between
            the point and the horizon; None where unknown.
        task_spread: How unlike the tasks of the source are beyond what their curves show; 0 where
            they are akin or many. In every batch to learn from, the logs of all ratios of final to
            last height, above the floor, are multiplied by one draw of `exp(task_spread N(0, 1))`,
            so that no task's own speed is learnt as certain.
        weight: Of the source in a fit, beside other sources.
        judged: Whether forecasts are judged on it; further metrics of a task only serve the fit.
        natural_unit: Values are error rates and are judged as they are; otherwise as the share of
            the way from the best value to the median first value, clipped to [0, 1].
    """

    source: str
    task: str
    positions: Floats
    values: Floats
    horizon: Floats
    schedule_remaining: Floats | None = None
    task_spread: float = 0.0
    weight: float = 1.0
    judged: bool = True
    natural_unit: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What is left out together."""
        return self.source, self.task

    def complete(self) -> NDArray[np.int64]:
        """Rows that have a finite value at the horizon."""
        last = np.where(np.isfinite(self.values), self.positions, -np.inf).max(axis=1)
        return np.flatnonzero(last >= self.horizon * (1 - 1e-9))

    def finals(self) -> Floats:
        """[num_curves], last finite values."""
        known = np.isfinite(self.values)
        last = known.shape[1] - 1 - known[:, ::-1].argmax(axis=1)
        return np.where(known.any(axis=1), self.values[np.arange(len(known)), last], np.nan)

    def scale(self) -> tuple[float, float]:
        """The values that are 0 and 1 where results are compared over tasks."""
        if self.natural_unit:
            return 0.0, 1.0
        first = np.where(np.isfinite(self.values), np.arange(self.values.shape[1]), 10**9)
        start = self.values[np.arange(len(first)), first.argmin(axis=1)]
        return float(np.nanmin(self.values)), float(np.nanmedian(start))

    def scaled(self, values: Floats) -> Floats:
        """Values on the scale on which they are judged."""
        low, high = self.scale()
        return np.asarray(np.clip((values - low) / (high - low), 0, 1))

    def rows(self, chosen: NDArray[np.int64]) -> CurveTable:
        """Some of the curves."""
        return replace(
            self,
            positions=self.positions[chosen],
            values=self.values[chosen],
            horizon=self.horizon[chosen],
            schedule_remaining=None
            if self.schedule_remaining is None
            else self.schedule_remaining[chosen],
        )

    def cut(self, share: Floats | float) -> tuple[Floats, Floats]:
        """Values and positions up to `share` of the horizon; of every curve the first point."""
        known = np.isfinite(self.values)
        limit = np.broadcast_to(share, len(self.values)) * self.horizon * (1 + 1e-9)
        kept = known & (self.positions <= limit[:, None])
        kept[np.arange(len(known)), known.argmax(axis=1)] = True
        kept &= known
        return np.where(kept, self.values, np.nan), np.where(kept, self.positions, np.nan)

    def remaining_after(self, values: Floats) -> Floats:
        """[num_curves], `schedule_remaining` at the last of the seen `values`."""
        if self.schedule_remaining is None:
            return np.full(len(values), np.nan)
        known = np.isfinite(values)
        last = known.shape[1] - 1 - known[:, ::-1].argmax(axis=1)
        return np.asarray(self.schedule_remaining[np.arange(len(known)), last])


@dataclass(frozen=True)
class Examples:
    """Descriptions of partial curves, with the final heights to learn.

    Attributes:
        features: [num_examples, num_features].
        anchor: [num_examples].
        pace: [num_examples].
        target: [num_examples], final height.
    """

    features: Floats
    anchor: Floats
    pace: Floats
    target: Floats

    def __len__(self) -> int:
        return len(self.target)

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """All examples of `parts`."""
        return cls(
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.anchor for part in parts]),
            np.concatenate([part.pace for part in parts]),
            np.concatenate([part.target for part in parts]),
        )


def make_examples(table: CurveTable, rng: Generator, num_batches: int) -> Examples | None:
    """Examples from `num_batches` random batches of the table; None when it has no whole curve."""
    batches = (_batch(table, rng) for _ in range(num_batches))
    parts = [part for part in batches if part is not None]
    return Examples.joined(parts) if parts else None


def _batch(table: CurveTable, rng: Generator) -> Examples | None:
    whole = table.complete()
    if not len(whole):
        return None
    if rng.random() < WARPED_SHARE:
        table = _warped(table, rng)
    num = int(np.clip(np.exp(rng.uniform(np.log(4), np.log(len(whole) * 1.5))), 1, len(whole)))
    chosen = table.rows(rng.choice(whole, 1 if rng.random() < 0.04 else num, replace=False))
    if not table.natural_unit and rng.random() < 0.6:
        low, high = table.scale()
        chosen = replace(chosen, values=np.clip((chosen.values - low) / (high - low), 0, 1))
    shares = _shares(len(chosen.values), rng)
    values, positions = chosen.cut(shares)
    values = _thinned(values, positions, rng)
    partial = compact(positions, values, chosen.horizon)
    remaining = chosen.remaining_after(values)
    if rng.random() < 0.5:
        remaining = np.full(len(values), np.nan)
    partial = replace(partial, schedule_remaining=remaining)
    described = describe(partial)
    target = described.unit.height(chosen.finals())
    if table.task_spread > 0:
        lowest = described.unit.height(np.nanmin(chosen.values)) - 0.02
        ratio = np.clip((target - lowest) / (described.anchor - lowest), 1e-3, 1e3)
        ratio = ratio ** np.exp(table.task_spread * rng.standard_normal())
        target = lowest + (described.anchor - lowest) * ratio
    open_ended = partial.last_position < LARGEST_SHARE * partial.horizon
    if not open_ended.any():
        return None
    return Examples(
        described.features[open_ended],
        described.anchor[open_ended],
        described.pace[open_ended],
        target[open_ended],
    )


def _warped(table: CurveTable, rng: Generator) -> CurveTable:
    """The table of a task that might have been."""
    end = table.horizon[:, None]
    positions = end * (table.positions / end) ** np.exp(WARP * rng.standard_normal())
    low, high = table.scale() if not table.natural_unit else (float(np.nanmin(table.values)), 1.0)
    values = table.values
    if high > low:
        floor = rng.uniform(0, 0.3) * (high - low)
        exponent = np.exp(WARP * rng.standard_normal())
        with np.errstate(over="ignore"):
            values = ((values - low + floor) / (high - low + floor)) ** exponent
        values = np.where(np.isinf(values), np.nan, values)
    return replace(table, positions=positions, values=values)


def _shares(num: int, rng: Generator) -> Floats:
    """How much of each curve of a batch is seen: alike, roughly alike, or anything."""
    base = np.exp(rng.uniform(np.log(0.05), np.log(0.95)))
    kind = rng.random()
    if kind < 0.65:
        return np.full(num, base)
    if kind < 0.85:
        spread = np.exp(0.7 * rng.standard_normal(num))
        return np.asarray(np.clip(base * spread, 0.03, LARGEST_SHARE))
    return np.minimum(np.exp(rng.uniform(np.log(0.03), np.log(1.5), num)), 1)


def _thinned(values: Floats, positions: Floats, rng: Generator) -> Floats:
    """Sometimes fewer evaluations: every second or third, or a few at a constant ratio (rungs)."""
    kind, width = rng.random(), values.shape[1]
    known = np.isfinite(values)
    last = width - 1 - known[:, ::-1].argmax(axis=1)
    keep = np.zeros(known.shape, dtype=bool)
    if kind < 0.25 and width > 10:
        keep[:, :: rng.integers(2, 4)] = True
    elif kind < 0.4:
        end = positions[np.arange(len(positions)), last]
        ratio = np.exp(rng.uniform(np.log(1.5), np.log(4)))
        for power in range(int(rng.integers(0, 5))):
            below = known & (positions <= (end / ratio ** (power + 1))[:, None] * (1 + 1e-9))
            place = width - 1 - below[:, ::-1].argmax(axis=1)
            keep[np.arange(len(keep)), place] |= below.any(axis=1)
    else:
        return values
    keep[np.arange(len(keep)), last] = True
    keep &= known
    return np.where(keep, values, np.nan)


def simulated(rng: Generator) -> CurveTable:
    """A task of the parametric family: power laws, exponentials and sigmoids with floors.

    With a learning-rate schedule whose decay lowers the curve, overfitting, correlated noise,
    curves that never leave the start, and jumps of divergence that may heal.
    """
    num, length = int(rng.integers(40, 200)), int(rng.choice([20, 30, 50, 80, 120]))
    share = np.arange(1, length + 1) / length
    normal = rng.standard_normal((num, 6))

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def ratio(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    speed = ratio(2, 400) * np.exp(between(0.2, 1.2) * normal[:, 0])
    exponent = (ratio(0.2, 1.5) * np.exp(between(0.05, 0.3) * normal[:, 1]))[:, None]
    floor = between(0, 0.15) + between(0.01, 0.25) * np.abs(normal[:, 2]) ** between(0.7, 2)
    floor = np.clip(floor, 0, 0.95)[:, None]
    late = (rng.random() < 0.35) * (ratio(1e-3, 0.2) * np.exp(0.5 * normal[:, 3]))[:, None]
    time = np.maximum(share - late, 0) * speed[:, None]
    shapes = np.stack(
        [
            (1 + time) ** -exponent,
            np.exp(-(time ** np.minimum(exponent, 1))),
            1 / (1 + (time / ratio(1, 8)) ** (1 + exponent)),
        ]
    )
    own = (
        rng.integers(0, 3, num) if rng.random() < 0.3 else np.full(num, rng.choice([0, 0, 0, 1, 2]))
    )
    shape = shapes[own, np.arange(num)]
    rate = _simulated_rate(share, rng, between(0.5, 1))
    values = floor + (1 - floor) * shape
    gain = (rng.random() < 0.75) * np.minimum(between(0, 0.35) * np.exp(0.7 * normal[:, 4]), 0.6)
    values += (
        gain[:, None]
        * (1 - values / 2)
        * (1 - np.exp(-time))
        * rate ** between(0.4, 1.5)
        * (1 - shape)
    )
    if rng.random() < 0.35:
        rise = (ratio(0.01, 0.5) * np.exp(normal[:, 5]))[:, None]
        values += rise * np.maximum(share - between(0.02, 0.7), 0) ** between(0.7, 1.5)
    noise = ratio(3e-4, 0.03) * np.exp(between(0, 0.8) * rng.standard_normal(num))
    memory, error = between(0, 0.7), rng.standard_normal((num, length))
    for k in range(1, length):
        error[:, k] = memory * error[:, k - 1] + np.sqrt(1 - memory**2) * error[:, k]
    values += noise[:, None] * error * np.clip(1 - values, 0.05, 1) * (0.8 * rate + 0.2)
    stuck = rng.random(num) < (between(0, 0.5) if rng.random() < 0.5 else 0)
    level = 1 + ratio(1e-5, 1e-2) * rng.standard_normal((num, 1))
    level = level + ratio(1e-5, 1e-3) * rng.standard_normal((num, length))
    values = np.where(stuck[:, None], level, values)
    broken = rng.random(num) < (between(0, 0.3) if rng.random() < 0.6 else 0)
    when = (rng.random(num) ** ratio(0.5, 3))[:, None]
    height = (np.exp(0.7 * rng.standard_normal(num)) * between(0.2, 1.2) * broken)[:, None]
    heal = np.where(rng.random(num) < between(0, 0.6), ratio(3, 60), 0.0)[:, None]
    values += np.where(share > when, height * np.exp(-np.maximum(share - when, 0) * heal), 0)
    if rng.random() < 0.7:
        values[:, 0] = 1
    values = np.maximum(values, 0)
    values = np.where(values < 1, values ** ratio(0.6, 1.6), values)
    return CurveTable(
        "simulated",
        f"simulated {int(rng.integers(1 << 30))}",
        np.tile(share * length, (num, 1)),
        values,
        np.full(num, float(length)),
        np.tile(rate - rate[-1], (num, 1)),
        weight=0.3,
        judged=False,
    )


def _simulated_rate(share: Floats, rng: Generator, decay: float) -> Floats:
    """A learning rate: cosine, linear, constant, constant then linear, or steps."""
    return np.asarray(
        [
            (1 + np.cos(np.pi * share)) / 2,
            1 - share,
            np.ones_like(share),
            np.clip((1 - share) / (1.001 - decay), 0, 1),
            np.where(share < 0.33, 1, np.where(share < 0.66, 0.2, 0.04)),
        ][int(rng.integers(5))]
    )
