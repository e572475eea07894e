"""Tier 2 from a checkpoint on disk to a profile: every row of the table, and what goes wrong."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape, registry
from llp.errors import SpecError
from llp.flatness import refinements
from llp.flatness.context import MetricContext
from llp.flatness.metrics import GAINS, measured_names
from llp.flatness.profile import CallableFlatnessObjective, FlatnessObjective, measure
from llp.landscape.parameters import same_bits
from llp.protocols import Objective
from llp.records import CheckpointRef, FlatnessProfile, Job, JobEnd, Rung, Trial, to_plain
from llp.spec.schema import Spec, Tier2Spec
from llp.training import checkpoint, loop
from llp.training.python_objective import CallableObjective
from llp.training.recipe import Recipe
from llp.workloads import load
from llp.workloads.subsets import nested_order

ROWS = sorted(registry.METRICS)


def spec(**tier2: Any) -> Spec:
    return Spec(
        name="tiny",
        dataset={"name": "digits", "max_train_examples": 200},
        model={"name": "convnet", "options": {"width": 4}},
        training={"batch_size": 32, "label_smoothing": 0.1, "learning_rate": 0.05},
        search_space={"weight_decay": [1e-4, 1e-3]},
        tier2={"num_examples": 100, "batch_size": 40, "num_probes": 4, "budget": 0, **tier2},
    )


@pytest.fixture(scope="module")
def images() -> Any:
    return load(spec().dataset, 0)


def network(images: Any, seed: int = 0) -> nn.Module:
    """A small network that has learned a little, with batch-norm statistics of its own."""
    torch.manual_seed(seed)
    model = Recipe.of(spec(), {}).build_model(
        channels=images.channels, image_size=images.image_size, num_classes=images.num_classes
    )
    pixels = torch.as_tensor(np.array(images.train.images)).float() / 255
    labels = torch.as_tensor(np.array(images.train.labels))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(15):
        optimizer.zero_grad()
        functional.cross_entropy(model((pixels - 0.3) / 0.3), labels).backward()
        optimizer.step()
    return model


@pytest.fixture
def study(images: Any, tmp_path: Path) -> tuple[Path, Job]:
    reference = checkpoint.save(
        "checkpoints/t000-r1.pt", {"model": network(images).state_dict()}, root=tmp_path
    )
    job = Job(
        job_id="t000-m",
        kind="measure",
        trial=Trial("t000", {"weight_decay": 1e-3}, seed=5),
        rung=Rung(1, 1.0, len(images.train), 2),
        seed=5,
        start_from=reference,
    )
    return tmp_path, job


def run(objective: Objective, job: Job) -> tuple[FlatnessProfile | None, JobEnd]:
    reports: Generator[Any, None, JobEnd] = objective(job)
    found = []
    while True:
        try:
            found.append(next(reports))
        except StopIteration as stop:
            assert len(found) <= 1
            return (found[0] if found else None), stop.value


def without_seconds(profile: FlatnessProfile) -> list[Any]:
    return [to_plain(dataclasses.replace(m, seconds=0.0)) for m in profile.measurements]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_measures_a_checkpoint_and_leaves_the_process_as_it_was(
    row: str, images: Any, study: tuple[Path, Job]
) -> None:
    folder, job = study
    options = spec(metrics=[row], refinements=[], refinement_epochs=1)
    objective = FlatnessObjective(options, images, folder)
    state, content = torch.get_rng_state(), (folder / job.start_from.path).read_bytes()
    profile, end = run(objective, job)
    assert end.outcome == "completed", end.failure
    assert profile is not None
    assert [m.name for m in profile.measurements] == measured_names(row, options.tier2)
    for measurement in profile.measurements:
        assert math.isfinite(measurement.value), measurement
        assert measurement.num_examples == (len(images.validation) if row in GAINS else 100)
        assert measurement.seconds > 0
        if row != "hessian_eigenvalues":
            assert measurement.standard_error >= 0
    assert end.samples_seen > 0
    assert sum(m.seconds for m in profile.measurements) <= profile.seconds <= end.seconds
    assert torch.equal(state, torch.get_rng_state())
    assert (folder / job.start_from.path).read_bytes() == content
    again, _ = run(pickle.loads(pickle.dumps(objective)), job)
    assert again is not None
    assert without_seconds(again) == without_seconds(profile)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in GAINS])
def test_every_metric_leaves_its_network_bit_identical(row: str, images: Any) -> None:
    model = network(images).train()
    context = plain_context(model, images)
    before = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    registry.load("metrics", row)(context)
    after = [*model.parameters(), *model.buffers()]
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert all(module.training for module in model.modules())


def plain_context(model: nn.Module, images: Any, **options: Any) -> MetricContext:
    pixels = torch.as_tensor(np.array(images.train.images[:90])).float() / 255
    labels = torch.as_tensor(np.array(images.train.labels[:90]))
    batches = list(zip(pixels.split(40), labels.split(40), strict=True))
    return MetricContext(model, batches, Tier2Spec(num_probes=4, **options), seed=3)


def test_values_are_those_of_the_landscape_room_in_eval_mode_on_the_plain_loss(
    images: Any, study: tuple[Path, Job]
) -> None:
    folder, job = study
    metrics = ["sam_sharpness", "asam_sharpness", "noise_sharpness", "gradient_norm"]
    metrics += ["hessian_eigenvalues", "hessian_trace"]
    options = spec(metrics=metrics, refinements=[])
    profile, end = run(FlatnessObjective(options, images, folder), job)
    assert profile is not None
    order = nested_order(images.train.labels, seed=options.seed)[:100]
    pixels = torch.as_tensor(np.array(images.train.images)[order]).double() / 255
    mean, std = (torch.tensor(v).double().view(1, -1, 1, 1) for v in (images.mean, images.std))
    inputs = ((pixels - mean) / std).float()
    targets = torch.as_tensor(np.array(images.train.labels)[order])
    model = network(images).eval()
    loss = functional.cross_entropy(model(inputs), targets)
    grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert profile["gradient_norm"].value == pytest.approx(float(grads.norm()), rel=1e-4)
    with torch.no_grad(), landscape.perturbed(model, 0.05 * grads / grads.norm()):
        rise = functional.cross_entropy(model(inputs), targets) - loss
    assert profile["sam_sharpness"].value == pytest.approx(float(rise), rel=1e-3)
    op = landscape.hessian(model, functional.cross_entropy, [(inputs, targets)])
    top = landscape.top_eigenpairs(op, k=3, tolerance=1e-4)
    for i in range(3):
        found = profile[f"hessian_eigenvalue_{i + 1}"].value
        assert found == pytest.approx(float(top.values[i]), rel=1e-3)
    exact = landscape.trace(op, num_probes=100)
    estimate = profile["hessian_trace"]
    error = math.hypot(estimate.standard_error, exact.standard_error)
    assert abs(estimate.value - exact.value) < 5 * error
    # 1 gradient for all, 1/3 for SAM and ASAM each, 16/3 for the noise, 1 graph, 2 per product
    products = int(profile["hessian_eigenvalue_1"].note.split(" after ")[1].split()[0]) + 4
    assert end.samples_seen == round((1 + 2 / 3 + 16 / 3 + 1 + 2 * products) * 100)


def test_a_metric_does_not_depend_on_which_others_run(images: Any, study: tuple[Path, Job]) -> None:
    folder, job = study
    full, _ = run(FlatnessObjective(spec(), images, folder), job)
    assert full is not None
    for row in ("noise_sharpness", "hessian_trace", "swa_gain"):
        alone = spec(metrics=[row], refinements=[])
        profile, _ = run(FlatnessObjective(alone, images, folder), job)
        assert profile is not None
        for name in measured_names(row, alone.tier2):
            assert profile[name].value == full[name].value


def test_fewer_examples_in_the_rung_are_all_that_is_measured_on(
    images: Any, study: tuple[Path, Job]
) -> None:
    folder, job = study
    small = dataclasses.replace(job, rung=Rung(1, 0.2, 40, 2))
    profile, _ = run(FlatnessObjective(spec(), images, folder), small)
    assert profile is not None
    assert profile["sam_sharpness"].num_examples == 40


def test_metric_that_raises_or_is_not_finite_becomes_a_note_and_costs_no_other(
    images: Any,
) -> None:
    model = network(images)
    names = ["sam_sharpness", "hessian_eigenvalues", "swa_gain", "gradient_norm"]
    context = plain_context(model, images, num_eigenvalues=2)
    profile = measure(context, names, trial_id="t1")
    assert "failed: ValueError: swa_gain needs training" in profile["swa_gain"].note
    assert math.isnan(profile["swa_gain_loss"].value)
    assert math.isfinite(profile["gradient_norm"].value)

    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    broken = measure(plain_context(model, images, num_eigenvalues=2), names, trial_id="t1")
    assert all(math.isnan(m.value) and m.note for m in broken.measurements)
    assert "not finite" in broken["sam_sharpness"].note
    assert broken["hessian_eigenvalue_2"].note == (
        "failed: FloatingPointError: a Hessian product is not finite"
    )


@pytest.mark.parametrize("where", ["file", "functions"])
def test_out_of_memory_is_tried_again_with_smaller_batches_and_only_then_becomes_a_note(
    where: str, images: Any, study: tuple[Path, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = study
    objective: Objective = FlatnessObjective(spec(refinements=[]), images, folder)
    if where == "functions":
        split = tuple(
            torch.as_tensor(np.array(part)) for part in (images.train.images, images.train.labels)
        )
        training = CallableObjective(
            lambda config: network(images),
            lambda: ((split[0].float() / 255, split[1]),) * 2,
            functional.cross_entropy,
            lambda model, config: torch.optim.SGD(model.parameters(), lr=0.1),
            folder,
            device="cpu",
        )
        objective = CallableFlatnessObjective(training, spec(refinements=[]).tier2)
    sizes: list[list[int]] = []

    def greedy(context: MetricContext) -> Any:
        sizes.append([len(labels) for _, labels in context.batches])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("llp.flatness.metrics.hessian_trace", greedy)
    profile, end = run(objective, job)
    assert (profile, end.outcome) == (None, "out_of_memory")
    assert "Tried to allocate" in end.failure
    assert end.samples_seen > 0, "what was measured before it was spent"
    again, end = run(objective, dataclasses.replace(job, attempt=1, micro_batch_divisor=4))
    assert end.outcome == "completed"
    assert again is not None
    assert sizes == [[40, 40, 20], [10] * 10]
    assert math.isnan(again["hessian_trace"].value)
    assert "failed: OutOfMemoryError: CUDA out of memory" in again["hessian_trace"].note
    assert math.isfinite(again["sam_sharpness"].value)


def test_smaller_batches_measure_the_same(images: Any, study: tuple[Path, Job]) -> None:
    folder, job = study
    objective = FlatnessObjective(spec(refinements=[]), images, folder)
    whole, _ = run(objective, job)
    parts, _ = run(objective, dataclasses.replace(job, micro_batch_divisor=64))
    assert whole is not None
    assert parts is not None
    for measurement in whole.measurements:
        assert parts[measurement.name].value == pytest.approx(measurement.value, rel=1e-3)


def test_unknown_metric_is_refused_before_anything_is_measured(images: Any) -> None:
    with pytest.raises(SpecError, match="did you mean 'sam_sharpness'"):
        measure(plain_context(network(images), images), ["sam_sharpnes"], trial_id="t")


@pytest.mark.parametrize("damage", ["altered", "missing", "none", "other network"])
def test_checkpoint_that_cannot_be_used_fails_the_job_with_its_reason(
    damage: str, images: Any, study: tuple[Path, Job]
) -> None:
    folder, job = study
    file = folder / job.start_from.path
    reference: CheckpointRef | None = job.start_from
    if damage == "altered":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    elif damage == "missing":
        file.unlink()
    elif damage == "none":
        reference = None
    else:
        reference = checkpoint.save(
            "checkpoints/x.pt", {"model": nn.Linear(1, 1).state_dict()}, root=folder
        )
    profile, end = run(
        FlatnessObjective(spec(), images, folder), dataclasses.replace(job, start_from=reference)
    )
    assert profile is None
    assert end.outcome == "failed"
    expected = {
        "altered": "is damaged or was replaced",
        "missing": "does not exist",
        "none": "names no checkpoint",
        "other network": "holds the weights of another network",
    }
    assert expected[damage] in end.failure


def test_other_kinds_of_jobs_are_refused(images: Any, study: tuple[Path, Job]) -> None:
    folder, job = study
    with pytest.raises(ValueError, match="does not work on 'probe' jobs"):
        run(FlatnessObjective(spec(), images, folder), dataclasses.replace(job, kind="probe"))


def test_swa_gain_is_the_paired_difference_to_the_checkpoint(
    images: Any, study: tuple[Path, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = study
    seen: dict[str, Tensor] = {}
    original = refinements.averaged

    def watched(setup: Any, epochs: int, device: Any) -> Any:
        seen["start"] = landscape.flatten(list(setup.model.parameters()))
        rates = [group["lr"] for group in setup.optimizer.param_groups]
        average = original(setup, epochs, device)
        assert [group["lr"] for group in setup.optimizer.param_groups] == [
            pytest.approx(0.5 * rate) for rate in rates
        ]
        seen["average"] = landscape.flatten(list(average.parameters()))
        seen["model"] = average.module
        return average

    monkeypatch.setattr(refinements, "averaged", watched)
    options = spec(metrics=["swa_gain"], refinements=["swa_gain"], refinement_epochs=2)
    profile, end = run(FlatnessObjective(options, images, folder), job)
    assert profile is not None
    start = landscape.flatten(list(network(images).parameters()))
    assert torch.equal(seen["start"], start)
    assert not torch.equal(seen["average"], start)

    pixels = torch.as_tensor(np.array(images.validation.images)).double() / 255
    mean, std = (torch.tensor(v).double().view(1, -1, 1, 1) for v in (images.mean, images.std))
    inputs = ((pixels - mean) / std).float()
    labels = torch.as_tensor(np.array(images.validation.labels))
    models = (network(images), seen["model"])
    with torch.no_grad():
        outputs = [model.eval()(inputs).double() for model in models]
    before, after = (functional.cross_entropy(o, labels, reduction="none") for o in outputs)
    gain = before - after
    assert profile["swa_gain_loss"].value == pytest.approx(float(gain.mean()), rel=1e-4)
    error = float(gain.std()) / math.sqrt(len(labels))
    assert profile["swa_gain_loss"].standard_error == pytest.approx(error, rel=1e-4)
    accuracies = [float((o.argmax(1) == labels).double().mean()) for o in outputs]
    assert profile["swa_gain"].value == pytest.approx(accuracies[1] - accuracies[0])
    # two epochs of training and a third of a gradient for the batch statistics
    assert end.samples_seen == 2 * len(images.train) + round(100 / 3)


@pytest.mark.parametrize(("row", "passes"), [("sam_gain", 2), ("entropy_sgd_gain", 1)])
def test_a_gain_is_that_of_the_continued_training(
    row: str,
    passes: int,
    images: Any,
    study: tuple[Path, Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, job = study
    seen: list[Any] = []
    original = loop.train_epoch

    def watched(steps: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(steps)
        return original(steps, *args, **kwargs)

    monkeypatch.setattr(loop, "train_epoch", watched)
    options = spec(metrics=[], refinements=[row], refinement_epochs=2)
    profile, end = run(FlatnessObjective(options, images, folder), job)
    assert profile is not None
    (steps, again) = seen
    assert steps is again
    assert steps.optimizer.num_gradients == {"sam_gain": 2, "entropy_sgd_gain": 5}[row]
    assert steps.peaks == [pytest.approx(0.1 * options.training.learning_rate)]
    batches = len(images.train) // options.training.batch_size + 1
    assert steps.schedule(0) == 1.0
    assert steps.schedule(2 * batches) == pytest.approx(0.0, abs=0.02)
    start = landscape.flatten(list(network(images).parameters()))
    assert not torch.equal(landscape.flatten(list(steps.model.parameters())), start)
    validation = (
        FlatnessObjective(options, images, folder)
        .training.prepare(dataclasses.replace(job, kind="probe"), torch.device("cpu"))
        .validation
    )
    before = loop.evaluate(network(images), validation)
    after = loop.evaluate(steps.model, validation)
    assert profile[row].value == pytest.approx(after.accuracy - before.accuracy, abs=1e-6)
    assert profile[f"{row}_loss"].value == pytest.approx(before.loss - after.loss, abs=1e-5)
    assert profile[row].standard_error > 0
    assert end.samples_seen == passes * 2 * len(images.train)


def test_average_of_a_run_at_rest_is_the_checkpoint(images: Any, study: tuple[Path, Job]) -> None:
    folder, job = study
    options = spec(metrics=[], refinements=["swa_gain"])
    objective = FlatnessObjective(options, images, folder)
    setup = objective._context(job, torch.device("cpu")).fresh()
    for group in setup.optimizer.param_groups:
        group["lr"] = 0.0
    average = refinements.averaged(setup, 2, torch.device("cpu"))
    before = landscape.flatten(list(network(images).parameters()))
    assert torch.allclose(landscape.flatten(list(average.parameters())), before, atol=1e-6)


def test_search_from_python_functions_is_measured_with_its_own_criterion(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 3, generator=generator)
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5])

    def model_fn(config: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))

    training = CallableObjective(
        model_fn,
        lambda: ((inputs[:50], targets[:50]), (inputs[50:], targets[50:])),
        nn.MSELoss(),
        lambda model, config: torch.optim.SGD(model.parameters(), lr=0.01),
        tmp_path,
        num_correct=lambda output, target: ((output - target).abs() < 0.5).sum(),
        device="cpu",
    )
    torch.manual_seed(0)
    model = model_fn({})
    reference = checkpoint.save("checkpoints/a.pt", {"model": model.state_dict()}, root=tmp_path)
    job = Job("t0-m", "measure", Trial("t0", {}, 0), Rung(1, 1.0, 50, 1), 0, start_from=reference)
    profile, end = run(CallableFlatnessObjective(training, Tier2Spec(num_probes=64, budget=0)), job)
    assert end.outcome == "completed", end.failure
    assert profile is not None
    # Mean squared error of a linear model: H = 2/n X'X with a column of ones for the bias
    design = torch.cat([inputs[:50], torch.ones(50, 1)], 1).double()
    hessian = 2 * design.T @ design / 50
    assert profile["hessian_eigenvalue_1"].value == pytest.approx(
        float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4
    )
    trace = profile["hessian_trace"]
    assert abs(trace.value - float(hessian.trace())) < 5 * trace.standard_error
    assert math.isfinite(profile["swa_gain_loss"].value)
    assert profile["swa_gain_loss"].num_examples == 10
