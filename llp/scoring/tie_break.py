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

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from llp.records import CurvePoint, FlatnessProfile, TieBreak, from_plain
from llp.scoring.calibration import MIN_FINISHED, Calibration
from llp.scoring.ranks import normal_scores
from llp.scoring.terms import GATE_SHARE

MIN_MATCHED, MIN_CURVED = 4, 6
CLEAR = 1.96


def read_calibration(text: str) -> Calibration:
    """The calibration in a file of `llp calibrate --out`.

    Raises:
        ValueError: It is none, or of another version.
    """
    try:
        plain = json.loads(text)
        found = from_plain(Calibration, plain)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("is no calibration that `llp calibrate --out` has written") from error
    if found.version != Calibration.version:
        raise ValueError(f"is of version {found.version}, and {Calibration.version} is read here")
    return found


def earned(found: Calibration | None, rows: Mapping[str, Sequence[str]]) -> TieBreak:
    """Whether tier 2 may break ties, by a calibration; with the reason either way.

    Args:
        found: None where there is none.
        rows: Metric of the experiment -> names of its measurements.
    """
    if found is None:
        return TieBreak(False, "no calibration was given in tier2.calibration")
    basis = f"{found.num_finished} finished trials of {found.num_studies} studies"
    if found.num_finished < MIN_FINISHED or found.gain_tier2 is None:
        return TieBreak(False, f"{basis} could not say anything of tier 2")
    gain = found.gain_tier2
    numbers = f"tau {gain.value:+.3f}, lower 95 % limit {gain.interval.low:+.3f}"
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
