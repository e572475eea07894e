"""SAM and ASAM: closed forms on a quadratic, invariance, exact weights, one pass for statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llp.optim.sam import SharpnessAware
from llp.optim.wrapper import batch_norms, statistics_frozen


def quadratic(seed: int = 0) -> tuple[Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    return root @ root.T, nn.Parameter(start)


def closure_of(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def test_the_step_on_a_quadratic_is_the_closed_form() -> None:
    matrix, theta = quadratic()
    start = theta.detach().clone()
    optimizer = SharpnessAware(torch.optim.SGD([theta], lr=0.1), rho=0.3)
    value = optimizer.step(closure_of(optimizer, lambda: 0.5 * theta @ matrix @ theta))
    gradient = matrix @ start
    moved = matrix @ (start + 0.3 * gradient / gradient.norm())
    assert torch.allclose(theta.grad, moved, rtol=1e-10)
    assert torch.allclose(theta.detach(), start - 0.1 * moved, rtol=1e-10)
    assert float(value.detach()) == pytest.approx(float(0.5 * start @ matrix @ start))


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5])
def test_the_adaptive_step_on_a_quadratic_is_the_closed_form(eta: float) -> None:
    matrix, theta = quadratic()
    start = theta.detach().clone()
    base = torch.optim.SGD([theta], lr=0.1)
    optimizer = SharpnessAware(base, rho=0.3, adaptive=True, eta=eta)
    optimizer.step(closure_of(optimizer, lambda: 0.5 * theta @ matrix @ theta))
    gradient, scale = matrix @ start, start.abs() + eta
    moved = start + 0.3 * scale**2 * gradient / (scale * gradient).norm()
    assert torch.allclose(theta.grad, matrix @ moved, rtol=1e-10)


def test_the_move_is_the_worst_one_in_the_ball_to_first_order() -> None:
    """No random point of either ball raises the linearised loss more."""
    matrix, theta = quadratic(3)
    start, gradient = theta.detach().clone(), matrix @ theta.detach()
    for adaptive in (False, True):
        optimizer = SharpnessAware(
            torch.optim.SGD([theta], lr=0.1), rho=0.3, adaptive=adaptive, eta=0.1
        )
        closure_of(optimizer, lambda: 0.5 * theta @ matrix @ theta)()
        optimizer.move()
        rise = float(gradient @ (theta.detach() - start))
        optimizer.abandon()
        scale = start.abs() + 0.1 if adaptive else torch.ones(6).double()
        points = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1)).double()
        points = 0.3 * scale * points / points.norm(dim=1, keepdim=True)
        assert float((points @ gradient).max()) < rise * (1 + 1e-9)
        assert float((points @ gradient).max()) > 0.7 * rise


def relu_network(scale: float) -> nn.Sequential:
    """One function for every `scale`: the second layer undoes what the first does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        model[0].weight *= scale
        model[0].bias *= scale
        model[2].weight /= scale
    return model


def loss_after_the_move(scale: float, *, adaptive: bool) -> float:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(40, 5, generator=generator).double()
    labels = torch.randint(0, 3, (40,), generator=generator)
    model = relu_network(scale)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SharpnessAware(base, rho=0.5, adaptive=adaptive, eta=0.0)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(data), labels)

    closure_of(optimizer, loss)()
    optimizer.move()
    return float(loss().detach())


def test_asam_does_not_see_a_rescaling_of_layers_and_sam_does() -> None:
    adaptive = [loss_after_the_move(scale, adaptive=True) for scale in (0.2, 1.0, 5.0)]
    plain = [loss_after_the_move(scale, adaptive=False) for scale in (0.2, 1.0, 5.0)]
    assert adaptive == pytest.approx([adaptive[1]] * 3, rel=1e-9)
    assert max(plain) > 1.05 * min(plain)


def batch_norm_network() -> tuple[nn.Sequential, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    data, target = torch.randn(16, 4), torch.randint(0, 2, (16,))
    return model, lambda: nn.functional.cross_entropy(model(data), target)


def test_weights_come_back_bit_by_bit_and_frozen_statistics_stay() -> None:
    model, loss = batch_norm_network()
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    closure = closure_of(optimizer, loss)
    closure()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model[0].weight.grad.clone()
    optimizer.move()
    assert not torch.equal(model[0].weight, before["0.weight"])
    with statistics_frozen(batch_norms(model)):
        closure()
    optimizer.abandon()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.allclose(first, model[0].weight.grad)
    closure()
    assert int(model[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 1


def test_the_second_gradient_is_that_of_training_mode() -> None:
    """Frozen statistics are not evaluation mode: the batch still normalises itself."""
    model, loss = batch_norm_network()
    with torch.no_grad():
        usual = loss()
        with statistics_frozen(batch_norms(model)):
            frozen = loss()
        assert torch.equal(usual, frozen)
        model.eval()
        assert not torch.allclose(loss(), frozen, atol=1e-4)


def test_an_error_in_the_second_pass_leaves_the_weights() -> None:
    model, loss = batch_norm_network()
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    calls = [0]

    def broken() -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("no")
        return closure_of(optimizer, loss)()

    with pytest.raises(RuntimeError, match="no"):
        optimizer.step(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_with_one_gradient_is_refused() -> None:
    _, theta = quadratic()
    optimizer = SharpnessAware(torch.optim.SGD([theta], lr=0.1))
    theta.grad = torch.ones_like(theta)
    with pytest.raises(RuntimeError, match="needs two gradients"):
        optimizer.step()
    optimizer.move()
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.move()


def test_the_ball_is_shared_by_all_groups_and_each_may_have_its_radius() -> None:
    one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    base = torch.optim.SGD([{"params": [one]}, {"params": [two], "rho": 1.0}], lr=0.1)
    optimizer = SharpnessAware(base, rho=0.5)
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    optimizer.move()
    assert torch.allclose(one.detach(), torch.tensor([0.3, 0.0]))
    assert torch.allclose(two.detach(), torch.tensor([0.0, 0.8]))


def test_no_gradient_means_no_move() -> None:
    theta = nn.Parameter(torch.ones(3))
    optimizer = SharpnessAware(torch.optim.SGD([theta], lr=0.1), rho=0.5)
    theta.grad = torch.zeros(3)
    optimizer.move()
    assert torch.equal(theta, torch.ones(3))


@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_equal_those_of_the_optimizer_library(adaptive: bool) -> None:
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(2)).double()
    target = torch.arange(16) % 2
    ends = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
        settings: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
        if ours:
            base = torch.optim.SGD(model.parameters(), **settings)
            optimizer = SharpnessAware(base, rho=0.1, adaptive=adaptive, eta=0.0)
        else:
            optimizer = library.SAM(
                model.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, **settings
            )

        def loss(model: nn.Module = model) -> Tensor:
            return nn.functional.cross_entropy(model(data), target)

        closure = closure_of(optimizer, loss)
        for _ in range(5):
            closure()
            if ours:
                optimizer.move()
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.allclose(*ends, rtol=1e-6, atol=1e-8)  # the library's norms are float32
