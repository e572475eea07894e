"""Layer by layer: ranks of features and weights, and units that have stopped working."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llp.reporting import formats
from llp.reporting.palette import LIGHT
from llp.reporting.pictures import Picture
from llp.reporting.svg import canvas, percent_axis


def rank_data(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a layer in the order of the network.

    Columns: `layer`, the ranks, and `possible`: the largest rank that its matrix could have.
    """
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        return frame
    frame["layer"] = range(1, len(frame) + 1)
    frame["possible"] = frame[["num_rows", "num_columns"]].min(axis=1)
    return frame


def rank_pictures(data: pd.DataFrame, measure: str, what: str) -> tuple[Picture, ...]:
    """A rank from the first layer to the last, and what would be possible."""
    if data.empty or measure not in data:
        return ()
    figure, axes = canvas(bottom=0.42, left=0.5)
    axes.plot(data["layer"], data["possible"], color=LIGHT["faint"], linestyle=(0, (4, 1.5)))
    axes.plot(data["layer"], data[measure], color=LIGHT["blue"], marker="o", markersize=3.5)
    axes.set_ylim(bottom=0)
    _finish(axes, f"{measure} rank of {what}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: formats.number(v, 3)))
    return (
        Picture(
            f"ranks-{what}",
            f"{measure} rank of {what} from the first layer to the last",
            f"{len(data)} layers; dashed: the largest rank possible.",
            figure,
        ),
    )


def unit_data(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row an activation: `site`, and the shares `dead`, `saturated` and `dormant`."""
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        return frame
    frame["site"] = range(1, len(frame) + 1)
    for kind in ("dead", "saturated", "dormant"):
        frame[kind] = frame[f"num_{kind}"] / frame["num_units"]
    return frame


def unit_pictures(data: pd.DataFrame) -> tuple[Picture, ...]:
    """Shares of dead, saturated and dormant units over depth."""
    if data.empty:
        return ()
    figure, axes = canvas(bottom=0.42)
    for kind, role, dash, mark in (
        ("dormant", "blue", "-", "o"),
        ("dead", "vermillion", (0, (4, 1.5)), "s"),
        ("saturated", "green", (0, (1, 1)), "^"),
    ):
        axes.plot(
            data["site"],
            data[kind],
            color=LIGHT[role],
            linestyle=dash,
            marker=mark,
            markersize=3.5,
        )
    axes.set_ylim(0, max(0.05, float(data[["dormant", "dead", "saturated"]].max().max()) * 1.1))
    percent_axis(axes)
    _finish(axes, "units that do nothing", label="activation")
    return (
        Picture(
            "units",
            "Dead, saturated and dormant units from the first activation to the last",
            f"{len(data)} activations.",
            figure,
        ),
    )


def _finish(axes: Axes, title: str, label: str = "layer") -> None:
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(axis="y")
