"""Rank correlation between rungs: the number, its interval, when stopping goes off, who says so."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_probing_audits import RUNGS, StopsBelow, decisions, open_study, source_of

from llp import views
from llp.driver import ProbeSource, Study
from llp.probing.promotion import DONE
from llp.probing.rung_correlation import (
    is_due,
    rank_correlations,
    rank_interval,
    spearman,
    weak_ranks,
)
from llp.probing.search_stopping import NoGain
from llp.probing.state import SearchState
from llp.probing.stopping import Plateau
from llp.probing.verdicts import StopPolicy
from llp.records import (
    CurvePoint,
    Decision,
    Interval,
    Job,
    JobEnd,
    LearningCurve,
    RankCorrelation,
    StopDecision,
    to_plain,
)
from llp.reporting.rank_exhibit import rank_exhibit
from llp.tracking.ledger import Ledger
from llp.tracking.mlflow_rows import Rows
from llp.tracking.replay import result_from_events
from llp.tracking.rows import STUDY

NUM = 45


def run(source: ProbeSource, upper: list[float]) -> None:
    """Plays the worker: on rung 2 trial i reaches `upper[i]` whatever it did below."""
    while (job := source.next_job()) != DONE:
        assert isinstance(job, Job)
        final = float(job.trial.hyperparameters["x"])
        if job.rung.rung == 2:
            final = upper[int(job.trial.trial_id[1:])]
        outcome, stopped_by = "completed", ""
        for epoch in range(1, job.rung.epochs + 1):
            now = final * (1 - 0.5**epoch)
            seen = epoch * job.rung.num_examples
            point = CurvePoint(job.rung.rung, 1.0, epoch, seen, 1 - now, now, 1 - now, now, 1.0)
            verdict = source.on_report(job, point)
            if verdict is not None and verdict.stop:
                outcome, stopped_by = "stopped", verdict.reason
                break
        end = JobEnd(job.job_id, job.trial.trial_id, outcome, stopped_by)  # type: ignore[arg-type]
        source.on_end(job, end)


def accuracies() -> tuple[list[float], dict[str, list[float]]]:
    """Results on rung 1, and on rung 2: in the same order, or in none."""
    rng = np.random.default_rng(7)
    lower = rng.uniform(0.1, 0.9, NUM)
    return lower.tolist(), {
        "same": lower.tolist(),
        "none": np.minimum(1.2 - 0.8 * lower, 1.0).tolist(),
    }


def searched(folder: Path, above: str, **options: Any) -> Study:
    lower, upper = accuracies()
    study = open_study(folder)
    options = {"stop_rules": [StopsBelow(0.3)], "seed": 1} | options
    run(source_of(study, lower, **options), upper[above])
    return study


@pytest.fixture(scope="module")
def weak_study(tmp_path_factory) -> Study:
    return searched(tmp_path_factory.mktemp("weak") / "s", "none")


@pytest.fixture(scope="module")
def strong_study(tmp_path_factory) -> Study:
    return searched(tmp_path_factory.mktemp("strong") / "s", "same", stop_rules=[StopsBelow(0.75)])


@pytest.mark.parametrize("seed", range(4))
def test_the_correlation_is_scipys_with_and_without_ties(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, 30))
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0])
    first, second = rng.integers(0, 5, size=(2, 30)).astype(float)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0])


def test_what_cannot_be_correlated_is_nan_and_says_nothing():
    assert math.isnan(spearman([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]))
    assert rank_interval(math.nan, 30) == Interval(-1.0, 1.0, 0.9)
    assert rank_interval(1.0, 3) == Interval(-1.0, 1.0, 0.9)
    four = rank_interval(1.0, 4)
    assert four.low < 0 < four.high == 1
    assert rank_interval(-1.0, 4).low == -1


@pytest.mark.parametrize("num", [6, 12, 30])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.85])
def test_the_interval_covers_the_true_correlation_nine_times_in_ten(num, rho):
    """Of joint normals Spearman's is `6 / pi asin(rho / 2)` (Pearson 1907)."""
    rng = np.random.default_rng(num)
    truth = 6 / math.pi * math.asin(rho / 2)
    hits, draws = 0, 400
    for _ in range(draws):
        first = rng.normal(size=num)
        second = rho * first + math.sqrt(1 - rho**2) * rng.normal(size=num)
        found = rank_interval(float(stats.spearmanr(first, second)[0]), num)
        hits += found.low <= truth <= found.high
    assert 0.86 <= hits / draws <= 0.99


def played(rho: float, num: int, rng: np.random.Generator) -> bool:
    """Whether stopping goes off in a search over two pairs of rungs, best third promoted."""
    below = rng.normal(size=num)
    for lower in (1, 2):
        above = rho * below + math.sqrt(1 - rho**2) * rng.normal(size=len(below))
        order = np.argsort(-below)[: len(below) // 3]
        for count in range(1, len(order) + 1):
            best = order[:count]
            value = spearman(below[best], above[best])
            pair = RankCorrelation(
                lower, lower + 1, count, count, len(below), value, rank_interval(value, count)
            )
            if weak_ranks([pair]) is not None:
                return True
        below = above[order]
    return False


def test_stopping_goes_off_where_ranks_are_weak_and_seldom_elsewhere():
    """Correlation among all trials, though only promoted ones are seen on both rungs."""
    rng = np.random.default_rng(0)
    share = {
        rho: np.mean([played(rho, 81, rng) for _ in range(60)]) for rho in (0.2, 0.38, 0.8, 0.9)
    }
    assert share[0.2] > 0.8
    assert share[0.38] > 0.7
    assert share[0.8] < 0.4
    assert share[0.9] < 0.15
    assert np.mean([played(0.2, 9, rng) for _ in range(60)]) < 0.1


def test_the_very_best_alone_and_distant_rungs_decide_nothing():
    low = rank_interval(-0.5, 20)
    assert weak_ranks([RankCorrelation(1, 2, 20, 20, 60, -0.5, low)]) is not None
    assert weak_ranks([RankCorrelation(1, 2, 20, 20, 200, -0.5, low)]) is None
    assert weak_ranks([RankCorrelation(1, 3, 20, 20, 60, -0.5, low)]) is None


def test_correlations_come_from_the_trials_completed_on_both_rungs(weak_study):
    study, state = weak_study, weak_study.state
    both = [t for t, rung in state.ends if rung == 2]
    assert all(state.ends[t, 2].outcome == "completed" for t in both)
    assert len(both) == NUM // 3
    columns = [[state.result(t, rung)[0] for t in both] for rung in (1, 2)]
    (found,) = rank_correlations(state, 2)
    assert found.value == pytest.approx(stats.spearmanr(*columns)[0])
    assert found.num_trials == found.num_promoted == len(both)
    assert found.num_below == NUM
    assert result_from_events(study.history).rank_correlations == (found,)
    again = SearchState.from_events(study.history)
    stopped = again.completed[2].pop()
    again.ends[stopped, 2] = replace(again.ends[stopped, 2], outcome="stopped")
    (found,) = rank_correlations(again, 2)
    assert (found.num_trials, found.num_promoted) == (len(both) - 1, len(both))


def test_long_searches_are_measured_after_every_tenth_trial_only():
    state = SearchState()
    assert not is_due(state, 2)
    due = []
    for num in range(1, 101):
        state.completed.setdefault(2, []).append(f"t{num:03d}")
        due += [num] if is_due(state, 2) else []
    assert due == [*range(1, 51), 60, 70, 80, 90, 100]


class StopsPromoted(StopsBelow):
    """Stops what is low on rung 1, and on rung 2 what is high."""

    def decide(self, curve: LearningCurve, **asked: Any) -> StopDecision:
        if curve.rung == 1:
            return super().decide(curve, **asked)
        late = len(curve.points) == 4 and curve.points[-1].validation_accuracy > 0.65
        return StopDecision(late, self.name, Interval(0, 0.5), "is high", 0.9 if late else None)


def test_where_ranks_are_weak_forecasts_stop_nothing_more(tmp_path, strong_study):
    rule = StopsPromoted(0.3)
    study = searched(tmp_path / "s", "none", stop_rules=[rule])
    (off,) = decisions(study, "stops_off")
    assert "below 0.5" in off["reason"]
    place = next(i for i, e in enumerate(study.history) if e.get("decision") == off)
    kinds = [e["decision"]["kind"] for e in study.history[:place] if e["event"] == "decision"]
    assert "stop" in kinds
    later = [e["job"]["trial"]["trial_id"] for e in study.history[place:] if e["event"] == "job"]
    curves = [study.state.curve(trial_id, 2, up_to=4) for trial_id in later]
    asked = {"num_points": 8, "ended": [], "keep_fraction": 1 / 3}
    assert sum(rule.decide(curve, **asked).stop for curve in curves) >= 2
    assert all(study.state.ends[trial_id, 2].outcome == "completed" for trial_id in later)
    assert decisions(strong_study, "stop")
    assert not decisions(strong_study, "stops_off")


def test_only_forecasts_go_off(tmp_path):
    state = SearchState()
    weak = [RankCorrelation(1, 2, 20, 20, 60, -0.5, rank_interval(-0.5, 20))]
    assert StopPolicy([Plateau()]).about_ranks(state, weak) is None
    assert StopPolicy([StopsBelow(0.6)]).about_ranks(state, weak) is not None
    assert StopPolicy([], [NoGain()]).about_ranks(state, weak) is not None
    study = searched(tmp_path / "s", "none", stop_rules=[Plateau(patience_fraction=0.1)])
    assert not decisions(study, "stops_off")
    assert result_from_events(study.history).rank_correlations


def test_a_job_is_asked_about_by_no_forecast_once_stopping_is_off(tmp_path):
    study = open_study(tmp_path / "s")
    source = source_of(study, [0.4] * 6, stop_rules=[StopsBelow(0.6)])
    first, second = source.next_job(), source.next_job()

    def verdict(job: Job) -> bool:
        for epoch in range(1, 5):
            point = CurvePoint(1, 1.0, epoch, 50 * epoch, 1.0, 0.4, 0.6, 0.4, 1.0)
            found = source.on_report(job, point)
        return found is not None and found.stop

    assert verdict(first)
    study.record("decision", decision=Decision("stops_off", "", 2, "for the test"))
    assert not verdict(second)


def test_a_ledger_cut_anywhere_gives_the_same_decisions(tmp_path):
    lower, upper = accuracies()
    options: dict[str, Any] = {"stop_rules": [StopsBelow(0.3)], "audit_share": 0.1, "seed": 1}
    study = searched(tmp_path / "s", "none", **options)
    expected = [e["decision"] for e in study.history if e["event"] == "decision"]
    assert "stops_off" in {d["kind"] for d in expected}
    lines = study.ledger.path.read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if b'"stops_off"' in line)
    for cut in (*range(place - 3, place + 3), place // 2, len(lines) - 20):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "ledger.jsonl").write_bytes(b"".join(lines[:cut]))
        again = Study(Ledger.open(folder))
        again.record("opened", host="h", pid=1, environment={})
        run(source_of(again, lower, **options), upper["none"])
        made = [e["decision"] for e in again.history if e["event"] == "decision"]
        assert [d for d in made if d["kind"] != "retry"] == expected, f"cut after line {cut}"
        assert to_plain(again.ranks) == to_plain(study.ranks)
        again.ledger.close()


def test_report_mlflow_and_show_say_that_stopping_went_off(weak_study, capsys):
    study = weak_study
    result = result_from_events(study.history)
    (off,) = decisions(study, "stops_off")
    (pair,) = result.rank_correlations
    exhibit = rank_exhibit(result)
    assert exhibit.reading == f"Early stopping went off, {off['reason']}."
    assert f"{abs(pair.interval.high):.2f}" in str(exhibit.data[0])
    rows = Rows()
    for event in study.history:
        rows.take(event)
    assert rows.rows[STUDY].tags["llp.early_stopping"] == off["reason"]
    logged = {name: value for name, value, *_ in rows.rows[STUDY].metrics}
    assert logged["ranks/rung_1_to_2"] == pair.value
    assert logged["ranks/rung_1_to_2_low"] == pair.interval.low
    assert logged["ranks/rung_1_to_2_high"] == pair.interval.high
    views.show_trial(views.about_trial(result, "t000"), views.console())
    shown = " ".join(capsys.readouterr().out.split())
    assert "early stopping went off in this study" in shown
    assert "below 0.5" in shown


def test_the_report_has_the_correlation_of_every_pair_in_any_case(strong_study):
    result = result_from_events(strong_study.history)
    (pair,) = result.rank_correlations
    assert pair.value > 0.99
    reading = rank_exhibit(result).reading
    assert "rung 1 and rung 2: Spearman" in reading
    assert f"{pair.num_trials} trials" in reading
    empty = result_from_events(strong_study.history[:1])
    assert len(empty.rungs) == len(RUNGS)
    assert "Nothing was measured" in rank_exhibit(empty).reading
