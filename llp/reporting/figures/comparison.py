"""The figures of a matrix's index: accuracies, costs and ranks of the configurations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from llp.reporting import formats
from llp.reporting.comparison import Stage, Winner, common_trials
from llp.reporting.figures.cost import PARTS
from llp.reporting.figures.ranks import kendall
from llp.reporting.palette import HATCHES, LIGHT
from llp.reporting.svg import BARS, canvas, drawing, inline, label_width, percent_axis
from llp.reporting.uncertainty import Difference, seed_interval


def accuracy_figure(found: Sequence[Winner], names: Sequence[str], reference: str) -> str:
    """A ring a full training and the mean of every winner; names without a winner stay empty."""
    by_name = {winner.entry.name: winner for winner in found}
    labels = [
        f"{name}: {by_name[name].trial_id}" if name in by_name else f"{name}: none"
        for name in names
    ]
    labels = [formats.short(label, 26) for label in labels]
    with drawing():
        figure, axes = canvas(
            (BARS, 0.5 + 0.32 * len(names)),
            left=label_width(labels),
            bottom=0.42,
            top=0.05,
        )
        for y, name in enumerate(names):
            winner = by_name.get(name)
            if winner is None:
                continue
            colour = LIGHT["vermillion" if name == reference else "blue"]
            values = list(winner.accuracies.values())
            axes.plot(values, [y] * len(values), "o", mfc="none", mec=LIGHT["muted"], ms=5, mew=1)
            axes.plot(winner.mean, y + 0.22, "D" if name == reference else "s", color=colour, ms=5)
        axes.set_yticks(range(len(names)), labels)
        axes.set_ylim(len(names) - 0.4, -0.65)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        percent_axis(axes, "x")
        axes.set_xlabel("test accuracy of the winner, trained fully")
        return inline(
            figure,
            key="winners",
            title="Test accuracy of every winner",
            description="; ".join(
                f"{winner.entry.name} {formats.percent(winner.mean)}" for winner in found
            ),
        )


def difference_figure(rows: Sequence[tuple[str, Difference]], reference: str) -> str:
    """Difference of every winner to the reference, with its 95 % interval."""
    labels = [formats.short(name, 20) for name, _ in rows]
    with drawing():
        figure, axes = canvas(
            (BARS, 0.5 + 0.28 * max(len(rows), 1)), left=label_width(labels), bottom=0.42, top=0.05
        )
        for y, (_, found) in enumerate(rows):
            colour = LIGHT["vermillion" if found.decided else "blue"]
            ends = [100 * found.low, 100 * found.high]
            axes.plot(ends, [y, y], color=colour, linewidth=1.6)
            axes.plot(100 * found.value, y, "D" if found.decided else "o", color=colour, ms=5.5)
        axes.axvline(0, color=LIGHT["faint"], linewidth=0.8)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        axes.set_xlabel(f"points more than {formats.short(reference, 20)}")
        axes.xaxis.set_major_formatter(lambda value, _: formats.signed(value, 1))
        return inline(
            figure,
            key="differences",
            title="Difference of test accuracy to the reference",
            description="; ".join(
                f"{name} {formats.signed(100 * d.value)} ({formats.signed(100 * d.low)} to "
                f"{formats.signed(100 * d.high)})"
                for name, d in rows
            ),
        )


def costs_figure(data: pd.DataFrame) -> str:
    """Samples seen by every configuration, stacked by part."""
    rows = data.to_dict("records")
    labels = [formats.short(row["name"], 20) for row in rows]
    with drawing():
        figure, axes = canvas(
            (BARS, 0.15 + 0.32 * max(len(rows), 1)),
            left=label_width(labels),
            right=0.02,
            bottom=0.04,
            top=0.04,
        )
        most = max(
            (float(row["total"]) for row in rows if formats.is_number(row["total"])), default=1
        )
        for y, row in enumerate(rows):
            left = 0.0
            for (part, _, role), hatch in zip(PARTS, HATCHES, strict=False):
                samples = float(row[part]) if formats.is_number(row[part]) else 0.0
                axes.barh(
                    y,
                    samples,
                    0.6,
                    left=left,
                    color=LIGHT[role],
                    hatch=hatch,
                    edgecolor=LIGHT["page"],
                )
                left += samples
            axes.annotate(
                formats.amount(left) if left else "not run",
                (left, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, max(most, 1) * 1.24)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["bottom", "left"]].set_visible(False)
        return inline(
            figure,
            key="costs",
            title="Samples seen by every configuration",
            description="; ".join(
                f"{row['name']} {formats.amount(row['total'])}" for row in rows if row["total"]
            ),
        )


def agreement_figures(found: Sequence[Stage], reference: Stage) -> tuple[str, ...]:
    """One scatter for every stage of another configuration against the reference's top stage."""
    panels = []
    with drawing():
        for place, stage in enumerate(found):
            if stage.entry.name == reference.entry.name or stage.budget == reference.budget:
                continue
            shared = common_trials(stage, reference)
            if len(shared) < 3:
                continue
            x = [stage.accuracies[t] for t in shared]
            y = [reference.accuracies[t] for t in shared]
            figure, axes = canvas(left=0.66, bottom=0.42)
            axes.plot(
                x, y, "o", color=LIGHT["blue"], markeredgecolor=LIGHT["page"], markersize=5, mew=0.5
            )
            winner = reference.entry.result.winner if reference.entry.result else None
            if winner in shared:
                at = (stage.accuracies[str(winner)], reference.accuracies[str(winner)])
                axes.plot(*at, "o", mfc="none", mec=LIGHT["vermillion"], markersize=9, mew=1.4)
            tau = kendall(x, y)[0]
            axes.set_title(f"tau {formats.signed(tau)}, n = {len(shared)}")
            axes.set_xlabel(formats.short(stage.label, 34))
            axes.set_ylabel(formats.short(reference.label, 30))
            percent_axis(axes, "x")
            percent_axis(axes, "y")
            axes.grid()
            panels.append(
                inline(
                    figure,
                    key=f"agreement-{place}",
                    title=f"Validation accuracy on {reference.label} against {stage.label}",
                    description=f"Kendall tau {formats.signed(tau)}, n = {len(shared)}.",
                )
            )
    return tuple(panels)


def seeds_text(winner: Winner) -> str:
    """The interval of the mean over seeds, in words; empty with one seed."""
    low, high = seed_interval(list(winner.accuracies.values()))
    if math.isnan(low):
        return ""
    return f"{formats.percent(max(low, 0.0))} to {formats.percent(min(high, 1.0))}"
