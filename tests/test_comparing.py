"""The comparison of finished trainings, against other libraries, formulas and brute force."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llp.comparing.convergence import first_reached, steps_to
from llp.comparing.significance import (
    against,
    by_seed,
    holm,
    paired_test,
    sign_flip_p_value,
)
from llp.comparing.summary import (
    heat_map,
    largest,
    one_at_a_time,
    power_law,
    summary,
    tradeoff,
)

pairs = st.integers(2, 9).flatmap(
    lambda num: st.tuples(st.just(num), st.integers(0, 10_000), st.floats(-2, 2))
)


def training(label: str, seed: int, accuracy: float, **other: object) -> dict[str, object]:
    curve = [0.5 * accuracy, 0.9 * accuracy, accuracy]
    row: dict[str, object] = {
        **dict.fromkeys(("run", "configuration_id", "label"), label),
        "kind": "final",
        "job_id": f"{label}-s{seed}",
        "seed": seed,
        "repeat": 0,
        "dataset": "digits",
        "model": "mlp",
        "optimizer": label,
        "learning_rate": 0.1,
        "batch_size": 32,
        "data_fraction": 1.0,
        "epochs": 3,
        "num_examples": 100,
        "num_parameters": 10.0,
        "outcome": "completed",
        "failure": "",
        "test_accuracy": accuracy,
        "test_loss": 1 - accuracy,
        "validation_accuracy": accuracy,
        "validation_loss": 1 - accuracy,
        "num_test": 200.0,
        "samples": 300.0,
        "seconds": 3.0,
        "peak_memory_bytes": 1e6,
        "asked": "{}",
        "trained": "{}",
        "changed": "{}",
        "own": "{}",
        "curve_epoch": [1.0, 2.0, 3.0],
        "curve_samples": [100.0, 200.0, 300.0],
        "curve_seconds": [1.0, 2.0, 3.0],
        "curve_validation_accuracy": curve,
    }
    return {**row, **other}


@given(pairs)
def test_the_paired_test_is_scipys(drawn):
    num, seed, shift = drawn
    generator = np.random.default_rng(seed)
    first = generator.normal(0.9, 0.1, num)
    second = first + generator.normal(shift, 1, num)
    found = paired_test(dict(enumerate(first)), dict(enumerate(second)))
    known = stats.ttest_rel(first, second)
    low, high = known.confidence_interval(0.95)
    assert found.num_pairs == len(first)
    assert found.statistic == pytest.approx(known.statistic, rel=1e-6)
    assert found.p_value == pytest.approx(known.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


def test_the_paired_test_by_hand():
    # differences 2, 3, 1: mean 2, standard deviation 1, t = 2 / (1 / sqrt 3)
    found = paired_test({5: 3.0, 6: 5.0, 7: 4.0, 8: 1.0}, {5: 1.0, 6: 2.0, 7: 3.0, 9: 0.0})
    assert found.num_pairs == 3  # seeds 8 and 9 have no partner
    assert found.difference == 2
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert found.statistic == pytest.approx(2 * math.sqrt(3))
    # Student's t with 2 degrees of freedom has a closed form: P(|T| > t) = 1 - t / sqrt(2 + t^2)
    assert found.p_value == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(2 + 12))
    assert found.exact_p_value == 2 / 2**3


def test_equal_differences_have_no_t_and_are_never_called_certain():
    same = paired_test({0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.9, 1: 0.8, 2: 0.7})
    assert (same.difference, same.p_value) == (0.0, 1.0)
    shifted = paired_test({0: 3.0, 1: 2.0, 2: 1.0}, {0: 2.0, 1: 1.0, 2: 0.0})
    assert shifted.difference == 1.0
    assert shifted.p_value == 0.25  # of the exact test, and not 0


@pytest.mark.parametrize("num", [0, 1])
def test_one_seed_says_nothing_about_chance(num):
    found = paired_test(dict.fromkeys(range(num), 0.9), dict.fromkeys(range(num), 0.8))
    assert found.num_pairs == num
    assert math.isnan(found.p_value)
    assert not found.decided


@given(st.lists(st.integers(-6, 6), min_size=2, max_size=8))
def test_sign_flips_are_counted_as_scipy_counts_them(differences):
    expected = stats.permutation_test(
        (np.array(differences, float),),
        lambda x: abs(x.sum()),
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf,
    ).pvalue
    assert sign_flip_p_value(differences) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_testing_procedure_of_bonferroni(p_values):
    # Marcus, Peritz & Gabriel 1976: a hypothesis is rejected at level a when Bonferroni rejects
    # every intersection that holds it; its adjusted p is the largest of those, |S| min over S.
    expected = []
    for k in range(len(p_values)):
        worst = 0.0
        for size in range(1, len(p_values) + 1):
            for chosen in itertools.combinations(range(len(p_values)), size):
                if k in chosen:
                    worst = max(worst, min(1.0, size * min(p_values[i] for i in chosen)))
        expected.append(worst)
    assert holm(p_values) == pytest.approx(expected)


def test_holm_leaves_out_what_was_not_tested():
    assert holm([0.02, math.nan, 0.01])[::2] == [0.02, 0.02]
    assert math.isnan(holm([0.02, math.nan, 0.01])[1])


def test_repeats_of_a_seed_are_averaged_and_are_no_new_evidence():
    rows = [training("a", s, 0.8 + 0.01 * s) for s in range(3)]
    rows += [
        training("b", s, 0.85 + 0.02 * s + 0.01 * r, repeat=r) for s in range(3) for r in (0, 1)
    ]
    table = pd.DataFrame(rows)
    assert by_seed(table, "b") == pytest.approx({0: 0.855, 1: 0.875, 2: 0.895})
    (test,) = against(table, "a", ["a", "b"])
    assert test.num_pairs == 3
    assert test.difference == pytest.approx(0.065)
    row = summary(table).set_index("label").loc["b"]
    assert row["num"] == 3
    assert row["standard_error"] == pytest.approx(stats.sem([0.855, 0.875, 0.895]))


def test_false_findings_in_a_family_stay_below_five_percent():
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        reference = generator.normal(0, 1, 5)
        rows = [training("base", s, reference[s]) for s in range(5)]
        for k in range(6):
            rows += [training(f"o{k}", s, generator.normal(0, 1)) for s in range(5)]
        tests = against(pd.DataFrame(rows), "base", [f"o{k}" for k in range(6)])
        wrong += any(test.decided for test in tests)
    assert wrong / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_summary_is_pandas_and_counts_failures():
    rows = [training("a", s, v) for s, v in enumerate([0.8, 0.9, 0.85])]
    rows.append(training("a", 3, math.nan, outcome="diverged"))
    rows.append(training("a", 4, math.nan, outcome="missing"))
    rows.append(training("a", 5, 0.1, kind="candidate"))
    (row,) = summary(pd.DataFrame(rows)).to_dict("records")
    assert (row["num"], row["num_failed"]) == (3, 1)
    assert row["test_accuracy"] == pytest.approx(0.85)
    assert row["standard_error"] == pytest.approx(0.05 / math.sqrt(3))
    assert (row["lowest"], row["highest"]) == (0.8, 0.9)


def test_the_heat_map_is_a_pivot_table_of_the_best_configurations():
    generator = np.random.default_rng(1)
    rows = [
        training(f"{o}-{m}-{k}", s, generator.uniform(0.5, 1), optimizer=o, model=m)
        for o in ("sgd", "talt")
        for m in ("mlp", "convnet")
        for k in range(1 + (m == "mlp"))
        for s in range(3)
    ]
    table = pd.DataFrame(rows)
    means = table.groupby(["optimizer", "model", "label"])["test_accuracy"].mean()
    expected = means.groupby(["optimizer", "model"]).max()
    cells = heat_map(table)
    assert len(cells) == 4
    for cell in cells.to_dict("records"):
        key = (cell["optimizer"], cell["model"])
        assert cell["mean"] == pytest.approx(expected[key])
        assert cell["num_configurations"] == 1 + (cell["model"] == "mlp")
        assert means[(*key, cell["label"])] == pytest.approx(cell["mean"])


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from([0.7, 0.75, 0.8, 0.85])),
        min_size=1,
        max_size=7,
    )
)
def test_the_front_holds_exactly_what_nothing_dominates(points):
    table = pd.DataFrame(
        [
            training(f"c{k}", 0, accuracy, samples=float(cost))
            for k, (cost, accuracy) in enumerate(points)
        ]
    )
    found = dict(zip(tradeoff(table)["label"], tradeoff(table)["on_front"], strict=True))
    for k, (cost, accuracy) in enumerate(points):
        dominated = any(
            other_cost <= cost
            and other_accuracy >= accuracy
            and (other_cost, other_accuracy) != (cost, accuracy)
            for other_cost, other_accuracy in points
        )
        assert found[f"c{k}"] == (not dominated)


def test_steps_to_a_share_of_the_best_by_hand():
    fast = training("fast", 0, 0.8, curve_validation_accuracy=[0.75, 0.79, 0.8])
    slow = training("slow", 0, 1.0, curve_validation_accuracy=[0.5, 0.9, 1.0])
    late = training("slow", 1, 0.95, curve_validation_accuracy=[0.2, 0.3, 0.95])
    found = steps_to(pd.DataFrame([fast, slow, late])).set_index(["label", "share"])
    assert (found["target"].loc["fast"] == [0.9, 0.95, 0.99]).all()  # of the best of all, 1.0
    assert list(found.loc["fast", "num_reached"]) == [0, 0, 0]
    assert found.loc["fast", "epochs"].isna().all()
    assert list(found.loc["slow", "num_reached"]) == [2, 2, 1]
    assert list(found.loc["slow", "epochs"]) == [2.5, 3.0, 3.0]
    assert list(found.loc["slow", "samples"]) == [250.0, 300.0, 300.0]
    assert list(found.loc["slow", "steps"]) == [10.0, 12.0, 12.0]  # 4 batches of 32 hold 100
    assert first_reached([0.1, 0.2], 0.3) is None


def test_datasets_have_targets_of_their_own():
    table = pd.DataFrame([training("a", 0, 0.9), training("b", 0, 0.5, dataset="cifar10")])
    found = steps_to(table, shares=[1.0]).set_index("label")
    assert found.loc["a", "target"] == pytest.approx(0.9)
    assert found.loc["b", "target"] == pytest.approx(0.5)


@given(st.floats(-1.5, 0.5), st.floats(0.05, 2), st.integers(0, 100))
def test_the_power_law_is_a_straight_line_in_logarithms(exponent, coefficient, seed):
    generator = np.random.default_rng(seed)
    sizes = np.array([1.0, 2.0, 4.0, 8.0])
    errors = coefficient * sizes**exponent * np.exp(generator.normal(0, 0.05, 4))
    law = power_law(sizes, errors)
    (slope, intercept), covariance = np.polyfit(np.log(sizes), np.log(errors), 1, cov=True)
    assert law is not None
    assert law.exponent == pytest.approx(slope, abs=1e-9)
    assert law.coefficient == pytest.approx(math.exp(intercept))
    assert law.standard_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-6)


def test_there_is_no_law_through_one_size_or_perfect_results():
    assert power_law(np.array([2.0, 2.0]), np.array([0.1, 0.2])) is None
    assert power_law(np.array([1.0, 2.0]), np.array([0.0, 0.1])) is None


def test_a_study_is_laid_out_by_value_with_the_runs_own_between():
    own = json.dumps({"width": 16})
    rows = [training("talt", s, 0.9, own=own, run="talt") for s in range(2)]
    for width, accuracy in ((32, 0.95), (8, 0.8)):
        rows += [
            training(
                f"talt width {width}",
                s,
                accuracy,
                kind="scaling",
                run="talt",
                changed=json.dumps({"width": width}),
            )
            for s in range(2)
        ]
    found = one_at_a_time(pd.DataFrame(rows), "talt", "scaling")
    assert list(found["value"]) == [8, 16, 32]
    assert list(found["own"]) == [False, True, False]
    assert list(found["test_accuracy"]) == pytest.approx([0.8, 0.9, 0.95])
    assert largest(found, "test_accuracy")["value"] == 32
