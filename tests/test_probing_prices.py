"""What a configuration costs by the sample is in freeze-thaw's rule and comes from the ledger."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_runs import simulate

from llp.probing.freeze_thaw import FreezeThaw
from llp.probing.prices import COSTS, prices
from llp.probing.promotion import NewTrial
from llp.probing.state import SearchState
from llp.records import JobEnd, to_plain

QUALITY = {i: (i * 5 % 8) / 10 for i in range(8)}


def decisions(events: list[dict]) -> list[dict]:
    return [e["decision"] for e in events if e["event"] == "decision"]


def drawn(seed: int, num: int = 16) -> dict[int, float]:
    generator = random.Random(seed)
    return {i: math.exp(generator.uniform(-1.5, 1.5)) for i in range(num)}


def test_a_price_is_the_time_a_sample_takes_whatever_a_rung_adds_to_it():
    """Times that are a product of trial and rung are taken apart exactly."""
    dear, level = drawn(3), {1: 5.0, 2: 2.0, 3: 1.0}
    _, state = simulate(
        FreezeThaw(8, 3, wave=8),
        quality=QUALITY,
        seconds=lambda i, k: 3**k * dear[i] * level[k],
    )
    assert {rung for _, rung in state.ends} == {1, 2, 3}
    found, mean = prices(state, "seconds"), np.mean([dear[i] for i in range(8)])
    assert found == pytest.approx({f"t{i:03d}": dear[i] / mean for i in range(8)})


def test_failures_tell_no_price_and_samples_have_none():
    _, state = simulate(FreezeThaw(4, 3, wave=4), seconds=lambda i, k: 1.0 + i)
    assert not prices(state, "samples")
    before = prices(state, "seconds")
    state.ends["t000", 1] = JobEnd("t000-r1", "t000", "failed", samples_seen=3, seconds=1e6)
    assert prices(state, "seconds").get("t000", 1.0) < 10 * before["t000"]
    assert not prices(SearchState(), "seconds")


def test_of_two_that_promise_the_same_the_cheaper_goes_on():
    quality = dict.fromkeys(range(8), 0.5)
    dear = dict.fromkeys(range(8), 1.0) | {5: 0.5}
    for cost, chosen in (("samples", "t001"), ("seconds", "t005"), ("operations", "t005")):
        scheduler = FreezeThaw(8, 3, wave=8, least_gain=0, cost=cost)
        events, _ = simulate(
            scheduler, quality=quality, seconds=lambda i, k: 3**k * dear[i], operations=dear
        )
        first = next(d for d in decisions(events) if d["kind"] == "promote")
        assert first["trial_id"] == chosen


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), cost=st.sampled_from(["seconds", "operations"]))
def test_the_first_promotion_has_the_largest_gain_per_price(seed, cost):
    """Against the gains of the same search in samples, divided by hand."""
    dear, generator = drawn(seed), random.Random(seed)
    quality = {i: generator.random() for i in range(8)}
    runs = {}
    for name in ("samples", cost):
        scheduler = FreezeThaw(8, 3, wave=8, least_gain=0, cost=name)
        events, _ = simulate(
            scheduler, quality=quality, seconds=lambda i, k: 3**k * dear[i], operations=dear
        )
        place = next(n for n, e in enumerate(events) if e.get("decision", {}).get("rung", 0) > 1)
        runs[name] = (SearchState.from_events(events[:place]), events[place]["decision"])
    state, picked = runs[cost]
    here = scheduler._posteriors(state, state.standings(2))[1]
    gains = dict(zip(here.trial_ids, here.improvement(here.mean.max()), strict=True))
    leader = here.trial_ids[int(here.mean.argmax())]
    rates = {t: gain / dear[int(t[1:])] for t, gain in gains.items() if t != leader}
    assert rates[picked["trial_id"]] == pytest.approx(max(rates.values()))
    assert gains[runs["samples"][1]["trial_id"]] == pytest.approx(
        max(gain for t, gain in gains.items() if t != leader)
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), cost=st.sampled_from(COSTS), scale=st.floats(1e-3, 1e3))
def test_only_ratios_of_costs_count_and_equal_ones_are_no_costs(seed, cost, scale):
    dear = drawn(seed)
    if cost == "samples":  # here: one price for all, in the other currencies
        dear = dict.fromkeys(dear, 1.0)

    def run(name: str, factor: float) -> list[dict]:
        events, _ = simulate(
            FreezeThaw(12, 3, wave=5, cost=name),
            seed=seed,
            workers=3,
            seconds=lambda i, k: 3**k * dear[i] * factor,
            operations={i: value * factor for i, value in dear.items()},
        )
        return decisions(events)

    if cost == "samples":
        assert run("samples", 1.0) == run("seconds", scale) == run("operations", scale)
    else:
        assert run(cost, 1.0) == run(cost, scale)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cost=st.sampled_from(["seconds", "operations"]),
    workers=st.integers(1, 4),
    kill_every=st.sampled_from([0, 4]),
)
def test_decisions_by_price_replay_and_keep_to_the_budget(seed, cost, workers, kill_every):
    dear, noise = drawn(seed), random.Random(seed)
    scheduler = FreezeThaw(12, 3, wave=4, cost=cost)
    events, final = simulate(
        scheduler,
        workers=workers,
        seed=seed,
        kill_every=kill_every,
        seconds=lambda i, k: 3**k * dear[i] * math.exp(noise.gauss(0, 0.2)),
        operations=dear,
    )
    state, again = SearchState(), FreezeThaw(12, 3, wave=4, cost=cost)
    for number, event in enumerate(events):
        if event["event"] == "decision":
            step = scheduler.next_step(SearchState.from_events(events[:number]))
            assert step == again.next_step(state)
            if isinstance(step, NewTrial):
                assert event["decision"]["kind"] == "new"
            else:
                assert to_plain(step) == event["decision"]
        state.apply(event)
    assert any(rung == 3 for _, rung in final.ends)  # the budget was not spent on beginnings
    costs, price = scheduler.rung_costs(), prices(final, cost)
    most = scheduler.total_budget() + sum(costs) * max(price.values())
    assert scheduler.spent(final) <= most + 1e-9
    jobs = [*((t, 1) for t in final.trials), *final.promoted]
    assert scheduler.spent(final) == pytest.approx(sum(costs[k - 1] * price[t] for t, k in jobs))


def test_an_unknown_cost_is_named():
    with pytest.raises(ValueError, match="unknown cost 'second'; did you mean 'seconds'"):
        FreezeThaw(4, 3, cost="second")
