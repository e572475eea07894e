"""Forecasts of final results from partial learning curves, with uncertainty that is meant.

`extrapolate` takes the curves of a search so far and says, for each, how its metric will be
distributed at the *horizon*. The distribution comes from a prior that was fitted on the curves of
other tasks (`curve_prior`), never from the residuals of a curve's own fit, and is corrected on the
search's own finished trials (`finished`): their forecasts are made again from what was seen of them
at the same point, and the levels are moved to where their results really fell, the more the more
trials there are (a conformal correction, shrunk towards none).

`extrapolate_full` joins two axes. Along *training*, the curve of a rung is forecast to the rung's
end; along *data*, the ends of a trial's rungs are a curve of the metric against the number of
images, which is forecast to the full data set.

A forecast is scale-free: the metric may be a loss, an error or an accuracy in any unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from llp.probing.curve_features import Curves, Description, Floats, compact, describe
from llp.probing.curve_input import (
    completed,
    matrix,
    metric_range,
    parse_finished,
    parse_positions,
    remaining_at_end,
)
from llp.probing.curve_prior import LEVELS, LOGITS, Prior, load, widen_ties
from llp.probing.forecasts import Forecast, at_logits, logit_below, pooled

__all__ = ["Forecast", "corrected_logits", "extrapolate", "extrapolate_full"]

SHRINKAGE = 20.0
LOCATION_TRIALS = 8.0
SCALE_TRIALS = 10.0
"""Finished trials that weigh as much as the prior, on the shape, the location and the scale of the
correction. Less trust in the prior (8, 1.5, 2.6) is worse with 4, 10 and 30 finished trials on all
three sources of curves: with 10, 90 % intervals on LCDB cover 83 % instead of 87 %, at .034 instead
of .032 mean error."""
_GROUP_RATIO = 1.5
_MEAN_DEVIATION = 2 * np.log(2)  # of the standard logistic distribution
_SCORES = np.linspace(-16.0, 16.0, 641)
_NODES = (0.1, 0.3, 0.5, 0.7, 0.9)


def extrapolate(
    curves: ArrayLike,
    *,
    horizon: ArrayLike,
    positions: ArrayLike | None = None,
    schedule_remaining: ArrayLike | None = None,
    finished: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    higher_is_better: bool = False,
    bounds: tuple[float, float] | None = None,
    prior: Prior | None = None,
) -> Forecast:
    """The distribution of every curve's value at the horizon.

    The curves of one call are taken for trials of one search on one task, and are evidence about
    each other; their order is not. A curve of which nothing was seen gets the mixture of its peers'
    forecasts. A curve with an infinite value has diverged and is forecast at the worst value seen.
    A curve seen to the horizon gets its last value, with an interval as wide as its noise.

    Args:
        curves: [num_curves, num_points], the metric; NaN where not seen.
        horizon: Position of the result, one or [num_curves].
        positions: Where the points are (epochs, steps, images), [num_points] or
            [num_curves, num_points], in any order; 1, 2, ... by default. Where the first is 0 or
            negative, all and the horizon are moved up until the first is one gap above 0.
        schedule_remaining: Share of the learning rate's decay that lies between a curve's last
            point and the horizon, (rate now - rate at the horizon) / peak rate, in [0, 1]; one,
            [num_curves], or [num_curves, num_points] at every point. 0 for a constant rate. NaN or
            None where unknown.
        finished: [num_finished, num_points], complete curves of the same search on the same
            positions (equally spaced ones go on as they are where these curves are longer), or a
            pair of such values and their own positions. Curves without a value at
            the horizon are left out; where curves have their own horizons, finished ones end at
            their last point. Without them the forecast is as calibrated as the prior is on a new
            task.
        higher_is_better: For accuracies.
        bounds: The metric's range. By default at least 0 where no value is negative, and at most 1
            where besides higher is better and none is above 1.
        prior: Instead of the one that is shipped.

    Raises:
        ValueError: Shapes do not fit, or a position is missing or not finite.

    >>> curves = [[0.9, 0.6, 0.5, 0.45, 0.42], [0.9, 0.8, 0.75, 0.72, 0.70]]
    >>> forecast = extrapolate(curves, horizon=50)
    >>> forecast.quantile([0.05, 0.5, 0.95]).shape
    (3, 2)
    >>> bool(forecast.mean[0] < forecast.mean[1])
    True
    """
    values = matrix(curves, "curves")
    chosen = load() if prior is None else prior
    places, ends = parse_positions(positions, horizon, values.shape)
    old, old_places, old_ends = parse_finished(finished, positions, horizon)
    sign = -1.0 if higher_is_better else 1.0
    diverged = np.isinf(values).any(axis=1)
    usable = np.isfinite(values) & (places <= ends[:, None] * (1 + 1e-9))
    known = usable.any(axis=1) & ~diverged
    ended = completed(old, old_places, old_ends, sign)

    table = np.full((len(values), len(LEVELS)), np.nan)
    if known.any():
        batch = compact(
            places[known],
            np.where(usable, sign * values, np.nan)[known],
            ends[known],
            remaining_at_end(schedule_remaining, np.where(usable, values, np.nan))[known],
        )
        table[known] = _forecast(batch, ended, chosen)
    unseen = ~known & ~diverged
    if unseen.any():
        table[unseen] = pooled(table[known] if ended is None else _about(ended.last_value))
    costs = np.concatenate([sign * array[np.isfinite(array)] for array in (values, old)])
    if diverged.any() and len(costs):
        table[diverged] = costs.max()
    limits = metric_range(bounds, higher_is_better, values, old)
    return Forecast(widen_ties(table), limits, higher_is_better)


def extrapolate_full(
    curves: ArrayLike,
    *,
    sizes: Sequence[float],
    full_size: float,
    horizon: ArrayLike,
    positions: ArrayLike | None = None,
    schedule_remaining: ArrayLike | None = None,
    higher_is_better: bool = False,
    bounds: tuple[float, float] | None = None,
    prior: Prior | None = None,
) -> Forecast:
    """The distribution of every trial's result on the full data after full training.

    Along training, each rung's curve is forecast to the end of the rung. Along data, the ends of
    the rungs are a curve against the number of images; the newest of them is uncertain, so that
    curve is forecast for several quantiles of it, and the forecasts are mixed. Curves that have
    reached the end of a rung, or of the ladder, correct the forecasts of the others there, as
    `finished` does in `extrapolate`. While a rung runs,
    its own forecast and the one from the rungs below it are pooled with equal weights (the mean of
    their quantiles): they are about the same number, and how far they agree by chance is unknown.

    Args:
        curves: [num_curves, num_rungs, num_points]; NaN where not seen.
        sizes: Images of each rung, increasing.
        full_size: Images of the full data set, at least the largest of `sizes`.
        horizon: Last position of a rung, one or [num_rungs].
        positions: Within a rung, [num_points]; 1, 2, ... by default.
        schedule_remaining: As in `extrapolate`, for the rung that runs.
        higher_is_better: For accuracies.
        bounds: The metric's range.
        prior: Instead of the one that is shipped.

    Raises:
        ValueError: Shapes or sizes do not fit.
    """
    values = np.asarray(curves, dtype=float)
    images = np.asarray(sizes, dtype=float)
    if values.ndim != 3 or values.shape[1] != len(images):
        raise ValueError(
            f"curves must be [num_curves, {len(images)} rungs, num_points], got {values.shape}"
        )
    if not (np.diff(images) > 0).all() or not images[0] > 0 or full_size < images[-1]:
        raise ValueError(
            f"sizes must be positive and increase up to full_size, got {images.tolist()} and "
            f"{full_size}"
        )
    sign = -1.0 if higher_is_better else 1.0
    limits = metric_range(bounds, higher_is_better, values, values[:0])
    remaining = np.nan if schedule_remaining is None else np.asarray(schedule_remaining, float)
    remaining = np.broadcast_to(remaining, len(values))
    ends = np.broadcast_to(np.asarray(horizon, dtype=float), len(images))

    def along_data(heads: Floats, size: float, finished: Floats | None = None) -> Floats:
        return extrapolate(
            heads,
            horizon=size,
            positions=images[: heads.shape[1]],
            finished=finished,
            higher_is_better=higher_is_better,
            bounds=limits,
            prior=prior,
        ).costs

    rows = np.arange(len(values))
    heads = np.full(values.shape[:2], np.nan)
    newest = np.full((len(values), len(LEVELS)), np.nan)
    last = np.zeros(len(values), dtype=int)
    for rung in range(len(images)):
        begun = (~np.isnan(values[:, rung])).any(axis=1)
        if not begun.any():
            continue
        done = _at_end(values[begun, rung], positions, float(ends[rung]))
        along = extrapolate(
            values[begun, rung],
            horizon=ends[rung],
            positions=positions,
            schedule_remaining=remaining[begun],
            finished=values[begun, rung][done] if done.any() and not done.all() else None,
            higher_is_better=higher_is_better,
            bounds=limits,
            prior=prior,
        ).costs
        lower = heads[begun, :rung]
        running = np.isfinite(lower).any(axis=1) & ~done
        if running.any():
            upward = along_data(lower, float(images[rung]))
            along[running] = (along[running] + upward[running]) / 2
        newest[begun], last[begun] = along, rung
        heads[begun, rung] = sign * along[:, len(LEVELS) // 2]
    tables = []
    whole = _at_end(values[:, -1], positions, float(ends[-1])) & (full_size == images[-1])
    for level in _NODES:
        ladder = heads.copy()
        ladder[rows, last] = sign * newest[:, np.searchsorted(LEVELS, level - 1e-9)]
        tables.append(along_data(ladder, full_size, heads[whole] if whole.any() else None))
    mixed = np.stack([pooled(np.stack(parts)) for parts in zip(*tables, strict=True)])
    return Forecast(widen_ties(mixed), limits, higher_is_better)


def _at_end(values: Floats, positions: ArrayLike | None, end: float) -> NDArray[np.bool_]:
    """Whether each curve has a point at the horizon."""
    places, ends = parse_positions(positions, end, values.shape)
    return np.asarray((np.isfinite(values) & (places >= ends[:, None] * (1 - 1e-9))).any(axis=1))


def _forecast(batch: Curves, ended: Curves | None, prior: Prior) -> Floats:
    """Quantile tables [num_curves, num_levels] of curves with at least one point each."""
    over = batch.last_position >= batch.horizon * (1 - 1e-9)
    table = np.empty((len(batch), len(LEVELS)))
    if ended is None:
        described = describe(batch)
        if over.all():  # nothing to forecast
            return _observed(batch, described)
        table[:] = described.unit.value(prior.quantiles(described))
        table[over] = _observed(batch, described)[over]
        return table
    final = ended.last_value
    for group in _groups(batch.last_position / batch.horizon):
        share = float(np.median((batch.last_position / batch.horizon)[group]))
        remaining = batch.schedule_remaining[group]
        typical = np.median(remaining) if np.isfinite(remaining).all() else np.nan
        replay = ended.until(ended.horizon * share)
        both = _joined(batch.rows(group), replay, float(typical))
        described = describe(both)
        heights = prior.quantiles(described)
        num = len(group)
        scores = logit_below(widen_ties(heights[num:]), described.unit.height(final))[0]
        levels = corrected_logits(scores)
        table[group] = described.unit.value(at_logits(heights[:num], levels))
        here = over[group]
        table[group[here]] = _observed(both, described)[:num][here]
    return table


def corrected_logits(scores: Floats) -> Floats:
    """At which logit of the forecast each of `LOGITS` really lies, [num_levels], increasing.

    `scores` are the logits of the forecasts' distribution functions at the results of finished
    trials; were the forecasts calibrated, they would follow the standard logistic distribution.
    What they do follow is taken for a mixture of the scores themselves, smoothed, and, with the
    weight of `SHRINKAGE` trials, a logistic distribution whose location and log scale are those of
    the scores, shrunk towards the standard ones by as much as tasks were seen to differ.
    """
    scores = np.clip(scores[np.isfinite(scores)], -14, 14)
    num = len(scores)
    if num == 0:
        return LOGITS.copy()
    middle = float(np.median(scores))
    location = middle * num / (num + LOCATION_TRIALS)
    scale = 1.0
    if num > 1:
        spread = np.mean(np.abs(scores - middle)) * np.sqrt(num / (num - 1)) / _MEAN_DEVIATION
        scale = max(float(spread), 1e-3) ** ((num - 1) / (num - 1 + SCALE_TRIALS))
    scale = float(np.hypot(scale, 1 / np.sqrt(num + LOCATION_TRIALS)))
    width = 0.5 * scale * num ** (-1 / 3)
    below = SHRINKAGE * expit((_SCORES - location) / scale)
    below += expit((_SCORES[:, None] - scores) / width).sum(axis=1)
    below = np.clip(below / (SHRINKAGE + num), 1e-12, 1 - 1e-12)
    found = np.interp(LOGITS, np.log(below) - np.log1p(-below), _SCORES)
    return np.asarray(found + 1e-9 * np.arange(len(found)))


def _observed(batch: Curves, described: Description) -> Floats:
    """Tables about the last value, as wide as the curve's noise."""
    noise = np.maximum(described.noise, 1e-6) * np.sqrt(3) / np.pi
    slope = np.exp(described.unit.log_slope(described.anchor))
    return np.asarray(batch.last_value[:, None] + (noise * slope)[:, None] * LOGITS)


def _groups(shares: Floats) -> list[NDArray[np.int64]]:
    """Rows of curves that are about equally far."""
    order = np.argsort(shares, kind="stable")
    groups: list[list[int]] = []
    start = -np.inf
    for row in order:
        if shares[row] > start * _GROUP_RATIO or not groups:
            groups.append([])
            start = shares[row]
        groups[-1].append(int(row))
    return [np.array(group) for group in groups]


def _joined(first: Curves, second: Curves, schedule_remaining: float) -> Curves:
    """Two batches as one; the second gets one value of `schedule_remaining`."""
    width = max(first.values.shape[1], second.values.shape[1])

    def both(left: Floats, right: Floats) -> Floats:
        pads = [((0, 0), (0, width - array.shape[1])) for array in (left, right)]
        return np.concatenate(
            [
                np.pad(array, pad, constant_values=np.nan)
                for array, pad in zip((left, right), pads, strict=True)
            ]
        )

    return Curves(
        both(first.positions, second.positions),
        both(first.values, second.values),
        np.concatenate([first.num_seen, second.num_seen]),
        np.concatenate([first.horizon, second.horizon]),
        np.concatenate([first.schedule_remaining, np.full(len(second), schedule_remaining)]),
    )


def _about(results: Floats) -> Floats:
    """Tables of known results, each widened to the gaps between them."""
    width = np.std(results) * len(results) ** -0.2 * np.sqrt(3) / np.pi
    return np.asarray(results[:, None] + width * LOGITS)
