"""The race over seeds: error rate and length on simulated normals, and the same after a kill."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import norm, ttest_rel
from study_runs import TINY, events, killed_at, llp

from llp.errors import SpecError
from llp.records import RaceLook, Verification, from_plain, to_plain
from llp.scoring.racing import (
    RaceRules,
    accuracies_of,
    image_error,
    race,
    race_sentence,
    upper_bound,
)
from llp.spec import digest, load_spec
from llp.tracking.replay import Replay
from llp.verification import race_rules

SEEDS = tuple(range(8))


def rules(num=3, **changes) -> RaceRules:
    names = tuple(f"t{i:03d}" for i in range(num))
    return RaceRules(names, SEEDS, **{"margin": 0.0, **changes})


def drawn(generator, means, *, noise, shared=0.0) -> dict[str, dict[int, float]]:
    """Accuracies of configurations with these true means; `shared` is what a seed does to all."""
    common = generator.normal(0, shared, len(SEEDS))
    return {
        f"t{i:03d}": dict(zip(SEEDS, mean + common + generator.normal(0, s, 8), strict=True))
        for i, (mean, s) in enumerate(zip(means, np.broadcast_to(noise, len(means)), strict=True))
    }


def test_the_bound_is_the_one_sided_paired_t_interval_of_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.9, 0.01, 5), generator.normal(0.9, 0.01, 5)
    agreed = rules(4, first_look=2)
    # With looks at 2..8 seeds the fifth has (5 - 1) of 1 + 2 + ... + 7 = 28 parts of alpha / 3.
    level = 0.05 / 3 * 4 / 28
    expected = ttest_rel(a, b, alternative="less").confidence_interval(1 - level).high
    assert upper_bound(list(a), list(b), agreed) == pytest.approx(expected, rel=1e-9)


def test_the_levels_of_all_looks_and_rivals_sum_to_the_error_rate():
    for num, first in ((2, 2), (3, 2), (5, 4), (3, 8)):
        agreed = rules(num, first_look=first, error_rate=0.1)
        assert sum(map(agreed.level, agreed.looks)) * (num - 1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("means", "noise", "shared"),
    [
        ((0.90, 0.90, 0.90), 0.004, 0.0),
        ((0.90, 0.8999, 0.88), 0.004, 0.004),
        ((0.90, 0.897, 0.897), (0.001, 0.02, 0.005), 0.002),
    ],
)
def test_a_wrong_order_is_no_more_frequent_than_stated(means, noise, shared):
    generator, num, wrong = np.random.default_rng(1), 1000, 0
    agreed = rules(error_rate=0.2)
    for _ in range(num):
        looks = race(drawn(generator, means, noise=noise, shared=shared), agreed)
        # Of equally good ones the first counts as the best: none may be taken out, at worst.
        wrong += any("t000" in at.out for at in looks)
    limit = 0.2 + norm.ppf(0.999) * math.sqrt(0.2 * 0.8 / num)
    assert wrong / num <= limit


def test_the_winner_is_within_the_margin_of_the_best_as_often_as_stated():
    generator, num, wrong, settled = np.random.default_rng(2), 1000, 0, 0
    means = (0.895, 0.9, 0.8)  # the first is five margins of 0.1 points below the best
    agreed = rules(error_rate=0.2, margin=0.004)
    for _ in range(num):
        last = race(drawn(generator, means, noise=0.006), agreed)[-1]
        settled += last.settled
        wrong += last.settled and last.leader != "t001"
    assert settled > 0.2 * num
    assert wrong / num <= 0.2 + norm.ppf(0.999) * math.sqrt(0.2 * 0.8 / num)


def test_a_clear_order_takes_fewer_seeds_than_the_fixed_design():
    generator, spent, right, num = np.random.default_rng(3), 0, 0, 300
    for _ in range(num):
        looks = race(drawn(generator, (0.90, 0.89, 0.86), noise=0.002), rules())
        spent += sum(
            at.num_seeds if k == len(looks) - 1 else 0 for k, at in enumerate(looks)
        ) * len(looks[-1].racing) + sum(at.num_seeds * len(at.out) for at in looks)
        right += looks[-1].settled and looks[-1].leader == "t000"
    assert right >= 0.97 * num
    assert spent / num < 0.7 * 3 * len(SEEDS)


def test_equally_good_ones_settle_within_a_margin_and_not_without():
    generator = np.random.default_rng(4)
    alike = [drawn(generator, (0.9, 0.9), noise=0.001) for _ in range(100)]
    with_margin = [race(each, rules(2, margin=0.01))[-1] for each in alike]
    assert sum(at.settled and at.num_seeds <= 5 for at in with_margin) >= 95
    without = [race(each, rules(2))[-1] for each in alike]
    assert sum(at.settled for at in without) <= 5
    assert all(at.num_seeds == 8 for at in without if not at.settled)


def test_looks_depend_on_the_accuracies_of_their_seeds_only():
    generator = np.random.default_rng(5)
    whole = drawn(generator, (0.9, 0.897, 0.894), noise=0.004)
    all_looks = race(whole, rules())
    for num in range(9):
        part = {name: {s: v for s, v in runs.items() if s < num} for name, runs in whole.items()}
        assert race(part, rules()) == all_looks[: max(0, num - 1)]


def test_a_failed_training_takes_a_configuration_out_and_equal_ones_go_to_the_better_score():
    runs = {name: dict.fromkeys(SEEDS, 0.5) for name in ("t000", "t001", "t002")}
    runs["t000"][1] = math.nan
    looks = race(runs, rules())
    assert looks[0].out == {"t000": "a full training failed"}
    assert looks[-1].leader == "t001"
    assert "t000 was out after 2 seeds (a full training failed)" in race_sentence(
        looks, runs, rules()
    )
    nothing = race({name: dict.fromkeys(SEEDS, math.nan) for name in runs}, rules())
    assert (nothing[-1].leader, nothing[-1].racing, nothing[-1].settled) == ("", (), True)


def test_the_default_margin_is_the_error_of_the_validation_images():
    agreed = rules(2, margin=None, num_validation=400)
    assert image_error(0.75, agreed) == pytest.approx(math.sqrt(2 * 0.75 * 0.25 / 400), rel=1e-2)
    runs = {"t000": dict.fromkeys(SEEDS, 0.75), "t001": dict.fromkeys(SEEDS, 0.74)}
    assert race(runs, agreed)[-1].margin == image_error(0.75, agreed)
    told = race_sentence(race(runs, agreed), runs, agreed)
    assert "on the same 400 validation images" in told


def test_a_look_survives_the_ledger():
    found = race(drawn(np.random.default_rng(6), (0.9, 0.85), noise=0.01), rules(2))[0]
    assert from_plain(RaceLook, json.loads(json.dumps(to_plain(found)))) == found


def test_the_sentence_gives_the_numbers_of_the_race():
    runs = {
        "t000": {0: 0.90, 1: 0.902, 2: 0.898, 3: 0.90},
        "t001": {0: 0.80, 1: 0.801, 2: 0.799, 3: 0.80},
    }
    agreed = RaceRules(("t000", "t001"), (0, 1, 2, 3), margin=0.0)
    looks = race(runs, agreed)
    told = race_sentence(looks, runs, agreed)
    assert looks[-1].settled
    assert looks[-1].leader == "t000"
    assert "at most 5 %" in told
    assert "t001 was out after" in told
    assert f"{100 * np.mean([0.90, 0.902, 0.898, 0.90][: looks[-1].num_seeds]):.2f} %" in told


def test_a_file_asks_for_a_race_and_a_wrong_one_is_named(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    plain = load_spec(file)
    assert race_rules(plain, ["a", "b"], 100) is None
    raced = load_spec(file, overrides=["verification.race=true", "verification.max_seeds=5"])
    agreed = race_rules(raced, ["a", "b"], 100)
    assert agreed is not None
    assert (len(set(agreed.seeds)), agreed.first_look, agreed.error_rate) == (5, 2, 0.05)
    assert race_rules(raced, ["a"], 100) is None
    assert digest(raced) != digest(plain)
    assert digest(plain) == digest(load_spec(file, overrides=["verification.max_seeds=5"]))
    with pytest.raises(SpecError, match=r"max_seeds \(2\) is below num_seeds \(3\)"):
        load_spec(
            file,
            overrides=[
                "verification.race=true",
                "verification.max_seeds=2",
                "verification.num_seeds=3",
            ],
        )


RACE = [
    "--set", "verification.race=true", "--set", "verification.max_seeds=4",
    "--set", "verification.top_k=3", "--set", "verification.margin=0.0",
    "--set", "tier1.num_trials=6", "--set", "output.report=true",
]  # fmt: skip


@pytest.mark.slow
def test_a_race_that_is_killed_takes_the_same_decisions(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    studies = tmp_path / "llp_studies"
    done = llp("search", "tiny.yaml", "--study", "whole", *RACE, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = events(studies / "whole" / "ledger.jsonl")
    first = next(k for k, e in enumerate(whole) if e["event"] == "race")
    ledger = studies / "cut" / "ledger.jsonl"
    search = ("search", "tiny.yaml", "--study", "cut", *RACE)
    killed_at(ledger, first - 3, *search, folder=tmp_path)
    killed_at(ledger, first + 8, "resume", "cut", folder=tmp_path)
    assert llp("resume", "cut", folder=tmp_path).returncode == 0
    cut = events(ledger)
    looks = [[e["look"] for e in log if e["event"] == "race"] for log in (whole, cut)]
    assert looks[0] == looks[1]
    assert len(looks[0]) >= 2
    ends = [[e["winner_reason"] for e in log if e["event"] == "finished"] for log in (whole, cut)]
    assert ends[0] == ends[1]
    assert "won the race over seeds" in ends[0][0]
    trained = [e["end"]["job_id"] for e in cut if e["event"] == "job_end" and e["kind"] == "verify"]
    assert len(trained) == len(set(trained))
    # The looks follow from the trainings in the ledger alone.
    replay = Replay()
    for event in cut:
        replay.take(event)
    result = replay.result(running=False)
    assert all(isinstance(v, Verification) for v in result.verifications)
    spec = load_spec(studies / "cut" / "spec.yaml")
    entrants = (*result.race[0].racing, *result.race[0].out)
    by_score = [s.trial_id for s in result.score_report.scores if s.trial_id in entrants]
    agreed = race_rules(spec, by_score, int(cut[0]["num_validation"]))
    again = race(accuracies_of(result.verifications), agreed)
    assert [(set(at.racing), at.settled, at.leader) for at in again] == [
        (set(at.racing), at.settled, at.leader) for at in result.race
    ]
    assert "The race over seeds" in (studies / "cut" / "report.html").read_text()
