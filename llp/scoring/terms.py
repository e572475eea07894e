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

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llp.scoring.ranks import Array, normal_scores
from llp.scoring.roles import Family, Roles

T1_WEIGHTS: dict[Family, float] = {"metric": 0.4, "loss": 0.4, "recent": 0.2}
GATE_SHARE = 0.8
GATE_MINIMUM = 12
ASSUMED_NOISE = 0.1
"""Standard error where none is known, in units of the column's spread between trials."""


@dataclass(frozen=True, eq=False)
class Study:
    """One study's table as arrays, every column oriented so that higher is better."""

    table: pd.DataFrame
    roles: Roles

    def __len__(self) -> int:
        return len(self.table)

    def numeric(self, column: str) -> Array:
        """A column as floats; what is not a number is NaN."""
        values = pd.to_numeric(self.table[column], errors="coerce")
        return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))

    def signal(self, column: str) -> Array:
        """A tier-1 signal, higher is better; NaN where diverged."""
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
        if total == 0:
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

    def coefficients(self, mean: Array, covariance: Array) -> Array:
        """Fitted weights, shape [1, p]."""
        return mean[None, :]


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
                return errors, (self.rng.beta(a, b, size=shape) - p) / errors
        errors_known = study.standard_error(name)
        if errors_known is None:
            self.assumed.add(name)
            errors_known = np.full(len(study), ASSUMED_NOISE * spread(value))
        return errors_known, self.rng.standard_normal(shape)

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

    def coefficients(self, mean: Array, covariance: Array) -> Array:
        """Draws of fitted weights, shape [num_draws, p]."""
        return self.rng.multivariate_normal(
            mean, covariance, size=self.num_draws, check_valid="ignore"
        )
