"""Networks for small images: `build`, and the rows that are short enough to stand here.

Every row takes any number of input channels and classes and any image size from 8 pixels (VGG: from
32). Convolutions and hidden layers that feed a ReLU are drawn as in He et al., "Delving Deep into
Rectifiers" (2015), section 2.2, from torch's global generator: seed it before `build`.
Residual networks are in `resnet`, VGG in `vgg`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn

from llp import registry
from llp.errors import SpecError, unknown
from llp.workloads.layers import he_initialised
from llp.workloads.resnet import resnet18, resnet20, resnet34, resnet50, wide_resnet
from llp.workloads.vgg import vgg11, vgg11_bn, vgg16, vgg16_bn

__all__ = [
    "build",
    "convnet",
    "mlp",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "simple_cnn",
    "vgg11",
    "vgg11_bn",
    "vgg16",
    "vgg16_bn",
    "wide_resnet",
]

_MIN_IMAGE_SIZE = 8


def build(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    channels: int,
    image_size: int,
    num_classes: int,
) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: A row of `registry.MODELS`, or `my_package:build_model`.
        options: Arguments of the builder beside the three below; missing ones keep their default.
        channels: Input channels.
        image_size: Side of the square input images in pixels.
        num_classes: Outputs.

    Returns:
        A module from images [B, channels, image_size, image_size] to logits [B, num_classes]. A
        builder from outside gets those of `channels`, `image_size`, `num_classes` that it accepts.

    Raises:
        SpecError: Unknown name, unknown or ill-typed option, an image size the model cannot take,
            or a builder from outside that returns something else than a module.
    """
    options = dict(options or {})
    builder = registry.load("models", name)
    given = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
    if name in registry.MODELS:
        _check_options(name, options, registry.MODELS[name].options)
        if image_size < _MIN_IMAGE_SIZE:
            raise SpecError(
                f"{name} needs images of at least {_MIN_IMAGE_SIZE} pixels, not {image_size}"
            )
    else:
        parameters = inspect.signature(builder).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for option in options:
                if option not in parameters:
                    raise SpecError(unknown(f"option of {name}", option, parameters))
            given = {key: value for key, value in given.items() if key in parameters}
    model = builder(**given, **options)
    if not isinstance(model, nn.Module):
        raise SpecError(f"{name} returned {type(model).__name__} instead of a torch.nn.Module")
    return model


def mlp(
    *,
    channels: int,
    image_size: int,
    num_classes: int,
    width: int = 256,
    depth: int = 2,
    dropout: float = 0.0,
) -> nn.Module:
    """A fully connected network: `depth` hidden layers of `width` units with ReLU and dropout.

    Args:
        channels: Input channels.
        image_size: Side of the input images.
        num_classes: Outputs.
        width: Units of each hidden layer.
        depth: Hidden layers; 0 is softmax regression.
        dropout: Probability of zeroing a hidden unit.
    """
    sizes = [channels * image_size**2, *[width] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
    return he_initialised(nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes)))


def simple_cnn(
    *,
    channels: int,
    image_size: int,
    num_classes: int,
    width: int = 32,
    dropout: float = 0.0,
) -> nn.Module:
    """Three 3x3 convolutions of `width`, 2 and 4 times that, each pooled; 512 units; no batch norm.

    Feature maps larger than 4x4 are averaged down to 4x4 before the 512 units, so that the network
    does not grow with images beyond 32x32.

    Args:
        channels: Input channels.
        image_size: Side of the input images, at least 8.
        num_classes: Outputs.
        width: Channels of the first convolution.
        dropout: Probability of zeroing one of the 512 units.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([channels, width, 2 * width, 4 * width]):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    side = min(4, image_size // 8)
    layers += [
        nn.AdaptiveAvgPool2d(side) if image_size // 8 > side else nn.Identity(),
        nn.Flatten(),
        nn.Linear(4 * width * side**2, 512),
        nn.ReLU(),
        nn.Dropout(dropout),
    ]
    return he_initialised(nn.Sequential(*layers, nn.Linear(512, num_classes)))


def convnet(
    *,
    channels: int,
    image_size: int,
    num_classes: int,
    width: int = 32,
    dropout: float = 0.0,
) -> nn.Module:
    """Three blocks (3x3 convolution, batch norm, ReLU, max-pool) and a linear layer on the average.

    Args:
        channels: Input channels.
        image_size: Side of the input images, at least 8; the network does not depend on it.
        num_classes: Outputs.
        width: Channels of the first block; the others have 2 and 4 times as many.
        dropout: Probability of zeroing one of the averaged features.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([channels, width, 2 * width, 4 * width]):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]
    return he_initialised(nn.Sequential(*layers, nn.Linear(4 * width, num_classes)))


def _check_options(name: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Every option is known and a whole number where its default is one, and in range."""
    for option, value in options.items():
        if option not in defaults:
            raise SpecError(unknown(f"option of {name}", option, defaults))
        if isinstance(defaults[option], int):
            least = 0 if option == "depth" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(
                    f"{name}: {option} must be a whole number of at least {least}, not {value!r}"
                )
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise SpecError(f"{name}: {option} must be a number in [0, 1), not {value!r}")
