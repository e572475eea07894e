"""Do cheap rungs order trials as expensive ones do? Kendall's tau-b between rungs.

Only trials that finished both rungs can be compared, and those were chosen for being good on the
lower one. That restricts the range and lowers tau against what all trials would show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.palette import LIGHT
from llp.reporting.study import final_on, states, verified
from llp.reporting.svg import canvas, drawing, inline, percent_axis
from llp.reporting.tables import finite

VERIFIED = "verified"
WEAK = 0.5
MIN_FOR_INTERVAL = 6
_BOOTSTRAPS = 1000


def accuracies_by_stage(result: SearchResult) -> dict[str, dict[str, float]]:
    """Stage (`rung 1`, ..., `verified`) -> trial id -> accuracy of those who finished it.

    Validation accuracy on a rung, mean test accuracy for verified configurations.
    """
    where = states(result)
    stages: dict[str, dict[str, float]] = {}
    for rung in result.rungs:
        finals = {}
        for trial in result.trials:
            point = final_on(trial, rung.rung)
            state = where.get((trial.trial.trial_id, rung.rung))
            if point and state in {"promoted", "finished"}:
                finals[trial.trial.trial_id] = point.validation_accuracy
        stages[f"rung {rung.rung}"] = finals
    stages[VERIFIED] = {row.trial_id: row.mean for row in verified(result)}
    return {stage: finals for stage, finals in stages.items() if finals}


def kendall(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Tau-b with a 90 % percentile bootstrap interval over trials.

    Returns:
        `(tau, low, high)`; tau is NaN under three pairs or when one side is constant, the interval
        is NaN under `MIN_FOR_INTERVAL` pairs.
    """
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan, math.nan
    tau = float(kendalltau(x, y).statistic)
    if len(x) < MIN_FOR_INTERVAL:
        return tau, math.nan, math.nan
    index = np.random.default_rng(0).integers(0, len(x), size=(_BOOTSTRAPS, len(x)))
    sign = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    tied_x, tied_y = (x[:, None] != x).astype(float), (y[:, None] != y).astype(float)
    counts = np.stack([np.bincount(row, minlength=len(x)) for row in index]).astype(float)

    def pairs(matrix: np.ndarray) -> np.ndarray:
        """Sum over all pairs of every resample."""
        return np.asarray(((counts @ matrix) * counts).sum(axis=1))

    with np.errstate(invalid="ignore", divide="ignore"):
        draws = pairs(sign) / np.sqrt(pairs(tied_x) * pairs(tied_y))
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [0.05, 0.95])
    return tau, float(low), float(high)


def rank_agreement_data(result: SearchResult) -> pd.DataFrame:
    """One row a pair of stages: `lower`, `higher`, `num_trials`, `tau`, `low`, `high`."""
    stages = accuracies_by_stage(result)
    names = list(stages)
    rows = []
    for i, lower in enumerate(names):
        for higher in names[i + 1 :]:
            shared = [t for t in stages[lower] if t in stages[higher]]
            tau, low, high = kendall(*_columns(stages, lower, higher))
            rows.append((lower, higher, len(shared), tau, low, high))
    columns = ["lower", "higher", "num_trials", "tau", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def rank_agreement_reading(data: pd.DataFrame) -> str:
    """The best supported pair of rungs, and whether cheap ranks can be trusted."""
    known = finite(data, "tau")
    if known.empty:
        return "Fewer than three trials finished two rungs: their order cannot be compared."
    row = known.sort_values("num_trials", ascending=False, kind="stable").iloc[0]
    interval = ""
    if math.isfinite(row["low"]):
        interval = f" (90 % interval {formats.signed(row['low'])} to {formats.signed(row['high'])})"
    text = (
        f"{row['lower'].capitalize()} orders trials as {row['higher']} does with Kendall tau "
        f"{formats.signed(row['tau'])}{interval}, n = {row['num_trials']}"
    )
    if not math.isfinite(row["low"]) or row["high"] - row["low"] > 1:
        return f"{text}: too few trials to say more."
    if row["tau"] < WEAK:
        return f"{text}. That is weak: early stopping here may drop good configurations."
    return f"{text}: the cheap rung is a usable guide."


def rank_agreement_figures(stages: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """One scatter for every two neighbouring stages with at least three trials in common."""
    names = list(stages)
    panels = []
    with drawing():
        for place, (lower, higher) in enumerate(itertools.pairwise(names)):
            x, y = _columns(stages, lower, higher)
            if len(x) < 3:
                continue
            figure, axes = canvas(left=0.66, bottom=0.42)
            axes.plot(
                x, y, "o", color=LIGHT["blue"], markeredgecolor=LIGHT["page"], markersize=5, mew=0.5
            )
            tau = kendall(x, y)[0]
            axes.set_title(f"tau {formats.signed(tau)}, n = {len(x)}")
            axes.set_xlabel(f"accuracy, {lower}")
            axes.set_ylabel(f"accuracy, {higher}")
            percent_axis(axes, "x")
            percent_axis(axes, "y")
            axes.grid()
            panels.append(
                inline(
                    figure,
                    key=f"ranks-{place}",
                    title=f"Accuracy on {higher} against {lower}",
                    description=f"Kendall tau {formats.signed(tau)}, n = {len(x)}.",
                )
            )
    return tuple(panels)


def _columns(
    stages: Mapping[str, Mapping[str, float]], lower: str, higher: str
) -> tuple[list[float], list[float]]:
    shared = [trial_id for trial_id in stages[lower] if trial_id in stages[higher]]
    return [stages[lower][t] for t in shared], [stages[higher][t] for t in shared]
