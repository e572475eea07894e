"""What a tier-2 metric is given: one trained network, the examples it is measured on, and options.

Measurements run on the plain loss of fixed, unaugmented training examples, whatever smoothing or
augmentation the training used, so that trials are compared by the same function. Randomness comes
from `MetricContext.generator`, which depends on the study's seed and the metric's name only: every
trial gets the same probes and the same noise (common random numbers), whichever other metrics run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llp import landscape
from llp.records import Measurement
from llp.spec.schema import Tier2Spec
from llp.training import loop
from llp.training.jobs import Setup


@dataclass
class MetricContext:
    """One network to measure. Metrics leave `model` bit-identical and add their cost to `spent`.

    Attributes:
        model: At the checkpoint, on its device.
        batches: Fixed `(inputs, targets)` on the same device.
        options: The `tier2` section of the experiment.
        seed: Of the study.
        fresh: Makes a new network at the checkpoint with optimizer, training and validation
            batches, for refinements; None where there is nothing to train with.
        loss_fn: Mean loss of a batch.
        spent: Cost so far.
    """

    model: nn.Module
    batches: Sequence[tuple[Any, Any]]
    options: Tier2Spec
    seed: int = 0
    fresh: Callable[[], Setup] | None = None
    loss_fn: loop.Criterion = functional.cross_entropy
    spent: Spent = field(default_factory=lambda: Spent())

    @cached_property
    def num_examples(self) -> int:
        """Training examples measured on."""
        return sum(len(targets) for _, targets in self.batches)

    @cached_property
    def hessian(self) -> landscape.Hessian:
        """The Hessian on `batches`; shared by the metrics, so that its graph is built once."""
        return landscape.hessian(self.model, self.loss_fn, self.batches)

    def generator(self, name: str) -> torch.Generator:
        """A fresh CPU generator for the metric `name`."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))

    def measurement(
        self,
        name: str,
        estimate: landscape.Estimate,
        *,
        higher_is_better: bool | None = None,
        note: str = "",
    ) -> Measurement:
        """`estimate` as a record, its cost added to `spent`."""
        self.spent.gradient_equivalents += estimate.gradient_equivalents
        return Measurement(
            name=name,
            value=estimate.value,
            standard_error=estimate.standard_error,
            higher_is_better=higher_is_better,
            num_examples=self.num_examples,
            seconds=estimate.seconds,
            note=note,
        )


@dataclass
class Spent:
    """Cost of a profile.

    Attributes:
        gradient_equivalents: In gradients over the measured examples: a forward pass counts 1/3, a
            Hessian product 2, building its graph 1.
        training_examples: Examples that refinements trained on, repeats counted.
    """

    gradient_equivalents: float = 0.0
    training_examples: int = 0

    def samples_seen(self, num_examples: int) -> int:
        """Both in training examples, with `num_examples` to a gradient."""
        return self.training_examples + round(self.gradient_equivalents * num_examples)
