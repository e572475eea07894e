"""What every row of the schedulers' table keeps to, whatever the results and their order."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_runs import completed_per_rung, simulate

from llp import registry
from llp.probing.curve_prior import LEVELS
from llp.probing.freeze_thaw import FreezeThaw
from llp.probing.growth import Pasha, noise, same_order
from llp.probing.learning_curves import extrapolate
from llp.probing.promotion import DONE, Asha, Hyperband, NewTrial, Scheduler
from llp.probing.state import SearchState
from llp.records import to_plain

ROWS = sorted(registry.SCHEDULERS)
OPTIONS = {"freeze_thaw": {"wave": 4}}


def make(name: str, num_trials: int, num_rungs: int, **options: object) -> Scheduler:
    return registry.load("schedulers", name)(
        num_trials=num_trials, num_rungs=num_rungs, **{**OPTIONS.get(name, {}), **options}
    )


def promotions(events: list[dict]) -> list[tuple[str, int]]:
    decisions = [e["decision"] for e in events if e["event"] == "decision"]
    return [(d["trial_id"], d["rung"]) for d in decisions if d["kind"] == "promote"]


SEARCHES = {
    "num_trials": st.integers(1, 14),
    "num_rungs": st.integers(2, 4),
    "workers": st.integers(1, 5),
    "seed": st.integers(0, 10**6),
}


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=8, deadline=None)
@given(**SEARCHES, broken=st.sets(st.integers(0, 13), max_size=6), kinds=st.integers(1, 3))
def test_budget_is_conserved_and_nobody_is_promoted_twice_or_for_nothing(
    name, num_trials, num_rungs, workers, seed, broken, kinds
):
    """With ties (`kinds` different results) and trials that diverge."""
    scheduler = make(name, num_trials, num_rungs)
    quality = {i: random.Random(seed + i).randrange(kinds) / 4 for i in range(num_trials)}
    events, state = simulate(
        scheduler, quality=quality, workers=workers, seed=seed, diverges=frozenset(broken)
    )
    made = promotions(events)
    assert len(made) == len(set(made))
    assert len(state.trials) <= num_trials
    for trial_id, rung in made:
        assert math.isfinite(state.result(trial_id, rung - 1)[0])
    ends = [e["end"]["job_id"] for e in events if e["event"] == "job_end"]
    assert len(ends) == len(set(ends))
    assert not state.running
    jobs = [e["job"]["rung"]["rung"] for e in events if e["event"] == "job"]
    if isinstance(scheduler, FreezeThaw):
        costs = scheduler.rung_costs()
        assert sum(costs[rung - 1] for rung in jobs) <= scheduler.total_budget() + 1e-9
    else:
        for rung in set(jobs):
            planned = sum(sizes.get(rung, 0) for sizes in scheduler.sizes())
            assert jobs.count(rung) <= planned


@pytest.mark.parametrize("name", ROWS)
def test_one_trial_gets_as_far_as_the_ladder_goes(name):
    _, state = simulate(make(name, 1, 3), quality={0: 0.5})
    top = 2 if name == "pasha" else 3  # nobody disagrees about one trial
    assert max(rung for _, rung in state.ends) == top


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_search_in_which_everything_diverges_ends_without_a_promotion(name, workers):
    events, state = simulate(make(name, 6, 3), diverges=frozenset(range(6)), workers=workers)
    assert promotions(events) == []
    assert len(state.trials) == 6


@pytest.mark.parametrize("name", ["asha", "hyperband", "pasha"])
@settings(max_examples=20, deadline=None)
@given(**SEARCHES)
def test_no_order_of_arrival_starves_a_better_trial(name, num_trials, num_rungs, workers, seed):
    """Nobody who was passed over on a rung was better there than one who went on."""
    quality = {i: random.Random(seed + i).random() for i in range(num_trials)}
    _, state = simulate(
        make(name, num_trials, num_rungs), quality=quality, workers=workers, seed=seed
    )
    for rung in range(1, num_rungs):
        for trial_id, at in state.ends:
            if at != rung or (trial_id, rung + 1) in state.promoted:
                continue
            bracket = state.trials[trial_id].bracket
            went_on = [
                other
                for other, upper in state.promoted
                if upper == rung + 1 and state.trials[other].bracket == bracket
            ]
            for other in went_on:
                assert state.result(other, rung) >= state.result(trial_id, rung)


@pytest.mark.parametrize("name", ["freeze_thaw", "pasha"])
@settings(max_examples=8, deadline=None)
@given(workers=st.integers(1, 4), seed=st.integers(0, 10**6), kill_every=st.sampled_from([0, 4]))
def test_every_decision_is_a_function_of_the_ledger(name, workers, seed, kill_every):
    scheduler = make(name, 10, 3)
    events, _ = simulate(scheduler, workers=workers, seed=seed, kill_every=kill_every)
    state = SearchState()
    for number, event in enumerate(events):
        if event["event"] == "decision":
            step = scheduler.next_step(SearchState.from_events(events[:number]))
            assert step == make(name, 10, 3).next_step(state)
            decision = event["decision"]
            if decision["kind"] == "new":
                assert isinstance(step, NewTrial)
            else:
                assert to_plain(step) == decision
        state.apply(event)


def brute_force(scheduler: Scheduler, state: SearchState) -> tuple[str, int] | None:
    """The certain promotion of halving, from the definition: it holds whatever is still to come.

    A trial may go up when, with every result that its rung may still get ahead of it, it would be
    among those that go on; the highest rung first.
    """
    found = None
    sizes = scheduler.sizes()[0]
    to_come = 0
    for rung in sorted(sizes)[:-1]:
        over = [t for t in state.trials if state.is_over(t, rung, max_failures=2)]
        if rung == min(sizes):
            to_come = sizes[rung] - len(over)
        ranked = sorted(over, key=lambda t, r=rung: state.result(t, r), reverse=True)
        usable = [t for t in ranked if math.isfinite(state.result(t, rung)[0])]
        waiting = [t for t in usable if (t, rung + 1) not in state.promoted]
        promoted = sum((t, rung + 1) in state.promoted for t in state.trials)
        if waiting and promoted < sizes[rung + 1]:
            place = ranked.index(waiting[0]) + 1
            if to_come == 0 or place + to_come <= sizes[rung + 1]:
                found = (waiting[0], rung + 1)
        arrived = sum(state.is_over(t, rung + 1, max_failures=2) for t in state.trials)
        to_come = min(max(sizes[rung + 1], promoted), promoted + len(waiting) + to_come) - arrived
    return found


@settings(max_examples=25, deadline=None)
@given(**SEARCHES, broken=st.sets(st.integers(0, 13), max_size=4))
def test_standings_give_the_promotions_of_the_definition(
    num_trials, num_rungs, workers, seed, broken
):
    scheduler = Asha(num_trials, num_rungs, 3)
    events, _ = simulate(
        scheduler, workers=workers, seed=seed, diverges=frozenset(broken), kill_every=6
    )
    state = SearchState()
    for event in events:
        if len(state.trials) == num_trials and not state.orphans:
            step = scheduler.next_step(state)
            expected = brute_force(scheduler, state)
            found = None if isinstance(step, str) else (step.trial_id, step.rung)
            if event["event"] != "job":  # a decision and its job are one step
                assert found == expected
        state.apply(event)


def test_hyperband_brackets_begin_one_after_the_other():
    """With one worker: the paper's order, (9, 1) before (5, 2) before (3, 3)."""
    events, _ = simulate(Hyperband(17, 3, 3), quality={i: i / 17 for i in range(17)})
    order = [
        (e["job"]["trial"]["bracket"], e["job"]["rung"]["rung"])
        for e in events
        if e["event"] == "job"
    ]
    assert order == [(0, 1)] * 9 + [(0, 2)] * 3 + [(0, 3)] + [(1, 2)] * 5 + [(1, 3)] + [(2, 3)] * 3


def test_hyperband_of_81_spends_the_brackets_of_the_paper():
    """R = 81, eta = 3: (81, 1) (34, 3) (15, 9) (8, 27) (5, 81)."""
    scheduler = Hyperband(143, 5, 3)
    started = [(b.size, 3 ** (b.first_rung - 1)) for b in scheduler.brackets()]
    assert started == [(81, 1), (34, 3), (15, 9), (8, 27), (5, 81)]
    _, state = simulate(scheduler, workers=4, quality={i: i / 143 for i in range(143)})
    assert completed_per_rung(state) == {
        1: 81,
        2: 27 + 34,
        3: 9 + 11 + 15,
        4: 3 + 3 + 5 + 8,
        5: 1 + 1 + 1 + 2 + 5,
    }


def isotonic(values: np.ndarray) -> np.ndarray:
    """The closest values that do not increase, by their minimax formula."""
    n = len(values)
    mean = [[values[i : j + 1].mean() if j >= i else 0.0 for j in range(n)] for i in range(n)]
    return np.array(
        [min(max(mean[i][j] for j in range(k, n)) for i in range(k + 1)) for k in range(n)]
    )


def test_freeze_thaw_thaws_the_largest_expected_improvement_per_cost():
    """The first decision after the wave, from the forecasts by hand."""
    scheduler = FreezeThaw(8, 3, wave=8, warm=True, least_gain=0)
    quality = {i: (i * 5 % 8) / 10 for i in range(8)}
    events, _ = simulate(scheduler, quality=quality)
    first = next(e["decision"] for e in events if e.get("decision", {}).get("kind") == "promote")
    costs = np.array(scheduler.rung_costs())
    best = sorted(quality, key=quality.get, reverse=True)
    forecast = extrapolate(
        [[quality[i]] for i in best],
        positions=[costs[0]],
        horizon=costs.sum(),
        higher_is_better=True,
    )
    edges = np.concatenate([[0.0], (LEVELS[1:] + LEVELS[:-1]) / 2, [1.0]])
    leader = int(np.argmax(forecast.mean))
    within = np.clip(-forecast.costs, *forecast.bounds)
    gains = np.maximum(within - forecast.mean[leader], 0) @ np.diff(edges)
    gains = isotonic(gains)
    gains[leader] = -1
    chosen = int(np.argmax(gains))
    assert first["trial_id"] == f"t{best[chosen]:03d}"
    rate = gains[chosen] / costs[1] / (forecast.mean[leader] - np.median(list(quality.values())))
    assert f"gain {rate:.3g} per full training" in first["reason"]
    assert f"{forecast.mean[chosen]:.4g}" in first["reason"]


def test_freeze_thaw_takes_a_clear_leader_to_the_top_first():
    """Accuracies end at 1: nobody can be expected far above the leader."""
    quality = {i: 0.3 + 0.02 * i for i in range(12)} | {11: 0.95}
    events, _ = simulate(FreezeThaw(12, 3, wave=12), quality=quality)
    taken = [e["decision"] for e in events if e["event"] == "decision"]
    at_top = [d["trial_id"] for d in taken if d["kind"] == "promote" and d["rung"] == 3]
    assert at_top[0] == "t011"


def test_freeze_thaw_finishes_another_where_the_leader_died():
    quality = {i: 0.3 + 0.02 * i for i in range(12)} | {11: 0.95}
    scheduler = FreezeThaw(12, 3, wave=12)
    _, state = simulate(scheduler, quality=quality, diverges=frozenset([11]))
    assert completed_per_rung(state)[3] >= 1


def test_freeze_thaw_trains_its_leader_to_the_end_when_nobody_promises_enough():
    scheduler = FreezeThaw(12, 3, wave=5, budget=20, least_gain=1e9)
    events, _ = simulate(scheduler, quality={i: i / 12 for i in range(12)})
    kinds = [e["decision"] for e in events if e["event"] == "decision"]
    assert [d["kind"] for d in kinds[:7]] == ["new"] * 5 + ["promote"] * 2
    assert [d["rung"] for d in kinds[5:7]] == [2, 3]
    assert kinds[5]["trial_id"] == kinds[6]["trial_id"]
    assert kinds[5]["reason"].startswith("leads: forecast")
    assert sum(e["event"] == "trial" for e in events) == 12  # the budget is enough for all


@pytest.mark.parametrize(
    ("options", "about"),
    [
        ({"wave": 0}, "wave must be at least 1"),
        ({"budget": 0.5}, "budget must be at least"),
        ({"least_gain": -1.0}, "least_gain must be at least 0"),
        ({"costs": (1.0,)}, "costs must be 3 positive numbers"),
    ],
)
def test_impossible_options_are_named(options, about):
    with pytest.raises(ValueError, match=about):
        FreezeThaw(4, 3, **options)


def test_pasha_stays_low_while_rungs_agree_and_grows_when_they_do_not():
    agree = {i: i / 27 for i in range(27)}
    _, state = simulate(Pasha(27, 4, 3), quality=agree)
    assert max(completed_per_rung(state)) == 2
    _, state = simulate(Pasha(27, 4, 3), seed=3)  # every rung draws results anew
    assert max(completed_per_rung(state)) == 4


def test_pasha_measures_noise_on_pairs_that_change_back():
    tables = [{"a": 0.5, "b": 0.4}, {"a": 0.6, "b": 0.65}, {"a": 0.71, "b": 0.7}]
    assert noise(tables) == pytest.approx(0.01)
    assert not same_order(tables[0], tables[1], 0.0)
    assert same_order(tables[1], tables[2], 0.06)


def test_done_is_final():
    for name in ROWS:
        scheduler = make(name, 5, 3)
        _, state = simulate(scheduler, quality={i: i / 5 for i in range(5)})
        assert scheduler.next_step(state) == DONE
