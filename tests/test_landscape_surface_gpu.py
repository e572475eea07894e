"""Surfaces, sharpness, curves and ranks on a CUDA device: the same numbers as on the CPU."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from test_landscape_surface import Attention, conv_net, images, seeded, tokens
from torch import nn
from torch.nn import functional

from llp import landscape
from llp.landscape import sharpness
from llp.landscape.evaluation import PointEvaluator
from llp.landscape.parameters import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def both(double: bool = True):
    dtype = torch.float64 if double else torch.float32
    here = conv_net(dtype)
    there = copy.deepcopy(here).cuda()
    batches = images(dtype, 9, 4)
    return here, there, batches  # batches stay on the CPU: they are moved once per chunk


@pytest.mark.parametrize("strategy", ["loop", "vmap", "auto"])
def test_a_surface_is_that_of_the_cpu_and_its_centre_is_the_base_loss(strategy: str) -> None:
    here, there, batches = both()
    plane = landscape.directions.random(here)
    moved = landscape.directions.make(there, plane.vectors)
    expected = landscape.surface(
        here, functional.cross_entropy, batches, directions=plane, resolution=7
    )
    before = [tensor.clone() for tensor in (*there.parameters(), *there.buffers())]
    found = landscape.surface(
        there, functional.cross_entropy, batches, directions=moved, resolution=7,
        strategy=strategy,
    )  # fmt: skip
    assert found.loss == pytest.approx(expected.loss, rel=1e-10)
    assert (found.metric == expected.metric).all()
    assert float(found.loss[3, 3]) == found.base_loss
    after = [*there.parameters(), *there.buffers()]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("case", ["conv", "conv, channels last", "attention"])
def test_the_centre_is_the_base_loss_to_the_bit_in_single_precision(case: str) -> None:
    if case == "attention":
        model, batches = seeded(Attention).cuda(), tokens(64, 30)
    else:
        model, batches = conv_net().cuda(), images(torch.float32, 64, 30)
        if "last" in case:
            model = model.to(memory_format=torch.channels_last)
    found = landscape.surface(model, functional.cross_entropy, batches, resolution=5)
    assert float(found.loss[2, 2]) == found.base_loss
    line = landscape.line(model, functional.cross_entropy, batches, resolution=3)
    assert float(line.loss[1]) == found.base_loss


def test_the_probe_times_the_loop_and_stacks_and_takes_the_fastest() -> None:
    _, model, batches = both(double=False)
    plane = landscape.directions.random(model)
    evaluate = PointEvaluator(model, functional.cross_entropy, batches, plane.vectors)
    evaluate(np.random.default_rng(0).normal(size=(16, 2)))
    assert {"loop", "channels_last", "vmap 4", "vmap 16"} <= set(evaluate.probe_seconds)
    best = min(evaluate.probe_seconds, key=evaluate.probe_seconds.__getitem__)
    assert evaluate.used == best


def test_a_model_that_cannot_be_stacked_is_looped() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y if y.sum().item() > 0 else 2 * y

    model = Branching().cuda()
    data = [(torch.randn(9, 4), torch.arange(9) % 3)]
    found = landscape.surface(model, functional.cross_entropy, data, resolution=5)
    assert found.strategy == "loop"
    assert float(found.loss[2, 2]) == found.base_loss


def test_how_often_the_device_is_waited_for_does_not_depend_on_the_number_of_points() -> None:
    _, model, batches = both(double=False)
    plane = landscape.directions.random(model)
    on_device = [(x.cuda(), y.cuda()) for x, y in batches]
    evaluate = PointEvaluator(
        model, functional.cross_entropy, on_device, plane.vectors, strategy="loop"
    )
    counts = []
    for num_points in (5, 5, 40):
        points = np.random.default_rng(0).normal(size=(num_points, 2))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                evaluate(points)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(len(seen))
    assert counts[1] == counts[2] > 0


def test_a_robust_surface_and_new_statistics_run_on_the_device() -> None:
    here, there, batches = both()
    plane = landscape.directions.random(here)
    moved = landscape.directions.make(there, plane.vectors)
    for options in ({"rho": 0.1}, {"rho": 0.1, "robust": "first_order"}, {"statistics": batches}):
        expected, found = (
            landscape.surface(
                model, functional.cross_entropy, batches, directions=rows, resolution=3, **options
            )
            for model, rows in ((here, plane), (there, moved))
        )
        assert found.loss == pytest.approx(expected.loss, rel=1e-9)
        if "rho" in options:
            assert found.robust == pytest.approx(expected.robust, rel=1e-9)
            assert (found.robust >= found.loss).all()


SHARPNESS = {
    "sam": {},
    "asam": {},
    "m_sharpness": {"m": 5},
    "worst_case": {"num_steps": 4},
    "epsilon_box": {"num_steps": 4},
    "noise": {"num_draws": 3},
    "noise_sigma": {"num_draws": 3},
    "gradient_norm": {},
    "adaptive_trace": {"num_probes": 5},
    "relative_flatness": {},
    "local_entropy": {"num_chains": 2, "num_nodes": 2, "num_steps": 2, "num_warmup": 1},
}


@pytest.mark.parametrize("name", SHARPNESS)
def test_sharpness_on_the_device_is_that_of_the_cpu(name: str) -> None:
    here, there, batches = both()
    values = [
        getattr(sharpness, name)(model, functional.cross_entropy, batches, **SHARPNESS[name]).value
        for model in (here, there)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_curves_ranks_units_and_paths_run_on_the_device() -> None:
    here, there, batches = both()
    other = copy.deepcopy(there)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = landscape.connect(
        there, other, functional.cross_entropy, batches, num_epochs=2, num_points=3
    )
    assert (
        found.path.loss[0]
        == landscape.linear_barrier(
            there, other, functional.cross_entropy, batches, num_points=2
        ).loss[0]
    )
    path = landscape.trajectory(
        there, functional.cross_entropy, batches,
        [other, found.curve.at(0.5), there.state_dict()],
    )  # fmt: skip
    assert path.out_of_plane[-1] < 1e-9
    for one, two in zip(
        landscape.feature_ranks(here, batches), landscape.feature_ranks(there, batches),
        strict=True,
    ):  # fmt: skip
        assert two.effective == pytest.approx(one.effective, rel=1e-6)
    for one, two in zip(
        landscape.unit_activity(here, batches), landscape.unit_activity(there, batches),
        strict=True,
    ):  # fmt: skip
        assert two.mean_size == pytest.approx(one.mean_size, rel=1e-9)
    example = batches[0][0][0]
    ranks = [
        landscape.partial_jacobian_rank(model, example, mode="crop", side=4).rank
        for model in (here, there)
    ]
    assert ranks[0] == ranks[1]
    smooth = [
        landscape.smoothness(model, functional.cross_entropy, batches).effective_beta
        for model in (here, there)
    ]
    assert smooth[1] == pytest.approx(smooth[0], rel=1e-6)
