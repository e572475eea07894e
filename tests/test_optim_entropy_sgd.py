"""Entropy-SGD: the gradient of the local entropy in closed form, and what makes it not SGD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llp.optim.entropy_sgd import EntropySGD


def quadratic(seed: int = 0) -> tuple[Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, nn.Parameter(start)


def around(theta: nn.Parameter, rate: float = 0.1, **options: Any) -> EntropySGD:
    return EntropySGD(torch.optim.SGD([theta], lr=rate), **options)


def closure_of(optimizer: EntropySGD, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def test_a_step_follows_the_algorithm() -> None:
    matrix, theta = quadratic()
    start = theta.detach().clone()
    optimizer = around(theta, inner_steps=4, gamma=2.0, noise=0.3, inner_learning_rate=0.1, seed=7)
    optimizer.step(closure_of(optimizer, lambda: 0.5 * theta @ matrix @ theta))
    draws = torch.Generator().manual_seed(7)
    x, mean = start.clone(), start.clone()
    for _ in range(4):
        drift = matrix @ x + 2.0 * (x - start)
        noise = torch.randn(5, generator=draws).double()
        x = x - 0.1 * drift + math.sqrt(0.1) * 0.3 * noise
        mean = 0.75 * mean + 0.25 * x
    expected = 2.0 * (start - mean)
    assert torch.allclose(theta.grad, expected, rtol=1e-9)
    assert torch.allclose(theta.detach(), start - 0.1 * expected, rtol=1e-9)


def test_a_long_chain_gives_the_gradient_of_the_local_entropy() -> None:
    """Of a quadratic it is `gamma A (A + gamma)^-1 theta`, for any noise in the mean."""
    matrix, theta = quadratic(1)
    start, gamma = theta.detach().clone(), 1.5
    optimizer = around(
        theta, inner_steps=400, gamma=gamma, noise=0.0, mean_weight=1.0, inner_learning_rate=0.2
    )
    optimizer.step(closure_of(optimizer, lambda: 0.5 * theta @ matrix @ theta))
    smoothed = gamma * matrix @ torch.linalg.inv(matrix + gamma * torch.eye(5).double())
    assert torch.allclose(theta.grad, smoothed @ start, rtol=1e-8)


def test_it_is_not_sgd() -> None:
    """Steep directions count less against flat ones than in the gradient, at any learning rate."""
    matrix, theta = quadratic(1)
    plain = matrix @ theta.detach()
    optimizer = around(theta, inner_steps=20, gamma=1.0, noise=0.0)
    optimizer.step(closure_of(optimizer, lambda: 0.5 * theta @ matrix @ theta))
    vectors = torch.linalg.eigh(matrix).eigenvectors
    ratios = (vectors.T @ theta.grad) / (vectors.T @ plain)
    assert bool((ratios > 0).all())
    assert float(ratios[0] / ratios[-1]) > 1.5
    assert bool((ratios.diff() < 0).all())


def test_the_gradient_is_gamma_times_the_way_to_the_mean_on_a_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    data, target = torch.randn(30, 4), torch.arange(30) % 2
    optimizer = EntropySGD(
        torch.optim.SGD(model.parameters(), lr=0.5), inner_steps=3, gamma=2.0, seed=1
    )
    start = [p.detach().clone() for p in model.parameters()]
    means = [p.clone() for p in start]

    def gradients() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data), target).backward()

    for _ in range(3):
        gradients()
        optimizer.move()
        for mean, parameter in zip(means, model.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 0.25)
    # `step` makes the last inner step itself, so the third above was one too many.
    optimizer.abandon()
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))

    optimizer = EntropySGD(
        torch.optim.SGD(model.parameters(), lr=0.5), inner_steps=3, gamma=2.0, seed=1
    )
    for index in range(3):
        gradients()
        if index < 2:
            optimizer.move()
    optimizer.step()
    for before, mean, parameter in zip(start, means, model.parameters(), strict=True):
        assert torch.allclose(parameter.grad, 2.0 * (before - mean), atol=1e-6)
        assert torch.allclose(parameter, before - 0.5 * parameter.grad, atol=1e-6)


def test_scoping_narrows_and_ends_where_a_langevin_step_forgets() -> None:
    _, theta = quadratic()
    optimizer = around(theta, gamma=0.5, gamma_growth=0.1, inner_learning_rate=0.1, inner_steps=1)
    seen = []
    for _ in range(60):
        seen.append(optimizer.gamma)
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
    assert seen[:3] == pytest.approx([0.5, 0.55, 0.605])
    assert seen[-1] == 10.0
    assert seen == sorted(seen)


def test_fewer_gradients_than_inner_steps_make_a_step_too() -> None:
    """The last batches of an epoch: what was gathered counts."""
    matrix, theta = quadratic()
    start = theta.detach().clone()
    optimizer = around(theta, inner_steps=5, gamma=2.0, noise=0.0)
    theta.grad = matrix @ start
    optimizer.step()
    expected = 2.0 * 0.25 * 0.1 * (matrix @ start)  # gamma * weight * eta * gradient
    assert torch.allclose(theta.grad, expected)
    assert torch.allclose(theta.detach(), start - 0.1 * expected)


def test_noise_is_its_own_and_scales_as_the_temperature() -> None:
    spread = []
    for noise in (0.1, 0.4):
        theta = nn.Parameter(torch.zeros(20_000))
        optimizer = around(theta, inner_steps=2, gamma=1e-3, noise=noise, seed=3)
        theta.grad = torch.zeros_like(theta)
        state = torch.get_rng_state()
        optimizer.move()
        assert torch.equal(torch.get_rng_state(), state)
        spread.append(float(theta.detach().std()))
    assert spread == pytest.approx([math.sqrt(0.1) * 0.1, math.sqrt(0.1) * 0.4], rel=0.03)


def test_gradients_of_about_the_size_of_sgds_by_default() -> None:
    matrix, theta = quadratic()
    with torch.no_grad():
        matrix = matrix / 4  # curvatures up to 1, where the default learning rates belong
    plain = matrix @ theta.detach()
    optimizer = around(theta)
    optimizer.step(closure_of(optimizer, lambda: 0.5 * theta @ matrix @ theta))
    assert 0.4 < float(theta.grad.norm() / plain.norm()) < 1.2
