"""What a little more, flatness-seeking training adds to a checkpoint: a probe of its surroundings.

`swa_gain`: stochastic weight averaging (Izmailov et al. 2018). Training goes on from the checkpoint
at a constant learning rate, weights are averaged on the way, and batch statistics are taken anew at
the average.

`sam_gain`, `entropy_sgd_gain`: training goes on with SAM or Entropy-SGD around the optimizer of the
trial, at a low learning rate that ends at zero: a few epochs of SAM at the end of a training find
what SAM finds (Zhou et al., 2025, "Sharpness-Aware Minimization Efficiently Selects Flatter Minima
Late In Training").

The validation loss and accuracy afterwards are compared with the checkpoint's, example by example.
What plain training would have added in as many epochs is part of each gain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from llp.flatness.context import MetricContext
from llp.optim.entropy_sgd import EntropySGD
from llp.optim.sam import SharpnessAware
from llp.optim.wrapper import Wrapper, estimate_statistics, gradients_per_step
from llp.records import Measurement
from llp.training import loop, schedules
from llp.training.jobs import Setup

LEARNING_RATE_SHARE = 0.5
"""Of the peak learning rate: .05 for networks trained at .1 (Izmailov et al., section 4)."""

AVERAGES_PER_EPOCH = 8
"""Weights are averaged this often. Once per epoch, as in the paper, is too few for two epochs."""

FINAL_SHARE = 0.1
"""Of the peak learning rate, where the continuations with SAM and Entropy-SGD begin their cosine:
about where a cosine schedule is when 80 % of a training are over."""

INNER_STEPS = 5
"""Of Entropy-SGD, as its row has it."""


def swa_gain(context: MetricContext) -> list[Measurement]:
    """The gain of `refinement_epochs` epochs of weight averaging, on the validation split.

    Two measurements: `swa_gain`, accuracy of the average minus that of the checkpoint, and
    `swa_gain_loss`, loss of the checkpoint minus that of the average. Standard errors from paired
    per-example differences over the validation examples, `sd / sqrt(n)`. `num_examples` is that of
    the validation split. The first quarter of the steps is not averaged.

    Raises:
        ValueError: The context has nothing to train with.
        llp.training.loop.Diverged: The continued training did.
    """
    epochs = context.options.refinement_epochs

    def refine(setup: Setup, device: torch.device) -> tuple[nn.Module, str]:
        average = averaged(setup, epochs, device)
        several, same_batch = gradients_per_step(setup.optimizer)
        passes = several if same_batch else 1
        context.spent.training_examples += passes * epochs * setup.train.num_examples
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in average.modules()):
            estimate_statistics(average, context.batches, device)
            context.spent.add(1 / 3, alone=1 / 3)
        note = f"{int(average.n_averaged)} averages, {epochs} epochs, "
        return average.module, f"{note}{LEARNING_RATE_SHARE:g} x peak learning rate"

    return _gains(context, "swa_gain", refine)


def sam_gain(context: MetricContext) -> list[Measurement]:
    """The gain of `refinement_epochs` epochs of SAM at `rho`.

    Measurements and errors as `swa_gain`.

    Raises:
        ValueError: The context has nothing to train with.
        llp.training.loop.Diverged: The continued training did.
    """
    rho = context.options.rho
    return _gains(
        context,
        "sam_gain",
        lambda setup, device: _continued(
            context, setup, device, lambda base: SharpnessAware(base, rho=rho), f"rho {rho:g}"
        ),
    )


def entropy_sgd_gain(context: MetricContext) -> list[Measurement]:
    """The gain of `refinement_epochs` epochs of Entropy-SGD with the defaults of its row.

    Measurements and errors as `swa_gain`.

    Raises:
        ValueError: The context has nothing to train with.
        llp.training.loop.Diverged: The continued training did.
    """
    return _gains(
        context,
        "entropy_sgd_gain",
        lambda setup, device: _continued(
            context,
            setup,
            device,
            lambda base: EntropySGD(base, inner_steps=INNER_STEPS, seed=context.seed),
            f"{INNER_STEPS} inner steps",
        ),
    )


def _gains(
    context: MetricContext,
    name: str,
    refine: Callable[[Setup, torch.device], tuple[nn.Module, str]],
) -> list[Measurement]:
    """What `refine` changes: accuracy gained and loss lost, against the checkpoint."""
    if context.fresh is None:
        raise ValueError(f"{name} needs training and validation batches")
    started = time.perf_counter()
    context.hessian.release()  # its graph may hold a quarter of the device's memory
    setup = context.fresh()
    device = next(setup.model.parameters()).device
    before = _per_example(setup.model, setup)
    model, note = refine(setup, device)
    after = _per_example(model, setup)
    seconds = time.perf_counter() - started
    gains = {name: after[1] - before[1], f"{name}_loss": before[0] - after[0]}
    return [
        Measurement(
            name=each,
            value=float(gain.mean()),
            standard_error=float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.nan,
            higher_is_better=None,
            num_examples=len(gain),
            seconds=seconds / len(gains),
            note=note,
        )
        for each, gain in gains.items()
    ]


def _continued(
    context: MetricContext,
    setup: Setup,
    device: torch.device,
    around: Callable[[Optimizer], Wrapper],
    options: str,
) -> tuple[nn.Module, str]:
    """The network of `setup` after some epochs with `around` its optimizer, and a note."""
    epochs, optimizer = context.options.refinement_epochs, setup.optimizer
    base = optimizer.base if isinstance(optimizer, Wrapper) else optimizer
    for group in base.param_groups:
        group["lr"] *= FINAL_SHARE
    steps = loop.Steps(
        model=setup.model,
        optimizer=around(base),
        criterion=setup.criterion,
        schedule=schedules.planned(
            "cosine", num_steps=epochs * len(setup.train), warmup_fraction=0.0
        ),
        device=device,
        precision=setup.precision,
        gradient_clip=setup.gradient_clip,
        num_correct=setup.num_correct,
    )
    for epoch in range(epochs):
        progress = loop.train_epoch(
            steps, setup.train.epoch(epoch), first_step=epoch * len(setup.train)
        )
        context.spent.training_examples += progress.samples_seen
    note = f"{options}, {epochs} epochs, from {FINAL_SHARE:g} x peak learning rate"
    return setup.model, note


def averaged(setup: Setup, epochs: int, device: torch.device) -> AveragedModel:
    """Trains `setup` on at half its peak learning rate and returns the average of its weights.

    Batch-norm statistics of the average are not re-estimated: that is `estimate_statistics`.
    """
    for group in setup.optimizer.param_groups:
        group["lr"] *= LEARNING_RATE_SHARE
    steps = loop.Steps(
        model=setup.model,
        optimizer=setup.optimizer,
        criterion=setup.criterion,
        schedule=lambda step: 1.0,
        device=device,
        precision=setup.precision,
        gradient_clip=setup.gradient_clip,
        num_correct=setup.num_correct,
    )
    average = AveragedModel(setup.model)
    per_epoch = len(setup.train)
    interval = max(1, per_epoch // AVERAGES_PER_EPOCH)
    skipped = epochs * per_epoch // 4
    for epoch in range(epochs):
        first_step = epoch * per_epoch

        def collect(progress: loop.Progress, first_step: int = first_step) -> None:
            step = first_step + progress.steps
            if step > skipped and (epochs * per_epoch - step) % interval == 0:
                average.update_parameters(setup.model)

        loop.train_epoch(steps, setup.train.epoch(epoch), first_step=first_step, after_step=collect)
    return average


@torch.no_grad()
def _per_example(model: nn.Module, setup: Setup) -> tuple[Tensor, Tensor]:
    """Loss and hit (0 or 1) of every validation example, float64 on the CPU."""
    losses, hits = [], []
    model.eval()
    for inputs, targets in setup.validation.epoch(0):
        outputs = model(inputs)
        losses.append(_split(setup.validation_criterion, outputs, targets))
        hits.append(_split(setup.num_correct, outputs, targets))
    return torch.cat(losses).double().cpu(), torch.cat(hits).double().cpu()


def _split(function: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Tensor:
    """A batch function's value on each example alone."""
    if function is functional.cross_entropy:
        return functional.cross_entropy(outputs, targets, reduction="none")
    if function is loop.num_correct and outputs.ndim == 2 and targets.ndim == 1:
        hits: Tensor = outputs.argmax(1) == targets
        return hits
    return torch.stack(
        [function(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    )
