"""Tier 2 as a tie-break at promotions: earned or not used; only ties; same budget; replayed."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_runs import TINY, events, llp

from llp.driver import ProbeSource, Study
from llp.errors import SpecError
from llp.probing.promotion import DONE, WAIT, Asha, Hyperband
from llp.probing.ties import MIN_TIED, settle, tie_at_cut
from llp.records import (
    CheckpointRef,
    CurvePoint,
    FlatnessProfile,
    Interval,
    Job,
    JobEnd,
    Measurement,
    Rung,
    TieBreak,
)
from llp.reporting.tie_exhibit import tie_sentence
from llp.scoring.calibration import Calibration
from llp.scoring.evidence import Gain
from llp.scoring.ranks import normal_scores
from llp.scoring.tie_break import earned, read_calibration, tie_values
from llp.spec import digest
from llp.spec.checks import check
from llp.spec.domains import RandomSearch, Uniform
from llp.spec.schema import Spec
from llp.tie_break import make_tie_break
from llp.tracking.ledger import Ledger
from llp.tracking.replay import result_from_events

IMAGES = 200
RUNGS = [Rung(1, 0.1, 30, 2), Rung(2, 0.5, 90, 2), Rung(3, 1.0, 270, 2)]
NO_INTERVAL = Interval(math.nan, math.nan)
FLAT = TieBreak(True, "it has earned it", {"flat": 0.4}, ("flat",))


def calibration(**changes: Any) -> Calibration:
    """One in which tier 2 earned its place, by hand."""
    plain: dict[str, Any] = {
        "target": "verified_accuracy",
        "num_finished": 96,
        "num_studies": 2,
        "weights": {"validation_accuracy": 0.5, "h: surface": 9.0, "sam_sharpness": 0.4},
        "standard_errors": {"validation_accuracy": 0.1, "h: surface": 0.1, "sam_sharpness": 0.1},
        "tier2_enters": True,
        "gain_tier2": Gain(0.05, Interval(0.02, 0.08, 0.9), 0.0),
        "in_force": "T1+h+T2",
    }
    return Calibration(**(plain | changes))


# --- the cut ----------------------------------------------------------------------------------


def places(accuracies: list[float]) -> list[tuple[float, float, int, str]]:
    return sorted((-a, 1 - a, i, f"t{i:03d}") for i, a in enumerate(accuracies))


@pytest.mark.parametrize("seed", range(30))
def test_tied_are_those_within_the_standard_error_on_both_sides_of_the_cut(seed: int) -> None:
    rng = random.Random(seed)
    spread = rng.choice([0.005, 0.05, 0.4])
    ranked = places([0.5 + spread * rng.random() for _ in range(rng.randrange(2, 25))])
    quota = rng.randrange(1, len(ranked) + 1)
    found = tie_at_cut(ranked, quota, IMAGES)

    def error(a: float, b: float) -> float:
        p, q = ((IMAGES * x + 0.5) / (IMAGES + 1) for x in (a, b))
        return math.sqrt((p * (1 - p) + q * (1 - q)) / IMAGES)

    kept, rest = [-p[0] for p in ranked[:quota]], [-p[0] for p in ranked[quota:]]
    inside = [a for a in kept if rest and a - rest[0] <= error(a, rest[0])]
    inside += [b for b in rest if kept[-1] - b <= error(kept[-1], b)]
    if found is None:
        assert len(inside) < MIN_TIED
        return
    assert [-place[0] for place in found.tied] == inside
    assert found.num_kept == sum(a >= kept[-1] for a in inside)
    assert found.standard_error == pytest.approx(error(kept[-1], rest[0]))


def test_results_without_a_number_are_never_tied() -> None:
    ranked = sorted([*places([0.5, 0.5]), (math.inf, math.inf, 7, "t007"), (math.inf, 0, 8, "t8")])
    assert tie_at_cut(ranked, 2, IMAGES) is None


@pytest.mark.parametrize("seed", range(10))
def test_as_many_go_on_and_equal_values_leave_the_order_as_it_is(seed: int) -> None:
    rng = random.Random(seed)
    tie = tie_at_cut(places([0.8 + 0.001 * rng.random() for _ in range(9)]), 4, IMAGES)
    assert tie is not None
    values = {place[3]: rng.random() for place in tie.tied}
    choice = settle(tie, values)
    assert len(choice.kept) == len(choice.usual) == tie.num_kept
    assert min(values[n] for n in choice.kept) > max(values[n] for n in choice.passed_over)
    assert settle(tie, dict.fromkeys(values, 0.3)).kept == choice.usual
    assert settle(tie, {}).kept == choice.usual


# --- whole searches, without Ray --------------------------------------------------------------


def make_study(folder: Path) -> Study:
    header = {"study_id": "s", "spec": {}, "spec_digest": "d", "rungs": RUNGS, "num_train": 270}
    return Study(Ledger.create(folder, **header))


def source(study: Study, scheduler: Any, tie_break: TieBreak | None = FLAT) -> ProbeSource:
    return ProbeSource(
        study,
        scheduler=scheduler,
        searcher=RandomSearch({"x": Uniform(low=0.0, high=1.0)}, (), 0),
        rungs=RUNGS,
        tie_break=tie_break,
        tie_values=tie_values,
    )


def point_of(job: Job) -> CurvePoint:
    """Accuracies of few different values, so that there are ties; a loss that says nothing."""
    draw = random.Random(f"{job.trial.trial_id} {job.rung.rung}")
    accuracy = round(0.6 + 0.1 * job.trial.hyperparameters["x"] + 0.02 * draw.random(), 2)
    seen = job.rung.samples_seen
    return CurvePoint(job.rung.rung, 1.0, 2, seen, draw.random(), 0.9, 0.5, accuracy, 1.0)


def finish(probes: ProbeSource, job: Job, *, flat: bool = True) -> None:
    samples = job.rung.samples_seen
    if job.kind == "measure":
        assert job.start_from is not None
        assert job.metrics == FLAT.metrics
        value = random.Random(f"flat {job.trial.trial_id}").random() if flat else 1.0
        found = Measurement("flat", value, 0.01, False, 32, 1.0)
        probes.on_report(job, FlatnessProfile(job.trial.trial_id, (found,), 1.0))
        samples //= 5
    else:
        probes.on_report(job, point_of(job))
    reference = CheckpointRef(f"checkpoints/{job.job_id}.pt", "0" * 64)
    end = JobEnd(job.job_id, job.trial.trial_id, "completed", samples_seen=samples)
    if job.kind == "probe":
        end = dataclasses.replace(end, checkpoint=reference)
    probes.on_end(job, end)


def search(folder: Path, probes: Any, *, workers: int = 1, seed: int = 0, flat: bool = True) -> Any:
    """Plays a search to its end on `workers`, which finish in random order."""
    rng, running = random.Random(seed), []
    while True:
        job = probes.next_job() if len(running) < workers else WAIT
        if job == DONE:
            assert not running
            return probes.study
        if job == WAIT:
            assert running, "waiting for nothing"
            finish(probes, running.pop(rng.randrange(len(running))), flat=flat)
        else:
            running.append(job)


def promoted(study: Study) -> set[tuple[str, int]]:
    return set(study.state.promoted)


def decided(study: Study) -> list[Any]:
    return [e["decision"] for e in study.history if e["event"] == "decision"]


@pytest.mark.parametrize("build", [Asha, Hyperband])
@pytest.mark.parametrize("num_trials", [9, 30])
def test_outside_ties_no_choice_changes_and_the_budget_is_the_same(
    build: Any, num_trials: int, tmp_path: Path
) -> None:
    plain = search(tmp_path, source(make_study(tmp_path / "p"), build(num_trials, 3), None))
    tied = build(num_trials, 3, tie_images=IMAGES)
    study = search(tmp_path, source(make_study(tmp_path / "t"), tied))
    equal = search(tmp_path, source(make_study(tmp_path / "e"), tied), flat=False)
    assert promoted(equal) == promoted(plain), "values that are equal change nothing"
    state = study.state
    assert Counter(r for _, r in promoted(study)) == Counter(r for _, r in promoted(plain))
    for bracket, sizes in enumerate(tied.sizes()):
        for rung in sorted(sizes)[:-1]:
            ranked = [p[3] for p in state.standings(2).rung(bracket, rung).ranked]
            usual, there = (
                ranked[: sizes[rung + 1]],
                {n for n, r in promoted(study) if r == rung + 1},
            )
            kept = [name for name in ranked if name in there]
            assert len(kept) == len(usual)
            choice = state.ties.get((bracket, rung))
            differ = set(kept) ^ set(usual)
            assert differ <= (set(choice.tied) if choice else set())
            if choice is not None:
                assert set(choice.kept) - set(choice.usual) == set(kept) - set(usual)
    measured = [
        e["end"] for e in study.history if e["event"] == "job_end" and e["kind"] == "measure"
    ]
    assert {m["trial_id"] for m in measured} == {n for c in state.ties.values() for n in c.tied}
    if num_trials == 30 and build is Asha:
        assert any(c.kept != c.usual for c in state.ties.values()), "or nothing was tested"
    cost = result_from_events(study.history).cost
    assert cost.tier2 == sum(m["samples_seen"] for m in measured)
    assert cost.tier2 <= 0.2 * cost.tier1


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_ties_are_settled_alike_by_any_number_of_workers(workers: int, tmp_path: Path) -> None:
    one = search(tmp_path, source(make_study(tmp_path / "a"), Asha(30, 3, tie_images=IMAGES)))
    many = search(
        tmp_path,
        source(make_study(tmp_path / "b"), Asha(30, 3, tie_images=IMAGES)),
        workers=workers,
        seed=workers,
    )
    assert promoted(many) == promoted(one)
    assert many.state.ties == one.state.ties


def test_a_ledger_cut_after_any_line_settles_its_ties_alike(tmp_path: Path) -> None:
    scheduler = Asha(12, 3, tie_images=IMAGES)
    whole = search(tmp_path, source(make_study(tmp_path / "whole"), scheduler))
    assert whole.state.ties
    lines = whole.ledger.path.read_bytes().splitlines(keepends=True)
    whole.ledger.close()
    first = next(i for i, e in enumerate(whole.history) if e["event"] == "job" and "-t" in str(e))
    for cut in range(first - 2, len(lines)):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "ledger.jsonl").write_bytes(b"".join(lines[:cut]))
        study = Study(Ledger.open(folder))
        study.record("opened", host="h", pid=1, environment={})
        search(tmp_path, source(study, scheduler))
        assert [d for d in decided(study) if d["kind"] != "retry"] == decided(whole), cut
        assert study.state.ties == whole.state.ties, cut
        study.ledger.close()


def test_a_measurement_that_fails_for_good_leaves_the_trial_to_the_metric(tmp_path: Path) -> None:
    probes = source(make_study(tmp_path / "s"), Asha(12, 3, tie_images=IMAGES))
    issued = 0
    while (job := probes.next_job()) != DONE:
        if job.kind == "probe":
            finish(probes, job)
            continue
        issued += 1
        probes.on_end(job, JobEnd(job.job_id, job.trial.trial_id, "failed", failure="boom"))
    choices = list(probes.study.state.ties.values())
    assert issued == 3 * sum(len(choice.tied) for choice in choices) > 0
    assert all(choice.kept == choice.usual for choice in choices)


# --- whether it is earned, and its values -----------------------------------------------------


ROWS = {"sam_sharpness": ["sam_sharpness"], "hessian_trace": ["hessian_trace"]}


def test_a_calibration_earns_it_and_only_clear_weights_count() -> None:
    found = earned(calibration(), ROWS)
    assert (found.used, found.weights, found.metrics) == (
        True, {"sam_sharpness": 0.4}, ("sam_sharpness",),
    )  # fmt: skip
    assert "96 finished trials of 2 studies (tau +0.050, lower 95 % limit +0.020)" in found.reason
    assert "sam_sharpness +0.40 ± 0.10" in found.reason


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, "no calibration was given"),
        (calibration(num_finished=11), "could not say anything"),
        (calibration(gain_tier2=None), "could not say anything"),
        (calibration(gain_tier2=Gain(math.nan, NO_INTERVAL)), "of 2 studies could not say"),
        (calibration(gain_tier2=Gain(0.05, NO_INTERVAL)), "(tau +0.050, without an interval)"),
        (calibration(num_studies=1, tier2_enters=False), "on 96 finished trials of 1 study it"),
        (calibration(num_finished=1, num_studies=1), "1 finished trial of 1 study could"),
        (calibration(tier2_enters=False), "gained nothing that is clear of 0"),
        (calibration(gain_tier2=Gain(0.05, Interval(-0.01, 0.1, 0.9))), "nothing that is clear"),
        (calibration(standard_errors={"sam_sharpness": 0.3}), "no metric of tier2.metrics has a"),
        (calibration(weights={"other": 1.0}, standard_errors={"other": 0.1}), "no metric of tier2"),
    ],
)
def test_what_has_not_earned_it_is_not_used_and_it_is_said_why(given: Any, why: str) -> None:
    found = earned(given, ROWS)
    assert (found.used, found.weights, found.metrics) == (False, {}, ())
    assert why in found.reason


def test_a_calibration_is_read_as_it_was_written_and_one_of_another_version_is_refused() -> None:
    assert read_calibration(calibration().to_json()) == calibration()
    old = json.loads(calibration().to_json()) | {"version": 1}
    with pytest.raises(ValueError, match="version 1"):
        read_calibration(json.dumps(old))


def tied(num: int, seed: int = 0) -> tuple[list[FlatnessProfile], dict[str, CurvePoint]]:
    rng = np.random.default_rng(seed)
    profiles, points = [], {}
    for i in range(num):
        name = f"t{i:03d}"
        found = (
            Measurement("low", float(rng.normal()), 0.1, False, 32, 1.0),
            Measurement("high", float(rng.normal()), 0.1, True, 32, 1.0),
        )
        profiles.append(FlatnessProfile(name, found, 1.0))
        points[name] = CurvePoint(1, 1.0, 1, 10, float(rng.random()), 0.9, 0.5, 0.8, 1.0)
    return profiles, points


@pytest.mark.parametrize(("num", "degree"), [(4, 1), (5, 1), (6, 2), (15, 2)])
def test_values_are_the_calibrated_weights_of_what_is_left_beside_training_loss(
    num: int, degree: int
) -> None:
    profiles, points = tied(num)
    values = tie_values(profiles, points, {"low": 0.4, "high": 0.2}, 0.9)
    loss = normal_scores(np.array([point.train_loss for point in points.values()]))
    expected = np.zeros(num)
    for k, sign, weight in ((0, -1, 0.4), (1, 1, 0.2)):
        z = normal_scores(np.array([sign * p.measurements[k].value for p in profiles]))
        expected += weight * (z - np.polyval(np.polyfit(loss, z, degree), loss))
    assert list(values.values()) == pytest.approx(expected.tolist())
    assert values == tie_values(profiles[::-1], points, {"low": 0.4, "high": 0.2}, 0.9)


def test_few_and_networks_that_have_not_learnt_have_no_value() -> None:
    profiles, points = tied(8)
    assert set(tie_values(profiles[:3], points, {"low": 1.0}, 0.9).values()) == {0.0}
    dull = dataclasses.replace(points["t002"], train_accuracy=0.3)
    values = tie_values(profiles, points | {"t002": dull}, {"low": 1.0}, 0.9)
    assert [name for name, value in values.items() if value == 0] == ["t002"]


# --- the experiment file ----------------------------------------------------------------------


def spec(tier1: dict[str, Any] | None = None, **tier2: Any) -> Spec:
    return Spec(
        name="ties",
        dataset={"name": "synthetic"},
        model={"name": "mlp"},
        search_space={"learning_rate": [0.1, 0.2]},
        tier1=tier1 or {},
        tier2={"tie_break": "earned", **tier2},
    )


@pytest.mark.parametrize(
    ("tier1", "tier2", "said"),
    [
        ({"scheduler": "median"}, {}, "use asha or hyperband"),
        ({"eager_promotion": True}, {}, "drop tier1.eager_promotion"),
        ({}, {"top_k": 0}, "turns tier 2 off"),
        ({}, {"tie_break": "off", "calibration": "c.json"}, "only with tier2.tie_break: earned"),
    ],
)
def test_contradictions_are_refused(tier1: Any, tier2: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        check(spec(tier1, **tier2))


def written(**changes: Any) -> str:
    return json.dumps(json.loads(calibration().to_json()) | changes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2", "Expecting"),
        ("[1, 2]", "it is [1, 2], not a mapping"),
        ("{}", "it has no 'target'"),
        ("[" * 100_000, "decoding a JSON array"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "can't decode"),
        (written(weights=5), "weights is 5, not a mapping"),
        (written(weights={"sam_sharpness": "0.4"}), "weights.sam_sharpness is '0.4', not a number"),
        (written(standard_errors=[0.1]), "standard_errors is [0.1], not a mapping"),
        (written(num_finished="96"), "num_finished is '96', not a whole number"),
        (written(num_studies=True), "num_studies is True, not a whole number"),
        (written(tier2_enters="no"), "tier2_enters is 'no', not true or false"),
        (written(gain_tier2=0.05), "gain_tier2 is 0.05, not a mapping"),
        (written(gain_tier2={"value": 1.0}), "gain_tier2 has no 'interval'"),
        (
            written(gain_tier2={"value": 1, "interval": {"low": [], "high": 1}}),
            "gain_tier2.interval.low is [], not a number or null",
        ),
        (written(dropped=[1]), "dropped[0] is 1, not text"),
        (written(version="2"), "version is '2', not a whole number"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused_and_it_is_said_why(
    content: str | bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError) as raised:
        make_tie_break(spec(calibration=str(path)))
    told = str(raised.value)
    assert f"'{path}' is no calibration that `llp calibrate --out` has written: " in told
    assert said in told


def test_the_file_is_looked_at_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(SpecError, match=r"calibration\.json': No such file"):
        make_tie_break(spec(calibration=str(path)))
    path.write_text(calibration().to_json())
    found = make_tie_break(spec(calibration=str(path)))
    assert found is not None
    assert found.used
    assert make_tie_break(spec(tie_break="off")) is None


def test_a_study_from_before_keeps_its_digest() -> None:
    off = spec(tie_break="off")
    plain = off.model_dump(mode="json")
    del plain["tier2"]["tie_break"], plain["tier2"]["calibration"]
    assert digest(Spec.model_validate(plain)) == digest(off) != digest(spec())


# --- end to end -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("is_earned", [True, False])
def test_a_search_settles_its_ties_within_the_budget_of_tier_2(
    is_earned: bool, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "c.json").write_text(calibration(tier2_enters=is_earned).to_json())
    options = [
        "tier2.tie_break=earned", "tier2.calibration=c.json", "output.report=true",
        "tier1.stop_rules=[]", "search_space.learning_rate.low=0.02",
        "search_space.learning_rate.high=0.1", "searcher.name=random", "tier1.num_trials=18",
    ]  # fmt: skip
    chosen = [part for option in options for part in ("--set", option)]
    done = llp("search", "tiny.yaml", "--study", "ties", *chosen, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    log = events(tmp_path / "llp_studies" / "ties" / "ledger.jsonl")
    result = result_from_events(log)
    assert result.tie_break is not None
    assert result.tie_break.used == is_earned
    page = (tmp_path / "llp_studies" / "ties" / "report.html").read_text(encoding="utf-8")
    assert tie_sentence(result) in page.replace("\u00a0", " ")
    assert "ties at promotions" in " ".join(done.stdout.split())
    settled = [e["end"] for e in log if e["event"] == "job_end" and "-t" in e["end"]["job_id"]]
    if not is_earned:
        assert not settled
        assert not result.tie_choices
        return
    assert result.tie_choices, "the trials of this search are alike"
    assert {end["trial_id"] for end in settled} == {n for c in result.tie_choices for n in c.tied}
    assert {end["outcome"] for end in settled} == {"completed"}
    for choice in result.tie_choices:
        probe = next(rung for rung in result.rungs if rung.rung == choice.rung)
        for end in settled:
            if end["job_id"].endswith(f"-t{choice.rung}"):
                assert end["samples_seen"] <= 0.2 * probe.samples_seen
    assert {p.trial_id for p in result.profiles} <= {t.trial.trial_id for t in result.trials}
    assert len(result.profiles) == 2, "what settled a tie is no measurement of a survivor"
