"""Promotion and budgets: exact sizes, purity, and what failures do to them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_runs import completed_per_rung, simulate

from llp.probing.budgets import Bracket, fill_brackets, hyperband_brackets, ladder, rung_sizes
from llp.probing.promotion import WAIT, Asha, Fifo, Hyperband, Median, NewTrial
from llp.probing.state import SearchState, probe_id
from llp.records import CurvePoint, Decision, Job, JobEnd, Rung, Trial, to_plain

SCHEDULERS = [Asha, Hyperband, Median, Fifo]


def test_hyperband_brackets_are_those_of_the_paper():
    brackets = hyperband_brackets(5, 3)
    assert [(b.size, b.first_rung) for b in brackets] == [(81, 1), (34, 2), (15, 3), (8, 4), (5, 5)]


def test_brackets_hold_exactly_the_trials_asked_for():
    filled = fill_brackets([Bracket(1, 9), Bracket(2, 5), Bracket(3, 3)], 30)
    assert sum(b.size for b in filled) == 30
    assert [b.size for b in filled] == [9, 5, 3, 9, 4]


def test_ladder_counts_images_and_samples():
    rungs = ladder([0.1, 0.333, 1.0], [3, 5, 7], 1000)
    assert [(r.num_examples, r.samples_seen) for r in rungs] == [
        (100, 300),
        (333, 1665),
        (1000, 7000),
    ]


@settings(max_examples=60, deadline=None)
@given(
    num_trials=st.integers(1, 40),
    num_rungs=st.integers(2, 4),
    eta=st.integers(2, 4),
    workers=st.integers(1, 7),
    seed=st.integers(0, 10**6),
)
def test_rung_sizes_are_exact_whatever_the_order_of_arrival(
    num_trials, num_rungs, eta, workers, seed
):
    _, state = simulate(Asha(num_trials, num_rungs, eta), workers=workers, seed=seed)
    assert completed_per_rung(state) == rung_sizes(Bracket(1, num_trials), num_rungs, eta)


@settings(max_examples=30, deadline=None)
@given(num_trials=st.integers(1, 60), workers=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_hyperband_spends_exactly_its_brackets(num_trials, workers, seed):
    scheduler = Hyperband(num_trials, 3, 3)
    _, state = simulate(scheduler, workers=workers, seed=seed)
    expected: Counter[int] = Counter()
    for sizes in scheduler.sizes():
        expected.update(sizes)
    assert completed_per_rung(state) == dict(expected)


def test_one_worker_promotes_exactly_the_best():
    quality = {i: (i * 37 % 27) / 27 for i in range(27)}
    _, state = simulate(Asha(27, 3, 3), quality=quality)
    best = sorted(quality, key=quality.get, reverse=True)
    assert {t for t, r in state.ends if r == 2} == {f"t{i:03d}" for i in best[:9]}
    assert {t for t, r in state.ends if r == 3} == {f"t{i:03d}" for i in best[:3]}


@settings(max_examples=40, deadline=None)
@given(workers=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_promotions_do_not_depend_on_the_order_of_arrival(workers, seed):
    quality = {i: (i * 37 % 27) / 27 for i in range(27)}
    _, state = simulate(Asha(27, 3, 3), quality=quality, workers=workers, seed=seed)
    _, alone = simulate(Asha(27, 3, 3), quality=quality)
    assert set(state.ends) == set(alone.ends)


def test_no_worker_waits_while_a_promotion_is_certain():
    """With 2 of 9 results outstanding and 3 places, the first of the 7 is certain already."""
    scheduler = Asha(9, 2, 3)
    state = SearchState()
    for index in range(9):
        trial = Trial(f"t{index:03d}", {}, 0)
        job = Job(probe_id(trial.trial_id, 1), "probe", trial, Rung(1, 1.0, 10, 1), 0)
        point = CurvePoint(1, 1.0, 1, 10, 0, 0, 1, index / 10, 1)
        end = JobEnd(job.job_id, trial.trial_id, "completed")
        state.apply({"event": "trial", "trial": to_plain(trial)})
        state.apply({"event": "job", "job": to_plain(job)})
        if index < 7:
            about = {"job_id": job.job_id, "trial_id": trial.trial_id, "kind": "probe"}
            state.apply({"event": "point", "point": to_plain(point), **about})
            state.apply(
                {"event": "job_end", "rung": 1, "attempt": 0, "end": to_plain(end), **about}
            )
    step = scheduler.next_step(state)
    assert isinstance(step, Decision)
    assert (step.trial_id, step.rung) == ("t006", 2)
    state.apply({"event": "decision", "decision": to_plain(step)})
    assert scheduler.next_step(state) == WAIT


@settings(max_examples=25, deadline=None)
@given(workers=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_eager_promotion_is_the_rule_of_the_paper(workers, seed):
    """Every promotion was in the top floor(n / eta) of its rung at that moment."""
    events, state = simulate(Asha(18, 3, 3, eager=True), workers=workers, seed=seed)
    results: dict[int, dict[str, float]] = {1: {}, 2: {}, 3: {}}
    last: dict[str, float] = {}
    started = 0
    for event in events:
        if event["event"] == "point":
            last[event["job_id"]] = event["point"]["validation_accuracy"]
        elif event["event"] == "job_end":
            results[event["rung"]][event["end"]["trial_id"]] = last[event["end"]["job_id"]]
        elif event["event"] == "trial":
            started += 1
        elif event["event"] == "decision" and event["decision"]["kind"] == "promote":
            below = results[event["decision"]["rung"] - 1]
            ranked = sorted(below, key=below.get, reverse=True)
            keep = len(below) // 3 if started < 18 else max(1, len(below) // 3)
            assert event["decision"]["trial_id"] in ranked[:keep]
    assert completed_per_rung(state)[3] >= 1


@pytest.mark.parametrize("kind", SCHEDULERS)
@settings(max_examples=25, deadline=None)
@given(workers=st.integers(1, 4), seed=st.integers(0, 10**6), kill_every=st.sampled_from([0, 3, 7]))
def test_replaying_the_ledger_gives_every_decision_again(kind, workers, seed, kill_every):
    scheduler = kind(12, 3, 3)
    events, _ = simulate(scheduler, workers=workers, seed=seed, kill_every=kill_every)
    state, compared = SearchState(), 0
    for event in events:
        if event["event"] == "decision":
            step = scheduler.next_step(state)
            decision = event["decision"]
            if decision["kind"] == "new":
                assert isinstance(step, NewTrial)
                assert step.rung == decision["rung"]
            else:
                assert to_plain(step) == decision
            compared += 1
        state.apply(event)
    assert compared >= 12


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_kill_loses_no_completed_job_and_repeats_none(kind):
    plain, _ = simulate(kind(9, 3, 3), quality={i: i / 9 for i in range(9)})
    killed, state = simulate(kind(9, 3, 3), quality={i: i / 9 for i in range(9)}, kill_every=3)
    ends = [e["end"]["job_id"] for e in killed if e["event"] == "job_end"]
    assert len(ends) == len(set(ends))
    assert set(ends) == {e["end"]["job_id"] for e in plain if e["event"] == "job_end"}
    assert not state.running


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_failing_trial_is_tried_again_then_given_up(kind):
    scheduler = kind(4, 2, 2, max_failures=2)
    events, state = simulate(scheduler, quality={i: i / 4 for i in range(4)}, fails=frozenset({3}))
    attempts = [
        e for e in events if e["event"] == "job" and e["job"]["trial"]["trial_id"] == "t003"
    ]
    assert [e["job"]["attempt"] for e in attempts] == [0, 1, 2]
    assert not any(trial_id == "t003" for trial_id, _ in state.promoted)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_all_trials_failing_ends_the_search(kind):
    _, state = simulate(kind(5, 3, 2, max_failures=0), fails=frozenset(range(5)))
    assert completed_per_rung(state) == {}
    assert len(state.trials) == 5


def test_no_trial_is_promoted_twice():
    for seed in range(20):
        events, _ = simulate(Asha(20, 4, 2), workers=5, seed=seed)
        promotions = [
            (e["decision"]["trial_id"], e["decision"]["rung"])
            for e in events
            if e["event"] == "decision" and e["decision"]["kind"] == "promote"
        ]
        assert len(promotions) == len(set(promotions))


def test_median_sends_up_only_what_is_not_below_the_median():
    quality = {0: 0.5, 1: 0.4, 2: 0.6, 3: 0.45, 4: 0.7}
    _, state = simulate(Median(5, 2, 3), quality=quality)
    assert {t for t, r in state.ends if r == 2} == {"t000", "t002", "t004"}
