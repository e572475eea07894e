"""The benchmarks measure what they say: process trees, steady state, equal budgets, JSON shape."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text())

BURN = """
import resource, subprocess, sys, time
if len(sys.argv) > 1:
    block = bytearray(b"x" * 150_000_000)
    while time.process_time() < 1.0:
        pass
    print("burnt", flush=True)
    sys.stdin.read()
else:
    subprocess.run([sys.executable, __file__, "again"], check=True)
    own, child = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(own.ru_utime + own.ru_stime + child.ru_utime + child.ru_stime)
"""


HELP = """
import contextlib, io, json, pathlib, runpy, sys, traceback
said, scripts = {}, [pathlib.Path(word) for word in sys.argv[1:]]
for script in scripts:
    sys.argv, out, code = [str(script), "--help"], io.StringIO(), 1
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            print(traceback.format_exc())
    said[script.stem] = (code, out.getvalue())
print(json.dumps(said))
"""


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def load(name: str) -> ModuleType:
    """A benchmark as a module, under a name that shadows nothing."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def help_of() -> dict[str, tuple[int, str]]:
    """Name -> exit code and words of `--help`, in one process: the imports take seconds."""
    command = [sys.executable, "-c", HELP, *(str(FOLDER / f"{name}.py") for name in NAMES)]
    said = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_its_command_and_has_the_common_options(name, help_of):
    code, words = help_of[name]
    assert code == 0, words
    assert f"python tests/benchmarks/{name}.py" in words
    assert "--json" in words
    assert "--quick" in words


def test_search_takes_a_smaller_search_when_quick_and_own_overrides_last():
    search = load("search")
    assert search.parse([]).seeds == 3
    quick = search.parse(["--quick", "--set", "tier1.num_trials=9"])
    assert quick.seeds == 1
    assert quick.overrides == [*search.QUICK, "tier1.num_trials=9"]
    assert search.parse(["--quick", "--seeds", "2"]).seeds == 2


def test_overhead_refuses_too_few_trials_for_a_steady_state(capsys):
    overhead = load("overhead")
    assert overhead.parse([]).trials == overhead.parse([]).function_trials == 64
    assert overhead.parse(["--quick"]).long_seconds is None
    with pytest.raises(SystemExit):
        overhead.parse(["--long-trials", "3"])
    assert "steady state" in capsys.readouterr().err


def test_a_watched_tree_counts_cpu_and_memory_of_grandchildren(tmp_path, monkeypatch):
    harness = load("harness")
    whole, samples = harness.ProcessTree.memory, threading.Semaphore(0)

    def counted(self, *, proportional):
        found = whole(self, proportional=proportional)
        if proportional:
            samples.release()
        return found

    monkeypatch.setattr(harness.ProcessTree, "memory", counted)
    script = tmp_path / "burn.py"
    script.write_text(BURN)
    child = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    watch = harness.Watch(child.pid)
    watch.start()
    assert child.stdout.readline() == "burnt\n"
    while samples.acquire(blocking=False):
        pass
    for _ in range(2):  # so that one sample lies wholly after the work
        assert samples.acquire(timeout=300)
    said, _ = child.communicate(timeout=300)
    usage = watch.finish()
    assert usage.cpu_seconds == pytest.approx(float(said), abs=0.4)
    assert usage.num_processes == 2
    assert 150e6 < usage.peak_pss_bytes <= usage.peak_rss_bytes < 400e6


def test_a_part_that_fails_says_why(tmp_path):
    harness = load("harness")
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('the reason')")
    with pytest.raises(RuntimeError, match=r"(?s)--part one ended with code 1.*the reason"):
        harness.run_part(str(script), "one", {})


def test_bars_compare_in_their_direction_and_the_file_has_two_keys(tmp_path, capsys):
    harness = load("harness")
    bars = [
        harness.Bar("seconds", 0.4, 0.5),
        harness.Bar("ratio", 4.0, 5, at_most=False),
    ]
    harness.finish({"a": 1}, bars, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == {
        "figures": {"a": 1},
        "bars": [
            {"name": "seconds", "value": 0.4, "bar": "<= 0.5", "met": True},
            {"name": "ratio", "value": 4.0, "bar": ">= 5", "met": False},
        ],
    }
    assert "MISSED" in capsys.readouterr().out


def span(pid: int, began: float, ended: float, active: float) -> dict[str, Any]:
    return {"pid": pid, "began": began, "ended": ended, "active": active}


def test_steady_state_leaves_out_start_and_tail_and_counts_gaps_and_waits():
    # Worker 2 starts 5 s late and worker 1 is done at 21, so 5..21 counts. Jobs take 5 s of which
    # 0.5 s are spent waiting for the driver; worker 1 also idles from 10 to 11.
    spans = [
        span(1, 0, 5, 4.5),
        span(1, 5, 10, 4.5),
        span(1, 11, 16, 4.5),
        span(1, 16, 21, 4.5),
        span(2, 5, 10, 4.5),
        span(2, 10, 15, 4.5),
        span(2, 15, 25, 9.0),
    ]
    found = load("timing").steady(spans, 2)
    assert found["steady_seconds"] == 16
    busy = (3 * 5 + 16) * 0.9
    assert found["lost_share"] == pytest.approx(1 - busy / 32)
    assert found["worker_seconds_per_job"] == pytest.approx(32 / (3 + 2 + 0.6))


def test_peers_stop_drawing_at_the_budget_and_early_stopping_buys_more_trials():
    class Source:
        def suggest(self, index: int) -> dict[str, Any]:
            return {"learning_rate": index}

    def run(cost: int) -> tuple[int, int]:
        """Trials and samples of a searcher whose trials, two at a time, each take `cost`."""
        draws = load("search").draws_within(1050, Source(), full=100, seed=0)
        running: list[str] = []
        for number in range(1000):
            answer = draws.suggest(f"x{number}")
            if isinstance(answer, dict):
                assert answer["learning_rate"] == len(drawn)
                drawn.append(f"x{number}")
                running.append(f"x{number}")
            elif answer is not None:
                assert not running
                return len(drawn), draws.spent()
            if len(running) == 2 or answer is None:
                draws.on_trial_complete(running.pop(0), {"samples_seen": cost})
        raise AssertionError("never finished")

    drawn: list[str] = []
    assert run(100) == (10, 1000)
    drawn = []
    trials, spent = run(20)
    assert trials > 45
    assert 950 <= spent <= 1050


def fake_row(accuracy: float, seconds: float, samples: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "cpu_seconds": seconds,
        "peak_memory_gb": 1.0,
        "peak_memory_rss_gb": 2.0,
        "samples_seen": samples,
        "num_trials": 3,
        "test_accuracy": accuracy,
        "regret_points": 0.0,
        "num_test_examples": 360,
    }


def test_search_judges_accuracy_to_one_test_image_and_demands_equal_budgets():
    search = load("search")
    runs = [
        {
            "llp": fake_row(0.970 + shift, 50, 1000),
            "asha": fake_row(0.972 + shift, 100, 1000),
            "random": fake_row(0.980 + shift, 100, 800),
        }
        for shift in (0.0, 0.01)
    ]
    summary = search.summarise(runs)
    assert summary["asha"]["seconds_ratio_to_llp"] == 2
    assert summary["llp"]["test_accuracy_standard_error"] == pytest.approx(0.005)
    met = {bar.name: bar.met for bar in search.bars(summary, runs)}
    assert met["seconds of the main job, slowest seed"]
    assert met["test accuracy of llp minus that of asha, points"]  # 0.20 < 100 / 360
    assert not met["test accuracy of llp minus that of random, points"]
    assert not met["samples seen by a peer, as a share of ours"]


@pytest.mark.parametrize(("length", "num_bare"), [(4.0, 1), (10.0, 2)])
def test_overhead_judges_what_a_trial_of_ten_seconds_loses(length, num_bare):
    figures = {
        "start": {"seconds": {"llp --help": 0.3}},
        "short": {
            "cpu_seconds_per_trial": 0.1,
            "function": {"num_jobs": 64, "ratio_to_engine": 6.0},
        },
        "long": {
            "trial_seconds": length,
            "lost_seconds_per_trial": 0.1,
            "extra_share": 0.5,
            "bare": [{}] * num_bare,
        },
    }
    values = {bar.name.split(" (")[0]: bar for bar in load("overhead").bars(figures)}
    assert values["% of the wall time of a trial of 10 s that is lost"].value == pytest.approx(1.0)
    missed = [name for name, bar in values.items() if not bar.met]
    slower = "% slower than in bare processes, trials of 10.0 s"
    assert missed == ([slower] if num_bare > 1 else [])


def check_written(path: Path) -> dict[str, Any]:
    written = json.loads(path.read_text())
    assert set(written) == {"figures", "bars"}
    for bar in written["bars"]:
        assert set(bar) == {"name", "value", "bar", "met"}
        assert math.isfinite(bar["value"])
        assert isinstance(bar["met"], bool)
    return written["figures"]


def run_script(name: str, *arguments: str) -> None:
    found = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *arguments], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_a_tiny_run_of_search_compares_three_contenders_at_equal_samples(tmp_path):
    small = {
        "training.epochs": 2,
        "tier1.num_trials": 6,
        "tier2.top_k": 1,
        "verification.top_k": 1,
        "tracking.mlflow": "false",
    }
    overrides = [f"--set={key}={value}" for key, value in small.items()]
    spec = FOLDER.parents[1] / "search_spaces" / "synthetic.yaml"
    out = tmp_path / "search.json"
    run_script("search", "--seeds=1", f"--spec={spec}", *overrides, f"--json={out}")
    figures = check_written(out)
    (run,) = figures["runs"]
    assert set(run) == set(figures["summary"]) == {"llp", "asha", "random"}
    for row in run.values():
        assert row["samples_seen"] == sum(row["samples_by_phase"].values())
        assert 0 < row["test_accuracy"] <= 1
        assert row["regret_points"] >= 0
    assert run["asha"]["num_errors"] == run["random"]["num_errors"] == 0
    assert run["random"]["samples_seen"] <= run["llp"]["samples_seen"]
    assert run["asha"]["num_trials"] >= run["random"]["num_trials"] > 0


@pytest.mark.slow
def test_a_tiny_run_of_overhead_measures_every_part(tmp_path):
    out = tmp_path / "overhead.json"
    run_script(
        "overhead", "--quick", "--trials=12", "--function-trials=4", "--long-trials=4",
        f"--json={out}",
    )  # fmt: skip
    figures = check_written(out)
    short = figures["short"]
    assert [short[name]["num_jobs"] for name in ("bare", "engine", "function")] == [12, 12, 4]
    assert all(short[name]["num_failed"] == 0 for name in ("bare", "engine", "function"))
    assert short["function"]["num_processes"] == 4  # Tune's default: a process for every trial
    assert short["engine"]["num_processes"] <= 6  # reused; how often depends on what ends at once
    assert 0 < short["bare"]["cpu_seconds_per_job"] < short["engine"]["cpu_seconds_per_job"]
    assert 0 <= figures["long"]["lost_share"] < 1
