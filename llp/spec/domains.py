"""Search-space domains: what values a hyperparameter may take, and how to draw one.

A domain is written in YAML as `{type: loguniform, low: 1e-3, high: 1}`, as a list of choices, or as
one fixed value. `when` makes it conditional on another parameter: inactive parameters are absent
from `Trial.hyperparameters`, never None. `constraints` relate several parameters by an expression
such as `learning_rate * batch_size <= 64`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llp.records import HyperparameterValue


class _Domain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    when: dict[str, HyperparameterValue | list[HyperparameterValue]] = Field(
        default_factory=dict,
        description="active only where each named parameter has this value (or one of these)",
    )

    def active(self, values: Mapping[str, HyperparameterValue]) -> bool:
        """Whether the conditions hold for the values drawn so far."""
        return all(
            name in values
            and values[name] in (allowed if isinstance(allowed, list) else [allowed])
            for name, allowed in self.when.items()
        )


class Uniform(_Domain):
    """A real number, uniform on `[low, high]`, or on multiples of `step` from `low`."""

    type: Literal["uniform"] = "uniform"
    low: float
    high: float
    step: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        _check_bounds(self.low, self.high)
        return self

    def sample(self, generator: np.random.Generator) -> float:
        """One value."""
        if self.step is None:
            return float(generator.uniform(self.low, self.high))
        count = math.floor((self.high - self.low) / self.step + 1e-9)
        return float(self.low + self.step * int(generator.integers(0, count + 1)))


class LogUniform(_Domain):
    """A positive real number whose logarithm is uniform on `[log low, log high]`."""

    type: Literal["loguniform"] = "loguniform"
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        if self.low <= 0:
            raise ValueError(f"loguniform needs low > 0, not {self.low:g}; use uniform or low: 1e-8")
        _check_bounds(self.low, self.high)
        return self

    def sample(self, generator: np.random.Generator) -> float:
        """One value."""
        return float(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))


class Integer(_Domain):
    """A whole number on `[low, high]` in steps of `step`, or log-uniform with `log: true`."""

    type: Literal["integer"] = "integer"
    low: int
    high: int
    step: int = Field(default=1, ge=1)
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Integer:
        _check_bounds(self.low, self.high)
        if self.log and self.low < 1:
            raise ValueError(f"a logarithmic integer needs low >= 1, not {self.low}")
        if self.log and self.step != 1:
            raise ValueError("give either log: true or a step, not both")
        return self

    def sample(self, generator: np.random.Generator) -> int:
        """One value."""
        if self.log:
            drawn = math.exp(generator.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5)))
            return min(max(round(drawn), self.low), self.high)
        return self.low + self.step * int(
            generator.integers(0, (self.high - self.low) // self.step + 1)
        )


class Choice(_Domain):
    """One of the listed values, all equally likely."""

    type: Literal["choice"] = "choice"
    values: list[HyperparameterValue] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Choice:
        if len({(type(v), v) for v in self.values}) < len(self.values):
            raise ValueError(f"a value is listed twice in {self.values}")
        return self

    def sample(self, generator: np.random.Generator) -> HyperparameterValue:
        """One value."""
        return self.values[int(generator.integers(0, len(self.values)))]


class Fixed(_Domain):
    """Always the same value."""

    type: Literal["fixed"] = "fixed"
    value: HyperparameterValue

    def sample(self, generator: np.random.Generator) -> HyperparameterValue:
        """The value."""
        return self.value


Domain = Annotated[
    Uniform | LogUniform | Integer | Choice | Fixed,
    Field(discriminator="type"),
]


def _check_bounds(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"low ({low:g}) must be below high ({high:g})")


def as_domain(value: Any) -> Any:
    """YAML shorthand: a list is a choice, a scalar is fixed; a mapping is left as it is."""
    if isinstance(value, list):
        return {"type": "choice", "values": value}
    if isinstance(value, bool | int | float | str):
        return {"type": "fixed", "value": value}
    return value
