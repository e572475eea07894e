"""Stop rules: when a running job is not worth finishing.

A rule is a pure function of the job's own curve and of the completed curves of other trials on the
same rung. A rule never trusts its own fit's residuals: a power law with plug-in sigma is badly
overconfident, so the spread (and the bias) of the forecast is measured on the completed curves, by
making the same forecast at the same epoch for each of them and comparing with what came out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from llp.records import Interval, LearningCurve, StopDecision

CONTINUE = StopDecision(stop=False)
_EXPONENTS = np.linspace(0.1, 2.0, 20)


def power_law_forecast(errors: Sequence[float] | NDArray[np.float64], horizon: int) -> float:
    """The value at `horizon` of the least-squares fit `error(t) = c + a t^-b`, t = 1, 2, ...

    `b` is searched on a grid over [0.1, 2]; `a >= 0`, and the result is clipped to [0, 1].

    Args:
        errors: Error rates after epochs 1..m, m >= 2; finite.
        horizon: Epoch to forecast, at least m.

    >>> curve = [0.1 + 0.5 * t**-0.5 for t in range(1, 9)]
    >>> round(power_law_forecast(curve, 16), 3)
    0.225
    """
    y = np.asarray(errors, dtype=float)
    t = np.arange(1, len(y) + 1, dtype=float)
    x = t[None, :] ** -_EXPONENTS[:, None]
    centred = x - x.mean(axis=1, keepdims=True)
    slope = np.maximum((centred * (y - y.mean())).sum(axis=1) / (centred**2).sum(axis=1), 0.0)
    offset = y.mean() - slope * x.mean(axis=1)
    residual = ((offset[:, None] + slope[:, None] * x - y) ** 2).sum(axis=1)
    best = int(residual.argmin())
    forecast = offset[best] + slope[best] * horizon ** -_EXPONENTS[best]
    return float(np.clip(forecast, 0.0, 1.0))


@dataclass(frozen=True)
class PowerLaw:
    """Stops a job whose forecast is clearly below what would be promoted from its rung.

    The forecast at the rung's last epoch is a power law through the validation error, moved by the
    mean error of the same forecast on completed curves, with a Student-t interval from their
    spread: `forecast + mean(e) +- t_{n-1} * sd(e) * sqrt(1 + 1/n)`. The job stops when the upper
    end lies below the accuracy that the best `keep_fraction` of all ended jobs reached. Jobs that
    were stopped before count among them: a place among the survivors alone would grow harder to
    reach with every stop.

    Attributes:
        min_points: Points of the curve before the first decision; at least 4.
        confidence: One-sided confidence of the upper end, in (0.5, 1).
        min_finished: Completed curves on the rung before the first decision; at least 2.
        min_spread: Least standard deviation of the forecast's error, in accuracy; few completed
            curves may agree by chance. Half a point is the sampling error of 10,000 images.
    """

    min_points: int = 4
    confidence: float = 0.95
    min_finished: int = 2
    min_spread: float = 0.005
    name: str = "power_law"

    def decide(
        self,
        curve: LearningCurve,
        *,
        num_points: int,
        ended: Sequence[LearningCurve],
        keep_fraction: float,
    ) -> StopDecision:
        """The verdict after the last point of `curve`."""
        seen = len(curve.points)
        others = [c for c in ended if c.trial_id != curve.trial_id]
        complete = [c for c in others if len(c.points) == num_points]
        if seen < max(self.min_points, 4) or seen >= num_points:
            return CONTINUE
        if len(complete) < max(self.min_finished, 2, math.ceil(1 / keep_fraction)):
            return CONTINUE
        own = _errors(curve)
        if own is None:
            return CONTINUE
        misses, finals = [], []
        for other in complete:
            errors = _errors(other)
            if errors is not None:
                finals.append(errors[-1])
                misses.append(errors[-1] - power_law_forecast(errors[:seen], num_points))
        if len(misses) < 2:
            return CONTINUE
        n = len(misses)
        middle = power_law_forecast(own, num_points) + float(np.mean(misses))
        spread = max(float(np.std(misses, ddof=1)), self.min_spread) * math.sqrt(1 + 1 / n)
        reach = float(stats.t.ppf(self.confidence, n - 1)) * spread
        low, high = max(0.0, 1 - middle - reach), min(1.0, 1 - middle + reach)
        place = math.ceil((len(others) + 1) * keep_fraction)
        needed = 1 - sorted(finals)[place - 1] if place <= n else 0.0
        forecast = Interval(low, high, 2 * self.confidence - 1)
        if high >= needed:
            return StopDecision(stop=False, predicted_final=forecast)
        return StopDecision(
            stop=True,
            reason=self.name,
            predicted_final=forecast,
            detail=f"forecast accuracy [{low:.3f}, {high:.3f}] at the end is below "
            f"{needed:.3f}, place {place} of {len(others)} on rung {curve.rung}",
        )


@dataclass(frozen=True)
class Plateau:
    """Stops a job whose validation loss has not improved for a share of its rung.

    Attributes:
        patience_fraction: Share of the rung's epochs without improvement, in (0, 1].
        min_points: Points of the curve before the first decision.
    """

    patience_fraction: float = 0.5
    min_points: int = 4
    name: str = "plateau"

    def decide(
        self,
        curve: LearningCurve,
        *,
        num_points: int,
        ended: Sequence[LearningCurve],
        keep_fraction: float,
    ) -> StopDecision:
        """The verdict after the last point of `curve`."""
        losses = np.array([point.validation_loss for point in curve.points])
        if len(losses) < self.min_points or len(losses) >= num_points or np.isnan(losses).all():
            return CONTINUE
        best = int(np.nanargmin(losses))
        waited = len(losses) - 1 - best
        if waited < math.ceil(self.patience_fraction * num_points):
            return CONTINUE
        return StopDecision(
            stop=True,
            reason=self.name,
            detail=f"validation loss has not improved on {losses[best]:.4f} (point {best + 1}) "
            f"for {waited} of {num_points} points",
        )


def _errors(curve: LearningCurve) -> NDArray[np.float64] | None:
    """Validation error by epoch, or None when a point is not finite."""
    errors = 1 - np.array([point.validation_accuracy for point in curve.points])
    return errors if np.isfinite(errors).all() else None
