"""Tier 2 against tier 1: every landscape measurement beside the accuracy of the same checkpoint."""

from __future__ import annotations

import math

import pandas as pd

from llp.records import FlatnessProfile, SearchResult
from llp.reporting import formats
from llp.reporting.figures.ranks import kendall
from llp.reporting.palette import LIGHT, MARKERS
from llp.reporting.study import final_on, find_trial, reached
from llp.reporting.svg import canvas, drawing, inline, log_axis, percent_axis
from llp.reporting.tables import finite

MAX_PANELS = 12


def flatness_data(result: SearchResult) -> pd.DataFrame:
    """One row a measurement.

    Columns: `trial_id`, `metric`, `value`, `standard_error`, `higher_is_better`, `num_examples`,
    `seconds`, `samples` and `samples_alone` (cost with the others, and alone), `note`, `rung` and
    `validation_accuracy` (of the trial's highest rung, whose checkpoint was measured).
    """
    rows = []
    for profile in result.profiles:
        trial = find_trial(result, profile.trial_id)
        rung = reached(trial) if trial else 0
        point = final_on(trial, rung) if trial else None
        for m in profile.measurements:
            rows.append(
                {
                    "trial_id": profile.trial_id,
                    "metric": m.name,
                    "value": m.value,
                    "standard_error": m.standard_error,
                    "higher_is_better": m.higher_is_better,
                    "num_examples": m.num_examples,
                    "seconds": m.seconds,
                    "samples": m.samples,
                    "samples_alone": m.samples_alone,
                    "note": m.note,
                    "rung": rung,
                    "validation_accuracy": point.validation_accuracy if point else math.nan,
                }
            )
    columns = ["trial_id", "metric", "value", "standard_error", "higher_is_better"]
    columns += ["num_examples", "seconds", "samples", "samples_alone"]
    columns += ["note", "rung", "validation_accuracy"]
    return pd.DataFrame(rows, columns=columns)


def flatness_summary(data: pd.DataFrame) -> pd.DataFrame:
    """One row a metric.

    Columns: `metric`, `num_trials` measured, `failed`, `tau` with validation accuracy and its 90 %
    interval `low`, `high`, median `relative_error`, and total `seconds`, `samples` and
    `samples_alone`.
    """
    rows = []
    for metric, here in data.groupby("metric", sort=False):
        good = finite(here, "value")
        tau, low, high = kendall(good["value"].tolist(), good["validation_accuracy"].tolist())
        relative = [
            abs(error / value)
            for error, value in zip(good["standard_error"], good["value"], strict=True)
            if math.isfinite(error) and value
        ]
        rows.append(
            {
                "metric": metric,
                "num_trials": len(good),
                "failed": len(here) - len(good),
                "tau": tau,
                "low": low,
                "high": high,
                "relative_error": float(pd.Series(relative).median()) if relative else math.nan,
                "seconds": float(here["seconds"].sum()),
                "samples": float(here["samples"].astype(float).sum(min_count=1)),
                "samples_alone": float(here["samples_alone"].astype(float).sum(min_count=1)),
            }
        )
    columns = ["metric", "num_trials", "failed", "tau", "low", "high", "relative_error", "seconds"]
    columns += ["samples", "samples_alone"]
    return pd.DataFrame(rows, columns=columns)


def flatness_reading(data: pd.DataFrame, profiles: tuple[FlatnessProfile, ...]) -> str:
    """How many were measured at what cost, and whether any metric goes along with accuracy."""
    num = data["trial_id"].nunique()
    seconds = sum(profile.seconds for profile in profiles)
    text = f"{formats.plural(num, 'configuration')} measured in {formats.duration(seconds)}."
    summary = flatness_summary(data)
    known = finite(summary, "low")
    if known.empty:
        return f"{text} That is too few to say whether any metric goes along with accuracy."
    clear = known[(known["low"] > 0) | (known["high"] < 0)]
    if clear.empty:
        return f"{text} No metric goes clearly along with validation accuracy."
    best = max(clear.to_dict("records"), key=lambda row: abs(row["tau"]))
    return (
        f"{text} {formats.short(best['metric'], 60)} goes along with validation accuracy most: "
        f"Kendall tau {formats.signed(best['tau'])} (90 % interval {formats.signed(best['low'])} "
        f"to {formats.signed(best['high'])}, n = {best['num_trials']}); one of "
        f"{formats.plural(len(known), 'metric')} looked at."
    )


def flatness_figures(data: pd.DataFrame, winner: str | None = None) -> tuple[str, ...]:
    """One panel a metric: validation accuracy against the value with its standard error."""
    panels = []
    usable = finite(data, "value", "validation_accuracy")
    with drawing():
        for number, (metric, here) in enumerate(usable.groupby("metric", sort=False)):
            if number >= MAX_PANELS:
                break
            figure, axes = canvas()
            low, high = here["value"].min(), here["value"].max()
            if low > 0 and high / low > 20:
                log_axis(axes, "x", low / 1.3, high * 1.3)
            for rung in sorted(set(here["rung"].tolist())):
                rows = here[here["rung"] == rung]
                axes.errorbar(
                    rows["value"],
                    rows["validation_accuracy"],
                    xerr=[e if math.isfinite(e) and e > 0 else 0 for e in rows["standard_error"]],
                    fmt=MARKERS[(rung - 1) % len(MARKERS)],
                    color=LIGHT["blue"],
                    markeredgecolor=LIGHT["page"],
                    mew=0.5,
                    markersize=7,
                    elinewidth=1,
                )
            won = here[here["trial_id"] == winner]
            axes.plot(
                won["value"],
                won["validation_accuracy"],
                "o",
                mfc="none",
                mec=LIGHT["vermillion"],
                ms=12,
                mew=1.4,
            )
            axes.set_title(formats.short(metric, 34))
            axes.xaxis.set_major_formatter(lambda value, _: formats.number(value, 3))
            if axes.get_xscale() == "linear":
                axes.locator_params(axis="x", nbins=5)
            percent_axis(axes)
            axes.grid(axis="y")
            panels.append(
                inline(
                    figure,
                    key=f"flatness-{number}",
                    title=f"Validation accuracy against {formats.short(metric, 60)}",
                    description=f"{len(here)} configurations.",
                )
            )
    return tuple(panels)
