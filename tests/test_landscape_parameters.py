"""The model is given back bit for bit, whatever happened in between."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from llp import landscape
from llp.landscape.parameters import exact_arithmetic, same_bits


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    )


def snapshot(model: nn.Module) -> list[torch.Tensor]:
    tensors = [p.detach() for p in model.parameters()] + list(model.buffers())
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    return [t.clone() for t in tensors]


def test_flat_vector_leaves_out_frozen_and_counts_tied_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 1)})
    model["b"].weight = model["a"].weight
    model["c"].weight.requires_grad_(False)
    assert len(landscape.flatten(landscape.trainable(model))) == 9 + 3 + 3 + 1


def test_unflatten_inverts_flatten_also_for_blocks() -> None:
    like = [torch.randn(2, 3), torch.randn(4)]
    block = torch.randn(5, 10)
    parts = landscape.unflatten(block, like)
    assert [tuple(part.shape) for part in parts] == [(5, 2, 3), (5, 4)]
    assert torch.equal(torch.cat([part.reshape(5, -1) for part in parts], 1), block)
    with pytest.raises(ValueError, match="expected 10 entries, got 9"):
        landscape.unflatten(torch.zeros(9), like)


def test_trainable_refuses_nothing_and_mixtures() -> None:
    with pytest.raises(ValueError, match="ReLU has no trainable parameter"):
        landscape.trainable(nn.ReLU())
    with pytest.raises(ValueError, match="share one dtype"):
        landscape.trainable(nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1).double()]))


@pytest.mark.parametrize("fails", [False, True])
def test_perturbed_model_moves_by_the_vector_and_comes_back_exactly(fails: bool) -> None:
    model = network()
    before, storages = snapshot(model), [p.data_ptr() for p in model.parameters()]
    weights = landscape.flatten(landscape.trainable(model))
    step = 1e3 * torch.randn_like(weights)  # adding and subtracting this would lose digits

    def move() -> None:
        with landscape.perturbed(model, step):
            assert torch.equal(landscape.flatten(landscape.trainable(model)), weights + step)
            if fails:
                raise RuntimeError("inside")

    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            move()
    else:
        move()
    assert all(same_bits(a, b) for a, b in zip(before, snapshot(model), strict=True))
    assert storages == [p.data_ptr() for p in model.parameters()]


def spoil(model: nn.Sequential) -> None:
    """Changes everything that `evaluation_state` promises to restore."""
    model[0].weight.data.add_(1.0)  # behind autograd's back: no version counter moves
    with torch.no_grad():
        model[4].bias.copy_(torch.full((2,), float("nan")))
    model[1].running_mean.fill_(7.0)
    model[1].running_var = torch.full((3,), 9.0)
    model[1].register_buffer("extra", torch.zeros(1))
    model[0].weight.grad.zero_()
    model[4].weight.grad = torch.ones(2, 48)
    model[0].bias.requires_grad_(False)
    model[2].train()
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_state_restores_everything(fails: bool) -> None:
    model = network()
    model[1].eval()  # a flag of its own must survive
    model[0].weight.grad = torch.tensor(-0.0).expand(3, 1, 3, 3).clone()
    running_var = model[1].running_var
    before = snapshot(model)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        try:
            with landscape.evaluation_state(model):
                assert not any(module.training for module in model.modules())
                if draws:
                    spoil(model)
                if fails:
                    raise KeyError("loss")
        except KeyError:
            assert fails
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    after = snapshot(model)
    assert len(before) == len(after)
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert model[1].running_var is running_var
    assert "extra" not in model[1]._buffers
    assert model[0].bias.requires_grad
    assert model[4].weight.grad is None
    assert draws[0] == draws[1]


def test_untouched_parameters_are_not_written_to() -> None:
    model = network()
    versions = [p._version for p in model.parameters()]
    with landscape.evaluation_state(model):
        model(torch.zeros(1, 1, 4, 4))
    assert versions == [p._version for p in model.parameters()]


def test_exact_arithmetic_switches_shortcuts_off_and_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            exact_arithmetic(torch.device("cpu")),
        ):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
