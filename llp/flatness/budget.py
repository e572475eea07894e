"""How much tier 2 may cost, and what is measured with for it.

The cost of measuring one trial is held to `tier2.budget` (0.2) times the samples that its highest
probe saw. What gives way, in this order: the epochs of the refinements, down to 1, while they take
more than half; probe vectors and pairs of noise draws, down to 2, and then the eigenvalues, down to
1, as long as fewer than `ENOUGH_EXAMPLES` would be measured on; then the examples, down to
`MIN_EXAMPLES`. Where the least of everything is still over the budget, the dearest metric or
refinement is left out and named, until the rest fits; then, last first, each comes back with which
it still fits: metrics that share their products save nothing alone, so cheap ones go before them.
While it is measured (`profile.measure`), a metric that no longer fits into what the others have
left is not begun.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llp.flatness.context import FORWARD, GRADIENT_ROWS
from llp.flatness.metrics import GAINS
from llp.records import Rung
from llp.spec.schema import Tier2Spec

ENOUGH_EXAMPLES = 256
MIN_EXAMPLES = 32
MIN_REPEATS = 2
"""Probe vectors, and pairs of noise draws: the fewest that have a standard error."""
NUM_BATCHES = 8
"""Standard errors over batches have 7 degrees of freedom then."""
SIGMA_LEVELS = 4
"""Levels that the search for `noise_sigma` takes, about."""
PRODUCTS, PRODUCTS_PER_EIGENVALUE = 6, 4
"""Of Lanczos, about: those that confirm and begin, and those of each eigenvalue."""


@dataclass(frozen=True)
class MeasurementPlan:
    """What one trial is measured with.

    Attributes:
        options: The `tier2` section with the counts that were chosen.
        samples: About what it costs, in training examples.
        allowed: What it may cost; infinite without a budget.
        note: What was chosen, in words; empty without a budget.
        left_out: Metrics and refinements that were asked for and do not fit.
    """

    options: Tier2Spec
    samples: int
    allowed: float
    note: str
    left_out: tuple[str, ...] = ()

    @property
    def gradients(self) -> float:
        """Gradients over the measured examples that all metrics together may take."""
        refined = self.samples - gradient_equivalents(self.options) * self.options.num_examples
        return (self.allowed - max(0.0, refined)) / self.options.num_examples


def plan_measurement(options: Tier2Spec, rung: Rung) -> MeasurementPlan:
    """The plan for measuring a trial whose highest probe was on `rung`.

    >>> plan_measurement(Tier2Spec(refinements=[]), Rung(1, 0.1, 100, 15)).left_out
    ('hessian_eigenvalues', 'noise_sigma')
    """
    asked = options
    left_out: tuple[str, ...] = ()
    while (planned := _plan(options, rung, left_out)).samples > planned.allowed:
        left_out = (*left_out, _dearest(planned.options, rung))
        options = _without(asked, left_out)
    for name in left_out[::-1]:
        fewer = tuple(other for other in left_out if other != name)
        again = _plan(_without(asked, fewer), rung, fewer)
        if again.samples <= again.allowed:
            planned, left_out = again, fewer
    return planned


def _without(options: Tier2Spec, names: Sequence[str]) -> Tier2Spec:
    return options.model_copy(
        update={
            "metrics": [name for name in options.metrics if name not in names],
            "refinements": [name for name in options.refinements if name not in names],
        }
    )


def _dearest(options: Tier2Spec, rung: Rung) -> str:
    """What saves most when it is left out; the last of equals."""
    names = [*options.metrics, *options.refinements][::-1]
    return min(
        names, key=lambda name: _samples(_without(options, [name]), options.num_examples, rung)
    )


def _plan(options: Tier2Spec, rung: Rung, left_out: tuple[str, ...]) -> MeasurementPlan:
    most = min(options.num_examples, rung.num_examples)
    if options.budget == 0:
        chosen = options.model_copy(update={"num_examples": most})
        return MeasurementPlan(chosen, _samples(chosen, most, rung), math.inf, "")
    allowed = options.budget * rung.samples_seen
    enough = min(most, ENOUGH_EXAMPLES)
    probes, draws, values = options.num_probes, options.num_draws, options.num_eigenvalues
    epochs = options.refinement_epochs
    while epochs > 1 and epochs * _refined_in_an_epoch(options, rung) > allowed / 2:
        epochs -= 1

    def with_counts(num_examples: int) -> Tier2Spec:
        return options.model_copy(
            update={
                "num_examples": num_examples,
                "batch_size": max(
                    1, min(options.batch_size, math.ceil(num_examples / NUM_BATCHES))
                ),
                "num_probes": probes,
                "num_draws": draws,
                "num_eigenvalues": values,
                "refinement_epochs": epochs,
            }
        )

    def fits(num_examples: int) -> bool:
        return _samples(with_counts(num_examples), num_examples, rung) <= allowed

    while not fits(enough) and max(probes, draws) > MIN_REPEATS:
        probes = max(MIN_REPEATS, probes // 2) if probes > MIN_REPEATS else probes
        draws = max(MIN_REPEATS, draws // 2) if draws > MIN_REPEATS else draws
    if not fits(enough):
        values = 1
    low, high = min(most, MIN_EXAMPLES), most
    while low < high:  # the cost grows with the examples
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    chosen = with_counts(low)
    samples = _samples(chosen, low, rung)
    note = (
        f"budget {options.budget:g} of {rung.samples_seen:,} samples of the probe: {low} examples, "
        f"{probes} probe vectors, {draws} pairs of noise draws"
    )
    if "hessian_eigenvalues" in options.metrics:
        note += f", {values} eigenvalue{'s' * (values != 1)}"
    if options.refinements:
        note += f", refinements of {epochs} epoch{'s' * (epochs != 1)}"
    note += f"; predicted cost {100 * samples / rung.samples_seen:.1f} %"
    if left_out:
        note += f"; left out, as even the least of it is over the budget: {', '.join(left_out)}"
    return MeasurementPlan(chosen, samples, allowed, note, left_out)


def _samples(options: Tier2Spec, num_examples: int, rung: Rung) -> int:
    gradients = gradient_equivalents(options)
    refined = options.refinement_epochs * _refined_in_an_epoch(options, rung)
    return round(gradients * num_examples) + refined


def _refined_in_an_epoch(options: Tier2Spec, rung: Rung) -> int:
    return sum(GAINS.get(name, 1) for name in options.refinements) * rung.num_examples


def gradients_of_rest(options: Tier2Spec, begun: Sequence[str], rest: Sequence[str]) -> float:
    """About what the metrics of `rest` add to those of `begun`, in gradients."""

    def cost(names: Sequence[str]) -> float:
        return gradient_equivalents(options.model_copy(update={"metrics": list(names)}))

    return cost([*begun, *rest]) - cost(begun)


def gradient_equivalents(options: Tier2Spec) -> float:
    """About what the metrics of `options` cost together, in gradients over the measured examples.

    A forward pass counts a third of a gradient, a Hessian product two. The gradient, the losses,
    the Hessian's graph and its products with random signs are counted once.

    >>> gradient_equivalents(Tier2Spec(metrics=["gradient_norm", "calibration_error"]))
    1.0
    """
    metrics = set(options.metrics)
    total = 0.0
    if metrics & GRADIENT_ROWS:
        total += 1.0
    elif metrics & {"noise_sharpness", "noise_sigma", *_CONFIDENCE}:
        total += FORWARD
    total += FORWARD * len(metrics & {"sam_sharpness", "asam_sharpness"})
    total += 2 * FORWARD * options.num_draws * ("noise_sharpness" in metrics)
    total += 2 * FORWARD * options.num_draws * SIGMA_LEVELS * ("noise_sigma" in metrics)
    if metrics & {"hessian_eigenvalues", "hessian_trace", "adaptive_trace"}:
        total += 1.0
    if metrics & {"hessian_trace", "adaptive_trace"}:
        total += 2.0 * options.num_probes
    if "hessian_eigenvalues" in metrics:
        total += 2.0 * (PRODUCTS + PRODUCTS_PER_EIGENVALUE * options.num_eigenvalues)
    return total + len(metrics - _KNOWN)


_CONFIDENCE = frozenset({"calibration_error", "mean_entropy", "confidence_gap"})
_KNOWN = GRADIENT_ROWS | _CONFIDENCE | {
    "noise_sharpness", "noise_sigma", "hessian_eigenvalues", "hessian_trace", "adaptive_trace",
}  # fmt: skip
