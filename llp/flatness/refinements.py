"""What a little more, flatness-seeking training adds to a checkpoint: a probe of its surroundings.

`swa_gain`: stochastic weight averaging (Izmailov et al. 2018). Training goes on from the checkpoint
at a constant learning rate, weights are averaged on the way, batch statistics are taken anew at the
average, and the validation loss and accuracy of the average are compared with the checkpoint's,
example by example.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, update_bn

from llp.flatness.context import MetricContext
from llp.records import Measurement
from llp.training import loop
from llp.training.jobs import Setup

LEARNING_RATE_SHARE = 0.5
"""Of the peak learning rate: .05 for networks trained at .1 (Izmailov et al., section 4)."""

AVERAGES_PER_EPOCH = 8
"""Weights are averaged this often. Once per epoch, as in the paper, is too few for two epochs."""


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
    if context.fresh is None:
        raise ValueError("swa_gain needs training and validation batches")
    started = time.perf_counter()
    context.hessian.release()  # its graph may hold a quarter of the device's memory
    setup = context.fresh()
    device = next(setup.model.parameters()).device
    before = _per_example(setup.model, setup)
    average = averaged(setup, context.options.refinement_epochs, device)
    context.spent.training_examples += context.options.refinement_epochs * setup.train.num_examples
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in average.modules()):
        update_bn(context.batches, average, device)
        context.spent.gradient_equivalents += 1 / 3
    after = _per_example(average.module, setup)
    seconds = time.perf_counter() - started
    gains = {"swa_gain": after[1] - before[1], "swa_gain_loss": before[0] - after[0]}
    return [
        Measurement(
            name=name,
            value=float(gain.mean()),
            standard_error=float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.nan,
            higher_is_better=None,
            num_examples=len(gain),
            seconds=seconds / len(gains),
            note=f"{int(average.n_averaged)} averages, {context.options.refinement_epochs} epochs, "
            f"{LEARNING_RATE_SHARE:g} x peak learning rate",
        )
        for name, gain in gains.items()
    ]


def averaged(setup: Setup, epochs: int, device: torch.device) -> AveragedModel:
    """Trains `setup` on at half its peak learning rate and returns the average of its weights.

    Batch-norm statistics of the average are not re-estimated: that is `swa_utils.update_bn`.
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
