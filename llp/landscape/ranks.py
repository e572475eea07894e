"""Ranks of weight matrices and of layers' features, all from one singular value decomposition each.

With singular values `s_1 >= s_2 >= ...` and shares `p_i = s_i / sum s`:

- *matrix*: values above `max(m, n) eps s_1`, the rounding error of the dtype.
- *numerical*: values of at least `.01 s_1`.
- *effective*: `exp(-sum p ln p)` (Roy and Vetterli 2007).
- *approximate*: how many of the largest hold 99 % of `sum s^2` (Yang et al. 2020).
- *l1*: how many of the largest hold 99 % of `sum s`.
- *stable*: `sum s^2 / s_1^2` (Rudelson and Vershynin 2007).
- *nuclear*: `sum s`.
- *gini*: Gini coefficient of the values: 0 when all are equal, towards 1 when one holds everything.

A matrix of zeros has all ranks 0 and gini 0. Features are measured in the model's dtype, decomposed
in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from llp.landscape.evaluation import Array
from llp.landscape.normalization import NORMALIZATION_LAYERS
from llp.landscape.parameters import evaluation_state, exact_arithmetic, trainable
from llp.landscape.passes import Batches, iterate
from llp.landscape.plain import Plain

NUMERICAL_TOLERANCE = 0.01
ENERGY = 0.99

Spatial = Literal["flatten", "channels", "mean"]


@dataclass(frozen=True)
class Ranks(Plain):
    """Ranks of one matrix.

    Attributes:
        name: Of the layer.
        matrix: Singular values above rounding error.
        numerical: Singular values of at least 1 % of the largest.
        effective: Exponential of the entropy of their shares.
        approximate: Largest values that hold 99 % of the squares.
        l1: Largest values that hold 99 % of the sum.
        stable: Sum of squares over the largest square.
        nuclear: Sum of the singular values.
        gini: Gini coefficient of the values.
        num_rows: Rows of the matrix.
        num_columns: Columns of the matrix.
        tolerance: What `matrix` counts from.
        singular_values: Falling `[min(rows, columns)]`, float64.
    """

    name: str
    matrix: int
    numerical: int
    effective: float
    approximate: int
    l1: int
    stable: float
    nuclear: float
    gini: float
    num_rows: int
    num_columns: int
    tolerance: float
    singular_values: Array


@dataclass(frozen=True)
class RankDynamics(Plain):
    """How a rank falls from layer to layer; layers count from 0.

    Attributes:
        measure: Which rank.
        ranks: Of every layer in order `[L]`.
        drops: Fall from each layer to the next, rises counting as 0 `[L - 1]`.
        drop_gini: Gini coefficient of the drops: 0 for an even fall, towards 1 for a single cliff.
        drop_centroid: `sum i drop_i / sum drop_i` with i from 1: around which layer the rank is
            lost; NaN when it never falls.
        rank_centroid: `sum i r_i / sum r_i` with i from 0: around which layer the rank is.
        area: Trapezoidal area under the ranks over that of a constant rank `reference`.
        reference: The largest rank the first layer can have, or the first layer's own.
    """

    measure: str
    ranks: Array
    drops: Array
    drop_gini: float
    drop_centroid: float
    rank_centroid: float
    area: float
    reference: float


def matrix_ranks(
    matrix: Tensor, *, name: str = "", numerical_tolerance: float = NUMERICAL_TOLERANCE
) -> Ranks:
    """All ranks of one matrix `[m, n]` from one decomposition in float64.

    The tolerance of `matrix` is that of the dtype the matrix came in.

    Raises:
        ValueError: Not a matrix, empty, or with entries that are not finite.

    >>> round(matrix_ranks(torch.eye(3)).effective, 9)
    3.0
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name or 'matrix'}: expected a matrix, not shape {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name or 'matrix'}: has entries that are not finite")
    values = singular_values(matrix)
    epsilon = torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 2.0**-52
    tolerance = max(matrix.shape) * epsilon * float(values[0])
    total, squares = float(values.sum()), values**2
    shares = values[values > 0] / total if total else values[:0]
    return Ranks(
        name=name,
        matrix=int((values > tolerance).sum()),
        numerical=int((values >= numerical_tolerance * values[0]).sum()) if total else 0,
        effective=float(np.exp(-(shares * np.log(shares)).sum())) if total else 0.0,
        approximate=_holding(squares, ENERGY),
        l1=_holding(values, ENERGY),
        stable=float(squares.sum() / squares[0]) if total else 0.0,
        nuclear=total,
        gini=gini(values),
        num_rows=matrix.shape[0],
        num_columns=matrix.shape[1],
        tolerance=tolerance,
        singular_values=values,
    )


def singular_values(matrix: Tensor) -> Array:
    """Singular values of `[m, n]` in float64, falling."""
    values: Array = torch.linalg.svdvals(matrix.detach().double()).cpu().numpy()
    return values


def weight_ranks(model: nn.Module) -> tuple[Ranks, ...]:
    """Ranks of every weight of two or more dimensions, as `[out, everything else]`, in order.

    Normalisation layers are left out; tied weights count once, frozen ones too.
    """
    found, seen = [], set()
    for path, module in model.named_modules():
        if isinstance(module, NORMALIZATION_LAYERS):
            continue
        for held, parameter in module._parameters.items():
            if parameter is None or parameter.ndim < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{held}" if path else held
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            matrix = parameter.transpose(0, 1) if transposed else parameter
            found.append(matrix_ranks(matrix.flatten(1), name=name))
    return tuple(found)


def feature_ranks(
    model: nn.Module,
    batches: Batches,
    *,
    layers: Sequence[str] | None = None,
    spatial: Spatial = "flatten",
    max_rows: int = 4096,
) -> tuple[Ranks, ...]:
    """Ranks of the features `[examples, units]` that layers give out, in the order of the modules.

    Args:
        model: Left bit-identical; runs in eval mode.
        batches: Re-iterable of `(inputs, targets)`; read until there are enough rows.
        layers: Names of modules; default: all linear layers and convolutions.
        spatial: What becomes of positions: `flatten` makes each a unit, `channels` makes each an
            example, `mean` averages over them.
        max_rows: Examples used at most, the first ones.

    Raises:
        ValueError: An unknown layer, or one that gives out no tensor.
    """
    names = list(layers) if layers is not None else _default_layers(model)
    features = collect_features(model, batches, names, spatial=spatial, max_rows=max_rows)
    return tuple(matrix_ranks(features[name], name=name) for name in names)


def collect_features(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[str],
    *,
    spatial: Spatial = "flatten",
    max_rows: int = 4096,
) -> dict[str, Tensor]:
    """The outputs of named modules as matrices `[rows, units]`, in the order of the examples."""
    if spatial not in ("flatten", "channels", "mean"):
        raise ValueError(f"spatial must be flatten, channels or mean, not {spatial!r}")
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules:
            raise ValueError(f"no module is called {name!r}; there are {sorted(modules)[1:]}")
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if not isinstance(output, Tensor) or output.ndim < 2:
                raise ValueError(f"{name} gives out no tensor [examples, units, ...]")
            features = output.detach()
            if isinstance(modules[name], nn.Linear) and features.ndim > 2:
                features = features.movedim(-1, 1)  # [examples, tokens, units]
            kept[name].append(_as_rows(features, spatial))

        return modules[name].register_forward_hook(hook)

    handles = [keep(name) for name in layers]
    try:
        device = trainable(model)[0].device
        with evaluation_state(model), exact_arithmetic(device), torch.no_grad():
            for inputs, _, _ in iterate(batches, device):
                model(inputs)
                if all(sum(map(len, parts)) >= max_rows for parts in kept.values()):
                    break
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    silent = [name for name, parts in kept.items() if not parts]
    if silent:
        raise ValueError(f"{silent[0]} was not called by the model")
    return {name: torch.cat(parts)[:max_rows] for name, parts in kept.items()}


def rank_dynamics(
    ranks: Sequence[Ranks] | Sequence[float],
    measure: str = "effective",
    *,
    reference: float | None = None,
) -> RankDynamics:
    """How a rank falls over depth.

    Args:
        ranks: Of the layers from first to last, at least 2, or the numbers themselves.
        measure: Which field of `Ranks` to follow.
        reference: What a lossless network would keep; default: the first layer's largest possible
            rank, or the first number.

    Raises:
        ValueError: Fewer than two layers, or a reference that is not above 0.
    """
    values = np.asarray(
        [float(getattr(each, measure)) if isinstance(each, Ranks) else each for each in ranks],
        dtype=np.float64,
    )
    if len(values) < 2:
        raise ValueError(f"rank dynamics need at least 2 layers, not {len(values)}")
    if reference is None:
        first = ranks[0]
        reference = float(values[0])
        if isinstance(first, Ranks):
            reference = float(min(first.num_rows, first.num_columns))
    if not reference > 0:
        raise ValueError(f"reference must be above 0, not {reference:g}")
    drops = np.maximum(values[:-1] - values[1:], 0.0)
    positions = np.arange(len(values), dtype=np.float64)
    total = float(drops.sum())
    return RankDynamics(
        measure=measure,
        ranks=values,
        drops=drops,
        drop_gini=gini(drops),
        drop_centroid=float(positions[1:] @ drops / total) if total else float("nan"),
        rank_centroid=float(positions @ values / values.sum()) if values.sum() else float("nan"),
        area=float(np.trapezoid(values) / (reference * (len(values) - 1))),
        reference=float(reference),
    )


def gini(values: Array) -> float:
    """Gini coefficient of values that are not negative; 0 for no or only zero values.

    `(n + 1 - 2 sum_i C_i / C_n) / n` with the cumulative sums `C` of the rising values.

    >>> gini(np.array([0.0, 0.0, 0.0, 1.0]))
    0.75
    """
    rising = np.sort(np.asarray(values, dtype=np.float64))
    total = float(rising.sum())
    if not len(rising) or not total:
        return 0.0
    count = len(rising)
    return float((count + 1 - 2 * np.cumsum(rising).sum() / total) / count)


def by_name(ranks: Sequence[Ranks]) -> Mapping[str, Ranks]:
    """The same by layer name."""
    return {each.name: each for each in ranks}


def _default_layers(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) and name]
    if not names:
        raise ValueError("there is no linear layer or convolution; name the layers")
    return names


def _as_rows(output: Tensor, spatial: Spatial) -> Tensor:
    if output.ndim == 2:
        return output
    if spatial == "flatten":
        return output.flatten(1)
    channels = output.flatten(2)
    if spatial == "mean":
        return channels.mean(2)
    return channels.transpose(1, 2).reshape(-1, channels.shape[1])


def _holding(parts: Array, share: float) -> int:
    """How many of the first parts hold `share` of their sum."""
    total = float(parts.sum())
    if not total:
        return 0
    return int(np.searchsorted(np.cumsum(parts), share * total * (1 - 1e-12)) + 1)
