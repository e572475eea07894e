"""Sections of a landscape's page about planes, lines and paths, each with pictures and reading."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Key, Section, share, whole
from llp.reporting.figures import paths, surfaces
from llp.reporting.landscape_found import Array, Found
from llp.reporting.tables import Column, table, text

KINDS = {
    "random": "random directions",
    "hessian": "the two largest Hessian eigenvectors",
    "hessian_signed": "the most positive and the most negative Hessian eigenvector",
    "adam": "the optimizer's moments",
    "trajectory": "the main plane of the training",
    "random_base": "random directions around newly initialised weights",
}
"""What a plane is spanned by."""
LINES = {
    "random": "a random direction",
    "hessian": "the largest Hessian eigenvector",
    "hessian_signed": "the most negative Hessian eigenvector",
    "adam": "the optimizer's next step",
    "from_start": "from the end of the training, at 0, back to its start, at 1",
}
"""What a line runs along."""


def surfaces_section(found: Found) -> Section | None:
    """Every plane: heat map, contour lines, relief, accuracy, and the robust loss."""
    names = found.parts("surfaces")
    exhibits = [exhibit for name in names for exhibit in _surface(found, name)]
    if not exhibits:
        return None
    return Section(
        "surfaces",
        "Loss surfaces",
        "The loss on planes through the weights. The cross is the model itself.",
        tuple(exhibits),
    )


def _surface(found: Found, name: str) -> Iterator[Exhibit]:
    cap = found.plain["settings"]["surfaces"].get("loss_cap")
    data = surfaces.surface_data(found.values, found.arrays, name, cap=cap)
    kind = name.rpartition("/")[2]
    x, y, lowest = data.lowest
    lost = int((~np.isfinite(data.loss)).sum())
    reading = (
        f"The loss goes from {formats.number(lowest)} to "
        f"{formats.number(_highest(data.loss))}; the model has "
        f"{formats.number(data.base_loss)}"
    )
    if data.has_base and lowest < data.base_loss:
        reading += (
            f", and at ({formats.number(x, 3)}, {formats.number(y, 3)}) the plane is "
            f"{formats.number(data.base_loss - lowest, 3)} lower"
        )
    reading += "."
    if lost:
        reading += f" In {formats.plural(lost, 'cell')} it is not finite and left blank."
    notes = [_scale_note(data)]
    if not data.exact.all():
        error = found.number(f"{name}/interpolation/max_relative")
        notes.append(
            f"{formats.count(int(data.exact.sum()))} of {formats.count(data.exact.size)} cells "
            "were evaluated, the others interpolated; on held-out cells the largest error is "
            f"{formats.percent(error, 2)} of the range."
        )
    yield Exhibit(
        key=name.replace("/", "-").replace("_", "-"),
        title=_sentence(KINDS.get(kind, kind)),
        reading=reading,
        svgs=found.draw(surfaces.surface_pictures(data)),
        data=(Data("Numbers", _numbers_table(found, name)),),
        note=" ".join(notes),
    )
    if data.robust is None:
        return
    added = data.robust - data.loss
    yield Exhibit(
        key=f"{name.replace('/', '-').replace('_', '-')}-robust",
        title=f"{_sentence(KINDS.get(kind, kind))}: robust loss",
        reading=f"In a ball of radius {formats.number(data.numbers.get('rho'))} the loss is higher "
        f"by {formats.number(float(np.nanmin(added)), 3)} to "
        f"{formats.number(float(np.nanmax(added)), 3)}; at the model itself by "
        f"{formats.number(_at_base(data, added), 3)}.",
        svgs=found.draw(surfaces.robust_pictures(data)),
        note="Plain and robust loss share their colours and their axes; both in eval mode, and the "
        "robust one is never below.",
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _highest(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else math.nan


def _at_base(data: surfaces.SurfaceData, values: Array) -> float:
    i, j = np.flatnonzero(data.x == 0.0), np.flatnonzero(data.y == 0.0)
    return float(values[i[0], j[0]]) if len(i) and len(j) else float("nan")


def _scale_note(data: surfaces.SurfaceData) -> str:
    scale = surfaces.Scale(data.mesh()[2])
    told = "Colours, lines and heights follow the logarithm of the loss. " if scale.log else ""
    if data.cap is not None:
        told += f"Losses above {formats.number(data.cap)} are cut in the pictures. "
    return (
        f"{told}A coordinate of 1 is a distance of {formats.number(data.norms[0], 3)} along the "
        f"first direction and {formats.number(data.norms[1], 3)} along the second."
    )


def _numbers_table(found: Found, name: str) -> Any:
    rows = [
        (key.removeprefix(f"{name}/"), value)
        for key, value in found.values.items()
        if key.startswith(f"{name}/") and value is not None
    ]
    frame = pd.DataFrame(rows, columns=["name", "value"], dtype=object)
    return table(frame, (text("name", "name"), Column("value", "value")))


def lines_section(found: Found) -> Section | None:
    """Every line: loss and accuracy."""
    exhibits = []
    for name in found.parts("lines"):
        data = paths.line_data(found.values, found.arrays, name)
        kind = name.rpartition("/")[2]
        known = data["loss"].where(np.isfinite(data["loss"]), np.inf).to_numpy()
        base, low = found.number(f"{name}/base_loss"), float(known.min())
        where = float(data["x"][int(known.argmin())])
        legend = [Key("loss", "blue")]
        if "robust" in data:
            legend.append(Key("in the worst point of a ball", "vermillion", "dashed"))
        if "parabola" in data:
            legend.append(Key("the eigenvalue's parabola", "muted", "dotted"))
        columns = (
            Column("x", "coordinate"),
            Column("loss", "loss"),
            share("metric", "accuracy"),
            Column("robust", "robust loss"),
        )
        exhibits.append(
            Exhibit(
                key=name.replace("/", "-").replace("_", "-"),
                title=_sentence(LINES.get(kind, kind)),
                reading=f"The lowest loss on the line is {formats.number(low)} at "
                f"{formats.number(where, 3)}; the model has {formats.number(base)}.",
                svgs=found.draw(paths.line_pictures(data, found.values, name)),
                legend=(*legend, Key("the model", "ink", "D")),
                data=(Data("Every point", table(data, columns)),),
            )
        )
    if not exhibits:
        return None
    return Section("lines", "Lines", "The loss along lines through the weights.", tuple(exhibits))


def trajectory_section(found: Found) -> Section | None:
    """The path of the training, with the true losses."""
    if "trajectory" not in found.parts("trajectory"):
        return None
    data = paths.path_data(found.arrays)
    plane = None
    if "surface/trajectory" in found.parts("surfaces"):
        plane = surfaces.surface_data(found.values, found.arrays, "surface/trajectory")
    labels = (
        str(found.values["trajectory/label_1"]),
        str(found.values["trajectory/label_2"]),
    )
    explained = found.arrays["trajectory/explained"]
    off = (data["plane_loss"] - data["loss"]).abs()
    far = data["out_of_plane"].to_numpy()
    worst = int(np.nan_to_num(off.to_numpy(), posinf=0.0).argmax())
    columns = (
        whole("epoch", "epoch"),
        Column("loss", "true loss"),
        Column("plane_loss", "loss on the plane"),
        share("metric", "accuracy"),
        Column("out_of_plane", "distance from the plane"),
        Column("distance", "distance from the model"),
    )
    return Section(
        "trajectory",
        "Path of the training",
        "Checkpoints of the training in the plane in which they moved most.",
        (
            Exhibit(
                key="trajectory",
                title="",
                reading=f"The plane holds {formats.percent(float(explained.sum()))} of the "
                f"checkpoints' variance; they are up to {formats.number(float(far.max()), 3)} away "
                f"from it. At epoch {int(data['epoch'][worst])} the plane shows a loss of "
                f"{formats.number(data['plane_loss'][worst], 3)} where the checkpoint has "
                f"{formats.number(data['loss'][worst], 3)}.",
                svgs=found.draw(paths.path_pictures(data, plane, labels)),
                legend=(
                    Key("true loss; distance from the model", "blue", "o"),
                    Key("loss on the plane; distance from the plane", "vermillion", "s"),
                ),
                data=(Data("Every checkpoint", table(data, columns), sortable=True),),
                note="Two components hold most of the variance even of a random walk: what counts "
                "is how far the true losses are from those of the plane. The marks are coloured by "
                "the true losses, the lines belong to the plane, with the last checkpoint's batch "
                "normalisation.",
            ),
        ),
    )


def connectivity_section(found: Found) -> Section | None:
    """Barriers between two independent trainings."""
    if "connectivity" not in found.parts("connectivity"):
        return None
    data = paths.connection_data(found.values, found.arrays)
    length, chord = (found.number(f"connectivity/curve/{key}") for key in ("length", "chord"))
    columns = (Column("t", "position t"), Column("loss", "loss"), share("metric", "accuracy"))
    return Section(
        "connectivity",
        "Path to an independent training",
        "Whether two trainings from different seeds ended in the same valley.",
        (
            Exhibit(
                key="connectivity",
                title="",
                reading=f"On the straight path the loss rises by "
                f"{formats.number(data.barriers[0], 3)} above the line between the two ends; on a "
                f"trained {formats.clean(found.values.get('connectivity/curve/kind', 'curve'))} "
                f"curve by {formats.number(data.barriers[1], 3)}. The curve is "
                f"{formats.number(length / chord if chord else float('nan'), 3)} times as long as "
                "the straight path.",
                svgs=found.draw(paths.connection_pictures(data)),
                legend=(
                    Key("straight path", "vermillion", "dashed"),
                    Key("trained curve", "blue", "o"),
                    Key("the two networks", "ink", "D"),
                ),
                data=(
                    Data("Straight path", table(data.linear, columns)),
                    Data("Trained curve", table(data.curve, columns)),
                ),
                note="Batch normalisation is estimated anew at every point between the ends.",
            ),
        ),
    )


def smoothness_section(found: Found) -> Section | None:
    """How far the gradient can be trusted."""
    if "smoothness" not in found.parts("smoothness"):
        return None
    data = paths.smoothness_data(found.values, found.arrays)
    told = {
        key: formats.number(found.values.get(f"smoothness/{key}"))
        for key in ("effective_beta", "loss_lipschitz", "gradient_norm")
    }
    columns = (
        Column("step", "step"),
        Column("loss", "loss"),
        Column("linear", "predicted by the gradient"),
        Column("gradient_change", "change of the gradient, relative"),
        Column("gradient_cosine", "cosine of the gradients"),
        Column("beta", "effective smoothness"),
    )
    return Section(
        "smoothness",
        "Along the gradient",
        "How well the gradient describes the loss some way along it.",
        (
            Exhibit(
                key="smoothness",
                title="",
                reading=f"The gradient changes by at most {told['effective_beta']} per distance, "
                f"the loss by {told['loss_lipschitz']}; the gradient's norm is "
                f"{told['gradient_norm']}.",
                svgs=found.draw(paths.smoothness_pictures(data)),
                legend=(Key("downhill", "blue", "o"), Key("uphill", "vermillion", "s")),
                data=(Data("Every step", table(data, columns)),),
            ),
        ),
    )
