"""Findings as files: `landscape.json` with every number, `landscape.npz` with every array.

A key is the name of a part, a slash, and the name of a field: `surface/random/loss`,
`sharpness/asam/standard_error`, for a layer `ranks/fc1/effective`; a sharpness measure's own value
is `sharpness/asam`. What a field means stands in `about`, taken from the docstring of the record it
comes from. Scripts made for older projects find the names they know beside them (see
`llp.landscape.keys`).

    {"format": 1, "subject": {...}, "settings": {...}, "values": {key: number, text or null},
     "arrays": {key: shape}, "aliases": {older name: key}, "about": {field: text},
     "parts": {name: {"analysis", "seconds", "device", "settings"}},
     "missing": {name: why}, "command": ...}
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llp.analyses.spectrum import ABOUT
from llp.analyses.store import Stored
from llp.analyses.subject import Array
from llp.landscape import (
    Eigenpairs,
    SpectralDensity,
    SpectrumReport,
    TraceEstimate,
    keys,
)
from llp.landscape.confidence import Confidence
from llp.landscape.connectivity import Connection, Path
from llp.landscape.directions import Directions
from llp.landscape.interpolation import InterpolationError
from llp.landscape.jacobian import JacobianRank
from llp.landscape.passes import Estimate
from llp.landscape.ranks import RankDynamics, Ranks
from llp.landscape.smoothness import Smoothness
from llp.landscape.surfaces import Line, Surface
from llp.landscape.trajectory import Trajectory
from llp.landscape.units import LayerSize, UnitActivity

FORMAT = 1
OLDER = {
    "line/random/loss": "interp_1d",
    "connectivity/curve/loss": "mode_curve",
    "surface/random/robust": "sam_surface",
}
"""Older names of keys that `keys` knows under another name, or not."""

_AXES = {
    "direction_kind": "Kind of the directions.",
    "label": "What direction n is, as label_n.",
    "norm": "Its Euclidean length, as norm_n.",
    "value": "The number that belongs to it, as value_n: an eigenvalue, a share of the variance.",
}
_EXTRA: dict[str, dict[str, str]] = {
    "spectrum": ABOUT,
    "surface": _AXES,
    "line": _AXES,
    "trajectory": {
        **_AXES,
        "epoch": "Completed epochs of every checkpoint; -1 where unknown.",
        "x_low": "Extent along the first direction that holds the path.",
        "x_high": "Extent along the first direction that holds the path.",
        "y_low": "Extent along the second direction that holds the path.",
        "y_high": "Extent along the second direction that holds the path.",
    },
    "connectivity": {
        "other": "The independent training.",
        "distance_before": "Distance of the weights before their units were aligned.",
        "distance_after": "Distance of the weights afterwards.",
    },
    "sharpness": {
        "measure": "Row of the table of measures.",
        "options": "What it was computed with.",
        "gradient_equivalents": "Cost in gradients over the measured examples.",
    },
    "units": {
        "dead_ratio": "Dead units over all units.",
        "saturated_ratio": "Saturated units over all units.",
    },
}
_RECORDS: dict[str, tuple[type, ...]] = {
    "spectrum": (SpectrumReport, SpectralDensity, TraceEstimate, Eigenpairs),
    "surface": (Surface, InterpolationError),
    "line": (Line,),
    "trajectory": (Trajectory, Directions),
    "connectivity": (Path, Connection),
    "ranks": (Ranks,),
    "weight_ranks": (Ranks,),
    "rank_dynamics": (RankDynamics,),
    "units": (UnitActivity,),
    "sizes": (LayerSize,),
    "smoothness": (Smoothness,),
    "jacobian": (JacobianRank,),
    "confidence": (Confidence,),
    "sharpness": (Estimate,),
}


def values_of(stored: Stored) -> dict[str, Any]:
    """Every number and text of a part under its key; what is None is left out."""
    found: dict[str, Any] = {}
    for key, value in stored.finding.numbers.items():
        if value is not None:
            found[f"{stored.name}/{key}".removesuffix("/")] = value
    for row in stored.finding.rows:
        layer = str(row.get("name", ""))
        found.update(
            {f"{stored.name}/{layer}/{k}": value for k, value in row.items() if k != "name"}
        )
    return found


def arrays_of(stored: Stored) -> dict[str, Array]:
    """Every array of a part under its key."""
    return {f"{stored.name}/{key}": value for key, value in stored.finding.arrays.items()}


def aliases(known: Iterable[str]) -> dict[str, str]:
    """Older name -> key, for the keys that are there."""
    found: dict[str, str] = {}
    for key in known:
        older = [*keys.aliases_of(key), *([OLDER[key]] if key in OLDER else [])]
        for name in older:
            found.setdefault(name, key)
    return found


def about(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Section -> field -> what it means, for the sections of these parts."""
    sections = dict.fromkeys(name.partition("/")[0] for name in names)
    return {
        section: {**_described(_RECORDS.get(section, ())), **_EXTRA.get(section, {})}
        for section in sections
    }


def _described(records: Iterable[type]) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in reversed(tuple(records)):
        for base in reversed(record.__mro__):
            text = inspect.cleandoc(base.__doc__ or "")
            _, _, fields = text.partition("Attributes:\n")
            for name, meaning in re.findall(
                r"^    (\w+): ((?:.*\n?(?:\s{8}.*\n?)*))", fields, re.M
            ):
                found[name] = " ".join(meaning.split())
    return found


def content(
    stored: Iterable[Stored],
    *,
    subject: Mapping[str, Any],
    settings: Mapping[str, Any],
    missing: Mapping[str, str],
    environment: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """What goes into `landscape.json` and into `landscape.npz`."""
    parts = list(stored)
    values: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    for part in parts:
        values.update(values_of(part))
        arrays.update(arrays_of(part))
    plain = {
        "format": FORMAT,
        "subject": dict(subject),
        "settings": dict(settings),
        "values": values,
        "arrays": {key: list(value.shape) for key, value in arrays.items()},
        "aliases": aliases([*values, *arrays]),
        "rows": {part.name: list(part.finding.rows) for part in parts if part.finding.rows},
        "about": about(part.name for part in parts),
        "parts": {
            part.name: {
                "analysis": part.analysis,
                "seconds": part.seconds,
                "device": part.device,
                "settings": dict(part.settings),
            }
            for part in parts
        },
        "missing": dict(missing),
        "environment": dict(environment),
    }
    return plain, arrays
