"""Checkpoints: durable when named, verified when read, and never code.

`save` makes the file durable before it returns its `CheckpointRef`: bytes to a temporary file in
the same folder, fsync, rename, fsync of the folder. A reader sees the whole file or none. `load`
checks the sha256 of the bytes (torch reads a file with a flipped byte without complaint) and
unpickles with `weights_only=True` only, so that a checkpoint from elsewhere cannot run code.

A *sealed* file carries the sha256 of its own content in its last bytes. It is for files that nobody
keeps a reference to, such as the periodic snapshots of a running job.

States hold tensors, numbers, strings, lists and dicts; no numpy values and no paths, which
`weights_only` refuses to read back.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llp.errors import CheckpointError, EnvironmentProblem
from llp.records import CheckpointRef

_SEAL = b"\nllp-sha256:"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def save(path: str | Path, state: Mapping[str, Any], *, root: str | Path) -> CheckpointRef:
    """Writes `state` to `root/path` and returns where it is, once it would survive a power cut.

    Args:
        path: Relative to `root`; folders are made.
        state: See the head of this file.
        root: The study folder.

    Returns:
        `CheckpointRef(path, sha256)` with `path` relative to `root`, in POSIX form.

    Raises:
        EnvironmentProblem: The disk is full or cannot be written to; no partial file is left.
    """
    content = _serialise(state)
    write_durably(Path(root) / path, content)
    return CheckpointRef(Path(path).as_posix(), hashlib.sha256(content).hexdigest())


def load(path: str | Path, sha256: str | None = None) -> dict[str, Any]:
    """The state saved at `path`, on the CPU.

    Args:
        path: The file.
        sha256: Digest the file's bytes must have; None skips that check (files from elsewhere).

    Raises:
        CheckpointError: Missing, truncated, altered, or holding more than plain data.
    """
    return _deserialise(Path(path), _read(Path(path)), sha256)


def load_ref(reference: CheckpointRef, *, root: str | Path) -> dict[str, Any]:
    """The state behind `reference` in the study folder `root`, its sha256 verified.

    Raises:
        CheckpointError: As `load`, or the path leaves `root`.
    """
    path = (Path(root) / reference.path).resolve()
    if not path.is_relative_to(Path(root).resolve()):
        raise CheckpointError(f"checkpoint {reference.path} lies outside the study folder {root}")
    return load(path, reference.sha256)


def save_sealed(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes `state` durably to `path` together with its own sha256.

    Raises:
        EnvironmentProblem: As `save`.
    """
    content = _serialise(state)
    write_durably(Path(path), content + _SEAL + hashlib.sha256(content).hexdigest().encode())


def load_sealed(path: str | Path) -> dict[str, Any]:
    """The state written by `save_sealed`, its seal verified.

    Raises:
        CheckpointError: Missing, truncated, altered, unsealed, or holding more than plain data.
    """
    content, seal, digest = _read(Path(path)).rpartition(_SEAL)
    if not seal:
        raise CheckpointError(f"checkpoint {path} is truncated: it has no seal")
    return _deserialise(Path(path), content, digest.decode("ascii", "replace"))


def write_durably(path: Path, content: bytes) -> None:
    """Replaces the file at `path` by `content` so that a crash leaves the old or the new one.

    Raises:
        EnvironmentProblem: The disk is full or cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in _FULL:
            raise EnvironmentProblem(
                f"the disk is full: {len(content):,} bytes for {path} do not fit; "
                "free some space and run `llp resume`, nothing finished is lost"
            ) from error
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror or error}") from error


def to_cpu(value: Any) -> Any:
    """A copy of the nested `value` with every tensor in it detached and on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value


def _serialise(state: Mapping[str, Any]) -> bytes:
    # To memory first: torch's own file writer turns a full disk into a RuntimeError, and the digest
    # must be of the bytes that were meant, not of those that arrived.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _deserialise(path: Path, content: bytes, sha256: str | None) -> dict[str, Any]:
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise CheckpointError(
            f"checkpoint {path} is damaged or was replaced: its sha256 starts with {found[:12]}, "
            f"expected {sha256[:12]} ({len(content):,} bytes)"
        )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read as plain tensors and numbers "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(state).__name__}, not a dict")
    return state
