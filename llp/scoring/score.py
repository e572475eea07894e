"""One number per trial from both tiers, with an interval, P(best), ties and its contributions.

Presets:

    validation   G = validation accuracy
    llp          G = validation accuracy - alpha * sharpness          (for comparison)
    weights      G = sum_k w_k z_k, z normal scores of ranks of the named columns
    calibrated   G = c T1 + h + gate * sum_k b_k r_k, weights earned on finished trials (files
                 `terms`, `calibration`); under 12 finished trials, or where these say that it
                 ranks worse, it is `validation` and says so;
                 a finished trial is drawn towards its own result (contribution `result`), and
                 half a standard deviation of what is not known of the weights is subtracted where
                 hyperparameters count (contribution `uncertainty`): the best of many guesses is
                 likely to be a guess that is too good

Trials that got further come first: where the numbers alone would put a trial of a lower level (or
a diverged one) above one of a higher level, a contribution `level` is subtracted, a power of ten
per level that keeps the levels apart. P(best) and ties respect the levels in every draw, so a trial
that was left behind has P(best) 0.

Intervals are 90 % quantiles over draws of the inputs from their uncertainty (see `terms`), widened
where necessary to hold the score itself. Rank-based terms are ranked anew in each draw.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from llp.errors import SpecError, unknown
from llp.scoring.calibration import (
    MIN_SLOPE,
    Calibration,
    Model,
    fit,
    split,
    surprises,
    tier2,
)
from llp.scoring.mixture import Posterior
from llp.scoring.ranks import Array, normal_scores, one_thread
from llp.scoring.roles import Roles
from llp.scoring.terms import Drawn, Observed, Study, t1
from llp.scoring.twins import twins_sentence, without_twins

PRESETS = ("calibrated", "validation", "llp", "weights")
LEVEL = 0.9
CAUTION = 0.5
"""Standard deviations that are subtracted; 0 costs .002 to .004 in tau and 5 to 10 % in regret."""
SHARPNESS = ("noise_sharpness", "sam_sharpness")
RESERVED = frozenset(
    [
        "score",
        "lower",
        "upper",
        "probability_best",
        "result",
        "hyperparameters",
        "level",
        "uncertainty",
        "event",
        "trial",
    ]
)
"""Names of the output; the contribution of a column called so gets its tier in front."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a table of trials.

    Attributes:
        table: The input's index, best first (study by study); columns `score`, `lower`, `upper`,
            `probability_best`, then one per contribution. Contributions sum to `score`. The
            contribution of a column that is itself called `score` is `tier1.score`.
        weights: Term -> weight in force.
        sentence: What the score rests on, and what it does not.
        preset: In force after any fallback.
        ties: Groups of index labels, best first, whose order is a coin toss: P(i > j) between the
            group's first and each other member is in [0.25, 0.75].
        contributions: Names of the contribution columns.
        calibration: Evidence of preset `calibrated`; None for others.
        diverged: Labels of trials without a usable validation result; they rank last.
        ranks: The index of `table`; columns `rank` (1 is best), `lower`, `upper`: 90 % interval of
            the trial's rank within its study, over the draws.
    """

    table: pd.DataFrame
    weights: Mapping[str, float]
    sentence: str
    preset: str
    ties: tuple[tuple[Hashable, ...], ...] = ()
    contributions: tuple[str, ...] = ()
    calibration: Calibration | None = None
    diverged: frozenset[Hashable] = frozenset()
    ranks: pd.DataFrame = field(default_factory=pd.DataFrame)

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
        label = contribution_names(study.roles)
        if self.preset == "weights":
            return {label[n]: w * self._z(study, inputs, n) for n, w in self.weights.items()}
        if self.preset == "calibrated":
            return self._calibrated(study, inputs, label)
        primary = study.roles.primary
        out = {label[primary]: _no_worse(inputs.signal(primary), study.primary)}
        if self.preset == "llp" and self.sharpness is not None:
            # Inputs are oriented: a metric declared `lower` arrives with its sign turned already.
            sign = 1.0 if study.roles.tier2[self.sharpness] == "lower" else -1.0
            out[label[self.sharpness]] = sign * self.alpha * _neutral(inputs.metric(self.sharpness))
        return out

    def _z(self, study: Study, inputs: Observed, name: str) -> Array:
        if name in study.roles.tier1:
            return study.t1(name, inputs.signal(name))
        values = inputs.metric(name)
        measured = ~np.isnan(study.metric(name))
        out = np.zeros(values.shape)
        out[..., measured] = normal_scores(values[..., measured])
        return out

    def _calibrated(
        self, study: Study, inputs: Observed, label: Mapping[str, str]
    ) -> dict[str, Array]:
        assert self.model is not None
        model = self.model
        drawn = inputs.coefficients(self.posteriors)
        slope = np.maximum(drawn[:, :1], MIN_SLOPE)
        out = {
            label[name]: slope * weight * study.t1(name, inputs.signal(name))
            for name, weight in study.t1_weights.items()
        }
        phi = model.surface[self.number]
        if model.calibration.hyperparameters_enter:
            near = drawn[:, 1:2] * model.smoothed[self.number]
            out["hyperparameters"] = near + drawn[:, 2 : 2 + phi.shape[1]] @ phi.T
        start = 2 + phi.shape[1]
        for k, name in enumerate(model.metrics):
            if name in study.roles.tier2:
                r = study.t2(name, inputs.metric(name))
                out[label[name]] = drawn[:, start + k : start + k + 1] * r
        return {name: np.squeeze(v, 0) if v.shape[0] == 1 else v for name, v in out.items()}

    def uncertainty(self, study: Study) -> Array | None:
        """Standard deviation [n] from what is not known of the weights; None without h."""
        if self.model is None or not self.posteriors:
            return None
        if not self.model.calibration.hyperparameters_enter:
            return None
        columns = [t1(study), self.model.smoothed[self.number]]
        x = np.concatenate(
            [
                np.stack(columns, axis=1),
                self.model.surface[self.number],
                tier2(study, self.model.metrics),
            ],
            axis=1,
        )
        share = np.array([posterior.weight for posterior in self.posteriors])
        share /= share.sum()
        values = np.stack([x @ posterior.mean for posterior in self.posteriors])
        variance = share @ (values - share @ values) ** 2
        for part, posterior in zip(share, self.posteriors, strict=True):
            variance = variance + part * np.einsum("ij,ij->i", x @ posterior.covariance, x)
        return np.asarray(np.sqrt(np.maximum(variance, 0.0)))

    @cached_property
    def posteriors(self) -> list[Posterior]:
        """Coefficients of this study; empty for presets without any."""
        fitted = self.preset == "calibrated" and self.model is not None
        return self.model.posteriors(self.number) if fitted and self.model is not None else []


def score(
    table: pd.DataFrame,
    *,
    roles: Roles | Mapping[str, Any] | None = None,
    preset: str = "calibrated",
    weights: Mapping[str, float] | None = None,
    alpha: float = 0.1,
    history: pd.DataFrame | Sequence[pd.DataFrame] | None = None,
    seed: int = 0,
) -> Scores:
    """Scores of all trials of `table`; rows with a target are finished trials to learn from.

    Args:
        table: One row per trial; see `table.study_table`, or any table with its `roles`.
        roles: What the columns mean, or plain data as `Roles.from_mapping` reads it; default:
            `Roles.from_table(table)`.
        preset: `calibrated`, `validation`, `llp` or `weights`.
        weights: Column -> weight, for preset `weights`. Tier-1 and tier-2 columns; a tier-2
            column of unknown direction counts as higher is better, so its weight carries the sign.
        alpha: Of preset `llp`, >= 0.
        history: Tables of earlier studies with their targets; used by `calibrated`. Columns that
            they lack are not used; with a history, `table` may lack the target. Rows that are in
            `table` or an earlier table already count once.
        seed: Of the draws and folds.

    Raises:
        SpecError: Unknown preset, column or role, the message names the nearest valid one; see
            `Roles.check` for the rest.
    """
    if preset not in PRESETS:
        raise SpecError(unknown("score preset", preset, PRESETS))
    roles = Roles.of(roles, table)
    if history is not None and roles.target is not None and roles.target not in table:
        table = table.assign(**{roles.target: np.nan})
    if len(table) == 0:
        roles.check(table)
        frame = pd.DataFrame(columns=["score", "lower", "upper", "probability_best"])
        ranks = pd.DataFrame(columns=["rank", "lower", "upper"])
        return Scores(frame, {}, "There are no trials to score.", preset, ranks=ranks)
    studies = split(table, roles)
    past, twins = _past(history, table, roles)
    formula, sentence = _formula(studies, roles, preset, weights, alpha, past, seed)
    sentence += twins_sentence(twins)
    if formula.model is not None and formula.model.alone:
        studies = [replace(study, alone=True) for study in studies]

    frames, intervals, ties, assumed = [], [], [], set()
    for number, study in enumerate(studies):
        rng = np.random.default_rng([seed, number])
        own = replace(formula, number=number)
        with one_thread():
            frame, ranks, groups, guessed = _score_study(study, own, rng)
        frames.append(frame)
        intervals.append(ranks)
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
    if placed := sum(int((study.gaps > 0).sum()) for study in studies):
        one = placed == 1
        sentence += (
            f" {placed} trial{'s' * (not one)} without {roles.primary} {'is' if one else 'are'} "
            f"placed by {'its' if one else 'their'} other signals, with a wider interval."
        )
    blind = [bool(np.isnan(study.primary).all()) for study in studies]
    gaps = sum(_gaps(study) for study, nothing in zip(studies, blind, strict=True) if not nothing)
    if gaps:
        one = gaps == 1
        sentence += (
            f" {gaps} trial{'s' * (not one)} without {roles.primary} but with other signals "
            f"{'counts' if one else 'count'} as diverged and rank{'s' * one} last."
        )
    if all(blind):
        sentence += _no_result(formula, roles.primary)
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
        ranks=pd.concat(intervals),
    )


def verification_set(scores: Scores, probability: float = 0.8) -> tuple[Hashable, ...]:
    """The fewest trials that together hold the best with at least this probability, best first.

    With several studies it is the set of the first one. Trials with the highest P(best) are taken
    until their sum, the probability that one of them is the best, is reached.

    Args:
        scores: Of the trials.
        probability: In (0, 1].
    """
    chances = scores.table["probability_best"].to_numpy(dtype=np.float64)
    order = np.argsort(-chances, kind="stable")
    if len(order) == 0 or chances.max() <= 0:
        return ()
    # P(best) sums to one in every study, and the first study comes first.
    first = int(np.searchsorted(np.cumsum(chances), 1 - 1e-9)) + 1
    order = order[order < first]
    taken = int(np.searchsorted(np.cumsum(chances[order]), probability - 1e-9)) + 1
    chosen = np.sort(order[:taken])
    return tuple(scores.table.index[i] for i in chosen)


def _no_result(formula: _Formula, primary: str) -> str:
    """What a ranking without a single primary signal is worth."""
    learnt = formula.model is not None and formula.model.calibration.hyperparameters_enter
    worth = "means nothing"
    if learnt:
        worth = "is only what hyperparameters and results of finished trials say"
    return (
        f" No trial has a usable validation result ({primary} is missing in all of them), so their "
        f"order {worth}, and none is proposed for verification."
    )


def _gaps(study: Study) -> int:
    """Trials without a primary signal (not infinite) that the others do not place either."""
    others = [study.signal(name) for name in study.roles.tier1 if name != study.roles.primary]
    known = np.isfinite(others).any(axis=0) if others else np.zeros(len(study), dtype=bool)
    missing = np.isnan(study.numeric(study.roles.primary)) & np.isnan(study.primary)
    return int((missing & known).sum())


def contribution_names(roles: Roles) -> dict[str, str]:
    """Tier-1 or tier-2 column -> name of its contribution, its own unless the output has it.

    >>> contribution_names(Roles(tier1={"score": "higher", "loss": "lower"}))
    {'score': 'tier1.score', 'loss': 'loss'}
    """
    taken = {*roles.tier1, *roles.tier2, *RESERVED}
    names: dict[str, str] = {}
    for tier, columns in (("tier1", roles.tier1), ("tier2", roles.tier2)):
        for column in columns:
            name = column
            while column in RESERVED and name in taken:
                name = f"{tier}.{name}"
            names[column] = name
    return names


def _past(
    history: pd.DataFrame | Sequence[pd.DataFrame] | None, scored: pd.DataFrame, roles: Roles
) -> tuple[list[Study], int]:
    """The studies of the history, and how many of its rows are left out as twins."""
    tables = [history] if isinstance(history, pd.DataFrame) else list(history or [])
    studies: list[Study] = []
    seen, twins = [(scored, roles)], 0
    for table in tables:
        own = roles.of_history(table)
        own.check(table)
        fresh = without_twins(table, own, seen)
        twins += len(table) - len(fresh)
        seen.append((fresh, own))
        studies += split(fresh, own)
    return studies, twins


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
    with one_thread():
        model = fit([*studies, *past], seed=seed)
    calibration = model.calibration
    if calibration.in_force == "validation":
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
) -> tuple[pd.DataFrame, pd.DataFrame, list[tuple[Hashable, ...]], set[str]]:
    num = len(study)
    num_draws = int(np.clip(1_000_000 // num, 200, 4000))
    terms = formula.terms(study, Observed(study))
    drawn = Drawn(study, num_draws, rng)
    draws = np.zeros((num_draws, num))
    for values in formula.terms(study, drawn).values():
        draws = draws + values
    if formula.posteriors:
        y, share = surprises(study, formula.posteriors)
        if share.any():
            terms["result"] = share * (y - np.sum(list(terms.values()), axis=0))
            draws = draws + share * (y - draws)
        draws = draws + np.sqrt(1 - share) * drawn.residual(formula.posteriors)
        deviation = formula.uncertainty(study)
        if deviation is not None:
            terms["uncertainty"] = -CAUTION * (1 - share) * deviation

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
    places = rankdata(-ranked, axis=1)
    best_place, worst_place = np.quantile(places, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    ranks = pd.DataFrame(
        {"lower": best_place, "upper": worst_place}, index=study.table.index, dtype=np.float64
    ).iloc[order]
    ranks.insert(0, "rank", np.arange(1, num + 1))
    return frame.iloc[order], ranks, groups, drawn.assumed


def _ties(
    draws: Array, order: NDArray[np.int64], labels: list[Hashable]
) -> list[tuple[Hashable, ...]]:
    """Runs of the ranking whose members cannot be told from the first one."""
    groups, start = [], 0
    ranked = np.ascontiguousarray(draws[:, order].T)
    while start < len(order):
        end = start + 1
        while end < len(order):
            above = 0.5 + 0.5 * float(np.sign(ranked[start] - ranked[end]).mean())
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
