"""Curvature during training as a section that any page can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from markupsafe import Markup

from llp.records import Observation
from llp.reporting.exhibits import Data, Exhibit, Key, Section, seconds, whole
from llp.reporting.figures import tracking
from llp.reporting.pictures import Picture
from llp.reporting.svg import drawing
from llp.reporting.tables import Column, table, text

_COLUMNS = (
    text("job_id", "training"),
    whole("epoch", "epoch"),
    Column("eigenvalue_1", "largest eigenvalue by size"),
    Column("residual_1", "its residual"),
    Column("eigenvalue_2", "next"),
    Column("residual_2", "its residual"),
    Column("trace", "trace"),
    Column("trace_standard_error", "standard error"),
    Column("gradient_norm", "gradient norm"),
    whole("samples", "cost in samples"),
    seconds("seconds", "time"),
    text("note", "note"),
)


def tracking_sections(observations: Iterable[Observation]) -> tuple[Section, ...]:
    """The section, drawn now; nothing where curvature was not tracked."""
    exhibit = tracking_exhibit(observations, _inline)
    if exhibit is None:
        return ()
    lead = "Trainings were watched between epochs; that changed no bit of them."
    return (Section("curvature", "Curvature during training", lead, (exhibit,)),)


def tracking_exhibit(
    observations: Iterable[Observation], draw: Callable[[tuple[Picture, ...]], Any]
) -> Exhibit | None:
    """Eigenvalues, trace and gradient norm by epoch; None where they were not tracked.

    Args:
        observations: Of any callbacks.
        draw: Makes inline drawings of pictures.
    """
    data = tracking.curvature_data(dataclasses.asdict(seen) for seen in observations)
    if data.empty:
        return None
    several = data["job_id"].nunique() > 1
    return Exhibit(
        key="curvature",
        title="",
        reading=tracking.curvature_reading(data),
        svgs=draw(tracking.curvature_pictures(data)),
        legend=(
            Key("largest eigenvalue by size; trace; gradient norm", "blue", "o"),
            Key("next eigenvalue", "vermillion", "s"),
            *((Key("line styles: trainings", "muted", "dashed"),) if several else ()),
        ),
        data=(Data("Every look", table(data, _COLUMNS), sortable=True),),
        note="Of the plain loss on fixed, unaugmented training examples, in eval mode. The bars of "
        "the trace are standard errors over its probe vectors.",
    )


def _inline(pictures: tuple[Picture, ...]) -> tuple[Markup, ...]:
    with drawing():
        return tuple(picture.inline() for picture in pictures)
