"""Roles: what each column of a table of trials means, so that scoring serves any table.

The service, a notebook and tables from elsewhere all hand over one row per trial. `Roles` says
which columns are hyperparameters, which are tier-1 signals of the probe, which are tier-2 metrics
of the loss landscape and in which direction each is better.

Words used: the *primary* signal is the one that "validation only" ranks by. A *level* is how much
budget a trial's signals were obtained with; trials of different levels are never compared by their
raw signals. A column `NAME_se` holds the standard error of column `NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from llp.errors import Problem, SpecError, unknown
from llp.scoring.numbers import numbers

Direction = Literal["higher", "lower", "unknown"]
Family = Literal["metric", "loss", "recent", "train_loss", "train_accuracy"]

TIER1: dict[str, Direction] = {
    "validation_accuracy": "higher",
    "validation_loss": "lower",
    "validation_accuracy_last3": "higher",
    "train_loss": "lower",
    "train_accuracy": "higher",
}
"""Signals of our own study tables."""

TARGET = "verified_accuracy"
"""Validation accuracy of the full trainings: what weights are learnt from."""

TEST = "test_accuracy"
"""Test accuracy of the full trainings: rankings are judged by it in the report, nothing else is."""

BOOKKEEPING = (
    "outcome",
    "rung",
    "level",
    "data_fraction",
    "samples_seen",
    "seconds",
    "num_validation",
    "tier2_seconds",
    "num_seeds",
    "verification_samples",
    "study",
    TARGET,
    TEST,
)
"""Columns of our own study tables that are neither hyperparameters nor signals."""


MISSING = frozenset({"", "nan", "na", "n/a", "none", "null", "<na>", "nat", "-"})
"""Text that counts as a missing value."""


@dataclass(frozen=True)
class Roles:
    """Which column plays which part.

    Attributes:
        hyperparameters: Numeric or categorical columns; missing means inactive.
        tier1: Signal of the probe -> better direction.
        tier2: Metric of the landscape -> believed direction (`unknown`: to be learnt).
        study: Column that tells studies apart; None for one study.
        target: Result of full training, higher is better; empty for trials to be ranked.
        level: Budget reached, higher is further; None when all trials had the same.
        num_validation: Number of validation examples behind an accuracy in [0, 1].
    """

    hyperparameters: tuple[str, ...] = ()
    tier1: Mapping[str, Direction] = field(default_factory=dict)
    tier2: Mapping[str, Direction] = field(default_factory=dict)
    study: str | None = None
    target: str | None = None
    level: str | None = None
    num_validation: str | None = None

    @property
    def primary(self) -> str:
        """The signal that "validation only" ranks by.

        Raises:
            SpecError: No tier-1 column is declared.
        """
        if not self.tier1:
            raise SpecError("roles: tier1 is empty; name at least one column, e.g. {val: higher}")
        if "validation_accuracy" in self.tier1:
            return "validation_accuracy"
        ranked = [name for name in self.tier1 if family(name) == "metric"]
        return ranked[0] if ranked else next(iter(self.tier1))

    @property
    def columns(self) -> list[str]:
        """All columns with a role; one that was given two occurs twice."""
        return [column for _, column in self._named()]

    def _named(self) -> list[tuple[str, str]]:
        """(role, column) of every column."""
        singles = ("study", "target", "level", "num_validation")
        single = [(role, getattr(self, role)) for role in singles]
        return [
            *(("hyperparameters", name) for name in self.hyperparameters),
            *(("tier1", name) for name in self.tier1),
            *(("tier2", name) for name in self.tier2),
            *((role, name) for role, name in single if name is not None),
        ]

    def of_family(self, wanted: Family) -> list[str]:
        """Tier-1 columns of one family, in order."""
        return [name for name in self.tier1 if family(name) == wanted]

    def to_plain(self) -> dict[str, Any]:
        """Plain data, as `from_mapping` reads it and `DataFrame.attrs` keeps it."""
        return {
            "hyperparameters": list(self.hyperparameters),
            "tier1": dict(self.tier1),
            "tier2": dict(self.tier2),
            "study": self.study,
            "target": self.target,
            "level": self.level,
            "num_validation": self.num_validation,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Roles:
        """Roles from plain data such as a YAML file.

        Raises:
            SpecError: Unknown key or direction, the message names the nearest; or a column with
                two roles.
        """
        names = [f.name for f in fields(cls)]
        found = [
            Problem(unknown("role", str(key), names), str(key)) for key in data if key not in names
        ]
        listed = data.get("hyperparameters") or ()
        if isinstance(listed, str | Mapping) or not all(isinstance(name, str) for name in listed):
            found.append(Problem("is a list of columns: [a, b]", "hyperparameters"))
            listed = ()
        tiers: dict[str, dict[str, Direction]] = {"tier1": {}, "tier2": {}}
        for tier, columns in tiers.items():
            allowed = ["higher", "lower"] + (["unknown"] if tier == "tier2" else [])
            given = data.get(tier) or {}
            if not isinstance(given, Mapping):
                text = f"is a mapping of columns to {' or '.join(allowed)}: {{column: higher}}"
                found.append(Problem(text, tier))
                continue
            for column, direction in given.items():
                if direction not in allowed:
                    text = unknown("direction", str(direction), allowed)
                    found.append(Problem(text, f"{tier}.{column}"))
                else:
                    columns[str(column)] = direction
        singles: dict[str, str | None] = {}
        for name in ("study", "target", "level", "num_validation"):
            value = data.get(name)
            if value is not None and not isinstance(value, str):
                found.append(Problem(f"is the name of one column, not {value!r}", name))
            singles[name] = value if isinstance(value, str) else None
        roles = cls(tuple(listed), tiers["tier1"], tiers["tier2"], **singles)
        found += roles.conflicts()
        if found:
            raise SpecError(found)
        return roles

    @classmethod
    def of(cls, given: Roles | Mapping[str, Any] | None, table: pd.DataFrame) -> Roles:
        """The roles that a caller gave, as they are or as plain data; else those of `table`.

        Raises:
            SpecError: See `from_mapping`.
        """
        if given is None:
            return cls.from_table(table)
        return given if isinstance(given, cls) else cls.from_mapping(cast("Any", given))

    def conflicts(self) -> list[Problem]:
        """One problem for each column with two roles, or with one role twice."""
        first: dict[str, str] = {}
        found = []
        for role, column in self._named():
            if column not in first:
                first[column] = role
                continue
            other = first[column]
            text = (
                f"the column {column!r} is listed twice"
                if other == role
                else f"the column {column!r} has two roles, {other} and {role}; give it one"
            )
            found.append(Problem(text, f"{role}.{column}" if role in ("tier1", "tier2") else role))
        return found

    def of_history(self, table: pd.DataFrame) -> Roles:
        """The roles of an earlier table: its own, or the part of these that it has columns for."""
        return type(self).from_table(table) if "roles" in table.attrs else self.present_in(table)

    def present_in(
        self, table: pd.DataFrame, others: Sequence[pd.DataFrame] | None = None
    ) -> Roles:
        """The roles of the columns that `table` has; its target and primary signal are kept.

        With `others`, a role whose column none of these has is kept too, to be found missing.
        """
        columns = {str(name) for name in table.columns}
        if others is not None:
            elsewhere = {str(name) for other in others for name in other.columns}
            columns |= set(self.columns) - elsewhere

        def known(name: str | None) -> str | None:
            return name if name in columns else None

        return replace(
            self,
            hyperparameters=tuple(name for name in self.hyperparameters if name in columns),
            tier1={n: way for n, way in self.tier1.items() if n in columns or n == self.primary},
            tier2={n: way for n, way in self.tier2.items() if n in columns},
            study=known(self.study),
            level=known(self.level),
            num_validation=known(self.num_validation),
        )

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Roles:
        """Roles from `table.attrs["roles"]`, or else from the column names.

        By name: our own signals, `study`, `level`, `num_validation` and the target
        `verified_accuracy` are known, and `test_accuracy` is known to be no target; a column with a
        `NAME_se` beside it is a tier-2 metric of unknown direction; all other columns are taken to
        be hyperparameters.
        """
        stored = table.attrs.get("roles")
        if stored is not None:
            return stored if isinstance(stored, cls) else cls.from_mapping(stored)
        names = [str(name) for name in table.columns]
        present = set(names)
        errors = {name for name in names if name.endswith("_se") and name[:-3] in present}
        tier1 = {name: way for name, way in TIER1.items() if name in present}
        tier2: dict[str, Direction] = {
            name: "unknown" for name in names if f"{name}_se" in errors and name not in tier1
        }
        known = errors | set(tier1) | set(tier2) | set(BOOKKEEPING)
        return cls(
            hyperparameters=tuple(name for name in names if name not in known),
            tier1=tier1,
            tier2=tier2,
            study="study" if "study" in present else None,
            target=TARGET if TARGET in present else None,
            level="level" if "level" in present else None,
            num_validation="num_validation" if "num_validation" in present else None,
        )

    def check(self, table: pd.DataFrame) -> None:
        """Holds the roles against the columns of `table`.

        Raises:
            SpecError: A named column is missing (the message names the nearest) or has two roles;
                or a signal, metric or target has a value that is no number; names row and value.
        """
        columns = [str(name) for name in table.columns]
        for role, name in self._named():
            if name not in columns:
                raise SpecError(unknown("column", name, columns))
            if columns.count(name) > 1:
                raise SpecError(f"the column {name!r} occurs {columns.count(name)} times")
            if role in ("tier1", "tier2", "target"):
                values = table.iloc[:, columns.index(name)]
                for row in np.flatnonzero(values.notna() & np.isnan(numbers(values))):
                    value = values.iloc[row]
                    if str(value).strip().lower() not in MISSING:
                        place = _row(table, int(row))
                        raise SpecError(
                            f"the column {name!r} ({role}) has {value!r} in {place}, which is no "
                            "number; leave it empty where there is none"
                        )
        if found := self.conflicts():
            raise SpecError(found)
        _ = self.primary


def _row(table: pd.DataFrame, row: int) -> str:
    """Row number `row`, counted from 1, with its label where the table has labels."""
    if isinstance(table.index, pd.RangeIndex):
        return f"row {row + 1}"
    return f"row {row + 1} ({table.index[row]!r})"


def family(column: str) -> Family:
    """What kind of tier-1 signal a column holds, told from its name.

    >>> family("train_loss"), family("val_nll"), family("accuracy_at_epoch_3")
    ('train_loss', 'loss', 'metric')
    """
    name = column.lower()
    is_loss = any(word in name for word in ("loss", "nll", "entropy"))
    if "train" in name:
        return "train_loss" if is_loss else "train_accuracy"
    if is_loss:
        return "loss"
    return "recent" if any(word in name for word in ("last3", "recent")) else "metric"
