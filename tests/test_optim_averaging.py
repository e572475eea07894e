"""SWA and EMA against torch's own classes and against sums by hand."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from llp import registry
from llp.errors import SpecError
from llp.optim import averaging, wrapper


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def wander(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def data(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (2 * torch.randn(16, 3, generator=generator) + 1, torch.zeros(16, dtype=torch.long))
        for _ in range(count)
    ]


def test_swa_is_the_plain_mean_of_what_it_took_in() -> None:
    model = network()
    average = averaging.swa(model, num_steps=40, swa_start=0.5, swa_averages=5)
    reference, taken = AveragedModel(model), []
    for step in range(1, 41):
        wander(model, step)
        average.after_step(step)
        if step > 20 and step % 4 == 0:  # five, evenly, the last one at the end
            taken.append(vector(model).double())
            reference.update_parameters(model)
    assert average.count == len(taken) == 5
    assert torch.allclose(vector(average.module).double(), torch.stack(taken).mean(0), atol=1e-6)
    assert torch.allclose(vector(average.module), vector(reference.module), atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("wanted", [1, 3, 32])
def test_the_last_weights_are_always_in_the_average(num_steps: int, wanted: int) -> None:
    model = network()
    average = averaging.swa(model, num_steps=num_steps, swa_averages=wanted)
    counts = []
    for step in range(1, num_steps + 1):
        average.after_step(step)
        counts.append(average.count)
    assert 1 <= counts[-1] <= wanted
    assert counts[-1] > (counts[-2] if num_steps > 1 else 0)
    first = counts.index(1) + 1
    assert first > round(0.75 * num_steps) - 1


def test_steps_that_take_several_batches_skip_no_weights() -> None:
    model = network()
    average = averaging.swa(model, num_steps=40, swa_start=0.5, swa_averages=5)
    for step in [*range(3, 40, 3), 40]:
        average.after_step(step)
    assert average.count == 5


def test_ema_is_its_recursion_and_at_length_that_of_torch() -> None:
    model = network()
    average = averaging.ema(model, num_steps=60, ema_decay=0.6)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6))
    by_hand = torch.zeros(0)
    for step in range(1, 61):
        wander(model, step)
        average.after_step(step)
        reference.update_parameters(model)
        new, n = vector(model).double(), step - 1
        decay = min(0.6, (1 + n) / (10 + n))
        by_hand = new if step == 1 else decay * by_hand + (1 - decay) * new
    assert torch.allclose(vector(average.module).double(), by_hand, atol=1e-5)
    assert torch.allclose(vector(average.module), vector(reference.module), atol=1e-4)


def test_a_short_training_is_not_dominated_by_its_first_weights() -> None:
    model = network()
    average = averaging.ema(model, num_steps=30, ema_decay=0.999)
    plain = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    with torch.no_grad():
        model[0].bias.zero_()
    for step in range(1, 31):
        average.after_step(step)
        plain.update_parameters(model)
        with torch.no_grad():
            model[0].bias.fill_(1.0)
    assert float(plain.module[0].bias[0]) < 0.1
    assert float(average.module[0].bias[0]) > 0.9


def test_statistics_after_refresh_are_those_recomputed_by_hand() -> None:
    model = network()
    average = averaging.swa(model, num_steps=4, swa_start=0.0, swa_averages=4)
    for step in range(1, 5):
        wander(model, step)
        average.after_step(step)
    assert average.refresh(data()) == 80
    layer = average.module[0]
    means, variances = [], []
    with torch.no_grad():
        for inputs, _ in data():
            hidden = inputs.double() @ layer.weight.double().T + layer.bias.double()
            means.append(hidden.mean(0))
            variances.append(hidden.var(0))  # unbiased, as batch norm keeps it
    norm = average.module[1]
    assert torch.allclose(norm.running_mean.double(), torch.stack(means).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var.double(), torch.stack(variances).mean(0), atol=1e-5)
    reference = AveragedModel(model)
    reference.module.load_state_dict(average.module.state_dict())
    update_bn(data(), reference)
    assert torch.equal(norm.running_var, reference.module[1].running_var)


def test_no_layer_asks_for_the_number_of_batches(monkeypatch) -> None:
    """That would make the host wait for the GPU in every layer of every batch."""
    model = network()
    seen: list[float | None] = []
    forward = nn.BatchNorm1d.forward

    def watched(self: nn.BatchNorm1d, inputs: torch.Tensor) -> torch.Tensor:
        seen.append(self.momentum)
        return forward(self, inputs)

    monkeypatch.setattr(nn.BatchNorm1d, "forward", watched)
    num_batches = len(list(data()))
    assert wrapper.estimate_statistics(model, data()) == 80
    assert seen == [1 / number for number in range(1, num_batches + 1)]
    assert model[1].momentum == nn.BatchNorm1d(1).momentum


def test_an_error_in_the_middle_leaves_mode_and_momentum() -> None:
    model = network().eval()

    def broken() -> Any:
        yield from itertools.islice(data(), 1)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        wrapper.estimate_statistics(model, broken())
    assert not model.training
    assert model[1].momentum == nn.BatchNorm1d(1).momentum


def test_without_batch_norm_no_data_is_read() -> None:
    model = nn.Linear(3, 2)
    average = averaging.ema(model, num_steps=3)
    average.after_step(1)

    def broken() -> Any:
        raise AssertionError("read")
        yield

    assert average.refresh(broken()) == 0


def test_the_trained_network_is_left_alone() -> None:
    model = network()
    average = averaging.swa(model, num_steps=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 5):
        average.after_step(step)
    average.refresh(data())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in average.module.parameters())


def test_the_schedule_goes_over_as_torchs_swalr_does() -> None:
    def planned(step: int) -> float:
        return 1.0 - step / 200

    average = averaging.swa(network(), num_steps=100, swa_start=0.6, swa_learning_rate=0.3)
    schedule = average.schedule(planned)
    assert [schedule(step) for step in range(60)] == [planned(step) for step in range(60)]
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=planned(60))
    theirs = SWALR(optimizer, swa_lr=0.3, anneal_epochs=4, anneal_strategy="cos")
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [schedule(step) for step in range(60, 100)] == pytest.approx(expected)
    assert schedule(99) == 0.3


def test_ema_leaves_the_schedule() -> None:
    def planned(step: int) -> float:
        return 0.5

    assert averaging.ema(network(), num_steps=10).schedule(planned) is planned


@pytest.mark.parametrize("name", ["swa", "ema"])
def test_a_saved_average_goes_on_to_the_same_bits(name: str) -> None:
    ends = []
    for cut in (False, True):
        model = network()
        average = averaging.build(name, model, num_steps=20)
        assert average is not None
        for step in range(1, 21):
            wander(model, step)
            average.after_step(step)
            if cut and step == 17:
                state = copy.deepcopy(average.state_dict())
                average = averaging.build(name, model, num_steps=20)
                assert average is not None
                average.load_state_dict(state)
        ends.append(vector(average.module))
    assert torch.equal(*ends)


def test_options_of_the_table_are_those_of_the_functions() -> None:
    for name in registry.AVERAGINGS:
        signature = inspect.signature(registry.load("averagings", name)).parameters
        defaults = {k: p.default for k, p in signature.items() if k not in ("model", "num_steps")}
        assert defaults == registry.options("averagings", name)
    assert averaging.build("none", network(), num_steps=3) is None


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("swa", {"swa_start": 1.0}, "swa_start must be at least 0 and below 1, not 1.0"),
        ("swa", {"swa_learning_rate": 0.0}, "swa_learning_rate must be finite and above 0"),
        ("swa", {"swa_averages": 0}, "swa_averages must be at least 1, not 0"),
        ("ema", {"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, not 1.0"),
        ("ema", {"decay": 0.9}, "unknown option 'decay'"),
        ("sva", {}, "did you mean 'swa'"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        averaging.build(name, network(), num_steps=10, **options)
