"""Which result of the full trainings counts: accuracy on clean images, or on corrupted ones.

A target is put in by exchanging the accuracies of the verifications, so that everything behind it,
weights, ablation and the choice of the winner, is the same for every target. As with clean images,
validation chooses and the test split is only reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llp.records import Verification

CORRUPTED = "accuracy on corrupted validation images"


def judged(verifications: Sequence[Verification], *, corrupted: bool) -> tuple[Verification, ...]:
    """The verifications with the accuracies that count as their validation and test accuracy."""
    if not corrupted:
        return tuple(verifications)
    return tuple(
        replace(
            each,
            validation_accuracy=each.corrupted_validation_accuracy,
            test_accuracy=each.corrupted_test_accuracy,
        )
        for each in verifications
    )
