"""Findings on disk: each is whole or not there, and knows what it was computed from.

`parts/NAME.npz` holds the arrays and `parts/NAME.json` the rest, with the digest of settings and
subject, and the sha256 of the arrays. The JSON file is written last and both appear in one
step, so a kill at any moment leaves a finding that is complete or none. A finding of another digest
is out of date: it is computed again and replaced.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llp.analyses.subject import Array, Finding
from llp.records import to_plain
from llp.training.checkpoint import write_durably

VERSION = 1
"""Of the findings; a higher one makes those of before out of date."""
_VECTORS = "vectors:"


@dataclass(frozen=True)
class Stored:
    """A finding as it was stored.

    Attributes:
        name: Of the part.
        analysis: Its analysis.
        digest: What it was computed from.
        finding: The finding.
        settings: Settings of the part.
        seconds: Time that the part took.
        device: Where it was computed.
    """

    name: str
    analysis: str
    digest: str
    finding: Finding
    settings: Mapping[str, Any]
    seconds: float
    device: str


class PartStore:
    """The findings in a results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parts"

    def load(self, name: str, digest: str) -> Stored | None:
        """The finding of the part `name`; None when there is none of this digest, or none whole."""
        try:
            head = json.loads(self.path(name, "json").read_bytes())
            if head["version"] != VERSION or head["digest"] != digest:
                return None
            content = self.path(name, "npz").read_bytes()
            if hashlib.sha256(content).hexdigest() != head["arrays_sha256"]:
                return None
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None  # missing or damaged: computed again
        return Stored(
            name=name,
            analysis=head["analysis"],
            digest=digest,
            finding=Finding(
                numbers=_numbers(head["numbers"], head["missing"]),
                arrays={k: v for k, v in arrays.items() if not k.startswith(_VECTORS)},
                rows=[_numbers(row, lost) for row, lost in head["rows"]],
                vectors={
                    key.removeprefix(_VECTORS): value
                    for key, value in arrays.items()
                    if key.startswith(_VECTORS)
                },
            ),
            settings=head["settings"],
            seconds=head["seconds"],
            device=head["device"],
        )

    def save(self, stored: Stored) -> None:
        """Keeps a finding durably.

        Raises:
            EnvironmentProblem: The disk is full or cannot be written to.
        """
        finding = stored.finding
        named: dict[str, Array] = {
            **finding.arrays,
            **{f"{_VECTORS}{key}": value for key, value in finding.vectors.items()},
        }
        content = as_npz(named)
        head = {
            "version": VERSION,
            "analysis": stored.analysis,
            "digest": stored.digest,
            "settings": stored.settings,
            "seconds": stored.seconds,
            "device": stored.device,
            "numbers": finding.numbers,
            "missing": _missing(finding.numbers),
            "rows": [[row, _missing(row)] for row in finding.rows],
            "arrays_sha256": hashlib.sha256(content).hexdigest(),
        }
        write_durably(self.path(stored.name, "npz"), content)
        text = json.dumps(to_plain(head), allow_nan=False, indent=1)
        write_durably(self.path(stored.name, "json"), text.encode())

    def scratch(self, name: str) -> Path:
        """Where a part may keep what it has finished of itself."""
        return self.path(name, "chunks")

    def path(self, name: str, suffix: str) -> Path:
        """The file of a part: `surface/random` is `surface-random`."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._]+', '-', name)}.{suffix}"

    def clear(self, name: str) -> None:
        """Removes what a part kept on its way."""
        shutil.rmtree(self.scratch(name), ignore_errors=True)


def digest_of(subject: str, settings: Mapping[str, Any], needed: Mapping[str, str]) -> str:
    """What a finding was computed from: subject, settings, and the digests of what it needed."""
    plain = to_plain({"subject": subject, "settings": settings, "needed": needed})
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def as_npz(arrays: Mapping[str, Array]) -> bytes:
    """The bytes of an `.npz` file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(arrays))
    return buffer.getvalue()


def _missing(numbers: Mapping[str, Any]) -> dict[str, str]:
    """JSON has no NaN and no infinity: which keys hold one."""
    return {
        key: str(value)
        for key, value in numbers.items()
        if isinstance(value, float) and not math.isfinite(value)
    }


def _numbers(numbers: Mapping[str, Any], missing: Mapping[str, str]) -> dict[str, Any]:
    return {**numbers, **{key: float(text) for key, text in missing.items()}}
