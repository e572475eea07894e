from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from llp.errors import SpecError
from llp.records import to_plain
from llp.scoring import Roles, calibrate, score
from llp.scoring.basis import basis
from llp.scoring.calibration import _Problem, t1
from llp.scoring.terms import Study
from tests.scoring_tables import simulate


def shuffled_studies_that_earn_weight(num):
    """Studies where tier 2 says nothing about the result, of the kinds a search produces."""
    kinds = [(15, 1), (15, 4), (30, 2), (45, 6)]
    earned = 0
    for seed in range(num):
        finished, metrics = kinds[seed % len(kinds)]
        table = simulate(seed, finished=finished, metrics=metrics, hyper=(seed % 2) * 0.5)
        earned += calibrate(table).tier2_enters
    return earned


def test_unrelated_tier2_earns_no_weight_in_95_percent_of_studies():
    assert shuffled_studies_that_earn_weight(24) <= 1


@pytest.mark.slow
def test_unrelated_tier2_earns_no_weight_in_95_percent_of_400_studies():
    assert shuffled_studies_that_earn_weight(400) <= 20


def test_planted_tier2_signal_earns_weight_and_improves_the_ranking_of_the_others():
    for seed in range(2):
        table = simulate(seed, rows=80, finished=45, planted=1.0)
        scores = score(table)
        assert scores.calibration.tier2_enters
        assert scores.weights["metric0"] > 3 * abs(scores.weights["metric1"])
        assert scores.calibration.gain_tier2.value > scores.calibration.gain_tier2.shuffled + 0.05


def test_planted_sign_is_learnt_not_believed():
    table = simulate(0, rows=80, finished=45, planted=-1.0)
    scores = score(table)
    assert scores.calibration.tier2_enters
    assert scores.weights["metric0"] < 0


def test_planted_hyperparameter_effect_earns_weight_as_prior_knowledge():
    scores = score(simulate(0, rows=80, finished=45, hyper=1.5))
    assert scores.calibration.hyperparameters_enter
    assert "hyperparameters" in scores.contributions
    assert not scores.calibration.tier2_enters


def test_metric_that_only_stands_in_for_a_hyperparameter_does_not_count_as_flatness():
    entered = 0
    for seed in range(4):
        table = simulate(seed, rows=80, finished=45, hyper=1.5)
        table["metric0"] = -((np.log10(table["learning_rate"]) + 1.5) ** 2)
        calibration = calibrate(table)
        entered += calibration.tier2_enters and calibration.hyperparameters_enter
    assert entered == 0


def test_gate_keeps_tier2_out_when_fewer_than_12_have_learnt():
    table = simulate(0, rows=60, finished=45, planted=2.0)
    table.iloc[11:, table.columns.get_loc("train_accuracy")] = 0.1
    calibration = calibrate(table)
    assert calibration.gain_tier2 is None
    assert "not measured on at least 12 trials that have learnt enough" in calibration.sentence


def test_term_of_tier2_is_free_of_the_training_loss_and_zero_outside_the_gate():
    table = simulate(0, rows=60, finished=0)
    table["metric0"] = 3 * table["train_loss"] ** 2 + 0.01 * table["metric0"]
    table.iloc[:10, table.columns.get_loc("train_accuracy")] = 0.1
    study = Study(table, Roles.from_table(table))
    r = study.t2("metric0", study.metric("metric0"))
    loss = table["train_loss"].to_numpy()[10:]
    assert (r[:10] == 0).all()
    assert np.abs(np.corrcoef(r[10:], loss)[0, 1]) < 0.05
    assert np.abs(np.corrcoef(study.metric("metric0")[10:], loss)[0, 1]) > 0.95


def test_metric_noisier_than_half_the_spread_is_dropped_and_named():
    table = simulate(0, finished=40, planted=1.0)
    table["metric0_se"] = 0.8
    calibration = calibrate(table)
    assert calibration.dropped == ("metric0",)
    assert "too noisy to use: metric0" in calibration.sentence
    assert "metric0" not in calibration.weights


def test_leave_one_out_shortcut_equals_refitting_without_each_trial():
    table = simulate(0, rows=20, finished=20, hyper=0.5)
    study = Study(table, Roles.from_table(table))
    h, _ = basis([table], study.roles.hyperparameters)
    rows = np.arange(20)
    problem = _Problem([study], [rows], h, (), np.random.default_rng(0))
    errors = {}
    for strength in (1.0, 100.0):
        x, penalty = problem._design(problem.r, strength, np.inf)
        y = problem.y - problem.t1
        refit = []
        for i in rows:
            keep = rows != i
            beta = np.linalg.solve(x[keep].T @ x[keep] + np.diag(penalty), x[keep].T @ y[keep])
            refit.append(y[i] - x[i] @ beta)
        inner = np.linalg.solve(x.T @ x + np.diag(penalty), x.T)
        shortcut = (y - x @ (inner @ y)) / (1 - np.einsum("ij,ji->i", x, inner))
        errors[strength] = np.abs(shortcut - refit).max()
    assert max(errors.values()) < 1e-9


def test_known_weights_are_recovered_within_their_standard_errors():
    inside = []
    for seed in range(10):
        table = simulate(seed, rows=200, finished=200, metrics=2)
        study = Study(table, Roles.from_table(table))
        truth = 0.6 * t1(study) + 0.8 * study.t2("metric0", study.metric("metric0"))
        rng = np.random.default_rng(seed)
        table["verified_accuracy"] = truth + 0.3 * rng.normal(size=200)
        # Normal scores divide the target by its spread, and the weights with it.
        scale = np.std(table["verified_accuracy"])
        calibration = calibrate(table)
        error = calibration.weights["metric0"] - 0.8 / scale
        inside.append(abs(error) < 2 * calibration.standard_errors["metric0"] + 0.05)
    assert sum(inside) >= 9


def test_calibration_is_plain_json():
    calibration = calibrate([simulate(0), simulate(1)])
    data = json.loads(json.dumps(to_plain(calibration)))
    assert data["version"] == 1
    assert data["num_studies"] == 2
    assert data["num_finished"] == 60


def test_two_studies_in_one_table_equal_two_tables():
    a, b = simulate(0, planted=1.0), simulate(1, planted=1.0)
    both = pd.concat([a.assign(study="a"), b.assign(study="b")])
    assert calibrate(both).weights == pytest.approx(calibrate([a, b]).weights)


def test_missing_target_is_refused():
    with pytest.raises(SpecError, match="no target"):
        calibrate(simulate(0).drop(columns="verified_accuracy"))


def test_basis_takes_logs_squares_categories_and_drops_what_is_constant():
    table = pd.DataFrame(
        {
            "learning_rate": [1e-3, 1e-2, 1e-1, 1.0],
            "momentum": [0.0, 0.9, 0.0, 0.9],
            "optimizer": ["sgd", "adamw", "sgd", "adamw"],
            "constant": 3,
            "depth": [1, 2, 3, np.nan],
            "nesterov": [True, False, True, False],
        }
    )
    (matrix,), names = basis([table], list(table.columns))
    assert "constant" not in names
    assert {"optimizer=sgd", "depth", "depth^2", "nesterov", "learning_rate^2"} <= set(names)
    effective = np.log10(table["learning_rate"] / (1 - table["momentum"]))
    got = matrix[:, names.index("learning_rate")]
    assert np.corrcoef(got, effective)[0, 1] == pytest.approx(1.0)
    assert matrix[3, names.index("depth")] == 0.0
