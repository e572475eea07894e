"""The images a study works on: split three ways, never written to, ready for another process.

A *split* is a set of images with their labels. `RawImages` is what a dataset loader returns: the
official training and test sets. `ImageData` is what training gets: the official training set cut
into train and validation, beside the untouched test set. Arrays are read-only numpy, so that they
travel through a shared object store without a copy. Images that would not fit in memory stay in
their files (`FileImages`) and are decoded batch by batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from llp.errors import DataError

Indices: TypeAlias = NDArray[np.int64]
Pixels: TypeAlias = NDArray[Any]

DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is not an image, is cut short or is damaged."""

_STATISTICS_SAMPLE = 2048
_DECODE_THREADS = 8


@dataclass(frozen=True)
class FileImages:
    """Images that stay in their files and are decoded when asked for.

    Attributes:
        root: Folder the paths are relative to; must be readable by every worker.
        paths: One file per image.
        image_size: Side in pixels after resizing the shorter side and cropping the centre.
        channels: 3 (RGB) or 1 (grey).
    """

    root: str
    paths: tuple[str, ...]
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(N, C, H, W)`, as the decoded array would have."""
        return (len(self.paths), self.channels, self.image_size, self.image_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded array."""
        return math.prod(self.shape)

    def take(self, indices: Indices) -> FileImages:
        """The images at `indices`, still in their files."""
        return dataclasses.replace(self, paths=tuple(self.paths[int(i)] for i in indices))

    def decode(self, indices: Indices | Sequence[int]) -> NDArray[np.uint8]:
        """The images at `indices` as uint8 [B, C, H, W].

        Raises:
            DataError: A file is missing, truncated or no image; the message names it.
        """
        out = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)

        def one(slot: int) -> None:
            path = Path(self.root, self.paths[int(indices[slot])])
            try:
                out[slot] = _decode_resized(path, self.image_size, self.channels)
            except DECODE_ERRORS as error:
                raise DataError(f"{path}: cannot read this image: {error}") from error

        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            for _ in pool.map(one, range(len(indices))):
                pass
        return out


def _decode_resized(path: Path, image_size: int, channels: int) -> NDArray[np.uint8]:
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB" if channels == 3 else "L")
    square = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels: NDArray[np.uint8] = np.asarray(square).reshape(image_size, image_size, channels)
    return pixels.transpose(2, 0, 1)


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 [N, C, H, W] in 0..255, or float32 [N, C, H, W], or `FileImages`.
        labels: int64 [N] in 0..num_classes-1.
    """

    images: Pixels | FileImages
    labels: Indices

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Indices) -> Split:
        """The examples at `indices`, in that order."""
        images = self.images
        taken = images.take(indices) if isinstance(images, FileImages) else images[indices]
        return Split(frozen(taken), frozen(self.labels[indices]))

    def pixels(self, indices: Indices | Sequence[int]) -> Pixels:
        """The decoded images at `indices`, [B, C, H, W]."""
        if isinstance(self.images, FileImages):
            return self.images.decode(indices)
        taken: Pixels = self.images[np.asarray(indices)]
        return taken


@dataclass(frozen=True, eq=False)
class RawImages:
    """What a dataset loader returns: the official training and test sets.

    Attributes:
        train_images: As `Split.images`.
        train_labels: int [N].
        test_images: As `Split.images`; never used before the verification.
        test_labels: int [M].
        class_names: One per class, in label order; empty for names made from the numbers.
        source: How the images were obtained, in words.
    """

    train_images: Pixels | FileImages
    train_labels: Indices
    test_images: Pixels | FileImages
    test_labels: Indices
    class_names: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A dataset ready for training, in three disjoint splits.

    Attributes:
        name: The dataset as the experiment file names it.
        train: What the nested subsets are taken from.
        validation: Carved out of the official training set; chooses configurations.
        test: The official test set, or None in workers that must not see it.
        class_names: One per class, in label order.
        mean: Per channel, of the training split (of pixels / 255 for uint8 images).
        std: Per channel, likewise.
        source: How the images were obtained.
        digest: sha256 over the labels and images of all three splits.
    """

    name: str
    train: Split
    validation: Split
    test: Split | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    digest: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return int(self.train.images.shape[1])

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return int(self.train.images.shape[2])

    def without_test(self) -> ImageData:
        """The same data for a worker that must not read the test split."""
        return dataclasses.replace(self, test=None)


def frozen(images: Any) -> Any:
    """`images`, made read-only where it is an array: a split is never written to."""
    if isinstance(images, np.ndarray):
        images = np.ascontiguousarray(images).view()
        images.setflags(write=False)
    return images


def channel_statistics(
    images: Pixels | FileImages,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, over all images and pixels.

    uint8 pixels are divided by 255 and counted exactly, through a histogram; float images are taken
    as they are. Images in files: a sample of 2,048, evenly spaced. A constant channel gets a
    standard deviation of 1.
    """
    if isinstance(images, FileImages):
        count = min(len(images), _STATISTICS_SAMPLE)
        images = images.decode(np.linspace(0, len(images) - 1, count).astype(np.int64))
    means, deviations = [], []
    for channel in range(images.shape[1]):
        plane = images[:, channel]
        if plane.dtype == np.uint8:
            counts = np.zeros(256, dtype=np.int64)
            for start in range(0, len(plane), 4096):  # bincount casts to int64: 8x the memory
                counts += np.bincount(plane[start : start + 4096].ravel(), minlength=256)
            levels = np.arange(256) / 255
            mean = float(levels @ counts / counts.sum())
            variance = float((levels - mean) ** 2 @ counts / counts.sum())
        else:
            mean = float(plane.mean(dtype=np.float64))
            variance = float(plane.var(dtype=np.float64))
        means.append(mean)
        deviations.append(math.sqrt(variance) if variance > 1e-12 else 1.0)
    return tuple(means), tuple(deviations)


def digest(splits: Sequence[Split]) -> str:
    """sha256 over labels and images; for images in files, over their paths and sizes."""
    sha = hashlib.sha256()
    for split in splits:
        sha.update(_bytes(split.labels))
        if isinstance(split.images, FileImages):
            for path in split.images.paths:
                size = Path(split.images.root, path).stat().st_size
                sha.update(f"{path}\0{size}\n".encode())
        else:
            sha.update(f"{split.images.dtype} {split.images.shape}".encode())
            sha.update(_bytes(split.images))
    return sha.hexdigest()


def _bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of `array` without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
