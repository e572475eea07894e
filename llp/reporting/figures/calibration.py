"""Does the confidence of a model mean what it says? Reliability, expected calibration error.

The confidence of a prediction is the probability of the class it chose. Images are sorted into bins
of equal width by confidence; a model is calibrated where the share of hits in each bin is the mean
confidence there. The expected calibration error is sum_b n_b / n |hits_b - confidence_b| over the
bins b (Guo et al., "On Calibration of Modern Neural Networks", 2017). With finitely many images it
is above zero even for a perfectly calibrated model; what such a model would show is computed too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llp.reporting import formats
from llp.reporting.palette import LIGHT
from llp.reporting.predictions import Predictions
from llp.reporting.study import wilson_interval
from llp.reporting.svg import canvas, drawing, inline, percent_axis

NUM_BINS = 15
_DRAWS = 1000


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy lie apart.

    Attributes:
        bins: One row a bin: `from`, `to` (confidence), `images`, `confidence` (mean), `accuracy`,
            its 95 % Wilson interval `low` to `high`, and `gap` (accuracy - confidence).
        error: Expected calibration error, in [0, 1]; NaN without images.
        low: Lower end of its 95 % interval: percentile bootstrap over images.
        high: Upper end.
        if_calibrated: Mean error of a model that is right with exactly its confidence.
        if_calibrated_high: 95 % quantile of the same.
        overconfidence: Mean confidence minus accuracy.
    """

    bins: pd.DataFrame
    error: float
    low: float
    high: float
    if_calibrated: float
    if_calibrated_high: float
    overconfidence: float


def calibration(said: Predictions, *, num_bins: int = NUM_BINS) -> Calibration:
    """The calibration of one full training on the test images."""
    confidence, hits = said.confidence, said.hits.astype(float)
    num = len(hits)
    places = bins_of(confidence, num_bins)
    edges = np.linspace(0, 1, num_bins + 1)
    counts = np.bincount(places, minlength=num_bins)
    rows = []
    for place in range(num_bins):
        here, n = places == place, int(counts[place])
        accuracy = float(hits[here].mean()) if n else math.nan
        mean = float(confidence[here].mean()) if n else math.nan
        low, high = wilson_interval(accuracy, n)
        rows.append((edges[place], edges[place + 1], n, mean, accuracy, low, high, accuracy - mean))
    columns = ["from", "to", "images", "confidence", "accuracy", "low", "high", "gap"]
    frame = pd.DataFrame(rows, columns=columns)
    if num == 0:
        return Calibration(frame, *[math.nan] * 6)
    generator = np.random.default_rng(0)
    again, ideal = np.empty(_DRAWS), np.empty(_DRAWS)
    for draw in range(_DRAWS):
        chosen = generator.integers(0, num, num)
        again[draw] = calibration_error(confidence[chosen], hits[chosen], places[chosen], num_bins)
        lucky = generator.random(num) < confidence
        ideal[draw] = calibration_error(confidence, lucky.astype(float), places, num_bins)
    low, high = np.quantile(again, [0.025, 0.975])
    return Calibration(
        frame,
        calibration_error(confidence, hits, places, num_bins),
        float(low),
        float(high),
        float(ideal.mean()),
        float(np.quantile(ideal, 0.95)),
        float(confidence.mean() - hits.mean()),
    )


def bins_of(confidence: NDArray[np.float64], num_bins: int) -> NDArray[np.int64]:
    """The bin of each confidence; bins are closed above, so that 1.0 is in the last one."""
    return np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)


def calibration_error(
    confidence: NDArray[np.float64],
    hits: NDArray[np.float64],
    places: NDArray[np.int64],
    num_bins: int,
) -> float:
    """Sum over bins of |sum of hits - sum of confidence|, divided by the number of images."""
    gaps = np.bincount(places, weights=hits - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(hits))


def calibration_reading(found: Calibration) -> str:
    """The error with its interval, its direction, and what a calibrated model would show."""
    if not math.isfinite(found.error):
        return "There are no test images."
    text = (
        f"Expected calibration error {formats.percent(found.error)} (95 % interval "
        f"{formats.percent(found.low)} to {formats.percent(found.high)}); a perfectly calibrated "
        f"model would show about {formats.percent(found.if_calibrated)} with these images"
    )
    if found.error <= found.if_calibrated_high:
        return f"{text}, so this one cannot be told from calibrated."
    side = "more" if found.overconfidence > 0 else "less"
    return (
        f"{text}. On average it is {formats.points(abs(found.overconfidence))} points {side} "
        "confident than right."
    )


def reliability_figure(found: Calibration) -> str:
    """Accuracy against confidence by bin, with the diagonal of a calibrated model."""
    rows = found.bins[found.bins["images"] > 0].to_dict("records")
    with drawing():
        figure, axes = canvas(left=0.52, bottom=0.42)
        axes.plot([0, 1], [0, 1], color=LIGHT["faint"], linewidth=0.9, linestyle=(0, (4, 2)))
        for row in rows:
            axes.plot([row["confidence"]] * 2, [row["low"], row["high"]], color=LIGHT["blue"])
        axes.plot(
            [row["confidence"] for row in rows],
            [row["accuracy"] for row in rows],
            "o",
            color=LIGHT["blue"],
            markersize=4.5,
        )
        for which in ("x", "y"):
            percent_axis(axes, which)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_title("share right, by confidence")
        axes.set_xlabel("mean confidence in the bin")
        axes.grid()
        return inline(
            figure,
            key="reliability",
            title="Reliability diagram",
            description=calibration_reading(found),
        )


def confidence_figure(said: Predictions) -> str:
    """How many images got which confidence, hits and misses apart."""
    edges = np.linspace(0, 1, 21)
    right, _ = np.histogram(said.confidence[said.hits], edges)
    wrong, _ = np.histogram(said.confidence[~said.hits], edges)
    with drawing():
        figure, axes = canvas(left=0.6, bottom=0.42)
        width = 0.05
        middle = edges[:-1] + width / 2
        style: Any = {"edgecolor": LIGHT["page"], "linewidth": 0.6}
        axes.bar(middle, right, width * 0.96, color=LIGHT["blue"], **style)
        axes.bar(
            middle,
            wrong,
            width * 0.96,
            bottom=right,
            color=LIGHT["vermillion"],
            hatch="///",
            **style,
        )
        percent_axis(axes, "x")
        axes.set_xlim(0, 1)
        axes.set_title("test images, by confidence")
        axes.set_xlabel("confidence")
        axes.yaxis.set_major_formatter(lambda value, _: formats.count(value))
        return inline(
            figure,
            key="confidence",
            title="Test images by confidence",
            description=f"{int(right.sum())} right and {int(wrong.sum())} wrong.",
        )
