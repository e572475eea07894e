"""One configuration of a report matrix as its pages know it: a study, finished or not, or none.

Made from the events of a ledger and from files in the study folder, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llp.errors import StudyError
from llp.records import (
    CurvePoint,
    JobEnd,
    Observation,
    SearchResult,
    Verification,
    from_plain,
)
from llp.reporting import predictions
from llp.reporting.predictions import Predictions

Status = Literal["missing", "running", "interrupted", "finished", "failed", "damaged"]
DOCUMENTS = (("training", "training report"), ("test", "test report"), ("log", "training log"))
"""Suffix of the file and name of the three pages of a configuration."""


@dataclass(frozen=True)
class FullTraining:
    """One full training.

    Attributes:
        job_id: Its job.
        trial_id: The configuration.
        seed: Its seed.
        points: One per epoch.
        end: How it ended; None while it runs or when it was interrupted.
        verification: What came of it; None when it did not get that far.
        predictions: What it said about the test images; None where there are none.
        problem: Why there are no predictions.
        observations: What its callbacks saw, in the order of the epochs.
    """

    job_id: str
    trial_id: str
    seed: int
    points: tuple[CurvePoint, ...]
    end: JobEnd | None = None
    verification: Verification | None = None
    predictions: Predictions | None = None
    problem: str = ""
    observations: tuple[Observation, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One configuration.

    Attributes:
        name: As in the definition; also of its study.
        status: Of its study.
        note: Why there is no study or what is the matter with it; empty when all is well.
        definition: The experiment as the definition has it now, as plain data.
        result: The study; None when there is none, or none that can be read.
        events: Its ledger.
        trainings: Its full trainings, in the order in which they started.
        changed: What the study was run with that the definition has otherwise now.
        study_page: Link to the study's own page; empty when there is none.
    """

    name: str
    status: Status
    note: str
    definition: Mapping[str, Any]
    result: SearchResult | None = None
    events: Sequence[Mapping[str, Any]] = ()
    trainings: tuple[FullTraining, ...] = ()
    changed: tuple[str, ...] = ()
    study_page: str = ""

    @property
    def spec(self) -> Mapping[str, Any]:
        """What the study was run with; the definition where there is no study."""
        return self.definition if self.result is None else self.result.spec

    def of_winner(self) -> tuple[FullTraining, ...]:
        """The winner's full trainings that were verified, in order of start."""
        winner = self.result.winner if self.result else None
        return tuple(t for t in self.trainings if t.trial_id == winner and t.verification)


def file_name(entry: Entry | str, document: str) -> str:
    """The file of one of the documents of a configuration; `text` is the log as plain text."""
    name = entry if isinstance(entry, str) else entry.name
    return f"{name}_log.txt" if document == "text" else f"{name}_{document}.html"


def full_trainings(events: Iterable[Mapping[str, Any]]) -> tuple[FullTraining, ...]:
    """The full trainings in a ledger, without their predictions.

    A point that was reported again replaces the old one and all later ones of its job.
    """
    jobs: dict[str, tuple[str, int]] = {}
    points: dict[str, dict[int, CurvePoint]] = {}
    ends: dict[str, JobEnd] = {}
    results: dict[str, Verification] = {}
    seen: dict[str, dict[tuple[int, str], Observation]] = {}
    for event in events:
        kind = event["event"]
        if kind == "job" and event["job"]["kind"] == "verify":
            job = event["job"]
            jobs[job["job_id"]] = (job["trial"]["trial_id"], int(job["seed"]))
            ends.pop(job["job_id"], None)
        elif kind == "point" and event["kind"] == "verify":
            point = from_plain(CurvePoint, event["point"])
            known = points.setdefault(event["job_id"], {})
            for epoch in [epoch for epoch in known if epoch >= point.epoch]:
                del known[epoch]
            known[point.epoch] = point
        elif kind == "observation":
            found = from_plain(Observation, event["observation"])
            seen.setdefault(found.job_id, {})[found.epoch, found.callback] = found
        elif kind == "job_end" and event["kind"] == "verify":
            end = from_plain(JobEnd, event["end"])
            ends[end.job_id] = end
        elif kind == "verification":
            results[event["job_id"]] = from_plain(Verification, event["verification"])
    return tuple(
        FullTraining(
            job_id,
            trial_id,
            seed,
            tuple(points.get(job_id, {}).values()),
            ends.get(job_id),
            results.get(job_id),
            observations=tuple(found for _, found in sorted(seen.get(job_id, {}).items())),
        )
        for job_id, (trial_id, seed) in jobs.items()
    )


def with_predictions(training: FullTraining, folder: Path) -> FullTraining:
    """`training` with what it said about the test images, or why that is not there.

    Args:
        training: From `full_trainings`.
        folder: The study folder.
    """
    done = training.verification
    if done is None:
        return training
    if not done.predictions:
        return replace(training, problem="its predictions were not kept")
    try:
        said = predictions.load(folder, done.predictions, done.predictions_sha256)
    except StudyError as error:
        return replace(training, problem=str(error))
    return replace(training, predictions=said)
