"""What MLflow should hold, without MLflow: the translation depends on the events only."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param

from llp.tracking.mlflow_rows import Rows
from llp.tracking.rows import STUDY, safe_key
from tests.make_study import HOSTILE, RUNGS, make_events


def rows_of(events: list[dict[str, Any]]) -> Rows:
    rows = Rows()
    for event in events:
        rows.take(event)
    return rows


def test_steps_place_every_rung_at_the_same_spot_of_the_ladder() -> None:
    rows = rows_of(make_events(12)).rows
    below = {rung.rung: sum(r.epochs for r in RUNGS[: rung.rung - 1]) for rung in RUNGS}
    fractions = {
        below[rung.rung] + epoch: rung.data_fraction
        for rung in RUNGS
        for epoch in range(1, rung.epochs + 1)
    }
    seen = set()
    for key, row in rows.items():
        for name, value, _, step in row.metrics:
            if name == "tier1/data_fraction":
                assert value == fractions[step], key
                seen.add(step)
    assert seen == set(fractions)


def test_non_finite_numbers_are_never_rows() -> None:
    events = make_events(12)
    assert any(e["event"] == "point" and e["point"]["train_loss"] is None for e in events)
    for row in rows_of(events).rows.values():
        assert all(math.isfinite(value) for _, value, _, _ in row.metrics)


def test_failed_trials_have_no_final_accuracy_but_say_what_they_cost() -> None:
    rows = rows_of(make_events(12)).rows
    for key in ("t001", "t006"):
        names = {name for name, *_ in rows[key].metrics if name.startswith("final/")}
        assert names == {"final/samples_seen", "final/seconds"}
        assert rows[key].status == "FAILED"
    assert rows["t001"].tags["llp.stop_reason"] == "diverged"
    assert "shapes do not match" in rows["t006"].tags["llp.failure"]
    assert rows["t003"].status == "FINISHED"
    assert rows["t003"].tags["llp.stop_reason"] == "power_law"


def test_params_are_the_searched_values_and_their_logarithms() -> None:
    events = make_events(12)
    rows = rows_of(events).rows
    for event in events:
        if event["event"] == "trial":
            values = event["trial"]["hyperparameters"]
            params = dict(rows[event["trial"]["trial_id"]].params)
            for name in ("learning_rate", "weight_decay", "width"):
                logarithm = float(params.pop(f"log10_{name}"))
                assert 10**logarithm == pytest.approx(values[name], rel=1e-4)
            assert params == {name: str(value) for name, value in values.items()}


def test_each_scalar_has_one_row_and_each_step_of_a_curve_one_point() -> None:
    for row in rows_of(make_events(12, resumed=True)).rows.values():
        places = [(name, step) for name, _, _, step in row.metrics]
        if row.name not in {"t004", "t006"}:  # retried with other numbers or none: see the docs
            assert len(places) == len(set(places)), row.name


def test_batches_do_not_matter() -> None:
    events = make_events(12, resumed=True)
    whole, pieces = rows_of(events), Rows()
    metrics: dict[str, list[Any]] = {}
    for number, event in enumerate(events):
        pieces.take(event)
        if number % 7 == 0 or number == len(events) - 1:
            for key in pieces.dirty:
                metrics.setdefault(key, []).extend(pieces.rows[key].metrics)
            pieces.forget()
    for key, row in whole.rows.items():
        assert metrics[key] == row.metrics
        assert (pieces.rows[key].tags, pieces.rows[key].status) == (row.tags, row.status)


def test_interrupted_study_leaves_nothing_running_until_it_is_resumed() -> None:
    events = make_events(12, resumed=True)
    second = max(number for number, event in enumerate(events) if event["event"] == "opened")
    rows = rows_of(events[:second])
    running = {key for key, row in rows.rows.items() if row.status == "RUNNING"}
    assert STUDY in running
    rows.interrupt()
    assert {key for key, row in rows.rows.items() if row.status == "KILLED"} == running
    for event in events[second:]:
        rows.take(event)
    assert {row.status for row in rows.rows.values()} == {"FINISHED", "FAILED"}
    assert rows.rows[STUDY].tags["llp.status"] == "finished"


def test_verified_accuracy_is_the_mean_over_seeds() -> None:
    events = make_events(12)
    rows = rows_of(events).rows
    winner = events[-1]["winner"]
    values = [
        event["verification"]["test_accuracy"]
        for event in events
        if event["event"] == "verification" and event["verification"]["trial_id"] == winner
    ]
    metrics = {name: value for name, value, _, _ in rows[winner].metrics}
    assert metrics["verified/test_accuracy"] == pytest.approx(sum(values) / 2)
    assert metrics["verified/test_accuracy_standard_deviation"] == pytest.approx(
        abs(values[0] - values[1]) / math.sqrt(2)
    )
    assert rows[winner].tags["llp.winner"] == "true"


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=300) | st.from_regex(r"[a./@ -]{1,8}", fullmatch=True))
def test_every_name_becomes_one_mlflow_accepts(name: str) -> None:
    key = safe_key(name)
    _validate_metric_name(key)
    _validate_param(key, "1")


@given(names=st.lists(st.text(alphabet="ab@#/.", max_size=5), unique=True, max_size=6))
def test_different_names_stay_different(names: list[str]) -> None:
    assert len({safe_key(name) for name in names}) == len(names)


def test_hostile_study_is_translated_to_storable_text() -> None:
    rows = rows_of(make_events(8, hostile=HOSTILE)).rows
    texts = [
        text
        for row in rows.values()
        for pair in (row.params, row.tags)
        for item in pair.items()
        for text in item
    ]
    assert any("script" in text for text in texts)
    for text in texts:
        assert not re.search("[\x00-\x08\ud800-\udfff]", text)


def test_trial_that_was_not_promoted_ended_when_its_last_job_did() -> None:
    events = make_events(12)
    rows = rows_of(events).rows
    for key, row in rows.items():
        if key != STUDY:
            ends = [
                event["time"]
                for event in events
                if event["event"] == "job_end"
                and event["kind"] == "probe"
                and event["end"]["trial_id"] == key
            ]
            assert row.end == round(1000 * ends[-1])
