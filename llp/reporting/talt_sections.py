"""What TALT saw and did in one training, as sections that a training report holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup

from llp.reporting import formats, optimizer_log
from llp.reporting.exhibits import Data, Exhibit, Key, Section, share, whole
from llp.reporting.figures import paths, surfaces, talt
from llp.reporting.landscape_found import Found
from llp.reporting.optimizer_log import OptimizerLog
from llp.reporting.runs import FullTraining
from llp.reporting.svg import drawing
from llp.reporting.tables import Column, table, text


def talt_sections(folder: Path, training: FullTraining) -> tuple[Section, ...]:
    """The sections of a training with TALT; none where its optimizer left no log.

    Args:
        folder: The study folder.
        training: The seed that is looked at.
    """
    log = optimizer_log.load(folder, training.job_id)
    if log is None:
        return ()
    seed = f"Of the training {formats.clean(training.job_id)}, from the optimizer's own log."
    landscape = _landscape(folder / "landscape" / training.job_id, log)
    return (
        Section("talt", "What TALT saw and did", seed, (_events(log, training), _effects(log))),
        Section(
            "talt-path",
            "Valleys on the landscape",
            "The plane in which the training moved most, with the loss on it.",
            landscape,
        ),
    )


def _events(log: OptimizerLog, training: FullTraining) -> Exhibit:
    with drawing():
        svgs = tuple(picture.inline() for picture in talt.pictures(log, training.points)[:2])
    return Exhibit(
        key="talt-events",
        title="Loss and valleys",
        reading=talt.reading(log),
        svgs=svgs,
        legend=(
            Key("training loss", "blue", "o"),
            Key("validation loss", "vermillion", "s"),
            Key("share of tensors in a valley", "sky", "bar"),
        ),
        note="A tensor is in a valley where its gradients oscillate and their mean keeps a "
        "direction off the steep ones. It is looked at every few steps; when the log is full every "
        "other look is dropped.",
        wide=True,
    )


def _effects(log: OptimizerLog) -> Exhibit:
    with drawing():
        svgs = tuple(picture.inline() for picture in talt.pictures(log, ())[2:])
    columns = (
        text("tensor", "tensor"),
        whole("events", "looks in a valley"),
        share("share", "of its looks"),
        Column("strength", "mean strength there"),
        Column("cosine", "pairwise cosine"),
        Column("ratio", "length after / before"),
        Column("alignment", "cosine with the raw gradient"),
        Column("eigenvalue", "largest eigenvalue"),
    )
    count = log.eigenvalues.shape[2]
    memory = ""
    if np.isfinite(log.bytes_per_parameter):
        memory = f" It keeps {formats.number(log.bytes_per_parameter, 3)} bytes a parameter."
    return Exhibit(
        key="talt-effects",
        title="Spectra, norms and the transform",
        reading=f"The {formats.plural(count, 'largest eigenvalue')} of the covariance of the "
        f"gradients, and what the transform made of their length and direction.{memory}",
        svgs=svgs,
        legend=(
            Key("largest eigenvalue; raw gradient", "blue"),
            Key("next eigenvalue; changed gradient", "vermillion", "dashed"),
            Key("look in a valley", "vermillion", "^"),
            Key("other look", "faint", "o"),
        ),
        data=(Data("Every tensor", table(talt.tensor_table(log), columns), sortable=True),),
        note="Medians over the looks. Eigenvalues and norms are those of the projected gradients.",
    )


def _landscape(folder: Path, log: OptimizerLog) -> tuple[Exhibit, ...]:
    found = _found(folder)
    if found is None or "trajectory" not in found.parts("trajectory"):
        why = "There are too few kept weights for a path: --checkpoint-every 1 keeps them."
        return (Exhibit("talt-no-path", "", why),)
    path = _with_epochs(paths.path_data(found.arrays), log.num_epochs)
    surface = None
    if "surface/trajectory" in found.parts("surfaces"):
        surface = surfaces.surface_data(found.values, found.arrays, "surface/trajectory")
    explained = float(found.arrays["trajectory/explained"].sum())
    with drawing():
        still = talt.path_picture(log, path, surface).inline()
    return (
        Exhibit(
            key="talt-path-picture",
            title="",
            reading=f"{len(path)} checkpoints; the plane holds {formats.percent(explained)} of "
            f"their variance, and they are up to "
            f"{formats.number(float(path['out_of_plane'].max()), 3)} away from it.",
            svgs=(still, Markup(talt.animation(path, surface))),
            legend=(
                Key("path", "ink"),
                Key("valleys since the checkpoint before, by size", "vermillion", "ring"),
            ),
            note="On the right the same path as it was walked. The loss under it is that on the "
            "plane, on fixed training images, and not the one of the checkpoints beside it.",
        ),
    )


def _with_epochs(path: pd.DataFrame, last: int) -> pd.DataFrame:
    """`path` with the number of its last epoch, which final weights do not say; no epoch twice."""
    known = path.assign(epoch=path["epoch"].where(path["epoch"] >= 0, last))
    return known.drop_duplicates("epoch", ignore_index=True)


def _found(folder: Path) -> Found | None:
    try:
        plain = json.loads((folder / "landscape.json").read_text(encoding="utf-8"))
        with np.load(folder / "landscape.npz", allow_pickle=False) as file:
            return Found(plain, {name: file[name] for name in file.files})
    except (OSError, ValueError):
        return None
