from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import multivariate_normal

from llp.errors import SpecError
from llp.records import to_plain
from llp.scoring import Roles, calibrate, score
from llp.scoring.basis import coordinates
from llp.scoring.mixture import Finished, Mixture, slope_priors
from llp.scoring.surface import covariance, features, smoothed
from llp.scoring.terms import Study, t1
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


def made_up(num=24, seed=0):
    rng = np.random.default_rng(seed)
    study = np.arange(num) % 3
    blocks = [rng.normal(size=(num, 1)), rng.normal(size=(num, 1))]
    phi = features(blocks, np.array([0.7, 0.3]))
    return Finished(study, rng.normal(size=num), rng.normal(size=(num, 2)), phi, np.zeros((num, 0)))


def without(data, rows):
    kept = np.setdiff1d(np.arange(len(data)), rows)
    return Finished(
        data.study[kept], data.y[kept], data.x[kept], data.phi[kept], data.r[kept]
    ), kept


@pytest.mark.parametrize("by_study", [False, True])
def test_left_out_predictions_equal_refitting_without_the_trial_or_study(by_study):
    data = made_up()
    shortcut = Mixture(data, use_h=True, use_2=False).left_out(data.study if by_study else None)
    groups = [np.flatnonzero(data.study == s) for s in range(3)] if by_study else np.arange(24)
    for rows in groups[:6]:
        rows = np.atleast_1d(rows)
        refit, _ = without(data, rows)
        mixture = Mixture(refit, use_h=True, use_2=False)
        expected = np.zeros(len(rows))
        x, weights = np.concatenate([data.x, data.phi], axis=1), mixture.weights()
        for point, weight in zip(mixture.points, weights, strict=True):
            # Straight from the textbook: k(new, old) K^-1 residual, study effects included.
            same = (data.study[rows][:, None] == refit.study[None, :]).astype(float)
            alike = 0.7 + 0.3 * same
            cross = 0.1 * same + data.x[rows] @ point.slopes @ refit.x.T * alike
            cross = cross + point.surface * data.phi[rows] @ refit.phi.T * alike
            own = (refit.study[:, None] == refit.study[None, :]).astype(float)
            alike = 0.7 + 0.3 * own
            k = 0.1 * own + refit.x @ point.slopes @ refit.x.T * alike
            k = k + point.surface * refit.phi @ refit.phi.T * alike
            k = k + point.noise * np.eye(len(refit))
            rest = refit.y - refit.x @ point.prior
            mean = data.x[rows] @ point.prior + cross @ np.linalg.solve(k, rest)
            expected += weight * mean
        assert shortcut[rows] == pytest.approx(expected, abs=1e-8)
        assert x.shape[0] == len(shortcut)


def test_weights_of_the_signals_are_uncertain_in_size_and_by_share():
    for share, (mean, spread, _) in zip((0, 0.3, 0.6), slope_priors(2, True), strict=True):
        rng = np.random.default_rng(0)
        size = 0.9 + np.sqrt(0.05) * rng.standard_normal(200_000)
        own = np.sqrt(0.03) * rng.standard_normal((200_000, 2))
        drawn = size[:, None] * np.array([1 - share, share]) + own
        assert drawn.mean(axis=0) == pytest.approx(mean, abs=0.005)
        assert np.cov(drawn.T) == pytest.approx(spread, abs=0.002)


def test_evidence_is_the_log_density_of_the_results():
    data = made_up(12)
    for point in Mixture(data, use_h=True, use_2=False).points[::7]:
        same = (data.study[:, None] == data.study[None, :]).astype(float)
        alike = 0.7 + 0.3 * same
        k = 0.1 * same + data.x @ point.slopes @ data.x.T * alike + point.noise * np.eye(12)
        k = k + point.surface * data.phi @ data.phi.T * alike
        mean = data.x @ point.prior
        expected = multivariate_normal(mean, k).logpdf(data.y) + 6 * np.log(2 * np.pi)
        expected += np.log(0.1 if point.prior[1] == 0 else 0.45)
        assert point.evidence == pytest.approx(expected, abs=1e-8)


def test_posterior_coefficients_predict_what_the_covariances_predict():
    data = made_up()
    rows = np.array([5])
    refit, _ = without(data, rows)
    mixture = Mixture(refit, use_h=True, use_2=False)
    study = int(data.study[5])
    x = np.concatenate([data.x, data.phi], axis=1)[5]
    posteriors = list(mixture.posteriors(study))
    assert sum(p.weight for p in posteriors) == pytest.approx(1.0, abs=0.2)
    heaviest = posteriors[0]
    point = mixture.points[int(np.argmax(mixture.weights()))]
    same = (refit.study == study).astype(float)
    alike = 0.7 + 0.3 * same
    linear = refit.x @ point.slopes @ data.x[5]
    cross = alike * (linear + point.surface * refit.phi @ data.phi[5])
    expected = data.x[5] @ point.prior + cross @ point.alpha
    assert x @ heaviest.mean == pytest.approx(expected, abs=1e-8)
    k = (point.vectors * (point.values + point.noise)) @ point.vectors.T
    variance = data.x[5] @ point.slopes @ data.x[5] + point.surface * data.phi[5] @ data.phi[5]
    variance -= cross @ np.linalg.solve(k, cross)
    assert x @ heaviest.covariance @ x == pytest.approx(variance, abs=1e-8)


def test_features_reproduce_the_covariance_and_pivots_come_first():
    rng = np.random.default_rng(0)
    blocks = [rng.normal(size=(60, 1)), rng.normal(size=(60, 2))]
    relevance = np.array([0.8, 0.2])
    phi = features(blocks, relevance, first=[7, 8])
    k = covariance(blocks, blocks, relevance)
    assert np.abs(phi @ phi.T - k).max() < 0.05
    assert (phi @ phi.T)[7] == pytest.approx(k[7], abs=1e-9)


def test_smoothed_signal_does_not_contain_the_trial_itself():
    rng = np.random.default_rng(0)
    blocks = {"rate": rng.normal(size=(40, 1)), "width": rng.normal(size=(40, 1))}
    signal = np.sin(blocks["rate"][:, 0]) + 0.3 * rng.normal(size=40)
    relevance = np.array([0.5, 0.5])
    before, _ = smoothed(blocks, signal, rng, relevance)
    assert np.corrcoef(before, np.sin(blocks["rate"][:, 0]))[0, 1] > 0.8
    _, learnt = smoothed(blocks, signal, rng)
    assert learnt[0] > 0.6
    assert learnt.sum() == pytest.approx(1.0)


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
    assert data["version"] == 2
    assert data["num_studies"] == 2
    assert data["num_finished"] == 60


def test_two_studies_in_one_table_equal_two_tables():
    a, b = simulate(0, planted=1.0), simulate(1, planted=1.0)
    both = pd.concat([a.assign(study="a"), b.assign(study="b")])
    assert calibrate(both).weights == pytest.approx(calibrate([a, b]).weights)


def test_missing_target_is_refused():
    with pytest.raises(SpecError, match="no target"):
        calibrate(simulate(0).drop(columns="verified_accuracy"))


def test_coordinates_take_logs_and_categories_and_drop_what_is_constant():
    table = pd.DataFrame(
        {
            "learning_rate": [1e-3, 1e-2, 1e-1, 1.0],
            "momentum": [0.0, 0.9, 0.0, 0.9],
            "optimizer": ["sgd", "adamw", "sgd", "adamw"],
            "constant": 3,
            "depth": [1, 2, 3, np.nan],
            "nesterov": [True, False, True, False],
            "path": ["a", "b", "c", "d"],
        }
    )
    (blocks,), names = coordinates([table], list(table.columns))
    assert "constant" not in names
    assert {"optimizer", "depth", "nesterov", "learning_rate"} <= set(names)
    effective = np.log10(table["learning_rate"] / (1 - table["momentum"]))
    assert np.corrcoef(blocks["learning_rate"][:, 0], effective)[0, 1] == pytest.approx(1.0)
    assert blocks["depth"][3].tolist() == [0.0, 0.0]
    assert blocks["depth"][0, 1] == 1.0
    distance = np.linalg.norm(blocks["optimizer"][0] - blocks["optimizer"][1])
    assert distance == pytest.approx(1.7)


@pytest.mark.parametrize("name", ["lr", "hp.lr", "learning_rate_init"])
def test_learning_rate_is_known_by_its_usual_names(name):
    table = pd.DataFrame({name: [1e-3, 1e-2, 1e-1, 1.0], "batch_size": [32, 64, 32, 128]})
    (blocks,), _ = coordinates([table], [name, "batch_size"])
    effective = np.log10(table[name] / table["batch_size"])
    assert np.corrcoef(blocks[name][:, 0], effective)[0, 1] == pytest.approx(1.0)


def kendall(values, other):
    return values.corr(other, method="kendall")


def test_signals_that_make_the_ranking_worse_stay_out_and_it_is_said():
    table = simulate(0, rows=100, finished=60, noise=0.2, metrics=0)
    truth = simulate(0, rows=100, finished=100, noise=0.2, metrics=0)["verified_accuracy"]
    table["validation_loss"] = np.random.default_rng(0).normal(size=100)
    found = score(table)
    assert found.preset == "calibrated"
    assert "validation_loss" not in found.weights
    assert "validation_loss" not in found.contributions
    assert found.calibration.gain_signals.interval.high < 0
    assert "the other tier-1 signals stayed out" in found.sentence
    without = score(table.drop(columns="validation_loss"))
    assert without.calibration.gain_signals is None
    left = table.index[60:]
    agreement = kendall(found.table["score"].loc[left], truth.loc[left])
    assert agreement > kendall(table["validation_accuracy"].loc[left], truth.loc[left]) - 0.01
    assert found.weights == pytest.approx(without.weights)


def test_signals_that_help_stay_in():
    for seed in range(4):
        table = simulate(seed, rows=80, finished=45, hyper=1.0)
        found = calibrate(table)
        assert found.gain_signals is None
        assert found.weights["validation_loss"] > 0


def test_a_whole_that_is_worse_than_validation_is_left_for_validation_alone(monkeypatch):
    table = simulate(0, rows=60, finished=45)
    right = Mixture.left_out
    # Predictions of the trials left out are turned round, as if what was learnt misled.
    monkeypatch.setattr(Mixture, "left_out", lambda self, groups=None: -right(self, groups))
    found = score(table)
    calibration = found.calibration
    assert calibration.gain_validation.interval.high < 0
    assert found.preset == calibration.in_force == "validation"
    assert found.weights == calibration.weights == {"validation_accuracy": 1.0}
    assert np.isnan(calibration.standard_errors["validation_accuracy"])
    assert not calibration.hyperparameters_enter
    assert "all of it stayed out" in found.sentence
    assert "The score is validation_accuracy alone." in found.sentence
    pd.testing.assert_frame_equal(found.table, score(table, preset="validation").table)


@pytest.mark.parametrize("num_features", [4, 60])
def test_eigenpairs_within_the_span_of_the_columns_are_those_of_the_whole_matrix(num_features):
    rng = np.random.default_rng(0)
    study, phi = np.arange(60) % 2, rng.normal(size=(60, num_features)) / 4
    data = Finished(
        study, rng.normal(size=60), rng.normal(size=(60, 2)), phi, rng.normal(size=(60, 3))
    )
    same = (study[:, None] == study[None, :]).astype(float)
    alike = 0.7 + 0.3 * same
    for use_h in (True, False):
        for point in Mixture(data, use_h=use_h, use_2=True).points[::11]:
            whole = 0.1 * same + data.x @ point.slopes @ data.x.T * alike
            whole += point.surface * phi @ phi.T * alike + point.metrics * data.r @ data.r.T / 3
            again = (point.vectors * point.values) @ point.vectors.T
            assert again == pytest.approx(whole, abs=1e-9)
            assert point.vectors.T @ point.vectors == pytest.approx(np.eye(60), abs=1e-10)
