"""Permuting the hidden units of one network so that it lies as close as possible to another.

Two trainings find the same units in different orders; a barrier between them may be nothing but
that (Entezari et al. 2022). *Weight matching* (Ainsworth et al. 2023, section 3.2) chooses for one
layer at a time the permutation that maximises the inner product of the weights, a linear assignment
problem, until no layer changes. The permuted network computes the same function.

Supported: `nn.Sequential` (also nested) of linear layers, convolutions with one group, batch
normalisation, element-wise activations, dropout, pooling, `Flatten(1)` and `Identity`. Anything
else (residual connections, attention, grouped convolutions) raises an error: its permutations are
tied to each other in ways that a chain cannot express.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


@dataclass(frozen=True)
class Alignment:
    """The second network with its units in the order of the first one's.

    Attributes:
        model: A permuted copy of the second network: the same function.
        permutations: For every hidden layer, which unit of the second stands in each place.
        distance_before: Distance of the weights before.
        distance_after: Distance of the weights after; not larger.
        num_rounds: Passes over all layers until nothing changed.
    """

    model: nn.Module
    permutations: tuple[tuple[int, ...], ...]
    distance_before: float
    distance_after: float
    num_rounds: int


@dataclass
class _Block:
    """A layer with weights and the batch normalisations that follow it."""

    layer: nn.Linear | _ConvNd
    norms: list[_BatchNorm]


def align(
    first: nn.Module,
    second: nn.Module,
    *,
    generator: torch.Generator | None = None,
    max_rounds: int = 100,
) -> Alignment:
    """Permutes the hidden units of a copy of `second` to match `first`.

    Args:
        first: Reference; not changed.
        second: Of the same structure; not changed.
        generator: CPU generator of the order in which layers are visited; default: seed 0.
        max_rounds: At most this many passes over the layers.

    Raises:
        ValueError: A structure that is not supported, or two networks that differ.
    """
    moved = copy.deepcopy(second)
    reference, blocks = _blocks(first), _blocks(moved)
    shapes = [[tuple(block.layer.weight.shape) for block in each] for each in (reference, blocks)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the networks differ: layers {shapes[0]} and {shapes[1]}")
    generator = generator or torch.Generator().manual_seed(0)
    before = _distance(first, moved)
    orders = [torch.arange(block.layer.weight.shape[0]) for block in blocks[:-1]]
    rounds, changed = 0, True
    with torch.no_grad():
        while changed and rounds < max_rounds:
            rounds += 1
            changed = False
            for index in torch.randperm(len(orders), generator=generator).tolist():
                gain = _similarity(reference, blocks, index)
                rows, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
                new = torch.from_numpy(columns)
                stay = float(gain.diagonal().sum())
                if float(gain[rows, columns].sum()) > stay + 1e-12 * max(abs(stay), 1e-300):
                    _permute(blocks, index, new)
                    orders[index] = orders[index][new]
                    changed = True
    return Alignment(
        model=moved,
        permutations=tuple(tuple(order.tolist()) for order in orders),
        distance_before=before,
        distance_after=_distance(first, moved),
        num_rounds=rounds,
    )


def _blocks(model: nn.Module) -> list[_Block]:
    found: list[_Block] = []
    for module in _chain(model):
        if isinstance(module, nn.Linear | _ConvNd):
            if isinstance(module, _ConvTransposeNd) or getattr(module, "groups", 1) != 1:
                raise ValueError(
                    f"{module}: only convolutions with one group, not transposed, can be permuted"
                )
            if found and module.weight.shape[1] % found[-1].layer.weight.shape[0]:
                raise ValueError(f"{module}: its inputs are not the outputs of {found[-1].layer}")
            found.append(_Block(module, []))
        elif isinstance(module, _BatchNorm):
            if not found or module.num_features != found[-1].layer.weight.shape[0]:
                raise ValueError(f"{module}: batch normalisation must follow the layer it scales")
            found[-1].norms.append(module)
        elif isinstance(module, nn.Flatten) and module.start_dim != 1:
            raise ValueError(f"{module}: only Flatten(1) keeps units apart")
    if len(found) < 2:
        raise ValueError("there is no hidden layer to permute")
    return found


def _chain(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, nn.Sequential):
        return [leaf for child in model for leaf in _chain(child)]
    if isinstance(model, nn.Linear | _ConvNd | _BatchNorm) or type(model) in _ELEMENTWISE:
        return [model]
    raise ValueError(
        f"{type(model).__name__} cannot be aligned: permutations are found for nn.Sequential of "
        "linear layers, convolutions, batch normalisation, activations, pooling and Flatten only"
    )


def _similarity(reference: list[_Block], blocks: list[_Block], index: int) -> Tensor:
    """Inner products `[out, out]` of the weights in and out of each pair of units."""
    here, there = reference[index], blocks[index]
    gain = _rows(here.layer.weight) @ _rows(there.layer.weight).T
    pairs = [(here.layer.bias, there.layer.bias)]
    for norm, twin in zip(here.norms, there.norms, strict=True):
        pairs += [(norm.weight, twin.weight), (norm.bias, twin.bias)]
    for one, other in pairs:
        if one is not None and other is not None:
            gain += torch.outer(one.double(), other.double())
    num_units = len(gain)
    after = [_inputs(each[index + 1].layer.weight, num_units) for each in (reference, blocks)]
    return gain + after[0] @ after[1].T


def _rows(weight: Tensor) -> Tensor:
    return weight.detach().double().flatten(1)


def _inputs(weight: Tensor, num_units: int) -> Tensor:
    """What leaves each unit of the layer before, `[units, everything else]`.

    After a flatten the inputs of one channel stand together, so they go with their channel.
    """
    split = weight.detach().double().reshape(weight.shape[0], num_units, -1)
    return split.transpose(0, 1).flatten(1)


def _permute(blocks: list[_Block], index: int, order: Tensor) -> None:
    block, after = blocks[index], blocks[index + 1].layer
    for tensor in [block.layer.weight, block.layer.bias]:
        if tensor is not None:
            tensor.copy_(tensor[order.to(tensor.device)].clone())
    for norm in block.norms:
        for tensor in [norm.weight, norm.bias, norm.running_mean, norm.running_var]:
            if tensor is not None:
                tensor.copy_(tensor[order.to(tensor.device)].clone())
    weight = after.weight
    split = weight.reshape(weight.shape[0], len(order), -1)
    weight.copy_(split[:, order.to(weight.device)].reshape(weight.shape).clone())


def _distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return math.sqrt(sum(float((a - b).detach().double().pow(2).sum()) for a, b in pairs))
