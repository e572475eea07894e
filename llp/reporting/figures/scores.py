"""Scores with intervals and contributions, the ablation of the score, and the verification."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llp.records import AblationRow, SearchResult
from llp.reporting import formats
from llp.reporting.palette import HATCHES, LIGHT, SERIES
from llp.reporting.study import Verified, verified
from llp.reporting.svg import BARS, canvas, drawing, inline, label_width, percent_axis
from llp.reporting.tables import finite

MAX_SHOWN = 16
MAX_TERMS = len(SERIES)


def scores_data(result: SearchResult) -> pd.DataFrame:
    """One row a scored trial in the report's order, best first.

    Columns: `rank`, `trial_id`, `value`, `low`, `high`, `level`, `probability_best`, `tie` (number
    of the group that cannot be told apart, 0 for none), and `term NAME` for every contribution.
    """
    report = result.score_report
    rows = []
    for rank, score in enumerate(report.scores if report else (), start=1):
        group = [i for i, tie in enumerate(report.ties, start=1) if score.trial_id in tie]  # type: ignore[union-attr]
        rows.append(
            {
                "rank": rank,
                "trial_id": score.trial_id,
                "value": score.value,
                "low": score.interval.low,
                "high": score.interval.high,
                "level": score.interval.level,
                "probability_best": score.probability_best,
                "tie": group[0] if group else 0,
                **{f"term {name}": addend for name, addend in score.contributions.items()},
            }
        )
    columns = ["rank", "trial_id", "value", "low", "high", "level", "probability_best", "tie"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def terms(data: pd.DataFrame) -> list[str]:
    """Names of the contributions, those that vary most between trials first."""
    names = [c.removeprefix("term ") for c in data.columns if c.startswith("term ")]
    spread = {name: float(data[f"term {name}"].fillna(0).std(ddof=0)) for name in names}
    return sorted(names, key=lambda name: -spread[name] if math.isfinite(spread[name]) else 0.0)


def scores_reading(data: pd.DataFrame) -> str:
    """First place, its probability, and what cannot be told apart."""
    if data.empty:
        return "No scores yet."
    first = data.iloc[0]
    text = (
        f"{formats.clean(first['trial_id'])} scores highest, {formats.number(first['value'], 3)} "
        f"({formats.percent(first['level'], 0)} interval {formats.number(first['low'], 3)} to "
        f"{formats.number(first['high'], 3)}); the probability that it is the best of "
        f"{len(data)} is {formats.probability(first['probability_best'])}"
    )
    tied = data[(data["tie"] == first["tie"]) & (data["tie"] > 0)]["trial_id"].tolist()
    if len(tied) > 1:
        return f"{text}. It cannot be told apart from {formats.listed(tied[1:], 4)}."
    return text + "."


def scores_figure(data: pd.DataFrame, winner: str | None = None) -> str:
    """Dot and interval of the best `MAX_SHOWN` scores, best on top."""
    rows = finite(data, "value").head(MAX_SHOWN).iloc[::-1]
    with drawing():
        figure, axes = _rows(rows["trial_id"].tolist(), 14)
        for y, row in enumerate(rows.to_dict("records")):
            won = row["trial_id"] == winner
            colour = LIGHT["vermillion" if won else "blue"]
            if math.isfinite(row["low"]) and math.isfinite(row["high"]):
                axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.6)
            axes.plot(row["value"], y, "D" if won else "o", color=colour, markersize=5.5)
        axes.set_xlabel("score")
        axes.xaxis.set_major_formatter(lambda value, _: formats.number(value, 3))
        return inline(
            figure,
            key="scores",
            title="Scores with intervals",
            description=scores_reading(data),
        )


def contributions_data(data: pd.DataFrame) -> pd.DataFrame:
    """Addends compared with the average configuration: what moves a score up or down.

    Columns: `trial_id`, `difference` (score minus mean score), and for every term its addend minus
    the mean of that term over all scored configurations; an absent term counts as 0. The terms of a
    row sum to its `difference`. Terms are named as in `terms`.
    """
    names = terms(data)
    known = finite(data, "value")
    frame = pd.DataFrame({"trial_id": known["trial_id"]})
    frame["difference"] = known["value"] - known["value"].mean()
    for name in names:
        addends = known[f"term {name}"].astype(float).fillna(0.0)
        frame[f"term {name}"] = addends - addends.mean()
    return frame


def contributions_reading(data: pd.DataFrame) -> str:
    """The term that separates the configurations most; `data` is from `contributions_data`."""
    names = terms(data)
    if not names:
        return "The score has no separate terms."
    if len(names) == 1:
        return f"The score has one term: {formats.short(names[0], 60)}."
    spread = data[f"term {names[0]}"]
    return (
        f"{formats.short(names[0], 60)} separates the configurations most: its addend lies between "
        f"{formats.signed(spread.min())} and {formats.signed(spread.max())} around its mean."
    )


def contributions_figure(data: pd.DataFrame) -> str:
    """Stacked differences of the best scores; what pulls a score down is left of zero."""
    rows = data.head(MAX_SHOWN).iloc[::-1]
    names = terms(data)[:MAX_TERMS]
    with drawing():
        figure, axes = _rows(rows["trial_id"].tolist(), 14)
        for y, row in enumerate(rows.to_dict("records")):
            left = {True: 0.0, False: 0.0}
            for name, role, hatch in zip(names, SERIES, HATCHES, strict=False):
                addend = row[f"term {name}"]
                axes.barh(
                    y,
                    addend,
                    0.66,
                    left=left[addend > 0],
                    color=LIGHT[role],
                    hatch=hatch,
                    edgecolor=LIGHT["page"],
                    linewidth=0.6,
                )
                left[addend > 0] += addend
            axes.plot(
                [row["difference"]] * 2, [y - 0.4, y + 0.4], color=LIGHT["ink"], linewidth=1.6
            )
        axes.axvline(0, color=LIGHT["faint"], linewidth=0.8)
        axes.set_xlabel("difference from the average configuration")
        axes.xaxis.set_major_formatter(lambda value, _: formats.number(value, 3))
        return inline(
            figure,
            key="contributions",
            title="What moves the scores",
            description=contributions_reading(data),
        )


def ablation_data(rows: tuple[AblationRow, ...]) -> pd.DataFrame:
    """One row a way of ranking, in the order of the score report.

    Columns: `name`, `tau`, `low`, `high`, `regret_at_1`, `regret_at_5` (percentage points),
    `samples_seen`, `num_trials`.
    """
    columns = ["name", "tau", "low", "high", "regret_at_1", "regret_at_5"]
    columns += ["samples_seen", "num_trials"]
    return pd.DataFrame(
        [
            (
                *(r.name, r.tau, r.interval.low, r.interval.high),
                *(r.regret_at_1, r.regret_at_5, r.samples_seen, r.num_trials),
            )
            for r in rows
        ],
        columns=columns,
    )


def ablation_figure(data: pd.DataFrame) -> str:
    """Kendall's tau of every way of ranking with its interval."""
    rows = data.iloc[::-1]
    with drawing():
        figure, axes = _rows(rows["name"].tolist(), 26)
        for y, row in enumerate(rows.to_dict("records")):
            if math.isfinite(row["low"]) and math.isfinite(row["high"]):
                axes.plot([row["low"], row["high"]], [y, y], color=LIGHT["blue"], linewidth=1.6)
            if math.isfinite(row["tau"]):
                axes.plot(row["tau"], y, "o", color=LIGHT["blue"], markersize=5.5)
        axes.axvline(0, color=LIGHT["faint"], linewidth=0.8)
        axes.set_xlim(-1.05, 1.05)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_xlabel("Kendall tau with the results compared")
        return inline(
            figure, key="ablation", title="Agreement of every ranking with the final results"
        )


def verification_data(result: SearchResult) -> pd.DataFrame:
    """One row a full training, best mean test accuracy first.

    Columns: `place`, `trial_id`, `seed`, `test_accuracy`, `test_loss`, `validation_accuracy`,
    `num_test_examples`, `samples_seen`, `seconds`.
    """
    place = {row.trial_id: number for number, row in enumerate(verified(result), start=1)}
    rows = [
        {
            "place": place.get(v.trial_id, len(place) + 1),
            "trial_id": v.trial_id,
            "seed": v.seed,
            "test_accuracy": v.test_accuracy,
            "test_loss": v.test_loss,
            "validation_accuracy": v.validation_accuracy,
            "num_test_examples": v.num_test_examples,
            "samples_seen": v.samples_seen,
            "seconds": v.seconds,
        }
        for v in result.verifications
    ]
    columns = ["place", "trial_id", "seed", "test_accuracy", "test_loss", "validation_accuracy"]
    frame = pd.DataFrame(rows, columns=[*columns, "num_test_examples", "samples_seen", "seconds"])
    return frame.sort_values(["place", "seed"], kind="stable", ignore_index=True)


def margin_sentence(rows: tuple[Verified, ...]) -> str:
    """The lead of the first verified configuration over the second, against its standard error."""
    if not rows:
        return "Nothing has been verified by full training."
    first = rows[0]
    if len(rows) == 1:
        return f"Only {formats.clean(first.trial_id)} was verified: there is no runner-up."
    second = rows[1]
    margin = first.mean - second.mean
    error = math.hypot(first.standard_error, second.standard_error)
    seeds = f"{len(first.accuracies)} and {formats.plural(len(second.accuracies), 'seed')}"
    text = (
        f"{formats.clean(first.trial_id)} leads {formats.clean(second.trial_id)} by "
        f"{formats.points(margin, 2)}"
    )
    if not math.isfinite(error):
        return f"{text} points in test accuracy; with a single seed there is no error to judge it."
    verdict = (
        "more than two standard errors" if margin > 2 * error else "within two standard errors"
    )
    return f"{text} ± {formats.points(error, 2)} points in test accuracy ({seeds}): {verdict}."


def verification_figure(rows: tuple[Verified, ...]) -> str:
    """A dot a seed, and the mean with its standard error, for every verified configuration."""
    shown = rows[:MAX_SHOWN][::-1]
    with drawing():
        figure, axes = _rows([row.trial_id for row in shown], 14, 0.32)
        for y, row in enumerate(shown):
            best = row.trial_id == rows[0].trial_id
            colour = LIGHT["vermillion" if best else "blue"]
            axes.plot(
                row.accuracies,
                [y] * len(row.accuracies),
                "o",
                mfc="none",
                mec=LIGHT["muted"],
                ms=5,
                mew=1,
            )
            if math.isfinite(row.standard_error):
                ends = [row.mean - row.standard_error, row.mean + row.standard_error]
                axes.plot(ends, [y - 0.24] * 2, color=colour, linewidth=2)
            axes.plot(row.mean, y - 0.24, "D" if best else "s", color=colour, markersize=5, mew=0)
        percent_axis(axes, "x")
        axes.set_xlabel("test accuracy")
        return inline(
            figure,
            key="verification",
            title="Test accuracy of every seed",
            description=margin_sentence(rows),
        )


def _rows(names: list[str], length: int, row_height: float = 0.22) -> tuple[Figure, Axes]:
    """A figure with a labelled row for every name, from the bottom, and a vertical grid."""
    labels = [formats.short(name, length) for name in names]
    height = 0.5 + row_height * max(len(names), 1)
    figure, axes = canvas((BARS, height), left=label_width(labels), bottom=0.42, top=0.05)
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(-0.65, len(names) - 0.4)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
    return figure, axes
