"""Optuna's samplers through Ray Tune: TPE and Gaussian process.

A searcher is asked `suggest(index)` for trial 0, 1, 2, ... in order, and told the result of a
trial's first rung by `tell(index, value)`. Values of one rung are comparable with each other, those
of different rungs are not, so later rungs are not told. Asked and told in the same order, it
gives the same configurations: that is how a resumed study rebuilds it from the ledger.

Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011 (TPE).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from llp.records import HyperparameterValue
from llp.spec.constraints import satisfied
from llp.spec.domains import (
    Choice,
    Domain,
    Fixed,
    Integer,
    LogUniform,
    RandomSearch,
    Uniform,
    ordered,
)

MAX_TRIES = 20
"""Suggestions that may violate the constraints before a feasible one is drawn at random."""


class OptunaThroughTune:
    """A Tune `OptunaSearch` with conditional parameters and constraints.

    A suggestion that violates a constraint is told to Optuna as pruned, which counts as bad. Told
    as failed it would be forgotten, and TPE likes best where it has seen nothing bad. After 20 of
    them the trial gets a feasible configuration drawn at random.

    Args:
        sampler: An Optuna sampler, seeded.
        space: Parameter -> domain.
        constraints: Expressions that every configuration must satisfy.
        seed: Of the random draws.
    """

    num_points: int | None = None

    def __init__(
        self, sampler: Any, space: Mapping[str, Domain], constraints: Sequence[str], seed: int
    ) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("ray.tune.search").setLevel(logging.ERROR)
        self._space, self._constraints = dict(space), tuple(constraints)
        self._order = ordered(space)
        self._random = RandomSearch(space, constraints, seed)
        self._keys: dict[int, str] = {}  # trial -> the suggestion that satisfied the constraints
        self._search = OptunaSearch(
            space=self._define, metric="validation_accuracy", mode="max", sampler=sampler
        )

    def _define(self, trial: Any) -> None:
        values: dict[str, HyperparameterValue] = {}
        for name in self._order:
            domain = self._space[name]
            if domain.active(values):
                values[name] = _suggest(trial, name, domain)

    def suggest(self, index: int) -> dict[str, HyperparameterValue]:
        """The configuration of trial `index`.

        Raises:
            SpecError: Not even random draws satisfy the constraints.
        """
        for attempt in range(MAX_TRIES + 1):
            if attempt == MAX_TRIES:
                drawn = self._random.suggest(index)
                self._search._ot_study.enqueue_trial(drawn)  # type: ignore[attr-defined]
            key = str(index) if attempt == 0 else f"{index}.{attempt}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a GP may take over a second
                suggested: dict[str, HyperparameterValue] = self._search.suggest(key) or {}
            values = {
                name: domain.value
                if isinstance(domain, Fixed)
                else _as_declared(domain, suggested[name])
                for name, domain in self._space.items()
                if name in suggested or (isinstance(domain, Fixed) and domain.active(suggested))
            }
            if satisfied(self._constraints, values):
                break
            self._search.on_trial_complete(key)
        self._keys[index] = key
        return values

    def tell(self, index: int, value: float | None) -> None:
        """Reports the first rung's validation accuracy; None when there is none (worst)."""
        result = None if value is None or math.isnan(value) else {"validation_accuracy": value}
        self._search.on_trial_complete(self._keys[index], result=result)


def tpe(
    space: Mapping[str, Domain], constraints: Sequence[str], *, seed: int, num_startup_trials: int
) -> OptunaThroughTune:
    """Tree-structured Parzen estimator; parameters that depend on each other are drawn together."""
    from optuna.samplers import TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `multivariate` and `group` are marked experimental
        sampler = TPESampler(
            seed=seed,
            n_startup_trials=num_startup_trials,
            multivariate=True,
            group=True,
            constant_liar=True,
        )
    return OptunaThroughTune(sampler, space, constraints, seed)


def gp(
    space: Mapping[str, Domain], constraints: Sequence[str], *, seed: int, num_startup_trials: int
) -> OptunaThroughTune:
    """Gaussian process with a Matern kernel and expected improvement, as Optuna implements it."""
    from optuna.samplers import GPSampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = GPSampler(
            seed=seed, n_startup_trials=num_startup_trials, deterministic_objective=False
        )
    return OptunaThroughTune(sampler, space, constraints, seed)


def _suggest(trial: Any, name: str, domain: Domain) -> HyperparameterValue:
    value: HyperparameterValue
    match domain:
        case Uniform():
            value = trial.suggest_float(name, domain.low, domain.high, step=domain.step)
        case LogUniform():
            value = trial.suggest_float(name, domain.low, domain.high, log=True)
        case Integer():
            value = trial.suggest_int(
                name, domain.low, domain.high, step=domain.step, log=domain.log
            )
        case Choice():
            value = trial.suggest_categorical(name, domain.values)
        case Fixed():
            value = domain.value
    return value


def _as_declared(domain: Domain, value: HyperparameterValue) -> HyperparameterValue:
    return float(value) if isinstance(domain, Uniform | LogUniform) else value
