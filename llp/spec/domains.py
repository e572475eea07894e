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

MAX_TRIES = 100_000
"""Draws before `RandomSearch` gives up on the constraints."""
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


class _Domain(Frozen):
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
        return self

    def sample(self, generator: np.random.Generator) -> float:
        """One value."""
        if self.step is None:
            return float(generator.uniform(self.low, self.high))
        return self._multiple(int(generator.integers(0, self._num_steps() + 1)))

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
        return self

    def sample(self, generator: np.random.Generator) -> float:
        """One value."""
        drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
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
        return self

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
        return self

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
        for _ in range(MAX_TRIES):
            values = self.draw(generator)
            if satisfied(self.constraints, values):
                return values
        text = (
            f"none of {MAX_TRIES:,} draws satisfies {' and '.join(self.constraints)}; "
            "widen a domain or drop a constraint"
        )
        raise SpecError([Problem(text, path="constraints")])

    def draw(self, generator: np.random.Generator) -> dict[str, HyperparameterValue]:
        """One configuration before the constraints; inactive parameters are absent."""
        values: dict[str, HyperparameterValue] = {}
        for name in self._order:
            if self.space[name].active(values):
                values[name] = self.space[name].sample(generator)
        return values


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


def _check_step(step: float, width: float) -> None:
    if step > width:
        raise wrong(f"a step of {step:g} is over the width {width:g} of the domain", "step")
    if isinstance(step, float) and width / step > 2**31:
        raise wrong(f"a step of {step:g} makes over 2^31 values; drop it", "step")
