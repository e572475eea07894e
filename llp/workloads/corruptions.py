"""Common image corruptions in five severities: rows of `registry.CORRUPTIONS`.

A test of robustness in the manner of Hendrycks & Dietterich (2019, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations"). Noise, contrast, brightness and JPEG have the
strengths of their code for 32x32 images; blur and pixelation are made a little stronger, and shifts
are added. Lengths are in pixels of a 32x32 image and grow with larger ones.

Everything works on uint8 `[N, C, H, W]` and is fixed by the seed. The random part of an image is
the same at every severity, so a higher severity is the same corruption, only stronger.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from llp import registry
from llp.errors import DataError
from llp.workloads.images import Split

SEVERITIES = (1, 2, 3, 4, 5)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

_REFERENCE_SIDE = 32


def corrupt(images: Pixels, name: str, severity: int, *, seed: int = 0) -> Pixels:
    """`images` with one corruption, as uint8 of the same shape.

    Args:
        images: uint8 `[N, C, H, W]`, one channel or three; not changed.
        name: Row of `registry.CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of what is random in it.

    Raises:
        SpecError: Unknown corruption; the message names the nearest.
        ValueError: Another severity.
        DataError: Images that are no uint8 `[N, 1 or 3, H, W]`.
    """
    function = registry.load("corruptions", name)
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of 1 to 5, not {severity}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            "corruptions need uint8 images [N, 1 or 3, H, W], not "
            f"{images.dtype} {list(images.shape)}"
        )
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    found: Pixels = function(images, severity, rng)
    return found


def corrupted_copies(split: Split, *, seed: int = 0) -> Iterator[tuple[str, Split]]:
    """Every corruption with a copy of `split`, in which each severity has a fifth of the images.

    The severity of an image differs from corruption to corruption; which it is depends on the seed
    and the image's place alone. Images in files are decoded a copy at a time.

    Raises:
        DataError: As `corrupt`, or an image cannot be read.
    """
    num = len(split)
    images = split.pixels(np.arange(num))
    place = np.random.default_rng([seed, num]).permutation(num)
    for number, name in enumerate(registry.CORRUPTIONS):
        out = np.empty_like(images)
        for severity in SEVERITIES:
            own = (place + number) % len(SEVERITIES) == severity - 1
            if own.any():
                out[own] = corrupt(images[own], name, severity, seed=seed)
        yield name, Split(out, split.labels)


def gaussian_noise(images: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Independent noise on every pixel; standard deviation .04 to .10 of the range."""
    draws = rng.standard_normal(images.shape, dtype=np.float32)
    return _back(_unit(images) + (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1] * draws)


def gaussian_blur(images: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Gaussian blur; .4 to 1.2 pixels wide."""
    width = (0.4, 0.6, 0.8, 1.0, 1.2)[severity - 1] * _scale(images)
    return _back(ndimage.gaussian_filter(_unit(images), (0, 0, width, width), mode="nearest"))


def contrast(images: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Contrast around the image's mean of each channel, scaled by .75 down to .15."""
    unit = _unit(images)
    middle = unit.mean(axis=(2, 3), keepdims=True)
    return _back((unit - middle) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + middle)


def brightness(images: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """All channels brighter by .05 to .3 of the range."""
    return _back(_unit(images) + np.float32((0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]))


def jpeg(images: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """JPEG by Pillow at quality 80 down to 40."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def through(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        return Image.open(buffer).convert(image.mode)

    return _each(images, through)


def pixelate(images: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Coarser pixels, 7/8 down to 3/8 as many along a side, each of the mean colour it covers."""
    down, across = (
        _coarse(side, max(1, round(side * (8 - severity) / 8))) for side in images.shape[2:]
    )
    return _back(np.asarray(down @ _unit(images) @ across.T, dtype=np.float32))


def _coarse(fine: int, coarse: int) -> Floats:
    """`[fine, fine]`: means over `coarse` equal intervals, and back onto the fine ones."""
    starts, ends = np.arange(fine) / fine, (np.arange(fine) + 1) / fine
    lows, highs = np.arange(coarse) / coarse, (np.arange(coarse) + 1) / coarse
    shared = np.minimum(ends, highs[:, None]) - np.maximum(starts, lows[:, None])
    overlap = np.clip(shared, 0, None)  # [coarse, fine]
    mean = overlap * coarse
    back = overlap.T * fine
    return np.asarray(back @ mean, dtype=np.float32)


def shift(images: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Moved by .8 to 4 pixels in a direction of the image's own; the border is repeated."""
    length = 0.8 * severity * images.shape[2] / _REFERENCE_SIDE
    angles = rng.uniform(0, 2 * np.pi, len(images))
    unit, out = _unit(images), np.empty(images.shape, dtype=np.float32)
    for number, angle in enumerate(angles):
        step = (0, length * np.sin(angle), length * np.cos(angle))
        ndimage.shift(unit[number], step, output=out[number], order=1, mode="nearest")
    return _back(out)


def _scale(images: Pixels) -> float:
    return max(1.0, float(images.shape[2]) / _REFERENCE_SIDE)


def _unit(images: Pixels) -> Floats:
    return images.astype(np.float32) / np.float32(255)


def _back(unit: Floats) -> Pixels:
    rounded: Pixels = np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
    return rounded


def _each(images: Pixels, through: Callable[[Image.Image], Image.Image]) -> Pixels:
    """Every image through a function of Pillow images."""
    out = np.empty_like(images)
    for number, pixels in enumerate(images):
        grey = pixels.shape[0] == 1
        plane = pixels[0] if grey else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        found = np.asarray(through(Image.fromarray(plane)))
        out[number] = found[None] if grey else found.transpose(2, 0, 1)
    return out
