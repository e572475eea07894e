"""JSON batches of the TALT project: every field is mapped or refused, none is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llp.errors import SpecError
from llp.spec.batch import load_batch
from llp.spec.batch_json import HYPERPARAMETERS, LEFT_OUT, REFUSED, convert_batch

FIRST = {
    "name": "resnet18 cifar10 talt",
    "architecture": "resnet18",
    "dataset": "cifar10",
    "optimizer": "talt",
    "epochs": 30,
    "batch-size": 128,
    "lr": 0.1,
    "weight-decay": 0.0005,
    "mixed-precision": True,
    "projection-dim": 64,
    "update-interval": 20,
    "valley-strength": 0.1,
    "smoothing-factor": 0.9,
    "cov-decay": 0.99,
    "seed": 3,
    "gpu-index": 1,
}
SECOND = {
    "name": "plain",
    "architecture": "simplecnn",
    "dataset": "mnist",
    "optimizer": "sgd",
    "epochs": 5,
    "batch_size": 64,
    "lr": 0.01,
    "momentum": 0.9,
    "memory-size": 10,
    "projection-dim": 32,
    "mixed_precision": False,
}


def write(folder: Path, *experiments: object, **rest: object) -> Path:
    path = folder / "cnn_comparison.json"
    path.write_text(json.dumps({"experiments": list(experiments), **rest}, indent=2))
    return path


def refused(path: Path, *drop: str) -> str:
    with pytest.raises(SpecError) as caught:
        convert_batch(path, drop=drop)
    return str(caught.value)


def test_every_field_arrives_under_its_new_name(tmp_path):
    batch = convert_batch(write(tmp_path, FIRST, SECOND)).load()
    assert batch.name == "cnn_comparison"
    talt, plain = batch.runs["resnet18-cifar10-talt"], batch.runs["plain"]
    assert talt.spec.model.name == "resnet18"
    assert talt.spec.dataset.name == "cifar10"
    assert talt.spec.dataset.validation_fraction == 0.1
    assert talt.spec.training.epochs == 30
    assert talt.spec.training.precision == "fp16"
    assert talt.seeds == (3,)
    assert talt.points == (
        {
            "optimizer": "talt",
            "batch_size": 128,
            "learning_rate": 0.1,
            "weight_decay": 0.0005,
            "projection_dimension": 64,
            "update_interval": 20,
            "valley_strength": 0.1,
            "smoothing_factor": 0.9,
            "decay": 0.99,
        },
    )
    assert plain.spec.model.name == "convnet"
    assert plain.spec.training.precision == "float32"
    assert plain.points == (
        {"optimizer": "sgd", "batch_size": 64, "learning_rate": 0.01, "momentum": 0.9},
    )


def test_the_yaml_is_the_same_batch(tmp_path):
    converted = convert_batch(write(tmp_path, FIRST, SECOND))
    path = tmp_path / "new.yaml"
    path.write_text(converted.yaml)
    direct, by_file = converted.load(), load_batch(path)
    assert direct.runs == by_file.runs
    assert direct.folder == by_file.folder


def test_what_only_says_where_it_runs_is_left_out_with_a_note(tmp_path):
    notes = convert_batch(write(tmp_path, FIRST, SECOND)).notes
    assert any(note.startswith("gpu-index was left out: Ray places") for note in notes)
    assert any("projection-dim was left out where the optimizer is not TALT" in n for n in notes)
    assert any("simplecnn becomes convnet" in note for note in notes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "bert-base", "'bert-base' has no counterpart: llp has no BERT"),
        ("dataset", "glue-sst2", "'glue-sst2' has no counterpart: llp has no text"),
        ("optimizer", "original-talt", "'original-talt' has no counterpart: llp has one TALT"),
        ("optimizer", "adaam", "unknown optimizer 'adaam'; did you mean 'adam'?"),
        ("memory-size", 10, "'memory-size' has no counterpart: TALT here weights gradients"),
        ("adaptive-reg", 1e-5, "'adaptive-reg' has no counterpart"),
        ("tune-hyperparams", True, "'tune-hyperparams' has no counterpart: write a grid"),
        ("learnig-rate", 1, "unknown field 'learnig-rate'"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_its_line(tmp_path, field, value, message):
    path = write(tmp_path, {**FIRST, field: value})
    text = refused(path)
    assert message in text
    line = next(n for n, row in enumerate(path.read_text().splitlines(), 1) if f'"{field}"' in row)
    assert f"{path}:{line}:" in text
    assert f"experiments.0.{field}" in text


def test_a_refused_field_can_be_dropped_knowingly(tmp_path):
    path = write(tmp_path, {**FIRST, "memory-size": 10})
    assert "--drop memory-size" in refused(path)
    converted = convert_batch(path, drop=["memory_size"])
    assert "memory-size was left out as you asked" in converted.notes
    assert "unknown field 'memry'" in refused(path, "memry")


def test_a_missing_field_a_broken_file_and_a_foreign_file_are_told_apart(tmp_path):
    missing = {key: value for key, value in FIRST.items() if key != "dataset"}
    assert "experiments.0: missing field 'dataset'" in refused(write(tmp_path, missing))
    assert "must be a mapping of options, not 3" in refused(write(tmp_path, 3))
    assert "experiments: is empty" in refused(write(tmp_path))
    assert "unknown key 'gpus'" in refused(write(tmp_path, FIRST, gpus=2))
    path = tmp_path / "broken.json"
    path.write_text('{"experiments": [\n  {"name": }\n]}')
    assert "broken.json:2:12" in refused(path)
    path.write_text('{"other": 1}')
    assert "is no batch of the TALT project" in refused(path)


def test_two_experiments_of_one_name_stay_two(tmp_path):
    batch = convert_batch(write(tmp_path, FIRST, FIRST)).load()
    assert list(batch.runs) == ["resnet18-cifar10-talt", "resnet18-cifar10-talt-2"]


def test_no_field_is_both_mapped_and_refused():
    groups = [set(HYPERPARAMETERS), set(LEFT_OUT), set(REFUSED)]
    assert sum(map(len, groups)) == len(set().union(*groups))
