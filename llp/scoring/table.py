"""The study table: one row per trial, made from the records of tiers 1 and 2 and verification.

Comparing trials across budgets: multi-fidelity search trains trials on different rungs, and an
accuracy on 10 % of the data says nothing against one on all of it. What does count is that a trial
was *promoted*. So every row has a `level`, the highest rung it finished, plus one half when it had
begun the next rung and a stop rule ended it there (it was promoted, but did not get through).
Everything downstream ranks by level first and by signals second; signals of a row are those at the
end of its highest finished rung, and before that its last report. A diverged trial has no signals
at all, however well it did on lower rungs: with more data it fails, so it ranks last.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from llp.records import CurvePoint, FlatnessProfile, LearningCurve, TrialResult, Verification
from llp.scoring.roles import BOOKKEEPING, TIER1, Direction, Roles

NAN = math.nan


def study_table(
    trials: Sequence[TrialResult],
    profiles: Sequence[FlatnessProfile] = (),
    verifications: Sequence[Verification] = (),
    *,
    num_validation: int | None = None,
    study: str | None = None,
) -> pd.DataFrame:
    """One row per trial, indexed by `trial_id`, with its `Roles` in `attrs["roles"]`.

    Columns: the hyperparameters (missing where inactive); `outcome`, `rung` (highest finished, 0
    for none), `level`, `data_fraction`, `samples_seen` and `seconds` (all probes of the trial);
    the tier-1 signals; `num_validation`; each tier-2 metric NAME with NAME_se, and
    `tier2_seconds`; `test_accuracy` (the target: mean over verification seeds), `num_seeds`,
    `verification_samples`.

    Args:
        trials: In order of suggestion.
        profiles: Tier-2 measurements; the last one of a trial counts.
        verifications: One per (trial, seed).
        num_validation: Number of validation images, for the binomial error of accuracies.
        study: Name of the study; adds a `study` column.
    """
    full_length = _epochs_by_rung(trials)
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
        target="test_accuracy",
        level="level",
        num_validation="num_validation",
    )
    if not rows:
        table = pd.DataFrame(columns=["level", *TIER1, "num_validation", "test_accuracy"])
    table.attrs["roles"] = roles.to_plain()
    return table


def finished_curves(
    result: TrialResult, full_length: Mapping[int, int]
) -> tuple[list[LearningCurve], LearningCurve | None]:
    """The curves of a trial that ran to their rung's end, and the one that did not, if any."""
    curves = [curve for curve in result.curves if curve.points]
    if not curves:
        return [], None
    last = curves[-1]
    complete = result.outcome == "completed" or (
        # A retryable failure of the *next* rung's job leaves this rung's curve whole.
        result.outcome in ("failed", "out_of_memory")
        and result.checkpoint is not None
        and last.points[-1].epoch >= full_length.get(last.rung, math.inf)
    )
    return (curves, None) if complete else (curves[:-1], last)


def _epochs_by_rung(trials: Sequence[TrialResult]) -> dict[int, int]:
    longest: dict[int, int] = defaultdict(int)
    for result in trials:
        for curve in result.curves:
            for point in curve.points:
                longest[curve.rung] = max(longest[curve.rung], point.epoch)
    return dict(longest)


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
    accuracies = [v.test_accuracy for v in verifications if math.isfinite(v.test_accuracy)]
    return {
        "test_accuracy": float(np.mean(accuracies)) if accuracies else NAN,
        "num_seeds": len(accuracies),
        "verification_samples": sum(v.samples_seen for v in verifications),
    }


def _direction(higher_is_better: bool | None) -> Direction:
    if higher_is_better is None:
        return "unknown"
    return "higher" if higher_is_better else "lower"
