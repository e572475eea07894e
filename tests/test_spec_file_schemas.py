"""The JSON Schemas of all kinds of files hold against the files that are shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from llp.cli import app
from llp.errors import SpecError
from llp.spec.file_schemas import KINDS, file_schema
from llp.spec.source import parse

ROOT = Path(__file__).parents[1]
FILES = {
    "experiment": "search_spaces/*.yaml",
    "batch": "reports/optimizers_*.yaml",
    "report": "reports/cifar*.yaml",
    "study": "reports/evidence.yaml",
}
TRAIN = """\
dataset: {name: digits}
model: {name: mlp, options: {depth: 1}}
training: {epochs: 3}
search_space: {learning_rate: 0.1, width: [32]}
"""
LANDSCAPE = """\
source: {train: true}
experiment: {dataset: {name: digits}, model: {name: mlp}, output: {report: false}}
surfaces: {resolution: 9}
output: {pictures: [png]}
"""


def problems(kind: str, text: str) -> list[str]:
    data, _, wrong = parse(text, kind)
    assert not wrong
    validator = jsonschema.Draft202012Validator(file_schema(kind))
    return [error.json_path for error in validator.iter_errors(data)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_schema_is_one_and_refers_to_nothing_outside(kind: str) -> None:
    schema = file_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(schema)
    for name in {part.split('"')[0] for part in text.split("#/$defs/")[1:]}:
        assert name in schema["$defs"]


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind, glob in FILES.items() for path in ROOT.glob(glob)]
)
def test_shipped_files_pass(kind: str, path: Path) -> None:
    assert problems(kind, path.read_text()) == []


def test_a_training_and_a_landscape_pass() -> None:
    assert problems("train", TRAIN) == []
    assert problems("landscape", LANDSCAPE) == []


@pytest.mark.parametrize(
    ("kind", "text", "path"),
    [
        ("batch", "name: b\nruns: {a: {training: {epoch: 3}}}\n", "$.runs.a.training"),
        ("batch", "name: b\nruns: {a: {grid: {learning_rate: {type: log}}}}\n", "$.runs.a.grid.*"),
        ("batch", "name: b\ndefaults: {tracking: {mlflow: 3}}\nruns: {a: {}}\n", "$.defaults.*"),
        ("report", "name: r\nbase: x\nconfigurations: {a: {tier9: {}}}\n", "$.configurations.a"),
        ("study", "name: s\nstudies: {a: {dataset: {name: digits}}}\n", "$.studies.a"),
        ("train", TRAIN + "tier1: {num_trials: 3}\n", "$"),
        ("train", TRAIN.replace("[32]", "[32, 64]"), "$.search_space.width"),
        ("landscape", LANDSCAPE.replace("report", "reports"), "$.experiment"),
    ],
)
def test_what_the_loaders_refuse_in_form_is_refused(kind: str, text: str, path: str) -> None:
    (found,) = problems(kind, text)
    assert found.startswith(path.removesuffix("*"))


def test_the_command_prints_the_schema_of_a_kind() -> None:
    def printed(*arguments: str) -> Any:
        done = CliRunner().invoke(app, ["schema", *arguments])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    assert printed() == file_schema("experiment")
    assert printed("batch") == file_schema("batch")
    wrong = CliRunner().invoke(app, ["schema", "batches"])
    assert wrong.exit_code == 2
    assert "did you mean 'batch'?" in wrong.stderr
    with pytest.raises(SpecError, match="unknown kind of file"):
        file_schema("x")
