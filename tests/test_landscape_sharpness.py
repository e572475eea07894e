"""Sharpness on quadratics of known curvature, and its invariances."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape.parameters import same_bits

sharpness = landscape.sharpness


class Quadratic(nn.Module):
    """`theta' A theta / 2 + b' theta`, whatever the input."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.register_buffer("matrix", root @ root.T - torch.eye(size).double())
        self.register_buffer("slope", torch.randn(size, generator=generator).double())
        self.theta = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        return self.theta @ self.matrix @ self.theta / 2 + self.slope @ self.theta


def as_is(output: Tensor, _: Tensor) -> Tensor:
    return output


NOTHING = [(torch.zeros(3, 1), torch.zeros(3)), (torch.zeros(1, 1), torch.zeros(1))]


def relu_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def rescaled(model: nn.Sequential) -> nn.Sequential:
    """The same function with layers scaled by 4 and 1/4, and biases accordingly."""
    twin = relu_network().to(next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin[0].weight *= 4
        twin[0].bias *= 4
        twin[2].weight *= 0.25
    return twin


def examples(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 5, generator=generator).double(),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def test_sam_on_a_quadratic_is_its_closed_form() -> None:
    model, rho = Quadratic(), 0.3
    gradient = model.matrix @ model.theta.detach() + model.slope
    norm = gradient.norm()
    expected = rho * norm + rho**2 / 2 * (gradient @ model.matrix @ gradient) / norm**2
    estimate = sharpness.sam(model, as_is, NOTHING, rho=rho)
    assert estimate.value == pytest.approx(float(expected), rel=1e-12)
    assert estimate.standard_error == pytest.approx(0.0, abs=1e-12)  # every batch is the same
    assert estimate.num_examples == 4
    assert estimate.gradient_equivalents == pytest.approx(4 / 3)


def test_asam_on_a_quadratic_is_its_closed_form() -> None:
    model, rho, eta = Quadratic(), 0.3, 0.1
    theta = model.theta.detach()
    gradient = model.matrix @ theta + model.slope
    scale = theta.abs() + eta
    step = rho * scale**2 * gradient / (scale * gradient).norm()
    expected = gradient @ step + step @ model.matrix @ step / 2
    estimate = sharpness.asam(model, as_is, NOTHING, rho=rho, eta=eta)
    assert estimate.value == pytest.approx(float(expected), rel=1e-12)
    assert float((step / scale).norm()) == pytest.approx(rho)


def test_asam_step_is_the_steepest_on_its_ellipsoid() -> None:
    model, rho = relu_network().double(), 1e-4  # so small that the loss is linear
    batches = examples(30)
    loss = functional.cross_entropy
    best = sharpness.asam(model, loss, batches, rho=rho).value
    weights = landscape.flatten(landscape.trainable(model))
    inputs, targets = batches[0]
    with torch.no_grad():
        base = float(loss(model(inputs), targets))
        for _ in range(50):
            direction = torch.randn_like(weights)
            step = rho * weights.abs() * direction / direction.norm()
            with landscape.perturbed(model, step):
                assert float(loss(model(inputs), targets)) - base < best


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_asam_ignores_layer_scales_and_sam_does_not(rho: float) -> None:
    model = relu_network().double()
    twin, batches, loss = rescaled(model), examples(20, 7), functional.cross_entropy
    assert torch.allclose(model(batches[0][0]), twin(batches[0][0]), rtol=1e-12)
    one, other = (sharpness.asam(m, loss, batches, rho=rho).value for m in (model, twin))
    assert one == pytest.approx(other, rel=1e-10)
    plain, scaled = (sharpness.sam(m, loss, batches, rho=rho).value for m in (model, twin))
    assert abs(plain - scaled) > 0.05 * plain


def test_relative_noise_ignores_layer_scales_and_additive_noise_does_not() -> None:
    model = relu_network().double()
    twin, batches, loss = rescaled(model), examples(20, 7), functional.cross_entropy
    relative = [sharpness.noise(m, loss, batches, sigma=0.1).value for m in (model, twin)]
    assert relative[0] == pytest.approx(relative[1], rel=1e-9)
    additive = [
        sharpness.noise(m, loss, batches, sigma=0.1, relative=False).value for m in (model, twin)
    ]
    assert abs(additive[0] - additive[1]) > 0.05 * additive[0]


@pytest.mark.parametrize("relative", [True, False])
def test_mean_rise_under_noise_on_a_quadratic(relative: bool) -> None:
    model, sigma = Quadratic(), 0.2
    estimate = sharpness.noise(model, as_is, NOTHING, sigma=sigma, num_draws=400, relative=relative)
    scales = model.theta.detach() ** 2 if relative else torch.ones(6).double()
    expected = sigma**2 / 2 * float(model.matrix.diagonal() @ scales)
    assert abs(estimate.value - expected) < 4 * estimate.standard_error
    # Isserlis: the variance of z' M z is 2 |M|_F^2
    root = scales.sqrt()
    spread = sigma**2 / 2 * math.sqrt(2 * float(((root[:, None] * model.matrix * root) ** 2).sum()))
    assert estimate.standard_error == pytest.approx(spread / math.sqrt(400), rel=0.2)
    assert estimate.num_forwards == 801


def test_antithetic_pairs_cancel_a_linear_loss() -> None:
    model = nn.Linear(5, 1).double()
    estimate = sharpness.noise(model, lambda output, _: output.mean(), examples(10))
    assert estimate.value == pytest.approx(0.0, abs=1e-15)


def test_one_seed_gives_every_model_the_same_noise() -> None:
    batches, loss = examples(10), functional.cross_entropy
    values = [
        sharpness.noise(
            relu_network().double(), loss, batches, generator=torch.Generator().manual_seed(seed)
        ).value
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


def test_gradient_norm_is_that_of_the_whole_data_and_its_error_that_of_the_groups() -> None:
    model, loss = relu_network().double(), functional.cross_entropy
    sizes = [5] * 11 + [2]  # more batches than groups, and a ragged end
    batches = examples(*sizes)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    grads = torch.autograd.grad(loss(model(inputs), targets), list(model.parameters()))
    total = torch.cat([grad.flatten() for grad in grads])
    estimate = sharpness.gradient_norm(model, loss, batches)
    assert estimate.value == pytest.approx(float(total.norm()), rel=1e-12)
    projections, weights = [], []
    for group in range(8):
        rows = [batches[i] for i in range(len(batches)) if i % 8 == group]
        x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
        part = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        projections.append(torch.cat([g.flatten() for g in part]) @ total / total.norm())
        weights.append(len(y) / sum(sizes))
    share, values = torch.tensor(weights, dtype=torch.float64), torch.stack(projections)
    assert float(share @ values) == pytest.approx(estimate.value)
    expected = math.sqrt(8 / 7 * float((share**2 * (values - estimate.value) ** 2).sum()))
    assert estimate.standard_error == pytest.approx(expected, rel=1e-9)


def test_standard_error_of_sam_is_that_of_the_batch_rises() -> None:
    model, loss, rho = relu_network().double(), functional.cross_entropy, 0.1
    batches = examples(*[6] * 5)
    estimate = sharpness.sam(model, loss, batches, rho=rho)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    grads = torch.autograd.grad(loss(model(inputs), targets), list(model.parameters()))
    step = torch.cat([grad.flatten() for grad in grads])
    step = rho * step / step.norm()
    with torch.no_grad():
        base = torch.stack([loss(model(x), y) for x, y in batches])
        with landscape.perturbed(model, step):
            rises = torch.stack([loss(model(x), y) for x, y in batches]) - base
    assert estimate.value == pytest.approx(float(rises.mean()), rel=1e-9)
    assert estimate.standard_error == pytest.approx(float(rises.std()) / math.sqrt(5), rel=1e-9)


def test_one_batch_has_no_standard_error() -> None:
    model, batches = relu_network().double(), examples(9)
    assert math.isnan(sharpness.sam(model, functional.cross_entropy, batches).standard_error)


def test_at_a_stationary_point_there_is_no_ascent() -> None:
    model = Quadratic()
    with torch.no_grad():
        model.theta.zero_()
        model.slope.zero_()
    assert sharpness.sam(model, as_is, NOTHING).value == 0.0
    assert sharpness.asam(model, as_is, NOTHING).value == 0.0


FUNCTIONS: dict[str, Callable[..., object]] = {
    "sam": sharpness.sam,
    "asam": sharpness.asam,
    "noise": sharpness.noise,
    "gradient_norm": sharpness.gradient_norm,
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_model_is_left_bit_identical(name: str, fails: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model = model.double().train()
    batches = examples(8, 3)
    functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    calls = iter(range(1))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if fails and next(calls, None) is None:
            raise FloatingPointError("loss")
        return functional.cross_entropy(output, target)

    def tensors() -> list[Tensor]:
        found = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        return [tensor.detach().clone() for tensor in found]

    before, state = tensors(), torch.get_rng_state()
    if fails:
        with pytest.raises(FloatingPointError):
            FUNCTIONS[name](model, loss, batches)
    else:
        FUNCTIONS[name](model, loss, batches)
    assert all(same_bits(a, b) for a, b in zip(before, tensors(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: sharpness.sam(m, as_is, d, rho=0.0), "rho must be above 0"),
        (lambda m, d: sharpness.asam(m, as_is, d, eta=-1.0), "eta must not be negative"),
        (lambda m, d: sharpness.noise(m, as_is, d, sigma=0.0), "sigma must be above 0"),
        (lambda m, d: sharpness.noise(m, as_is, d, num_draws=0), "num_draws must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Quadratic(), NOTHING)
