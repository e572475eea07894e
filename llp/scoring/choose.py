"""Who is measured, who is verified, and who wins.

Validation data chooses throughout; the test split is only reported. Each choice is a pure function
of its arguments, with ties broken by trial id.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t as student

from llp.errors import NoTrialSucceeded
from llp.records import TrialResult, Verification
from llp.scoring.score import Scores
from llp.scoring.table import study_table

CONFIDENCE = 0.95


def choose_for_measurement(trials: Sequence[TrialResult], top_k: int) -> list[str]:
    """Trial ids to measure, best first: furthest level, then validation accuracy, then loss.

    Trials that diverged or have no checkpoint are never chosen, so there may be fewer than `top_k`.
    """
    table = study_table(trials)
    with_weights = {r.trial.trial_id for r in trials if r.checkpoint is not None}
    usable = table[[name in with_weights for name in table.index]]
    usable = usable[usable["validation_accuracy"].notna()]
    loss = usable["validation_loss"].astype(float).fillna(math.inf)
    rows = sorted(
        zip(
            -usable["level"].astype(float),
            -usable["validation_accuracy"].astype(float),
            loss,
            map(str, usable.index),
            strict=True,
        )
    )
    return [row[-1] for row in rows[: max(0, top_k)]]


def choose_for_verification(scores: Scores, top_k: int) -> list[str]:
    """The `top_k` best-scored trial ids, best first; trials known to have diverged are left out."""
    candidates = [str(name) for name in scores.ranking if name not in scores.diverged]
    return candidates[: max(0, top_k)]


def choose_winner(
    verifications: Sequence[Verification], scores: Scores | None = None
) -> tuple[str, str]:
    """The trial with the best mean validation accuracy over its full trainings, and why.

    Ties go to the lower mean validation loss, then to the better score, then to the trial id. The
    reason gives the margin over the runner-up with its standard error: paired over seeds when both
    were trained with the same ones, Welch's otherwise. They count as separated when the margin
    exceeds the two-sided 95 % quantile of Student's t times the standard error.

    Raises:
        NoTrialSucceeded: No verification has a finite validation accuracy.
    """
    runs: dict[str, dict[int, Verification]] = defaultdict(dict)
    for verification in verifications:
        if math.isfinite(verification.validation_accuracy):
            runs[verification.trial_id][verification.seed] = verification
    if not runs:
        raise NoTrialSucceeded("no full training ended with a usable validation accuracy")
    place = {name: i for i, name in enumerate(scores.ranking)} if scores is not None else {}

    def key(name: str) -> tuple[float, float, int, str]:
        loss = _mean(runs[name], "validation_loss")
        return (
            -round(_mean(runs[name], "validation_accuracy"), 12),
            loss if math.isfinite(loss) else math.inf,
            place.get(name, len(place)),
            name,
        )

    order = sorted(runs, key=key)
    best = order[0]
    accuracy = 100 * _mean(runs[best], "validation_accuracy")
    seeds = len(runs[best])
    reason = (
        f"{best} has the best validation accuracy after full training: {accuracy:.2f} % "
        f"{f'on average over {seeds} seeds' if seeds > 1 else 'with one seed'}"
    )
    if len(order) == 1:
        return best, f"{reason}; no other trial was verified, so there is nothing to compare with."
    return best, f"{reason}, {_comparison(best, order[1], runs)}."


def _mean(runs: Mapping[int, Verification], name: str) -> float:
    return float(np.mean([getattr(run, name) for run in runs.values()]))


def _comparison(best: str, second: str, runs: Mapping[str, Mapping[int, Verification]]) -> str:
    a, b = (
        {seed: 100 * run.validation_accuracy for seed, run in runs[name].items()}
        for name in (best, second)
    )
    margin = float(np.mean(list(a.values())) - np.mean(list(b.values())))
    lead = f"{margin:.2f} points ahead of {second}"
    if margin < 1e-9:
        lead = f"level with {second} (its validation loss or score decided)"
    error, degrees, how = difference_error(a, b)
    if math.isnan(error):
        return f"{lead}; too few seeds to say whether that is more than chance"
    needed = float(student.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    separated = margin > max(needed, 1e-9)
    verdict = (
        "they are separated at the 95 % level"
        if separated
        else "that is within what seeds alone can do, so the two are not separated"
    )
    return f"{lead} (standard error {error:.2f} {how}); {verdict}"


def difference_error(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[float, float, str]:
    """Standard error of mean(a) - mean(b), its degrees of freedom, and how it was obtained.

    `a` and `b` map seed to result. Paired when the seeds are the same, Welch-Satterthwaite
    otherwise; NaN when either has fewer than two seeds.
    """
    if len(a) < 2 or len(b) < 2:
        return math.nan, math.nan, ""
    if set(a) == set(b):
        difference = np.array([a[seed] - b[seed] for seed in a])
        error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
        return error, len(difference) - 1.0, "paired over seeds"
    x, y = np.array(list(a.values())), np.array(list(b.values()))
    u, v = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if u + v == 0:
        return 0.0, float(len(x) + len(y) - 2), "over seeds"
    degrees = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
    return math.sqrt(u + v), float(degrees), "over seeds"
