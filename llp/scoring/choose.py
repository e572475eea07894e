"""Who is measured, who is verified, and who wins.

Validation data chooses throughout; the test split is only reported. Each choice is a pure function
of its arguments, with ties broken by trial id.

How sure a margin d between two configurations is. Both were trained with m seeds and judged on the
same n validation images; another m seeds *and* another n images could have given another margin:

    error^2 = max(s^2, 1 / (12 n^2)) / m  +  (p_a (1 - p_a) + p_b (1 - p_b)) / n

First part: s^2 is the variance of the margin over seeds (paired where the seeds are the same). An
accuracy is a multiple of 1/n, so equal margins are equal only up to rounding, whose variance
1 / (12 n^2) is the least that s^2 can be. Second part: on one image the margin is +1, 0 or -1, with
variance p_a (1 - p_a) + p_b (1 - p_b) - 2 cov. Which images were right is not recorded, so cov is
unknown; it is taken as 0, an upper bound of the variance as long as two networks do not find
*different* images hard. (Dropping even that assumption adds 2 (1 - p_a) (1 - p_b) at most, the
price of disjoint errors.) p_a and p_b enter as (n p + 1/2) / (n + 1), so that the error is not 0
where no image was wrong.

The margin is held against Student's t with Welch-Satterthwaite's degrees of freedom, those of the
seeds for the first part and infinity for the second: close to the normal quantile where the images
decide and to the t quantile where the seeds do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t as student

from llp.errors import NoTrialSucceeded
from llp.records import Rung, TrialResult, Verification
from llp.scoring.score import Scores, verification_set
from llp.scoring.table import study_table

CONFIDENCE = 0.95


def choose_for_measurement(
    trials: Sequence[TrialResult], top_k: int, *, rungs: Sequence[Rung] = ()
) -> list[str]:
    """Trial ids to measure, best first: furthest level, then validation accuracy, then loss.

    Trials that diverged or have no checkpoint are never chosen, so there may be fewer than `top_k`.
    `rungs` are those of the study; see `table.study_table`.
    """
    table = study_table(trials, rungs=rungs)
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


def choose_for_verification(
    scores: Scores, top_k: int, *, probability: float | None = None
) -> list[str]:
    """The `top_k` best-scored trial ids, best first; trials known to have diverged are left out.

    With `probability`, the fewest that together hold the best trial with this probability, and
    `top_k` is the most there may be.
    """
    chosen = scores.ranking if probability is None else verification_set(scores, probability)
    candidates = [str(name) for name in chosen if name not in scores.diverged]
    return candidates[: max(0, top_k)]


def choose_winner(
    verifications: Sequence[Verification],
    scores: Scores | None = None,
    *,
    num_seeds: int | None = None,
    num_validation: int | None = None,
    judged_by: str = "validation accuracy",
) -> tuple[str, str]:
    """The trial with the best mean validation accuracy over its full trainings, and why.

    Trials that finished fewer seeds than expected come after those that finished all: a mean over
    the seeds that happened to survive is no fair comparison. Ties in accuracy go to the lower mean
    validation loss, then to the better score, then to the trial id. The reason gives the margin
    over the best of the others with as many seeds, its standard error and what follows from it (see
    the head of this file), and names the trials that finished too few.

    Args:
        verifications: One per (trial, seed) that finished.
        scores: Break ties.
        num_seeds: Full trainings asked for per trial; default: the most that any trial has.
        num_validation: Validation images behind an accuracy. Without it the error is that of the
            seeds alone, and the reason says so.
        judged_by: What `validation_accuracy` is, for the reason.

    Raises:
        NoTrialSucceeded: No verification has a finite validation accuracy.
    """
    runs: dict[str, dict[int, Verification]] = {v.trial_id: {} for v in verifications}
    for verification in verifications:
        if math.isfinite(verification.validation_accuracy):
            runs[verification.trial_id][verification.seed] = verification
    usable = [name for name in runs if runs[name]]
    if not usable:
        raise NoTrialSucceeded("no full training ended with a usable validation accuracy")
    place = {name: i for i, name in enumerate(scores.ranking)} if scores is not None else {}
    expected = num_seeds or max(len(runs[name]) for name in usable)

    def key(name: str) -> tuple[int, float, float, int, str]:
        loss = _mean(runs[name], "validation_loss")
        return (
            -min(len(runs[name]), expected),
            -round(_mean(runs[name], "validation_accuracy"), 12),
            loss if math.isfinite(loss) else math.inf,
            place.get(name, len(place)),
            name,
        )

    best, *others = sorted(usable, key=key)
    rivals = [name for name in others if key(name)[0] == key(best)[0]]
    accuracy = 100 * _mean(runs[best], "validation_accuracy")
    seeds = len(runs[best])
    reason = (
        f"{best} has the best {judged_by} after full training: {accuracy:.2f} % "
        f"{f'on average over {seeds} seeds' if seeds > 1 else 'with one seed'}"
    )
    if rivals:
        reason += f", {_comparison(best, rivals[0], runs, num_validation)}"
    elif others:
        reason += "; no other trial finished as many seeds, so there is nothing to compare with"
    else:
        reason += "; no other trial was verified, so there is nothing to compare with"
    for name in sorted(name for name in runs if len(runs[name]) < expected):
        reason += f"; {name} finished only {len(runs[name])} of {expected}"
    return best, f"{reason}."


def _mean(runs: Mapping[int, Verification], name: str) -> float:
    return float(np.mean([getattr(run, name) for run in runs.values()]))


def _comparison(
    best: str,
    second: str,
    runs: Mapping[str, Mapping[int, Verification]],
    num_validation: int | None,
) -> str:
    a, b = (
        {seed: run.validation_accuracy for seed, run in runs[name].items()}
        for name in (best, second)
    )
    margin = float(np.mean(list(a.values())) - np.mean(list(b.values())))
    lead = f"{100 * margin:.2f} points ahead of {second}"
    if margin < 1e-9:
        lead = f"level with {second} (its validation loss or score decided)"
    error, degrees, how = difference_error(a, b, num_validation)
    if math.isnan(error):
        return f"{lead}; too few seeds to say whether that is more than chance"
    if error < 1e-9:
        return (
            f"{lead} with every seed; seeds that agree to the last digit say nothing of chance, "
            "so the two are not separated"
        )
    separated = margin > float(student.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    if num_validation:
        cause = "what other seeds and other validation images could change"
        verdict = "they are separated at the 95 % level"
    else:
        cause = "what seeds alone can do"
        verdict = "they are separated at the 95 % level as far as seeds can tell"
    if not separated:
        verdict = f"that is within {cause}, so the two are not separated"
    return f"{lead} (standard error {100 * error:.2f} {how}); {verdict}"


def difference_error(
    a: Mapping[int, float], b: Mapping[int, float], num_validation: int | None = None
) -> tuple[float, float, str]:
    """Standard error of mean(a) - mean(b), its degrees of freedom, and how it was obtained.

    Seeds are paired when they are the same, Welch-Satterthwaite otherwise; all NaN when either has
    fewer than two. With `num_validation` the rounding and sampling of the images come in; for the
    formulas see the head of this file.

    Args:
        a: Seed -> accuracy in [0, 1] (any number without `num_validation`).
        b: Likewise.
        num_validation: Images behind every accuracy, the same ones for all.
    """
    if len(a) < 2 or len(b) < 2:
        return math.nan, math.nan, ""
    rounding = 1 / (12 * num_validation**2) if num_validation else 0.0
    if set(a) == set(b):
        difference = np.array([a[seed] - b[seed] for seed in a])
        seeds = max(float(difference.var(ddof=1)), rounding) / len(difference)
        degrees, how = len(difference) - 1.0, "paired over seeds"
    else:
        x, y = np.array(list(a.values())), np.array(list(b.values()))
        u, v = (max(float(z.var(ddof=1)), rounding) / len(z) for z in (x, y))
        seeds, how = u + v, "over seeds"
        degrees = float(len(x) + len(y) - 2)
        if seeds > 0:
            degrees = seeds**2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
    if not num_validation:
        return math.sqrt(seeds), degrees, how
    images = sum(_binomial_variance(list(z.values()), num_validation) for z in (a, b))
    degrees *= ((seeds + images) / seeds) ** 2
    return math.sqrt(seeds + images), degrees, f"{how} and over {num_validation} validation images"


def _binomial_variance(accuracies: Sequence[float], num_images: int) -> float:
    p = (num_images * float(np.clip(np.mean(accuracies), 0, 1)) + 0.5) / (num_images + 1)
    return p * (1 - p) / num_images
