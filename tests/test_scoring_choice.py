from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kendalltau, ttest_ind, ttest_rel

from llp.errors import NoTrialSucceeded
from llp.records import ScoreReport, from_plain, to_plain
from llp.scoring import (
    ablation,
    choose_for_measurement,
    choose_for_verification,
    choose_winner,
    score,
    score_report,
    study_table,
)
from llp.scoring.ablation import noise_ceiling
from llp.scoring.choose import difference_error
from tests.scoring_tables import profile, result, simulate, verification

TRIALS = [
    result("t000", [0.5, 0.95]),
    result("t001", [0.5, 0.7], [0.6, 0.7]),
    result("t002", [0.5, 0.9], [0.1], outcome="diverged"),
    result("t003", [0.5, 0.7], [0.5, 0.8]),
    result("t004", [0.5, 0.99], checkpoint=False),
]


def test_measured_are_those_that_got_furthest_then_the_most_accurate():
    assert choose_for_measurement(TRIALS, 2) == ["t003", "t001"]
    assert choose_for_measurement(TRIALS, 10) == ["t003", "t001", "t000"]
    assert choose_for_measurement(TRIALS, 0) == []


def test_verified_are_the_best_scored_without_the_diverged():
    scores = score(study_table(TRIALS))
    assert choose_for_verification(scores, 2) == ["t003", "t001"]
    assert choose_for_verification(scores, 10) == ["t003", "t001", "t004", "t000"]


def test_winner_is_chosen_on_validation_not_on_test():
    runs = [verification("t000", 0, 0.80, test=0.99), verification("t001", 0, 0.81, test=0.50)]
    winner, reason = choose_winner(runs)
    assert winner == "t001"
    assert "1.00 points ahead of t000; too few seeds" in reason


def test_winner_on_equal_accuracy_has_the_lower_loss_and_says_so():
    runs = [verification("t000", 0, 0.8, loss=0.5), verification("t001", 0, 0.8, loss=0.4)]
    winner, reason = choose_winner(runs)
    assert winner == "t001"
    assert "level with t000" in reason


def test_separation_is_claimed_only_when_the_paired_test_agrees():
    a, b = [0.90, 0.91, 0.92], [0.80, 0.812, 0.82]
    runs = [verification("t000", s, v) for s, v in enumerate(a)]
    runs += [verification("t001", s, v) for s, v in enumerate(b)]
    assert ttest_rel(a, b).pvalue < 0.05
    assert "they are separated" in choose_winner(runs)[1]
    close = [verification("t001", s, v) for s, v in enumerate([0.92, 0.89, 0.90])]
    reason = choose_winner(runs[:3] + close)[1]
    assert "not separated" in reason
    assert "paired over seeds" in reason


def test_difference_error_is_scipys_paired_and_welch():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(size=5)
    paired = ttest_rel(a, b)
    error, degrees, _ = difference_error(dict(enumerate(a)), dict(enumerate(b)))
    assert (a.mean() - b.mean()) / error == pytest.approx(paired.statistic)
    assert degrees == paired.df
    welch = ttest_ind(a, b[:3], equal_var=False)
    error, degrees, _ = difference_error(dict(enumerate(a)), dict(enumerate(b[:3])))
    assert (a.mean() - b[:3].mean()) / error == pytest.approx(welch.statistic)
    assert degrees == pytest.approx(welch.df)


def test_winner_needs_a_usable_verification():
    with pytest.raises(NoTrialSucceeded):
        choose_winner([verification("t000", 0, math.nan)])
    winner, reason = choose_winner([verification("t000", 0, 0.5), verification("t1", 0, math.nan)])
    assert winner == "t000"
    assert "no other trial was verified" in reason


def test_ablation_is_empty_with_a_reason_under_3_verified_trials():
    table = study_table(TRIALS, (), [verification("t001", 0, 0.8), verification("t003", 0, 0.9)])
    rows, sentence = ablation(table)
    assert rows == ()
    assert "Not enough evidence: 2 verified trials" in sentence


def test_ablation_judges_each_ranking_on_the_verified_trials():
    tests = {"t000": 0.7, "t001": 0.9, "t003": 0.8}
    runs = [verification(n, s, v, test=v + 0.001 * s) for n, v in tests.items() for s in (0, 1)]
    profiles = [profile(n, noise_sharpness=v) for n, v in zip(tests, [9.0, 0.1, 5.0], strict=True)]
    table = study_table(TRIALS, profiles, runs, num_validation=100)
    rows, sentence = ablation(table, runs)
    by_name = {row.name: row for row in rows}
    # By level and accuracy: t003, t001, t000; by llp: t001 (0.69), t003 (0.3), t000.
    assert by_name["validation_accuracy"].tau == pytest.approx(1 / 3)
    assert by_name["validation_accuracy"].regret_at_1 == pytest.approx(10.0)
    assert by_name["llp"].tau == pytest.approx(1.0)
    assert by_name["llp"].regret_at_1 == 0.0
    assert by_name["noise ceiling"].tau == pytest.approx(1.0)
    assert by_name["noise ceiling"].samples_seen == 15000
    # Five probes of 1,000 samples in 10 s; three profiles of 2 s at that rate are 600 samples.
    assert by_name["T1"].samples_seen == 5000
    assert by_name["llp"].samples_seen == 5600
    assert "Not enough evidence: 3 verified trials" in sentence
    assert "T1+h" not in by_name


def test_ablation_with_many_finished_trials_has_every_row_and_a_verdict():
    rows, sentence = ablation(simulate(0, rows=60, finished=40, planted=1.0))
    names = [row.name for row in rows]
    assert names == [
        "validation_accuracy",
        "validation_loss",
        "T1",
        "T1+h",
        "T1+T2",
        "T1+h+T2",
        "T1+h+shuffled T2",
    ]
    by_name = {row.name: row for row in rows}
    assert by_name["T1+T2"].tau > by_name["T1"].tau + 0.1
    assert by_name["T1+h+shuffled T2"].tau < by_name["T1+h+T2"].tau
    assert all(row.interval.low <= row.tau <= row.interval.high for row in rows)
    assert sentence.startswith("Did flatness help here? Yes")
    gain = score(simulate(0, rows=60, finished=40, planted=1.0)).calibration.gain_tier2
    assert f"{gain.value:+.3f} in cross-validated tau" in sentence
    verdict = ablation(simulate(0, rows=60, finished=40))[1]
    assert verdict.startswith(("Did flatness help here? No", "Did flatness help here? Not enough"))


def test_tau_of_the_ablation_is_scipys():
    table = simulate(0, finished=10)
    rows, _ = ablation(table)
    done = table[table["test_accuracy"].notna()]
    expected = kendalltau(done["validation_accuracy"], done["test_accuracy"]).statistic
    assert rows[0].tau == pytest.approx(expected)


def test_noise_ceiling_is_the_tau_between_two_seeds():
    rng = np.random.default_rng(0)
    accuracy = rng.uniform(0.5, 0.9, (8, 2))
    runs = [verification(f"t{i}", s, 0.5, test=accuracy[i, s]) for i in range(8) for s in (0, 1)]
    assert noise_ceiling(runs).tau == pytest.approx(kendalltau(*accuracy.T).statistic)
    assert noise_ceiling(runs[::2]) is None


def test_score_report_survives_its_json_form_and_is_best_first():
    runs = [verification(n, s, 0.8) for n in ("t001", "t003") for s in (0, 1)]
    profiles = [profile("t001", noise_sharpness=0.3), profile("t003", noise_sharpness=0.2)]
    report = score_report(TRIALS, profiles, runs, num_validation=300)
    assert from_plain(ScoreReport, to_plain(report)) == report
    assert [s.trial_id for s in report.scores] == ["t003", "t001", "t004", "t000", "t002"]
    assert report.preset == "validation"
    assert "4 finished" not in report.sentence
    assert "2 finished trials, 12 are needed" in report.sentence
    assert "Did flatness help here? Not enough evidence: 2 verified" in report.sentence
    for entry in report.scores:
        assert sum(entry.contributions.values()) == pytest.approx(entry.value)
