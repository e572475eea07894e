"""A killed driver: nothing that was completed is lost or run again, and decisions are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
from study_runs import TINY, environment, events, killed_at, llp, signals_itself, start

from llp.driver import ProbeSource
from llp.pipeline import make_scheduler, num_kept
from llp.probing.promotion import NewTrial
from llp.probing.rung_correlation import rank_correlations
from llp.probing.state import SearchState
from llp.probing.verdicts import StopPolicy
from llp.records import Decision, to_plain
from llp.registry import load
from llp.spec import Spec

pytestmark = pytest.mark.slow


def decisions(log: list[dict]) -> list[dict]:
    """What was decided, in order; retries of lost jobs are the only addition of a kill."""
    return [
        e["decision"] for e in log if e["event"] == "decision" and e["decision"]["kind"] != "retry"
    ]


def ranking(log: list[dict]) -> list[tuple[str, float]]:
    report = [e for e in log if e["event"] == "scores"][-1]["score_report"]
    return [(s["trial_id"], s["value"]) for s in report["scores"]]


def outcomes(log: list[dict]) -> dict[str, tuple]:
    return {
        e["end"]["job_id"]: (e["end"]["outcome"], e["end"]["stopped_by"])
        for e in log
        if e["event"] == "job_end"
    }


def check_replay(log: list[dict]) -> int:
    """Asks the schedulers and rules for every decision again; returns how many were compared."""
    spec = Spec.model_validate(log[0]["spec"])
    scheduler = make_scheduler(spec)
    source = SimpleNamespace(scheduler=scheduler, num_kept=num_kept(spec))
    source.keep_fraction = partial(ProbeSource.keep_fraction, source)
    rules = [
        load("stop_rules", rule["name"])(**{k: v for k, v in rule.items() if k != "name"})
        for rule in spec.tier1.stop_rules
    ]
    epochs = dict(enumerate(spec.rung_epochs(), start=1))
    state, compared, last_epoch = SearchState(), 0, {}
    for event in log:
        if event["event"] == "point":
            last_epoch[event["job_id"]] = event["point"]["epoch"]
        if event["event"] == "decision":
            decision = event["decision"]
            if decision["kind"] in ("stop", "audit"):
                trial_id, rung = decision["trial_id"], decision["rung"]
                curve = state.curve(trial_id, rung, up_to=last_epoch[f"{trial_id}-r{rung}"])
                verdicts = [
                    rule.decide(
                        curve,
                        num_points=epochs[rung],
                        ended=state.ended_curves(rung),
                        keep_fraction=source.keep_fraction(state.trials[trial_id], rung),
                    )
                    for rule in rules
                ]
                verdict = next(v for v in verdicts if v.stop)
                again = Decision(
                    decision["kind"],
                    trial_id,
                    rung,
                    f"{verdict.reason}: {verdict.detail}",
                    verdict.predicted_final,
                    needed=verdict.needed,
                )
                assert to_plain(again) == decision
            elif decision["kind"] == "stops_off":
                found = rank_correlations(state, decision["rung"])
                assert to_plain(StopPolicy(rules).about_ranks(state, found)) == decision
            else:
                step = scheduler.next_step(state)
                if decision["kind"] == "new":
                    assert isinstance(step, NewTrial)
                    assert step.rung == decision["rung"]
                else:
                    assert to_plain(step) == decision
            compared += 1
        state.apply(event)
    return compared


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    done = llp("search", "tiny.yaml", "--study", "whole", folder=folder)
    assert done.returncode == 0, done.stderr
    return events(folder / "llp_studies" / "whole" / "ledger.jsonl")


def test_killed_again_and_again_a_search_ends_as_if_nothing_had_happened(uninterrupted, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    ledger = tmp_path / "llp_studies" / "cut" / "ledger.jsonl"
    total = len(uninterrupted)
    command = ("search", "tiny.yaml", "--study", "cut")
    for share in (0.02, 0.2, 0.45, 0.7, 0.9):
        lines = max(2, int(share * total))
        if ledger.exists():
            lines = max(lines, ledger.read_bytes().count(b"\n") + 8)
        killed_at(ledger, lines, *command, folder=tmp_path)
        command = ("resume", "cut")
    done = llp("resume", "cut", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    log = events(ledger)
    assert decisions(log) == decisions(uninterrupted)
    assert outcomes(log) == outcomes(uninterrupted)
    assert ranking(log) == ranking(uninterrupted)
    assert log[-1]["event"] == uninterrupted[-1]["event"] or log[-1]["event"] == "finished"
    winners = [
        [e["winner"] for e in each if e["event"] == "finished"] for each in (log, uninterrupted)
    ]
    assert winners[0] == winners[1]
    completed = Counter(
        e["end"]["job_id"]
        for e in log
        if e["event"] == "job_end" and e["end"]["outcome"] == "completed"
    )
    assert set(completed.values()) == {1}, "a completed job was run again"
    assert check_replay(log) >= 12


def test_replaying_a_ledger_of_several_workers_gives_every_decision_again(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    overrides = ["--set", "resources.num_cpus=3", "--set", "resources.max_concurrent=3"]
    ledger = tmp_path / "llp_studies" / "many" / "ledger.jsonl"
    words = ("search", "tiny.yaml", "--study", "many", *overrides)
    killed_at(ledger, 60, *words, folder=tmp_path)
    done = llp("resume", "many", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert check_replay(events(ledger)) >= 12


def test_interrupting_saves_the_state_and_says_how_to_go_on(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    ledger = tmp_path / "llp_studies" / "stop" / "ledger.jsonl"
    words = ("llp.cli", "search", "tiny.yaml", "--study", "stop")
    stopped = subprocess.run(
        signals_itself("SIGTERM", f"ledger={ledger}", 11, *words),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "llp resume stop" in stopped.stderr
    assert events(ledger)[-1]["event"] != "finished"


def test_the_plan_is_what_is_spent_when_nothing_is_stopped(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    calm = [
        "--set", "tier1.stop_rules=[]", "--set", "search_space.learning_rate.high=0.1",
        "--set", "resources.num_cpus=2", "--set", "resources.max_concurrent=2",
    ]  # fmt: skip
    for scheduler in ("asha", "hyperband", "fifo"):
        name = f"plan-{scheduler}"
        chosen = [*calm, "--set", f"tier1.scheduler={scheduler}"]
        planned = llp("check", "tiny.yaml", "--json", *chosen, folder=tmp_path)
        assert planned.returncode == 0, planned.stderr
        plan = next(
            e for e in map(json.loads, planned.stdout.splitlines()) if "samples_tier1" in str(e)
        )
        plan = plan["check"]["plan"]
        done = llp("search", "tiny.yaml", "--study", name, *chosen, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        spent = Counter()
        for event in events(tmp_path / "llp_studies" / name / "ledger.jsonl"):
            if event["event"] == "job_end":
                assert event["end"]["outcome"] == "completed"
                spent[event["kind"]] += event["end"]["samples_seen"]
        assert spent["probe"] == pytest.approx(plan["samples_tier1"], rel=0.01)
        assert spent["verify"] == pytest.approx(plan["samples_verification"], rel=0.01)


def test_a_second_driver_is_refused_by_name(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    ledger = tmp_path / "llp_studies" / "two" / "ledger.jsonl"
    process = start("search", "tiny.yaml", "--study", "two", folder=tmp_path)
    deadline = time.monotonic() + 600
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGSTOP)  # it holds the lock for as long as the second one asks
    try:
        second = llp("resume", "two", folder=tmp_path)
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.terminate()
        process.wait(timeout=300)
    assert second.returncode == 4
    assert str(process.pid) in second.stderr


@pytest.mark.parametrize("scheduler", ["freeze_thaw", "pasha"])
def test_a_killed_search_of_another_scheduler_goes_on_and_replays(tmp_path, scheduler):
    (tmp_path / "tiny.yaml").write_text(TINY)
    chosen = ["--set", f"tier1.scheduler={scheduler}", "--set", "output.report=true"]
    if scheduler == "freeze_thaw":
        chosen += ["--set", "tier1.scheduler_options.wave=6"]
    ledger = tmp_path / "llp_studies" / "cut" / "ledger.jsonl"
    killed_at(ledger, 60, "search", "tiny.yaml", "--study", "cut", *chosen, folder=tmp_path)
    done = llp("resume", "cut", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    log = events(ledger)
    assert check_replay(log) >= 6
    upward = [d for d in decisions(log) if d["kind"] == "promote"]
    assert upward
    assert all(d["reason"] for d in upward)
    winner = next(e["winner"] for e in log if e["event"] == "finished")
    assert winner in {e["trial"]["trial_id"] for e in log if e["event"] == "trial"}
    assert winner in (ledger.parent / "report.html").read_text(encoding="utf-8")
