"""One driver per study: an advisory lock on the file `lock` of the study folder.

The lock is the kernel's (`flock`), so it is gone the moment its holder dies, even by `kill -9`, and
no stale file can keep a study closed. The JSON inside (host, pid, time) is only for the message
to the second driver. The file stays behind on purpose: removing it would let two drivers lock two
different files of the same name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from llp.errors import EnvironmentProblem, StudyError
from llp.tracking.files import disk_problem

_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_PAUSE_SECONDS = 0.05


class FileLock:
    """An exclusive lock that this process holds until `release` or its death."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path, *, busy: str, wait_seconds: float = 0.25) -> FileLock:
        """Takes the lock or says who has it.

        A reader that looks whether the lock is held (`holder`) has it for microseconds itself;
        therefore it is tried for a moment before giving up.

        Args:
            path: The lock file; made when missing.
            busy: Start of the message when another process holds it.
            wait_seconds: How long to try.

        Raises:
            StudyError: Held by another process; the message names its host and pid.
            EnvironmentProblem: The file cannot be written, or its file system has no locks.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise disk_problem(error, path) from error
        try:
            deadline = time.monotonic() + wait_seconds
            while not _try_lock(descriptor, fcntl.LOCK_EX, path):
                if time.monotonic() > deadline:
                    raise StudyError(f"{busy} {_describe(_read(descriptor))} ({path})")
                time.sleep(_PAUSE_SECONDS)
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            except OSError as error:
                raise disk_problem(error, path) from error
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    def release(self) -> None:
        """Gives the lock back; a second call does nothing."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def holder(path: Path) -> dict[str, Any] | None:
    """Host, pid and time of the process that holds the lock at `path`; None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        if _try_lock(descriptor, fcntl.LOCK_SH, path):
            return None
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise EnvironmentProblem(
            f"the file system of {path} has no file locks ({error.strerror}); "
            "put output.root on one that has"
        ) from error
    return True


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # its holder is between taking the lock and signing it
        return {}
    return found if isinstance(found, dict) else {}


def _describe(found: dict[str, Any]) -> str:
    if "pid" not in found:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.get("time", 0)))
    return f"process {found['pid']} on host {found.get('host', '?')} since {since}"
