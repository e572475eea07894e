"""The sections of a landscape's page: each result with its pictures, its reading and its table.

Those about planes, lines and paths are in `landscape_planes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from llp.records import CurvePoint, Observation, from_plain
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Key, Section, share, whole
from llp.reporting.figures import depths, spectra, tracking
from llp.reporting.landscape_found import Found
from llp.reporting.landscape_planes import (
    connectivity_section,
    lines_section,
    smoothness_section,
    surfaces_section,
    trajectory_section,
)
from llp.reporting.tables import Column, table, text
from llp.reporting.tracking_section import tracking_exhibit


def sections(found: Found) -> tuple[Section, ...]:
    """All sections that the results have something for, in the order of the page."""
    makers: tuple[Callable[[Found], Section | None], ...] = (
        surfaces_section,
        lines_section,
        trajectory_section,
        spectrum_section,
        sharpness_section,
        connectivity_section,
        depth_section,
        smoothness_section,
        confidence_section,
        jacobian_section,
        training_section,
    )
    return tuple(made for made in (maker(found) for maker in makers) if made is not None)


def spectrum_section(found: Found) -> Section | None:
    """Eigenvalues, trace and density."""
    if "spectrum" not in found.parts("spectrum"):
        return None
    eigenvalues = spectra.eigenvalue_data(found.arrays)
    density = spectra.density_data(found.arrays)
    values = found.values
    columns = (
        Column("value", "eigenvalue"),
        Column("residual", "residual"),
        Column("bound", "estimated error"),
    )
    derived = [
        (label, values[f"spectrum/{key}"])
        for key, label in _DERIVED
        if values.get(f"spectrum/{key}") is not None
    ]
    frame = pd.DataFrame(derived, columns=["name", "value"], dtype=object)
    trace, error = found.number("spectrum/trace"), found.number("spectrum/trace_standard_error")
    half = found.number("spectrum/trace_half_width")
    reading = (
        f"Trace {formats.number(trace)} ± {formats.number(error, 2)} (standard error"
        + (f"; 95 % interval ± {formats.number(half, 2)}" if np.isfinite(half) else "")
        + ")."
    )
    if len(eigenvalues):
        top, low = eigenvalues["value"].iloc[0], eigenvalues["value"].iloc[-1]
        negative = spectra.clearly_negative(found.arrays, found.number("spectrum/density_width"))
        reading = (
            f"The largest eigenvalue is {formats.number(top)}, the smallest "
            f"{formats.number(low)}. {reading}"
        )
        if np.isfinite(negative):
            reading += (
                f" {formats.percent(negative, 2)} of the eigenvalues lie below 0 by more than the "
                "width of the smoothing."
            )
    products = values.get("spectrum/num_products")
    return Section(
        "spectrum",
        "Hessian spectrum",
        "Curvature of the mean loss on the measured examples.",
        (
            Exhibit(
                key="spectrum",
                title="",
                reading=reading,
                svgs=found.draw(spectra.spectrum_pictures(density, eigenvalues)),
                legend=(Key("density", "blue"), Key("eigenvalue that was certified", "vermillion")),
                data=(
                    Data("Eigenvalues", table(eigenvalues, columns), shown=len(eigenvalues) <= 12),
                    Data(
                        "What follows from them",
                        table(frame, (text("name", "quantity"), Column("value", "value"))),
                    ),
                ),
                note="An eigenvalue lies within the residual of each value; the estimated error is "
                "sharper and no proof. The density is smoothed, so it can be above 0 between "
                "eigenvalues, and it does not tell eigenvalues near 0 apart: shares below and "
                "above 0 are those of the quadrature's nodes. "
                f"{formats.count(products)} Hessian products in all.",
                wide=True,
            ),
        ),
    )


_DERIVED = (
    ("trace", "trace"),
    ("trace_standard_error", "its standard error"),
    ("largest", "largest eigenvalue"),
    ("smallest", "smallest eigenvalue"),
    ("re", "re: |smallest / largest|"),
    ("khn", "Khn, n = 0.5"),
    ("negative_fraction", "share of eigenvalues below 0"),
    ("zero_fraction", "share of eigenvalues at 0, to rounding"),
    ("mass_balance", "share above 0 minus share below"),
    ("negative_sum", "sum of the negative eigenvalues"),
    ("positive_sum", "sum of the positive eigenvalues"),
    ("top_sum", "sum of the largest by size"),
    ("top_share", "their share of the trace"),
    ("frobenius_norm", "Frobenius norm"),
    ("condition_of_top", "first over last of the largest by size"),
    ("condition_of_mean", "largest over mean size"),
)


def sharpness_section(found: Found) -> Section | None:
    """One row a measure, with standard error and cost."""
    names = found.parts("sharpness")
    if not names:
        return None
    rows = [
        {
            "measure": found.values[f"{name}/measure"],
            "options": found.values.get(f"{name}/options") or "",
            "value": found.values.get(name),
            "standard_error": found.values.get(f"{name}/standard_error"),
            "gradient_equivalents": found.values.get(f"{name}/gradient_equivalents"),
            "seconds": found.values.get(f"{name}/seconds"),
        }
        for name in names
    ]
    columns = (
        text("measure", "measure"),
        Column("value", "value"),
        Column("standard_error", "standard error"),
        Column("gradient_equivalents", "cost in gradients"),
        Column("seconds", "time", formats.duration),
        text("options", "options"),
    )
    spent = sum(float(row["gradient_equivalents"] or 0) for row in rows)
    return Section(
        "sharpness",
        "Sharpness",
        "How much the loss rises near the weights.",
        (
            Exhibit(
                key="sharpness",
                title="",
                reading=f"{formats.plural(len(rows), 'measure')} for the cost of "
                f"{formats.number(spent, 3)} gradients over the measured examples.",
                data=(Data("", table(pd.DataFrame(rows, dtype=object), columns), shown=True),),
                note="Values of different measures cannot be compared with each other. SAM, "
                "worst_case and noise with relative=False change when layers are rescaled; asam, "
                "adaptive_trace and relative_flatness do not.",
            ),
        ),
    )


def depth_section(found: Found) -> Section | None:
    """Ranks and units over depth."""
    names = found.parts("ranks")
    if not names:
        return None
    measure = str(found.plain["settings"]["ranks"]["measure"])
    exhibits = []
    for part, what in (("ranks", "features"), ("weight_ranks", "weights")):
        data = depths.rank_data(found.rows(part))
        if data.empty:
            continue
        exhibits.append(
            Exhibit(
                key=f"ranks-{what}",
                title=f"Ranks of {what}",
                reading=_rank_reading(data, measure, what),
                svgs=found.draw(depths.rank_pictures(data, measure, what)),
                legend=(Key(f"{measure} rank", "blue", "o"), Key("possible", "faint", "dashed")),
                data=(Data("Every layer", table(data, _RANK_COLUMNS), sortable=True),),
            )
        )
    units = depths.unit_data(found.rows("units"))
    if not units.empty:
        columns = (
            whole("site", "number"),
            text("name", "activation in"),
            text("activation", "kind"),
            whole("num_units", "units"),
            share("dead", "dead"),
            share("saturated", "saturated"),
            share("dormant", "dormant"),
        )
        counts = {k: found.number(f"units/num_{k}") for k in ("dead", "saturated", "dormant")}
        exhibits.append(
            Exhibit(
                key="units",
                title="Units that do nothing",
                reading=f"Of {formats.count(found.values.get('units/num_units'))} units "
                + ", ".join(f"{formats.count(count)} {kind}" for kind, count in counts.items())
                + ".",
                svgs=found.draw(depths.unit_pictures(units)),
                legend=(
                    Key("dormant", "blue", "o"),
                    Key("dead", "vermillion", "s"),
                    Key("saturated", "green", "^"),
                ),
                data=(Data("Every activation", table(units, columns), sortable=True),),
            )
        )
    return Section("ranks", "From layer to layer", "", tuple(exhibits)) if exhibits else None


_RANK_COLUMNS = (
    whole("layer", "number"),
    text("name", "layer"),
    whole("matrix", "matrix"),
    whole("numerical", "numerical"),
    Column("effective", "effective"),
    whole("approximate", "approximate"),
    whole("l1", "l1"),
    Column("stable", "stable"),
    Column("nuclear", "nuclear"),
    Column("gini", "gini"),
    whole("num_rows", "rows"),
    whole("num_columns", "columns"),
)


def _rank_reading(data: pd.DataFrame, measure: str, what: str) -> str:
    shares = data[measure] / data["possible"]
    low = int(shares.argmin())
    name = formats.short(data["name"].iloc[low], 40)
    return (
        f"The {measure} rank of the {what} goes from {formats.number(data[measure].iloc[0], 3)} in "
        f"the first layer to {formats.number(data[measure].iloc[-1], 3)} in the last; it uses the "
        f"smallest share of what is possible in the one called {name}: "
        f"{formats.percent(float(shares.iloc[low]))}."
    )


def _confidence_reading(found: Found) -> str:
    """Calibration in words; outputs that are no numbers have none."""
    names = ("calibration_error", "calibration_error_standard_error", "confidence_gap")
    error, spread, gap = (found.number(f"confidence/{name}") for name in names)
    accuracy = formats.percent(found.number("confidence/accuracy"), 1)
    if not math.isfinite(gap):
        return (
            f"Some outputs of the network are not finite, so how sure it is cannot be told. Its "
            f"accuracy is {accuracy}."
        )
    way = "too sure" if gap > 0 else "not sure enough" if gap < 0 else "as sure as it is right"
    return (
        f"Expected calibration error {formats.percent(error, 2)} ± {formats.percent(spread, 2)}: "
        f"on average the network is {way}, with a mean confidence of "
        f"{formats.percent(found.number('confidence/mean_confidence'), 1)} at an accuracy of "
        f"{accuracy}. Mean entropy {formats.number(found.number('confidence/mean_entropy'), 3)} "
        "nats."
    )


def confidence_section(found: Found) -> Section | None:
    """Confidence against accuracy, bin by bin."""
    if not found.parts("confidence"):
        return None
    counts = np.asarray(found.arrays["confidence/bin_count"])
    edges = np.linspace(0, 1, len(counts) + 1)
    bins = pd.DataFrame(
        {
            "above": edges[:-1],
            "up_to": edges[1:],
            "examples": counts,
            "confidence": found.arrays["confidence/bin_confidence"],
            "accuracy": found.arrays["confidence/bin_accuracy"],
        }
    )[counts > 0]
    return Section(
        "confidence",
        "Confidence",
        "How sure the network is of its answers, against how often they are right.",
        (
            Exhibit(
                key="confidence",
                title="",
                reading=_confidence_reading(found),
                data=(
                    Data(
                        "",
                        table(
                            bins,
                            (
                                share("above", "confidence above"),
                                share("up_to", "up to"),
                                whole("examples", "examples"),
                                share("confidence", "mean confidence"),
                                share("accuracy", "accuracy"),
                            ),
                        ),
                        shown=True,
                    ),
                ),
                note="On the measured examples, without augmentation.",
            ),
        ),
    )


def jacobian_section(found: Found) -> Section | None:
    """Ranks of partial Jacobians."""
    rows = [
        {
            "layer": name.partition("/")[2],
            **{
                key: found.values.get(f"{name}/{key}")
                for key in ("rank", "effective", "num_inputs", "num_outputs", "mode", "seconds")
            },
        }
        for name in found.parts("jacobian")
    ]
    if not rows:
        return None
    columns = (
        text("layer", "layer"),
        whole("rank", "rank"),
        Column("effective", "effective rank"),
        whole("num_inputs", "inputs"),
        whole("num_outputs", "outputs"),
        text("mode", "part of the input"),
        Column("seconds", "time", formats.duration),
    )
    return Section(
        "jacobian",
        "Rank of the Jacobian",
        "How many directions of a part of the input can still be told apart at a layer.",
        (
            Exhibit(
                key="jacobian",
                title="",
                reading="Near the first measured example, in float64.",
                data=(Data("", table(pd.DataFrame(rows, dtype=object), columns), shown=True),),
            ),
        ),
    )


def training_section(found: Found) -> Section | None:
    """The training that led here, where it is known, with its tracked curvature."""
    subject = found.plain["subject"]
    points = tuple(from_plain(CurvePoint, point) for point in subject["curve"])
    exhibits = []
    if points:
        data = tracking.curve_data(points)
        columns = (
            whole("epoch", "epoch"),
            Column("learning_rate", "learning rate"),
            Column("train_loss", "training loss"),
            share("train_accuracy", "training accuracy"),
            Column("validation_loss", "validation loss"),
            share("validation_accuracy", "validation accuracy"),
        )
        exhibits.append(
            Exhibit(
                key="training",
                title="",
                reading=tracking.curve_reading(data),
                svgs=found.draw(tracking.curve_pictures(data)),
                legend=(Key("training", "blue"), Key("validation", "vermillion", "dashed")),
                data=(Data("Every epoch", table(data, columns)),),
            )
        )
    seen = [from_plain(Observation, each) for each in subject["observations"]]
    tracked = tracking_exhibit(seen, found.draw)
    if tracked is not None:
        exhibits.append(dataclasses.replace(tracked, title="Curvature during the training"))
    if not exhibits:
        return None
    return Section("training", "The training", "", tuple(exhibits))
