"""CIFAR and MNIST, from torchvision's files or from parquet files, whichever the folder holds.

torchvision's files are read by torchvision's own classes, which check CIFAR's md5 sums; parquet
files by `parquet`. Where there are both, torchvision's are used: they hold the exact pixels.
"""

from __future__ import annotations

import dataclasses
import pickle
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from llp.errors import DataError
from llp.workloads import parquet
from llp.workloads.cifar_names import CIFAR_NAMES
from llp.workloads.images import RawImages

DEFAULT_ROOT = "data"
"""Data folder where `dataset.root` is not given."""

_READ_ERRORS = (
    RuntimeError,
    OSError,
    ValueError,
    AssertionError,
    EOFError,
    KeyError,
    pickle.UnpicklingError,
    zlib.error,
)
_CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
}


def cifar10(*, root: str | Path | None = None, download: bool = False) -> RawImages:
    """CIFAR-10: 50,000 + 10,000 images of 3x32x32 in 10 classes (Krizhevsky 2009).

    Args:
        root: Data folder with torchvision's files or parquet files.
        download: Let torchvision fetch what is missing.

    Raises:
        DataError: The files are missing or damaged.
    """
    return _from_files("cifar10", root, download, channels=3, num_classes=10, image_size=32)


def cifar100(*, root: str | Path | None = None, download: bool = False) -> RawImages:
    """CIFAR-100: 50,000 + 10,000 images of 3x32x32 in 100 classes; arguments as `cifar10`."""
    return _from_files(
        "cifar100",
        root,
        download,
        channels=3,
        num_classes=100,
        image_size=32,
        label_columns=("fine_label", "fine_labels", *parquet.LABEL_COLUMNS),
    )


def mnist(*, root: str | Path | None = None, download: bool = False) -> RawImages:
    """MNIST: 60,000 + 10,000 digits of 1x28x28 in 10 classes; arguments as `cifar10`."""
    return _from_files("mnist", root, download, channels=1, num_classes=10, image_size=28)


def fashion_mnist(*, root: str | Path | None = None, download: bool = False) -> RawImages:
    """Fashion-MNIST: 60,000 + 10,000 articles of 1x28x28 in 10 classes; arguments as `cifar10`."""
    return _from_files("fashion_mnist", root, download, channels=1, num_classes=10, image_size=28)


def _read(name: str, base: Path, *, download: bool) -> RawImages:
    """The dataset by torchvision, from its files in `base / _folder(name)`."""
    cls, place = _class(name), base / _folder(name)
    try:
        train = cls(str(base), train=True, download=download)
        test = cls(str(base), train=False, download=False)
    except _READ_ERRORS as error:
        doing = "the download failed or is damaged" if download else "incomplete or damaged"
        raise DataError(
            f"{name}: {doing}: {_damage(cls, place)}: {error}. Set dataset.download: true, or "
            f"remove {place} and get the files again"
        ) from error
    return RawImages(
        train_images=_channels_first(train.data),
        train_labels=np.asarray(train.targets, dtype=np.int64),
        test_images=_channels_first(test.data),
        test_labels=np.asarray(test.targets, dtype=np.int64),
        class_names=tuple(str(label) for label in train.classes),
        source=f"torchvision's files in {place}",
    )


def standard_names(name: str) -> tuple[str, ...]:
    """The classes of `cifar10`, `cifar100`, ... in label order, for files without names."""
    return CIFAR_NAMES.get(name) or tuple(str(label) for label in _class(name).classes)


def _folder(name: str) -> str:
    """The folder, relative to the data folder, that torchvision keeps dataset `name` in."""
    cls = _class(name)
    return str(getattr(cls, "base_folder", f"{cls.__name__}/raw"))


def _class(name: str) -> Any:
    return getattr(datasets, _CLASSES[name])


def _channels_first(data: Any) -> Any:
    images = np.asarray(data)  # CIFAR: [N, H, W, C]; MNIST: [N, H, W]
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def _damage(cls: Any, place: Path) -> str:
    """The first file that is missing or fails torchvision's md5 check, in words."""
    if hasattr(cls, "train_list"):
        for filename, md5 in [*cls.train_list, *cls.test_list]:
            if not (place / filename).is_file():
                return f"{place / filename} is missing"
            if not check_integrity(str(place / filename), md5):
                return f"{place / filename} is truncated or altered (its md5 is wrong)"
        return str(place)
    for prefix in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            if not (place / f"{prefix}-{kind}").is_file():
                return f"{place / f'{prefix}-{kind}'} is missing"
    return str(place)


def _from_files(
    name: str,
    root: str | Path | None,
    download: bool,
    *,
    channels: int,
    num_classes: int,
    image_size: int,
    label_columns: tuple[str, ...] = parquet.LABEL_COLUMNS,
) -> RawImages:
    base = Path(DEFAULT_ROOT if root is None else root).expanduser().resolve()
    if base.name == Path(_folder(name)).parts[0]:  # root names torchvision's own folder
        base = base.parent
    files = {split: parquet.find(base, name, split) for split in ("train", "test")}
    if (base / _folder(name)).is_dir() or (download and not any(files.values())):
        raw = _read(name, base, download=download)
    elif not all(files.values()):
        raise DataError(_missing(name, base, files))
    else:
        train, test = (
            parquet.read(
                files[split],
                channels=channels,
                num_classes=num_classes,
                label_columns=label_columns,
            )
            for split in ("train", "test")
        )
        named = ", ".join(file.name for split in ("train", "test") for file in files[split])
        raw = RawImages(
            train.images,
            train.labels,
            test.images,
            test.labels,
            train.class_names,
            f"parquet files in {base} ({train.encoding} images): {named}",
        )
    _check_official(name, raw, (channels, image_size, image_size), num_classes)
    has_names = len(raw.class_names) == num_classes
    return raw if has_names else dataclasses.replace(raw, class_names=standard_names(name))


def _missing(name: str, base: Path, files: Mapping[str, tuple[Path, ...]]) -> str:
    present = [str(file) for found in files.values() for file in found]
    if present:
        split = next(split for split, found in files.items() if not found)
        return (
            f"{name}: found {', '.join(present)} but no {split} split under {base}; looked "
            f"for {parquet.places(name, split)}"
        )
    gone = "" if base.is_dir() else " (there is no such folder)"
    return (
        f"{name}: no data in {base}{gone}. Looked for torchvision's {_folder(name)}/ and "
        f"for parquet files ({parquet.places(name, 'train')}; the same for test). "
        "Do one of these: set dataset.download: true; or put torchvision's files in "
        f"{base / _folder(name)}; or point dataset.root to a folder with parquet files, "
        "columns image (or img) and label"
    )


def _check_official(
    name: str, raw: RawImages, shape: tuple[int, int, int], num_classes: int
) -> None:
    """The files are the dataset they are taken for, as far as shapes and classes tell."""
    for split, images, labels in (
        ("train", raw.train_images, raw.train_labels),
        ("test", raw.test_images, raw.test_labels),
    ):
        if tuple(images.shape[1:]) != shape:
            raise DataError(
                f"{name}: {split} images are {_times(images.shape[1:])}, expected "
                f"{_times(shape)}; from {raw.source}"
            )
        present = len(np.unique(labels))
        if split == "train" and present != num_classes:
            raise DataError(
                f"{name}: the training set holds {present} of {num_classes} classes; "
                f"from {raw.source}"
            )


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)
