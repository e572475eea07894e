# ruff: noqa: E501  (the table has one row a line)
"""Every kind of bad input to the spec gets one clear message with its file, line and path.

`GOOD` is a sound file; each row replaces one of its lines (or appends some) and names what must
come out: line, dotted path, and message. Numbers of lines are those of `GOOD`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from llp.errors import Problem, SpecError
from llp.spec import RandomSearch, check_ladder, load_spec, render
from llp.spec.schema import Spec
from llp.spec.source import parse
from llp.workloads.subsets import nested_order

GOOD = """\
version: 1
name: study
dataset: {name: digits}
model:
  name: convnet
  options: {dropout: 0.1}
training:
  optimizer: sgd
  batch_size: 64
search_space:
  learning_rate: {type: loguniform, low: 1e-3, high: 1.0}
  momentum: {type: uniform, low: 0.5, high: 0.99}
  width: [8, 16]
constraints:
  - learning_rate * momentum <= 0.9
searcher: {name: random}
tier1:
  scheduler: asha
  num_trials: 12
  data_fractions: [0.1, 0.3, 1.0]
  stop_rules: [{name: power_law}]
tier2:
  metrics: [hessian_trace]
  top_k: 4
verification: {top_k: 2}
"""

# line to replace, new text, line of the problem, path, message
ROWS = [
    # names, each with the nearest
    (3, "dataset: {name: cifar11}", 3, "dataset.name", "unknown dataset 'cifar11'; did you mean 'cifar10'?"),
    (5, "  name: resnet21", 5, "model.name", "unknown model 'resnet21'; did you mean 'resnet"),
    (8, "  optimizer: adamm", 8, "training.optimizer", "unknown optimizer 'adamm'; did you mean 'adam"),
    (9, "  schedule: cosin", 9, "training.schedule", "unknown schedule 'cosin'; did you mean 'cosine'?"),
    (9, "  augmentation: [flip, croop]", 9, "training.augmentation.1", "unknown augmentation 'croop'; did you mean 'crop'?"),
    (16, "searcher: {name: optuna}", 16, "searcher.name", "unknown searcher 'optuna'; choose one of: gp, grid, random, tpe"),
    (18, "  scheduler: ahsa", 18, "tier1.scheduler", "unknown scheduler 'ahsa'; did you mean 'asha'?"),
    (21, "  stop_rules: [{name: powerlaw}]", 21, "tier1.stop_rules.0.name", "unknown stop rule 'powerlaw'; did you mean 'power_law'?"),
    (23, "  metrics: [hesian_trace]", 23, "tier2.metrics.0", "unknown metric 'hesian_trace'; did you mean 'hessian_trace'?"),
    (23, "  metrics: [swa_gain]", 23, "tier2.metrics.0", "'swa_gain' belongs to tier2.refinements"),
    (23, "  refinements: [swa_gian]", 23, "tier2.refinements.0", "unknown refinement 'swa_gian'; did you mean 'swa_gain'?"),
    (5, "  name: no_such_package:build", 5, "model.name", "cannot load 'no_such_package:build': No module named"),
    (5, "  name: llp.errors:build", 5, "model.name", "cannot load 'llp.errors:build'"),
    # keys
    (19, "  max_trails: 12", 19, "tier1.max_trails", "unknown key 'max_trails'; did you mean 'num_trials'?"),
    (19, "  num_trails: 12", 19, "tier1.num_trails", "unknown key 'num_trails'; did you mean 'num_trials'?"),
    (25, "num_trials: 12", 25, "num_trials", "unknown key 'num_trials' here; it belongs to tier1"),
    (16, "sercher: {name: random}", 16, "sercher", "unknown key 'sercher'; did you mean 'searcher'?"),
    (11, "  learning_rate: {type: loguniform, low: 1e-3, hihg: 1.0}", 11, "search_space.learning_rate.hihg", "unknown key 'hihg'; did you mean 'high'?"),
    (2, "", 1, "name", "missing key 'name'"),
    (19, "  num_trials: 12\n  num_trials: 13", 20, "tier1.num_trials", "'num_trials' already given at line 19"),
    # types
    (19, "  num_trials: many", 19, "tier1.num_trials", "must be a whole number, not 'many'"),
    (19, "  num_trials: 12.5", 19, "tier1.num_trials", "must be a whole number, not 12.5"),
    (19, "  num_trials: true", 19, "tier1.num_trials", "must be a number, not true"),
    (20, "  data_fractions: [true, 1.0]", 20, "tier1.data_fractions.0", "must be a number, not true"),
    (20, "  data_fractions: 0.1", 20, "tier1.data_fractions", "must be a list, not 0.1"),
    (19, "  epochs: [3, x, 5]", 19, "tier1.epochs.1", "must be a whole number, not 'x'"),
    (19, "  epochs: x", 19, "tier1.epochs", "must be a whole number or a list, not 'x'"),
    (19, "  num_trials:", 19, "tier1.num_trials", "must be a whole number, not nothing"),
    (16, "searcher: random", 16, "searcher", "must be a mapping of keys to values, not 'random'"),
    (6, "  options: {dropout: [1]}", 6, "model.options.dropout", "must be true or false, a number or text, not a list"),
    (25, "verification: {top_k: 0}", 25, "verification.top_k", "must be at least 1, not 0"),
    (9, "  learning_rate: -0.1", 9, "training.learning_rate", "must be above 0, not -0.1"),
    (9, "  weight_decay: .nan", 9, "training.weight_decay", "must be a finite number, not nan"),
    (9, "  precision: fp15", 9, "training.precision", "unknown value 'fp15'; did you mean 'fp16'?"),
    (1, "version: 2", 1, "version", "must be 1, not 2"),
    (2, "name: a/b", 2, "name", "'a/b' may hold letters, digits"),
    (2, "name: 7", 2, "name", "must be text, not 7"),
    # options
    (6, "  options: {dropuot: 0.1}", 6, "model.options.dropuot", "model convnet has no option 'dropuot'; did you mean 'dropout'?"),
    (6, "  options: {width: 2.5}", 6, "model.options.width", "must be a whole number, not 2.5"),
    (6, "  options: {width: true}", 6, "model.options.width", "must be a whole number, not true"),
    (6, "  options: {dropout: 1.5}", 6, "model.options.dropout", "must be at least 0 and below 1, not 1.5"),
    (9, "  optimizer_options: {beta1: 0.9}", 9, "training.optimizer_options.beta1", "optimizer sgd has no option 'beta1'; it takes: momentum, nesterov"),
    (9, "  optimizer_options: {nesterov: 1}", 9, "training.optimizer_options.nesterov", "must be true or false, not 1"),
    (8, "  optimizer: talt\n  optimizer_options: {base: adamm}", 9, "training.optimizer_options.base", "unknown optimizer 'adamm'; did you mean 'adam"),
    (8, "  optimizer: talt\n  optimizer_options: {base: sam}", 9, "training.optimizer_options.base", "'sam' takes several gradients a step itself; choose one of: adam, adamw, muon, sgd, talt"),
    (8, "  optimizer: talt\n  optimizer_options: {projection_dimension: 1}", 9, "training.optimizer_options.projection_dimension", "must be at least 2, not 1"),
    (8, "  optimizer: muon\n  optimizer_options: {newton_schulz_steps: 100}", 9, "training.optimizer_options.newton_schulz_steps", "must be at least 1 and below 100, not 100"),
    (13, "  base: [talt, asam]\n  optimizer: [sam]", 13, "search_space.base.1", "'asam' takes several gradients a step itself"),
    (3, "dataset: {name: digits, options: {size: 3}}", 3, "dataset.options.size", "dataset digits has no option 'size'; it takes: none"),
    (3, "dataset: {name: image_folder}", 3, "dataset.root", "missing key 'root': image_folder needs the folder of the images"),
    (21, "  stop_rules: [{name: plateau, patience: 3}]", 21, "tier1.stop_rules.0.patience", "stop rule plateau has no option 'patience'; did you mean 'patience_fraction'?"),
    (21, "  stop_rules: [{name: power_law, confidence: 95}]", 21, "tier1.stop_rules.0.confidence", "must be above 0 and below 1, not 95"),
    (21, "  stop_rules: [{min_points: 4}]", 21, "tier1.stop_rules.0", "missing key 'name'"),
    # domains
    (11, "  learning_rate: {type: loguniform, low: 1, high: 1e-4}", 11, "search_space.learning_rate.low", "low (1) must be below high (0.0001)"),
    (11, "  learning_rate: {type: loguniform, low: 0, high: 1}", 11, "search_space.learning_rate.low", "loguniform needs low > 0, not 0; use uniform or low: 1e-8"),
    (11, "  learning_rate: {type: logunif, low: 0, high: 1}", 11, "search_space.learning_rate.type", "unknown domain type 'logunif'; did you mean 'loguniform'?"),
    (11, "  learning_rate: {low: 0.1, high: 1}", 11, "search_space.learning_rate", "missing key 'type'; choose one of: choice, fixed"),
    (11, "  learning_rate: {type: uniform, low: 0.1, high: .inf}", 11, "search_space.learning_rate.high", "must be a finite number, not inf"),
    (11, "  learning_rate: {type: uniform, low: 0.1, high: 0.5, step: 1}", 11, "search_space.learning_rate.step", "a step of 1 is over the width 0.4 of the domain"),
    (11, "  learning_rate:", 11, "search_space.learning_rate", "must be a mapping of keys to values, not nothing"),
    (13, "  width: []", 13, "search_space.width", "needs at least one value"),
    (13, "  width: [8, 8]", 13, "search_space.width", "8 is listed twice"),
    (13, "  width: [8, [9]]", 13, "search_space.width.1", "must be true or false, a number or text, not a list"),
    # values that the parameter cannot have
    (11, "  learning_rate: {type: uniform, low: 0, high: 1}", 11, "search_space.learning_rate.low", "must be above 0, not 0"),
    (11, "  learning_rate: [0.1, fast]", 11, "search_space.learning_rate.1", "must be a number, not 'fast'"),
    (11, "  learning_rate: [0.1, true]", 11, "search_space.learning_rate.1", "must be a number, not true"),
    (13, "  batch_size: {type: uniform, low: 16, high: 64}", 13, "search_space.batch_size.type", "batch_size needs whole numbers and uniform draws fractions; use {type: integer, low: 16, high: 64}"),
    (13, "  batch_size: [16, 32.5]", 13, "search_space.batch_size.1", "must be a whole number, not 32.5"),
    (13, "  width: {type: loguniform, low: 8, high: 64}", 13, "search_space.width.type", "use {type: integer, low: 8, high: 64, log: true}"),
    (13, "  width: {type: integer, low: 0, high: 64}", 13, "search_space.width.low", "must be at least 1, not 0"),
    (13, "  optimizer: [sgd, adm]", 13, "search_space.optimizer.1", "unknown optimizer 'adm'; did you mean 'adam'?"),
    (13, "  optimizer: 3", 13, "search_space.optimizer", "must be a name, not 3"),
    (13, "  augmentation: [none, flip+crp]", 13, "search_space.augmentation.1", "unknown augmentation 'crp'; did you mean 'crop'?"),
    (12, "  momentum: {type: uniform, low: 0.5, high: 1.2}", 12, "search_space.momentum.high", "must be at least 0 and below 1, not 1.2"),
    (13, "  nesterov: [true, 0]", 13, "search_space.nesterov.1", "must be true or false, not 0"),
    # hyperparameters that nobody reads
    (12, "  momentun: 0.9", 12, "search_space.momentun", "nothing reads 'momentun'; did you mean 'momentum'?"),
    (12, "  lr: 0.9", 12, "search_space.lr", "nothing reads 'lr'; did you mean 'learning_rate'?"),
    (12, "  beta1: [0.8, 0.9]", 12, "search_space.beta1", "nothing reads 'beta1': it is an option of optimizer adam and optimizer adamw and optimizer muon, and this file uses sgd and convnet"),
    (12, "  epochs: [1, 2]", 12, "search_space.epochs", "nothing reads 'epochs' here: the rungs fix the epochs"),
    (13, "  optimizer: [sgd, adam]", 12, "search_space.momentum", "optimizer adam would not read 'momentum'; add when: {optimizer: sgd}"),
    (10, "  schedule: one_cycle\nsearch_space:\n  warmup_fraction: [0, 0.1]", 12, "search_space.warmup_fraction", "nothing reads 'warmup_fraction': schedule one_cycle does not take it"),
    # conditions
    (12, "  momentum: {type: uniform, low: 0.5, high: 0.9, when: {widht: 8}}", 12, "search_space.momentum.when.widht", "unknown parameter 'widht'; did you mean 'width'? (of search_space)"),
    (12, "  momentum: {type: uniform, low: 0.5, high: 0.9, when: {width: 9}}", 12, "search_space.momentum.when.width", "'width' is never 9"),
    (12, "  momentum: {type: uniform, low: 0.5, high: 0.9, when: {learning_rate: 0.1}}", 12, "search_space.momentum.when.learning_rate", "'learning_rate' is a real number and never exactly one value; use constraints"),
    (12, "  momentum: {type: choice, values: [0.5], when: {momentum: 0.5}}", 12, "search_space.momentum.when", "conditions go round in a circle: momentum -> momentum"),
    (12, "  momentum: {type: choice, values: [0.5], when: {width: []}}", 12, "search_space.momentum.when.width", "needs at least one value"),
    # constraints
    (15, "  - learning_rate <", 15, "constraints.0", "'learning_rate <' cannot be read: invalid syntax"),
    (15, "  - learning_rat < 1", 15, "constraints.0", "unknown parameter 'learning_rat'; did you mean 'learning_rate'? (of search_space)"),
    (15, "  - batch_size < 1", 15, "constraints.0", "'batch_size' is not in search_space; add it there, a single value will do"),
    (15, "  - __import__('os').system('id') == 0", 15, "constraints.0", "is not allowed; use names, numbers, + - * /"),
    (15, "  - learning_rate * 2", 15, "constraints.0", "is a value and not a condition"),
    (15, "  - learning_rate > 2", 15, "constraints.0", "'learning_rate > 2' is contradictory: 0 of 10,000 draws satisfy it"),
    (15, "  - learning_rate > 0.1\n  - learning_rate < 0.1", 14, "constraints", "contradictory: 0 of 10,000 draws satisfy all of them"),
    (15, "  - 1 < 2", 15, "constraints.0", "'1 < 2' names no parameter"),
    (14, "  optimizer: [sgd]\nconstraints:\n  - optimizer < 3\n#", 16, "constraints.0", "optimizer is 'sgd' and not a number"),
    # rungs
    (20, "  data_fractions: [1.0]", 20, "tier1.data_fractions", "scheduler 'asha' needs at least 2 rungs and there is 1; add a data fraction"),
    (20, "  data_fractions: []", 20, "tier1.data_fractions", "needs at least one value"),
    (20, "  data_fractions: [0.1, 1.5]", 20, "tier1.data_fractions.1", "1.5 is over 1 (fraction of the training set)"),
    (20, "  data_fractions: [0, 1.0]", 20, "tier1.data_fractions.0", "0 is not above 0 (fraction of the training set)"),
    (20, "  data_fractions: [0.3, 0.1, 1.0]", 20, "tier1.data_fractions.1", "must not decrease: 0.3 is followed by 0.1"),
    (20, "  data_fractions: [0.1, 0.1, 1.0]", 20, "tier1.data_fractions.1", "rung 2 (0.1 of the images, 20 epochs) costs no more than rung 1 (0.1, 20 epochs)"),
    (19, "  epochs: [1, 2]", 19, "tier1.epochs", "epochs has 2 entries for 3 data_fractions"),
    (19, "  epochs: [0, 1, 2]", 19, "tier1.epochs", "a rung needs at least 1 epoch, not 0"),
    # sections that contradict each other
    (24, "  top_k: 13", 24, "tier2.top_k", "tier2.top_k (13) is over tier1.num_trials (12)"),
    (25, "verification: {top_k: 13}", 25, "verification.top_k", "verification.top_k (13) is over tier1.num_trials (12)"),
    (25, "score: {preset: weights}", 25, "score.preset", "weights and preset: weights belong together"),
    (25, "resources: {num_cpus: 1, cpus_per_trial: 2}", 25, "resources.cpus_per_trial", "cpus_per_trial (2) is over num_cpus (1)"),
    (25, "resources: {gpus_per_trial: 1.5}", 25, "resources.gpus_per_trial", "1.5 GPUs: use a fraction below 1 or a whole number"),
    (25, "tracking: {uri: 'https://me:secret@host:5000'}", 25, "tracking.uri", "credentials in a URL end up in logs"),
    (25, "tracking: {uri: ./mlruns}", 25, "tracking.uri", "MLflow no longer writes to plain folders ('./mlruns')"),
    # YAML
    (5, "\tname: convnet", 5, "", "tab used for indentation; use spaces"),
    (3, "dataset: !!python/object/apply:os.system ['true']", 3, "dataset", "YAML tags are not allowed: tag:yaml.org,2002:python/object/apply:os.system"),
    (2, "name: !include secrets.yaml", 2, "name", "YAML tags are not allowed: !include"),
    (2, "name: &anchor study", 2, "", "anchors and aliases are not allowed; write the value out"),
    (2, "name: *anchor", 2, "", "anchors and aliases are not allowed; write the value out"),
    (3, "dataset: {name: digits", 4, "", "yaml: expected ',' or '}'"),
    (2, "name: a: b", 2, "", "yaml: a second ':' here; quote the text, or check the indentation"),
    (25, "---\nname: again", 25, "", "a second document starts here; one file is one experiment"),
    (1, "%YAML 1.1\n---", 2, "", "YAML directives are not allowed"),
    (2, "? [a]\n: b", 2, "", "a key must be plain text"),
]  # fmt: skip


def edited(line: int, text: str) -> str:
    lines = GOOD.splitlines()
    lines[line - 1] = text
    return "\n".join(lines) + "\n"


def problems_of(path: Path | str, **options: object) -> tuple[Problem, ...]:
    with pytest.raises(SpecError) as caught:
        load_spec(path, **options)  # type: ignore[arg-type]
    return caught.value.problems


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_the_table_edits_is_sound(here: Path) -> None:
    Path("exp.yaml").write_text(GOOD)
    assert load_spec("exp.yaml").tier1.num_trials == 12


@pytest.mark.parametrize(
    ("line", "text", "at", "path", "message"),
    ROWS,
    ids=[f"{row[3]}-{row[1].strip()}" for row in ROWS],
)
def test_bad_input_is_one_message_with_line_and_path(
    here: Path, line: int, text: str, at: int, path: str, message: str
) -> None:
    Path("exp.yaml").write_text(edited(line, text))
    found = problems_of("exp.yaml")
    assert [(problem.file, problem.line, problem.path) for problem in found] == [
        ("exp.yaml", at, path)
    ], [str(problem) for problem in found]
    assert message in found[0].message
    assert found[0].column >= 1
    assert str(found[0]).startswith(f"exp.yaml:{at}:{found[0].column} ")
    assert "Value error" not in found[0].message


def test_all_problems_come_at_once_in_the_order_of_the_file(here: Path) -> None:
    text = GOOD.replace("digits", "digitz").replace("num_trials: 12", "num_trails: 12")
    text = text.replace("[0.1, 0.3, 1.0]", "[0.1, 1.5]").replace("power_law", "powr_law")
    text = text.replace("high: 1.0", "high: 1e-4")
    Path("exp.yaml").write_text(text.replace("hessian_trace", "trace"))
    found = problems_of("exp.yaml")
    assert [(problem.line, problem.path) for problem in found] == [
        (3, "dataset.name"),
        (11, "search_space.learning_rate.low"),
        (19, "tier1.num_trails"),
        (20, "tier1.data_fractions.1"),
        (21, "tier1.stop_rules.0.name"),
        (23, "tier2.metrics.0"),
    ]


def test_names_are_checked_although_the_whole_search_space_is_wrong(here: Path) -> None:
    head, tail = GOOD.replace("digits", "digitz").split("search_space:\n")
    rest = tail[tail.index("constraints:") :]
    Path("exp.yaml").write_text(head.replace("name: study\n", "") + "search_space: {}\n" + rest)
    assert [(problem.line, problem.path) for problem in problems_of("exp.yaml")] == [
        (1, "name"),
        (2, "dataset.name"),
        (9, "search_space"),
    ]


def test_misspelt_key_is_not_also_reported_as_missing(here: Path) -> None:
    Path("exp.yaml").write_text(GOOD.replace("name: study", "nmae: study"))
    assert [problem.message for problem in problems_of("exp.yaml")] == [
        "unknown key 'nmae'; did you mean 'name'?"
    ]


def test_caret_stands_under_the_wrong_value(here: Path) -> None:
    Path("exp.yaml").write_text(edited(3, "dataset: {name: cifar11}"))
    with pytest.raises(SpecError) as caught:
        load_spec("exp.yaml")
    head, source, caret = render(caught.value).splitlines()
    assert head.startswith("error: exp.yaml:3:17 dataset.name: unknown dataset 'cifar11'")
    assert source.endswith("| dataset: {name: cifar11}")
    assert source[caret.index("^") :].startswith("cifar11")


def test_caret_stays_under_the_value_in_a_very_long_line(here: Path) -> None:
    filler = ", ".join(f"{k}.5" for k in range(1, 200))
    Path("exp.yaml").write_text(edited(11, f"  learning_rate: [{filler}, [wrong]]"))
    with pytest.raises(SpecError) as caught:
        load_spec("exp.yaml")
    _, source, caret = render(caught.value, width=80).splitlines()
    assert len(source) < 100
    assert source[caret.index("^") :].startswith("[wrong]")


def test_terminal_codes_in_a_file_do_not_reach_the_terminal(here: Path) -> None:
    Path("exp.yaml").write_text(edited(3, 'dataset: {name: "\\e[31mred"}'))
    with pytest.raises(SpecError) as caught:
        load_spec("exp.yaml")
    assert "\x1b" not in render(caught.value)


def test_many_problems_are_cut_short(here: Path) -> None:
    Path("exp.yaml").write_text(GOOD + "".join(f"zzz{k}: 1\n" for k in range(100)))
    with pytest.raises(SpecError) as caught:
        load_spec("exp.yaml")
    assert len(caught.value.problems) == 100
    assert render(caught.value).splitlines()[-1] == "and 75 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; an experiment is a mapping of keys to values"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "holds a list; an experiment is a mapping"),
        (b"just text\n", "holds 'just text'; an experiment is a mapping"),
        (b"name: caf\xe9\n", "is not UTF-8 text: byte 0xe9"),
        (bytes(range(256)), "is not UTF-8 text: byte 0x80"),
        (b"name: a\x00b\n", "yaml: special characters are not allowed"),
        (b"name: x\n" + b"\n" * 10**6, "is over 256 kB; not a spec"),
        (b"\n" * 250_000 + b"- 1", "holds a list"),
        (b"[" * 250_000, "is nested over 30 levels deep"),
        (b"{a: " * 60_000, "is nested over 30 levels deep"),
        (b"- " * 100_000, "is nested over 30 levels deep"),
        (b"a: [" + b"1, " * 80_000 + b"]", "has over 5,000 entries; not a spec"),
        (b"a: " + b"x" * 250_000, "missing key"),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (98 + k, 98 + k, b",".join([b"*%c" % (97 + k)] * 9))
                for k in range(8)
            ),
            "anchors and aliases are not allowed",
        ),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_hostile_files_are_refused(here: Path, content: bytes, message: str) -> None:
    Path("exp.yaml").write_bytes(content)
    found = problems_of("exp.yaml")
    assert all(problem.file == "exp.yaml" for problem in found)
    assert any(message in problem.message for problem in found), found


def test_a_missing_file_names_the_nearest(here: Path) -> None:
    Path("mine.yaml").write_text(GOOD)
    assert "no such file; did you mean 'mine.yaml'?" in problems_of("mien.yaml")[0].message
    assert "no such file; did you mean 'cifar10'?" in problems_of("cifar11")[0].message
    assert "shipped: cifar10, cifar100" in problems_of("zzzzzz")[0].message


def test_a_folder_and_a_device_are_not_experiment_files(here: Path) -> None:
    Path("folder").mkdir()
    assert problems_of("folder")[0].message == "is a folder, not an experiment file"
    assert problems_of("/dev/null")[0].message == "is not a regular file"


def test_a_grid_must_fit_the_number_of_trials(here: Path) -> None:
    text = GOOD.replace("name: random", "name: grid").replace(
        "{type: loguniform, low: 1e-3, high: 1.0}", "[0.01, 0.1]"
    )
    text = text.replace("{type: uniform, low: 0.5, high: 0.99}", "[0.5, 0.9]")
    Path("exp.yaml").write_text(text)
    (problem,) = problems_of("exp.yaml")
    assert (problem.line, problem.path) == (19, "tier1.num_trials")
    assert (
        "the grid has 8 configurations and num_trials is 12; set num_trials: 8" in problem.message
    )
    assert load_spec("exp.yaml", ["tier1.num_trials=8"]).tier1.num_trials == 8


def test_a_grid_needs_finite_domains(here: Path) -> None:
    Path("exp.yaml").write_text(GOOD.replace("name: random", "name: grid"))
    found = problems_of("exp.yaml")
    assert [(problem.line, problem.path) for problem in found] == [
        (11, "search_space.learning_rate"),
        (12, "search_space.momentum"),
    ]
    assert found[0].message.startswith(
        "a grid needs finitely many values and loguniform has no end"
    )


def test_a_circle_of_conditions_is_named_once(here: Path) -> None:
    text = GOOD.replace(
        "width: [8, 16]", "width: {type: choice, values: [8], when: {momentum: 0.5}}"
    )
    text = text.replace(
        "{type: uniform, low: 0.5, high: 0.99}", "{type: choice, values: [0.5], when: {width: 8}}"
    )
    Path("exp.yaml").write_text(text)
    (problem,) = problems_of("exp.yaml")
    assert problem.message == "conditions go round in a circle: momentum -> width -> momentum"
    assert problem.line == 12


def test_fraction_smaller_than_one_image_per_class_gives_the_numbers(here: Path) -> None:
    Path("exp.yaml").write_text(GOOD.replace("[0.1, 0.3, 1.0]", "[0.005, 0.3, 1.0]"))
    spec = load_spec("exp.yaml")
    with pytest.raises(SpecError) as caught:
        check_ladder(spec, num_train=1222, num_classes=10)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.path) == ("exp.yaml", 20, "tier1.data_fractions.0")
    assert problem.message == (
        "a fraction of 0.005 is 6 of 1,222 training images, fewer than one for each of 10 classes; "
        "use 0.0082 or more"
    )
    check_ladder(load_spec("exp.yaml", ["tier1.data_fractions.0=0.0082"]), 1222, 10)


def test_a_rung_without_a_rare_class_is_refused_with_a_fraction_that_has_it(here: Path) -> None:
    labels = np.repeat([0, 1, 2], [900, 95, 5])

    def counts(spec: Spec) -> list[Any]:
        order = nested_order(labels, seed=spec.seed)
        sizes = [round(fraction * 1000) for fraction in spec.tier1.data_fractions]
        return [np.bincount(labels[order[:size]], minlength=3) for size in sizes]

    Path("exp.yaml").write_text(GOOD.replace("[0.1, 0.3, 1.0]", "[0.01, 0.02, 1.0]"))
    spec = load_spec("exp.yaml")
    check_ladder(spec, 1000, 3)
    with pytest.raises(SpecError) as caught:
        check_ladder(spec, 1000, 3, counts(spec))
    first, second = caught.value.problems
    assert (first.path, first.line) == ("tier1.data_fractions.0", 20)
    assert second.path == "tier1.data_fractions.1"
    assert first.message == (
        "a fraction of 0.01 is 10 of 1,000 training images and none of class 2, of which the "
        "highest rung has 5; use 0.2 or more"
    )
    good = load_spec("exp.yaml", ["tier1.data_fractions=[0.2, 0.5, 1.0]"])
    check_ladder(good, 1000, 3, counts(good))
    with pytest.raises(SpecError, match=r"none of class 1, .* has 0; the data need more of"):
        check_ladder(good, 1000, 2, [[200, 0], [500, 0], [1000, 0]])


def test_importing_a_users_module_that_breaks_is_a_message(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(here)
    Path("broken_llp_user.py").write_text("def build(:\n")
    Path("works_llp_user.py").write_text(
        "constant = 3\ndef build(*, channels, image_size, num_classes, hidden=8): ...\n"
    )
    Path("exp.yaml").write_text(edited(5, "  name: broken_llp_user:build"))
    assert "cannot load 'broken_llp_user:build': SyntaxError" in problems_of("exp.yaml")[0].message
    Path("exp.yaml").write_text(edited(5, "  name: works_llp_user:constant"))
    assert "is 3 and cannot be called" in problems_of("exp.yaml")[0].message
    text = edited(5, "  name: works_llp_user:build").replace("dropout: 0.1", "hidden: 4")
    Path("exp.yaml").write_text(text.replace("width:", "hidden:"))
    assert load_spec("exp.yaml").model.options == {"hidden": 4}
    Path("exp.yaml").write_text(text)
    (problem,) = problems_of("exp.yaml")
    assert problem.message.startswith("nothing reads 'width': it is an option of model")
    assert "image_size" not in problem.message


def test_loading_shipped_names_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from llp.spec import load_spec; load_spec('digits'); load_spec('cifar10');"
        "sys.exit(bool({'torch', 'ray', 'mlflow', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0


SCALARS = (
    *("", "~", "true", "-1", "0", "1e999", ".nan", "x", "sgd", "[]", "{}", "[1, x]", "[[1]]"),
    *("{type: uniform}", "{type: choice, values: [1, true, x]}", "{name: {}}", "'1e-3'"),
    "99999999999999999999",
)
scalars = st.sampled_from(SCALARS)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_any_value_anywhere_gives_a_spec_or_a_spec_error(data: st.DataObject) -> None:
    lines = GOOD.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        k = data.draw(st.integers(0, len(lines) - 1))
        head, colon, rest = lines[k].partition(": ")
        kind = data.draw(st.sampled_from(["value", "inner", "cut", "drop", "letter"]))
        if kind == "value" and colon:
            lines[k] = head + colon + data.draw(scalars)
        elif kind == "inner" and ": " in rest:
            key, _, _ = rest.rpartition(": ")
            lines[k] = f"{head}: {key}: {data.draw(scalars)}" + "}"
        elif kind == "cut":
            lines[k] = lines[k][: data.draw(st.integers(0, len(lines[k])))]
        elif kind == "drop":
            lines[k] = ""
        elif lines[k]:
            at = data.draw(st.integers(0, len(lines[k]) - 1))
            lines[k] = (
                lines[k][:at]
                + data.draw(st.sampled_from("aZ0-:,[]{}#&*!|>'\"%@` "))
                + lines[k][at:]
            )
    parsed, _, found = parse("\n".join(lines), "exp.yaml")
    if found or not isinstance(parsed, dict):
        assert all(problem.line for problem in found)
        return
    messages = []
    try:
        spec = load_spec(parsed)
        RandomSearch(spec.search_space, spec.constraints, 0).suggest(0)
    except SpecError as error:
        messages = [problem.message for problem in error.problems]
        event("refused")
    assert all(message and "Value error" not in message for message in messages)
