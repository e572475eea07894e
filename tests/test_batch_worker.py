"""What a worker trains is what the file asks for, for every optimizer; else it is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llp import batch, registry
from llp.batch_worker import CONFIGURATION, RunObjective
from llp.errors import LlpError
from llp.records import CurvePoint, Observation, Verification
from llp.spec.batch import load_batch
from llp.spec.batch_plan import finals

SYNTHETIC = """\
version: 1
name: b
defaults:
  dataset: {name: synthetic, options: {num_train: 200, num_test: 60, num_classes: 4, image_size: 8}}
  model: {name: mlp, options: {width: 8, depth: 1}}
  training: {epochs: 2, batch_size: 32, augmentation: [flip]}
runs:
  it: %s
"""


def job_of(folder: Path, run: str = "{}", **changes: object):
    path = folder / "b.yaml"
    path.write_text(SYNTHETIC % run)
    found = load_batch(path)
    data = batch.datasets(found)["it"]
    one = finals(found.runs["it"])[0]
    job = batch._job(one, "verify", 7, 0, len(data.train))
    return found.runs["it"], one, job, RunObjective(found.runs["it"].spec, data, folder, threads=1)


def reports_of(objective, job):
    found, work = [], objective(job)
    try:
        while True:
            found.append(next(work))
    except StopIteration as stop:
        return found, stop.value


@pytest.mark.parametrize("optimizer", sorted(registry.OPTIMIZERS))
def test_every_optimizer_trains_with_what_was_asked_for(tmp_path, optimizer):
    run, one, job, objective = job_of(
        tmp_path,
        f"{{parameters: {{optimizer: {optimizer}, learning_rate: 0.0123, weight_decay: 0.00321, "
        "batch_size: 16, label_smoothing: 0.05, schedule: constant}}",
    )
    reports, end = reports_of(objective, job)
    assert end.outcome == "completed", end.failure
    said = reports[0]
    assert isinstance(said, Observation)
    assert said.callback == CONFIGURATION
    asked = batch.asked_for(run, one, job)
    assert asked["learning_rate"] == 0.0123
    assert asked["num_examples"] == job.rung.num_examples
    batch._require_asked(job.job_id, asked, json.loads(said.note))
    assert [type(report) for report in reports[1:]] == [CurvePoint, CurvePoint, Verification]


@pytest.mark.parametrize("averaging", sorted(registry.AVERAGINGS))
def test_every_averaging_too(tmp_path, averaging):
    run, one, job, objective = job_of(tmp_path, f"{{parameters: {{averaging: {averaging}}}}}")
    said = next(objective(job))
    batch._require_asked(job.job_id, batch.asked_for(run, one, job), json.loads(said.note))
    assert json.loads(said.note)["averaging"] == averaging


def test_options_of_every_kind_are_held_against_the_file(tmp_path):
    run, one, job, objective = job_of(
        tmp_path,
        "{parameters: {optimizer: talt, valley_strength: 0.7, smoothing_factor: 0.3, width: 12, "
        "averaging: ema, ema_decay: 0.9, augmentation: none, gradient_clip: none}, "
        "data_fraction: 0.5}",
    )
    said = json.loads(next(objective(job)).note)
    asked = batch.asked_for(run, one, job)
    batch._require_asked(job.job_id, asked, said)
    assert said["augmentation"] == asked["augmentation"] == []
    assert said["gradient_clip"] is None
    assert said["num_examples"] == round(0.5 * 170)
    assert {"valley_strength", "width", "ema_decay"} <= asked.keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 0.1), ("momentum", 0.5), ("num_examples", 3), ("seed", 8), ("width", 9)],
)
def test_a_value_that_got_lost_on_the_way_ends_the_batch(tmp_path, key, value):
    run, one, job, objective = job_of(
        tmp_path, "{parameters: {learning_rate: 0.05, momentum: 0.8, width: 12}}"
    )
    said = json.loads(next(objective(job)).note)
    asked = batch.asked_for(run, one, job)
    batch._require_asked(job.job_id, asked, said)
    with pytest.raises(LlpError, match=f"{key} .* instead of") as caught:
        batch._require_asked(job.job_id, asked, {**said, key: value})
    assert caught.value.exit_code == 1
    del said[key]
    with pytest.raises(LlpError, match=f"{key} None instead of"):
        batch._require_asked(job.job_id, asked, said)


def test_a_worker_that_ignores_the_learning_rate_is_caught(tmp_path, monkeypatch):
    from llp.training.recipe import Recipe

    run, one, job, objective = job_of(tmp_path, "{parameters: {learning_rate: 0.05}}")
    real = Recipe.build_optimizer

    def deaf(self, model):
        optimizer = real(self, model)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        return optimizer

    monkeypatch.setattr(Recipe, "build_optimizer", deaf)
    said = json.loads(next(objective(job)).note)
    with pytest.raises(LlpError, match=r"learning_rate 0\.1 instead of 0\.05: a bug"):
        batch._require_asked(job.job_id, batch.asked_for(run, one, job), said)


def test_a_share_of_the_data_is_the_first_part_of_the_nested_order(tmp_path):
    _, _, job, objective = job_of(tmp_path, "{data_fraction: 0.5}")
    _, _, whole, everything = job_of(tmp_path, "{}")
    import torch

    few = objective.prepare(job, torch.device("cpu")).train
    probe = batch._job(finals(load_batch(tmp_path / "b.yaml").runs["it"])[0], "probe", 7, 0, 170)
    assert few.num_examples == 85
    assert everything.prepare(whole, torch.device("cpu")).train.num_examples == 170
    assert everything.prepare(probe, torch.device("cpu")).test is None  # never sees the test split
    assert everything.prepare(whole, torch.device("cpu")).test is not None


def test_a_full_training_of_a_batch_is_that_of_a_search_to_the_bit(tmp_path):
    from llp.training.objective import TrainingObjective

    run, _, job, objective = job_of(tmp_path, "{parameters: {learning_rate: 0.05}}")
    found, _ = reports_of(objective, job)
    data = objective.data
    (tmp_path / "other").mkdir()
    other, _ = reports_of(TrainingObjective(run.spec, data, tmp_path / "other", threads=1), job)
    same = [(r.train_loss, r.validation_loss) for r in other if isinstance(r, CurvePoint)]
    assert [(r.train_loss, r.validation_loss) for r in found if isinstance(r, CurvePoint)] == same
    assert found[-1].test_loss == other[-1].test_loss
