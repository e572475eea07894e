"""What a worker process does with a job of a study.

Apart from `pipeline`, so that a worker imports what trains and measures and nothing else: the rooms
that score, track and report would cost every worker several seconds and 200 MB at its start.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llp.errors import EnvironmentProblem
from llp.flatness.profile import FlatnessObjective
from llp.protocols import Objective
from llp.records import Job
from llp.spec.schema import Spec
from llp.training.objective import TrainingObjective
from llp.workloads.images import ImageData

LEDGER = "ledger.jsonl"


class StudyObjective:
    """What a worker does with any job of a study: train it, or measure it.

    Made by the driver, used by workers, which may be on other nodes. Checkpoints go from node to
    node through the study folder, so before its first job a worker makes sure that it sees the
    folder that the driver writes to, and not one of its own of the same name.
    """

    def __init__(self, spec: Spec, data: ImageData, folder: Path) -> None:
        threads = max(1, int(spec.resources.cpus_per_trial))
        folder = folder.resolve()
        self._folder, self._header, self._looked = folder, first_line(folder), False
        self._training: Objective = TrainingObjective(spec, data, folder, threads=threads)
        self._flatness: Objective = FlatnessObjective(spec, data, folder, threads=threads)

    def __call__(self, job: Job) -> Iterator[Any]:
        """Yields reports and returns the end; see `protocols.Objective`.

        Raises:
            EnvironmentProblem: This node does not see the study folder.
        """
        if not self._looked and self._header:
            require_folder(self._folder, self._header)
        self._looked = True
        return self._flatness(job) if job.kind == "measure" else self._training(job)


def require_folder(folder: Path, header: bytes) -> None:
    """Makes sure that this node sees the study folder that the driver writes to.

    Args:
        folder: The study folder.
        header: First line of the ledger that the driver wrote.

    Raises:
        EnvironmentProblem: There is no study, or another one.
    """
    found = first_line(folder)
    if found == header:
        return
    what = "another study is in" if found else "there is no study in"
    raise EnvironmentProblem(
        f"node {socket.gethostname()}: {what} {folder}; the study folder must be on "
        "storage that all nodes see, at the same path: set output.root to such a folder"
    )


def first_line(folder: Path) -> bytes:
    """What the ledger in `folder` begins with; nothing where there is none."""
    try:
        with (folder / LEDGER).open("rb") as ledger:
            return ledger.readline()
    except OSError:
        return b""
