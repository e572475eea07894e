"""Expert priors: draws follow the stated mixture, and a wrong prior costs a bounded amount."""

from __future__ import annotations

import math
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm, truncnorm
from study_runs import TINY

from llp.cluster.searchers import gp, tpe
from llp.errors import SpecError
from llp.spec import digest, load_spec
from llp.spec.domains import Choice, Domain, Integer, LogUniform, RandomSearch, Uniform
from llp.spec.priors import DEVIATION, EXTRA, PRIOR_SHARE


def prior(mode, confidence="medium"):
    return {"mode": mode, "confidence": confidence}


def draws(domain: Domain, num: int, seed: int = 0, constraints=()) -> list:
    search = RandomSearch({"x": domain}, constraints, seed)
    return [search.suggest(index)["x"] for index in range(1, num + 1)]


def mixture_cdf(mode: float, deviation: float):
    """Half truncated normal on [0, 1] around the mode, half uniform, by scipy."""
    near = truncnorm((0 - mode) / deviation, (1 - mode) / deviation, loc=mode, scale=deviation)
    return lambda x: PRIOR_SHARE * near.cdf(x) + (1 - PRIOR_SHARE) * np.clip(x, 0, 1)


@pytest.mark.parametrize("confidence", ["low", "medium", "high"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_numbers_follow_the_mixture_on_the_scale_of_their_domain(confidence, share):
    expected = mixture_cdf(share, DEVIATION[confidence])
    uniform = Uniform(low=-2, high=6, prior=prior(-2 + 8 * share, confidence))
    positions = (np.array(draws(uniform, 1200)) + 2) / 8
    assert kstest(positions, expected).pvalue > 1e-4
    log = LogUniform(low=1e-4, high=1, prior=prior(10 ** (-4 + 4 * share), confidence))
    positions = (np.log10(draws(log, 1200)) + 4) / 4
    assert kstest(positions, expected).pvalue > 1e-4
    assert kstest(positions, "uniform").pvalue < 1e-4  # a test that could not fail says nothing


def test_whole_numbers_and_steps_follow_it_too():
    values = np.array(draws(Integer(low=10, high=30, step=5, prior=prior(20, "high")), 2000))
    # Five bins of width 1/5; the mode is the middle of the third.
    cuts = truncnorm(-0.5 / 0.1, 0.5 / 0.1, loc=0.5, scale=0.1).cdf(np.linspace(0, 1, 6))
    for value, near in zip(range(10, 31, 5), np.diff(cuts), strict=True):
        expected = PRIOR_SHARE * near + (1 - PRIOR_SHARE) / 5
        assert (values == value).mean() == pytest.approx(expected, abs=0.05)
    stepped = draws(Uniform(low=0, high=1, step=0.25, prior=prior(0.5, "high")), 500)
    assert set(stepped) == {0.0, 0.25, 0.5, 0.75, 1.0}
    log = draws(Integer(low=1, high=512, log=True, prior=prior(64, "high")), 2000)
    assert statistics.median(log) == pytest.approx(64, rel=0.35)
    assert min(log) >= 1
    assert max(log) <= 512


def test_a_choice_takes_its_mode_with_the_stated_probability():
    for confidence, extra in EXTRA.items():
        found = Counter(draws(Choice(values=["a", "b", "c"], prior=prior("b", confidence)), 2000))
        expected = PRIOR_SHARE * (extra + (1 - extra) / 3) + (1 - PRIOR_SHARE) / 3
        spread = norm.ppf(0.9999) * math.sqrt(expected * (1 - expected) / 2000)
        assert abs(found["b"] / 2000 - expected) < spread
        assert found["a"] > 0
        assert found["c"] > 0


def test_the_first_configuration_has_every_mode_unless_the_constraints_forbid_it():
    space = {
        "a": LogUniform(low=1e-4, high=1, prior=prior(0.1)),
        "b": Integer(low=1, high=9, prior=prior(4)),
        "c": Choice(values=["x", "y"], prior=prior("y")),
        "d": Uniform(low=0, high=1),
    }
    first = RandomSearch(space, (), 3).suggest(0)
    assert (first["a"], first["b"], first["c"]) == (0.1, 4, "y")
    assert [type(first[name]) for name in "abc"] == [float, int, str]
    elsewhere = RandomSearch(space, ["a < 0.01"], 3).suggest(0)
    assert elsewhere["a"] < 0.01


@given(st.integers(0, 2**31 - 1), st.integers(0, 500))
@settings(max_examples=40)
def test_draws_with_priors_depend_on_seed_and_index_alone(seed, index):
    space = {"a": Uniform(low=0, high=1, prior=prior(0.2)), "b": Choice(values=[1, 2])}
    search = RandomSearch(space, ["a < 0.9"], seed)
    search.suggest(index + 1)
    assert search.suggest(index) == RandomSearch(space, ["a < 0.9"], seed).suggest(index)


def test_other_parameters_are_drawn_as_without_priors():
    plain = {"a": Uniform(low=0, high=1), "b": Choice(values=[1, 2, 3])}
    assert [RandomSearch(plain, (), 5).suggest(k) for k in range(3)] == [
        RandomSearch(dict(plain), (), 5).suggest(k) for k in range(3)
    ]
    beside = {**plain, "c": Uniform(low=0, high=1, prior=prior(0.9, "high"))}
    drawn = [RandomSearch(beside, (), 1).suggest(k)["a"] for k in range(1, 1500)]
    assert kstest(drawn, "uniform").pvalue > 1e-4


def best_after(search, num: int, optimum: float) -> list[float]:
    """Distance of the best so far to the optimum, after each trial."""
    found, best = [], math.inf
    for index in range(num):
        x = search.suggest(index)["x"]
        best = min(best, abs(x - optimum))
        if hasattr(search, "tell"):
            search.tell(index, 1 - (x - optimum) ** 2)
        found.append(best)
    return found


def test_random_search_finds_a_good_region_sooner_and_recovers_from_a_bad_prior():
    good, bad = prior(0.9, "high"), prior(0.1, "high")

    def needed(given) -> float:
        """Trials until a configuration lies within 0.02 of the optimum, mean over searches."""
        counts = []
        for seed in range(80):
            search = RandomSearch({"x": Uniform(low=0, high=1, prior=given)}, (), seed)
            counts.append(
                next(k for k in range(1, 2000) if abs(search.suggest(k)["x"] - 0.93) < 0.02)
            )
        return statistics.fmean(counts)

    plain = needed(None)
    assert needed(good) < 0.6 * plain
    # Half of the draws are uniform: twice as many, within the error of the mean of geometrics.
    assert needed(bad) < 2 * plain * (1 + 3 * math.sqrt(2 / 80))


@pytest.mark.parametrize("build", [tpe, gp])
def test_model_based_searchers_start_from_the_prior_and_recover_from_a_bad_one(build):
    def space(given):
        return {"x": Uniform(low=0, high=1, prior=given)}

    search = build(space(prior(0.7, "high")), (), seed=0, num_startup_trials=8)
    reference = RandomSearch(space(prior(0.7, "high")), (), 0)
    for index in range(8):
        drawn = search.suggest(index)
        assert drawn == reference.suggest(index)
        search.tell(index, 1 - (drawn["x"] - 0.7) ** 2)
    misled = [
        best_after(build(space(prior(0.1, "high")), (), seed=seed, num_startup_trials=8), 30, 0.93)[
            -1
        ]
        for seed in range(3)
    ]
    assert statistics.median(misled) < 0.02


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{type: uniform, low: 0, high: 1, prior: {mode: 2}}", "the mode 2 is not between 0 and 1"),
        ("{type: uniform, low: 0, high: 1, prior: {mode: yes}}", "is not a number"),
        ("{type: uniform, low: 0, high: 1, prior: {mode: 0.5, confidence: sure}}", "low"),
        ("{type: uniform, low: 0, high: 1, prior: {mood: 0.5}}", "mode"),
        ("{type: choice, values: [0.1, 0.2], prior: {mode: 0.3}}", "is not one of the values"),
        ("{type: fixed, value: 0.3, prior: {mode: 0.3}}", "a fixed value has no use for a prior"),
    ],
)
def test_a_wrong_prior_is_named_with_its_line(tmp_path, line, message):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.replace("{type: uniform, low: 0.0, high: 0.95}", line))
    with pytest.raises(SpecError, match=message) as caught:
        load_spec(file)
    assert "tiny.yaml:8" in str(caught.value)
    assert "momentum" in str(caught.value)


def test_a_file_with_a_prior_is_another_search_and_one_without_stays_what_it_was(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    plain = load_spec(file)
    file.write_text(
        TINY.replace("high: 0.95}", "high: 0.95, prior: {mode: 0.9, confidence: high}}")
    )
    with_prior = load_spec(file)
    assert with_prior.search_space["momentum"].prior.mode == 0.9
    assert digest(with_prior) != digest(plain)
    with pytest.raises(SpecError, match="a grid has no use for a prior"):
        load_spec(file, overrides=["searcher.name=grid"])
