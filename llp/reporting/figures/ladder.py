"""How the ladder spent the budget: who started, went on, or ended on each rung; and the curves."""

from __future__ import annotations

from statistics import median

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from llp.records import CurvePoint, SearchResult
from llp.reporting import formats
from llp.reporting.palette import LIGHT
from llp.reporting.study import FAILURES, STATES, points_on, states
from llp.reporting.svg import BARS, canvas, drawing, inline, label_width, percent_axis
from llp.reporting.tables import finite

MAX_POINTS = 60  # of one curve as drawn; the ledger has all
STATE_STYLES: dict[str, tuple[str, str]] = {  # state -> colour role, hatch
    "promoted": ("blue", ""),
    "finished": ("sky", "///"),
    "stopped": ("faint", "..."),
    "diverged": ("vermillion", "xxx"),
    "failed": ("purple", "\\\\\\"),
    "out_of_memory": ("orange", "---"),
    "unfinished": ("rule", ""),
}


def ladder_data(result: SearchResult) -> pd.DataFrame:
    """One row a rung.

    Columns: `rung`, `data_fraction`, `num_examples`, `epochs`, `started`, one count per state of
    `study.STATES`, and `samples_seen` in completed epochs as the curves tell it.
    """
    where = states(result)
    rows = []
    for rung in result.rungs:
        here = [state for (_, number), state in where.items() if number == rung.rung]
        seen = sum(
            max((point.samples_seen for point in points_on(trial, rung.rung)), default=0)
            for trial in result.trials
        )
        rows.append(
            {
                "rung": rung.rung,
                "data_fraction": rung.data_fraction,
                "num_examples": rung.num_examples,
                "epochs": rung.epochs,
                "started": len(here),
                **{state: here.count(state) for state in STATES},
                "samples_seen": seen,
            }
        )
    columns = ["rung", "data_fraction", "num_examples", "epochs", "started", *STATES]
    return pd.DataFrame(rows, columns=[*columns, "samples_seen"])


def ladder_reading(data: pd.DataFrame) -> str:
    """From how many trials to how many, and where the samples went."""
    started = data[data["started"] > 0]
    if started.empty:
        return "No trial has started yet."
    total = started["samples_seen"].sum()
    first, last = started.iloc[0], started.iloc[-1]
    text = f"{formats.plural(int(first['started']), 'trial')} started on rung {first['rung']:.0f}"
    if len(started) > 1:
        text += f", {last['started']:.0f} got to rung {last['rung']:.0f}"
    if total > 0:
        heavy = max(started.to_dict("records"), key=lambda row: row["samples_seen"])
        share = heavy["samples_seen"] / total
        text += f"; rung {heavy['rung']:.0f} took {formats.percent(share, 0)} of tier 1's samples"
    ended = int(data[["stopped", *FAILURES]].to_numpy().sum())
    return text + (f", and {ended} ended before the end of their rung." if ended else ".")


def ladder_figure(data: pd.DataFrame) -> str:
    """Stacked horizontal bars: what became of the trials of each rung."""
    with drawing():
        labels = [
            f"rung {row['rung']}: {100 * row['data_fraction']:.3g} %"
            for row in data.to_dict("records")
        ]
        figure, axes = canvas(
            (BARS, 0.1 + 0.3 * max(len(data), 1)),
            left=label_width(labels),
            right=0.02,
            bottom=0.04,
            top=0.04,
        )
        for place, row in enumerate(data.to_dict("records")):
            left = 0
            for state in STATES:
                role, hatch = STATE_STYLES[state]
                num = row[state]
                if num:
                    axes.barh(
                        place,
                        num,
                        0.62,
                        left=left,
                        color=LIGHT[role],
                        hatch=hatch,
                        edgecolor=LIGHT["page"],
                        linewidth=0.8,
                    )
                left += num
            axes.annotate(
                str(left),
                (left, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, max(int(data["started"].max() or 0), 1) * 1.08)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["bottom", "left"]].set_visible(False)
        return inline(
            figure, key="ladder", title="Trials by rung", description=ladder_reading(data)
        )


def curves_data(result: SearchResult) -> pd.DataFrame:
    """Every point of every probe, at most `MAX_POINTS` a curve (first and last always kept).

    Columns: `rung`, `data_fraction`, `trial_id`, `state` on that rung, `winner`, `epoch`,
    `samples_seen`, `train_loss`, `validation_loss`, `validation_accuracy`.
    """
    where = states(result)
    rows = []
    for rung in result.rungs:
        for trial in result.trials:
            state = where.get((trial.trial.trial_id, rung.rung))
            for point in _thin(points_on(trial, rung.rung)):
                rows.append(
                    {
                        "rung": rung.rung,
                        "data_fraction": rung.data_fraction,
                        "trial_id": trial.trial.trial_id,
                        "state": state,
                        "winner": trial.trial.trial_id == result.winner,
                        "epoch": point.epoch,
                        "samples_seen": point.samples_seen,
                        "train_loss": point.train_loss,
                        "validation_loss": point.validation_loss,
                        "validation_accuracy": point.validation_accuracy,
                    }
                )
    columns = ["rung", "data_fraction", "trial_id", "state", "winner", "epoch", "samples_seen"]
    columns += ["train_loss", "validation_loss", "validation_accuracy"]
    return pd.DataFrame(rows, columns=columns)


def curve_summary(data: pd.DataFrame) -> pd.DataFrame:
    """One row a curve: `rung`, `trial_id`, `state`, `epochs`, `first`, `best`, `last` accuracy."""
    rows = []
    for (rung, trial_id), curve in data.groupby(["rung", "trial_id"], sort=False):
        accuracy = curve["validation_accuracy"]
        rows.append(
            {
                "rung": rung,
                "trial_id": trial_id,
                "state": curve["state"].iloc[0],
                "epochs": int(curve["epoch"].max()),
                "first": accuracy.iloc[0],
                "best": accuracy.max(),
                "last": accuracy.iloc[-1],
                "validation_loss": curve["validation_loss"].iloc[-1],
            }
        )
    columns = ["rung", "trial_id", "state", "epochs", "first", "best", "last", "validation_loss"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values(["rung", "last"], ascending=[False, False], kind="stable")


def curves_reading(data: pd.DataFrame) -> str:
    """Spread of the finished trials on the highest rung, and how early stops came."""
    summary = curve_summary(data)
    finished = summary[summary["state"].isin(["promoted", "finished"])]
    parts = []
    if not finished.empty:
        top = finished[finished["rung"] == finished["rung"].max()]
        best, middle = top["last"].max(), median(top["last"])
        parts.append(
            f"On rung {top['rung'].iloc[0]} the best of "
            f"{formats.plural(len(top), 'finished trial')} ends at {formats.percent(best)} "
            "validation accuracy"
            + (f", the median at {formats.percent(middle)}" if len(top) > 2 else "")
        )
    stopped = summary[summary["state"] == "stopped"]
    if not stopped.empty:
        parts.append(
            f"{formats.plural(len(stopped), 'trial')} stopped by a rule after "
            f"{median(stopped['epochs']):g} epochs (median)"
        )
    return ". ".join(parts) + "." if parts else "No trial has finished a rung yet."


def curves_figures(data: pd.DataFrame) -> tuple[str, ...]:
    """One panel a rung: validation accuracy against epoch, on the same scale.

    Diverged and failed trials do not set the scale; below it they lie on the lower edge.
    """
    known = finite(data, "validation_accuracy")
    panels = []
    with drawing():
        sound = known[~known["state"].isin(FAILURES)]
        low, high = _limits((known if sound.empty else sound)["validation_accuracy"].tolist())
        for rung, here in known.groupby("rung"):
            figure, axes = canvas(bottom=0.42)
            for _, curve in sorted(
                here.groupby("trial_id"), key=lambda item: _layer(item[1].iloc[0])
            ):
                _draw_curve(axes, curve, low)
            fraction = here["data_fraction"].iloc[0]
            axes.set_title(f"rung {rung}: {100 * fraction:.3g} % of the images")
            axes.set_xlabel("epoch")
            axes.set_ylim(low, high)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            percent_axis(axes)
            axes.grid(axis="y")
            panels.append(
                inline(
                    figure,
                    key=f"curves-{rung}",
                    title=f"Validation accuracy by epoch on rung {rung}",
                    description=f"{here['trial_id'].nunique()} learning curves.",
                )
            )
    return tuple(panels)


def _thin(points: tuple[CurvePoint, ...]) -> tuple[CurvePoint, ...]:
    if len(points) <= MAX_POINTS:
        return points
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return tuple(points[round(i * step)] for i in range(MAX_POINTS))


def _layer(row: pd.Series) -> int:
    order = ["stopped", "unfinished", *FAILURES, "finished", "promoted"]
    return len(order) if row["winner"] else order.index(row["state"])


def _limits(values: list[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    margin = max(0.04 * (max(values) - min(values)), 0.005)
    return min(values) - margin, max(values) + margin


def _draw_curve(axes: Axes, curve: pd.DataFrame, low: float) -> None:
    state, winner = curve["state"].iloc[0], bool(curve["winner"].iloc[0])
    x, y = curve["epoch"].tolist(), curve["validation_accuracy"].clip(lower=low).tolist()
    role, dash, width, marker = {
        "promoted": ("blue", "-", 1.1, ""),
        "finished": ("sky", "-", 0.9, ""),
        "stopped": ("faint", (0, (4, 2)), 0.8, "|"),
    }.get(state, ("faint", (0, (1, 1.5)), 0.9, "x" if state in FAILURES else "."))
    if winner:
        role, width = "vermillion", 2.0
    colour = LIGHT["vermillion" if marker == "x" else role]
    axes.plot(x, y, color=LIGHT[role], linestyle=dash, linewidth=width)
    if marker:
        axes.plot(x[-1:], y[-1:], color=colour, marker=marker, markersize=4, clip_on=False)
    elif winner or len(x) == 1:
        axes.plot(x[-1:], y[-1:], color=colour, marker="o", markersize=4 if winner else 2.5)
