"""Paired tests over seeds: does one way to train beat another, beyond what seeds explain?

Two configurations trained with the same seeds share initialisation and order of the images, so they
are compared seed by seed: the differences d_1, ..., d_n are one sample, and Student's t with n - 1
degrees of freedom tests whether their mean is zero (Student 1908; Dietterich 1998, section 3.5, has
the caveats). Repeats of one seed are averaged first: they are no new evidence.

Several comparisons with one reference are corrected by Holm (1979): the p-values in rising order
are multiplied by m, m - 1, ..., 1, never falling; an adjusted value below 0.05 keeps the chance of
one or more false findings in the whole family below 5 %.

What is tested is the training; the test images are the same for all, so another test set may order
them otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
MAX_EXACT = 16
"""Pairs up to which all sign patterns are counted in the exact test (2^16 of them)."""


@dataclass(frozen=True)
class PairedTest:
    """The comparison of one configuration with the reference.

    Attributes:
        label: The configuration.
        reference: What it is compared with.
        num_pairs: Seeds that both completed.
        difference: Mean of (configuration - reference).
        standard_error: Of that mean; NaN for fewer than two pairs.
        low: Lower end of Student's 95 % interval of the mean.
        high: Upper end.
        statistic: Student's t.
        p_value: Two-sided; see `paired_test`.
        exact_p_value: Two-sided, of the sign-flip test, which assumes only symmetry; NaN above 16
            pairs. With n pairs it cannot be below 2 / 2^n, so five seeds reach 0.0625 at best.
        adjusted: `p_value` after Holm's correction over its family; NaN before `holm_corrected`.
    """

    label: str
    reference: str
    num_pairs: int
    difference: float
    standard_error: float
    low: float
    high: float
    statistic: float
    p_value: float
    exact_p_value: float
    adjusted: float = math.nan

    @property
    def decided(self) -> bool:
        """Whether the corrected test says that the two differ."""
        return self.adjusted < 1 - LEVEL


def paired_test(
    first: Mapping[int, float], second: Mapping[int, float], *, label: str = "", reference: str = ""
) -> PairedTest:
    """Compares results by seed with Student's paired t.

    When all differences are equal t is not defined: p is 1 for differences of zero, otherwise that
    of the exact test.

    Args:
        first: Seed -> result of the configuration.
        second: Seed -> result of the reference.
        label: Name of the first.
        reference: Name of the second.

    >>> found = paired_test({0: 3.0, 1: 5.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    >>> found.num_pairs, found.difference, round(found.statistic, 3)
    (3, 2.0, 3.464)
    """
    seeds = sorted(first.keys() & second.keys())
    differences = np.array([first[seed] - second[seed] for seed in seeds], dtype=float)
    num = len(seeds)
    nothing = math.nan
    if num < 2:
        mean = float(differences.mean()) if num else nothing
        return PairedTest(label, reference, num, mean, *[nothing] * 6)
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(num)
    exact = sign_flip_p_value(differences)
    scale = float(np.abs(differences).max())
    if error <= 1e-12 * scale or scale == 0:
        t, p = (0.0, 1.0) if scale == 0 else (math.copysign(math.inf, mean), exact)
        return PairedTest(label, reference, num, mean, 0.0, mean, mean, t, p, exact)
    t = mean / error
    p = 2 * float(stats.t.sf(abs(t), num - 1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, num - 1)) * error
    return PairedTest(label, reference, num, mean, error, mean - half, mean + half, t, p, exact)


def sign_flip_p_value(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the exact sign-flip test: the share of sign patterns with as large a mean.

    >>> sign_flip_p_value([1.0, 2.0, 3.0])
    0.25
    """
    values = np.asarray(differences, dtype=float)
    if not 1 <= len(values) <= MAX_EXACT:
        return math.nan
    signs = np.array(list(product((-1.0, 1.0), repeat=len(values))))
    sums, observed = np.abs(signs @ values), abs(float(values.sum()))
    return float(np.mean(sums >= observed - 1e-12 * np.abs(values).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; NaN stays NaN and counts for nothing.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [math.nan] * len(p_values)
    ranked = sorted((p, k) for k, p in enumerate(p_values) if not math.isnan(p))
    highest = 0.0
    for place, (p, k) in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - place) * p))
        adjusted[k] = highest
    return adjusted


def holm_corrected(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """The tests of one family with `adjusted` filled in."""
    adjusted = holm([test.p_value for test in tests])
    return [replace(test, adjusted=p) for test, p in zip(tests, adjusted, strict=True)]


def by_seed(table: pd.DataFrame, label: str, column: str = "test_accuracy") -> dict[int, float]:
    """Seed -> mean of `column` over the repeats of the configuration `label`."""
    rows = table[table["label"] == label].dropna(subset=[column])
    means = rows.groupby("seed")[column].mean()
    return {int(str(seed)): float(value) for seed, value in means.items()}


def against(
    table: pd.DataFrame, reference: str, labels: Sequence[str], column: str = "test_accuracy"
) -> list[PairedTest]:
    """Every configuration of `labels` against `reference`, as one family.

    Args:
        table: Completed trainings, a row each.
        reference: A label.
        labels: The configurations to compare; the reference itself is left out.
        column: What is compared; larger is better.
    """
    base = by_seed(table, reference, column)
    return holm_corrected(
        [
            paired_test(by_seed(table, label, column), base, label=label, reference=reference)
            for label in labels
            if label != reference
        ]
    )
