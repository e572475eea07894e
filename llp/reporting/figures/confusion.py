"""Which classes are taken for which: per-class figures, the confusion matrix, the worst pairs.

Rows of a confusion matrix are the true classes, columns what the model said.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llp.reporting import formats
from llp.reporting.palette import LIGHT
from llp.reporting.predictions import Predictions
from llp.reporting.study import wilson_interval
from llp.reporting.svg import canvas, drawing, inline

MAX_NUMBERED = 25
"""Up to this many classes the matrix is a table with numbers, above it a picture."""
MAX_PICTURED = 250
"""Classes a picture can show; with more only the pairs are listed."""
NUM_PAIRS = 30


def confusion_counts(said: Predictions) -> NDArray[np.int64]:
    """Test images by true class (row) and predicted class (column), [K, K]."""
    num = said.num_classes
    flat = np.bincount(said.labels * num + said.predicted, minlength=num * num)
    return flat.reshape(num, num)


def class_data(said: Predictions) -> pd.DataFrame:
    """One row a class.

    Columns: `label`, `name`, `images` (of that class), `predicted` (times it was said), `hits`,
    `precision` (hits / predicted), `recall` (hits / images) with its 95 % Wilson interval `low` to
    `high`, `f1` (2 hits / (images + predicted)), and `mistaken_for`, the class most often said
    instead. A share of nothing is NaN.
    """
    counts = confusion_counts(said)
    rows = []
    for label in range(said.num_classes):
        images, predicted = int(counts[label].sum()), int(counts[:, label].sum())
        hits = int(counts[label, label])
        low, high = wilson_interval(hits / images if images else np.nan, images)
        others = counts[label].copy()
        others[label] = 0
        worst = int(others.argmax())
        rows.append(
            {
                "label": label,
                "name": said.name(label),
                "images": images,
                "predicted": predicted,
                "hits": hits,
                "precision": hits / predicted if predicted else np.nan,
                "recall": hits / images if images else np.nan,
                "low": low,
                "high": high,
                "f1": 2 * hits / (images + predicted) if images + predicted else np.nan,
                "mistaken_for": f"{said.name(worst)} ({others[worst]})" if others[worst] else "",
            }
        )
    return pd.DataFrame(rows)


def class_reading(data: pd.DataFrame) -> str:
    """The easiest and the hardest class by F1."""
    known = data.dropna(subset=["f1"]).sort_values("f1", kind="stable")
    if known.empty:
        return "There are no test images."
    worst, best = known.iloc[0], known.iloc[-1]
    return (
        f"Hardest is {formats.clean(worst['name'])} (F1 {formats.percent(worst['f1'])}: "
        f"{worst['hits']} of {worst['images']} found), easiest {formats.clean(best['name'])} "
        f"({formats.percent(best['f1'])}); the mean over classes is "
        f"{formats.percent(known['f1'].mean())}."
    )


def confused_pairs(said: Predictions, num: int = NUM_PAIRS) -> pd.DataFrame:
    """The most frequent mistakes: `true`, `predicted`, `count`, `share` of the true class."""
    counts = confusion_counts(said)
    images = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:num]
    rows = []
    for true, predicted in zip(*np.unravel_index(order, counts.shape), strict=True):
        count = int(counts[true, predicted])
        if count:
            rows.append(
                (said.name(int(true)), said.name(int(predicted)), count, count / images[true])
            )
    return pd.DataFrame(rows, columns=["true", "predicted", "count", "share"])


def pairs_reading(data: pd.DataFrame, num_mistakes: int) -> str:
    """The most frequent mistake."""
    if data.empty:
        return "There is no mistake among the test images."
    row = data.iloc[0]
    return (
        f"The most frequent mistake: {formats.clean(row['true'])} taken for "
        f"{formats.clean(row['predicted'])}, {row['count']} times "
        f"({formats.percent(row['share'])} of that class); there are "
        f"{formats.plural(num_mistakes, 'mistake')} in all."
    )


def confusion_figure(said: Predictions) -> str:
    """The matrix as a picture: the stronger the colour, the larger the share of the row."""
    counts = confusion_counts(said)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    blue = [int(LIGHT["blue"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    picture = np.empty((*shares.shape, 4))
    picture[..., :3] = blue
    picture[..., 3] = np.sqrt(shares)  # small shares of mistakes stay visible
    names = [formats.short(said.name(label), 16) for label in range(said.num_classes)]
    with drawing():
        figure, axes = canvas((8.6, 8.6), left=0.95, right=0.05, bottom=0.95, top=0.05)
        axes.imshow(picture, interpolation="none", aspect="equal")
        size = min(5.0, 520 / len(names))
        step = 1 if size >= 3.5 else -(-len(names) // 100)
        places = list(range(0, len(names), step))
        axes.set_yticks(places, [names[i] for i in places], fontsize=max(size, 3.5))
        axes.set_xticks(places, [names[i] for i in places], fontsize=max(size, 3.5), rotation=90)
        axes.tick_params(length=0, pad=1.5)
        axes.set_xlabel("the model said")
        axes.set_ylabel("true class")
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
        return inline(
            figure,
            key="confusion",
            title="Confusion matrix",
            description="Rows are true classes, columns what the model said; the diagonal is "
            f"right. {pairs_reading(confused_pairs(said, 1), int((~said.hits).sum()))}",
        )
