"""What a user is told at the command line about things that otherwise happen in silence."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from make_study import make_events, write_study
from rich.console import Console
from study_runs import TINY

from llp import pipeline, views
from llp.display import Reporter, block, facts, landmark
from llp.progress import ProgressState
from llp.records import Decision, EarlierStudies, to_plain
from llp.reporting.earlier_exhibit import with_earlier
from llp.reporting.exhibits import Section
from llp.reporting.html import write_report
from llp.reporting.probing_sections import ladder_section
from llp.spec import digest, load_spec, notes
from llp.tracking.ledger import load_study
from llp.tracking.replay import result_from_events

WHY = "rank_correlation: the order on rung 1 says too little about that on rung 2"
STOPS_OFF = Decision("stops_off", "", 2, WHY)
EARLIER = {
    "first": [{"x": 1.0}, {"x": 2.0}],
    "earlier": [],
    "studies": EarlierStudies(
        ("past-0", "past-1"),
        {"cut": "not finished", "damaged": "its ledger cannot be read"},
        {"'x' outside its domain": 3},
        num_first=2,
    ),
}


def with_line(event: str, **payload: object) -> list[dict]:
    """The ledger of a made-up study with one more line, before that of its first trial."""
    return among(make_events(), event, **payload)


def among(events: list[dict], event: str, **payload: object) -> list[dict]:
    place = next(k for k, line in enumerate(events) if line["event"] == "trial")
    events.insert(place, {"event": event, "time": events[place]["time"], **to_plain(payload)})
    return [{**line, "seq": seq} for seq, line in enumerate(events)]


def shown(events: list[dict]) -> tuple[ProgressState, list[str], str]:
    """The state, the lines that are printed at once, and the live block."""
    state, lines, out = ProgressState(), [], io.StringIO()
    for event in events:
        state.update(event)
        lines.append(landmark(state, event))
    Console(file=out, width=400).print(block(state))
    return state, lines, out.getvalue()


def printed(show, *arguments: object) -> str:
    out = io.StringIO()
    show(*arguments, Console(file=out, width=400))
    return " ".join(out.getvalue().split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study that did both, with its page."""
    events = among(with_line("warm_start", **EARLIER), "decision", decision=STOPS_OFF)
    folder = write_study(tmp_path_factory.mktemp("told") / "s", events)
    write_report(load_study(folder), folder / "report.html")
    return folder


def spec_of(place: Path, *overrides: str):
    (place / "tiny.yaml").write_text(TINY)
    return load_spec(place / "tiny.yaml", overrides=list(overrides))


def test_screen_summary_and_page_say_that_early_stopping_went_off(folder):
    events = with_line("decision", decision=STOPS_OFF)
    state, lines, live = shown(events)
    assert f"early stopping went off, {WHY}" in lines
    assert f"early stopping went off, {WHY}" in live
    assert facts(state)["early_stopping_off"] == WHY
    result = load_study(folder)
    assert f"early stopping went off, {WHY}" in printed(views.show_summary, result, folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"Early stopping went off, {WHY}" in page
    plain, quiet, _ = shown(make_events())
    assert facts(plain)["early_stopping_off"] is None
    assert not any("went off" in line for line in quiet)


def test_several_retries_are_counted_in_their_plural():
    result = result_from_events(make_events())
    for num, words in ((1, "1 retry."), (2, "2 retries.")):
        decisions = (
            Decision("promote", "t000", 2, "x"),
            *[Decision("retry", "t001", 1, "x")] * num,
        )
        exhibits = ladder_section(replace(result, decisions=decisions)).exhibits
        reading = next(e.reading for e in exhibits if e.key == "decisions")
        assert reading == f"1 promotion, {words}"


def test_a_terminal_keeps_the_line_above_the_live_block():
    console, kept = Console(file=io.StringIO(), force_terminal=True, width=300), []
    with Reporter(console=console) as reporter:
        console.print = lambda *lines, **_: kept.extend(map(str, lines))  # the block is not printed
        for event in with_line("decision", decision=STOPS_OFF):
            reporter({**event, "time": None})
    assert kept.count(f"early stopping went off, {WHY}") == 1


def test_screen_summary_and_page_say_what_comes_from_earlier_studies(folder):
    events = with_line("warm_start", **EARLIER)
    state, lines, live = shown(events)
    used = "2 first configurations from 2 studies: past-0 and past-1"
    left = "left out cut (not finished) and damaged (its ledger cannot be read)"
    skipped = "3 configurations left out (3 'x' outside its domain)"
    assert f"warm start: {used}; {left}; {skipped}" in lines
    assert used in live
    assert to_plain(facts(state))["earlier_studies"]["left_out"]["cut"] == "not finished"
    result = load_study(folder)
    summary = printed(views.show_summary, result, folder)
    assert all(words in summary for words in (used, left, skipped))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Taken from earlier studies" in page
    for name in ("past-0", "past-1", "cut", "damaged", "left out: not finished"):
        assert name in page
    section = Section("space", "", "", ())
    assert with_earlier(section, result_from_events(make_events())) == section


def test_a_plan_says_what_comes_from_earlier_studies(tmp_path):
    spec = spec_of(tmp_path)
    plan = pipeline.plan(spec)
    assert plan.earlier is None
    assert "warm start" not in printed(views.show_plan, plan, spec)
    with_earlier = replace(plan, earlier=EarlierStudies(("a", "b"), {"c": "no"}))
    text = printed(views.show_plan, with_earlier, spec)
    assert "warm start 0 first configurations from 2 studies: a and b left out c (no)" in text


@pytest.mark.parametrize(
    ("overrides", "rungs"),
    [
        (["search_space.warmup_fraction=[0.05,0.3]"], "rungs 1, 2"),
        (["search_space.warmup_fraction={type: uniform, low: 0.1, high: 0.4}"], "rungs 1, 2"),
        (["search_space.warmup_fraction={type: uniform, low: 0.2, high: 0.4}"], ""),
        (["search_space.warmup_fraction=[0.05,0.3]", "tier1.warmup_fraction=0"], ""),
        ([], ""),
    ],
)
def test_a_check_notes_searched_warm_ups_that_probes_do_not_use(tmp_path, overrides, rungs):
    spec = spec_of(tmp_path, "tier1.warmup_fraction=0.2", *overrides)
    found = [str(note) for note in notes(spec)]
    assert len(found) == bool(rungs)
    text = printed(views.show_plan, pipeline.plan(spec), spec)
    if rungs:
        assert f"on {rungs} values below tier1.warmup_fraction (0.2) count as 0.2" in found[0]
        assert "search_space.warmup_fraction" in found[0]
        assert " ".join(f"note {found[0]}".split()) in text
    else:
        assert "note" not in text.split()


def test_a_warm_up_of_0_asks_for_nothing_as_none_does(tmp_path):
    without, zero = spec_of(tmp_path), spec_of(tmp_path, "tier1.warmup_fraction=0")
    assert digest(without) == digest(zero) != digest(spec_of(tmp_path, "tier1.warmup_fraction=0.2"))
