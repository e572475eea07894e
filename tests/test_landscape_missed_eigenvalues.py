"""What `Eigenpairs.confidence` promises about eigenvalues that the search did not meet."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from curvature_cases import operator, seeded
from torch import Tensor

from llp import landscape
from llp.landscape.confirmation import Confirmation
from llp.landscape.krylov import KrylovBasis


class Diagonal:
    """Known eigenvalues in `[P]`, and a gradient as networks have it: along the large ones."""

    def __init__(self, values: np.ndarray, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.values = torch.as_tensor(values, dtype=dtype)
        self.shape, self.dtype = (len(values), len(values)), dtype
        self.device = torch.device("cpu")
        self._seed = seed

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.values * vectors if vectors.ndim == 1 else self.values[:, None] * vectors

    def hint(self) -> Tensor:
        return self.values.abs().sqrt() * torch.randn(
            len(self.values), generator=seeded(self._seed)
        )


def like_a_network(copies: dict[int, int], size: int = 4000) -> np.ndarray:
    """Five outliers, some of them more than once, before a heavy bulk (|bulk| is 22)."""
    outliers = [10.0, 8, 6, 5, 4]
    values = np.zeros(size)
    values[:2000] = np.random.default_rng(0).normal(0, 0.5, 2000)
    found = [x for i, x in enumerate(outliers) for _ in range(copies.get(i, 1))]
    values[2000 : 2000 + len(found)] = found
    return values


def misses(values: np.ndarray, *, seeds: int, confidence: float) -> tuple[int, list[float]]:
    truth = sorted(values, key=lambda x: -abs(x))[:5]
    wrong, said = 0, []
    for seed in range(seeds):
        pairs = landscape.top_eigenpairs(
            Diagonal(values, seed + 1000), k=5, confidence=confidence, generator=seeded(seed)
        )
        assert pairs.converged
        said.append(pairs.confidence)
        wrong += not np.allclose(pairs.values, truth, rtol=5e-3)
    return wrong, said


@pytest.mark.parametrize("copies", [{}, {0: 2}, {2: 2}, {0: 3}, {1: 2, 3: 2}])
def test_a_second_copy_is_missed_no_more_often_than_said(copies: dict[int, int]) -> None:
    wrong, said = misses(like_a_network(copies), seeds=40, confidence=0.9)
    assert wrong <= 4 + 5  # 10 % of 40 seeds and 2.6 standard deviations of a binomial
    assert np.mean(said) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_confidence_is_kept_over_200_seeds(confidence: float) -> None:
    wrong, said = misses(like_a_network({2: 2}), seeds=200, confidence=confidence)
    least = 200 * (1 - confidence)
    assert wrong <= least + 3 * np.sqrt(least * confidence)
    assert np.mean([each >= confidence for each in said]) > 0.5


def test_trusting_the_residuals_misses_the_second_copy() -> None:
    # What single-vector Lanczos and power iteration with deflation do; nothing in it is flagged.
    wrong, said = misses(like_a_network({2: 2}), seeds=10, confidence=0.0)
    assert wrong == 10
    assert set(said) == {0.0}


def test_the_chance_is_that_of_a_component_small_enough_to_stay_hidden() -> None:
    # Against the definition, by drawing: with the eigenvalue x in A, how often would the chain have
    # allowed its component? That share is at most the stated chance, whatever x is.
    values = like_a_network({}, size=3000)
    hidden = 5.0
    shares = []
    for seed in range(200):
        matrix = Diagonal(np.append(values[values < 3.9], hidden), seed, torch.float64)
        basis = KrylovBasis(matrix, seeded(seed), capacity=20)
        chain = Confirmation(basis)
        for _ in range(3):
            basis.advance(1)
            chain.note()
        shares.append(chain.chance(hidden))
    ordered = np.sort(shares)
    # a p-value: the share of draws below t is at most t
    for t in (0.02, 0.05, 0.1, 0.3):
        assert np.searchsorted(ordered, t) / 200 <= t + 3 * np.sqrt(t * (1 - t) / 200)


def test_the_chance_falls_while_nothing_is_there() -> None:
    basis = KrylovBasis(Diagonal(like_a_network({})[:2000], 0), seeded(0), capacity=20)
    chain = Confirmation(basis)
    found = []
    for _ in range(8):
        basis.advance(1)
        chain.note()
        found.append(chain.chance(10.0))
    assert all(later < earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] < 1e-3
    assert chain.num_products == 8


def test_everything_seen_is_certain_and_nothing_looked_for_is_not() -> None:
    small = landscape.top_eigenpairs(operator([3.0, 2, 1]), k=3)
    assert small.confidence == 1.0
    short = landscape.top_eigenpairs(operator(np.linspace(1, 2, 200)), k=3, max_products=5)
    assert (short.converged, short.confidence) == (False, 0.0)


def test_a_low_rank_is_confirmed_by_one_product() -> None:
    values = np.zeros(500)
    values[:3] = 3, 2, 1
    pairs = landscape.top_eigenpairs(operator(values), k=3)
    assert pairs.num_confirming == 1
    assert pairs.confidence > 0.999
    assert pairs.num_products <= 6


def test_confidence_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence must be at least 0 and below 1"):
        landscape.top_eigenpairs(torch.eye(3), confidence=1.0)
