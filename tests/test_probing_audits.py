"""Early stops are audited: which, what they cost, what they say; and tier 1 ends by its rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from llp import views
from llp.driver import ProbeSource, Study
from llp.errors import SpecError
from llp.full_forecast import full_results
from llp.pipeline import make_rules
from llp.probing.audits import clopper_pearson, is_audited, tally, tightened
from llp.probing.promotion import DONE, WAIT, Asha
from llp.probing.search_stopping import (
    LEAST_SPREAD,
    NoGain,
    Samples,
    SearchPlan,
    Target,
    Time,
    chance_of_better,
    chance_of_new,
    chances_of_trials,
    forecast_ends,
    spent_samples,
)
from llp.probing.state import SearchState
from llp.probing.stopping import CurveForecast, Divergence, Plateau, PowerLaw
from llp.probing.verdicts import promise, promising
from llp.records import (
    CurvePoint,
    Decision,
    Interval,
    Job,
    JobEnd,
    LearningCurve,
    Rung,
    StopAudit,
    StopDecision,
)
from llp.reporting.probing_sections import _audit_exhibits
from llp.spec import load_spec
from llp.tracking.ledger import Ledger
from llp.tracking.mlflow_rows import Rows
from llp.tracking.replay import result_from_events
from llp.tracking.rows import STUDY

RUNGS = [Rung(1, 0.5, 50, 8), Rung(2, 1.0, 100, 8)]


class Listed:
    """A searcher with given final accuracies."""

    num_points = None

    def __init__(self, accuracies: list[float]) -> None:
        self.accuracies = accuracies

    def suggest(self, index: int) -> dict[str, Any]:
        return {"x": self.accuracies[index % len(self.accuracies)]}


class StopsBelow:
    """Stops, wrongly or not, whatever ends below a limit, and promises `delta`."""

    name = "below"

    def __init__(self, needed: float, delta: float = 0.05) -> None:
        self.needed, self.delta = needed, delta

    def decide(
        self, curve: LearningCurve, *, num_points: int, ended: Any, keep_fraction: float
    ) -> StopDecision:
        if len(curve.points) != 4 or curve.points[-1].validation_accuracy >= self.needed:
            return StopDecision(False)
        return StopDecision(True, self.name, Interval(0, 0.5), "is low", self.needed)


def open_study(folder: Path) -> Study:
    return Study(
        Ledger.create(
            folder, study_id=folder.name, spec={}, spec_digest="d", rungs=RUNGS, num_train=100
        )
    )


def source_of(study: Study, accuracies: list[float], **options: Any) -> ProbeSource:
    scheduler = Asha(len(accuracies), 2, 3)
    return ProbeSource(study, scheduler, Listed(accuracies), RUNGS, **options)


def work(source: ProbeSource, job: Job, late: float = 0.0) -> None:
    """Plays the worker; `late` is gained in the last epoch."""
    final = float(job.trial.hyperparameters["x"])
    for epoch in range(1, job.rung.epochs + 1):
        now = final * (1 - 0.5**epoch) + (late if epoch == job.rung.epochs else 0)
        seen = epoch * job.rung.num_examples
        point = CurvePoint(
            job.rung.rung, 1.0, epoch, seen, 2 * (1 - now), now, 1 - now, now, float(epoch)
        )
        verdict = source.on_report(job, point)
        if verdict is not None and verdict.stop:
            end = JobEnd(job.job_id, job.trial.trial_id, "stopped", stopped_by=verdict.reason)
            source.on_end(job, end)
            return
    source.on_end(job, JobEnd(job.job_id, job.trial.trial_id, "completed"))


def run(source: ProbeSource, **options: Any) -> None:
    while (job := source.next_job()) != DONE:
        assert job != WAIT
        work(source, job, **options)


def decisions(study: Study, kind: str) -> list[dict[str, Any]]:
    found = [e["decision"] for e in study.history if e["event"] == "decision"]
    return [decision for decision in found if decision["kind"] == kind]


# Audits


@pytest.mark.parametrize(("hits", "num"), [(0, 5), (2, 7), (7, 7), (1, 200)])
def test_the_bound_is_the_root_of_the_binomial_tail(hits, num):
    found = clopper_pearson(hits, num)
    if hits:
        assert stats.binom.sf(hits - 1, num, found.low) == pytest.approx(0.025)
    else:
        assert found.low == 0
    if hits < num:
        assert stats.binom.cdf(hits, num, found.high) == pytest.approx(0.025)
    else:
        assert found.high == 1


def test_no_audit_yet_says_nothing_about_the_rate():
    assert clopper_pearson(0, 0) == Interval(0.0, 1.0, 0.95)


def test_audits_cost_about_their_share_and_never_twice_that(tmp_path):
    study = open_study(tmp_path / "s")
    rng = np.random.default_rng(0)
    accuracies = rng.uniform(0.1, 0.9, 150).tolist()
    run(source_of(study, accuracies, stop_rules=[StopsBelow(0.6)], audit_share=0.1, seed=3))
    audited = decisions(study, "audit")
    assert len(decisions(study, "stop")) > 40
    cost = 4 * 50 * sum(d["rung"] == 1 for d in audited)
    cost += 4 * 100 * sum(d["rung"] == 2 for d in audited)
    share = cost / spent_samples(study.state)
    assert 0.03 < share < 0.2


def test_false_stops_are_counted_from_what_audited_jobs_reached(tmp_path):
    study = open_study(tmp_path / "s")
    accuracies = np.random.default_rng(1).uniform(0.1, 0.9, 80).tolist()
    options = {"stop_rules": [StopsBelow(0.6)], "audit_share": 0.3, "seed": 1}
    run(source_of(study, accuracies, **options), late=0.1)
    audits = decisions(study, "audit")
    wrong = 0
    for decision in audits:
        final = study.state.curve(decision["trial_id"], decision["rung"]).points[-1]
        wrong += final.validation_accuracy >= 0.6
    found = result_from_events(study.history).stop_audit
    assert found is not None
    assert wrong > 0
    assert (found.num_false, found.num_audits) == (wrong, len(audits))
    assert found.num_stops == len(decisions(study, "stop"))
    assert found.rate.low < wrong / len(audits) < found.rate.high
    assert found.delta == 0.05


def test_an_audited_job_is_not_stopped_by_a_forecast_again_and_may_be_promoted(tmp_path):
    study = open_study(tmp_path / "s")
    options = {"stop_rules": [StopsBelow(0.6)], "audit_share": 0.5, "seed": 1}
    run(source_of(study, [0.4, 0.5, 0.5, 0.55, 0.59, 0.61] * 5, **options), late=0.2)
    audited = {(d["trial_id"], d["rung"]) for d in decisions(study, "audit")}
    assert audited
    for key in audited:
        assert study.state.ends[key].outcome == "completed"
    promoted = {(d["trial_id"], d["rung"] - 1) for d in decisions(study, "promote")}
    assert audited & promoted


def test_a_rule_that_was_wrong_too_often_becomes_more_careful():
    def seen(num_false: int, num: int) -> StopAudit:
        return StopAudit(9, num, num_false, clopper_pearson(num_false, num), 0.05)

    assert tightened(0.05, seen(0, 20)) == 0.05
    assert tightened(0.05, seen(1, 30)) == 0.05
    assert tightened(0.05, seen(3, 10)) < 0.02
    assert tightened(0.05, seen(6, 10)) < tightened(0.05, seen(3, 10))
    assert promise(promising(PowerLaw(), 0.01)) == pytest.approx(0.01)
    assert promise(promising(CurveForecast(), 0.01)) == 0.01
    assert promise(Plateau()) is None


def test_a_replayed_ledger_gives_the_same_stops_and_audits(tmp_path):
    study = open_study(tmp_path / "s")
    accuracies = np.random.default_rng(2).uniform(0.1, 0.9, 40).tolist()
    options = {
        "stop_rules": [Plateau(), PowerLaw(), StopsBelow(0.6)],
        "audit_share": 0.2,
        "search_rules": [Samples(14_000)],
        "seed": 5,
    }
    run(source_of(study, accuracies, **options), late=0.1)
    expected = [e["decision"] for e in study.history if e["event"] == "decision"]
    assert {d["kind"] for d in expected} >= {"new", "stop", "audit", "end"}
    lines = study.ledger.path.read_bytes().splitlines(keepends=True)
    for cut in range(5, len(lines), 151):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "ledger.jsonl").write_bytes(b"".join(lines[:cut]))
        again = Study(Ledger.open(folder))
        again.record("opened", host="h", pid=1, environment={})
        run(source_of(again, accuracies, **options), late=0.1)
        made = [e["decision"] for e in again.history if e["event"] == "decision"]
        assert [d for d in made if d["kind"] != "retry"] == expected, f"cut after line {cut}"
        again.ledger.close()


def test_every_stop_carries_its_reason_and_a_prediction(tmp_path):
    study = open_study(tmp_path / "s")
    accuracies = np.random.default_rng(2).uniform(0.1, 0.9, 30).tolist()
    rules = [Plateau(patience_fraction=0.3), CurveForecast()]
    run(source_of(study, accuracies, stop_rules=rules, search_rules=[Samples(9000)]))
    stops = decisions(study, "stop")
    assert stops
    for decision in stops:
        assert decision["reason"]
        assert 0 <= decision["predicted_final"]["low"] <= decision["predicted_final"]["high"] <= 1


def test_the_share_of_audits_can_be_nothing(tmp_path):
    study = open_study(tmp_path / "s")
    run(source_of(study, [0.1, 0.9] * 20, stop_rules=[StopsBelow(0.6)]))
    assert decisions(study, "stop")
    assert not decisions(study, "audit")
    assert tally(study.state, delta=0.05).num_audits == 0
    job = Job("t000-r1", "probe", study.state.trials["t000"], RUNGS[0], 0)
    assert not is_audited(study.state, job, audit_share=0.0, seed=0)


# The end of a search


def test_tier_1_ends_when_its_samples_are_spent(tmp_path):
    study = open_study(tmp_path / "s")
    run(source_of(study, [0.5] * 50, search_rules=[Samples(2000)]))
    assert 2000 <= spent_samples(study.state) < 2000 + 100
    (decision,) = decisions(study, "end")
    assert decision["reason"].startswith("cost: ")
    assert len(study.state.trials) < 50


def test_tier_1_ends_when_the_target_is_reached(tmp_path):
    study = open_study(tmp_path / "s")
    run(source_of(study, [0.3, 0.8, 0.5, 0.95, 0.6, 0.4] * 3, search_rules=[Target(0.9)]))
    (decision,) = decisions(study, "end")
    assert "t003" in decision["reason"]
    best = study.state.result("t003", 2)[0]
    assert best >= 0.9


def test_time_counts_only_while_a_driver_runs():
    def event(kind: str, time: float) -> dict[str, Any]:
        return {"event": kind, "time": time}

    state = SearchState.from_events(
        [event("study", 100), event("phase", 130), event("opened", 1000), event("phase", 1005)]
    )
    assert state.seconds == 35
    plan = SearchPlan(RUNGS, 4)
    assert Time(30).decide(state, plan).stop
    assert not Time(36).decide(state, plan).stop


def test_running_jobs_are_stopped_at_their_next_report_once_the_search_ends(tmp_path):
    study = open_study(tmp_path / "s")
    source = source_of(study, [0.5] * 6, search_rules=[Samples(100)])
    first, second = source.next_job(), source.next_job()
    point = CurvePoint(1, 1.0, 2, 100, 1.0, 0.5, 0.5, 0.5, 1.0)
    verdicts = [source.on_report(job, point) for job in (first, second)]
    assert [v.reason for v in verdicts if v is not None] == ["cost", "cost"]
    assert source.next_job() == WAIT
    for job in (first, second):
        source.on_end(job, JobEnd(job.job_id, job.trial.trial_id, "stopped", stopped_by="cost"))
    assert source.next_job() == DONE


def test_jobs_whose_worker_was_lost_end_with_the_search(tmp_path):
    study = open_study(tmp_path / "s")
    source = source_of(study, [0.5] * 6, search_rules=[Samples(100)])
    first, second = source.next_job(), source.next_job()
    source.on_end(second, JobEnd(second.job_id, "t001", "failed", failure="lost"))
    source.on_report(first, CurvePoint(1, 1.0, 2, 100, 1.0, 0.5, 0.5, 0.5, 1.0))
    source.on_end(first, JobEnd(first.job_id, "t000", "stopped", stopped_by="cost"))
    assert source.next_job() == DONE
    assert study.state.ends["t001", 1].outcome == "stopped"


def with_top_results(folder: Path, finals: list[float], lower: int, upper: int) -> Study:
    """The first `lower` trials completed rung 1, the first `upper` of them the highest too."""
    study = open_study(folder)
    source = source_of(study, finals)
    for _ in range(lower):
        work(source, source.next_job())
    for number in range(upper):
        trial = study.state.trials[f"t{number:03d}"]
        study.record("decision", decision=Decision("promote", trial.trial_id, 2, "for the test"))
        job = Job(f"{trial.trial_id}-r2", "probe", trial, RUNGS[1], 0)
        study.record("job", job=job)
        work(source, job)
    return study


def test_the_chance_of_a_trial_is_the_student_tail_of_the_searchs_own_factors(tmp_path):
    """Rung 2 repeats rung 1 here, so the factors are all 1 and their spread the least allowed."""
    finals = [0.8, 0.7, 0.75, 0.72, 0.6, 0.5]
    study = with_top_results(tmp_path / "s", finals, 6, 4)
    plan = SearchPlan(RUNGS, 6)
    found = chances_of_trials(study.state, plan, ["t004", "t005"], 0.62)
    for trial_id, chance in zip(("t004", "t005"), found, strict=True):
        error = 1 - study.state.result(trial_id, 1)[0]
        score = math.log(0.38 / error) / (LEAST_SPREAD * math.sqrt(1 + 1 / 4))
        assert chance == pytest.approx(stats.t.cdf(score, 3))
    missed = np.prod(1 - found)
    assert chance_of_better(study.state, plan, 0.62) == pytest.approx(1 - missed)


def test_before_there_are_factors_the_prior_forecasts_along_both_axes(tmp_path):
    study = with_top_results(tmp_path / "s", [0.8, 0.7, 0.75, 0.72, 0.6, 0.5], 6, 2)
    plan = SearchPlan(RUNGS, 6)
    found = chances_of_trials(study.state, plan, ["t004", "t005"], 0.82)
    made = forecast_ends(study.state, plan, ["t004", "t005"])
    np.testing.assert_allclose(found, made.probability_better_than(0.82)[:2])
    assert found[0] > found[1]


def test_new_configurations_are_exchangeable_draws(tmp_path):
    """Without a margin the next of n is the best with probability 1 / (n + 1), and so on."""
    finals = np.random.default_rng(4).uniform(0.3, 0.8, 12).tolist()
    study = with_top_results(tmp_path / "s", finals, 12, 12)
    best = max(finals) * (1 - 0.5**8)
    assert chance_of_new(study.state, SearchPlan(RUNGS, 20), best) == pytest.approx(1 / 13)
    assert chance_of_better(study.state, SearchPlan(RUNGS, 12), best) == 0
    ten = chance_of_better(study.state, SearchPlan(RUNGS, 22), best + 0.01)
    each = chance_of_new(study.state, SearchPlan(RUNGS, 22), best + 0.01)
    assert each < 1 / 13
    assert ten == pytest.approx(1 - (1 - each) ** 10)


def test_the_margin_of_a_new_best_matches_simulation():
    """Maxima of exponential tails: how often the next draw beats 20 by a margin."""
    rng = np.random.default_rng(0)
    draws = rng.exponential(0.05, (20_000, 21))
    beaten = draws[:, -1] > draws[:, :-1].max(axis=1) + 0.05
    assert beaten.mean() == pytest.approx(math.exp(-1) / 21, rel=0.15)


def test_a_search_without_prospects_ends_and_one_with_prospects_goes_on(tmp_path):
    """The first trials are far better than all others are, or all are much alike."""
    rng = np.random.default_rng(0)
    poor = [0.95, 0.94, 0.93, 0.94, *rng.uniform(0.2, 0.3, 20).tolist()]
    alike = rng.uniform(0.5, 0.7, 24).tolist()
    rule = NoGain(margin=0.01, delta=0.05)
    for finals, ends in ((poor, True), (alike, False)):
        study = with_top_results(tmp_path / str(ends), finals, 24, 4)
        verdict = rule.decide(study.state, SearchPlan(RUNGS, 24))
        assert verdict.stop == ends, verdict
        early = with_top_results(tmp_path / f"early {ends}", finals, 24, 1)
        assert not rule.decide(early.state, SearchPlan(RUNGS, 24)).stop


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Time(0), "seconds must be above 0"),
        (lambda: Samples(math.nan), "samples must be above 0"),
        (lambda: Target(1.5), "accuracy"),
        (lambda: NoGain(delta=0.7), "delta"),
        (lambda: NoGain(margin=-1), "margin"),
        (lambda: Divergence(factor=0.5), "factor"),
    ],
)
def test_rules_refuse_what_makes_no_sense(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Divergence


def with_losses(losses: list[float]) -> LearningCurve:
    return LearningCurve(
        "x",
        1,
        tuple(
            CurvePoint(1, 0.1, e, 10 * e, loss, loss, 0.5, 0.5, 1.0)
            for e, loss in enumerate(losses, start=1)
        ),
    )


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([2.3, 1.0, 0.6, 0.5], False),
        ([2.3, 9.0, 8.0], True),
        ([2.3, 9.0, 1.9], False),
        ([2.3, 1.0, 2.31, 2.31], True),
        ([2.3, 2.29, 2.31, 2.31], False),
        ([2.3, 1.0, 2.31, 1.1], False),
    ],
)
def test_divergence_needs_a_blow_up_or_the_loss_of_what_was_learned(losses, stops):
    verdict = Divergence().decide(with_losses(losses), num_points=10, ended=[], keep_fraction=1 / 3)
    assert verdict.stop == stops
    assert bool(verdict.detail) == stops


# In the service


def test_audits_are_in_the_report_and_in_mlflows_rows(tmp_path):
    study = open_study(tmp_path / "s")
    options = {"stop_rules": [StopsBelow(0.6)], "audit_share": 0.4, "seed": 1}
    run(source_of(study, [0.4, 0.5, 0.5, 0.55, 0.59, 0.61] * 5, **options), late=0.2)
    result = result_from_events(study.history)
    assert result.stop_audit is not None
    (exhibit,) = _audit_exhibits(result)
    assert f"{result.stop_audit.num_false} of " in exhibit.reading
    assert f"{result.stop_audit.rate.high:.0%}" in exhibit.reading
    audited = decisions(study, "audit")
    assert all(d["trial_id"] in str(exhibit.data[0]) for d in audited)
    rows = Rows()
    for event in study.history:
        rows.take(event)
    logged = {name: value for name, value, *_ in rows.rows[STUDY].metrics}
    assert logged["stops/num_false"] == result.stop_audit.num_false
    assert logged["stops/false_stop_rate"] == pytest.approx(
        result.stop_audit.num_false / result.stop_audit.num_audits
    )
    assert logged["stops/false_stop_rate_high"] == pytest.approx(result.stop_audit.rate.high)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"name": "target", "accuracy": 1.5}], "must be above 0 and at most 1, not 1.5"),
        ([{"name": "targets", "accuracy": 0.5}], "did you mean 'target'"),
        ([{"name": "time"}], "seconds must be above 0"),
        ([{"name": "no_gain", "margins": 0.1}], "did you mean 'margin'"),
    ],
)
def test_search_rules_of_a_file_are_checked_before_anything_starts(rules, message):
    with pytest.raises(SpecError, match=message):
        make_rules(load_spec("digits", overrides=[f"tier1.search_rules={rules}"]), "search_rules")


def test_search_rules_of_a_file_become_rules():
    rules = [{"name": "cost", "samples": 1e6}, {"name": "no_gain", "margin": 0.01}]
    spec = load_spec("digits", overrides=[f"tier1.search_rules={rules}"])
    assert make_rules(spec, "search_rules") == [Samples(1e6), NoGain(margin=0.01)]


def test_full_training_is_forecast_from_all_rungs_and_shown(tmp_path, capsys):
    study = open_study(tmp_path / "s")
    finals = np.random.default_rng(3).uniform(0.4, 0.8, 12).tolist()
    run(source_of(study, finals))
    result = result_from_events(study.history)
    found = full_results(result)
    assert set(found) == {trial.trial.trial_id for trial in result.trials}
    top = [t for t, rung in study.state.ends if rung == 2]
    for trial_id in top:  # the highest rung is full training here
        mean, interval = found[trial_id]
        assert mean == pytest.approx(study.state.result(trial_id, 2)[0], abs=0.02)
        assert interval.low <= mean <= interval.high
    mean, interval = found[top[0]]
    about = views.about_trial(result, top[0]) | {"full_training": found[top[0]]}
    views.show_trial(about, views.console())
    shown = capsys.readouterr().out
    assert f"full training: forecast accuracy {100 * mean:.1f}" in shown.replace("\xa0", " ")
    assert "promote" in shown


def test_a_stop_is_shown_with_its_reason_and_forecast(tmp_path, capsys):
    study = open_study(tmp_path / "s")
    run(source_of(study, [0.4, 0.9] * 6, stop_rules=[StopsBelow(0.6)]))
    result = result_from_events(study.history)
    trial_id = decisions(study, "stop")[0]["trial_id"]
    views.show_trial(views.about_trial(result, trial_id), views.console())
    shown = capsys.readouterr().out.replace("\xa0", " ")
    assert "below: is low" in shown
    assert "forecast 0.0 % to 50.0 %" in shown
