"""Every row of the tables behind `llp landscape` works, with the defaults that it promises."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from llp import registry
from llp.landscape.parameters import same_bits

MEASURES = list(registry.SHARPNESS_MEASURES)


@pytest.mark.parametrize("name", MEASURES)
def test_every_sharpness_measure_has_the_defaults_of_its_function(name: str) -> None:
    parameters = inspect.signature(registry.load("sharpness_measures", name)).parameters
    for option, default in registry.SHARPNESS_MEASURES[name].options.items():
        real = parameters[option].default
        assert (default or None) == (real or None), option


@pytest.mark.parametrize("name", MEASURES)
def test_every_sharpness_measure_is_a_finite_number_and_leaves_the_model_alone(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    before = [tensor.clone() for tensor in model.state_dict().values()]
    batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]
    measure = registry.load("sharpness_measures", name)
    found = measure(model, functional.cross_entropy, batches)
    assert math.isfinite(found.value)
    assert found.num_examples == 24
    assert found.gradient_equivalents > 0
    assert all(map(same_bits, model.state_dict().values(), before))


def test_every_measure_of_the_library_is_in_the_table() -> None:
    from llp.landscape import sharpness

    targets = {entry.target.partition(":")[2] for entry in registry.SHARPNESS_MEASURES.values()}
    assert targets == set(sharpness.__all__)


@pytest.mark.parametrize("table", ["analyses", "callbacks", "sharpness_measures"])
def test_every_row_has_one_line_that_says_what_it_is(table: str) -> None:
    for name, entry in registry.entries(table).items():
        assert 10 < len(entry.summary) < 100, name
        assert callable(registry.load(table, name))
