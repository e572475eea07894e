"""Weights earned on finished trials: T1 -> + hyperparameters (h) -> + tier 2 (T2).

The model of a trial's result y (normal scores of the target within its study) is

    y_i = study effect + c T1_i + sum_p gamma_p H_pi + sum_k b_k gate_ki r_ki

a ridge regression that is shrunk towards T1 alone: c towards 1, gamma and b towards 0, each block
with its own strength, infinity included. A strength is chosen by leave-one-out error (by leave-
study-out when there are three studies or more and the newest has under 12 finished trials) with
the one-standard-error rule: the strongest shrinkage whose error is within one standard error,
paired over trials, of the least. A block then *enters* only if the lower 95 % limit (one-sided) of
its cross-validated gain in Kendall's tau is above 0; strengths are chosen anew inside every fold,
so nothing is judged on trials that tuned it. T2 must gain over T1 + h, and over T1 too when h
stayed out, or it would merely stand in for the hyperparameters. The same is done with T2 shuffled
over the trials of a study, and reported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llp.errors import SpecError
from llp.records import Interval
from llp.scoring.basis import basis
from llp.scoring.ranks import Array, normal_scores, pair_means
from llp.scoring.roles import Roles
from llp.scoring.terms import Observed, Study

MIN_FINISHED = 12
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, np.inf)
PRIOR_SLOPE = 4.0
"""Pseudo-observations that hold c at 1."""
PRIOR_EFFECT = 0.1
MAX_EVIDENCE = 1000
"""More finished trials than this are thinned for the cross-validated evidence."""


@dataclass(frozen=True)
class Gain:
    """Cross-validated gain in tau of one block over the ladder below it.

    Attributes:
        value: Mean gain.
        interval: Two-sided 90 %; its lower end is the one-sided 95 % limit.
        shuffled: Mean gain of the same block shuffled over trials; NaN for h.
    """

    value: float
    interval: Interval
    shuffled: float = float("nan")


@dataclass(frozen=True)
class Calibration:
    """Weights with their evidence; plain data that can be written as JSON.

    Attributes:
        version: Of this layout.
        target: Column that was calibrated on.
        num_finished: Finished trials used.
        num_studies: Studies with finished trials.
        weights: Term -> weight; T1 columns, `h: regressor`, tier-2 metrics.
        standard_errors: Of the weights.
        hyperparameters_enter: Whether h earned its place.
        tier2_enters: Whether T2 earned its place.
        gain_hyperparameters: Of T1 + h over T1; None under 12 finished trials.
        gain_tier2: Of T2 over what it was added to; None when no metric could be used.
        dropped: Tier-2 metrics too noisy to be used.
        sentence: All of this in words.
    """

    target: str
    num_finished: int
    num_studies: int
    weights: dict[str, float]
    standard_errors: dict[str, float]
    hyperparameters_enter: bool = False
    tier2_enters: bool = False
    gain_hyperparameters: Gain | None = None
    gain_tier2: Gain | None = None
    dropped: tuple[str, ...] = ()
    sentence: str = ""
    version: int = 1


@dataclass(frozen=True, eq=False)
class Model:
    """A fitted calibration, ready to score the studies it was fitted with.

    Attributes:
        calibration: The evidence.
        mean: Fitted [c, gamma.., b..].
        covariance: Of `mean`.
        regressors: Names of the p columns of H.
        basis: H of every study, [rows, p].
        metrics: Names of the k tier-2 columns.
        out_of_fold: Ladder step -> cross-validated prediction of all finished trials.
        finished: (study number, row) of every finished trial, in the order of `out_of_fold`.
    """

    calibration: Calibration
    mean: Array
    covariance: Array
    regressors: tuple[str, ...]
    basis: tuple[Array, ...]
    metrics: tuple[str, ...]
    out_of_fold: dict[str, Array] = field(default_factory=dict)
    finished: tuple[tuple[int, int], ...] = ()


def calibrate(
    tables: Sequence[pd.DataFrame] | pd.DataFrame,
    *,
    target: str | None = None,
    roles: Roles | None = None,
    seed: int = 0,
) -> Calibration:
    """Weights earned on the finished trials of `tables`, with the evidence for them.

    Args:
        tables: One or more tables; a `study` column splits a table further.
        target: Column to calibrate on; default: the roles'.
        roles: For all tables; default: each table's own.
        seed: Of folds and shuffles.

    Raises:
        SpecError: A table lacks a column that its roles name, or has no target.
    """
    studies = []
    for table in [tables] if isinstance(tables, pd.DataFrame) else tables:
        own = roles or Roles.from_table(table)
        if target is not None:
            own = Roles.from_mapping({**own.to_plain(), "target": target})
        if own.target is None:
            raise SpecError("roles: no target column to calibrate on")
        studies += split(table, own)
    return fit(studies, seed=seed).calibration


def split(table: pd.DataFrame, roles: Roles) -> list[Study]:
    """The studies of a table, rows ordered by their numbers.

    That order makes folds and draws, and so every result, the same whatever the trials are called
    and however the table was sorted.

    Raises:
        SpecError: A column that `roles` names is missing.
    """
    roles.check(table)
    if roles.study is None:
        return [_canonical(Study(table, roles))]
    keys = table[roles.study].astype(str)
    return [_canonical(Study(table[keys == key], roles)) for key in dict.fromkeys(keys)]


def _canonical(study: Study) -> Study:
    keys = [study.numeric(name) for name in [*study.roles.tier2, *study.roles.tier1]]
    keys += [study.target, study.primary]
    order = np.lexsort([np.where(np.isnan(key), -np.inf, key) for key in keys])
    return Study(study.table.iloc[order], study.roles)


def t1(study: Study) -> Array:
    """T1 of every trial of a study."""
    inputs = Observed(study)
    total = np.zeros(len(study))
    for column, weight in study.t1_weights.items():
        total += weight * study.t1(column, inputs.signal(column))
    return total


def fit(studies: Sequence[Study], *, seed: int = 0) -> Model:
    """The calibrated model of `studies`, the one to be scored first; T1 alone under 12 trials."""
    first = studies[0]
    names = tuple(dict.fromkeys(n for s in studies for n in s.roles.hyperparameters))
    matrices, regressors = basis([s.table for s in studies], names)
    noisy = {name for s in studies for name in s.noisy_metrics}
    metrics = tuple(
        name
        for name in dict.fromkeys(n for s in studies for n in s.roles.tier2)
        if name not in noisy and any(name in s.roles.tier2 and s.gate(name).any() for s in studies)
    )
    rows = [np.flatnonzero(np.isfinite(s.target)) for s in studies]
    finished = tuple((number, int(row)) for number, own in enumerate(rows) for row in own)
    used = [number for number, own in enumerate(rows) if len(own)]
    target = first.roles.target or "target"
    weights = dict(first.t1_weights)

    def unfitted(sentence: str) -> Model:
        calibration = Calibration(
            target,
            len(finished),
            len(used),
            weights,
            dict.fromkeys(weights, 0.0),
            dropped=tuple(sorted(noisy)),
            sentence=sentence,
        )
        p = len(regressors)
        q = len(metrics)
        mean = np.concatenate([[1.0], np.zeros(p + q)])
        covariance = np.zeros((1 + p + q,) * 2)
        return Model(calibration, mean, covariance, tuple(regressors), tuple(matrices), metrics)

    if len(finished) < MIN_FINISHED:
        return unfitted(
            f"Not enough evidence to weigh anything beside validation accuracy: {len(finished)} "
            f"finished trial{'s' * (len(finished) != 1)}, {MIN_FINISHED} are needed."
        )

    problem = _Problem(studies, rows, matrices, metrics, np.random.default_rng(seed))
    oof, gains, enters = problem.ladder()
    strengths = problem.strengths(np.arange(len(problem.y)), "h" in enters, "T2" in enters)
    mean, covariance = problem.solve(np.arange(len(problem.y)), *strengths)
    p = len(regressors)
    deviations = np.sqrt(np.clip(np.diag(covariance), 0, None))
    slope = max(float(mean[0]), 0.05)
    mean[0] = slope
    named = {name: slope * weight for name, weight in weights.items()}
    errors = {name: float(deviations[0]) * weight for name, weight in weights.items()}
    if "h" in enters:
        named |= {f"h: {n}": float(v) for n, v in zip(regressors, mean[1 : 1 + p], strict=True)}
        errors |= {f"h: {n}": float(v) for n, v in zip(regressors, deviations[1:], strict=False)}
    if metrics:
        named |= {n: float(v) for n, v in zip(metrics, mean[1 + p :], strict=True)}
        errors |= {n: float(v) for n, v in zip(metrics, deviations[1 + p :], strict=True)}
    calibration = Calibration(
        target=target,
        num_finished=len(finished),
        num_studies=len(used),
        weights=named,
        standard_errors=errors,
        hyperparameters_enter="h" in enters,
        tier2_enters="T2" in enters,
        gain_hyperparameters=gains.get("h"),
        gain_tier2=gains.get("T2"),
        dropped=tuple(sorted(noisy)),
        sentence=_sentence(len(finished), len(used), gains, enters, sorted(noisy)),
    )
    return Model(
        calibration,
        mean,
        covariance,
        tuple(regressors),
        tuple(matrices),
        metrics,
        oof,
        tuple(finished[i] for i in problem.kept),
    )


def _sentence(
    num: int, num_studies: int, gains: dict[str, Gain], enters: set[str], noisy: list[str]
) -> str:
    studies = f"{num_studies} stud{'y' if num_studies == 1 else 'ies'}"
    parts = [f"Weights rest on {num} finished trials of {studies}"]
    for block, name in (("h", "hyperparameters (prior knowledge)"), ("T2", "tier 2")):
        gain = gains.get(block)
        if gain is None:
            parts.append(f"{name}: nothing to use" if block == "h" else _NO_T2)
            continue
        numbers = f"tau {gain.value:+.3f}, lower 95 % limit {gain.interval.low:+.3f}"
        if block == "T2":
            numbers += f", shuffled {gain.shuffled:+.3f}"
        parts.append(f"{name} {'entered' if block in enters else 'stayed out'} ({numbers})")
    if noisy:
        parts.append(f"too noisy to use: {', '.join(noisy)}")
    return "; ".join(parts) + "."


_NO_T2 = "tier 2: not measured on at least 12 trials that have learnt enough"


class _Problem:
    """The pooled regression: columns [study effects | T1 | H | R], offset T1."""

    def __init__(
        self,
        studies: Sequence[Study],
        rows: Sequence[NDArray[np.int64]],
        matrices: Sequence[Array],
        metrics: tuple[str, ...],
        rng: np.random.Generator,
    ) -> None:
        blocks = []
        for number, (study, own) in enumerate(zip(studies, rows, strict=True)):
            r = np.zeros((len(study), len(metrics)))
            for k, name in enumerate(metrics):
                if name in study.roles.tier2:
                    r[:, k] = study.t2(name, study.metric(name))
            y = normal_scores(study.target[own])
            one = t1(study)[own]
            blocks.append((np.full(len(own), number), y, one, matrices[number][own], r[own]))
        self.study, self.y, self.t1, self.h, self.r = (
            np.concatenate([block[i] for block in blocks]) for i in range(5)
        )
        self.rng = rng
        self.effects = (self.study[:, None] == np.unique(self.study)[None, :]).astype(np.float64)
        counts = np.bincount(self.study)
        self.by_study = len(counts[counts > 0]) >= 3 and counts[0] < MIN_FINISHED
        num = len(self.y)
        self.kept = (
            np.arange(num)
            if num <= MAX_EVIDENCE
            else np.sort(rng.choice(num, MAX_EVIDENCE, replace=False))
        )
        if self.by_study:
            self.fold = self.study[self.kept]
        else:
            folds = min(len(self.kept), 20 if num <= 100 else 10 if num <= 1000 else 5)
            self.fold = rng.permutation(np.arange(len(self.kept)) % folds)

    def _design(self, r: Array, lam_h: float, lam_2: float) -> tuple[Array, Array]:
        parts = [self.effects, self.t1[:, None]]
        penalty = [np.full(self.effects.shape[1], PRIOR_EFFECT), np.array([PRIOR_SLOPE])]
        for block, lam in ((self.h, lam_h), (r, lam_2)):
            if np.isfinite(lam) and block.shape[1]:
                parts.append(block)
                penalty.append(np.full(block.shape[1], lam))
        return np.concatenate(parts, axis=1), np.concatenate(penalty)

    def _choose(self, rows: NDArray[np.int64], r: Array, lam_h: float | None) -> float:
        """The strength of H (`lam_h` None) or, given it, of `r`, by cross-validation in `rows`."""
        squared = []
        for lam in STRENGTHS:
            x, penalty = self._design(r, *((lam, np.inf) if lam_h is None else (lam_h, lam)))
            x, y = x[rows], (self.y - self.t1)[rows]
            inner = np.linalg.solve(x.T @ x + np.diag(penalty), x.T)
            residual = y - x @ (inner @ y)
            if self.by_study and len(np.unique(self.study[rows])) > 1:
                for study in np.unique(self.study[rows]):
                    own = np.flatnonzero(self.study[rows] == study)
                    hat = x[own] @ inner[:, own]
                    residual[own] = np.linalg.solve(np.eye(len(own)) - hat, residual[own])
                    residual[own] -= residual[own].mean()
            else:
                residual /= np.clip(1 - np.einsum("ij,ji->i", x, inner), 1e-9, None)
            squared.append(residual**2)
        errors = np.array(squared)
        best = int(errors.mean(axis=1).argmin())
        excess = errors - errors[best]
        within = excess.mean(axis=1) <= excess.std(axis=1) / np.sqrt(len(rows)) + 1e-12
        return float(STRENGTHS[int(np.flatnonzero(within).max())])

    def strengths(
        self, rows: NDArray[np.int64], use_h: bool, use_2: bool, r: Array | None = None
    ) -> tuple[float, float]:
        """Chosen strengths of H and R on `rows`; infinity for a block that is not in use."""
        r = self.r if r is None else r
        lam_h = self._choose(rows, r, None) if use_h and self.h.shape[1] else np.inf
        return lam_h, self._choose(rows, r, lam_h) if use_2 and r.shape[1] else np.inf

    def _coefficients(
        self, rows: NDArray[np.int64], lam_h: float, lam_2: float, r: Array
    ) -> tuple[Array, Array]:
        x, penalty = self._design(r, lam_h, lam_2)
        x, y = x[rows], (self.y - self.t1)[rows]
        inverse = np.asarray(np.linalg.inv(x.T @ x + np.diag(penalty)), dtype=np.float64)
        beta = np.asarray(inverse @ (x.T @ y), dtype=np.float64)
        degrees = float(np.einsum("ij,jk,ik->", x, inverse, x))
        variance = float(((y - x @ beta) ** 2).sum()) / max(1.0, len(rows) - degrees)
        return beta, variance * inverse

    def solve(self, rows: NDArray[np.int64], lam_h: float, lam_2: float) -> tuple[Array, Array]:
        """[c, gamma, b] and their covariance; blocks that are not in use are exactly 0."""
        beta, inverse = self._coefficients(rows, lam_h, lam_2, self.r)
        start, p, k = self.effects.shape[1], self.h.shape[1], self.r.shape[1]
        used = [0]
        used += list(range(1, 1 + p)) if np.isfinite(lam_h) else []
        used += list(range(1 + p, 1 + p + k)) if np.isfinite(lam_2) else []
        mean, covariance = np.zeros(1 + p + k), np.zeros((1 + p + k,) * 2)
        mean[used] = beta[start:]
        covariance[np.ix_(used, used)] = inverse[start:, start:]
        mean[0] += 1.0
        return mean, covariance

    def _predict(self, use_h: bool, use_2: bool, r: Array | None = None) -> Array:
        """Out-of-fold predictions of the kept trials, strengths chosen inside each fold."""
        r = self.r if r is None else r
        if not (use_h and self.h.shape[1]) and not (use_2 and r.shape[1]):
            return self.t1[self.kept]
        out = np.empty(len(self.kept))
        for fold in np.unique(self.fold):
            held = self.kept[self.fold == fold]
            rows = np.setdiff1d(np.arange(len(self.y)), held)
            lam_h, lam_2 = self.strengths(rows, use_h, use_2, r)
            beta, _ = self._coefficients(rows, lam_h, lam_2, r)
            x, _ = self._design(r, lam_h, lam_2)
            start = self.effects.shape[1]
            out[self.fold == fold] = self.t1[held] + x[held, start:] @ beta[start:]
        return out

    def _gain(self, new: Array, old: Array) -> Gain:
        """Gain in tau of `new` over `old`, pairs within studies only, with its normal interval."""
        items, weights = [], []
        for study in np.unique(self.study[self.kept]):
            own = np.flatnonzero(self.study[self.kept] == study)
            if len(own) < 2:
                continue
            y = self.y[self.kept][own]
            items.append(pair_means(new[own], y) - pair_means(old[own], y))
            weights.append(np.ones(len(own)))
        if not items:
            return Gain(0.0, Interval(-1.0, 1.0))
        item = np.concatenate(items)
        half = 1.645 * 2 * item.std(ddof=1) / np.sqrt(len(item))
        value = float(item.mean())
        return Gain(value, Interval(value - half, value + half))

    def ladder(self) -> tuple[dict[str, Array], dict[str, Gain], set[str]]:
        """Out-of-fold predictions of each step, gains of the blocks, and the blocks that enter."""
        oof = {"T1": self._predict(False, False)}
        gains: dict[str, Gain] = {}
        enters: set[str] = set()
        if self.h.shape[1]:
            oof["T1+h"] = self._predict(True, False)
            gains["h"] = self._gain(oof["T1+h"], oof["T1"])
            if gains["h"].interval.low > 0:
                enters.add("h")
        else:
            oof["T1+h"] = oof["T1"]
        if self.r.shape[1]:
            oof["T1+T2"] = self._predict(False, True)
            oof["T1+h+T2"] = self._predict(True, True)
            shuffled = self.r.copy()
            for study in np.unique(self.study):
                own = np.flatnonzero(self.study == study)
                shuffled[own] = shuffled[self.rng.permutation(own)]
            oof["T1+h+shuffled T2"] = self._predict(True, True, shuffled)
            control = self._gain(oof["T1+h+shuffled T2"], oof["T1+h"]).value
            over_h = self._gain(oof["T1+h+T2"], oof["T1+h"])
            over_t1 = self._gain(oof["T1+T2"], oof["T1"])
            judged = over_h
            if "h" not in enters and over_t1.interval.low < over_h.interval.low:
                judged = over_t1
            gains["T2"] = Gain(judged.value, judged.interval, control)
            if judged.interval.low > 0:
                enters.add("T2")
        return oof, gains, enters
