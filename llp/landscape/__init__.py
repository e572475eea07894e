"""The loss landscape around trained weights, for any `nn.Module`, loss and data.

`batches` is any re-iterable of `(inputs, targets)`; `loss_fn(outputs, targets)` is a mean over the
batch. Everything runs in eval mode and leaves the model bit-identical. A library of its own: torch,
numpy and scipy only.

    from llp import landscape
    op = landscape.hessian(model, loss_fn, batches)
    landscape.top_eigenpairs(op, k=5).values
    landscape.trace(op, relative_error=0.01).value
    landscape.sharpness.asam(model, loss_fn, batches, rho=0.5).value
"""

from llp.landscape import sharpness
from llp.landscape.hessian import Hessian, hessian
from llp.landscape.parameters import evaluation_state, flatten, perturbed, trainable, unflatten
from llp.landscape.passes import Batches, Estimate, LossFunction
from llp.landscape.spectrum import Eigenpairs, TraceEstimate, top_eigenpairs, trace

__all__ = [
    "Batches",
    "Eigenpairs",
    "Estimate",
    "Hessian",
    "LossFunction",
    "TraceEstimate",
    "evaluation_state",
    "flatten",
    "hessian",
    "perturbed",
    "sharpness",
    "top_eigenpairs",
    "trace",
    "trainable",
    "unflatten",
]
