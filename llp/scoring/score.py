"""One number per trial from both tiers, with an interval, P(best), ties and its contributions.

Presets:

    validation   G = validation accuracy
    llp          G = validation accuracy - alpha * sharpness          (for comparison)
    weights      G = sum_k w_k z_k, z normal scores of ranks of the named columns
    calibrated   G = c T1 + h + gate * sum_k b_k r_k, weights earned on finished trials (files
                 `terms`, `calibration`); under 12 finished trials it is `validation` and says so

Trials that got further come first: where the numbers alone would put a trial of a lower level (or
a diverged one) above one of a higher level, a contribution `level` is subtracted, a power of ten
per level that keeps the levels apart. P(best) and ties respect the levels in every draw, so a trial
that was left behind has P(best) 0.

Intervals are 90 % quantiles over draws of the inputs from their uncertainty (see `terms`), widened
where necessary to hold the score itself. Rank-based terms are ranked anew in each draw.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llp.errors import SpecError, unknown
from llp.scoring.calibration import MIN_FINISHED, Calibration, Model, fit, split
from llp.scoring.ranks import Array, normal_scores
from llp.scoring.roles import Roles
from llp.scoring.terms import Drawn, Observed, Study

PRESETS = ("calibrated", "validation", "llp", "weights")
LEVEL = 0.9
SHARPNESS = ("noise_sharpness", "sam_sharpness")


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a table of trials.

    Attributes:
        table: The input's index, best first (study by study); columns `score`, `lower`, `upper`,
            `probability_best`, then one per contribution. Contributions sum to `score`.
        weights: Term -> weight in force.
        sentence: What the score rests on, and what it does not.
        preset: In force after any fallback.
        ties: Groups of index labels, best first, whose order is a coin toss: P(i > j) between the
            group's first and each other member is in [0.25, 0.75].
        contributions: Names of the contribution columns.
        calibration: Evidence of preset `calibrated`; None for others.
        diverged: Labels of trials without a usable validation result; they rank last.
    """

    table: pd.DataFrame
    weights: Mapping[str, float]
    sentence: str
    preset: str
    ties: tuple[tuple[Hashable, ...], ...] = ()
    contributions: tuple[str, ...] = ()
    calibration: Calibration | None = None
    diverged: frozenset[Hashable] = frozenset()

    @property
    def ranking(self) -> tuple[Hashable, ...]:
        """Index labels, best first."""
        return tuple(self.table.index)


@dataclass(frozen=True, eq=False)
class _Formula:
    """How the terms of one study are made from (observed or drawn) inputs."""

    preset: str
    weights: dict[str, float]
    alpha: float = 0.1
    sharpness: str | None = None
    model: Model | None = None
    number: int = 0

    def terms(self, study: Study, inputs: Observed) -> dict[str, Array]:
        """Contribution -> values, shape [n] or [num_draws, n]."""
        if self.preset == "weights":
            return {name: w * self._z(study, inputs, name) for name, w in self.weights.items()}
        if self.preset == "calibrated":
            return self._calibrated(study, inputs)
        primary = study.roles.primary
        out = {primary: _no_worse(inputs.signal(primary), study.primary)}
        if self.preset == "llp" and self.sharpness is not None:
            # Inputs are oriented: a metric declared `lower` arrives with its sign turned already.
            sign = 1.0 if study.roles.tier2[self.sharpness] == "lower" else -1.0
            out[self.sharpness] = sign * self.alpha * _neutral(inputs.metric(self.sharpness))
        return out

    def _z(self, study: Study, inputs: Observed, name: str) -> Array:
        if name in study.roles.tier1:
            return study.t1(name, inputs.signal(name))
        values = inputs.metric(name)
        measured = ~np.isnan(study.metric(name))
        out = np.zeros(values.shape)
        out[..., measured] = normal_scores(values[..., measured])
        return out

    def _calibrated(self, study: Study, inputs: Observed) -> dict[str, Array]:
        assert self.model is not None
        model = self.model
        drawn = inputs.coefficients(model.mean, model.covariance)
        slope = np.maximum(drawn[:, :1], 0.05)
        p = len(model.regressors)
        out = {
            name: slope * weight * study.t1(name, inputs.signal(name))
            for name, weight in study.t1_weights.items()
        }
        if model.calibration.hyperparameters_enter:
            out["hyperparameters"] = drawn[:, 1 : 1 + p] @ model.basis[self.number].T
        if model.calibration.tier2_enters:
            for k, name in enumerate(model.metrics):
                if name in study.roles.tier2:
                    r = study.t2(name, inputs.metric(name))
                    out[name] = drawn[:, 1 + p + k : 2 + p + k] * r
        return {name: np.squeeze(v, 0) if v.shape[0] == 1 else v for name, v in out.items()}


def score(
    table: pd.DataFrame,
    *,
    roles: Roles | None = None,
    preset: str = "calibrated",
    weights: Mapping[str, float] | None = None,
    alpha: float = 0.1,
    history: pd.DataFrame | Sequence[pd.DataFrame] | None = None,
    seed: int = 0,
) -> Scores:
    """Scores of all trials of `table`; rows with a target are finished trials to learn from.

    Args:
        table: One row per trial; see `table.study_table`, or any table with its `roles`.
        roles: What the columns mean; default: `Roles.from_table(table)`.
        preset: `calibrated`, `validation`, `llp` or `weights`.
        weights: Column -> weight, for preset `weights`. Tier-1 and tier-2 columns; a tier-2
            column of unknown direction counts as higher is better, so its weight carries the sign.
        alpha: Of preset `llp`, >= 0.
        history: Tables of earlier studies with their targets; used by `calibrated`.
        seed: Of the draws and folds.

    Raises:
        SpecError: Unknown preset, column or role; the message names the nearest valid one.
    """
    if preset not in PRESETS:
        raise SpecError(unknown("score preset", preset, PRESETS))
    roles = roles or Roles.from_table(table)
    if len(table) == 0:
        frame = pd.DataFrame(columns=["score", "lower", "upper", "probability_best"])
        return Scores(frame, {}, "There are no trials to score.", preset)
    studies = split(table, roles)
    formula, sentence = _formula(
        studies, roles, preset, weights, alpha, _past(history, roles), seed
    )

    frames, ties, assumed = [], [], set()
    for number, study in enumerate(studies):
        rng = np.random.default_rng([seed, number])
        own = replace(formula, number=number)
        frame, groups, guessed = _score_study(study, own, rng)
        frames.append(frame)
        ties += groups
        assumed |= guessed
    frame = pd.concat(frames)
    columns = tuple(frame.columns[4:])
    frame[list(columns)] = frame[list(columns)].fillna(0.0)
    if assumed:
        sentence += (
            f" No error is known for {', '.join(sorted(assumed))}: "
            "a tenth of its spread between trials is assumed."
        )
    if all(np.isnan(study.primary).all() for study in studies):
        sentence += " No trial has a usable validation result, so their order means nothing."
    calibration = formula.model.calibration if formula.model is not None else None
    return Scores(
        table=frame,
        weights=formula.weights,
        sentence=sentence,
        preset=formula.preset,
        ties=tuple(ties),
        contributions=columns,
        calibration=calibration,
        diverged=frozenset(
            label
            for study in studies
            for label, value in zip(study.table.index, study.primary, strict=True)
            if np.isnan(value)
        ),
    )


def _past(history: pd.DataFrame | Sequence[pd.DataFrame] | None, roles: Roles) -> list[Study]:
    tables = [history] if isinstance(history, pd.DataFrame) else list(history or [])
    studies = []
    for table in tables:
        own = Roles.from_table(table) if "roles" in table.attrs else roles
        studies += split(table, own)
    return studies


def _formula(
    studies: Sequence[Study],
    roles: Roles,
    preset: str,
    weights: Mapping[str, float] | None,
    alpha: float,
    past: Sequence[Study],
    seed: int,
) -> tuple[_Formula, str]:
    """The formula in force and the sentence that explains it."""
    primary = roles.primary
    plain = {primary: 1.0}
    if preset == "weights":
        known = [*roles.tier1, *roles.tier2]
        if not weights:
            raise SpecError("preset weights needs weights: {column: weight}")
        for name in weights:
            if name not in known:
                raise SpecError("weights: " + unknown("column", name, known))
        return _Formula(preset, dict(weights)), "Weights are as given; no evidence was asked for."
    if preset == "validation":
        return _Formula(preset, plain), f"The score is {primary} alone."
    if preset == "llp":
        column = _sharpness_column(studies, roles)
        if column is None:
            return (
                _Formula("validation", plain),
                f"No sharpness was measured, so the score is {primary} alone.",
            )
        missing = sum(int(np.isnan(study.metric(column)).sum()) for study in studies)
        sentence = f"The score is {primary} - {alpha:g} x {column}."
        if missing:
            sentence += f" {missing} trials without {column} get the median of the others."
        return _Formula(preset, {**plain, column: -alpha}, alpha, column), sentence
    model = fit([*studies, *past], seed=seed)
    calibration = model.calibration
    if calibration.num_finished < MIN_FINISHED:
        sentence = f"{calibration.sentence} The score is {primary} alone."
        return _Formula("validation", plain, model=model), sentence
    return _Formula("calibrated", dict(calibration.weights), model=model), calibration.sentence


def _sharpness_column(studies: Sequence[Study], roles: Roles) -> str | None:
    others = [name for name in roles.tier2 if "sharpness" in name]
    for name in [*SHARPNESS, *others]:
        if name in roles.tier2 and any(np.isfinite(s.metric(name)).any() for s in studies):
            return name
    return None


def _score_study(
    study: Study, formula: _Formula, rng: np.random.Generator
) -> tuple[pd.DataFrame, list[tuple[Hashable, ...]], set[str]]:
    num = len(study)
    num_draws = int(np.clip(1_000_000 // num, 200, 4000))
    terms = formula.terms(study, Observed(study))
    drawn = Drawn(study, num_draws, rng)
    draws = np.zeros((num_draws, num))
    for values in formula.terms(study, drawn).values():
        draws = draws + values

    raw = np.sum(list(terms.values()), axis=0)
    shift = level_shift(raw, study.band)
    if shift.any():
        terms["level"] = shift
    total = np.sum(list(terms.values()), axis=0)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0) + shift
    frame = pd.DataFrame(
        {
            "score": total,
            "lower": np.minimum(low, total),
            "upper": np.maximum(high, total),
            "probability_best": 0.0,
            **terms,
        },
        index=study.table.index,
    )
    # A gap wider than all draws keeps every draw's order within the levels.
    ranked = draws - study.band * (np.ptp(draws) + 1.0)
    best = ranked == ranked.max(axis=1, keepdims=True)
    frame["probability_best"] = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)

    second = study.roles.of_family("loss")[:1] or [study.roles.primary]
    tie_break = np.where(np.isnan(study.signal(second[0])), -np.inf, study.signal(second[0]))
    order = np.lexsort((-tie_break, -total, study.band))
    groups = _ties(ranked, order, list(study.table.index))
    return frame.iloc[order], groups, drawn.assumed


def _ties(
    draws: Array, order: NDArray[np.int64], labels: list[Hashable]
) -> list[tuple[Hashable, ...]]:
    """Runs of the ranking whose members cannot be told from the first one."""
    groups, start = [], 0
    while start < len(order):
        end = start + 1
        while end < len(order):
            first, other = draws[:, order[start]], draws[:, order[end]]
            above = float((first > other).mean() + 0.5 * (first == other).mean())
            if not 0.25 <= above <= 0.75:
                break
            end += 1
        if end > start + 1:
            groups.append(tuple(labels[i] for i in order[start:end]))
        start = end
    return groups


def level_shift(raw: Array, band: NDArray[np.int64]) -> Array:
    """What to add to `raw` so that no trial overtakes one of a better band; all 0 if none does.

    >>> level_shift(np.array([0.6, 0.7]), np.array([0, 1])).tolist()
    [0.0, -1.0]
    """
    bands = np.unique(band)
    edges = [(raw[band == b].min(), raw[band == b].max()) for b in bands]
    if all(edges[i][0] > edges[i + 1][1] for i in range(len(edges) - 1)):
        return np.zeros(len(raw))
    step = 1.0
    while step <= np.ptp(raw):
        step *= 10
    return -step * band.astype(np.float64) + 0.0


def _no_worse(values: Array, observed: Array) -> Array:
    """Diverged trials get 0, or the worst observed value where that is below 0."""
    worst = min(0.0, float(np.nanmin(observed))) if np.isfinite(observed).any() else 0.0
    return np.where(np.isnan(values), worst, values)


def _neutral(values: Array) -> Array:
    """Missing values get the median of the measured; infinite ones the finite extreme."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return np.zeros(values.shape)
    clipped = np.clip(values, finite.min(), finite.max())
    return np.where(np.isnan(values), np.median(finite), clipped)
