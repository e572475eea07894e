"""Datasets: the rows of `registry.DATASETS`, and `load`, which cuts one into its three splits.

A loader returns the official training and test sets as `RawImages`. `load` checks them, carves the
validation split out of the training set (fixed by seed and labels, in proportion to the classes)
and leaves the test set alone. CIFAR and MNIST are in `official`, image folders in `folder`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import numpy as np

from llp import registry
from llp.errors import DataError, LlpError, SpecError, unknown
from llp.workloads.folder import image_folder
from llp.workloads.images import (
    FileImages,
    ImageData,
    Indices,
    Pixels,
    RawImages,
    Split,
    channel_statistics,
    digest,
    frozen,
)
from llp.workloads.official import cifar10, cifar100, fashion_mnist, mnist
from llp.workloads.subsets import nested_order, split_validation
from llp.workloads.synthetic import synthetic

if TYPE_CHECKING:
    from llp.spec.schema import DatasetSpec

__all__ = [
    "FileImages",
    "ImageData",
    "RawImages",
    "Split",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "image_folder",
    "load",
    "mnist",
    "synthetic",
]

_MIN_VALIDATION = 1000
_DIGITS_TEST_FRACTION = 0.2
_LABEL_STREAM = 3


def load(spec: DatasetSpec, seed: int) -> ImageData:
    """The dataset that `spec` names, in three disjoint splits.

    Validation is `spec.validation_fraction` of the official training set. With
    `spec.max_train_examples` the training split is cut to that many images, in proportion to the
    classes, and the validation split to the same ratio but not below 1,000 images (or all there
    are): fewer would make its accuracy too noisy, more would cost more than the training. The test
    split is the whole official one, or as many of its images as `spec.max_test_examples` says, the
    same ones for every seed. `spec.label_noise` of the training labels are replaced; validation and
    test keep theirs.

    Args:
        spec: The `dataset` section of an experiment.
        seed: Of the split; a study uses one for all its trials.

    Raises:
        SpecError: Unknown dataset or option, or fewer images than classes are asked for.
        DataError: Files are missing, damaged or inconsistent, or a loader from outside fails.
    """
    raw = _raw(spec)
    train = _checked(raw.train_images, raw.train_labels, f"{spec.name}: training set")
    test = _checked(raw.test_images, raw.test_labels, f"{spec.name}: test set")
    names = _class_names(spec.name, raw.class_names, train, test)
    indices, validation_indices = split_validation(
        train.labels, fraction=spec.validation_fraction, seed=seed
    )
    limit = spec.max_train_examples
    if limit is not None and limit < len(indices):
        _require_classes("max_train_examples", limit, spec, len(names))
        ratio = spec.validation_fraction / (1 - spec.validation_fraction)
        indices = _first(train.labels, indices, limit, seed)
        size = max(round(ratio * limit), _MIN_VALIDATION)
        validation_indices = _first(train.labels, validation_indices, size, seed)
    kept = train.take(indices)
    if spec.label_noise:
        noisy = with_label_noise(kept.labels, spec.label_noise, len(names), seed=seed)
        kept = Split(kept.images, frozen(noisy))
    limit = spec.max_test_examples
    if limit is not None and limit < len(test):
        _require_classes("max_test_examples", limit, spec, len(names))
        test = test.take(_first(test.labels, np.arange(len(test)), limit, seed=0))
    splits = kept, train.take(validation_indices), test
    mean, std = channel_statistics(splits[0].images)
    return ImageData(
        name=spec.name,
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        class_names=names,
        mean=mean,
        std=std,
        source=raw.source,
        digest=digest(splits),
    )


def with_label_noise(labels: Indices, share: float, num_classes: int, *, seed: int) -> Indices:
    """`labels` with `round(share * N)` of them replaced by another class, each as likely.

    The examples with a wrong label at one share are among those at a larger one.
    """
    rng = np.random.default_rng([seed, _LABEL_STREAM])
    order = rng.permutation(len(labels))
    others = (labels + rng.integers(1, num_classes, len(labels))) % num_classes
    noisy = np.array(labels)
    wrong = order[: round(share * len(labels))]
    noisy[wrong] = others[wrong]
    return noisy


def digits(*, root: str | Path | None = None, download: bool = False) -> RawImages:
    """scikit-learn's handwritten digits: 1,797 images of 8x8 with 17 grey levels, as uint8 0..255.

    There is no official test set; a fixed fifth of every class, the same for all seeds, is held out
    as one. Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998).

    Args:
        root: Not used: the images come with scikit-learn.
        download: Not used.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, test = split_validation(labels, fraction=_DIGITS_TEST_FRACTION, seed=0)
    return RawImages(
        images[train],
        labels[train],
        images[test],
        labels[test],
        tuple(str(digit) for digit in range(10)),
        "scikit-learn's load_digits; test: a fixed, class-balanced fifth",
    )


def _raw(spec: DatasetSpec) -> RawImages:
    """What the loader returns, called with the arguments it accepts."""
    loader = registry.load("datasets", spec.name)
    if spec.name not in registry.DATASETS:
        return _from_outside(loader, spec)
    return _called(loader, spec)


def _from_outside(loader: Any, spec: DatasetSpec) -> RawImages:
    """`_called`, where whatever goes wrong in code from outside is told as a `DataError`."""
    try:
        raw = _called(loader, spec)
        return RawImages(
            _array(raw.train_images),
            _array(raw.train_labels),
            _array(raw.test_images),
            _array(raw.test_labels),
            tuple(raw.class_names),
            str(raw.source),
        )
    except LlpError:
        raise
    except Exception as error:
        file = getattr(getattr(loader, "__code__", None), "co_filename", None)
        lines = [f.lineno for f in extract_tb(error.__traceback__) if f.filename == file]
        place = f" (line {lines[-1]} of {file})" if lines else ""
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise DataError(f"{spec.name}: {reason}{place}") from error


def _array(value: Any) -> Any:
    return value if isinstance(value, FileImages) else np.asarray(value)


def _called(loader: Any, spec: DatasetSpec) -> RawImages:
    arguments: dict[str, Any] = {"root": spec.root, "download": spec.download}
    parameters = inspect.signature(loader).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
        for option in spec.options:
            if option not in parameters:
                known = [key for key in parameters if key not in {"root", "download"}]
                if not known:
                    raise SpecError(f"{spec.name} takes no options, so not '{option}'")
                raise SpecError(unknown(f"option of {spec.name}", option, known))
    try:
        result = loader(**{**arguments, **spec.options})
    except FileNotFoundError as error:
        raise DataError(f"{spec.name}: {error}") from error
    if isinstance(result, RawImages):
        return result
    if not isinstance(result, tuple | list) or len(result) != 4:
        raise DataError(
            f"{spec.name} must return RawImages or (train_images, train_labels, test_images, "
            f"test_labels), not {type(result).__name__}"
        )
    train_images, train_labels, test_images, test_labels = result
    source = f"{spec.name}, with {dict(spec.options)}"
    return RawImages(train_images, train_labels, test_images, test_labels, source=source)


def _checked(images: Any, labels: Any, what: str) -> Split:
    """A split of read-only arrays of the right types, shapes and values."""
    if not isinstance(images, FileImages):
        images = _as_pixels(np.asarray(images), what)
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) != len(images):
        raise DataError(f"{what}: {len(images)} images but labels of shape {labels.shape}")
    if len(labels) == 0:
        raise DataError(f"{what}: no images")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{what}: labels must be whole numbers, not {labels.dtype}")
    if labels.min() < 0:
        raise DataError(f"{what}: label {labels.min()} is negative; classes count from 0")
    return Split(frozen(images), frozen(labels.astype(np.int64)))


def _as_pixels(images: Pixels, what: str) -> Pixels:
    if images.ndim == 3:  # grey images without a channel axis
        images = images[:, None]
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        turned = images.ndim == 4 and images.shape[1] == images.shape[2]
        hint = "; transpose(0, 3, 1, 2) puts the channels first" if turned else ""
        raise DataError(
            f"{what}: images must be square, [N, C, H, H], not {list(images.shape)}{hint}"
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{what}: images must be uint8 (0..255) or floats, not {images.dtype}")
    images = images.astype(np.float32)
    if not np.isfinite(images).all():
        row = int(np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0])
        raise DataError(f"{what}: image {row} holds NaN or infinity")
    return images


def _class_names(name: str, names: tuple[str, ...], train: Split, test: Split) -> tuple[str, ...]:
    """The names given, or the class numbers; checks that every class can be split and learnt."""
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{name}: training images are {list(train.images.shape[1:])}, "
            f"test images {list(test.images.shape[1:])} [C, H, W]"
        )
    counts = np.bincount(train.labels)
    num_classes = len(names) or len(counts)
    for what, labels in (("training", train.labels), ("test", test.labels)):
        if labels.max() >= num_classes:
            raise DataError(
                f"{name}: {what} label {labels.max()} of {num_classes} classes (0-based)"
            )
    counts = np.bincount(train.labels, minlength=num_classes)
    if counts.min() < 2 or num_classes < 2:
        raise DataError(
            f"{name}: class {int(counts.argmin())} has {int(counts.min())} training image(s); "
            "at least two classes with two images each are needed, for training and validation"
        )
    return tuple(names) or tuple(str(label) for label in range(num_classes))


def _require_classes(key: str, limit: int, spec: DatasetSpec, num_classes: int) -> None:
    if limit < num_classes:
        raise SpecError(
            f"dataset.{key}: {limit} is fewer than one image for each of the "
            f"{num_classes} classes of {spec.name}"
        )


def _first(labels: Indices, indices: Indices, count: int, seed: int) -> Indices:
    """`count` of `indices` in proportion to the classes, in ascending order."""
    return np.sort(indices[nested_order(labels[indices], seed=seed)[:count]])
