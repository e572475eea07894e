"""Images in folders: `train/<class>/*.png` and `test/<class>/*.png`.

Decoded into memory where that takes at most `EAGER_BYTES`, else left in their files.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from llp.errors import DataError, SpecError
from llp.workloads.images import DECODE_ERRORS, FileImages, Indices, Pixels, RawImages

EAGER_BYTES = 2 * 2**30
"""Largest decoded size, train and test together, that is kept in memory."""

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})

_GREY = {"1", "L", "I", "I;16", "F"}


def image_folder(
    *, root: str | Path | None = None, download: bool = False, image_size: int = 64
) -> RawImages:
    """The images under `root/train` and `root/test`, one sub-folder per class.

    Classes are the sub-folders of `train` in the order of their names. Images are resized so that
    the shorter side has `image_size` pixels, and the centre square is used. They are grey if all
    files are, else RGB.

    Args:
        root: The folder.
        download: Not used: there is nowhere to download from.
        image_size: Side in pixels, at least 8.

    Raises:
        DataError: A folder is missing or empty, or a file is no image; the message names it.
        SpecError: `root` is not given, or `image_size` is below 8.
    """
    if root is None:
        raise SpecError("image_folder needs dataset.root: the folder with train/ and test/")
    if image_size < 8:
        raise SpecError(f"image_folder: image_size must be at least 8, not {image_size}")
    base = Path(root).expanduser().resolve()
    train_paths, train_labels, names = _listing(base, "train", None)
    test_paths, test_labels, _ = _listing(base, "test", names)
    channels = 1 if _all_grey(base, [*train_paths, *test_paths]) else 3
    splits = [
        FileImages(str(base), paths, image_size, channels) for paths in (train_paths, test_paths)
    ]
    images: list[FileImages | Pixels] = list(splits)
    if sum(split.nbytes for split in splits) <= EAGER_BYTES:
        images = [split.decode(np.arange(len(split))) for split in splits]
    kept = "in memory" if isinstance(images[0], np.ndarray) else "decoded as needed"
    return RawImages(
        images[0], train_labels, images[1], test_labels, names, f"image files in {base}, {kept}"
    )


def _listing(
    base: Path, split: str, names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Indices, tuple[str, ...]]:
    """Paths relative to `base`, labels and class names of one split."""
    place = base / split
    if not place.is_dir():
        raise DataError(
            f"image_folder: no folder {place}; expected {base}/train/<class>/<image> and "
            f"{base}/test/<class>/<image>"
        )
    found = tuple(sorted(folder.name for folder in place.iterdir() if folder.is_dir()))
    if names is None and len(found) < 2:
        raise DataError(f"image_folder: {place} needs a sub-folder per class, at least two")
    names = found if names is None else names
    for extra in sorted(set(found) - set(names)):
        raise DataError(f"image_folder: class '{extra}' is in {place} but not in {base}/train")
    paths, labels = [], []
    for label, name in enumerate(names):
        files = sorted(
            str(path.relative_to(base))
            for path in (place / name).rglob("*")
            if path.suffix.lower() in EXTENSIONS and path.is_file()
        )
        if not files and split == "train":
            raise DataError(f"image_folder: no images in {place / name}")
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DataError(f"image_folder: no images in {place}")
    return tuple(paths), np.array(labels, dtype=np.int64), names


def _all_grey(base: Path, paths: list[str]) -> bool:
    """Whether every file is a grey image; reads the headers only."""

    def grey(path: str) -> bool:
        try:
            with Image.open(base / path) as image:
                return image.mode in _GREY
        except DECODE_ERRORS as error:
            raise DataError(f"{base / path}: cannot read this image: {error}") from error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return all(list(pool.map(grey, paths)))
