"""How good forecasts are on tasks that were left out of the fit.

Curves are cut at a share of their horizon, forecast, and compared with what came out, on the scale
of `CurveTable.scaled`: mean absolute error of the point forecast, mean log density, Spearman's
correlation within a task, and how often the intervals cover. Every figure is the mean over tasks.

Beside ours stand the *last value* and *pow3* (`c + a t^-b` by SciPy's least squares); both get the
spread of their own errors on the other tasks of the source, as nothing else has any calibration.
Where pow3 cannot be fitted it keeps the last value; how often is counted (`Score.unfitted`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import rankdata

from llp.probing.curve_features import Floats
from llp.probing.curve_fitting import FitOptions, Library, fit
from llp.probing.curve_prior import LEVELS, Prior, widen_ties
from llp.probing.curve_tables import CurveTable
from llp.probing.learning_curves import Forecast, extrapolate

SHARES = (0.1, 0.2, 0.4, 0.7)
INTERVALS = (0.5, 0.8, 0.9)
MIN_CURVES = 5
POW3_EVALUATIONS = 5000
"""At most so many evaluations of the law in one fit. With 400, fits of every 25th curve of TaskSet
converged on 28 % (10 % seen) and 35 % (40 % seen), with 5,000 on 72 % and 77 %; of the curves that
are not constant the mean error fell from .053 to .042 and from .024 to .021."""
RESOLUTION = 0.002
"""A density is the probability within this distance of the result, per width: results that repeat a
value seen before would otherwise count without limit for a forecast that bets on it."""


@dataclass(frozen=True)
class Cut:
    """What was seen of a task's curves, on the scale of the judgement, and what came out.

    Attributes:
        table: The task, scaled, with the curves that can be judged.
        share: Share of the horizon that was seen.
        values: [num_curves, num_points], NaN where unseen.
        truth: [num_curves].
    """

    table: CurveTable
    share: float
    values: Floats
    truth: Floats


@dataclass(frozen=True)
class Score:
    """How one method did on one task at one share.

    Attributes:
        method: Name.
        source: Of the task.
        task: Name.
        share: Share of the horizon that was seen.
        error: Mean absolute error.
        log_density: Mean log density.
        spearman: Rank correlation of forecast and result.
        coverage: By `INTERVALS`, share of results inside the central interval.
        unfitted: Share of curves where the method had no fit of its own and kept the last value.
    """

    method: str
    source: str
    task: str
    share: float
    error: float
    log_density: float
    spearman: float
    coverage: tuple[float, ...]
    unfitted: float = 0.0


def cut(
    table: CurveTable, share: float, *, unit: CurveTable | None = None, scaled: bool = True
) -> Cut | None:
    """The task's curves seen up to `share`, on the scale of `unit` (by default their own).

    None when too few can be judged.
    """
    unit = unit or table
    known = np.isfinite(table.values)
    first = np.where(known, table.positions, np.inf).min(axis=1)
    rows = table.complete()
    if table.natural_unit:  # a size below the smallest was never tried
        rows = rows[first[rows] <= share * table.horizon[rows]]
    if len(rows) < MIN_CURVES:
        return None
    chosen = table.rows(rows)
    values, _ = chosen.cut(share)
    return Cut(
        chosen,
        share,
        unit.scaled(values) if scaled else values,
        unit.scaled(chosen.finals()),
    )


def forecast(
    seen: Cut, prior: Prior, *, schedule: bool = False, finished: CurveTable | None = None
) -> Forecast:
    """Our forecast of a cut task; `finished` are whole curves of the same, in the same unit."""
    table = seen.table
    return extrapolate(
        seen.values,
        horizon=table.horizon,
        positions=table.positions,
        schedule_remaining=table.remaining_after(seen.values) if schedule else None,
        finished=None if finished is None else (finished.values, finished.positions),
        prior=prior,
    )


def score(
    method: str,
    seen: Cut,
    made: Forecast,
    point: Floats | None = None,
    fitted: NDArray[np.bool_] | None = None,
) -> Score:
    """What `made` is worth; `point` is its point forecast if that is not its mean.

    `fitted` [num_curves] says for which curves the method had a fit of its own; by default all.
    """
    inside = [
        float(np.mean((low <= seen.truth) & (seen.truth <= high)))
        for low, high in (made.quantile([0.5 - level / 2, 0.5 + level / 2]) for level in INTERVALS)
    ]
    point = made.mean if point is None else point
    near = made.probability_better_than(seen.truth + RESOLUTION)
    near = near - made.probability_better_than(seen.truth - RESOLUTION)
    return Score(
        method,
        seen.table.source,
        seen.table.task,
        seen.share,
        float(np.abs(point - seen.truth).mean()),
        float(np.log(np.maximum(near / (2 * RESOLUTION), 1e-3)).mean()),
        _spearman(point, seen.truth),
        tuple(inside),
        0.0 if fitted is None else float(np.mean(~fitted)),
    )


def _spearman(first: Floats, second: Floats) -> float:
    a, b = rankdata(first), rankdata(second)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def last_value(seen: Cut) -> Floats:
    """[num_curves], the last value seen."""
    known = np.isfinite(seen.values)
    last = known.shape[1] - 1 - known[:, ::-1].argmax(axis=1)
    return np.asarray(seen.values[np.arange(len(known)), last])


def pow3(seen: Cut) -> tuple[Floats, NDArray[np.bool_]]:
    """`c + a t^-b` at the horizon, and for which curves it could be fitted; both [num_curves].

    The last value stands where it could not: with under 4 points, on constant curves, and where
    least squares do not converge.
    """
    found, fitted = last_value(seen), np.zeros(len(seen.values), dtype=bool)
    for row, (values, positions) in enumerate(zip(seen.values, seen.table.positions, strict=True)):
        known = np.isfinite(values)
        y, t = values[known], positions[known] / seen.table.horizon[row]
        if len(y) < 4 or np.ptp(y) == 0:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", (OptimizeWarning, RuntimeWarning))
                (c, a, _), _ = curve_fit(
                    lambda t, c, a, b: c + a * t**-b,
                    t,
                    y,
                    p0=(y[-1], (y[0] - y[-1]) * t[0] ** 0.5, 0.5),
                    maxfev=POW3_EVALUATIONS,
                )
        except RuntimeError:
            continue
        if np.isfinite(c + a):
            found[row], fitted[row] = np.clip(c + a, 0, 1), True
    return found, fitted


Baseline = Callable[[Cut], "Floats | tuple[Floats, NDArray[np.bool_]]"]
"""A point forecast [num_curves], by itself or with the curves for which it could be fitted."""
BASELINES: dict[str, Baseline] = {"last value": last_value, "pow3": pow3}


def with_spread_of_others(point: Floats, errors: Floats) -> Forecast:
    """A point forecast with the quantiles of the same forecast's `errors` on other tasks."""
    table = point[:, None] + np.quantile(errors, LEVELS)
    return Forecast(widen_ties(table), (0.0, np.inf))


def judge_baselines(
    tables: Iterable[CurveTable],
    shares: Sequence[float] = SHARES,
    baselines: dict[str, Baseline] = BASELINES,
) -> list[Score]:
    """The baselines on every judged task, each with the spread of the source's other tasks."""
    scores = []
    judged = [table for table in tables if table.judged]
    for share in shares:
        for source in dict.fromkeys(table.source for table in judged):
            cuts = [c for t in judged if t.source == source and (c := cut(t, share)) is not None]
            for name, method in baselines.items():
                points, fits = [], []
                for seen in cuts:
                    found = method(seen)
                    own = found if isinstance(found, tuple) else (found, None)
                    points.append(own[0])
                    fits.append(own[1])
                errors = [seen.truth - point for seen, point in zip(cuts, points, strict=True)]
                for k, seen in enumerate(cuts):
                    others = errors[:k] + errors[k + 1 :] or errors
                    made = with_spread_of_others(points[k], np.concatenate(others))
                    scores.append(score(name, seen, made, points[k], fits[k]))
    return scores


def folds(tables: Iterable[CurveTable], most: int) -> list[frozenset[tuple[str, str]]]:
    """Which tasks are left out together: one at a time, or `most` groups of a source's tasks."""
    found: list[frozenset[tuple[str, str]]] = []
    keys = list(dict.fromkeys(table.key for table in tables if table.judged))
    for source in dict.fromkeys(source for source, _ in keys):
        of_source = [key for key in keys if key[0] == source]
        num = min(len(of_source), most)
        found += [frozenset(of_source[k::num]) for k in range(num)]
    return found


def judge(
    tables: Sequence[CurveTable],
    options: FitOptions,
    *,
    left_out: Sequence[frozenset[tuple[str, str]]],
    library: Library | None = None,
    judged_by: Callable[[list[CurveTable], Prior], list[Score]] | None = None,
    on_fold: Callable[[int], None] = lambda fold: None,
) -> list[Score]:
    """Scores on every group of tasks, by priors fitted without it.

    Args:
        tables: All tasks.
        options: How to fit.
        left_out: Groups of tasks.
        library: Examples of `tables`, where they were made before.
        judged_by: The scores of a prior on the tasks it does not know; `judge_prior` by default.
        on_fold: Told the number of every group that is done.
    """
    library = library or Library(tables, options)
    scores = []
    for number, group in enumerate(left_out):
        prior = fit(tables, options, library=library, left_out=group)
        held = [table for table in tables if table.judged and table.key in group]
        scores += (judged_by or judge_prior)(held, prior)
        on_fold(number)
    return scores


def judge_prior(
    tables: Iterable[CurveTable],
    prior: Prior,
    *,
    shares: Sequence[float] = SHARES,
    name: str = "llp",
    scaled: bool = True,
    schedule: bool = False,
    num_finished: int = 0,
    seed: int = 0,
) -> list[Score]:
    """Scores of a prior on judged tables; it should not have been fitted on them.

    Args:
        tables: The tasks.
        prior: What is judged.
        shares: Where the curves are cut.
        name: Method name in the scores.
        scaled: Forecast the scaled curves, or the metric as it is.
        schedule: Tell the forecast what is left of the learning-rate schedule.
        num_finished: So many random curves of each task are given as finished, and not judged.
        seed: Chooses them.
    """
    scores = []
    for table in tables:
        if not table.judged:
            continue
        order = np.random.default_rng(seed).permutation(table.complete())
        finished = table.rows(order[:num_finished]) if num_finished else None
        if finished is not None and scaled:
            finished = replace(finished, values=table.scaled(finished.values))
        open_rows = table.rows(np.sort(order[num_finished:]))
        for share in shares:
            seen = cut(open_rows, share, unit=table, scaled=scaled)
            if seen is None:
                continue
            made = forecast(seen, prior, schedule=schedule, finished=finished)
            if not scaled:
                low, high = table.scale()
                made = Forecast(widen_ties((made.costs - low) / (high - low)), (0.0, 1.0))
            scores.append(score(name, seen, made))
    return scores


def summary(scores: Iterable[Score]) -> list[Score]:
    """Means over tasks, one row per source, share and method; `task` holds their number."""
    groups: dict[tuple[str, float, str], list[Score]] = {}
    for one in scores:
        groups.setdefault((one.source, one.share, one.method), []).append(one)
    rows = []
    for (source, share, method), members in groups.items():
        coverage: NDArray[np.float64] = np.mean([one.coverage for one in members], axis=0)
        rows.append(
            Score(
                method,
                source,
                f"{len(members)} tasks",
                share,
                float(np.mean([one.error for one in members])),
                float(np.mean([one.log_density for one in members])),
                float(np.mean([one.spearman for one in members])),
                tuple(float(level) for level in coverage),
                float(np.mean([one.unfitted for one in members])),
            )
        )
    return sorted(rows, key=lambda row: (row.source, row.share))


def evidence(scores: Iterable[Score]) -> dict[str, Any]:
    """The summary of leave-tasks-out scores, as it is kept in the prior's file."""
    found: dict[str, Any] = {"protocol": "tasks left out of the fit", "intervals": list(INTERVALS)}
    for row in summary(scores):
        found.setdefault(row.source, {})[f"{row.share:g}"] = {
            "tasks": int(row.task.split()[0]),
            "error": round(row.error, 4),
            "log_density": round(row.log_density, 3),
            "spearman": round(row.spearman, 3),
            "coverage": [round(part, 3) for part in row.coverage],
        }
    return found
