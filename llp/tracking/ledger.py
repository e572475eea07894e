"""The ledger: the truth about a study, as append-only JSON lines.

`ledger.jsonl` in the study folder holds one event a line, `{"seq", "time", "event", ...}`, in the
order in which things happened. A line is durable (written and fsynced) before `append` returns; a
line that a kill cut short has no newline at its end, was never acknowledged, and is dropped.
Everything else, MLflow, the report, the exports and a resumed search, is computed from these lines
and can be computed again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llp.errors import StudyError, nearest
from llp.records import SearchResult, to_plain
from llp.tracking.files import disk_problem, fsync_folder
from llp.tracking.lines import LEDGER_VERSION, decode, drop_torn_line, encode, read_lines
from llp.tracking.lock import FileLock, holder
from llp.tracking.replay import result_from_events

LEDGER_NAME = "ledger.jsonl"
LOCK_NAME = "lock"
_RESERVED = {"seq", "time", "event"}
_logger = logging.getLogger(__name__)


class Ledger:
    """The ledger of one study, open for appending by its one driver.

    Use `Ledger.create` for a new study, `Ledger.open` to go on with one. Both take the study's
    lock, which `close` (or leaving the `with` block, or the death of the process) gives back.
    """

    def __init__(self, folder: Path, lock: FileLock, descriptor: int, num_events: int) -> None:
        self.folder = folder
        self.path = folder / LEDGER_NAME
        self._lock = lock
        self._descriptor: int | None = descriptor
        self._num_events = num_events
        self._study_id = folder.name
        self._guard = threading.Lock()

    @classmethod
    def create(cls, folder: Path | str, **header: Any) -> Ledger:
        """Starts a study: makes its folder, locks it and writes the `study` event.

        Args:
            folder: The study folder; made when missing, with its parents.
            **header: Payload of the `study` event (study_id, spec, spec_digest, environment,
                llp_version, rungs, num_train, num_classes, ...); `ledger_version` is added.

        Raises:
            StudyError: The folder already holds a study, or another driver has it.
            EnvironmentProblem: The folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_problem(error, folder) from error
        ledger = cls._start(folder)
        try:
            if ledger._num_events:
                raise StudyError(
                    f"{folder} already holds a study; go on with `llp resume {folder.name}` "
                    "or give the new one another name"
                )
            ledger.append("study", **{**header, "ledger_version": LEDGER_VERSION})
            fsync_folder(folder)
            fsync_folder(folder.parent)
        except BaseException:
            ledger.close()
            raise
        ledger._study_id = str(header.get("study_id", folder.name))
        return ledger

    @classmethod
    def open(cls, folder: Path | str, *, wait_seconds: float = 0.25) -> Ledger:
        """Goes on with a study, dropping a last line that a kill cut short.

        Args:
            folder: The study folder.
            wait_seconds: How long another driver may take to be gone.

        Raises:
            StudyError: No study there, another driver has it, it is damaged, or it was written by
                a newer `llp`.
            EnvironmentProblem: The folder cannot be written.
        """
        folder = Path(folder)
        header = study_header(folder)
        ledger = cls._start(folder, wait_seconds=wait_seconds)
        ledger._study_id = str(header.get("study_id", folder.name))
        return ledger

    @classmethod
    def _start(cls, folder: Path, *, wait_seconds: float = 0.25) -> Ledger:
        path = folder / LEDGER_NAME
        lock = FileLock.acquire(
            folder / LOCK_NAME,
            busy=f"the study {folder.name} is already being run by",
            wait_seconds=wait_seconds,
        )
        try:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise disk_problem(error, path) from error
            try:
                drop_torn_line(descriptor, path)
                num_events = sum(1 for _ in read_lines(path))
            except BaseException:
                os.close(descriptor)
                raise
        except BaseException:
            lock.release()
            raise
        return cls(folder, lock, descriptor, num_events)

    @property
    def study_id(self) -> str:
        """Name of the study."""
        return self._study_id

    def append(self, event: str, **payload: Any) -> dict[str, Any]:
        """Writes one event durably and returns the line as `events` will give it back.

        Args:
            event: Kind of the event.
            **payload: Records, or plain data; non-finite floats are written as null.

        Raises:
            EnvironmentProblem: The disk is full or fails. The ledger is as before the call.
        """
        return self.append_many([(event, payload)])[0]

    def append_many(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Writes several events in order, with one write and one fsync for all of them."""
        with self._guard:
            if self._descriptor is None:
                raise ValueError(f"the ledger {self.path} is closed")
            lines: list[dict[str, Any]] = []
            for event, payload in events:
                if _RESERVED & payload.keys():
                    raise ValueError(f"a payload cannot hold {sorted(_RESERVED & payload.keys())}")
                lines.append(
                    {
                        "seq": self._num_events + len(lines),
                        "time": round(time.time(), 6),
                        "event": event,
                        **to_plain(payload),
                    }
                )
            data = b"".join(encode(line) for line in lines)
            self._write(self._descriptor, data)
            self._num_events += len(lines)
            return lines

    def _write(self, descriptor: int, data: bytes) -> None:
        before = os.fstat(descriptor).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError as error:
            # Shortening a file needs no space, so the half line can go even on a full disk. When
            # even that fails the next `open` drops it, because it has no newline.
            try:
                os.ftruncate(descriptor, before)
            except OSError:
                _logger.exception("%s: an unfinished line stays until the next start", self.path)
                self._close()
            raise disk_problem(error, self.path, self._study_id) from error

    def events(self) -> list[dict[str, Any]]:
        """All events so far, in order."""
        return list(read_lines(self.path))

    def close(self) -> None:
        """Closes the file and gives the lock back; a second call does nothing."""
        with self._guard:
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class StudySummary:
    """One row of the list of studies.

    Attributes:
        study_id: Name of the study folder.
        folder: Where it is.
        status: `running`, `interrupted`, `finished`, `failed` or `damaged`.
        num_trials: Configurations tried so far.
        winner: Trial id of the winner, when there is one.
        started: Unix time of the first event.
        updated: Unix time of the last event.
        problem: Why it cannot be read, when it is damaged.
    """

    study_id: str
    folder: Path
    status: str
    num_trials: int = 0
    winner: str | None = None
    started: float = 0.0
    updated: float = 0.0
    problem: str = ""


def read_events(folder: Path | str) -> Iterator[dict[str, Any]]:
    """The events of a study in order, one at a time; needs no lock.

    A last line without its newline is being written at the moment, or was cut short: it is left
    out.

    Raises:
        StudyError: No study there, a damaged line (the message gives file:line), or a newer
            ledger version.
    """
    path = Path(folder) / LEDGER_NAME
    if not path.is_file():
        raise StudyError(f"no study in {folder}: there is no {LEDGER_NAME}")
    return read_lines(path)


class LedgerTail:
    """The events that were added to a growing ledger since the last look.

    Every iteration goes on where the one before ended, at no cost for what came earlier.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / LEDGER_NAME
        self._num_events = 0
        self._offset = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while (raw := file.readline()).endswith(b"\n"):
                event = decode(raw, self.path, self._num_events)
                self._num_events += 1
                self._offset += len(raw)
                yield event


def study_header(folder: Path | str) -> dict[str, Any]:
    """The `study` event: spec, digest, environment, rungs.

    Raises:
        StudyError: As `read_events`; also when the study was killed before its first line.
    """
    for event in read_events(folder):
        return event
    raise StudyError(
        f"the study in {folder} was killed before its first line was written; "
        "there is nothing to resume, start it again with `llp search`"
    )


def has_study(folder: Path | str) -> bool:
    """Whether `folder` holds a study; one that was killed before its first line is none."""
    if not (Path(folder) / LEDGER_NAME).is_file():
        return False
    return any(True for _ in read_events(folder))


def no_batch(folder: Path) -> Path:
    """`folder`, unless it holds a batch of runs, which has a page and a table of its own.

    Raises:
        StudyError: It does.
    """
    if has_study(folder) and study_header(folder).get("kind") == "batch":
        raise StudyError(
            f"{folder} is a batch and no search; see its report.html and runs.parquet, or "
            "`llp batch FILE --render-only`"
        )
    return folder


def is_running(folder: Path | str) -> bool:
    """Whether a driver holds the study's lock at this moment."""
    return holder(Path(folder) / LOCK_NAME) is not None


def check_same_spec(folder: Path | str, digest: str) -> None:
    """Makes sure that the study in `folder` was started with the spec of this `digest`.

    Raises:
        StudyError: Another spec; the message gives both digests and what to do.
    """
    found = str(study_header(folder).get("spec_digest", ""))
    if found != digest:
        name = Path(folder).name
        raise StudyError(
            f"the study {name} was started with another spec: its digest is {found[:12]} and "
            f"yours is {digest[:12]}; go on with the old one by `llp resume {name}` (its spec is "
            f"{Path(folder) / 'spec.yaml'}), or give the new one another name or output.root"
        )


def load_study(folder: Path | str) -> SearchResult:
    """The whole study as its ledger tells it; works while it runs.

    Raises:
        StudyError: As `study_header`.
    """
    study_header(folder)
    running = is_running(folder)  # before reading: a driver that ends in between has its say
    return result_from_events(read_events(folder), running=running)


def list_studies(root: Path | str) -> list[StudySummary]:
    """All studies under the output folder `root`, oldest first; damaged ones are listed too."""
    found = []
    for path in sorted(Path(root).glob(f"*/{LEDGER_NAME}")):
        try:
            found.append(_summary(path.parent))
        except StudyError as error:
            started = path.stat().st_mtime
            found.append(
                StudySummary(
                    path.parent.name, path.parent, "damaged", started=started, problem=str(error)
                )
            )
    return sorted(found, key=lambda study: (study.started, study.study_id))


def find_study(root: Path | str, name: str) -> Path:
    """The folder of the study called `name` under `root`, or `name` itself when it is a folder.

    Raises:
        StudyError: No such study; the message names the nearest, or all there are.
    """
    for folder in (Path(root) / name, Path(name)):
        if (folder / LEDGER_NAME).is_file():
            return folder
    known = [path.parent.name for path in sorted(Path(root).glob(f"*/{LEDGER_NAME}"))]
    guess = nearest(name, known)
    if guess:
        hint = f"did you mean '{guess}'?"
    elif known:
        hint = f"there are: {', '.join(known[-5:])}"
    else:
        hint = "there are none yet; `llp search` makes one"
    raise StudyError(f"no study '{name}' in {root}; {hint}")


def _summary(folder: Path) -> StudySummary:
    started = updated = 0.0
    num_trials, winner, status = 0, None, ""
    for event in read_events(folder):
        started = started or float(event["time"])
        updated = float(event["time"])
        kind = event["event"]
        num_trials += kind == "trial"
        if kind in {"finished", "failed"}:
            winner, status = event.get("winner"), kind
        elif kind == "opened":
            status = ""
    if not started:
        raise StudyError(f"the study in {folder} was killed before its first line was written")
    status = status or ("running" if is_running(folder) else "interrupted")
    return StudySummary(folder.name, folder, status, num_trials, winner, started, updated)
