"""What is shown of a search, given its ledger events."""

from __future__ import annotations

import io
import json
import math
import os
import threading
import time

import pytest
from make_study import HOSTILE, make_events
from rich.console import Console

from llp import display
from llp.display import Reporter, block, facts, landmark, sentence, write_line
from llp.progress import ProgressState
from llp.tracking.replay import result_from_events


def replayed(events):
    state = ProgressState()
    for event in events:
        state.update(event)
    return state


def text_of(state, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(block(state))
    return out.getvalue()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("until", [None, "tier1", "tier2", "score", "verify"])
def test_samples_and_full_search_equal_the_ledgers_own_account(resumed, until):
    events = make_events(resumed=resumed, until=until)
    cost = result_from_events(events).cost
    state = replayed(events)
    assert state.samples_spent == cost.tier1 + cost.tier2 + cost.verification
    assert state.samples_full_search == cost.full_search


def test_cost_agrees_with_the_ledger_while_it_grows():
    events = make_events(num_trials=8, resumed=True)
    state = ProgressState()
    for number, event in enumerate(events):
        state.update(event)
        if number % 5:
            continue
        cost = result_from_events(events[: number + 1]).cost
        assert state.samples_spent == cost.tier1 + cost.tier2 + cost.verification, event


def test_endings_equal_those_counted_from_the_trials():
    events = make_events(num_trials=20)
    counted: dict[str, dict[str, int]] = {}
    for trial in result_from_events(events).trials:
        if trial.outcome == "completed" and not trial.stopped_by:
            continue
        outcome = "stopped" if trial.outcome == "completed" else trial.outcome
        reason = trial.stopped_by.replace("rung", "after rung")
        counted.setdefault(outcome, {}).setdefault(reason, 0)
        counted[outcome][reason] += 1
    assert {k: dict(v) for k, v in replayed(events).endings().items()} == counted


def test_a_resumed_study_ends_with_the_same_counts_as_one_that_ran_through():
    through, resumed = replayed(make_events()), replayed(make_events(resumed=True))
    for kind in ("probe", "measure", "verify"):
        assert resumed.counts(kind) == through.counts(kind)
        assert resumed.expected(kind) == through.expected(kind)
    assert resumed.endings() == through.endings()
    assert resumed.samples_planned == through.samples_planned


def test_a_new_driver_forgets_what_was_running_and_the_pause():
    events = make_events(until="tier1")
    cut = next(i for i, e in enumerate(events) if e["event"] == "job_end")
    state = replayed(events[:cut])
    assert state.counts("probe")[1] == 2
    worked = state.elapsed()
    state.update({"event": "opened", "time": events[cut - 1]["time"] + 5000, "host": "h"})
    assert state.counts("probe")[1] == 0
    assert state.elapsed() == pytest.approx(worked)
    assert state.elapsed(now=events[cut - 1]["time"] + 5010) == pytest.approx(worked + 10)


def test_the_best_is_the_most_accurate_until_there_are_scores_and_then_the_first():
    events = make_events()
    before = replayed(make_events(until="tier2")).best
    accuracies = {
        event["trial_id"]: event["point"]["validation_accuracy"]
        for event in events
        if event["event"] == "point" and event["kind"] == "probe"
    }
    bad = {
        event["end"]["trial_id"]
        for event in events
        if event["event"] == "job_end" and event["end"]["outcome"] in ("failed", "diverged")
    }
    usable = {trial: accuracy for trial, accuracy in accuracies.items() if trial not in bad}
    assert before is not None
    assert before.trial_id == max(usable, key=lambda trial: usable[trial])
    assert math.isnan(before.score)
    scored = replayed(make_events(until="score"))
    assert scored.best is not None
    assert scored.best.trial_id == scored.scores[0][0]
    final = replayed(events)
    assert final.best is not None
    assert final.best.trial_id == events[-1]["winner"]


def test_expected_probes_follow_the_scheduler():
    spec = make_events(num_trials=12)[0]
    assert replayed([spec]).expected_on == {1: 12, 2: 4, 3: 1}
    spec["spec"]["tier1"]["scheduler"] = "fifo"
    assert replayed([spec]).expected_on == {1: 0, 2: 0, 3: 12}


def test_a_ledger_that_says_how_many_probes_it_plans_is_believed():
    events = make_events(num_trials=12)
    events[0] |= {"num_trials": 9, "jobs_per_rung": {"1": 9, "2": 3}}  # a grid of nine points
    state = replayed(events[:1])
    assert state.expected_on == {1: 9, 2: 3, 3: 0}
    assert state.expected("probe") == 12
    assert state.samples_full_search == 9 / 12 * replayed(make_events()[:1]).samples_full_search
    assert "9 trials" in landmark(state, events[0])


def test_no_more_is_measured_or_verified_than_there_are_trials():
    events = make_events(num_trials=12)
    events[0] |= {"num_trials": 1, "jobs_per_rung": {"1": 1}}
    state = replayed(events[:1])
    assert (state.expected("measure"), state.expected("verify")) == (1, 2)  # with two seeds


def test_full_trainings_are_numbered_not_named_by_their_seeds():
    events = make_events()
    state, lines = ProgressState(), []
    for event in events:
        state.update(event)
        lines += [landmark(state, event)] if event["event"] == "verification" else []
    assert [line.partition(" full training ")[2][:6] for line in lines] in (
        ["1 of 2", "1 of 2", "2 of 2", "2 of 2"],
        ["1 of 2", "2 of 2", "1 of 2", "2 of 2"],
    )


def test_printed_tables_end_where_their_words_end():
    out = io.StringIO()
    display.put(Console(file=out, width=10_000), block(replayed(make_events())))
    lines = out.getvalue().splitlines()
    assert lines == [line.rstrip() for line in lines]
    whole = [line.rstrip() for line in text_of(replayed(make_events()), 10_000).splitlines()]
    assert lines == whole


def test_remaining_time_falls_to_zero_and_is_unknown_at_first():
    events = make_events()
    state = ProgressState()
    seen = []
    for event in events:
        state.update(event)
        seen.append(state.remaining())
    assert seen[0] is None
    verify_end = next(
        i for i, e in enumerate(events) if e.get("name") == "verify" and e["status"] == "end"
    )
    assert seen[verify_end] == 0
    halfway = seen[verify_end // 2]
    assert halfway is not None
    assert halfway > 0


def test_no_share_leaves_the_unit_interval_at_any_moment():
    state = ProgressState()
    for event in make_events(num_trials=9, resumed=True):
        state.update(event)
        assert all(0 <= share <= 1 for _, share, _ in display._rows(state))
        assert text_of(state)


@pytest.mark.parametrize("width", [20, 60, 200])
def test_narrow_terminals_lose_no_fact(width):
    state = replayed(make_events())
    text = "".join(text_of(state, width).split())
    assert "t005" in text
    assert "power_law" in text
    assert max(len(line) for line in text_of(state, width).splitlines()) <= width


def test_the_live_block_is_short():
    for until in (None, "tier1", "score"):
        assert len(text_of(replayed(make_events(until=until)), 120).splitlines()) <= 9


def test_names_from_users_cannot_steer_the_terminal():
    events = make_events(hostile=HOSTILE + "\x1b[2J\x07")
    state = replayed(events)
    shown = text_of(state) + sentence(state)
    shown += "".join(landmark(state, event) for event in events)
    assert not any(letter in shown for letter in "\x1b\x07\x00‮\u2028")


def test_facts_are_strict_json_even_before_the_first_event():
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for state in (ProgressState(), replayed(make_events(until="tier1"))):
        out = io.StringIO()
        write_line(out, facts(state))
        assert json.loads(out.getvalue(), parse_constant=refuse)["event"] == "status"


def fresh(events, shift=None):
    """The events moved to now, as a running pipeline would send them."""
    shift = time.time() - events[0]["time"] if shift is None else shift
    return [{**event, "time": event["time"] + shift} for event in events]


def run_plain(events, monkeypatch, seconds, **options):
    monkeypatch.setattr(display, "PLAIN_SECONDS", seconds)
    people = io.StringIO()
    with Reporter(console=Console(file=people, width=160), **options) as reporter:
        for event in events:
            reporter(event)
    return people.getvalue()


def test_without_a_terminal_landmarks_come_at_once_and_progress_rarely(monkeypatch):
    text = run_plain(fresh(make_events()), monkeypatch, 3600.0)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert sum("planned samples" in line for line in lines) == 2  # the first, and tier 1's end
    for part in ("tier 1: probing", "tier 2: measuring", "verify: full", "test accuracy"):
        assert any(part in line for line in lines)
    assert any("t006-r1 failed: RuntimeError: shapes do not match" in line for line in lines)


def test_replayed_events_are_counted_but_not_shown_again(monkeypatch):
    text = run_plain(make_events(), monkeypatch, 0.0)
    assert text == ""


def test_machines_get_every_event_once(monkeypatch):
    events = fresh(make_events())
    machine = io.StringIO()
    text = run_plain(events, monkeypatch, 1.0, machine=machine, quiet=True)
    seen = [json.loads(line) for line in machine.getvalue().splitlines()]
    assert [event["seq"] for event in seen] == list(range(len(events)))
    assert text == ""


def test_non_finite_numbers_become_null_in_json_lines():
    out = io.StringIO()
    write_line(out, {"event": "x", "value": math.nan, "other": math.inf})
    assert json.loads(out.getvalue()) == {"event": "x", "value": None, "other": None}


def test_on_a_terminal_the_block_is_live_and_failures_stay_above_it():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    with Reporter(console=console) as reporter:
        for event in fresh(make_events()):
            reporter(event)
    text = out.getvalue()
    assert "t006-r1 failed" in text
    assert "made-up-0123abcd" in text
    assert threading.active_count() < 20


def test_a_search_that_fails_before_it_began_leaves_no_empty_block():
    out = io.StringIO()
    with Reporter(console=Console(file=out, force_terminal=True, width=60)):
        assert display.clock(0) == "0:00:00"
    assert out.getvalue().endswith("\x1b[2K")  # erased


def test_a_resumed_search_says_so_once_without_a_terminal(monkeypatch):
    events = make_events(resumed=True)
    at = [i for i, event in enumerate(events) if event["event"] == "opened"][1]
    now = time.time() - events[at]["time"]
    resumed = events[:at] + fresh(events[at:], now)
    text = run_plain(resumed, monkeypatch, 3600.0)
    assert text.count("going on with study made-up-0123abcd") == 1
    assert "t006-r1 failed" not in text


@pytest.mark.parametrize("role", ["people", "machine"])
def test_a_search_outlives_its_reader(role):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        given = {"machine": stream} if role == "machine" else {}
        console = Console(file=io.StringIO() if given else stream)
        with Reporter(console=console, **given) as reporter:
            for event in fresh(make_events()):
                reporter(event)
        assert reporter.state.winner
        assert os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev
