"""One epoch and one evaluation against closed forms and plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llp.training import loop

CPU = torch.device("cpu")


class Fixed:
    """Given batches, in the same order every epoch."""

    def __init__(self, *sizes: int, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(sum(sizes))
        self.batches = [
            (
                torch.randn(size, 4, generator=generator),
                torch.randint(0, classes, (size,), generator=generator),
            )
            for size in sizes
        ]
        self.num_examples = sum(sizes)

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.batches[start:]


def network(seed: int = 0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


def steps(model: nn.Module, rate: float = 0.1, **options: Any) -> loop.Steps:
    return loop.Steps(
        **{
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9),
            "criterion": functional.cross_entropy,
            "schedule": lambda step: 1.0,
            "device": CPU,
            **options,
        }
    )


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_an_epoch_equals_the_textbook_loop() -> None:
    data, model, reference = Fixed(7, 7, 3), network(), network()
    schedule = [1.0, 0.5, 0.25]
    progress = loop.train_epoch(
        steps(model, schedule=lambda step: schedule[step - 5]), data.epoch(), first_step=5
    )
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    loss_sum, hits = 0.0, 0
    for (x, y), scale in zip(data.batches, schedule, strict=True):
        optimizer.param_groups[0]["lr"] = 0.1 * scale
        optimizer.zero_grad()
        output = reference(x)
        loss = functional.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(y)
        hits += int((output.argmax(1) == y).sum())
    assert torch.equal(weights(model), weights(reference))
    assert progress.mean_loss == pytest.approx(loss_sum / 17, rel=1e-6)
    assert progress.accuracy == hits / 17
    assert (progress.steps, progress.num_examples) == (3, 17)
    assert progress.learning_rate == pytest.approx(0.025)


@pytest.mark.parametrize("divisor", [2, 3, 4, 100])
def test_accumulated_micro_batches_equal_the_full_batch(divisor: int) -> None:
    data, whole, parts = Fixed(10, 10, 7), network(), network()
    one = loop.train_epoch(steps(whole), data.epoch(), first_step=0)
    many = loop.train_epoch(steps(parts, micro_batch_divisor=divisor), data.epoch(), first_step=0)
    assert torch.allclose(weights(whole), weights(parts), atol=1e-6)
    assert many.mean_loss == pytest.approx(one.mean_loss, abs=1e-6)
    assert many.accuracy == one.accuracy
    assert many.num_examples == one.num_examples == 27


def test_no_micro_batch_has_a_single_example() -> None:
    sizes: list[int] = []
    model = network(norm=True)
    model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    loop.train_epoch(steps(model, micro_batch_divisor=64), Fixed(5, 2).epoch(), first_step=0)
    assert sizes == [3, 2, 2]


def test_label_smoothing_is_its_closed_form() -> None:
    data, model, epsilon = Fixed(6), network(), 0.2
    x, y = data.batches[0]
    logp = functional.log_softmax(model(x), 1).double()
    expected = (1 - epsilon) * -logp[range(6), y] + epsilon * -logp.mean(1)
    criterion = partial(functional.cross_entropy, label_smoothing=epsilon)
    progress = loop.train_epoch(steps(model, criterion=criterion), data.epoch(), first_step=0)
    assert progress.mean_loss == pytest.approx(expected.mean().item(), abs=1e-6)


@pytest.mark.parametrize("limit", [1e-3, 0.1, 1e6])
def test_clipping_bounds_the_global_gradient_norm(limit: float) -> None:
    model = network()
    before, data = weights(model), Fixed(8)
    x, y = data.batches[0]
    gradients = torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    loop.train_epoch(steps(model, rate=1.0, gradient_clip=limit), data.epoch(), first_step=0)
    moved = float((weights(model) - before).norm())
    assert moved == pytest.approx(min(limit, norm), rel=1e-3)


def test_an_epoch_taken_in_two_parts_is_the_same() -> None:
    data, whole, parts = Fixed(5, 5, 5, 5), network(norm=True), network(norm=True)
    one = loop.train_epoch(steps(whole), data.epoch(), first_step=0)
    machine = steps(parts)
    progress = loop.train_epoch(machine, data.batches[:3], first_step=0)
    progress = loop.train_epoch(machine, data.epoch(start=3), first_step=0, progress=progress)
    assert torch.equal(weights(whole), weights(parts))
    assert (progress.mean_loss, progress.accuracy) == (one.mean_loss, one.accuracy)


def test_a_loss_that_is_no_number_ends_the_epoch() -> None:
    machine = steps(network(), rate=1e38)
    with pytest.raises(loop.Diverged, match=r"training loss is (nan|inf) after 4 steps"):
        loop.train_epoch(machine, Fixed(8, 8, 8, 8).epoch(), first_step=0)


def test_divergence_is_noticed_long_before_the_end_of_a_long_epoch() -> None:
    model, data, seen = network(), Fixed(2), [0]

    def long() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(10 * loop.CHECK_EVERY):
            seen[0] += 1
            yield data.batches[0]

    with pytest.raises(loop.Diverged):
        loop.train_epoch(steps(model, rate=1e38), long(), first_step=0)
    assert seen[0] == loop.CHECK_EVERY


def test_evaluation_is_the_mean_over_examples_and_leaves_the_model_alone() -> None:
    data, model = Fixed(5, 5, 2), network(norm=True)
    model[1].eval()  # a part that was in eval mode stays there
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss, accuracy = loop.evaluate(model, data)
    inputs = torch.cat([x for x, _ in data.batches])
    targets = torch.cat([y for _, y in data.batches])
    reference = network(norm=True).eval()
    output = reference(inputs)
    expected = functional.cross_entropy(output, targets)
    assert loss == pytest.approx(float(expected), abs=1e-6)
    assert accuracy == float((output.argmax(1) == targets).double().mean())
    assert [m.training for m in model.children()] == [True, False, True, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_almost_the_same_function(precision: str) -> None:
    data, half, full = Fixed(16, 16, 16), network(), network()
    machine, reference_machine = steps(half, precision=precision), steps(full)
    for _ in range(5):
        progress = loop.train_epoch(machine, data.epoch(), first_step=0)
        reference = loop.train_epoch(reference_machine, data.epoch(), first_step=0)
    assert (machine.scaler is None) == (precision == "bf16")
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert progress.mean_loss == pytest.approx(reference.mean_loss, abs=0.05)
    assert loop.evaluate(half, data, precision=precision).loss == pytest.approx(
        loop.evaluate(half, data).loss, abs=0.02
    )


def test_accuracy_of_something_else_than_classes_is_asked_for() -> None:
    with pytest.raises(TypeError, match="pass your own num_correct"):
        loop.num_correct(torch.zeros(4, 1), torch.zeros(4))


def test_a_mean_over_nothing_is_not_a_division_by_zero() -> None:
    progress = loop.Progress.start(CPU)
    assert progress.mean_loss == 0.0
    assert math.isnan(progress.learning_rate)
