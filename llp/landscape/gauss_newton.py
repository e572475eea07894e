"""The generalised Gauss-Newton matrix as a linear operator (Schraudolph 2002, section 3).

`sum_n J_n' M_n J_n` with `M` the Hessian of the loss with respect to the outputs. It is the Hessian
without the curvature of the network itself: equal to it for a model that is linear in its
parameters, and positive semi-definite for a convex loss.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from llp.landscape.data import Batch
from llp.landscape.devices import on_devices
from llp.landscape.operators import Curvature
from llp.landscape.outputs import Form, OutputCurvature
from llp.landscape.passes import Batches, LossFunction
from llp.landscape.products import CurvatureOptions


class GaussNewton(OutputCurvature):
    """The generalised Gauss-Newton matrix; made by `gauss_newton`."""

    def form(self, outputs: Tensor, batch: Batch) -> Form:
        """The Hessian of the batch's loss with respect to the outputs."""
        leaf = outputs.requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf, batch)
            (slope,) = torch.autograd.grad(
                loss, leaf, create_graph=True, allow_unused=True, materialize_grads=True
            )

        def form(vector: Tensor) -> Tensor:
            if not slope.requires_grad:  # a loss that is linear in the outputs
                return torch.zeros_like(vector)
            (product,) = torch.autograd.grad(slope, leaf, vector, retain_graph=True)
            return product

        return form


def gauss_newton(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    **options: Unpack[CurvatureOptions],
) -> Curvature:
    """The generalised Gauss-Newton matrix of the loss over `batches`; options as in `hessian`.

    The network must return one tensor. A term of the loss that does not go through the outputs,
    such as weight decay, is not part of it.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> gauss_newton(model, nn.functional.mse_loss, data) @ torch.tensor([1.0, 2.0])
    tensor([1., 2.])
    """
    return on_devices(GaussNewton, model, loss_fn, batches, options)
