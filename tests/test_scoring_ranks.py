from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, norm

from llp.scoring.ranks import normal_scores, pair_means, regret, tau, tau_interval


def brute_force_tau_b(x, y):
    concordant = ties_x = ties_y = 0
    pairs = list(itertools.combinations(range(len(x)), 2))
    for i, j in pairs:
        concordant += np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        ties_x += x[i] == x[j]
        ties_y += y[i] == y[j]
    scale = math.sqrt((len(pairs) - ties_x) * (len(pairs) - ties_y))
    return concordant / scale if scale else math.nan


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_tau_equals_brute_force_over_all_pairs(pairs):
    x, y = (np.array(v, dtype=float) for v in zip(*pairs, strict=True))
    assert tau(x, y) == pytest.approx(brute_force_tau_b(x, y), nan_ok=True)


def test_pair_means_average_to_tau_without_ties():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 700))
    assert pair_means(x, y).mean() == pytest.approx(kendalltau(x, y).statistic)


def test_bootstrap_and_normal_intervals_agree_at_their_border():
    rng = np.random.default_rng(0)
    x = rng.normal(size=401)
    y = x + rng.normal(size=401)
    many, few = tau_interval(x, y), tau_interval(x[:400], y[:400])
    assert many.low == pytest.approx(few.low, abs=0.01)
    assert many.high == pytest.approx(few.high, abs=0.01)


def test_interval_of_tau_covers_the_true_value_about_as_often_as_it_says():
    truth = 2 / math.pi * math.asin(0.7)  # Greiner's relation for a bivariate normal
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], size=40).T
        interval = tau_interval(x, y, num_draws=300)
        hits += interval.low <= truth <= interval.high
    assert 0.8 <= hits / 200 <= 0.97


def test_interval_is_vacuous_without_information():
    assert tau_interval(np.ones(5), np.arange(5.0)).low == -1.0


def test_regret_by_hand():
    scores, target = np.array([5.0, 4, 3, 2, 1]), np.array([0.80, 0.90, 0.85, 0.95, 0.10])
    assert regret(scores, target, 1) == pytest.approx(15.0)
    assert regret(scores, target, 2) == pytest.approx(5.0)
    assert regret(scores, target, 5) == 0.0
    assert regret(scores, 100 * target, 1) == pytest.approx(15.0)


def test_normal_scores_are_bloms_and_lexicographic_in_the_band():
    values = np.array([0.9, 0.1, 0.5, np.nan])
    band = np.array([1, 0, 0, 2])
    blom = norm.ppf((np.array([2, 3, 4, 1]) - 0.375) / 4.25)
    assert normal_scores(values, band) == pytest.approx(blom)
    assert normal_scores(np.stack([values, values]), band)[1] == pytest.approx(blom)
