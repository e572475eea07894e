"""A batch runs through Ray Tune, survives being killed, and never trains twice what finished."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from study_runs import events, killed_at, llp
from typer.testing import CliRunner

from llp import batch
from llp.cli import app
from llp.driver import Study
from llp.errors import SpecError, StudyError
from llp.spec.batch import load_batch
from llp.tracking.ledger import Ledger
from llp.tracking.links import read_state

TINY = """\
version: 1
name: tiny
defaults:
  dataset: {name: synthetic, options: {num_train: 300, num_test: 80, num_classes: 4, image_size: 8}}
  model: {name: mlp, options: {width: 16, depth: 1}}
  training: {epochs: 2, batch_size: 32}
  seeds: 2
  resources: {num_cpus: 1, max_concurrent: 1}
runs:
  sgd: {grid: {learning_rate: [0.01, 0.1]}, choose: {}}
  sam: {parameters: {optimizer: sam, learning_rate: 0.1}, repeats: 2}
  broken: {parameters: {learning_rate: 1e12}}
ablation: {sam: {momentum: 0}}
scaling: {sgd: {data_fraction: [0.5]}}
"""
NUM_CHOOSE, NUM_FULL = 2, 2 + 4 + 2 + 4 + 2


def write(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_killed_batch_goes_on_and_repeats_nothing_that_finished(tmp_path):
    write(tmp_path)
    folder = tmp_path / "llp_batches" / "tiny"
    killed_at(folder / "ledger.jsonl", 60, "batch", "tiny.yaml", folder=tmp_path)
    before = events(folder / "ledger.jsonl")
    finished = {e["end"]["job_id"] for e in before if e["event"] == "job_end"}
    assert 0 < len(finished) < NUM_CHOOSE + NUM_FULL

    done = llp("batch", "tiny.yaml", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    after = events(folder / "ledger.jsonl")
    assert after[: len(before)] == before  # append-only
    begun = Counter(e["job"]["job_id"] for e in after[len(before) :] if e["event"] == "job")
    assert not finished & begun.keys()
    ended = Counter(e["end"]["job_id"] for e in after if e["event"] == "job_end")
    assert len(ended) == NUM_CHOOSE + NUM_FULL
    assert set(ended.values()) == {1}

    result = json.loads(done.stdout.splitlines()[-1])
    assert result["event"] == "result"
    assert result["outcomes"] == {"completed": NUM_FULL - 2, "diverged": 2}  # failures are values
    table = pd.read_parquet(folder / "runs.parquet")
    for row in table.to_dict("records"):
        if row["outcome"] == "completed":
            asked, trained = json.loads(row["asked"]), json.loads(row["trained"])
            assert {key: trained[key] for key in asked} == asked
            assert trained["seed"] == row["seed"]
            assert trained["num_examples"] == row["num_examples"]
    twice = table[(table["configuration_id"] == "sam") & (table["seed"] == 1)]["test_loss"]
    assert twice.nunique() == 1  # the same seed gives the same bits
    assert len(twice) == 2
    assert not (folder / "ray").exists()
    shipped = read_state(folder)  # MLflow has it too, although the first driver was killed
    assert shipped is not None
    assert shipped.complete
    assert shipped.runs.keys() == set(ended)

    # Once more: nothing runs. Then a changed run is refused, and more seeds are only added.
    size = (folder / "ledger.jsonl").read_bytes().count(b'"event":"job"')
    off = ("--set", "defaults.tracking.mlflow=false")
    again = llp("batch", "tiny.yaml", "-q", "--set", "runs.sam.seeds=3", *off, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    new = (folder / "ledger.jsonl").read_bytes().count(b'"event":"job"') - size
    assert new == 2 + 2  # one seed more, twice, of sam and of its ablation
    changed = llp("batch", "tiny.yaml", "--set", "defaults.training.epochs=3", folder=tmp_path)
    assert changed.returncode == 4
    assert "was trained with another definition" in changed.stderr


@pytest.mark.slow
def test_only_one_run_and_then_the_rest(tmp_path):
    write(tmp_path, TINY.replace("  seeds: 2\n", "  seeds: 2\n  tracking: {mlflow: false}\n"))
    folder = tmp_path / "llp_batches" / "tiny"
    done = llp("batch", "tiny.yaml", "--only", "broken", folder=tmp_path)
    assert done.returncode == 3  # all of it diverged
    assert "no full training of the batch was completed" in done.stderr
    done = llp("batch", "tiny.yaml", "--only", "sgd", "--only", "broken", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(folder / "runs.parquet")
    assert set(table["run"]) == {"sgd", "broken"}
    assert "sgd: chose sgd.k00" in done.stderr


def test_the_plan_is_printed_and_nothing_starts(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["batch", "tiny.yaml", "--dry-run"])
    assert done.exit_code == 0, done.stderr
    rows = {line[:14].strip(): line.split()[-2:] for line in done.stdout.splitlines()}
    assert rows["together"][0] == str(NUM_CHOOSE + NUM_FULL)
    assert rows["sam"] == ["4", str(4 * 2 * 2 * 255).replace("4080", "4,080")]
    assert not (tmp_path / "llp_batches").exists()
    done = CliRunner().invoke(app, ["batch", "tiny.yaml", "--dry-run", "--json", "--only", "sam"])
    (plan,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert [part["name"] for part in plan["parts"]] == ["sam", "sam: ablation"]


def test_a_json_batch_is_read_converted_and_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = {"name": "a", "architecture": "resnet18", "dataset": "cifar10", "optimizer": "sgd"}
    (tmp_path / "old.json").write_text(json.dumps({"experiments": [experiment]}))
    done = CliRunner().invoke(app, ["batch", "old.json", "--convert"])
    assert done.exit_code == 0, done.stderr
    (tmp_path / "new.yaml").write_text(done.stdout)
    assert load_batch("new.yaml").runs["a"].spec.model.name == "resnet18"
    (tmp_path / "old.json").write_text(json.dumps({"experiments": [{**experiment, "lrr": 1}]}))
    done = CliRunner().invoke(app, ["batch", "old.json", "--convert"])
    assert done.exit_code == 2
    assert "unknown field 'lrr'; did you mean 'lr'?" in done.stderr
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert CliRunner().invoke(app, ["batch", "tiny.yaml", "--convert"]).exit_code == 2


def test_a_data_fraction_below_an_image_a_class_is_refused_before_anything_starts(tmp_path):
    found = load_batch(write(tmp_path), ["scaling.sgd.data_fraction=[0.01]"])
    with pytest.raises(SpecError, match=r"runs\.sgd: a data fraction of 0\.01 is 3 of 255"):
        batch.plan(found)


def test_a_folder_with_a_search_in_it_is_refused(tmp_path):
    found = load_batch(write(tmp_path), [f"defaults.output.root={tmp_path}"])
    Ledger.create(tmp_path / "tiny", study_id="tiny").close()
    with pytest.raises(StudyError, match="holds a study that is no batch"):
        batch.run(found)


def made(folder: Path, choose: str, *, bad: tuple[str, ...] = ()):
    from batch_ledgers import make_ledger

    text = f"""\
version: 1
name: n
base: digits
runs: {{a: {{grid: {{learning_rate: [0.03, 0.1, 0.3]}}, choose: {choose}}}}}
"""
    found = make_ledger(folder, text=text, levels={"a": 0.9}, bad=bad)
    return found.runs["a"], Ledger.open(found.folder)


@pytest.mark.parametrize("by", ["validation_accuracy", "validation_loss"])
def test_the_best_candidate_by_validation_is_chosen_and_said_once(tmp_path, by):
    run, ledger = made(tmp_path, f"{{by: {by}}}")  # the one in the middle is the best
    with ledger:
        study = Study(ledger)
        best = batch._choose(run, study)
        assert best is not None
        assert best.hyperparameters == {"learning_rate": 0.1}
        num = sum(event["event"] == "chosen" for event in study.history)
        assert batch._choose(run, study) == best
        assert sum(event["event"] == "chosen" for event in study.history) == num


def test_a_candidate_that_lost_a_training_is_not_chosen(tmp_path):
    run, ledger = made(tmp_path, "{}", bad=("a.k001-t0",))
    with ledger:
        best = batch._choose(run, Study(ledger))
        assert best is not None
        assert best.configuration_id == "a.k000"  # as good as k002, and earlier


def test_without_a_completed_candidate_nothing_is_chosen(tmp_path):
    run, ledger = made(tmp_path, "{}", bad=tuple(f"a.k00{k}-t0" for k in range(3)))
    with ledger:
        study = Study(ledger)
        assert batch._choose(run, study) is None
        assert study.history[-1]["configuration_id"] is None


def test_other_images_than_those_it_began_with_are_refused(tmp_path, monkeypatch):
    from batch_ledgers import make_ledger

    text = "version: 1\nname: n\nbase: digits\nruns: {a: {}}\n"
    found = make_ledger(tmp_path, text=text, levels={"a": 0.9})
    with pytest.raises(StudyError, match="the images of the run a are not those"):
        batch.run(found)


def test_another_place_in_mlflow_than_it_began_with_is_refused(tmp_path):
    from batch_ledgers import Images

    path = tmp_path / "n.yaml"
    path.write_text("version: 1\nname: n\nbase: digits\nruns: {a: {}}\n")

    def loaded(*overrides: str):
        return load_batch(path, [f"defaults.output.root={tmp_path}", *overrides])

    here, there = (f"defaults.tracking.uri=sqlite:///{name}.db" for name in ("here", "there"))
    began = loaded(here)
    with batch._ledger(began, {"a": Images()}, "") as ledger:
        study = Study(ledger)
        batch._require_same_tracking(began, study)
        batch._require_same_tracking(loaded(there, "defaults.tracking.mlflow=false"), study)
        with pytest.raises(StudyError, match=r"uri was \S+here\.db when .* \S+there\.db now"):
            batch._require_same_tracking(loaded(there), study)
        with pytest.raises(StudyError, match=r"tracking\.experiment was not set .* is mine now"):
            batch._require_same_tracking(loaded(here, "defaults.tracking.experiment=mine"), study)
