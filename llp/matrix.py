"""Runs what is missing of a report matrix and writes its pages: definition -> studies -> pages.

A configuration is a study of its own, named like it, under `output.root`: it can be looked at,
resumed and exported like any other. What is finished is left alone, what was interrupted goes on,
and a study that was run with another definition is never taken for this one. `write_pages` reads
the study folders and nothing else: no dataset, no Ray, no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llp.errors import LlpError, NoTrialSucceeded, Problem, SpecError, StudyError
from llp.reporting.matrix import answer_text, write_matrix
from llp.reporting.runs import Entry, Status, full_trainings, with_predictions
from llp.spec import Spec, digest
from llp.spec.matrix import Matrix, differences, load_matrix
from llp.tracking.ledger import has_study, load_study, read_events, study_header
from llp.tracking.links import read_state

OUT = Path("reports") / "out"
"""Where the folder with the pages of a matrix goes by default."""

OnEvent = Callable[[Mapping[str, Any]], None]
Watch = Callable[[str, int, int], AbstractContextManager[OnEvent]]
"""Gets a configuration, its number and how many there are; shows its events while it runs."""


@dataclass(frozen=True)
class Found:
    """The study of one configuration as it lies on disk.

    Attributes:
        name: The configuration.
        folder: Its study folder, there or not.
        status: Of the study.
        changed: What it was run with that the definition has otherwise now.
        problem: Why it cannot be read.
    """

    name: str
    folder: Path
    status: Status
    changed: tuple[str, ...] = ()
    problem: str = ""


def look(matrix: Matrix) -> dict[str, Found]:
    """The state of every configuration's study."""
    return {name: _look(name, spec) for name, spec in matrix.configurations.items()}


def _look(name: str, spec: Spec) -> Found:
    folder = Path(spec.output.root) / name
    try:
        if not has_study(folder):
            return Found(name, folder, "missing")
        header, result = study_header(folder), load_study(folder)
    except StudyError as error:
        return Found(name, folder, "damaged", problem=str(error))
    changed: tuple[str, ...] = ()
    if header.get("spec_digest") != digest(spec):
        changed = tuple(differences(_completed(header), spec.model_dump(mode="json")))
    return Found(name, folder, result.status, changed)


def _completed(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """The spec of a study, with the defaults of settings that are newer than the study."""
    plain: Mapping[str, Any] = header.get("spec", {})
    try:
        return Spec.model_validate(plain).model_dump(mode="json")
    except ValueError:  # of a version that knew settings this one does not
        return plain


def run(
    matrix: Matrix,
    watch: Watch,
    *,
    only: Sequence[str] = (),
    command: str = "",
) -> dict[str, LlpError]:
    """Runs the configurations that are not finished, one after the other.

    Everything is checked before the first starts: names, definitions of the studies that are there,
    rungs of every configuration against the data. A configuration that fails does not keep the
    others from running.

    Args:
        matrix: The matrix.
        watch: Shows the events of a study.
        only: Configurations to run; all of them when empty.
        command: What the user typed, for the ledgers.

    Returns:
        Configuration -> why it did not get a winner, for those that did not.

    Raises:
        SpecError: `only` names no configuration, or a configuration does not fit the data.
        StudyError: A study was run with another definition, or is damaged.
        DataError: The dataset cannot be read.
        EnvironmentProblem: No GPU, disk full, Ray does not start.
        KeyboardInterrupt: On Ctrl-C and SIGTERM; everything finished is in the ledgers.
    """
    found = look(matrix)
    chosen = matrix.chosen(only)
    _refuse_others(matrix, [found[name] for name in chosen])
    failed: dict[str, LlpError] = {}
    todo = []
    for name in chosen:
        if found[name].status == "running":
            failed[name] = StudyError(f"the study {name} is being run by another driver just now")
        elif found[name].status == "failed":
            reason = load_study(found[name].folder).winner_reason
            failed[name] = NoTrialSucceeded(f"the study {name} failed before: {reason}")
        elif found[name].status != "finished":
            todo.append(name)
    if todo:
        _run_all(matrix, todo, watch, command, failed)
    return failed


def _refuse_others(matrix: Matrix, found: Sequence[Found]) -> None:
    damaged = [study.problem for study in found if study.status == "damaged"]
    if damaged:
        raise StudyError("\n".join(damaged))
    changed = [study for study in found if study.changed]
    if changed:
        lines = [
            f"the study {study.name} in {study.folder} was run with another definition; there and "
            f"in {matrix.file} now: {shortened(study.changed)}"
            for study in changed
        ]
        raise StudyError(
            "\n".join(lines) + "\nsay the same --set as then, or keep both: --set "
            "output.root=FOLDER, or remove the old study; --render-only shows what was run"
        )


def shortened(changed: Sequence[str], most: int = 6) -> str:
    """The first of what differs."""
    rest = f" and {len(changed) - most} more" if len(changed) > most else ""
    return ", ".join(changed[:most]) + rest


def _run_all(
    matrix: Matrix,
    todo: Sequence[str],
    watch: Watch,
    command: str,
    failed: dict[str, LlpError],
) -> None:
    from llp import pipeline
    from llp.cluster.ray_tune import ray_session
    from llp.workloads import load as load_data

    first = matrix.configurations[todo[0]]
    images = _Images(load_data)
    problems: list[Problem] = []
    for name in todo:
        try:
            pipeline.plan(matrix.configurations[name], images(matrix.configurations[name]))
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    resources = first.resources
    with (
        ray_session(
            address=resources.address, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus
        ),
        pipeline.interruptible(),  # in this order: Ray sets a SIGTERM handler too
    ):
        for number, name in enumerate(todo, start=1):
            with watch(name, number, len(todo)) as on_event:
                try:
                    pipeline.search(
                        matrix.configurations[name],
                        study_id=name,
                        resume=True,
                        data=images(matrix.configurations[name]),
                        on_event=on_event,
                        command=command,
                    )
                except (NoTrialSucceeded, StudyError) as error:
                    failed[name] = error


class _Images:
    """The dataset of a configuration; the last one is kept, for those that share it."""

    def __init__(self, load: Callable[[Any, int], Any]) -> None:
        self._load = load
        self._of: tuple[Any, int] | None = None
        self._data: Any = None

    def __call__(self, spec: Spec) -> Any:
        if self._of != (spec.dataset, spec.seed):
            self._data = None  # freed before the next is loaded
            self._data, self._of = self._load(spec.dataset, spec.seed), (spec.dataset, spec.seed)
        return self._data


def entries(matrix: Matrix, out: Path) -> list[Entry]:
    """Every configuration with what its study folder holds, for the pages in `out`."""
    return [_entry(found, matrix, out) for found in look(matrix).values()]


def _entry(found: Found, matrix: Matrix, out: Path) -> Entry:
    entry = Entry(
        name=found.name,
        status=found.status,
        note="",
        definition=matrix.configurations[found.name].model_dump(mode="json"),
        changed=found.changed,
    )
    if found.status in ("missing", "damaged"):
        return replace(entry, note=found.problem)
    events = tuple(read_events(found.folder))
    page = found.folder / "report.html"
    return replace(
        entry,
        result=load_study(found.folder),
        events=events,
        trainings=tuple(with_predictions(t, found.folder) for t in full_trainings(events)),
        study_page=Path(os.path.relpath(page, out)).as_posix() if page.is_file() else "",
    )


def write_pages(matrix: Matrix, out: Path | None = None) -> tuple[list[Path], str]:
    """Writes the index, the pages of all configurations and their logs.

    Returns:
        The files, the index first, and what the index says in a few sentences.

    Raises:
        EnvironmentProblem: A file cannot be written.
    """
    folder = OUT / matrix.name if out is None else out
    found = entries(matrix, folder)
    written = write_matrix(
        found, folder, name=matrix.name, title=matrix.title, file=Path(matrix.file).name
    )
    return written, answer_text(found)


def not_in_mlflow(matrix: Matrix, chosen: Sequence[str]) -> list[Path]:
    """Study folders of finished configurations that MLflow is to show and has not all of."""
    behind = []
    for name in chosen:
        spec = matrix.configurations[name]
        folder = Path(spec.output.root) / name
        shipped = read_state(folder)
        if spec.tracking.mlflow and not (shipped and shipped.complete):
            behind.append(folder)
    return behind


__all__ = [
    "Found",
    "entries",
    "load_matrix",
    "look",
    "not_in_mlflow",
    "run",
    "shortened",
    "write_pages",
]
