"""Durable files: what a full or failing disk means to the user, and atomic replacement."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from llp.errors import EnvironmentProblem

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_problem(error: OSError, path: Path, study_id: str = "") -> EnvironmentProblem:
    """The error to raise when writing `path` failed with `error`.

    Args:
        error: What the operating system said.
        path: The file that was being written.
        study_id: Named in the advice when the study can be resumed.
    """
    resume = f"`llp resume {study_id}`" if study_id else "try again"
    if error.errno in _FULL:
        what = "disk full" if error.errno == errno.ENOSPC else f"disk full ({error.strerror})"
        return EnvironmentProblem(
            f"{what} while writing {path}: nothing lost, free space then {resume}"
        )
    reason = error.strerror or str(error)
    return EnvironmentProblem(
        f"cannot write {path}: {reason}; nothing recorded is lost, put it right then {resume}"
    )


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable, so that a new file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replaces `path` by `text`: after a crash there is the old file or the new one, no mixture.

    Raises:
        OSError: The disk is full or fails; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
