"""Learning-curve forecasts on tasks left out of the fit, beside four other methods; and their cost.

    python tests/benchmarks/learning_curves.py [TABLE...] [--quick] [--json FILE]

The tables (default: those of `../shared/curves`) are cut at 10, 20, 40 and 70 % of the horizon. The
prior is fitted again without the task (without a fifth of the datasets of LCDB), and once without
the whole source. On TaskSet and AlgoPerf values are scaled to the way from the best value of the
task (0) to the median start (1) and clipped; LCDB's are error rates. Every figure is the mean over
tasks; a density is the probability within 0.002 of the result.

- *last value* and *pow3* (`c + a t^-b`, SciPy), with the spread of their errors on other tasks;
- *pow3 plug-in*: the same fit with the normal interval of its own residuals;
- *mixture*: power laws, exponentials and sigmoids as exact Bayesian linear models, by evidence;
- *quantile GBM*: gradient-boosted trees on our features, one per quantile, without the tasks;
- *llp*; *llp raw*: the metric in its own unit; *llp schedule*: told what is left of the schedule;
  *llp + 10, 30*: corrected on so many finished trials of the task.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness import Bar, finish, machine, parser, print_table
from scipy.optimize import OptimizeWarning, curve_fit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llp.curve_files import read_tables
from llp.probing.curve_evaluation import (
    INTERVALS,
    POW3_EVALUATIONS,
    SHARES,
    Score,
    cut,
    folds,
    judge,
    judge_baselines,
    judge_prior,
    last_value,
    pow3,
    score,
    summary,
)
from llp.probing.curve_features import compact, describe
from llp.probing.curve_fitting import FitOptions, Library, fit
from llp.probing.curve_prior import LEVELS, LOGITS, load, widen_ties
from llp.probing.curve_tables import CurveTable
from llp.probing.learning_curves import Forecast, extrapolate

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "curves"
FILES = ("taskset_dev.npz", "algoperf_dev_curves.parquet", "lcdb_dev.npz")
GBM_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BARS: dict[str, dict[float, dict[str, float]]] = {
    "taskset": {
        0.1: {"error": 0.034, "log density": 3.0},
        0.2: {"error": 0.022, "log density": 3.4},
        0.4: {"error": 0.014, "log density": 3.6},
    },
    "algoperf": {0.1: {"error": 0.080}, 0.2: {"error": 0.072}, 0.4: {"error": 0.055}},
    "lcdb": {0.1: {"error": 0.040}, 0.2: {"error": 0.029}},
}


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The command line."""
    built = parser(__doc__ or "")
    built.add_argument("tables", nargs="*", type=Path, help=f"default: {', '.join(FILES)}")
    built.add_argument(
        "--skip",
        action="append",
        default=[],
        choices=("pow3", "mixture", "boosted", "source"),
        help="leave out a slow part; may be given again",
    )
    found = built.parse_args(arguments)
    found.tables = found.tables or [FOLDER / name for name in FILES]
    missing = [str(path) for path in found.tables if not path.exists()]
    if missing:
        built.error(f"not there: {', '.join(missing)}")
    return found


def ours(tables: list[CurveTable], prior: Any) -> list[Score]:
    """All variants of our forecast on tasks the prior does not know."""
    found = judge_prior(tables, prior)
    found += judge_prior(tables, prior, name="llp raw", scaled=False)
    found += judge_prior(tables, prior, name="llp schedule", schedule=True)
    for num in (10, 30):
        found += judge_prior(tables, prior, name=f"llp + {num}", num_finished=num)
    return found


def plug_in(tables: Sequence[CurveTable]) -> list[Score]:
    """pow3 with the normal interval of its own residuals, as it is mostly used."""
    scores = []
    for table in tables:
        for share in SHARES:
            seen = cut(table, share)
            if seen is not None:
                points, spreads, fitted = zip(
                    *(
                        _pow3(values[known], positions[known] / end)
                        for values, positions, end in zip(
                            seen.values, seen.table.positions, seen.table.horizon, strict=True
                        )
                        for known in [np.isfinite(values)]
                    ),
                    strict=True,
                )
                made = _logistic(points, spreads)
                scores.append(score("pow3 plug-in", seen, made, fitted=np.array(fitted)))
    return scores


def _pow3(y: Any, t: Any) -> tuple[float, float, bool]:
    """The value at 1, the residuals' spread, and whether the law could be fitted."""
    if len(y) < 4 or np.ptp(y) == 0:
        return float(y[-1]), 1e-3, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (OptimizeWarning, RuntimeWarning))
        try:
            found, _ = curve_fit(
                _law,
                t,
                y,
                p0=(y[-1], (y[0] - y[-1]) * t[0] ** 0.5, 0.5),
                maxfev=POW3_EVALUATIONS,
            )
        except RuntimeError:
            return float(y[-1]), float(np.std(np.diff(y))) + 1e-3, False
        rest = y - _law(t, *found)
    point = found[0] + found[1]
    if not np.isfinite(point) or not np.isfinite(rest).all():
        return float(y[-1]), float(np.std(np.diff(y))) + 1e-3, False
    spread = float(np.sqrt((rest**2).sum() / (len(y) - 3))) + 1e-4
    return float(np.clip(point, 0, 1)), spread, True


def _law(t: Any, c: float, a: float, b: float) -> Any:
    return c + a * t**-b


def _logistic(points: Any, spreads: Any) -> Forecast:
    """Distributions of given mean and standard deviation."""
    scale = np.asarray(spreads) * np.sqrt(3) / np.pi
    return Forecast(widen_ties(np.asarray(points)[:, None] + scale[:, None] * LOGITS))


def mixture(tables: Sequence[CurveTable]) -> list[Score]:
    """Bayesian linear models `c + a phi(t)` with noise and a random walk, mixed by evidence.

    `c ~ N(.3, .4^2)`, `a ~ N(0, .7^2)` on scaled values; phi is one of 12 shapes, the noise 3 and
    the random walk per unit of log time 3 sizes. Everything is Gaussian given those.
    """
    scores = []
    for table in tables:
        for share in SHARES:
            seen = cut(table, share)
            if seen is not None:
                rows = [
                    _mixture_row(values[known], positions[known] / end)
                    for values, positions, end in zip(
                        seen.values, seen.table.positions, seen.table.horizon, strict=True
                    )
                    for known in [np.isfinite(values)]
                ]
                scores.append(score("mixture", seen, Forecast(widen_ties(np.stack(rows)))))
    return scores


def _shapes(t: Any) -> list[Any]:
    powers = [t**-b for b in (0.2, 0.5, 1.0, 2.0)]
    decays = [np.exp(-t / tau) for tau in (0.05, 0.15, 0.4, 1.0)]
    bends = [1 / (1 + (t / middle) ** 2) for middle in (0.05, 0.15, 0.4, 1.0)]
    return [*powers, *decays, *bends]


def _mixture_row(y: Any, t: Any, most: int = 20) -> Any:
    """Quantiles of the value at 1; of long curves `most` points, the last among them."""
    kept = np.unique(np.linspace(0, len(y) - 1, min(most, len(y))).round().astype(int))
    y, t = y[kept], t[kept]
    time = np.log(np.append(t, 1.0) / t[0])
    walk = np.minimum.outer(time, time)
    last, spread, evidence = [], [], []
    for shape in _shapes(np.append(t, 1.0)):
        shape = shape / max(abs(shape[0]), 1e-9)
        base = 0.16 + 0.49 * np.outer(shape, shape)
        for noise in (1e-3, 1e-2, 5e-2):
            for drift in (1e-3, 2e-2, 8e-2):
                cov = base + drift**2 * walk + noise**2 * np.eye(len(time))
                factor = np.linalg.cholesky(cov[:-1, :-1])
                white = np.linalg.solve(factor, np.column_stack([y - 0.3, cov[:-1, -1]]))
                evidence.append(-0.5 * (white[:, 0] ** 2).sum() - np.log(np.diag(factor)).sum())
                last.append(0.3 + white[:, 0] @ white[:, 1])
                spread.append(np.sqrt(max(cov[-1, -1] - white[:, 1] @ white[:, 1], 1e-12)))
    weight = np.exp(np.array(evidence) - max(evidence))
    weight /= weight.sum()
    scale = np.array(spread) * np.sqrt(3) / np.pi
    grid = np.sort(np.add.outer(np.array(last), np.linspace(-6, 6, 25) * scale.max()).ravel())
    below = (weight / (1 + np.exp(-np.clip((grid[:, None] - last) / scale, -500, 500)))).sum(1)
    return np.interp(LEVELS, below, grid)


def boosted(
    tables: Sequence[CurveTable], library: Library, left_out: Sequence[frozenset[tuple[str, str]]]
) -> list[Score]:
    """Gradient-boosted quantiles of the final height, on our features and examples."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    scores = []
    for group in left_out:
        drawn = library.draw(np.random.default_rng(0), group)
        change = np.clip(drawn.target - drawn.anchor, -2, 2)
        models = [
            HistGradientBoostingRegressor(
                loss="quantile", quantile=level, max_iter=150, learning_rate=0.08, random_state=0
            ).fit(drawn.features, change)
            for level in GBM_LEVELS
        ]
        for table in (t for t in tables if t.judged and t.key in group):
            for share in SHARES:
                seen = cut(table, share)
                if seen is None:
                    continue
                described = describe(compact(seen.table.positions, seen.values, seen.table.horizon))
                steps = np.sort([model.predict(described.features) for model in models], axis=0)
                logits = np.log(np.array(GBM_LEVELS) / (1 - np.array(GBM_LEVELS)))
                rows = [_in_line(logits, column) for column in steps.T]
                heights = described.anchor[:, None] + np.stack(rows)
                made = Forecast(widen_ties(described.unit.value(heights)), (0.0, np.inf))
                scores.append(score("quantile GBM", seen, made))
    return scores


def _in_line(logits: Any, values: Any) -> Any:
    """Values at `LOGITS`, the ends going on as between the two outermost."""
    table = np.interp(LOGITS, logits, values)
    for side, ends in ((logits[0] > LOGITS, (0, 1)), (logits[-1] < LOGITS, (-1, -2))):
        slope = (values[ends[1]] - values[ends[0]]) / (logits[ends[1]] - logits[ends[0]])
        table[side] = values[ends[0]] + slope * (LOGITS[side] - logits[ends[0]])
    return table


def speed() -> dict[str, float]:
    """CPU seconds for 1,000 curves, and per curve of a batch of 100, shipped prior; best of 5."""
    rng = np.random.default_rng(0)
    t = np.arange(1, 51)
    curves = rng.uniform(0, 0.5, (1000, 1)) + rng.uniform(0.2, 1, (1000, 1)) * t**-0.5
    curves += 0.01 * rng.standard_normal(curves.shape)
    partial = np.where(t <= rng.integers(3, 45, (1000, 1)), curves, np.nan)
    load()

    def seconds(**given: Any) -> float:
        best = np.inf
        for _ in range(5):
            began = time.process_time()
            extrapolate(horizon=50, **given).quantile([0.05, 0.5, 0.95])
            best = min(best, time.process_time() - began)
        return float(best)

    return {
        "seconds for 1000 curves": seconds(curves=partial),
        "the same with 30 finished trials": seconds(curves=partial, finished=curves[:30]),
        "ms per curve, 1000 at once": seconds(curves=partial),
        "ms per curve, 100 at once": 10 * seconds(curves=partial[:100]),
    }


def bars(scores: Sequence[Score], cost: dict[str, float]) -> list[Bar]:
    """The figures that have a limit."""
    rows = {(row.source, row.share, row.method): row for row in summary(scores)}
    found = []
    for source, by_share in BARS.items():
        for share, limits in by_share.items():
            row = rows.get((source, share, "llp"))
            if row is None:
                continue
            where = f"{source}, {100 * share:.0f} % seen"
            found.append(Bar(f"{where}: error", row.error, limits["error"]))
            if "log density" in limits:
                found.append(
                    Bar(f"{where}: log density", row.log_density, limits["log density"], False)
                )
                last = rows[source, share, "last value"].spearman
                found.append(
                    Bar(f"{where}: Spearman minus last value's", row.spearman - last, 0.0, False)
                )
        covered = [
            row.coverage[INTERVALS.index(0.9)]
            for (s, share, method), row in rows.items()
            if s == source and method == "llp" and share in by_share
        ]
        if covered:
            value = 100 * float(np.mean(covered))
            found.append(Bar(f"{source}: % in the 90 % interval", value, 93))
            found.append(Bar(f"{source}: % in the 90 % interval", value, 87, at_most=False))
    found.append(Bar("CPU ms per curve, 100 at once", cost["ms per curve, 100 at once"], 0.5))
    found.append(Bar("CPU seconds for 1000 curves", cost["seconds for 1000 curves"], 0.5))
    return found


def table_of(scores: Sequence[Score]) -> list[list[str]]:
    """The summary as rows of text."""
    return [
        [
            f"{row.source} {100 * row.share:.0f} % {row.method}",
            row.task.split()[0],
            f"{row.error:.4f}",
            f"{row.log_density:.2f}",
            f"{row.spearman:.3f}",
            *(f"{100 * part:.1f}" for part in row.coverage),
            f"{100 * row.unfitted:.1f} %" if row.unfitted else "",
        ]
        for row in summary(scores)
    ]


def main() -> None:
    """Measures and prints."""
    options = parse()
    fitting = FitOptions(num_networks=1, num_examples=40_000) if options.quick else FitOptions()
    tables = read_tables(options.tables)
    if options.quick:
        datasets = list(dict.fromkeys(t.task for t in tables if t.source == "lcdb"))[::4]
        tables = [t for t in tables if t.source != "lcdb" or t.task in datasets]
    judged = [table for table in tables if table.judged]
    library = Library(tables, fitting)
    groups = folds(tables, 2 if options.quick else 7)
    scores = judge(tables, fitting, left_out=groups, library=library, judged_by=ours)
    scores += judge_baselines(tables, baselines={"last value": last_value})
    skip = {*options.skip, *(("pow3", "mixture", "boosted") if options.quick else ())}
    if "pow3" not in skip:
        scores += judge_baselines(tables, baselines={"pow3": pow3})
        scores += plug_in(judged)
    if "mixture" not in skip:
        scores += mixture(judged)
    if "boosted" not in skip:
        scores += boosted(tables, library, groups)
    header = ["", "tasks", "error", "log density", "Spearman"]
    header += [*(f"in {100 * level:.0f} %" for level in INTERVALS), "no fit"]
    print_table("Tasks left out of the fit", header, table_of(scores))
    figures: dict[str, Any] = {"machine": machine(), "left out": table_of(scores)}
    figures["by task"] = [asdict(one) for one in scores if one.source != "lcdb"]
    whole: list[Score] = []
    sources = dict.fromkeys(table.source for table in judged)
    for source in () if "source" in skip else sources:
        keys = frozenset(table.key for table in tables if table.source == source)
        prior = fit(tables, fitting, library=library, left_out=keys)
        of_source = [table for table in judged if table.source == source]
        whole += judge_prior(of_source, prior, name="llp")
        whole += judge_prior(of_source, prior, name="llp + 30", num_finished=30)
    if whole:
        print_table("The whole source left out", header, table_of(whole))
        figures["source left out"] = table_of(whole)
    cost = speed()
    print_table("Cost", ["", ""], [[name, f"{value:.3f}"] for name, value in cost.items()])
    figures["cost"] = cost
    finish(figures, bars(scores, cost), options.json)


if __name__ == "__main__":
    main()
