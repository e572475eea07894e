"""What seeds and test images leave open: intervals of an accuracy and of a difference.

Two things make the test accuracy of a configuration uncertain: the training (seed, order of the
images, rounding) and the test split, which is a sample of finite size. `seed_interval` is about the
first, `study.wilson_interval` about the second, `difference` about both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

LEVEL = 0.95


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of independent trainings; NaN for fewer than two.

    >>> [round(end, 3) for end in seed_interval([0.90, 0.92])]
    [0.783, 1.037]
    """
    if len(values) < 2:
        return math.nan, math.nan
    half = float(t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * math.sqrt(
        variance(values) / len(values)
    )
    return fmean(values) - half, fmean(values) + half


@dataclass(frozen=True)
class Spread:
    """Variance of test accuracy between trainings of one configuration, pooled over several.

    Attributes:
        variance: Of a single training; NaN when no configuration was trained twice.
        degrees: Degrees of freedom: trainings minus configurations.
    """

    variance: float
    degrees: int


def pooled_spread(groups: Iterable[Sequence[float]]) -> Spread:
    """The spread between trainings, from all configurations that were trained at least twice."""
    squares, degrees = 0.0, 0
    for values in groups:
        if len(values) > 1:
            squares += variance(values) * (len(values) - 1)
            degrees += len(values) - 1
    return Spread(squares / degrees if degrees else math.nan, degrees)


@dataclass(frozen=True)
class Difference:
    """The difference of two mean test accuracies.

    Attributes:
        value: First minus second, in [-1, 1].
        low: Lower end of the 95 % interval.
        high: Upper end.
        seeds_known: Whether the spread between trainings is part of the interval.
        paired: Whether the two were compared image by image.
    """

    value: float
    low: float
    high: float
    seeds_known: bool
    paired: bool

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def difference(
    first: Sequence[float],
    second: Sequence[float],
    spread: Spread,
    *,
    num_images: int,
    hits: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
) -> Difference:
    """The difference of the mean accuracies of two configurations with its 95 % interval.

    The variance is that of the trainings (`spread`, shared by both sides) plus that of the test
    images. With `hits` the images are paired, image by image; without, they count as two samples,
    which is too careful. Half the width is Student's quantile, with the degrees of freedom of the
    spread, times the root of the sum.

    Args:
        first: Accuracies of the trainings of one configuration.
        second: Of the other.
        spread: Between trainings.
        num_images: Size of the test split.
        hits: Share of trainings that were right on each image, for both, [N].
    """
    value = fmean(first) - fmean(second)
    paired = hits is not None and len(hits[0]) == len(hits[1]) > 1
    if paired:
        assert hits is not None
        images = float(np.var(hits[0] - hits[1], ddof=1)) / len(hits[0])
    else:
        images = sum(fmean(side) * (1 - fmean(side)) for side in (first, second)) / num_images
    seeds_known = spread.degrees > 0
    quantile = float(norm.ppf(0.5 + LEVEL / 2))
    seeds = 0.0
    if seeds_known:
        quantile = float(t.ppf(0.5 + LEVEL / 2, spread.degrees))
        seeds = spread.variance * (1 / len(first) + 1 / len(second))
    half = quantile * math.sqrt(images + seeds)
    return Difference(value, value - half, value + half, seeds_known, paired)
