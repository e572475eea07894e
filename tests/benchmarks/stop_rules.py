"""Are early stops right? Rules on real curves of tasks that the prior was not fitted on.

    python tests/benchmarks/stop_rules.py [--quick] [--json FILE] [TABLE ...]

A search is played on the tables of TaskSet and AlgoPerf: configurations drawn at random run one
after the other on one rung, each asks the rules after every point, and one in three would go on.
Losses are scaled to the way from the best value of the task (0) to the median start (1); the
accuracy is one minus that, at equally spaced points of the training. For every task the prior of
the forecast is fitted without it.

A stop is *false* when the curve, which the table has in full, ends with the accuracy that the rule
said it would miss, or better. *Lost* is a stop of a configuration that belongs to the best third of
all of the search. Saved is the share of all points that were not computed. A stopped job is not
among the completed ones that correct later forecasts, as in a real search.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import Bar, finish, machine, parser, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llp.curve_files import read_tables
from llp.probing.audits import clopper_pearson
from llp.probing.curve_evaluation import folds
from llp.probing.curve_fitting import FitOptions, Library, fit
from llp.probing.curve_tables import CurveTable
from llp.probing.stopping import CurveForecast, PowerLaw
from llp.records import CurvePoint, LearningCurve

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "curves"
FILES = ("taskset_dev.npz", "algoperf_dev_curves.parquet", "lcdb_dev.npz")
NUM_POINTS = 12
KEEP = 1 / 3
DELTA = 0.05
COUNTS = ("jobs", "stops", "false", "lost", "saved", "points")


def accuracies(table: CurveTable) -> np.ndarray:
    """[num_curves, NUM_POINTS], one minus the scaled value, the last value before each point."""
    chosen = table.rows(table.complete())
    scaled = table.scaled(chosen.values)
    rows = []
    for values, positions, end in zip(scaled, chosen.positions, chosen.horizon, strict=True):
        known = np.isfinite(values) & np.isfinite(positions)
        wanted = end * np.arange(1, NUM_POINTS + 1) / NUM_POINTS * (1 + 1e-9)
        last = np.searchsorted(positions[known], wanted, "right")
        rows.append(1 - values[known][np.maximum(last - 1, 0)])
    return np.array(rows)


def curve(name: str, values: Sequence[float]) -> LearningCurve:
    """A learning curve with these accuracies."""
    return LearningCurve(
        name,
        1,
        tuple(
            CurvePoint(1, 1.0, k, k, 1 - a, 1 - a, a, a, float(k))
            for k, a in enumerate(values, start=1)
        ),
    )


def play(finals: np.ndarray, rule: Any) -> dict[str, int]:
    """One search: how many stops, false ones, lost ones, and points saved."""
    found = dict.fromkeys(COUNTS, 0)
    best = np.sort(finals[:, -1])[::-1][max(0, int(len(finals) * KEEP) - 1)]
    ended: list[LearningCurve] = []
    for number, values in enumerate(finals):
        name, stopped = f"t{number}", 0
        for seen in range(1, NUM_POINTS):
            verdict = rule.decide(
                curve(name, values[:seen]), num_points=NUM_POINTS, ended=ended, keep_fraction=KEEP
            )
            if verdict.stop:
                stopped = seen
                found["stops"] += 1
                found["false"] += values[-1] >= verdict.needed
                found["lost"] += values[-1] >= best
                found["saved"] += NUM_POINTS - seen
                break
        ended.append(curve(name, values[: stopped or NUM_POINTS]))
        found["jobs"] += 1
        found["points"] += NUM_POINTS
    return found


def main() -> None:
    """Measures and prints."""
    built = parser(__doc__ or "")
    built.add_argument("tables", nargs="*", type=Path, help=f"default: {', '.join(FILES)}")
    built.add_argument("--searches", type=int, default=6, help="searches on every task")
    built.add_argument("--trials", type=int, default=40, help="configurations of a search")
    options = built.parse_args()
    paths = options.tables or [FOLDER / name for name in FILES]
    fitting = FitOptions()
    if options.quick:
        fitting = FitOptions(num_networks=1, num_examples=40_000, num_epochs=8)
        options.searches, options.trials = 2, 30
    tables = read_tables(paths)
    library = Library(tables, fitting)
    counts: dict[tuple[str, str], dict[str, int]] = {}
    by_task: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for group in folds(tables, 7):
            held = [t for t in tables if t.judged and t.key in group and not t.natural_unit]
            if not held:
                continue
            file = Path(folder) / f"prior{len(by_task)}.json"
            file.write_text(fit(tables, fitting, library=library, left_out=group).dump())
            rules: dict[str, Any] = {
                "forecast": CurveForecast(delta=DELTA, prior=str(file)),
                "power_law": PowerLaw(confidence=1 - DELTA),
            }
            for table in held:
                values = accuracies(table)
                for name, rule in rules.items():
                    rng = np.random.default_rng(0)
                    total = dict.fromkeys(COUNTS, 0)
                    for _ in range(options.searches):
                        num = min(options.trials, len(values))
                        one = play(values[rng.choice(len(values), num, replace=False)], rule)
                        total = {key: total[key] + int(one[key]) for key in total}
                    by_task.append(
                        {"source": table.source, "task": table.task, "rule": name} | total
                    )
                    for source in (table.source, "all"):
                        known = counts.setdefault((source, name), dict.fromkeys(total, 0))
                        counts[source, name] = {key: known[key] + total[key] for key in total}
    rows, bars = [], []
    for (source, name), total in sorted(counts.items()):
        rate = clopper_pearson(total["false"], total["stops"])
        share = total["false"] / max(total["stops"], 1)
        rows.append(
            [
                f"{source} {name}",
                str(total["jobs"]),
                str(total["stops"]),
                str(total["false"]),
                f"{100 * share:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]",
                str(total["lost"]),
                f"{100 * total['saved'] / total['points']:.0f}",
            ]
        )
        if name == "forecast":
            bars.append(Bar(f"{source}: % of stops that are false", 100 * share, 100 * DELTA))
            if source == "all":
                bars.append(Bar(f"{source}: its upper 95 % bound", 100 * rate.high, 100 * DELTA))
    header = ["", "jobs", "stops", "false", "% false [95 %]", "lost", "% of points saved"]
    print_table("Early stops on tasks left out of the fit", header, rows)
    finish({"machine": machine(), "rows": rows, "by task": by_task}, bars, options.json)


if __name__ == "__main__":
    main()
