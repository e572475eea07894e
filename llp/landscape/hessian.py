"""The Hessian of the loss as a linear operator: `H v` without forming H (Pearlmutter 1994).

`H v = d/dtheta (g(theta) . v)`, in two ways. Differentiating the gradient's own graph: with that
graph kept a product costs the floor of twice a gradient, built anew three times. Or pushing the
tangent `v` through the computation of the gradient (forward-over-reverse), which keeps nothing
between products and needs the memory of about two gradients.
The operator is taken at the parameters' values when a product is made: it notices parameters that
were changed in place and builds its graphs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llp.landscape.data import Batch, Reduction
from llp.landscape.devices import on_devices
from llp.landscape.differentiable import TwiceDifferentiable
from llp.landscape.engines import Engine
from llp.landscape.functional import functional_call
from llp.landscape.operators import Curvature, row_of
from llp.landscape.parameters import Selection, unflatten
from llp.landscape.passes import Batches, LossFunction
from llp.landscape.products import BatchwiseCurvature, CurvatureOptions


class Hessian(BatchwiseCurvature):
    """The `[P, P]` Hessian of the loss over all batches; made by `hessian`."""

    def record(self, batch: Batch) -> list[Tensor]:
        """The batch's gradient, with its graph."""
        with torch.enable_grad(), TwiceDifferentiable():
            loss = self.loss(self.outputs(batch), batch)
        return list(
            torch.autograd.grad(
                loss,
                self.parameters,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )

    def merge(self, first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
        """The sum of two gradients."""
        with torch.enable_grad():
            return [a + b for a, b in zip(first, second, strict=True)]

    def recorded(self, record: list[Tensor]) -> list[Tensor]:
        """The gradient."""
        return record

    def gradient(self) -> Tensor:
        """From the kept graph, where there is one."""
        if self.plan is not None and self.plan.engine == "retained" and self.data.num_local:
            return row_of(self.graph(), self.parameters)
        return super().gradient()

    def multiply_record(self, record: list[Tensor], row: Tensor, slots: tuple[int, ...]) -> Tensor:
        """The Jacobian of the gradient, which is symmetric, times the vector."""
        chosen = [self.parameters[slot] for slot in slots]
        parts = unflatten(row, chosen)
        pairs = [
            (record[slot], part)
            for slot, part in zip(slots, parts, strict=True)
            if record[slot].requires_grad  # the loss may be linear in a parameter
        ]
        if not pairs:
            return torch.zeros_like(row)
        outputs, slopes = [each for each, _ in pairs], [each for _, each in pairs]
        products = torch.autograd.grad(
            outputs, chosen, slopes, retain_graph=True, allow_unused=True
        )
        return row_of(products, chosen)

    def multiply_forward(self, prepared: Batch, row: Tensor, slots: tuple[int, ...]) -> Tensor:
        """The derivative of the gradient along the vector."""
        chosen = [self.parameters[slot] for slot in slots]
        names = [self.names[slot] for slot in slots]
        values = {name: p.detach() for name, p in zip(names, chosen, strict=True)}
        tangents = dict(zip(names, unflatten(row, chosen), strict=True))
        whole = _WithLoss(self.model, lambda batch: self.loss(self.model(batch.inputs), batch))

        def loss(values: dict[str, Tensor]) -> Tensor:
            with TwiceDifferentiable(convolutions=False):
                named = {f"model.{name}": value for name, value in values.items()}
                result: Tensor = functional_call(whole, named, (prepared,))
                return result

        products = torch.func.jvp(torch.func.grad(loss), (values,), (tangents,))[1]
        return row_of([products[name] for name in names], chosen)


class _WithLoss(nn.Module):
    """A network with its loss as one module, so that both see replaced parameters."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self.training = model.training

    def forward(self, batch: Batch) -> Tensor:
        result: Tensor = self._loss(batch)
        return result


def hessian(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    *,
    parameters: Selection = None,
    reduction: Reduction = "auto",
    engine: Engine = "auto",
    memory_budget: int | None = None,
    chunk_size: int | None = None,
    check: bool = True,
    devices: Sequence[torch.device | str] | None = None,
    process_group: Any = None,
) -> Curvature:
    """The Hessian of the loss over `batches` as a linear operator.

    Products run in eval mode in the parameters' dtype, with TF32 and fused attention off, and leave
    weights, buffers, `.grad`, training flags and random states bit-identical.

    Args:
        model: Any module; frozen parameters are left out, tied ones counted once.
        loss_fn: `loss_fn(outputs, targets)`, a mean or a sum over the batch.
        batches: Re-iterable of `(inputs, targets)`; batches may differ in size and are weighted by
            it. It must give the same data every time.
        parameters: Which parameters: names of parameters or modules, or a predicate of name and
            owning module; default: all.
        reduction: What `loss_fn` does over a batch; `auto` finds out. The Hessian is that of the
            mean over all examples for `mean`, of the sum for `sum`.
        engine: `retained` keeps the gradient's graph between products, `rebuild` builds it each
            time, `forward` is forward-over-reverse. `auto` keeps the graph where it fits the
            budget; where it does not, and on a GPU, it times the alternatives on the first batch.
            `forward` alone does not see a loss function that holds on to parameters; `auto`
            notices that.
        memory_budget: Bytes that kept graphs may take; default: a quarter of the free memory, at
            most 4 GiB on a CPU.
        chunk_size: Columns of a block that are differentiated at once; default: by a timed probe.
        check: Refuse data that change between passes and networks that draw random numbers. Costs
            one reading of a loader; nothing for a list.
        devices: Spread the batches over these, with a copy of the model on each.
        process_group: A group of `torch.distributed`: each process holds its own share of the
            batches, products are summed over the group, and every process must make the same calls.

    Raises:
        ValueError: No trainable parameters, an empty batch list, a loss that is no scalar, or data
            that are not the same in a second pass (`NotRepeatableError`).
        TypeError: `batches` can be read only once.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> op = hessian(model, nn.functional.mse_loss, data)
    >>> op @ torch.tensor([1.0, 2.0])
    tensor([1., 2.])
    """
    options = CurvatureOptions(
        parameters=parameters,
        reduction=reduction,
        engine=engine,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
        check=check,
        devices=devices,
        process_group=process_group,
    )
    return on_devices(Hessian, model, loss_fn, batches, options)
