"""A few kills of each kind; `tests/benchmarks/kills.py` has twenty of each."""

from __future__ import annotations

import random

import pytest
from kill_runs import (
    Killed,
    completed_twice,
    kill_driver,
    kill_node,
    kill_worker,
    redone,
    undisturbed,
)
from test_pipeline_resume import check_replay, decisions, outcomes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Killed:
    return undisturbed(tmp_path_factory.mktemp("whole"), "whole")


def race_and_winner(log):
    return [
        event.get("look") or (event["winner"], event["winner_reason"])
        for event in log
        if event["event"] in ("race", "finished")
    ]


def within_an_interval(found: Killed) -> bool:
    return all(work <= allowed for work, allowed in redone(found.folder))


@pytest.mark.parametrize("kill", [kill_driver, kill_worker])
def test_a_killed_search_loses_nothing_and_decides_the_same(kill, whole, tmp_path):
    found = kill(tmp_path, "cut", 2, random.Random(1))
    assert len(found.lines) == 2
    assert completed_twice(found.log) == []
    assert outcomes(found.log) == outcomes(whole.log)
    assert decisions(found.log) == decisions(whole.log)
    assert race_and_winner(found.log) == race_and_winner(whole.log)
    assert within_an_interval(found)
    assert check_replay(found.log) >= 12


def test_a_lost_node_costs_an_interval_and_the_ledger_replays(tmp_path):
    found = kill_node(tmp_path, "cut", 1, random.Random(1))
    assert len(found.lines) == 1
    assert completed_twice(found.log) == []
    assert within_an_interval(found)
    assert check_replay(found.log) >= 12
