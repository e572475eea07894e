"""Every row of the table of averagings lives through the same life cycle."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llp import optim, registry
from llp.errors import SpecError
from llp.optim import averaging
from llp.optim.averaging import WeightAverage

ROWS = sorted(set(registry.AVERAGINGS) - {"none"})
STEPS = 200


def weights_of(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def network(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    inputs, model = torch.randn(64, 6), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def train(
    name: str,
    *,
    steps: int = STEPS,
    autocast: bool = False,
    at: Callable[[int, nn.Module, WeightAverage], None] | None = None,
    model: nn.Module | None = None,
) -> tuple[nn.Module, WeightAverage]:
    """A small network and the average of its weights, `at` called after each step."""
    fresh, inputs, labels = network()
    model = model if model is not None else fresh
    average = averaging.build(name, model, num_steps=steps)
    assert average is not None
    optimizer = optim.build("sgd", model.parameters(), learning_rate=0.05, weight_decay=0.0)
    schedule = average.schedule(lambda step: 1.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * schedule(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        average.after_step(step + 1)
        if at is not None:
            at(step, model, average)
    return model, average


@pytest.mark.parametrize("name", ROWS)
def test_on_a_noisy_quadratic_the_average_is_nearer_than_the_weights(name: str) -> None:
    # Constant rate, unit noise: weights wander around the minimum, their average does less so.
    distances = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        model = nn.Linear(20, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(0.0)
        average = averaging.build(name, model, num_steps=4000)
        assert average is not None
        for step in range(4000):
            with torch.no_grad():
                gradient = model.weight + torch.randn(1, 20, generator=generator)
                model.weight.sub_(0.1 * gradient)
            average.after_step(step + 1)
        own = next(average.module.parameters())
        distances.append((float(own.norm()), float(model.weight.detach().norm())))
    assert all(average < last for average, last in distances)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ROWS)
def test_the_average_classifies_in_every_precision_and_stays_float32(
    name: str, autocast: bool
) -> None:
    _, average = train(name, autocast=autocast)
    _, inputs, labels = network()
    found = (average.module(inputs).argmax(1) == labels).float().mean()
    assert float(found) > 0.9
    assert {p.dtype for p in average.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ROWS)
def test_same_start_gives_same_bits(name: str) -> None:
    ends = [weights_of(train(name)[1].module) for _ in range(2)]
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ROWS)
def test_a_state_saved_on_the_way_carries_on_to_the_same_bits(name: str) -> None:
    kept: dict[str, Any] = {}
    path: list[torch.Tensor] = []
    middle = int(0.9 * STEPS)

    def at(step: int, model: nn.Module, average: WeightAverage) -> None:
        path.append(weights_of(model))
        if step == middle:
            file = io.BytesIO()
            torch.save(average.state_dict(), file)
            kept["file"] = file

    _, whole = train(name, at=at)
    model, _, _ = network(seed=1)
    again = averaging.build(name, model, num_steps=STEPS)
    assert again is not None
    kept["file"].seek(0)
    again.load_state_dict(torch.load(kept["file"], weights_only=True))
    for step in range(middle + 1, STEPS):
        nn.utils.vector_to_parameters(path[step].clone(), model.parameters())
        again.after_step(step + 1)
    assert again.count == whole.count > 1
    assert torch.equal(weights_of(again.module), weights_of(whole.module))


@pytest.mark.parametrize("name", ROWS)
def test_frozen_parameters_are_those_of_the_network(name: str) -> None:
    model, _, _ = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    _, average = train(name, model=model)
    # The mean of equal numbers, up to the rounding of each update.
    assert torch.allclose(average.module[0].weight, before, rtol=1e-6, atol=0.0)
    assert not torch.equal(average.module[2].weight, model[2].weight)


@pytest.mark.parametrize("name", ROWS)
def test_shared_parameters_are_averaged_once(name: str) -> None:
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    tied[2].weight = tied[0].weight
    _, average = train(name, model=tied)
    assert average.module[2].weight is average.module[0].weight
    assert len(list(average.module.parameters())) == len(list(tied.parameters())) == 5


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("row", sorted(registry.OPTIMIZERS))
def test_the_trained_weights_are_the_same_with_and_without(name: str, row: str) -> None:
    ends = []
    for averaged in (False, True):
        model, inputs, labels = network()
        average = averaging.build(name, model, num_steps=20) if averaged else None
        optimizer = optim.build(row, model.parameters(), learning_rate=0.01, weight_decay=0.01)

        def closure(
            model: nn.Module = model, optimizer: Any = optimizer, inputs: Any = inputs
        ) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)  # noqa: B023
            loss.backward()
            return loss

        for step in range(20):
            optimizer.step(closure)
            if average is not None:
                average.after_step(step + 1)
        ends.append(weights_of(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ROWS)
def test_bad_values_are_named(name: str) -> None:
    model, _, _ = network()
    with pytest.raises(SpecError, match="unknown option 'no_such_option'"):
        averaging.build(name, model, num_steps=10, no_such_option=1)
    for option in registry.options("averagings", name):
        with pytest.raises(SpecError, match=option):
            averaging.build(name, model, num_steps=10, **{option: -1})


def test_no_average_is_a_row_too() -> None:
    assert averaging.build("none", network()[0], num_steps=10) is None
