"""What a worker process does with a job of a study.

Apart from `pipeline`, so that a worker imports what trains and measures and nothing else: the rooms
that score, track and report would cost every worker several seconds and 200 MB at its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llp.flatness.profile import FlatnessObjective
from llp.protocols import Objective
from llp.records import Job
from llp.spec.schema import Spec
from llp.training.objective import TrainingObjective
from llp.workloads.images import ImageData


class StudyObjective:
    """What a worker does with any job of a study: train it, or measure it."""

    def __init__(self, spec: Spec, data: ImageData, folder: Path) -> None:
        threads = max(1, int(spec.resources.cpus_per_trial))
        folder = folder.resolve()
        self._training: Objective = TrainingObjective(spec, data, folder, threads=threads)
        self._flatness: Objective = FlatnessObjective(spec, data, folder, threads=threads)

    def __call__(self, job: Job) -> Iterator[Any]:
        """Yields reports and returns the end; see `protocols.Objective`."""
        return self._flatness(job) if job.kind == "measure" else self._training(job)
