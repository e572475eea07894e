"""Diagonal blocks of a curvature matrix: one layer's own curvature, and all of them side by side.

A block's product costs less than the whole matrix's, because only its own parameters are
differentiated with respect to; the graphs are those of the whole operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llp.landscape.operators import Curvature

Blocks = Literal["layer", "parameter"] | Callable[[str], str]
"""How parameters are grouped: by owning module, one by one, or by a function of their name."""


def grouped(names: Sequence[str], by: Blocks) -> dict[str, list[int]]:
    """The numbers of the names in each group, groups in the order of their first name.

    >>> grouped(["0.weight", "0.bias", "2.weight"], "layer")
    {'0': [0, 1], '2': [2]}
    """
    if by not in ("layer", "parameter") and not callable(by):
        raise ValueError(f"by must be 'layer', 'parameter' or a function of a name, not {by!r}")
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        if callable(by):
            group = by(name)
        elif by == "layer":
            group = name.rpartition(".")[0]
        else:
            group = name
        groups.setdefault(group, []).append(number)
    return groups


class BlockView:
    """The block of some parameters, `[Q, Q]`; products are counted here and in the whole operator.

    Attributes:
        shape: `(Q, Q)`.
        dtype: Of the parameters.
        device: Of the parameters.
        names: Of its parameters.
        num_products: Products of this block so far.
    """

    def __init__(self, whole: Curvature, slots: Sequence[int]) -> None:
        self._whole = whole
        self._slots = tuple(slots)
        counts = list(whole.sizes().values())
        size = sum(counts[slot] for slot in slots)
        self.shape = (size, size)
        self.dtype, self.device = whole.dtype, whole.device
        self.names = tuple(whole.names[slot] for slot in slots)
        self.num_products = 0

    @property
    def num_examples(self) -> int:
        """Examples the curvature is taken over."""
        return self._whole.num_examples

    @property
    def num_gradients(self) -> int:
        """Of the whole operator, whose graphs are shared."""
        return self._whole.num_gradients

    @property
    def num_forwards(self) -> int:
        """Of the whole operator."""
        return self._whole.num_forwards

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with `[Q]` or `[Q, K]`."""
        result = self._whole.multiply(vectors, self._slots)
        self.num_products += 1 if vectors.ndim == 1 else vectors.shape[1]
        return result

    def hint(self) -> Tensor:
        """The gradient with respect to the block's parameters `[Q]`."""
        parts = torch.split(self._whole.hint(), list(self._whole.sizes().values()))
        return torch.cat([parts[slot] for slot in self._slots])

    def session(self) -> contextlib.AbstractContextManager[None]:
        """The evaluation state of the whole operator."""
        return self._whole.session()


class BlockDiagonal:
    """The diagonal blocks of a matrix, zeros elsewhere; `[P, P]`.

    A product takes one product of every block, and that many are counted.

    Attributes:
        shape: `(P, P)`.
        dtype: Of the parameters.
        device: Of the parameters.
        blocks: The blocks by name.
        num_products: Products of blocks so far.
    """

    def __init__(self, whole: Curvature, groups: Mapping[str, Sequence[int]]) -> None:
        self._whole = whole
        self.shape, self.dtype, self.device = whole.shape, whole.dtype, whole.device
        self.blocks = {name: BlockView(whole, slots) for name, slots in groups.items()}
        ends = torch.tensor([0, *whole.sizes().values()]).cumsum(0).tolist()
        self._entries = {
            name: [slice(ends[slot], ends[slot + 1]) for slot in slots]
            for name, slots in groups.items()
        }

    @property
    def num_products(self) -> int:
        """Products of blocks so far."""
        return sum(block.num_products for block in self.blocks.values())

    @property
    def num_examples(self) -> int:
        """Examples the curvature is taken over."""
        return self._whole.num_examples

    @property
    def num_gradients(self) -> int:
        """Of the whole operator, whose graphs are shared."""
        return self._whole.num_gradients

    @property
    def num_forwards(self) -> int:
        """Of the whole operator."""
        return self._whole.num_forwards

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with `[P]` or `[P, K]`."""
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.shape[0]:
            raise ValueError(
                f"expected a vector [{self.shape[0]}] or a block [{self.shape[0]}, K], "
                f"not shape {tuple(vectors.shape)}"
            )
        result = torch.empty(vectors.shape, dtype=self.dtype, device=self.device)
        with self.session():
            for name, block in self.blocks.items():
                parts = self._entries[name]
                product = block @ torch.cat([vectors[part] for part in parts])
                counts = [part.stop - part.start for part in parts]
                for part, piece in zip(parts, torch.split(product, counts), strict=True):
                    result[part] = piece
        return result

    def hint(self) -> Tensor:
        """The gradient `[P]`."""
        return self._whole.hint()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """The evaluation state of the whole operator."""
        with self._whole.session():
            yield
