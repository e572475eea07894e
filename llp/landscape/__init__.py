"""The loss landscape around trained weights, for any `nn.Module`, loss and data.

`batches` is any re-iterable of `(inputs, targets)`; `loss_fn(outputs, targets)` is a mean over the
batch. Everything runs in eval mode and leaves the model bit-identical. A library of its own: torch,
numpy and scipy only.

    from llp import landscape
    op = landscape.hessian(model, loss_fn, batches)
    landscape.top_eigenpairs(op, k=5).values
    landscape.trace(op, relative_error=0.01).value
    landscape.sharpness.asam(model, loss_fn, batches, rho=0.5).value
    landscape.surface(model, loss_fn, batches, directions=landscape.directions.random(model)).loss
"""

from llp.landscape import directions, keys, sharpness
from llp.landscape.confidence import Confidence, confidence
from llp.landscape.connectivity import Connection, Curve, Path, connect, linear_barrier
from llp.landscape.data import NotRepeatableError
from llp.landscape.density import SpectralDensity, spectral_density
from llp.landscape.directions import Directions
from llp.landscape.engines import Plan
from llp.landscape.evaluation import accuracy
from llp.landscape.fisher import empirical_fisher, monte_carlo_fisher
from llp.landscape.gauss_newton import gauss_newton
from llp.landscape.hessian import Hessian, hessian
from llp.landscape.interpolation import InterpolationError
from llp.landscape.jacobian import JacobianRank, partial_jacobian_rank
from llp.landscape.matching import Alignment, align
from llp.landscape.operators import Curvature
from llp.landscape.parameters import (
    evaluation_state,
    flatten,
    perturbed,
    selected,
    trainable,
    unflatten,
)
from llp.landscape.passes import Batches, Estimate, LossFunction
from llp.landscape.ranks import (
    RankDynamics,
    Ranks,
    feature_ranks,
    matrix_ranks,
    rank_dynamics,
    weight_ranks,
)
from llp.landscape.smoothness import Smoothness, smoothness
from llp.landscape.spectrum import Eigenpairs, top_eigenpairs
from llp.landscape.store import FileStore
from llp.landscape.summary import SpectrumReport, report, spectrum_report
from llp.landscape.surfaces import Line, Surface, line, surface
from llp.landscape.traces import TraceEstimate, trace
from llp.landscape.trajectory import Trajectory, pca_directions, principal_components, trajectory
from llp.landscape.units import LayerSize, UnitActivity, layer_sizes, unit_activity

__all__ = [
    "Alignment",
    "Batches",
    "Confidence",
    "Connection",
    "Curvature",
    "Curve",
    "Directions",
    "Eigenpairs",
    "Estimate",
    "FileStore",
    "Hessian",
    "InterpolationError",
    "JacobianRank",
    "LayerSize",
    "Line",
    "LossFunction",
    "NotRepeatableError",
    "Path",
    "Plan",
    "RankDynamics",
    "Ranks",
    "Smoothness",
    "SpectralDensity",
    "SpectrumReport",
    "Surface",
    "TraceEstimate",
    "Trajectory",
    "UnitActivity",
    "accuracy",
    "align",
    "confidence",
    "connect",
    "directions",
    "empirical_fisher",
    "evaluation_state",
    "feature_ranks",
    "flatten",
    "gauss_newton",
    "hessian",
    "keys",
    "layer_sizes",
    "line",
    "linear_barrier",
    "matrix_ranks",
    "monte_carlo_fisher",
    "partial_jacobian_rank",
    "pca_directions",
    "perturbed",
    "principal_components",
    "rank_dynamics",
    "report",
    "selected",
    "sharpness",
    "smoothness",
    "spectral_density",
    "spectrum_report",
    "surface",
    "top_eigenpairs",
    "trace",
    "trainable",
    "trajectory",
    "unflatten",
    "unit_activity",
    "weight_ranks",
]
