"""The numbers of an evidence run, from tables of trials: rankings, metrics, verdicts.

Partial tau of a metric given other columns: the normal scores of the metric and of the target, each
minus its least-squares fit on those columns, and Kendall's tau of what is left. Given tier 1, the
columns are 1, T1, and the training loss (normal scores) with its square, without which a metric
only says how well a network was fitted: one that has not learnt is flat. Given tier 1 and the
hyperparameters, the regressors of `scoring.basis` besides. The fits use up degrees of freedom that
a bootstrap of the residuals does not know of, so its interval is widened by sqrt((n - 1) / (n - r))
with r the rank of the columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from scipy import stats

from llp.records import FlatnessProfile, Interval, Verification
from llp.reporting.evidence_rows import (
    NO_INTERVAL,
    MetricRow,
    Ranking,
    TargetEvidence,
    Verdict,
)
from llp.scoring import Roles, ablation, calibrate, score
from llp.scoring.basis import basis
from llp.scoring.ranks import Array, normal_scores, regret, tau, tau_interval
from llp.scoring.roles import TARGET, TEST
from llp.scoring.terms import Study, spread, t1

TRANSFERRED = "score, learnt elsewhere"
CEILING = "noise ceiling"
WITH_METRICS = ("T2", "llp")
SPARE = 5
"""Configurations there must be beyond the regressors for a partial tau."""


def target_evidence(
    target: str,
    table: pd.DataFrame,
    profiles: Sequence[FlatnessProfile],
    verifications: Sequence[Verification],
    others: Sequence[pd.DataFrame],
    *,
    probe_share: float,
    metrics_share: float,
    seed: int = 0,
) -> TargetEvidence:
    """All that one study says about one target.

    Args:
        target: A key of `evidence_rows.TARGETS`.
        table: `scoring.study_table` with that target.
        profiles: For the costs of metrics.
        verifications: With the accuracies of that target, for the noise ceiling.
        others: Tables of the other studies, with the same target.
        probe_share: Cost of a probe, in full trainings.
        metrics_share: Cost of measuring one configuration, in full trainings.
        seed: Of folds, draws and bootstraps.
    """
    rows, _ = ablation(table, verifications, seed=seed)
    finished = int(np.isfinite(pd.to_numeric(table[TARGET])).sum())
    rankings = [
        Ranking(
            name=row.name,
            tau=row.tau,
            interval=row.interval,
            regret_at_1=row.regret_at_1,
            regret_at_5=row.regret_at_5,
            cost=1.0 if row.name == CEILING else _cost(row.name, probe_share, metrics_share),
            learnt_from=finished if "h" in row.name or "T2" in row.name else 0,
        )
        for row in rows
    ]
    if others:
        ceiling = [row for row in rankings if row.name == CEILING]
        rankings = [row for row in rankings if row.name != CEILING]
        rankings.append(_transferred(table, others, probe_share + metrics_share, seed))
        rankings += ceiling
    return TargetEvidence(
        target=target,
        num=finished,
        rankings=tuple(rankings),
        metrics=tuple(metric_rows(table, profiles, seed=seed)),
        verdict=verdict([table], seed=seed),
    )


def _cost(name: str, probe_share: float, metrics_share: float) -> float:
    return probe_share + (metrics_share if any(word in name for word in WITH_METRICS) else 0.0)


def transferred_scores(
    table: pd.DataFrame, others: Sequence[pd.DataFrame], *, seed: int = 0
) -> Array:
    """The product's score of every row, its weights earned on `others` and nothing known here."""
    blind = table.copy()
    blind.attrs = dict(table.attrs)
    blind[TARGET] = math.nan
    found = score(blind, history=list(others), seed=seed).table["score"]
    return np.asarray(found.reindex(table.index).to_numpy(dtype=np.float64))


def _transferred(
    table: pd.DataFrame, others: Sequence[pd.DataFrame], cost: float, seed: int
) -> Ranking:
    values, target = transferred_scores(table, others, seed=seed), judge(table)
    known = np.isfinite(target)
    finished = sum(int(np.isfinite(pd.to_numeric(other[TARGET])).sum()) for other in others)
    return Ranking(
        name=TRANSFERRED,
        tau=tau(values[known], target[known]),
        interval=tau_interval(values[known], target[known], seed=seed),
        regret_at_1=regret(values[known], target[known], 1),
        regret_at_5=regret(values[known], target[known], 5),
        cost=cost,
        learnt_from=finished,
    )


def judge(table: pd.DataFrame) -> Array:
    """The test accuracies that rankings are judged by; NaN for configurations without one."""
    return np.asarray(pd.to_numeric(table[TEST], errors="coerce").to_numpy(dtype=np.float64))


def metric_rows(
    table: pd.DataFrame, profiles: Sequence[FlatnessProfile] = (), *, seed: int = 0
) -> list[MetricRow]:
    """What every tier-2 metric of a study says about its target, and what it costs."""
    roles = Roles.from_table(table)
    # Numbered rows keep the order of the table; `split` would sort them.
    study = Study(table.reset_index(drop=True), replace(roles, study=None))
    matrix = basis([study.table], roles.hyperparameters)[0][0]
    target, own = judge(table), t1(study)
    rate = study.numeric("learning_rate") if "learning_rate" in study.table else None
    found = []
    for name in roles.tier2:
        values = study.numeric(name)
        rows = np.isfinite(values) & np.isfinite(target)
        x, y = normal_scores(values[rows]), normal_scores(target[rows])
        columns = [own[rows]]
        for loss in roles.of_family("train_loss")[:1]:
            z = normal_scores(study.signal(loss)[rows])
            columns += [z, z**2]
        plain = np.stack(columns, axis=1)
        given_t1, given_t1_interval = partial_tau(x, y, plain, seed=seed)
        both = np.concatenate([plain, matrix[rows]], axis=1)
        given_h, given_h_interval = partial_tau(x, y, both, seed=seed)
        errors = study.standard_error(name)
        wide = spread(values)
        typical = float(np.median(errors[np.isfinite(values)])) if errors is not None else math.nan
        costs = [p[name] for p in profiles if any(m.name == name for m in p.measurements)]
        found.append(
            MetricRow(
                name=name,
                num=int(rows.sum()),
                tau=tau(x, y),
                interval=tau_interval(x, y, seed=seed),
                given_t1=given_t1,
                given_t1_interval=given_t1_interval,
                given_t1_h=given_h,
                given_t1_h_interval=given_h_interval,
                log_learning_rate=math.nan if rate is None else tau(x, rate[rows]),
                noise=typical / wide if wide > 0 else math.nan,
                dropped=name in study.noisy_metrics,
                samples=_mean([m.samples for m in costs]),
                samples_alone=_mean([m.samples_alone for m in costs]),
            )
        )
    return found


def partial_tau(x: Array, y: Array, given: Array, *, seed: int = 0) -> tuple[float, Interval]:
    """Tau of what is left of `x` and `y` after their least-squares fits on 1 and `given` `[n, p]`.

    NaN with fewer than `SPARE` rows beyond the regressors.
    """
    design = np.concatenate([np.ones((len(x), 1)), given], axis=1)
    rank = int(np.linalg.matrix_rank(design))
    if len(x) < rank + SPARE:
        return math.nan, NO_INTERVAL
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    # What is left of a column that the others explain is rounding, which has ranks too.
    clean = [np.where(np.abs(v) < 1e-9, 0.0, v) for v in left]
    value, found = tau(*clean), tau_interval(*clean, seed=seed)
    wider = math.sqrt((len(x) - 1) / (len(x) - rank))
    low, high = value - wider * (value - found.low), value + wider * (found.high - value)
    return value, Interval(max(-1.0, low), min(1.0, high), found.level)


def verdict(tables: Sequence[pd.DataFrame], *, seed: int = 0) -> Verdict:
    """Whether tier 2 earns a weight on the finished configurations of `tables`."""
    found = calibrate(list(tables), seed=seed)
    gain = found.gain_tier2
    if gain is None:
        return Verdict(math.nan, NO_INTERVAL, math.nan, False, found.sentence)
    return Verdict(gain.value, gain.interval, gain.shuffled, found.tier2_enters, found.sentence)


def over_studies(studies: Sequence[TargetEvidence]) -> tuple[Ranking, ...]:
    """Every ranking in the mean over the studies that have it, with a t interval over studies."""
    names = dict.fromkeys(row.name for study in studies for row in study.rankings)
    order = [name for name in names if name != CEILING] + [n for n in names if n == CEILING]
    found = []
    for name in order:
        rows = [row for study in studies for row in study.rankings if row.name == name]
        rows = [row for row in rows if math.isfinite(row.tau)]
        if not rows:
            continue
        found.append(
            Ranking(
                name=name,
                tau=fmean(row.tau for row in rows),
                interval=mean_interval([row.tau for row in rows]),
                regret_at_1=fmean(row.regret_at_1 for row in rows),
                regret_at_5=fmean(row.regret_at_5 for row in rows),
                cost=fmean(row.cost for row in rows),
                learnt_from=round(fmean(row.learnt_from for row in rows)),
                num_studies=len(rows),
            )
        )
    return tuple(found)


def metrics_over_studies(studies: Sequence[TargetEvidence]) -> tuple[MetricRow, ...]:
    """Every metric in the mean over the studies that measured it, with t intervals over studies.

    `num` counts configurations; a metric is dropped when every study drops it.
    """
    found = []
    for name in dict.fromkeys(row.name for study in studies for row in study.metrics):
        rows = [row for study in studies for row in study.metrics if row.name == name]
        taus, t1s, both = (
            [value for value in (getattr(row, key) for row in rows) if math.isfinite(value)]
            for key in ("tau", "given_t1", "given_t1_h")
        )
        found.append(
            MetricRow(
                name=name,
                num=sum(row.num for row in rows),
                tau=_mean(taus),
                interval=mean_interval(taus),
                given_t1=_mean(t1s),
                given_t1_interval=mean_interval(t1s),
                given_t1_h=_mean(both),
                given_t1_h_interval=mean_interval(both),
                log_learning_rate=_mean([row.log_learning_rate for row in rows]),
                noise=_mean([row.noise for row in rows]),
                dropped=all(row.dropped for row in rows),
                samples=_mean([row.samples for row in rows]),
                samples_alone=_mean([row.samples_alone for row in rows]),
            )
        )
    return tuple(found)


def mean_interval(values: Sequence[float], level: float = 0.9) -> Interval:
    """Student's interval of a mean of taus, within -1 to 1; NaN for fewer than two values."""
    if len(values) < 2:
        return NO_INTERVAL
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values)
    half /= math.sqrt(len(values))
    return Interval(max(-1.0, fmean(values) - half), min(1.0, fmean(values) + half), level)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def by_name(rows: Sequence[Ranking]) -> Mapping[str, Ranking]:
    """Rankings by their name."""
    return {row.name: row for row in rows}
