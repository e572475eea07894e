"""Curvature that is taken between the outputs: `sum_n J_n' M_n J_n`.

`J_n` is the Jacobian of the outputs with respect to the parameters for one example (or a batch of
them) and `M_n` a small symmetric matrix between outputs, the *form*. A product takes `J v` (the
derivative of `u -> J' u` along v, or forward mode), then `M`, then `J'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llp.landscape.data import Batch
from llp.landscape.differentiable import TwiceDifferentiable
from llp.landscape.functional import functional_call
from llp.landscape.operators import row_of
from llp.landscape.parameters import unflatten
from llp.landscape.products import BatchwiseCurvature

Form = Callable[[Tensor], Tensor]
"""A symmetric matrix between outputs: from `[B, ...]` to `[B, ...]`."""


@dataclass(frozen=True)
class OutputRecord:
    """What products with `J' M J` need.

    Attributes:
        outputs: Of each batch, with their graphs.
        dummies: `u` of each batch.
        pulled: `J' u` for each parameter, summed over batches, with its graph.
        forms: `M` of each batch.
    """

    outputs: tuple[Tensor, ...]
    dummies: tuple[Tensor, ...]
    pulled: tuple[Tensor | None, ...]
    forms: tuple[Form, ...]


class OutputCurvature(BatchwiseCurvature):
    """`J' M J`, summed over batches; a subclass says what `M` is."""

    def form(self, outputs: Tensor, batch: Batch) -> Form:
        """`M` for a batch whose outputs (without graph) are given."""
        raise NotImplementedError

    def outputs(self, batch: Batch) -> Tensor:
        """The network's outputs, which must be one tensor."""
        found = super().outputs(batch)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"{type(self).__name__} needs a network whose output is one tensor, not "
                f"{type(found).__name__}; wrap it in a module that returns the tensor"
            )
        return found

    def record(self, batch: Batch) -> OutputRecord:
        """The batch's outputs and their pull-back, with graphs."""
        with torch.enable_grad(), TwiceDifferentiable():
            outputs = self.outputs(batch)
        form = self.form(outputs.detach(), batch)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled: Sequence[Tensor | None] = [None] * len(self.parameters)
        if outputs.requires_grad:
            pulled = torch.autograd.grad(
                outputs, self.parameters, dummy, create_graph=True, allow_unused=True
            )
        return OutputRecord((outputs,), (dummy,), tuple(pulled), (form,))

    def merge(self, first: OutputRecord, second: OutputRecord) -> OutputRecord:
        """Both batches; one backward pass goes through all of them."""
        with torch.enable_grad():
            pulled = tuple(
                b if a is None else a if b is None else a + b
                for a, b in zip(first.pulled, second.pulled, strict=True)
            )
        return OutputRecord(
            first.outputs + second.outputs,
            first.dummies + second.dummies,
            pulled,
            first.forms + second.forms,
        )

    def recorded(self, record: OutputRecord) -> list[Tensor]:
        """Outputs and pull-back."""
        return [*record.outputs, *(each for each in record.pulled if each is not None)]

    def multiply_record(self, record: OutputRecord, row: Tensor, slots: tuple[int, ...]) -> Tensor:
        """`J' M J v`."""
        chosen = [self.parameters[slot] for slot in slots]
        pulled: list[Tensor] = []
        slopes: list[Tensor] = []
        for slot, part in zip(slots, unflatten(row, chosen), strict=True):
            if (each := record.pulled[slot]) is not None:
                pulled.append(each)
                slopes.append(part)
        if not pulled:
            return torch.zeros_like(row)
        pushed = torch.autograd.grad(
            pulled, record.dummies, slopes, retain_graph=True, allow_unused=True
        )
        weighted = [
            form(torch.zeros_like(dummy) if each is None else each)
            for form, each, dummy in zip(record.forms, pushed, record.dummies, strict=True)
        ]
        return row_of(
            torch.autograd.grad(
                record.outputs, chosen, weighted, retain_graph=True, allow_unused=True
            ),
            chosen,
        )

    def prepare(self, batch: Batch) -> tuple[Batch, Tensor, Form]:
        """The outputs with the graph of one gradient, and `M`."""
        with torch.enable_grad(), TwiceDifferentiable():
            outputs = self.outputs(batch)
        return batch, outputs, self.form(outputs.detach(), batch)

    def multiply_forward(
        self, prepared: tuple[Batch, Tensor, Form], row: Tensor, slots: tuple[int, ...]
    ) -> Tensor:
        """`J' M J v` with `J v` by forward mode."""
        batch, outputs, form = prepared
        chosen = [self.parameters[slot] for slot in slots]
        names = [self.names[slot] for slot in slots]
        values = {name: p.detach() for name, p in zip(names, chosen, strict=True)}
        tangents = dict(zip(names, unflatten(row, chosen), strict=True))

        def network(values: dict[str, Tensor]) -> Tensor:
            with TwiceDifferentiable(convolutions=False):
                result: Tensor = functional_call(self.model, values, (batch.inputs,))
                return result

        pushed = torch.func.jvp(network, (values,), (tangents,))[1]
        if not outputs.requires_grad:
            return torch.zeros_like(row)
        return row_of(
            torch.autograd.grad(
                outputs, chosen, form(pushed), retain_graph=True, allow_unused=True
            ),
            chosen,
        )

    def slopes(self, outputs: Tensor, targets: Any, size: int) -> Tensor:
        """The slope of each example's own loss with respect to its outputs."""
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._loss_fn(leaf, targets)
        (slope,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
        return slope if self.reduction == "sum" else slope * size

    def outer_form(self, slopes: Tensor, factor: float) -> Form:
        """`factor * sum s s'` for slopes `[S, B, ...]`, each example by itself."""
        count, size = slopes.shape[:2]
        flat = slopes.reshape(count, size, -1)

        def form(vector: Tensor) -> Tensor:
            along = (flat * vector.reshape(1, size, -1)).sum(-1, keepdim=True)
            return (flat * along).sum(0).mul(factor).reshape(vector.shape)

        return form

    def share(self) -> float:
        """The weight of one example."""
        return 1.0 if self.reduction == "sum" else 1.0 / self.num_examples
