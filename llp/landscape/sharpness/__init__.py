"""Sharpness: how much the loss rises near the weights. One file per family.

- First-order worst case: `sam`, `asam`, and `m_sharpness` on groups of m examples.
- Worst case by projected ascent: `worst_case` in a ball, `epsilon_box` (Keskar).
- Average case: `noise` at a level, `noise_sigma` for a rise (PAC-Bayes).
- Volume: `local_entropy`. Slope: `gradient_norm`.
- Second derivatives free of layer scales: `adaptive_trace`, `relative_flatness`.

Each is called as `NAME(model, loss_fn, batches, ...)`, returns an `Estimate` with value, standard
error and cost, and leaves the model bit-identical.
"""

from llp.landscape.sharpness.ascent import asam, sam
from llp.landscape.sharpness.average import noise, noise_sigma
from llp.landscape.sharpness.curvature import adaptive_trace, relative_flatness
from llp.landscape.sharpness.entropy import local_entropy
from llp.landscape.sharpness.gradient import gradient_norm
from llp.landscape.sharpness.groups import m_sharpness
from llp.landscape.sharpness.worst import epsilon_box, worst_case

__all__ = [
    "adaptive_trace",
    "asam",
    "epsilon_box",
    "gradient_norm",
    "local_entropy",
    "m_sharpness",
    "noise",
    "noise_sigma",
    "relative_flatness",
    "sam",
    "worst_case",
]
