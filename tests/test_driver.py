"""The driver's side of a study without Ray: retries, stops, lost workers, replayed searchers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from study_runs import TINY

from llp import pipeline
from llp.cluster.searchers import gp, tpe
from llp.driver import ListedSource, PhasedSource, ProbeSource, Study, derived_seed
from llp.probing.freeze_thaw import FreezeThaw
from llp.probing.promotion import DONE, WAIT, Asha
from llp.probing.stopping import PowerLaw
from llp.records import CheckpointRef, CurvePoint, Job, JobEnd, Rung, Trial
from llp.spec import load_spec
from llp.spec.domains import Choice, Fixed, LogUniform, RandomSearch, Uniform
from llp.tracking.ledger import Ledger
from llp.training.model_cost import ModelCosts
from llp.workloads import load

RUNGS = [Rung(1, 0.5, 50, 6), Rung(2, 1.0, 100, 6)]
SPACE = {"x": Uniform(low=0.0, high=1.0)}


def make_study(folder: Path) -> Study:
    header = {
        "study_id": folder.name,
        "spec": {},
        "spec_digest": "d",
        "rungs": RUNGS,
        "num_train": 100,
    }
    return Study(Ledger.create(folder, **header))


def reopen(study: Study) -> Study:
    folder = study.ledger.path.parent
    study.ledger.close()
    again = Study(Ledger.open(folder))
    again.record("opened", host="h", pid=1, environment={})
    return again


def probes(study: Study, num_trials: int = 6, **options: Any) -> ProbeSource:
    options.setdefault("searcher", RandomSearch(SPACE, (), 0))
    return ProbeSource(study, scheduler=Asha(num_trials, 2, 3), rungs=RUNGS, **options)


def work(
    source: Any, job: Job, *, accuracy: float | None = None, outcome: str = "completed"
) -> int:
    """Plays the worker for one job; returns the number of points it made."""
    value = accuracy if accuracy is not None else float(job.trial.hyperparameters["x"])
    if outcome in ("failed", "out_of_memory"):
        source.on_end(job, JobEnd(job.job_id, job.trial.trial_id, outcome, failure="boom"))
        return 0
    for epoch in range(1, job.rung.epochs + 1):
        now = value * (1 - 0.5**epoch)
        seen = epoch * job.rung.num_examples
        point = CurvePoint(job.rung.rung, 1.0, epoch, seen, 1.0, 0.5, 1 - now, now, float(epoch))
        verdict = source.on_report(job, point)
        if verdict is not None and verdict.stop:
            end = JobEnd(job.job_id, job.trial.trial_id, "stopped", stopped_by=verdict.reason)
            source.on_end(job, end)
            return epoch
    reference = CheckpointRef(f"checkpoints/{job.job_id}.pt", "0" * 64)
    source.on_end(job, JobEnd(job.job_id, job.trial.trial_id, outcome, checkpoint=reference))
    return job.rung.epochs


def run_to_the_end(source: Any) -> list[Job]:
    done = []
    while (job := source.next_job()) != DONE:
        assert job != WAIT, "one worker never has to wait"
        work(source, job)
        done.append(job)
    return done


def kinds(study: Study) -> Counter[str]:
    return Counter(event["event"] for event in study.history)


def test_every_step_is_in_the_ledger_before_the_next_is_decided(tmp_path):
    study = make_study(tmp_path / "s")
    jobs = run_to_the_end(probes(study))
    assert [job.job_id for job in jobs[:6]] == [f"t00{i}-r1" for i in range(6)]
    assert len(jobs) == 6 + 2
    assert kinds(study)["job"] == kinds(study)["job_end"] == 8
    assert study.ledger.events() == study.history


def test_out_of_memory_is_tried_once_more_with_a_smaller_micro_batch(tmp_path):
    source = probes(make_study(tmp_path / "s"), num_trials=1)
    first = source.next_job()
    work(source, first, outcome="out_of_memory")
    second = source.next_job()
    assert (second.job_id, second.attempt) == (first.job_id, 1)
    assert second.micro_batch_divisor == 4 * first.micro_batch_divisor
    work(source, second, outcome="out_of_memory")
    assert source.next_job() == DONE


def test_a_lost_job_is_issued_again_after_a_restart_and_nothing_else_is(tmp_path):
    study = make_study(tmp_path / "s")
    source = probes(study)
    work(source, source.next_job())
    lost = source.next_job()
    study = reopen(study)
    source = probes(study)
    again = source.next_job()
    assert (again.job_id, again.attempt) == (lost.job_id, 1)
    work(source, again)
    rest = run_to_the_end(source)
    issued = Counter(job.job_id for job in rest)
    assert set(issued.values()) == {1}
    assert lost.job_id not in issued


def test_points_that_a_resumed_job_repeats_are_not_written_twice(tmp_path):
    study = make_study(tmp_path / "s")
    source = probes(study, num_trials=1)
    job = source.next_job()
    for epoch in (1, 2, 3):
        source.on_report(job, CurvePoint(1, 1.0, epoch, epoch * 50, 1, 0.5, 0.5, 0.5, 1.0))
    study = reopen(study)
    source = probes(study, num_trials=1)
    again = source.next_job()
    for epoch in (1, 2, 3, 4):
        source.on_report(again, CurvePoint(1, 1.0, epoch, epoch * 50, 1, 0.5, 0.5, 0.5, 9.0))
    points = [e["point"]["epoch"] for e in study.history if e["event"] == "point"]
    assert points == [1, 2, 3, 4]


def test_a_stop_that_was_recorded_before_a_kill_still_counts(tmp_path):
    study = make_study(tmp_path / "s")
    rules = [PowerLaw()]
    source = probes(study, num_trials=9, stop_rules=rules)
    for accuracy in (0.9, 0.91, 0.92, 0.93, 0.94, 0.95):
        work(source, source.next_job(), accuracy=accuracy)
    job = source.next_job()
    for epoch in range(1, 7):
        point = CurvePoint(1, 1.0, epoch, epoch * 50, 1, 0.1, 0.9, 0.05 * (1 - 0.5**epoch), 1.0)
        verdict = source.on_report(job, point)
        if verdict is not None:
            break
    assert verdict is not None
    assert verdict.reason == "power_law"
    study = reopen(study)
    source = probes(study, num_trials=9, stop_rules=rules)
    end = study.state.ends[job.trial.trial_id, 1]
    assert (end.outcome, end.stopped_by) == ("stopped", "power_law")
    assert source.next_job().trial.trial_id == "t007"


def test_a_search_in_which_everything_fails_gives_up_early(tmp_path):
    source = probes(make_study(tmp_path / "s"), num_trials=50)
    issued = 0
    while (job := source.next_job()) != DONE:
        work(source, job, outcome="failed")
        issued += 1
    assert issued == 3 * 3


def test_warm_promotion_starts_from_the_weights_below_and_cold_does_not(tmp_path):
    for warm in (True, False):
        jobs = run_to_the_end(probes(make_study(tmp_path / str(warm)), warm=warm))
        upper = [job for job in jobs if job.rung.rung == 2]
        starts = [job.start_from.path if job.start_from else None for job in upper]
        below = [f"checkpoints/{job.trial.trial_id}-r1.pt" for job in upper]
        assert starts == (below if warm else [None] * len(upper))


def test_listed_jobs_are_retried_and_skipped_when_they_are_done(tmp_path):
    study = make_study(tmp_path / "s")
    trial = Trial("t000", {"x": 0.5}, 0)
    listed = [Job(f"t000-v{i}", "verify", trial, RUNGS[1], i) for i in range(3)]
    source = ListedSource(study, listed, max_failures=1)
    work(source, source.next_job())
    work(source, source.next_job(), outcome="failed")
    assert (again := source.next_job()).attempt == 1
    assert again.job_id == "t000-v1"
    study = reopen(study)
    source = ListedSource(study, listed, max_failures=1)
    assert [job.job_id for job in run_to_the_end(source)] == ["t000-v1", "t000-v2"]
    study = reopen(study)
    assert ListedSource(study, listed, max_failures=1).next_job() == DONE


def test_phases_follow_each_other_and_are_made_when_their_turn_comes(tmp_path):
    study = make_study(tmp_path / "s")
    made = []

    def second() -> ListedSource:
        made.append(len(study.state.ends))
        trial = next(iter(study.state.trials.values()))
        return ListedSource(study, [Job("t000-v0", "verify", trial, RUNGS[1], 0)])

    phases = [("tier1", lambda: probes(study)), ("verify", second)]
    jobs = run_to_the_end(PhasedSource(study, phases, lambda: 0.0))
    assert made == [8]
    assert jobs[-1].job_id == "t000-v0"
    told = [(e["name"], e["status"]) for e in study.history if e["event"] == "phase"]
    assert told == [("tier1", "start"), ("tier1", "end"), ("verify", "start"), ("verify", "end")]


@pytest.mark.parametrize("build", [tpe, gp])
def test_a_resumed_searcher_goes_on_as_the_uninterrupted_one(tmp_path, build):
    def searcher():
        return build(SPACE, (), seed=3, num_startup_trials=3)

    whole = make_study(tmp_path / "whole")
    run_to_the_end(probes(whole, num_trials=9, searcher=searcher()))
    cut = make_study(tmp_path / "cut")
    source = probes(cut, num_trials=9, searcher=searcher())
    for _ in range(5):
        work(source, source.next_job())
    source.next_job()
    cut = reopen(cut)
    run_to_the_end(probes(cut, num_trials=9, searcher=searcher()))
    drawn = [{t: dict(v.hyperparameters) for t, v in s.state.trials.items()} for s in (whole, cut)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 9


def test_tpe_finds_the_better_half():
    search = tpe({"x": Uniform(low=0.0, high=1.0)}, (), seed=0, num_startup_trials=8)
    drawn = []
    for index in range(40):
        drawn.append(search.suggest(index)["x"])
        search.tell(index, 1 - (drawn[-1] - 0.8) ** 2)
    assert sum(abs(x - 0.8) < 0.2 for x in drawn[20:]) >= 14


def test_optuna_respects_conditions_constraints_and_fixed_values():
    space = {
        "optimizer": Choice(values=["sgd", "adamw"]),
        "learning_rate": LogUniform(low=1e-4, high=1.0),
        "momentum": Uniform(low=0.5, high=0.9, when={"optimizer": "sgd"}),
        "width": Fixed(value=8),
    }
    rule = "optimizer == 'sgd' or learning_rate <= 0.01"
    search = tpe(space, [rule], seed=1, num_startup_trials=5)
    seen = Counter()
    for index in range(30):
        values = search.suggest(index)
        seen[values["optimizer"]] += 1
        assert ("momentum" in values) == (values["optimizer"] == "sgd")
        assert values["optimizer"] == "sgd" or values["learning_rate"] <= 0.01
        assert values["width"] == 8
        search.tell(index, None if index % 5 == 0 else 0.5)
    assert len(seen) == 2


def test_derived_seeds_are_distinct_and_stable():
    seeds = {derived_seed(s, kind, i) for s in range(3) for kind in (1, 2) for i in range(50)}
    assert len(seeds) == 300
    assert derived_seed(0, 1, 0) == derived_seed(0, 1, 0)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_ledger_cut_after_any_line_leads_to_the_same_decisions(tmp_path):
    """Batches of lines are one write, but a power cut or a full page can end between them."""
    whole = make_study(tmp_path / "whole")
    run_to_the_end(probes(whole, num_trials=4))
    lines = whole.ledger.path.read_bytes().splitlines(keepends=True)
    expected = [e["decision"] for e in whole.history if e["event"] == "decision"]
    ended = {e["end"]["job_id"] for e in whole.history if e["event"] == "job_end"}
    for cut in range(1, len(lines)):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "ledger.jsonl").write_bytes(b"".join(lines[:cut]))
        study = Study(Ledger.open(folder))
        study.record("opened", host="h", pid=1, environment={})
        run_to_the_end(probes(study, num_trials=4))
        decisions = [e["decision"] for e in study.history if e["event"] == "decision"]
        assert [d for d in decisions if d["kind"] != "retry"] == expected, f"cut after line {cut}"
        ends = [e["end"]["job_id"] for e in study.history if e["event"] == "job_end"]
        assert sorted(ends) == sorted(ended), f"cut after line {cut}"
        study.ledger.close()


def test_a_retried_failure_is_told_to_the_searcher_in_ledger_order(tmp_path):
    told: list[int] = []

    class Listening(RandomSearch):
        def tell(self, index: int, value: float | None) -> None:
            told.append(index)

    study = make_study(tmp_path / "s")
    source = probes(study, num_trials=4, searcher=Listening(SPACE, (), 0))
    failed = source.next_job()
    work(source, failed, outcome="failed")
    again = source.next_job()
    assert again.job_id == failed.job_id
    other = source.next_job()
    work(source, other)
    work(source, again)
    live = list(told)
    assert live == [1, 0]
    told.clear()
    probes(reopen(study), num_trials=4, searcher=Listening(SPACE, (), 0))
    assert told == live


def test_operations_reach_the_ledger_before_their_trial_wherever_it_is_cut(tmp_path):
    def source(study: Study) -> ProbeSource:
        return ProbeSource(
            study,
            scheduler=FreezeThaw(6, 2, wave=3, cost="operations"),
            searcher=RandomSearch(SPACE, (), 0),
            rungs=RUNGS,
            operations=lambda values: 1e6 * (1 + float(values["x"])),
        )

    study = make_study(tmp_path / "whole")
    run_to_the_end(source(study))
    expected = [e["decision"] for e in study.history if e["event"] == "decision"]
    for trial_id, trial in study.state.trials.items():
        wanted = 1e6 * (1 + float(trial.hyperparameters["x"]))
        assert study.state.operations[trial_id] == wanted
    lines = study.ledger.path.read_bytes().splitlines(keepends=True)
    for place in range(2, len(lines), 5):
        folder = tmp_path / f"cut{place}"
        folder.mkdir()
        (folder / "ledger.jsonl").write_bytes(b"".join(lines[:place]))
        cut = reopen(Study(Ledger.open(folder)))
        run_to_the_end(source(cut))
        found = [e["decision"] for e in cut.history if e["event"] == "decision"]
        assert [d for d in found if d["kind"] != "retry"] == expected
        assert cut.state.operations == study.state.operations


NET = """
from torch import nn

def build(*, channels, image_size, num_classes, width=4):
    if width == 8:
        raise ValueError("8 is not a width")
    pixels = channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.Linear(width, num_classes))
"""


def test_a_network_that_cannot_be_built_is_a_failed_trial_and_not_the_end_of_the_search(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "narrow_net.py").write_text(NET)
    (tmp_path / "tiny.yaml").write_text(TINY)
    spec = load_spec(
        tmp_path / "tiny.yaml",
        [
            "model={name: 'narrow_net:build'}",
            "search_space.width=[8, 16, 32]",
            "searcher={name: random}",
            "tier1.scheduler=freeze_thaw",
            "tier1.scheduler_options={cost: operations}",
            "tier1.max_failures=0",
        ],
    )
    data = load(spec.dataset, spec.seed)
    pixels = data.channels * data.image_size**2

    def played(study: Study) -> Study:
        source = pipeline.probes(spec, study, ModelCosts(spec, data))
        while (job := source.next_job()) != DONE:
            assert job != WAIT, "one worker never has to wait"
            values = job.trial.hyperparameters
            outcome = "failed" if values["width"] == 8 else "completed"
            work(source, job, accuracy=float(values["momentum"]), outcome=outcome)
        return study

    study = played(make_study(tmp_path / "whole"))
    widths = {name: t.hyperparameters["width"] for name, t in study.state.trials.items()}
    broken = {name for name, width in widths.items() if width == 8}
    assert broken
    assert study.state.operations == {
        name: pixels * width + width * data.num_classes
        for name, width in widths.items()
        if name not in broken
    }
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == len(broken)
    for name in broken:
        assert any(f"of {name} cannot" in text and "8 is not a width" in text for text in told)
    expected = [e["decision"] for e in study.history if e["event"] == "decision"]
    lines = study.ledger.path.read_bytes().splitlines(keepends=True)
    first = next(
        k
        for k, event in enumerate(study.history)
        if event["event"] == "trial" and event["trial"]["trial_id"] in broken
    )
    for place in (first, first + 1, first + 2, len(lines) // 2, len(lines)):
        folder = tmp_path / f"cut{place}"
        folder.mkdir(exist_ok=True)
        (folder / "ledger.jsonl").write_bytes(b"".join(lines[:place]))
        cut = played(reopen(Study(Ledger.open(folder))))
        found = [e["decision"] for e in cut.history if e["event"] == "decision"]
        assert [d for d in found if d["kind"] != "retry"] == expected
        assert cut.state.operations == study.state.operations


def test_costs_are_asked_only_of_a_configuration_that_has_a_result(tmp_path):
    told = []

    class Listening(RandomSearch):
        objectives = ("error", "parameters")

        def tell(self, index: int, value: float | None, costs: Any = None) -> None:
            told.append((index, value, costs and costs["parameters"]))

    def size(values: Any) -> dict[str, float]:
        assert asked != ["t000"], "its network cannot be built"
        return {"parameters": 7.0}

    source = probes(
        make_study(tmp_path / "s"), 2, searcher=Listening(SPACE, (), 0), model_costs=size
    )
    asked: list[str] = []
    while (job := source.next_job()) != DONE and job.rung.rung == 1:
        asked[:] = [job.trial.trial_id]
        work(source, job, outcome="failed" if asked == ["t000"] else "completed")
    assert told[0] == (0, None, None)
    assert told[1][0] == 1
    assert told[1][2] == 7.0
