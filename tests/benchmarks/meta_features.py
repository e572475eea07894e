"""Features of datasets and models, and weights of studies by them, for `meta.py`.

They did not make proposals better, so the product does not have them. Those of a dataset are
computed from the training split alone, on an even sample of at most `SAMPLE` images, without
randomness: the same data give the same bits. Size, classes and channels; balance and pixel
statistics; and landmarkers, the accuracy of cheap classifiers that were fitted on one half of the
sample and judged on the other (Pfahringer et al., "Meta-learning by landmarking various learning
algorithms", ICML 2000).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llp.workloads.images import ImageData
from llp.workloads.subsets import nested_order

Floats = NDArray[np.float64]
SAMPLE = 1000
"""Images that are looked at."""
PIXELS = 1024
"""Pixels of an image that landmarkers see; larger images are thinned evenly."""
BANDWIDTH = 2.0
"""Of the weights, in lower quartiles of the distances. On 19 of the data sets, first five of 40:
regret .057, .049, .044 and .045 with 1, 1.5, 2 and 3, and .044 with equal weights."""


def dataset_features(data: ImageData) -> dict[str, float]:
    """Name -> value of every feature of the training split.

    `log_images`, `log_classes`, `channels`, `log_pixels` (of one image and channel), `balance`
    (entropy of the classes over its maximum), `mean` and `deviation` of the pixels on 0..1 (float
    images: as they are), `skewness`, `kurtosis` (excess), `smoothness` (correlation of neighbours
    in a row), and the landmarkers `centroid`, `ridge` and `neighbour`: accuracy over guessing, 0
    to 1.
    """
    labels = np.asarray(data.train.labels)
    counts = np.bincount(labels, minlength=data.num_classes)
    order = nested_order(labels, seed=0)[:SAMPLE]
    images = np.asarray(data.train.pixels(order), dtype=np.float64)
    if data.train.pixels(order[:1]).dtype == np.uint8:
        images = images / 255
    mean, deviation = float(images.mean()), float(images.std())
    standard = (images - mean) / max(deviation, 1e-9)
    shares = counts[counts > 0] / counts.sum()
    kinds = max(data.num_classes, 2)
    left, right = standard[..., :-1].ravel(), standard[..., 1:].ravel()
    return {
        "log_images": float(np.log10(len(labels))),
        "log_classes": float(np.log10(kinds)),
        "channels": float(data.channels),
        "log_pixels": float(np.log10(data.image_size**2)),
        "balance": float(-(shares * np.log(shares)).sum() / np.log(kinds)),
        "mean": mean,
        "deviation": deviation,
        "skewness": float((standard**3).mean()),
        "kurtosis": float((standard**4).mean() - 3),
        "smoothness": float((left * right).mean()) if left.size else 0.0,
        **_landmarkers(standard.reshape(len(images), -1), labels[order], data.num_classes),
    }


def _landmarkers(rows: Floats, labels: NDArray[np.integer], num_classes: int) -> dict[str, float]:
    """Accuracies over guessing of three classifiers, fitted on every other example of a class."""
    rows = rows[:, np.unique(np.linspace(0, rows.shape[1] - 1, PIXELS).astype(np.int64))]
    # Not every other example: the order may go round the classes, and halves would miss some.
    place = (labels[:, None] == labels[None]).astype(np.int64)
    even = np.tril(place, -1).sum(axis=1) % 2 == 0
    fit, judge, known, true = rows[even], rows[~even], labels[even], labels[~even]
    if not len(judge):
        return dict.fromkeys(("centroid", "ridge", "neighbour"), 0.0)
    classes = np.unique(known)
    guessing = float(np.bincount(true, minlength=num_classes).max() / len(true))

    def over(predicted: NDArray[np.integer]) -> float:
        accuracy = float((predicted == true).mean())
        return max(0.0, (accuracy - guessing) / max(1 - guessing, 1e-9))

    centroids = np.stack([fit[known == one].mean(axis=0) for one in classes])
    targets = (known[:, None] == classes[None]).astype(np.float64)
    centre, average = fit.mean(axis=0), targets.mean(axis=0)
    gram = (fit - centre) @ (fit - centre).T
    gram += (0.1 * np.trace(gram) / len(gram) + 1e-9) * np.eye(len(gram))
    dual = np.linalg.solve(gram, targets - average)
    scores = (judge - centre) @ ((fit - centre).T @ dual) + average
    return {
        "centroid": over(classes[_distances(judge, centroids).argmin(axis=1)]),
        "ridge": over(classes[scores.argmax(axis=1)]),
        "neighbour": over(known[_distances(judge, fit).argmin(axis=1)]),
    }


def _distances(a: Floats, b: Floats) -> Floats:
    """Squared distances of rows, [len(a), len(b)]."""
    found: Floats = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)
    return found


def study_features(spec: Mapping[str, Any], dataset: Mapping[str, float]) -> dict[str, float]:
    """Features of a study: of its dataset, its model, and of the recipe where it is fixed.

    A name counts as 1 in a feature of its own, so that equal names are near.

    Args:
        spec: The experiment as plain data.
        dataset: Features of its dataset.
    """
    found = dict(dataset)
    found[f"model={spec['model']['name']}"] = 1.0
    for option, value in (spec["model"].get("options") or {}).items():
        if isinstance(value, bool | str):
            found[f"model.{option}={value}"] = 1.0
        elif isinstance(value, int | float):
            found[f"model.{option}"] = float(value)
    if "optimizer" not in spec.get("search_space", {}):
        found[f"optimizer={spec['training']['optimizer']}"] = 1.0
    found["log_epochs"] = math.log10(max(1, spec["training"]["epochs"]))
    return found


def similarity(there: Floats, here: Floats) -> Floats:
    """Weights of studies, summing to 1, from the distance of their features.

    Every feature is scaled by its standard deviation over all studies and the present one; one
    that is the same everywhere does not count.

    Args:
        there: [num_studies, num_features].
        here: [num_features].
    """
    together = np.vstack([there, here])
    spread = together.std(axis=0)
    used = spread > 1e-9
    scaled = (there - here)[:, used] / spread[used]
    distance = np.sqrt((scaled**2).sum(axis=1))
    quartile = np.sort(distance)[len(distance) // 4]
    width = BANDWIDTH * quartile if quartile > 0 else max(float(distance.max()), 1.0) / BANDWIDTH
    weights = np.exp(-((distance / width) ** 2))
    return np.asarray(weights / weights.sum(), dtype=np.float64)
