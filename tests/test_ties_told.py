"""What is said of ties: in the plan, while a search runs, of a trial, and on the page."""

from __future__ import annotations

import dataclasses
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from make_study import make_events
from rich.console import Console
from test_ties import FLAT, IMAGES, ROWS, calibration, spec

from llp.display import _rows, _spent
from llp.flatness.budget import plan_measurement
from llp.pipeline import Plan
from llp.pipeline import plan as make_plan
from llp.probing.ties import difference_error
from llp.progress import ProgressState
from llp.records import JobEnd, TieChoice, to_plain
from llp.reporting.html import study_page
from llp.reporting.tie_exhibit import tie_data, tie_sentence
from llp.scoring.calibration import Calibration
from llp.scoring.tie_break import earned
from llp.tracking.replay import result_from_events
from llp.views import about_trial, show_plan, show_trial

TIER1_END = ("tier1", "end")


def told_plan(tmp_path: Path, found: Calibration | None, **tier2: Any) -> tuple[Plan, str]:
    path = tmp_path / "c.json"
    if found is not None:
        path.write_text(found.to_json())
        tier2 |= {"calibration": str(path)}
    given = spec({"data_fractions": [0.02, 0.2, 1.0], "epochs": 2}, **tier2)
    planned, out = make_plan(given), StringIO()
    show_plan(planned, given, Console(file=out, width=10_000))
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("ties ")]
    return planned, line


def test_the_plan_says_whether_ties_will_be_settled_and_what_that_costs(tmp_path: Path) -> None:
    planned, line = told_plan(tmp_path, None)
    assert "tier 2 will not settle ties at promotions: no calibration was given" in line
    assert to_plain(planned)["ties"]["used"] is False
    _, line = told_plan(tmp_path, calibration(tier2_enters=False))
    assert "will not settle ties at promotions: on 96 finished trials of 2 studies it g" in line

    planned, line = told_plan(tmp_path, calibration(), budget=0.8)
    assert "tier 2 settles ties at promotions, as it has earned it on 96 finished trials" in line
    assert "weights sam_sharpness +0.40 ± 0.10; measured beyond the samples of tier 2" in line
    assert line.endswith("at most 0.8 of the samples of its probe for each tied trial")
    assert (planned.left_out_of_ties, to_plain(planned)["ties"]["used"]) == ({}, True)
    assert told_plan(tmp_path, calibration(), budget=0)[1].endswith("as tier2.budget is 0")


def test_the_plan_says_on_which_rungs_a_metric_of_the_tie_break_does_not_fit(
    tmp_path: Path,
) -> None:
    both = {"sam_sharpness": 0.4, "noise_sigma": 0.4}
    weighed = calibration(weights=both, standard_errors=dict.fromkeys(both, 0.1))
    planned, line = told_plan(tmp_path, weighed)
    options = spec(metrics=["sam_sharpness", "noise_sigma"], refinements=[]).tier2
    fitting = {r.rung: plan_measurement(options, r).left_out for r in planned.rungs[:2]}
    assert fitting == {1: ("noise_sigma", "sam_sharpness"), 2: ("noise_sigma",)}
    assert planned.left_out_of_ties == fitting
    assert "left out on rung 1, as over tier2.budget: noise_sigma, sam_sharpness (accuracy" in line
    assert line.endswith("left out on rung 2, as over tier2.budget: noise_sigma")


def made_choice() -> TieChoice:
    names = ("t000", "t002", "t005", "t007")
    return TieChoice(
        bracket=0,
        rung=1,
        tied=names,
        accuracies=dict(zip(names, (0.9, 0.89, 0.88, 0.88), strict=True)),
        values=dict(zip(names, (0.1, -0.3, 0.2, 0.0), strict=True)),
        kept=("t000", "t005"),
        usual=("t000", "t002"),
        standard_error=difference_error(0.89, 0.88, IMAGES),
    )


@pytest.mark.parametrize(
    ("trial_id", "said"),
    [
        ("t000", "kept by tier 2 among 4 tied trials (value +0.100); by accuracy alone as well"),
        ("t002", "passed over by tier 2 among 4 tied trials (value −0.300); by accuracy alone it "
         "would have gone on"),
        ("t005", "kept by tier 2 among 4 tied trials (value +0.200); by accuracy alone it would "
         "not have gone on"),
        ("t001", ""),
    ],
)  # fmt: skip
def test_a_trial_says_that_it_was_kept_or_passed_over_by_the_tie_break(
    trial_id: str, said: str
) -> None:
    study = result_from_events(make_events(num_trials=12))
    found = dataclasses.replace(study, tie_break=FLAT, tie_choices=(made_choice(),))
    about, out = about_trial(found, trial_id), StringIO()
    show_trial(about, Console(file=out, width=10_000))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("  tie ")]
    assert lines == ([f"  tie     rung 1  {said}"] if said else [])
    assert to_plain(about)["ties"] == ([to_plain(made_choice())] if said else [])


def test_the_page_shows_the_choices_it_changed_or_why_it_was_not_used() -> None:
    study = result_from_events(make_events(num_trials=12))
    assert tie_sentence(study) == ""
    assert "Ties that tier 2 settled" not in study_page(study)
    choice = made_choice()
    changed = dataclasses.replace(study, tie_break=FLAT, tie_choices=(choice,))
    (row,) = tie_data(changed).to_dict("records")
    assert (row["rung"], row["kept"], row["passed_over"]) == (1, "t005", "t002")
    assert (row["behind"], row["value"], row["other"]) == (pytest.approx(-1), 0.2, -0.3)
    assert "it settled 1 tie and changed 1 choice." in tie_sentence(changed)
    same = dataclasses.replace(choice, kept=choice.usual)
    kept = dataclasses.replace(study, tie_break=FLAT, tie_choices=(same,))
    assert "it settled 1 tie and changed no choice." in tie_sentence(kept)
    unused = dataclasses.replace(study, tie_break=earned(None, ROWS))
    for found in (changed, kept, unused):
        assert tie_sentence(found) in study_page(found).replace("\u00a0", " ")
    assert tie_sentence(unused) == (
        "Tier 2 was not used to settle ties at promotions: no calibration was given in "
        "tier2.calibration."
    )


def test_what_is_measured_for_ties_in_tier_1_is_no_progress_of_tier_2() -> None:
    log = make_events(num_trials=12, until="tier1")
    over = next(k for k, e in enumerate(log) if (e.get("name"), e.get("status")) == TIER1_END)
    plain, state = ProgressState(), ProgressState()
    for event in log[:over]:
        plain.update(event)
        state.update(event)
    rows, left, seen = _rows(plain), plain.remaining(), plain.samples_spent
    assert ("tier 2", 0.0, "0/4 measured") in rows

    probe = next(e["job"] for e in log if e["event"] == "job")
    for num, name in enumerate(("t000", "t001"), 1):
        job = probe | {"kind": "measure", "job_id": f"{name}-t1", "metrics": ["sam_sharpness"]}
        state.update({"event": "job", "job": job | {"trial": probe["trial"] | {"trial_id": name}}})
        assert _rows(state)[0][2].endswith(f"{num - 1}/{num} measured for ties")
        assert state.remaining() == left, "while it runs"
        end = JobEnd(f"{name}-t1", name, "completed", samples_seen=500, seconds=1e6)
        state.update({"event": "job_end", "kind": "measure", "end": to_plain(end)})
        assert _rows(state)[1:] == rows[1:]
        assert state.remaining() == left
    assert state.counts("measure") == plain.counts("measure") == (0, 0)
    assert state.expected("measure") == 4
    assert (state.samples_spent, seen) == (plain.samples_spent + 1000, plain.samples_spent)
    assert _spent(state) == _spent(plain) + ", 1,000 more in tier 2"
