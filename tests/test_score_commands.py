from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from llp.cli import app
from llp.scoring import Roles, calibrate, score
from tests.scoring_tables import simulate

ROLES = """
hyperparameters: [learning_rate, weight_decay, optimizer]
tier1: {validation_accuracy: higher, validation_loss: lower}
tier2: {metric0: unknown, metric1: lower}
study: data
target: result
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def files(tmp_path):
    table = simulate(0, rows=40, finished=15, hyper=1.0)
    table = table.rename(columns={"verified_accuracy": "result"}).assign(data="a")
    table.to_parquet(tmp_path / "table.parquet")
    past = simulate(1, rows=50, finished=50, hyper=1.0)
    past = past.rename(columns={"verified_accuracy": "result"}).assign(data="b")
    past.to_parquet(tmp_path / "past.parquet")
    more = simulate(2, rows=30, finished=30, hyper=1.0)
    more = more.rename(columns={"verified_accuracy": "result"}).assign(data="c")
    more.to_csv(tmp_path / "more.csv", index=False)
    (tmp_path / "roles.yaml").write_text(ROLES)
    return tmp_path


def test_score_writes_the_rows_index_and_what_the_function_returns(files):
    out = files / "new" / "scores.parquet"
    done = run("score", files / "table.parquet", "--roles", files / "roles.yaml", "--out", out)
    assert done.exit_code == 0, done.output
    written, table = pd.read_parquet(out), pd.read_parquet(files / "table.parquet")
    assert list(written.index) == list(table.index)
    assert list(written.columns[:4]) == ["score", "lower", "upper", "probability_best"]
    contributions = written.iloc[:, 4:].sum(axis=1)
    assert contributions.to_numpy() == pytest.approx(written["score"].to_numpy())
    roles = Roles(
        hyperparameters=("learning_rate", "weight_decay", "optimizer"),
        tier1={"validation_accuracy": "higher", "validation_loss": "lower"},
        tier2={"metric0": "unknown", "metric1": "lower"},
        study="data",
        target="result",
    )
    expected = score(table, roles=roles).table["score"]
    assert written["score"].to_dict() == pytest.approx(expected.to_dict())
    assert "15 finished trials of 1 study" in done.output
    assert "Verify" in done.output


def test_history_is_read_from_any_number_of_tables(files):
    command = ["score", files / "table.parquet", "--roles", files / "roles.yaml", "--json"]
    several = run(*command, "--history", files / "past.parquet", files / "more.csv")
    repeated = run(*command, "--history", files / "past.parquet", "--history", files / "more.csv")
    assert several.exit_code == 0, several.output
    assert several.stdout == repeated.stdout
    last = json.loads(several.stdout.splitlines()[-1])
    assert "95 finished trials of 3 studies" in last["sentence"]
    alone = run(*command)
    assert alone.stdout != several.stdout


def test_a_table_that_is_given_again_counts_once(files):
    pd.read_parquet(files / "table.parquet").to_csv(files / "again.csv", index=False)
    roles = ("--roles", files / "roles.yaml", "--json")
    alone = run("score", files / "table.parquet", *roles).stdout.splitlines()
    history = ("--history", files / "again.csv")
    again = run("score", files / "table.parquet", *roles, *history).stdout.splitlines()
    assert again[:-1] == alone[:-1]
    said = " 40 rows are in an earlier table already and count once."
    assert said in json.loads(again[-1])["sentence"]
    assert said not in json.loads(alone[-1])["sentence"]
    pair = (files / "table.parquet", files / "past.parquet")
    once = json.loads(run("calibrate", *pair, *roles).stdout)
    twice = json.loads(run("calibrate", *pair, files / "again.csv", *roles).stdout)
    assert twice["weights"] == once["weights"]
    assert twice["num_finished"] == once["num_finished"]
    assert "40 rows are in an earlier table" in twice["sentence"]


def test_repeated_index_labels_and_csv_keep_their_rows(files):
    table = pd.read_parquet(files / "table.parquet")
    table.index = [0] * len(table)
    table.to_parquet(files / "same.parquet")
    out = files / "scores.csv"
    done = run("score", files / "same.parquet", "--roles", files / "roles.yaml", "--out", out)
    assert done.exit_code == 0, done.output
    numbered = files / "scores.parquet"
    run("score", files / "table.parquet", "--roles", files / "roles.yaml", "--out", numbered)
    assert pd.read_csv(out)["score"].to_numpy() == pytest.approx(
        pd.read_parquet(numbered)["score"].to_numpy()
    )


def test_too_few_finished_trials_are_an_answer(files):
    table = pd.read_parquet(files / "table.parquet")
    table["result"] = table["result"].where(np.arange(len(table)) < 3)
    table.to_parquet(files / "few.parquet")
    for command in ("score", "calibrate"):
        done = run(command, files / "few.parquet", "--roles", files / "roles.yaml")
        assert done.exit_code == 0, done.output
        assert "Not enough evidence" in done.output
    assert "+1.000 (given, not estimated)" in done.output
    assert "±" not in done.output
    plain = [files / "few.parquet", "--roles", files / "roles.yaml", "--json"]
    learnt = json.loads(run("calibrate", *plain).stdout.splitlines()[-1])
    ranked = json.loads(run("score", *plain).stdout.splitlines()[-1])
    assert learnt["weights"] == ranked["weights"] == {"validation_accuracy": 1.0}
    assert learnt["standard_errors"] == {"validation_accuracy": None}
    assert learnt["in_force"] == ranked["preset"] == "validation"


def test_calibrate_prints_and_writes_its_evidence(files):
    out = files / "calibration.json"
    tables = [files / "table.parquet", files / "past.parquet"]
    done = run("calibrate", *tables, "--roles", files / "roles.yaml", "--out", out)
    assert done.exit_code == 0, done.output
    for words in ("±", "regret@1", "regret@5", "T1+h+shuffled T2", "gain in tau over validation"):
        assert words in done.output
    assert "effective number of studies: 1.6" in done.output  # 65^2 / (15^2 + 50^2)
    stored = json.loads(out.read_text())
    roles = Roles.from_mapping(
        {
            "hyperparameters": ["learning_rate", "weight_decay", "optimizer"],
            "tier1": {"validation_accuracy": "higher", "validation_loss": "lower"},
            "tier2": {"metric0": "unknown", "metric1": "lower"},
            "study": "data",
            "target": "result",
        }
    )
    expected = calibrate([pd.read_parquet(path) for path in tables], roles=roles)
    assert stored["weights"] == pytest.approx(expected.weights)
    assert stored["version"] == 2
    assert stored["rankings"][0]["name"] == "validation"
    assert stored["sentence"] == expected.sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("metric1: lower", "metric1: down"), "roles.yaml:4"),
        (("metric1: lower", "metrik1: lower"), "metric1"),
        (("study: data", "studi: data"), "study"),
        (("target: result", "target: resullt"), "result"),
        (("metric1: lower", "metrik1: lower"), "table.parquet: unknown column"),
        (("metric1: lower", "result: lower"), "roles.yaml:6:"),
        (("metric1: lower", "optimizer: lower"), "hyperparameters and tier2"),
    ],
)
def test_wrong_roles_end_with_2_and_name_the_place_or_the_nearest(files, change, words):
    (files / "roles.yaml").write_text(ROLES.replace(*change))
    done = run("score", files / "table.parquet", "--roles", files / "roles.yaml")
    assert done.exit_code == 2
    assert words in done.output


def test_a_file_that_is_no_table_ends_with_2(files):
    (files / "broken.parquet").write_text("no table")
    done = run("score", files / "broken.parquet", "--roles", files / "roles.yaml")
    assert done.exit_code == 2
    assert "broken.parquet" in done.output


def test_two_tables_without_history_are_refused(files):
    tables = [files / "table.parquet", files / "past.parquet"]
    done = run("score", *tables, "--roles", files / "roles.yaml")
    assert done.exit_code == 2
    assert "--history" in done.output


def test_calibrate_names_the_nearest_study(tmp_path):
    done = run("calibrate", "nothing-here", "--root", tmp_path)
    assert done.exit_code == 4
    assert "nothing-here" in done.output


def test_a_column_that_only_the_history_lacks_is_named_with_its_file(files):
    past = pd.read_parquet(files / "past.parquet").drop(columns="result")
    past.to_parquet(files / "past.parquet")
    tables = (files / "table.parquet", "--roles", files / "roles.yaml")
    for done in (
        run("score", *tables, "--history", files / "past.parquet"),
        run("calibrate", *tables, files / "past.parquet"),
    ):
        assert done.exit_code == 2
        assert "past.parquet: unknown column 'result'" in " ".join(done.output.split())


def test_calibrate_takes_a_table_without_a_hyperparameter(files):
    past = pd.read_parquet(files / "past.parquet").drop(columns="weight_decay")
    past.to_parquet(files / "past.parquet")
    done = run(
        "calibrate",
        files / "table.parquet",
        files / "past.parquet",
        "--roles",
        files / "roles.yaml",
    )
    assert done.exit_code == 0, done.output
    assert "65 finished trials" in done.output


def test_a_table_without_rows_is_an_answer(files):
    out = files / "scores.csv"
    pd.read_parquet(files / "table.parquet").iloc[:0].to_csv(files / "none.csv", index=False)
    for more in ((), ("--json",), ("--out", out)):
        done = run("score", files / "none.csv", "--roles", files / "roles.yaml", *more)
        assert done.exit_code == 0, done.output
        assert "There are no trials to score." in done.output
        assert "Verify" not in done.output
    assert len(pd.read_csv(out)) == 0
    (files / "none.csv").write_text("learning_rate\n")
    done = run("score", files / "none.csv", "--roles", files / "roles.yaml")
    assert done.exit_code == 2
    assert "none.csv" in done.output


def test_nothing_usable_gives_nothing_to_verify(files):
    table = pd.read_parquet(files / "table.parquet")
    table[["validation_accuracy", "validation_loss"]] = np.nan
    table.to_parquet(files / "table.parquet")
    done = run("score", files / "table.parquet", "--roles", files / "roles.yaml")
    assert done.exit_code == 0, done.output
    assert "No trial has a usable validation result (validation_accuracy is" in done.output
    assert "rank last" not in done.output
    assert "Verify" not in done.output
    table = table.drop(columns="result").assign(result=np.nan)
    table.to_parquet(files / "table.parquet")
    done = run("score", files / "table.parquet", "--roles", files / "roles.yaml")
    assert "so their order means nothing, and none is proposed" in done.output


def test_text_among_the_numbers_is_named_with_file_column_row_and_value(files):
    table = pd.read_parquet(files / "table.parquet").reset_index(drop=True)
    table["validation_accuracy"] = table["validation_accuracy"].astype(object)
    table.loc[4, "validation_accuracy"] = "diverged"
    table.to_csv(files / "text.csv", index=False)
    done = run("score", files / "text.csv", "--roles", files / "roles.yaml")
    assert done.exit_code == 2
    for named in ("text.csv", "'validation_accuracy'", "'diverged'", "row 5,", "leave it empty"):
        assert named in done.output


@pytest.mark.parametrize("command", ["score", "calibrate"])
@pytest.mark.parametrize("out", ["folder", "roles.yaml/scores.csv"])
def test_out_that_cannot_be_written_ends_with_2_before_any_work(files, command, out, monkeypatch):
    (files / "folder").mkdir()

    def never(*_, **__):
        raise AssertionError("computed first")

    monkeypatch.setattr(f"llp.scoring.{command}", never)
    done = run(
        command, files / "table.parquet", "--roles", files / "roles.yaml", "--out", files / out
    )
    assert done.exit_code == 2, done.output
    assert "cannot be written" in " ".join(done.output.split())


def test_an_ending_that_is_no_table_is_refused_with_the_nearest(files):
    roles, table = files / "roles.yaml", files / "table.parquet"
    done = run("score", table, "--roles", roles, "--out", files / "scores.parket")
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert "unknown ending '.parket'; did you mean '.parquet'?" in said
    assert not (files / "scores.parket").exists()
    done = run("score", table, "--roles", roles, "--out", files / "scores.txt")
    assert done.exit_code == 2
    assert ".csv" in done.output
    assert ".parquet" in done.output
