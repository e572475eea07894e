"""What a full training said about every test image, kept for the reports.

`Recorder` stands in for the hit counter of the one pass over the test split that a verification
makes, so that nothing is read twice; `save` writes `predictions/<job_id>.npz` durably before the
verification is reported. Nothing that is written here is ever read by a search.

The file holds plain numpy arrays (no pickles), in this order, N test images and K classes:

- `format`: version of this list, int32 []
- `labels`, `predicted`: int32 [N]; `predicted` is the class that was counted as a hit or a miss
- `confidence`: float32 [N], probability of the predicted class
- `rank`: int32 [N], number of classes that got a larger logit than the true one
- `probabilities`: float16 [N, K]
- `class_names`: UTF-8 JSON list as uint8 [bytes]
- `confident_wrong`, `unsure_right`, `random`: int32 [<= 24], examples for a gallery: the misses
  with the highest confidence, the hits with the lowest, and images drawn by a fixed seed, the same
  for every training on the same test split
- `image_index`: int32 [M], the examples of all three; `images`: uint8 [M, H, W, 1 or 3], at most 48
  pixels a side
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from llp.training import checkpoint

FORMAT = 1
NUM_EXAMPLES = 24
"""Images in each of the three groups of the gallery."""
MAX_SIDE = 48
"""Pixels; larger test images are kept as thumbnails of this size."""

Pixels = Callable[[Sequence[int]], NDArray[Any]]
"""Indices -> test images [B, C, H, W], uint8 or floats, before normalisation."""


class Recorder:
    """Counts hits as `num_correct` does and keeps what the model said.

    Args:
        num_correct: Hits of a batch.
    """

    def __init__(self, num_correct: Callable[[Any, Any], Tensor]) -> None:
        self._num_correct = num_correct
        self._parts: list[dict[str, Tensor]] = []

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Hits of a batch of logits [B, K] with class indices [B]; see `loop.num_correct`."""
        hits = self._num_correct(output, target)
        probabilities = output.softmax(1)
        predicted = output.argmax(1)
        truth = output.gather(1, target[:, None])
        self._parts.append(
            {
                "labels": target.to(torch.int32),
                "predicted": predicted.to(torch.int32),
                "confidence": probabilities.gather(1, predicted[:, None])[:, 0].float(),
                "rank": (output > truth).sum(1).to(torch.int32),
                "probabilities": probabilities.half(),
            }
        )
        return hits

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything recorded, in the order in which it came."""
        return {
            name: torch.cat([part[name] for part in self._parts]).cpu().numpy()
            for name in (self._parts[0] if self._parts else ())
        }


def save(
    path: str,
    arrays: dict[str, NDArray[Any]],
    *,
    class_names: Sequence[str],
    pixels: Pixels,
    root: Path,
) -> tuple[str, str]:
    """Writes the predictions durably and returns their path and the sha256 of the file.

    The same predictions give the same bytes.

    Args:
        path: Relative to `root`.
        arrays: From `Recorder.arrays`.
        class_names: One per class.
        pixels: Gives the test images of the gallery.
        root: The study folder.

    Raises:
        EnvironmentProblem: The disk is full or cannot be written to.
    """
    groups = gallery(arrays)
    wanted = np.unique(np.concatenate(list(groups.values())))
    names = json.dumps([str(name) for name in class_names]).encode("ascii")
    everything: dict[str, Any] = {
        "format": np.int32(FORMAT),
        **arrays,
        "class_names": np.frombuffer(names, dtype=np.uint8),
        **groups,
        "image_index": wanted.astype(np.int32),
        "images": thumbnails(pixels(wanted.tolist())),
    }
    content = io.BytesIO()
    np.savez_compressed(content, **everything)
    checkpoint.write_durably(root / path, content.getvalue())
    return path, hashlib.sha256(content.getvalue()).hexdigest()


def gallery(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.int32]]:
    """The examples to show, as indices into the test split; ties go to the earlier image."""
    wrong = arrays["predicted"] != arrays["labels"]
    confidence = arrays["confidence"]

    def first(chosen: NDArray[np.bool_], key: NDArray[Any]) -> NDArray[np.int32]:
        indices = np.flatnonzero(chosen)
        order = np.argsort(key[indices], kind="stable")[:NUM_EXAMPLES]
        return indices[order].astype(np.int32)

    generator = np.random.Generator(np.random.PCG64(0))
    count = len(wrong)
    drawn = generator.choice(count, size=min(NUM_EXAMPLES, count), replace=False)
    return {
        "confident_wrong": first(wrong, -confidence),
        "unsure_right": first(~wrong, confidence),
        "random": drawn.astype(np.int32),
    }


def thumbnails(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Images [M, C, H, W] as uint8 [M, h, w, 1 or 3] for people to look at.

    Floats are stretched between the smallest and the largest value of the batch; images of other
    than one or three channels become the grey mean of their channels.
    """
    if images.dtype != np.uint8:
        low, high = float(images.min(initial=0.0)), float(images.max(initial=0.0))
        images = np.rint((images - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    if images.shape[1] not in (1, 3):
        images = np.rint(images.mean(axis=1, keepdims=True)).astype(np.uint8)
    images = images.transpose(0, 2, 3, 1)
    height, width = images.shape[1:3]
    if max(height, width) > MAX_SIDE:
        scale = MAX_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = [_resized(image, size) for image in images]
        images = np.stack(small) if small else images[:, : size[1], : size[0]]
    return np.ascontiguousarray(images)


def _resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    grey = image.shape[2] == 1
    small = Image.fromarray(image[:, :, 0] if grey else image).resize(
        size, Image.Resampling.BILINEAR
    )
    return np.asarray(small).reshape(size[1], size[0], image.shape[2])
