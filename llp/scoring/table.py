"""The study table: one row per trial, made from the records of tiers 1 and 2 and verification.

Comparing trials across budgets: multi-fidelity search trains trials on different rungs, and an
accuracy on 10 % of the data says nothing against one on all of it. What does count is that a trial
was *promoted*. So every row has a `level`, the highest rung it finished, plus one half when it had
begun the next rung and a stop rule ended it there (it was promoted, but did not get through).
Everything downstream ranks by level first and by signals second; signals of a row are those at the
end of its highest finished rung, and before that its last report. A diverged trial has no signals
at all, however well it did on lower rungs: with more data it fails, so it ranks last.

What is learnt from: the target is the validation accuracy of the full trainings, so the test split
has no part in any weight, score or choice. It is measured on the validation images that the probes
were measured on, which favours the probes' own validation signals over hyperparameters and tier 2:
the cautious side. Test accuracy stands beside it for the ablation table alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from llp.records import (
    CurvePoint,
    FlatnessProfile,
    LearningCurve,
    Rung,
    TrialResult,
    Verification,
)
from llp.scoring.roles import BOOKKEEPING, TARGET, TEST, TIER1, Direction, Roles

NAN = math.nan


def study_table(
    trials: Sequence[TrialResult],
    profiles: Sequence[FlatnessProfile] = (),
    verifications: Sequence[Verification] = (),
    *,
    num_validation: int | None = None,
    study: str | None = None,
    rungs: Sequence[Rung] = (),
) -> pd.DataFrame:
    """One row per trial, indexed by `trial_id`, with its `Roles` in `attrs["roles"]`.

    Columns: the hyperparameters (missing where inactive); `outcome`, `rung` (highest finished, 0
    for none), `level`, `data_fraction`, `samples_seen` and `seconds` (all probes of the trial);
    the tier-1 signals; `num_validation`; each tier-2 metric NAME with NAME_se, and
    `tier2_seconds`; `verified_accuracy` (the target: validation accuracy of the full trainings,
    mean over seeds), `num_seeds`, `verification_samples`, and `test_accuracy` (mean over seeds; to
    report with, never learnt from).

    Args:
        trials: In order of suggestion.
        profiles: Tier-2 measurements; the last one of a trial counts.
        verifications: One per (trial, seed).
        num_validation: Number of validation images, for the binomial error of accuracies.
        study: Name of the study; adds a `study` column.
        rungs: Tell how many epochs a finished curve has. Without them the last curve of a trial
            counts as finished only when the trial is `completed`.
    """
    full_length = {rung.rung: rung.epochs for rung in rungs}
    measured = {profile.trial_id: profile for profile in profiles}
    verified: dict[str, list[Verification]] = defaultdict(list)
    for verification in verifications:
        verified[verification.trial_id].append(verification)

    names = list(dict.fromkeys(name for r in trials for name in r.trial.hyperparameters))
    directions: dict[str, Direction] = {}
    for profile in profiles:
        for measurement in profile.measurements:
            directions[measurement.name] = _direction(measurement.higher_is_better)
    reserved = {*TIER1, *BOOKKEEPING, *directions, *(f"{name}_se" for name in directions)}
    columns = {name: f"hyperparameter.{name}" if name in reserved else name for name in names}

    rows = []
    for result in trials:
        given = result.trial.hyperparameters
        row: dict[str, object] = {columns[name]: given.get(name, NAN) for name in names}
        row |= _tier1(result, full_length)
        row["num_validation"] = num_validation if num_validation else NAN
        row |= _tier2(measured.get(result.trial.trial_id), directions)
        row |= _target(verified.get(result.trial.trial_id, []))
        if study is not None:
            row["study"] = study
        rows.append(row)
    index = pd.Index([result.trial.trial_id for result in trials], name="trial_id", dtype=object)
    table = pd.DataFrame(rows, index=index)
    roles = Roles(
        hyperparameters=tuple(columns.values()),
        tier1=dict(TIER1),
        tier2=directions,
        study="study" if study is not None else None,
        target=TARGET,
        level="level",
        num_validation="num_validation",
    )
    if not rows:
        table = pd.DataFrame(columns=["level", *TIER1, "num_validation", TARGET, TEST])
    table.attrs["roles"] = roles.to_plain()
    return table


def finished_curves(
    result: TrialResult, full_length: Mapping[int, int]
) -> tuple[list[LearningCurve], LearningCurve | None]:
    """The curves of a trial that ran to their rung's end, and the one that did not, if any.

    A curve with a later rung after it is finished, as only finished probes are promoted. The last
    one is when its job completed, or when it has all epochs and it was the job of the *next* rung
    that failed.

    Args:
        result: The trial.
        full_length: Rung -> epochs. On a rung that is missing here, only completion counts.
    """
    if not result.curves:
        return [], None
    *earlier, last = result.curves
    complete = [curve for curve in earlier if curve.points]
    if not last.points:
        return complete, None
    length = full_length.get(last.rung)
    if result.outcome == "completed":
        # A shorter one belongs to a job that was still running when the study was interrupted.
        ended = length is None or last.points[-1].epoch >= length
    else:
        ended = (
            result.outcome in ("failed", "out_of_memory")
            and result.checkpoint is not None
            and length is not None
            and last.points[-1].epoch >= length
        )
    return ([*complete, last], None) if ended else (complete, last)


def _tier1(result: TrialResult, full_length: Mapping[int, int]) -> dict[str, object]:
    complete, broken = finished_curves(result, full_length)
    rung = complete[-1].rung if complete else 0
    stopped_above = broken is not None and result.outcome == "stopped"
    judged = complete[-1] if complete else broken
    dead = result.outcome == "diverged" or (
        not complete and result.outcome in ("failed", "out_of_memory")
    )
    points = judged.points if judged is not None and not dead else ()
    last = points[-1] if points else None
    return {
        "outcome": result.outcome,
        "rung": rung,
        "level": rung + 0.5 * stopped_above,
        "data_fraction": last.data_fraction if last else NAN,
        "samples_seen": result.samples_seen,
        "seconds": result.seconds,
        "validation_accuracy": _finite(last, "validation_accuracy"),
        "validation_loss": _finite(last, "validation_loss"),
        "validation_accuracy_last3": (
            float(np.mean([point.validation_accuracy for point in points[-3:]])) if points else NAN
        ),
        "train_loss": _finite(last, "train_loss"),
        "train_accuracy": _finite(last, "train_accuracy"),
    }


def _finite(point: CurvePoint | None, name: str) -> float:
    value = float(getattr(point, name)) if point is not None else NAN
    return value if math.isfinite(value) else NAN


def _tier2(
    profile: FlatnessProfile | None, directions: Mapping[str, Direction]
) -> dict[str, object]:
    row: dict[str, object] = {}
    found = {m.name: m for m in profile.measurements} if profile is not None else {}
    for name in directions:
        row[name] = found[name].value if name in found else NAN
        row[f"{name}_se"] = found[name].standard_error if name in found else NAN
    row["tier2_seconds"] = profile.seconds if profile is not None else 0.0
    return row


def _target(verifications: Sequence[Verification]) -> dict[str, object]:
    usable = [v for v in verifications if math.isfinite(v.validation_accuracy)]
    return {
        TARGET: _mean([v.validation_accuracy for v in verifications]),
        "num_seeds": len(usable),
        "verification_samples": sum(v.samples_seen for v in verifications),
        TEST: _mean([v.test_accuracy for v in verifications]),
    }


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else NAN


def _direction(higher_is_better: bool | None) -> Direction:
    if higher_is_better is None:
        return "unknown"
    return "higher" if higher_is_better else "lower"
