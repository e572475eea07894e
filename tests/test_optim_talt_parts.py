"""The parts of TALT against dense linear algebra and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llp.optim import talt_parts
from llp.optim.talt_parts import (
    IncrementalCovariance,
    Oscillation,
    Persistence,
    SparseProjection,
    StackedProjection,
    dominant_direction,
    noise_edge,
    orthogonal_to,
    orthonormal,
    power_iteration,
    random_start,
    ridge_for_condition,
    valley,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- sparse random projection ---------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 50, 64, 500])
def test_the_projection_keeps_squared_lengths_on_average(size: int) -> None:
    generator = seeded()
    maps = [SparseProjection(size, 8, generator=generator) for _ in range(1500)]
    for seed in range(3):
        x = torch.randn(size, generator=seeded(seed + 1))
        if seed == 2:
            x = torch.ones(size)  # as coherent as can be
        squares = torch.stack([(one.matrix() @ x).square().sum() for one in maps])
        spread = float(squares.std()) / math.sqrt(len(maps))
        assert abs(float(squares.mean() - x.square().sum())) < 4 * spread + 1e-3


def test_the_projection_is_its_matrix_and_sparse() -> None:
    for size, dimension in ((13, 5), (64, 16), (4, 9)):
        one = SparseProjection(size, dimension, generator=seeded())
        kept = min(size, dimension)
        matrix = one.matrix()
        assert matrix.shape == (kept, size)
        assert torch.equal(matrix.abs().sum(0), torch.ones(size))  # one +-1 in each column
        assert torch.equal(matrix @ matrix.T, torch.diag(one.bucket_sizes))
        x = torch.randn(3, size, 4, generator=seeded(1))
        z = torch.randn(3, kept, 4, generator=seeded(2))
        assert torch.allclose(one.lift(z), matrix.T @ z, atol=1e-5)
        assert torch.allclose(one.add_back(x, z), x + matrix.T @ z, atol=1e-5)
        assert torch.allclose(one.rows(x), matrix @ x, atol=1e-5)
        assert torch.allclose(one.columns(x[0].mT), x[0].mT @ matrix.T, atol=1e-5)
        assert torch.allclose(StackedProjection([one] * 3, kept)(x.flatten(0, 1)), matrix @ x)


def test_what_fits_is_kept_exactly() -> None:
    one = SparseProjection(6, 32, generator=seeded())
    x = torch.randn(2, 6, 3)
    assert one.exact
    assert torch.equal(one.lift(x), x)
    assert torch.equal(StackedProjection([one, one], 6)(x.flatten(0, 1)), x)
    assert torch.equal(one.matrix(), torch.eye(6))


def test_maps_of_many_sizes_are_applied_at_once() -> None:
    maps = [SparseProjection(size, 8, generator=seeded(size)) for size in (13, 3, 8, 1, 64)]
    matrices = [torch.randn(one.size, 5, generator=seeded(one.size)) for one in maps]
    found = StackedProjection(maps, 9)(torch.cat(matrices))
    assert found.shape == (5, 9, 5)
    for own, one, matrix in zip(found, maps, matrices, strict=True):
        assert torch.allclose(own[: one.dimension], one.matrix() @ matrix, atol=1e-5)
        assert not own[one.dimension :].any()


def test_projections_follow_their_generator_and_not_the_global_one() -> None:
    state = torch.get_rng_state()
    one = SparseProjection(100, 8, generator=seeded(3))
    two = SparseProjection(100, 8, generator=seeded(3))
    other = SparseProjection(100, 8, generator=seeded(4))
    assert torch.equal(one.signs, two.signs)
    assert not torch.equal(one.signs, other.signs)
    assert torch.equal(torch.get_rng_state(), state)


# --- incremental covariance -------------------------------------------------------------------


def whole(series: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weighted mean and unbiased covariance of `[steps, rows, columns]` at once, in float64."""
    series = series.double()
    weights = decay ** torch.arange(len(series) - 1, -1, -1).double()
    weights = weights / weights.sum()
    mean = (weights.view(-1, 1, 1) * series).sum(0)
    off = series - mean
    scatter = (weights.view(-1, 1, 1) * (off @ off.mT)).sum(0)
    return mean, scatter / (1 - weights.square().sum())


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("steps", [2, 5, 40])
def test_the_incremental_covariance_is_that_of_the_whole_series(decay: float, steps: int) -> None:
    series = torch.randn(steps, 2, 3, 4, generator=seeded()) + 100.0  # far from zero
    running = IncrementalCovariance(2, 3, 4, decay=decay, dtype=torch.float64)
    for matrices in series.double():
        running.update(matrices)
    for index in range(2):
        mean, covariance = whole(series[:, index], decay)
        assert torch.allclose(running.mean[index], mean, rtol=1e-10)
        assert torch.allclose(running.covariance()[index], covariance, rtol=1e-8)


def test_float32_is_enough_far_from_zero() -> None:
    series = torch.randn(200, 1, 3, 1, generator=seeded()) + 1000.0
    running = IncrementalCovariance(1, 3, 1, decay=0.95)
    for matrices in series:
        running.update(matrices)
    _, covariance = whole(series[:, 0], 0.95)
    assert torch.allclose(running.covariance()[0].double(), covariance, rtol=0.01, atol=0.01)


def test_it_is_unbiased_from_the_second_sample_on() -> None:
    running = IncrementalCovariance(20_000, 2, 1, decay=0.9)
    truth = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    root = torch.linalg.cholesky(truth)
    generator = seeded()
    for step in range(4):
        running.update(root @ torch.randn(20_000, 2, 1, generator=generator))
        if step:
            assert torch.allclose(running.covariance().mean(0), truth, atol=0.15)
    assert torch.allclose(running.mean.mean(0), torch.zeros(2, 1), atol=0.05)


def test_a_series_without_a_sample_stays_as_it_was() -> None:
    one = IncrementalCovariance(2, 3, 2, decay=0.8)
    two = IncrementalCovariance(2, 3, 2, decay=0.8)
    samples = torch.randn(6, 2, 3, 2, generator=seeded())
    for step, sample in enumerate(samples):
        one.update(sample, [True, step % 2 == 0])
    for sample in samples[::2]:
        two.update(sample)
    assert torch.allclose(one.covariance()[1], two.covariance()[1], rtol=1e-5)
    assert one.concentration[1] == pytest.approx(two.concentration[1])
    everything = IncrementalCovariance(2, 3, 2, decay=0.8)
    for sample in samples:
        everything.update(sample)
    assert torch.allclose(one.covariance()[0], everything.covariance()[0], rtol=1e-5)


def test_a_series_that_begins_late_has_no_bias_from_before() -> None:
    running = IncrementalCovariance(1, 2, 1, decay=0.9)
    nothing = torch.zeros(1, 2, 1)
    for _ in range(5):
        assert running.update(nothing, [False]) == [0.0]
    assert running.concentration == [1.0]
    assert running.update(torch.ones(1, 2, 1)) == [1.0]
    assert torch.equal(running.mean, torch.ones(1, 2, 1))


# --- power iteration --------------------------------------------------------------------------


def with_spectrum(values: list[float], count: int = 3, seed: int = 0) -> Tensor:
    size = len(values)
    basis = torch.linalg.qr(torch.randn(count, size, size, generator=seeded(seed))).Q
    return (basis * torch.tensor(values)) @ basis.mT


def start(matrices: Tensor, num: int) -> Tensor:
    return random_start(len(matrices), matrices.shape[1], num, seeded(9))


def test_eigenpairs_are_those_of_the_dense_solver() -> None:
    matrices = with_spectrum([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])
    found = power_iteration(matrices, start(matrices, 4), iterations=200)
    values, vectors = torch.linalg.eigh(matrices)
    assert torch.allclose(found.values, values.flip(1)[:, :4], atol=1e-4)
    cosines = (found.vectors * vectors.flip(2)[:, :, :4]).sum(1).abs()
    assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-4)
    assert bool(found.converged(1e-3).all())


def test_the_residual_bounds_the_distance_to_an_eigenvalue() -> None:
    """Weinstein's bound, which holds for few iterations as for many."""
    matrices = with_spectrum([4.0, 3.9, 3.0, 1.0, 0.2])
    truth = torch.linalg.eigvalsh(matrices)
    for iterations in (1, 2, 5, 20):
        found = power_iteration(matrices, start(matrices, 3), iterations=iterations)
        distance = (found.values.unsqueeze(2) - truth.unsqueeze(1)).abs().amin(2)
        assert bool((distance <= found.residuals + 1e-5).all())
    rough = power_iteration(matrices, start(matrices, 3), iterations=1)
    assert not bool(rough.converged(1e-3).all())


@pytest.mark.parametrize(
    "values", [[5.0, 5.0, 5.0, 1.0], [3.0, 0.0, 0.0, 0.0], [0.0] * 4, [1e-30] * 4, [1e12, 1, 1, 1]]
)
def test_vectors_are_orthonormal_whatever_the_spectrum(values: list[float]) -> None:
    matrices = with_spectrum(values)
    found = power_iteration(matrices, start(matrices, 3), iterations=30)
    gram = found.vectors.mT @ found.vectors
    assert torch.allclose(gram, torch.eye(3).expand_as(gram), atol=1e-5)
    assert bool((found.values >= -1e-6 * max(values[0], 1e-30)).all())


def test_a_tolerance_ends_the_iteration_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = with_spectrum([9.0, 3.0, 1.0, 0.1])
    sweeps = [0]

    def counted(vectors: Tensor) -> Tensor:
        sweeps[0] += 1
        return orthonormal(vectors)

    monkeypatch.setattr(talt_parts, "orthonormal", counted)
    found = power_iteration(matrices, start(matrices, 2), iterations=10_000, tolerance=1e-3)
    assert 3 < sweeps[0] < 60
    assert bool((found.residuals <= 1.1e-3 * 9.0).all())


def test_gram_schmidt_spans_what_it_was_given() -> None:
    given = torch.randn(2, 7, 4, generator=seeded())
    found = orthonormal(given)
    assert torch.allclose(found.mT @ found, torch.eye(4).expand(2, 4, 4), atol=1e-5)
    assert torch.allclose(found @ (found.mT @ given), given, atol=1e-5)
    assert torch.allclose((found.mT @ given).tril(-1), torch.zeros(2, 4, 4), atol=1e-5)
    given[:, :, 2] = 0
    assert torch.equal(orthonormal(given)[:, :, 2], torch.zeros(2, 7))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_columns_that_depend_on_others_become_zero_and_harm_none(scale: float) -> None:
    given = scale * torch.randn(2, 3, 5, generator=seeded())
    given[:, :, 1] = -2 * given[:, :, 0]
    found = orthonormal(given)
    kept = found[:, :, [0, 2, 3]]
    assert torch.allclose(kept.mT @ kept, torch.eye(3).expand(2, 3, 3), atol=1e-5)
    assert float(found[:, :, [1, 4]].abs().max()) < 1e-3


def test_nearly_parallel_columns_are_parted_as_well_as_float32_can() -> None:
    given = torch.randn(3, 8, 3, generator=seeded())
    given[:, :, 1] = given[:, :, 0] + 2e-3 * given[:, :, 1]
    found = orthonormal(given)
    assert torch.allclose(found.mT @ found, torch.eye(3).expand(3, 3, 3), atol=1e-5)
    exact = torch.linalg.qr(given.double()).Q.float()
    assert torch.allclose((found * exact).sum(1).abs(), torch.ones(3, 3), atol=1e-5)


def test_the_dominant_direction_is_the_first_left_singular_vector() -> None:
    for scale in (1e-12, 1.0, 1e12):
        given = scale * torch.randn(3, 6, 4, generator=seeded())
        found = dominant_direction(given, iterations=100)
        expected = torch.linalg.svd(given).U[:, :, :1]
        cosines = (found * expected).sum((1, 2)).abs()
        assert torch.allclose(cosines, torch.ones(3), atol=1e-4)
    assert torch.equal(dominant_direction(torch.zeros(2, 3, 4), iterations=3), torch.zeros(2, 3, 1))


def test_last_times_vectors_make_few_iterations_enough() -> None:
    matrices = with_spectrum([9.0, 7.0, 3.0, 1.0, 0.5])
    good = power_iteration(matrices, start(matrices, 2), iterations=200).vectors
    nudged = matrices + 0.01 * with_spectrum([1.0, 1.0, 1.0, 1.0, 1.0], seed=5)
    warm = power_iteration(nudged, good, iterations=3)
    cold = power_iteration(nudged, start(matrices, 2), iterations=3)
    assert bool(warm.converged(1e-2).all())
    assert float(warm.residuals.sum()) < 0.1 * float(cold.residuals.sum())


def test_the_part_orthogonal_to_vectors_is_that() -> None:
    basis = torch.linalg.qr(torch.randn(2, 6, 3, generator=seeded())).Q
    v = torch.randn(2, 6, 2, generator=seeded(1))
    rest = orthogonal_to(basis, v)
    assert torch.allclose(basis.mT @ rest, torch.zeros(2, 3, 2), atol=1e-6)
    assert torch.allclose(rest + basis @ (basis.mT @ v), v, atol=1e-5)


def test_the_ridge_is_the_least_that_bounds_the_condition() -> None:
    largest, rest = torch.tensor([100.0, 100.0, 5.0]), torch.tensor([1.0, 0.0, 1.0])
    ridge = ridge_for_condition(largest, rest, 10.0)
    conditions = (largest + ridge) / (rest + ridge)
    assert conditions.tolist() == pytest.approx([10.0, 10.0, 5.0])
    assert float(ridge[2]) == 0.0


# --- oscillation, persistence, valleys --------------------------------------------------------


def watch(
    gradients: Tensor, decay: float = 0.9
) -> tuple[IncrementalCovariance, Oscillation, Persistence]:
    """Runs `[steps, count, rows, columns]` through all parts; directions are the unit vectors."""
    _, count, rows, columns = gradients.shape
    covariance = IncrementalCovariance(count, rows, columns, decay=decay)
    oscillation = Oscillation(count, rows, columns, "cpu")
    persistence = Persistence(count, rows, columns, "cpu")
    basis = torch.eye(rows).repeat(count, 1, 1)
    for gradient in gradients:
        weights = covariance.update(gradient)
        oscillation.update(gradient, weights)
        persistence.update(basis, gradient, weights)
    return covariance, oscillation, persistence


def test_the_mean_pairwise_cosine_is_that_over_all_pairs() -> None:
    gradients = torch.randn(12, 2, 3, 2, generator=seeded()) + 0.5
    covariance, oscillation, _ = watch(gradients, decay=0.8)
    units = gradients / gradients.flatten(2).norm(dim=2).view(12, 2, 1, 1)
    weights = 0.8 ** torch.arange(11, -1, -1)
    weights = weights / weights.sum()
    for index in range(2):
        total = mass = 0.0
        for i in range(12):
            for j in range(12):
                if i != j:
                    pair = float(weights[i] * weights[j])
                    total += pair * float((units[i, index] * units[j, index]).sum())
                    mass += pair
        concentration = torch.tensor(covariance.concentration)
        found = float(oscillation.cosine(concentration)[index])
        assert found == pytest.approx(total / mass, abs=1e-5)


def test_persistence_tells_drift_noise_and_swinging_apart() -> None:
    steps = torch.arange(60).float()
    drift = torch.ones(60)
    fading = 0.7**steps
    swing = (-1.0) ** steps
    series = torch.stack([drift, fading, swing], 1).view(60, 1, 3, 1)
    correlation = watch(series)[2].correlation()[0]
    assert correlation.tolist() == pytest.approx([1.0, 1.0, -1.0], abs=1e-3)
    noise = torch.randn(60, 500, 1, 1, generator=seeded())
    found = watch(noise)[2].correlation()
    assert abs(float(found.mean())) < 0.05
    assert float(found.std()) < 0.35


def test_persistence_passes_over_steps_that_a_series_has_no_gradient_at() -> None:
    series = torch.randn(40, 1, 2, 1, generator=seeded()) + 0.5
    basis = torch.eye(2).expand(2, 2, 2)
    one, two = Persistence(2, 2, 1, "cpu"), Persistence(1, 2, 1, "cpu")
    for step, sample in enumerate(series):
        here = step % 3 != 1
        one.update(basis, sample.expand(2, 2, 1), [0.1, 0.1 * here])
        if here:
            two.update(basis[:1], sample, [0.1])
    assert torch.allclose(one.correlation()[1], two.correlation()[0], atol=1e-6)


def test_persistence_goes_over_to_turned_directions() -> None:
    series = torch.zeros(30, 1, 2, 1)
    series[:, 0, 0, 0] = 1.0
    series[:, 0, 1, 0] = 3 * (-1.0) ** torch.arange(30)
    persistence = watch(series)[2]
    persistence.turn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    assert persistence.correlation()[0].tolist() == pytest.approx([-1.0, 1.0], abs=1e-3)
    persistence.turn(torch.zeros(1, 2, 2))
    assert persistence.correlation()[0].tolist() == [0.0, 0.0]


def descent(curvatures: list[float], rate: float, steps: int, noise: float = 0.0) -> Tensor:
    """Gradients of gradient descent on a bowl, `[steps, 1, dimensions, 1]`."""
    h = torch.tensor(curvatures)
    x, generator, gradients = torch.ones(len(h)), seeded(5), []
    for _ in range(steps):
        gradient = h * x + noise * torch.randn(len(h), generator=generator)
        gradients.append(gradient)
        x = x - rate * gradient
    return torch.stack(gradients).view(steps, 1, -1, 1)


def seen_along(gradients: Tensor, direction: int) -> float:
    covariance, oscillation, _ = watch(gradients)
    concentration = torch.tensor(covariance.concentration)
    return float(
        valley(
            oscillation.cosine(concentration),
            covariance.mean[:, direction, 0].square(),
            covariance.covariance()[:, direction, direction],
            concentration,
            noise_edge(torch.tensor(1.0), torch.tensor(1.0)),
        )
    )


def test_a_ravine_is_a_valley_along_its_floor_only() -> None:
    ravine = descent([100.0, 1.0], rate=0.0199, steps=40)  # swings across, creeps along
    assert seen_along(ravine, 1) > 0.5
    assert seen_along(ravine, 0) == 0.0


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_a_plain_is_no_valley(rate: float) -> None:
    plain = descent([1.0, 1.0], rate=rate, steps=40)
    assert [seen_along(plain, k) for k in (0, 1)] == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(6, 3), (28, 8), (32, 1), (2, 1)])
def test_noise_is_no_valley(shape: tuple[int, int]) -> None:
    rows, columns = shape
    noise = torch.randn(60, 400, rows, columns, generator=seeded())
    covariance, oscillation, _ = watch(noise)
    square = torch.linalg.matrix_norm(covariance.mean, ord=2).square()  # chosen as the largest
    variance = covariance.covariance().diagonal(dim1=1, dim2=2).mean(1)
    concentration = torch.tensor(covariance.concentration)
    strength = valley(
        oscillation.cosine(concentration),
        square,
        variance,
        concentration,
        noise_edge(torch.tensor(float(rows)), torch.tensor(float(columns))) / columns,
    )
    assert float((strength > 0).float().mean()) < 0.02
    assert float(strength.mean()) < 0.002
    assert bool((oscillation.cosine(concentration) < 0.5).all())


def test_a_valley_does_not_depend_on_the_scale_of_the_gradient() -> None:
    ravine = descent([100.0, 1.0], rate=0.0199, steps=40)
    for scale in (1e-8, 1e8):
        assert seen_along(scale * ravine, 1) == pytest.approx(seen_along(ravine, 1), rel=1e-3)
