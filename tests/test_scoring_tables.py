"""Any table is scored: no crash, no NaN, no certainty that is not there."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llp.errors import SpecError
from llp.scoring import Roles, calibrate, score, verification_set
from tests.scoring_tables import simulate

COLUMNS = (
    "numbers",
    "few",
    "wide",
    "constant",
    "text",
    "words",
    "flags",
    "missing",
    "wild",
    "mixed",
    "broken",
)


def column(kind, num, rng):
    """One column of a kind that tables in the wild have."""
    words = np.array(["sgd", "adamw", "lion"])
    return {
        "numbers": lambda: rng.normal(size=num),
        "few": lambda: rng.choice([16, 32, 64], num),
        "wide": lambda: 10 ** rng.uniform(-6, 2, num),
        "constant": lambda: np.full(num, 3.0),
        "text": lambda: np.array([f"run-{i}" for i in range(num)], dtype=object),
        "words": lambda: words[rng.integers(0, 3, num)],
        "flags": lambda: rng.random(num) < 0.5,
        "missing": lambda: np.where(rng.random(num) < 0.6, np.nan, rng.normal(size=num)),
        "wild": lambda: rng.choice([np.inf, -np.inf, np.nan, 1e300, -1e300, 0.0, 1.0], num),
        "mixed": lambda: np.array(
            [[None, "NA", 1, "2.5", "", True, np.nan][k] for k in rng.integers(0, 7, num)] + [None],
            dtype=object,
        )[:num],
        "broken": lambda: np.array(
            [[None, "a", 1, 2.5, [1], True, np.nan][k] for k in rng.integers(0, 7, num)] + [None],
            dtype=object,
        )[:num],
    }[kind]()


@st.composite
def tables(draw):
    num = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    kinds = st.lists(st.sampled_from(COLUMNS), max_size=4)
    hyper, first, second = draw(kinds), draw(kinds), draw(kinds)
    signals = [*first, draw(st.sampled_from(COLUMNS))]
    table, roles = {}, {"hyperparameters": [], "tier1": {}, "tier2": {}, "target": "target"}
    for k, kind in enumerate(hyper):
        name = f"h{k}" if k else draw(st.sampled_from(["learning_rate", "h0"]))
        table[name] = column(kind, num, rng)
        roles["hyperparameters"].append(name)
    for k, kind in enumerate(signals):
        name = draw(st.sampled_from(["validation_accuracy", "val_loss", "train_acc"])) + str(k)
        table[name] = column(kind, num, rng)
        roles["tier1"][name] = draw(st.sampled_from(["higher", "lower"]))
    for k, kind in enumerate(second):
        table[f"m{k}"] = column(kind, num, rng)
        roles["tier2"][f"m{k}"] = draw(st.sampled_from(["higher", "lower", "unknown"]))
    target = column(draw(st.sampled_from(COLUMNS)), num, rng)
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    table["target"] = pd.Series(target, dtype=object).where(rng.random(num) < share, None)
    if draw(st.booleans()):
        roles["study"] = "dataset"
        table["dataset"] = rng.choice(np.array(["a", "b", None], dtype=object), num)
    index = rng.integers(0, num, num) if draw(st.booleans()) else np.arange(num)
    return pd.DataFrame(table, index=index), Roles.from_mapping(roles)


def refused(values):
    """Whether a value is there that is no number and does not say that it is missing."""

    def wrong(value):
        try:
            float(value)
        except (TypeError, ValueError):
            return str(value) not in ("NA", "")
        return False

    return any(wrong(value) for value in values[values.notna()])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(tables())
def test_any_table_is_scored_without_a_crash_a_nan_or_invented_certainty(drawn):
    table, roles = drawn
    if any(refused(table[name]) for name in [*roles.tier1, *roles.tier2, roles.target]):
        for use in (score, calibrate):
            with pytest.raises(SpecError, match="which is no number"):
                use(table, roles=roles)
        return
    scores = score(table, roles=roles)
    frame = scores.table
    assert sorted(frame.index) == sorted(table.index)
    assert np.isfinite(frame.to_numpy(dtype=float)).all()
    assert (frame["lower"] <= frame["score"] + 1e-9).all()
    assert (frame["score"] <= frame["upper"] + 1e-9).all()
    assert frame["probability_best"].between(0, 1 + 1e-9).all()
    studies = table["dataset"].fillna("").nunique() if roles.study else 1
    assert frame["probability_best"].sum() == pytest.approx(studies)
    contributions = frame[list(scores.contributions)].sum(axis=1)
    assert contributions.to_numpy() == pytest.approx(frame["score"].to_numpy(), rel=1e-6, abs=1e-6)
    calibration = calibrate(table, roles=roles)
    assert json.loads(calibration.to_json())["num_finished"] == calibration.num_finished
    if not calibration.enough:
        assert "Not enough evidence" in scores.sentence
        assert scores.preset == "validation"


@pytest.mark.parametrize("rows", [1, 2, 12, 13])
def test_identical_trials_have_identical_chances(rows):
    table = simulate(0, rows=12, finished=0, metrics=1)
    same = pd.concat([table.iloc[[0]]] * rows)
    chances = score(same).table["probability_best"]
    assert chances.to_numpy() == pytest.approx(np.full(rows, 1 / rows), abs=0.05)


def test_5000_rows_are_scored_in_the_order_of_a_sample_of_them():
    """A large table keeps the model of a small one: the common rows rank alike."""
    large = simulate(0, rows=5000, finished=40, hyper=1.0)
    few = large.iloc[:400]
    a, b = score(large).table["score"], score(few).table["score"]
    assert a.loc[few.index].corr(b.loc[few.index], method="spearman") > 0.95


def test_score_takes_history_without_columns_that_it_lacks():
    past = simulate(1, rows=60, finished=60, hyper=1.5)
    past = past.drop(columns=["weight_decay", "metric1", "metric1_se", "num_validation"])
    table = simulate(2, rows=60, finished=0, hyper=1.5)
    roles = Roles.from_table(table)
    scores = score(table.drop(columns="verified_accuracy"), roles=roles, history=[past])
    assert scores.preset == "calibrated"
    assert scores.calibration.num_studies == 1


def test_what_was_learnt_on_another_data_set_improves_the_ranking_of_a_new_one():
    gains = []
    for seed in range(4):
        past = simulate(seed, rows=150, finished=150, hyper=1.5, noise=1.0)
        table = simulate(100 + seed, rows=150, finished=150, hyper=1.5, noise=1.0)
        truth = table["verified_accuracy"].copy()
        table["verified_accuracy"] = math.nan
        scored = score(table, roles=Roles.from_table(table), history=past).table["score"]
        plain = table["validation_accuracy"].corr(truth, method="kendall")
        gains.append(scored.loc[truth.index].corr(truth, method="kendall") - plain)
    assert min(gains) > 0.03


def test_verification_set_is_the_smallest_that_reaches_the_probability():
    scores = score(simulate(0, rows=20, finished=0))
    chances = scores.table["probability_best"].sort_values(ascending=False)
    for wanted in (0.3, 0.8, 0.95):
        chosen = verification_set(scores, wanted)
        assert scores.table.loc[list(chosen), "probability_best"].sum() >= wanted - 1e-9
        assert chances.iloc[: len(chosen) - 1].sum() < wanted
        places = [scores.ranking.index(name) for name in chosen]
        assert places == sorted(places)


def test_rank_intervals_hold_the_rank_and_are_ranks():
    scores = score(simulate(0, rows=30, finished=20, hyper=1.0))
    ranks = scores.ranks
    assert list(ranks.index) == list(scores.table.index)
    assert ranks["rank"].tolist() == list(range(1, 31))
    assert ranks["lower"].between(1, 30).all()
    assert (ranks["lower"] <= ranks["upper"]).all()
    assert (ranks["upper"] - ranks["lower"]).mean() > 2


def test_intervals_of_the_score_cover_the_results_of_full_training():
    """Results on the scale of the score: normal scores among all trials of the study."""
    inside, width = [], []
    for seed in range(8):
        table = simulate(seed, rows=120, finished=120, hyper=1.0)
        truth = table["verified_accuracy"].copy()
        rng = np.random.default_rng(seed)
        hidden = table.index[rng.permutation(120)[:90]]
        table.loc[hidden, "verified_accuracy"] = math.nan
        frame = score(table).table.loc[hidden]
        place = (truth.rank() - 0.375) / 120.25
        result = pd.Series(pd.Series(place).map(_quantile), index=truth.index).loc[hidden]
        inside.append(result.between(frame["lower"], frame["upper"]).mean())
        width.append((frame["upper"] - frame["lower"]).mean())
    assert 0.8 < np.mean(inside) < 0.99
    assert np.mean(width) < 3.3  # 90 % of a standard normal are 3.29 wide


def test_finished_trials_are_drawn_towards_their_results_and_others_are_not():
    table = simulate(0, rows=60, finished=40, hyper=1.0)
    before = score(table)
    worst = before.table.index[before.table.index.isin(table.index[:40])][-1]
    table.loc[worst, "verified_accuracy"] = 1.0
    after = score(table)
    assert after.table.loc[worst, "result"] > 0.5
    assert after.ranking.index(worst) < before.ranking.index(worst) - 10
    assert (after.table.loc[table.index[40:], "result"] == 0).all()


def _quantile(share):
    from scipy.stats import norm

    return norm.ppf(share)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"tier1": {"val": "up"}}, "tier1.val: .*direction.*up"),
        ({"tier1": ["val"]}, "tier1: is a mapping"),
        ({"hyperparameters": "lr", "tier1": {"val": "higher"}}, "hyperparameters: is a list"),
        ({"tier1": {"val": "higher"}, "targets": "y"}, "targets"),
        ({"tier1": {"val": "higher"}, "target": ["y"]}, "target: is the name of one column"),
        ({"tier1": {"val": "unknown"}}, "tier1.val"),
        (
            {"tier1": {"val": "higher"}, "target": "val"},
            "target: the column 'val' has two roles, tier1 and target",
        ),
        (
            {"hyperparameters": ["lr"], "tier1": {"val": "higher"}, "tier2": {"lr": "lower"}},
            "tier2.lr: the column 'lr' has two roles, hyperparameters and tier2",
        ),
        (
            {"hyperparameters": ["lr", "lr"], "tier1": {"val": "higher"}},
            "hyperparameters: the column 'lr' is listed twice",
        ),
    ],
)
def test_wrong_roles_are_refused_with_their_path(data, words):
    with pytest.raises(SpecError, match=words):
        Roles.from_mapping(data)


def test_two_roles_are_refused_however_the_roles_were_made():
    table = simulate(0)
    roles = Roles(("learning_rate",), {"validation_accuracy": "higher"}, target="learning_rate")
    with pytest.raises(SpecError, match="hyperparameters and target"):
        score(table, roles=roles)
    with pytest.raises(SpecError, match="tier1 and target"):
        calibrate(table, target="validation_accuracy")


def test_roles_may_be_plain_data():
    table = simulate(0, rows=20, finished=14)
    roles = Roles.from_table(table)
    pd.testing.assert_frame_equal(
        score(table, roles=roles.to_plain()).table, score(table, roles=roles).table
    )
    assert calibrate(table, roles=roles.to_plain()) == calibrate(table, roles=roles)
    with pytest.raises(SpecError, match="tier_1"):
        score(table, roles={"tier_1": {}})


@pytest.mark.parametrize(
    ("column", "role"),
    [("validation_loss", "tier1"), ("metric0", "tier2"), ("verified_accuracy", "target")],
)
def test_text_where_numbers_are_needed_is_refused_and_numbers_as_text_are_not(column, role):
    table = simulate(0, rows=20, finished=14)
    roles = Roles.from_table(table)
    for rows, first in ((slice(None), "1 .'t000'"), (slice(7, 9), "8 .'t007'")):
        mixed = table.astype({column: object})
        mixed.iloc[rows, mixed.columns.get_loc(column)] = "good"
        wrong = f"'{column}' .{role}. has 'good' in row {first}., which is no number"
        for use in (score, calibrate):
            with pytest.raises(SpecError, match=wrong):
                use(mixed, roles=roles)
    text = table[column].map(repr)
    scored = score(table.assign(**{column: text}), roles=roles).table["score"]
    assert scored.to_dict() == score(table, roles=roles).table["score"].to_dict()


def test_a_table_without_rows_has_its_roles_checked_and_no_scores():
    empty = simulate(0).iloc[:0]
    found = score(empty)
    assert found.ranking == ()
    assert list(found.ranks.columns) == ["rank", "lower", "upper"]
    with pytest.raises(SpecError, match="did you mean 'validation_loss'"):
        score(empty, roles=Roles(tier1={"validation_los": "lower"}))


def test_calibrate_takes_a_table_without_a_column_that_another_has():
    whole = simulate(0, hyper=1.0)
    lacking = simulate(1, hyper=1.0).drop(columns=["weight_decay", "metric1", "metric1_se"])
    roles = Roles.from_table(whole)
    for tables in ([whole, lacking], [lacking, whole]):
        assert calibrate(tables, roles=roles).num_finished == 60
    with pytest.raises(SpecError, match="weight_decay"):
        calibrate([lacking], roles=roles)
