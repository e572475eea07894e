"""Plot data against numbers worked out by hand on a study of six trials."""

from __future__ import annotations

import dataclasses
import itertools
import math
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from llp.records import (
    AblationRow,
    Cost,
    CurvePoint,
    Decision,
    FlatnessProfile,
    GeneralizationScore,
    Interval,
    LearningCurve,
    Measurement,
    Outcome,
    Rung,
    ScoreReport,
    SearchResult,
    Trial,
    TrialResult,
    Verification,
)
from llp.reporting import formats, study
from llp.reporting.figures import cost, flatness, importance, ladder, ranks, scores, space
from llp.reporting.html import study_page

RUNGS = (Rung(1, 0.1, 100, 2), Rung(2, 1.0, 1000, 2))
SPACE = {
    "learning_rate": {"type": "loguniform", "low": 0.001, "high": 1.0},
    "depth": {"type": "integer", "low": 1, "high": 5},
    "optimizer": {"type": "choice", "values": ["sgd", "adamw"]},
    "momentum": {"type": "uniform", "low": 0.0, "high": 1.0, "when": {"optimizer": "sgd"}},
    "epsilon": {"type": "fixed", "value": 0.1},
}


def curve(trial_id: str, rung: Rung, accuracies: list[float]) -> LearningCurve:
    points = tuple(
        CurvePoint(
            rung=rung.rung,
            data_fraction=rung.data_fraction,
            epoch=epoch,
            samples_seen=epoch * rung.num_examples,
            train_loss=1.0,
            train_accuracy=accuracy,
            validation_loss=1 - accuracy,
            validation_accuracy=accuracy,
            seconds=float(epoch),
        )
        for epoch, accuracy in enumerate(accuracies, start=1)
    )
    return LearningCurve(trial_id, rung.rung, points)


def trial(
    number: int,
    first: list[float],
    second: list[float] | None = None,
    *,
    outcome: Outcome = "completed",
    stopped_by: str = "",
    **hyperparameters: Any,
) -> TrialResult:
    trial_id = f"t{number:03d}"
    curves = [curve(trial_id, RUNGS[0], first)]
    if second is not None:
        curves.append(curve(trial_id, RUNGS[1], second))
    values = {
        "learning_rate": 10.0 ** -(number % 4),
        "depth": 1 + number % 5,
        "optimizer": "adamw",
        "epsilon": 0.1,
    }
    return TrialResult(
        Trial(trial_id, {**values, **hyperparameters}, seed=number),
        tuple(curves),
        outcome,
        stopped_by,
        failure="boom" if outcome in study.FAILURES else "",
        samples_seen=sum(c.points[-1].samples_seen for c in curves if c.points),
        seconds=1.0,
    )


@pytest.fixture
def result() -> SearchResult:
    trials = (
        trial(0, [0.5, 0.6], [0.7, 0.8], optimizer="sgd", momentum=0.9),
        trial(1, [0.5, 0.7], [0.7, 0.9]),
        trial(2, [0.4, 0.5], stopped_by="rung 1"),
        trial(3, [0.2], outcome="stopped", stopped_by="power_law"),
        trial(4, [0.1, math.nan], outcome="diverged"),
        trial(5, [0.55, 0.65], [0.6, 0.7]),
    )
    return SearchResult(
        study_id="hand-made",
        spec_digest="0" * 64,
        spec={"seed": 3, "search_space": SPACE},
        status="finished",
        rungs=RUNGS,
        trials=trials,
        decisions=tuple(Decision("promote", t, 2) for t in ("t000", "t001", "t005")),
        profiles=(
            FlatnessProfile(
                "t000",
                (
                    Measurement("sam_sharpness", 0.2, 0.02, False, 64, 1.0),
                    Measurement("hessian_trace", math.nan, math.nan, None, 64, 2.0, "no luck"),
                ),
                seconds=3.5,
            ),
            FlatnessProfile(
                "t001", (Measurement("sam_sharpness", 0.1, 0.02, False, 64, 1.0),), seconds=1.5
            ),
        ),
        score_report=ScoreReport(
            preset="calibrated",
            scores=(
                GeneralizationScore("t001", 1.5, Interval(1, 2), {"T1": 1.0, "T2": 0.5}, 0.8, "c"),
                GeneralizationScore("t000", 0.5, Interval(0, 1), {"T1": 0.5}, 0.2, "c"),
            ),
            weights={"T1": 1.0},
            sentence="No.",
            ablation=(AblationRow("T1", 0.5, Interval(0.1, 0.9), 1.0, 0.0, 600, 6),),
            ties=(("t001", "t000"),),
        ),
        verifications=tuple(
            Verification(t, seed, accuracy, 0.3, accuracy, 0.3, 400, 5000, 9.0)
            for t, seed, accuracy in (
                ("t001", 8, 0.92),
                ("t001", 7, 0.88),
                ("t000", 7, 0.80),
                ("t000", 8, 0.82),
            )
        ),
        winner="t001",
        winner_reason="highest mean",
        cost=Cost(tier1=6_900, tier2=100, verification=3_000, full_search=30_000),
        environment={},
        started=0.0,
        finished=1.0,
    )


def by(frame: Any, key: str, value: object) -> dict[str, Any]:
    """The only row of `frame` whose `key` is `value`."""
    rows = [row for row in frame.to_dict("records") if row[key] == value]
    assert len(rows) == 1
    return rows[0]


def test_states_tell_who_got_how_far(result: SearchResult) -> None:
    states = study.states(result)
    assert [states[f"t00{i}", 1] for i in range(6)] == [
        "promoted",
        "promoted",
        "finished",
        "stopped",
        "diverged",
        "promoted",
    ]
    assert {key: value for key, value in states.items() if key[1] == 2} == {
        ("t000", 2): "finished",
        ("t001", 2): "finished",
        ("t005", 2): "finished",
    }


def test_a_promotion_not_yet_begun_counts_and_a_short_curve_is_unfinished(
    result: SearchResult,
) -> None:
    running = dataclasses.replace(
        result,
        trials=(trial(0, [0.5, 0.6]), trial(1, [0.5])),
        decisions=(Decision("promote", "t000", 2),),
    )
    assert study.states(running) == {("t000", 1): "promoted", ("t001", 1): "unfinished"}


def test_ladder_counts_add_up_to_the_started(result: SearchResult) -> None:
    data = ladder.ladder_data(result)
    assert data["started"].tolist() == [6, 3]
    assert data["promoted"].tolist() == [3, 0]
    assert data["finished"].tolist() == [1, 3]
    assert (data["stopped"] + data["diverged"]).tolist() == [2, 0]
    # rung 1: four trials of 2 x 100, one stopped after 100, one diverged after 200
    assert data["samples_seen"].tolist() == [4 * 200 + 100 + 200, 3 * 2000]
    assert data[list(study.STATES)].sum(axis=1).tolist() == data["started"].tolist()


def test_cost_shares_and_sentence(result: SearchResult) -> None:
    data = cost.cost_data(result)
    assert by(data, "part", "total")["samples_seen"] == 10_000
    assert by(data, "part", "tier1")["share"] == pytest.approx(0.23)
    assert "3.0 times as many" in cost.cost_reading(data)
    dear = dataclasses.replace(result, cost=Cost(6_000, 0, 0, 3_000))
    assert "2.0 times as much" in cost.cost_reading(cost.cost_data(dear))


def test_savings_are_full_training_minus_spent(result: SearchResult) -> None:
    data = cost.savings_data(result)
    assert data["num_trials"].sum() == 6
    full = 30_000 / 6
    assert by(data, "reason", "not promoted from rung 1")["saved"] == full - 200
    assert by(data, "reason", "stopped by power_law")["saved"] == full - 100
    top = by(data, "reason", "reached the top, or still open")
    assert (top["num_trials"], top["saved"]) == (3, 3 * (full - 2200))


def test_curves_keep_first_and_last_point_when_thinned(result: SearchResult) -> None:
    long = [0.3 + 0.001 * i for i in range(301)]
    data = ladder.curves_data(dataclasses.replace(result, trials=(trial(0, long),)))
    assert len(data) == ladder.MAX_POINTS
    assert data["epoch"].iloc[[0, -1]].tolist() == [1, 301]
    assert data["epoch"].is_monotonic_increasing
    assert data["epoch"].is_unique


def test_curve_summary_is_first_best_last(result: SearchResult) -> None:
    changed = dataclasses.replace(result, trials=(trial(0, [0.3, 0.9, 0.6]),))
    row = ladder.curve_summary(ladder.curves_data(changed)).to_dict("records")[0]
    assert (row["first"], row["best"], row["last"], row["epochs"]) == (0.3, 0.9, 0.6, 3)


def test_kendall_matches_counting_pairs() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]  # 5 concordant pairs, 1 discordant
    assert ranks.kendall(x, y)[0] == pytest.approx(4 / 6)
    assert all(math.isnan(v) for v in ranks.kendall([1.0, 2.0], [1.0, 2.0]))
    assert math.isnan(ranks.kendall([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])[0])


def test_kendall_interval_equals_resampling_with_scipy() -> None:
    generator = np.random.default_rng(5)
    x = generator.normal(size=12)
    y = x + generator.normal(size=12)
    tau, low, high = ranks.kendall(x.tolist(), y.tolist())
    index = np.random.default_rng(0).integers(0, 12, size=(1000, 12))
    draws = [kendalltau(x[i], y[i]).statistic for i in index]
    expected = np.nanquantile(draws, [0.05, 0.95])
    assert [low, high] == pytest.approx(expected.tolist(), abs=1e-12)
    assert low < tau < high


def test_rank_agreement_compares_only_shared_trials(result: SearchResult) -> None:
    data = ranks.rank_agreement_data(result)
    row = by(data[data["lower"] == "rung 1"], "higher", "rung 2")
    # rung 1: .60 .70 .65; rung 2: .80 .90 .70 -> pairs (+, -, +)
    assert row["num_trials"] == 3
    assert row["tau"] == pytest.approx(1 / 3)
    assert by(data[data["lower"] == "rung 2"], "higher", ranks.VERIFIED)["num_trials"] == 2
    assert "too few" in ranks.rank_agreement_reading(data)


def test_weak_rank_agreement_is_called_weak() -> None:
    assert "weak" in ranks.rank_agreement_reading(_agreement(tau=0.3, low=0.0, high=0.6))
    assert "usable" in ranks.rank_agreement_reading(_agreement(tau=0.8, low=0.6, high=0.9))


def _agreement(**values: float) -> Any:
    return pd.DataFrame([{"lower": "rung 1", "higher": "rung 2", "num_trials": 30, **values}])


def test_axes_follow_the_spec_and_drop_fixed_values(result: SearchResult) -> None:
    found = {axis.name: axis for axis in study.axes(result)}
    assert list(found) == ["learning_rate", "depth", "optimizer", "momentum"]
    assert found["learning_rate"].log
    assert found["learning_rate"].position(0.001) == pytest.approx(0.0)
    assert found["learning_rate"].position(10**-1.5) == pytest.approx(0.5)
    assert found["depth"].position(3) == pytest.approx(0.5)
    assert found["optimizer"].position("adamw") == pytest.approx(0.75)
    assert math.isnan(found["momentum"].position(None))


def test_axes_of_an_unknown_spec_come_from_the_values(result: SearchResult) -> None:
    bare = dataclasses.replace(result, spec={})
    found = {axis.name: axis for axis in study.axes(bare)}
    assert found["learning_rate"].low == 0.001
    assert found["optimizer"].categories == ("sgd", "adamw")
    assert "epsilon" not in found  # one value only


def test_space_compares_on_the_rung_most_trials_ran_on(result: SearchResult) -> None:
    data = space.space_data(result)
    assert data.rung == 1
    row = by(data.frame, "trial_id", "t001")
    assert (row["accuracy"], row["reached"], row["group"]) == (0.7, 2, "winner")
    diverged = by(data.frame, "trial_id", "t004")
    assert math.isnan(diverged["accuracy"])
    assert diverged["group"] == "failed"


def test_space_of_a_study_without_early_stopping_is_the_top_rung(result: SearchResult) -> None:
    fifo = tuple(
        dataclasses.replace(t, curves=(curve(t.trial.trial_id, RUNGS[1], [0.5, 0.6]),))
        for t in result.trials
    )
    assert space.space_data(dataclasses.replace(result, trials=fifo)).rung == 2


def test_importance_finds_the_hyperparameter_that_matters(result: SearchResult) -> None:
    generator = np.random.default_rng(2)
    trials = []
    for number in range(40):
        rate = float(10 ** generator.uniform(-3, 0))
        accuracy = 0.9 - 0.2 * abs(math.log10(rate) + 1.5)
        trials.append(trial(number, [0.1, accuracy], learning_rate=rate))
    data = importance.importance_data(
        space.space_data(dataclasses.replace(result, trials=tuple(trials), winner=None))
    )
    first = data.frame.iloc[0]
    assert first["name"] == "learning_rate"
    assert first["importance"] > 0.5
    assert data.held_out > 0.7
    assert data.frame["importance"].iloc[1:].max() < 0.2
    assert importance.importance_reading(data).startswith("learning_rate mattered most (")


def test_importance_of_noise_says_read_nothing(result: SearchResult) -> None:
    generator = np.random.default_rng(4)
    trials = tuple(
        trial(n, [0.1, float(generator.uniform())], learning_rate=float(10 ** -generator.uniform()))
        for n in range(30)
    )
    data = importance.importance_data(
        space.space_data(dataclasses.replace(result, trials=trials, winner=None))
    )
    assert data.held_out < 0.1
    assert "read nothing" in importance.importance_reading(data)


def test_importance_of_few_trials_is_not_computed(result: SearchResult) -> None:
    data = importance.importance_data(space.space_data(result))
    assert math.isnan(data.held_out)
    assert data.frame["importance"].isna().all()
    assert "at least 12" in importance.importance_reading(data)


def test_flatness_pairs_a_metric_with_the_accuracy_of_the_same_weights(
    result: SearchResult,
) -> None:
    data = flatness.flatness_data(result)
    row = by(data[data["metric"] == "sam_sharpness"], "trial_id", "t000")
    assert (row["rung"], row["validation_accuracy"], row["standard_error"]) == (2, 0.8, 0.02)
    summary = flatness.flatness_summary(data)
    sharp = by(summary, "metric", "sam_sharpness")
    assert (sharp["num_trials"], sharp["failed"], sharp["seconds"]) == (2, 0, 2.0)
    assert sharp["relative_error"] == pytest.approx((0.02 / 0.2 + 0.02 / 0.1) / 2)
    assert by(summary, "metric", "hessian_trace")["failed"] == 1
    assert "too few" in flatness.flatness_reading(data, result.profiles)


def test_scores_keep_the_order_and_the_terms(result: SearchResult) -> None:
    data = scores.scores_data(result)
    assert data["trial_id"].tolist() == ["t001", "t000"]
    assert data["tie"].tolist() == [1, 1]
    assert scores.terms(data) == ["T1", "T2"]
    reading = scores.scores_reading(data)
    assert "t001 scores highest" in reading
    assert "cannot be told apart from t000" in reading


def test_contributions_sum_to_the_difference_from_the_mean(result: SearchResult) -> None:
    data = scores.contributions_data(scores.scores_data(result))
    assert data["difference"].tolist() == pytest.approx([0.5, -0.5])
    assert (data["term T1"] + data["term T2"]).tolist() == pytest.approx([0.5, -0.5])
    assert data["term T2"].tolist() == pytest.approx([0.25, -0.25])  # absent counts as 0


def test_ablation_rows_are_taken_over(result: SearchResult) -> None:
    assert result.score_report is not None
    row = scores.ablation_data(result.score_report.ablation).to_dict("records")[0]
    assert row == {
        "name": "T1",
        "tau": 0.5,
        "low": 0.1,
        "high": 0.9,
        "regret_at_1": 1.0,
        "regret_at_5": 0.0,
        "samples_seen": 600,
        "num_trials": 6,
    }


def test_verified_means_and_standard_errors(result: SearchResult) -> None:
    first, second = study.verified(result)
    assert first.trial_id == "t001"
    assert first.accuracies == (0.88, 0.92)
    assert first.mean == pytest.approx(mean([0.88, 0.92]))
    # sample deviation of two values is |a - b| / sqrt(2); over sqrt(2) again
    assert first.standard_error == pytest.approx(0.02)
    low, high = first.sampling_interval
    assert low < 0.9 < high
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(0.9 * 0.1 / 400), rel=0.01)
    assert second.mean == pytest.approx(0.81)
    sentence = scores.margin_sentence((first, second))
    assert "9.00 ± 2.24 points" in sentence
    assert "more than two standard errors" in sentence


def test_a_perfect_test_accuracy_is_not_certain(result: SearchResult) -> None:
    perfect = study.Verified("t001", (1.0,), 1.0, math.nan, 50)
    low, high = perfect.sampling_interval
    assert high == pytest.approx(1.0)
    # At the end of a score interval the observed share lies 1.96 standard errors away.
    assert 1.0 - low == pytest.approx(1.959964 * (low * (1 - low) / 50) ** 0.5)
    for end in study.wilson_interval(0.3, 40):
        assert abs(0.3 - end) == pytest.approx(1.959964 * (end * (1 - end) / 40) ** 0.5)
    assert all(map(math.isnan, study.wilson_interval(0.5, 0)))
    chosen = dataclasses.replace(
        result,
        verifications=tuple(
            dataclasses.replace(v, test_accuracy=1.0, num_test_examples=50)
            for v in result.verifications
        ),
    )
    page = study_page(chosen).replace(formats.NBSP, " ")
    assert "50 images alone leave 92.9 % to 100.0 % open" in page


def test_margin_with_one_seed_claims_no_error(result: SearchResult) -> None:
    single = dataclasses.replace(
        result, verifications=tuple(v for v in result.verifications if v.seed == 7)
    )
    assert "single seed" in scores.margin_sentence(study.verified(single))
    assert "Nothing has been verified" in scores.margin_sentence(())
    assert "no runner-up" in scores.margin_sentence(study.verified(single)[:1])


def test_leader_is_the_best_on_the_highest_rung(result: SearchResult) -> None:
    found = study.leader(result)
    assert found is not None
    assert found.trial.trial_id == "t001"
    only_failed = dataclasses.replace(
        result, trials=tuple(t for t in result.trials if t.outcome == "diverged")
    )
    assert study.leader(only_failed) is None


def test_every_figure_is_made_of_its_data_alone(result: SearchResult) -> None:
    placed = space.space_data(result)
    rated = scores.scores_data(result)
    assert result.score_report is not None
    drawn = [
        cost.cost_figure(cost.cost_data(result)),
        ladder.ladder_figure(ladder.ladder_data(result)),
        *ladder.curves_figures(ladder.curves_data(result)),
        *ranks.rank_agreement_figures(ranks.accuracies_by_stage(result)),
        space.parallel_figure(placed),
        *space.slice_figures(placed),
        importance.importance_figure(importance.importance_data(placed)),
        *flatness.flatness_figures(flatness.flatness_data(result), result.winner),
        scores.scores_figure(rated, result.winner),
        scores.contributions_figure(scores.contributions_data(rated)),
        scores.ablation_figure(scores.ablation_data(result.score_report.ablation)),
        scores.verification_figure(study.verified(result)),
    ]
    assert len(drawn) == 15
    assert all(svg.startswith("<svg ") and svg.endswith("</svg>") for svg in drawn)
    for first, second in itertools.combinations(drawn, 2):
        assert first != second
