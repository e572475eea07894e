"""Rank of the Jacobian of a layer's output with respect to a part of the input.

How many directions of a small patch of the input can still be told apart at a layer, near one
example. All in float64: in float32 the rank of a deep network's Jacobian is mostly rounding error.

The *patch* is `side x side` pixels of every channel, and a *mode* says how it becomes an input:

- `crop`: the pixels of a central window; the others keep the example's values.
- `zero_padding`: the same window, all other pixels 0.
- `strided_subsample`: pixels on a regular grid over the whole image; the others keep their values.
- `interpolate`: the image is the patch, resized bilinearly to the full size.
- `all`: every entry of the input (any shape).

The Jacobian comes column by column (`forward`, `torch.func.jvp`) or row by row (`reverse`,
`torch.func.vjp`), in vectorised chunks; `sketch` never forms it: `J Omega` with a random `Omega` of
growing width has the rank of J as soon as it is wider than that (Halko et al. 2011, section 1.3).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from llp.landscape.evaluation import Array
from llp.landscape.parameters import evaluation_state, exact_arithmetic
from llp.landscape.plain import Plain
from llp.landscape.ranks import matrix_ranks, singular_values

PatchMode = Literal["all", "crop", "zero_padding", "strided_subsample", "interpolate"]
Method = Literal["auto", "forward", "reverse", "sketch"]


@dataclass(frozen=True)
class JacobianRank(Plain):
    """Rank of a layer's partial Jacobian at one example.

    Attributes:
        layer: Name of the module, empty for the whole network.
        rank: Singular values above `tolerance`.
        effective: Exponential of their entropy; of the sketch, for `sketch`.
        num_inputs: Entries of the patch.
        num_outputs: Entries of the layer's output.
        tolerance: Absolute, `relative_tolerance` times the largest singular value.
        mode: How the patch becomes an input.
        method: `forward`, `reverse` or `sketch`.
        num_products: Products with the Jacobian or its transpose.
        seconds: Wall-clock time.
        singular_values: Falling; of the sketch, for `sketch`.
    """

    layer: str
    rank: int
    effective: float
    num_inputs: int
    num_outputs: int
    tolerance: float
    mode: str
    method: str
    num_products: int
    seconds: float
    singular_values: Array


def partial_jacobian_rank(
    model: nn.Module,
    example: Tensor,
    *,
    layer: str = "",
    mode: PatchMode = "all",
    side: int = 16,
    method: Method = "auto",
    relative_tolerance: float | None = None,
    chunk_size: int = 64,
    generator: torch.Generator | None = None,
) -> JacobianRank:
    """The rank of `d layer / d patch` at one example.

    Args:
        model: Not changed; a float64 copy in eval mode is differentiated.
        example: One input without the batch dimension; `[channels, height, width]` for the modes
            that need an image.
        layer: Name of a module; default: the network's output.
        mode: How the patch becomes an input, see above.
        side: Height and width of the patch, at most those of the image.
        method: `auto` is `forward` when the patch is not larger than the output, else `reverse`.
        relative_tolerance: What counts as zero, over the largest singular value; default
            `max(inputs, outputs) * eps` of float64, for `sketch` 1e-9.
        chunk_size: Products made at once.
        generator: CPU generator of the sketch; default: seed 0.

    Raises:
        ValueError: An unknown layer, mode or method, or a patch that does not fit.
    """
    if mode not in get_args(PatchMode) or method not in get_args(Method):
        raise ValueError(
            f"mode is one of {get_args(PatchMode)} and method one of {get_args(Method)}, "
            f"not {mode!r} and {method!r}"
        )
    started = time.perf_counter()
    found = _jacobian(model, example, layer, mode, side, method, chunk_size, generator)
    if relative_tolerance is None:
        largest = max(found.num_inputs, found.num_outputs)
        relative_tolerance = 1e-9 if found.method == "sketch" else largest * 2.0**-52
    ranks = matrix_ranks(found.values, name=layer)
    tolerance = relative_tolerance * float(ranks.singular_values[0])
    return JacobianRank(
        layer=layer,
        rank=int((ranks.singular_values > tolerance).sum()),
        effective=ranks.effective,
        num_inputs=found.num_inputs,
        num_outputs=found.num_outputs,
        tolerance=tolerance,
        mode=mode,
        method=found.method,
        num_products=found.num_products,
        seconds=time.perf_counter() - started,
        singular_values=ranks.singular_values,
    )


def partial_jacobian(
    model: nn.Module,
    example: Tensor,
    *,
    layer: str = "",
    mode: PatchMode = "all",
    side: int = 16,
    chunk_size: int = 64,
) -> Tensor:
    """The Jacobian itself `[outputs, patch entries]` in float64; see `partial_jacobian_rank`."""
    return _jacobian(model, example, layer, mode, side, "auto", chunk_size, None).values


@dataclass
class _Found:
    """A Jacobian `[outputs, inputs]`, or a sketch of it `[outputs, width]`."""

    values: Tensor
    num_inputs: int
    num_outputs: int
    method: str
    num_products: int


def _jacobian(
    model: nn.Module,
    example: Tensor,
    layer: str,
    mode: PatchMode,
    side: int,
    method: Method,
    chunk_size: int,
    generator: torch.Generator | None,
) -> _Found:
    twin = copy.deepcopy(model).double().eval().requires_grad_(False)
    point = example.detach().double().to(_device(twin, example))
    patch, embed = _patch(point, mode, side)

    def of(flat: Tensor) -> Tensor:
        return _output(twin, embed(flat.reshape(patch.shape))[None], layer).reshape(-1)

    with evaluation_state(twin), exact_arithmetic(point.device):
        start = patch.reshape(-1)
        num_outputs, num_inputs = len(of(start)), len(start)
        if method == "auto":
            method = "forward" if num_inputs <= num_outputs else "reverse"
        if method == "sketch":
            matrix, products = _sketch(of, start, num_outputs, chunk_size, generator)
        else:
            matrix, products = _full(of, start, num_outputs, method, chunk_size)
    return _Found(matrix, num_inputs, num_outputs, method, products)


class _ReachedError(Exception):
    """Ends a forward pass at the layer that was asked for."""


def _output(model: nn.Module, inputs: Tensor, layer: str) -> Tensor:
    if not layer:
        whole: Tensor = model(inputs)
        return whole
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f"no module is called {layer!r}; there are {sorted(modules)[1:]}")
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found.append(output)
        raise _ReachedError

    handle = modules[layer].register_forward_hook(keep)
    try:
        model(inputs)
    except _ReachedError:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(f"{layer} was not called by the model")


def _patch(point: Tensor, mode: PatchMode, side: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The patch at the example, and the map from a patch to an input."""
    if mode == "all":
        return point, lambda patch: patch
    if point.ndim != 3 or side < 1 or side > min(point.shape[1:]):
        raise ValueError(
            f"mode {mode!r} needs an example [channels, height, width] that holds {side} x {side} "
            f"pixels, not shape {tuple(point.shape)}"
        )
    height, width = point.shape[1:]
    if mode == "interpolate":
        small = functional.interpolate(
            point[None], (side, side), mode="bilinear", align_corners=False
        )[0]

        def resize(patch: Tensor) -> Tensor:
            return functional.interpolate(
                patch[None], (height, width), mode="bilinear", align_corners=False
            )[0]

        return small, resize
    if mode == "strided_subsample":
        rows = torch.arange(side, device=point.device) * height // side
        columns = torch.arange(side, device=point.device) * width // side
    else:
        rows = torch.arange(side, device=point.device) + (height - side) // 2
        columns = torch.arange(side, device=point.device) + (width - side) // 2
    places = (torch.arange(len(point), device=point.device)[:, None, None], rows[:, None], columns)
    rest = torch.zeros_like(point) if mode == "zero_padding" else point

    def place(patch: Tensor) -> Tensor:
        return rest.index_put(places, patch)

    return point[places], place


def _full(
    of: Callable[[Tensor], Tensor], start: Tensor, num_outputs: int, method: str, chunk_size: int
) -> tuple[Tensor, int]:
    """The Jacobian `[outputs, inputs]` and the number of products."""
    if method == "forward":
        count = len(start)
        columns = [
            _directional(of, start, _unit(start, first, min(chunk_size, count - first)))
            for first in range(0, count, chunk_size)
        ]
        return torch.cat(columns).T, count
    pull = torch.func.vjp(of, start)[1]
    like = start.new_zeros(num_outputs)
    rows = []
    for first in range(0, num_outputs, chunk_size):
        units = _unit(like, first, min(chunk_size, num_outputs - first))
        rows.append(torch.func.vmap(pull)(units)[0])
    return torch.cat(rows), num_outputs


def _sketch(
    of: Callable[[Tensor], Tensor],
    start: Tensor,
    num_outputs: int,
    chunk_size: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, int]:
    """`J Omega`, its width doubled until it is wider than its rank or as wide as J."""
    generator = generator or torch.Generator().manual_seed(0)
    limit = min(len(start), num_outputs)
    parts: list[Tensor] = []
    width = 0
    while True:
        wanted = min(max(32, 2 * width), limit + 8)
        draws = torch.randn(wanted - width, len(start), generator=generator, dtype=torch.float64)
        for chunk in torch.split(draws.to(start), chunk_size):
            parts.append(_directional(of, start, chunk / math.sqrt(len(start))))
        width = wanted
        values = singular_values(torch.cat(parts))
        if width > limit or (len(values) and values[-1] <= 1e-9 * values[0]):
            return torch.cat(parts).T, width


def _directional(of: Callable[[Tensor], Tensor], start: Tensor, directions: Tensor) -> Tensor:
    """Derivatives `[k, outputs]` along `directions` `[k, inputs]`."""

    def push(direction: Tensor) -> Tensor:
        derivative: Tensor = torch.func.jvp(of, (start,), (direction,))[1]
        return derivative

    pushed: Tensor = torch.func.vmap(push)(directions)
    return pushed


def _unit(like: Tensor, first: int, count: int) -> Tensor:
    """Unit vectors number `first` to `first + count`."""
    rows = like.new_zeros(count, like.numel())
    rows[torch.arange(count), first + torch.arange(count)] = 1.0
    return rows


def _device(model: nn.Module, example: Tensor) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), example.device)
