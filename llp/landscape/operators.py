"""What a curvature matrix looks like from outside: products, counters, blocks.

A `Curvature` is a symmetric `[P, P]` matrix that is never formed: `op @ v` with a flat vector `[P]`
or a block `[P, K]` in the order of `model.parameters()`. It is a sum over batches of per-batch
matrices, weighted by batch size, at the weights that the model has when a product is made.
How the products are made is in `products` (one device) and `devices` (several).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llp.landscape.blocks import BlockDiagonal, Blocks, BlockView, grouped
from llp.landscape.engines import Plan
from llp.landscape.parameters import Selection, selected


class Curvature:
    """A curvature matrix; use `op @ v` with `[P]` or `[P, K]`.

    Attributes:
        model: The network.
        named: The parameters that are looked at, by name, in the order of the flat vector.
        names: Their names.
        shape: `(P, P)`.
        dtype: Of the parameters and of every product.
        device: Of the parameters and of every product.
        num_products: Products so far; each column of a block counts.
        num_gradients: Passes over all data that built a graph or, by forward-over-reverse, the
            gradient that is differentiated.
        num_forwards: Passes over all data that computed the loss or the outputs alone.
    """

    def __init__(self, model: nn.Module, parameters: Selection = None) -> None:
        self.model = unwrapped(model)
        self.named = selected(self.model, parameters)
        self.names = tuple(self.named)
        self.parameters: list[nn.Parameter] = list(self.named.values())
        size = sum(parameter.numel() for parameter in self.parameters)
        self.shape = (size, size)
        self.dtype = self.parameters[0].dtype
        self.device = self.parameters[0].device
        self.num_products = 0
        self.num_gradients = 0
        self.num_forwards = 0

    @property
    def num_examples(self) -> int:
        """Examples in `batches`, of all processes."""
        raise NotImplementedError

    @property
    def plan(self) -> Plan | None:
        """What was decided; None before the first product."""
        raise NotImplementedError

    @property
    def gradient_equivalents(self) -> float:
        """Cost so far in gradients: a graph counts 1, a product 2, a forward pass 1/3."""
        return self.num_gradients + 2.0 * self.num_products + self.num_forwards / 3

    def __matmul__(self, vectors: Tensor | NDArray[Any]) -> Tensor:
        """The product with `vectors` `[P]` or `[P, K]`, in the parameters' dtype, same shape.

        An array of numpy is converted; the product is a tensor all the same.
        """
        if isinstance(vectors, np.ndarray):
            vectors = torch.tensor(vectors)
        if not isinstance(vectors, Tensor):
            raise TypeError(f"a vector is a tensor or an array, not {type(vectors).__name__}")
        return self.multiply(vectors, range(len(self.parameters)))

    def multiply(self, vectors: Tensor, slots: Sequence[int]) -> Tensor:
        """The product of the diagonal block of the parameters `slots` (numbers into `names`).

        Raises:
            ValueError: `vectors` does not have the block's length.
        """
        size = sum(self.parameters[slot].numel() for slot in slots)
        if vectors.ndim not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(
                f"expected a vector [{size}] or a block [{size}, K], "
                f"not shape {tuple(vectors.shape)}"
            )
        rows = vectors.detach().to(device=self.device, dtype=self.dtype)
        rows = rows[None] if vectors.ndim == 1 else rows.T.contiguous()
        if len(rows) == 0:
            return rows.T
        with self.session():
            product = self.product(rows, tuple(slots))
        self.num_products += len(rows)
        return product[0] if vectors.ndim == 1 else product.T

    def product(self, rows: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Products `[K, Q]` with the rows `[K, Q]`, inside a session; a subclass says how."""
        raise NotImplementedError

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Holds the evaluation state over several products, so that it is saved only once."""
        raise NotImplementedError

    def hint(self) -> Tensor:
        """The gradient of the loss `[P]`: a vector that lies largely along the outliers."""
        raise NotImplementedError

    def release(self) -> None:
        """Frees what is kept between products; the next product builds it again."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        """Entries of the flat vector by parameter name, in order."""
        return {name: parameter.numel() for name, parameter in self.named.items()}

    def block(self, parameters: Selection) -> BlockView:
        """The diagonal block of some of the parameters, as an operator that shares the graphs.

        Raises:
            ValueError: None of them is among the operator's parameters.
        """
        chosen = {id(parameter) for parameter in selected(self.model, parameters).values()}
        slots = [i for i, parameter in enumerate(self.parameters) if id(parameter) in chosen]
        if not slots:
            raise ValueError("none of these parameters belongs to the operator")
        return BlockView(self, slots)

    def layers(self, by: Blocks = "layer") -> dict[str, BlockView]:
        """The diagonal blocks, by name: one for each `layer` (module) or each `parameter`."""
        return {name: BlockView(self, slots) for name, slots in grouped(self.names, by).items()}

    def block_diagonal(self, by: Blocks = "layer") -> BlockDiagonal:
        """The matrix without the entries between different blocks."""
        return BlockDiagonal(self, grouped(self.names, by))


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `DistributedDataParallel`, `DataParallel` or `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def stamp(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter or buffer is replaced or written to in place."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def row_of(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """`parts` as one vector, zeros where there is none."""
    return torch.cat(
        [
            (torch.zeros_like(parameter) if part is None else part).detach().reshape(-1)
            for part, parameter in zip(parts, like, strict=True)
        ]
    )
