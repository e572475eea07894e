"""What a tier-2 metric is given: one trained network, the examples it is measured on, and options.

Measurements run on the plain loss of fixed, unaugmented training examples, whatever smoothing or
augmentation the training used, so that trials are compared by the same function. Randomness comes
from `MetricContext.generator`, which depends on the study's seed and the metric's name only: every
trial gets the same probes and the same noise (common random numbers), whichever other metrics run.

Several metrics need the same things at the same weights: losses and outputs (`base`), the gradient
(`gradient`), Hessian products with random signs (`sign_products`), the Hessian's graph (`hessian`).
Each is computed once, by the first metric that asks. `Spent` keeps two accounts: what was spent,
and what the metrics would have cost had each computed all that it uses by itself.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llp import landscape
from llp.landscape import evaluation_state
from llp.landscape.estimators import Probes
from llp.landscape.parameters import exact_arithmetic, flatten, trainable
from llp.landscape.passes import BatchLosses, Gradient, batch_losses, gradient
from llp.records import Measurement
from llp.spec.schema import Tier2Spec
from llp.training import loop
from llp.training.jobs import Setup

FORWARD = 1 / 3
"""Cost of a pass that computes the loss alone, in gradients."""

GRADIENT_ROWS = frozenset({"sam_sharpness", "asam_sharpness", "gradient_norm"})
"""Metrics that need the gradient; with one of them the losses and outputs cost nothing more."""


@dataclass(frozen=True)
class Base:
    """What one pass at the weights gives.

    Attributes:
        losses: Of every batch.
        outputs: Of every batch, detached.
    """

    losses: BatchLosses
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class SignProducts:
    """Quadratic forms of random signs z: one Hessian product each serves both traces.

    Attributes:
        trace: `z' H z` `[K]`, float64; its mean estimates `sum H_ii`.
        adaptive: `(theta^2 z)' H z` `[K]`, float64; its mean estimates `sum theta_i^2 H_ii`.
    """

    trace: Tensor
    adaptive: Tensor


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
        wanted: The metrics that will run, so that one pass is made for all of them.
        note: What the budget chose, in words; empty without one.
        allowed: Gradients over the measured examples that the metrics may take.
        to_come: What those that have not begun will take of it, about.
    """

    model: nn.Module
    batches: Sequence[tuple[Any, Any]]
    options: Tier2Spec
    seed: int = 0
    fresh: Callable[[], Setup] | None = None
    loss_fn: loop.Criterion = functional.cross_entropy
    spent: Spent = field(default_factory=lambda: Spent())
    wanted: Sequence[str] = ()
    note: str = ""
    allowed: float = math.inf
    to_come: float = 0.0

    @property
    def left(self) -> float:
        """Gradients that the metric at work may take."""
        return self.allowed - self.spent.gradient_equivalents - self.to_come

    @cached_property
    def num_examples(self) -> int:
        """Training examples measured on."""
        return sum(len(targets) for _, targets in self.batches)

    def gradient(self) -> Gradient:
        """The gradient and its groups; counted as one gradient for whoever asks."""
        made = "_slope" not in self.__dict__
        found = self._slope[0]
        self.spent.add(1.0 if made else 0.0, alone=1.0)
        return found

    def base(self) -> Base:
        """Losses and outputs at the weights; free when a metric takes the gradient anyway."""
        if "_slope" not in self.__dict__ and not GRADIENT_ROWS.isdisjoint(self.wanted):
            self.spent.add(1.0, alone=0.0)
            _ = self._slope
        if "_slope" in self.__dict__:
            self.spent.add(0.0, alone=FORWARD)
            return self._slope[1]
        made = "_losses" not in self.__dict__
        found = self._losses
        self.spent.add(FORWARD if made else 0.0, alone=FORWARD)
        return found

    @cached_property
    def hessian(self) -> landscape.Curvature:
        """The Hessian on `batches`; shared by the metrics, so that its graph is built once."""
        return landscape.hessian(self.model, self.loss_fn, self.batches)

    @contextlib.contextmanager
    def counted_hessian(self) -> Iterator[landscape.Curvature]:
        """`hessian`, with what is done with it inside added to `spent`."""
        op = self.hessian
        before, had_graph = op.gradient_equivalents, self._has_graph()
        try:
            yield op
        finally:
            own = op.gradient_equivalents - before
            self.spent.add(own, alone=own + had_graph)

    def sign_products(self) -> SignProducts:
        """`options.num_probes` quadratic forms, from `generator("hessian_trace")`."""
        made = "_forms" not in self.__dict__
        before = self.hessian.gradient_equivalents
        had_graph = self._has_graph() if made else True
        forms = self._forms
        own = self.hessian.gradient_equivalents - before
        if made:
            self._forms_alone = own + had_graph
        self.spent.add(own, alone=self._forms_alone)
        return forms

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
        """`estimate` as a record, its own cost added to `spent`."""
        self.spent.add(estimate.gradient_equivalents, alone=estimate.gradient_equivalents)
        return Measurement(
            name=name,
            value=estimate.value,
            standard_error=estimate.standard_error,
            higher_is_better=higher_is_better,
            num_examples=self.num_examples,
            seconds=estimate.seconds,
            note=note,
        )

    def _has_graph(self) -> bool:
        """Whether a graph is kept that the next product does not have to build."""
        op = self.hessian
        return bool(op.num_gradients and op.plan is not None and op.plan.engine == "retained")

    @cached_property
    def _slope(self) -> tuple[Gradient, Base]:
        outputs: list[Any] = []
        with evaluation_state(self.model), exact_arithmetic(self._device):
            found = gradient(self.model, self._recorded(outputs), self.batches)
        return found, Base(found.losses, tuple(outputs))

    @cached_property
    def _losses(self) -> Base:
        outputs: list[Any] = []
        with evaluation_state(self.model), exact_arithmetic(self._device):
            losses = batch_losses(self.model, self._recorded(outputs), self.batches)
        return Base(losses, tuple(outputs))

    @cached_property
    def _forms(self) -> SignProducts:
        op = self.hessian
        probes = Probes(op, self.generator("hessian_trace"))
        squares = flatten(trainable(self.model)).double() ** 2
        left, plain, scaled = self.options.num_probes, list[float](), list[float]()
        with evaluation_state(self.model):
            while left > 0:
                drawn, images = probes.multiplied(min(left, probes.block()))
                for sign, image in zip(drawn.T, images.T, strict=True):
                    terms = sign.double() * image.double()
                    plain.append(float(terms.sum()))
                    scaled.append(float(terms @ squares))
                left -= drawn.shape[1]
        return SignProducts(*(torch.tensor(each, dtype=torch.float64) for each in (plain, scaled)))

    @property
    def _device(self) -> torch.device:
        return trainable(self.model)[0].device

    def _recorded(self, outputs: list[Any]) -> Callable[[Any, Any], Tensor]:
        def loss(found: Any, targets: Any) -> Tensor:
            outputs.append(found.detach() if isinstance(found, Tensor) else found)
            return self.loss_fn(found, targets)

        return loss


@dataclass
class Spent:
    """Cost of a profile.

    Attributes:
        gradient_equivalents: In gradients over the measured examples: a forward pass counts 1/3, a
            Hessian product 2, building its graph 1.
        training_examples: Examples that refinements trained on, repeats counted.
        alone: Gradient equivalents, had every metric so far computed all that it used by itself.
    """

    gradient_equivalents: float = 0.0
    training_examples: int = 0
    alone: float = 0.0

    def add(self, gradients: float, *, alone: float) -> None:
        """Adds to both accounts of gradients."""
        self.gradient_equivalents += gradients
        self.alone += alone

    def samples_seen(self, num_examples: int) -> int:
        """Both in training examples, with `num_examples` to a gradient."""
        return self.training_examples + round(self.gradient_equivalents * num_examples)
