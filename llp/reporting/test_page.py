"""The test report of one configuration: what its winner does on the test images.

Accuracies are of all full trainings of the winner. What needs single images (classes, confusion,
calibration, gallery) is of the first of them, which is fixed before any result is known.
"""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pandas as pd

from llp.reporting import formats, gallery
from llp.reporting.documents import Document, state_sentence, status_document
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, share, whole
from llp.reporting.figures import calibration, confusion
from llp.reporting.html import part
from llp.reporting.predictions import Predictions
from llp.reporting.runs import Entry, FullTraining
from llp.reporting.study import wilson_interval
from llp.reporting.tables import Column, table, text
from llp.reporting.uncertainty import seed_interval

TOP = 5


def test_document(entry: Entry, whose: str) -> Document:
    """The test report, whatever state the study is in.

    Args:
        entry: The study.
        whose: What was trained, for the headline; empty: the winner of the search.
    """
    runs = entry.of_winner()
    if entry.result is None or not runs:
        found = status_document(entry, "test")
        if entry.result is None:
            return found
        return Document(
            headline=found.headline if entry.status != "finished" else "There is no test report.",
            sure=state_sentence(entry) or "No full training of a winner has read the test images.",
        )
    accuracies = [t.verification.test_accuracy for t in runs if t.verification]
    images = max(t.verification.num_test_examples for t in runs if t.verification)
    mean = fmean(accuracies)
    shown = next((t for t in runs if t.predictions is not None), None)
    sections: tuple[Section, ...] = (_accuracy(runs),)
    if shown is None:
        reason = "; ".join(dict.fromkeys(t.problem for t in runs))
        why = Exhibit("none", "", f"There is nothing to say about single images: {reason}.")
        sections += (Section("images", "Classes, confusion, calibration", "", (why,)),)
    else:
        assert shown.predictions is not None
        sections += _of_images(shown.predictions, shown)
    seeds = formats.plural(len(accuracies), "full training")
    return Document(
        figure=formats.percent(mean),
        headline=f"test accuracy of {whose or _winner(entry)} (mean of {seeds}, "
        f"{formats.count(images)} test images).",
        sure=sureness(accuracies, images),
        facts=tuple(_facts(entry, runs)),
        sections=sections,
    )


def _winner(entry: Entry) -> str:
    assert entry.result is not None
    return f"{formats.clean(entry.result.winner)}, the winner of {formats.clean(entry.name)}"


def sureness(accuracies: list[float], images: int) -> str:
    """What the number of test images and the number of seeds leave open, in one sentence."""
    low, high = wilson_interval(fmean(accuracies), images)
    text = (
        f"The finite number of test images alone leaves {formats.percent(low)} to "
        f"{formats.percent(high)} open (95 % interval, Wilson)"
    )
    low, high = seed_interval(accuracies)
    if math.isnan(low):
        return f"{text}; with a single training nothing is known about the spread between seeds."
    return (
        f"{text}; the {len(accuracies)} seeds alone leave {formats.percent(low)} to "
        f"{formats.percent(min(high, 1.0))} (95 % interval of the mean, Student)."
    )


def _facts(entry: Entry, runs: tuple[FullTraining, ...]) -> list[tuple[str, str]]:
    dataset = entry.spec.get("dataset")
    name = dataset.get("name", "") if isinstance(dataset, dict) else ""
    first = runs[0].verification
    assert first is not None
    return [
        ("Dataset", formats.short(name, 80)),
        ("Test images", formats.count(first.num_test_examples)),
        ("Read", "once, after the last epoch of each full training; nothing was chosen by them"),
        ("Seeds", ", ".join(str(t.seed) for t in runs)),
    ]


def _accuracy(runs: tuple[FullTraining, ...]) -> Section:
    rows = []
    for training in runs:
        done, said = training.verification, training.predictions
        assert done is not None
        low, high = wilson_interval(done.test_accuracy, done.num_test_examples)
        row: dict[str, object] = {
            "job_id": training.job_id,
            "seed": training.seed,
            "accuracy": done.test_accuracy,
            "low": low,
            "high": high,
            "loss": done.test_loss,
            "validation": done.validation_accuracy,
        }
        if said is not None:
            row |= {
                "top": float((said.rank < TOP).mean()) if said.num_classes > 10 else None,
                "f1": float(confusion.class_data(said)["f1"].mean()),
                "brier": brier(said),
                "ece": calibration.calibration_error(
                    said.confidence,
                    said.hits.astype(float),
                    calibration.bins_of(said.confidence, calibration.NUM_BINS),
                    calibration.NUM_BINS,
                ),
            }
        rows.append(row)
    frame = pd.DataFrame(rows)
    columns = [
        text("job_id", "training"),
        Column("seed", "seed", str),
        share("accuracy", "accuracy"),
        share("low", "from"),
        share("high", "to (95 %)"),
        share("top", f"top {TOP}"),
        share("f1", "F1, mean of classes"),
        Column("loss", "cross-entropy"),
        Column("brier", "Brier score"),
        share("ece", "calibration error"),
        share("validation", "validation accuracy"),
    ]
    if "top" in frame and frame["top"].isna().all():
        frame = frame.drop(columns="top")
    reading = "Every training ended with " + formats.listed(
        [formats.percent(row["accuracy"], 2) for row in rows]
    )
    if len(rows) == 1:
        reading = f"One training, with {formats.percent(rows[0]['accuracy'], 2)}"
    if "top" in frame:
        tops = [float(value) for value in frame["top"].dropna()]
        reading += (
            f"; the true class is among the {TOP} most probable for "
            f"{formats.percent(fmean(tops))} of the images"
        )
    exhibit = Exhibit(
        key="accuracy",
        title="",
        reading=reading + ".",
        data=(Data("Every full training of the winner", table(frame, columns), shown=True),),
        note="Intervals are Wilson's for the test images of one training. The Brier score is the "
        "squared error of the probabilities, summed over classes: 0 is perfect.",
    )
    return Section("accuracy", "Accuracy", "", (exhibit,))


def brier(said: Predictions) -> float:
    """Mean over images of the squared error of the probabilities, summed over classes."""
    wanted = np.zeros_like(said.probabilities)
    wanted[np.arange(len(said.labels)), said.labels] = 1
    return float(((said.probabilities - wanted) ** 2).sum(axis=1).mean())


def _of_images(said: Predictions, shown: FullTraining) -> tuple[Section, ...]:
    which = (
        f"Of the training {formats.clean(shown.job_id)} (seed {shown.seed}), the first with "
        "predictions; it was not picked by its result."
    )
    return (
        Section("classes", "Classes", which, (_classes(said),)),
        Section("confusion", "Confusion", "", _confusion(said)),
        Section(
            "calibration",
            "Calibration",
            "Confidence is the probability of the class that was chosen.",
            _calibration(said),
        ),
        Section("gallery", "Images", "", tuple(_gallery(said))),
    )


def _classes(said: Predictions) -> Exhibit:
    data = confusion.class_data(said)
    columns = (
        text("name", "class"),
        whole("images", "images"),
        whole("predicted", "predicted"),
        whole("hits", "right"),
        share("precision", "precision"),
        share("recall", "recall"),
        share("low", "recall from"),
        share("high", "to (95 %)"),
        share("f1", "F1"),
        text("mistaken_for", "most often taken for"),
    )
    return Exhibit(
        key="classes",
        title="",
        reading=confusion.class_reading(data),
        data=(Data("Every class", table(data, columns, limit=1000), shown=True, sortable=True),),
        note="Precision: of the images called so, how many are. Recall: of the images that are, "
        "how many were found. F1: 2 right / (images + predicted). Click a heading to sort.",
    )


def _confusion(said: Predictions) -> tuple[Exhibit, ...]:
    pairs = confusion.confused_pairs(said)
    reading = confusion.pairs_reading(pairs, int((~said.hits).sum()))
    columns = (
        text("true", "true class"),
        text("predicted", "taken for"),
        whole("count", "times"),
        share("share", "of the true class"),
    )
    listed = (
        (Data("Most frequent mistakes", table(pairs, columns), sortable=True),)
        if len(pairs)
        else ()
    )
    note = "Rows are true classes, columns what the model said."
    if said.num_classes <= confusion.MAX_NUMBERED:
        counts = confusion.confusion_counts(said)
        names = [said.name(label) for label in range(said.num_classes)]
        shades = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
        body = part("confusion", names, counts.tolist(), shades.round(3).tolist())
        return (
            Exhibit(
                key="confusion",
                title="",
                reading=reading,
                svgs=(body,),
                data=listed,
                note=f"{note} Numbers are test images; the shade is the share of the row (by "
                "its square root).",
                wide=True,
            ),
        )
    pictured = said.num_classes <= confusion.MAX_PICTURED
    return (
        Exhibit(
            key="confusion",
            title="",
            reading=reading,
            svgs=drawn(confusion.confusion_figure(said)) if pictured else (),
            data=tuple(Data(d.title, d.table, shown=True, sortable=True) for d in listed),
            note=f"{note} The stronger the colour, the larger the share of the row (its square "
            "root)."
            if pictured
            else "There are too many classes for a picture.",
            wide=True,
        ),
    )


def _calibration(said: Predictions) -> tuple[Exhibit, ...]:
    found = calibration.calibration(said)
    frame = found.bins[found.bins["images"] > 0]
    columns = (
        share("from", "confidence over"),
        share("to", "up to"),
        whole("images", "images"),
        share("confidence", "mean confidence"),
        share("accuracy", "right"),
        share("low", "from"),
        share("high", "to (95 %)"),
        Column("gap", "difference, points", lambda v: formats.signed(100 * v, 1)),
    )
    return (
        Exhibit(
            key="calibration",
            title="",
            reading=calibration.calibration_reading(found),
            svgs=drawn(calibration.reliability_figure(found), calibration.confidence_figure(said)),
            legend=(
                Key("bin, with 95 % interval", "blue", "o"),
                Key("as right as confident", "faint", "dashed"),
                Key("right", "blue", "bar"),
                Key("wrong", "vermillion", "bar", 1),
            ),
            data=(Data("Bins", table(frame, columns), shown=True),),
            note=f"{calibration.NUM_BINS} bins of equal width, empty ones left out. The interval "
            "of the error is a bootstrap over images; resampling adds noise, so it lies somewhat "
            "too high.",
        ),
    )


def _gallery(said: Predictions) -> list[Exhibit]:
    groups = (
        ("wrong", "Most confident and wrong", said.confident_wrong),
        ("unsure", "Right, but least confident", said.unsure_right),
        ("random", "Drawn at random", said.random),
    )
    exhibits = []
    for key, title, indices in groups:
        pictures = gallery.pictures(said, indices)
        right = sum(picture.right for picture in pictures)
        reading = {
            "wrong": "Mistakes the model was sure of: look for odd labels first.",
            "unsure": "Hits that were close to a miss.",
            "random": f"{right} of {len(pictures)} are right. The same images in every report on "
            "this test set: they were drawn before any result was known.",
        }[key]
        if not pictures:
            reading = "There is none."
        exhibits.append(
            Exhibit(
                key=f"gallery-{key}",
                title=title,
                reading=reading,
                svgs=(part("gallery", pictures),) if pictures else (),
                wide=True,
            )
        )
    return exhibits
