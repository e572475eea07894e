"""The page of a study: complete, offline, escaped, and honest about what is missing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
import shutil
import stat
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llp.errors import EnvironmentProblem
from llp.records import (
    Cost,
    CurvePoint,
    LearningCurve,
    Rung,
    SearchResult,
    Trial,
    TrialResult,
    Verification,
)
from llp.reporting import html
from llp.tracking.ledger import result_from_events
from tests.make_study import make_events

SECTIONS = [
    "verdict",
    "ladder",
    "curves",
    "ranks",
    "space",
    "flatness",
    "scores",
    "verification",
    "trials",
    "failures",
    "reproduce",
]
EVIL = (
    "<script>document.title='pwned'</script></script><img src=x onerror=document.title='pwned'>"
    '"onload="1" \' {{7*7}} ${7*7} `x` & \u202e'
)
NOTHING = SearchResult(
    study_id="empty",
    spec_digest="",
    spec={},
    status="running",
    rungs=(Rung(1, 0.1, 100, 2), Rung(2, 1.0, 1000, 2)),
    trials=(),
    decisions=(),
    profiles=(),
    score_report=None,
    verifications=(),
    winner=None,
    winner_reason="",
    cost=Cost(0, 0, 0, 0),
    environment={},
    started=0.0,
    finished=0.0,
)


class Page(HTMLParser):
    """Tags, ids, references and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: dict[str, str] = {}
        self.script = ""
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"]
        if tag not in {"meta", "path", "use", "rect", "circle", "br", "img"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.script += data
        elif "style" not in self._open:
            self.words[self._section] = self.words.get(self._section, "") + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def study(num_trials: int = 12, **options: str) -> SearchResult:
    return result_from_events(make_events(num_trials, **options))  # type: ignore[arg-type]


def evil_study() -> SearchResult:
    """Hostile text wherever a user, a library or another machine can put some."""
    result = study(12, hostile=EVIL, study_id=EVIL)
    assert result.score_report is not None
    trials = tuple(
        dataclasses.replace(
            t,
            failure=t.failure and f"{EVIL}\n{t.failure}\n{EVIL}",
            stopped_by=t.stopped_by and f"{t.stopped_by}{EVIL}",
        )
        for t in result.trials
    )
    scores = tuple(
        dataclasses.replace(
            score, contributions={f"{k}{EVIL}": v for k, v in score.contributions.items()}
        )
        for score in result.score_report.scores
    )
    return dataclasses.replace(
        result,
        spec_digest=EVIL,
        trials=trials,
        decisions=tuple(dataclasses.replace(d, reason=d.reason + EVIL) for d in result.decisions),
        profiles=tuple(
            dataclasses.replace(
                profile,
                device=EVIL,
                measurements=tuple(
                    dataclasses.replace(m, name=m.name + EVIL, note=EVIL)
                    for m in profile.measurements
                ),
            )
            for profile in result.profiles
        ),
        score_report=dataclasses.replace(
            result.score_report,
            preset=EVIL,
            scores=scores,
            sentence=EVIL,
            weights={EVIL: 1.0},
            ablation=tuple(
                dataclasses.replace(row, name=row.name + EVIL)
                for row in result.score_report.ablation
            ),
        ),
        winner_reason=EVIL,
        cost=dataclasses.replace(result.cost, seconds={EVIL: 3.0}),
        environment={EVIL: EVIL, "nested": {EVIL: [EVIL]}, "command": EVIL},
    )


def all_diverged() -> SearchResult:
    bad = CurvePoint(1, 0.1, 1, 100, math.nan, math.nan, math.inf, math.nan, 1.0)
    trials = tuple(
        TrialResult(
            Trial(f"t{n:03d}", {"learning_rate": 10.0**n}, n),
            (LearningCurve(f"t{n:03d}", 1, (bad,)),),
            "diverged",
            failure="loss is not finite",
            samples_seen=100,
        )
        for n in range(13)
    )
    return dataclasses.replace(
        NOTHING, status="finished", trials=trials, cost=Cost(1300, 0, 0, 26_000)
    )


CASES = {
    "finished": study,
    "resumed": lambda: result_from_events(make_events(8, resumed=True)),
    "tier1": lambda: study(12, until="tier1"),
    "one": lambda: study(1),
    "diverged": all_diverged,
    "nothing": lambda: NOTHING,
    "evil": evil_study,
}


@cache
def page(case: str) -> Page:
    return Page(html.study_page(CASES[case]()))


@pytest.fixture(params=CASES)
def any_page(request: pytest.FixtureRequest) -> Page:
    return page(request.param)


def test_every_section_is_there_in_order_and_says_something(any_page: Page) -> None:
    assert [attributes["id"] for attributes in any_page.all("section")] == SECTIONS
    for name in SECTIONS:
        assert len(any_page.words[name].split()) > 5


def test_nothing_is_loaded_from_anywhere(any_page: Page) -> None:
    for _, attributes in any_page.tags:
        assert not attributes.keys() & {"src", "srcset", "data", "action", "poster", "xlink:href"}
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
        for target in re.findall(r"url\(([^)]*)\)", " ".join(attributes.values())):
            assert target.startswith("#")
    style = any_page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert {name for name, _ in any_page.tags} & {
        "link",
        "iframe",
        "object",
        "embed",
        "img",
    } == set()


def test_the_policy_allows_only_the_inline_sorter(any_page: Page) -> None:
    policies = [m["content"] for m in any_page.all("meta") if "http-equiv" in m]
    digest = base64.b64encode(hashlib.sha256(any_page.script.encode()).digest()).decode()
    assert len(policies) == 1
    assert policies[0].startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    assert f"'sha256-{digest}'" in policies[0]
    assert len(any_page.all("script")) == 1


def test_ids_are_unique_and_every_reference_resolves(any_page: Page) -> None:
    ids = [attributes["id"] for _, attributes in any_page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set()
    for _, attributes in any_page.tags:
        wanted |= set(re.findall(r"url\(#([^)]*)\)", " ".join(attributes.values())))
        wanted |= {attributes["href"][1:]} if "href" in attributes else set()
        wanted |= set(attributes.get("aria-labelledby", "").split())
    assert wanted <= set(ids)


def test_figures_take_all_their_colours_from_the_theme(any_page: Page) -> None:
    for drawn in re.findall(r"<svg.*?</svg>", any_page.source, flags=re.S):
        assert not re.search(r"(fill|stroke)[:=]\W?#", drawn)


def test_every_figure_has_a_name_a_reading_and_a_table(any_page: Page) -> None:
    drawn = [a for a in any_page.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a["role"] == "img" and a["aria-label"] for a in drawn)
    assert any_page.source.count("<title>") == len(drawn) + 1
    for block in re.findall(r"<figure.*?</figure>", any_page.source, flags=re.S):
        if 'role="img"' in block:
            assert 'class="reading"' in block
            assert "<table" in block or "table under" in block


def test_hostile_text_is_shown_and_never_run() -> None:
    shown = page("evil")
    assert "<script>document" not in shown.source
    assert "<script>alert" not in shown.source
    assert "<img" not in shown.source
    assert "49" not in "".join(re.findall(r"\S*7\*7\S*", shown.source))
    for name in ("verdict", "ladder", "space", "flatness", "scores", "failures", "reproduce"):
        assert "<script>document.title='pwned'</script>" in shown.words[name], name
    assert "{{7*7}}" in shown.words["failures"]
    assert "\u202e" not in shown.source
    assert len(shown.all("script")) == 1


def test_verdict_holds_winner_yaml_cost_and_certainty() -> None:
    result = study()
    words = page("finished").words["verdict"]
    test = [v.test_accuracy for v in result.verifications if v.trial_id == result.winner]
    assert f"{100 * sum(test) / len(test):.1f} ±" in words
    assert f"{result.winner}, trained fully" in words
    assert "2 seeds, 360 test images" in words
    assert result.winner_reason in words
    winner = next(t for t in result.trials if t.trial.trial_id == result.winner)
    for name, value in winner.trial.hyperparameters.items():
        assert f"  {name}: {value}\n" in words
    cost = result.cost
    spent = cost.tier1 + cost.tier2 + cost.verification
    assert f"{cost.full_search / spent:.1f} times as many" in words


@pytest.mark.parametrize(
    ("case", "section", "sentence"),
    [
        ("tier1", "verdict", "No winner yet. Best so far"),
        ("tier1", "", "interrupted"),
        ("tier1", "flatness", "did not get to tier 2"),
        ("tier1", "scores", "did not get to scoring"),
        ("tier1", "verification", "Nothing has been verified"),
        ("one", "ranks", "cannot be compared"),
        ("one", "space", "importance needs at least 12"),
        ("one", "verification", "no runner-up"),
        ("diverged", "verdict", "No configuration produced a usable result: 13 diverged"),
        ("diverged", "verdict", "Every trial diverged"),
        ("diverged", "failures", "loss is not finite"),
        ("diverged", "flatness", "turned off or had no survivor"),
        ("nothing", "verdict", "No configuration has been tried yet"),
        ("nothing", "ladder", "No trial has started yet"),
        ("nothing", "curves", "once a trial has reported"),
        ("nothing", "trials", "No trial has been started"),
        ("nothing", "failures", "No trial has run yet"),
        ("nothing", "reproduce", "command was not recorded"),
    ],
)
def test_what_is_missing_is_said(case: str, section: str, sentence: str) -> None:
    text = " ".join(page(case).words[section].split()).replace("\u00a0", " ")
    assert sentence in text


def test_trials_that_fail_alike_are_told_once() -> None:
    assert page("diverged").words["failures"].count("loss is not finite") == 1
    assert "t000 (rung 1), t001 (rung 1)" in page("diverged").words["failures"]
    assert "and 1 more" in page("diverged").words["failures"]


def test_every_trial_is_in_the_table_winner_first() -> None:
    words = page("finished").words["trials"]
    found = re.findall(r"t0\d\d", words)
    assert sorted(found) == [f"t{n:03d}" for n in range(12)]
    assert found[0] == study().winner


def test_reproduce_tells_command_digest_seeds_versions_and_spec() -> None:
    result, words = study(), page("finished").words["reproduce"]
    for expected in (
        result.environment["command"],
        result.environment["git_commit"],
        result.environment["torch"],
        result.spec_digest,
        "1000, 1001",
        "learning_rate:",
        "type: loguniform",
    ):
        assert expected in words


def test_secrets_are_hidden() -> None:
    result = dataclasses.replace(
        NOTHING,
        spec={"tracking": {"uri": "http://me:hunter2@host/"}, "options": {"api_key": "hunter2"}},
        environment={"MY_TOKEN": "hunter2", "command": "llp --uri http://me:hunter2@host"},
    )
    text = html.study_page(result)
    assert "hunter2" not in text
    assert "(hidden)" in text


def test_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    path = html.write_report(CASES["resumed"](), tmp_path / "deep" / "a.html")
    assert path == tmp_path / "deep" / "a.html"
    assert path.read_bytes() == page("resumed").source.encode()


def test_page_of_64_trials_with_long_curves_is_under_2_mb() -> None:
    result = study(64)
    rungs = tuple(dataclasses.replace(rung, epochs=200) for rung in result.rungs)
    trials = []
    for number, trial in enumerate(result.trials):
        curves = tuple(
            LearningCurve(
                curve.trial_id,
                curve.rung,
                tuple(
                    dataclasses.replace(
                        curve.points[0],
                        epoch=epoch,
                        validation_accuracy=0.9 - 0.5 / epoch + 0.01 * math.sin(epoch * number),
                    )
                    for epoch in range(1, 201)
                ),
            )
            for curve in trial.curves
        )
        many = {f"hyperparameter_{i}": (i + 1.0) / (number + 1) for i in range(16)}
        trials.append(
            dataclasses.replace(
                trial,
                trial=dataclasses.replace(trial.trial, hyperparameters=many),
                curves=curves,
                outcome="failed" if number % 2 else "completed",
                failure=f"Traceback {number}\n" + "x" * 20_000 if number % 2 else "",
            )
        )
    big = dataclasses.replace(result, rungs=rungs, trials=tuple(trials), spec={"search_space": {}})
    assert len(html.study_page(big).encode()) <= 2_000_000


def test_an_older_report_survives_a_failed_write(tmp_path: Path) -> None:
    blocked = tmp_path / "report.html"
    blocked.mkdir()
    (blocked / "keep").write_text("old")
    with pytest.raises(EnvironmentProblem, match=r"cannot write the report to .*report\.html"):
        html.write_page("<p>new</p>", blocked)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (blocked / "keep").read_text() == "old"


def test_written_page_is_readable_by_others_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = html.write_page("<p>é</p>", tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == "<p>é</p>"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_accuracies_that_are_not_finite_do_not_enter_the_verdict() -> None:
    broken = Verification("t000", 1, math.nan, math.nan, math.nan, math.nan, 0, 0, 0.0)
    result = dataclasses.replace(study(1), verifications=(broken,))
    text = html.study_page(result)
    assert "no full training has verified it" in " ".join(text.split())
    assert "nan" not in re.findall(r"\bnan\b", text.lower())


@pytest.mark.slow
def test_chromium_runs_the_sorter_and_nothing_hostile(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to open the page with")
    path = html.write_report(evil_study(), tmp_path / "report.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    dom = Page(done.stdout)
    assert "pwned" not in done.stdout.split("</title>")[0].replace("document.title='pwned'", "")
    assert dom.all("button")  # the sorter made the headings clickable: its hash was accepted
    assert not dom.all("img")
