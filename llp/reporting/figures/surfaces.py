"""A loss surface as heat map, contour lines and relief, all three from one array.

A stored surface has `loss[i, j]` at `(x[i], y[j])`: its first index runs along the first direction.
Pictures want rows along y. `mesh` turns it once, and every picture is made from what it returns, so
that they cannot disagree about which axis is which. Losses that span more than a factor of
`LOG_RATIO` are shown by their logarithm, in all three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llp.reporting import formats
from llp.reporting.palette import LIGHT
from llp.reporting.pictures import Picture
from llp.reporting.svg import canvas

Array = np.ndarray[Any, Any]
What = Literal["loss", "metric", "robust"]

SIZE = (3.5, 3.0)
COLOURS = "viridis"
LOG_RATIO = 20.0
NUM_LEVELS = 11
MAX_TICKS = 7


@dataclass(frozen=True)
class SurfaceData:
    """One surface as it is drawn.

    Attributes:
        name: Of the part: `surface/random`.
        x: Coordinates along the first direction `[n]`.
        y: Coordinates along the second `[m]`.
        loss: `[n, m]`, as stored.
        metric: Accuracy `[n, m]`, or None.
        robust: Loss in the worst point of a ball `[n, m]`, or None.
        exact: Which cells were evaluated and not interpolated `[n, m]`.
        base_loss: Loss of the model itself.
        base_metric: Its accuracy.
        labels: What the two directions are.
        norms: Their lengths.
        has_base: Whether (0, 0) is the model itself.
        cap: Losses above are cut in pictures; None for none.
        numbers: All numbers of the part, by field.
    """

    name: str
    x: Array
    y: Array
    loss: Array
    metric: Array | None
    robust: Array | None
    exact: Array
    base_loss: float
    base_metric: float
    labels: tuple[str, str]
    norms: tuple[float, float]
    has_base: bool
    cap: float | None
    numbers: Mapping[str, Any]

    def mesh(self, what: What = "loss") -> tuple[Array, Array, Array]:
        """X, Y and the values `[m, n]`, rows along y: turned here and nowhere else; losses capped.

        Raises:
            ValueError: The surface has no such values.
        """
        values = getattr(self, what)
        if values is None:
            raise ValueError(f"{self.name} has no {what}")
        across, up = np.meshgrid(self.x, self.y)
        turned = values.T.astype(float)
        if self.cap is not None and what != "metric":
            turned = np.minimum(turned, self.cap)
        return across, up, turned

    @property
    def lowest(self) -> tuple[float, float, float]:
        """Coordinates and loss of the lowest cell; of the first when none is finite."""
        known = np.where(np.isfinite(self.loss), self.loss, np.inf)
        i, j = np.unravel_index(int(np.argmin(known)), known.shape)
        return float(self.x[i]), float(self.y[j]), float(self.loss[i, j])


def surface_data(
    values: Mapping[str, Any],
    arrays: Mapping[str, Array],
    name: str,
    *,
    cap: float | None = None,
) -> SurfaceData:
    """The surface of the part `name` from the results.

    Raises:
        KeyError: There is none.
    """
    own = {k.removeprefix(f"{name}/"): v for k, v in values.items() if k.startswith(f"{name}/")}
    metric = arrays.get(f"{name}/metric")
    return SurfaceData(
        name=name,
        x=arrays[f"{name}/x"],
        y=arrays[f"{name}/y"],
        loss=arrays[f"{name}/loss"],
        metric=metric,
        robust=arrays.get(f"{name}/robust"),
        exact=arrays.get(f"{name}/exact", np.ones(arrays[f"{name}/loss"].shape, dtype=bool)),
        base_loss=_number(own.get("base_loss")),
        base_metric=_number(own.get("base_metric")),
        labels=(str(own.get("label_1", "x")), str(own.get("label_2", "y"))),
        norms=(_number(own.get("norm_1")), _number(own.get("norm_2"))),
        has_base=own.get("direction_kind") != "random_base",
        cap=cap,
        numbers=own,
    )


class Scale:
    """How losses are coloured and written: as they are, or by their logarithm."""

    def __init__(self, *values: Array) -> None:
        finite = np.concatenate([part[np.isfinite(part)].ravel() for part in values])
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        self.log = low > 0 and high / low > LOG_RATIO
        self.low, self.high = self.of(np.asarray(low)).item(), self.of(np.asarray(high)).item()
        if self.low == self.high:
            self.high = self.low + 1.0
        self.norm = Normalize(self.low, self.high)

    def of(self, values: Array) -> Array:
        """What is drawn for these losses; not a number where there is none."""
        plain = np.where(np.isfinite(values), values, np.nan)
        if not self.log:
            return plain
        return np.log10(np.where(plain > 0, plain, np.nan))

    def text(self, drawn: float, _position: int | None = None) -> str:
        """The loss at a drawn value."""
        return formats.number(10.0**drawn if self.log else drawn, 3)

    def ticks(self) -> list[float]:
        """Where round losses are drawn: 1, 2, 5 times powers of ten on a logarithmic scale."""
        if not self.log:
            found = MaxNLocator(nbins=6).tick_values(self.low, self.high)
            return [float(tick) for tick in found if self.low <= tick <= self.high]
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            marks = [d + math.log10(factor) for d in decades for factor in factors]
            marks = [mark for mark in marks if self.low <= mark <= self.high]
            if len(marks) <= MAX_TICKS:
                return marks
        return marks[:: -(-len(marks) // MAX_TICKS)]

    def levels(self, count: int = NUM_LEVELS) -> Array:
        """Where contour lines run: denser towards the bottom, where networks live."""
        shares = np.linspace(0.0, 1.0, count + 2)[1:-1]
        if not self.log:
            shares = shares**1.6
        levels: Array = self.low + shares * (self.high - self.low)
        return levels


def surface_pictures(data: SurfaceData) -> tuple[Picture, ...]:
    """Heat map, contour lines and relief of the loss, and a heat map of the accuracy."""
    key = data.name.replace("/", "-").replace("_", "-")
    where = f"{data.labels[0]} across, {data.labels[1]} up"
    low_x, low_y, lowest = data.lowest
    seen = (
        f"{where}. The model has a loss of {formats.number(data.base_loss)}; the lowest cell, at "
        f"({formats.number(low_x, 3)}, {formats.number(low_y, 3)}), {formats.number(lowest)}."
    )
    made = [
        Picture(f"{key}-heat", f"Loss on {_plane(data)}: heat map", seen, heat_map(data)),
        Picture(f"{key}-contour", f"Loss on {_plane(data)}: contour lines", seen, contour(data)),
        Picture(f"{key}-relief", f"Loss on {_plane(data)}: relief", seen, relief(data)),
    ]
    if data.metric is not None:
        made.append(
            Picture(
                f"{key}-accuracy",
                f"Accuracy on {_plane(data)}",
                f"{where}. The model has {formats.percent(data.base_metric)}.",
                heat_map(data, "metric"),
            )
        )
    return tuple(made)


def robust_pictures(data: SurfaceData) -> tuple[Picture, ...]:
    """The robust loss with the colours of the plain one, and what it adds."""
    assert data.robust is not None
    key = data.name.replace("/", "-").replace("_", "-")
    scale = Scale(data.mesh("loss")[2], data.mesh("robust")[2])
    figure, axes = plane_canvas()
    across, up, values = data.mesh("robust")
    _image(
        figure, axes, across, up, values - data.mesh("loss")[2], Scale(values * np.nan), plain=True
    )
    frame(axes, data, "robust minus plain loss")
    return (
        Picture(
            f"{key}-plain",
            f"Loss on {_plane(data)}, colours shared with the robust loss",
            "The loss as it is.",
            heat_map(data, "loss", scale, title="loss"),
        ),
        Picture(
            f"{key}-robust",
            f"Loss in the worst point of a ball, on {_plane(data)}",
            f"Radius {formats.number(data.numbers.get('rho'))}; same colours as the plain loss.",
            heat_map(data, "robust", scale, title="robust loss"),
        ),
        Picture(
            f"{key}-added",
            f"What the ball adds to the loss, on {_plane(data)}",
            "Robust minus plain loss; never below 0.",
            figure,
        ),
    )


def heat_map(
    data: SurfaceData, what: What = "loss", scale: Scale | None = None, *, title: str = ""
) -> Figure:
    """Every value as a coloured cell around its coordinates."""
    figure, axes = plane_canvas()
    across, up, values = data.mesh(what)
    _image(figure, axes, across, up, values, scale or Scale(values), share=what == "metric")
    frame(axes, data, title or ("accuracy" if what == "metric" else "heat map"))
    return figure


def contour(data: SurfaceData) -> Figure:
    """Lines of equal loss, labelled."""
    figure, axes = plane_canvas()
    draw_contours(axes, data)
    frame(axes, data, "contour lines")
    return figure


def draw_contours(axes: Axes, data: SurfaceData, *, labels: bool = True) -> Scale:
    """The contour lines of the loss in these axes."""
    across, up, values = data.mesh("loss")
    scale = Scale(values)
    drawn = scale.of(values)
    if (
        min(values.shape) < 2
        or not np.isfinite(drawn).any()
        or np.nanmax(drawn) == np.nanmin(drawn)
    ):
        axes.text(0.5, 0.5, "flat: no lines", transform=axes.transAxes, ha="center")
        return scale
    lines = axes.contour(
        across, up, drawn, levels=scale.levels(), cmap=COLOURS, norm=scale.norm, linewidths=1.1
    )
    if labels:
        axes.clabel(
            lines, list(scale.levels())[::2], fmt=scale.text, fontsize=6.5, colors=LIGHT["ink"]
        )
    return scale


def relief(data: SurfaceData) -> Figure:
    """The surface in space, seen from the front left, low x to the left and low y in front."""
    figure = Figure(figsize=SIZE)
    axes: Any = figure.add_axes((0.0, 0.09, 0.94, 0.91), projection="3d")
    across, up, values = data.mesh("loss")
    scale = Scale(values)
    drawn = scale.of(values)
    colours = colormaps[COLOURS](scale.norm(np.nan_to_num(drawn, nan=scale.high)))
    axes.plot_surface(
        across,
        up,
        drawn,
        facecolors=colours,
        rstride=1,
        cstride=1,
        linewidth=0,
        antialiased=True,
        shade=False,
        rasterized=True,
    )
    if data.has_base:
        height = scale.of(np.asarray(data.base_loss)).item()
        axes.plot([0], [0], [height], "o", color=LIGHT["vermillion"], markersize=4, zorder=10)
    axes.view_init(elev=32, azim=-60)
    axes.set_xlabel(formats.short(data.labels[0], 24), labelpad=-4)
    axes.set_ylabel(formats.short(data.labels[1], 24), labelpad=-4)
    marks = scale.ticks()
    axes.set_zticks(marks, [scale.text(mark) for mark in marks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
        axis._axinfo["grid"].update(color=LIGHT["rule"], linewidth=0.5)
    axes.tick_params(pad=-2, labelsize=6.5)
    axes.set_title("relief", x=0.06, y=0.98)
    figure.set_dpi(150)
    return figure


def _image(
    figure: Figure,
    axes: Axes,
    across: Array,
    up: Array,
    values: Array,
    scale: Scale,
    *,
    share: bool = False,
    plain: bool = False,
) -> None:
    """Cells around their coordinates: the outer ones reach half a cell beyond the grid."""
    if plain:
        finite = values[np.isfinite(values)]
        drawn, norm = values, Normalize(0.0, float(finite.max()) if len(finite) else 1.0)
    elif share:
        drawn, norm = values, Normalize(0.0, 1.0)
    else:
        drawn, norm = scale.of(values), scale.norm
    found = axes.imshow(
        drawn,
        origin="lower",
        extent=(*_reach(across[0]), *_reach(up[:, 0])),
        aspect="auto",
        cmap=COLOURS,
        norm=norm,
        interpolation="none",
    )
    place = axes.get_position()
    beside = figure.add_axes((place.x1 + 0.02, place.y0, 0.035, place.height))
    bar = figure.colorbar(found, cax=beside)
    bar.outline.set_visible(False)
    if share:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: formats.percent(v, 0)))
    elif plain:
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=6))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: formats.number(v, 3)))
    else:
        marks = scale.ticks()
        bar.set_ticks(marks, labels=[scale.text(mark) for mark in marks])
    bar.ax.tick_params(length=2)


def frame(axes: Axes, data: SurfaceData, title: str) -> None:
    """Title, labels and limits of a plane, and its base point."""
    axes.set_title(title)
    axes.set_xlim(*_reach(data.x))
    axes.set_ylim(*_reach(data.y))
    axes.set_xlabel(_short(data.labels[0]))
    axes.set_ylabel(_short(data.labels[1]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    for value in (axes.xaxis, axes.yaxis):
        value.set_major_formatter(FuncFormatter(lambda v, _: formats.number(v, 3)))
    if data.has_base:
        mark_base(axes)


def plane_canvas() -> tuple[Figure, Axes]:
    """An empty figure whose axes are the same for every picture of a plane, with room for a key."""
    return canvas(SIZE, left=0.6, right=0.78, bottom=0.45)


def _reach(axis: Array) -> tuple[float, float]:
    """From half a cell before the first coordinate to half a cell after the last."""
    half = (float(axis[-1]) - float(axis[0])) / (len(axis) - 1) / 2
    return float(axis[0]) - half, float(axis[-1]) + half


def mark_base(axes: Axes, x: float = 0.0, y: float = 0.0) -> None:
    """The model itself: a cross that can be seen on every colour."""
    axes.plot([x], [y], "X", color="white", mec="black", mew=0.7, markersize=6.5, zorder=9)


def _plane(data: SurfaceData) -> str:
    return data.name.rpartition("/")[2].replace("_", " ") + " plane"


def _short(label: str) -> str:
    return formats.short(label, 40)


def _number(value: Any) -> float:
    return float(value) if formats.is_number(value) else float("nan")
