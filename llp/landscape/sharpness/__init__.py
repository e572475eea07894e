"""Sharpness: how much the loss rises near the weights. One file per family.

`sam` and `asam` (worst case, first order), `noise` (average case), `gradient_norm`. Each returns an
`Estimate` with value, standard error and cost, and leaves the model bit-identical.
"""

from llp.landscape.sharpness.ascent import asam, sam
from llp.landscape.sharpness.average import noise
from llp.landscape.sharpness.gradient import gradient_norm

__all__ = ["asam", "gradient_norm", "noise", "sam"]
