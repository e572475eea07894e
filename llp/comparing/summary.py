"""Mean and standard error of every configuration; heat map, cost and accuracy, scaling laws."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

SUMMARY = (
    *("run", "kind", "label", "configuration_id", "dataset", "model", "optimizer"),
    *("learning_rate", "num", "num_failed", "test_accuracy", "standard_error", "lowest", "highest"),
    *("validation_accuracy", "test_loss", "samples", "seconds", "peak_memory_bytes"),
    *("num_parameters", "num_test"),
)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration that was trained fully, in the order of the table.

    Args:
        table: Of `table.runs_table`.

    Returns:
        `num` seeds that were completed and `num_failed` trainings that were not; over the seeds the
        mean `test_accuracy` with its `standard_error` (NaN for one seed), `lowest` and `highest`;
        means of loss, samples, seconds and memory. Repeats of a seed are averaged first.
    """
    rows = []
    full = table[table["kind"] != "candidate"]
    for label, group in full.groupby("label", sort=False):
        done = group[(group["outcome"] == "completed") & group["test_accuracy"].notna()]
        seeds = done.groupby("seed")["test_accuracy"].mean()
        first = group.iloc[0]
        row: dict[str, Any] = {
            name: first[name]
            for name in (
                *("run", "kind", "configuration_id", "dataset", "model", "optimizer"),
                "learning_rate",
            )
        }
        row |= {
            "label": label,
            "num": len(seeds),
            "num_failed": int((~group["outcome"].isin(["completed", "missing"])).sum()),
            "test_accuracy": float(seeds.mean()) if len(seeds) else math.nan,
            "standard_error": standard_error(seeds.to_numpy(float)),
            "lowest": float(seeds.min()) if len(seeds) else math.nan,
            "highest": float(seeds.max()) if len(seeds) else math.nan,
        }
        for name in (
            *("validation_accuracy", "test_loss", "samples", "seconds", "peak_memory_bytes"),
            *("num_parameters", "num_test"),
        ):
            row[name] = float(done[name].mean()) if len(done) else math.nan
        rows.append(row)
    return pd.DataFrame(rows, columns=list(SUMMARY))


def standard_error(values: np.ndarray) -> float:
    """Standard deviation with n - 1, divided by the root of n; NaN for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def largest(frame: pd.DataFrame, column: str) -> dict[str, Any]:
    """The row with the highest value of `column`, the first of equal ones."""
    return _row(frame, int(np.nanargmax(frame[column].to_numpy(float))))


def smallest(frame: pd.DataFrame, column: str) -> dict[str, Any]:
    """The row with the lowest value of `column`, the first of equal ones."""
    return _row(frame, int(np.nanargmin(frame[column].to_numpy(float))))


def _row(frame: pd.DataFrame, place: int) -> dict[str, Any]:
    return {str(key): value for key, value in frame.iloc[place].items()}


def heat_map(table: pd.DataFrame, rows: str = "optimizer", columns: str = "model") -> pd.DataFrame:
    """Mean test accuracy of every pair of `rows` and `columns`, over the runs' own configurations.

    Where several configurations share a cell (a grid without a choice), the best mean stands in it
    and `num_configurations` says of how many: such a cell is optimistic.

    Returns:
        A row a cell: the two names, `mean`, `standard_error`, `num` seeds, `num_configurations`,
        `label` of the configuration shown.
    """
    found = []
    of = summary(table[table["kind"] == "final"]).dropna(subset=["test_accuracy"])
    for (row, column), group in of.groupby([rows, columns], sort=False):
        best = largest(group, "test_accuracy")
        found.append(
            {
                rows: row,
                columns: column,
                "mean": best["test_accuracy"],
                "standard_error": best["standard_error"],
                "num": best["num"],
                "num_configurations": len(group),
                "label": best["label"],
            }
        )
    names = (rows, columns, "mean", "standard_error", "num", "num_configurations", "label")
    return pd.DataFrame(found, columns=list(names))


def tradeoff(table: pd.DataFrame, cost: str = "samples") -> pd.DataFrame:
    """Cost against accuracy, cheapest first, and which configurations are on the front.

    A configuration is on the front when no other is both at most as dear and more accurate, or
    cheaper and at least as accurate; by means, whatever their errors.

    Args:
        table: Of `table.runs_table`.
        cost: Column of `summary`: `samples`, `seconds` or `peak_memory_bytes`.
    """
    of = summary(table).dropna(subset=["test_accuracy", cost])
    pairs = list(zip(of[cost], of["test_accuracy"], strict=True))
    front = [
        not any((c <= mine and a > accuracy) or (c < mine and a >= accuracy) for c, a in pairs)
        for mine, accuracy in pairs
    ]
    names = ["run", "kind", "label", cost, "test_accuracy", "standard_error"]
    return of[names].assign(on_front=front).sort_values(cost, kind="stable", ignore_index=True)


def one_at_a_time(table: pd.DataFrame, run: str, kind: str) -> pd.DataFrame:
    """What a study found: every changed value of one hyperparameter, the run's own beside them.

    Args:
        table: Of `table.runs_table`.
        run: Of the study.
        kind: `sensitivity` or `scaling`.

    Returns:
        A row per value: `parameter`, `value`, `own` (whether it is the run's own), `num`,
        `test_accuracy`, `standard_error`, `label`, `samples`.
    """
    of = summary(table[table["run"] == run])
    asked = table.drop_duplicates("label").set_index("label")
    found = []
    for row in of[of["kind"] == kind].to_dict("records"):
        changed = json.loads(str(asked.loc[row["label"], "changed"]))
        for name, value in changed.items():
            found.append({**row, "parameter": name, "value": value, "own": False})
    final = of[of["kind"] == "final"]
    if len(final):
        own = final.iloc[0]
        values = json.loads(str(asked.loc[own["label"], "own"]))
        for name in dict.fromkeys(str(row["parameter"]) for row in found):
            found.append({**own.to_dict(), "parameter": name, "value": values[name], "own": True})
    names = ("parameter", "value", "own", "num", "test_accuracy", "standard_error", "label")
    frame = pd.DataFrame(found, columns=[*names, "samples"])
    return frame.sort_values(
        ["parameter", "value"], key=_sortable, kind="stable", ignore_index=True
    )


def _sortable(column: pd.Series) -> pd.Series:
    """Numbers by size, then words, then what is unknown."""
    return column.map(
        lambda v: (
            (0, float(v), "")
            if isinstance(v, int | float) and not isinstance(v, bool)
            else (1 if v is not None else 2, 0.0, str(v))
        )
    )


@dataclass(frozen=True)
class PowerLaw:
    """error = coefficient * size ** exponent, fitted to mean errors by least squares of logs.

    Attributes:
        exponent: Slope in the log-log plane; negative when more helps.
        standard_error: Of the exponent; NaN for two points.
        coefficient: Error at size 1.
        num_points: Sizes.
    """

    exponent: float
    standard_error: float
    coefficient: float
    num_points: int


def power_law(sizes: np.ndarray, errors: np.ndarray) -> PowerLaw | None:
    """The law through positive `errors` at positive `sizes`; None for fewer than two of them.

    >>> law = power_law(np.array([1.0, 4.0, 16.0]), np.array([0.4, 0.2, 0.1]))
    >>> round(law.exponent, 6), round(law.coefficient, 6)
    (-0.5, 0.4)
    """
    keep = (sizes > 0) & (errors > 0)
    if keep.sum() < 2 or len(np.unique(sizes[keep])) < 2:
        return None
    fit = stats.linregress(np.log(sizes[keep]), np.log(errors[keep]))
    error = float(fit.stderr) if keep.sum() > 2 else math.nan
    return PowerLaw(float(fit.slope), error, math.exp(float(fit.intercept)), int(keep.sum()))
