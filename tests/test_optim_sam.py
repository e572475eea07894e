"""SAM: the gradient of the quadratic in closed form, exact weights, frozen statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llp.optim.sam import SharpnessAware


class Quadratic(nn.Module):
    def __init__(self, matrix: torch.Tensor, start: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.theta = nn.Parameter(start.clone())

    def loss(self) -> torch.Tensor:
        return 0.5 * self.theta @ self.matrix @ self.theta


def test_gradient_on_a_quadratic_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.T
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    model = Quadratic(matrix, start)

    def recompute() -> None:
        model.zero_grad()
        model.loss().backward()

    recompute()
    SharpnessAware(model, rho=0.3)(recompute)
    gradient = matrix @ start
    expected = matrix @ (start + 0.3 * gradient / gradient.norm())
    assert torch.allclose(model.theta.grad, expected, rtol=1e-10)
    assert torch.equal(model.theta.detach(), start)


def test_batch_norm_statistics_and_weights_are_left_alone_even_when_it_fails():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    data, target = torch.randn(16, 4), torch.randint(0, 2, (16,))

    def recompute() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(data), target).backward()

    recompute()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = model[0].weight.grad.clone()
    SharpnessAware(model, rho=0.5)(recompute)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not torch.allclose(first, model[0].weight.grad)

    def broken() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        SharpnessAware(model)(broken)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    recompute()
    assert int(model[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 1


def test_a_radius_of_zero_is_refused():
    with pytest.raises(ValueError, match="rho must be above 0"):
        SharpnessAware(nn.Linear(1, 1), rho=0.0)
