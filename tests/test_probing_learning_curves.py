"""Forecasts of learning curves: closed forms, invariances, calibration, and the fit itself."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, special, stats

from llp.errors import DataError
from llp.probing import curve_evaluation, curve_fitting, curve_prior, learning_curves
from llp.probing.curve_features import compact, describe
from llp.probing.curve_prior import LEVELS, LOGITS
from llp.probing.curve_tables import CurveTable, make_examples, simulated
from llp.probing.forecasts import Forecast, pooled
from llp.probing.learning_curves import extrapolate, extrapolate_full
from llp.probing.stopping import CurveForecast, complete, early_ranks
from llp.records import CurvePoint, LearningCurve

FREE = (-math.inf, math.inf)


def family(num: int, length: int, seed: int, noise: float = 0.005) -> np.ndarray:
    """Power laws with the same start, different limits and speeds."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, length + 1)
    floor = rng.uniform(0.1, 0.4, (num, 1))
    power = rng.uniform(0.4, 1.2, (num, 1))
    return floor + (0.9 - floor) * t**-power + noise * rng.standard_normal((num, length))


def tables_agree(first: Forecast, second: Forecast, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(first.costs, second.costs, rtol=rtol, atol=1e-9)


# Closed forms


@pytest.mark.parametrize("place", range(1, 4))
def test_an_exact_power_law_is_continued_exactly(place):
    """The step that the law of the same exponent adds, against its formula."""
    exponent = (0.0, 0.3, 0.7, 1.5)[place]
    t = np.arange(1, 11.0)
    values = 0.2 + 0.7 * t**-exponent
    described = describe(compact(t[None], values[None], np.array([80.0])))
    true = (0.2 + 0.7 * 80**-exponent - values[-1]) / described.unit.span
    fine = described.features[0, described.names.index(f"power law {exponent}")]
    assert np.sinh(fine) * 1e-3 == pytest.approx(true, rel=0.05)


def test_power_laws_are_recovered_far_better_than_the_last_value_does():
    curves = family(60, 50, seed=1, noise=0.0)
    made = extrapolate(curves[:, :10], horizon=50)
    error = np.abs(made.mean - curves[:, -1]).mean()
    assert error < 0.5 * np.abs(curves[:, 9] - curves[:, -1]).mean()
    low, high = made.quantile([0.05, 0.95])
    assert np.mean((low <= curves[:, -1]) & (curves[:, -1] <= high)) > 0.85


def test_a_mixture_of_one_logistic_has_its_quantiles():
    found = curve_prior._mixture_quantiles(
        np.ones((1, 1)), np.full((1, 1), 0.3), np.full((1, 1), 0.1)
    )
    np.testing.assert_allclose(found[0], 0.3 + 0.1 * LOGITS, rtol=1e-9)


def test_quantiles_of_a_mixture_match_root_finding():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(5), 20)
    places, scales = rng.normal(0, 1, (20, 5)), rng.uniform(0.01, 0.5, (20, 5))
    found = curve_prior._mixture_quantiles(weights, places, scales)
    below = (weights[:, :, None] * stats.logistic.cdf(
        (found[:, None] - places[:, :, None]) / scales[:, :, None]
    )).sum(axis=1)  # fmt: skip
    np.testing.assert_allclose(below, np.broadcast_to(LEVELS, below.shape), atol=0.02)


def test_mixture_quantiles_are_those_of_the_textbook_formula_to_rounding():
    """With `expit`, which takes twice as long; far tails and tiny scales included."""
    rng = np.random.default_rng(5)
    for scale in (1e-3, 1.0):
        weights = rng.dirichlet(np.ones(31), 6)
        places, scales = rng.normal(size=(6, 31)), scale * np.exp(rng.normal(0, 2, (6, 31)))
        grid = (places[:, :, None] + scales[:, :, None] * curve_prior._NODE_LOGITS).reshape(6, -1)
        grid.sort(axis=1)
        parts = special.expit((grid[:, None] - places[:, :, None]) / scales[:, :, None])
        below = np.clip((weights[:, :, None] * parts).sum(axis=1), 1e-12, 1 - 1e-12)
        logit = np.log(below) - np.log1p(-below)
        expected = [np.interp(LOGITS, *pair) for pair in zip(logit, grid, strict=True)]
        found = curve_prior._mixture_quantiles(weights, places, scales)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * scale)


def test_curves_that_are_all_over_are_told_as_when_one_is_not():
    """All at the horizon: no forecast is made; the batch is described the same either way."""
    rng = np.random.default_rng(2)
    curves = np.sort(rng.random((6, 9)), axis=1)[:, ::-1]
    over = extrapolate(curves, horizon=9)
    batch = compact(np.tile(np.arange(1.0, 10), (6, 1)), curves, np.full(6, 9.0))
    described = describe(batch)
    width = np.maximum(described.noise, 1e-6) * np.sqrt(3) / np.pi
    slope = np.exp(described.unit.log_slope(described.anchor))
    expected = curves[:, -1:] + (width * slope)[:, None] * LOGITS
    np.testing.assert_allclose(over.costs, expected, rtol=0, atol=1e-11)


def test_density_is_the_slope_of_the_probability_and_integrates_to_one():
    made = extrapolate(family(5, 50, 2)[:, :12], horizon=50, bounds=FREE)
    points = made.quantile([0.205, 0.374, 0.506, 0.803])  # at a level of the table it jumps
    for row in points:
        step = 1e-7
        slope = made.probability_better_than(row + step) - made.probability_better_than(row - step)
        np.testing.assert_allclose(np.exp(made.log_density(row)), slope / (2 * step), rtol=1e-2)
    nodes = made.quantile([1e-6, *LEVELS, 1 - 1e-6])[:, 0]
    total = sum(
        integrate.quad(lambda x: np.exp(made.log_density(np.full(5, x))[0]), a, b)[0]
        for a, b in itertools.pairwise(nodes)
    )
    assert total == pytest.approx(1, abs=1e-3)


def test_the_middle_of_a_symmetric_forecast_is_its_mean():
    made = Forecast(np.array([[2.0]]) + 3 * LOGITS)
    assert made.mean[0] == pytest.approx(2)
    assert made.median[0] == pytest.approx(2)


# Invariances


def test_another_unit_of_the_metric_changes_nothing_but_the_unit():
    curves = family(20, 30, 3)[:, :8]
    plain = extrapolate(curves, horizon=30, bounds=FREE)
    scaled = extrapolate(-7 + 250 * curves, horizon=30, bounds=FREE)
    np.testing.assert_allclose(scaled.costs, -7 + 250 * plain.costs, rtol=1e-6)
    np.testing.assert_allclose(
        extrapolate(250 * curves, horizon=30).mean, 250 * plain.mean, rtol=1e-6
    )


def test_accuracies_are_the_mirror_of_errors():
    curves = family(20, 30, 4)[:, :8]
    errors = extrapolate(curves, horizon=30, bounds=FREE)
    accuracies = extrapolate(1 - curves, horizon=30, higher_is_better=True, bounds=FREE)
    np.testing.assert_allclose(accuracies.mean, 1 - errors.mean, rtol=1e-6)
    np.testing.assert_allclose(
        accuracies.quantile([0.1, 0.9]), 1 - errors.quantile([0.9, 0.1]), rtol=1e-6
    )
    np.testing.assert_allclose(
        accuracies.probability_better_than(0.8), errors.probability_better_than(0.2), atol=1e-6
    )


def test_the_unit_of_the_positions_changes_nothing():
    curves = family(10, 30, 5)[:, :8]
    tables_agree(
        extrapolate(curves, horizon=30),
        extrapolate(curves, horizon=30_000, positions=1000 * np.arange(1, 9)),
    )


def test_positions_may_start_at_zero():
    curves = family(10, 30, 5)[:, :8]
    tables_agree(
        extrapolate(curves, horizon=30),
        extrapolate(curves, horizon=29, positions=np.arange(8)),
    )


def test_order_within_the_batch_is_irrelevant():
    curves = family(30, 40, 6)
    curves[5] = curves[11]  # ties
    curves = np.where(
        np.arange(40) < np.random.default_rng(0).integers(2, 30, (30, 1)), curves, np.nan
    )
    order = np.random.default_rng(1).permutation(30)
    finished = family(12, 40, 7)
    for options in ({}, {"finished": finished}):
        plain = extrapolate(curves, horizon=40, **options)
        mixed = extrapolate(curves[order], horizon=40, **options)
        np.testing.assert_allclose(mixed.costs, plain.costs[order], rtol=1e-5, atol=1e-7)


def test_padding_and_gaps_of_nan_are_irrelevant():
    curves = family(10, 30, 8)[:, :8]
    wide = np.full((10, 40), np.nan)
    wide[:, [3, 4, 7, 9, 20, 25, 30, 39]] = curves
    places = np.full((10, 40), np.nan)
    places[:, [3, 4, 7, 9, 20, 25, 30, 39]] = np.arange(1, 9)
    tables_agree(extrapolate(curves, horizon=30), extrapolate(wide, horizon=30, positions=places))


def test_points_beyond_the_horizon_are_not_looked_at():
    curves = family(10, 30, 9)
    tables_agree(
        extrapolate(curves[:, :12], horizon=12), extrapolate(curves, horizon=12), rtol=1e-9
    )


# Edges


def test_a_curve_seen_to_the_horizon_gets_its_last_value_and_its_noise():
    rng = np.random.default_rng(0)
    clean = family(1, 30, 10, noise=0)
    for noise in (0.003, 0.03):
        curves = clean + noise * rng.standard_normal((40, 30))
        made = extrapolate(curves, horizon=30, bounds=FREE)
        np.testing.assert_allclose(made.mean, curves[:, -1], atol=1e-9)
        low, high = made.quantile([0.05, 0.95])
        width = float(np.median(high - low)) / (2 * 1.645)
        assert noise / 2 < width < 2 * noise


def test_one_point_gives_a_wide_but_finite_forecast():
    made = extrapolate([[0.7]], horizon=100)
    low, high = made.quantile([0.05, 0.95])[:, 0]
    assert np.isfinite([low, high]).all()
    assert low <= 0.7
    assert high > low


def test_nothing_seen_is_nan_alone_and_the_mixture_of_the_peers_among_them():
    assert np.isnan(extrapolate([[np.nan, np.nan]], horizon=5).mean).all()
    assert np.isnan(extrapolate([[np.nan]], horizon=5).probability_better_than(0.5)).all()
    curves = np.vstack([family(30, 40, 11)[:, :10], np.full((1, 10), np.nan)])
    made = extrapolate(curves, horizon=40)
    chance = made.probability_better_than(0.3)
    assert chance[-1] == pytest.approx(chance[:-1].mean(), abs=0.02)
    finished = family(40, 40, 12)
    fresh = extrapolate([[np.nan]], horizon=40, finished=finished)
    assert fresh.median[0] == pytest.approx(np.median(finished[:, -1]), abs=0.03)


def test_no_curves_give_an_empty_forecast():
    made = extrapolate(np.empty((0, 4)), horizon=10)
    assert made.mean.shape == (0,)
    assert made.quantile([0.1, 0.9]).shape == (2, 0)


def test_a_diverged_curve_is_forecast_at_the_worst_that_was_seen():
    curves = family(6, 30, 13)[:, :8]
    curves[2, 5:] = np.inf
    made = extrapolate(curves, horizon=30)
    worst = np.nanmax(curves[np.isfinite(curves)])
    assert made.mean[2] == pytest.approx(worst)
    assert made.probability_better_than(worst - 1e-3)[2] == pytest.approx(0, abs=1e-9)
    assert np.isfinite(made.mean).all()
    up = extrapolate(
        1 - np.where(np.isinf(curves), np.nan, curves), horizon=30, higher_is_better=True
    )
    assert np.isfinite(up.mean).all()


def test_astronomic_losses_harm_nobody_else():
    curves = family(20, 30, 14)[:, :8]
    usual = extrapolate(curves, horizon=30).mean
    curves[3, 4:] = [1e3, 1e9, 1e15, 1e18]
    made = extrapolate(curves, horizon=30)
    others = np.arange(20) != 3
    assert made.mean[3] > 1
    assert np.isfinite(made.costs).all()
    np.testing.assert_allclose(made.mean[others], usual[others], atol=0.05)


def test_constant_curves_stay_where_they_are():
    made = extrapolate(np.full((4, 6), 2.5), horizon=50)
    np.testing.assert_allclose(made.median, 2.5, atol=0.25)
    assert np.isfinite(made.costs).all()


def test_forecasts_stay_in_the_range_of_the_metric():
    high = extrapolate([[0.9, 0.95, 0.99, 0.995]], horizon=100, higher_is_better=True)
    assert high.quantile([0.999])[0, 0] <= 1
    low = extrapolate([[0.3, 0.05, 0.01, 0.005]], horizon=100)
    assert low.quantile([0.001])[0, 0] >= 0
    assert low.probability_better_than(0.0)[0] == 0
    own = extrapolate([[0.3, 0.05, 0.01, 0.005]], horizon=100, bounds=(0.004, 0.2))
    assert own.quantile([0.001])[0, 0] >= 0.004
    assert own.quantile([0.999])[0, 0] <= 0.2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"curves": [0.5, 0.4], "horizon": 5}, "num_curves, num_points"),
        ({"curves": [[0.5, 0.4]], "horizon": [5, 6]}, "do not fit"),
        ({"curves": [[0.5, 0.4]], "horizon": 5, "positions": [1]}, "do not fit"),
        ({"curves": [[0.5, 0.4]], "horizon": np.nan}, "finite"),
        ({"curves": [[0.5, 0.4]], "horizon": -1, "positions": [3, 4]}, "before the first"),
    ],
)
def test_input_that_does_not_fit_is_named(given, message):
    if message == "do not fit" and given.get("positions") == [1]:
        given = {**given, "positions": [[1, 2], [1, 2]]}
    with pytest.raises(ValueError, match=message):
        extrapolate(**given)


def test_levels_outside_the_open_unit_interval_are_refused():
    made = extrapolate([[0.5, 0.4]], horizon=5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        made.quantile([0.5, 1.0])


# Properties

VALUES = st.floats(-1e6, 1e6) | st.just(math.nan)


@settings(max_examples=40, deadline=None)
@given(
    arrays(float, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=VALUES),
    st.integers(1, 60),
    st.booleans(),
)
def test_quantiles_are_ordered_and_agree_with_probabilities(curves, horizon, higher):
    made = extrapolate(curves, horizon=horizon, higher_is_better=higher)
    levels = np.array([1e-4, 0.01, 0.05, 0.3, 0.5, 0.7, 0.95, 0.99, 0.9999])
    found = made.quantile(levels)
    known = np.isfinite(curves[:, :horizon]).any(axis=1)
    known |= known.any()  # the others get their peers' mixture
    assert np.isnan(found[:, ~known]).all()
    assert np.isfinite(found[:, known]).all()
    assert (np.diff(found[:, known], axis=0) >= 0).all()
    free = replace(made, bounds=FREE)
    for level, row in zip(levels[2:-2], free.quantile(levels)[2:-2], strict=True):
        chance = free.probability_better_than(row)[known]
        np.testing.assert_allclose(chance, 1 - level if higher else level, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(-2, 3), min_size=2, max_size=6), st.booleans())
def test_a_harder_goal_is_never_more_likely(seed, goals, higher):
    curves = family(6, 20, seed)[:, : 2 + seed % 15]
    made = extrapolate(1 - curves if higher else curves, horizon=20, higher_is_better=higher)
    chances = np.array([made.probability_better_than(goal) for goal in sorted(goals)])
    steps = np.diff(chances, axis=0)
    assert ((steps <= 0) if higher else (steps >= 0)).all()
    assert ((chances >= 0) & (chances <= 1)).all()


# Calibration on the search itself


def surprising(num: int, seed: int) -> np.ndarray:
    """A search that no prior expects: the curves fall to half at 60 % of the way."""
    curves = family(num, 40, seed, noise=0.01)
    rng = np.random.default_rng(seed + 1)
    drop = np.where(np.arange(40) > 24, rng.normal(0.45, 0.05, (num, 1)), 1.0)
    return curves * drop


def test_finished_trials_move_the_coverage_to_nominal():
    raw, corrected = [], []
    for seed in range(6):
        curves = surprising(90, 10 * seed)
        seen, finished, truth = curves[40:, :12], curves[:40], curves[40:, -1]
        for options, covered in (({}, raw), ({"finished": finished}, corrected)):
            low, high = extrapolate(seen, horizon=40, **options).quantile([0.05, 0.95])
            covered.append(np.mean((low <= truth) & (truth <= high)))
    assert np.mean(raw) < 0.7
    assert 0.83 < np.mean(corrected) < 0.97


def test_the_correction_shrinks_to_none_without_evidence_and_is_monotone():
    np.testing.assert_allclose(learning_curves.corrected_logits(np.empty(0)), LOGITS, atol=0.02)
    few = learning_curves.corrected_logits(np.array([6.0, 7.0]))
    assert (np.diff(few) > 0).all()
    assert few[len(few) // 2] > 0
    calibrated = np.random.default_rng(0).logistic(size=4000)
    np.testing.assert_allclose(
        learning_curves.corrected_logits(calibrated)[8:-8], LOGITS[8:-8], atol=0.25
    )
    narrow = learning_curves.corrected_logits(4 * calibrated)
    assert narrow[-10] > 2.5 * LOGITS[-10]


def test_finished_curves_with_their_own_positions_are_taken_alike():
    curves, finished = family(10, 40, 20)[:, :12], family(15, 40, 21)
    places = np.tile(np.arange(1, 41.0), (15, 1))
    tables_agree(
        extrapolate(curves, horizon=40, finished=finished),
        extrapolate(
            curves,
            horizon=np.full(10, 40),
            positions=np.tile(np.arange(1, 13.0), (10, 1)),
            finished=(finished, places),
        ),
    )


def test_finished_trials_that_never_reached_the_horizon_are_left_out():
    curves, finished = family(10, 40, 22)[:, :12], family(15, 40, 23)
    more = np.vstack([finished, np.where(np.arange(40) < 20, finished[:3], np.nan)])
    tables_agree(
        extrapolate(curves, horizon=40, finished=finished),
        extrapolate(curves, horizon=40, finished=more),
    )


# Two axes


def ladder(num: int, seed: int, noise: float = 0.002) -> np.ndarray:
    """[num, 4 rungs, 20 epochs] of errors that fall with epochs and with images."""
    rng = np.random.default_rng(seed)
    images = np.array([100, 300, 900, 2700])[None, :, None]
    floor = rng.uniform(0.02, 0.1, (num, 1, 1))
    end = floor + rng.uniform(1, 3, (num, 1, 1)) * images**-0.45
    epochs = np.arange(1, 21)[None, None]
    curves = end + (0.9 - end) * np.exp(-(epochs / rng.uniform(2, 5, (num, 1, 1))))
    return curves + noise * rng.standard_normal(curves.shape)


def test_both_axes_together_forecast_full_data_better_than_the_last_rung():
    curves = ladder(40, 0)
    truth = curves[:, 3, -1]
    seen = curves[:, :3].copy()
    seen[:, 2, 8:] = np.nan
    made = extrapolate_full(seen, sizes=[100, 300, 900], full_size=2700, horizon=20)
    error = np.abs(made.mean - truth).mean()
    assert error < 0.5 * np.abs(seen[:, 2, 7] - truth).mean()
    assert error < 0.5 * np.abs(seen[:, 1, -1] - truth).mean()
    low, high = made.quantile([0.05, 0.95])
    assert np.mean((low <= truth) & (truth <= high)) > 0.8


def test_a_ladder_that_is_complete_is_its_own_forecast():
    curves = ladder(12, 1)
    made = extrapolate_full(curves, sizes=[100, 300, 900, 2700], full_size=2700, horizon=20)
    np.testing.assert_allclose(made.mean, curves[:, 3, -1], atol=2e-3)


def test_rungs_not_begun_do_not_matter_and_accuracies_mirror_errors():
    seen = ladder(10, 2)[:, :2]
    open_ended = np.concatenate([seen, np.full((10, 1, 20), np.nan)], axis=1)
    short = extrapolate_full(seen, sizes=[100, 300], full_size=2700, horizon=20, bounds=FREE)
    long = extrapolate_full(
        open_ended, sizes=[100, 300, 900], full_size=2700, horizon=20, bounds=FREE
    )
    tables_agree(short, long)
    mirror = extrapolate_full(
        1 - seen, sizes=[100, 300], full_size=2700, horizon=20, higher_is_better=True, bounds=FREE
    )
    np.testing.assert_allclose(mirror.mean, 1 - short.mean, atol=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 rungs"):
        extrapolate_full(np.ones((3, 4, 5)), sizes=[1, 2], full_size=5, horizon=5)
    with pytest.raises(ValueError, match="increase"):
        extrapolate_full(np.ones((3, 2, 5)), sizes=[3, 2], full_size=5, horizon=5)


def test_a_pool_of_equal_tables_is_the_table_and_of_two_the_mixture():
    table = 1 + 0.2 * LOGITS
    np.testing.assert_allclose(pooled(np.stack([table] * 3)), table, atol=0.02)
    both = pooled(np.stack([table, table + 100]))
    assert np.mean(both < 50) == pytest.approx(0.5, abs=0.02)


# The prior and its fit


def test_the_shipped_prior_is_small_fits_the_features_and_says_how_good_it_is():
    prior = curve_prior.load()
    text = (Path(curve_prior.__file__).parent / "curve_prior.json").read_text()
    assert len(text) < 200_000
    one = describe(compact(np.array([[1.0, 2.0]]), np.array([[1.0, 0.5]]), np.array([4.0])))
    assert prior.names == one.names
    for source in ("taskset", "algoperf", "lcdb"):
        assert prior.sources[source]["tasks"] > 1
        for share in ("0.1", "0.2", "0.4"):
            row = prior.evidence[source][share]
            assert row["error"] > 0
            assert len(row["coverage"]) == len(prior.evidence["intervals"])


def test_a_prior_survives_its_file(tmp_path):
    prior = curve_prior.load()
    path = tmp_path / "prior.json"
    path.write_text(prior.dump())
    curves = family(10, 30, 30)[:, :8]
    tables_agree(
        extrapolate(curves, horizon=30),
        extrapolate(curves, horizon=30, prior=curve_prior.load(path)),
    )


def test_a_file_that_is_no_prior_is_named(tmp_path):
    path = tmp_path / "prior.json"
    with pytest.raises(DataError, match=r"prior\.json"):
        curve_prior.load(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="no prior"):
        curve_prior.load(path)
    plain = json.loads(curve_prior.load().dump()) | {"version": 99}
    path.write_text(json.dumps(plain))
    with pytest.raises(DataError, match="version 99"):
        curve_prior.load(path)


def small_tables(num: int = 12) -> list[CurveTable]:
    rng = np.random.default_rng(5)
    return [
        replace(simulated(rng), source="made", task=f"task {k}", judged=True) for k in range(num)
    ]


SMALL = curve_fitting.FitOptions(
    num_networks=1,
    hidden=(12, 8),
    num_examples=6000,
    num_epochs=4,
    batch_size=256,
    num_simulated=10,
    batches_per_source=60,
)


def test_gradients_match_finite_differences():
    rng = np.random.default_rng(0)
    options = replace(SMALL, hidden=(5, 4))
    network = {
        name: array.astype(np.float64) + 0.1 * rng.standard_normal(array.shape)
        for name, array in curve_fitting._initial(6, rng, options).items()
    }
    inputs, anchor = rng.standard_normal((7, 6)), rng.uniform(0, 1, 7)
    pace, target = rng.uniform(0.05, 0.3, 7), rng.uniform(-0.2, 1.2, 7)

    def loss(changed: dict[str, np.ndarray]) -> float:
        return curve_fitting.gradients(
            changed, inputs, anchor, pace, target, rng, dropout=0, clip=math.inf
        )[0]

    found = curve_fitting.gradients(
        network, inputs, anchor, pace, target, rng, dropout=0, clip=math.inf
    )[1]
    for name, array in network.items():
        for index in [tuple(rng.integers(0, s) for s in array.shape) for _ in range(6)]:
            up, down = ({n: a.copy() for n, a in network.items()} for _ in range(2))
            up[name][index] += 1e-5
            down[name][index] -= 1e-5
            slope = (loss(up) - loss(down)) / 2e-5
            assert found[name][index] == pytest.approx(slope, rel=2e-3, abs=2e-5), name


def test_a_fit_forecasts_tasks_left_out_better_than_the_last_value():
    tables = small_tables()
    held = frozenset(table.key for table in tables[:4])
    scores = curve_evaluation.judge(tables, SMALL, left_out=[held])
    scores += curve_evaluation.judge_baselines(
        tables[:4], baselines={"last value": curve_evaluation.last_value}
    )
    rows = {(row.share, row.method): row for row in curve_evaluation.summary(scores)}
    for share in (0.2, 0.4):
        assert rows[share, "llp"].log_density > rows[share, "last value"].log_density
        assert rows[share, "llp"].error < rows[share, "last value"].error


def test_a_fit_is_a_function_of_its_seed():
    tables = small_tables(3)
    options = replace(SMALL, num_examples=1000, num_epochs=1)
    first, second = (curve_fitting.fit(tables, options).dump() for _ in range(2))
    assert first == second
    assert curve_fitting.fit(tables, replace(options, seed=1)).dump() != first


def test_tasks_left_out_are_not_learnt_from():
    tables = small_tables(4)
    library = curve_fitting.Library(tables, replace(SMALL, num_simulated=0))
    held = frozenset(table.key for table in tables[1:])
    drawn = library.draw(np.random.default_rng(0), held)
    own = library.examples[tables[0].key]
    known = {row.tobytes() for row in own.features}
    assert {row.tobytes() for row in drawn.features} <= known
    with pytest.raises(DataError, match="no curve"):
        library.draw(np.random.default_rng(0), held | {tables[0].key})


def test_examples_never_show_what_comes_after_the_cut():
    """Values after the cut may be anything: the descriptions stay, only the targets move."""
    rng = np.random.default_rng(3)
    table = replace(simulated(rng), natural_unit=True)
    seen, places = table.cut(0.3)
    assert (places[np.isfinite(seen)] <= 0.3 * table.horizon[0] * (1 + 1e-9)).all()
    assert np.isfinite(seen).sum() == (table.positions <= 0.3 * table.horizon[:, None] + 1e-9).sum()
    made = make_examples(table, rng, 5)
    assert made is not None
    assert len(made) > 0
    assert np.isfinite(made.features).all()
    assert np.isfinite(made.target).all()
    assert (made.pace > 0).all()


def test_scores_are_what_they_say():
    values = np.array(
        [[1.0, 0.5, 0.25], [1.0, 0.8, 0.6], [1, 0.9, 0.1], [1, 0.3, 0.2], [1, 0.2, 0.3]]
    )
    table = CurveTable(
        "s", "t", np.tile([1.0, 2, 3], (5, 1)), values, np.full(5, 3.0), natural_unit=True
    )
    seen = curve_evaluation.cut(table, 0.7)
    assert seen is not None
    np.testing.assert_allclose(curve_evaluation.last_value(seen), values[:, 1])
    one = curve_evaluation.score(
        "flat", seen, Forecast(values[:, 1:2] + 0.01 * LOGITS), values[:, 1]
    )
    assert one.error == pytest.approx(np.abs(values[:, 1] - values[:, 2]).mean())
    assert one.spearman == pytest.approx(stats.spearmanr(values[:, 1], values[:, 2])[0])
    scale = table.scaled(np.array([0.1, 2.0]))
    np.testing.assert_allclose(scale, [0.1, 1])
    np.testing.assert_allclose(replace(table, natural_unit=False).scaled(np.array([0.55])), [0.5])


def test_the_density_of_a_score_is_the_truth_of_a_wide_forecast():
    values = np.tile(np.linspace(1, 0.2, 6), (5, 1)) + 0.01 * np.arange(5)[:, None]
    table = CurveTable(
        "s", "t", np.tile(np.arange(1.0, 7), (5, 1)), values, np.full(5, 6.0), natural_unit=True
    )
    seen = curve_evaluation.cut(table, 0.5)
    assert seen is not None
    made = Forecast(seen.truth[:, None] + 0.1 * LOGITS)
    assert curve_evaluation.score("x", seen, made).log_density == pytest.approx(
        stats.logistic.logpdf(0, scale=0.1), abs=1e-3
    )


def test_pow3_finds_the_limit_of_a_power_law():
    t = np.arange(1, 21.0)
    values = 0.1 + 0.6 * t ** -np.linspace(0.5, 1, 6)[:, None]
    table = CurveTable("s", "t", np.tile(t, (6, 1)), values, np.full(6, 20.0), natural_unit=True)
    seen = curve_evaluation.cut(table, 0.5)
    assert seen is not None
    point, fitted = curve_evaluation.pow3(seen)
    assert fitted.all()
    np.testing.assert_allclose(point, values[:, -1], atol=1e-4)


def test_curves_on_which_pow3_keeps_the_last_value_are_counted():
    """A constant curve and one of three points have no fit; the others do."""
    t = np.arange(1, 21.0)
    values = 0.1 + 0.6 * t ** -np.linspace(0.5, 1, 6)[:, None]
    values[0] = 0.4
    values[1, 3:10] = np.nan
    table = CurveTable("s", "t", np.tile(t, (6, 1)), values, np.full(6, 20.0), natural_unit=True)
    seen = curve_evaluation.cut(table, 0.5)
    assert seen is not None
    point, fitted = curve_evaluation.pow3(seen)
    assert fitted.tolist() == [False, False, True, True, True, True]
    np.testing.assert_array_equal(point[:2], curve_evaluation.last_value(seen)[:2])
    by_method = {
        row.method: row.unfitted
        for row in curve_evaluation.summary(curve_evaluation.judge_baselines([table], (0.5,)))
    }
    assert by_method == {"last value": 0.0, "pow3": pytest.approx(2 / 6)}


def test_folds_leave_every_judged_task_out_once():
    tables = [*small_tables(7), replace(small_tables(1)[0], source="other", judged=False)]
    groups = curve_evaluation.folds(tables, 3)
    assert len(groups) == 3
    assert sorted(key for group in groups for key in group) == sorted(t.key for t in tables[:7])


# The stop rule


def accuracies(name: str, errors: np.ndarray) -> LearningCurve:
    return LearningCurve(
        name,
        1,
        tuple(
            CurvePoint(1, 0.1, e, 10 * e, x, 1 - x, x, 1 - x, float(e), 0.1)
            for e, x in enumerate(errors.tolist(), start=1)
        ),
    )


def test_the_forecast_rule_stops_the_hopeless_and_rarely_what_would_be_promoted():
    rule, stopped, false_stops, promoted = CurveForecast(), 0, 0, 0
    for seed in range(8):
        curves = family(30, 20, 100 + seed, noise=0.01)
        ended = [accuracies(f"f{k}", row) for k, row in enumerate(curves[:10])]
        goal = np.sort(curves[:10, -1])[math.ceil(11 / 3) - 1]
        for k, row in enumerate(curves[10:]):
            verdict = rule.decide(
                accuracies(f"x{k}", row[:8]), num_points=20, ended=ended, keep_fraction=1 / 3
            )
            stopped += verdict.stop
            promoted += bool(row[-1] <= goal)
            false_stops += verdict.stop and bool(row[-1] <= goal)
            if verdict.stop:
                assert verdict.predicted_final is not None
                assert "probability" in verdict.detail
    assert stopped > 10
    assert false_stops <= max(1, 0.05 * promoted)


# Files and commands


def long_table(path: Path) -> None:
    lines = ["task,curve,position,value"]
    for number, table in enumerate(small_tables(4)):
        for row in range(12):
            for place, value in zip(table.positions[row], table.values[row], strict=True):
                lines.append(f"{number},{row},{place},{value}")
    path.write_text("\n".join(lines))


def test_the_commands_fit_and_evaluate_a_table(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from llp.cli import app

    monkeypatch.setattr(
        curve_fitting, "FitOptions", lambda **given: replace(SMALL, seed=given["seed"])
    )
    table, out = tmp_path / "runs.csv", tmp_path / "prior.json"
    long_table(table)
    run = CliRunner()
    fitted = run.invoke(app, ["curves", "fit", str(table), "--out", str(out), "--folds", "2"])
    assert fitted.exit_code == 0, fitted.output
    prior = curve_prior.load(out)
    assert prior.sources["runs"] == {"tasks": 4, "curves": 48}
    assert prior.evidence["runs"]["0.2"]["tasks"] == 4
    judged = run.invoke(app, ["curves", "evaluate", str(table), "--prior", str(out), "--json"])
    assert judged.exit_code == 0, judged.output
    rows = [json.loads(line) for line in judged.output.splitlines() if line.startswith("{")]
    assert {row["method"] for row in rows} == {"llp", "last value", "pow3"}


def test_a_file_of_no_known_layout_is_named(tmp_path):
    from llp.curve_files import read_tables

    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"odd\.csv: no known layout"):
        read_tables([tmp_path / "odd.csv"])
    np.savez(tmp_path / "odd.npz", a=np.ones(3))
    with pytest.raises(DataError, match="neither"):
        read_tables([tmp_path / "odd.npz"])


@pytest.fixture
def shared_curves() -> Path:
    folder = Path(__file__).resolve().parents[2] / "shared" / "curves"
    if not folder.is_dir():
        pytest.skip("tables of learning curves are not beside the checkout (../shared/curves)")
    return folder


def test_public_tables_are_read_with_their_directions_and_schedules(shared_curves):
    from llp.curve_files import read_tables

    names = ("taskset_dev.npz", "algoperf_dev_curves.parquet", "lcdb_dev.npz")
    tables = read_tables([shared_curves / name for name in names])
    by_source = {s: [t for t in tables if t.source == s] for s in ("taskset", "algoperf", "lcdb")}
    assert [len({t.task for t in part}) for part in by_source.values()] == [6, 7, 110]
    for table in tables:
        assert np.isfinite(table.finals()[table.complete()]).all()
        if table.schedule_remaining is not None:
            left = table.schedule_remaining[np.isfinite(table.values)]
            assert left.min() >= -1e-9
            assert left.max() <= 1
    for table in (t for t in by_source["algoperf"] if t.judged):
        low, high = table.scale()
        assert np.median(table.finals()) < low + 0.35 * (high - low)  # lower is better throughout


# As others may call it


def test_finished_curves_may_be_longer_than_positions_that_are_equally_spaced():
    curves, finished = family(10, 40, 20)[:, :12], family(15, 40, 21)
    plain = extrapolate(curves, horizon=40, finished=finished)
    for positions in (np.arange(1, 13), np.arange(1, 41), np.tile(np.arange(1, 13), (10, 1))):
        tables_agree(plain, extrapolate(curves, horizon=40, positions=positions, finished=finished))
    with pytest.raises(ValueError, match="as a pair"):
        extrapolate(curves, horizon=40, positions=np.arange(1, 13.0) ** 2, finished=finished)
    apart = np.arange(1, 13) * np.linspace(1, 2, 10)[:, None]
    with pytest.raises(ValueError, match="as a pair"):
        extrapolate(curves, horizon=40, positions=apart, finished=finished)
    for nothing in ([], np.empty((0, 40))):
        tables_agree(
            extrapolate(curves, horizon=40), extrapolate(curves, horizon=40, finished=nothing)
        )


def test_the_schedule_may_be_given_at_the_end_or_at_every_point():
    curves = family(10, 40, 20)[:, :12]
    left = np.linspace(0.9, 0.6, 12)
    tables_agree(
        extrapolate(curves, horizon=40, schedule_remaining=0.6),
        extrapolate(curves, horizon=40, schedule_remaining=np.tile(left, (10, 1))),
    )
    with pytest.raises(ValueError, match="schedule_remaining"):
        extrapolate(curves, horizon=40, schedule_remaining=np.zeros((3, 4)))


def test_rows_of_different_length_are_named():
    with pytest.raises(ValueError, match="NaN"):
        extrapolate([[0.5, 0.4], [0.3]], horizon=5)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e200])
def test_losses_of_any_size_are_forecast_alike(scale):
    curves = family(10, 40, 20)[:, :12]
    plain = extrapolate(curves, horizon=40)
    scaled = extrapolate(scale * curves, horizon=40)
    np.testing.assert_allclose(scaled.mean, scale * plain.mean, rtol=1e-6)
    np.testing.assert_allclose(
        scaled.probability_better_than(0.3 * scale), plain.probability_better_than(0.3), atol=1e-9
    )


def test_accuracies_in_percent_are_forecast_as_fractions_are():
    curves = 1 - family(10, 40, 20)[:, :12]
    fractions = extrapolate(curves, horizon=40, higher_is_better=True, bounds=FREE)
    percent = extrapolate(100 * curves, horizon=40, higher_is_better=True, bounds=FREE)
    np.testing.assert_allclose(percent.mean, 100 * fractions.mean, rtol=1e-6)


def test_positions_that_repeat_or_are_not_in_order_do_no_harm():
    curves = family(10, 40, 20)[:, :12]
    order = np.random.default_rng(0).permutation(12)
    places = np.arange(1, 13)
    tables_agree(
        extrapolate(curves, horizon=40, positions=places),
        extrapolate(curves[:, order], horizon=40, positions=places[order]),
    )
    for odd in (np.repeat(np.arange(1, 7), 2), np.ones(12)):
        made = extrapolate(curves, horizon=40, positions=odd)
        assert np.isfinite(made.costs).all()
        assert (np.diff(made.costs, axis=1) > 0).all()


def crossing(num: int, seed: int) -> list[LearningCurve]:
    """Curves that order at the end as they did in the middle, turned round."""
    rng = np.random.default_rng(seed)
    early = rng.uniform(0.3, 0.6, num)
    rows = np.concatenate(
        [np.linspace(0.9, 1, 5)[::-1] * early[:, None], np.tile(0.7 - early[:, None], (1, 5))], 1
    )
    return [accuracies(f"c{k}", row) for k, row in enumerate(rows)]


def test_nothing_is_stopped_while_early_ranks_say_too_little():
    bad = accuracies("bad", np.full(10, 0.95))
    cut = LearningCurve("bad", 1, bad.points[:6])
    usual = [accuracies(f"u{k}", row) for k, row in enumerate(family(12, 10, 3, noise=0.03))]
    about = {"num_points": 10, "ended": usual, "keep_fraction": 1 / 3}
    ranks = early_ranks(complete(usual, 10), 6)
    assert 0.5 < ranks < 0.99
    for demand, stops in ((0.5, True), (0.99, False)):
        assert CurveForecast(min_correlation=demand).decide(cut, **about).stop == stops


def test_early_ranks_are_spearmans_correlation():
    mixed = crossing(12, 0)
    early, final = ([1 - c.points[k].validation_accuracy for c in mixed] for k in (4, 9))
    assert early_ranks(complete(mixed, 10), 5) == pytest.approx(stats.spearmanr(early, final)[0])
    assert early_ranks(complete(mixed, 10), 5) < 0
    assert early_ranks([], 3) == 0


def test_a_narrow_miss_counts_as_reaching_what_is_needed():
    """All curves end alike: whoever is behind by less than the margin is not stopped."""
    finished = [accuracies(f"u{k}", row) for k, row in enumerate(family(9, 12, 4, noise=0.0))]
    close = accuracies("x", np.linspace(0.9, 0.5, 12))
    about = {"num_points": 12, "ended": finished, "keep_fraction": 1 / 3}
    cut = LearningCurve("x", 1, close.points[:8])
    stopped = [CurveForecast(margin=margin).decide(cut, **about).stop for margin in (0.0, 0.5)]
    assert stopped == [True, False]
