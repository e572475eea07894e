"""Datasets kept as parquet files: encoded images in one column, class numbers in another.

The layout of the Hugging Face hub and its relatives: a column `image` or `img` that holds encoded
bytes or a struct of `bytes` and `path`, and a column of whole-number labels. A split is one file or
several (`train-00000-of-00002.parquet`), read in the order of their names.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from llp.errors import DataError
from llp.workloads.images import DECODE_ERRORS, Indices

IMAGE_COLUMNS = ("image", "img", "images", "png", "jpg")
LABEL_COLUMNS = ("label", "fine_label", "labels", "target", "class")

_MODES = {1: {"L", "1"}, 3: {"RGB", "RGBA", "P", "CMYK", "YCbCr"}}
_CHUNK = 512


@dataclass(frozen=True, eq=False)
class ParquetSplit:
    """The decoded contents of a split.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        class_names: From the files' metadata; empty when they have none.
        encoding: Format of the first image, for example `JPEG`: lossy images train differently.
    """

    images: NDArray[np.uint8]
    labels: Indices
    class_names: tuple[str, ...]
    encoding: str


def places(name: str, split: str) -> str:
    """Where `find` looks, in words."""
    return (
        f"{name}_{split}.parquet or {split}.parquet, in one file or in parts such as "
        f"{split}-00000-of-00002.parquet, in the folder itself or in {name}/, data/ or plain_text/"
    )


def find(root: Path, name: str, split: str) -> tuple[Path, ...]:
    """The files of a split under `root`, in order of their names; empty when there are none.

    Files named after the dataset come before files that only say `train` or `test`.

    Raises:
        DataError: A file says it is one of several and not all of them are there.
    """
    own = (root / name, root / name / "data", root / name / "plain_text")
    wanted = [(root, f"{name}[-_]{split}"), *((folder, split) for folder in own)]
    wanted += [(folder, split) for folder in (root, root / "data", root / "plain_text")]
    for folder, prefix in wanted:
        parts = re.compile(prefix + r"([-_.]?\d.*)?\.parquet")
        files = tuple(f for f in sorted(folder.glob("*.parquet")) if parts.fullmatch(f.name))
        if files:
            _check_complete(files)
            return files
    return ()


def read(
    files: Sequence[Path],
    *,
    channels: int,
    num_classes: int,
    label_columns: Sequence[str] = LABEL_COLUMNS,
) -> ParquetSplit:
    """All images and labels of `files`, decoded.

    Args:
        files: The parts of one split, in order.
        channels: 1 or 3; an image with another number is an error.
        num_classes: Labels must lie in 0..num_classes-1.
        label_columns: Names the label column may have, the preferred one first.

    Raises:
        DataError: A file is truncated or lacks a column, or a row has a null, an image that cannot
            be decoded, another shape, another number of channels or a label out of range. The
            message names the file and the row.
    """
    images, labels = [], []
    names: tuple[str, ...] = ()
    encoding, shape = "", None
    for file in files:
        table, label_column = _table(file, label_columns)
        names = names or _class_names(table.schema.metadata or {}, label_column)
        encoded = _encoded(table.column(0), file)
        if not encoded:
            continue
        labels.append(_labels(table.column(1), file, num_classes))
        if shape is None:
            first, encoding = _decode(encoded[0], file, 0, channels)
            shape = first.shape
        images.append(_decode_all(encoded, file, channels, shape))
    if not images:
        raise DataError(f"{', '.join(map(str, files))}: no rows")
    together = images[0] if len(images) == 1 else np.concatenate(images)
    return ParquetSplit(together, np.concatenate(labels), names, encoding)


def _check_complete(files: Sequence[Path]) -> None:
    parts = [re.search(r"-(\d+)-of-(\d+)\b", file.name) for file in files]
    totals = {int(part[2]) for part in parts if part}
    for total in totals:
        missing = set(range(total)) - {int(part[1]) for part in parts if part}
        if missing:
            raise DataError(
                f"{files[0]}: part {min(missing)} of {total} is missing from {files[0].parent}"
            )


def _table(file: Path, label_columns: Sequence[str]) -> tuple[pa.Table, str]:
    try:
        columns = pq.read_schema(file).names
        image = next((c for c in IMAGE_COLUMNS if c in columns), None)
        label = next((c for c in label_columns if c in columns), None)
        if image is None or label is None:
            wanted = IMAGE_COLUMNS[:2] if image is None else label_columns
            raise DataError(
                f"{file}: no column named {' or '.join(wanted)}; it has {', '.join(columns)}"
            )
        return pq.ParquetFile(file).read(columns=[image, label]).select([image, label]), label
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: truncated, or not a parquet file: {error}") from error


def _encoded(column: pa.ChunkedArray, file: Path) -> list[bytes]:
    kind = column.type
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            raise DataError(f"{file}: the image column is a struct without a field 'bytes'")
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], pa.binary())
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{file}: the image column holds {kind}, not encoded images as bytes")
    values: list[bytes | None] = column.to_pylist()
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        raise DataError(f"{file}, row {values.index(None)}: the image is null")
    return found


def _labels(column: pa.ChunkedArray, file: Path, num_classes: int) -> Indices:
    if not pa.types.is_integer(column.type):
        raise DataError(f"{file}: the label column holds {column.type}, not whole numbers")
    values = column.to_pylist()
    for row, value in enumerate(values):
        if value is None or not 0 <= value < num_classes:
            what = "null" if value is None else f"{value}, outside 0..{num_classes - 1}"
            raise DataError(f"{file}, row {row}: the label is {what}")
    return np.array(values, dtype=np.int64)


def _decode_all(
    encoded: list[bytes], file: Path, channels: int, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    out = np.empty((len(encoded), *shape), dtype=np.uint8)

    def some(start: int) -> None:
        for row in range(start, min(start + _CHUNK, len(encoded))):
            image, _ = _decode(encoded[row], file, row, channels)
            if image.shape != shape:
                raise DataError(
                    f"{file}, row {row}: the image is {image.shape[2]}x{image.shape[1]}, "
                    f"the first one {shape[2]}x{shape[1]}"
                )
            out[row] = image

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        for _ in pool.map(some, range(0, len(encoded), _CHUNK)):
            pass
    return out


def _decode(encoded: bytes, file: Path, row: int, channels: int) -> tuple[NDArray[np.uint8], str]:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode not in _MODES[channels]:
                raise DataError(
                    f"{file}, row {row}: an image of mode {image.mode} "
                    f"where {channels} channel(s) are expected"
                )
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            encoding = image.format or ""
    except DECODE_ERRORS as error:
        raise DataError(f"{file}, row {row}: cannot decode the image: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1), encoding


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...]:
    """Names from a `class_names` entry, or from the features that the Hugging Face hub writes."""
    found: Any = None
    try:
        if b"class_names" in metadata:
            found = json.loads(metadata[b"class_names"])
        elif b"huggingface" in metadata:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            found = features[label_column]["names"]
    except (ValueError, KeyError, TypeError):
        found = None  # odd metadata only costs the names
    return tuple(str(name) for name in found) if isinstance(found, list) else ()
