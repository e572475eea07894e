"""What a worker promises about a probe and a verification."""

from __future__ import annotations

import errno
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_support import (
    HERE,
    NUM_TEST,
    NUM_TRAIN,
    Untouchable,
    drive,
    equal,
    image_data,
    make_job,
    make_spec,
    numbers,
    objective,
    weights,
)
from torch.nn import functional

from llp.errors import EnvironmentProblem, SpecError
from llp.protocols import Objective
from llp.records import CheckpointRef, CurvePoint, Rung, Verification
from llp.spec.checks import check
from llp.spec.digest import digest
from llp.training import checkpoint, jobs
from llp.training.objective import TrainingObjective, check_batch
from llp.workloads import subsets
from llp.workloads.batches import Batches


def test_a_probe_reports_every_epoch_and_counts_samples_exactly(tmp_path: Path) -> None:
    work = objective(tmp_path)
    assert isinstance(work, Objective)
    points, end = drive(work, make_job())
    assert [p.epoch for p in points] == [1, 2, 3, 4]
    assert [p.samples_seen for p in points] == [33, 66, 99, 132]
    assert (end.outcome, end.samples_seen, end.failure) == ("completed", 132, "")
    assert all(p.rung == 1 and p.data_fraction == 0.5 for p in points)
    assert points[-1].train_loss < points[0].train_loss
    assert [p.seconds for p in points] == sorted(p.seconds for p in points)
    assert end.seconds >= points[-1].seconds > 0
    assert end.peak_memory_bytes > 10 * 2**20
    assert end.device == "cpu"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["t000-r1.pt"]
    assert end.checkpoint is not None
    assert checkpoint.load_ref(end.checkpoint, root=tmp_path)["epoch"] == 4


@pytest.mark.parametrize("num_examples", [1, 2, 16, 17, 32, 33, 61])
def test_no_example_of_a_ragged_batch_is_lost(tmp_path: Path, num_examples: int) -> None:
    _, end = drive(objective(tmp_path), make_job(rung=Rung(1, 0.1, num_examples, 2)))
    assert (end.outcome, end.samples_seen) == ("completed", 2 * num_examples)


def test_the_last_step_uses_the_end_of_its_own_schedule(tmp_path: Path) -> None:
    for epochs in (2, 4):
        points, _ = drive(objective(tmp_path), make_job(rung=Rung(1, 0.5, 32, epochs)))
        steps = 2 * epochs
        expected = 0.05 * (1 + math.cos(math.pi * (steps - 1) / steps)) / 2
        assert points[-1].learning_rate == pytest.approx(expected)


def test_short_probes_warm_up_for_as_long_as_tier_one_says(tmp_path: Path) -> None:
    data = objective(tmp_path).data
    full = Rung(3, 1.0, len(data.train), 4)
    short = Rung(1, 0.5, 32, 4)

    def first(rung: Rung, tier1: float | None, own: float) -> float:
        spec = make_spec(
            training={"warmup_fraction": own}, tier1={"warmup_fraction": tier1, "num_trials": 2}
        )
        setup = TrainingObjective(spec, data, tmp_path).prepare(
            make_job(rung=rung), torch.device("cpu")
        )
        steps = rung.epochs * len(setup.train)
        rise = [setup.schedule(step) for step in range(steps)]
        return rise.index(max(rise)) / steps

    assert first(short, None, 0.0) == first(short, 0.0, 0.0) == 0
    assert first(short, 0.5, 0.0) == first(short, 0.5, 0.25) == first(short, 0.25, 0.5) == 0.5
    assert first(full, 0.5, 0.0) == 0  # a full training is the recipe's
    with pytest.raises(SpecError, match="one_cycle has a rise of its own"):
        check(make_spec(training={"schedule": "one_cycle"}, tier1={"warmup_fraction": 0.5}))
    assert digest(make_spec()) == digest(make_spec(tier1={"warmup_fraction": None}))
    assert digest(make_spec()) != digest(make_spec(tier1={"warmup_fraction": 0.5}))


def test_reported_validation_is_that_of_the_saved_weights(tmp_path: Path) -> None:
    work = objective(tmp_path)
    points, _ = drive(work, make_job())
    saved, data = weights(tmp_path), work.data
    images = (torch.from_numpy(data.validation.images) / 255 - 0.5) / 0.3
    hidden = functional.relu(images.flatten(1) @ saved["1.weight"].T + saved["1.bias"])
    names = sorted(k for k in saved if k.endswith("weight"))
    logits = hidden @ saved[names[1]].T + saved[names[1].replace("weight", "bias")]
    labels = torch.from_numpy(data.validation.labels)
    expected = functional.cross_entropy(logits, labels)
    assert points[-1].validation_loss == pytest.approx(float(expected), abs=1e-5)
    assert points[-1].validation_accuracy == float((logits.argmax(1) == labels).double().mean())


def test_same_seed_same_bits_and_another_seed_other_bits(tmp_path: Path) -> None:
    runs = []
    for seed in (5, 5, 6):
        points, _ = drive(objective(tmp_path), make_job(seed=seed))
        runs.append((numbers(points), weights(tmp_path)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert equal(runs[0][1], runs[1][1])
    assert not equal(runs[0][1], runs[2][1])


def test_jobs_on_one_objective_do_not_influence_each_other(tmp_path: Path) -> None:
    spec = make_spec(model={"name": f"{HERE}:noisy"}, training={"augmentation": ["flip", "crop"]})
    work = objective(tmp_path, spec)
    first = make_job(job_id="a")
    second = make_job({"optimizer": "adamw", "batch_size": 8}, job_id="b", seed=9)
    alone = [numbers(drive(objective(tmp_path, spec), job)[0]) for job in (first, second)]
    backwards = [numbers(drive(work, job)[0]) for job in (second, first)]
    woven: list[list[Any]] = [[], []]
    running = [work(first), work(second)]
    for _ in range(4):
        for index in (0, 1):
            woven[index].append(next(running[index]))
            torch.rand(3)  # somebody else draws from the global generator
    assert alone == backwards[::-1] == [numbers(points) for points in woven]


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    drive(objective(tmp_path), make_job())
    generator = objective(tmp_path)(make_job())
    next(generator)
    generator.close()
    assert torch.equal(torch.rand(4), expected)


def test_a_probe_trains_on_the_nested_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(split: Any, indices: Any = None, **options: Any) -> Batches:
        seen.append(indices)
        return Batches(split, indices, **options)

    monkeypatch.setattr("llp.training.objective.Batches", spy)
    work = objective(tmp_path, make_spec(seed=3))
    drive(work, make_job(rung=Rung(1, 0.2, 12, 1)))
    drive(work, make_job(rung=Rung(2, 0.5, 33, 1), seed=8))
    trained = [list(indices) for indices in seen if indices is not None]
    order = list(subsets.nested_order(work.data.train.labels, seed=3))
    assert trained == [order[:12], order[:33]]


def test_a_probe_never_touches_the_test_split(tmp_path: Path) -> None:
    work = objective(tmp_path, data=image_data(test=Untouchable()))
    assert drive(work, make_job())[1].outcome == "completed"


def test_a_verification_trains_on_everything_and_reads_the_test_split_once(
    tmp_path: Path,
) -> None:
    test = Untouchable(allowed=1)
    work = objective(tmp_path, data=image_data(test=test))
    generator = work(make_job(kind="verify", job_id="t000-v1"))
    points = [next(generator) for _ in range(4)]
    assert test.reads == []
    assert [p.samples_seen for p in points] == [NUM_TRAIN * e for e in (1, 2, 3, 4)]
    assert {(p.rung, p.data_fraction) for p in points} == {(4, 1.0)}
    verification = next(generator)
    assert isinstance(verification, Verification)
    assert len(test.reads) > 0
    reads = len(test.reads)
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert len(test.reads) == reads
    end = stop.value.value
    assert (end.outcome, end.samples_seen) == ("completed", 4 * NUM_TRAIN)
    assert end.checkpoint == CheckpointRef("checkpoints/t000-v1.pt", end.checkpoint.sha256)
    assert verification.num_test_examples == NUM_TEST
    assert verification.samples_seen == 4 * NUM_TRAIN
    assert verification.validation_loss == points[-1].validation_loss
    assert 0.8 < verification.test_accuracy <= 1


def test_verification_epochs_go_before_training_epochs(tmp_path: Path) -> None:
    work = objective(tmp_path, make_spec(verification={"epochs": 2}))
    reports, _ = drive(work, make_job(kind="verify"))
    assert [type(r) for r in reports] == [CurvePoint, CurvePoint, Verification]


def test_reports_can_be_thinned_and_keep_the_last(tmp_path: Path) -> None:
    work = objective(tmp_path, make_spec(tier1={"report_every": 3}))
    points, _ = drive(work, make_job())
    full, _ = drive(objective(tmp_path), make_job())
    assert [p.epoch for p in points] == [3, 4]
    assert numbers(points) == numbers(full)[2:]


def test_a_warm_start_begins_where_the_checkpoint_ended(tmp_path: Path) -> None:
    work = objective(tmp_path)
    _, end = drive(work, make_job(rung=Rung(1, 0.5, 33, 8)))
    warm = make_job(job_id="t000-r2", rung=Rung(2, 1.0, 61, 1), start_from=end.checkpoint)
    cold = replace(warm, job_id="t001-r2", start_from=None)
    assert drive(work, warm)[0][0].train_loss < drive(work, cold)[0][0].train_loss


def test_a_warm_start_from_a_damaged_checkpoint_fails_and_says_so(tmp_path: Path) -> None:
    work = objective(tmp_path)
    _, end = drive(work, make_job())
    path = tmp_path / "checkpoints" / "t000-r1.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    _, second = drive(work, make_job(job_id="t000-r2", start_from=end.checkpoint))
    assert second.outcome == "failed"
    assert "damaged or was replaced" in second.failure
    assert second.samples_seen == 0


@pytest.mark.parametrize("model", ["mlp", "convnet", "simple_cnn"])
def test_an_absurd_learning_rate_diverges_within_the_first_epochs(
    tmp_path: Path, model: str
) -> None:
    work = objective(tmp_path, make_spec(model={"name": model, "options": {"width": 8}}))
    points, end = drive(work, make_job({"learning_rate": 1e9}, rung=Rung(1, 1.0, 61, 20)))
    assert end.outcome == "diverged"
    assert "loss" in end.failure
    assert len(points) <= 1
    assert all(math.isfinite(p.train_loss + p.validation_loss) for p in points)
    assert end.checkpoint is None
    assert end.samples_seen <= 2 * 61


def test_two_lost_epochs_are_divergence_and_one_is_not(tmp_path: Path) -> None:
    run = jobs.JobRun(
        make_job(),
        lambda: None,  # type: ignore[arg-type, return-value]
        folder=tmp_path,
        device=torch.device("cpu"),
        checkpoint_seconds=30,
    )
    guess = math.log(3)
    setup = type("Setup", (), {"guessing_loss": guess})()
    run._require_sane(5 * guess, setup)
    run._last_loss = 5 * guess
    run._require_sane(2 * guess, setup)
    with pytest.raises(Exception, match=r"mean training loss is 4\.39 in epoch 1 after 5\.49"):
        run._require_sane(4 * guess, setup)
    run._last_loss = 0.0
    with pytest.raises(Exception, match=r"guessing would give 1\.1"):
        run._require_sane(101 * guess, setup)


def test_a_failing_model_is_a_failed_job_with_its_traceback(tmp_path: Path) -> None:
    spec = make_spec(model={"name": f"{HERE}:broken", "options": {"after": 4}})
    points, end = drive(objective(tmp_path, spec), make_job())
    assert end.outcome == "failed"
    assert "Traceback (most recent call last)" in end.failure
    assert "a bug in the user's network" in end.failure
    assert "test_training_support.py" in end.failure
    assert (len(points), end.checkpoint) == (2, None)
    assert end.samples_seen == 66


@pytest.mark.parametrize(("name", "options"), [("hungry", {"after": 3}), ("greedy", {})])
def test_memory_that_runs_out_is_an_outcome(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    spec = make_spec(model={"name": f"{HERE}:{name}", "options": options})
    _, end = drive(objective(tmp_path, spec), make_job())
    assert end.outcome == "out_of_memory"
    assert "memory" in end.failure


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_every_form_of_out_of_memory_is_recognised(error: Exception) -> None:
    assert jobs.is_out_of_memory(error)
    assert not jobs.is_out_of_memory(RuntimeError("shape mismatch"))


def test_an_unread_hyperparameter_is_a_failed_job(tmp_path: Path) -> None:
    _, end = drive(objective(tmp_path), make_job({"lr": 0.1}))
    assert end.outcome == "failed"
    assert "nothing reads 'lr'" in end.failure


def test_an_interrupt_passes_through(tmp_path: Path) -> None:
    work = objective(tmp_path, make_spec(model={"name": f"{HERE}:interrupted"}))
    with pytest.raises(KeyboardInterrupt):
        drive(work, make_job())


def test_a_full_disk_ends_the_worker_and_not_just_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        drive(objective(tmp_path), make_job())


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    whole, _ = drive(objective(tmp_path), make_job())
    parts, end = drive(objective(tmp_path), make_job(job_id="b", micro_batch_divisor=4))
    assert end.samples_seen == 132
    for one, other in zip(whole, parts, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-5)
        assert one.validation_loss == pytest.approx(other.validation_loss, abs=1e-5)


def test_it_travels_without_what_it_put_on_the_device(tmp_path: Path) -> None:
    work = objective(tmp_path)
    expected = numbers(drive(work, make_job())[0])
    assert work._cache
    travelled = pickle.loads(pickle.dumps(work))
    assert travelled._cache == {}
    assert numbers(drive(travelled, make_job())[0]) == expected


def test_plain_data_will_do_for_a_spec(tmp_path: Path) -> None:
    spec = make_spec()
    plain = objective(tmp_path, spec.model_dump(mode="json"))  # type: ignore[arg-type]
    assert plain.spec == spec


def test_measurements_are_not_its_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not work on 'measure' jobs"):
        drive(objective(tmp_path), make_job(kind="measure"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_environment_problem(tmp_path: Path) -> None:
    work = objective(tmp_path, make_spec(resources={"gpus_per_trial": 0.5}))
    work.device = None
    with pytest.raises(EnvironmentProblem, match="CUDA sees no GPU"):
        drive(work, make_job())


def test_checking_a_batch_reports_the_model_and_leaves_the_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    spec = make_spec(
        search_space={
            "momentum": {"type": "uniform", "low": 0, "high": 0.9, "when": {"optimizer": "sgd"}},
            "optimizer": ["sgd"],
        }
    )
    report = check_batch(spec, image_data(test=Untouchable()))
    assert report["parameters"] == 64 * 16 + 16 + 16 * 3 + 3
    assert report["output_shape"] == [16, 3]
    assert 0.1 < report["loss"] < 10
    assert report["seconds"] > 0
    assert set(report["sampled"]["hyperparameters"]) == {"momentum", "optimizer"}
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"model": {"name": f"{HERE}:five_classes"}},
            r"must give logits of shape \[16, 3\] .* and gives \[16, 5\]",
        ),
        ({"model": {"name": f"{HERE}:broken"}}, "fails on a training step: KeyError"),
        ({"model": {"name": f"{HERE}:greedy"}}, "cannot be built for 1x8x8 images and 3 classes"),
        ({"search_space": {"lr": [0.1]}}, "nothing reads 'lr'"),
        ({"training": {"optimizer_options": {"nesterov": True, "momentum": 0.0}}}, "Nesterov"),
        ({"model": {"name": "vgg11"}}, "pixels"),
    ],
)
def test_checking_a_batch_names_what_does_not_fit(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        check_batch(make_spec(**sections), image_data())
