"""Schedules against torch's own schedulers, and the claims of their docstrings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from llp import registry
from llp.errors import SpecError
from llp.training import schedules

ROWS = sorted(registry.SCHEDULES)


def rates(name: str, num_steps: int, warmup_fraction: float) -> list[float]:
    at = schedules.planned(name, num_steps=num_steps, warmup_fraction=warmup_fraction)
    return [at(t) for t in range(num_steps + 1)]


def torch_rates(num_steps: int, warmup: int, main: Callable[[Any], Any]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    scheduler = (
        lr_scheduler.SequentialLR(optimizer, [rise, main(optimizer)], milestones=[warmup])
        if warmup
        else main(optimizer)
    )
    found = []
    for _ in range(num_steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 0.5, 0.99])
def test_every_schedule_stays_in_range_and_never_starts_at_zero(
    name: str, num_steps: int, warmup_fraction: float
) -> None:
    found = rates(name, num_steps, warmup_fraction)
    assert all(0 <= rate <= 1 for rate in found)
    assert all(rate > 0 for rate in found[:-1])
    assert max(found[:-1]) > 0.5 or name == "step"


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 64, 1000])
def test_annealing_schedules_end_at_zero(name: str, num_steps: int) -> None:
    assert rates(name, num_steps, 0.1)[-1] == pytest.approx(0.0, abs=1e-12)


def test_cosine_is_torchs_after_a_linear_warm_up() -> None:
    expected = torch_rates(40, 4, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=36))
    assert rates("cosine", 40, 0.1) == pytest.approx(expected, abs=1e-6)


def test_cosine_without_warm_up_is_torchs() -> None:
    expected = torch_rates(25, 0, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=25))
    assert rates("cosine", 25, 0.0) == pytest.approx(expected, abs=1e-6)


def test_step_is_torchs_multi_step() -> None:
    expected = torch_rates(40, 0, lambda o: lr_scheduler.MultiStepLR(o, [20, 30], gamma=0.1))
    assert rates("step", 40, 0.0) == pytest.approx(expected)


def test_constant_is_torchs_linear_warm_up() -> None:
    expected = torch_rates(20, 5, lambda o: lr_scheduler.ConstantLR(o, factor=1.0))
    assert rates("constant", 20, 0.25) == pytest.approx(expected)


def test_one_cycle_peaks_at_three_tenths_whatever_the_warm_up() -> None:
    found = rates("one_cycle", 100, 0.7)
    assert found.index(1.0) == 30
    assert found == rates("one_cycle", 100, 0.0)
    assert found[:30] == pytest.approx([(t + 1) / 31 for t in range(30)])


@pytest.mark.parametrize("name", ROWS)
def test_one_multiplier_is_that_of_the_plan(name: str) -> None:
    found = schedules.multiplier(name, 7, num_steps=10, warmup_fraction=0.2)
    assert found == rates(name, 10, 0.2)[7]


def test_unknown_schedule_gets_the_nearest_name() -> None:
    with pytest.raises(SpecError, match="did you mean 'cosine'"):
        schedules.planned("cosin", num_steps=10, warmup_fraction=0.0)


@pytest.mark.parametrize(("num_steps", "warmup_fraction"), [(0, 0.0), (10, 1.0), (10, -0.1)])
def test_impossible_lengths_are_refused(num_steps: int, warmup_fraction: float) -> None:
    with pytest.raises(SpecError, match="num_steps >= 1 and 0 <= warmup_fraction < 1"):
        schedules.planned("cosine", num_steps=num_steps, warmup_fraction=warmup_fraction)
