"""The regression behind calibrated weights: a Gaussian process, averaged over its strengths.

The result y of a finished trial of study s (see `calibration`) is modelled as

    y = e_s + x' beta_s + phi(x)' omega_s + r' b + noise

with x the tier-1 signals, phi the features of the surface over hyperparameters (`surface`) and r
the tier-2 terms. Everything has a Gaussian prior around what the probes say: omega and b around 0,
the weights of T1 and of the smoothed T1 around (1 - a) TOTAL and a TOTAL. beta_s and omega_s are
alike between studies but not the same (correlations below), so what was learnt elsewhere counts,
and less than the study's own trials do.

The share a and how strong h, T2 and the noise are is not chosen but averaged over a grid, each
point weighed by its marginal likelihood. With few trials nearly all weight stays on weak effects;
that is the shrinkage. Only the ratio of the weights changes a ranking, so it is the ratio that is
on the grid.
Leave-one-out predictions are exact: for each point in closed form, and the weights of the points
are those without the trial, evidence / p(y_i | rest). Nothing is judged on what tuned it.

Source: Rasmussen and Williams 2006, sections 2.2, 5.4.2; E. Bonilla et al., Multi-task Gaussian
process prediction, NIPS 2007 (correlation between studies).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llp.scoring.ranks import Array

TOTAL, PRIOR_ALONE = 0.9, 0.8
SHARES = {0.0: 0.1, 0.3: 0.45, 0.6: 0.45}
"""Share of the smoothed T1 in the weight of both -> its prior probability."""
VARIANCE_ALONE, VARIANCE_TOTAL, VARIANCE_EACH, VARIANCE_EFFECT = 0.1, 0.05, 0.03, 0.1
VARIANCE_DEVIATION = 0.02
SURFACES = (0.0, 0.05, 0.15, 0.4, 1.0)
"""Prior variances of the surface; results have variance 1."""
METRICS = (0.03, 0.1, 0.3)
"""Prior variances of all tier-2 terms together."""
NOISES = (0.05, 0.1, 0.2, 0.35, 0.6)
SURFACE_CORRELATION = 0.7
SLOPE_CORRELATION = 0.7


@dataclass(frozen=True, eq=False)
class Finished:
    """The finished trials of all studies.

    Attributes:
        study: Study number, shape [m].
        y: Result, shape [m].
        x: Signals, shape [m, q]: T1, the smoothed T1, then deviations.
        phi: Features of the surface, shape [m, p].
        r: Tier-2 terms, shape [m, k].
    """

    study: NDArray[np.int64]
    y: Array
    x: Array
    phi: Array
    r: Array

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Coefficients [beta | omega | b] of one study under one point of the grid.

    Attributes:
        weight: Of the point.
        mean: Shape [q + p + k].
        covariance: Of `mean`.
        noise: Variance of a result around the model.
    """

    weight: float
    mean: Array
    covariance: Array
    noise: float


@dataclass(frozen=True, eq=False)
class _Point:
    prior: Array
    slopes: Array
    surface: float
    metrics: float
    noise: float
    evidence: float
    values: Array
    vectors: Array
    alpha: Array


class Mixture:
    """The model of some blocks, conditioned on the finished trials."""

    def __init__(self, data: Finished, *, use_h: bool, use_2: bool) -> None:
        self.data, self.use_h, self.use_2 = data, use_h, use_2
        self.same = (data.study[:, None] == data.study[None, :]).astype(np.float64)

    @cached_property
    def points(self) -> list[_Point]:
        """The grid with evidence and factors."""
        data = self.data
        if len(data) == 0:
            return []
        alike = _alike(self.same, SLOPE_CORRELATION)
        surface = data.phi @ data.phi.T * _alike(self.same, SURFACE_CORRELATION)
        metrics = data.r @ data.r.T / max(1, data.r.shape[1])
        span = _Span(self._columns())
        inside_surface, inside_metrics = span.inside(surface), span.inside(metrics)
        strengths = [
            (h, t2)
            for h in (SURFACES if self.use_h and data.phi.shape[1] else (0.0,))
            for t2 in (METRICS if self.use_2 and data.r.shape[1] else (0.0,))
        ]
        found = []
        for prior, slopes, chance in slope_priors(data.x.shape[1], self.use_h):
            base = VARIANCE_EFFECT * self.same + data.x @ slopes @ data.x.T * alike
            residual = data.y - data.x @ prior
            inside = span.inside(base)
            for h, t2 in strengths:
                values, vectors = span.eigh(inside + h * inside_surface + t2 * inside_metrics)
                values = np.maximum(values, 0.0)
                projected = vectors.T @ residual
                for noise in NOISES:
                    spectrum = values + noise
                    evidence = -0.5 * float((projected**2 / spectrum + np.log(spectrum)).sum())
                    evidence += math.log(chance)
                    alpha = vectors @ (projected / spectrum)
                    found.append(
                        _Point(prior, slopes, h, t2, noise, evidence, values, vectors, alpha)
                    )
        return found

    def _columns(self) -> Array:
        """Columns that every covariance of the grid is made of, shape [m, any number]."""
        data, features = self.data, []
        blocks = [np.ones((len(data), 1)), data.x] + ([data.phi] if self.use_h else [])
        for study in np.unique(data.study):
            own = (data.study == study)[:, None]
            features += [own * block for block in blocks]
        return np.concatenate([*features, data.r], axis=1)

    def weights(self) -> Array:
        """Posterior weights of the points."""
        evidence = np.array([point.evidence for point in self.points])
        weights = np.exp(evidence - evidence.max())
        return np.asarray(weights / weights.sum())

    def left_out(self, groups: NDArray[np.int64] | None = None) -> Array:
        """Prediction of every trial from all others, or from those of other `groups`, shape [m]."""
        if groups is None:
            predictions, density = zip(*(self._one(point) for point in self.points), strict=True)
        else:
            predictions, density = zip(
                *(self._group(point, groups) for point in self.points), strict=True
            )
        evidence = np.array([point.evidence for point in self.points])[:, None]
        without = evidence - np.stack(density)
        weights = np.exp(without - without.max(axis=0))
        weights /= weights.sum(axis=0)
        return np.asarray((weights * np.stack(predictions)).sum(axis=0))

    def _one(self, point: _Point) -> tuple[Array, Array]:
        precision = (point.vectors**2 / (point.values + point.noise)).sum(axis=1)
        error = point.alpha / precision
        density = 0.5 * np.log(precision) - 0.5 * error**2 * precision
        return self.data.y - error, density

    def _group(self, point: _Point, groups: NDArray[np.int64]) -> tuple[Array, Array]:
        y = self.data.y
        prediction, density = np.empty(len(y)), np.empty(len(y))
        for group in np.unique(groups):
            own = np.flatnonzero(groups == group)
            rows = point.vectors[own]
            precision = (rows / (point.values + point.noise)) @ rows.T
            error = np.linalg.solve(precision, point.alpha[own])
            prediction[own] = y[own] - error
            _, determinant = np.linalg.slogdet(precision)
            density[own] = 0.5 * determinant - 0.5 * float(error @ point.alpha[own])
        return prediction, density

    def posteriors(self, study: int) -> Iterator[Posterior]:
        """Coefficients of a study, also of one without finished trials; heaviest weights first."""
        data = self.data
        p, k = data.phi.shape[1], data.r.shape[1]
        weights = self.weights()
        own = (data.study == study).astype(np.float64)
        slopes = SLOPE_CORRELATION + (1 - SLOPE_CORRELATION) * own
        surface = SURFACE_CORRELATION + (1 - SURFACE_CORRELATION) * own
        for i in np.argsort(-weights, kind="stable"):
            if weights[i] < 0.01 * weights.max():
                break
            point = self.points[int(i)]
            q = len(point.prior)
            prior = np.zeros((q + p + k, q + p + k))
            prior[:q, :q] = point.slopes
            prior[range(q, q + p), range(q, q + p)] = point.surface
            prior[range(q + p, q + p + k), range(q + p, q + p + k)] = point.metrics / max(1, k)
            features = np.concatenate(
                [data.x * slopes[:, None], data.phi * surface[:, None], data.r], axis=1
            )
            shared = prior @ features.T
            projected = shared @ point.vectors
            mean = np.concatenate([point.prior, np.zeros(p + k)]) + shared @ point.alpha
            covariance = prior - (projected / (point.values + point.noise)) @ projected.T
            yield Posterior(float(weights[i]), mean, covariance, point.noise)


class _Span:
    """Eigenpairs of symmetric matrices whose range is in the span of some columns.

    With fewer columns than rows only the part inside is decomposed; what is left of an orthonormal
    basis belongs to eigenvalue 0. For 300 trials and 105 columns that takes a fifth of the time.
    """

    def __init__(self, columns: Array) -> None:
        num, width = columns.shape
        self.basis: Array | None = None
        if width < num:
            self.basis = np.linalg.qr(columns, mode="complete")[0]
            self.width = width

    def inside(self, matrix: Array) -> Array:
        """The matrix in the basis of the span."""
        if self.basis is None:
            return matrix
        own = self.basis[:, : self.width]
        return np.asarray(own.T @ (matrix @ own))

    def eigh(self, inside: Array) -> tuple[Array, Array]:
        """Eigenvalues [m] and eigenvectors [m, m] of the matrix that `inside` stands for."""
        values, vectors = np.linalg.eigh(inside)
        if self.basis is None:
            return values, vectors
        rest = self.basis[:, self.width :]
        zeros = np.zeros(rest.shape[1])
        own = self.basis[:, : self.width] @ vectors
        return np.concatenate([values, zeros]), np.concatenate([own, rest], axis=1)


def slope_priors(num: int, use_h: bool) -> list[tuple[Array, Array, float]]:
    """Prior mean [num] and covariance [num, num] of the signals' weights, probability; per share.

    Without h (`use_h`) the smoothed T1 has weight 0.
    """
    found = []
    for share, chance in (SHARES if use_h and num > 1 else {0.0: 1.0}).items():
        prior, covariance = np.zeros(num), VARIANCE_DEVIATION * np.eye(num)
        if use_h and num > 1:
            parts = np.array([1 - share, share])
            prior[:2] = TOTAL * parts
            covariance[:2, :2] = VARIANCE_TOTAL * np.outer(parts, parts)
            covariance[:2, :2] += VARIANCE_EACH * np.eye(2)
        else:
            prior[0], covariance[0, 0] = PRIOR_ALONE, VARIANCE_ALONE
            covariance[1:2] = 0.0
        found.append((prior, covariance, chance))
    return found


def _alike(same: Array, correlation: float) -> Array:
    return correlation + (1 - correlation) * same
