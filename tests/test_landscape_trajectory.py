"""The path of a training: components against a plain SVD, true losses, distances."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from test_landscape_sharpness import examples, relu_network
from test_landscape_surface import conv_net, images
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape import trajectory as path_of
from llp.landscape.parameters import evaluation_state, flatten, same_bits, trainable
from llp.landscape.passes import batch_losses
from llp.landscape.trajectory import principal_components


def trained(model: nn.Module, batches, num_steps: int = 12) -> list[dict[str, Tensor]]:
    """State dicts along a training, the model itself at the last one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8)
    states = []
    model.train()
    for _ in range(num_steps):
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        for inputs, targets in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    states.append({key: value.clone() for key, value in model.state_dict().items()})
    return states


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    model = nn.Linear(30, 4).double()
    generator = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(9, 3, generator=generator).double()
        @ torch.randn(3, 124, generator=generator).double()
        + 5.0
    )
    rows += 0.01 * torch.randn(9, 124, generator=generator).double()
    found = principal_components(model, list(rows), count=3)
    _, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for got, wanted in zip(found.vectors, right, strict=False):
        assert abs(abs(float(got @ wanted)) - 1) < 1e-10
    assert found.explained == pytest.approx((values**2 / (values**2).sum())[:3].tolist())
    assert found.singular_values[:8] == pytest.approx(values[:8].numpy(), rel=1e-6)
    gram = found.vectors @ found.vectors.T
    assert torch.allclose(gram, torch.eye(3).double(), atol=1e-12)
    first = found.vectors @ (rows[0] - rows.mean(0))
    assert (first >= 0).all()


def test_components_do_not_depend_on_how_the_weights_are_cut_into_blocks(monkeypatch) -> None:
    model = nn.Linear(30, 4).double()
    rows = list(torch.randn(6, 124, generator=torch.Generator().manual_seed(0)).double())
    whole = principal_components(model, rows)
    monkeypatch.setattr(sys.modules["llp.landscape.trajectory"], "_COLUMNS", 17)
    cut = principal_components(model, rows)
    assert torch.allclose(whole.vectors, cut.vectors, atol=1e-12)


def test_a_path_has_its_true_losses_and_its_distance_from_the_plane() -> None:
    batches = images(torch.float64, 9, 5)
    model = conv_net(torch.float64)
    states = trained(model, batches)
    found = landscape.trajectory(model, functional.cross_entropy, batches, states)
    origin = flatten(trainable(model))
    rows = found.directions.vectors
    for index, state in enumerate(states):
        twin = conv_net(torch.float64)
        twin.load_state_dict(state)
        with evaluation_state(twin):
            expected = batch_losses(twin, functional.cross_entropy, batches).mean
        assert found.loss[index] == pytest.approx(expected, rel=1e-12)
        step = flatten(trainable(twin)) - origin
        assert found.coordinates[index] == pytest.approx((rows @ step).numpy(), abs=1e-10)
        rest = step - rows.T @ (rows @ step)
        assert found.out_of_plane[index] == pytest.approx(float(rest.norm()), abs=1e-9)
        assert found.distance[index] == pytest.approx(float(step.norm()), abs=1e-12)
    assert found.coordinates[-1] == pytest.approx([0.0, 0.0], abs=1e-15)
    assert found.out_of_plane[-1] < 1e-12
    assert found.plane_loss[-1] == found.loss[-1]
    assert found.explained == found.directions.values
    assert 0 < sum(found.explained) <= 1


def test_the_loss_under_a_projected_point_is_not_the_loss_of_the_checkpoint() -> None:
    """Why a path needs its true losses: here the plane misses what the path did."""
    model, batches = relu_network().double(), examples(20, 7)
    generator = torch.Generator().manual_seed(0)
    base = flatten(trainable(model))
    steps = torch.randn(12, len(base), generator=generator).double().cumsum(0)
    walk = [base + 0.1 * step for step in steps.flip(0)] + [base]
    found = landscape.trajectory(model, functional.cross_entropy, batches, walk)
    assert sum(found.explained) > 0.5  # a random walk looks two-dimensional
    assert found.out_of_plane.max() > 0.3 * found.distance.max()
    assert np.abs(found.loss - found.plane_loss).max() > 0.05 * found.loss.max()


def test_buffers_of_the_checkpoints_are_used_and_the_model_is_left_alone() -> None:
    batches = images(torch.float64, 9)
    model = conv_net(torch.float64)
    states = trained(model, batches, 4)
    model.train()
    before = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    vectors = [flatten([state[name] for name, _ in model.named_parameters()]) for state in states]
    with_buffers = landscape.trajectory(model, functional.cross_entropy, batches, states)
    without = landscape.trajectory(model, functional.cross_entropy, batches, vectors)
    assert with_buffers.coordinates == pytest.approx(without.coordinates, abs=1e-9)
    assert np.abs(with_buffers.loss[0] - without.loss[0]) > 1e-4
    after = [*model.parameters(), *model.buffers()]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert all(module.training for module in model.modules())


def test_the_extent_holds_the_path_and_the_model() -> None:
    batches = images(torch.float64, 9)
    model = conv_net(torch.float64)
    states = trained(model, batches, 5)
    found = landscape.trajectory(model, functional.cross_entropy, batches, states)
    for column, (low, high) in zip(found.coordinates.T, found.extent(), strict=True):
        assert low < min(0.0, column.min()) <= max(0.0, column.max()) < high
    plane = landscape.surface(
        model, functional.cross_entropy, batches, directions=found.directions,
        extent=found.extent(), resolution=3,
    )  # fmt: skip
    assert plane.x[0] == found.extent()[0][0]
    assert plane.kind == "trajectory"


def test_a_path_can_be_drawn_in_another_plane_of_any_lengths() -> None:
    model, batches = relu_network().double(), examples(9)
    size = len(flatten(trainable(model)))
    rows = torch.zeros(2, size).double()
    rows[0, 3], rows[1, 5] = 2.0, 0.5
    plane = landscape.directions.make(model, rows)
    base = flatten(trainable(model))
    away = base.clone()
    away[[3, 5, 7]] += torch.tensor([1.0, 1.0, 3.0]).double()
    found = landscape.trajectory(
        model, functional.cross_entropy, batches, [away, base], directions=plane
    )
    assert found.coordinates[0].tolist() == pytest.approx([0.5, 2.0])
    assert found.out_of_plane[0] == pytest.approx(3.0)
    assert found.distance[0] == pytest.approx(math.sqrt(11))
    slanted = landscape.directions.make(model, torch.stack([rows[0], rows[0] + rows[1]]))
    with pytest.raises(ValueError, match="two orthogonal directions"):
        landscape.trajectory(
            model, functional.cross_entropy, batches, [away, base], directions=slanted
        )


def test_too_few_or_equal_checkpoints_are_refused() -> None:
    model = nn.Linear(3, 2).double()
    rows = [torch.arange(8.0).double()] * 4
    with pytest.raises(ValueError, match="need at least 3 checkpoints, not 2"):
        principal_components(model, rows[:2])
    with pytest.raises(ValueError, match="do not span 2 directions"):
        principal_components(model, rows)
    with pytest.raises(ValueError, match="do not span 2 directions"):
        principal_components(model, [row * k for k, row in enumerate(rows)])


def test_single_precision_components_are_as_good_as_double() -> None:
    model = nn.Linear(30, 4)
    generator = torch.Generator().manual_seed(0)
    rows = 100 + 1e-2 * torch.randn(6, 124, generator=generator).cumsum(0)  # far from 0
    found = path_of(
        model, lambda output, _: output.mean(), [(torch.ones(2, 30), torch.zeros(2))], list(rows)
    )
    wide = rows.double()
    _, _, right = torch.linalg.svd(wide - wide.mean(0), full_matrices=False)
    for got, wanted in zip(found.directions.vectors.double(), right, strict=False):
        assert abs(float(got @ wanted)) == pytest.approx(1, abs=1e-6)
    assert found.directions.cosine < 1e-6
