from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from llp.errors import SpecError
from llp.scoring import Roles, score, study_table
from llp.scoring.score import PRESETS, level_shift
from tests.scoring_tables import ROLES, profile, result, simulate

WEIGHTS = {"validation_accuracy": 1.0, "validation_loss": 0.5, "noise_sharpness": 0.5}


def small(num=6, seed=0):
    rng = np.random.default_rng(seed)
    accuracy = rng.uniform(0.4, 0.9, num)
    return pd.DataFrame(
        {
            "validation_accuracy": accuracy,
            "validation_loss": 1 - accuracy + rng.normal(0, 0.05, num),
            "noise_sharpness": rng.uniform(0.1, 2, num),
            "noise_sharpness_se": 0.01,
            "num_validation": 200,
        },
        index=[f"t{i:03d}" for i in range(num)],
    )


def run(table, preset, **kwargs):
    weights = WEIGHTS if preset == "weights" else None
    return score(table, roles=kwargs.pop("roles", ROLES), preset=preset, weights=weights, **kwargs)


@pytest.mark.parametrize("preset", PRESETS)
def test_contributions_sum_to_the_score_and_the_interval_holds_it(preset):
    table = simulate(0, planted=1.0, hyper=1.0) if preset == "calibrated" else small()
    roles = Roles.from_table(table) if preset == "calibrated" else ROLES
    scores = run(table, preset, roles=roles)
    frame = scores.table
    total = frame[list(scores.contributions)].sum(axis=1)
    assert total.to_numpy() == pytest.approx(frame["score"].to_numpy(), abs=1e-9)
    assert (frame["lower"] <= frame["score"]).all()
    assert (frame["upper"] >= frame["score"]).all()
    assert frame["probability_best"].sum() == pytest.approx(1.0)
    assert sorted(scores.ranking) == sorted(table.index)


def test_llp_is_accuracy_minus_alpha_times_sharpness():
    table = small()
    scores = run(table, "llp", alpha=0.3)
    expected = table["validation_accuracy"] - 0.3 * table["noise_sharpness"]
    got = scores.table["score"]
    assert got.to_numpy() == pytest.approx(expected[got.index].to_numpy())
    assert (np.diff(got) <= 0).all()


@pytest.mark.parametrize("direction", ["lower", "higher", "unknown"])
def test_llp_subtracts_sharpness_whatever_its_declared_direction(direction):
    roles = Roles(tier1={"validation_accuracy": "higher"}, tier2={"noise_sharpness": direction})
    table = small()
    got = run(table, "llp", roles=roles).table["score"]
    expected = table["validation_accuracy"] - 0.1 * table["noise_sharpness"]
    assert got.to_numpy() == pytest.approx(expected[got.index].to_numpy())


def test_llp_without_any_sharpness_is_validation_and_says_so():
    table = small().drop(columns=["noise_sharpness", "noise_sharpness_se"])
    scores = run(table, "llp", roles=Roles(tier1=ROLES.tier1))
    assert scores.preset == "validation"
    assert "No sharpness was measured" in scores.sentence


def test_rank_based_scores_ignore_monotone_transformations_of_their_columns():
    table = small(12)
    changed = table.copy()
    changed["validation_accuracy"] = changed["validation_accuracy"] ** 3
    changed["validation_loss"] = np.exp(5 * changed["validation_loss"])
    changed["noise_sharpness"] = np.log(changed["noise_sharpness"])
    before, after = run(table, "weights").table, run(changed, "weights").table
    assert list(before.index) == list(after.index)
    assert before["score"].to_numpy() == pytest.approx(after["score"].to_numpy())


def test_calibrated_ignores_monotone_transformations_of_metric_and_target():
    table = simulate(0, planted=1.0)
    changed = table.copy()
    changed["metric0"] = np.exp(changed["metric0"])
    changed["metric1"] = changed["metric1"] ** 3
    changed["verified_accuracy"] = changed["verified_accuracy"] ** 2
    changed[["metric0_se", "metric1_se"]] = 0.0
    before, after = score(table), score(changed)
    assert before.calibration.tier2_enters
    assert before.table["score"].to_dict() == pytest.approx(after.table["score"].to_dict())


@pytest.mark.parametrize("preset", PRESETS)
def test_renaming_and_reordering_trials_changes_nothing_but_the_names(preset):
    table = simulate(3, planted=1.0) if preset == "calibrated" else small(12)
    roles = Roles.from_table(table)
    shuffled = table.sample(frac=1, random_state=0).rename(index=lambda name: f"x{name}")
    before, after = run(table, preset, roles=roles), run(shuffled, preset, roles=roles)
    renamed = before.table.rename(index=lambda name: f"x{name}")
    pd.testing.assert_frame_equal(renamed, after.table)
    assert after.ties == tuple(tuple(f"x{n}" for n in group) for group in before.ties)


@pytest.mark.parametrize("preset", PRESETS)
def test_diverged_trials_rank_last_and_are_never_best(preset):
    if preset == "calibrated":
        table = simulate(1, hyper=2.0, planted=1.0, diverged=3)
        roles = Roles.from_table(table)
    else:
        table, roles = small(8), ROLES
        table.loc[["t001", "t004", "t005"], ["validation_accuracy", "validation_loss"]] = math.nan
        table.loc["t001", "noise_sharpness"] = -50.0
    scores = run(table, preset, roles=roles)
    dead = set(table.index[table["validation_accuracy"].isna()])
    assert set(scores.ranking[-3:]) == dead == set(scores.diverged)
    assert (scores.table.loc[list(dead), "probability_best"] == 0).all()
    assert (np.diff(scores.table["score"]) <= 1e-12).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_trial_of_a_higher_rung_is_never_overtaken_by_raw_accuracy(preset):
    trials = [
        result("t000", [0.5, 0.95]),
        result("t001", [0.5, 0.7], [0.6, 0.7]),
        result("t002", [0.5, 0.9]),
        result("t003", [0.5, 0.7], [0.5, 0.6]),
    ]
    profiles = [profile(f"t00{i}", noise_sharpness=v) for i, v in enumerate([0.1, 1, 1, 30.0])]
    table = study_table(trials, profiles, num_validation=100)
    scores = run(table, preset, roles=None)
    assert set(scores.ranking[:2]) == {"t001", "t003"}
    assert scores.table.loc[["t000", "t002"], "probability_best"].sum() == 0
    assert (np.diff(scores.table["score"]) < 0).all()


def test_probability_best_equals_numerical_integration_of_the_posteriors():
    table = small(3)
    table["validation_accuracy"], table["num_validation"] = [0.70, 0.74, 0.66], 100
    grid = np.linspace(0, 1, 20001)
    posteriors = [beta(100 * p + 0.5, 100 * (1 - p) + 0.5) for p in (0.70, 0.74, 0.66)]
    for i, name in enumerate(table.index):
        others = np.prod([q.cdf(grid) for j, q in enumerate(posteriors) if j != i], axis=0)
        exact = np.trapezoid(posteriors[i].pdf(grid) * others, grid)
        got = run(table, "validation").table.loc[name, "probability_best"]
        assert got == pytest.approx(exact, abs=4 * math.sqrt(0.25 / 4000))


def test_interval_of_validation_is_the_binomial_one():
    table = small(4)
    row = run(table, "validation").table.loc["t002"]
    p = table.loc["t002", "validation_accuracy"]
    low, high = beta(200 * p + 0.5, 200 * (1 - p) + 0.5).ppf([0.05, 0.95])
    assert row["lower"] == pytest.approx(low, abs=0.006)
    assert row["upper"] == pytest.approx(high, abs=0.006)


def test_ties_group_what_a_coin_toss_orders_and_separate_what_it_does_not():
    table = small(4)
    table["validation_accuracy"] = [0.90, 0.895, 0.60, 0.595]
    assert run(table, "validation").ties == (("t000", "t001"), ("t002", "t003"))
    table["validation_accuracy"] = [0.90, 0.80, 0.60, 0.50]
    assert run(table, "validation").ties == ()


def test_equal_accuracies_are_ordered_by_validation_loss():
    table = small(3)
    table["validation_accuracy"], table["validation_loss"] = 0.8, [0.5, 0.3, 0.4]
    assert run(table, "validation").ranking == ("t001", "t002", "t000")


@pytest.mark.parametrize("preset", PRESETS)
def test_one_trial_is_the_best_trial(preset):
    scores = run(small(1), preset)
    assert scores.ranking == ("t000",)
    assert scores.table["probability_best"].tolist() == [1.0]
    assert scores.ties == ()


@pytest.mark.parametrize("preset", PRESETS)
def test_when_everything_diverged_all_are_tied_and_it_is_said(preset):
    table = small(3)
    table[["validation_accuracy", "validation_loss", "noise_sharpness"]] = math.nan
    scores = run(table, preset)
    assert scores.table["probability_best"].tolist() == pytest.approx([1 / 3] * 3)
    assert scores.table["score"].nunique() == 1
    assert [sorted(group) for group in scores.ties] == [["t000", "t001", "t002"]]
    assert "No trial has a usable validation result" in scores.sentence


def test_under_12_finished_trials_calibrated_is_validation_only_and_says_so():
    table = simulate(0, finished=11, planted=2.0)
    calibrated, plain = score(table), score(table, preset="validation")
    pd.testing.assert_frame_equal(calibrated.table, plain.table)
    assert calibrated.preset == "validation"
    assert "Not enough evidence" in calibrated.sentence
    assert "11 finished trials, 12 are needed" in calibrated.sentence
    assert score(simulate(0, finished=12)).preset == "calibrated"


def test_finished_trials_of_earlier_studies_count_towards_the_12():
    table = simulate(0, finished=0, planted=1.5)
    past = [simulate(1, finished=40, planted=1.5), simulate(2, finished=40, planted=1.5)]
    scores = score(table, history=past)
    assert scores.preset == "calibrated"
    assert scores.calibration.num_studies == 2
    assert scores.calibration.tier2_enters
    assert scores.weights["metric0"] > 3 * abs(scores.weights["metric1"])


def test_unknown_validation_size_is_admitted():
    scores = run(
        small().drop(columns="num_validation"), "validation", roles=Roles(tier1=ROLES.tier1)
    )
    assert "No error is known for validation_accuracy" in scores.sentence


def test_studies_in_one_table_are_ranked_apart():
    table = pd.concat([small(4, seed=1), small(3, seed=2)])
    table["study"] = ["a"] * 4 + ["b"] * 3
    roles = Roles(tier1=ROLES.tier1, study="study", num_validation="num_validation")
    frame = run(table.reset_index(drop=True), "validation", roles=roles).table
    assert frame["probability_best"].iloc[:4].sum() == pytest.approx(1)
    assert frame["probability_best"].iloc[4:].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"preset": "calibrate"}, "did you mean 'calibrated'"),
        ({"preset": "weights", "weights": {"noise_sharpnes": 1.0}}, "mean 'noise_sharpness'"),
        ({"preset": "weights"}, "needs weights"),
        ({"roles": Roles()}, "tier1 is empty"),
    ],
)
def test_wrong_requests_are_refused_with_a_hint(kwargs, message):
    with pytest.raises(SpecError, match=message):
        score(small(), **{"roles": ROLES, **kwargs})


def test_no_trials_is_not_an_error():
    assert score(study_table([])).sentence == "There are no trials to score."


def test_level_shift_keeps_levels_apart_by_a_power_of_ten():
    raw, band = np.array([0.2, 5.0, 30.0]), np.array([0, 1, 2])
    assert level_shift(raw, band).tolist() == [0.0, -100.0, -200.0]
    assert level_shift(raw[::-1].copy(), band).tolist() == [0.0, 0.0, 0.0]


VALUES = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=32), st.sampled_from([0.0, 0.5, 1.0])
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(VALUES, VALUES, VALUES, VALUES, VALUES), min_size=1, max_size=20),
    preset=st.sampled_from(PRESETS),
    categories=st.booleans(),
)
def test_no_table_of_numbers_makes_scoring_crash(rows, preset, categories):
    columns = ["x", "validation_accuracy", "validation_loss", "noise_sharpness", "target"]
    table = pd.DataFrame(rows, columns=columns)
    if categories:
        table["x"] = table["x"].map(lambda v: "a" if v > 0 else None)
    roles = Roles(("x",), ROLES.tier1, ROLES.tier2, target="target")
    scores = run(table, preset, roles=roles)
    assert len(scores.table) == len(table)
    assert np.isfinite(scores.table["score"]).all()
    assert scores.table["probability_best"].sum() == pytest.approx(1.0)


def test_missing_primary_signals_beside_others_are_counted_and_said():
    table = small(8)
    table.loc[["t001", "t004"], "validation_accuracy"] = math.nan
    table.loc["t005", ["validation_accuracy", "validation_loss"]] = math.nan
    table.loc["t006", "validation_accuracy"] = -math.inf
    scores = run(table, "validation")
    words = "{} without validation_accuracy but with other signals {} as diverged and {} last."
    assert words.format("2 trials", "count", "rank") in scores.sentence
    assert scores.diverged == {"t001", "t004", "t005", "t006"}
    table.loc["t001"] = math.nan
    said = run(table, "validation").sentence
    assert words.format("1 trial", "counts", "ranks") in said
    table.loc["t004"] = math.nan
    assert "other signals" not in run(table, "validation").sentence


def test_a_missing_primary_signal_is_made_up_for_by_the_others_with_a_wider_interval():
    table = simulate(0, rows=60, finished=0, noise=0.2)
    best, worst = (table["validation_loss"].sort_values().index[k] for k in (2, -3))
    full = score(table, preset="validation")
    known = full.table
    table.loc[[best, worst], "validation_accuracy"] = math.nan
    scores = score(table, preset="validation")
    assert "2 trials without validation_accuracy are placed by their other signals" in (
        scores.sentence
    )
    assert not scores.diverged
    rank = scores.ranks["rank"]
    assert rank[best] <= 15
    assert rank[worst] >= 45
    for name in (best, worst):
        width = scores.table.loc[name, "upper"] - scores.table.loc[name, "lower"]
        assert width > known.loc[name, "upper"] - known.loc[name, "lower"]
    table.loc[best, ["validation_loss", "validation_accuracy_last3", "train_loss"]] = math.nan
    table.loc[best, "train_accuracy"] = math.nan
    assert score(table, preset="validation").diverged == {best}


TAKEN = ("score", "lower", "upper", "probability_best", "result", "hyperparameters", "level")


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("preset", ["calibrated", "validation"])
def test_a_signal_with_a_name_of_the_output_gets_the_scores_of_any_other_name(name, preset):
    table = simulate(0, rows=40, finished=15, hyper=1.0, planted=1.0).rename(
        columns={"verified_accuracy": "final", "validation_accuracy": "val", "metric0": "sharp"}
    )
    tables = {"val": table, name: table.rename(columns={"val": name})}
    before, after = (
        score(
            columns,
            roles=Roles(
                ("learning_rate",),
                {signal: "higher", "validation_loss": "lower"},
                {"sharp": "lower"},
                target="final",
            ),
            preset=preset,
        )
        for signal, columns in tables.items()
    )
    changed = after.table.rename(columns={f"tier1.{name}": "val"})
    pd.testing.assert_frame_equal(changed, before.table)
    assert f"tier1.{name}" in after.contributions
    total = after.table[list(after.contributions)].sum(axis=1)
    assert total.to_numpy() == pytest.approx(after.table["score"].to_numpy(), abs=1e-9)


def test_tier2_with_a_name_of_the_output_keeps_its_scores_and_given_weights():
    table = small(12)
    before = run(table, "weights").table
    roles = Roles(tier1=ROLES.tier1, tier2={"level": "lower", "tier2.level": "lower"})
    renamed = table.rename(columns={"noise_sharpness": "level"})
    renamed["tier2.level"] = 0.0
    weights = {"validation_accuracy": 1.0, "validation_loss": 0.5, "level": 0.5}
    after = score(renamed, roles=roles, preset="weights", weights=weights).table
    assert after["score"].to_dict() == pytest.approx(before["score"].to_dict())
    assert "tier2.tier2.level" in after.columns
