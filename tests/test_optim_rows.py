"""Every row of the optimizer table lives through the same life cycle."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llp import optim, registry
from llp.errors import SpecError

ROWS = sorted(registry.OPTIMIZERS)
LEARNING_RATE = {"sgd": 0.02, "adam": 0.05, "adamw": 0.05}


def make(name: str, parameters: Any, weight_decay: float = 0.0, **options: Any) -> Any:
    rate = LEARNING_RATE.get(name, 0.05)
    return optim.build(name, parameters, learning_rate=rate, weight_decay=weight_decay, **options)


def quadratic(seed: int = 0) -> tuple[nn.Parameter, Callable[[], torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    matrix = basis @ torch.diag(torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0, 8.0])) @ basis.T
    weights = nn.Parameter(torch.randn(6, generator=generator))
    return weights, lambda: 0.5 * weights @ matrix @ weights


def run(optimizer: Any, loss: Callable[[], torch.Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ROWS)
def test_descends_a_quadratic(name: str) -> None:
    weights, loss = quadratic()
    before = float(loss().detach())
    run(make(name, [weights]), loss, 300)
    assert float(loss().detach()) < 1e-2 * before


@pytest.mark.parametrize("name", ROWS)
def test_same_start_gives_same_bits(name: str) -> None:
    ends = []
    for _ in range(2):
        weights, loss = quadratic()
        run(make(name, [weights], weight_decay=0.01), loss, 20)
        ends.append(weights.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ROWS)
def test_state_dict_carries_on_to_the_same_bits(name: str) -> None:
    weights, loss = quadratic()
    optimizer = make(name, [weights], weight_decay=0.01)
    run(optimizer, loss, 7)
    middle, state = weights.detach().clone(), copy.deepcopy(optimizer.state_dict())
    run(optimizer, loss, 7)

    again, loss_again = quadratic()
    with torch.no_grad():
        again.copy_(middle)
    fresh = make(name, [again], weight_decay=0.01)
    fresh.load_state_dict(state)
    run(fresh, loss_again, 7)
    assert torch.equal(again, weights)


@pytest.mark.parametrize("name", ROWS)
def test_groups_keep_their_own_rate_and_decay(name: str) -> None:
    slow, fast = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": slow, "lr": 1e-4, "weight_decay": 0.0}, {"params": (p for p in [fast])}]
    optimizer = make(name, groups, weight_decay=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-4, LEARNING_RATE.get(name, 0.05)]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    run(optimizer, lambda: slow.square().sum() + fast.square().sum(), 1)
    assert 0 < float((1 - slow).max().detach()) < 0.1 * float((1 - fast).min().detach())


@pytest.mark.parametrize("name", ROWS)
def test_frozen_and_unused_parameters_stay_as_they_are(name: str) -> None:
    used = nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    unused = nn.Parameter(torch.ones(3))
    run(make(name, [used, frozen, unused], weight_decay=0.1), lambda: used.square().sum(), 3)
    assert not torch.equal(used, torch.ones(3))
    assert torch.equal(frozen, torch.ones(3))
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("name", ROWS)
def test_options_of_the_table_are_those_of_the_function(name: str) -> None:
    signature = inspect.signature(registry.load("optimizers", name)).parameters
    defaults = {
        key: parameter.default
        for key, parameter in signature.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in {"learning_rate", "weight_decay"}
    }
    assert defaults == registry.options("optimizers", name)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, not 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and above 0, not -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite and above 0, not nan"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0, not -0.1"),
        ({"no_such_option": 1}, "unknown option 'no_such_option'"),
    ],
)
def test_bad_values_are_named(name: str, bad: dict[str, Any], words: str) -> None:
    arguments = {"learning_rate": 0.1, "weight_decay": 0.0, **bad}
    with pytest.raises(SpecError, match=words) as caught:
        optim.build(name, [nn.Parameter(torch.ones(1))], **arguments)
    assert f"optimizer '{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sgd", {"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ("sgd", {"momentum": 0.0, "nesterov": True}, "Nesterov momentum requires a momentum"),
        ("adam", {"beta1": 1.5}, r"beta1 must be in \[0, 1\), not 1.5"),
        ("adamw", {"beta2": -0.1}, r"beta2 must be in \[0, 1\), not -0.1"),
        ("adamw", {"epsilon": 0.0}, "epsilon must be finite and above 0, not 0.0"),
        ("adam", {"momentun": 0.9}, "unknown option 'momentun'"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make(name, [nn.Parameter(torch.ones(1))], **options)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(SpecError, match="no parameters to train"):
        make("sgd", nn.Flatten().parameters())


def test_unknown_optimizer_gets_the_nearest_name() -> None:
    with pytest.raises(SpecError, match="did you mean 'adamw'"):
        make("adamww", [nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}, "sgd"),
        ("adam", {"beta1": 0.8}, "adam"),
        ("adamw", {"beta2": 0.95, "epsilon": 1e-6}, "adamw"),
    ],
)
def test_steps_follow_the_published_update(
    name: str, options: dict[str, Any], reference: str
) -> None:
    weights, loss = quadratic()
    expected = weights.detach().double().clone()
    optimizer = make(name, [weights], weight_decay=0.1, **options)
    rate = LEARNING_RATE[name]
    mean, square = torch.zeros(6).double(), torch.zeros(6).double()
    for step in range(1, 6):
        optimizer.zero_grad()
        loss().backward()
        gradient = weights.grad.double()
        optimizer.step()
        if reference == "sgd":
            gradient = gradient + 0.1 * expected
            mean = 0.9 * mean + gradient if step > 1 else gradient
            expected = expected - rate * (gradient + 0.9 * mean)
            continue
        beta1, beta2 = options.get("beta1", 0.9), options.get("beta2", 0.999)
        if reference == "adam":
            gradient = gradient + 0.1 * expected
        else:
            expected = expected - rate * 0.1 * expected
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        root = (square / (1 - beta2**step)).sqrt() + options.get("epsilon", 1e-8)
        expected = expected - rate * mean / (1 - beta1**step) / root
    assert torch.allclose(weights.detach().double(), expected, atol=1e-5)


def test_weight_decay_acts_on_biases_too() -> None:
    layer = nn.Linear(2, 2)
    optimizer = make("sgd", layer.parameters(), weight_decay=0.5, momentum=0.0)
    before = layer.bias.detach().clone()
    optimizer.zero_grad()
    (0 * layer(torch.ones(1, 2)).sum()).backward()
    optimizer.step()
    assert torch.allclose(layer.bias.detach(), before * (1 - 0.5 * LEARNING_RATE["sgd"]))
