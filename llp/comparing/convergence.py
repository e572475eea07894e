"""How long a training takes to 90, 95 and 99 % of the best validation accuracy.

The *target* of a share is that share of the best validation accuracy that any full training on the
same dataset reached, so that all are asked for the same; a training that never gets there has no
time. Times are read at the epochs that were evaluated: the first at or above the target counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

SHARES = (0.9, 0.95, 0.99)
COLUMNS = (
    *("dataset", "label", "share", "target", "num", "num_reached"),
    *("epochs", "samples", "seconds", "steps"),
)


def first_reached(values: Sequence[float], target: float) -> int | None:
    """Index of the first value at or above `target`; None when there is none.

    >>> first_reached([0.2, 0.6, 0.5, 0.7], 0.6)
    1
    """
    return next((k for k, value in enumerate(values) if value >= target), None)


def steps_to(table: pd.DataFrame, shares: Sequence[float] = SHARES) -> pd.DataFrame:
    """Epochs, samples, optimizer steps and seconds to shares of the best, of every configuration.

    Args:
        table: Completed trainings with their curves; see `table.runs_table`.
        shares: Of the best validation accuracy on the dataset.

    Returns:
        A row per dataset, label and share: `target`, `num` trainings, `num_reached` of them, and
        over those the mean `epochs`, `samples` (examples in all gradients), `seconds`, and `steps`
        (passes over the images divided by the batch size). NaN when none got there: a mean over
        the lucky ones alone would be too good, so look at `num_reached` first.
    """
    rows = []
    for dataset, group in table.groupby("dataset", sort=False):
        curves = [list(curve) for curve in group["curve_validation_accuracy"] if len(curve)]
        if not curves:
            continue
        best = max(max(curve) for curve in curves)
        for label, trainings in group.groupby("label", sort=False):
            for share in shares:
                found = [_times(r, share * best) for r in trainings.to_dict("records")]
                reached = [times for times in found if times is not None]
                row: dict[str, object] = {
                    "dataset": dataset,
                    "label": label,
                    "share": share,
                    "target": share * best,
                    "num": len(found),
                    "num_reached": len(reached),
                }
                for k, name in enumerate(("epochs", "samples", "seconds", "steps")):
                    values = [times[k] for times in reached]
                    row[name] = sum(values) / len(values) if values else math.nan
                rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _times(row: Mapping[Any, Any], target: float) -> tuple[float, float, float, float] | None:
    def column(name: str) -> list[float]:
        return [float(value) for value in row[name]]

    place = first_reached(column("curve_validation_accuracy"), target)
    if place is None:
        return None
    epochs = column("curve_epoch")[place]
    batches = math.ceil(float(row["num_examples"]) / float(row["batch_size"]))
    return (
        epochs,
        column("curve_samples")[place],
        column("curve_seconds")[place],
        epochs * batches,
    )
