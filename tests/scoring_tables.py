"""Made-up studies for the scoring tests: records with chosen numbers, and simulated tables."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from llp.records import (
    CheckpointRef,
    CurvePoint,
    FlatnessProfile,
    LearningCurve,
    Measurement,
    Trial,
    TrialResult,
    Verification,
)
from llp.scoring import Roles


def curve(trial_id, rung, accuracies, losses=None):
    losses = losses or [1 - a for a in accuracies]
    points = tuple(
        CurvePoint(rung, 0.1 * rung, e + 1, 100 * (e + 1), loss, a, loss, a, float(e))
        for e, (a, loss) in enumerate(zip(accuracies, losses, strict=True))
    )
    return LearningCurve(trial_id, rung, points)


def result(trial_id, *rungs, outcome="completed", checkpoint=True, **hyperparameters):
    """A trial whose n-th entry of `rungs` lists the validation accuracies on rung n."""
    curves = tuple(curve(trial_id, n + 1, list(a)) for n, a in enumerate(rungs))
    return TrialResult(
        Trial(trial_id, hyperparameters or {"learning_rate": 0.1}, 0),
        curves,
        outcome,
        checkpoint=CheckpointRef(f"checkpoints/{trial_id}.pt", "00") if checkpoint else None,
        samples_seen=1000,
        seconds=10.0,
    )


def profile(trial_id, seconds=2.0, se=0.01, **metrics):
    measurements = tuple(
        Measurement(name, value, se, False, 64, seconds) for name, value in metrics.items()
    )
    return FlatnessProfile(trial_id, measurements, seconds)


def verification(trial_id, seed, validation, test=None, loss=None):
    test = validation if test is None else test
    loss = 1 - validation if loss is None else loss
    return Verification(trial_id, seed, test, 1 - test, validation, loss, 1000, 5000, 30.0)


def simulate(
    seed, *, rows=48, finished=30, planted=0.0, hyper=0.0, metrics=2, noise=0.5, diverged=0
):
    """A study table whose result is quality + hyper x (learning-rate optimum) + planted x metric 0.

    The probe sees the quality with noise; metrics are independent of it.
    """
    rng = np.random.default_rng(seed)
    rate, quality = rng.uniform(-3, 0, rows), rng.normal(size=rows)
    flat = rng.normal(size=(rows, metrics))
    truth = quality - hyper * (rate + 1.5) ** 2
    if metrics:
        truth = truth + planted * flat[:, 0]
    seen = 1 / (1 + np.exp(-(quality + noise * rng.normal(size=rows))))
    final = 1 / (1 + np.exp(-truth))
    table = pd.DataFrame(
        {
            "learning_rate": 10**rate,
            "weight_decay": 10 ** rng.uniform(-5, -2, rows),
            "optimizer": rng.choice(["sgd", "adamw"], rows),
            "validation_accuracy": seen,
            "validation_loss": -np.log(seen) + 0.05 * rng.normal(size=rows),
            "train_loss": rng.uniform(0.1, 1, rows),
            "train_accuracy": rng.uniform(0.9, 1, rows),
            "num_validation": 500,
            **{f"metric{k}": flat[:, k] for k in range(metrics)},
            **{f"metric{k}_se": 0.05 for k in range(metrics)},
            "verified_accuracy": np.where(np.arange(rows) < finished, final, math.nan),
        },
        index=[f"t{i:03d}" for i in range(rows)],
    )
    for i in range(diverged):
        signals = ["validation_accuracy", "validation_loss", "train_loss", "train_accuracy"]
        table.loc[table.index[-1 - i], signals] = math.nan
    return table


ROLES = Roles(
    tier1={"validation_accuracy": "higher", "validation_loss": "lower"},
    tier2={"noise_sharpness": "lower"},
    num_validation="num_validation",
)
