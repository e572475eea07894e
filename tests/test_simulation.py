"""Simulated searches: cost by hand, the driver's own decisions, peers, the command."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from llp.cli import app
from llp.errors import DataError, SpecError
from llp.simulation.clock import run
from llp.simulation.outcome import match, summary
from llp.simulation.own import OwnContender, ladder_steps
from llp.simulation.peers import PEERS
from llp.simulation.study import Options, contender, methods, simulate
from llp.simulation.tasks import Task, read_tasks

STEPS = 18


def made_up(num: int = 30, *, diverged: int = 0, restarts: bool = False) -> Task:
    """Power laws whose order never changes; configuration 7 is the best."""
    final = np.random.default_rng(0).permutation(num)
    final = np.where(final == 0, final[7], final)
    final[7] = 0
    steps = np.arange(1, STEPS + 1)
    values = 0.1 + final[:, None] / num + steps[None, :] ** -1.0
    values[num - diverged :, 3:] = np.nan
    scale = (float(np.nanmin(values[:, -1])), float(np.nanmedian(values[:, 0])))
    return Task("made up", "laws", values, steps / STEPS, restarts, scale)


def test_ladders_end_at_the_full_training():
    assert ladder_steps(51, 3) == [2, 6, 17, 51]
    assert ladder_steps(51, 2) == [2, 3, 6, 13, 26, 51]
    assert ladder_steps(1, 3) == [1]


def test_random_search_costs_one_training_each_and_finds_the_best_of_them():
    task = made_up()
    trace = run(task, contender(task, "random", list(range(30)), 0, Options()), budget=5)
    assert trace.row == [row for row in range(5) for _ in range(STEPS)]
    assert trace.step == list(range(STEPS)) * 5
    assert trace.cost[-1] == pytest.approx(5)
    expected = task.regret(task.values[:5, -1])
    budgets = np.arange(1.0, 6.0)
    assert trace.regret(task, budgets) == pytest.approx(np.minimum.accumulate(expected))
    assert trace.regret(task, np.array([0.5]))[0] == 1


def test_workers_share_the_cost_and_the_clock():
    task = made_up()
    alone = run(task, contender(task, "random", list(range(30)), 0, Options()), budget=8)
    eight = run(task, contender(task, "random", list(range(30)), 0, Options()), budget=8, workers=8)
    assert eight.cost[-1] == pytest.approx(alone.cost[-1])
    assert alone.time[-1] == pytest.approx(8)
    assert eight.time[-1] == pytest.approx(1)


def test_cold_promotions_pay_the_lower_rungs_again():
    """27 trials, eta 3, rungs of 2, 6 and 18 steps, which is what they cost."""
    task, rows = made_up(), list(range(27))
    warm = run(task, OwnContender(task, "asha", rows), budget=99)
    cold = run(task, OwnContender(task, "asha", rows, warm=False), budget=99)
    assert warm.cost[-1] * STEPS == pytest.approx(27 * 2 + 9 * 4 + 3 * 12)
    assert cold.cost[-1] * STEPS == pytest.approx(27 * 2 + 9 * 6 + 3 * 18)


def test_later_brackets_of_hyperband_train_from_the_start():
    """(9, 2 steps) (5, 6) (3, 18): 9 x 2 + 3 x 4 + 12, then 5 x 6 + 12, then 3 x 18 steps."""
    task = made_up()
    trace = run(task, OwnContender(task, "hyperband", list(range(17))), budget=99)
    assert trace.cost[-1] * STEPS == pytest.approx((18 + 12 + 12) + (30 + 12) + 54)


def test_halving_finds_the_best_where_ranks_never_change():
    task = made_up()
    trace = run(task, OwnContender(task, "asha", list(range(27))), budget=99)
    assert trace.regret(task, np.array([99.0]))[0] == 0
    assert trace.row[-1] == 7 or 7 in trace.row


def test_where_steps_are_data_sizes_every_rung_is_a_training_of_its_own():
    task = made_up(restarts=True)
    trace = run(task, OwnContender(task, "hyperband", list(range(9))), budget=99)
    assert len(trace.cost) == len({(r, s) for r, s in zip(trace.row, trace.step, strict=True)})
    paid = np.diff([0.0, *trace.cost])
    assert paid == pytest.approx(task.cost[np.array(trace.step)])


def test_a_simulated_search_decides_as_its_ledger_replays():
    """The ledger in memory, folded again, gives every next step: nothing else was looked at."""
    from llp.probing.state import SearchState

    task = made_up(diverged=5)
    own = OwnContender(task, "freeze_thaw", list(range(30)), options={"wave": 9})
    run(task, own, budget=6, workers=3)
    state, compared = SearchState(), 0
    for line in own.study.ledger.lines:
        if line["event"] == "decision" and line["decision"]["kind"] == "promote":
            step = own.source.scheduler.next_step(state)
            assert (step.trial_id, step.rung, step.reason) == (
                line["decision"]["trial_id"],
                line["decision"]["rung"],
                line["decision"]["reason"],
            )
            compared += 1
        state.apply(line)
    assert compared >= 5


@pytest.mark.parametrize("name", sorted(set(methods()) - {"random"}))
@pytest.mark.parametrize("workers", [1, 4])
def test_every_method_keeps_to_the_budget_and_ends_what_diverges(name, workers):
    task = made_up(diverged=10)
    rows = [29, 28, *range(27)]
    trace = run(task, contender(task, name, rows, 0, Options(budget=6)), budget=6, workers=workers)
    assert trace.cost[-1] <= 6 + 1 / STEPS
    assert len(set(trace.row)) > 3
    after = [s for r, s in zip(trace.row, trace.step, strict=True) if r == 29 and s > 3]
    assert after == []
    visits = list(zip(trace.row, trace.step, strict=True))
    if "_cold" not in name:
        assert len(visits) == len(set(visits))


def test_tune_asha_stops_where_its_own_percentile_says():
    """Trials come one by one; the second rung's cut-off is Tune's percentile of those before."""
    task = made_up()
    rows = list(range(30))
    trace = run(task, PEERS["tune_asha"][0](task, rows, 3, 0), budget=99)
    reached = dict.fromkeys(rows, 0)
    for row, step in zip(trace.row, trace.step, strict=True):
        reached[row] = max(reached[row], step + 1)
    seen: dict[int, list[float]] = {2: [], 6: []}
    for row in rows:
        for rung in (2, 6):
            if reached[row] < rung:
                continue
            value = -task.values[row, rung - 1]
            cut = np.percentile(seen[rung], 100 * (1 - 1 / 3)) if seen[rung] else -np.inf
            assert (reached[row] == rung) == (value < cut)
            seen[rung].append(value)


def test_match_is_where_the_curve_meets_random_search():
    task = made_up()
    options = Options(budget=10, seeds=3, trials=27, points=100)
    found = simulate([task], ["random", "hyperband"], options)
    rows = {row.method: row for row in summary(found, options)}
    assert rows["random"].against_random == 1
    target = found[0].regret["laws"][:, -1].mean()
    curve = found[1].regret["laws"].mean(axis=0)
    first = next(b for b, r in zip(options.budgets(), curve, strict=True) if r <= target + 1e-12)
    assert rows["hyperband"].match == pytest.approx(first)
    assert match(np.array([0.5, 0.4]), 0.3, np.array([1.0, 2.0])) == float("inf")


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(SpecError, match="did you mean 'hyperband'"):
        simulate([made_up()], ["hyperbnad"], Options())


@pytest.fixture
def table(tmp_path):
    task = made_up(12)
    long = pd.DataFrame(
        {
            "task": "laws",
            "curve": np.repeat(np.arange(12), STEPS),
            "position": np.tile(np.arange(1, STEPS + 1), 12),
            "value": task.values.ravel(),
        }
    )
    path = tmp_path / "laws.parquet"
    long.to_parquet(path)
    return path


def test_a_table_is_read_as_it_was_written(table):
    (task,) = read_tasks([table])
    assert task.values == pytest.approx(made_up(12).values)
    assert task.cost == pytest.approx(np.arange(1, STEPS + 1) / STEPS)
    assert not task.restarts


def test_the_command_compares_and_writes_curves(table, tmp_path):
    out = tmp_path / "out"
    arguments = ["simulate", str(table), "--scheduler", "random,asha,tune_asha,optuna_median"]
    arguments += ["--budget", "4", "--seeds", "2", "--workers", "2", "--json", "--out", str(out)]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [row["method"] for row in rows] == ["random", "asha", "tune_asha", "optuna_median"]
    assert rows[0]["match"] <= 4
    curves = pd.read_parquet(out / "regret.parquet")
    at_end = curves[(curves["method"] == "asha") & (curves["cost"] == 4.0)]
    assert at_end["regret"].mean() == pytest.approx(rows[1]["final"])
    assert (out / "regret.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["--scheduler", "asah"], "did you mean 'asha'"),
        (["--budget", "0"], "--budget must be above 0"),
        (["--option", "wave"], "KEY=VALUE"),
        (["--scheduler", "freeze_thaw", "--option", "wvae=1"], "did you mean 'wave'"),
        (["--scheduler", "tune_asha", "--option", "wave=1"], "none of the chosen schedulers"),
        (["--out", __file__], "cannot write into the folder"),
    ],
)
def test_bad_arguments_are_named(table, arguments, about):
    answer = CliRunner().invoke(app, ["simulate", str(table), *arguments])
    assert answer.exit_code == 2
    assert about in answer.output + answer.stderr


def test_nothing_is_compared_with_a_random_search_that_finds_the_best_or_is_not_there(table):
    task = made_up()
    options = Options(budget=30, seeds=2, trials=30)
    rows = summary(simulate([task], ["random", "asha"], options), options)
    assert all(np.isnan(row.against_random) and np.isnan(row.worst_task) for row in rows)
    arguments = ["simulate", str(table), "--scheduler", "asha", "--seeds", "1", "--budget", "1e9"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.splitlines()[1].split()[1] == "-"
    assert "compare with random search, which is not among them" in answer.stderr
    assert "budget 12: all trials" in answer.stderr


def test_a_table_without_whole_curves_is_an_error(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text("task,curve,position,value\n" + "\n".join(f"a,1,{k},1" for k in range(1, 12)))
    with pytest.raises(DataError, match="no task"):
        read_tasks([path])
