"""The sharpness measures beyond one SAM step: against quadratics, and their invariances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from test_landscape_sharpness import (
    NOTHING,
    Quadratic,
    as_is,
    examples,
    relu_network,
    rescaled,
)
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape import sharpness
from llp.landscape.parameters import same_bits
from llp.landscape.passes import BatchLosses, value_and_gradient
from llp.landscape.sharpness.entropy import _quadrature
from llp.landscape.sharpness.groups import groups_of
from llp.landscape.sharpness.worst import Ball, Place, ascend


def trust_region(matrix: Tensor, slope: Tensor, rho: float) -> float:
    """`max g'd + d'Ad / 2` over `|d| <= rho` from the secular equation `|(mu - A)^-1 g| = rho`."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    parts = vectors.T @ slope.numpy()

    def too_long(mu: float) -> float:
        return float(np.linalg.norm(parts / (mu - values))) - rho

    top = values.max()
    mu = brentq(too_long, top + 1e-13, top + np.linalg.norm(parts) / rho + 1, xtol=1e-14)
    step = parts / (mu - values)
    return float(parts @ step + (values * step**2).sum() / 2)


def slope_of(model: Quadratic) -> Tensor:
    return model.matrix @ model.theta.detach() + model.slope


def at_zero(extra: float = 0.0) -> Quadratic:
    """Stationary, and with `extra` on the diagonal."""
    model = Quadratic()
    with torch.no_grad():
        model.theta.zero_()
        model.slope.zero_()
        model.matrix += extra * torch.eye(6)
    return model


@pytest.mark.parametrize("rho", [0.05, 0.3, 2.0])
def test_worst_case_in_a_ball_solves_the_trust_region_problem(rho: float) -> None:
    model = Quadratic()
    expected = trust_region(model.matrix, slope_of(model), rho)
    found = sharpness.worst_case(model, as_is, NOTHING, rho=rho, num_steps=50)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.num_gradients == 1 + 50 + 50
    assert found.num_examples == 4


def test_worst_case_at_a_stationary_point_is_the_largest_eigenvalue() -> None:
    model, rho = at_zero(), 0.2
    expected = rho**2 / 2 * float(torch.linalg.eigvalsh(model.matrix)[-1])
    found = sharpness.worst_case(model, as_is, NOTHING, rho=rho, num_steps=80)
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_adaptive_worst_case_is_the_trust_region_in_relative_coordinates() -> None:
    model, rho = Quadratic(), 0.4
    scale = model.theta.detach().abs()
    expected = trust_region(scale[:, None] * model.matrix * scale, scale * slope_of(model), rho)
    found = sharpness.worst_case(model, as_is, NOTHING, rho=rho, adaptive=True, num_steps=50)
    assert found.value == pytest.approx(expected, rel=1e-9)


def corners(model: Quadratic, widths: Tensor) -> float:
    """The largest rise over the corners of a box, where a convex function has its maximum."""
    slope, best = slope_of(model), -math.inf
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        step = torch.tensor(signs, dtype=torch.float64) * widths
        best = max(best, float(slope @ step + step @ model.matrix @ step / 2))
    return best


def test_worst_case_in_a_box_is_the_best_corner_of_a_convex_quadratic() -> None:
    model, rho = Quadratic(), 0.5
    with torch.no_grad():
        model.matrix += torch.eye(6)
        model.slope *= 0.1
    expected = corners(model, torch.full((6,), rho).double())
    found = sharpness.worst_case(
        model, as_is, NOTHING, rho=rho, norm="linf", num_steps=30, num_restarts=6
    )
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_epsilon_box_is_keskars_percentage() -> None:
    model, epsilon = Quadratic(), 0.05
    with torch.no_grad():
        model.matrix += torch.eye(6)
    base = float(model(torch.zeros(1)).detach())
    rise = corners(model, epsilon * (model.theta.detach().abs() + 1))
    found = sharpness.epsilon_box(model, as_is, NOTHING, epsilon=epsilon, num_restarts=4)
    assert found.value == pytest.approx(100 * rise / (1 + base), rel=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_case_is_above_sam_and_above_the_average(adaptive: bool) -> None:
    model, batches, loss = relu_network().double(), examples(20, 7), functional.cross_entropy
    rho = 0.3
    worst = sharpness.worst_case(model, loss, batches, rho=rho, adaptive=adaptive).value
    one_step = sharpness.asam if adaptive else sharpness.sam
    assert worst > one_step(model, loss, batches, rho=rho).value > 0
    count = sum(parameter.numel() for parameter in model.parameters())
    sigma = rho / math.sqrt(count)  # noise of the same length
    average = sharpness.noise(model, loss, batches, sigma=sigma, relative=adaptive).value
    assert worst > average


def test_worst_case_ignores_layer_scales_when_adaptive_and_only_then() -> None:
    model = relu_network().double()
    twin, batches, loss = rescaled(model), examples(20, 7), functional.cross_entropy

    def both(adaptive: bool) -> list[float]:
        return [
            sharpness.worst_case(m, loss, batches, rho=0.2, adaptive=adaptive, num_steps=8).value
            for m in (model, twin)
        ]

    one, other = both(True)
    assert one == pytest.approx(other, rel=1e-9)
    one, other = both(False)
    assert abs(one - other) > 0.05 * one


class Scripted(Ball):
    """A ball whose losses are written down beforehand; the slope is the point, turned."""

    def __init__(self, losses: list[float]) -> None:
        self.rho, self.norm, self.losses, self.places = 1.0, "l2", iter(losses), []

    def place(self, point: Tensor) -> Place:
        slope = torch.stack([-point[1] + 0.3, point[0] + 0.1])
        loss = torch.tensor([next(self.losses)], dtype=torch.float64)
        self.places.append(Place(point, BatchLosses(loss, (1,)), slope))
        return self.places[-1]


def test_after_a_cut_of_the_step_the_search_goes_on_from_the_best_point() -> None:
    """A search that reloads the weights but not its own offset goes on from where it was."""
    # Of ten steps the first three are judged together: one of them rose.
    ball = Scripted([0.0, 5.0, 1.0, 0.5, 6.0, 0.2, 0.1, 7.0, 0.0, 0.0, 0.0])
    best = ascend(ball, ball.place(torch.zeros(2).double()), 10)
    places = ball.places
    assert len(places) == 11
    top = places[1]
    expected = ball.project(top.point + ball.uphill(top.slope, 1.0))  # half of the first 2 rho
    assert torch.equal(places[4].point, expected)
    # Without a cut, after the first step, there is momentum.
    aim = ball.project(places[1].point + ball.uphill(places[1].slope, 2.0))
    step = 0.75 * (aim - places[1].point) + 0.25 * (places[1].point - places[0].point)
    assert torch.allclose(places[2].point, ball.project(places[1].point + step), atol=1e-15)
    # The steps four and five are judged together: one of them rose, so it goes on from the fourth.
    top = places[4]
    expected = ball.project(top.point + ball.uphill(top.slope, 0.5))
    assert torch.equal(places[6].point, expected)
    assert best is places[7]


def test_the_search_ends_near_a_peak_that_its_first_steps_jump_over() -> None:
    class Ripples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, _: Tensor) -> Tensor:
            peak = torch.tensor([0.21, -0.13], dtype=torch.float64)
            return -((self.theta - peak) ** 2).sum() + 0.002 * torch.cos(60 * self.theta).sum()

    found = sharpness.worst_case(Ripples(), as_is, NOTHING, rho=1.0, num_steps=60, num_restarts=0)
    start = -(0.21**2) - 0.13**2 + 0.004
    assert -0.002 < found.value + start < 0.004


def test_random_restarts_start_elsewhere_and_find_the_higher_of_two_hills() -> None:
    class Hills(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, _: Tensor) -> Tensor:
            x = self.theta[0]
            low, high = torch.exp(-8 * (x - 0.5) ** 2), 9 * torch.exp(-200 * (x + 0.6) ** 2)
            return 0.3 * low + high

    values = [
        sharpness.worst_case(
            Hills(), as_is, NOTHING, rho=1.0, norm="linf", num_steps=40, num_restarts=restarts
        ).value
        for restarts in (0, 12)
    ]
    base = 0.3 * math.exp(-2)
    assert values[0] == pytest.approx(0.3 - base, abs=0.001)
    assert values[1] == pytest.approx(9.0 - base, abs=0.01)


@pytest.mark.parametrize("relative", [False, True])
def test_noise_sigma_reaches_the_rise_with_the_same_draws(relative: bool) -> None:
    model, rise = at_zero(extra=1.0), 0.3
    with torch.no_grad():
        model.theta.copy_(torch.arange(1.0, 7.0))
        model.slope.copy_(-model.matrix @ model.theta)  # a minimum away from 0
    found = sharpness.noise_sigma(
        model, as_is, NOTHING, rise=rise, num_draws=16, relative=relative, tolerance=1e-6
    )
    # with the draws fixed the mean rise is sigma^2 times a constant
    unit = sharpness.noise(model, as_is, NOTHING, sigma=1.0, num_draws=16, relative=relative)
    assert found.value == pytest.approx(math.sqrt(rise / unit.value), rel=1e-5)
    again = sharpness.noise(
        model, as_is, NOTHING, sigma=found.value, num_draws=16, relative=relative
    )
    assert again.value == pytest.approx(rise, rel=1e-5)
    assert found.standard_error == pytest.approx(
        found.value / 2 * unit.standard_error / unit.value, rel=0.1
    )
    assert found.num_forwards % 32 == 1


def test_noise_sigma_of_the_trace() -> None:
    model, rise = at_zero(extra=1.0), 0.2
    found = sharpness.noise_sigma(
        model, as_is, NOTHING, rise=rise, num_draws=400, relative=False, start=1.0
    )
    expected = math.sqrt(2 * rise / float(model.matrix.trace()))
    assert abs(found.value - expected) < 4 * found.standard_error


def test_noise_sigma_gives_up_with_a_reason_when_the_loss_never_rises() -> None:
    model = nn.Linear(5, 1).double()
    with pytest.raises(ValueError, match="the loss rises only by"):
        sharpness.noise_sigma(model, lambda output, _: output.tanh().mean() * 0.01, examples(10))


def test_m_sharpness_with_all_examples_is_sam_to_the_bit() -> None:
    model, batches, loss = relu_network().double(), examples(8, 8, 3), functional.cross_entropy
    assert (
        sharpness.m_sharpness(model, loss, batches, m=19, rho=0.1).value
        == sharpness.m_sharpness(model, loss, batches, m=100, rho=0.1).value
        == sharpness.sam(model, loss, batches, rho=0.1).value
    )
    adaptive = sharpness.m_sharpness(model, loss, batches, m=19, rho=0.5, adaptive=True)
    assert adaptive.value == sharpness.asam(model, loss, batches, rho=0.5).value


@pytest.mark.parametrize("m", [1, 4, 5, 8])
def test_m_sharpness_is_the_mean_of_sam_on_groups_across_batches(m: int) -> None:
    model, batches, loss = relu_network().double(), examples(8, 8, 3), functional.cross_entropy
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    rises, sizes = [], []
    for start in range(0, 19, m):
        group = [(inputs[start : start + m], targets[start : start + m])]
        rises.append(sharpness.sam(model, loss, group, rho=0.1).value)
        sizes.append(len(group[0][0]))
    found = sharpness.m_sharpness(model, loss, batches, m=m, rho=0.1)
    assert found.value == pytest.approx(np.average(rises, weights=sizes), rel=1e-9)
    assert found.num_examples == 19
    if m == 1:
        assert found.standard_error == pytest.approx(np.std(rises, ddof=1) / math.sqrt(19))


def test_smaller_groups_are_sharper() -> None:
    model, batches, loss = relu_network().double(), examples(16, 16), functional.cross_entropy
    values = [sharpness.m_sharpness(model, loss, batches, m=m, rho=0.1).value for m in (2, 8, 32)]
    assert values[0] > values[1] > values[2]


def test_groups_keep_every_example_once_in_order_and_in_nested_batches() -> None:
    batches = [({"x": torch.arange(a, b)}, (torch.arange(a, b),)) for a, b in ((0, 5), (5, 12))]
    found = list(groups_of(4, batches, torch.device("cpu")))
    assert [[len(t[0]) for _, t in group] for group in found] == [[4], [1, 3], [4]]
    assert torch.cat([x["x"] for group in found for x, _ in group]).tolist() == list(range(12))


def test_local_entropy_of_a_quadratic_is_half_a_log_determinant() -> None:
    model, gamma = at_zero(extra=1.0), 5.0
    expected = -0.5 * float(torch.logdet(torch.eye(6).double() + model.matrix / gamma))
    found = sharpness.local_entropy(
        model, as_is, NOTHING, gamma=gamma, num_chains=8, num_nodes=5, num_steps=15
    )
    assert found.standard_error < 0.1 * abs(expected)
    assert abs(found.value - expected) < 4 * found.standard_error
    assert found.num_gradients == 1 + 8 * (1 + 5 * 25)


def test_local_entropy_knows_a_slope_and_a_temperature() -> None:
    """With a slope b it gains `b' (A + gamma)^-1 b / 2`, at temperature 1."""
    model, gamma, temperature = at_zero(extra=2.0), 20.0, 0.5
    with torch.no_grad():
        model.slope.copy_(torch.linspace(-2, 2, 6))
    matrix, slope = model.matrix / temperature, model.slope / temperature
    shifted = matrix + gamma * torch.eye(6)
    expected = -0.5 * torch.logdet(shifted / gamma) + slope @ torch.linalg.solve(shifted, slope) / 2
    found = sharpness.local_entropy(
        model, as_is, NOTHING, gamma=gamma, temperature=temperature, num_chains=8, num_steps=15
    )
    assert abs(found.value - float(expected)) < 4 * found.standard_error
    assert found.standard_error < 0.3


def test_quadrature_of_the_local_entropy_is_fine_enough() -> None:
    nodes, shares = _quadrature(6)
    assert nodes == sorted(nodes)
    for ratio in (0.01, 1.0, 100.0, 1e4):  # curvature over gamma
        found = sum(w * ratio / (1 + b * ratio) for b, w in zip(nodes, shares, strict=True))
        assert found == pytest.approx(math.log1p(ratio), rel=0.02)


def test_adaptive_trace_is_that_of_the_dense_hessian_and_ignores_layer_scales() -> None:
    model, batches, loss = relu_network().double(), examples(12, 5), functional.cross_entropy
    names = [name for name, _ in model.named_parameters()]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weights = landscape.flatten(landscape.trainable(model))

    def total(flat: Tensor) -> Tensor:
        parts = landscape.unflatten(flat, landscape.trainable(model))
        weights = dict(zip(names, parts, strict=True))
        return loss(torch.func.functional_call(model, weights, (inputs,)), targets)

    dense = torch.func.hessian(total)(weights)
    expected = float((weights**2 * dense.diagonal()).sum())
    found = sharpness.adaptive_trace(model, loss, batches, num_probes=300)
    assert abs(found.value - expected) < 4 * found.standard_error
    assert found.standard_error < 0.1 * abs(expected)
    assert found.num_products == 300
    one, other = (
        sharpness.adaptive_trace(m, loss, batches, num_probes=6).value
        for m in (model, rescaled(model))
    )
    assert one == pytest.approx(other, rel=1e-8)


def test_relative_flatness_of_a_linear_regression_is_its_closed_form() -> None:
    """`H = 2/outputs E[x x']` for every output, none between them: `2/outputs |W|^2 E|x|^2`."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False).double()
    inputs = torch.randn(40, 5).double()
    batches = [(inputs[:30], torch.randn(30, 3).double()), (inputs[30:], torch.randn(10, 3))]
    expected = 2 / 3 * float(model.weight.detach().pow(2).sum() * inputs.pow(2).sum(1).mean())
    found = sharpness.relative_flatness(model, functional.mse_loss, batches)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert found.standard_error == 0.0
    assert found.num_products == 15
    sampled = sharpness.relative_flatness(model, functional.mse_loss, batches, num_probes=200)
    assert abs(sampled.value - expected) < 4 * sampled.standard_error


@pytest.mark.parametrize("layer", ["2", "4"])
def test_relative_flatness_is_its_definition_and_ignores_layer_scales(layer: str) -> None:
    model, batches, loss = relu_network().double(), examples(12, 5), functional.cross_entropy
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weight = model.get_parameter(f"{layer}.weight")

    def total(value: Tensor) -> Tensor:
        found = torch.func.functional_call(model, {f"{layer}.weight": value}, (inputs,))
        return loss(found, targets)

    dense = torch.func.hessian(total)(weight.detach()).detach()  # [out, in, out, in]
    gram = weight.detach() @ weight.detach().T
    expected = 0.0
    for s in range(len(gram)):
        for t in range(len(gram)):
            expected += float(gram[s, t] * dense[s, :, t].trace())
    found = sharpness.relative_flatness(model, loss, batches, layer=layer)
    assert found.value == pytest.approx(expected, rel=1e-9)
    twin = sharpness.relative_flatness(rescaled(model), loss, batches, layer=layer)
    assert twin.value == pytest.approx(expected, rel=1e-8)


def test_value_and_gradient_agrees_with_the_grouped_gradient() -> None:
    model, batches, loss = relu_network().double(), examples(*[3] * 10), functional.cross_entropy
    losses, slope = value_and_gradient(model, loss, batches)
    grouped = landscape.passes.gradient(model, loss, batches)
    assert torch.allclose(slope, grouped.total, rtol=1e-12, atol=1e-14)
    assert torch.equal(losses.values, grouped.losses.values)


FUNCTIONS: dict[str, Callable[..., object]] = {
    "worst_case": lambda m, f, b: sharpness.worst_case(m, f, b, num_steps=3),
    "epsilon_box": lambda m, f, b: sharpness.epsilon_box(m, f, b, num_steps=3),
    "noise_sigma": lambda m, f, b: sharpness.noise_sigma(m, f, b, rise=0.01, num_draws=2),
    "m_sharpness": lambda m, f, b: sharpness.m_sharpness(m, f, b, m=4),
    "local_entropy": lambda m, f, b: sharpness.local_entropy(
        m, f, b, num_chains=1, num_nodes=2, num_steps=1
    ),
    "adaptive_trace": lambda m, f, b: sharpness.adaptive_trace(m, f, b, num_probes=2),
    "relative_flatness": sharpness.relative_flatness,
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_model_is_left_bit_identical(name: str, fails: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model = model.double().train()
    batches = examples(8, 3)
    functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    calls = itertools.count()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if next(calls) == 3 and fails:
            raise FloatingPointError("loss")
        return functional.cross_entropy(output, target)

    def tensors() -> list[Tensor]:
        found = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        return [tensor.detach().clone() for tensor in found]

    before, state = tensors(), torch.get_rng_state()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    if fails:
        with pytest.raises(FloatingPointError):
            FUNCTIONS[name](model, loss, batches)
    else:
        FUNCTIONS[name](model, loss, batches)
    assert all(same_bits(a, b) for a, b in zip(before, tensors(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: sharpness.worst_case(m, as_is, d, rho=0.0), "radius must be above 0"),
        (lambda m, d: sharpness.worst_case(m, as_is, d, norm="l1"), "norm must be l2 or linf"),
        (lambda m, d: sharpness.worst_case(m, as_is, d, num_steps=1), "num_steps must be"),
        (lambda m, d: sharpness.m_sharpness(m, as_is, d, m=0), "m must be at least 1"),
        (lambda m, d: sharpness.noise_sigma(m, as_is, d, rise=0.0), "rise, tolerance and start"),
        (lambda m, d: sharpness.local_entropy(m, as_is, d, gamma=0.0), "gamma and temperature"),
        (lambda m, d: sharpness.local_entropy(m, as_is, d, num_nodes=1), "2 nodes"),
        (lambda m, d: sharpness.relative_flatness(m, as_is, d), "no linear layer"),
    ],
)
def test_values_out_of_range_are_refused(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Quadratic(), NOTHING)
