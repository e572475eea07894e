"""Search-space domains: what values a hyperparameter may take, and how to draw one.

A domain is written in YAML as `{type: loguniform, low: 1e-3, high: 1}`, as a list of choices, or as
one fixed value. `when` makes it conditional on another parameter: inactive parameters are absent
from `Trial.hyperparameters`, never None. `constraints` relate several parameters by an expression
such as `learning_rate * batch_size <= 64`.

`RandomSearch` and `GridSearch` turn a space into configurations; both are pure functions of their
arguments and the number of the trial, so a resumed search draws what an uninterrupted one draws.
Parameters are resolved in the order of `ordered`, which does not depend on the order in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llp.errors import Problem, SpecError
from llp.records import HyperparameterValue
from llp.spec.constraints import same, satisfied
from llp.spec.priors import PRIOR_SHARE, Confidence, draw_position, takes_mode

MAX_TRIES = 100_000
"""Draws before `RandomSearch` gives up on the constraints."""
MODE_TRIES = 100
"""Draws that may violate the constraints before the first configuration leaves the modes."""
MAX_GRID = 100_000
"""Largest grid that is enumerated."""

_NUMERAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")


def wrong(message: str, *at: str) -> PydanticCustomError:
    """The error of a validator; `at` are the keys to point to, the first that was given wins."""
    return PydanticCustomError("llp", "{message}", {"message": message, "at": at})


def numeral(value: Any) -> Any:
    """Text such as `1e-3` or `0.1` as a number (other YAML loaders read it as text)."""
    return float(value) if isinstance(value, str) and _NUMERAL.fullmatch(value.strip()) else value


def no_bool(value: Any) -> Any:
    """`value`; true and false are not numbers."""
    if isinstance(value, bool):
        raise wrong(f"must be a number, not {str(value).lower()}")
    return value


Value = Annotated[HyperparameterValue, BeforeValidator(numeral)]
"""A number, text, true or false."""


Number = Annotated[float, BeforeValidator(no_bool)]
Whole = Annotated[int, BeforeValidator(no_bool)]


class Frozen(BaseModel):
    """Base of all parts of a spec: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Prior(Frozen):
    """Where the best value is believed to be; see `spec.priors`."""

    mode: Value = Field(description="the best value as far as anyone knows")
    confidence: Confidence = Field(default="medium", description="how surely; how narrow")


class _Domain(Frozen):
    prior: Prior | None = Field(
        default=None, description="where the best value is believed to be, and how surely"
    )
    when: dict[str, Value | list[Value]] = Field(
        default_factory=dict,
        description="active only where each named parameter has this value (or one of these)",
    )

    def active(self, values: Mapping[str, HyperparameterValue]) -> bool:
        """Whether the conditions hold for the values drawn so far."""
        return all(
            name in values and any(same(values[name], one) for one in as_list(allowed))
            for name, allowed in self.when.items()
        )


class Uniform(_Domain):
    """A real number, uniform on `[low, high]`, or on multiples of `step` from `low`."""

    type: Literal["uniform"] = "uniform"
    low: Number
    high: Number
    step: Number | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        _check_bounds(self.low, self.high)
        if self.step is not None:
            _check_step(self.step, self.high - self.low)
        _check_mode(self.prior, self.low, self.high)
        return self

    def sample(self, generator: np.random.Generator) -> float:
        """One value."""
        if self.step is None:
            return float(generator.uniform(self.low, self.high))
        return self._multiple(int(generator.integers(0, self._num_steps() + 1)))

    def near(self, prior: Prior, generator: np.random.Generator) -> float:
        """One value from the prior."""
        position = draw_position(
            (float(prior.mode) - self.low) / (self.high - self.low), prior.confidence, generator
        )
        value = self.low + position * (self.high - self.low)
        if self.step is None:
            return min(max(value, self.low), self.high)
        return self._multiple(min(round((value - self.low) / self.step), self._num_steps()))

    @property
    def num_values(self) -> int | None:
        """How many values there are; None: no end."""
        return None if self.step is None else self._num_steps() + 1

    def finite(self) -> list[float]:
        """All values in order; empty when there are infinitely many."""
        return [self._multiple(k) for k in range(self.num_values or 0)]

    def _num_steps(self) -> int:
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9)

    def _multiple(self, k: int) -> float:
        return min(float(self.low + (self.step or 1) * k), self.high)


class LogUniform(_Domain):
    """A positive real number whose logarithm is uniform on `[log low, log high]`."""

    type: Literal["loguniform"] = "loguniform"
    low: Number
    high: Number

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        if self.low <= 0:
            raise wrong(
                f"loguniform needs low > 0, not {self.low:g}; use uniform or low: 1e-8", "low"
            )
        _check_bounds(self.low, self.high)
        _check_mode(self.prior, self.low, self.high)
        return self

    def sample(self, generator: np.random.Generator) -> float:
        """One value."""
        drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return min(max(drawn, self.low), self.high)

    def near(self, prior: Prior, generator: np.random.Generator) -> float:
        """One value from the prior."""
        low, width = math.log(self.low), math.log(self.high) - math.log(self.low)
        position = (math.log(float(prior.mode)) - low) / width
        drawn = math.exp(low + width * draw_position(position, prior.confidence, generator))
        return min(max(drawn, self.low), self.high)

    num_values: ClassVar[int | None] = None

    def finite(self) -> list[float]:
        """Empty: there are infinitely many values."""
        return []


class Integer(_Domain):
    """A whole number on `[low, high]` in steps of `step`, or log-uniform with `log: true`."""

    type: Literal["integer"] = "integer"
    low: Whole
    high: Whole
    step: Whole = Field(default=1, ge=1)
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Integer:
        _check_bounds(self.low, self.high)
        if max(abs(self.low), abs(self.high)) > 2**53:
            raise wrong("is beyond 2^53, the largest whole number that is exact", "high")
        if self.log and self.low < 1:
            raise wrong(f"a logarithmic integer needs low >= 1, not {self.low}", "low")
        if self.log and self.step != 1:
            raise wrong("give either log: true or a step, not both", "step")
        _check_step(self.step, self.high - self.low)
        _check_mode(self.prior, self.low, self.high)
        if self.prior is not None and self.prior.mode not in self.finite():
            raise wrong(f"the mode {self.prior.mode} is not one of its steps", "prior", "mode")
        return self

    def near(self, prior: Prior, generator: np.random.Generator) -> int:
        """One value from the prior."""
        mode = float(prior.mode)
        if self.log:
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            position = (math.log(mode) - low) / (high - low)
            drawn = math.exp(
                low + (high - low) * draw_position(position, prior.confidence, generator)
            )
            return min(max(round(drawn), self.low), self.high)
        num = (self.high - self.low) // self.step + 1
        position = ((mode - self.low) / self.step + 0.5) / num
        steps = min(int(num * draw_position(position, prior.confidence, generator)), num - 1)
        return self.low + self.step * steps

    def sample(self, generator: np.random.Generator) -> int:
        """One value."""
        if self.log:
            drawn = math.exp(generator.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5)))
            return min(max(round(drawn), self.low), self.high)
        return self.low + self.step * int(
            generator.integers(0, (self.high - self.low) // self.step + 1)
        )

    @property
    def num_values(self) -> int:
        """How many values there are."""
        return len(self.finite())

    def finite(self) -> range:
        """All values in order."""
        return range(self.low, self.high + 1, self.step)


class Choice(_Domain):
    """One of the listed values, all equally likely."""

    type: Literal["choice"] = "choice"
    values: list[Value] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Choice:
        if len({(type(v), v) for v in self.values}) < len(self.values):
            twice = next(v for k, v in enumerate(self.values) if v in self.values[:k])
            raise wrong(f"{twice!r} is listed twice", "values")
        if self.prior is not None and not any(same(self.prior.mode, v) for v in self.values):
            raise wrong(f"the mode {self.prior.mode!r} is not one of the values", "prior", "mode")
        return self

    def near(self, prior: Prior, generator: np.random.Generator) -> HyperparameterValue:
        """One value from the prior."""
        return prior.mode if takes_mode(prior.confidence, generator) else self.sample(generator)

    def sample(self, generator: np.random.Generator) -> HyperparameterValue:
        """One value."""
        return self.values[int(generator.integers(0, len(self.values)))]

    @property
    def num_values(self) -> int:
        """How many values there are."""
        return len(self.values)

    def finite(self) -> list[HyperparameterValue]:
        """All values in order."""
        return self.values


class Fixed(_Domain):
    """Always the same value."""

    type: Literal["fixed"] = "fixed"
    value: Value

    @model_validator(mode="after")
    def _no_prior(self) -> Fixed:
        if self.prior is not None:
            raise wrong("a fixed value has no use for a prior", "prior")
        return self

    def near(self, prior: Prior, generator: np.random.Generator) -> HyperparameterValue:
        """The value."""
        return self.value

    def sample(self, generator: np.random.Generator) -> HyperparameterValue:
        """The value."""
        return self.value

    num_values: ClassVar[int] = 1

    def finite(self) -> list[HyperparameterValue]:
        """The one value."""
        return [self.value]


Domain = Annotated[
    Uniform | LogUniform | Integer | Choice | Fixed,
    Field(discriminator="type"),
]


DOMAINS: dict[str, type[Frozen]] = {
    "uniform": Uniform,
    "loguniform": LogUniform,
    "integer": Integer,
    "choice": Choice,
    "fixed": Fixed,
}
"""`type` of a domain in the file -> its class."""


def as_domain(value: Any) -> Any:
    """YAML shorthand: a list is a choice, a scalar is fixed; a mapping is left as it is."""
    if isinstance(value, list):
        return {"type": "choice", "values": value}
    if isinstance(value, bool | int | float | str):
        return {"type": "fixed", "value": value}
    return value


def as_list(
    value: HyperparameterValue | list[HyperparameterValue],
) -> list[HyperparameterValue]:
    """The values that a condition allows, one or several."""
    return value if isinstance(value, list) else [value]


def ordered(space: Mapping[str, Domain]) -> list[str]:
    """The parameters so that each comes after those its `when` names; alphabetical otherwise.

    Raises:
        SpecError: A condition names a parameter that does not exist, or conditions form a circle.
    """
    order: list[str] = []
    left = sorted(space)
    while left:
        ready = next((name for name in left if set(space[name].when) <= set(order)), None)
        if ready is None:
            problems = [
                Problem(
                    f"depends on {', '.join(sorted(set(space[name].when) - set(order)))}, which is "
                    "unknown or depends on it",
                    path=f"search_space.{name}.when",
                )
                for name in left
            ]
            raise SpecError(problems)
        order.append(ready)
        left.remove(ready)
    return order


class RandomSearch:
    """Independent draws from the space; constraints by rejection.

    Args:
        space: Parameter -> domain.
        constraints: Expressions of `spec.constraints`, all of which a configuration satisfies.
        seed: Seed of the study.
    """

    num_points: int | None = None

    def __init__(
        self, space: Mapping[str, Domain], constraints: Sequence[str] = (), seed: int = 0
    ) -> None:
        self.space, self.constraints, self.seed = dict(space), tuple(constraints), seed
        self._order = ordered(space)

    def suggest(self, index: int) -> dict[str, HyperparameterValue]:
        """The configuration of trial `index` (from 0): a pure function of `(seed, index)`.

        Raises:
            SpecError: None of 100,000 draws satisfied the constraints.
        """
        generator = np.random.default_rng([self.seed, index])
        for attempt in range(MAX_TRIES):
            values = self.draw(generator, near=self._near(index, attempt, generator))
            if satisfied(self.constraints, values):
                return values
        text = (
            f"none of {MAX_TRIES:,} draws satisfies {' and '.join(self.constraints)}; "
            "widen a domain or drop a constraint"
        )
        raise SpecError([Problem(text, path="constraints")])

    @property
    def has_priors(self) -> bool:
        """Whether some parameter has an expert prior."""
        return any(domain.prior is not None for domain in self.space.values())

    def _near(
        self, index: int, attempt: int, generator: np.random.Generator
    ) -> Literal["mode", "prior", ""]:
        """How a configuration uses the priors; the constraints may rule the modes out."""
        if not self.has_priors:
            return ""
        if index == 0 and attempt < MODE_TRIES:
            return "mode"
        return "prior" if generator.random() < PRIOR_SHARE else ""

    def draw(
        self, generator: np.random.Generator, *, near: Literal["mode", "prior", ""] = ""
    ) -> dict[str, HyperparameterValue]:
        """One configuration before the constraints; inactive parameters are absent.

        Args:
            generator: Of the randomness.
            near: Take the modes of the priors, or draw from the priors, where there are any.
        """
        values: dict[str, HyperparameterValue] = {}
        for name in self._order:
            domain = self.space[name]
            if domain.active(values):
                if domain.prior is None or not near:
                    values[name] = domain.sample(generator)
                elif near == "prior":
                    values[name] = domain.near(domain.prior, generator)
                else:
                    values[name] = declared(domain, domain.prior.mode)
        return values


def declared(domain: Domain, value: HyperparameterValue) -> HyperparameterValue:
    """`value` as the domain gives it: a float of a real domain, the listed one of a choice."""
    if isinstance(domain, Uniform | LogUniform):
        return float(value)
    if isinstance(domain, Choice):
        return next((v for v in domain.values if same(v, value)), value)
    return int(value) if isinstance(domain, Integer) else value


class GridSearch:
    """Every combination of finite domains that satisfies the constraints, in a fixed order.

    The last parameter of `ordered` varies fastest. Inactive parameters do not multiply the grid.

    Args:
        space: Parameter -> domain; choices, fixed values, integers, and uniform with a step.
        constraints: Expressions of `spec.constraints`.
        seed: Not used: a grid has no chance in it.

    Raises:
        SpecError: A domain has infinitely many values, or there are over 100,000 combinations.
    """

    def __init__(
        self, space: Mapping[str, Domain], constraints: Sequence[str] = (), seed: int = 0
    ) -> None:
        order = ordered(space)
        endless = [name for name in order if space[name].num_values is None]
        if endless:
            raise SpecError(
                Problem(
                    f"a grid needs finitely many values and {space[name].type} has no end; "
                    f"list them, for example {name}: [0.01, 0.1]",
                    path=f"search_space.{name}",
                )
                for name in endless
            )
        too_large = SpecError(
            [Problem(f"the grid has over {MAX_GRID:,} combinations", path="search_space")]
        )
        if any((space[name].num_values or 0) > MAX_GRID for name in order):
            raise too_large
        self._points: list[dict[str, HyperparameterValue]] = []
        for visited, values in enumerate(_combinations(space, order, {})):
            if visited >= MAX_GRID:
                raise too_large
            if satisfied(constraints, values):
                self._points.append(values)

    @property
    def num_points(self) -> int:
        """Number of configurations."""
        return len(self._points)

    def suggest(self, index: int) -> dict[str, HyperparameterValue]:
        """The configuration number `index`, from 0.

        Raises:
            IndexError: The grid has no more than `num_points` configurations.
        """
        if not 0 <= index < self.num_points:
            raise IndexError(f"point {index} of a grid of {self.num_points}")
        return dict(self._points[index])


def _combinations(
    space: Mapping[str, Domain], order: Sequence[str], values: dict[str, HyperparameterValue]
) -> Iterator[dict[str, HyperparameterValue]]:
    if not order:
        yield values
        return
    name, rest = order[0], order[1:]
    if not space[name].active(values):
        yield from _combinations(space, rest, values)
        return
    for value in space[name].finite():
        yield from _combinations(space, rest, {**values, name: value})


def _check_bounds(low: float, high: float) -> None:
    if low >= high:
        raise wrong(f"low ({low:g}) must be below high ({high:g})", "low")
    if not math.isfinite(float(high) - float(low)):
        raise wrong(f"the width from {low:g} to {high:g} is too large for a number", "high")


def _check_mode(prior: Prior | None, low: float, high: float) -> None:
    if prior is None:
        return
    if isinstance(prior.mode, bool | str):
        raise wrong(f"the mode {prior.mode!r} is not a number", "prior", "mode")
    if not low <= prior.mode <= high:
        raise wrong(f"the mode {prior.mode:g} is not between {low:g} and {high:g}", "prior", "mode")


def _check_step(step: float, width: float) -> None:
    if step > width:
        raise wrong(f"a step of {step:g} is over the width {width:g} of the domain", "step")
    if isinstance(step, float) and width / step > 2**31:
        raise wrong(f"a step of {step:g} makes over 2^31 values; drop it", "step")
