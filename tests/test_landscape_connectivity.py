"""Barriers, trained curves and permutations between two networks."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from test_landscape_sharpness import NOTHING, as_is
from test_landscape_surface import Attention, ConvNet, conv_net, images, seeded, tokens
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape.connectivity import Curve, along
from llp.landscape.parameters import (
    evaluation_state,
    exact_arithmetic,
    flatten,
    same_bits,
    trainable,
)
from llp.landscape.passes import batch_losses


def own_loss(model: nn.Module, batches) -> float:
    with evaluation_state(model), exact_arithmetic(torch.device("cpu")):
        return batch_losses(model, functional.cross_entropy, batches).mean


def pair(seed: int = 0) -> tuple[ConvNet, ConvNet]:
    first, second = conv_net(), conv_net()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*second.parameters(), second.norm.running_mean):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return first, second


class Ring(nn.Module):
    """A ring of minima of radius 1 with a hill of height 1 in the middle."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        start = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        self.theta = nn.Parameter(start)

    def forward(self, _: Tensor) -> Tensor:
        return (1 - self.theta.square().sum()) ** 2


@pytest.mark.parametrize("kind", ["bezier", "chain"])
def test_a_curve_is_its_formula_and_ends_at_its_ends_to_the_bit(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 7, generator=generator)
    curve = Curve(points, kind)
    assert same_bits(curve.at(0.0), points[0])
    assert same_bits(curve.at(1.0), points[-1])
    for t in (0.1, 0.35, 0.9):
        a, b, c, d = points.double()
        if kind == "bezier":
            expected = (
                (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d
            )
        else:
            piece = int(3 * t)
            expected = torch.lerp(points[piece], points[piece + 1], 3 * t - piece).double()
        assert torch.allclose(curve.at(t).double(), expected, atol=1e-6)
        assert sum(curve.weights(t)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="t must be from 0 to 1"):
        curve.at(1.5)


@pytest.mark.parametrize("kind", ["bezier", "chain"])
@pytest.mark.parametrize("t", [0.0, 0.2, 0.55, 1.0])
def test_the_derivative_of_a_curve_is_its_difference_quotient(kind: str, t: float) -> None:
    points = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).double()
    curve, step = Curve(points, kind), 1e-6
    low, high = max(0.0, t - step), min(1.0, t + step)
    expected = (curve.at(high) - curve.at(low)) / (high - low)
    assert torch.allclose(curve.derivative(t), expected, atol=1e-4)


def test_the_length_of_a_curve() -> None:
    corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]).double()
    assert Curve(corner, "chain").length() == 7.0
    assert Curve(corner[[0, 2]], "bezier").length() == 5.0
    bent = Curve(corner, "bezier")
    pieces = torch.stack([bent.at(k / 4000) for k in range(4001)])
    expected = float((pieces[1:] - pieces[:-1]).norm(dim=1).sum())
    assert bent.length() == pytest.approx(expected, rel=1e-6)
    assert 5.0 < bent.length() < 7.0


@pytest.mark.parametrize("statistics", [False, True])
def test_the_ends_of_a_path_are_the_two_models_to_the_bit(statistics: bool) -> None:
    first, second = pair()
    batches = images(torch.float32, 9, 4)
    found = landscape.linear_barrier(
        first, second, functional.cross_entropy, batches, num_points=5,
        statistics=batches if statistics else None,
    )  # fmt: skip
    assert float(found.loss[0]) == own_loss(first, batches)
    assert float(found.loss[-1]) == own_loss(second, batches)
    assert found.length == pytest.approx(found.chord)
    assert found.t.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_points_between_have_the_weights_and_statistics_between() -> None:
    first, second = pair()
    batches = images(torch.float64, 9, 4)
    first, second = first.double(), second.double()
    plain = landscape.linear_barrier(first, second, functional.cross_entropy, batches, num_points=5)
    anew = landscape.linear_barrier(
        first, second, functional.cross_entropy, batches, num_points=5, statistics=batches[:1]
    )
    middle = copy.deepcopy(first).eval()
    with torch.no_grad():
        for mixed, one, other in zip(
            middle.parameters(), first.parameters(), second.parameters(), strict=True
        ):
            mixed.copy_(0.75 * one + 0.25 * other)
        middle.norm.running_mean.copy_(
            0.75 * first.norm.running_mean + 0.25 * second.norm.running_mean
        )
    assert float(plain.loss[1]) == pytest.approx(own_loss(middle, batches), rel=1e-12)
    convolved = middle.first(batches[0][0]).detach()
    middle.norm.running_mean.copy_(convolved.mean((0, 2, 3)))
    middle.norm.running_var.copy_(convolved.var((0, 2, 3)))
    assert float(anew.loss[1]) == pytest.approx(own_loss(middle, batches), rel=1e-12)
    assert abs(anew.loss[1] - plain.loss[1]) > 1e-3


def test_a_convex_loss_has_no_barrier_and_a_hill_has_its_height() -> None:
    data = [(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3)]
    torch.manual_seed(0)
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    found = landscape.linear_barrier(first, second, functional.cross_entropy, data)
    assert found.barrier == 0.0
    hill = landscape.linear_barrier(Ring(0.0), Ring(math.pi), as_is, NOTHING)
    assert hill.barrier == pytest.approx(1.0)
    assert hill.barrier_at == 0.5
    assert hill.chord == pytest.approx(2.0)
    uneven = landscape.linear_barrier(Slope(0.0), Slope(2.0), as_is, NOTHING, num_points=5)
    assert uneven.loss.tolist() == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert uneven.barrier == pytest.approx(0.0, abs=1e-15)


class Slope(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        return self.theta[0]


@pytest.mark.parametrize(("kind", "num_bends"), [("bezier", 1), ("bezier", 3), ("chain", 3)])
def test_a_trained_curve_goes_round_the_hill(kind: str, num_bends: int) -> None:
    first, second = Ring(0.0), Ring(0.8 * math.pi)
    found = landscape.connect(
        first, second, as_is, NOTHING, kind=kind, num_bends=num_bends, num_epochs=300,
        learning_rate=0.05,
    )  # fmt: skip
    straight = landscape.linear_barrier(first, second, as_is, NOTHING)
    assert straight.barrier > 0.8
    assert found.path.barrier < 0.15
    assert found.path.length > 1.15 * found.path.chord
    assert found.path.mean_loss < 0.1 < straight.mean_loss
    assert found.training_losses[-1] < found.training_losses[0]
    assert same_bits(found.curve.at(0.0), first.theta.detach())
    assert same_bits(found.curve.at(1.0), second.theta.detach())
    assert found.path.kind == kind


def test_a_straight_start_is_not_the_answer() -> None:
    """A bend put at the average of the ends and left there is linear interpolation."""
    first, second = Ring(0.0), Ring(0.8 * math.pi)
    found = landscape.connect(first, second, as_is, NOTHING, num_epochs=100)
    average = (first.theta + second.theta).detach() / 2
    assert float((found.curve.points[1] - average).norm()) > 0.3


CASES = {
    "convolutions and batch normalisation": (pair, lambda: images(torch.float32, 8, 8, 5)),
    "attention and tied weights": (
        lambda: (seeded(Attention), other_attention()),
        lambda: tokens(8, 8),
    ),
}


def other_attention() -> Attention:
    torch.manual_seed(1)
    return Attention()


@pytest.mark.parametrize("case", CASES)
def test_any_module_can_be_connected_without_being_rewritten(case: str) -> None:
    make, data = CASES[case]
    first, second = make()
    first.train()
    batches = data()
    before = [
        tensor.detach().clone()
        for model in (first, second)
        for tensor in (*model.parameters(), *model.buffers())
    ]
    state = torch.get_rng_state()
    epochs: list[int] = []
    found = landscape.connect(
        first, second, functional.cross_entropy, batches, num_epochs=25, learning_rate=0.1,
        num_points=5, on_epoch=lambda epoch, loss: epochs.append(epoch),
    )  # fmt: skip
    straight = landscape.linear_barrier(
        first, second, functional.cross_entropy, batches, num_points=5, statistics=batches
    )
    assert found.path.loss[2] < straight.loss[2]
    assert found.path.mean_loss < straight.mean_loss
    assert epochs == list(range(25))
    after = [t for model in (first, second) for t in (*model.parameters(), *model.buffers())]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert first.training
    again = landscape.connect(
        first, second, functional.cross_entropy, batches, num_epochs=25, learning_rate=0.1,
        num_points=5,
    )  # fmt: skip
    assert torch.equal(again.curve.points, found.curve.points)
    assert float(found.path.loss[0]) == own_loss(first, batches)
    assert float(found.path.loss[-1]) == own_loss(second, batches)


def test_the_gradient_of_a_bend_is_its_share_of_the_gradient_at_t() -> None:
    """One step of training against the chain rule done by hand."""
    first, second = Ring(0.0), Ring(0.8 * math.pi)
    generator = torch.Generator().manual_seed(7)
    found = landscape.connect(
        first, second, as_is, NOTHING[:1], num_epochs=1, learning_rate=0.1, momentum=0.0,
        generator=generator,
    )  # fmt: skip
    twin = torch.Generator().manual_seed(7)
    torch.randint(2**31, (), generator=twin)
    t = float(torch.rand((), generator=twin, dtype=torch.float64))
    ends = [model.theta.detach() for model in (first, second)]
    bend = torch.lerp(ends[0], ends[1], 0.5)
    point = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]
    gradient = -4 * (1 - point @ point) * point
    expected = bend - 0.1 * 2 * t * (1 - t) * gradient
    assert torch.allclose(found.curve.points[1], expected, rtol=1e-12)


def test_a_curve_that_diverges_says_so() -> None:
    with pytest.raises(FloatingPointError, match="use a smaller learning_rate than 100"):
        landscape.connect(Ring(0.0), Ring(3.0), as_is, NOTHING, num_epochs=50, learning_rate=100.0)


def test_a_path_of_infinite_losses_has_no_finite_barrier() -> None:
    class Wall(Slope):
        def forward(self, _: Tensor) -> Tensor:
            return 1 / (self.theta[0] - 1)

    found = landscape.linear_barrier(Wall(0.0), Wall(2.0), as_is, NOTHING, num_points=3)
    assert math.isinf(found.barrier)
    assert found.barrier_at == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bends": 0}, "num_bends and num_epochs"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"kind": "spline"}, "kind must be bezier or chain"),
        ({"num_points": 1, "num_epochs": 1}, "num_points must be at least 2"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landscape.connect(Ring(0.0), Ring(1.0), as_is, NOTHING, **options)


def test_models_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(3, 5\)"):
        landscape.linear_barrier(nn.Linear(4, 3), nn.Linear(5, 3), as_is, NOTHING)


def conv_chain(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(5 * 9, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 3),
    ).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def shuffled(model: nn.Sequential) -> nn.Sequential:
    """The same function with its hidden units in another order, done by hand."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    one, two, three = (torch.randperm(n, generator=generator) for n in (6, 5, 8))
    with torch.no_grad():
        first, norm = twin[0][0], twin[0][1]
        for tensor in (
            first.weight, first.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var,
        ):  # fmt: skip
            tensor.copy_(tensor[one].clone())
        twin[2].weight.copy_(twin[2].weight[two][:, one].clone())
        inputs = torch.cat([torch.arange(9) + 9 * int(unit) for unit in two])
        twin[5].weight.copy_(twin[5].weight[three][:, inputs].clone())
        for tensor in (
            twin[5].bias, twin[6].weight, twin[6].bias, twin[6].running_mean, twin[6].running_var,
        ):  # fmt: skip
            tensor.copy_(tensor[three].clone())
        twin[8].weight.copy_(twin[8].weight[:, three].clone())
    return twin


def test_alignment_undoes_a_permutation_exactly() -> None:
    model, batch = conv_chain(0), images(torch.float64, 11)[0][0]
    twin = shuffled(model)
    assert torch.allclose(twin(batch), model(batch), atol=1e-12)
    found = landscape.align(model, twin)
    assert found.distance_before > 1.0
    assert found.distance_after == 0.0
    state = found.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    barrier = landscape.linear_barrier(
        model, found.model, functional.cross_entropy, images(torch.float64, 11)
    )
    assert barrier.barrier == pytest.approx(0.0, abs=1e-14)
    assert [len(order) for order in found.permutations] == [6, 5, 8]


def test_alignment_keeps_the_function_and_comes_closer() -> None:
    first, second = conv_chain(0), conv_chain(1)
    batch = images(torch.float64, 11)[0][0]
    before = {key: value.clone() for key, value in second.state_dict().items()}
    found = landscape.align(first, second)
    assert torch.allclose(found.model(batch), second(batch), atol=1e-12)
    assert found.distance_after < found.distance_before
    assert all(torch.equal(before[key], value) for key, value in second.state_dict().items())
    original = copy.deepcopy(second)
    for index, order in enumerate(found.permutations):
        assert sorted(order) == list(range(len(order))), index
    rows = original[8].weight.detach()[:, list(found.permutations[-1])]
    assert torch.equal(rows, found.model[8].weight.detach())


def test_each_layers_permutation_is_the_best_of_all() -> None:
    """Brute force over the permutations of a layer, the others as found."""
    import itertools

    torch.manual_seed(0)
    first, second = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        for _ in range(2)
    )
    found = landscape.align(first, second)
    best = found.distance_after
    for order in itertools.permutations(range(4)):
        for into, out in ((0, 2), (2, 4)):
            twin = copy.deepcopy(found.model)
            with torch.no_grad():
                twin[into].weight.copy_(found.model[into].weight[list(order)])
                twin[into].bias.copy_(found.model[into].bias[list(order)])
                twin[out].weight.copy_(found.model[out].weight[:, list(order)])
            parts = zip(first.parameters(), twin.parameters(), strict=True)
            distance = math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in parts))
            assert distance >= best - 1e-6


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ConvNet(), "ConvNet cannot be aligned"),
        (nn.Sequential(nn.Linear(3, 3)), "no hidden layer"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 3)), "one group"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), "not the outputs of"),
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(4, 2)), "must follow"),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "LayerNorm cannot be"),
    ],
)
def test_structures_that_cannot_be_aligned_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landscape.align(model, copy.deepcopy(model))


def test_any_curve_can_be_measured() -> None:
    first, second = Ring(0.0), Ring(math.pi / 2)
    corner = torch.stack([first.theta.detach(), torch.ones(2).double(), second.theta.detach()])
    found = along(Curve(corner, "chain"), first, second, as_is, NOTHING, num_points=5)
    assert found.loss.tolist() == pytest.approx([0.0, 0.0625, 1.0, 0.0625, 0.0], abs=1e-12)
    assert found.length == pytest.approx(2.0)
    assert np.isclose(found.mean_loss, 0.28125)
    assert found.to_arrays()["t"].shape == (5,)
    assert flatten(trainable(first)).tolist() == [1.0, 0.0]
