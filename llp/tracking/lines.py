"""The lines of a ledger: how an event is written, read, found damaged, or found cut short.

A whole line ends with a newline, is one JSON object, and carries its own number. A last line
without its newline is being written at the moment or was cut short by a kill; it was never
acknowledged. Anything else that is not as expected is damage, and nothing is guessed around it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llp.errors import EnvironmentProblem, StudyError

LEDGER_VERSION = 1
"""Version of the event list; a ledger of a higher version is refused."""

_logger = logging.getLogger(__name__)


def encode(line: Mapping[str, Any]) -> bytes:
    """One event as a line of strict JSON.

    Raises:
        ValueError: A number is not finite.
    """
    # ASCII only: lone surrogates and line separators in a user's names cannot break a line.
    return json.dumps(line, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The events in the ledger at `path`, without a last line that has no newline.

    Raises:
        StudyError: As `decode`.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            if not raw.endswith(b"\n"):
                return
            yield decode(raw, path, number)


def decode(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    """The event on line `number` (from 0) of the ledger at `path`.

    Raises:
        StudyError: The line is damaged (the message gives file:line and what to do), or the first
            line tells of a newer ledger version.
    """
    try:
        event = json.loads(raw)
    except ValueError as error:
        raise _damaged(path, number, f"not a JSON line ({error})") from error
    if not isinstance(event, dict) or not {"seq", "time", "event"} <= event.keys():
        raise _damaged(path, number, "not an event")
    if event["seq"] != number:
        raise _damaged(path, number, f"event number {event['seq']} where {number} is expected")
    if number == 0:
        version = event.get("ledger_version")
        if event["event"] != "study" or not isinstance(version, int):
            raise _damaged(path, number, "the first line is not the `study` event")
        if version > LEDGER_VERSION:
            raise StudyError(
                f"{path} was written by a newer llp {event.get('llp_version', '')} "
                f"(ledger version {version}; this one reads up to {LEDGER_VERSION}): upgrade llp"
            )
    return event


def _damaged(path: Path, number: int, reason: str) -> StudyError:
    line = number + 1
    return StudyError(
        f"{path}:{line}: damaged line: {reason}; restore the file from a copy, or keep what is "
        f"good (`head -n {number} ledger.jsonl`) and resume: the rest will be run again"
    )


def drop_torn_line(descriptor: int, path: Path) -> None:
    """Cuts off what follows the last newline, with a warning.

    Raises:
        EnvironmentProblem: The file cannot be shortened.
    """
    size = os.fstat(descriptor).st_size
    end, block = size, 1 << 16
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end == size:
        return
    _logger.warning(
        "%s: dropped an unfinished last line of %d bytes, cut short when the driver was killed",
        path,
        size - end,
    )
    try:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
    except OSError as error:
        raise EnvironmentProblem(f"cannot repair {path}: {error.strerror}") from error
