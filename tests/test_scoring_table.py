from __future__ import annotations

import math

import pandas as pd
import pytest

from llp.errors import SpecError
from llp.records import Rung, TrialResult
from llp.scoring import Roles, study_table
from llp.scoring.roles import family
from tests.scoring_tables import curve, profile, result, verification


def test_row_holds_signals_at_the_end_of_the_highest_finished_rung():
    table = study_table([result("t000", [0.1, 0.2], [0.3, 0.5, 0.6, 0.8])], num_validation=50)
    row = table.loc["t000"]
    assert (row["rung"], row["level"]) == (2, 2.0)
    assert row["validation_accuracy"] == 0.8
    assert row["validation_loss"] == pytest.approx(0.2)
    assert row["validation_accuracy_last3"] == pytest.approx((0.5 + 0.6 + 0.8) / 3)
    assert row["num_validation"] == 50
    assert math.isnan(row["verified_accuracy"])
    assert math.isnan(row["test_accuracy"])


def test_stopped_trial_keeps_the_signals_of_the_rung_it_finished_and_ranks_between_rungs():
    trials = [
        result("t000", [0.5, 0.6]),
        result("t001", [0.5, 0.7], [0.1], outcome="stopped"),
        result("t002", [0.5, 0.7], [0.1, 0.2]),
        result("t003", [0.4], outcome="stopped", checkpoint=False),
    ]
    table = study_table(trials)
    assert table["level"].tolist() == [1.0, 1.5, 2.0, 0.5]
    assert table["validation_accuracy"].tolist() == [0.6, 0.7, 0.2, 0.4]


def test_diverged_trial_has_no_signals_even_after_a_good_lower_rung():
    table = study_table([result("t000", [0.9, 0.95], [0.1], outcome="diverged")])
    assert table["validation_accuracy"].isna().all()
    assert table["validation_accuracy_last3"].isna().all()


def test_failure_on_the_next_rung_keeps_the_finished_one():
    whole = result("t001", [0.5, 0.7], outcome="failed")
    cut = result("t002", [0.5], outcome="failed", checkpoint=False)
    rungs = [Rung(1, 0.1, 100, 2), Rung(2, 1.0, 1000, 15)]
    table = study_table([result("t000", [0.5, 0.6]), whole, cut], rungs=rungs)
    assert table.loc["t001", ["level", "validation_accuracy"]].tolist() == [1.0, 0.7]
    assert math.isnan(table.loc["t002", "validation_accuracy"])


def test_only_trial_on_a_rung_does_not_make_its_partial_curve_a_finished_one():
    rungs = [Rung(1, 0.1, 100, 2), Rung(2, 1.0, 1000, 15)]
    for outcome in ("failed", "out_of_memory", "stopped"):
        broken = result("t000", [0.5, 0.6], [0.9, 0.99], outcome=outcome)
        for known in (rungs, ()):
            row = study_table([broken, result("t001", [0.5, 0.7])], rungs=known).loc["t000"]
            assert row["rung"] == 1
            assert row["validation_accuracy"] == 0.6


def test_partial_curve_of_an_interrupted_job_is_not_finished():
    rungs = [Rung(1, 0.1, 100, 2), Rung(2, 1.0, 1000, 3)]
    going, done = result("t000", [0.5, 0.6], [0.9]), result("t001", [0.5, 0.6], [0.7, 0.8, 0.9])
    table = study_table([going, done], rungs=rungs)
    assert table["level"].tolist() == [1.0, 2.0]
    assert table["validation_accuracy"].tolist() == [0.6, 0.9]


def test_failure_before_the_first_report_on_a_rung_keeps_the_rung_below():
    table = study_table([result("t000", [0.5, 0.7], [], outcome="failed")])
    assert table.loc["t000", ["level", "validation_accuracy"]].tolist() == [1.0, 0.7]


def test_target_is_verified_validation_accuracy_never_test_accuracy(tmp_path):
    runs = [verification("t000", 0, 0.7, test=0.1), verification("t000", 1, math.nan, test=0.2)]
    table = study_table([result("t000", [0.5])], (), runs)
    table.to_parquet(tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    assert back[Roles.from_table(back).target].tolist() == [0.7]
    back.attrs.clear()
    assert back[Roles.from_table(back).target].tolist() == [0.7]
    roles = Roles.from_table(back.drop(columns="verified_accuracy"))
    assert roles.target is None
    assert "test_accuracy" not in roles.hyperparameters
    assert back["num_seeds"].tolist() == [1]


def test_target_is_the_mean_over_seeds_and_metrics_keep_their_errors():
    table = study_table(
        [result("t000", [0.5]), result("t001", [0.6])],
        [profile("t001", noise_sharpness=0.3, se=0.02)],
        [verification("t001", 0, 0.7, 0.70), verification("t001", 1, 0.8, 0.74)],
    )
    row = table.loc["t001"]
    assert row["verified_accuracy"] == pytest.approx(0.75)
    assert row["test_accuracy"] == pytest.approx(0.72)
    assert row["num_seeds"] == 2
    assert (row["noise_sharpness"], row["noise_sharpness_se"]) == (0.3, 0.02)
    assert math.isnan(table.loc["t000", "noise_sharpness"])
    assert Roles.from_table(table).tier2 == {"noise_sharpness": "lower"}


def test_hyperparameter_with_the_name_of_a_signal_does_not_overwrite_it():
    trial = result("t000", [0.5], **{"level": 3, "learning_rate": 0.2})
    table = study_table([trial])
    assert table["level"].tolist() == [1.0]
    assert table["hyperparameter.level"].tolist() == [3]
    assert Roles.from_table(table).hyperparameters == ("hyperparameter.level", "learning_rate")


def test_trial_that_never_reported_and_empty_study_give_rows_without_signals():
    silent = TrialResult(result("t000").trial, (curve("t000", 1, []),), "failed")
    assert study_table([silent])["validation_accuracy"].isna().all()
    assert len(study_table([])) == 0


def test_roles_survive_parquet(tmp_path):
    table = study_table([result("t000", [0.5]), result("t001", [0.6])])
    table.to_parquet(tmp_path / "t.parquet")
    assert Roles.from_table(pd.read_parquet(tmp_path / "t.parquet")) == Roles.from_table(table)


def test_roles_by_name_when_a_table_brings_none():
    table = pd.DataFrame(
        {"lr": [1.0], "validation_accuracy": [0.5], "trace": [1.0], "trace_se": [0.1]}
    )
    roles = Roles.from_table(table)
    assert roles.hyperparameters == ("lr",)
    assert roles.tier1 == {"validation_accuracy": "higher"}
    assert roles.tier2 == {"trace": "unknown"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tier_1": {}}, "did you mean 'tier1'"),
        ({"tier1": {"val": "hihger"}}, "did you mean 'higher'"),
        ({"tier1": {"val": "unknown"}}, "choose one of: higher, lower"),
    ],
)
def test_wrong_roles_are_named_with_the_nearest_valid_one(data, message):
    with pytest.raises(SpecError, match=message):
        Roles.from_mapping(data)


def test_roles_name_a_missing_column_with_the_nearest():
    with pytest.raises(SpecError, match="did you mean 'val_acc'"):
        Roles(tier1={"val_ac": "higher"}).check(pd.DataFrame({"val_acc": [1.0]}))


def test_family_is_told_from_the_name():
    names = ["validation_accuracy", "val_loss", "validation_accuracy_last3", "train_loss", "err"]
    assert [family(n) for n in names] == ["metric", "loss", "recent", "train_loss", "metric"]
