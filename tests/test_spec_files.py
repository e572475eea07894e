# ruff: noqa: E501  (tables have one row a line)
"""Loading: what YAML means here, names, overrides; and the texts made from a spec."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llp.errors import SpecError
from llp.probing.budgets import Bracket, ladder, rung_sizes
from llp.spec import (
    Spec,
    check,
    completed_digest,
    digest,
    init_template,
    json_schema,
    load_spec,
    to_yaml,
)
from llp.spec.loading import shipped_folders
from llp.spec.source import parse
from llp.spec.template import PRESETS

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "search_spaces").glob("*.yaml"))
MINIMAL = {
    "name": "study",
    "dataset": {"name": "digits"},
    "model": {"name": "mlp"},
    "search_space": {"learning_rate": {"type": "loguniform", "low": 1e-3, "high": 1}},
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("010", 10),
        ("0x10", 16),
        ("0o10", 8),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("-.inf", -float("inf")),
        ("[1, two, 3.0]", [1, "two", 3.0]),
        ("{a: {b: []}}", {"a": {"b": []}}),
        ("|\n  a\n  b\n", "a\nb\n"),
        ("../shared/data", "../shared/data"),
        ("sqlite:///x.db", "sqlite:///x.db"),
        ("9" * 5000, float("inf")),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    data, _, problems = parse(f"a: {text}", "x.yaml")
    assert problems == []
    assert data == {"a": value}
    assert type(data["a"]) is type(value)


def test_places_are_those_a_person_would_point_to() -> None:
    text = "a: 1\nb:\n  c: [x, y]\n  d:\n    - p\n    - q: 2\n"
    _, source, _ = parse(text, "f")
    rows = text.splitlines()
    for path, line, start in [
        (("a",), 1, "1"),
        (("b",), 2, "b:"),
        (("b", "c"), 3, "[x"),
        (("b", "c", 1), 3, "y]"),
        (("b", "d", 1, "q"), 6, "2"),
    ]:
        place = source.values[path]
        assert place.line == line
        assert rows[line - 1][place.column - 1 :].startswith(start)


def test_quoted_numbers_are_numbers_where_one_is_wanted() -> None:
    spec = load_spec(
        {
            **MINIMAL,
            "training": {"learning_rate": "1e-3", "weight_decay": "5E-4"},
            "search_space": {
                "learning_rate": ["1e-3", 0.1],
                "momentum": {"type": "uniform", "low": "1e-1", "high": "0.9"},
            },
            "model": {"name": "mlp", "options": {"dropout": "1e-1"}},
        }
    )
    assert spec.model.options == {"dropout": 0.1}
    assert spec.training.learning_rate == 0.001
    assert spec.search_space["learning_rate"].values == [0.001, 0.1]
    assert spec.search_space["momentum"].low == 0.1


def test_a_name_is_a_path_then_a_search_space_here_then_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_spec("digits").name == "digits"
    assert load_spec("digits.yaml").name == "digits"
    Path("search_spaces").mkdir()
    Path("search_spaces/digits.yaml").write_text(to_yaml(load_spec(MINIMAL, ["name=mine"])))
    assert load_spec("digits").name == "mine"
    Path("digits").write_text(to_yaml(load_spec(MINIMAL, ["name=path"])))
    assert load_spec("digits").name == "path"
    Path("elsewhere").mkdir()
    Path("elsewhere/other.yml").write_text(to_yaml(load_spec(MINIMAL, ["name=given"])))
    assert load_spec("other", search_path=["elsewhere"]).name == "given"
    with pytest.raises(SpecError, match=": no such file"):
        load_spec("sub/digits")


def test_shipped_files_are_found_when_installed_as_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class File(type(Path())):
        def locate(self):
            return tmp_path / self

    (tmp_path / "share/llp/search_spaces").mkdir(parents=True)
    listed = [File("llp/cli.py"), File("share/llp/search_spaces/digits.yaml")]
    monkeypatch.setattr("importlib.metadata.files", lambda name: listed)
    assert tmp_path / "share/llp/search_spaces" in shipped_folders()


def test_a_spec_loads_from_a_mapping_or_a_spec_as_from_a_file(tmp_path: Path) -> None:
    spec = load_spec(MINIMAL)
    (tmp_path / "x.yaml").write_text(to_yaml(spec))
    assert load_spec(tmp_path / "x.yaml") == spec == load_spec(spec)
    assert load_spec(spec, ["seed=3"]).seed == 3
    assert check(spec) is None


def test_problems_of_a_mapping_have_a_path() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec({**MINIMAL, "tier1": {"num_trails": 3}})
    assert str(caught.value) == (
        "tier1.num_trails: unknown key 'num_trails'; did you mean 'num_trials'?"
    )


def test_a_spec_made_in_code_is_checked_too() -> None:
    spec = Spec.model_validate({**MINIMAL, "model": {"name": "mlpp"}})
    with pytest.raises(SpecError, match=r"model\.name: unknown model 'mlpp'; did you mean 'mlp'"):
        check(spec)


def test_later_problems_still_know_their_line() -> None:
    problem = load_spec("digits").problem("tier1.data_fractions.0", "too small")
    row = Path(ROOT / problem.file).read_text().splitlines()[problem.line - 1]
    assert row[problem.column - 1 :].startswith("0.1, 0.3, 1.0]")


# overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("tier1.num_trials=8", lambda s: s.tier1.num_trials, 8),
        ("tier1.data_fractions=[0.2, 1]", lambda s: s.tier1.data_fractions, [0.2, 1.0]),
        ("tier1.data_fractions.0=0.2", lambda s: s.tier1.data_fractions, [0.2, 0.3, 1.0]),
        ("tier2.top_k=0", lambda s: s.tier2.top_k, 0),
        ("dataset.root=../shared/data", lambda s: s.dataset.root, "../shared/data"),
        ("dataset.root=", lambda s: s.dataset.root, None),
        ("search_space.momentum=0.9", lambda s: s.search_space["momentum"].value, 0.9),
        ("search_space.momentum.low=6e-1", lambda s: s.search_space["momentum"].low, 0.6),
        ("search_space.dropout=[0, 0.1]", lambda s: s.search_space["dropout"].values, [0, 0.1]),
        ("constraints=[learning_rate < 0.5]", lambda s: s.constraints, ["learning_rate < 0.5"]),
        ("tracking={mlflow: false}", lambda s: s.tracking.mlflow, False),
        ("tracking.uri=http://localhost:5000", lambda s: s.tracking.uri, "http://localhost:5000"),
        ("training.gradient_clip=1e0", lambda s: s.training.gradient_clip, 1.0),
        (" seed = 3", lambda s: s.seed, 3),
    ],
)
def test_an_override_takes_the_place_of_the_value(override, read, value) -> None:
    assert read(load_spec("digits", [override])) == value


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("tier1.num_trails=8", "tier1.num_trails", "unknown key 'num_trails'; did you mean 'num_trials'?"),
        ("tier.num_trials=8", "tier", "unknown key 'tier'; did you mean 'tier"),
        ("tier1.num_trials=many", "tier1.num_trials", "must be a whole number, not 'many'"),
        ("tier1.num_trials", "", "'tier1.num_trials' is not of the form path.to.key=VALUE"),
        ("=3", "", "'=3' is not of the form path.to.key=VALUE"),
        ("tier1..x=3", "", "is not of the form path.to.key=VALUE"),
        ("name.first=3", "name.first", "'name' is a single value and has no 'first'"),
        ("tier1.data_fractions.7=1", "tier1.data_fractions.7", "'tier1.data_fractions' is a list of 3 and has no '7'"),
        ("name=[a", "name", "yaml: expected ',' or ']'"),
        ("name=!!python/name:os.system x", "name", "YAML tags are not allowed"),
        ("name=*x", "name", "anchors and aliases are not allowed"),
        ("model.name=convnett", "model.name", "unknown model 'convnett'; did you mean 'convnet'?"),
        ("search_space.learning_rate.low=5", "search_space.learning_rate.low", "low (5) must be below high (1)"),
        ("search_space.widht=[8]", "search_space.widht", "nothing reads 'widht'; did you mean 'width'?"),
        ("constraints=[momentum > 1]", "constraints.0", "contradictory"),
        ("search_space.width=[]", "search_space.width", "needs at least one value"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_attributed_to_set(override: str, path: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("digits", [override])
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.path) == ("--set", 0, path)
    assert message in problem.message
    assert str(problem).startswith(f"--set {path}: " if path else "--set: ")


def test_an_override_that_contradicts_the_file_is_named_as_the_cause() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec({**MINIMAL, "tier2": {"top_k": 6}}, ["tier1.num_trials=4"])
    assert str(caught.value) == (
        "--set tier1.num_trials: tier2.top_k (6) is over tier1.num_trials (4)"
    )


def test_an_override_can_repair_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(to_yaml(load_spec(MINIMAL)).replace("name: mlp", "name: mlpp"))
    assert load_spec(path, ["model.name=mlp"]).model.name == "mlp"


@given(st.integers(1, 10**6), st.floats(1e-6, 1e6), st.text(max_size=20))
@settings(max_examples=40, deadline=None)
def test_an_overridden_value_survives_yaml(number: int, real: float, text: str) -> None:
    text = "".join(letter for letter in text if letter.isprintable())
    spec = load_spec(
        MINIMAL,
        [
            f"tier1.num_trials={number + 10}",
            f"training.learning_rate={real!r}",
            "dataset.root=" + "'" + text.replace("'", "''") + "'",
        ],
    )
    data, _, problems = parse(to_yaml(spec), "x")
    assert problems == []
    assert Spec.model_validate(data) == spec
    assert spec.tier1.num_trials == number + 10
    assert spec.training.learning_rate == real
    assert spec.dataset.root == text


def test_defaults_shrink_to_a_small_number_of_trials() -> None:
    spec = load_spec(MINIMAL, ["tier1.num_trials=2"])
    assert (spec.tier2.top_k, spec.verification.top_k) == (2, 2)
    data, _, _ = parse(to_yaml(spec), "x")
    assert load_spec(data) == spec


# digest


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "resources.cpus_per_trial=2",
        "resources.max_concurrent=1",
        "tracking.mlflow=false",
        "output.root=/elsewhere",
        "dataset.root=/elsewhere",
        "dataset.download=true",
    ],
)
def test_digest_ignores_where_things_run_and_lie(override: str) -> None:
    assert digest(load_spec("cifar10", [override])) == digest(load_spec("cifar10"))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "tier1.num_trials=33",
        "training.epochs=21",
        "search_space.momentum.low=0.81",
        "constraints=[]",
        "searcher.name=tpe",
        "verification.num_seeds=3",
        "tier2.rho=0.1",
        "dataset.validation_fraction=0.2",
        "score.preset=llp",
    ],
)
def test_digest_changes_with_what_determines_results(override: str) -> None:
    assert digest(load_spec("cifar10", [override])) != digest(load_spec("cifar10"))


def test_digest_of_a_folder_of_images_includes_the_folder() -> None:
    folder = {**MINIMAL, "dataset": {"name": "image_folder", "root": "a"}}
    assert digest(load_spec(folder)) != digest(load_spec(folder, ["dataset.root=b"]))


def test_a_spec_stored_before_a_setting_existed_has_the_digest_of_its_file() -> None:
    spec = load_spec(MINIMAL)
    stored = spec.model_dump(mode="json")
    del stored["training"]["label_smoothing"], stored["tier2"]
    assert completed_digest(stored) == digest(spec)
    stored["seed"] = spec.seed + 1
    assert completed_digest(stored) != digest(spec)
    assert completed_digest({**stored, "of_a_newer_version": 1}) == ""


def test_digest_does_not_depend_on_the_order_of_keys_or_how_a_number_is_written() -> None:
    backwards = dict(reversed(MINIMAL.items()))
    assert digest(load_spec(backwards)) == digest(load_spec(MINIMAL))
    low = {"type": "loguniform", "high": 1.0, "low": "1e-3", "when": {}}
    same = load_spec({**MINIMAL, "search_space": {"learning_rate": low}})
    assert digest(same) == digest(load_spec(MINIMAL))
    assert re.fullmatch("[0-9a-f]{64}", digest(same))


# shipped files, templates, schema


def test_all_wanted_search_spaces_are_shipped() -> None:
    wanted = "cifar10 cifar100 cifar100_small_cnn cifar10_small_cnn digits fashion_mnist synthetic"
    assert set(wanted.split()) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_search_space_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    spec = load_spec(ROOT / "search_spaces" / f"{name}.yaml")
    (tmp_path / "again.yaml").write_text(to_yaml(spec))
    again = load_spec(tmp_path / "again.yaml")
    assert again == spec
    assert digest(again) == digest(spec)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_head_comment_states_the_budget(name: str) -> None:
    spec = load_spec(name)
    head = (ROOT / "search_spaces" / f"{name}.yaml").read_text()
    official = {"digits": 1438, "synthetic": 2000, "cifar10": 50_000, "cifar100": 50_000}
    num_train = int(re.search(r"early; ([\d,]+) training images", head)[1].replace(",", ""))
    whole = official.get(spec.dataset.name, 60_000)
    assert num_train == pytest.approx(whole * (1 - spec.dataset.validation_fraction), abs=1)
    rungs = ladder(spec.tier1.data_fractions, spec.rung_epochs(), num_train)
    eta, num_trials = spec.tier1.reduction_factor, spec.tier1.num_trials
    sizes = rung_sizes(Bracket(1, num_trials), len(rungs), eta)
    tier1 = sum(sizes[rung.rung] * rung.samples_seen for rung in rungs)
    full = spec.training.epochs * num_train
    num_full = spec.verification.top_k * spec.verification.num_seeds
    chain = " -> ".join(str(size) for size in sizes.values())
    squeezed = " ".join(head.split())
    assert (
        f"tier 1 {tier1:,} = {tier1 / full:.1f} full trainings ({chain} configurations)" in squeezed
    )
    assert f"verification {num_full * full:,} = {num_full} full trainings" in squeezed
    assert f"together {tier1 + num_full * full:,};" in squeezed
    assert f"training all {num_trials} configurations fully takes {num_trials * full:,}" in squeezed


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_template_loads_and_checks(preset: str, tmp_path: Path) -> None:
    text = init_template("my study", preset)
    (tmp_path / "x.yaml").write_text(text)
    spec = load_spec(tmp_path / "x.yaml")
    assert (spec.name, spec.dataset.name) == ("my-study", PRESETS[preset]["dataset"])
    assert len([line for line in text.splitlines() if line.strip()]) <= 55
    assert max(map(len, text.splitlines())) <= 100
    assert "$" not in text


def test_a_template_is_named_after_its_preset_or_falls_back_to_digits() -> None:
    assert "name: cifar10\n" in init_template("cifar10")
    assert re.search(r"name: digits +#", init_template("mine"))
    assert init_template("a/../b c").count("name: a-..-b-c\n") == 1
    with pytest.raises(SpecError, match="unknown preset 'cifar11'; did you mean 'cifar10'"):
        init_template("x", "cifar11")


def test_every_key_of_the_schema_is_described() -> None:
    schema = json_schema()
    sections = {"Spec": schema, **schema["$defs"]}
    missing = [
        f"{section}.{key}"
        for section, found in sections.items()
        if section not in {"Uniform", "LogUniform", "Integer", "Choice", "Fixed"}
        for key, field in found["properties"].items()
        if not field.get("description")
    ]
    assert missing == []


def test_the_template_shows_every_section() -> None:
    text = init_template("x")
    assert [key for key in Spec.model_fields if not re.search(rf"^{key}:", text, re.M)] == []


def test_the_json_schema_accepts_what_the_loader_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    for name in SHIPPED:
        data, _, _ = parse((ROOT / "search_spaces" / f"{name}.yaml").read_text(), name)
        assert list(validator.iter_errors(data)) == []
    wrong = {**MINIMAL, "dataset": {"name": "cifar11"}, "tier9": {}}
    assert len(list(validator.iter_errors(wrong))) == 2


def test_a_spec_is_frozen_and_pickles() -> None:
    import pickle

    spec = load_spec("digits")
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 1
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert not dataclasses.is_dataclass(spec)
