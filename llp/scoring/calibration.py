"""Weights earned on finished trials: T1 -> + hyperparameters (h) -> + tier 2 (T2).

A trial's result y is the normal score of its target among the finished trials of its study, put on
the scale of their T1: y has their mean and spread, so that "validation alone" is y = T1. Then

    y_i = study effect + c T1_i + d smoothed_i + surface(x_i) + sum_k b_k gate_ki r_ki + noise

h is the two terms in the middle: `smoothed` is what the probes of similar configurations say, the
surface is learnt from the finished trials (file `surface`). Files `mixture` and `terms` have the
model and r.

h is prior knowledge and enters by shrinkage, from 12 finished trials on: its strength is averaged
over a grid that holds zero. A threshold on its cross-validated gain was measured and is worse: on
simulated and real tables with 15 finished trials it gives away a third of the gain in tau
(`tests/benchmarks/scoring.py`).

The score must not be worse than validation alone. Where T1 ranks the finished trials worse than the
primary signal does (the upper 95 % limit, one-sided, of its gain in tau is below 0), T1 is that
signal alone; where the whole does so in cross-validation, the score is that signal alone.

T2 is a claim about flatness and must be earned: it *enters* only if the lower 95 % limit
(one-sided) of its cross-validated gain in Kendall's tau over T1 + h is above 0. Cross-validation is
leave-one-out, or leave-study-out when there are three studies with finished trials and the newest
has under 12. The same is done with T2 shuffled over the trials of a study, and reported beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr

from llp.errors import SpecError
from llp.records import to_plain
from llp.scoring.basis import coordinates
from llp.scoring.evidence import Gain, Ranking, effective_studies, gain, ranking
from llp.scoring.mixture import Finished, Mixture, Posterior
from llp.scoring.ranks import Array, normal_scores, one_thread
from llp.scoring.roles import Roles
from llp.scoring.surface import features, smoothed
from llp.scoring.terms import Study, t1
from llp.scoring.twins import twins_sentence, without_twins

MIN_FINISHED = 12
MIN_SPREAD = 0.3
"""Least spread of y, where the finished trials have nearly the same T1."""
MAX_FITTED = 300
"""More finished trials than this are thinned."""
NUM_LEARNT_RELEVANCES = 3
"""Studies that the relevances of hyperparameters are learnt from, the first ones."""


@dataclass(frozen=True)
class Calibration:
    """Weights with their evidence; plain data, `to_json` writes it.

    Attributes:
        version: Of this layout.
        target: Column that was calibrated on.
        num_finished: Finished trials used.
        num_studies: Studies with finished trials.
        weights: Term -> weight; T1 columns, `h: smoothed`, `h: surface` (its spread over trials),
            tier-2 metrics. Without evidence the primary signal alone.
        standard_errors: Of the weights; NaN (null in JSON) where they are given, not estimated.
        hyperparameters_enter: Whether h is in force.
        tier2_enters: Whether T2 earned its place.
        gain_hyperparameters: Of T1 + h over T1; None under 12 finished trials.
        gain_tier2: Of T2 over what it was added to; None when no metric could be used.
        dropped: Tier-2 metrics too noisy to be used.
        sentence: All of this in words.
        gain_validation: Of the weighed score over validation alone, which is in force where the
            interval is below 0; None under 12 finished trials.
        rankings: Ways of ranking, each predicted for trials that were left out.
        gain_signals: Of T1 over validation alone, where its interval is below 0 and the other
            signals stay out; None elsewhere.
        in_force: Name of the ranking that the weights belong to.
        effective_studies: (sum m)^2 / sum m^2 over the studies' numbers m of finished trials.
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
    gain_validation: Gain | None = None
    gain_signals: Gain | None = None
    rankings: tuple[Ranking, ...] = ()
    in_force: str = "validation"
    effective_studies: float = 0.0
    version: int = 2

    @property
    def enough(self) -> bool:
        """Whether there are 12 finished trials to learn from."""
        return self.num_finished >= MIN_FINISHED

    def to_json(self) -> str:
        """The calibration as JSON text; what is not a finite number is null."""
        return json.dumps(to_plain(self), indent=2)


@dataclass(frozen=True, eq=False)
class Model:
    """A fitted calibration, ready to score the studies it was fitted with.

    Attributes:
        calibration: The evidence.
        mixture: The fitted model; None under 12 finished trials.
        smoothed: Of every study, [rows], mean 0.
        surface: Features of every study, [rows, p].
        metrics: Names of the k tier-2 columns in force.
        out_of_fold: Ladder step -> cross-validated prediction of the finished trials used.
        finished: (study number, row) of every finished trial used, in the order of `out_of_fold`.
        alone: Whether T1 is the primary signal alone.
    """

    calibration: Calibration
    mixture: Mixture | None = None
    smoothed: tuple[Array, ...] = ()
    surface: tuple[Array, ...] = ()
    metrics: tuple[str, ...] = ()
    out_of_fold: dict[str, Array] = field(default_factory=dict)
    finished: tuple[tuple[int, int], ...] = ()
    alone: bool = False

    def posteriors(self, number: int) -> list[Posterior]:
        """Coefficients [T1, smoothed | surface | metrics] of study `number`, heaviest first."""
        return list(self.mixture.posteriors(number)) if self.mixture is not None else []


def calibrate(
    tables: Sequence[pd.DataFrame] | pd.DataFrame,
    *,
    target: str | None = None,
    roles: Roles | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Calibration:
    """Weights earned on the finished trials of `tables`, with the evidence for them.

    Args:
        tables: One or more tables; a `study` column splits a table further. Rows that are in an
            earlier table already count once.
        target: Column to calibrate on; default: the roles'.
        roles: For all tables, as they are or as plain data; default: each table's own. A column
            other than target and primary signal may lack in a table if another table has it.
        seed: Of thinning and shuffles.

    Raises:
        SpecError: No table, or one lacks a column that its roles name, or has no target.
    """
    studies: list[Study] = []
    seen: list[tuple[pd.DataFrame, Roles]] = []
    twins = 0
    tables = [tables] if isinstance(tables, pd.DataFrame) else list(tables)
    for table in tables:
        own = Roles.of(roles, table)
        if target is not None:
            own = replace(own, target=target)
        if roles is not None:
            own = own.present_in(table, tables)
        if own.target is None:
            raise SpecError("roles: no target column to calibrate on")
        own.check(table)
        fresh = without_twins(table, own, seen)
        twins += len(table) - len(fresh)
        seen.append((fresh, own))
        studies += split(fresh, own)
    if not studies:
        raise SpecError("there is no trial to calibrate on")
    with one_thread():
        found = fit(studies, seed=seed).calibration
    return replace(found, sentence=found.sentence + twins_sentence(twins))


def split(table: pd.DataFrame, roles: Roles) -> list[Study]:
    """The studies of a table, rows ordered by their numbers.

    That order makes thinning and draws, and so every result, the same whatever the trials are
    called and however the table was sorted.

    Raises:
        SpecError: A column that `roles` names is missing.
    """
    if any(not isinstance(name, str) for name in table.columns):
        table = table.rename(columns=str)
    roles.check(table)
    if len(table) == 0:
        return []
    if roles.study is None:
        return [_canonical(Study(table, roles))]
    keys = table[roles.study].astype(object)
    named = keys.where(keys.notna(), "").map(str).to_numpy(dtype=object)
    return [_canonical(Study(table[named == key], roles)) for key in dict.fromkeys(named)]


def _canonical(study: Study) -> Study:
    keys = [study.numeric(name) for name in [*study.roles.tier2, *study.roles.tier1]]
    keys += [study.target, study.primary]
    order = np.lexsort([np.where(np.isnan(key), -np.inf, key) for key in keys])
    return Study(study.table.iloc[order], study.roles)


def fit(studies: Sequence[Study], *, seed: int = 0) -> Model:
    """The calibrated model of `studies`, the ones to be scored first; T1 alone under 12 trials."""
    first = studies[0]
    noisy = {name for s in studies for name in s.noisy_metrics}
    metrics = tuple(
        name
        for name in dict.fromkeys(n for s in studies for n in s.roles.tier2)
        if name not in noisy and any(name in s.roles.tier2 and s.gate(name).any() for s in studies)
    )
    rows = [np.flatnonzero(np.isfinite(s.target)) for s in studies]
    counts = [len(own) for own in rows if len(own)]
    known = Calibration(
        target=first.roles.target or "target",
        num_finished=sum(counts),
        num_studies=len(counts),
        weights={first.roles.primary: 1.0},
        standard_errors={first.roles.primary: float("nan")},
        dropped=tuple(sorted(noisy)),
        effective_studies=effective_studies(counts),
    )
    if not known.enough:
        sentence = (
            "Not enough evidence to weigh anything beside validation accuracy: "
            f"{known.num_finished} finished trial{'s' * (known.num_finished != 1)}, "
            f"{MIN_FINISHED} are needed."
        )
        return Model(replace(known, sentence=sentence))
    ladder = _Ladder(studies, rows, metrics, np.random.default_rng(seed))
    data = ladder.finished
    signals = gain(data.x[:, 0], ladder.validation, data.y, data.study)
    alone = signals.interval.high < 0
    if alone:
        studies = [replace(study, alone=True) for study in studies]
        ladder = _Ladder(studies, rows, metrics, np.random.default_rng(seed))
    oof, gains, enters, rankings = ladder.climb(seed)
    mixture = Mixture(
        ladder.finished if "T2" in enters else replace(ladder.finished, r=ladder.finished.r[:, :0]),
        use_h=ladder.has_h,
        use_2="T2" in enters,
    )
    name = "T1" + "+h" * ladder.has_h + "+T2" * ("T2" in enters)
    in_force = metrics if "T2" in enters else ()
    model = Model(
        known,
        mixture,
        tuple(ladder.smoothed),
        tuple(ladder.surface),
        in_force,
        oof,
        tuple(zip(ladder.finished.study.tolist(), ladder.row.tolist(), strict=True)),
        alone,
    )
    whole = gain(oof[name], oof["validation"], ladder.finished.y, ladder.finished.study)
    calibration = replace(
        known,
        gain_hyperparameters=gains.get("h"),
        gain_tier2=gains.get("T2"),
        gain_validation=whole,
        gain_signals=signals if alone else None,
        rankings=rankings,
    )
    if whole.interval.high < 0:
        model = replace(model, mixture=None, metrics=())
    else:
        weights, errors = _weights(model, studies[0], metrics)
        calibration = replace(
            calibration,
            weights=weights,
            standard_errors=errors,
            hyperparameters_enter=ladder.has_h,
            tier2_enters="T2" in enters,
            in_force=name,
        )
    sentence = _sentence(calibration, first.roles.primary)
    return replace(model, calibration=replace(calibration, sentence=sentence))


def _weights(
    model: Model, first: Study, metrics: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Weights of the first study and their standard errors, over all points of the mixture."""
    posteriors = model.posteriors(0)
    share = np.array([p.weight for p in posteriors])
    share /= share.sum()
    means = np.stack([p.mean for p in posteriors])
    mean = share @ means
    variances = np.stack([np.diag(p.covariance) for p in posteriors]) + (means - mean) ** 2
    deviation = np.sqrt(np.clip(share @ variances, 0, None))
    slope = max(float(mean[0]), MIN_SLOPE)
    weights = {name: slope * weight for name, weight in first.t1_weights.items()}
    errors = {name: float(deviation[0]) * weight for name, weight in first.t1_weights.items()}
    phi = model.surface[0]
    if phi.shape[1]:
        weights["h: smoothed"], errors["h: smoothed"] = float(mean[1]), float(deviation[1])
        omega = slice(2, 2 + phi.shape[1])
        values = phi @ mean[omega]
        covariance = np.zeros((phi.shape[1], phi.shape[1]))  # law of total variance
        for posterior, part in zip(posteriors, share, strict=True):
            off = posterior.mean[omega] - mean[omega]
            covariance += part * (posterior.covariance[omega, omega] + np.outer(off, off))
        spread = ((phi @ covariance) * phi).sum(axis=1)
        weights["h: surface"] = float(values.std())
        errors["h: surface"] = float(np.sqrt(np.clip(spread, 0, None).mean()))
    for name in metrics:
        weights[name], errors[name] = 0.0, 0.0
    start = 2 + phi.shape[1]
    for k, name in enumerate(model.metrics):
        weights[name], errors[name] = float(mean[start + k]), float(deviation[start + k])
    return weights, errors


MIN_SLOPE = 0.05
"""Least weight of T1: validation never counts against a trial."""


def _sentence(found: Calibration, primary: str) -> str:
    studies = f"{found.num_studies} stud{'y' if found.num_studies == 1 else 'ies'}"
    parts = [f"Weights rest on {found.num_finished} finished trials of {studies}"]
    if found.gain_signals is not None:
        text = _worse(found.gain_signals, primary)
        parts.append(f"the other tier-1 signals stayed out: with them trials rank worse {text}")
    blocks = (
        ("hyperparameters (prior knowledge)", found.gain_hyperparameters),
        ("tier 2", found.gain_tier2),
    )
    for name, one in blocks:
        if one is None:
            parts.append(f"{name}: nothing to use" if name != "tier 2" else _NO_T2)
            continue
        numbers = f"tau {one.value:+.3f}, lower 95 % limit {one.interval.low:+.3f}"
        if name == "tier 2":
            numbers += f", shuffled {one.shuffled:+.3f}"
            verb = "entered" if found.tier2_enters else "stayed out"
        else:
            entered = found.hyperparameters_enter
            verb = "entered, shrunk by the evidence" if entered else "stayed out"
        parts.append(f"{name} {verb} ({numbers})")
    if found.dropped:
        parts.append(f"too noisy to use: {', '.join(found.dropped)}")
    if found.in_force == "validation" and found.gain_validation is not None:
        text = _worse(found.gain_validation, primary)
        parts.append(f"all of it stayed out: together they rank trials worse {text}")
    return "; ".join(parts) + "."


def _worse(one: Gain, primary: str) -> str:
    return f"than {primary} alone (tau {one.value:+.3f}, upper 95 % limit {one.interval.high:+.3f})"


_NO_T2 = "tier 2: not measured on at least 12 trials that have learnt enough"


class _Ladder:
    """The finished trials as arrays, and the steps T1, T1+h, T1+h+T2 judged on them."""

    def __init__(
        self,
        studies: Sequence[Study],
        rows: Sequence[NDArray[np.int64]],
        metrics: tuple[str, ...],
        rng: np.random.Generator,
    ) -> None:
        self.rng = rng
        names = tuple(dict.fromkeys(n for s in studies for n in s.roles.hyperparameters))
        blocks, kept = coordinates([s.table for s in studies], names)
        self.has_h = bool(kept)
        t1s = [t1(study) for study in studies]
        self.smoothed: list[Array] = []
        relevances: list[Array] = []
        for number, (own, signal) in enumerate(zip(blocks, t1s, strict=True)):
            learn = number < NUM_LEARNT_RELEVANCES
            known = None if learn else np.mean(relevances, axis=0)
            values, relevance = smoothed(own, signal, rng, known)
            self.smoothed.append(values - values.mean())
            relevances.append(relevance)
        kept_rows = _thinned(rows, rng)
        starts = np.cumsum([0, *(len(study) for study in studies)])
        if self.has_h:
            pooled = [np.concatenate([own[name] for own in blocks]) for name in kept]
            pivots = np.concatenate([r + s for r, s in zip(kept_rows, starts, strict=False)])
            relevance = np.mean(relevances[:NUM_LEARNT_RELEVANCES], axis=0)
            phi = features(pooled, relevance, [int(i) for i in pivots])
        else:
            phi = np.zeros((int(starts[-1]), 0))
        self.surface = np.split(phi, starts[1:-1])

        numbers = np.concatenate([np.full(len(own), n) for n, own in enumerate(kept_rows)])
        y: list[Array] = []
        x: list[Array] = []
        r: list[Array] = []
        validation: list[Array] = []
        raw: list[Array] = []
        for number, (study, fitted) in enumerate(zip(studies, kept_rows, strict=True)):
            y.append(results(study, rows[number], t1s[number])[fitted])
            x.append(np.stack([t1s[number], self.smoothed[number]], axis=1)[fitted])
            r.append(tier2(study, metrics)[fitted])
            validation.append(normal_scores(study.primary, study.band)[fitted])
            raw.append(study.target[fitted])
        surface = [values[own] for values, own in zip(self.surface, kept_rows, strict=True)]
        self.row = np.concatenate(kept_rows)
        self.validation, self.raw = np.concatenate(validation), np.concatenate(raw)
        self.finished = Finished(
            numbers,
            np.concatenate(y),
            np.concatenate(x),
            np.concatenate(surface),
            np.concatenate(r),
        )
        counts = [len(own) for own in rows]
        by_study = sum(count > 0 for count in counts) >= 3 and counts[0] < MIN_FINISHED
        self.groups = self.finished.study if by_study else None

    def _predict(self, use_h: bool, r: Array | None) -> Array:
        data = replace(self.finished, r=self.finished.r[:, :0] if r is None else r)
        mixture = Mixture(data, use_h=use_h, use_2=r is not None)
        return mixture.left_out(self.groups)

    def climb(
        self, seed: int
    ) -> tuple[dict[str, Array], dict[str, Gain], set[str], tuple[Ranking, ...]]:
        """Out-of-fold predictions of each step, gains, the blocks that enter, and rankings."""
        data = self.finished
        oof = {"validation": self.validation, "T1": data.x[:, 0]}
        gains: dict[str, Gain] = {}
        enters: set[str] = set()
        oof["T1+h"] = oof["T1"]
        if self.has_h:
            oof["T1+h"] = self._predict(True, None)
            gains["h"] = gain(oof["T1+h"], oof["T1"], data.y, data.study)
            enters.add("h")
        if data.r.shape[1]:
            shuffled = data.r.copy()
            for study in np.unique(data.study):
                own = np.flatnonzero(data.study == study)
                shuffled[own] = shuffled[self.rng.permutation(own)]
            oof["T1+T2"] = self._predict(False, data.r)
            oof["T1+h+T2"] = self._predict(True, data.r) if self.has_h else oof["T1+T2"]
            oof["T1+h+shuffled T2"] = self._predict(self.has_h, shuffled)
            control = gain(oof["T1+h+shuffled T2"], oof["T1+h"], data.y, data.study).value
            judged = gain(oof["T1+h+T2"], oof["T1+h"], data.y, data.study)
            gains["T2"] = replace(judged, shuffled=control)
            if judged.interval.low > 0:
                enters.add("T2")
        rankings = tuple(
            ranking(name, values, self.raw, data.study, seed=seed) for name, values in oof.items()
        )
        return oof, gains, enters, rankings


def results(study: Study, rows: NDArray[np.int64], signal: Array) -> Array:
    """Results y of all trials [n] on the scale of their T1 `signal`; NaN where not in `rows`."""
    y = np.full(len(study), np.nan)
    scale = max(MIN_SPREAD, float(signal[rows].std())) if len(rows) else 1.0
    middle = float(signal[rows].mean()) if len(rows) else 0.0
    if np.ptp(signal) == 0:
        scale, middle = 1.0, 0.0
    y[rows] = normal_scores(study.target[rows]) * scale + middle
    return y


def surprises(study: Study, posteriors: Sequence[Posterior]) -> tuple[Array, Array]:
    """Results y [n] of the finished trials, and how much of a surprise in them to believe, [n].

    The rest of a trial's deviation from the model is the error of placing m results among all
    trials: order statistic r of m has variance p (1 - p) / ((m + 2) phi(z)^2), p = (r - 3/8) /
    (m + 1/4), z its normal score. 0 where not finished.
    """
    rows = np.flatnonzero(np.isfinite(study.target))
    y = results(study, rows, t1(study))
    share = np.zeros(len(study))
    if len(rows):
        z = normal_scores(study.target[rows])
        p = ndtr(z)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        scale = float(np.std(y[rows])) / max(float(np.std(z)), 1e-9)
        placing = scale**2 * p * (1 - p) / ((len(rows) + 2) * density**2)
        weights = np.array([posterior.weight for posterior in posteriors])
        noise = float(weights @ [posterior.noise for posterior in posteriors] / weights.sum())
        share[rows] = np.clip(1 - placing / noise, 0.0, 1.0)
    return np.where(np.isnan(y), 0.0, y), share


def tier2(study: Study, metrics: Sequence[str]) -> Array:
    """Tier-2 terms r of every trial, shape [n, k]; 0 where a study lacks a metric."""
    r = np.zeros((len(study), len(metrics)))
    for k, name in enumerate(metrics):
        if name in study.roles.tier2:
            r[:, k] = study.t2(name, study.metric(name))
    return r


def _thinned(
    rows: Sequence[NDArray[np.int64]], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """At most 300 finished trials; the first study may keep half, the others share the rest."""
    left = MAX_FITTED
    kept: list[NDArray[np.int64]] = []
    for number, own in enumerate(rows):
        rest = sum(len(other) for other in rows[number + 1 :])
        room = left * len(own) // max(1, len(own) + rest)
        if number == 0:
            room = max(left // 2, left - rest)
        if len(own) > room:
            own = np.sort(rng.choice(own, max(1, room), replace=False))
        kept.append(own)
        left = max(0, left - len(own))
    return kept
