"""Tier 2 as a tie-break at promotions: whether calibration has earned it, and the values of a tie.

A calibration (`llp calibrate --out FILE`) earns it when tier 2 entered there, which asks for a
cross-validated gain in tau whose lower 95 % limit is above 0, and the weight of at least one metric
is clear of 0 (two-sided 95 %). Only such metrics are measured. The value of a tied trial is

    sum_k b_k r_k,    r_k = z(metric_k) minus its fit on [1, z(train_loss), z(train_loss)^2]

with normal scores z among the tied trials, as in file `terms`. Fewer than 6 trials are matched on
[1, z(train_loss)] alone, and where fewer than 4 have a metric it says nothing. Networks that have
not learnt (training accuracy under 0.8 of the best on their rung) are flat for that reason: 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llp.records import CurvePoint, FlatnessProfile, TieBreak, from_plain
from llp.scoring.calibration import MIN_FINISHED, Calibration
from llp.scoring.ranks import normal_scores
from llp.scoring.terms import GATE_SHARE

MIN_MATCHED, MIN_CURVED = 4, 6
CLEAR = 1.96


def read_calibration(text: str | bytes) -> Calibration:
    """The calibration in a file of `llp calibrate --out`.

    Raises:
        ValueError: It is none, or of another version; the message continues "FILE ...".
    """
    none = "is no calibration that `llp calibrate --out` has written"
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{none}: {error}") from error
    version = plain.get("version") if isinstance(plain, dict) else None
    if type(version) is int and version != Calibration.version:
        raise ValueError(f"is of version {version}, and {Calibration.version} is read here")
    wrong = _misfit(Calibration, plain, "")
    if wrong:
        raise ValueError(f"{none}: {wrong}")
    return from_plain(Calibration, plain)


_KINDS = {int: "a whole number", float: "a number or null", str: "text", bool: "true or false"}


def _misfit(hint: Any, value: Any, where: str) -> str:
    """The first thing in JSON data that is not of type `hint`, in words; empty if there is none."""
    kinds = typing.get_args(hint)
    if type(None) in kinds:
        return "" if value is None else _misfit(kinds[0], value, where)
    said = f"{where or 'it'} is {reprlib.repr(value)}, not"
    if hint in _KINDS:
        fits = type(value) is hint or (hint is float and (value is None or type(value) is int))
        return "" if fits else f"{said} {_KINDS[hint]}"
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            return f"{said} a list"
        parts = [(kinds[0], one, f"{where}[{i}]") for i, one in enumerate(value)]
    elif not isinstance(value, dict):
        return f"{said} a mapping"
    elif dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        for field in dataclasses.fields(hint):
            missing = field.name not in value and field.default is dataclasses.MISSING
            if missing and field.default_factory is dataclasses.MISSING:
                return f"{where or 'it'} has no '{field.name}'"
        names = [name for name in hints if name in value]
        parts = [(hints[name], value[name], f"{where}.{name}".lstrip(".")) for name in names]
    else:
        parts = [(kinds[1], one, f"{where}.{key}") for key, one in value.items()]
    return next(filter(None, (_misfit(*part) for part in parts)), "")


def earned(found: Calibration | None, rows: Mapping[str, Sequence[str]]) -> TieBreak:
    """Whether tier 2 may break ties, by a calibration; with the reason either way.

    Args:
        found: None where there is none.
        rows: Metric of the experiment -> names of its measurements.
    """
    if found is None:
        return TieBreak(False, "no calibration was given in tier2.calibration")
    finished, studies = found.num_finished, found.num_studies
    basis = f"{finished} finished trial{'s' * (finished != 1)} of "
    basis += f"{studies} stud{'y' if studies == 1 else 'ies'}"
    gain = found.gain_tier2
    if finished < MIN_FINISHED or gain is None or math.isnan(gain.value):
        return TieBreak(False, f"{basis} could not say anything of tier 2")
    numbers = f"tau {gain.value:+.3f}, lower 95 % limit {gain.interval.low:+.3f}"
    if math.isnan(gain.interval.low):
        numbers = f"tau {gain.value:+.3f}, without an interval"
    if not found.tier2_enters or not gain.interval.low > 0:
        return TieBreak(False, f"on {basis} it gained nothing that is clear of 0 ({numbers})")
    tier1 = {name for name in found.weights if name.startswith("h: ")}
    clear = {
        name: weight
        for name, weight in found.weights.items()
        if name not in tier1 and abs(weight) > CLEAR * found.standard_errors.get(name, math.nan)
    }
    measured = {name: row for row, names in rows.items() for name in names}
    weights = {name: weight for name, weight in clear.items() if name in measured}
    if not weights:
        return TieBreak(False, f"on {basis} no metric of tier2.metrics has a weight clear of 0")
    said = ", ".join(
        f"{name} {weight:+.2f} ± {found.standard_errors[name]:.2f}"
        for name, weight in weights.items()
    )
    return TieBreak(
        True,
        f"it has earned it on {basis} ({numbers}); weights {said}",
        weights,
        tuple(dict.fromkeys(measured[name] for name in weights)),
    )


def tie_values(
    profiles: Sequence[FlatnessProfile],
    points: Mapping[str, CurvePoint],
    weights: Mapping[str, float],
    best_accuracy: float,
) -> dict[str, float]:
    """The calibrated contribution of tier 2 of every tied trial; 0 where it says nothing.

    Args:
        profiles: Of the tied trials, as far as they could be measured.
        points: Trial -> last point on the rung.
        weights: Measurement -> weight of its normal score, higher is better.
        best_accuracy: Largest training accuracy on the rung.
    """
    values = dict.fromkeys(points, 0.0)
    for metric, weight in weights.items():
        found: dict[str, float] = {}
        for profile in profiles:
            point = points[profile.trial_id]
            for one in profile.measurements:
                learnt = not point.train_accuracy < GATE_SHARE * best_accuracy
                usable = math.isfinite(one.value) and math.isfinite(point.train_loss)
                if one.name == metric and usable and learnt:
                    sign = -1.0 if one.higher_is_better is False else 1.0
                    found[profile.trial_id] = sign * one.value
        if len(found) < MIN_MATCHED:
            continue
        names = sorted(found)
        z = normal_scores(np.array([found[name] for name in names]))
        loss = normal_scores(np.array([points[name].train_loss for name in names]))
        basis = np.stack([loss**k for k in range(3 if len(names) >= MIN_CURVED else 2)], axis=1)
        r = z - basis @ np.linalg.lstsq(basis, z, rcond=None)[0]
        for name, own in zip(names, r, strict=True):
            values[name] += weight * float(own)
    return values
