"""Averages of the weights along a training: stochastic weight averaging and moving averages.

SWA: at the constant learning rate of the last part of a training, weights wander around a region of
low loss; their plain mean lies in it, where the loss is flatter. Izmailov et al., "Averaging
Weights Leads to Wider Optima and Better Generalization", UAI 2018, algorithm 1; 75 % of the epochs
before and half the peak learning rate (.05 of .1) are theirs for CIFAR. Weights are taken
`swa_averages` times, evenly, where theirs are taken once an epoch: jobs here may have few epochs.

EMA: `a <- d a + (1 - d) w` after every step, with `d = min(ema_decay, (1 + n) / (10 + n))` at the
`n`-th, so that a short training is not dominated by its first weights (the rule of TensorFlow's
`ExponentialMovingAverage`).

The judged network is then the average, with batch-norm statistics estimated at the average
(`wrapper.estimate_statistics`). The numbers are those of torch's `AveragedModel`; that class is
not used in the step because it asks the GPU for the number of averages each time.

Every row of `registry.AVERAGINGS` is `row(model, *, num_steps, **options) -> WeightAverage | None`,
with options whose names do not meet those of optimizers and models.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llp import registry
from llp.errors import SpecError, unknown
from llp.optim.wrapper import estimate_statistics

Schedule = Callable[[int], float]
"""Step of the job -> multiplier of the peak learning rates."""

ANNEAL = 0.1
"""Share of SWA's part in which the learning rate goes over to its constant value, by a cosine."""

EMA_WARMUP = 10


class WeightAverage:
    """An average of the weights of `model`, kept up to date from outside by `after_step`.

    Args:
        model: The network that is trained.
        first_step: Steps of the job after which the first weights are taken, at least 1.
        interval: Steps between one taking and the next, at least 1.
        share: Number of weights taken before -> share that the new ones get in the average.
        schedule: Changes the learning-rate schedule; None leaves it.

    Attributes:
        module: A copy of the network with the averaged weights; its buffers are those at `refresh`.
        count: How many weights are in the average; 0 until the first are taken.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        first_step: int,
        interval: int,
        share: Callable[[int], float],
        schedule: Callable[[Schedule], Schedule] | None = None,
    ) -> None:
        self._model, self._share, self._schedule = model, share, schedule
        self.first_step, self.interval = max(1, first_step), max(1, interval)
        self.module = copy.deepcopy(model).requires_grad_(False)
        # Parameters that are shared come once, in the same order, in both networks. Going through
        # all modules each time would take longer than the averaging.
        self._weights: tuple[list[Tensor], list[Tensor]] = (
            list(self.module.parameters()),
            list(model.parameters()),
        )
        self.count = 0
        self._taken = -1  # number of the last moment at which weights were taken

    def schedule(self, planned: Schedule) -> Schedule:
        """The schedule to train by, made of the one that was planned."""
        return planned if self._schedule is None else self._schedule(planned)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Takes the weights in, if a moment for it was reached since the last call.

        Args:
            step: Steps (batches) of the job done so far.
        """
        moment = (step - self.first_step) // self.interval
        if step < self.first_step or moment <= self._taken:
            return
        self._taken = moment
        own, new = self._weights
        if self.count == 0:
            torch._foreach_copy_(own, new)
        else:
            torch._foreach_lerp_(own, new, self._share(self.count))
        self.count += 1

    @torch.no_grad()
    def refresh(self, batches: Iterable[Any]) -> int:
        """Brings the buffers of `module` up to date; with batch norm, from `batches`.

        Args:
            batches: `(inputs, targets)` of training data; read only where there is batch norm.

        Returns:
            Examples that went through the network.
        """
        for own, new in zip(self.module.buffers(), self._model.buffers(), strict=True):
            own.copy_(new)
        return estimate_statistics(self.module, batches)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the average and how far it is."""
        return {"module": self.module.state_dict(), "count": self.count, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.count, self._taken = state["count"], state["taken"]


def build(name: str, model: nn.Module, *, num_steps: int, **options: Any) -> WeightAverage | None:
    """The average called `name` of the weights of `model`; None for no average.

    Args:
        name: A row of `registry.AVERAGINGS`, an entry point, or `my_package:my_average`.
        model: The network that will be trained.
        num_steps: Steps (batches) of the whole job.
        options: Of this row only.

    Raises:
        SpecError: Unknown name or option, or a value out of range.
    """
    known = registry.options("averagings", name)
    for option in options:
        if option not in known:
            raise SpecError(f"averaging '{name}': {unknown('option', option, known)}")
    try:
        made: WeightAverage | None = registry.load("averagings", name)(
            model, num_steps=num_steps, **options
        )
    except (ValueError, TypeError) as error:
        raise SpecError(f"averaging '{name}' with {options or 'its defaults'}: {error}") from error
    return made


def none(model: nn.Module, *, num_steps: int) -> None:
    """No average."""


def swa(
    model: nn.Module,
    *,
    num_steps: int,
    swa_start: float = 0.75,
    swa_learning_rate: float = 0.5,
    swa_averages: int = 32,
) -> WeightAverage:
    """Stochastic weight averaging over the last part of a training.

    Args:
        model: The network that will be trained.
        num_steps: Steps of the job.
        swa_start: Share of the steps that follow the schedule as planned, in [0, 1).
        swa_learning_rate: Of the steps after, as a share of the peak learning rate, above 0.
        swa_averages: How many times weights are taken at most, at least 1; the last time at the
            end.

    Raises:
        ValueError: A value out of range.
    """
    if not 0 <= swa_start < 1:
        raise ValueError(f"swa_start must be at least 0 and below 1, not {swa_start!r}")
    if not 0 < swa_learning_rate < math.inf:
        raise ValueError(f"swa_learning_rate must be finite and above 0, not {swa_learning_rate!r}")
    if swa_averages < 1:
        raise ValueError(f"swa_averages must be at least 1, not {swa_averages!r}")
    start = min(round(swa_start * num_steps), num_steps - 1)
    interval = max(1, (num_steps - start) // swa_averages)
    taken = min(swa_averages, (num_steps - start) // interval)
    return WeightAverage(
        model,
        first_step=num_steps - (taken - 1) * interval,
        interval=interval,
        share=lambda count: 1 / (count + 1),
        schedule=lambda planned: constant_from(
            planned, start, swa_learning_rate, anneal_steps=round(ANNEAL * (num_steps - start))
        ),
    )


def constant_from(planned: Schedule, start: int, level: float, *, anneal_steps: int) -> Schedule:
    """`planned` before `start`, then over to the constant `level` by half a cosine.

    What torch's `SWALR` does when it takes over after `start` steps, with
    `anneal_epochs = anneal_steps`.
    """

    def at(step: int) -> float:
        if step < start:
            return planned(step)
        share = 1.0 if anneal_steps == 0 else min((step - start) / anneal_steps, 1.0)
        weight = (1 - math.cos(math.pi * share)) / 2
        return level * weight + planned(start) * (1 - weight)

    return at


def ema(model: nn.Module, *, num_steps: int, ema_decay: float = 0.999) -> WeightAverage:
    """Exponential moving average of the weights, from the first step on.

    Args:
        model: The network that will be trained.
        num_steps: Steps of the job; not needed.
        ema_decay: Share that the average keeps at a step in the long run, in [0, 1).

    Raises:
        ValueError: A value out of range.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be at least 0 and below 1, not {ema_decay!r}")
    return WeightAverage(
        model,
        first_step=1,
        interval=1,
        share=lambda count: 1 - min(ema_decay, (1 + count) / (EMA_WARMUP + count)),
    )
