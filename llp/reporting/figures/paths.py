"""Losses along one coordinate: lines, the path of a training, a connecting curve, the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llp.reporting import formats
from llp.reporting.figures.surfaces import (
    COLOURS,
    Scale,
    SurfaceData,
    draw_contours,
    frame,
    mark_base,
    plane_canvas,
)
from llp.reporting.palette import LIGHT
from llp.reporting.pictures import Picture
from llp.reporting.svg import canvas, log_axis, percent_axis

Array = np.ndarray[Any, Any]
LOG_RATIO = 50.0


# Lines


def line_data(values: Mapping[str, Any], arrays: Mapping[str, Array], name: str) -> pd.DataFrame:
    """One row a point of the line `name`.

    Columns: `x`, `loss`, `metric` and `robust` where measured, and for a line along an eigenvector
    `parabola`: the base loss with the slope there and the eigenvalue's curvature.
    """
    x, loss = arrays[f"{name}/x"], arrays[f"{name}/loss"]
    columns = {"x": x, "loss": loss}
    for what in ("metric", "robust"):
        if f"{name}/{what}" in arrays:
            columns[what] = arrays[f"{name}/{what}"]
    curvature = values.get(f"{name}/value_1")
    if (
        str(values.get(f"{name}/direction_kind", "")).startswith("hessian")
        and curvature is not None
    ):
        base = float(values[f"{name}/base_loss"])
        near = np.argsort(np.abs(x))[1:3]
        slope = float((loss[near[0]] - loss[near[1]]) / (x[near[0]] - x[near[1]]))
        columns["parabola"] = base + slope * x + float(curvature) / 2 * x**2
    return pd.DataFrame(columns)


def line_pictures(data: pd.DataFrame, values: Mapping[str, Any], name: str) -> tuple[Picture, ...]:
    """The loss along a line, and the accuracy where it was measured."""
    key = name.replace("/", "-").replace("_", "-")
    label = str(values.get(f"{name}/label_1", values.get(f"{name}/label", "")))
    figure, axes = canvas(bottom=0.42, left=0.56)
    x = data["x"].to_numpy()
    axes.plot(x, data["loss"], color=LIGHT["blue"], linewidth=1.4)
    if "robust" in data:
        axes.plot(x, data["robust"], color=LIGHT["vermillion"], linestyle=(0, (4, 1.5)))
    finite = data["loss"][np.isfinite(data["loss"])]
    if "parabola" in data and len(finite):
        inside = (data["parabola"] <= finite.max()) & (data["parabola"] >= finite.min())
        axes.plot(x, data["parabola"].where(inside), color=LIGHT["muted"], linestyle=(0, (1, 1.2)))
    _log_if_wide(axes, finite.to_numpy())
    base = values.get(f"{name}/base_loss")
    if base is not None and formats.is_number(base):
        axes.plot(
            [0], [float(base)], "X", color=LIGHT["ink"], mec=LIGHT["page"], mew=0.6, markersize=6
        )
    _finish(axes, f"loss: {formats.short(label, 34)}", "coordinate")
    made = [
        Picture(
            f"{key}-loss",
            f"Loss along {label}",
            f"{len(data)} points; the model, at 0, has {formats.number(base)}.",
            figure,
        )
    ]
    if "metric" in data:
        figure, axes = canvas(bottom=0.42)
        axes.plot(x, data["metric"], color=LIGHT["green"], linewidth=1.4)
        here = values.get(f"{name}/base_metric")
        if here is not None and formats.is_number(here):
            axes.plot([0], [float(here)], "X", color=LIGHT["ink"], mec=LIGHT["page"], mew=0.6, ms=6)
        _finish(axes, f"accuracy: {formats.short(label, 30)}", "coordinate")
        percent_axis(axes)
        described = f"The model has {formats.percent(here)}."
        made.append(Picture(f"{key}-accuracy", f"Accuracy along {label}", described, figure))
    return tuple(made)


# The path of a training


def path_data(arrays: Mapping[str, Array]) -> pd.DataFrame:
    """One row a checkpoint of the trajectory.

    Columns: `epoch`, `x`, `y` in the plane, `loss` and `metric` of the checkpoint itself,
    `plane_loss` under its projection, `out_of_plane` and `distance` from the model.
    """
    columns = {
        "epoch": arrays["trajectory/epoch"],
        "x": arrays["trajectory/coordinates"][:, 0],
        "y": arrays["trajectory/coordinates"][:, 1],
    }
    for what in ("loss", "metric", "plane_loss", "out_of_plane", "distance"):
        if f"trajectory/{what}" in arrays:
            columns[what] = arrays[f"trajectory/{what}"]
    return pd.DataFrame(columns)


def path_pictures(
    data: pd.DataFrame, surface: SurfaceData | None, labels: tuple[str, str]
) -> tuple[Picture, ...]:
    """The path in its plane with true losses, and how far plane and truth are apart."""
    described = (
        f"{len(data)} checkpoints; the marks have the colour of the checkpoint's own loss, not of "
        "the plane beneath it."
    )
    figure, axes = plane_canvas()
    scale = Scale(data["loss"].to_numpy())
    if surface is not None:
        scale = draw_contours(axes, surface, labels=False)
        frame(axes, surface, "the path on its plane")
    else:
        _finish(axes, "the path in its plane", labels[0])
        axes.set_ylabel(formats.short(labels[1], 34))
    axes.plot(data["x"], data["y"], color=LIGHT["ink"], linewidth=0.8, zorder=5)
    axes.scatter(
        data["x"],
        data["y"],
        c=scale.of(data["loss"].to_numpy()),
        cmap=COLOURS,
        norm=scale.norm,
        s=22,
        edgecolors=LIGHT["ink"],
        linewidths=0.6,
        zorder=6,
    )
    _tell_checkpoints(axes, data)
    if surface is None:
        mark_base(axes)
    made = [Picture("trajectory-path", "The path of the training in its plane", described, figure)]
    figure, axes = canvas(bottom=0.42, left=0.56)
    axes.plot(data["epoch"], data["loss"], color=LIGHT["blue"], marker="o", markersize=3)
    axes.plot(
        data["epoch"],
        data["plane_loss"],
        color=LIGHT["vermillion"],
        linestyle=(0, (4, 1.5)),
        marker="s",
        markersize=3,
    )
    both = np.concatenate([data["loss"], data["plane_loss"]])
    _log_if_wide(axes, both)
    _finish(axes, "loss by epoch", "epoch", whole=True)
    made.append(
        Picture(
            "trajectory-loss",
            "True loss of every checkpoint and the plane's loss beneath it",
            "Where the two differ, the plane does not show what the training saw.",
            figure,
        )
    )
    figure, axes = canvas(bottom=0.42, left=0.5)
    axes.plot(data["epoch"], data["distance"], color=LIGHT["blue"], marker="o", markersize=3)
    axes.plot(
        data["epoch"],
        data["out_of_plane"],
        color=LIGHT["vermillion"],
        linestyle=(0, (4, 1.5)),
        marker="s",
        markersize=3,
    )
    axes.set_ylim(bottom=0)
    _finish(axes, "distance by epoch", "epoch", whole=True)
    made.append(
        Picture(
            "trajectory-distance",
            "Distance of every checkpoint from the model and from the plane",
            "In weight space.",
            figure,
        )
    )
    return tuple(made)


def _tell_checkpoints(axes: Axes, data: pd.DataFrame) -> None:
    """Epoch, true loss and distance from the plane at the start, about the middle and the end."""
    rows = data.to_dict("records")
    chosen = [rows[index] for index in sorted({0, len(rows) // 2})]
    highest = max(chosen, key=lambda row: row["y"])
    for row in chosen:  # above the upper mark and below the lower one, so that they do not meet
        text = (
            f"epoch {int(row['epoch'])}: loss {formats.number(row['loss'], 3)}, "
            f"off plane {formats.number(row['out_of_plane'], 2)}"
        )
        low, high = axes.get_xlim()
        right = row["x"] > (low + high) / 2
        axes.annotate(
            text,
            (row["x"], row["y"]),
            xytext=(-5 if right else 5, 6 if row is highest else -13),
            textcoords="offset points",
            fontsize=6.5,
            ha="right" if right else "left",
            zorder=8,
        )


# Connectivity


@dataclass(frozen=True)
class ConnectionData:
    """The straight path and the trained curve, one row a point each, with their barriers."""

    linear: pd.DataFrame
    curve: pd.DataFrame
    barriers: tuple[float, float]


def connection_data(values: Mapping[str, Any], arrays: Mapping[str, Array]) -> ConnectionData:
    """Columns of both: `t`, `loss`, and `metric` where it was measured."""
    frames = []
    for name in ("linear", "curve"):
        columns = {
            what: arrays[f"connectivity/{name}/{what}"]
            for what in ("t", "loss", "metric")
            if f"connectivity/{name}/{what}" in arrays
        }
        frames.append(pd.DataFrame(columns))
    barriers = tuple(
        float(values.get(f"connectivity/{name}/barrier") or 0.0) for name in ("linear", "curve")
    )
    return ConnectionData(frames[0], frames[1], (barriers[0], barriers[1]))


def connection_pictures(data: ConnectionData) -> tuple[Picture, ...]:
    """Loss and accuracy from one network to the other."""
    described = (
        f"Barrier {formats.number(data.barriers[0], 3)} on the straight path and "
        f"{formats.number(data.barriers[1], 3)} on the trained curve."
    )
    figure, axes = canvas(bottom=0.42, left=0.56)
    _both(axes, data, "loss")
    both = np.concatenate([data.linear["loss"], data.curve["loss"]])
    _log_if_wide(axes, both)
    _finish(axes, "loss from one network to the other", "position t")
    made = [Picture("connectivity-loss", "Loss between two trainings", described, figure)]
    if "metric" in data.linear and "metric" in data.curve:
        figure, axes = canvas(bottom=0.42)
        _both(axes, data, "metric")
        _finish(axes, "accuracy from one to the other", "position t")
        percent_axis(axes)
        made.append(Picture("connectivity-accuracy", "Accuracy between two trainings", "", figure))
    return tuple(made)


def _both(axes: Axes, data: ConnectionData, what: str) -> None:
    axes.plot(
        data.linear["t"],
        data.linear[what],
        color=LIGHT["vermillion"],
        linestyle=(0, (4, 1.5)),
        marker="s",
        markersize=2.5,
    )
    axes.plot(data.curve["t"], data.curve[what], color=LIGHT["blue"], marker="o", markersize=2.5)
    ends = data.linear.iloc[[0, -1]]
    axes.plot(ends["t"], ends[what], "X", color=LIGHT["ink"], mec=LIGHT["page"], mew=0.6, ms=6)


# Along the gradient


def smoothness_data(values: Mapping[str, Any], arrays: Mapping[str, Array]) -> pd.DataFrame:
    """One row a step along the gradient, negative ones downhill.

    Columns: `step`, `loss`, `linear` (what the gradient alone predicts), `gradient_change` over the
    gradient's norm, `gradient_cosine`, `beta`.
    """
    steps = arrays["smoothness/steps"]
    norm = float(values["smoothness/gradient_norm"])
    change = arrays["smoothness/gradient_change"][0]
    distance = arrays["smoothness/distance"][0]
    return pd.DataFrame(
        {
            "step": steps,
            "loss": arrays["smoothness/loss"][0],
            "linear": float(values["smoothness/base_loss"]) + steps * norm**2,
            "gradient_change": change / norm,
            "gradient_cosine": arrays["smoothness/gradient_cosine"][0],
            "beta": change / distance,
        }
    )


def smoothness_pictures(data: pd.DataFrame) -> tuple[Picture, ...]:
    """Effective smoothness by step, downhill and uphill."""
    figure, axes = canvas(bottom=0.42, left=0.56)
    _two_ways(axes, data, "beta")
    _finish(axes, "effective smoothness by step", "step along the gradient")
    made = [
        Picture(
            "smoothness-beta",
            "Change of the gradient over the distance",
            "Largest curvature met along the gradient, downhill and uphill.",
            figure,
        )
    ]
    figure, axes = canvas(bottom=0.42, left=0.56)
    _two_ways(axes, data, "gradient_change", log=False)
    _finish(axes, "change of the gradient, relative", "step along the gradient")
    made.append(
        Picture(
            "smoothness-gradient",
            "Change of the gradient over its norm",
            "1 means that the gradient has changed by its own length.",
            figure,
        )
    )
    return tuple(made)


def _two_ways(axes: Axes, data: pd.DataFrame, column: str, *, log: bool = True) -> None:
    for down, role, dash, mark in (
        (True, "blue", "-", "o"),
        (False, "vermillion", (0, (4, 1.5)), "s"),
    ):
        part = data[(data["step"] < 0) == down]
        axes.plot(
            part["step"].abs(),
            part[column],
            color=LIGHT[role],
            linestyle=dash,
            marker=mark,
            markersize=4,
        )
    sizes = data["step"].abs()
    if sizes.min() < sizes.max():
        log_axis(axes, "x", float(sizes.min()) / 1.5, float(sizes.max()) * 1.5)
    if log:
        _log_if_wide(axes, data[column].to_numpy())


# Shared


def _log_if_wide(axes: Axes, values: Array) -> None:
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > LOG_RATIO:
        log_axis(axes, "y", float(finite.min()) / 1.4, float(finite.max()) * 1.4)


def _finish(axes: Axes, title: str, label: str, *, whole: bool = False) -> None:
    axes.set_title(title)
    axes.set_xlabel(formats.short(label, 40))
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: formats.number(v, 3)))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: formats.number(v, 3)))
    axes.grid(axis="y")


__all__ = [
    "ConnectionData",
    "connection_data",
    "connection_pictures",
    "line_data",
    "line_pictures",
    "path_data",
    "path_pictures",
    "smoothness_data",
    "smoothness_pictures",
]
