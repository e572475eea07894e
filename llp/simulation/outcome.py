"""What simulated searches come to: regret against cost, and how much cheaper than random search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llp.simulation.study import RANDOM, Options, Outcome
from llp.simulation.tasks import Floats

NO_REGRET = 1e-4
"""Random search that ends with less mean regret found the best: no ratio over it means anything."""


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: Name.
        match: Full trainings after which the mean regret is that of random search at the end of the
            budget; infinite when it never is.
        match_partial: The same where a value of an unfinished training counts as a result.
        final: Mean regret at the end.
        against_random: `final` over that of random search; NaN where that is below `NO_REGRET`.
        worst_task: Largest ratio over random search at the end, of all tasks where it has one.
        worst_task_name: Where.
        trials: Configurations started.
        milliseconds: Processor time per decision.
    """

    method: str
    match: float
    match_partial: float
    final: float
    against_random: float
    worst_task: float
    worst_task_name: str
    trials: float
    milliseconds: float


def mean_curve(regret: dict[str, Floats]) -> Floats:
    """[num_points], mean over searches, then over tasks."""
    return np.asarray(np.mean([part.mean(axis=0) for part in regret.values()], axis=0))


def match(curve: Floats, target: float, budgets: Floats) -> float:
    """The first budget at which a curve is at most `target`."""
    reached = np.flatnonzero(curve <= target + 1e-12)
    return float(budgets[reached[0]]) if len(reached) else math.inf


def summary(outcomes: Sequence[Outcome], options: Options) -> list[Row]:
    """One row a method; without random search among them, what compares with it is NaN."""
    budgets = options.budgets()
    reference = next((o for o in outcomes if o.method in (RANDOM, "fifo")), None)
    rows = []
    for outcome in outcomes:
        curve = mean_curve(outcome.regret)
        ratio = by_match = by_partial = worst = math.nan
        where = ""
        if reference is not None:
            target = float(mean_curve(reference.regret)[-1])
            by_match = match(curve, target, budgets)
            at_end = float(mean_curve(reference.partial)[-1])
            by_partial = match(mean_curve(outcome.partial), at_end, budgets)
            ratio = float(curve[-1]) / target if target >= NO_REGRET else math.nan
            ends = {task: float(part[:, -1].mean()) for task, part in reference.regret.items()}
            ratios = {
                task: float(part[:, -1].mean()) / ends[task]
                for task, part in outcome.regret.items()
                if ends[task] >= NO_REGRET
            }
            where = max(ratios, key=lambda task: ratios[task], default="")
            worst = ratios.get(where, math.nan)
        rows.append(
            Row(
                outcome.method,
                by_match,
                by_partial,
                float(curve[-1]),
                ratio,
                worst,
                where,
                outcome.trials,
                1e3 * outcome.cpu_seconds / max(outcome.decisions, 1),
            )
        )
    return rows


def frame(outcomes: Sequence[Outcome], options: Options) -> pd.DataFrame:
    """One row a method, task, search and budget.

    Columns: `method`, `task`, `seed`, `cost`, `regret`, `partial_regret`.
    """
    budgets, parts = options.budgets(), []
    for outcome in outcomes:
        for task, regret in outcome.regret.items():
            num_seeds, num_points = regret.shape
            parts.append(
                pd.DataFrame(
                    {
                        "method": outcome.method,
                        "task": task,
                        "seed": np.repeat(np.arange(num_seeds), num_points),
                        "cost": np.tile(budgets, num_seeds),
                        "regret": regret.ravel(),
                        "partial_regret": outcome.partial[task].ravel(),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def picture(outcomes: Sequence[Outcome], options: Options, path: Path) -> None:
    """Mean regret against cost, one line a method; PNG or SVG by the name of the file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    for number, outcome in enumerate(outcomes):
        axes.step(
            options.budgets(),
            mean_curve(outcome.regret),
            where="post",
            label=outcome.method,
            linestyle=("-", "--", ":")[number // 10 % 3],
        )
    axes.set(xlabel="cost, full trainings", ylabel="mean regret of the best full training")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
