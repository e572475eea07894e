"""Entries of a report matrix made up from whole studies and predictions, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from make_study import make_events

from llp.records import to_plain
from llp.reporting.predictions import Predictions
from llp.reporting.runs import Entry, full_trainings
from llp.tracking.replay import result_from_events


def make_predictions(
    num: int = 400,
    classes: int = 4,
    *,
    seed: int = 0,
    accuracy: float = 0.7,
    names: Sequence[str] | None = None,
    side: int = 8,
    channels: int = 1,
) -> Predictions:
    """Predictions of a made-up model that is right about `accuracy` of the time."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num) % classes
    logits = generator.normal(0, 1, (num, classes))
    bonus = -np.log(max(1 - accuracy, 1e-3)) * 2.2
    logits[np.arange(num), labels] += bonus
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    predicted = shares.argmax(axis=1)
    confidence = shares.max(axis=1)
    rank = (shares > shares[np.arange(num), labels][:, None]).sum(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    right = np.flatnonzero(predicted == labels)
    groups = (
        wrong[np.argsort(-confidence[wrong], kind="stable")][:24],
        right[np.argsort(confidence[right], kind="stable")][:24],
        generator.choice(num, min(24, num), replace=False),
    )
    shown = sorted({int(index) for group in groups for index in group})
    pixels = generator.integers(0, 256, (len(shown), side, side, channels)).astype(np.uint8)
    return Predictions(
        labels=labels,
        predicted=predicted,
        confidence=confidence,
        rank=rank,
        probabilities=shares.astype(np.float16).astype(float),
        class_names=tuple(names or (f"kind {label}" for label in range(classes))),
        confident_wrong=groups[0],
        unsure_right=groups[1],
        random=groups[2],
        images=dict(zip(shown, pixels, strict=True)),
    )


def make_entry(
    name: str = "made_10",
    *,
    fraction: float | None = None,
    hits: dict[str, list[np.ndarray]] | None = None,
    predictions: Predictions | None = None,
    status: str = "finished",
    **options: Any,
) -> Entry:
    """An entry from a made-up study.

    Args:
        name: Of the configuration.
        fraction: Scales the ladder: the data fraction of its highest rung.
        hits: Trial -> for each of its full trainings, which test images it got right; replaces the
            accuracies of the study, and the first trial becomes the winner.
        predictions: Of every full training, where `hits` does not say otherwise.
        status: Of the study.
        **options: For `make_study.make_events`.
    """
    events = [dict(event) for event in make_events(**options)]
    if fraction is not None:
        for event in events:
            if event["event"] == "study":
                event["rungs"] = [
                    {**rung, "data_fraction": rung["data_fraction"] * fraction}
                    for rung in event["rungs"]
                ]
    if hits is not None:
        events = _with_hits(events, hits)
    result = result_from_events(events, running=status == "running")
    trainings = []
    for training in full_trainings(events):
        said = predictions or make_predictions(seed=training.seed)
        if hits is not None and training.trial_id in hits:
            number = int(training.job_id.rsplit("v", 1)[1])
            said = predictions_of(hits[training.trial_id][number])
        known = training.verification is not None
        trainings.append(replace(training, predictions=said if known else None))
    return Entry(
        name=name,
        status=status,  # type: ignore[arg-type]
        note="",
        definition=result.spec,
        result=result,
        events=tuple(events),
        trainings=tuple(trainings),
        study_page="../studies/report.html",
    )


def predictions_of(right: np.ndarray) -> Predictions:
    """Predictions of a two-class model that is right exactly where `right` is true."""
    said = make_predictions(len(right), 2)
    predicted = np.where(right, said.labels, 1 - said.labels)
    return replace(said, predicted=predicted, rank=(predicted != said.labels).astype(int))


def _with_hits(
    events: list[dict[str, Any]], hits: dict[str, list[np.ndarray]]
) -> list[dict[str, Any]]:
    """The study with its full trainings replaced by those of `hits`."""
    kept: list[dict[str, Any]] = []
    template = next(e for e in events if e["event"] == "verification")["verification"]
    job = next(e for e in events if e["event"] == "job" and e["job"]["kind"] == "verify")["job"]
    trials = {e["trial"]["trial_id"]: e["trial"] for e in events if e["event"] == "trial"}
    for event in events:
        ours = event.get("kind") == "verify" or (
            event["event"] == "job" and event["job"]["kind"] == "verify"
        )
        if ours or event["event"] == "verification":
            continue
        if event["event"] == "finished":
            event = {**event, "winner": next(iter(hits))}
            for trial_id, runs in hits.items():
                for number, right in enumerate(runs):
                    job_id = f"{trial_id}-v{number}"
                    kept.append(
                        {
                            "event": "job",
                            "time": event["time"],
                            "job": {
                                **job,
                                "job_id": job_id,
                                "trial": trials[trial_id],
                                "seed": 1000 + number,
                            },
                        }
                    )
                    kept.append(
                        {
                            "event": "verification",
                            "time": event["time"],
                            "job_id": job_id,
                            "verification": {
                                **to_plain(template),
                                "trial_id": trial_id,
                                "seed": 1000 + number,
                                "test_accuracy": float(right.mean()),
                                "num_test_examples": len(right),
                            },
                        }
                    )
        kept.append(event)
    return kept
