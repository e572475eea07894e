"""From records to a `ScoreReport`: the one call the pipeline makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from llp.records import (
    FlatnessProfile,
    GeneralizationScore,
    Interval,
    Rung,
    ScoreReport,
    TrialResult,
    Verification,
)
from llp.scoring.ablation import ablation
from llp.scoring.calibration import split
from llp.scoring.roles import Roles
from llp.scoring.score import LEVEL, Scores, score
from llp.scoring.table import study_table


def score_report(
    trials: Sequence[TrialResult],
    profiles: Sequence[FlatnessProfile] = (),
    verifications: Sequence[Verification] = (),
    *,
    preset: str = "calibrated",
    weights: Mapping[str, float] | None = None,
    alpha: float = 0.1,
    num_validation: int | None = None,
    history: pd.DataFrame | Sequence[pd.DataFrame] | None = None,
    seed: int = 0,
    rungs: Sequence[Rung] = (),
) -> ScoreReport:
    """All scores of a study, best first, with the evidence for or against tier 2.

    Before verification the ablation table is empty and the sentence says why.

    Args:
        trials: In order of suggestion.
        profiles: Tier-2 measurements.
        verifications: Full trainings, once there are any.
        preset: See `score.score`.
        weights: Of preset `weights`.
        alpha: Of preset `llp`.
        num_validation: Validation images, for the binomial error of accuracies.
        history: Tables of earlier studies, for `calibrated`.
        seed: Of draws, folds and bootstraps.
        rungs: Of the study; see `table.study_table`.

    Raises:
        SpecError: Unknown preset or column.
    """
    table = study_table(trials, profiles, verifications, num_validation=num_validation, rungs=rungs)
    scores = score(table, preset=preset, weights=weights, alpha=alpha, history=history, seed=seed)
    rows, verdict = ablation(table, verifications, alpha=alpha, seed=seed)
    noisy = {n for study in split(table, Roles.from_table(table)) for n in study.noisy_metrics}
    sentence = f"{scores.sentence} {verdict}"
    if noisy and "too noisy" not in sentence:
        sentence += f" Too noisy to be used: {', '.join(sorted(noisy))}."
    return ScoreReport(
        preset=scores.preset,
        scores=generalization_scores(scores),
        weights=dict(scores.weights),
        sentence=sentence,
        ablation=rows,
        ties=tuple(tuple(str(name) for name in group) for group in scores.ties),
        dropped=tuple(sorted(noisy)),
    )


def generalization_scores(scores: Scores) -> tuple[GeneralizationScore, ...]:
    """The rows of `scores.table` as records, best first."""
    records = scores.table.to_dict(orient="records")
    return tuple(
        GeneralizationScore(
            trial_id=str(name),
            value=float(row["score"]),
            interval=Interval(float(row["lower"]), float(row["upper"]), LEVEL),
            contributions={term: float(row[term]) for term in scores.contributions},
            probability_best=float(row["probability_best"]),
            preset=scores.preset,
        )
        for name, row in zip(scores.table.index, records, strict=True)
    )
