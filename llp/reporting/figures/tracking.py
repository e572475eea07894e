"""One training epoch by epoch, and its curvature from the callback `curvature`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llp.records import CurvePoint
from llp.reporting import formats
from llp.reporting.palette import LIGHT, MARKERS, SERIES
from llp.reporting.pictures import Picture
from llp.reporting.svg import canvas, percent_axis
from llp.reporting.tables import finite

DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))


def curve_data(points: Sequence[CurvePoint]) -> pd.DataFrame:
    """One row an epoch, with the fields of `CurvePoint` as columns."""
    return pd.DataFrame([dataclasses.asdict(point) for point in points])


def curve_reading(data: pd.DataFrame) -> str:
    """Where the training ended."""
    last = data.iloc[-1]
    return (
        f"After {formats.plural(int(last['epoch']), 'epoch')}: training loss "
        f"{formats.number(last['train_loss'], 3)} (as optimised, with augmentation), validation "
        f"loss {formats.number(last['validation_loss'], 3)}, validation accuracy "
        f"{formats.percent(last['validation_accuracy'])}."
    )


def curve_pictures(data: pd.DataFrame) -> tuple[Picture, ...]:
    """Loss and accuracy by epoch."""
    made = []
    for what in ("loss", "accuracy"):
        figure, axes = canvas(bottom=0.42, left=0.56)
        for part, role, dash in (
            ("train", "blue", "-"),
            ("validation", "vermillion", (0, (4, 1.5))),
        ):
            known = finite(data, f"{part}_{what}")
            axes.plot(
                known["epoch"].to_numpy(),
                known[f"{part}_{what}"].to_numpy(),
                color=LIGHT[role],
                linestyle=dash,
                marker="o" if len(known) < 3 else "",
                markersize=3.5,
            )
        _finish(axes, f"{what} by epoch")
        if what == "accuracy":
            percent_axis(axes)
        described = f"Training and validation, {len(data)} epochs."
        made.append(Picture(f"training-{what}", f"{what} by epoch".capitalize(), described, figure))
    return tuple(made)


def curvature_data(observations: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row an observation of the callback `curvature`.

    Columns: `job_id`, `epoch`, `gradient_norm`, `trace`, `trace_standard_error`, `eigenvalue_1`,
    `residual_1`, ..., `samples`, `seconds`, `note`. A name that was not measured is left out.
    """
    rows = [
        {
            "job_id": seen["job_id"],
            "epoch": seen["epoch"],
            **seen["values"],
            "samples": seen["samples"],
            "seconds": seen["seconds"],
            "note": seen["note"],
        }
        for seen in observations
        if seen["callback"] == "curvature"
    ]
    return pd.DataFrame(rows)


def curvature_reading(data: pd.DataFrame) -> str:
    """What happened to the largest eigenvalue, and what looking cost."""
    if data.empty or "eigenvalue_1" not in data:
        return "Curvature was not tracked."
    parts = []
    for _, own in finite(data, "eigenvalue_1").groupby("job_id", sort=False):
        first, last = own.iloc[0], own.iloc[-1]
        parts.append(
            f"{formats.number(first['eigenvalue_1'], 3)} after epoch {int(first['epoch'])} and "
            f"{formats.number(last['eigenvalue_1'], 3)} after epoch {int(last['epoch'])}"
        )
    seconds = formats.duration(float(data["seconds"].sum()))
    seen = f" The largest Hessian eigenvalue by size: {'; '.join(parts)}." if parts else ""
    return f"{formats.plural(len(data), 'look')} took {seconds}.{seen}".strip()


def curvature_pictures(data: pd.DataFrame) -> tuple[Picture, ...]:
    """Eigenvalues, trace and gradient norm by epoch, one dash a job."""
    made = []
    names = [name for name in data.columns if name.startswith("eigenvalue_")]
    for key, columns, title in (
        ("eigenvalues", names, "largest Hessian eigenvalues"),
        ("trace", ["trace"], "Hessian trace"),
        ("gradient", ["gradient_norm"], "gradient norm"),
    ):
        present = [name for name in columns if name in data]
        if not present:
            continue
        figure, axes = canvas(bottom=0.42, left=0.56)
        for number, (_, own) in enumerate(data.groupby("job_id", sort=False)):
            for place, name in enumerate(present):
                known = finite(own, name)
                error = (
                    known["trace_standard_error"].fillna(0.0).to_numpy()
                    if name == "trace"
                    else None
                )
                axes.errorbar(
                    known["epoch"].to_numpy(),
                    known[name].to_numpy(),
                    yerr=error,
                    color=LIGHT[SERIES[place % len(SERIES)]],
                    linestyle=DASHES[number % len(DASHES)],
                    marker=MARKERS[place % len(MARKERS)],
                    markersize=3.5,
                    elinewidth=0.8,
                )
        _finish(axes, f"{title} by epoch")
        made.append(
            Picture(
                f"curvature-{key}",
                f"{title} during training",
                f"{len(data)} looks at {data['job_id'].nunique()} trainings.",
                figure,
            )
        )
    return tuple(made)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: formats.number(v, 3)))
    axes.grid(axis="y")
