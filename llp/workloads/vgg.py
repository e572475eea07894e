"""VGG-11 and VGG-16 for images from 32x32, with and without batch norm.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR
2015), table 1, columns A and D. Five poolings leave 1x1 of a 32x32 image, so the three large linear
layers are one here, as is usual at this size; larger maps are averaged. Convolutions before a batch
norm have no bias: the norm would cancel it.
Parameter counts for 3x32x32 and 10 classes: VGG-11 9,225,610, VGG-16 14,719,818; with batch norm
9,228,362 and 14,724,042.
"""

from __future__ import annotations

from torch import nn

from llp.errors import SpecError
from llp.workloads.layers import he_initialised

_POOL = 0
_VGG11 = (64, _POOL, 128, _POOL, 256, 256, _POOL, 512, 512, _POOL, 512, 512, _POOL)
_VGG16 = (
    64,
    64,
    _POOL,
    128,
    128,
    _POOL,
    *(256,) * 3,
    _POOL,
    *(512,) * 3,
    _POOL,
    *(512,) * 3,
    _POOL,
)
_MIN_IMAGE_SIZE = 32


def vgg11(*, channels: int, image_size: int, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """VGG-11 without batch norm.

    Args:
        channels: Input channels.
        image_size: Side of the input images, at least 32.
        num_classes: Outputs.
        dropout: Probability of zeroing one of the 512 features.

    Raises:
        SpecError: The images are too small for five poolings.
    """
    return _vgg("vgg11", _VGG11, channels, image_size, num_classes, dropout, batch_norm=False)


def vgg11_bn(
    *, channels: int, image_size: int, num_classes: int, dropout: float = 0.0
) -> nn.Module:
    """VGG-11 with batch norm after every convolution; arguments as `vgg11`."""
    return _vgg("vgg11_bn", _VGG11, channels, image_size, num_classes, dropout, batch_norm=True)


def vgg16(*, channels: int, image_size: int, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """VGG-16 without batch norm; arguments as `vgg11`."""
    return _vgg("vgg16", _VGG16, channels, image_size, num_classes, dropout, batch_norm=False)


def vgg16_bn(
    *, channels: int, image_size: int, num_classes: int, dropout: float = 0.0
) -> nn.Module:
    """VGG-16 with batch norm after every convolution; arguments as `vgg11`."""
    return _vgg("vgg16_bn", _VGG16, channels, image_size, num_classes, dropout, batch_norm=True)


def _vgg(
    name: str,
    plan: tuple[int, ...],
    channels: int,
    image_size: int,
    num_classes: int,
    dropout: float,
    *,
    batch_norm: bool,
) -> nn.Module:
    if image_size < _MIN_IMAGE_SIZE:
        raise SpecError(
            f"{name} halves the image five times and needs at least {_MIN_IMAGE_SIZE}x"
            f"{_MIN_IMAGE_SIZE} pixels, not {image_size}x{image_size}; "
            "use convnet, simple_cnn, resnet20 or wide_resnet for small images"
        )
    layers: list[nn.Module] = []
    previous = channels
    for planes in plan:
        if planes == _POOL:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(previous, planes, 3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(planes))
        layers.append(nn.ReLU(inplace=True))
        previous = planes
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]
    return he_initialised(nn.Sequential(*layers, nn.Linear(previous, num_classes)))
