"""Nested subsets: every prefix in proportion, the same everywhere; validation apart."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llp.workloads.subsets import nested_order, split_validation

class_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def labels_of(sizes: list[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@settings(max_examples=150, deadline=None)
@given(class_sizes, st.integers(0, 2**31 - 1))
def test_every_prefix_is_within_one_of_the_proportional_share(sizes, seed):
    labels = labels_of(sizes, seed)
    order = nested_order(labels, seed=seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    counts = [0] * len(sizes)
    for n, index in enumerate(order, start=1):
        counts[labels[index]] += 1
        for count, size in zip(counts, sizes, strict=True):
            assert abs(count - Fraction(n * size, len(labels))) < 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(2, 12), st.integers(0, 1000))
def test_equal_classes_differ_by_at_most_one_in_every_prefix(size, num_classes, seed):
    labels = labels_of([size] * num_classes, seed)
    order = nested_order(labels, seed=seed)
    running = np.cumsum(np.eye(num_classes, dtype=int)[labels[order]], axis=0)
    assert (running.max(axis=1) - running.min(axis=1)).max() <= 1


def test_many_small_classes_beside_a_large_one_stay_within_one():
    # The case where ordering by j / N_c (equal keys for all small classes) is off by k / 4.
    sizes = [60, *[1] * 60]
    labels = labels_of(sizes, 3)
    order = nested_order(labels, seed=3)
    large = np.cumsum(labels[order] == 0)
    assert np.abs(large - np.arange(1, 121) / 2).max() < 1


def test_seeds_change_the_order_and_nothing_else_does():
    labels = labels_of([20, 30, 50], 0)
    assert np.array_equal(nested_order(labels, seed=1), nested_order(labels.copy(), seed=1))
    assert not np.array_equal(nested_order(labels, seed=1), nested_order(labels, seed=2))
    same_as_int16 = nested_order(labels.astype(np.int16), seed=1)
    assert np.array_equal(nested_order(labels, seed=1), same_as_int16)


def test_the_order_is_the_same_in_another_process():
    code = (
        "import numpy as np; from llp.workloads.subsets import nested_order;"
        "print(nested_order(np.arange(30) ** 2 % 7, seed=5).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(nested_order(np.arange(30) ** 2 % 7, seed=5).tolist())


def test_the_order_of_a_known_input_never_changes():
    # A changed order silently changes every study: these numbers are written down on purpose.
    assert nested_order(np.array([0, 1] * 4), seed=0).tolist() == [3, 6, 7, 0, 5, 4, 2, 1]
    assert nested_order(np.array([0, 0, 0, 0, 0, 1, 1, 2]), seed=0).tolist() == [
        1,
        4,
        6,
        3,
        7,
        0,
        5,
        2,
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=2, max_size=8), st.floats(0.05, 0.6))
def test_validation_is_disjoint_proportional_and_leaves_no_class_empty(sizes, fraction):
    labels = labels_of(sizes, 1)
    train, validation = split_validation(labels, fraction=fraction, seed=1)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(labels)))
    assert set(labels[train]) == set(range(len(sizes)))
    assert abs(len(validation) - fraction * len(labels)) <= 1 + 0.5 + len(sizes)
    for c, size in enumerate(sizes):
        assert (labels[validation] == c).sum() <= fraction * size + 2
    assert np.array_equal(train, np.sort(train))


def test_validation_of_equal_classes_has_exactly_the_share_of_each():
    labels = np.arange(1000) % 10
    train, validation = split_validation(labels, fraction=0.15, seed=0)
    assert np.bincount(labels[validation]).tolist() == [15] * 10
    assert np.bincount(labels[train]).tolist() == [85] * 10


def test_validation_is_not_the_beginning_of_the_nested_order():
    labels = np.arange(200) % 10
    _, validation = split_validation(labels, fraction=0.2, seed=0)
    assert set(validation) != set(nested_order(labels, seed=0)[:40])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_a_fraction_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(ValueError, match="outside"):
        split_validation(np.zeros(10, dtype=int), fraction=fraction, seed=0)


def test_fifty_thousand_unequal_examples_have_a_valid_order():
    generator = np.random.default_rng(0)
    labels = generator.choice(100, 50_000, p=generator.dirichlet(np.ones(100)))
    order = nested_order(labels, seed=0)
    sizes = np.bincount(labels, minlength=100)
    for n in (500, 5_000, 25_000):
        counts = np.bincount(labels[order[:n]], minlength=100)
        assert np.abs(counts - n * sizes / 50_000).max() < 1
