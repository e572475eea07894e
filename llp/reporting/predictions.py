"""What a full training said about every test image, as the reports read it.

The file and its arrays are described where they are written (`training.predictions`). Nothing here
needs torch or the dataset.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llp.errors import StudyError

FORMAT = 1
_DAMAGE = (ValueError, KeyError, IndexError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Predictions:
    """One full training on N test images of K classes.

    Attributes:
        labels: True class, int [N].
        predicted: Class the model chose, int [N].
        confidence: Probability it gave that class, float [N].
        rank: Number of classes it preferred to the true one, int [N]; 0 is a hit.
        probabilities: Of every class, float [N, K], kept in half precision.
        class_names: K names.
        confident_wrong: Misses with the highest confidence, most confident first, int [<= 24].
        unsure_right: Hits with the lowest confidence, least confident first, int [<= 24].
        random: Images drawn by a fixed seed, int [<= 24].
        images: Test image -> pixels, uint8 [H, W, 1 or 3], for the images of the three groups.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    rank: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    class_names: tuple[str, ...]
    confident_wrong: NDArray[np.int64]
    unsure_right: NDArray[np.int64]
    random: NDArray[np.int64]
    images: dict[int, NDArray[np.uint8]]

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Which images were classified right, [N]."""
        found: NDArray[np.bool_] = self.predicted == self.labels
        return found

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def name(self, label: int) -> str:
        """The class as people read it; a bare number becomes `class 3`."""
        name = self.class_names[label]
        return f"class {name}" if name.isdecimal() else name


def load(folder: Path, path: str, sha256: str) -> Predictions:
    """The predictions at `path` in a study folder, their sha256 verified.

    Raises:
        StudyError: Missing, altered, of a newer llp, or outside the folder.
    """
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise StudyError(f"predictions {path} lie outside the study folder {folder}")
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StudyError(f"predictions {path} cannot be read: {reason}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StudyError(f"predictions {path} were altered: their sha256 is not that of the ledger")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return _decoded({name: arrays[name] for name in arrays.files})
    except _DAMAGE as error:
        raise StudyError(f"predictions {path} are not readable by this llp: {error}") from error


def _decoded(arrays: dict[str, NDArray[Any]]) -> Predictions:
    if int(arrays["format"]) > FORMAT:
        raise ValueError(f"format {int(arrays['format'])} is of a newer llp")
    whole = {
        name: arrays[name].astype(np.int64)
        for name in ("labels", "predicted", "rank", "confident_wrong", "unsure_right", "random")
    }
    return Predictions(
        **whole,
        confidence=arrays["confidence"].astype(np.float64),
        probabilities=arrays["probabilities"].astype(np.float64),
        class_names=tuple(map(str, json.loads(arrays["class_names"].tobytes()))),
        images=dict(zip(arrays["image_index"].tolist(), arrays["images"], strict=True)),
    )
