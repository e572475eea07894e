"""Residual networks for small images: ResNet-20, ResNet-18/34/50 and wide residual networks.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2 for ResNet-20 and
table 1 for the deeper ones, whose stem is a 3x3 convolution of stride 1 without max-pool here, as
is usual at 32x32. Zagoruyko & Komodakis, "Wide Residual Networks" (BMVC 2016), section 2.
Parameter counts for 3x32x32 and 10 classes: ResNet-20 269,722 (shortcuts without parameters,
option A), ResNet-18 11,173,962, ResNet-34 21,282,122, ResNet-50 23,520,842, WRN-16-4 2,748,890.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

from llp.errors import SpecError
from llp.workloads.layers import he_initialised


def resnet20(*, channels: int, image_size: int, num_classes: int, width: int = 16) -> nn.Module:
    """ResNet-20: three stages of three blocks with `width`, 2 and 4 times as many channels.

    Where a stage begins, the shortcut takes every second pixel and pads the missing channels with
    zeros (option A of section 4.2), so shortcuts have no parameters.

    Args:
        channels: Input channels.
        image_size: Side of the input images, at least 8; the network does not depend on it.
        num_classes: Outputs.
        width: Channels of the first stage.
    """
    blocks: list[nn.Module] = []
    previous = width
    for stage in range(3):
        planes = width * 2**stage
        for index in range(3):
            stride = 2 if stage > 0 and index == 0 else 1
            shortcut = _Subsample(planes - previous) if stride == 2 else None
            blocks.append(BasicBlock(previous, planes, stride, shortcut))
            previous = planes
    return he_initialised(
        nn.Sequential(*_stem(channels, width), *blocks, *_head(previous, num_classes))
    )


def resnet18(*, channels: int, image_size: int, num_classes: int, width: int = 64) -> nn.Module:
    """ResNet-18 with the 32x32 stem: basic blocks (2, 2, 2, 2).

    Args:
        channels: Input channels.
        image_size: Side of the input images, at least 8; the network does not depend on it.
        num_classes: Outputs.
        width: Channels of the first stage; the others have 2, 4 and 8 times as many.
    """
    return _resnet(BasicBlock, (2, 2, 2, 2), channels, num_classes, width)


def resnet34(*, channels: int, image_size: int, num_classes: int, width: int = 64) -> nn.Module:
    """ResNet-34 with the 32x32 stem: basic blocks (3, 4, 6, 3).

    Args:
        channels: Input channels.
        image_size: Side of the input images, at least 8; the network does not depend on it.
        num_classes: Outputs.
        width: Channels of the first stage; the others have 2, 4 and 8 times as many.
    """
    return _resnet(BasicBlock, (3, 4, 6, 3), channels, num_classes, width)


def resnet50(*, channels: int, image_size: int, num_classes: int, width: int = 64) -> nn.Module:
    """ResNet-50 with the 32x32 stem: bottleneck blocks (3, 4, 6, 3), their outputs 4 times wider.

    Args:
        channels: Input channels.
        image_size: Side of the input images, at least 8; the network does not depend on it.
        num_classes: Outputs.
        width: Inner channels of the first stage; the others have 2, 4 and 8 times as many.
    """
    return _resnet(Bottleneck, (3, 4, 6, 3), channels, num_classes, width)


def wide_resnet(
    *,
    channels: int,
    image_size: int,
    num_classes: int,
    depth: int = 16,
    widen_factor: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """WRN-depth-widen_factor: three stages of pre-activation blocks, (depth - 4) / 6 in each.

    Args:
        channels: Input channels.
        image_size: Side of the input images, at least 8; the network does not depend on it.
        num_classes: Outputs.
        depth: 6 n + 4 layers: 10, 16, 22, 28, 40, ...
        widen_factor: The stages have 16, 32 and 64 times as many channels.
        dropout: Between the two convolutions of a block.

    Raises:
        SpecError: `depth` is not of the form 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise SpecError(f"wide_resnet: depth must be 10, 16, 22, 28, 34, 40, ..., not {depth}")
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
    previous = 16
    for stage in range(3):
        planes = 16 * widen_factor * 2**stage
        for index in range((depth - 4) // 6):
            layers.append(_Wide(previous, planes, 2 if stage > 0 and index == 0 else 1, dropout))
            previous = planes
    layers += [nn.BatchNorm2d(previous), nn.ReLU(inplace=True), *_head(previous, num_classes)]
    return he_initialised(nn.Sequential(*layers))


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    depths: tuple[int, ...],
    channels: int,
    num_classes: int,
    width: int,
) -> nn.Module:
    blocks: list[nn.Module] = []
    previous = width
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            after = planes * block.expansion
            shortcut = None
            if stride == 2 or previous != after:
                projection = nn.Conv2d(previous, after, 1, stride=stride, bias=False)
                shortcut = nn.Sequential(projection, nn.BatchNorm2d(after))
            blocks.append(block(previous, planes, stride, shortcut))
            previous = after
    return he_initialised(
        nn.Sequential(*_stem(channels, width), *blocks, *_head(previous, num_classes))
    )


def _stem(channels: int, width: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


def _head(features: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, num_classes)]


class _Subsample(nn.Module):
    """Every second pixel, and `extra` channels of zeros."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        half = self.extra // 2
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.extra - half))


class _Wide(nn.Module):
    """Batch norm, ReLU, 3x3, batch norm, ReLU, dropout, 3x3; 1x1 shortcut to a new width."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )
        self.shortcut = (
            nn.Conv2d(before, after, 1, stride=stride, bias=False) if before != after else None
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        skipped = x if self.shortcut is None else self.shortcut(activated)
        total: Tensor = skipped + self.residual(activated)
        return total
