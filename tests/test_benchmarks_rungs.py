"""The comparison of rungs, and that with Ray Tune's ASHA: what is trained, and how it is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from llp.pipeline import plan
from llp.records import Job, Rung
from llp.spec import load_spec
from llp.training.full import run_here
from llp.training.objective import TrainingObjective
from llp.workloads import load

FOLDER = Path(__file__).resolve().parent / "benchmarks"
SYNTHETIC = ["training.epochs=10", "training.warmup_fraction=0.0", "training.schedule=constant"]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def trainer(tmp_path: Path) -> Any:
    from rung_trainings import Trainer

    spec = load_spec("synthetic", SYNTHETIC)
    return Trainer(spec, load(spec.dataset, spec.seed), tmp_path, (0.2, 0.6))


def test_a_trunk_and_its_decay_spend_the_budget_of_a_rung_and_a_fifth_of_all_steps():
    from rung_trainings import DECAY, Trunk, trunk_epochs

    first, second = Rung(1, 0.1, 100, 20), Rung(2, 0.3, 300, 20)
    new = trunk_epochs(first, None)
    assert (20 - new) * 100 == pytest.approx(DECAY * 20 * 100, abs=100)
    trunk = Trunk({}, {}, samples=new * 100)
    later = trunk_epochs(second, trunk)
    decay = (20 - later) * 300
    assert decay == pytest.approx(DECAY * (trunk.samples + later * 300 + decay), abs=300)


def test_a_promotion_goes_on_from_the_weights_before_the_judging_decay(tmp_path, monkeypatch):
    import rung_trainings
    from rung_trainings import trunk_epochs
    from rung_variants import Variant

    trunks = []

    class Noted(rung_trainings.Trunk):
        def __init__(self, *state: Any, **rest: Any) -> None:
            super().__init__(*state, **rest)
            trunks.append(self)

    monkeypatch.setattr(rung_trainings, "Trunk", Noted)
    ours = trainer(tmp_path)
    variant = Variant("decay branch", "decay", 0.0)
    rows = ours.probe(variant, 0, 0)
    assert [row["samples_seen"] for row in rows] == [r.samples_seen for r in ours.rungs(variant)]
    rung = ours.rungs(variant)[0]
    length = trunk_epochs(rung, None)
    trial = ours.trial(0, 0)
    plain = TrainingObjective(ours.spec, ours.data.without_test(), tmp_path / "plain", threads=1)
    short = Rung(1, rung.data_fraction, rung.num_examples, length)
    end = run_here(plain, Job("plain", "probe", trial, short, trial.seed), lambda report: None)
    assert end.checkpoint is not None
    expected = torch.load(tmp_path / "plain" / end.checkpoint.path, weights_only=True)["model"]
    assert set(expected) == set(trunks[0].model)
    for name, value in expected.items():
        assert torch.equal(value, trunks[0].model[name]), name
    assert trunks[0].samples == length * rung.num_examples


def test_a_judging_decay_falls_straight_to_zero():
    from rung_trainings import decaying

    at = decaying(lambda step: 0.5 if step >= 2 else 0.1, 4, 9)
    assert [at(0), at(2), at(4)] == [0.1, 0.5, 0.5]
    assert np.allclose(np.diff([at(step) for step in range(4, 10)]), -0.1)
    assert at(9) == 0


def test_scores_rank_as_tier_one_does_and_equal_results_share_a_rank():
    import rungs

    table = pd.DataFrame(
        {
            "seed": 0, "config": range(5),
            "validation_accuracy": [0.5, 0.7, 0.7, 0.0, 0.5],
            "validation_loss": [1.0, 0.9, 0.8, np.inf, 1.0],
        }
    )  # fmt: skip
    (ranks,) = rungs.scores(table, 1)
    assert ranks[2] > ranks[1] > ranks[0] == ranks[4] > ranks[3]


def test_tau_and_regret_are_those_of_a_halving_by_hand():
    import rungs

    generator = np.random.default_rng(3)
    test = generator.random((2, 9))
    signal = [generator.permutation(18).reshape(2, 9).astype(float) for _ in range(2)]
    complete = test.argsort(1).argsort(1).astype(float)
    everything = (np.arange(2), np.arange(9))
    tau1, tau2, regret, _ = rungs.figures(signal, complete, test, *everything)
    taus, regrets = [], []
    for seed in range(2):
        taus.append([stats.kendalltau(s[seed], test[1 - seed]).statistic for s in signal])
        left = sorted(range(9), key=lambda k: -signal[0][seed, k])[:3]
        (winner,) = sorted(left, key=lambda k: -signal[1][seed, k])[:1]
        regrets.append(100 * (test.mean(0).max() - test.mean(0)[winner]))
    assert [tau1, tau2] == pytest.approx(list(np.mean(taus, axis=0)))
    assert regret == pytest.approx(np.mean(regrets))


def test_the_budget_of_a_third_is_kept_by_the_largest_search_that_fits():
    import third

    spec = load_spec("digits")
    full = plan(spec).samples_full_search / spec.tier1.num_trials
    small = third.within(spec, 3.5 * full)
    planned = plan(small)
    spent = planned.samples_tier1 + planned.samples_verification
    per_trial = small.tier1.data_fractions[0] * full
    assert spent <= 3.5 * full < spent + per_trial + full  # one more, and what it promotes
    assert small.search_space == spec.search_space
    with pytest.raises(ValueError, match="no search fits"):
        third.within(spec, full)


def test_what_llp_would_answer_follows_its_events():
    import third

    def point(job: str, accuracy: float) -> dict[str, Any]:
        return {
            "event": "point", "job_id": job,
            "point": {"validation_accuracy": accuracy, "validation_loss": 1.0},
        }  # fmt: skip

    def end(trial: str, rung: int, kind: str = "probe", outcome: str = "completed") -> Any:
        job = f"{trial}-{'v0' if kind == 'verify' else f'r{rung}'}"
        return {
            "event": "job_end", "kind": kind, "rung": rung,
            "end": {"job_id": job, "trial_id": trial, "outcome": outcome, "samples_seen": 10},
        }  # fmt: skip

    def verified(trial: str, accuracy: float) -> dict[str, Any]:
        run = {"trial_id": trial, "validation_accuracy": accuracy}
        return {"event": "verification", "job_id": f"{trial}-v0", "verification": run}

    events = [
        point("a-r1", 0.6), end("a", 1),
        point("b-r1", 0.9), end("b", 1, outcome="stopped"),
        point("c-r1", 0.7), end("c", 1),
        point("a-r2", 0.5), end("a", 2),
        {"event": "profile", "profile": {"samples": 5.0}},
        verified("c", 0.8), end("c", 4, "verify"),
        verified("a", 0.9), end("a", 4, "verify"),
    ]  # fmt: skip
    assert third.llp_answers(events) == [(10, "a"), (30, "c"), (40, "a"), (55, "c"), (65, "a")]
    assert third.answers([[1, "a"], [4, "b"]], 12) == [(1 / 6, "a"), (1 / 3, "b")]


def test_third_judges_paired_differences_and_the_share_that_was_enough():
    import third

    def run(seed: int, gap: float) -> dict[str, Any]:
        def row(accuracy: float, share: float, curve: Any) -> dict[str, Any]:
            return {
                "accuracy": accuracy, "samples": 100 * share, "share": share, "num_trials": 9,
                "cpu_seconds": 1.0, "curve": curve,
            }  # fmt: skip

        return {
            "seed": seed, "num_test": 100,
            "asha": row(0.9, 1.0, [[1 / 6, 0.5], [1.0, 0.9]]),
            "third": row(0.9 + gap, 0.33, [[1 / 6, 0.5], [0.33, 0.9 + gap]]),
            "llp": row(0.9, 2.0, [[1 / 6, 0.5], [1 / 2, 0.9], [2.0, 0.9]]),
        }  # fmt: skip

    runs = [run(0, -0.01), run(1, 0.03)]
    summary = third.summarise(runs)
    assert summary["third"]["difference"] == pytest.approx(1.0)
    low, high = summary["third"]["interval"]
    expected = stats.ttest_1samp([-1.0, 3.0], 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert summary["llp"]["share_that_reaches_asha"] == 1 / 2
    assert all(bar.met for bar in third.bars(summary, runs))
    worse = [run(0, -0.06), run(1, -0.05)]
    missed = [bar.met for bar in third.bars(third.summarise(worse), worse)]
    assert missed == [True, False]


@pytest.mark.slow
def test_a_tiny_comparison_of_rungs_trains_once_and_reruns_from_its_cache(tmp_path):
    import rungs

    cache, out = tmp_path / "rungs.parquet", tmp_path / "rungs.json"
    arguments = [
        "--quick", "--configurations=5", "--set=training.epochs=4", f"--cache={cache}",
        "--only=cosine cold", "--only=cosine warm", "--only=constant, EMA", f"--json={out}",
    ]  # fmt: skip
    rungs.main(arguments)
    first, when = json.loads(out.read_text()), cache.stat().st_mtime_ns
    rungs.main(arguments)
    assert cache.stat().st_mtime_ns == when
    again = json.loads(out.read_text())
    assert again["figures"]["variants"] == first["figures"]["variants"]
    names = [row["variant"] for row in first["figures"]["variants"]]
    assert names == ["full training", "cosine cold", "cosine warm", "constant, EMA", "prefix"]
    for row in first["figures"]["variants"][1:4]:
        assert row["cost_of_rungs"] == pytest.approx([1 / 4, 3 / 4], rel=0.2)


@pytest.mark.slow
def test_a_tiny_run_of_third_keeps_its_budget(tmp_path, monkeypatch):
    import third

    monkeypatch.setattr(sys, "argv", ["third.py"])
    out, curves = tmp_path / "third.json", tmp_path / "curves.parquet"
    third.main(
        ["--seeds=1", "--fresh=1", "--set=training.epochs=4", "--set=tier1.num_trials=9",
         "--without-default", f"--curves={curves}", f"--json={out}"]
    )  # fmt: skip
    (run,) = json.loads(out.read_text())["figures"]["runs"]
    assert run["asha"]["num_trials"] == 9
    assert 0 < run["third"]["share"] <= 1 / 3
    table = pd.read_parquet(curves)
    assert set(table.contender) == {"asha", "third"}
    assert table.verified_accuracy.between(0, 1).all()
    assert curves.with_suffix(".png").stat().st_size > 5000
