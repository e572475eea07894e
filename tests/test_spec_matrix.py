"""A report matrix is checked whole before anything runs, and its errors point to the right file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

from llp.errors import SpecError
from llp.spec import RandomSearch, digest, load_spec, render
from llp.spec.matrix import MatrixFile, differences, is_definition, load_matrix

NAMES = ["10", "20", "30", "40", "multi"]
BASE = """\
version: 1
name: small
dataset: {name: digits}
model: {name: mlp, options: {width: 16, depth: 1}}
training: {epochs: 3, optimizer_options: {nesterov: true}}
search_space:
  learning_rate: {type: loguniform, low: 1e-2, high: 1}
  batch_size: [32, 64]
tier1: {num_trials: 4, data_fractions: [0.3, 1.0]}
"""
MATRIX = """\
version: 1
name: pair
base: small.yaml
common:
  seed: 5
  tier1: {scheduler: fifo, stop_rules: []}
configurations:
  few: {tier1: {data_fractions: [0.2]}}
  many: {tier1: {data_fractions: [0.5]}}
"""


def write(folder: Path, matrix: str = MATRIX, base: str = BASE) -> Path:
    (folder / "small.yaml").write_text(base, encoding="utf-8")
    path = folder / "pair.yaml"
    path.write_text(matrix, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_matrix(path, overrides)
    return [
        f"{Path(p.file).name}:{p.line}:{p.column} {p.path}: {p.message}"
        for p in caught.value.problems
    ]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_shipped_configurations_differ_in_how_they_probe_and_in_nothing_else(name):
    specs = load_matrix(ROOT / "reports" / f"{name}.yaml").configurations
    assert list(specs) == [f"{name}_{suffix}" for suffix in NAMES]
    assert [s.tier1.data_fractions for s in specs.values()] == [
        [0.1],
        [0.2],
        [0.3],
        [0.4],
        [0.1, 0.2, 0.3, 0.4],
    ]
    first = specs[f"{name}_10"].model_dump(mode="json")
    for spec in specs.values():
        told = differences(first, spec.model_dump(mode="json"))
        assert all(line.startswith("tier1.") for line in told)
        searches = [RandomSearch(s.search_space, s.constraints, s.seed) for s in specs.values()]
        assert len({repr([search.suggest(i) for i in range(8)]) for search in searches}) == 1
    assert len({digest(spec) for spec in specs.values()}) == 5


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_budget_in_the_head_comment_is_what_the_definition_spends(name):
    text = (ROOT / "reports" / f"{name}.yaml").read_text(encoding="utf-8")
    total = 0
    for key, spec in load_matrix(ROOT / "reports" / f"{name}.yaml").configurations.items():
        trials, tier1 = spec.tier1.num_trials, 0
        for fraction in spec.tier1.data_fractions:
            tier1 += trials * round(fraction * 45_000) * spec.training.epochs
            trials //= spec.tier1.reduction_factor
        runs = spec.verification.top_k * spec.verification.num_seeds
        full = runs * spec.training.epochs * 45_000
        found = re.search(rf"#   {key} +([\d,]+) +([\d,]+)", text)
        assert found, key
        assert [int(n.replace(",", "")) for n in found.groups()] == [tier1, full]
        total += tier1 + full
    assert f"together {total:>16,}" in text


def test_common_and_configuration_are_put_into_the_base_one_after_the_other(tmp_path):
    more = MATRIX.replace("seed: 5", "seed: 5\n  training: {epochs: 7}").replace(
        "fifo, stop", "fifo, num_trials: 6, stop"
    )
    specs = load_matrix(write(tmp_path, more), ["tier1.num_trials=9"]).configurations
    few, base = specs["few"], load_spec(tmp_path / "small.yaml")
    assert (few.name, few.seed) == ("few", 5)
    assert few.training.epochs == 7
    assert few.training.optimizer_options == {"nesterov": True}
    assert few.search_space == base.search_space
    assert few.tier1.data_fractions == [0.2]
    assert few.tier1.stop_rules == []
    assert {spec.tier1.num_trials for spec in specs.values()} == {9}
    assert few.tracking.experiment == "llp/pair"


def test_a_domain_is_replaced_and_not_mixed_with_the_old_one(tmp_path):
    text = MATRIX.replace(
        "seed: 5", "search_space: {learning_rate: {type: uniform, low: 0.1, high: 0.2}}"
    )
    space = load_matrix(write(tmp_path, text)).configurations["few"].search_space
    assert space["learning_rate"].model_dump(exclude_unset=True) == {
        "type": "uniform",
        "low": 0.1,
        "high": 0.2,
    }
    assert "batch_size" in space


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: pair", "nmae: pair", "pair.yaml:2:1 nmae: unknown key 'nmae'; did you mean 'name'"),
        ("common:", "seed: 3\ncommon:", "pair.yaml:4:1 seed: 'seed' belongs into common"),
        (
            "  seed: 5",
            "  seeed: 5",
            "pair.yaml:5:3 seeed: unknown key 'seeed'; did you mean 'seed'",
        ),
        ("  seed: 5", "  name: x", "pair.yaml:5:3 common.name: 'name' cannot be common"),
        (
            "few: {tier1",
            "few: {training: {epochs: 9}, tier1",
            "pair.yaml:8:9 configurations.few.training: 'training' belongs into common",
        ),
        (
            "few: {tier1: {data",
            "few: {tier1: {dta",
            "pair.yaml:8:17 tier1.dta_fractions: unknown key 'dta_fractions'; did you mean",
        ),
        ("[0.2]", "[1.2]", "pair.yaml:8:34 tier1.data_fractions.0: 1.2 is over 1"),
        ("many:", "few:", "pair.yaml:9:3 configurations.few: 'few' already given at line 8"),
        ("many:", "Few:", "pair.yaml:9:3 configurations.Few: 'Few' and 'few' differ in case only"),
        (
            "many: {tier1: {data_fractions: [0.5]}}",
            "many: 7",
            "pair.yaml:9:9 configurations.many: must be a mapping of keys to values, not 7",
        ),
        ("base: small.yaml", "base: smal.yaml", "pair.yaml:3:7 base: smal.yaml: no such file"),
        (
            "seed: 5",
            "searcher: {name: tpe}",
            "pair.yaml:5:20 searcher.name: 'tpe' suggests by results",
        ),
        ("name: pair", "name: ../pair", "pair.yaml:2:7 name: '../pair' may hold letters"),
        ("version: 1", "version: 2", "pair.yaml:1:10 version: must be 1, not 2"),
    ],
)
def test_every_mistake_is_told_with_its_file_line_and_column(tmp_path, old, new, expected):
    path = write(tmp_path, MATRIX.replace(old, new, 1))
    assert any(problem.startswith(expected) for problem in problems(path)), problems(path)


def test_a_mistake_in_the_base_is_told_once_and_in_the_base(tmp_path):
    path = write(tmp_path, base=BASE.replace("name: digits", "name: digitz"))
    assert problems(path) == [
        "small.yaml:3:17 dataset.name: unknown dataset 'digitz'; did you mean 'digits'?"
    ]


def test_all_mistakes_come_at_once_with_their_source_lines(tmp_path):
    path = write(
        tmp_path,
        MATRIX.replace("[0.2]", "[1.2]").replace("[0.5]", "[-1]"),
        BASE.replace("width: 16", "widht: 16"),
    )
    found = problems(path, "tier1.num_trails=3")
    assert [line.split(" ")[0] for line in found] == [
        "pair.yaml:8:34",
        "pair.yaml:9:35",
        "small.yaml:4:37",
        "--set:0:0",
    ]
    with pytest.raises(SpecError) as caught:
        load_matrix(path)
    assert "    8 |   few: {tier1: {data_fractions: [1.2]}}" in render(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=x", "named by its own key"),
        ("searcher.name=tpe", "suggests by results"),
        ("tier1.num_trials=0", "must be at least 1"),
        ("nonsense", "is not of the form"),
    ],
)
def test_a_wrong_override_is_told_once_for_all_configurations(tmp_path, override, expected):
    found = problems(write(tmp_path), override)
    assert len(found) == 1
    assert found[0].startswith("--set")
    assert expected in found[0]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("tier1.num_trials=3", "tier1", "num_trials", 3),
        ("training.epochs=2", "training", "epochs", 2),
        ("tier2.metrics=[gradient_norm]", "tier2", "metrics", ["gradient_norm"]),
        ("verification.num_seeds=5", "verification", "num_seeds", 5),
        ("resources.gpus_per_trial=0.5", "resources", "gpus_per_trial", 0.5),
        ("dataset.root=/somewhere", "dataset", "root", "/somewhere"),
        ("tracking.experiment=mine", "tracking", "experiment", "mine"),
        ("output.root=elsewhere", "output", "root", "elsewhere"),
    ],
)
def test_an_override_reaches_every_configuration(tmp_path, override, section, key, value):
    specs = load_matrix(write(tmp_path), [override]).configurations
    assert [getattr(getattr(s, section), key) for s in specs.values()] == [value] * 2


def test_chosen_keeps_the_order_of_the_file_and_refuses_unknown_names(tmp_path):
    matrix = load_matrix(write(tmp_path))
    assert matrix.chosen([]) == ("few", "many")
    assert matrix.chosen(["many", "few"]) == ("few", "many")
    assert matrix.chosen(["many"]) == ("many",)
    with pytest.raises(SpecError, match="did you mean 'many'"):
        matrix.chosen(["mani"])


def test_a_file_that_is_no_matrix_says_so(tmp_path):
    with pytest.raises(SpecError, match=r"pair.yml.*no such file; did you mean .*pair.yaml"):
        load_matrix(write(tmp_path).with_name("pair.yml"))
    for text in ("[1, 2]", "", "name: x\n\tbase: y"):
        with pytest.raises(SpecError):
            load_matrix(write(tmp_path, text))


def test_differences_name_what_determines_results_only():
    one = {"seed": 0, "tier1": {"num_trials": 3}, "resources": {"num_cpus": 1}, "name": "a"}
    two = {"seed": 0, "tier1": {"num_trials": 4}, "resources": {"num_cpus": 2}, "name": "b"}
    assert differences(one, two) == ["tier1.num_trials (3 and 4)"]
    assert differences(one, {**one, "name": "c"}) == []
    assert (
        differences({"dataset": {"name": "digits", "root": "a"}}, {"dataset": {"name": "digits"}})
        == []
    )
    folder = {"dataset": {"name": "image_folder", "root": "a"}}
    assert differences(folder, {"dataset": {"name": "image_folder", "root": "b"}}) == [
        "dataset.root ('a' and 'b')"
    ]
    assert differences({"model": {}}, {"model": {"options": {}}}) == []


def test_what_ends_in_yaml_is_a_definition_and_the_rest_are_studies(tmp_path):
    (tmp_path / "study.yaml").mkdir()
    assert is_definition("reports/cifar10.yaml")
    assert is_definition("gone.yml")
    assert not is_definition("cifar10_10")
    assert not is_definition(None)
    assert not is_definition(str(tmp_path / "study.yaml"))


def test_every_key_of_the_file_has_a_description():
    assert all(field.description for field in MatrixFile.model_fields.values())


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("reports/evidence.yaml", "llp study"),
        ("reports/optimizers_digits.yaml", "llp batch"),
        ("search_spaces/digits.yaml", "llp search"),
    ],
)
def test_a_definition_of_something_else_is_sent_to_its_command(file, command):
    with pytest.raises(SpecError) as caught:
        load_matrix(ROOT / file)
    (problem,) = caught.value.problems
    assert problem.message.endswith(f"run: {command} {ROOT / file}")
