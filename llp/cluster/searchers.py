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
from statistics import quantiles
from typing import Any, TypedDict, Unpack

from llp.records import EarlierResult, HyperparameterValue
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


class Known(TypedDict, total=False):
    """What a searcher may start from and look for; see `OptunaThroughTune`."""

    first: Sequence[Mapping[str, HyperparameterValue]]
    earlier: Sequence[EarlierResult]
    objectives: Sequence[str]


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
        num_startup_trials: Results before the sampler's model takes over.
        first: Configurations of the first trials.
        earlier: Results of earlier studies, of every active parameter of the space.
        objectives: Look for the front of these, all minimised, and not for the best accuracy.
    """

    num_points: int | None = None

    def __init__(
        self,
        sampler: Any,
        space: Mapping[str, Domain],
        constraints: Sequence[str],
        seed: int,
        *,
        num_startup_trials: int = 10,
        first: Sequence[Mapping[str, HyperparameterValue]] = (),
        earlier: Sequence[EarlierResult] = (),
        objectives: Sequence[str] = (),
    ) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("ray.tune.search").setLevel(logging.ERROR)
        self._space, self._constraints = dict(space), tuple(constraints)
        self._order = ordered(space)
        self._random = RandomSearch(space, constraints, seed)
        self._keys: dict[int, str] = {}  # trial -> the suggestion that satisfied the constraints
        self.objectives = tuple(objectives)
        self._search = OptunaSearch(
            space=self._define,
            metric=list(objectives) if objectives else "validation_accuracy",
            mode=["min"] * len(objectives) if objectives else "max",
            sampler=sampler,
        )
        self._num_startup = num_startup_trials
        self._first = [dict(configuration) for configuration in first]
        self._own: list[float] = []
        self._waiting = [result for result in earlier if not result.comparable]
        self._add([(r, r.value) for r in earlier if r.comparable])

    def _add(self, results: Sequence[tuple[EarlierResult, float]]) -> None:
        """Makes earlier results, with these values, trials of Optuna's study."""
        import optuna

        for result, value in results:
            searched = {
                name: value
                for name, value in result.hyperparameters.items()
                if not isinstance(self._space[name], Fixed)
            }
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=searched,
                    distributions={name: _distribution(self._space[name]) for name in searched},
                    value=value,
                )
            )

    @property
    def _study(self) -> Any:
        return self._search._ot_study

    def _given(self, index: int) -> dict[str, HyperparameterValue] | None:
        """A configuration that trial `index` has whatever the sampler thinks."""
        if index < len(self._first):
            return self._first[index]
        if self._random.has_priors and index < self._num_startup:
            return self._random.suggest(index)
        return None

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
        given = self._given(index)
        for attempt in range(MAX_TRIES + 1):
            if attempt == MAX_TRIES:
                given = self._random.suggest(index)
            if given is not None:
                self._study.enqueue_trial(given)
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
            given = None
            self._search.on_trial_complete(key)
        self._keys[index] = key
        return values

    def tell(
        self, index: int, value: float | None, costs: Mapping[str, float] | None = None
    ) -> None:
        """Reports a trial's first rung.

        Args:
            index: Of the trial.
            value: Validation accuracy; None when there is none (worst).
            costs: With several objectives, the others than `error`; NaN counts as no result.
        """
        result: dict[str, float] | None = None
        if value is not None and math.isfinite(value):
            result = {"validation_accuracy": value, "error": 1 - value, **(costs or {})}
            if not all(math.isfinite(result[name]) for name in self.objectives):
                result = None
        self._search.on_trial_complete(self._keys[index], result=result)
        if value is not None and math.isfinite(value):
            self._own.append(value)
        if self._waiting and len(self._own) >= self._num_startup:
            aligned = [*zip(self._waiting, aligned_values(self._waiting, self._own), strict=True)]
            self._waiting = []
            self._add(aligned)


def aligned_values(earlier: Sequence[EarlierResult], own: Sequence[float]) -> list[float]:
    """The values of earlier results, each study at the median and spread of `own`.

    The spread is half the distance between the quartiles; a study without one keeps its values
    around the median of `own`.
    """

    def middle(values: Sequence[float]) -> tuple[float, float]:
        low, median, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        return median, (high - low) / 2

    here, spread = middle(own)
    studies: dict[str, list[float]] = {}
    for result in earlier:
        studies.setdefault(result.study, []).append(result.value)
    aligned = []
    for result in earlier:
        there, width = middle(studies[result.study])
        scale = spread / width if width > 0 else 1.0
        aligned.append(here + scale * (result.value - there))
    return aligned


def tpe(
    space: Mapping[str, Domain],
    constraints: Sequence[str],
    *,
    seed: int,
    num_startup_trials: int,
    **known: Unpack[Known],
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
    return OptunaThroughTune(
        sampler, space, constraints, seed, num_startup_trials=num_startup_trials, **known
    )


def gp(
    space: Mapping[str, Domain],
    constraints: Sequence[str],
    *,
    seed: int,
    num_startup_trials: int,
    **known: Unpack[Known],
) -> OptunaThroughTune:
    """Gaussian process with a Matern kernel and expected improvement, as Optuna implements it."""
    from optuna.samplers import GPSampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = GPSampler(
            seed=seed, n_startup_trials=num_startup_trials, deterministic_objective=False
        )
    return OptunaThroughTune(
        sampler, space, constraints, seed, num_startup_trials=num_startup_trials, **known
    )


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


def _distribution(domain: Domain) -> Any:
    """The domain in Optuna's words; a fixed value has none."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    match domain:
        case Uniform():
            return FloatDistribution(domain.low, domain.high, step=domain.step)
        case LogUniform():
            return FloatDistribution(domain.low, domain.high, log=True)
        case Integer():
            return IntDistribution(domain.low, domain.high, step=domain.step, log=domain.log)
        case Choice():
            return CategoricalDistribution(domain.values)
    raise TypeError(f"{domain.type} is no distribution")


def _as_declared(domain: Domain, value: HyperparameterValue) -> HyperparameterValue:
    return float(value) if isinstance(domain, Uniform | LogUniform) else value
