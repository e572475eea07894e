"""Loss and gradient along the gradient, against quadratics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_landscape_sharpness import NOTHING, Quadratic, as_is, examples, relu_network
from torch.nn import functional

from llp import landscape
from llp.landscape.parameters import flatten, same_bits, trainable


def test_effective_beta_of_a_quadratic_is_the_stretch_of_its_gradient() -> None:
    model = Quadratic()
    slope = model.matrix @ model.theta.detach() + model.slope
    stretch = float((model.matrix @ slope).norm() / slope.norm())
    found = landscape.smoothness(model, as_is, NOTHING, steps=(1e-3, 1e-1))
    assert found.steps.tolist() == [-0.1, -1e-3, 1e-3, 0.1]
    for beta in (found.effective_beta, found.effective_beta_downhill, found.effective_beta_uphill):
        assert beta == pytest.approx(stretch, rel=1e-9)
    norm, bend = float(slope.norm()), float(slope @ model.matrix @ slope)
    base = float(model(torch.zeros(1)).detach())
    assert found.gradient_norm == pytest.approx(norm)
    assert found.base_loss == pytest.approx(base)
    expected = base + found.steps * norm**2 + found.steps**2 * bend / 2
    assert found.loss[0] == pytest.approx(expected, rel=1e-10)
    assert found.loss_range == pytest.approx(
        max(expected.max(), base) - min(expected.min(), base), rel=1e-10
    )
    distance = np.abs(found.steps) * norm
    assert found.distance[0] == pytest.approx(distance)
    assert found.loss_lipschitz == pytest.approx((np.abs(expected - base) / distance).max())
    assert found.gradient_predictiveness == pytest.approx(0.1 * stretch * norm)
    there = slope + 0.1 * model.matrix @ slope
    cosine = float(there @ slope / (there.norm() * slope.norm()))
    assert found.gradient_cosine[0, -1] == pytest.approx(cosine)
    assert found.num_gradients == 5


def test_downhill_and_uphill_differ_where_the_curvature_does() -> None:
    class Quartic(Quadratic):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return (self.theta[0] + 1) ** 4

    model = Quartic()
    with torch.no_grad():
        model.theta.zero_()
    found = landscape.smoothness(model, as_is, NOTHING, steps=(0.1,))
    assert found.effective_beta_uphill == pytest.approx(4 * (1.4**3 - 1) / 0.4)
    assert found.effective_beta_downhill == pytest.approx(4 * (1 - 0.6**3) / 0.4)
    assert found.effective_beta == found.effective_beta_uphill
    up = landscape.smoothness(model, as_is, NOTHING, steps=(0.1,), both_signs=False)
    assert up.steps.tolist() == [0.1]
    assert math.isnan(up.effective_beta_downhill)


def test_many_directions_at_the_length_of_the_gradient() -> None:
    model, batches = relu_network().double(), examples(20, 7)
    rows = landscape.directions.random(model, 4)
    found = landscape.smoothness(
        model, functional.cross_entropy, batches, steps=(1e-2,), directions=rows
    )
    assert found.loss.shape == (4, 2)
    assert found.distance == pytest.approx(np.full((4, 2), 1e-2 * found.gradient_norm))
    assert found.effective_beta == pytest.approx(
        (found.gradient_change / found.distance).max(), rel=1e-12
    )
    step = rows.vectors[2] * found.gradient_norm / rows.vectors[2].norm() * found.steps[0]
    with landscape.perturbed(model, step), torch.no_grad():
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        expected = float(functional.cross_entropy(model(inputs), targets))
    assert found.loss[2, 0] == pytest.approx(expected, rel=1e-12)
    assert found.to_arrays()["gradient_change"].shape == (4, 2)


def test_the_model_is_left_alone_and_bad_steps_are_refused() -> None:
    model, batches = relu_network(), [(torch.randn(9, 5), torch.arange(9) % 3)]
    before = flatten(trainable(model))
    landscape.smoothness(model.train(), functional.cross_entropy, batches)
    assert same_bits(before, flatten(trainable(model)))
    assert model.training
    for steps in ((), (0.0,), (math.nan,)):
        with pytest.raises(ValueError, match="steps must be finite"):
            landscape.smoothness(model, functional.cross_entropy, batches, steps=steps)
    flat = Quadratic()
    with torch.no_grad():
        flat.theta.zero_()
        flat.slope.zero_()
    with pytest.raises(ValueError, match="the gradient is 0"):
        landscape.smoothness(flat, as_is, NOTHING)
