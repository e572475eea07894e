"""The evidence run: its definition, its numbers against planted truths, and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from llp import evidence, evidence_numbers, evidence_strategies
from llp.errors import SpecError
from llp.evidence_strategies import Trained, compare, halving_cost, halving_rungs
from llp.records import (
    Cost,
    CurvePoint,
    FlatnessProfile,
    Interval,
    JobEnd,
    LearningCurve,
    Measurement,
    Rung,
    SearchResult,
    Trial,
    TrialResult,
    Verification,
)
from llp.reporting.evidence_page import evidence_html
from llp.reporting.evidence_rows import TargetEvidence
from llp.reporting.runs import FullTraining
from llp.scoring import study_table
from llp.scoring.targets import judged
from llp.spec.evidence import load_evidence

SHIPPED = Path(__file__).resolve().parent.parent / "reports" / "evidence.yaml"


# The definition


def test_the_shipped_file_has_five_studies_of_48_configurations_at_a_tenth_of_the_cost() -> None:
    studies = load_evidence(SHIPPED).configurations
    assert len(studies) >= 5
    for name, spec in studies.items():
        assert spec.tier1.num_trials == spec.tier2.top_k == spec.verification.top_k == 48, name
        assert spec.verification.num_seeds == 3
        assert spec.verification.corrupted
        assert spec.tier1.stop_rules == []
        share = spec.tier1.data_fractions[0] * spec.rung_epochs()[0] / spec.training.epochs
        assert share == pytest.approx(0.1), name
    assert studies["digits_noise"].dataset.label_noise > 0
    assert studies["cifar10_adamw"].training.optimizer == "adamw"
    assert "momentum" not in studies["cifar10_adamw"].search_space, "a null takes it out"


def test_the_shipped_file_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("evidence.yaml", "evidence"):
        assert load_evidence(name).configurations == load_evidence(SHIPPED).configurations
    with pytest.raises(SpecError, match="did you mean 'evidence'"):
        load_evidence("evidense")


def test_overrides_hold_for_all_studies_and_everyone_is_still_verified() -> None:
    studies = load_evidence(SHIPPED, ["tier1.num_trials=7", "seed=3"]).configurations
    for spec in studies.values():
        assert (spec.tier2.top_k, spec.verification.top_k, spec.seed) == (7, 7, 3)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("studies:\n  a: {tier1: {num_trials: 4}}", 4, "missing key 'base'"),
        ("studies:\n  a: {base: digit}", 4, "did you mean 'digits'"),
        ("study: {a: {base: digits}}", 3, "studies"),
        ("tier1: {}\nstudies:\n  a: {base: digits}", 3, "belongs into common"),
        ("studies:\n  a: {base: digits}", None, "one data fraction"),
        (
            "studies:\n  a: {base: digits, tier1: {data_fractions: [0.1], "
            "stop_rules: [{name: plateau}]}}",
            4,
            "no stop rule",
        ),
        (
            "studies:\n  a: {base: digits, searcher: {name: tpe}, tier1: {data_fractions: [0.1]}}",
            4,
            "suggests by results",
        ),
        ("studies:\n  a: {base: digits, tier1: {num_trails: 4}}", 4, "num_trials"),
    ],
)
def test_a_mistake_is_told_with_its_line(
    text: str, line: int | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"version: 1\nname: mine\n{text}\n")
    with pytest.raises(SpecError) as caught:
        load_evidence(file)
    assert message in str(caught.value)
    if line is not None:
        assert any(problem.line == line for problem in caught.value.problems), caught.value


# Numbers


def test_partial_tau_takes_out_what_the_others_explain_and_leaves_the_rest() -> None:
    rng = np.random.default_rng(0)
    num = 400
    known, own, noise = rng.standard_normal((3, num))
    target = known + own
    useless, useful = known + 0.3 * noise, known + own
    assert kendalltau(useless, target).statistic > 0.3
    nothing, interval = evidence_numbers.partial_tau(useless, target, known[:, None])
    assert interval.low < 0 < interval.high
    assert abs(nothing) < 0.08
    left, _ = evidence_numbers.partial_tau(useful, target, known[:, None])
    assert left > 0.95
    # By hand: residuals of simple regressions.
    by_hand = [v - np.polyval(np.polyfit(known, v, 1), known) for v in (useless, target)]
    assert nothing == pytest.approx(kendalltau(*by_hand).statistic)
    copy, _ = evidence_numbers.partial_tau(known, target, known[:, None])
    assert np.isnan(copy), "nothing is left of a copy"
    few, _ = evidence_numbers.partial_tau(known[:8], target[:8], rng.standard_normal((8, 6)))
    assert np.isnan(few)


def test_halving_costs_what_its_rungs_cost_and_keeps_to_the_compute() -> None:
    # 48 for 1 epoch, 16 for 2 more, 5 for 6 more, 1 for 18 more
    assert halving_cost(48, 27, (1, 3, 9, 27)) == pytest.approx((48 + 32 + 30 + 18) / 27)
    for compute in (5.0, 8.0, 15.0, 40.0):
        rungs = halving_rungs(48, 27, compute)
        assert halving_cost(48, 27, rungs) <= compute
        longer = (rungs[0] + 1, *[3**k * (rungs[0] + 1) for k in range(1, 4)])
        longer = (*[r for r in longer if r < 27], 27)
        assert halving_cost(48, 27, longer) > compute, "the costliest that fits"


def trained(**changes: Any) -> Trained:
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.5, 0.9, 24)
    epochs = np.arange(1, 11) / 10
    curves = truth[:, None, None] * epochs**0.1 * np.ones((24, 2, 10))
    base = Trained(curves, truth, {"T1": truth.copy()}, 0.1, 0.02, frozenset())
    return replace(base, **changes)


def test_with_faithful_curves_every_ranking_strategy_finds_the_best() -> None:
    found = {row.name: row for row in compare(trained())}
    for name, row in found.items():
        if "random" not in name:
            assert row.regret == pytest.approx(0, abs=1e-9), name
    assert found["random, equal compute"].regret > 1
    first = found["probe, rank by T1, verify 3"]
    assert first.cost == pytest.approx(18 * 0.1 + 3)
    for name, row in found.items():
        if "equal compute" in name:
            assert row.cost <= first.cost + 1e-9, name


def test_a_diverged_training_is_never_chosen_and_a_bad_score_is_told_from_a_good_one() -> None:
    good = trained()
    curves = good.curves.copy()
    best = int(good.truth.argmax())
    curves[best, :, 4:] = np.nan
    truth = good.truth.copy()
    truth[best] = truth.min()
    found = compare(
        replace(
            good,
            curves=curves,
            truth=truth,
            scores={"T1": good.truth, "bad": -good.truth},
            with_metrics=frozenset({"bad"}),
        )
    )
    by_name = {row.name: row for row in found}
    halving = by_name["successive halving, equal compute"]
    assert halving.regret < 6
    bad = by_name["probe, rank by bad, verify 3"]
    assert bad.cost == pytest.approx(18 * 0.12 + 3)
    assert bad.worse_by > 5
    assert bad.interval.low > 0


def made_run(name: str, *, seed: int, planted: float, num: int = 40) -> evidence.Run:
    """A study whose results follow the probe, and the metric `useful` by `planted`."""
    rng = np.random.default_rng(seed)
    rate = 10 ** rng.uniform(-3, 0, num)
    probe, own, useless = rng.standard_normal((3, num))
    final = 0.7 + 0.05 * probe + 0.05 * planted * own
    rung = Rung(1, 0.1, 100, 2)
    trials, profiles, verifications, trainings = [], [], [], []
    for i in range(num):
        points = tuple(
            CurvePoint(1, 0.1, e, 100 * e, 0.5, 0.9, 1 - a, a, 1.0)
            for e, a in ((1, 0.5), (2, 0.6 + 0.05 * probe[i]))
        )
        trial = Trial(f"t{i:03d}", {"learning_rate": float(rate[i])}, seed=i)
        curve = LearningCurve(trial.trial_id, 1, points)
        trials.append(TrialResult(trial, (curve,), "completed", samples_seen=200, seconds=1.0))
        profiles.append(
            FlatnessProfile(
                trial.trial_id,
                (
                    Measurement(
                        "useful", own[i], 0.05, None, 50, 1.0, samples=20, samples_alone=50
                    ),
                    Measurement("useless", useless[i], 0.05, None, 50, 1.0, "", 10, 50),
                    Measurement("shaky", useless[i], 5.0, None, 50, 1.0, "", 10, 50),
                ),
                1.0,
                samples=40,
                note="budget 0.2 of 200 samples",
            )
        )
        for s in range(3):
            value = float(final[i] + 0.002 * rng.standard_normal())
            verifications.append(
                Verification(
                    trial.trial_id,
                    s,
                    value,
                    1 - value,
                    value,
                    1 - value,
                    1000,
                    2000,
                    1.0,
                    corrupted_validation_accuracy=value - 0.2,
                    corrupted_test_accuracy=value - 0.2,
                )
            )
            epochs = tuple(
                replace(points[-1], rung=2, epoch=e, validation_accuracy=value * e / 5)
                for e in range(1, 6)
            )
            trainings.append(FullTraining(f"{trial.trial_id}-v{s}", trial.trial_id, s, epochs))
    result = SearchResult(
        study_id=name,
        spec_digest="",
        spec={
            "dataset": {"name": "made"},
            "model": {"name": "up"},
            "training": {"optimizer": "sgd", "schedule": "cosine"},
        },
        status="finished",
        rungs=(rung,),
        trials=tuple(trials),
        decisions=(),
        profiles=tuple(profiles),
        score_report=None,
        verifications=tuple(verifications),
        winner="t000",
        winner_reason="",
        cost=Cost(200 * num, 40 * num, 6000 * num, 2000 * num),
        environment={},
        started=0.0,
        finished=1.0,
    )
    tables = {
        target: study_table(
            trials,
            profiles,
            judged(verifications, corrupted=target == "corrupted"),
            num_validation=500,
            rungs=[rung],
        )
        for target in ("clean", "corrupted")
    }
    return evidence.Run(name, result, tuple(trainings), tables, "")


def taus_of(each: TargetEvidence) -> dict[str, float]:
    return {row.name: row.tau for row in each.rankings}


def test_the_sentence_compares_means_over_the_same_studies() -> None:
    runs = [made_run(f"s{k}", seed=k, planted=1.0) for k in range(3)]
    found = evidence.evidence("made", runs)
    less = replace(
        found.studies[0].targets[0],
        rankings=tuple(r for r in found.studies[0].targets[0].rankings if "T2" not in r.name),
    )
    others = [study.targets[0] for study in found.studies[1:]]
    said = evidence._target_sentence("clean", [less, *others], found.verdicts["clean"])
    tau = np.mean([taus_of(each)["T1+h"] for each in others])
    assert f"T1+h {tau:.2f}, T1+h+T2" in said
    assert "of the 2 in which tier 2 could be weighed" in said


def test_a_planted_metric_is_found_and_the_sentence_says_yes() -> None:
    runs = [made_run(f"s{k}", seed=k, planted=1.0) for k in range(3)]
    found = evidence.evidence("made", runs, [("later", "not run yet")])
    assert found.verdicts["clean"].enters
    assert "Yes, flatness helped to rank by test accuracy" in found.sentence
    assert f"{found.verdicts['clean'].gain:+.3f}" in found.sentence
    rows = {row.name: row for row in found.studies[0].targets[0].metrics}
    assert rows["useful"].given_t1_h_interval.low > 0
    assert rows["useful"].given_t1 > 0.5
    assert abs(rows["useless"].given_t1_h) < 0.3
    assert (rows["shaky"].dropped, rows["useful"].dropped) == (True, False)
    taus = {row.name: row for row in found.rankings["clean"]}
    assert taus["T1+h+T2"].tau > taus["T1+h"].tau + 0.1
    assert taus[evidence_numbers.TRANSFERRED].tau > taus["T1"].tau + 0.1
    assert taus["noise ceiling"].tau > 0.9
    assert taus["T1"].cost == pytest.approx(0.1)
    assert taus["T1+T2"].cost == pytest.approx(0.12)
    means = {row.name: row for row in found.metrics["clean"]}
    partial = [
        row.given_t1_h
        for study in found.studies
        for row in study.targets[0].metrics
        if row.name == "useful"
    ]
    assert means["useful"].given_t1_h == pytest.approx(np.mean(partial))
    assert means["useful"].given_t1_h_interval.low > 0 > means["useless"].given_t1_h_interval.low
    bars = {bar.name: bar for bar in found.bars}
    worst = bars["score minus validation accuracy alone, worst study"]
    gains = {
        f"{study.name}, {each.target}": taus_of(each)[evidence_numbers.TRANSFERRED]
        - taus_of(each)["validation_accuracy"]
        for study in found.studies
        for each in study.targets
    }
    assert (worst.value, worst.study) == (min(gains.values()), min(gains, key=gains.__getitem__))
    assert bars["cost of tier 2 over its probe, largest"].met is True
    assert bars["tau of the score, test accuracy, mean over studies"].met is True
    page = evidence_html(found, title="Made up")
    assert "Yes, flatness helped" in page
    assert "later: not run yet" in page
    assert page == evidence_html(
        evidence.evidence("made", runs, [("later", "not run yet")]), title="Made up"
    )


def test_without_anything_planted_the_sentence_does_not_say_yes() -> None:
    runs = [made_run(f"s{k}", seed=10 + k, planted=0.0) for k in range(3)]
    found = evidence.evidence("made", runs)
    assert not found.verdicts["clean"].enters
    assert "Yes" not in found.sentence
    assert "flatness did not help" in found.sentence or "has not been shown" in found.sentence
    taus = {row.name: row.tau for row in found.rankings["clean"]}
    assert taus[evidence_numbers.TRANSFERRED] >= taus["validation_accuracy"] - 0.01


def test_an_unfinished_study_counts_with_the_seeds_that_all_configurations_have() -> None:
    run = made_run("s0", seed=0, planted=0.5)
    names = {trial.trial.trial_id for trial in run.result.trials}
    ended = JobEnd("j", "t000", "completed")
    trainings = [replace(each, end=ended) for each in run.trainings]
    seeds = sorted({each.seed for each in trainings})
    assert evidence.whole_seeds(trainings, names) == set(seeds)
    last = next(k for k, each in enumerate(trainings) if each.seed == seeds[-1])
    trainings[last] = replace(trainings[last], end=None)  # still running
    assert evidence.whole_seeds(trainings, names) == set(seeds[:-1])
    started = replace(run, unfinished="interrupted, with 2 of 3 seeds")
    found = evidence.evidence("made", [started])
    assert "(not finished: s0 interrupted, with 2 of 3 seeds)" in found.sentence
    assert "Not finished: interrupted, with 2 of 3 seeds." in evidence_html(found)


def test_one_study_or_none_gives_a_page_too() -> None:
    alone = evidence.evidence("made", [made_run("s0", seed=0, planted=0.5)])
    assert evidence_numbers.TRANSFERRED not in {r.name for r in alone.rankings["clean"]}
    assert "one data" not in evidence_html(alone)
    nothing = evidence.evidence("made", [], [("s0", "not run yet")])
    assert "nothing can be said" in evidence_html(nothing)
    assert nothing.bars[0].met is None


def test_means_over_studies_have_students_interval() -> None:
    found = evidence_numbers.mean_interval([0.1, 0.2, 0.6])
    # t quantile .95 with 2 degrees of freedom is 2.919986
    half = 2.919986 * np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3)
    assert found == Interval(pytest.approx(0.3 - half), pytest.approx(0.3 + half), 0.9)
    assert np.isnan(evidence_numbers.mean_interval([0.1]).low)
    assert evidence_numbers.mean_interval([0.1, 0.9]) == Interval(-1.0, 1.0, 0.9)
    assert evidence_strategies.VERIFIED == 3


@pytest.mark.slow
def test_a_tiny_run_ends_in_a_page_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from llp.cli import app

    file = tmp_path / "tiny.yaml"
    file.write_text(
        "version: 1\nname: tiny\n"
        "common:\n"
        "  model: {name: mlp, options: {depth: 1}}\n"
        "  search_space: {width: [8, 16]}\n"
        "  training: {epochs: 4}\n"
        "  tier1: {num_trials: 13, data_fractions: [0.2], epochs: 2}\n"
        "  tier2: {metrics: [asam_sharpness, adaptive_trace, mean_entropy], refinements: []}\n"
        "  verification: {num_seeds: 2, corrupted: true}\n"
        "  tracking: {mlflow: false}\n"
        "  resources: {num_cpus: 1}\n"
        "studies:\n"
        "  plain: {base: digits, dataset: {max_train_examples: 300}}\n"
        "  wrong: {base: digits, dataset: {max_train_examples: 300, label_noise: 0.2}}\n"
    )
    monkeypatch.chdir(tmp_path)
    first = CliRunner().invoke(app, ["study", str(file), "--json"])
    assert first.exit_code == 0, first.output
    event = json.loads(first.stdout.strip().splitlines()[-1])
    page = Path(event["page"]).read_text()
    assert "Mean over studies: accuracy on corrupted test images" in page
    found = event["evidence"]
    assert [study["name"] for study in found["studies"]] == ["plain", "wrong"]
    for study in found["studies"]:
        assert study["probe_share"] == pytest.approx(0.1, rel=0.05)
        assert study["tier2_share"] > 0
        names = {row["name"] for row in study["targets"][0]["rankings"]}
        assert {"validation_accuracy", "validation_loss", "T1", "T1+h", "noise ceiling"} <= names
    ledgers = [
        Path("llp_studies", name, "ledger.jsonl").read_bytes() for name in ("plain", "wrong")
    ]
    again = CliRunner().invoke(app, ["study", str(file)])
    assert again.exit_code == 0, again.output
    assert "2 studies, 26 configurations" in again.output
    assert ledgers == [
        Path("llp_studies", name, "ledger.jsonl").read_bytes() for name in ("plain", "wrong")
    ]


def test_intervals_of_partial_tau_cover_zero_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(200):
        given = rng.standard_normal((48, 12))
        first, second = (given @ rng.standard_normal((12, 2)) + rng.standard_normal((48, 2))).T
        _, interval = evidence_numbers.partial_tau(first, second, given)
        covered.append(interval.low <= 0 <= interval.high)
    assert 0.84 <= np.mean(covered) <= 0.97  # 90 %, with a standard error of 2 %
