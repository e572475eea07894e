"""Optimizers that take several gradients, and averages of the weights, in a whole job."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_loop import CPU, Fixed, network, steps, weights
from test_training_resume import kill_after
from test_training_support import (
    HERE,
    drive,
    equal,
    image_data,
    make_job,
    make_spec,
    numbers,
    objective,
)
from test_training_support import weights as saved_weights
from torch import nn
from torch.nn import functional

from llp import optim, registry
from llp.optim import averaging
from llp.optim.entropy_sgd import EntropySGD
from llp.optim.sam import SharpnessAware
from llp.optim.wrapper import batch_norms, statistics_frozen
from llp.records import Job, Rung
from llp.spec import RandomSearch, Spec, SpecError, check
from llp.training import loop
from llp.training.recipe import Recipe

ROWS = sorted(registry.OPTIMIZERS)
JOB = make_job(rung=Rung(1, 0.5, 33, 4))  # two steps an epoch
OPTIONS: dict[str, dict[str, Any]] = {
    "talt": {"min_size": 2, "update_interval": 2},
    "entropy_sgd": {"inner_steps": 3},
}


def sam_steps(model: nn.Module, rho: float = 0.1, **options: Any) -> loop.Steps:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return steps(model, optimizer=SharpnessAware(base, rho=rho), **options)


# --- several gradients in the loop ------------------------------------------------------------


def test_an_epoch_with_sam_equals_the_textbook_loop() -> None:
    data, model, reference = Fixed(7, 7, 3), network(norm=True), network(norm=True)
    progress = loop.train_epoch(sam_steps(model), data.epoch(), first_step=0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    loss_sum = 0.0
    for x, y in data.batches:
        start = [p.detach().clone() for p in reference.parameters()]
        optimizer.zero_grad()
        loss = functional.cross_entropy(reference(x), y)
        loss.backward()
        loss_sum += loss.item() * len(y)
        norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
        with torch.no_grad():
            for p in reference.parameters():
                p += 0.1 * p.grad / norm
        optimizer.zero_grad()
        with statistics_frozen(batch_norms(reference)):
            functional.cross_entropy(reference(x), y).backward()
        with torch.no_grad():
            for p, before in zip(reference.parameters(), start, strict=True):
                p.copy_(before)
        optimizer.step()
    assert torch.allclose(weights(model), weights(reference), atol=1e-6)
    assert torch.allclose(model[1].running_var, reference[1].running_var, atol=1e-6)
    assert int(model[1].num_batches_tracked) == 3
    assert progress.mean_loss == pytest.approx(loss_sum / 17, rel=1e-5)  # at the weights
    assert (progress.steps, progress.num_examples, progress.samples_seen) == (3, 17, 34)


def test_entropy_sgd_takes_a_batch_for_each_gradient() -> None:
    data, model, reference = Fixed(6, 6, 6, 6, 6), network(), network()
    options: dict[str, Any] = {"inner_steps": 2, "gamma": 2.0, "gamma_growth": 0.0, "noise": 0.0}
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    machine = steps(model, optimizer=EntropySGD(base, **options))
    seen: list[int] = []
    progress = loop.train_epoch(
        machine, data.epoch(), first_step=0, after_step=lambda p: seen.append(p.steps)
    )
    for chunk in (data.batches[:2], data.batches[2:4], data.batches[4:]):
        start = [p.detach().clone() for p in reference.parameters()]
        means = [p.clone() for p in start]
        for x, y in chunk:
            reference.zero_grad()
            functional.cross_entropy(reference(x), y).backward()
            with torch.no_grad():
                for p, anchor, mean in zip(reference.parameters(), start, means, strict=True):
                    p -= 0.1 * (p.grad + 2.0 * (p - anchor))
                    mean.lerp_(p, 0.25)
        with torch.no_grad():
            for p, anchor, mean in zip(reference.parameters(), start, means, strict=True):
                p.copy_(anchor - 0.5 * 2.0 * (anchor - mean))
    assert torch.allclose(weights(model), weights(reference), atol=1e-6)
    assert seen == [2, 4, 5]  # batches after each step
    assert (progress.num_examples, progress.samples_seen) == (30, 30)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("divisor", [1, 3])
def test_accumulated_gradients_are_those_of_the_batch(name: str, divisor: int) -> None:
    data, whole, parts = Fixed(12, 12, 12), network(), network()
    for model, parts_of in ((whole, 1), (parts, divisor)):
        optimizer = optim.build(
            name,
            model.parameters(),
            learning_rate=0.01,
            weight_decay=0.0,
            **OPTIONS.get(name, {}),
        )
        machine = steps(model, optimizer=optimizer, micro_batch_divisor=parts_of)
        progress = loop.train_epoch(machine, data.epoch(), first_step=0)
    passes = 2 if name in ("sam", "asam") else 1
    assert progress.samples_seen == passes * 36
    # Rounding may flip the sign of a first step of Adam or Muon where the gradient is near zero.
    assert torch.allclose(weights(whole), weights(parts), atol=1e-5 if "ad" not in name else 2e-3)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ROWS)
def test_every_optimizer_learns_in_every_precision(name: str, precision: str) -> None:
    data, model = Fixed(16, 16, 16), network(norm=True)
    rate = 0.01 if name in ("adam", "adamw", "muon") else 0.1
    optimizer = optim.build(
        name, model.parameters(), learning_rate=rate, weight_decay=0.0, **OPTIONS.get(name, {})
    )
    machine = steps(model, optimizer=optimizer, precision=precision, gradient_clip=5.0)
    losses = []
    for _ in range(36 if name == "entropy_sgd" else 12):  # of a third as many steps
        losses.append(loop.train_epoch(machine, data.epoch(), first_step=0).mean_loss)
    assert losses[-1] < 0.85 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Overflowing(nn.Module):
    """A network whose gradients are infinite in given calls."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls, self.count = nn.Linear(4, 3), calls, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.layer(x)
        self.count += 1
        if self.count in self.calls and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))
        return output


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("name", ["sam", "entropy_sgd"])
def test_an_overflow_in_any_gradient_skips_the_step(name: str, bad: int) -> None:
    model = Overflowing({bad})
    options = {"inner_steps": 2} if name == "entropy_sgd" else {}
    optimizer = optim.build(
        name, model.parameters(), learning_rate=0.1, weight_decay=0.0, **options
    )
    machine = steps(model, optimizer=optimizer, precision="fp16")
    scale = machine.scaler.get_scale()
    before = weights(model)
    data = Fixed(8, 8)
    batches = data.batches if name == "entropy_sgd" else data.batches[:1]
    loop.train_epoch(machine, batches, first_step=0)
    assert torch.equal(weights(model), before)
    assert machine.scaler.get_scale() == scale / 2
    loop.train_epoch(machine, batches, first_step=0)
    assert not torch.equal(weights(model), before)
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("name", ["sam", "entropy_sgd"])
def test_an_error_between_gradients_leaves_the_weights(name: str) -> None:
    model = network()
    optimizer = optim.build(name, model.parameters(), learning_rate=0.1, weight_decay=0.0)
    before, calls = weights(model), [0]

    def criterion(output: Any, target: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("no")
        return functional.cross_entropy(output, target)

    machine = steps(model, optimizer=optimizer, criterion=criterion)
    with pytest.raises(RuntimeError, match="no"):
        loop.train_epoch(machine, Fixed(8, 8).epoch(), first_step=0)
    assert torch.equal(weights(model), before)


def test_a_compiled_models_statistics_are_frozen_too() -> None:
    model = network(norm=True)
    wrapped = torch._dynamo.OptimizedModule(model, torch._dynamo.disable)
    assert [module is model[1] for module in batch_norms(wrapped)] == [True]


# --- jobs: resuming, cost, averages -----------------------------------------------------------


def spec_of(name: str, averaging: str = "none", **training: Any) -> Spec:
    rate = 0.01 if name in ("adam", "adamw", "muon") else 0.05
    return make_spec(
        model={"name": f"{HERE}:noisy"},
        training={
            "optimizer": name,
            "optimizer_options": OPTIONS.get(name, {}),
            "averaging": averaging,
            "learning_rate": rate,
            "augmentation": ["flip"],
            "gradient_clip": 1.0,
            **training,
        },
    )


@pytest.mark.parametrize(
    ("name", "averaging", "snapshots"),
    [
        *[(name, "none", 3) for name in ROWS],
        ("sgd", "swa", 7),
        ("sgd", "ema", 3),
        ("entropy_sgd", "ema", 3),
        ("sam", "swa", 8),
    ],
)
def test_a_resumed_job_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, averaging: str, snapshots: int
) -> None:
    spec = spec_of(name, averaging, batch_size=8)
    job = replace(JOB, rung=Rung(1, 0.5, 33, 3))  # four steps an epoch, two of entropy_sgd's
    expected, whole_end = drive(objective(tmp_path / "whole", spec), job)
    folder = tmp_path / "cut"
    kill_after(monkeypatch, snapshots, objective(folder, spec, checkpoint_seconds=0.0), job)
    torch.manual_seed(1234)  # nothing random may come from outside
    reports, end = drive(objective(folder, spec), replace(job, attempt=1))
    assert numbers(reports) == numbers(expected)
    assert equal(saved_weights(folder), saved_weights(tmp_path / "whole"))
    assert end.samples_seen == whole_end.samples_seen


@pytest.mark.parametrize(
    ("name", "averaging", "samples"),
    [
        ("sgd", "none", 132),
        ("sam", "none", 264),
        ("asam", "none", 264),
        ("entropy_sgd", "none", 132),
        ("talt", "none", 132),
        ("sgd", "ema", 132 + 44),  # four evaluations, each after statistics from 33 images: a third
    ],
)
def test_samples_are_counted_once_for_every_gradient(
    tmp_path: Path, name: str, averaging: str, samples: int
) -> None:
    points, end = drive(objective(tmp_path, spec_of(name, averaging)), JOB)
    assert end.outcome == "completed", end.failure
    assert end.samples_seen == points[-1].samples_seen == samples
    assert [p.epoch for p in points] == [1, 2, 3, 4]


def with_norm(*, channels: int, image_size: int, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(image_size**2, 12), nn.BatchNorm1d(12), nn.Linear(12, num_classes)
    )


def test_what_is_judged_and_kept_is_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the mean of the weights along the same training, watched from outside."""
    model_name = {"name": f"{__name__}:with_norm"}
    options = {"averaging_options": {"swa_start": 0.5, "swa_averages": 2}}
    spec = make_spec(model=model_name, training={"averaging": "swa", **options})
    seen: list[torch.Tensor] = []
    train_epoch = loop.train_epoch

    def watched(machine: loop.Steps, *args: Any, after_step: Any, **kwargs: Any) -> Any:
        def both(progress: loop.Progress) -> None:
            seen.append(weights(machine.model))
            after_step(progress)

        return train_epoch(machine, *args, after_step=both, **kwargs)

    monkeypatch.setattr(loop, "train_epoch", watched)
    points, end = drive(objective(tmp_path, spec), replace(JOB, kind="verify"))
    assert end.outcome == "completed", end.failure
    model = Recipe.of(spec, {}).build_model(channels=1, image_size=8, num_classes=3)
    model.load_state_dict(saved_weights(tmp_path))
    steps_of_epoch = len(seen) // 4
    taken = [seen[3 * steps_of_epoch - 1], seen[-1]]
    assert torch.allclose(weights(model), torch.stack(taken).mean(0), atol=1e-6)
    work = objective(tmp_path, spec)
    setup = work.prepare(replace(JOB, kind="verify"), CPU)
    found = loop.evaluate(model, setup.validation)
    assert points[3].validation_loss == pytest.approx(found.loss, rel=1e-5)
    assert points[4].test_loss == pytest.approx(loop.evaluate(model, setup.test()).loss, rel=1e-5)
    assert [setup.schedule(step) for step in (0, 4 * steps_of_epoch - 1)] == pytest.approx(
        [setup.schedule(0), 0.5]
    )


def test_before_the_average_begins_the_weights_are_judged(tmp_path: Path) -> None:
    schedule = {"schedule": "constant", "warmup_fraction": 0.0}
    averaged, _ = drive(
        objective(
            tmp_path / "a",
            make_spec(
                training={**schedule, "averaging": "swa", "averaging_options": {"swa_start": 0.75}}
            ),
        ),
        JOB,
    )
    plain, _ = drive(objective(tmp_path / "b", make_spec(training=schedule)), JOB)
    same = [a.validation_loss == b.validation_loss for a, b in zip(averaged, plain, strict=True)]
    assert same == [True, True, True, False]


# --- searching for an optimizer ---------------------------------------------------------------


def everything() -> Spec:
    when = {"when": {"optimizer": ["sam", "asam"]}}
    return Spec.model_validate(
        {
            "name": "optimizers",
            "dataset": {"name": "digits"},
            "model": {"name": "mlp"},
            "search_space": {
                "optimizer": {
                    "type": "choice",
                    "values": ["sgd", "sam", "asam", "entropy_sgd", "talt", "adamw", "muon"],
                },
                "learning_rate": {"type": "loguniform", "low": 1e-3, "high": 0.3},
                "rho": {"type": "loguniform", "low": 0.02, "high": 1.0, **when},
                "gamma": {
                    "type": "loguniform",
                    "low": 0.3,
                    "high": 5.0,
                    "when": {"optimizer": "entropy_sgd"},
                },
                "inner_steps": {
                    "type": "integer",
                    "low": 2,
                    "high": 8,
                    "when": {"optimizer": "entropy_sgd"},
                },
                "smoothing_factor": {
                    "type": "uniform",
                    "low": 0.0,
                    "high": 1.0,
                    "when": {"optimizer": "talt"},
                },
                "momentum": {
                    "type": "uniform",
                    "low": 0.8,
                    "high": 0.95,
                    "when": {"optimizer": ["sgd", "sam", "asam", "entropy_sgd", "talt", "muon"]},
                },
                "averaging": ["none", "swa", "ema"],
                "ema_decay": {
                    "type": "uniform",
                    "low": 0.9,
                    "high": 0.999,
                    "when": {"averaging": "ema"},
                },
            },
        }
    )


def test_a_search_space_tunes_the_optimizer_and_its_options() -> None:
    spec = everything()
    check(spec)
    search = RandomSearch(spec.search_space, spec.constraints, spec.seed)
    seen: dict[str, set[str]] = {}
    for index in range(60):
        recipe = Recipe.of(spec, search.suggest(index))
        torch.manual_seed(0)
        model = recipe.build_model(channels=1, image_size=8, num_classes=10)
        recipe.build_optimizer(model)
        average = recipe.build_averaging(model, num_steps=100)
        assert (average is None) == (recipe.averaging == "none")
        assert set(recipe.averaging_options) == (
            {"ema_decay"} if recipe.averaging == "ema" else set()
        )
        seen.setdefault(recipe.optimizer, set()).update(recipe.optimizer_options)
    assert seen == {
        "sgd": {"momentum"},
        "sam": {"momentum", "rho"},
        "asam": {"momentum", "rho"},
        "entropy_sgd": {"momentum", "gamma", "inner_steps"},
        "talt": {"momentum", "smoothing_factor"},
        "adamw": set(),
        "muon": {"momentum"},
    }


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        ({"rho": [0.05, 0.1]}, "search_space.rho", "add when: {optimizer: [sam, asam]}"),
        ({"ema_decay": 0.9}, "search_space.ema_decay", "add when: {averaging: ema}"),
        (
            {"rho": {"type": "uniform", "low": 0, "high": 1, "when": {"optimizer": "sam"}}},
            "search_space.rho.low",
            "must be above 0, not 0",
        ),
        ({"averaging": ["swa", "eam"]}, "search_space.averaging", "did you mean 'ema'"),
        ({"averaging_options": [1, 2]}, "search_space.averaging_options", "by name"),
    ],
)
def test_what_nothing_reads_is_an_error_before_anything_runs(
    section: dict[str, Any], path: str, words: str
) -> None:
    spec = everything().model_dump()
    spec["search_space"].update(section)
    with pytest.raises(SpecError) as caught:
        check(Spec.model_validate(spec))
    assert any(path in str(p) and words in str(p) for p in caught.value.problems), caught.value


def test_options_in_the_file_go_to_the_averaging_that_takes_them() -> None:
    training = {"averaging": "swa", "averaging_options": {"ema_decay": 0.9, "swa_averages": 4}}
    spec = everything().model_copy(update={"training": make_spec(training=training).training})
    of = partial(Recipe.of, spec)
    assert of({"averaging": "ema"}).averaging_options == {"ema_decay": 0.9}
    assert of({"averaging": "swa"}).averaging_options == {"swa_averages": 4}
    assert of({"averaging": "none"}).averaging_options == {}
    with pytest.raises(SpecError, match=r"averaging_options\.ema_decay"):
        Recipe.of(make_spec(training=training), {})


def every_weight(model: nn.Module, *, num_steps: int, width: int = 3) -> Any:
    return averaging.swa(model, num_steps=num_steps, swa_averages=width)


def test_an_average_of_ones_own_can_be_named() -> None:
    name = f"{__name__}:every_weight"
    spec = make_spec(
        model={"name": "mlp", "options": {}},
        training={"averaging": name, "averaging_options": {"width": 2}},
    )
    assert registry.options("averagings", name) == {"width": 3}
    recipe = Recipe.of(spec, {"model": "convnet"})
    average = recipe.build_averaging(nn.Linear(2, 2), num_steps=8)
    assert average is not None
    assert (recipe.model, average.interval) == ("convnet", 1)


def test_a_job_with_an_optimizer_and_average_of_its_own_ends_well(tmp_path: Path) -> None:
    job: Job = make_job({"optimizer": "talt", "averaging": "ema", "smoothing_factor": 0.7})
    points, end = drive(objective(tmp_path, everything(), data=image_data()), job)
    assert end.outcome == "completed", end.failure
    assert points[-1].validation_accuracy > 0.5
