"""Roles: what each column of a table of trials means, so that scoring serves any table.

The service, a notebook and tables from elsewhere all hand over one row per trial. `Roles` says
which columns are hyperparameters, which are tier-1 signals of the probe, which are tier-2 metrics
of the loss landscape and in which direction each is better.

Words used: the *primary* signal is the one that "validation only" ranks by. A *level* is how much
budget a trial's signals were obtained with; trials of different levels are never compared by their
raw signals. A column `NAME_se` holds the standard error of column `NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pandas as pd

from llp.errors import SpecError, unknown

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
            SpecError: Unknown key or direction; the message names the nearest.
        """
        names = [f.name for f in fields(cls)]
        for key in data:
            if key not in names:
                raise SpecError(unknown("role", key, names))
        tiers: dict[str, dict[str, Direction]] = {}
        for tier in ("tier1", "tier2"):
            tiers[tier] = dict(data.get(tier) or {})
            allowed = ["higher", "lower"] + (["unknown"] if tier == "tier2" else [])
            for column, direction in tiers[tier].items():
                if direction not in allowed:
                    raise SpecError(f"{tier}.{column}: " + unknown("direction", direction, allowed))
        return cls(
            hyperparameters=tuple(data.get("hyperparameters") or ()),
            tier1=tiers["tier1"],
            tier2=tiers["tier2"],
            study=data.get("study"),
            target=data.get("target"),
            level=data.get("level"),
            num_validation=data.get("num_validation"),
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
        """Raises SpecError when a named column is not in `table`; the message names the nearest."""
        singles = [self.study, self.target, self.level, self.num_validation]
        named = [*self.hyperparameters, *self.tier1, *self.tier2]
        columns = [str(name) for name in table.columns]
        for name in [*named, *(single for single in singles if single is not None)]:
            if name not in columns:
                raise SpecError(unknown("column", name, columns))
        _ = self.primary


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
