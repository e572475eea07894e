"""The ablation table: how well each way of ranking agrees with verified test accuracy.

Rows: validation_accuracy, validation_loss, T1, llp always (llp where a sharpness was measured);
T1+h, T1+T2, T1+h+T2 and T1+h+shuffled T2 from 12 finished trials on, always predicted for trials
that were left out of the fit; the noise ceiling where trials were verified with several seeds.

Rankings are judged by the column `test_accuracy` where a table has one, by its target otherwise.
That is reporting: the weights are learnt from the target, the validation accuracy of the full
trainings, and no weight, choice or winner depends on a test accuracy.

Cost is in samples seen. T1 costs all probes; metrics add their seconds at the probes' own rate of
samples per second; h and T2 add the full trainings that their weights were learnt from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from llp.records import AblationRow, Interval, Verification
from llp.scoring.calibration import MIN_FINISHED, Model, fit, split
from llp.scoring.evidence import Gain
from llp.scoring.ranks import Array, normal_scores, regret, tau, tau_interval
from llp.scoring.roles import TARGET, TEST, Roles
from llp.scoring.score import score
from llp.scoring.terms import GATE_MINIMUM, Study, t1

MIN_VERIFIED = 3


def ablation(
    table: pd.DataFrame,
    verifications: Sequence[Verification] = (),
    *,
    roles: Roles | None = None,
    alpha: float = 0.1,
    seed: int = 0,
) -> tuple[tuple[AblationRow, ...], str]:
    """The rows, and one sentence that says whether flatness helped here: yes, no, or unknown.

    Args:
        table: Of one study; rankings are judged by its test accuracies, or by its target where it
            has none.
        verifications: For the noise ceiling.
        roles: What the columns mean; default: `Roles.from_table(table)`.
        alpha: Of the `llp` row.
        seed: Of bootstraps and folds.

    Raises:
        SpecError: A column that the roles name is missing.
    """
    roles = roles or Roles.from_table(table)
    num, judge = 0, roles.target or ""
    # Numbered rows: labels of a foreign table may repeat.
    table = table.reset_index(drop=True)
    if roles.target is not None and len(table):
        (study,) = split(table, replace(roles, study=None))
        if TEST in table and np.isfinite(study.numeric(TEST)).any():
            judge = TEST
        target = study.numeric(judge)
        rows = np.flatnonzero(np.isfinite(study.target) & np.isfinite(target))
        num = len(rows)
    if num < MIN_VERIFIED:
        return (), (
            f"Did flatness help here? Not enough evidence: {num} verified "
            f"trial{'s' * (num != 1)}, and comparing rankings takes at least {MIN_VERIFIED}."
        )
    model = fit([study], seed=seed) if num >= MIN_FINISHED else None
    folds = np.arange(num)
    if model is not None:
        fitted = np.array([row for _, row in model.finished])
        folds = np.flatnonzero(np.isin(fitted, rows))
        rows = fitted[folds]
    target = target[rows]
    probes, metrics, verified = _costs(table)
    rankings: list[tuple[str, Array, int]] = []

    def lexicographic(values: Array) -> Array:
        return normal_scores(values, study.band)[rows]

    rankings.append((roles.primary, lexicographic(study.primary), probes))
    for name in roles.of_family("loss")[:1]:
        rankings.append((name, lexicographic(study.signal(name)), probes))
    rankings.append(("T1", t1(study)[rows], probes))
    if model is not None:
        for name, samples in (
            ("T1+h", probes + verified),
            ("T1+T2", probes + metrics + verified),
            ("T1+h+T2", probes + metrics + verified),
            ("T1+h+shuffled T2", probes + metrics + verified),
        ):
            if name in model.out_of_fold:
                rankings.append((name, model.out_of_fold[name][folds], samples))
    llp = score(table, roles=roles, preset="llp", alpha=alpha, seed=seed)
    if llp.preset == "llp":
        values = llp.table["score"].loc[study.table.index].to_numpy(dtype=np.float64)[rows]
        rankings.append(("llp", values, probes + metrics))

    built = [
        AblationRow(
            name=name,
            tau=tau(values, target),
            interval=tau_interval(values, target, seed=seed),
            regret_at_1=regret(values, target, 1),
            regret_at_5=regret(values, target, 5),
            samples_seen=samples,
            num_trials=len(rows),
        )
        for name, values, samples in rankings
    ]
    ceiling = noise_ceiling(verifications, seed=seed)
    sentence = _sentence(study, model, num)
    if judge == TEST and roles.target != TEST:
        sentence += " The ablation table judges by test accuracy, which chooses nothing."
    return tuple(built + ([ceiling] if ceiling is not None else [])), sentence


def noise_ceiling(verifications: Sequence[Verification], *, seed: int = 0) -> AblationRow | None:
    """How well one full training predicts the mean of the others: no probe can do better.

    Tau and regrets are means over the seeds that all verified trials share; None with fewer than
    two such seeds or fewer than three trials. With two seeds it is the tau between them.
    """
    runs: dict[str, dict[int, Verification]] = defaultdict(dict)
    for verification in verifications:
        if math.isfinite(verification.test_accuracy):
            runs[verification.trial_id][verification.seed] = verification
    if len(runs) < MIN_VERIFIED:
        return None
    shared = sorted(set.intersection(*(set(own) for own in runs.values())))
    if len(shared) < 2:
        return None
    accuracy = np.array([[own[s].test_accuracy for s in shared] for own in runs.values()])
    taus, ones, fives, lows, highs = [], [], [], [], []
    for column in range(len(shared)):
        single, others = accuracy[:, column], np.delete(accuracy, column, axis=1).mean(axis=1)
        interval = tau_interval(single, others, seed=seed)
        taus.append(tau(single, others))
        lows.append(interval.low)
        highs.append(interval.high)
        ones.append(regret(single, others, 1))
        fives.append(regret(single, others, 5))
    samples = sum(run.samples_seen for own in runs.values() for run in own.values())
    total = sum(len(own) for own in runs.values())
    mean = float(np.mean(taus))
    return AblationRow(
        name="noise ceiling",
        tau=mean,
        interval=Interval(float(np.mean(lows)), float(np.mean(highs))),
        regret_at_1=float(np.mean(ones)),
        regret_at_5=float(np.mean(fives)),
        samples_seen=round(samples * len(runs) / total),
        num_trials=len(runs),
    )


def _costs(table: pd.DataFrame) -> tuple[int, int, int]:
    """Samples seen by all probes, by all metrics (converted), and by verification."""

    def total(name: str) -> float:
        return float(pd.to_numeric(table[name], errors="coerce").sum()) if name in table else 0.0

    probes, seconds = total("samples_seen"), total("seconds")
    metrics = total("tier2_seconds") * probes / seconds if seconds > 0 else 0.0
    return round(probes), round(metrics), round(total("verification_samples"))


def _sentence(study: Study, model: Model | None, num: int) -> str:
    """Did flatness help here, from the numbers."""
    question = "Did flatness help here?"
    if not study.roles.tier2:
        return f"{question} Unknown: no tier-2 metric was measured."
    if model is None:
        return (
            f"{question} Not enough evidence: {num} verified trials, "
            f"and weighing tier 2 takes {MIN_FINISHED}."
        )
    gain = model.calibration.gain_tier2
    if gain is None:
        measured = max(
            int((study.learnt & ~np.isnan(study.metric(name))).sum()) for name in study.roles.tier2
        )
        return (
            f"{question} Not enough evidence: tier 2 was measured on {measured} trials that had "
            f"learnt enough, and weighing it takes {GATE_MINIMUM}."
        )
    return f"{question} {_verdict(gain, model.calibration.tier2_enters, study.roles.target)}"


def _verdict(gain: Gain, enters: bool, target: str | None) -> str:
    words = "verified validation accuracy" if target == TARGET else target
    numbers = (
        f"{gain.value:+.3f} in cross-validated tau with {words}, 90 % interval "
        f"[{gain.interval.low:+.3f}, {gain.interval.high:+.3f}]; shuffled {gain.shuffled:+.3f}"
    )
    if enters:
        return f"Yes: adding tier 2 changed the ranking for the better ({numbers})."
    if gain.value <= 0:
        return f"No: adding tier 2 did not improve the ranking ({numbers})."
    return f"Not enough evidence: the gain cannot be told from chance ({numbers})."
