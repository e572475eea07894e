"""What full training of a trial would give, forecast from its probes along both axes.

The curve of every rung is forecast along training, and the ends of the rungs along the cost of a
rung (images times epochs), up to the cost of full training on all data.
"""

from __future__ import annotations

import math

import numpy as np

from llp.probing.learning_curves import extrapolate_full
from llp.records import Interval, SearchResult


def full_results(result: SearchResult) -> dict[str, tuple[float, Interval]]:
    """Trial id -> forecast validation accuracy after full training, with its 90 % interval.

    Trials without a point, and those that diverged or failed, are left out. All curves of the
    study are evidence.
    """
    rungs = result.rungs
    trials = [
        trial
        for trial in result.trials
        if any(curve.points for curve in trial.curves) and trial.outcome in ("completed", "stopped")
    ]
    if not rungs or not trials:
        return {}
    every = int(result.spec.get("tier1", {}).get("report_every", 1))
    num_points = [math.ceil(rung.epochs / every) for rung in rungs]
    curves = np.full((len(trials), len(rungs), max(num_points)), np.nan)
    for row, trial in enumerate(trials):
        for curve in trial.curves:
            seen = [point.validation_accuracy for point in curve.points]
            if 1 <= curve.rung <= len(rungs):
                seen = seen[: num_points[curve.rung - 1]]
                curves[row, curve.rung - 1, : len(seen)] = seen
    costs = [float(rung.num_examples) * rung.epochs for rung in rungs]
    top = rungs[-1]
    epochs = int(result.spec.get("training", {}).get("epochs", top.epochs))
    made = extrapolate_full(
        curves,
        sizes=costs,
        full_size=max(costs[-1], round(top.num_examples / top.data_fraction) * epochs),
        horizon=num_points,
        higher_is_better=True,
        bounds=(0.0, 1.0),
    )
    low, high = made.quantile([0.05, 0.95])
    return {
        trial.trial.trial_id: (float(mean), Interval(float(a), float(b), 0.9))
        for trial, mean, a, b in zip(trials, made.mean, low, high, strict=True)
        if math.isfinite(mean)
    }
