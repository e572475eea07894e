"""On a GPU: no step of any optimizer waits for the device, and results are those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llp import optim, registry
from llp.optim import averaging
from llp.optim.wrapper import batch_norms, gradients_per_step, statistics_frozen
from llp.workloads import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = sorted(registry.OPTIMIZERS)


def resnet20(device: str = "cuda") -> nn.Module:
    torch.manual_seed(0)
    model = models.build("resnet20", {}, channels=3, image_size=32, num_classes=10)
    return model.to(device).to(memory_format=torch.channels_last)


def batch(device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (32,), generator=generator)
    return images.to(device), labels.to(device)


def step(model: nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    frozen, (count, _) = batch_norms(model), gradients_per_step(optimizer)
    for index in range(count):
        if index:
            optimizer.move()
        optimizer.zero_grad()
        with statistics_frozen(frozen if index else ()):
            nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("average", ["none", "swa", "ema"])
@pytest.mark.parametrize("name", ROWS)
def test_a_step_does_not_wait_for_the_device(name: str, average: str) -> None:
    if average != "none" and name != "sgd":
        pytest.skip("averages do not depend on the optimizer")
    model, (images, labels) = resnet20(), batch()
    optimizer = optim.build(name, model.parameters(), learning_rate=0.01, weight_decay=5e-4)
    kept = averaging.build(average, model, num_steps=44)

    def some(first: int) -> None:
        for number in range(first, first + 22):
            step(model, optimizer, images, labels)
            if kept is not None:
                kept.after_step(number)

    some(1)  # state is made, kernels are chosen
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        some(23)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()
    if kept is not None:
        assert kept.count >= 8


@pytest.mark.parametrize("name", ROWS)
def test_it_descends_as_on_the_cpu(name: str) -> None:
    losses: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 40), nn.Tanh(), nn.Linear(40, 10))
        model, (images, labels) = model.to(device), batch(device)
        optimizer = optim.build(name, model.parameters(), learning_rate=1e-3, weight_decay=0.0)
        losses[device] = []
        for _ in range(20):
            step(model, optimizer, images, labels)
            with torch.no_grad():
                losses[device].append(float(nn.functional.cross_entropy(model(images), labels)))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)
    assert losses["cuda"][-1] < losses["cuda"][0]


@pytest.mark.parametrize("name", ["talt", "entropy_sgd", "sam", "muon"])
def test_a_state_saved_from_the_gpu_goes_on_there(name: str) -> None:
    from llp.training import checkpoint

    ends = []
    for cut in (False, True):
        model, (images, labels) = resnet20(), batch()
        optimizer = optim.build(name, model.parameters(), learning_rate=0.01, weight_decay=0.0)
        for number in range(12):
            if cut and number == 6:
                state = checkpoint.to_cpu(optimizer.state_dict())
                optimizer = optim.build(
                    name, model.parameters(), learning_rate=0.01, weight_decay=0.0
                )
                optimizer.load_state_dict(state)
            step(model, optimizer, images, labels)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-2, atol=1e-3)


def test_valleys_are_read_out_after_the_fact() -> None:
    model, (images, labels) = resnet20(), batch()
    optimizer: Any = optim.build("talt", model.parameters(), learning_rate=0.3, weight_decay=0.0)
    for _ in range(100):
        step(model, optimizer, images, labels)
    log = optimizer.log()
    assert log["strength"].shape == (10, len(log["tensors"]))
    assert log["strength"].device.type == "cpu"
    assert torch.isfinite(log["eigenvalues"]).all()
    assert (log["gradient_norm"] > 0).all()
    events = optimizer.events()
    assert len(events) == int((log["strength"] > 0).sum())
