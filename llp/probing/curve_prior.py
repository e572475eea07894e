"""The fitted prior of learning curves: from a description of a curve to a distribution.

The prior is a small ensemble of networks. Each turns the features of a curve into a mixture of
logistic distributions of the final height: half of the components are placed and scaled in *paces*
of the curve (what barely moves will barely move), half in heights (what looks stuck may still take
off), and one broad component of fixed weight says that anything can happen. The mixtures of all
networks, each fitted on other tasks and random numbers, are averaged; no residual of a curve's own
fit is ever taken for the uncertainty.

`curve_prior.json` beside this file holds the numbers, where they come from and how well they do on
tasks left out. `llp curves fit` makes such a file from tables of curves.
"""

from __future__ import annotations

import base64
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from llp.errors import DataError
from llp.probing.curve_features import Description, Floats

VERSION = 1
NUM_COMPONENTS = 6
WIDTH_FLOOR = 3e-4
"""Least scale of a component, in heights."""
BACKGROUND = (0.01, 0.5, 0.3)
"""Weight, location and scale of the component that is always there."""
HEADROOM = 3.0
"""How far above all that was seen a forecast may go; above 1 heights are logarithms."""
LEVELS: Floats = np.concatenate(
    [[0.001, 0.0025, 0.005], np.arange(1, 100) / 100, [0.995, 0.9975, 0.999]]
)
"""Levels of a quantile table."""
LOGITS: Floats = np.log(LEVELS) - np.log1p(-LEVELS)

_NODES = np.array([0.0005, 0.002, 0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.98, 0.998, 0.9995])
_NODE_LOGITS = np.log(_NODES) - np.log1p(-_NODES)
_ARRAYS = ("first", "first_bias", "second", "second_bias", "out", "out_bias", "skip")

Network = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Prior:
    """A fitted prior.

    Attributes:
        names: The features it expects.
        centre: [num_features], subtracted from the features.
        spread: [num_features], then divided by.
        networks: The ensemble; arrays by name, see `outputs`.
        sources: What it was fitted on, with numbers of tasks and curves.
        evidence: How it did on tasks that were left out of the fit.
    """

    names: tuple[str, ...]
    centre: Floats
    spread: Floats
    networks: tuple[Network, ...]
    sources: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def quantiles(self, described: Description) -> Floats:
        """Quantiles of the final height at `LEVELS`, [num_curves, num_levels], increasing.

        They end `HEADROOM` above the highest curve of the batch (or the start).
        """
        inputs = standardized(described.features, self.centre, self.spread)
        mixtures = [
            components(outputs(network, inputs).astype(float), described.anchor, described.pace)
            for network in self.networks
        ]
        num = len(described.anchor)
        share, place, scale = BACKGROUND
        log_weights = np.concatenate([mixture[0] for mixture in mixtures], axis=1)
        weights = np.exp(log_weights) * (1 - share) / len(mixtures)
        found = _mixture_quantiles(
            np.concatenate([weights, np.full((num, 1), share)], axis=1),
            np.concatenate([*(m[1] for m in mixtures), np.full((num, 1), place)], axis=1),
            np.concatenate([*(m[2] for m in mixtures), np.full((num, 1), scale)], axis=1),
        )
        return np.minimum(found, max(1.0, float(described.highest.max())) + HEADROOM)

    def dump(self) -> str:
        """As JSON; weights are half-precision little-endian bytes in base64."""
        return json.dumps(
            {
                "version": VERSION,
                "sources": self.sources,
                "evidence": self.evidence,
                "features": self.names,
                "centre": [float(f"{value:.5g}") for value in self.centre],
                "spread": [float(f"{value:.5g}") for value in self.spread],
                "networks": [
                    {
                        name: {
                            "shape": network[name].shape,
                            "float16": base64.b64encode(
                                network[name].astype("<f2").tobytes()
                            ).decode(),
                        }
                        for name in _ARRAYS
                    }
                    for network in self.networks
                ],
            },
            indent=1,
        )


def load(path: str | Path | None = None) -> Prior:
    """The prior in a file, by default the one that is shipped.

    Raises:
        DataError: The file is no prior, or one for other features.
    """
    if path is None:
        return _shipped()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the prior {path}: {error.strerror}") from error
    return parse(text, str(path))


@functools.cache
def _shipped() -> Prior:
    return parse(
        files("llp.probing").joinpath("curve_prior.json").read_text(encoding="utf-8"),
        "curve_prior.json",
    )


def parse(text: str, name: str = "prior") -> Prior:
    """The prior that `Prior.dump` wrote as `text`.

    Raises:
        DataError: It is no prior, or of another version.
    """
    try:
        plain = json.loads(text)
        if plain["version"] != VERSION:
            raise DataError(
                f"{name}: version {plain['version']} of the prior, this is for version {VERSION}"
            )
        networks = tuple(
            {key: _array(stored) for key, stored in network.items()}
            for network in plain["networks"]
        )
        found = Prior(
            tuple(plain["features"]),
            np.array(plain["centre"], dtype=float),
            np.array(plain["spread"], dtype=float),
            networks,
            plain["sources"],
            plain["evidence"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is no prior of learning curves: {error!r}") from error
    return found


def _array(stored: Mapping[str, Any]) -> NDArray[np.float32]:
    raw = np.frombuffer(base64.b64decode(stored["float16"]), dtype="<f2")
    return np.asarray(raw.astype(np.float32).reshape(stored["shape"]))


def standardized(features: Floats, centre: Floats, spread: Floats) -> NDArray[np.float32]:
    """Features as a network takes them; five standard deviations is as far as it goes."""
    return np.clip((features - centre) / spread, -5, 5).astype(np.float32)


def outputs(network: Network, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """[num_curves, 3 * num_components]: two hidden layers of SiLU and a linear path beside them."""
    hidden = silu(inputs @ network["first"] + network["first_bias"])
    hidden = silu(hidden @ network["second"] + network["second_bias"])
    return np.asarray(hidden @ network["out"] + network["out_bias"] + inputs @ network["skip"])


def silu(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """`x sigmoid(x)`."""
    return np.asarray(values * expit(values))


def components(raw: Floats, anchor: Floats, pace: Floats) -> tuple[Floats, Floats, Floats]:
    """Log weights, locations and scales of the mixture, each [num_curves, num_components]."""
    num = raw.shape[1] // 3
    logits, offsets, widths = raw[:, :num], raw[:, num : 2 * num], raw[:, 2 * num :]
    high = logits.max(axis=1, keepdims=True)
    log_weights = logits - high - np.log(np.exp(logits - high).sum(axis=1, keepdims=True))
    unit = units(pace, num).astype(raw.dtype)
    return (
        log_weights,
        anchor[:, None] + unit * offsets,
        WIDTH_FLOOR + unit * np.exp(np.clip(widths, -12, 6)),
    )


def units(pace: Floats, num_components: int) -> Floats:
    """[num_curves, num_components], in which offsets and widths are: paces, then heights."""
    found = np.full((len(pace), num_components), 0.25)
    found[:, : num_components // 2] = pace[:, None]
    return found


def _mixture_quantiles(weights: Floats, places: Floats, scales: Floats) -> Floats:
    """Quantiles at `LEVELS` of mixtures of logistic distributions.

    The distribution function is computed on the quantiles of all components and inverted by
    interpolation of its logit, which is exact for a single component.
    """
    num = len(weights)
    grid = (places[:, :, None] + scales[:, :, None] * _NODE_LOGITS).reshape(num, -1)
    grid.sort(axis=1)
    below, part = np.zeros_like(grid), np.empty_like(grid)
    for k in range(weights.shape[1]):  # weight / (1 + exp(-x)): half the time of `expit`
        np.subtract(places[:, k, None], grid, out=part)
        part /= scales[:, k, None]
        np.minimum(part, 700.0, out=part)
        np.exp(part, out=part)
        part += 1.0
        np.divide(weights[:, k, None], part, out=part)
        below += part
    below = np.clip(below, 1e-12, 1 - 1e-12)
    logit = np.log(below) - np.log1p(-below)
    return np.stack([np.interp(LOGITS, logit[i], grid[i]) for i in range(num)])


def widen_ties(table: Floats) -> Floats:
    """A quantile table that increases strictly, however narrow the distribution."""
    least = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-300) * 1e-14
    return np.asarray(np.maximum.accumulate(table, axis=1) + least * np.arange(table.shape[1]))


def logit(level: float) -> float:
    """`log(p / (1 - p))`."""
    return math.log(level) - math.log1p(-level)
