from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kendalltau, ttest_ind, ttest_rel
from scipy.stats import t as student

from llp.errors import NoTrialSucceeded
from llp.records import Rung, ScoreReport, from_plain, to_plain
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


def test_curve_that_broke_off_is_not_measured_as_finished():
    rungs = [Rung(1, 0.1, 100, 2), Rung(2, 1.0, 1000, 15)]
    trials = [
        result("t000", [0.5, 0.6], [0.9, 0.99], outcome="failed"),
        result("t001", [0.5, 0.7]),
    ]
    for known in (rungs, ()):
        assert choose_for_measurement(trials, 2, rungs=known) == ["t001", "t000"]
        scores = score_report(trials, rungs=known, num_validation=100).scores
        assert [entry.trial_id for entry in scores] == ["t001", "t000"]


def test_verified_are_the_best_scored_without_the_diverged():
    scores = score(study_table(TRIALS))
    assert choose_for_verification(scores, 2) == ["t003", "t001"]
    assert choose_for_verification(scores, 10) == ["t003", "t001", "t004", "t000"]


def test_verified_are_the_fewest_that_hold_the_best_with_the_wanted_probability():
    scores = score(simulate(0, rows=20, finished=0))
    chances = scores.table["probability_best"]
    for wanted in (0.5, 0.8):
        chosen = choose_for_verification(scores, 20, probability=wanted)
        assert chances[chosen].sum() >= wanted
        assert chances.nlargest(len(chosen) - 1).sum() < wanted
        assert chosen == [name for name in scores.ranking if name in chosen]
    assert len(choose_for_verification(scores, 2, probability=0.99)) == 2


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


def runs_of(**accuracies):
    """Verifications of trials from their accuracies per seed; None for a training that was lost."""
    return [
        verification(name, seed, value)
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
        if value is not None
    ]


@pytest.mark.parametrize("num_seeds", [None, 3])
def test_trial_with_missing_seeds_does_not_beat_one_with_all(num_seeds):
    runs = runs_of(t1=[None, 0.97, None], t2=[0.95, 0.96, 0.955])
    winner, reason = choose_winner(runs, num_seeds=num_seeds, num_validation=5000)
    assert winner == "t2"
    assert "t1 finished only 1 of 3" in reason
    assert "no other trial finished as many seeds" in reason
    assert "-" not in reason


def test_runner_up_is_the_best_of_those_with_as_many_seeds():
    runs = runs_of(t1=[0.99, None, 0.99], t2=[0.95, 0.96, 0.955], t3=[0.90, 0.91, 0.90])
    reason = choose_winner(runs, num_validation=5000)[1]
    assert "5.17 points ahead of t3" in reason
    assert "t1 finished only 2 of 3" in reason


def test_diverged_full_trainings_count_as_missing():
    runs = [*runs_of(t1=[0.97, math.nan], t2=[0.95, 0.96]), verification("t3", 0, math.nan)]
    winner, reason = choose_winner(runs)
    assert winner == "t2"
    assert reason.endswith("t1 finished only 1 of 2; t3 finished only 0 of 2.")


def test_winner_that_itself_lacks_seeds_is_said_to():
    winner, reason = choose_winner(runs_of(t1=[0.9, 0.9], t2=[0.99]), num_seeds=3)
    assert winner == "t1"
    assert "t1 finished only 2 of 3" in reason


def test_one_image_more_with_every_seed_is_not_separated():
    right = [205, 206, 207]
    runs = runs_of(t1=[(n + 1) / 216 for n in right], t2=[n / 216 for n in right])
    for num_validation in (216, None):
        reason = choose_winner(runs, num_validation=num_validation)[1]
        assert "0.46 points ahead" in reason
        assert "not separated" in reason
        assert "standard error 0.00" not in reason


def test_perfect_accuracies_still_have_an_error():
    error, _, _ = difference_error({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, 100)
    assert 0 < error < 0.02


def test_large_margin_is_separated_with_validation_sampling_counted():
    runs = runs_of(t1=[0.95, 0.96, 0.955], t2=[0.80, 0.812, 0.82])
    reason = choose_winner(runs, num_validation=216)[1]
    assert "they are separated at the 95 % level." in reason
    assert "paired over seeds and over 216 validation images" in reason


def simulated_accuracies(rng, num, num_images, num_seeds=3):
    """Accuracies [num, 2, num_seeds] of two configurations that are equally good, images shared.

    Every image has its own difficulty, for both the same; each training adds luck of its own.
    """
    logit = rng.normal(8.0, 6.0, (num, 1, 1, num_images))
    own = rng.normal(0, 4.0, (num, 2, 1, num_images))
    luck = rng.normal(0, 0.2, (num, 2, num_seeds, 1))
    right = 1 / (1 + np.exp(-(logit + own + luck)))
    return (rng.random(right.shape) < right).mean(axis=-1)


def claims(accuracies, num_validation):
    """Share of pairs that are called separated."""
    found = 0
    for a, b in accuracies:
        error, degrees, _ = difference_error(dict(enumerate(a)), dict(enumerate(b)), num_validation)
        found += error > 0 and abs(a.mean() - b.mean()) > student.ppf(0.975, degrees) * error
    return found / len(accuracies)


def test_equally_good_configurations_are_called_separated_in_under_5_percent_of_studies():
    accuracies = simulated_accuracies(np.random.default_rng(0), 1000, 216)
    assert claims(accuracies, 216) < 0.05
    assert claims(accuracies, None) > 0.10


def test_error_with_images_is_near_that_of_fresh_images_and_never_far_above():
    accuracies = simulated_accuracies(np.random.default_rng(1), 1000, 216)
    true = (accuracies[:, 0].mean(axis=1) - accuracies[:, 1].mean(axis=1)).std()
    errors = [
        difference_error(dict(enumerate(a)), dict(enumerate(b)), 216)[0] for a, b in accuracies
    ]
    assert true < np.mean(errors) < 2.5 * true


def test_degrees_of_freedom_follow_whichever_part_decides():
    a, b = {0: 0.90, 1: 0.91, 2: 0.92}, {0: 0.80, 1: 0.83, 2: 0.80}
    assert difference_error(a, b, 10**9)[1] == pytest.approx(2, rel=0.01)
    assert difference_error(a, b, 50)[1] > 50


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


def test_test_accuracy_changes_no_score_and_no_weight_but_judges_the_ablation():
    trials = [result(f"t{i:02d}", [0.5, 0.5 + 0.01 * i], x=float(i % 5)) for i in range(16)]
    names = [trial.trial.trial_id for trial in trials]
    rng = np.random.default_rng(0)
    validation = 0.6 + 0.01 * np.arange(16) + 0.02 * rng.normal(size=16)

    def report(tests):
        runs = [
            verification(name, 0, v, test=t)
            for name, v, t in zip(names, validation, tests, strict=True)
        ]
        return score_report(trials, (), runs, num_validation=200)

    upright, upside_down = report(validation), report(1 - validation)
    assert upright.preset == "calibrated"
    assert upright.scores == upside_down.scores
    assert upright.weights == upside_down.weights
    assert upright.sentence == upside_down.sentence
    assert "judges by test accuracy, which chooses nothing" in upright.sentence
    for one, other in zip(upright.ablation, upside_down.ablation, strict=True):
        assert one.tau == pytest.approx(-other.tau)


def test_ablation_is_judged_by_the_target_where_no_test_accuracy_is_known():
    runs = [verification(n, 0, v, test=math.nan) for n, v in [("t000", 0.7), ("t001", 0.9)]]
    runs.append(verification("t003", 0, 0.8, test=math.nan))
    rows, sentence = ablation(study_table(TRIALS, (), runs), runs)
    assert rows[0].tau == pytest.approx(1 / 3)
    assert "test accuracy" not in sentence


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
    done = table[table["verified_accuracy"].notna()]
    expected = kendalltau(done["validation_accuracy"], done["verified_accuracy"]).statistic
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
