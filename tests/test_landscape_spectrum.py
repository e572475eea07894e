"""Eigenpairs and traces of operators whose spectrum is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from curvature_cases import Counted, bulk, by_magnitude, operator
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional

from llp import landscape
from llp.landscape.krylov import KrylovBasis

SPECTRA = {
    "isolated": [10.0, -7, 5, 3, *bulk()],
    "multiplicity_2": [10.0, 10, 5, 4, 3, *bulk()],
    "multiplicity_3": [10.0, 10, 10, 5, 4, 3, *bulk()],
    "clustered_.999": [10.0, 9.99, 9.98, 5, 4, *bulk()],
    "negative": [-10.0, -9.9, -8, -7, -6, -5],
    "rank_deficient": [3.0, 2, *[0.0] * 100],
    "zero": [0.0] * 20,
    "identity": [2.0] * 30,
    "one_parameter": [-4.0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectrum_is_found_with_true_residuals(name: str, k: int, dtype) -> None:
    values = SPECTRA[name]
    for seed in range(3):
        matrix = operator(values, seed=seed, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        pairs = landscape.top_eigenpairs(matrix, k=k, generator=generator)
        truth = by_magnitude(values, k)
        scale = max(abs(truth[0]), 1.0)
        assert pairs.converged
        assert len(pairs.values) == min(k, len(values))
        assert np.abs(np.abs(pairs.values.numpy()) - np.abs(truth)).max() < 1e-3 * scale
        recomputed = (matrix @ pairs.vectors - pairs.vectors * pairs.values.to(dtype)).norm(dim=0)
        rounding = 1e-5 if dtype == torch.float32 else 1e-12
        assert (recomputed.double() - pairs.residuals).abs().max() < rounding * scale
        gram = pairs.vectors.T @ pairs.vectors
        assert (gram - torch.eye(len(gram), dtype=dtype)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("largest", [6.0, 4.0, 2.0]),
        ("smallest", [-9.0, -5.0, -3.0]),
        ("magnitude", [-9.0, 6.0, -5.0]),
    ],
)
def test_either_end_can_be_asked_for(which: str, expected: list[float]) -> None:
    matrix = operator([6, 4, 2, -9, -5, -3, *bulk(scale=0.3)])
    found = landscape.top_eigenpairs(matrix, k=3, which=which).values
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("copies", [2, 3])
def test_no_copy_of_a_multiple_eigenvalue_is_missed_in_40_seeds(copies: int) -> None:
    values = [10.0] * copies + [5, 4, 3, *bulk(120)]
    for seed in range(40):
        pairs = landscape.top_eigenpairs(
            operator(values, seed=seed, dtype=torch.float32),
            k=3,
            generator=torch.Generator().manual_seed(seed),
        )
        assert pairs.values.tolist() == pytest.approx(by_magnitude(values, 3).tolist(), rel=1e-3)


def test_an_isolated_eigenvalue_appears_once() -> None:
    basis = KrylovBasis(
        operator([50.0, *bulk(300)], dtype=torch.float32),
        torch.Generator().manual_seed(0),
        capacity=200,
    )
    basis.add_random()
    for _ in range(150):
        basis.advance(1)
    values, _, _ = basis.ritz()
    assert (values > 25).sum() == 1


def test_float32_basis_stays_orthonormal_over_200_steps() -> None:
    size = 1000
    basis = KrylovBasis(
        operator([100.0, 50, *bulk(size - 2)], dtype=torch.float32),
        torch.Generator().manual_seed(0),
        capacity=size,
    )
    basis.add_random()
    for _ in range(200):
        basis.advance(1)
    rows = basis._rows[: basis.size].double()
    assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-5


def test_breakdown_in_an_invariant_subspace_goes_on_with_a_new_direction() -> None:
    # Three distinct values: every Krylov space has at most three dimensions.
    values = [5.0, *[2.0] * 20, *[-1.0] * 20]
    pairs = landscape.top_eigenpairs(operator(values), k=6)
    assert pairs.converged
    assert pairs.values.tolist() == pytest.approx([5, 2, 2, 2, 2, 2], abs=1e-6)


def test_restarted_basis_finds_the_same_pairs_in_less_memory() -> None:
    spread = list(10 * 0.9 ** np.arange(200))
    matrix = operator(spread)
    full = landscape.top_eigenpairs(matrix, k=4, max_products=400)
    small = landscape.top_eigenpairs(
        matrix, k=4, max_products=400, max_basis_bytes=18 * 8 * len(spread)
    )
    assert full.converged
    assert small.converged
    assert small.num_products > 18
    assert small.values.tolist() == pytest.approx(full.values.tolist(), rel=1e-3)
    recomputed = (matrix @ small.vectors - small.vectors * small.values).norm(dim=0)
    assert (recomputed - small.residuals).abs().max() < 1e-9


def test_block_start_finds_the_same_values() -> None:
    matrix = operator(SPECTRA["multiplicity_3"])
    one = landscape.top_eigenpairs(matrix, k=5)
    block = landscape.top_eigenpairs(matrix, k=5, block_size=4, max_products=400)
    assert block.converged
    assert block.values.tolist() == pytest.approx(one.values.tolist(), rel=1e-3)


def test_budget_that_runs_out_is_said_and_never_exceeded() -> None:
    op = Counted(operator(bulk(300)))
    pairs = landscape.top_eigenpairs(op, k=5, max_products=12)
    assert not pairs.converged
    assert pairs.num_products == op.count == 12
    residuals = (op.matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(residuals, pairs.residuals, rtol=1e-6)
    few = landscape.top_eigenpairs(op, k=5, max_products=2)
    assert not few.converged
    assert len(few.values) <= 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(0, 3),
)
def test_small_operators_of_any_spectrum(values: list[int], k: int, seed: int) -> None:
    matrix = operator([float(v) for v in values], seed=seed)
    pairs = landscape.top_eigenpairs(matrix, k=k, which="largest")
    expected = sorted(values, reverse=True)[:k]
    assert pairs.converged
    assert pairs.values.tolist() == pytest.approx(expected, abs=1e-2)


def test_same_seed_gives_the_same_bits() -> None:
    matrix = operator(SPECTRA["isolated"], dtype=torch.float32)
    runs = [
        landscape.top_eigenpairs(matrix, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(runs[0].values, runs[1].values)
    assert torch.equal(runs[0].vectors, runs[1].vectors)
    traces = [
        landscape.trace(matrix, num_probes=5, generator=torch.Generator().manual_seed(3)).value
        for _ in range(2)
    ]
    assert traces[0] == traces[1]


def test_products_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        landscape.top_eigenpairs(torch.full((3, 3), math.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k and block_size"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"which": "LM"}, "magnitude, largest or smallest, not 'LM'"),
    ],
)
def test_bad_arguments_of_top_eigenpairs(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landscape.top_eigenpairs(torch.eye(3), **options)


def test_hessian_of_a_network_end_to_end() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, targets = torch.randn(40, 4).double(), torch.randint(0, 3, (40,))
    batches = [(inputs[:25], targets[:25]), (inputs[25:], targets[25:])]
    op = landscape.hessian(model, functional.cross_entropy, batches)
    matrix = op @ torch.eye(op.shape[0], dtype=torch.float64)
    truth = torch.linalg.eigvalsh(matrix)
    spent = op.num_products
    top = landscape.top_eigenpairs(op, k=3, which="largest")
    assert top.values.tolist() == pytest.approx(truth.flip(0)[:3].tolist(), rel=1e-3)
    assert op.num_products - spent == top.num_products
    lowest = landscape.top_eigenpairs(op, k=2, which="smallest", tolerance=1e-4)
    assert lowest.values.tolist() == pytest.approx(truth[:2].tolist(), rel=1e-3, abs=1e-6)
    estimate = landscape.trace(op, num_probes=200)
    assert abs(estimate.value - float(matrix.trace())) < 4 * estimate.standard_error


def test_trace_of_a_diagonal_operator_is_exact_from_one_probe() -> None:
    values = torch.tensor([3.0, -5, 0.25, 1e3])
    estimate = landscape.trace(torch.diag(values), num_probes=1)
    assert estimate.value == float(values.sum())
    assert math.isnan(estimate.standard_error)
    adaptive = landscape.trace(torch.diag(values), relative_error=0.01)
    assert (adaptive.standard_error, adaptive.num_probes, adaptive.converged) == (0.0, 8, True)


def test_trace_is_unbiased_and_its_error_has_the_theoretical_size() -> None:
    matrix = operator([20.0, 10, -4, *bulk(60)])
    generator = torch.Generator().manual_seed(0)
    runs = [landscape.trace(matrix, num_probes=20, generator=generator) for _ in range(200)]
    off_diagonal = float((matrix**2).sum() - (matrix.diagonal() ** 2).sum())
    expected = math.sqrt(2 * off_diagonal / 20)
    values = np.array([run.value for run in runs])
    assert abs(values.mean() - float(matrix.trace())) < 4 * expected / math.sqrt(200)
    assert values.std() == pytest.approx(expected, rel=0.2)
    errors = np.array([run.standard_error for run in runs])
    assert math.sqrt((errors**2).mean()) == pytest.approx(expected, rel=0.1)


def test_error_bar_of_the_trace_covers_the_truth_in_95_percent_of_200_seeds() -> None:
    matrix = operator([5.0, *np.linspace(0.1, 2, 200)], seed=1)
    truth, hits, limit = float(matrix.trace()), 0, stats.t.ppf(0.975, 7)
    for seed in range(200):
        estimate = landscape.trace(
            matrix, num_probes=8, generator=torch.Generator().manual_seed(seed)
        )
        hits += abs(estimate.value - truth) <= limit * estimate.standard_error
    # 95 % of 200 is 190; three standard deviations of a binomial below that
    assert hits >= 181


def test_adaptive_trace_stops_within_its_tolerance() -> None:
    matrix = operator([5.0, *np.linspace(0.1, 2, 200)], seed=1)
    truth = float(matrix.trace())
    op = Counted(matrix)
    within = 0
    for seed in range(40):
        estimate = landscape.trace(
            op, relative_error=0.02, generator=torch.Generator().manual_seed(seed)
        )
        assert estimate.converged
        within += abs(estimate.value - truth) <= 0.02 * truth
    assert within >= 34  # 95 % of 40 is 38; less three standard deviations
    capped = landscape.trace(op, relative_error=1e-6, max_probes=16)
    assert (capped.num_probes, capped.converged) == (16, False)
    with pytest.raises(ValueError, match="relative_error above 0"):
        landscape.trace(op, relative_error=None)
