"""How much tier 2 may cost, and what is measured with for it.

The cost of measuring one trial is held to `tier2.budget` (0.2) times the samples that its highest
probe saw. What gives way, in this order: the epochs of the refinements, down to 1, while they take
more than half; probe vectors and pairs of noise draws, down to 2, and then the eigenvalues, down to
1, as long as fewer than `ENOUGH_EXAMPLES` would be measured on; then the examples, down to
`MIN_EXAMPLES`. A metric that was asked for is never left out: where the least of everything is
still over the budget, the plan says so.
"""

from __future__ import annotations

import math
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
PRODUCTS_PER_EIGENVALUE = 6
"""Of Lanczos, about."""


@dataclass(frozen=True)
class MeasurementPlan:
    """What one trial is measured with.

    Attributes:
        options: The `tier2` section with the counts that were chosen.
        samples: About what it costs, in training examples.
        allowed: What it may cost; infinite without a budget.
        note: What was chosen, in words; empty without a budget.
    """

    options: Tier2Spec
    samples: int
    allowed: float
    note: str


def plan_measurement(options: Tier2Spec, rung: Rung) -> MeasurementPlan:
    """The plan for measuring a trial whose highest probe was on `rung`."""
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
    if samples > allowed:
        note += ", over the budget: the least that these metrics take"
    return MeasurementPlan(chosen, samples, allowed, note)


def _samples(options: Tier2Spec, num_examples: int, rung: Rung) -> int:
    gradients = gradient_equivalents(options)
    refined = options.refinement_epochs * _refined_in_an_epoch(options, rung)
    return round(gradients * num_examples) + refined


def _refined_in_an_epoch(options: Tier2Spec, rung: Rung) -> int:
    return sum(GAINS.get(name, 1) for name in options.refinements) * rung.num_examples


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
        total += 2.0 * PRODUCTS_PER_EIGENVALUE * options.num_eigenvalues
    return total + len(metrics - _KNOWN)


_CONFIDENCE = frozenset({"calibration_error", "mean_entropy", "confidence_gap"})
_KNOWN = GRADIENT_ROWS | _CONFIDENCE | {
    "noise_sharpness", "noise_sigma", "hessian_eigenvalues", "hessian_trace", "adaptive_trace",
}  # fmt: skip
