"""The inputs of a score as arrays, their uncertainty, and the terms T1 and T2 made from them.

    T1_i = sum_k a_k z_ki         z: normal scores of ranks within the study, diverged = worst
    r_ki = z(metric_k) minus its within-study fit on [1, z(train_loss), z(train_loss)^2]
    gate_i = train_accuracy_i >= 0.8 of the study's largest, and at least 12 trials pass

T1 weighs the validation metric at the end of the highest finished rung with 0.4, minus the
validation loss there with 0.4, and the mean of the last three evaluations with 0.2. r is what a
metric says beyond how well the network was fitted: networks that have not learnt are flat. A
metric's logarithm has the same ranks, so none is taken.

Uncertainty: a validation accuracy p on N examples is drawn from its Jeffreys posterior
Beta(Np + 1/2, N(1-p) + 1/2). The other signals of the same row are measured on the same examples,
so they move with it by the same number of their own standard errors (taken as fully correlated:
the cautious side). Trials are drawn independently, which is cautious too, as all share one
validation set. What one training run cannot show, the spread over seeds, is not in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr

from llp.scoring.mixture import Posterior
from llp.scoring.numbers import numbers
from llp.scoring.ranks import Array, normal_scores, tau
from llp.scoring.roles import Family, Roles

T1_WEIGHTS: dict[Family, float] = {"metric": 0.4, "loss": 0.4, "recent": 0.2}
GATE_SHARE = 0.8
GATE_MINIMUM = 12
MIN_KNOWN, MIN_AGREEMENT = 8, 0.3
"""Trials with both signals, and least tau between them, for one to stand in for the other."""
ASSUMED_NOISE = 0.1
"""Standard error where none is known, in units of the column's spread between trials."""


@dataclass(frozen=True, eq=False)
class Study:
    """One study's table as arrays, every column oriented so that higher is better.

    Attributes:
        table: One row per trial.
        roles: Of its columns.
        alone: Whether T1 is the primary signal alone.
    """

    table: pd.DataFrame
    roles: Roles
    alone: bool = False

    def __len__(self) -> int:
        return len(self.table)

    def numeric(self, column: str) -> Array:
        """A column as floats; what is not a number is NaN."""
        return numbers(self.table[column])

    def signal(self, column: str) -> Array:
        """A tier-1 signal, higher is better; NaN where diverged.

        A primary signal that alone is missing is what the others say, see `gaps`.
        """
        return self._placed[0] if column == self.roles.primary else self._raw(column)

    @property
    def gaps(self) -> Array:
        """Standard error of a primary signal that others stand in for, [n]; 0 elsewhere.

        Its normal score is r times that of the mean of the other signals, r their correlation on
        the trials that have both, and its value that quantile of the known ones.
        """
        return self._placed[1]

    @cached_property
    def _placed(self) -> tuple[Array, Array]:
        primary, error = self._raw(self.roles.primary), np.zeros(len(self))
        missing = np.isnan(self.numeric(self.roles.primary))
        known = np.isfinite(primary)
        total, count = np.zeros(len(self)), np.zeros(len(self))
        for name in self.roles.tier1 if missing.any() and known.sum() >= MIN_KNOWN else ():
            values = self._raw(name)
            there = np.isfinite(values)
            both = there & known
            if name == self.roles.primary or both.sum() < MIN_KNOWN:
                continue
            if np.ptp(values[both]) > 0 and tau(values[both], primary[both]) > MIN_AGREEMENT:
                total[there] += normal_scores(values[there])
                count[there] += 1
        mean = total / np.maximum(count, 1)
        both = known & (count > 0)
        placed = missing & (count > 0)
        if placed.any() and np.ptp(primary[both]) > 0 and np.ptp(mean[both]) > 0:
            z = normal_scores(primary[both])
            r = float(np.clip(np.corrcoef(z, mean[both])[0, 1], 0.0, 1.0))
            shares = ndtr(r * mean[placed] / max(float(mean[both].std()), 1e-9))
            primary = primary.copy()
            primary[placed] = np.quantile(primary[both], shares)
            error[placed] = np.sqrt(1 - r**2) * spread(primary[both])
        return primary, error

    def _raw(self, column: str) -> Array:
        sign = -1.0 if self.roles.tier1[column] == "lower" else 1.0
        values = sign * self.numeric(column)
        return np.where(np.isfinite(values), values, np.nan)

    def metric(self, column: str) -> Array:
        """A tier-2 metric, higher is believed better (or unknown); NaN where not measured."""
        sign = -1.0 if self.roles.tier2[column] == "lower" else 1.0
        return sign * self.numeric(column)

    @cached_property
    def primary(self) -> Array:
        """The signal of "validation only"."""
        return self.signal(self.roles.primary)

    @cached_property
    def band(self) -> NDArray[np.int64]:
        """0 for the trials that got furthest, counting up; diverged trials are in the last."""
        level = self.numeric(self.roles.level) if self.roles.level else np.zeros(len(self))
        level = np.where(np.isnan(level), -np.inf, level)
        dead = np.isnan(self.primary)
        alive = np.unique(level[~dead])[::-1]
        band = np.searchsorted(-alive, -level)
        return np.asarray(np.where(dead, len(alive), band), dtype=np.int64)

    @cached_property
    def target(self) -> Array:
        """Results of full training; NaN for trials to be ranked."""
        if self.roles.target is None:
            return np.full(len(self), np.nan)
        values = self.numeric(self.roles.target)
        return np.where(np.isfinite(values), values, np.nan)

    @cached_property
    def t1_weights(self) -> dict[str, float]:
        """Weight of each tier-1 column in T1; families share theirs, the sum is 1."""
        columns = {name: self.roles.of_family(name) for name in T1_WEIGHTS}
        total = sum(T1_WEIGHTS[name] for name in columns if columns[name])
        if total == 0 or self.alone:
            return {self.roles.primary: 1.0}
        return {
            column: T1_WEIGHTS[name] / total / len(members)
            for name, members in columns.items()
            for column in members
        }

    def t1(self, column: str, values: Array) -> Array:
        """Z of one signal's `values` (shape [..., n])."""
        return normal_scores(values, self.band)

    @cached_property
    def learnt(self) -> NDArray[np.bool_]:
        """Trials whose network has learnt enough for its flatness to mean something."""
        columns = [*self.roles.of_family("train_accuracy"), self.roles.primary]
        accuracy = self.signal(columns[0])
        if np.isnan(accuracy).all() or np.nanmax(accuracy) <= 0:
            return np.isfinite(self.primary)
        passes = accuracy >= GATE_SHARE * np.nanmax(accuracy)
        return np.asarray(passes & np.isfinite(self.primary))

    def gate(self, column: str) -> NDArray[np.bool_]:
        """Trials where a tier-2 metric counts; none when fewer than 12 would."""
        passes = self.learnt & ~np.isnan(self.metric(column))
        return passes if passes.sum() >= GATE_MINIMUM else np.zeros(len(self), dtype=bool)

    def t2(self, column: str, values: Array) -> Array:
        """Gate x r of one metric's `values` (shape [..., n]); 0 outside the gate."""
        out = np.zeros(values.shape)
        gate = self.gate(column)
        if not gate.any():
            return out
        z = normal_scores(values[..., gate])
        basis = [np.ones(int(gate.sum()))]
        for name in self.roles.of_family("train_loss")[:1]:
            loss = normal_scores(self.signal(name)[gate])
            basis += [loss, loss**2]
        q = np.linalg.qr(np.stack(basis, axis=1))[0]
        out[..., gate] = z - (z @ q) @ q.T
        return out

    def standard_error(self, column: str) -> Array | None:
        """The column NAME_se with gaps filled by its median, or None when there is nothing."""
        if f"{column}_se" not in self.table:
            return None
        errors = np.abs(self.numeric(f"{column}_se"))
        errors = np.where(np.isfinite(errors), errors, np.nan)
        if np.isnan(errors).all():
            return None
        return np.where(np.isnan(errors), np.nanmedian(errors), errors)

    @cached_property
    def noisy_metrics(self) -> tuple[str, ...]:
        """Metrics whose typical standard error exceeds half of their spread between trials."""
        noisy = []
        for name in self.roles.tier2:
            values, errors = self.metric(name), self.standard_error(name)
            measured = ~np.isnan(values)
            if errors is None or not measured.any():
                continue
            if np.median(errors[measured]) > 0.5 * spread(values):
                noisy.append(name)
        return tuple(noisy)


def spread(values: Array) -> float:
    """Robust standard deviation of the finite values: IQR / 1.349, or the plain one if it is 0."""
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        return 0.0
    low, high = np.quantile(finite, [0.25, 0.75])
    return float((high - low) / 1.349 or finite.std())


class Observed:
    """The inputs as they are."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def signal(self, column: str) -> Array:
        """Values of a tier-1 signal, shape [n]."""
        return self.study.signal(column)

    def metric(self, column: str) -> Array:
        """Values of a tier-2 metric, shape [n]."""
        return self.study.metric(column)

    def coefficients(self, posteriors: Sequence[Posterior]) -> Array:
        """Fitted weights, the mean over a mixture of posteriors, shape [1, p]."""
        share = np.array([posterior.weight for posterior in posteriors])
        means = np.stack([posterior.mean for posterior in posteriors])
        return np.asarray((share / share.sum() @ means)[None, :])

    def residual(self, posteriors: Sequence[Posterior]) -> Array:
        """What a result may deviate from its score; nothing for the score itself."""
        return np.zeros(len(self.study))


class Drawn(Observed):
    """The inputs drawn `num_draws` times from their uncertainty: arrays of shape [num_draws, n]."""

    def __init__(self, study: Study, num_draws: int, rng: np.random.Generator) -> None:
        super().__init__(study)
        self.num_draws, self.rng = num_draws, rng
        self.assumed: set[str] = set()
        self.errors, self.noise = self._primary_noise()

    def _primary_noise(self) -> tuple[Array, Array]:
        study, name = self.study, self.study.roles.primary
        value, shape = study.primary, (self.num_draws, len(study))
        if study.roles.num_validation and study.roles.tier1[name] == "higher":
            count = study.numeric(study.roles.num_validation)
            known = count[np.isfinite(count) & (count > 0)]
            proportion = value[np.isfinite(value)]
            if len(known) and ((proportion >= 0) & (proportion <= 1)).all():
                count = np.where(np.isfinite(count) & (count > 0), count, np.median(known))
                p = np.where(np.isnan(value), 0.5, value)
                a, b = count * p + 0.5, count * (1 - p) + 0.5
                errors = np.sqrt(a * b / (a + b + 1)) / (a + b)
                noise = (self.rng.beta(a, b, size=shape) - p) / errors
                return np.hypot(errors, study.gaps), noise
        errors_known = study.standard_error(name)
        if errors_known is None:
            self.assumed.add(name)
            errors_known = np.full(len(study), ASSUMED_NOISE * spread(value))
        return np.hypot(errors_known, study.gaps), self.rng.standard_normal(shape)

    def signal(self, column: str) -> Array:
        """Draws of a tier-1 signal, moving with the primary one."""
        study, value = self.study, self.study.signal(column)
        errors = self.errors if column == study.roles.primary else study.standard_error(column)
        if errors is None:
            scale = spread(study.primary)
            ratio = self.errors / scale if scale > 0 else np.full(len(study), ASSUMED_NOISE)
            errors = ratio * spread(value)
        return np.asarray(value + errors * self.noise)

    def metric(self, column: str) -> Array:
        """Draws of a tier-2 metric from its standard error."""
        value, errors = self.study.metric(column), self.study.standard_error(column)
        if errors is None:
            self.assumed.add(column)
            errors = np.full(len(self.study), ASSUMED_NOISE * spread(value))
        return np.asarray(value + errors * self.rng.standard_normal((self.num_draws, len(value))))

    def _members(self, posteriors: Sequence[Posterior]) -> list[int]:
        share = np.array([posterior.weight for posterior in posteriors])
        counts = np.floor(share / share.sum() * self.num_draws).astype(int)
        counts[0] += self.num_draws - counts.sum()
        return [int(count) for count in counts]

    def coefficients(self, posteriors: Sequence[Posterior]) -> Array:
        """Draws of fitted weights, shape [num_draws, p]; point after point of the mixture."""
        draws = []
        for posterior, count in zip(posteriors, self._members(posteriors), strict=True):
            values, vectors = np.linalg.eigh(posterior.covariance)
            root = vectors * np.sqrt(np.clip(values, 0, None))
            noise = self.rng.standard_normal((count, len(values)))
            draws.append(posterior.mean + noise @ root.T)
        return np.concatenate(draws)

    def residual(self, posteriors: Sequence[Posterior]) -> Array:
        """Draws of what a full training may deviate from its score, shape [num_draws, n]."""
        scale = np.repeat(
            [np.sqrt(posterior.noise) for posterior in posteriors], self._members(posteriors)
        )
        return np.asarray(
            scale[:, None] * self.rng.standard_normal((self.num_draws, len(self.study)))
        )


def t1(study: Study) -> Array:
    """T1 of every trial of a study."""
    inputs = Observed(study)
    total = np.zeros(len(study))
    for column, weight in study.t1_weights.items():
        total += weight * study.t1(column, inputs.signal(column))
    return total
