"""The search space: parallel coordinates, and one slice a hyperparameter.

Trials are compared at equal budget, on the common rung (see `study`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.palette import LIGHT, MARKERS
from llp.reporting.study import (
    FAILURES,
    Axis,
    axes,
    common_rung,
    final_on,
    reached,
    states,
)
from llp.reporting.svg import canvas, drawing, inline, label_width, log_axis, percent_axis
from llp.reporting.tables import finite

MAX_AXES = 12
INACTIVE = -0.12  # height at which a hyperparameter that is not active is drawn
GROUPS = ("other", "best", "winner", "failed")


@dataclass(frozen=True)
class SpaceData:
    """Every trial in the search space.

    Attributes:
        axes: The searched hyperparameters.
        frame: One row a trial: `trial_id`, `accuracy` (last validation accuracy on the common
            rung; NaN when diverged or never reported), `reached` (highest rung), `group`
            (`winner`; `best`: top tenth on the common rung, at least three; `failed`; `other`),
            and a column of raw values for every axis (None when inactive).
        rung: Number of the common rung; 0 when nothing ran.
    """

    axes: tuple[Axis, ...]
    frame: pd.DataFrame
    rung: int


def space_data(result: SearchResult) -> SpaceData:
    """The trials of `result` in its search space."""
    rung = common_rung(result)
    searched = axes(result)
    where = states(result)
    rows = []
    for trial in result.trials:
        point = final_on(trial, rung.rung) if rung else None
        failed = rung is None or where.get((trial.trial.trial_id, rung.rung)) in (*FAILURES, None)
        accuracy = point.validation_accuracy if point and not failed else math.nan
        row: dict[str, object] = {
            "trial_id": trial.trial.trial_id,
            "accuracy": accuracy,
            "reached": reached(trial),
            "group": "failed" if trial.outcome in FAILURES else "other",
        }
        rows.append(row)
    frame = pd.DataFrame(rows, columns=["trial_id", "accuracy", "reached", "group"])
    usable = frame[frame["group"] == "other"].sort_values(
        "accuracy", ascending=False, kind="stable"
    )
    usable = finite(usable, "accuracy")
    if len(usable) > 3:
        frame.loc[usable.index[: max(3, round(0.1 * len(usable)))], "group"] = "best"
    frame.loc[frame["trial_id"] == result.winner, "group"] = "winner"
    for number, axis in enumerate(searched):
        frame[f"axis {number}"] = pd.Series(
            [trial.trial.hyperparameters.get(axis.name) for trial in result.trials], dtype=object
        )
    return SpaceData(searched, frame, rung.rung if rung else 0)


def parallel_reading(data: SpaceData) -> str:
    """Where the best trials lie, for the numbers whose range they narrow most."""
    best = data.frame[data.frame["group"].isin(["best", "winner"])]
    if len(best) < 3:
        return "Too few trials have finished to say where the good ones lie."
    found = []
    for number, axis in enumerate(data.axes):
        values = [v for v in best[f"axis {number}"] if axis.position(v) == axis.position(v)]
        if axis.categories or len(values) < 3:
            continue
        places = [axis.position(v) for v in values]
        found.append((max(places) - min(places), axis.name, min(values), max(values)))
    found.sort(key=lambda item: item[0])
    narrow = [item for item in found if item[0] < 0.7][:2]
    if not narrow:
        return f"The best {len(best)} trials are spread over the whole range of every number."
    ranges = " and ".join(
        f"{formats.short(name, 40)} between {formats.number(low, 3)} and {formats.number(high, 3)}"
        for _, name, low, high in narrow
    )
    return f"The best {len(best)} trials on rung {data.rung} have {ranges}."


def parallel_figure(data: SpaceData) -> str:
    """One vertical axis a hyperparameter and one for accuracy; a line a trial."""
    shown = data.axes[:MAX_AXES]
    accuracy = [a for a in data.frame["accuracy"] if math.isfinite(a)]
    low, high = (min(accuracy), max(accuracy)) if accuracy else (0.0, 1.0)
    if low == high:  # one value, or all the same: put it in the middle
        low, high = low - 0.005, high + 0.005
    with drawing():
        names = [formats.short(axis.name, 16) for axis in shown] + ["accuracy"]
        figure, plot = canvas(
            (max(4.2, 1.25 * len(names)), 2.8),
            left=label_width(names[:1]) / 2,
            right=0.1,
            bottom=0.05,
            top=0.26,
        )
        frame = data.frame.assign(layer=data.frame["group"].map(_layer)).sort_values(
            ["layer", "accuracy"], kind="stable"
        )
        for row in frame.to_dict("records"):
            heights = [axis.position(row[f"axis {i}"]) for i, axis in enumerate(shown)]
            heights = [INACTIVE if math.isnan(height) else height for height in heights]
            value = row["accuracy"]
            heights.append(INACTIVE if math.isnan(value) else (value - low) / (high - low))
            _draw_trial(plot, heights, row["group"])
        for place, axis in enumerate(shown):
            _draw_axis(plot, place, axis)
        _draw_ticks(plot, len(shown), [(0.0, formats.percent(low)), (1.0, formats.percent(high))])
        plot.set_xticks(range(len(names)), names)
        plot.xaxis.tick_top()
        plot.tick_params(length=0, labelcolor=LIGHT["ink"])
        plot.set_yticks([])
        plot.set_xlim(-0.03, len(shown) + 0.6)
        plot.set_ylim(INACTIVE - 0.05, 1.05)
        plot.spines[["left", "bottom"]].set_visible(False)
        return inline(
            figure,
            key="parallel",
            title="Parallel coordinates of all trials",
            description=parallel_reading(data),
        )


def slices_reading(data: SpaceData) -> str:
    """What a slice shows and how many trials it holds."""
    num = len(finite(data.frame, "accuracy"))
    if not num:
        return "No trial has a usable accuracy on the common rung."
    return (
        f"Validation accuracy of {formats.plural(num, 'trial')} at equal budget, on rung "
        f"{data.rung}. Other hyperparameters vary along: a pattern is a hint, not an effect."
    )


def slice_figures(data: SpaceData) -> tuple[str, ...]:
    """One panel a hyperparameter: accuracy on the common rung against its value."""
    known = finite(data.frame, "accuracy")
    panels = []
    with drawing():
        for number, axis in enumerate(data.axes[:MAX_AXES]):
            values = [axis.value(raw) for raw in known[f"axis {number}"]]
            if sum(map(math.isfinite, values)) < 2:
                continue
            figure, plot = canvas()
            if axis.categories:
                values = [v + 0.3 * ((i * 0.618) % 1 - 0.5) for i, v in enumerate(values)]
                labels = [formats.short(c, 12) for c in axis.categories]
                plot.set_xticks(range(len(labels)), labels)
                plot.set_xlim(-0.5, len(labels) - 0.5)
            elif axis.log:
                margin = (axis.high / axis.low) ** 0.03
                log_axis(plot, "x", axis.low / margin, axis.high * margin)
            rows = known.assign(x=values)
            for rung in sorted(set(rows["reached"].tolist())):
                here = rows[rows["reached"] == rung]
                plot.plot(
                    here["x"],
                    here["accuracy"],
                    MARKERS[(rung - 1) % len(MARKERS)],
                    color=LIGHT["blue" if rung > data.rung else "faint"],
                    markeredgecolor=LIGHT["page"],
                    mew=0.5,
                    markersize=6.5,
                )
            won = rows[rows["group"] == "winner"]
            plot.plot(
                won["x"], won["accuracy"], "o", mfc="none", mec=LIGHT["vermillion"], ms=11, mew=1.4
            )
            plot.set_title(formats.short(axis.name, 34))
            percent_axis(plot)
            plot.grid(axis="y")
            panels.append(
                inline(
                    figure,
                    key=f"slice-{number}",
                    title=f"Accuracy against {formats.short(axis.name, 60)}",
                    description=f"{len(won)} winner marked; {len(rows)} trials.",
                )
            )
    return tuple(panels)


def _layer(group: str) -> int:
    return {"failed": 0, "other": 1, "best": 2, "winner": 3}[group]


def _draw_trial(plot: Axes, heights: list[float], group: str) -> None:
    role, width, dash = {
        "failed": ("faint", 0.7, (0, (1, 2))),
        "other": ("rule", 0.9, "-"),
        "best": ("blue", 1.2, "-"),
        "winner": ("vermillion", 2.2, "-"),
    }[group]
    plot.plot(range(len(heights)), heights, color=LIGHT[role], linewidth=width, linestyle=dash)


def _draw_axis(plot: Axes, place: int, axis: Axis) -> None:
    if axis.categories:
        num = len(axis.categories)
        ticks = [((i + 0.5) / num, formats.short(c, 9)) for i, c in enumerate(axis.categories)]
        if len(ticks) > 8:
            ticks = [ticks[0], ticks[-1]]
    else:
        ticks = [(0.0, formats.number(axis.low, 3)), (1.0, formats.number(axis.high, 3))]
        if axis.log:
            middle = math.sqrt(axis.low * axis.high)
            ticks.insert(1, (0.5, formats.number(middle, 2)))
        else:
            ticks.insert(1, (0.5, formats.number((axis.low + axis.high) / 2, 3)))
    _draw_ticks(plot, place, ticks)


def _draw_ticks(plot: Axes, place: int, ticks: list[tuple[float, str]]) -> None:
    plot.plot([place, place], [0, 1], color=LIGHT["muted"], linewidth=0.8)
    for height, label in ticks:
        plot.plot([place, place + 0.03], [height, height], color=LIGHT["muted"], linewidth=0.8)
        plot.text(place + 0.06, height, label, va="center", fontsize=7.5, color=LIGHT["ink"])
