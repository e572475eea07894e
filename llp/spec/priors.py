"""Expert priors: where someone believes that the best value of a hyperparameter lies.

`prior: {mode: 0.1, confidence: medium}` beside a domain. A number is then drawn from a normal
distribution around the mode, cut to the domain, on the scale of the domain (logarithmic for
`loguniform` and `log: true`); its standard deviation is a share of the domain's width. A choice
takes its mode with an extra probability.

Half of the configurations are drawn from the priors and half from the domains as if there were
none, decided anew for each configuration and for all its parameters together; the very first one
has every mode. So a prior that is wrong costs at most half of the draws, and one that is right
finds a good region in about twice the draws of a search that trusts it blindly. The share and the
first configuration follow PriorBand (Mallik et al., NeurIPS 2023), whose share of uniform draws
starts at one half on the lowest rung; TPE and GP take it from there by what they are told.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import numpy as np

Confidence = Literal["low", "medium", "high"]
DEVIATION: dict[str, float] = {"low": 0.4, "medium": 0.2, "high": 0.1}
"""Standard deviation of a number's prior, as a share of the width of its domain."""
EXTRA: dict[str, float] = {"low": 0.25, "medium": 0.5, "high": 0.75}
"""Probability that a choice takes its mode outright; otherwise all values are equally likely."""
PRIOR_SHARE = 0.5
"""Share of configurations that are drawn from the priors."""


def draw_position(mode: float, confidence: Confidence, generator: np.random.Generator) -> float:
    """A position in [0, 1] along a domain: normal around `mode`, cut to the domain."""
    normal = NormalDist(mode, DEVIATION[confidence])
    low, high = normal.cdf(0.0), normal.cdf(1.0)
    share = low + (high - low) * float(generator.random())
    return min(max(normal.inv_cdf(min(max(share, 1e-12), 1 - 1e-12)), 0.0), 1.0)


def takes_mode(confidence: Confidence, generator: np.random.Generator) -> bool:
    """Whether a choice takes its mode outright."""
    return bool(generator.random() < EXTRA[confidence])
