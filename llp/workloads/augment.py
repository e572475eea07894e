"""Random flips, crops and cutouts of a whole batch at once, on the device that holds it.

They work on *normalised* images, where 0 is the mean colour of the training set: crop pads with it
and cutout erases to it, as in DeVries & Taylor, "Improved Regularization of Convolutional Neural
Networks with Cutout" (2017), section 3. (torchvision's usual recipe pads black before normalising;
with zeros after it the border carries no edge of its own and images can be normalised once for all
epochs.) Each image of the batch gets its own draw, from the generator that is passed in; the images
that come in are left as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_CROP_SHARE, _CUTOUT_SHARE = 8, 4


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left-right with probability 1/2.

    Args:
        images: [B, C, H, W], any dtype.
        generator: On the device of `images`.

    Returns:
        [B, C, H, W], same dtype and device.
    """
    draws = torch.rand(len(images), generator=generator, device=images.device)
    return torch.where((draws < 0.5).view(-1, 1, 1, 1), images.flip(3), images)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 1/8 of its side, with zeros (the mean colour) moving in.

    The same as padding all sides by `side // 8` (at least 1; 4 for 32x32) and cutting a random
    window of the original size: He et al., "Deep Residual Learning" (2016), section 4.2.

    Args:
        images: [B, C, H, W], any dtype.
        generator: On the device of `images`.

    Returns:
        [B, C, H, W], same dtype and device.
    """
    count, _, height, width = images.shape
    pad_y, pad_x = max(1, height // _CROP_SHARE), max(1, width // _CROP_SHARE)
    top = _integers(2 * pad_y + 1, count, images.device, generator)
    left = _integers(2 * pad_x + 1, count, images.device, generator)
    padded = functional.pad(images, (pad_x, pad_x, pad_y, pad_y))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2py+1, 2px+1, H, W], a view
    return windows[torch.arange(count, device=images.device), :, top, left]


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with one square of 1/4 of its side set to zero (the mean colour).

    The centre is uniform over the pixels, so the square may hang over the border, as in the paper.

    Args:
        images: [B, C, H, W], any dtype.
        generator: On the device of `images`.

    Returns:
        [B, C, H, W], same dtype and device.
    """
    count, _, height, width = images.shape
    side = max(1, min(height, width) // _CUTOUT_SHARE)
    top = _integers(height, count, images.device, generator) - side // 2
    left = _integers(width, count, images.device, generator) - side // 2
    rows = torch.arange(height, device=images.device) - top.view(-1, 1)
    columns = torch.arange(width, device=images.device) - left.view(-1, 1)
    in_rows, in_columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    hole = in_rows.view(count, 1, height, 1) & in_columns.view(count, 1, 1, width)
    return images.masked_fill(hole, 0)


def _integers(high: int, count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (count,), generator=generator, device=device)
