"""Stop rules: they stop what is hopeless, keep what is not, and measure their own uncertainty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from llp.probing.stopping import Plateau, PowerLaw, power_law_forecast
from llp.records import CurvePoint, LearningCurve
from llp.registry import STOP_RULES, load


def curve(
    trial_id: str, accuracies: list[float], losses: list[float] | None = None
) -> LearningCurve:
    losses = losses or [1 - a for a in accuracies]
    return LearningCurve(
        trial_id,
        1,
        tuple(
            CurvePoint(1, 0.1, e, e * 10, loss, a, loss, a, float(e))
            for e, (a, loss) in enumerate(zip(accuracies, losses, strict=True), start=1)
        ),
    )


def noisy(
    trial_id: str, limit: float, epochs: int, seed: int, noise: float = 0.005
) -> LearningCurve:
    rng = np.random.default_rng(seed)
    t = np.arange(1, epochs + 1)
    return curve(trial_id, list(limit - 0.4 * t**-0.7 + noise * rng.standard_normal(epochs)))


def test_forecast_agrees_with_nonlinear_least_squares():
    rng = np.random.default_rng(0)
    t = np.arange(1, 9)
    errors = 0.15 + 0.5 * t**-0.8 + 0.003 * rng.standard_normal(8)
    fitted, _ = curve_fit(lambda t, a, b, c: c + a * t**-b, t, errors, p0=[0.5, 0.5, 0.1])
    expected = fitted[2] + fitted[0] * 20 ** -fitted[1]
    assert power_law_forecast(list(errors), 20) == pytest.approx(expected, abs=0.01)


def test_a_rising_error_is_not_extrapolated_beyond_its_mean():
    assert power_law_forecast([0.2, 0.3, 0.4, 0.5], 100) == pytest.approx(0.35)


def test_a_hopeless_job_is_stopped_and_a_good_one_is_not():
    finished = [noisy(f"f{i}", 0.9 - 0.02 * i, 12, i) for i in range(8)]
    bad, good = noisy("bad", 0.5, 12, 99), noisy("good", 0.92, 12, 98)
    rule = PowerLaw()
    verdict = rule.decide(
        curve("bad", [p.validation_accuracy for p in bad.points[:5]]),
        num_points=12,
        ended=finished,
        keep_fraction=1 / 3,
    )
    assert verdict.stop
    assert verdict.reason == "power_law"
    assert verdict.predicted_final is not None
    assert verdict.predicted_final.high < 0.8
    assert "below" in verdict.detail
    kept = rule.decide(
        curve("good", [p.validation_accuracy for p in good.points[:5]]),
        num_points=12,
        ended=finished,
        keep_fraction=1 / 3,
    )
    assert not kept.stop


def test_stopped_jobs_do_not_raise_the_bar_for_the_rest():
    """Nine weak jobs were stopped, so third best of twelve is enough, not best of three."""
    survivors = [noisy(f"f{i}", 0.95 - 0.02 * i, 12, i, noise=0.001) for i in range(3)]
    stopped = [curve(f"s{i}", [0.1] * 4) for i in range(9)]
    weaker = noisy("x", 0.80, 12, 50, noise=0.001)
    cut = LearningCurve("x", 1, weaker.points[:8])
    assert PowerLaw().decide(cut, num_points=12, ended=survivors, keep_fraction=1 / 3).stop
    assert (
        not PowerLaw()
        .decide(cut, num_points=12, ended=[*survivors, *stopped], keep_fraction=1 / 3)
        .stop
    )


def test_nothing_is_stopped_on_too_little_evidence():
    finished = [noisy(f"f{i}", 0.9, 12, i) for i in range(8)]
    bad = [p.validation_accuracy for p in noisy("bad", 0.3, 12, 5).points]
    rule = PowerLaw()
    assert not rule.decide(
        curve("bad", bad[:3]), num_points=12, ended=finished, keep_fraction=1 / 3
    ).stop
    assert not rule.decide(
        curve("bad", bad[:6]), num_points=12, ended=finished[:2], keep_fraction=1 / 3
    ).stop
    assert not rule.decide(
        curve("bad", bad), num_points=12, ended=finished, keep_fraction=1 / 3
    ).stop


def test_a_jobs_own_completed_curve_is_no_evidence_against_it():
    own = noisy("a", 0.5, 12, 1)
    others = [noisy(f"f{i}", 0.9, 12, i) for i in range(2)]
    cut = LearningCurve("a", 1, own.points[:6])
    assert not PowerLaw().decide(cut, num_points=12, ended=[own, *others], keep_fraction=1 / 3).stop


def test_intervals_cover_what_comes_out():
    rng = np.random.default_rng(3)
    limits = rng.uniform(0.6, 0.95, 400)
    curves = [noisy(f"c{i}", limit, 12, i, noise=0.01) for i, limit in enumerate(limits)]
    covered = []
    for i in range(0, 400, 10):
        group = curves[i : i + 10]
        cut = LearningCurve(group[0].trial_id, 1, group[0].points[:6])
        forecast = (
            PowerLaw()
            .decide(cut, num_points=12, ended=group[1:], keep_fraction=1 / 3)
            .predicted_final
        )
        assert forecast is not None
        assert forecast.level == pytest.approx(0.9)
        covered.append(forecast.low <= group[0].points[-1].validation_accuracy <= forecast.high)
    standard_error = math.sqrt(0.9 * 0.1 / len(covered))
    assert np.mean(covered) > 0.9 - 3 * standard_error


def test_a_nan_curve_is_left_to_the_divergence_check():
    finished = [noisy(f"f{i}", 0.9, 12, i) for i in range(8)]
    assert (
        not PowerLaw()
        .decide(
            curve("n", [0.3, math.nan, 0.3, 0.3, 0.3]),
            num_points=12,
            ended=finished,
            keep_fraction=1 / 3,
        )
        .stop
    )


def test_plateau_waits_for_its_patience():
    losses = [1.0, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    rule = Plateau(patience_fraction=0.5)
    at = [
        rule.decide(
            curve("p", [0.5] * n, losses[:n]), num_points=10, ended=[], keep_fraction=1 / 3
        ).stop
        for n in range(1, 9)
    ]
    assert at == [False] * 6 + [True, True]


@pytest.mark.parametrize("name", STOP_RULES)
def test_every_stop_rule_goes_through_the_same_life_cycle(name):
    rule = load("stop_rules", name)(**STOP_RULES[name].options)
    finished = [noisy(f"f{i}", 0.8, 10, i) for i in range(5)]
    full = noisy("x", 0.8, 10, 77)
    assert rule.name == name
    for n in range(1, 11):
        cut = LearningCurve("x", 1, full.points[:n])
        first = rule.decide(cut, num_points=10, ended=finished, keep_fraction=1 / 3)
        assert first == rule.decide(cut, num_points=10, ended=list(finished), keep_fraction=1 / 3)
        assert bool(first.reason) == first.stop
    assert not rule.decide(full, num_points=10, ended=finished, keep_fraction=1 / 3).stop


def test_no_rule_stops_what_goes_on_whatever_its_place():
    """On the highest rung of three trials, all three of which are verified, nobody is cut."""
    finished = [noisy(f"f{i}", 0.9, 12, i) for i in range(8)]
    bad = LearningCurve("bad", 1, noisy("bad", 0.3, 12, 5).points[:6])
    assert PowerLaw().decide(bad, num_points=12, ended=finished, keep_fraction=1 / 3).stop
    assert not PowerLaw().decide(bad, num_points=12, ended=finished, keep_fraction=1.0).stop


def test_completed_curves_that_agree_by_chance_do_not_make_certain():
    same = [curve(f"f{i}", [0.5, 0.7, 0.8, 0.85, 0.87, 0.88]) for i in range(4)]
    verdict = PowerLaw().decide(
        curve("x", [0.5, 0.7, 0.8, 0.85]), num_points=6, ended=same, keep_fraction=1 / 3
    )
    assert verdict.predicted_final is not None
    assert verdict.predicted_final.high - verdict.predicted_final.low > 0.01
