"""The page of a batch: which way to train is better, beyond what seeds explain, and at what cost.

Every sentence is made from the numbers of the table; where they do not decide, it says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llp.comparing.significance import PairedTest, against, holm_corrected
from llp.comparing.summary import largest, smallest, summary
from llp.comparing.table import completed, definition
from llp.reporting import formats
from llp.reporting.batch_sections import (
    choice_section,
    convergence_section,
    cost_section,
    failure_section,
    heat_section,
    p_text,
    study_sections,
)
from llp.reporting.documents import Document
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, seconds, share, whole
from llp.reporting.figures import batches as drawings
from llp.reporting.html import page, write_page
from llp.reporting.tables import Column, table, text

STYLE = "pages.css"


def write_batch_page(events: Sequence[Mapping[str, Any]], runs: pd.DataFrame, path: Path) -> Path:
    """Writes the page of a batch, in whatever state it is.

    The same ledger gives the same bytes.

    Args:
        events: The lines of the ledger.
        runs: The table made from them; see `comparing.table.runs_table`.
        path: The file to write or replace.

    Raises:
        EnvironmentProblem: The file cannot be written.
    """
    batch = definition(events)
    num_runs = formats.plural(len(batch["runs"]), "run")
    html = page(
        "document.html",
        title=formats.short(batch["title"] or f"Batch {batch['name']}", 200),
        extra_style=STYLE,
        kicker=f"batch {formats.short(batch['name'], 80)} · {num_runs} · "
        f"{formats.short(batch['file'], 200)}",
        links=(),
        state=_state(events, runs),
        document=batch_document(events, runs),
    )
    return write_page(html, path)


def batch_document(events: Sequence[Mapping[str, Any]], runs: pd.DataFrame) -> Document:
    """The page as plain parts."""
    batch = definition(events)
    of = summary(runs)
    tests = compared(runs, batch)
    figure, headline, sure = _answer(of, tests, batch)
    sections = (
        _accuracy_section(of, runs, tests, batch),
        *heat_section(runs),
        *choice_section(events, runs, batch),
        *study_sections(runs, batch),
        convergence_section(runs),
        *cost_section(runs),
        *failure_section(runs),
    )
    return Document(
        figure=figure,
        headline=headline,
        sure=sure,
        facts=_facts(events, runs, of),
        sections=sections,
    )


def answer_text(events: Sequence[Mapping[str, Any]], runs: pd.DataFrame) -> str:
    """What the page says first, with a sentence for every configuration, for a terminal."""
    batch = definition(events)
    tests = compared(runs, batch)
    _, headline, sure = _answer(summary(runs), tests, batch)
    lines = [" ".join(filter(None, (headline, sure))), *(verdict(test) for test in tests)]
    return "\n".join(lines).replace(formats.NBSP, " ")


# --- who is compared with whom ----------------------------------------------------------------


def references(runs: pd.DataFrame, batch: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(dataset, model) -> label that the others there are compared with.

    It is a configuration of the reference run; where that has none on a dataset and model, one with
    its optimizer. Of several the one with the best mean validation accuracy, so that the test split
    does not choose.
    """
    done = completed(runs)
    done = done[done["kind"] == "final"]
    optimizers = set(done.loc[done["run"] == batch["reference"], "optimizer"])
    found = {}
    for (dataset, model), everything in done.groupby(["dataset", "model"], sort=False):
        group = everything[everything["run"] == batch["reference"]]
        if group.empty:
            group = everything[everything["optimizer"].isin(optimizers)]
        if group.empty:
            continue
        means = group.groupby("label", sort=False, as_index=False)["validation_accuracy"].mean()
        found[str(dataset), str(model)] = str(largest(means, "validation_accuracy")["label"])
    return found


def compared(runs: pd.DataFrame, batch: Mapping[str, Any]) -> list[PairedTest]:
    """Every final configuration against the reference of its dataset and model, as one family."""
    done = completed(runs)
    finals = done[done["kind"] == "final"]
    tests: list[PairedTest] = []
    for (dataset, model), reference in references(runs, batch).items():
        group = finals[(finals["dataset"] == dataset) & (finals["model"] == model)]
        labels = [str(label) for label in dict.fromkeys(group["label"])]
        tests += against(group, reference, labels)
    return holm_corrected(tests)


def verdict(test: PairedTest) -> str:
    """Whether it helped, in one plain sentence.

    >>> verdict(PairedTest("sam", "sgd", 1, 0.01, *[math.nan] * 6)).replace(formats.NBSP, " ")
    'sam: one seed in common with sgd, +1.00 points; nothing can be said about chance.'
    """
    label, reference = formats.clean(test.label), formats.clean(test.reference)
    gain = f"{formats.signed(100 * test.difference)} points"
    if test.num_pairs < 2:
        if not test.num_pairs:
            return f"{label}: no seed in common with {reference}; nothing to compare."
        return (
            f"{label}: one seed in common with {reference}, {gain}; nothing can be said about "
            "chance."
        )
    interval = (
        f"95 % interval {formats.signed(100 * test.low)} to {formats.signed(100 * test.high)}"
    )
    p = p_text(test.adjusted)
    p = f"p {p}" if p.startswith("<") else f"p = {p}"
    evidence = f"({interval}; {p} after Holm; {test.num_pairs} seeds)"
    if not test.decided:
        return f"{label} cannot be told apart from {reference}: {gain} {evidence}."
    did = "helped" if test.difference > 0 else "hurt"
    return f"{label} {did}: {gain} against {reference} {evidence}."


# --- what the page says first -----------------------------------------------------------------


def _answer(
    of: pd.DataFrame, tests: Sequence[PairedTest], batch: Mapping[str, Any]
) -> tuple[str, str, str]:
    finals = of[(of["kind"] == "final")].dropna(subset=["test_accuracy"])
    if finals.empty:
        return "", "No full training has been completed yet.", ""
    if len(finals) == 1:
        only = largest(finals, "test_accuracy")
        return (
            formats.percent(only["test_accuracy"], 2),
            f"{formats.clean(only['label'])} has {_accuracy(only)} test accuracy.",
            "",
        )
    best = largest(finals, "test_accuracy")
    headline = (
        f"{formats.clean(best['label'])} has the highest mean: {_accuracy(best)} test accuracy."
    )
    if len(set(finals["dataset"])) > 1:
        headline = f"{formats.plural(len(finals), 'configuration')} on several datasets."
    better = [t.label for t in tests if t.decided and t.difference > 0]
    worse = [t.label for t in tests if t.decided and t.difference < 0]
    rest = len(tests) - len(better) - len(worse)
    reference = formats.clean(batch["reference"])
    if not tests:
        return "", headline, f"There is nothing to compare with {reference} seed by seed."
    parts = []
    if better:
        parts.append(f"{formats.listed(better)} helped")
    if worse:
        parts.append(f"{formats.listed(worse)} hurt")
    if rest:
        parts.append(f"{formats.plural(rest, 'configuration')} cannot be told apart from it")
    sure = (
        f"Against {reference}: {'; '.join(parts)} (paired t over seeds, Holm-corrected for "
        f"{formats.plural(len(tests), 'comparison')}, level 5 %). Seeds change initialisation and "
        "order of the images; split and test images are the same for all."
    )
    return f"{len(better)} of {len(tests)}", f"{_helped(len(better), reference)} {headline}", sure


def _helped(num: int, reference: str) -> str:
    if not num:
        return f"Nothing beat {reference} beyond what seeds explain."
    beat = "configuration beats" if num == 1 else "configurations beat"
    return f"{num} {beat} {reference} beyond what seeds explain."


def _accuracy(row: Mapping[str, Any]) -> str:
    mean = formats.percent(row["test_accuracy"], 2)
    if not formats.is_number(row["standard_error"]):
        return f"{mean} (one seed)"
    error = formats.points(row["standard_error"], 2)
    return f"{mean} ± {error} (standard error over {int(row['num'])} seeds)"


def _state(events: Sequence[Mapping[str, Any]], runs: pd.DataFrame) -> str:
    missing = int((runs["outcome"] == "missing").sum())
    last = events[-1]["event"] if events else ""
    if last != "finished":
        num = formats.plural(missing, "training")
        begun = f"; {num} had begun and not ended" if missing else ""
        return f"The batch is not finished{begun}. The same command goes on with it."
    return ""


def _facts(
    events: Sequence[Mapping[str, Any]], runs: pd.DataFrame, of: pd.DataFrame
) -> tuple[tuple[str, str], ...]:
    done = runs[runs["outcome"] == "completed"]
    full = done[done["kind"] != "candidate"]
    counts = sorted({int(n) for n in of["num"] if n})
    seeds = " to ".join(str(n) for n in dict.fromkeys([counts[0], counts[-1]])) if counts else ""
    return (
        ("full trainings", formats.count(len(full))),
        ("trainings to choose", formats.count(len(done) - len(full))),
        ("seeds", seeds),
        ("samples", formats.amount(float(done["samples"].sum()))),
        ("compute", formats.duration(float(done["seconds"].sum()))),
        ("test images", formats.count(float(full["num_test"].max())) if len(full) else ""),
    )


# --- the first section ------------------------------------------------------------------------


def _accuracy_section(
    of: pd.DataFrame, runs: pd.DataFrame, tests: Sequence[PairedTest], batch: Mapping[str, Any]
) -> Section:
    finals = of[of["kind"] == "final"]
    labels = [str(label) for label in finals["label"]]
    done = completed(runs)
    first = next(iter(references(runs, batch).values()), "")
    asked = runs.drop_duplicates("label").set_index("label")["asked"]
    by_label = {test.label: test for test in tests}
    rows = []
    for row in finals.to_dict("records"):
        test = by_label.get(str(row["label"]))
        rows.append(
            {
                **{str(key): value for key, value in row.items()},
                "error": _points(row["standard_error"]),
                "verdict": _word(test, row["num"]),
                "hyperparameters": formats.short(_told(str(asked[row["label"]])), 200),
            }
        )
    columns = (
        text("label", "configuration"),
        Column("test_accuracy", "test accuracy", lambda v: formats.percent(v, 2)),
        Column("error", "± standard error (points)", lambda v: formats.number(v, 2)),
        whole("num", "seeds"),
        text("verdict", "against the reference"),
        share("validation_accuracy", "validation accuracy"),
        whole("samples", "samples a training"),
        seconds("seconds", "time a training"),
        whole("num_failed", "failed"),
        text("hyperparameters", "hyperparameters"),
    )
    exhibits = [
        Exhibit(
            key="accuracies",
            title="",
            reading=_accuracy_reading(finals),
            svgs=drawn(drawings.accuracy_figure(done, labels, first)) if len(done) else (),
            legend=(
                Key("one seed", "muted", "ring"),
                Key("mean ± standard error", "blue", "s"),
                Key("reference", "vermillion", "D"),
            ),
            data=(Data("", table(pd.DataFrame(rows), columns), shown=True, sortable=True),)
            if rows
            else (),
            wide=True,
            note="The standard error is over seeds. Samples are training images in all gradients "
            "taken, so SAM and ASAM count two for each image. Times are those of the machine that "
            "ran it, with whatever else ran beside.",
        )
    ]
    if tests:
        exhibits.append(difference_exhibit(tests, "differences", "Did it help?"))
    return Section(
        "accuracy",
        "Accuracy",
        "Full trainings; the test split was read once, at the end of each.",
        tuple(exhibits),
    )


def difference_exhibit(tests: Sequence[PairedTest], key: str, title: str) -> Exhibit:
    """Differences to a reference with their tests, and a sentence on each."""
    frame = pd.DataFrame(
        {
            "label": t.label,
            "reference": t.reference,
            "num_pairs": t.num_pairs,
            "difference": 100 * t.difference,
            "low": 100 * t.low,
            "high": 100 * t.high,
            "t": t.statistic,
            "p": p_text(t.p_value),
            "adjusted": p_text(t.adjusted),
            "exact": p_text(t.exact_p_value),
            "verdict": verdict(t),
        }
        for t in tests
    )
    points = [
        Column(k, name, formats.signed)
        for k, name in (
            ("difference", "points"),
            ("low", "from"),
            ("high", "to (95 %)"),
            ("t", "t"),
        )
    ]
    columns = (
        text("label", "configuration"),
        text("verdict", "in words"),
        *points,
        text("p", "p"),
        text("adjusted", "p after Holm"),
        text("exact", "p of sign flips"),
        whole("num_pairs", "seeds"),
        text("reference", "against"),
    )
    return Exhibit(
        key=key,
        title=title,
        reading=" ".join(verdict(t) for t in tests if t.decided)
        or (
            "The comparison is not decided."
            if len(tests) == 1
            else f"None of the {len(tests)} comparisons is decided."
        ),
        svgs=tuple(
            svg
            for number, reference in enumerate(dict.fromkeys(t.reference for t in tests))
            for svg in drawn(
                drawings.difference_figure(
                    [t for t in tests if t.reference == reference], f"{key}-{number}"
                )
            )
        ),
        legend=(
            Key("decided: p after Holm below 0.05", "vermillion", "D"),
            Key("not decided", "blue", "o"),
        ),
        wide=len({t.reference for t in tests}) == 1,
        data=(Data("", table(frame, columns), shown=True),),
        note="Student's paired t over seeds, with its 95 % interval before the correction. The "
        "test of sign flips assumes no normal distribution; n seeds cannot give less than 2 / 2ⁿ.",
    )


def _word(test: PairedTest | None, num: int) -> str:
    if test is None:
        return "reference" if num else "no result"
    if test.num_pairs < 2:
        return "too few seeds"
    if not test.decided:
        return "not told apart"
    return "helped" if test.difference > 0 else "hurt"


def _points(value: Any) -> float | None:
    return 100 * value if formats.is_number(value) else None


def _told(asked: str) -> str:
    return ", ".join(f"{k} {formats.number(v)}" for k, v in json.loads(asked).items())


def _accuracy_reading(finals: pd.DataFrame) -> str:
    known = finals.dropna(subset=["test_accuracy"])
    if known.empty:
        return "No full training has been completed."
    best, worst = largest(known, "test_accuracy"), smallest(known, "test_accuracy")
    if len(known) == 1:
        return f"{formats.clean(best['label'])}: {_accuracy(best)}."
    return (
        f"From {formats.percent(worst['test_accuracy'], 2)} ({formats.clean(worst['label'])}) to "
        f"{formats.percent(best['test_accuracy'], 2)} ({formats.clean(best['label'])})."
    )
