"""Full trainings epoch by epoch: losses, accuracies and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from llp.reporting import formats
from llp.reporting.palette import LIGHT
from llp.reporting.runs import FullTraining
from llp.reporting.svg import canvas, drawing, inline, log_axis, percent_axis
from llp.reporting.tables import finite

DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
"""One a seed."""
_COLUMNS = [
    "job_id",
    "trial_id",
    "seed",
    "number",
    "winner",
    "epoch",
    "samples_seen",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "seconds",
]


def training_data(trainings: Sequence[FullTraining], winner: str | None) -> pd.DataFrame:
    """One row an epoch of every full training; `number` counts the seeds of a configuration."""
    rows = []
    counted: dict[str, int] = {}
    for training in trainings:
        number = counted[training.trial_id] = counted.get(training.trial_id, 0) + 1
        for point in training.points:
            rows.append(
                {
                    "job_id": training.job_id,
                    "trial_id": training.trial_id,
                    "seed": training.seed,
                    "number": number,
                    "winner": training.trial_id == winner,
                    "epoch": point.epoch,
                    "samples_seen": point.samples_seen,
                    "learning_rate": point.learning_rate,
                    "train_loss": point.train_loss,
                    "train_accuracy": point.train_accuracy,
                    "validation_loss": point.validation_loss,
                    "validation_accuracy": point.validation_accuracy,
                    "seconds": point.seconds,
                }
            )
    return pd.DataFrame(rows, columns=_COLUMNS)


def winners_rows(data: pd.DataFrame) -> pd.DataFrame:
    """The rows of the winner."""
    return data[data["winner"].astype(bool)]


def training_reading(data: pd.DataFrame) -> str:
    """Where the winner's trainings end, and whether validation was better before the end."""
    own = finite(winners_rows(data), "validation_accuracy")
    if own.empty:
        return "No full training of a winner has reported an epoch."
    last = own.groupby("job_id", sort=False).tail(1)
    best = own.groupby("job_id", sort=False)["validation_accuracy"].max()
    gap = float((last["train_accuracy"] - last["validation_accuracy"]).mean())
    lost = float((best.to_numpy() - last["validation_accuracy"].to_numpy()).mean())
    text = (
        f"After {int(last['epoch'].max())} epochs validation accuracy is "
        f"{_span(last['validation_accuracy'].tolist())} and training accuracy "
        f"{formats.points(abs(gap))} points {'higher' if gap >= 0 else 'lower'} (measured during "
        "the last epoch, on augmented images where there is augmentation)"
    )
    if lost < 0.001:
        return f"{text}; no earlier epoch was better by more than 0.1 points."
    return (
        f"{text}; the best epoch on validation data was {formats.points(lost)} points better, but "
        "the last one counts: nobody picks an epoch afterwards."
    )


def _span(values: list[float]) -> str:
    if len(values) == 1:
        return formats.percent(values[0])
    return f"{formats.percent(min(values))} to {formats.percent(max(values))}"


def training_figures(data: pd.DataFrame, *, alone: bool = False) -> tuple[str, ...]:
    """Loss, accuracy and learning rate of the winner, and accuracy of all that were verified.

    Args:
        data: See `training_data`.
        alone: There is one configuration, so nothing was won.
    """
    whose = "" if alone else "winner: "
    own = winners_rows(data)
    if own.empty:
        return ()
    panels = []
    with drawing():
        for what, title in (("loss", "loss"), ("accuracy", "accuracy")):
            figure, axes = canvas(bottom=0.42)
            for role, part in (("blue", "train"), ("vermillion", "validation")):
                _lines(axes, own, f"{part}_{what}", role)
            _epochs(axes, f"{whose}{title} by epoch")
            if what == "accuracy":
                percent_axis(axes)
            panels.append(
                inline(
                    figure,
                    key=f"training-{what}",
                    title=f"{whose}{title} by epoch".capitalize(),
                    description=f"Training and validation, {own['job_id'].nunique()} seeds.",
                )
            )
        rates = finite(own, "learning_rate")
        rates = rates[rates["learning_rate"] > 0]
        if not rates.empty:
            figure, axes = canvas(left=0.56, bottom=0.42)
            one = rates[rates["job_id"] == rates["job_id"].iloc[0]]
            _draw(axes, one, "learning_rate", "green", "-", 1.4)
            low, high = float(one["learning_rate"].min()), float(one["learning_rate"].max())
            if 10 <= high / low <= 1e4:  # beyond that it ends at zero, which has no logarithm
                log_axis(axes, "y", low / 1.5, high * 1.5)
            _epochs(axes, "learning rate at the end of an epoch")
            panels.append(
                inline(
                    figure,
                    key="training-rate",
                    title=f"{whose}learning rate by epoch".capitalize(),
                    description=f"From {formats.number(one['learning_rate'].iloc[0])} to "
                    f"{formats.number(one['learning_rate'].iloc[-1])}; the highest is "
                    f"{formats.number(high)}.",
                )
            )
        if not alone:
            panels.append(_all(data))
    return tuple(panels)


def _all(data: pd.DataFrame) -> str:
    """Validation accuracy of every full training, the winner's in front."""
    figure, axes = canvas(bottom=0.42)
    for _, curve in data.sort_values("winner", kind="stable").groupby("job_id", sort=False):
        won = bool(curve["winner"].iloc[0])
        dash = DASHES[(int(curve["number"].iloc[0]) - 1) % len(DASHES)]
        _draw(
            axes,
            curve,
            "validation_accuracy",
            "vermillion" if won else "faint",
            dash,
            1.4 if won else 0.9,
        )
    _epochs(axes, "validation accuracy, all verified")
    percent_axis(axes)
    return inline(
        figure,
        key="training-all",
        title="Validation accuracy of every full training",
        description=f"{data['trial_id'].nunique()} configurations, the winner in front.",
    )


def _lines(axes: Axes, own: pd.DataFrame, column: str, role: str) -> None:
    for _, curve in own.groupby("job_id", sort=False):
        dash = DASHES[(int(curve["number"].iloc[0]) - 1) % len(DASHES)]
        _draw(axes, curve, column, role, dash, 1.2)


def _draw(
    axes: Axes, curve: pd.DataFrame, column: str, role: str, dash: object, width: float
) -> None:
    known = finite(curve, column)
    x, y = known["epoch"].tolist(), known[column].tolist()
    axes.plot(x, y, color=LIGHT[role], linestyle=dash, linewidth=width)
    if len(x) == 1:
        axes.plot(x, y, "o", color=LIGHT[role], markersize=3.5)


def _epochs(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="y")


def rate_range(data: pd.DataFrame) -> tuple[float, float]:
    """Highest learning rate of the winner's first training and that at its end; NaN without."""
    own = finite(winners_rows(data), "learning_rate")
    rates = own[own["number"] == 1]["learning_rate"].tolist()
    return (max(rates), rates[-1]) if rates else (math.nan, math.nan)
