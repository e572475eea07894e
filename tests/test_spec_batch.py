"""A batch file is checked whole before anything runs, and becomes exactly the trainings it says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from conftest import ROOT

from llp.errors import SpecError
from llp.spec.batch import load_batch
from llp.spec.batch_plan import (
    candidates,
    costs,
    experiment_of,
    finals,
    fingerprint,
    in_force,
    run_of,
    told,
    variants,
)

BATCH = """\
version: 1
name: optimizers
base: digits
defaults: {seeds: 5, choose: {num_seeds: 2}, training: {epochs: 4}}
runs:
  sgd: {grid: {learning_rate: [0.03, 0.1, 0.3]}}
  swa: {parameters: {averaging: swa}, grid: {learning_rate: [0.1, 0.3]}, seeds: [7, 9]}
  talt: {parameters: {optimizer: talt, learning_rate: 0.1}, repeats: 2}
ablation: {talt: {smoothing_factor: 0, valley_strength: 0}}
sensitivity: {talt: {valley_strength: [0.5, 1, 2], learning_rate: [0.1, 0.2]}}
scaling: {sgd: {width: [8, 16], data_fraction: [0.25, 1], epochs: [2, 4]}}
"""


def write(folder: Path, text: str = BATCH, name: str = "batch.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_batch(path, overrides)
    return [
        f"{Path(p.file).name}:{p.line}:{p.column} {p.path}: {p.message}"
        for p in caught.value.problems
    ]


def test_a_grid_is_every_combination_that_satisfies_the_constraints(tmp_path):
    text = """\
version: 1
name: g
base: digits
runs:
  all:
    grid: {learning_rate: [0.01, 0.1, 1], batch_size: [32, 64], momentum: [0.5, 0.9]}
    constraints: [learning_rate / batch_size <= 0.01]
"""
    run = load_batch(write(tmp_path, text)).runs["all"]
    wanted = [
        {"learning_rate": lr, "batch_size": size, "momentum": momentum}
        for lr, size, momentum in itertools.product([0.01, 0.1, 1], [32, 64], [0.5, 0.9])
        if lr / size <= 0.01
    ]
    assert sorted(map(repr, (sorted(p.items()) for p in run.points))) == sorted(
        map(repr, (sorted(p.items()) for p in wanted))
    )
    assert len(wanted) == 8
    made = finals(run)
    assert len({one.configuration_id for one in made}) == len({one.label for one in made}) == 8
    assert {run_of(one.configuration_id) for one in made} == {"all"}
    assert all(set(run.varied) == {"learning_rate", "batch_size", "momentum"} for _ in made)


def test_random_samples_lie_in_the_domain_and_are_the_same_every_time(tmp_path):
    text = """\
version: 1
name: g
base: digits
runs:
  some: {grid: {learning_rate: {type: loguniform, low: 1e-3, high: 1}}, samples: 20}
"""
    first, again = (load_batch(write(tmp_path, text)).runs["some"] for _ in range(2))
    assert first.points == again.points
    assert len(first.points) == 20
    assert all(1e-3 <= point["learning_rate"] <= 1 for point in first.points)


def test_a_run_takes_the_base_the_defaults_and_its_own_in_this_order(tmp_path):
    batch = load_batch(write(tmp_path))
    sgd, swa, talt = (batch.runs[name] for name in ("sgd", "swa", "talt"))
    assert sgd.spec.dataset.name == "digits"
    assert sgd.spec.model.name == "convnet"  # of the base
    assert sgd.spec.training.optimizer_options == {"nesterov": True}
    assert sgd.spec.training.epochs == 4  # the base has 15
    assert (sgd.seeds, swa.seeds, talt.seeds) == ((0, 1, 2, 3, 4), (7, 9), (0, 1, 2, 3, 4))
    assert (sgd.choose and sgd.choose.num_seeds, talt.choose) == (2, None)  # one point: no choice
    assert batch.reference == "sgd"
    assert batch.folder == Path("llp_batches/optimizers")
    changed = load_batch(
        write(tmp_path), ["defaults.training.epochs=9", "runs.swa.seeds=[1]", "reference=talt"]
    )
    assert changed.runs["sgd"].spec.training.epochs == 9
    assert changed.runs["swa"].seeds == (1,)
    assert changed.reference == "talt"


def test_only_keeps_the_runs_and_their_studies(tmp_path):
    batch = load_batch(write(tmp_path))
    part = batch.chosen(["talt"])
    assert list(part.runs) == ["talt"]
    assert {study.run for study in part.studies} == {"talt"}
    assert batch.chosen([]) is batch
    with pytest.raises(SpecError, match="unknown run 'tallt'; did you mean 'talt'"):
        batch.chosen(["tallt"])


def test_an_ablation_switches_every_part_off_alone_and_all_together(tmp_path):
    batch = load_batch(write(tmp_path))
    run = batch.runs["talt"]
    study = next(s for s in batch.studies if s.kind == "ablation")
    made = variants(study, run, finals(run)[0])
    assert [dict(one.changed) for one in made] == [
        {"smoothing_factor": 0},
        {"valley_strength": 0},
        {"smoothing_factor": 0, "valley_strength": 0},
    ]
    for one in made:
        assert one.hyperparameters == {**finals(run)[0].hyperparameters, **one.changed}


def test_a_sensitivity_study_changes_one_value_and_leaves_the_runs_own_out(tmp_path):
    batch = load_batch(write(tmp_path))
    run = batch.runs["talt"]
    study = next(s for s in batch.studies if s.kind == "sensitivity")
    made = variants(study, run, finals(run)[0])
    # 1 is the default of valley_strength, 0.1 the run's own learning rate
    assert [dict(one.changed) for one in made] == [
        {"valley_strength": 0.5},
        {"valley_strength": 2},
        {"learning_rate": 0.2},
    ]


def test_scaling_goes_over_hyperparameters_data_and_epochs(tmp_path):
    batch = load_batch(write(tmp_path))
    run = batch.runs["sgd"]
    study = next(s for s in batch.studies if s.kind == "scaling")
    final = finals(run, {"learning_rate": 0.3})[0]
    made = variants(study, run, final)
    assert [(dict(one.changed), one.data_fraction, one.epochs) for one in made] == [
        ({"width": 8}, 1.0, 4),
        ({"width": 16}, 1.0, 4),
        ({"data_fraction": 0.25}, 0.25, 4),
        ({"epochs": 2}, 1.0, 2),
    ]
    assert all(one.hyperparameters["learning_rate"] == 0.3 for one in made)
    assert in_force(run, final, "width") == 32
    assert in_force(run, final, "epochs") == 4
    assert in_force(run, final, "nesterov") is True


def test_the_plan_counts_trainings_and_samples(tmp_path):
    found = {
        cost.name: cost
        for cost in costs(load_batch(write(tmp_path)), dict.fromkeys(("sgd", "swa", "talt"), 1000))
    }
    assert (found["sgd: choose"].trainings, found["sgd: choose"].samples) == (3 * 2, 6 * 4000)
    assert (found["sgd"].trainings, found["swa"].trainings) == (5, 2)
    assert found["talt"].trainings == 10  # five seeds, twice
    assert found["talt: ablation"].trainings == 3 * 10
    assert found["sgd: scaling"].samples == 5 * (4000 + 4000 + 1000 + 2000)


def test_sam_costs_two_gradients_an_image(tmp_path):
    text = "version: 1\nname: s\nbase: digits\nruns: {sam: {parameters: {optimizer: sam}}}\n"
    (cost,) = costs(load_batch(write(tmp_path, text)), {"sam": 100})
    assert cost.samples == 2 * 100 * 15


def test_the_fingerprint_changes_with_what_changes_results_and_with_nothing_else(tmp_path):
    def of(text: str, *overrides: str) -> str:
        run = load_batch(write(tmp_path, text), overrides).runs["talt"]
        return fingerprint(experiment_of(run), finals(run)[0])

    same = of(BATCH)
    assert same == of(BATCH, "defaults.seeds=9", "defaults.output.root=elsewhere")
    assert same == of(BATCH, "defaults.resources.num_cpus=1", "runs.sgd.seeds=2")
    assert same == of(BATCH, "runs.talt.repeats=3")
    changes = (
        "defaults.training.epochs=5",
        "runs.talt.parameters.learning_rate=0.2",
        "defaults.seed=1",
        "defaults.training.label_smoothing=0.1",
        "runs.talt.data_fraction=0.5",
    )
    assert len({same, *(of(BATCH, change) for change in changes)}) == 1 + len(changes)


def test_a_setting_that_is_newer_than_the_ledger_counts_with_its_default(tmp_path):
    run = load_batch(write(tmp_path)).runs["talt"]
    now = experiment_of(run)
    before = {**now, "training": {k: v for k, v in now["training"].items() if k != "compile"}}
    assert fingerprint(before, finals(run)[0]) == fingerprint(now, finals(run)[0])
    strange = {**now, "training": {**now["training"], "of_the_future": 1}}
    assert fingerprint(strange, finals(run)[0]) == ""


CASES = [
    ("seeds: 5", "seeds: 0", "batch.yaml:4:19 defaults.seeds: needs at least one seed"),
    ("seeds: [7, 9]", "seeds: [7, 7]", "runs.swa.seeds: a seed is listed twice"),
    ("base: digits", "base: digitz", "batch.yaml:3:7 base: digitz: no such file; did you mean"),
    (
        "learning_rate: [0.03, 0.1, 0.3]",
        "learning_rat: [0.03, 0.1]",
        "batch.yaml:6:30 runs.sgd.grid.learning_rat: nothing reads 'learning_rat'; did you mean",
    ),
    (
        "optimizer: talt,",
        "optimizer: tallt,",
        "batch.yaml:8:34 runs.talt.parameters.optimizer: unknown optimizer 'tallt'; did you mean",
    ),
    ("repeats: 2", "repeat: 2", "runs.talt.repeat: unknown key 'repeat'; did you mean 'repeats'?"),
    (
        "repeats: 2",
        "learning_rate: 2",
        "runs.talt.learning_rate: unknown key 'learning_rate'; choose one of:",
    ),
    ("repeats: 2", "seed: 2", "runs.talt.seed: 'seed' is the same for all runs of a batch"),
    ("repeats: 2", "tier1: {}", "runs.talt.tier1: a batch has no 'tier1'"),
    ("repeats: 2", "data_fraction: 2", "runs.talt.data_fraction: must be at most 1, not 2"),
    ("  swa:", "  SGD:", "batch.yaml:7:3 runs.SGD: 'SGD' and 'sgd' differ in case only"),
    ("  swa:", "  s.a:", "batch.yaml:7:3 runs.s.a: 's.a' cannot name a run"),
    ("ablation: {talt:", "ablation: {tolt:", "ablation.tolt: unknown run 'tolt'; did you mean"),
    (
        "smoothing_factor: 0",
        "smoothing_factr: 0",
        "batch.yaml:9:36 ablation.talt.smoothing_factr: nothing reads 'smoothing_factr'",
    ),
    (
        "valley_strength: [0.5, 1, 2]",
        "valley_strength: [0.5, -1]",
        "batch.yaml:10:45 sensitivity.talt.valley_strength.1: must be at least 0, not -1",
    ),
    (
        "data_fraction: [0.25, 1]",
        "data_fraction: [0.25, 1.5]",
        "scaling.sgd.data_fraction.1: must be above 0 and at most 1, not 1.5",
    ),
    ("epochs: [2, 4]", "epochs: [2.5]", "scaling.sgd.epochs.0: must be a whole number of at least"),
    ("version: 1\n", "version: 1\nreference: sdg\n", "reference: unknown run 'sdg'; did you mean"),
    ("version: 1\n", "version: 1\ndataset: {}\n", "dataset: 'dataset' belongs into defaults"),
    (
        "training: {epochs: 4}",
        "training: {epoch: 4}",
        "batch.yaml:4:57 defaults.training.epoch: unknown key 'epoch'",
    ),
    ("seeds: 5", "seeds: abc", "defaults.seeds: must be a whole number or a list, not 'abc'"),
    ("seeds: [7, 9]", "seeds: [7, x]", "runs.swa.seeds.1: must be a whole number, not 'x'"),
    (
        "learning_rate: 0.1}",
        "learning_rate: [0.1, 1]}",
        "not a list; several values belong into grid",
    ),
    (
        "averaging: swa}",
        "averaging: swa, learning_rate: 1}",
        "runs.swa.grid.learning_rate: 'learning_rate' is in parameters too",
    ),
    ("  sgd: {grid", "  sgd: 3\n  sgd2: {grid", "runs.sgd: must be a mapping of keys to values"),
]


@pytest.mark.parametrize(("old", "new", "message"), CASES, ids=[case[1] for case in CASES])
def test_bad_input_names_file_line_path_value_and_the_nearest_choice(tmp_path, old, new, message):
    assert BATCH.count(old) >= 1
    found = problems(write(tmp_path, BATCH.replace(old, new, 1)))
    assert any(message in problem for problem in found), found


def test_a_study_around_several_configurations_is_refused(tmp_path):
    text = BATCH.replace("choose: {num_seeds: 2}, ", "")
    found = problems(write(tmp_path, text))
    assert any("scaling.sgd: the run 'sgd' has 3 configurations" in line for line in found), found


def test_an_endless_grid_is_refused_where_it_stands(tmp_path):
    text = BATCH.replace("[0.03, 0.1, 0.3]", "{type: loguniform, low: 1e-3, high: 1}")
    (found,) = problems(write(tmp_path, text))
    assert "batch.yaml:6:31 runs.sgd.grid.learning_rate: a grid needs finitely many" in found


def test_all_problems_come_at_once(tmp_path):
    text = BATCH.replace("optimizer: talt,", "optimizer: tallt,").replace(
        "averaging: swa", "averaging: sva"
    )
    found = problems(write(tmp_path, text))
    assert {"swa", "talt"} <= {re.findall(r"runs\.(\w+)", line)[0] for line in found}


def test_a_problem_of_the_defaults_is_told_once(tmp_path):
    found = problems(write(tmp_path, BATCH.replace("seeds: 5", "output: {root: 3}")))
    assert len([line for line in found if "defaults.output.root" in line]) == 1


def test_the_shipped_comparisons_give_every_optimizer_the_same_chance():
    for name in ("optimizers_digits", "optimizers_cifar10"):
        batch = load_batch(ROOT / "reports" / f"{name}.yaml")
        assert batch.name == name
        assert {"sgd", "adamw", "sam", "asam", "swa", "entropy_sgd", "talt"} == set(batch.runs)
        assert {len(run.points) for run in batch.runs.values()} == {len(batch.runs["sgd"].points)}
        assert all(len(run.seeds) >= 5 for run in batch.runs.values())
        assert all(run.choose is not None for run in batch.runs.values())
        epochs = {run.spec.training.epochs for run in batch.runs.values()}
        assert len(epochs) == 1
        assert all(run.varied == ("learning_rate",) for run in batch.runs.values())
        for run in batch.runs.values():
            assert len(candidates(run)) == len(run.points)


@pytest.mark.parametrize(
    ("name", "num_train"), [("optimizers_digits", 1_222), ("optimizers_cifar10", 45_000)]
)
def test_the_budget_in_the_head_comment_is_that_of_the_plan(name, num_train):
    path = ROOT / "reports" / f"{name}.yaml"
    batch = load_batch(path)
    found = costs(batch, dict.fromkeys(batch.runs, num_train))
    choosing = sum(cost.samples for cost in found if cost.name.endswith(": choose"))
    comparing = sum(cost.samples for cost in found if ":" not in cost.name)
    text = path.read_text(encoding="utf-8")
    assert re.search(rf"choosing +{choosing:,} ", text)
    assert re.search(rf"comparing +{comparing:,} ", text)
    rest = sum(cost.samples for cost in found) - choosing - comparing
    assert not rest or f"{rest:,} (7 variants x 5 seeds)" in text


def test_labels_are_short_and_exact():
    assert told({"learning_rate": 0.1, "width": 8, "nesterov": True}) == (
        "learning_rate 0.1, width 8, nesterov True"
    )
