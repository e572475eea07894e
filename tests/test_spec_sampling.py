"""Draws stay in their domains, respect conditions and constraints, and depend on nothing else."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from llp import registry
from llp.errors import SpecError
from llp.spec.constraints import satisfied
from llp.spec.domains import (
    Choice,
    Domain,
    Fixed,
    GridSearch,
    Integer,
    LogUniform,
    RandomSearch,
    Uniform,
    ordered,
)

reals = st.floats(-1e6, 1e6)
positive = st.floats(1e-12, 1e12)


def _of(kind, low, high, **options):
    assume(low < high)
    try:
        return kind(low=low, high=high, **options)
    except ValidationError:
        assume(False)


domains = st.one_of(
    st.tuples(reals, reals).map(lambda t: _of(Uniform, *t)),
    st.tuples(reals, reals, st.floats(0.01, 10)).map(lambda t: _of(Uniform, *t[:2], step=t[2])),
    st.tuples(positive, positive).map(lambda t: _of(LogUniform, *t)),
    st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000), st.integers(1, 9)).map(
        lambda t: _of(Integer, *t[:2], step=t[2])
    ),
    st.tuples(st.integers(1, 1000), st.integers(1, 1000)).map(lambda t: _of(Integer, *t, log=True)),
    st.lists(
        st.integers(0, 9) | st.text(max_size=3) | st.booleans(), min_size=1, unique_by=repr
    ).map(lambda values: Choice(values=values)),
    st.floats(-9, 9).map(lambda value: Fixed(value=value)),
)
spaces = st.dictionaries(st.sampled_from("abcdef"), domains, min_size=1)
seeds = st.integers(0, 2**31 - 1)


@given(domains, seeds)
def test_a_draw_lies_within_its_domain(domain, seed) -> None:
    value = domain.sample(np.random.default_rng(seed))
    match domain:
        case Choice():
            assert any(type(value) is type(v) and value == v for v in domain.values)
        case Fixed():
            assert value == domain.value
        case Integer():
            assert type(value) is int
            assert domain.low <= value <= domain.high
            assert (value - domain.low) % domain.step == 0
        case Uniform() | LogUniform():
            assert type(value) is float
            assert domain.low <= value <= domain.high
            if domain.type == "uniform" and domain.step and value < domain.high:
                steps = (value - domain.low) / domain.step
                assert steps == pytest.approx(round(steps), abs=1e-6)


@given(domains)
def test_finite_lists_exactly_what_is_drawn(domain) -> None:
    assume(domain.num_values is not None and domain.num_values <= 20)
    values = domain.finite()
    assert len(values) == domain.num_values
    rng = np.random.default_rng(0)
    drawn = {repr(domain.sample(rng)) for _ in range(60 * len(values))}
    assert drawn <= {repr(value) for value in values}
    if not (isinstance(domain, Integer) and domain.log):  # its values are not equally likely
        assert len(drawn) == len(values)


@given(spaces, seeds, st.integers(0, 10**6))
def test_a_suggestion_is_a_function_of_seed_and_index_alone(space, seed, index) -> None:
    search = RandomSearch(space, (), seed)
    first = search.suggest(index)
    search.suggest(index + 1)
    again = RandomSearch(dict(reversed(space.items())), (), seed).suggest(index)
    assert search.suggest(index) == first == again
    assert set(first) == set(space)


def test_another_seed_or_index_is_another_draw() -> None:
    space = {"a": Uniform(low=0, high=1)}
    draws = {RandomSearch(space, (), seed).suggest(k)["a"] for seed in range(20) for k in range(20)}
    assert len(draws) == 400


def test_draws_are_spread_as_their_domain_says() -> None:
    rng = np.random.default_rng(0)
    n = 4000
    uniform = np.sort([Uniform(low=2, high=6).sample(rng) for _ in range(n)])
    assert np.abs((uniform - 2) / 4 - np.arange(n) / n).max() < 1.95 / math.sqrt(n)
    log = np.sort([LogUniform(low=1e-4, high=1).sample(rng) for _ in range(n)])
    assert np.abs((np.log10(log) + 4) / 4 - np.arange(n) / n).max() < 1.95 / math.sqrt(n)
    counts = Counter(Choice(values=["x", "y", "z"]).sample(rng) for _ in range(n))
    assert all(abs(c - n / 3) < 5 * math.sqrt(n * 2 / 9) for c in counts.values())
    whole = Counter(Integer(low=1, high=100, log=True).sample(rng) for _ in range(n))
    low = sum(count for value, count in whole.items() if value <= 7)
    expected = n * math.log(7.5 / 0.5) / math.log(100.5 / 0.5)
    assert abs(low - expected) < 5 * math.sqrt(n / 4)


conditional = {
    "optimizer": Choice(values=["sgd", "adam"]),
    "momentum": Uniform(low=0, high=0.9, when={"optimizer": "sgd"}),
    "dampened": Choice(values=[True, False], when={"optimizer": ["sgd"]}),
    "amount": Uniform(low=0, high=1, when={"dampened": True}),
    "beta1": Fixed(value=0.9, when={"optimizer": ["adam"]}),
}


@given(seeds, st.integers(0, 1000))
def test_inactive_parameters_are_absent(seed, index) -> None:
    values = RandomSearch(conditional, (), seed).suggest(index)
    assert ("momentum" in values) == ("dampened" in values) == (values["optimizer"] == "sgd")
    assert ("beta1" in values) == (values["optimizer"] == "adam")
    assert ("amount" in values) == (values.get("dampened") is True)
    assert None not in values.values()


def test_a_condition_on_true_is_not_met_by_one() -> None:
    domain = Fixed(value=1, when={"flag": True})
    assert domain.active({"flag": True})
    assert not domain.active({"flag": 1})


@given(seeds, st.integers(0, 1000))
@settings(max_examples=50)
def test_constraints_hold_for_every_suggestion(seed, index) -> None:
    space = {"a": LogUniform(low=1e-3, high=10), "b": Choice(values=[1, 2, 4]), **conditional}
    constraints = ["a * b <= 0.5", "optimizer == 'sgd' or a < 0.1", "momentum <= 1 - a"]
    values = RandomSearch(space, constraints, seed).suggest(index)
    assert values["a"] * values["b"] <= 0.5
    assert values["optimizer"] == "sgd" or values["a"] < 0.1
    assert values.get("momentum", 0) <= 1 - values["a"]


def test_impossible_constraints_give_up_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llp.spec.domains.MAX_TRIES", 50)
    search = RandomSearch({"a": Uniform(low=0, high=1)}, ["a > 2"], 0)
    with pytest.raises(SpecError, match="none of 50 draws satisfies a > 2; widen a domain"):
        search.suggest(0)


def test_parameters_are_ordered_after_what_they_depend_on() -> None:
    assert ordered(conditional) == ["optimizer", "beta1", "dampened", "amount", "momentum"]
    with pytest.raises(SpecError, match="depends on zz"):
        ordered({"a": Fixed(value=1, when={"zz": 1})})
    with pytest.raises(SpecError, match="depends on b"):
        ordered({"a": Fixed(value=1, when={"b": 1}), "b": Fixed(value=1, when={"a": 1})})


finite = st.one_of(
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(
        lambda v: Choice(values=v)
    ),
    st.integers(2, 5).map(lambda high: Integer(low=1, high=high)),
    st.just(Uniform(low=0.1, high=0.3, step=0.1)),
    st.just(Fixed(value="x")),
)


@given(st.dictionaries(st.sampled_from("abcd"), finite, min_size=1))
def test_a_grid_is_the_product_of_its_domains(space) -> None:
    grid = GridSearch(space)
    names = sorted(space)
    expected = [
        dict(zip(names, combination, strict=True))
        for combination in itertools.product(*(space[name].finite() for name in names))
    ]
    assert [grid.suggest(k) for k in range(grid.num_points)] == expected
    with pytest.raises(IndexError):
        grid.suggest(grid.num_points)


def test_inactive_parameters_do_not_multiply_a_grid() -> None:
    space = {
        "optimizer": Choice(values=["sgd", "adam"]),
        "momentum": Choice(values=[0.0, 0.5, 0.9], when={"optimizer": "sgd"}),
    }
    grid = GridSearch(space, ["momentum < 0.9"])
    assert [grid.suggest(k) for k in range(grid.num_points)] == [
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "sgd", "momentum": 0.5},
        {"optimizer": "adam"},
    ]


def test_a_quantised_uniform_ends_on_its_upper_bound() -> None:
    assert Uniform(low=0.1, high=0.3, step=0.1).finite() == [0.1, 0.2, 0.3]


def test_a_grid_without_end_or_too_large_is_an_error() -> None:
    with pytest.raises(SpecError, match="a grid needs finitely many values and uniform has no end"):
        GridSearch({"a": Uniform(low=0, high=1)})
    for space in (
        {name: Integer(low=1, high=1000) for name in "ab"},
        {"a": Integer(low=1, high=2**53)},
        {"a": Uniform(low=0, high=1, step=1e-9)},
    ):
        with pytest.raises(SpecError, match="the grid has over 100,000 combinations"):
            GridSearch(space)


def test_registry_names_the_searchers_built_here() -> None:
    assert registry.load("searchers", "random") is RandomSearch
    assert registry.load("searchers", "grid") is GridSearch


@pytest.mark.parametrize("text", ["1e-3", "1E3", ".5", "2.", "-1.5e+2", "+0.25"])
def test_text_that_is_a_number_elsewhere_is_one_here(text: str) -> None:
    choice = TypeAdapter(Domain).validate_python({"type": "choice", "values": [text]})
    assert choice.values == [float(text)]
    assert type(choice.values[0]) is float


@pytest.mark.parametrize("text", ["16", "sgd", "1e", "e5", "flip+crop", "", "1.2.3", "0x10"])
def test_other_text_stays_text(text: str) -> None:
    assert Choice(values=[text]).values == [text]


def test_satisfied_and_active_are_what_another_searcher_needs() -> None:
    rng = np.random.default_rng(3)
    values = {}
    for name in ordered(conditional):
        if conditional[name].active(values):
            values[name] = conditional[name].sample(rng)
    assert satisfied(["momentum < 1"], values)
    assert set(values) <= set(conditional)
