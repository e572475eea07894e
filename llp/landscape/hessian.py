"""The Hessian of the mean loss as a linear operator: `H v` without forming H (Pearlmutter 1994).

`H v = d/dtheta (g(theta) . v)` by differentiating the gradient's own graph. With that graph kept, a
product costs the floor of twice a gradient; building it anew each time makes it three times.
The operator is taken at the parameters' values when a graph is built; it notices parameters that
were changed in place and builds its graphs again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llp.landscape.parameters import (
    evaluation_state,
    exact_arithmetic,
    flatten,
    trainable,
    unflatten,
)
from llp.landscape.passes import Batches, LossFunction, iterate, mean_loss

Retain = bool | Literal["auto"]


class Hessian:
    """The P x P Hessian of the loss over all batches; use `op @ v` with `[P]` or `[P, K]`.

    Attributes:
        shape: `(P, P)`.
        dtype: Of the parameters and of every product.
        device: Of the parameters and of every product.
        num_products: Products so far; each column of a block counts.
        num_gradients: Gradients (graphs over the whole data) built so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Batches,
        *,
        retain: Retain = "auto",
        memory_budget: int | None = None,
        chunk_size: int = 1,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        self._model = model
        self._loss_fn = loss_fn
        self._batches = batches
        self._retain = retain
        self._memory_budget = memory_budget
        self._chunk_size = chunk_size
        self._parameters = trainable(model)
        self._watched = [*self._parameters, *model.buffers()]
        size = sum(parameter.numel() for parameter in self._parameters)
        self.shape = (size, size)
        self.dtype = self._parameters[0].dtype
        self.device = self._parameters[0].device
        self.num_products = 0
        self.num_gradients = 0
        self._num_examples = 0
        self._graph: list[Tensor] | None = None
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._inside = False

    @property
    def num_examples(self) -> int:
        """Examples in `batches`."""
        if not self._num_examples:
            self._num_examples = sum(size for *_, size in iterate(self._batches, self.device))
        return self._num_examples

    @property
    def gradient_equivalents(self) -> float:
        """Cost so far in gradients: one for each graph built, two for each product from it."""
        return self.num_gradients + 2.0 * self.num_products

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """H times `vectors` `[P]` or `[P, K]`, in the parameters' dtype, same shape."""
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.shape[0]:
            raise ValueError(
                f"expected a vector [{self.shape[0]}] or a block [{self.shape[0]}, K], "
                f"not shape {tuple(vectors.shape)}"
            )
        rows = vectors.detach().to(device=self.device, dtype=self.dtype)
        rows = rows[None] if vectors.ndim == 1 else rows.T.contiguous()
        with self.session():
            product = self._multiply(rows)
        self.num_products += len(rows)
        return product[0] if vectors.ndim == 1 else product.T

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Holds the evaluation state over several products, so that it is saved only once."""
        if self._inside:
            yield
            return
        with evaluation_state(self._model), exact_arithmetic(self.device):
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def release(self) -> None:
        """Frees the kept graphs; the next product builds them again."""
        self._graph = None

    def _multiply(self, rows: Tensor) -> Tensor:
        if self._graph is not None and self._stamp != _stamp(self._watched):
            self.release()
        if self._graph is None and self._keeps_graphs():
            self._graph = self._build()
            self._stamp = _stamp(self._watched)
        if self._graph is not None:
            return self._differentiate(self._graph, rows)
        total = torch.zeros_like(rows)
        for inputs, targets, size in iterate(self._batches, self.device):
            graph = self._batch_gradient(inputs, targets, size / self.num_examples)
            total += self._differentiate(graph, rows)
        self.num_gradients += 1
        return total

    def _differentiate(self, graph: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Rows `[K, P]` times the Jacobian of the gradient, which is symmetric."""
        pairs = [
            (output, slot)
            for slot, output in enumerate(graph)
            if output.requires_grad  # a parameter the loss is linear in has a constant gradient
        ]
        if not pairs:
            return torch.zeros_like(rows)
        outputs = [output for output, _ in pairs]
        results = []
        for chunk in torch.split(rows, self._chunk_size):
            batched = len(chunk) > 1
            parts = unflatten(chunk if batched else chunk[0], self._parameters)
            products = torch.autograd.grad(
                outputs,
                self._parameters,
                [parts[slot] for _, slot in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=not batched,
                is_grads_batched=batched,
            )
            if batched:
                filled = [
                    parameter.new_zeros(len(chunk), parameter.numel())
                    if product is None
                    else product.reshape(len(chunk), -1)
                    for product, parameter in zip(products, self._parameters, strict=True)
                ]
                results.append(torch.cat(filled, dim=1))
            else:
                results.append(flatten(products)[None])
        return torch.cat(results)

    def _build(self) -> list[Tensor]:
        """The gradient over all batches with its graph; one backward then serves every batch."""
        total: list[Tensor] | None = None
        for inputs, targets, size in iterate(self._batches, self.device):
            part = self._batch_gradient(inputs, targets, size / self.num_examples)
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        assert total is not None
        self.num_gradients += 1
        return total

    def _batch_gradient(self, inputs: Any, targets: Any, weight: float) -> list[Tensor]:
        with torch.enable_grad():
            loss = mean_loss(self._model, self._loss_fn, inputs, targets) * weight
            return list(
                torch.autograd.grad(
                    loss,
                    self._parameters,
                    create_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )

    def _keeps_graphs(self) -> bool:
        """Whether the graphs of all batches fit, from the bytes the first batch's graph saves."""
        if self._retain == "auto":
            given = self._memory_budget
            budget = _free_bytes(self.device) if given is None else given
            self._retain = self._graph_bytes() <= budget
        return self._retain

    def _graph_bytes(self) -> float:
        saved: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        iterator = iterate(self._batches, self.device)
        inputs, targets, size = next(iterator)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            graph = self._batch_gradient(inputs, targets, 1.0)
        total = sum(saved.values())
        del graph
        return total * self.num_examples / size


def hessian(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    retain: Retain = "auto",
    memory_budget: int | None = None,
    chunk_size: int = 1,
) -> Hessian:
    """The Hessian of the mean loss over `batches` as a linear operator.

    Products run in eval mode in the parameters' dtype, with TF32 and fused attention off, and leave
    weights, buffers, `.grad`, training flags and random states bit-identical.

    Args:
        model: Any module; frozen parameters are left out, tied ones counted once.
        loss_fn: `loss_fn(outputs, targets)`, a mean over the batch.
        batches: Re-iterable of `(inputs, targets)`; batches may differ in size.
        retain: Keep the gradient's graph between products; `auto` while it fits.
        memory_budget: Bytes that `auto` may keep; default: a quarter of the free memory, at most
            1 GiB on the CPU.
        chunk_size: Columns of a block that are differentiated at once. 1 is best for convolutions
            on a CPU; 16 is several times faster for networks of a few thousand parameters.

    Raises:
        ValueError: No trainable parameters, an empty batch list, or a loss that is no scalar.
        TypeError: `batches` can be read only once.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> op = hessian(model, nn.functional.mse_loss, data)
    >>> op @ torch.tensor([1.0, 2.0])
    tensor([1., 2.])
    """
    return Hessian(
        model,
        loss_fn,
        batches,
        retain=retain,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
    )


def _stamp(parameters: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 4
    pages = os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 2**17
    size = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**12
    return min(pages * size / 4, 2**30)
