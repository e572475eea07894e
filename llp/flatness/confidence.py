"""Confidence of the outputs on the measured examples: rows of `registry.METRICS`.

`calibration_error`: expected calibration error; `mean_entropy`: of the predicted distributions, in
nats; `confidence_gap`: mean confidence minus accuracy, positive where the network is too sure. All
three are `llp.landscape.confidence`.

They need the outputs alone, which the gradient's pass gives too: beside a gradient they are free.
"""

from __future__ import annotations

import time

from llp.flatness.context import MetricContext
from llp.landscape.confidence import of_outputs
from llp.records import Measurement


def calibration_error(context: MetricContext) -> list[Measurement]:
    """Expected calibration error in [0, 1]; standard error by resampling the examples.

    Raises:
        ValueError: The outputs are no `[N, classes]` for labels `[N]`.
    """
    return _measured(context, "calibration_error")


def mean_entropy(context: MetricContext) -> list[Measurement]:
    """Mean entropy of the predictions, in nats; standard error over examples.

    Raises:
        ValueError: As `calibration_error`.
    """
    return _measured(context, "mean_entropy")


def confidence_gap(context: MetricContext) -> list[Measurement]:
    """Mean confidence minus accuracy, in [-1, 1]; standard error over examples.

    Raises:
        ValueError: As `calibration_error`.
    """
    return _measured(context, "confidence_gap")


def _measured(context: MetricContext, name: str) -> list[Measurement]:
    started = time.perf_counter()
    outputs = context.base().outputs
    targets = [targets for _, targets in context.batches]
    try:
        found = of_outputs(outputs, targets, seed=context.seed)
    except ValueError as error:
        raise ValueError(str(error).replace("confidence", name, 1)) from error
    return [
        Measurement(
            name=name,
            value=getattr(found, name),
            standard_error=getattr(found, f"{name}_standard_error"),
            higher_is_better=None,
            num_examples=context.num_examples,
            seconds=time.perf_counter() - started,
        )
    ]
