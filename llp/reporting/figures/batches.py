"""The figures of a batch: accuracies, differences, heat map, curves, cost, choices, studies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from llp.comparing.significance import PairedTest
from llp.reporting import formats
from llp.reporting.palette import LIGHT, SERIES
from llp.reporting.svg import BARS, canvas, drawing, inline, label_width, log_axis, percent_axis

MAX_LABEL = 30
"""Letters of a label beside a row."""
MAX_CURVES = 12
"""Configurations in one picture of curves; two dash patterns of six colours."""


def _rows_axis(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])


def accuracy_figure(table: pd.DataFrame, labels: Sequence[str], reference: str) -> str:
    """A ring a seed and the mean with its standard error, one row a configuration."""
    shown = [formats.short(label, MAX_LABEL) for label in labels]
    with drawing():
        figure, axes = canvas(
            (BARS, 0.5 + 0.3 * len(labels)), left=label_width(shown), bottom=0.42, top=0.05
        )
        told = []
        for y, label in enumerate(labels):
            values = table.loc[table["label"] == label, "test_accuracy"].dropna().tolist()
            if not values:
                continue
            mean = sum(values) / len(values)
            colour = LIGHT["vermillion" if label == reference else "blue"]
            axes.plot(values, [y] * len(values), "o", mfc="none", mec=LIGHT["muted"], ms=5, mew=1)
            if len(values) > 1:
                square = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                error = math.sqrt(square / len(values))
                axes.plot([mean - error, mean + error], [y + 0.22] * 2, color=colour, lw=1.6)
            axes.plot(mean, y + 0.22, "D" if label == reference else "s", color=colour, ms=5)
            told.append(f"{label} {formats.percent(mean, 2)}")
        _rows_axis(axes, shown)
        percent_axis(axes, "x")
        axes.set_xlabel("test accuracy")
        return inline(
            figure,
            key="accuracies",
            title="Test accuracy of every configuration",
            description="; ".join(told),
        )


def difference_figure(tests: Sequence[PairedTest], key: str) -> str:
    """Mean difference to the reference with Student's 95 % interval, one row a configuration."""
    shown = [
        formats.short(test.label.removeprefix(f"{test.reference} "), MAX_LABEL) for test in tests
    ]
    with drawing():
        figure, axes = canvas(
            (BARS, 0.5 + 0.28 * max(len(tests), 1)), left=label_width(shown), bottom=0.42, top=0.05
        )
        for y, test in enumerate(tests):
            colour = LIGHT["vermillion" if test.decided else "blue"]
            if not math.isnan(test.low):
                axes.plot([100 * test.low, 100 * test.high], [y, y], color=colour, linewidth=1.6)
            mark = "D" if test.decided else "o"
            axes.plot(100 * test.difference, y, mark, color=colour, ms=5.5)
        axes.axvline(0, color=LIGHT["faint"], linewidth=0.8)
        _rows_axis(axes, shown)
        reference = formats.short(tests[0].reference if tests else "", MAX_LABEL)
        axes.set_xlabel(f"points more than {reference}")
        axes.xaxis.set_major_formatter(lambda value, _: formats.signed(value, 1))
        return inline(
            figure,
            key=key,
            title=f"Difference of test accuracy to {reference}",
            description="; ".join(
                f"{t.label} {formats.signed(100 * t.difference)} "
                f"({formats.signed(100 * t.low)} to {formats.signed(100 * t.high)})"
                for t in tests
            ),
        )


def heat_figure(cells: pd.DataFrame, rows: str, columns: str) -> str:
    """Mean test accuracy of every pair, darker when higher, with its number."""
    down, across = list(dict.fromkeys(cells[rows])), list(dict.fromkeys(cells[columns]))
    low, high = float(cells["mean"].min()), float(cells["mean"].max())
    shown = [formats.short(name, 20) for name in down]
    with drawing():
        width = max(2.6, label_width(shown) + 0.95 * len(across))
        figure, axes = canvas(
            (width, 0.4 + 0.36 * len(down)), left=label_width(shown), bottom=0.06, top=0.3
        )
        for cell in cells.to_dict("records"):
            x, y = across.index(cell[columns]), down.index(cell[rows])
            shade = 0.5 if high == low else (cell["mean"] - low) / (high - low)
            axes.add_patch(
                Rectangle(
                    (x - 0.48, y - 0.46),
                    0.96,
                    0.92,
                    facecolor=LIGHT["blue"],
                    alpha=0.06 + 0.42 * shade,
                    linewidth=0,
                )
            )
            number = formats.percent(cell["mean"], 2)
            axes.text(x, y, number, ha="center", va="center", color=LIGHT["ink"])
        axes.set_xlim(-0.5, len(across) - 0.5)
        axes.set_ylim(len(down) - 0.5, -0.5)
        axes.set_yticks(range(len(down)), shown)
        axes.set_xticks(range(len(across)), [formats.short(name, 16) for name in across])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelcolor=LIGHT["ink"])
        axes.spines[["bottom", "left"]].set_visible(False)
        return inline(
            figure,
            key="heat",
            title=f"Test accuracy by {rows} and {columns}",
            description="; ".join(
                f"{c[rows]}, {c[columns]}: {formats.percent(c['mean'], 2)}"
                for c in cells.to_dict("records")
            ),
        )


def curve_marks(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Label -> colour role and dash pattern, for as many as one picture can tell apart."""
    return {
        label: (SERIES[k % len(SERIES)], ("solid", "dashed")[k // len(SERIES)])
        for k, label in enumerate(labels[:MAX_CURVES])
    }


def curves_figure(table: pd.DataFrame, labels: Sequence[str]) -> str:
    """Validation accuracy against epochs, the mean over seeds of every configuration."""
    with drawing():
        figure, axes = canvas((BARS, 2.6), left=0.62, bottom=0.42, top=0.08)
        for label, (role, dash) in curve_marks(labels).items():
            curves: dict[float, list[float]] = {}
            for row in table[table["label"] == label].to_dict("records"):
                for epoch, value in zip(
                    row["curve_epoch"], row["curve_validation_accuracy"], strict=True
                ):
                    curves.setdefault(float(epoch), []).append(float(value))
            epochs = sorted(curves)
            means = [sum(curves[e]) / len(curves[e]) for e in epochs]
            axes.plot(epochs, means, color=LIGHT[role], linestyle=dash)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent_axis(axes, "y")
        axes.grid()
        return inline(
            figure,
            key="curves",
            title="Validation accuracy against epochs",
            description=f"Means over seeds of {formats.listed(list(labels[:MAX_CURVES]), 12)}.",
        )


def tradeoff_figure(data: pd.DataFrame, cost: str, label: str, key: str) -> str:
    """Cost of one training against test accuracy; the front as a step line, its members named."""
    with drawing():
        figure, axes = canvas((BARS, 2.7), left=0.62, bottom=0.42, top=0.1, right=0.3)
        rows = data.to_dict("records")
        front = [row for row in rows if row["on_front"]]
        if len(front) > 1:
            axes.step(
                [row[cost] for row in front],
                [row["test_accuracy"] for row in front],
                where="post",
                color=LIGHT["faint"],
                linewidth=0.9,
            )
        for row in rows:
            role, mark = ("vermillion", "D") if row["on_front"] else ("blue", "o")
            x, y, error = row[cost], row["test_accuracy"], row["standard_error"]
            if formats.is_number(error):
                axes.plot([x, x], [y - error, y + error], color=LIGHT[role], linewidth=1.0)
            axes.plot(x, y, mark, color=LIGHT[role], ms=5, mec=LIGHT["page"], mew=0.5)
            if row["on_front"] or len(rows) <= 10:
                axes.annotate(
                    formats.short(row["label"], 22),
                    (x, y),
                    xytext=(5, 3),
                    textcoords="offset points",
                    fontsize=7,
                    color=LIGHT["ink"],
                )
        values = [row[cost] for row in rows]
        log_axis(axes, "x", min(values) / 1.3, max(values) * 1.9)
        percent_axis(axes, "y")
        axes.margins(y=0.12)
        axes.grid()
        axes.set_xlabel(label)
        axes.set_ylabel("test accuracy")
        return inline(
            figure,
            key=key,
            title=f"Test accuracy against {label}",
            description=f"On the front: {formats.listed([r['label'] for r in front], 12)}.",
        )


def value_figure(
    data: pd.DataFrame, name: str, *, key: str, accuracy: str, y_label: str, marked: str
) -> str:
    """Accuracy against the values of one hyperparameter, with standard errors; one is marked.

    Args:
        data: `value`, the column `accuracy`, `standard_error` and the boolean column `marked`.
        name: Of the hyperparameter.
        key: Unique on the page.
        accuracy: Column of the height.
        y_label: Of the height.
        marked: Column that says which point is drawn as a diamond.
    """
    rows = data.to_dict("records")
    values = [row["value"] for row in rows]
    numeric = all(formats.is_number(value) for value in values)
    with drawing():
        figure, axes = canvas(left=0.62, bottom=0.42, top=0.24)
        places = [float(v) for v in values] if numeric else list(range(len(values)))
        heights = [float(row[accuracy]) for row in rows]
        axes.plot(places, heights, color=LIGHT["blue"], linewidth=0.9)
        for x, row in zip(places, rows, strict=True):
            role, mark = ("vermillion", "D") if row[marked] else ("blue", "o")
            y, error = float(row[accuracy]), row["standard_error"]
            if formats.is_number(error):
                axes.plot([x, x], [y - error, y + error], color=LIGHT[role], linewidth=1.2)
            axes.plot(x, y, mark, color=LIGHT[role], ms=5, mec=LIGHT["page"], mew=0.5)
        if numeric and min(places) > 0 and max(places) / min(places) >= 8:
            log_axis(axes, "x", min(places) / 1.3, max(places) * 1.3)
        elif not numeric:
            axes.set_xticks(places, [formats.short(formats.number(v), 10) for v in values])
        percent_axis(axes, "y")
        axes.grid()
        axes.set_title(formats.short(name, 30))
        axes.set_xlabel(formats.short(name, 30))
        axes.set_ylabel(y_label)
        return inline(
            figure,
            key=key,
            title=f"{y_label} against {name}",
            description="; ".join(
                f"{formats.number(row['value'])}: {formats.percent(row[accuracy], 2)}"
                for row in rows
            ),
        )
