"""Giving a direction in weight space the scales of the weights, and leaving parts of it out.

A direction's effect depends on how large the weights are that it moves, and a ReLU network's layers
can be rescaled without changing its function. *Filter normalisation* (Li et al. 2018, section 4)
gives every filter of the direction the norm of the same filter of the weights: `d_f |w_f| / |d_f|`.
A *filter* is what makes one output: a row of a linear layer, an output channel of a convolution. A
one-dimensional parameter (bias, scale) is one group as a whole; one group per element would turn
every bias direction into exactly +-|b|.

`weight` scales every entry by its weight's size, `filter`, `layer` (one parameter tensor) and
`model` give each group the weights' norm, `none` changes nothing. A group of zero weights gets a
zero direction, and so does a group in which the direction is zero.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from llp.landscape.parameters import flatten, trainable, unflatten

Normalization = Literal["none", "weight", "filter", "layer", "model"]

NORMALIZATION_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation of any dimension
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def normalized(
    model: nn.Module, vector: Tensor, normalization: Normalization, order: int = 2
) -> Tensor:
    """A flat direction `[P]` with the scales of the model's weights.

    Args:
        model: Its trainable parameters give the scales.
        vector: The direction; not changed.
        normalization: `none`, `weight`, `filter`, `layer` or `model`.
        order: Norm of a group: 1 (sum of sizes) or 2 (Euclidean).

    Raises:
        ValueError: An unknown normalisation or order.
    """
    if normalization not in get_args(Normalization):
        raise ValueError(
            f"normalization must be one of {get_args(Normalization)}, not {normalization!r}"
        )
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, not {order}")
    parameters = trainable(model)
    if normalization == "none":
        return vector.clone()
    weights = flatten(parameters)
    if normalization == "weight":
        return vector * weights.abs()
    pairs = zip(
        groups(model, weights, normalization), groups(model, vector, normalization), strict=True
    )
    scaled = [direction * _scale(weight, direction, order) for weight, direction in pairs]
    return ungrouped(model, scaled, normalization)


def groups(model: nn.Module, vector: Tensor, normalization: Normalization) -> list[Tensor]:
    """A flat vector `[P]` as matrices whose rows are the groups of a normalisation.

    One matrix `[filters, entries]` for each parameter for `filter`, `[1, entries]` for `layer`, and
    one `[1, P]` for all others.
    """
    if normalization not in ("filter", "layer"):
        return [vector[None]]
    parameters = trainable(model)
    parts = unflatten(vector, parameters)
    if normalization == "layer":
        return [part.reshape(1, -1) for part in parts]
    owners = _owners(model)
    return [
        _as_filters(owners[parameter][0], part)
        for parameter, part in zip(parameters, parts, strict=True)
    ]


def ungrouped(model: nn.Module, matrices: Sequence[Tensor], normalization: Normalization) -> Tensor:
    """The flat vector `[P]` of which these are the `groups`."""
    if normalization != "filter":
        return flatten(list(matrices))
    owners = _owners(model)
    return flatten(
        [
            _from_filters(owners[parameter][0], matrix, parameter)
            for parameter, matrix in zip(trainable(model), matrices, strict=True)
        ]
    )


def filter_norms(model: nn.Module, vector: Tensor, order: int = 2) -> list[Tensor]:
    """The norms of the filters of a flat vector `[P]`, one tensor for each parameter."""
    matrices = groups(model, vector, "filter")
    return [torch.linalg.vector_norm(matrix, order, 1) for matrix in matrices]


def moving(
    model: nn.Module,
    *,
    exclude_normalization: bool = True,
    exclude_bias: bool = True,
    frozen: Sequence[str] = (),
    normalization_layers: Iterable[type[nn.Module]] = NORMALIZATION_LAYERS,
) -> Tensor:
    """Which entries of a flat direction may move: a mask `[P]` of 0 and 1.

    Normalisation layers are known by their type, so one inside `downsample.1` is found too. A bias
    is what a module holds as `bias` (or `in_proj_bias`, `bias_ih_l0`, ...).

    Args:
        model: Its trainable parameters.
        exclude_normalization: Scale and shift of normalisation layers stay.
        exclude_bias: Biases stay.
        frozen: Parameter names, patterns with `*`, or names of modules, that stay.
        normalization_layers: Types that count as normalisation, for your own ones.

    Raises:
        ValueError: A frozen name that no trainable parameter has, or nothing is left that moves.
    """
    types = tuple(normalization_layers)
    parameters, owners = trainable(model), _owners(model)
    stays: list[bool] = []
    hits: set[str] = set()
    for parameter in parameters:
        module, held, name = owners[parameter]
        matched = [
            pattern
            for pattern in frozen
            if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        ]
        hits.update(matched)
        stays.append(
            bool(matched)
            or (exclude_normalization and isinstance(module, types))
            or (exclude_bias and held.replace("in_proj_", "").startswith("bias"))
        )
    unknown = [pattern for pattern in frozen if pattern not in hits]
    if unknown:
        names = [owners[parameter][2] for parameter in parameters]
        raise ValueError(f"no trainable parameter is called {unknown[0]!r}; there are {names}")
    if all(stays):
        raise ValueError("no parameter is left that a direction may move; exclude or freeze less")
    return flatten(
        [
            torch.full_like(parameter, 0.0 if stay else 1.0)
            for parameter, stay in zip(parameters, stays, strict=True)
        ]
    )


def _owners(model: nn.Module) -> dict[nn.Parameter, tuple[nn.Module, str, str]]:
    """Each parameter's first module, its name there, and its full name."""
    found: dict[nn.Parameter, tuple[nn.Module, str, str]] = {}
    for path, module in model.named_modules():
        for held, parameter in module._parameters.items():
            if parameter is not None and parameter not in found:
                found[parameter] = (module, held, f"{path}.{held}" if path else held)
    return found


def _as_filters(owner: nn.Module, tensor: Tensor) -> Tensor:
    """The filters of a parameter as rows `[filters, entries]`; one row if it has one dimension."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    if isinstance(owner, _ConvTransposeNd):
        # [in, out / groups, ...]: the inputs of an output are those of its group
        split = tensor.reshape(owner.groups, -1, *tensor.shape[1:])
        return split.movedim(2, 1).flatten(0, 1).flatten(1)
    return tensor.flatten(1)


def _from_filters(owner: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
    """The parameter of which these are the filters, shaped as `like`."""
    if like.ndim >= 2 and isinstance(owner, _ConvTransposeNd):
        split = rows.reshape(owner.groups, like.shape[1], -1, *like.shape[2:])
        return split.movedim(1, 2).reshape(like.shape)
    return rows.reshape(like.shape)


def _scale(weights: Tensor, direction: Tensor, order: int) -> Tensor:
    """`|w| / |d|` for every row `[rows, 1]`, 0 where one of them is 0."""
    wanted = torch.linalg.vector_norm(weights, order, 1, keepdim=True)
    present = torch.linalg.vector_norm(direction, order, 1, keepdim=True)
    return torch.where(present > 0, wanted / present.where(present > 0, 1.0), 0.0)
