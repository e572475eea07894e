"""Stop rules: when a running job is not worth finishing.

A rule is a pure function of the job's own curve and of the completed curves of other trials on the
same rung. A rule never trusts its own fit's residuals: a power law with plug-in sigma is badly
overconfident, so the spread (and the bias) of the forecast is measured on the completed curves, by
making the same forecast at the same epoch for each of them and comparing with what came out.
`CurveForecast` starts from a distribution that was fitted on other tasks, and corrects that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from llp.probing.curve_prior import Prior, load
from llp.probing.learning_curves import Forecast, extrapolate
from llp.records import Interval, LearningCurve, StopDecision

CONTINUE = StopDecision(stop=False)
CAUTION = 0.4
"""By how much forecasts are too sure of what is improbable, on tasks the prior does not know: of
stops at a probability below .05, 10 % were wrong there, at one below .02, 3 %."""
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


def forecast_of(
    errors: NDArray[np.float64],
    curve: LearningCurve,
    whole: Sequence[tuple[LearningCurve, NDArray[np.float64]]],
    num_points: int,
    prior: str = "",
) -> Forecast:
    """Forecast of the error at the end of the rung, corrected on the `complete` curves.

    `prior` names a file; empty for the prior that is shipped.
    """
    return extrapolate(
        [errors],
        horizon=num_points,
        schedule_remaining=_schedule_remaining(curve, [c for c, _ in whole]),
        finished=[finals for _, finals in whole] if whole else None,
        bounds=(0.0, 1.0),
        prior=_prior(prior) if prior else None,
    )


def predicted_final(
    curve: LearningCurve, *, num_points: int, ended: Sequence[LearningCurve]
) -> Interval | None:
    """90 % interval of the validation accuracy at the end of the rung; None without a point."""
    errors = 1 - np.array([point.validation_accuracy for point in curve.points])
    if not np.isfinite(errors).any():
        return None
    others = [c for c in ended if c.trial_id != curve.trial_id]
    found = forecast_of(errors, curve, complete(others, num_points), num_points)
    low, high = (float(q) for q in found.quantile([0.05, 0.95])[:, 0])
    return Interval(1 - high, 1 - low, 0.9)


def early_ranks(whole: Sequence[tuple[LearningCurve, NDArray[np.float64]]], num_seen: int) -> float:
    """Spearman's correlation of complete curves between a point and the end; 0 when all tie."""
    early = np.array([errors[num_seen - 1] for _, errors in whole])
    final = np.array([errors[-1] for _, errors in whole])
    if len(whole) < 2 or np.ptp(early) == 0 or np.ptp(final) == 0:
        return 0.0
    return float(stats.spearmanr(early, final)[0])


def complete(
    curves: Sequence[LearningCurve], num_points: int
) -> list[tuple[LearningCurve, NDArray[np.float64]]]:
    """The curves that have all their points, with their validation errors."""
    return [
        (c, errors)
        for c in curves
        if len(c.points) == num_points and (errors := _errors(c)) is not None
    ]


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
        whole = [c for c in others if len(c.points) == num_points]
        if seen < max(self.min_points, 4) or seen >= num_points:
            return CONTINUE
        if len(whole) < max(self.min_finished, 2, math.ceil(1 / keep_fraction)):
            return CONTINUE
        own = _errors(curve)
        if own is None:
            return CONTINUE
        misses, finals = [], []
        for other in whole:
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
            needed=needed,
        )


@dataclass(frozen=True)
class CurveForecast:
    """Stops a job that would be promoted from its rung with probability below `delta`.

    The distribution of the final validation accuracy is that of `learning_curves.extrapolate`,
    corrected on the completed curves of the rung; what it has to reach is the accuracy of place
    `keep_fraction` among all ended jobs, as in `PowerLaw`. The completed curves are those that no
    rule stopped, so they are better than the average, and the forecast errs to the high side.

    A forecast is only as good as early values are telling: while the rank correlation of the
    completed curves between this point and the end is below `min_correlation`, nothing is stopped.

    Attributes:
        delta: Share of wrong stops not to be exceeded, in (0, 0.5). The job stops when its forecast
            probability of being promoted is below `CAUTION * delta`.
        min_points: Points of the curve before the first decision; at least 4.
        min_finished: Completed curves on the rung before the first decision; at least 2.
        min_correlation: Spearman's rank correlation that the completed curves must show.
        margin: A result that misses what is needed by no more counts as reaching it; half a point
            of accuracy is the sampling error of 10,000 images.
        prior: File of a prior that `llp curves fit` made; empty for the one that is shipped.
    """

    delta: float = 0.05
    min_points: int = 4
    min_finished: int = 4
    min_correlation: float = 0.5
    margin: float = 0.005
    prior: str = ""
    name: str = "forecast"

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
        if seen < max(self.min_points, 4) or seen >= num_points:
            return CONTINUE
        own = _errors(curve)
        others = [c for c in ended if c.trial_id != curve.trial_id]
        whole = complete(others, num_points)
        if own is None or len(whole) < max(self.min_finished, 2, math.ceil(1 / keep_fraction)):
            return CONTINUE
        found = forecast_of(own, curve, whole, num_points, self.prior)
        low, high = (float(q) for q in found.quantile([0.05, 0.95])[:, 0])
        forecast = Interval(1 - high, 1 - low, 0.9)
        place = math.ceil((len(others) + 1) * keep_fraction)
        finals = sorted(float(errors[-1]) for _, errors in whole)
        if place > len(finals):
            return StopDecision(stop=False, predicted_final=forecast)
        needed = finals[place - 1]
        chance = float(found.probability_better_than(needed + self.margin)[0])
        if chance >= CAUTION * self.delta or early_ranks(whole, seen) < self.min_correlation:
            return StopDecision(stop=False, predicted_final=forecast)
        return StopDecision(
            stop=True,
            reason=self.name,
            predicted_final=forecast,
            detail=f"reaches accuracy {1 - needed:.3f}, place {place} of {len(others)} on rung "
            f"{curve.rung}, with probability {chance:.3f}; "
            f"forecast [{1 - high:.3f}, {1 - low:.3f}]",
            needed=1 - needed,
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


@dataclass(frozen=True)
class Divergence:
    """Stops a job whose training has blown up, though its losses are still finite.

    Losses that are not finite end a job as `diverged` without any rule. This is about what comes
    before or instead: the last `patience` training losses are all `factor` times the first or more,
    or the model had learned something (its loss had fallen below `learned` times the first) and has
    lost all of it again.

    Attributes:
        factor: Multiple of the first training loss that is too much, above 1.
        patience: Points in a row that must agree, at least 1.
        learned: Share of the first loss that must once have been reached for a loss back at the
            first to count as a collapse, in (0, 1).
    """

    factor: float = 3.0
    patience: int = 2
    learned: float = 0.8
    name: str = "divergence"

    def __post_init__(self) -> None:
        if not (self.factor > 1 and self.patience >= 1 and 0 < self.learned < 1):
            raise ValueError(
                f"needs factor > 1, patience >= 1 and learned in (0, 1), got {self.factor}, "
                f"{self.patience} and {self.learned}"
            )

    def decide(
        self,
        curve: LearningCurve,
        *,
        num_points: int,
        ended: Sequence[LearningCurve],
        keep_fraction: float,
    ) -> StopDecision:
        """The verdict after the last point of `curve`."""
        losses = np.array([point.train_loss for point in curve.points])
        num = len(losses)
        if num < self.patience + 1 or num >= num_points or not np.isfinite(losses).all():
            return CONTINUE
        first, lowest, last = losses[0], losses.min(), losses[-self.patience :].min()
        if first <= 0:
            return CONTINUE
        blown_up = last >= self.factor * first
        collapsed = lowest <= self.learned * first and last >= first
        if not (blown_up or collapsed):
            return CONTINUE
        what = "rose to" if blown_up else f"fell to {lowest:.4g} and is back at"
        return StopDecision(
            stop=True,
            reason=self.name,
            detail=f"training loss {what} {losses[-1]:.4g}, it began with {first:.4g}",
        )


@functools.cache
def _prior(path: str) -> Prior:
    return load(path)


def _errors(curve: LearningCurve) -> NDArray[np.float64] | None:
    """Validation error by epoch, or None when a point is not finite."""
    errors = 1 - np.array([point.validation_accuracy for point in curve.points])
    return errors if np.isfinite(errors).all() else None


def _schedule_remaining(curve: LearningCurve, whole: Sequence[LearningCurve]) -> float:
    """Share of the learning rate's decay to come, the end taken from completed curves."""
    rates = [np.array([point.learning_rate for point in c.points]) for c in (curve, *whole)]
    if not all(np.isfinite(r).all() and r.max() > 0 for r in rates):
        return math.nan
    end = float(np.median([r[-1] / r.max() for r in rates[1:]]))
    return float(np.clip(rates[0][-1] / rates[0].max() - end, 0, 1))
