"""How sure a classifier is of its outputs, against how often it is right.

Words: the *confidence* of an example is the largest predicted probability. The *calibration error*
is the expected calibration error (Guo et al. 2017, section 2): the mean over bins of equal width of
|accuracy - confidence|, weighted by the examples in each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llp.landscape.parameters import evaluation_state, exact_arithmetic, trainable
from llp.landscape.passes import Batches, iterate
from llp.landscape.plain import Plain

NUM_BINS = 15
NUM_RESAMPLES = 200

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Confidence(Plain):
    """Confidence and accuracy on the same examples; standard errors are over examples.

    Attributes:
        accuracy: Share of the examples whose most probable class is right.
        mean_confidence: Mean of the largest predicted probability.
        calibration_error: Expected calibration error, in [0, 1].
        calibration_error_standard_error: By resampling the examples.
        mean_entropy: Of the predicted distributions, in nats.
        mean_entropy_standard_error: Of the mean.
        confidence_gap: Mean confidence minus accuracy, in [-1, 1]; above 0 where the network is
            too sure.
        confidence_gap_standard_error: Of the mean.
        num_examples: Examples.
        bin_count: Examples in each bin of confidence; the bins divide [0, 1] equally.
        bin_confidence: Their mean confidence; NaN where there are none.
        bin_accuracy: Share of them that is right; NaN where there are none.
        num_forwards: Passes over the data.
        seconds: Wall-clock time.
    """

    accuracy: float
    mean_confidence: float
    calibration_error: float
    calibration_error_standard_error: float
    mean_entropy: float
    mean_entropy_standard_error: float
    confidence_gap: float
    confidence_gap_standard_error: float
    num_examples: int
    bin_count: Array
    bin_confidence: Array
    bin_accuracy: Array
    num_forwards: int
    seconds: float


def confidence(
    model: nn.Module, batches: Batches, *, num_bins: int = NUM_BINS, seed: int = 0
) -> Confidence:
    """Confidence, accuracy and calibration error of a classifier in eval mode.

    Args:
        model: Gives `[N, classes]` logits.
        batches: Re-iterable of `(inputs, labels)`.
        num_bins: Of the calibration error.
        seed: Of the resampling behind its standard error.

    Raises:
        ValueError: The outputs are no `[N, classes]` for labels `[N]`.

    >>> model = nn.Linear(2, 2)
    >>> found = confidence(model, [(torch.eye(2), torch.tensor([0, 1]))])
    >>> abs(found.mean_confidence - found.accuracy - found.confidence_gap) < 1e-12
    True
    """
    started = time.perf_counter()
    device = trainable(model)[0].device
    outputs, targets = [], []
    with evaluation_state(model), exact_arithmetic(device), torch.no_grad():
        for inputs, labels, _ in iterate(batches, device):
            outputs.append(model(inputs))
            targets.append(labels)
    return of_outputs(outputs, targets, num_bins=num_bins, seed=seed, started=started)


def of_outputs(
    outputs: Sequence[Any],
    targets: Sequence[Any],
    *,
    num_bins: int = NUM_BINS,
    seed: int = 0,
    started: float | None = None,
) -> Confidence:
    """The same from logits that are there already.

    Raises:
        ValueError: As `confidence`.
    """
    started = time.perf_counter() if started is None else started
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins}")
    for found, wanted in zip(outputs, targets, strict=True):
        fits = isinstance(found, Tensor) and isinstance(wanted, Tensor)
        if not fits or found.ndim != 2 or wanted.ndim != 1 or wanted.is_floating_point():
            raise ValueError("confidence needs outputs [N, classes] and labels [N]")
    logits = torch.cat([each.detach().double().cpu() for each in outputs])
    labels = torch.cat([each.detach().cpu() for each in targets])
    logs = torch.log_softmax(logits, dim=1)
    largest, said = logs.exp().max(dim=1)
    sure, hit = largest.numpy(), (said == labels).double().numpy()
    entropy, entropy_error = _mean(torch.special.entr(logs.exp()).sum(dim=1).numpy())
    gap, gap_error = _mean(sure - hit)
    place = np.clip(np.ceil(sure * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    error, error_error = _calibration(sure, hit, place, num_bins, seed)
    counts = np.bincount(place, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        sums = (np.bincount(place, weights, num_bins) / counts for weights in (sure, hit))
        bin_confidence, bin_accuracy = sums
    return Confidence(
        accuracy=float(hit.mean()),
        mean_confidence=float(sure.mean()),
        calibration_error=error,
        calibration_error_standard_error=error_error,
        mean_entropy=entropy,
        mean_entropy_standard_error=entropy_error,
        confidence_gap=gap,
        confidence_gap_standard_error=gap_error,
        num_examples=len(hit),
        bin_count=counts,
        bin_confidence=bin_confidence,
        bin_accuracy=bin_accuracy,
        num_forwards=1,
        seconds=time.perf_counter() - started,
    )


def _calibration(
    sure: Array, hit: Array, place: Array, num_bins: int, seed: int
) -> tuple[float, float]:
    """The calibration error and its standard deviation over resamples of the examples."""
    count = len(hit)
    gaps = np.zeros((count, num_bins))
    gaps[np.arange(count), place] = hit - sure
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES)
    resampled = np.abs(draws @ gaps).sum(axis=1) / count
    return float(np.abs(gaps.sum(axis=0)).sum() / count), float(resampled.std(ddof=1))


def _mean(values: Array) -> tuple[float, float]:
    count = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return float(values.mean()), error
