"""Schedulers on tabulated trainings: full trainings needed to be as good as random search's 20.

    python tests/benchmarks/promotion.py [TABLE...] [--seeds N] [--quick] [--json FILE]

Every method searches the same 80 configurations of a task in the same order on a virtual clock
(`llp simulate`): the same decision code as in a real search, Ray Tune's and Optuna's own classes
beside it. Only full trainings count as results ("match"); "match*" counts the weights of unfinished
trainings too. The prior of the forecasts is fitted again without the task.

`NAME_cold` starts again at every rung, `NAME` goes on. Random search trains all to the end; the
others end what diverges at once. Speed is CPU time of decisions among 10,000 trials.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import Bar, finish, machine, parser, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llp import registry
from llp.curve_files import read_tables
from llp.probing.curve_fitting import FitOptions, Library, fit
from llp.probing.curve_prior import Prior
from llp.probing.promotion import NewTrial
from llp.probing.state import SearchState, probe_id
from llp.records import CurvePoint, Decision, Job, JobEnd, Rung, Trial, to_plain
from llp.simulation.outcome import match, mean_curve
from llp.simulation.study import Options, Outcome, simulate
from llp.simulation.tasks import Task, read_tasks

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "curves"
FILES = ("taskset_dev.npz", "algoperf_dev_curves.parquet")
BUDGET = 20.0
SHORT = 6.0
"""Budget of forecasting methods on sources where only "match" is asked of them."""
BASELINES = (
    "median",
    "tune_asha",
    "tune_hyperband",
    "tune_median",
    "optuna_halving",
    "optuna_hyperband",
    "optuna_median",
    "asha_eager",
    "hyperband",
    "hyperband_cold",
)
OURS = ("freeze_thaw",)


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The command line."""
    built = parser(__doc__ or "")
    built.add_argument("tables", nargs="*", type=Path, help=f"default: {', '.join(FILES)}")
    built.add_argument("--seeds", type=int, default=0, help="searches per task (20; quick: 3)")
    built.add_argument("--workers", type=int, default=1, help="of the virtual clock")
    built.add_argument(
        "--shipped", action="store_true", help="the shipped prior, for tables it does not know"
    )
    found = built.parse_args(arguments)
    found.tables = found.tables or [FOLDER / name for name in FILES]
    found.seeds = found.seeds or (3 if found.quick else 20)
    missing = [str(path) for path in found.tables if not path.exists()]
    if missing:
        built.error(f"not there: {', '.join(missing)}")
    return found


def priors_without(paths: Sequence[Path]) -> Callable[[Task], Prior | None]:
    """The prior fitted on all tasks but the one that is searched."""
    tables = read_tables(paths)
    options = FitOptions(num_networks=2)
    library = Library(tables, options)
    known: dict[tuple[str, str], Prior] = {}

    def prior(task: Task) -> Prior:
        key = (task.source, task.name)
        if key not in known:
            known[key] = fit(tables, options, library=library, left_out=frozenset([key]))
        return known[key]

    return prior


def searches(
    tasks: Sequence[Task], asked: Any, prior: Callable[[Task], Prior | None], *, full: bool
) -> list[Outcome]:
    """All methods on the tasks of one source; ours to the end of the budget only when `full`."""
    common = {"seeds": asked.seeds, "workers": asked.workers}
    long = Options(budget=BUDGET, **common)
    baselines = ("tune_asha", "hyperband", "hyperband_cold") if asked.quick else BASELINES
    found = simulate(tasks, ["random", *baselines], long)
    own = long if full else Options(budget=SHORT, points=round(200 * SHORT / BUDGET), **common)
    return found + simulate(tasks, OURS, own, priors=prior)


def table(outcomes: Sequence[Outcome], budgets: Any) -> list[dict[str, Any]]:
    """One row a method."""
    reference = outcomes[0]
    target = float(mean_curve(reference.regret)[-1])
    partial = float(mean_curve(reference.partial)[-1])
    rows = []
    for outcome in outcomes:
        curve = mean_curve(outcome.regret)
        length = len(curve)
        per_task = [
            match(part.mean(axis=0), float(reference.regret[name][:, -1].mean()), budgets[:length])
            for name, part in outcome.regret.items()
        ]
        at = {
            budget: float(curve[index] / mean_curve(reference.regret)[index])
            for budget, index in ((5, 49), (10, 99), (20, 199))
            if index < length
        }
        rows.append(
            {
                "method": outcome.method,
                "match": match(curve, target, budgets[:length]),
                "match_partial": match(mean_curve(outcome.partial), partial, budgets[:length]),
                "per_task": per_task,
                "against_random": at,
                "trials": outcome.trials,
                "ms_per_decision": 1e3 * outcome.cpu_seconds / outcome.decisions,
            }
        )
    return rows


def show(source: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table of one source."""
    print_table(
        f"{source}: full trainings to match random search's {BUDGET:g}",
        ["method", "match", "match*", "tasks matched", "regret / random at 5, 10, 20", "trials"],
        [
            [
                row["method"],
                f"{row['match']:.1f}",
                f"{row['match_partial']:.1f}",
                f"{sum(map(math.isfinite, row['per_task']))} of {len(row['per_task'])}",
                ", ".join(f"{ratio:.2f}" for ratio in row["against_random"].values()),
                f"{row['trials']:.0f}",
            ]
            for row in rows
        ],
    )


def milliseconds(name: str, num_trials: int) -> float:
    """CPU milliseconds per decision of a whole search with 64 workers and random results."""
    scheduler = registry.load("schedulers", name)(num_trials, 5, 3)
    state, rng = SearchState(), random.Random(0)
    running: list[Job] = []
    seconds, asked = 0.0, 0

    def tell(event: str, **payload: Any) -> None:
        state.apply({"event": event, **{key: to_plain(value) for key, value in payload.items()}})

    while True:
        step: Any = "wait"
        if len(running) < 64:
            begin = time.process_time()
            step = scheduler.next_step(state)
            seconds, asked = seconds + time.process_time() - begin, asked + 1
        if step == "done":
            return 1e3 * seconds / asked
        if step != "wait":
            if isinstance(step, NewTrial):
                number = len(state.trials)
                trial = Trial(f"t{number:05d}", {"x": number}, number, step.bracket)
                tell("trial", trial=trial)
            else:
                assert isinstance(step, Decision)
                trial = state.trials[step.trial_id]
                tell("decision", decision=step)
            rung = Rung(step.rung, 1.0, 10, 1)
            running.append(Job(probe_id(trial.trial_id, step.rung), "probe", trial, rung, 0))
            tell("job", job=running[-1])
            continue
        job = running.pop(rng.randrange(len(running)))
        value = rng.random()
        point = CurvePoint(job.rung.rung, 1.0, 1, 10, 0.1, 0.9, 1 - value, value, 1.0)
        about = {"job_id": job.job_id, "trial_id": job.trial.trial_id, "kind": "probe"}
        tell("point", point=point, **about)
        end = JobEnd(job.job_id, job.trial.trial_id, "completed")
        tell("job_end", kind="probe", rung=job.rung.rung, attempt=0, end=end)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything."""
    asked = parse(arguments)
    tasks = read_tasks(asked.tables)
    prior = (lambda task: None) if asked.shipped else priors_without(asked.tables)
    figures: dict[str, Any] = {"machine": machine(), "seeds": asked.seeds}
    bars: list[Bar] = []
    budgets = Options(budget=BUDGET).budgets()
    for source in sorted({task.source for task in tasks}, reverse=True):
        chosen = [task for task in tasks if task.source == source]
        chosen = chosen[:2] if asked.quick else chosen
        rows = table(
            searches(chosen, asked, prior, full=source != "taskset" and not asked.quick), budgets
        )
        show(source, rows)
        figures[source] = rows
        by = {row["method"]: row for row in rows}
        ours = by["freeze_thaw"]
        if source == "taskset":
            bars.append(
                Bar("taskset: full trainings to match random search's 20", ours["match"], 3.0)
            )
            for peer, factor in (("tune_asha", 3.5), ("hyperband_cold", 1.35), ("hyperband", 1.35)):
                ratio = by[peer]["match"] / ours["match"]
                bars.append(
                    Bar(
                        f"taskset: {peer} needs more, times", min(ratio, 1e6), factor, at_most=False
                    )
                )
        elif not asked.quick:
            for budget, ratio in ours["against_random"].items():
                bars.append(Bar(f"{source}: regret over random search's at {budget}", ratio, 1.05))
    for name in ("asha", "hyperband", "median", "freeze_thaw"):
        spent = milliseconds(name, 500 if asked.quick else 10_000)
        figures[f"ms_{name}"] = spent
        bars.append(Bar(f"{name}: CPU ms per decision, 10,000 trials", spent, 1.0))
    finish(figures, bars, asked.json)


if __name__ == "__main__":
    main()
