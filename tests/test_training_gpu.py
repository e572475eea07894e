"""The same training on a GPU: half precision, compilation, resumption, micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training_support import HERE, drive, image_data, make_job, make_spec, objective

from llp.records import Rung
from llp.training import jobs
from llp.training.objective import TrainingObjective, check_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
JOB = make_job(rung=Rung(1, 1.0, 61, 6))


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_every_precision_learns_on_the_gpu(tmp_path: Path, precision: str) -> None:
    spec = make_spec(
        model={"name": "convnet", "options": {"width": 8}},
        training={"precision": precision, "gradient_clip": 1.0, "augmentation": ["crop"]},
    )
    work = TrainingObjective(spec, image_data(), tmp_path, "cuda")
    points, end = drive(work, JOB)
    on_cpu, _ = drive(
        objective(tmp_path, make_spec(model=spec.model.model_dump(), training={})), JOB
    )
    assert end.outcome == "completed", end.failure
    assert points[-1].train_loss < points[0].train_loss
    assert points[-1].validation_loss == pytest.approx(on_cpu[-1].validation_loss, abs=0.5)
    assert end.device == torch.cuda.get_device_name()
    assert 0 < end.peak_memory_bytes < 2**30


def test_a_compiled_model_trains_as_the_plain_one(tmp_path: Path) -> None:
    curves = []
    for compiled in (False, True):
        spec = make_spec(training={"compile": compiled})
        points, end = drive(TrainingObjective(spec, image_data(), tmp_path, "cuda"), JOB)
        assert end.outcome == "completed", end.failure
        curves.append([p.train_loss for p in points])
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_resumed_job_goes_on_where_it_was(tmp_path: Path, precision: str) -> None:
    spec = make_spec(model={"name": f"{HERE}:noisy"}, training={"precision": precision})
    expected, _ = drive(TrainingObjective(spec, image_data(), tmp_path / "a", "cuda"), JOB)
    work = TrainingObjective(spec, image_data(), tmp_path / "b", "cuda", checkpoint_seconds=0.0)
    generator = work(JOB)
    for _ in range(3):
        next(generator)
    generator.close()
    assert jobs.partial_path(tmp_path / "b", JOB.job_id).exists()
    found, end = drive(
        TrainingObjective(spec, image_data(), tmp_path / "b", "cuda"), replace(JOB, attempt=1)
    )
    assert end.samples_seen == 6 * 61
    assert [p.train_loss for p in found] == pytest.approx(
        [p.train_loss for p in expected], rel=1e-3
    )


def test_memory_that_runs_out_on_the_gpu_is_an_outcome(tmp_path: Path) -> None:
    spec = make_spec(model={"name": f"{HERE}:boundless"})
    work = TrainingObjective(spec, image_data(), tmp_path, "cuda")
    _, end = drive(work, JOB)
    assert end.outcome == "out_of_memory"
    assert torch.cuda.memory_allocated() < 2**30
    _, end = drive(TrainingObjective(make_spec(), image_data(), tmp_path, "cuda"), JOB)
    assert end.outcome == "completed"


def test_a_batch_is_checked_on_the_gpu() -> None:
    report = check_batch(make_spec(), image_data(), "cuda")
    assert report["device"] == "cuda"
    assert report["output_shape"] == [16, 3]
