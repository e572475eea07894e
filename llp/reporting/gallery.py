"""Test images with what they are and what the model said, ready for the template."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llp.reporting import formats
from llp.reporting.predictions import Predictions


@dataclass(frozen=True)
class Picture:
    """One image of the gallery.

    Attributes:
        uri: The image as a `data:` URI.
        width: Pixels.
        height: Pixels.
        true: Name of its class.
        said: Name of the class the model chose.
        confidence: Probability of that class, in words.
        right: Whether they are the same.
        number: Its place in the test split.
    """

    uri: str
    width: int
    height: int
    true: str
    said: str
    confidence: str
    right: bool
    number: int


def pictures(said: Predictions, indices: Iterable[int]) -> list[Picture]:
    """The images at `indices`, in that order; those whose pixels were not kept are left out."""
    found = []
    for index in map(int, indices):
        pixels = said.images.get(index)
        if pixels is None:
            continue
        found.append(
            Picture(
                uri=data_uri(pixels),
                width=pixels.shape[1],
                height=pixels.shape[0],
                true=said.name(int(said.labels[index])),
                said=said.name(int(said.predicted[index])),
                confidence=formats.percent(said.confidence[index]),
                right=bool(said.hits[index]),
                number=index,
            )
        )
    return found


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Pixels [H, W, 1 or 3] as a PNG inside a `data:` URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(
        buffer, format="PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
