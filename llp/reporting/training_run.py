"""The pages of one full training that was run by itself: report, test report and log.

They are made of the same parts as those of a search, with nothing about a search in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from llp.reporting import formats, yaml_text
from llp.reporting.documents import STATUS, Document, Link, state_sentence
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, seconds, share, whole
from llp.reporting.figures import training
from llp.reporting.html import page, write_page
from llp.reporting.log_page import log_phases, log_text
from llp.reporting.provenance import provenance
from llp.reporting.runs import Entry, FullTraining
from llp.reporting.tables import Column, table, text
from llp.reporting.test_page import sureness, test_document
from llp.reporting.tracking_section import tracking_sections
from llp.reporting.training_page import CURVE_COLUMNS

REPORT, TEST, LOG, TEXT = "report.html", "test.html", "log.html", "log.txt"
_PAGES = ((REPORT, "training report"), (TEST, "test report"), (LOG, "training log"))
_RUN_SECTIONS = ("seed", "dataset", "model", "training", "verification")


def write_run(
    entry: Entry, folder: Path, *, extra: tuple[Section, ...] = (), results: str = ""
) -> list[Path]:
    """Writes the pages of a training into `folder` and returns their paths, the report first.

    Args:
        entry: The training; its trainings are the seeds.
        folder: The study folder.
        extra: Sections about the optimizer.
        results: Name of the file with the results, to be named on the page.

    Raises:
        EnvironmentProblem: A file cannot be written.
    """
    tested = bool(_tested(entry))
    pages = {REPORT: _document(entry, REPORT, run_document(entry, extra, results), tested)}
    if tested:
        pages[TEST] = _document(entry, TEST, test_document(entry, subject(entry)), tested)
    pages[LOG] = page(
        "log.html",
        title=f"{formats.short(entry.name, 80)}: training log",
        extra_style="pages.css",
        kicker=_kicker(entry),
        links=_links(LOG, tested),
        state=state_sentence(entry),
        status=STATUS[entry.status],
        phases=log_phases(entry),
        text_file=TEXT,
        omitted=0,
    )
    pages[TEXT] = log_text(entry)
    return [write_page(content, folder / name) for name, content in pages.items()]


def subject(entry: Entry) -> str:
    """What was trained, in a few words."""
    names = {name: _named(entry, name) for name in ("model", "dataset")}
    recipe = _recipe_of(entry)
    how = formats.short(recipe.get("optimizer", ""), 40)
    if recipe.get("averaging", "none") != "none":
        how += f" and {formats.short(recipe['averaging'], 40)}"
    return f"{names['model']} on {names['dataset']} with {how}"


def run_document(entry: Entry, extra: tuple[Section, ...] = (), results: str = "") -> Document:
    """The training report, whatever state the training is in."""
    assert entry.result is not None
    tested = _tested(entry)
    figure, headline, sure = _answer(entry, tested)
    return Document(
        figure=figure,
        headline=headline,
        sure=sure,
        facts=tuple(_facts(entry, results)),
        yaml=yaml_text.dump({k: entry.spec[k] for k in _RUN_SECTIONS if k in entry.spec}),
        yaml_title="The training as a file",
        yaml_note="llp train FILE runs it again.",
        sections=(
            _curves(entry),
            _seeds(entry),
            *extra,
            *tracking_sections(seen for each in entry.trainings for seen in each.observations),
            _settings(entry),
        ),
        provenance=provenance(entry.result),
    )


def _tested(entry: Entry) -> list[FullTraining]:
    return [each for each in entry.trainings if each.verification is not None]


def _answer(entry: Entry, tested: list[FullTraining]) -> tuple[str, str, str]:
    what = subject(entry)
    if tested:
        accuracies = [each.verification.test_accuracy for each in tested if each.verification]
        images = max(each.verification.num_test_examples for each in tested if each.verification)
        figure = formats.percent(fmean(accuracies))
        if len(accuracies) > 1:
            error = stdev(accuracies) / math.sqrt(len(accuracies))
            figure = f"{formats.points(fmean(accuracies))} ± {formats.points(error, 2)} %"
        how = "mean ± standard error of " if len(accuracies) > 1 else ""
        return (
            figure,
            f"test accuracy of {what} ({how}{formats.plural(len(accuracies), 'seed')}, "
            f"{formats.count(images)} test images).",
            sureness(accuracies, images),
        )
    done = [each for each in entry.trainings if each.end and each.end.outcome == "completed"]
    if done:
        return (
            formats.percent(fmean(_judged(entry, each).validation_accuracy for each in done)),
            f"validation accuracy of {what} ({formats.plural(len(done), 'seed')}).",
            "The test split was not read.",
        )
    return "", f"There is no result of {what}: the training {STATUS[entry.status]}.", ""


def _judged(entry: Entry, each: FullTraining) -> Any:
    return _best(each) if _uses_best(entry) else each.points[-1]


def _best(each: FullTraining) -> Any:
    return max(each.points, key=lambda p: (p.validation_accuracy, -p.validation_loss))


def _uses_best(entry: Entry) -> bool:
    training_section = entry.spec.get("training")
    return isinstance(training_section, Mapping) and training_section.get("best_weights") == "use"


def _facts(entry: Entry, results: str) -> list[tuple[str, str]]:
    done = [each for each in entry.trainings if each.end is not None]
    ends = [each.end for each in done if each.end is not None]
    facts = [("Seeds", ", ".join(str(each.seed) for each in entry.trainings))]
    if ends:
        took = sum(end.seconds for end in ends)
        samples = sum(end.samples_seen for end in ends)
        peak = max(end.peak_memory_bytes for end in ends)
        facts += [
            ("Time", f"{formats.duration(took)} on {formats.listed(_devices(ends))}"),
            ("Samples seen", formats.count(samples)),
            ("Peak memory", f"{peak / 2**20:,.0f} MiB"),
        ]
    facts.append(
        (
            "Judged by",
            "the weights of the epoch with the best validation accuracy"
            if _uses_best(entry)
            else "the weights after the last epoch",
        )
    )
    read = "once, at the end of each seed" if _tested(entry) else "not at all"
    facts.append(("Test split read", read))
    if results:
        facts.append(("Results as JSON", results))
    return facts


def _devices(ends: list[Any]) -> list[str]:
    return sorted({formats.short(end.device, 60) for end in ends})


def _curves(entry: Entry) -> Section:
    assert entry.result is not None
    trial_id = entry.trainings[0].trial_id if entry.trainings else None
    data = training.training_data(entry.trainings, trial_id)
    seeds = data["job_id"].nunique()
    exhibit = Exhibit(
        key="curves",
        title="",
        reading=_curve_reading(entry),
        svgs=drawn(*training.training_figures(data, alone=True)) if len(data) else (),
        legend=(
            Key("training", "blue"),
            Key("validation", "vermillion"),
            *((Key("line styles: seeds", "muted", "dashed"),) if seeds > 1 else ()),
        )
        if len(data)
        else (),
        data=(Data("Every epoch", table(data, CURVE_COLUMNS)),) if len(data) else (),
        note="The training loss is as optimised, with augmentation and label smoothing where the "
        "recipe has them; the validation loss is plain cross-entropy.",
    )
    return Section("curves", "Curves", "", (exhibit,))


def _curve_reading(entry: Entry) -> str:
    known = [each for each in entry.trainings if each.points]
    if not known:
        return "No epoch has been reported."
    last = fmean(each.points[-1].validation_accuracy for each in known)
    best = fmean(_best(each).validation_accuracy for each in known)
    epochs = sorted({_best(each).epoch for each in known})
    where = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
    return (
        f"Validation accuracy is {formats.percent(last)} after the last epoch and "
        f"{formats.percent(best)} at its best ({where}). The best of many epochs is a little too "
        "good, because it was picked by the same images."
    )


def _seeds(entry: Entry) -> Section:
    rows = pd.DataFrame([_row(entry, each) for each in entry.trainings], dtype=object)
    columns = [
        text("job_id", "training"),
        Column("seed", "seed", str),
        text("state", "state"),
        whole("judged", "judged epoch"),
        share("validation", "validation accuracy"),
        Column("validation_loss", "validation loss"),
        share("best", "best validation accuracy"),
        whole("best_epoch", "its epoch"),
        share("test", "test accuracy"),
        Column("test_loss", "test loss"),
        whole("samples_seen", "samples seen"),
        seconds("seconds", "time"),
    ]
    failures = [
        f"{each.job_id}: {formats.short(each.end.failure.strip().splitlines()[-1], 200)}"
        for each in entry.trainings
        if each.end and each.end.failure.strip()
    ]
    done = sum(each.end is not None and not each.end.failure for each in entry.trainings)
    reading = f"{done} of {formats.plural(len(entry.trainings), 'seed')} ended with a result."
    exhibit = Exhibit(
        key="seeds",
        title="",
        reading=" ".join([reading, *failures]),
        data=(Data("Every seed", table(rows, columns), shown=True),) if len(rows) else (),
        note="A seed fixes initialisation, data order and augmentation; the split into training "
        "and validation images is the same for all.",
    )
    return Section("seeds", "Seeds", "", (exhibit,))


def _row(entry: Entry, each: FullTraining) -> dict[str, object]:
    row: dict[str, object] = {
        "job_id": each.job_id,
        "seed": each.seed,
        "state": each.end.outcome.replace("_", " ") if each.end else "not finished",
    }
    if each.points:
        judged, best = _judged(entry, each), _best(each)
        row |= {
            "judged": judged.epoch,
            "validation": judged.validation_accuracy,
            "validation_loss": judged.validation_loss,
            "best": best.validation_accuracy,
            "best_epoch": best.epoch,
            "samples_seen": each.points[-1].samples_seen,
            "seconds": each.points[-1].seconds,
        }
    if each.verification:
        row |= {"test": each.verification.test_accuracy, "test_loss": each.verification.test_loss}
    return row


def _recipe_of(entry: Entry) -> Mapping[str, Any]:
    recipe = entry.spec.get("training")
    return recipe if isinstance(recipe, Mapping) else {}


def _named(entry: Entry, section: str) -> str:
    part = entry.spec.get(section)
    return formats.short(part.get("name", ""), 60) if isinstance(part, Mapping) else ""


def _settings(entry: Entry) -> Section:
    rows = []
    for section in ("dataset", "model", "training"):
        part = entry.spec.get(section)
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if value not in (None, {}, []):
                rows.append((f"{section}.{name}", yaml_text.dump({"v": value})[3:].strip()))
    frame = pd.DataFrame(rows, columns=["name", "value"])
    columns = (text("name", "setting"), text("value", "value"))
    exhibit = Exhibit(
        key="settings",
        title="",
        reading="Everything that was set, defaults of the optimizer and the model left out.",
        data=(Data("Settings", table(frame, columns), shown=True),),
    )
    return Section("settings", "Settings", "", (exhibit,))


def _document(entry: Entry, name: str, document: Document, tested: bool) -> str:
    return page(
        "document.html",
        title=f"{formats.short(entry.name, 80)}: {dict(_PAGES)[name]}",
        extra_style="pages.css",
        kicker=_kicker(entry),
        links=_links(name, tested),
        state=state_sentence(entry),
        document=document,
    )


def _links(here: str, tested: bool) -> tuple[Link, ...]:
    return tuple(
        Link(label, "" if name == here else name)
        for name, label in _PAGES
        if tested or name != TEST
    )


def _kicker(entry: Entry) -> str:
    return f"{_named(entry, 'dataset')} · {_named(entry, 'model')} · {STATUS[entry.status]}"
