"""What TALT saw and did: valleys over the loss, spectra, norms, the transform, the path.

Everything but the landscape is made from the log of the optimizer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from llp.records import CurvePoint
from llp.reporting import formats
from llp.reporting.figures.surfaces import SurfaceData, draw_contours, frame, plane_canvas
from llp.reporting.optimizer_log import OptimizerLog
from llp.reporting.palette import LIGHT, SERIES
from llp.reporting.pictures import Picture
from llp.reporting.svg import canvas, log_axis, percent_axis

Array = np.ndarray[Any, Any]
MAX_DOTS = 1500
BINS = 60
MAX_ROWS, MAP_BINS = 28, 60
WIDE = (7.2, 2.3)


@dataclass(frozen=True)
class Valleys:
    """The valleys of a log, counted.

    Attributes:
        events: Updates of a tensor at which it was in a valley.
        updates: Updates of a tensor that were noted.
        tensors: Names of the tensors that were ever in one, most often first.
        share: Of the updates of each of these tensors.
    """

    events: int
    updates: int
    tensors: tuple[str, ...]
    share: tuple[float, ...]


def valleys(log: OptimizerLog) -> Valleys:
    """How often which tensors were in a valley."""
    inside = log.strength > 0
    share = inside.mean(axis=0)
    order = [int(k) for k in np.argsort(-share, kind="stable") if share[k] > 0]
    return Valleys(
        events=int(inside.sum()),
        updates=int(inside.size),
        tensors=tuple(log.names[k] for k in order),
        share=tuple(float(share[k]) for k in order),
    )


def reading(log: OptimizerLog) -> str:
    """How much happened, in a few sentences."""
    found = valleys(log)
    ratio = _ratio(log)
    text = (
        f"Of {formats.count(found.updates)} looks at {formats.plural(len(log.names), 'tensor')} "
        f"{formats.count(found.events)} found a valley "
        f"({formats.percent(found.events / max(found.updates, 1))})"
    )
    if found.tensors:
        text += f", most often {found.tensors[0]} ({formats.percent(found.share[0])} of its looks)"
    change = f"the middle half between {formats.number(np.nanquantile(ratio, 0.25), 3)} and "
    change += formats.number(np.nanquantile(ratio, 0.75), 3)
    return (
        f"{text}. After the transform the gradient is {formats.number(np.nanmedian(ratio), 3)} "
        f"times as long in the median, {change}."
    )


def tensor_table(log: OptimizerLog) -> pd.DataFrame:
    """One row a tensor: looks in a valley, strength there, what became of its gradient."""
    ratio = _ratio(log)
    rows = []
    for k, name in enumerate(log.names):
        inside = log.strength[:, k] > 0
        rows.append(
            {
                "tensor": name,
                "events": int(inside.sum()),
                "share": float(inside.mean()),
                "strength": float(log.strength[inside, k].mean()) if inside.any() else np.nan,
                "cosine": float(log.cosine[:, k].mean()),
                "ratio": float(np.nanmedian(ratio[:, k])),
                "alignment": float(np.median(log.alignment[:, k])),
                "eigenvalue": float(np.median(log.eigenvalues[:, k, 0])),
            }
        )
    return pd.DataFrame(rows)


def pictures(log: OptimizerLog, points: Sequence[CurvePoint]) -> tuple[Picture, ...]:
    """All that is drawn from the log and the learning curve; inside `svg.drawing()`."""
    return (
        _loss(log, points),
        _map(log),
        _spectra(log),
        _norms(log),
        _transform(log),
    )


def _ratio(log: OptimizerLog) -> Array:
    """Length after over length before `[U, T]`; NaN where there was no gradient."""
    before = np.where(log.gradient_norm > 0, log.gradient_norm, np.nan)
    ratio: Array = log.changed_norm / before
    return ratio


def _loss(log: OptimizerLog, points: Sequence[CurvePoint]) -> Picture:
    figure, axes = canvas(WIDE, left=0.56, right=0.6, bottom=0.42)
    counts = (log.strength > 0).mean(axis=1)
    edges = np.linspace(0, max(log.num_epochs, 1), min(BINS, max(len(log.steps), 1)) + 1)
    place = np.clip(np.digitize(log.epochs, edges) - 1, 0, len(edges) - 2)
    share = [float(counts[place == k].mean()) if (place == k).any() else 0.0
             for k in range(len(edges) - 1)]  # fmt: skip
    right = axes.twinx()
    right.bar(
        edges[:-1], share, width=np.diff(edges), align="edge", color=LIGHT["sky"], alpha=0.45,
        linewidth=0,
    )  # fmt: skip
    right.set_ylim(0, min(1.0, max(0.05, 1.3 * max(share, default=0.0))))
    percent_axis(right)
    right.set_ylabel("tensors in a valley")
    epochs = [point.epoch for point in points]
    axes.plot(epochs, [p.train_loss for p in points], color=LIGHT["blue"], marker="o", ms=2.5)
    axes.plot(
        epochs, [p.validation_loss for p in points], color=LIGHT["vermillion"],
        linestyle=(0, (4, 1.5)), marker="s", ms=2.5,
    )  # fmt: skip
    losses = [p.train_loss for p in points] + [p.validation_loss for p in points]
    losses = [value for value in losses if np.isfinite(value) and value > 0]
    if losses and max(losses) / min(losses) > 10:
        log_axis(axes, "y", min(losses) / 1.3, max(losses) * 1.3)
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    _finish(axes, "loss, and valleys seen")
    return Picture(
        "talt-loss", "Loss by epoch with the valleys that were seen",
        "Bars: share of tensors that were in a valley at that time.", figure,
    )  # fmt: skip


def _map(log: OptimizerLog) -> Picture:
    """Tensors from the input up, time to the right."""
    often = np.argsort(-(log.strength > 0).mean(axis=0), kind="stable")[:MAX_ROWS]
    rows = sorted(int(k) for k in often)
    count = len(rows)
    figure, axes = canvas((7.2, max(1.6, min(4.2, 0.5 + 0.13 * count))), left=1.9, bottom=0.42)
    edges = np.linspace(0, max(log.num_epochs, 1), min(MAP_BINS, max(len(log.steps), 1)) + 1)
    place = np.clip(np.digitize(log.epochs, edges) - 1, 0, len(edges) - 2)
    top = float(log.strength.max()) or 1.0
    for row, k in enumerate(rows):
        for column in range(len(edges) - 1):
            here = log.strength[place == column, k]
            strength = float(here.mean()) if len(here) else 0.0
            if strength > 0:
                axes.barh(
                    row,
                    float(edges[column + 1] - edges[column]),
                    left=float(edges[column]),
                    height=0.9,
                    align="center",
                    color=LIGHT["blue"],
                    alpha=min(1.0, 0.2 + 0.8 * strength / top),
                    linewidth=0,
                )
    axes.set_ylim(-0.6, count - 0.4)
    axes.set_xlim(0, max(log.num_epochs, 1))
    axes.set_yticks(range(count), [formats.short(log.names[k], 30) for k in rows])
    _finish(axes, "in a valley: which tensor, when")
    return Picture(
        "talt-valleys",
        "Which tensor was in a valley, and when",
        f"{count} of {len(log.names)} tensors, the input at the bottom; the darker, the stronger.",
        figure,
    )


def _spectra(log: OptimizerLog) -> Picture:
    figure, axes = canvas(left=0.6, bottom=0.42)
    low, high = np.inf, 0.0
    for k in range(log.eigenvalues.shape[2]):
        values = log.eigenvalues[:, :, k]
        middle = np.median(np.where(values > 0, values, np.nan), axis=1)
        known = np.isfinite(middle) & (middle > 0)
        if not known.any():
            continue
        colour = LIGHT[SERIES[k % len(SERIES)]]
        axes.plot(log.epochs[known], middle[known], color=colour, linewidth=1.1)
        if k == 0:
            band = np.nanquantile(np.where(values > 0, values, np.nan), [0.1, 0.9], axis=1)
            axes.fill_between(log.epochs, band[0], band[1], color=colour, alpha=0.15, linewidth=0)
            low, high = min(low, float(np.nanmin(band[0]))), max(high, float(np.nanmax(band[1])))
        low, high = min(low, float(middle[known].min())), max(high, float(middle[known].max()))
    if 0 < low < high:
        log_axis(axes, "y", low / 1.5, high * 1.5)
    _finish(axes, "eigenvalues of the gradients' covariance")
    return Picture(
        "talt-spectra", "Largest eigenvalues of the covariance of the gradients",
        "Median over tensors of each; the band holds 80 % of the tensors for the largest.", figure,
    )  # fmt: skip


def _norms(log: OptimizerLog) -> Picture:
    figure, axes = canvas(left=0.56, bottom=0.42)
    both = []
    for values, role, dash in (
        (log.gradient_norm, "blue", "-"),
        (log.changed_norm, "vermillion", (0, (4, 1.5))),
    ):
        total = np.sqrt((values**2).sum(axis=1))
        both.append(total)
        axes.plot(log.epochs, total, color=LIGHT[role], linestyle=dash, linewidth=0.9)
    known = np.concatenate(both)
    known = known[np.isfinite(known) & (known > 0)]
    if len(known) and known.max() / known.min() > 10:
        log_axis(axes, "y", float(known.min()) / 1.3, float(known.max()) * 1.3)
    _finish(axes, "gradient norm, raw and changed")
    return Picture(
        "talt-norms", "Norm of the gradient before and after the transform",
        "Over all tensors that TALT looks at, from their projections.", figure,
    )  # fmt: skip


def _transform(log: OptimizerLog) -> Picture:
    figure, axes = canvas(left=0.56, bottom=0.42)
    ratio, angle, inside = _ratio(log).ravel(), log.alignment.ravel(), (log.strength > 0).ravel()
    chosen = np.linspace(0, len(ratio) - 1, min(len(ratio), MAX_DOTS)).astype(int)
    for mask, role, mark in ((~inside, "faint", "o"), (inside, "vermillion", "^")):
        own = chosen[mask[chosen] & np.isfinite(ratio[chosen])]
        axes.scatter(ratio[own], angle[own], s=6, color=LIGHT[role], marker=mark, linewidths=0,
                     alpha=0.6)  # fmt: skip
    axes.axvline(1.0, color=LIGHT["muted"], linewidth=0.7, linestyle=(0, (1, 1.2)))
    axes.set_title("effect of the transform")
    axes.set_xlabel("length after / before")
    axes.set_ylabel("cosine with the raw gradient")
    axes.grid(axis="y")
    return Picture(
        "talt-transform", "Length and direction of the gradient after the transform",
        "One mark a look at a tensor; triangles were in a valley.", figure,
    )  # fmt: skip


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(axis="y")


# On the landscape


def per_checkpoint(log: OptimizerLog, epochs: Sequence[int]) -> Array:
    """Share of the looks since the checkpoint before that found a valley, for each checkpoint."""
    inside = (log.strength > 0).mean(axis=1)
    found, before = [], -1.0
    for epoch in epochs:
        here = (log.epochs > before) & (log.epochs <= epoch)
        found.append(float(inside[here].mean()) if here.any() else 0.0)
        before = float(epoch)
    return np.asarray(found)


def path_picture(log: OptimizerLog, path: pd.DataFrame, surface: SurfaceData | None) -> Picture:
    """The path in its plane; rings tell how many valleys were seen before each checkpoint."""
    figure, axes = plane_canvas()
    if surface is not None:
        draw_contours(axes, surface, labels=False)
        frame(axes, surface, "valleys on the landscape")
    else:
        axes.set_title("valleys on the path")
    axes.plot(path["x"], path["y"], color=LIGHT["ink"], linewidth=0.8, zorder=5)
    share = per_checkpoint(log, [int(epoch) for epoch in path["epoch"]])
    top = float(share.max()) or 1.0
    axes.scatter(
        path["x"], path["y"], s=8 + 130 * share / top, facecolors="none",
        edgecolors=LIGHT["vermillion"], linewidths=1.1, zorder=7,
    )  # fmt: skip
    axes.plot(path["x"], path["y"], ".", color=LIGHT["ink"], markersize=3, zorder=6)
    ends = [(k, f"epoch {int(path['epoch'].iloc[k])}") for k in (0, len(path) - 1)]
    for index, label in ends:
        axes.annotate(
            label, (path["x"].iloc[index], path["y"].iloc[index]), xytext=(5, 5),
            textcoords="offset points", fontsize=7, zorder=8,
        )  # fmt: skip
    return Picture(
        "talt-path", "Valleys on the path of the training",
        "The larger the ring, the more tensors were in a valley since the checkpoint before.",
        figure,
    )  # fmt: skip


def animation(path: pd.DataFrame, surface: SurfaceData | None, seconds: float = 8.0) -> Markup:
    """The path drawn from its start to its end, over and over, with the loss of each checkpoint.

    One `<svg>` element that a browser animates by itself (SMIL), without a script.
    """
    x, y = path["x"].to_numpy(dtype=float), path["y"].to_numpy(dtype=float)
    if surface is not None:
        box = (surface.x.min(), surface.x.max(), surface.y.min(), surface.y.max())
    else:
        box = (x.min(), x.max(), y.min(), y.max())
    width, height, edge = 360.0, 260.0, 14.0
    across = (width - 2 * edge) / max(box[1] - box[0], 1e-12)
    up = (height - 2 * edge) / max(box[3] - box[2], 1e-12)
    px, py = edge + (x - box[0]) * across, height - edge - (y - box[2]) * up
    route = "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in zip(px, py, strict=True))
    legs = np.hypot(np.diff(px), np.diff(py))
    total = float(legs.sum()) or 1.0
    times = np.linspace(0, 0.9, len(px))  # a tenth of the time it rests at the end
    covered = np.concatenate([[0.0], np.cumsum(legs)]) / total
    key_times = ";".join(f"{t:.4f}" for t in [*times, 1.0])
    key_points = ";".join(f"{c:.4f}" for c in [*covered, 1.0])
    offsets = ";".join(f"{total * (1 - c):.1f}" for c in [*covered, 1.0])
    duration = f"{seconds:g}s"
    cells = _cells(surface, box, (across, up), (edge, height - edge)) if surface is not None else ""
    captions = []
    for k in range(len(px)):
        text = f"epoch {int(path['epoch'].iloc[k])}: loss {formats.number(path['loss'].iloc[k], 3)}"
        shown = ";".join("1" if k == j else "0" for j in [*range(len(px)), len(px) - 1])
        start = 1 if k == 0 else 0
        captions.append(
            f'<text x="{edge}" y="{height + 14:.0f}" opacity="{start}" fill="var(--ink)" '
            f'style="font-size:11px">{escape(text)}<animate attributeName="opacity" '
            f'values="{shown}" keyTimes="{key_times}" calcMode="discrete" dur="{duration}" '
            f'repeatCount="indefinite"/></text>'
        )
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height + 22:.0f}" class="plot" '
        f'style="--width:{width:.0f}" role="img" aria-label="The path of the training, animated">'
        "<title>The path of the training, animated</title>"
        f"{cells}"
        f'<path d="{route}" fill="none" stroke="var(--faint)" stroke-width="0.8"/>'
        f'<path d="{route}" fill="none" stroke="var(--ink)" stroke-width="1.6" '
        f'stroke-dasharray="{total:.1f}" stroke-dashoffset="{total:.1f}">'
        f'<animate attributeName="stroke-dashoffset" values="{offsets}" keyTimes="{key_times}" '
        f'calcMode="linear" dur="{duration}" repeatCount="indefinite"/></path>'
        '<circle r="4.5" fill="var(--vermillion)" stroke="var(--page)">'
        f'<animateMotion path="{route}" keyPoints="{key_points}" keyTimes="{key_times}" '
        f'calcMode="linear" dur="{duration}" repeatCount="indefinite"/></circle>'
        f"{''.join(captions)}</svg>"
    )


def _cells(
    surface: SurfaceData,
    box: tuple[float, float, float, float],
    scale: tuple[float, float],
    corner: tuple[float, float],
) -> str:
    """The loss under the path as tinted rectangles, the darker the lower."""
    _, _, values = surface.mesh()
    known = values[np.isfinite(values) & (values > 0)]
    if not len(known):
        return ""
    low, high = float(np.log(known.min())), float(np.log(known.max()))
    wide = (box[1] - box[0]) / max(len(surface.x) - 1, 1) * scale[0]
    tall = (box[3] - box[2]) / max(len(surface.y) - 1, 1) * scale[1]
    made = []
    for j, y in enumerate(surface.y):
        for i, x in enumerate(surface.x):
            value = values[j, i]
            if not np.isfinite(value) or value <= 0:
                continue
            depth = (high - float(np.log(value))) / max(high - low, 1e-12)
            left = corner[0] + (float(x) - box[0]) * scale[0] - wide / 2
            top = corner[1] - (float(y) - box[2]) * scale[1] - tall / 2
            made.append(
                f'<rect x="{left:.2f}" y="{top:.2f}" width="{wide:.2f}" height="{tall:.2f}" '
                f'fill="var(--blue)" opacity="{0.06 + 0.5 * depth:.2f}" '
                f'shape-rendering="crispEdges"/>'
            )
    return "".join(made)
