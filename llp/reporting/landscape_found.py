"""The results of a landscape as its page reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llp.reporting import formats
from llp.reporting.pictures import Picture

Array = np.ndarray[Any, Any]


@dataclass
class Found:
    """The results, and the pictures that were drawn of them.

    Attributes:
        plain: What `landscape.json` holds.
        arrays: What `landscape.npz` holds.
        pictures: Every picture drawn, in order.
    """

    plain: Mapping[str, Any]
    arrays: Mapping[str, Array]
    pictures: list[Picture] = field(default_factory=list)

    @property
    def values(self) -> Mapping[str, Any]:
        """Every number by key."""
        values: Mapping[str, Any] = self.plain["values"]
        return values

    def parts(self, analysis: str) -> list[str]:
        """Names of the parts of an analysis that are there."""
        return [n for n, part in self.plain["parts"].items() if part["analysis"] == analysis]

    def rows(self, part: str) -> list[Mapping[str, Any]]:
        """One row a layer of a part."""
        rows: list[Mapping[str, Any]] = self.plain["rows"].get(part, [])
        return rows

    def draw(self, pictures: tuple[Picture, ...]) -> tuple[Any, ...]:
        """The pictures for the page; kept for the files."""
        self.pictures += pictures
        return tuple(picture.inline() for picture in pictures)

    def number(self, key: str) -> float:
        """A number, NaN where there is none."""
        value = self.values.get(key)
        return float(value) if value is not None and formats.is_number(value) else math.nan
