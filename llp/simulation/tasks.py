"""Tables of learning curves as tasks: configurations whose training can be looked up.

A training is `num_steps` steps long. Where the curves of a table share their positions, a step is
one evaluation; where they do not, the value at a step is the last one known at that share of the
training. Costs are counted in full trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llp.curve_files import read_tables
from llp.errors import DataError
from llp.probing.curve_tables import CurveTable

Floats = NDArray[np.float64]
GRID = 50
"""Steps of a training whose curves have positions of their own."""
MIN_CONFIGURATIONS = 5


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        source: Where the table comes from.
        name: Of the task.
        values: [num_configurations, num_steps], lower is better; NaN from where it diverged.
        cost: [num_steps], cost of a training up to each step, in full trainings.
        restarts: Whether every step is a training of its own (a data size), so that going on costs
            as much as starting there.
        scale: The values that are regret 0 and 1: the best final value of the table, and the median
            first value.
    """

    source: str
    name: str
    values: Floats
    cost: Floats
    restarts: bool
    scale: tuple[float, float]

    @property
    def num_steps(self) -> int:
        """Steps of a full training."""
        return int(self.values.shape[1])

    def regret(self, values: Floats) -> Floats:
        """Values as regrets in [0, 1]; NaN as 1."""
        best, start = self.scale
        found = np.clip((values - best) / (start - best), 0, 1)
        return np.where(np.isnan(found), 1.0, found)


def read_tasks(paths: Sequence[str | Path]) -> list[Task]:
    """The tasks in the files that `llp curves` reads.

    Raises:
        DataError: A file cannot be read, or holds no task with enough whole curves.
    """
    made = [as_task(table) for table in read_tables(paths) if table.judged]
    found = [task for task in made if task is not None]
    if not found:
        raise DataError(
            f"the files hold no task with at least {MIN_CONFIGURATIONS} curves that were trained "
            "to the end"
        )
    return found


def as_task(table: CurveTable) -> Task | None:
    """The task of a table; None when fewer than five curves can be used."""
    first = np.where(np.isfinite(table.values), table.positions, np.inf).min(axis=1)
    usable = np.isfinite(first)
    if table.natural_unit:  # sizes: curves must end at the same one
        usable &= table.horizon >= np.nanmax(table.horizon) * (1 - 1e-9)
    if usable.sum() < MIN_CONFIGURATIONS:
        return None
    rows = table.rows(np.flatnonzero(usable))
    shared = bool((rows.positions == rows.positions[0]).all())
    if shared:
        values, cost = rows.values.copy(), rows.positions[0] / rows.horizon[0]
    else:
        shares = np.arange(1, GRID + 1) / GRID
        values = np.stack([_at(rows, k, shares) for k in range(len(rows.values))])
        cost = shares
    if not np.isfinite(values[:, -1]).any():
        return None
    start = float(np.nanmedian(values[:, 0]))
    best = float(np.nanmin(values[:, -1]))
    if not start > best:
        start = float(np.nanmax(values))
    if not start > best:
        return None
    return Task(table.source, table.task, values, cost, table.natural_unit, (best, start))


def _at(rows: CurveTable, k: int, shares: Floats) -> Floats:
    """The last value of curve `k` at every share; its first value before."""
    known = np.isfinite(rows.values[k])
    places, values = rows.positions[k][known], rows.values[k][known]
    index = np.searchsorted(places, shares * rows.horizon[k] * (1 + 1e-9), side="right") - 1
    return np.asarray(values[np.maximum(index, 0)])
