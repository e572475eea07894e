"""One epoch of training and one evaluation. Knows models, batches and optimizers; no trials.

`Steps` holds what stays the same from step to step. The loop asks the device for numbers only at
the end of an epoch and every `CHECK_EVERY` steps (to leave a diverged run early): losses and hits
are summed on the device in float64.

An optimizer may take several gradients a step (`optim.wrapper`), of one batch or of one batch each.
`Progress.samples_seen` counts every example as often as a gradient was taken of it; only the first
gradient of a step is taken at the weights themselves, and only it updates batch-norm statistics.

Accumulating micro-batches (`Steps.micro_batch_divisor`) gives the gradient of the whole batch up to
rounding; batch normalisation alone sees the smaller parts. Where a batch has two examples no part
has fewer, because batch normalisation cannot be computed from one (`Batches` joins a last batch of
one example to the batch before it for the same reason; nothing is dropped).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from llp.optim.wrapper import batch_norms, gradients_per_step, statistics_frozen

Batch: TypeAlias = tuple[Any, Any]
Criterion: TypeAlias = Callable[[Any, Any], Tensor]
"""`criterion(output, target)`: mean loss over the batch, a scalar."""

CHECK_EVERY = 128
"""Steps between looks at the loss; each is one synchronisation with the device."""

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Batches(Protocol):
    """What the loop reads: `workloads.batches.Batches`, or anything of this shape."""

    num_examples: int

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number `start` on, a pure function of seed and `epoch`."""
        ...


class Diverged(Exception):
    """The loss is no longer a number, or far beyond that of guessing."""


class Evaluation(NamedTuple):
    """Mean loss and accuracy over a split."""

    loss: float
    accuracy: float


@dataclass
class Progress:
    """Where an epoch stands; with `steps` > 0 the epoch goes on from there.

    Attributes:
        steps: Batches done.
        num_examples: Examples in them, each counted once: those that loss and hits are summed over.
        loss: Sum over examples, float64 on the device.
        correct: Number of hits, float64 on the device.
        learning_rate: Of the last step (first parameter group).
        samples_seen: Examples in all gradients taken.
    """

    loss: Tensor
    correct: Tensor
    steps: int = 0
    num_examples: int = 0
    learning_rate: float = math.nan
    samples_seen: int = 0

    @classmethod
    def start(cls, device: torch.device) -> Progress:
        """An epoch that has not begun."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(loss=zero, correct=zero.clone())

    @property
    def mean_loss(self) -> float:
        """Mean loss so far (synchronises)."""
        return float(self.loss) / max(self.num_examples, 1)

    @property
    def accuracy(self) -> float:
        """Share of hits so far (synchronises)."""
        return float(self.correct) / max(self.num_examples, 1)


def num_correct(output: Tensor, target: Tensor) -> Tensor:
    """How many rows of the logits [B, classes] are largest at the class index in `target`."""
    if output.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        raise TypeError(
            f"accuracy needs logits [batch, classes] and class indices [batch], not "
            f"{list(output.shape)} and {list(target.shape)} ({target.dtype}); "
            "pass your own num_correct(output, target)"
        )
    return (output.argmax(1) == target).sum()


@dataclass
class Steps:
    """How a training step is made.

    Attributes:
        model: Called on the images; may be the compiled form.
        optimizer: Its groups' `lr` are the peak learning rates when `Steps` is made.
        criterion: Mean loss of a batch.
        schedule: Step of the job -> multiplier of the peak learning rates.
        device: Where model and batches are.
        precision: `float32`, `bf16` or `fp16` (autocast; fp16 with loss scaling).
        gradient_clip: Largest global gradient norm; None leaves gradients alone.
        micro_batch_divisor: Parts a batch is split into, gradients accumulated.
        num_correct: Hits of a batch, for the accuracy.
    """

    model: nn.Module
    optimizer: Optimizer
    criterion: Criterion
    schedule: Callable[[int], float]
    device: torch.device
    precision: str = "float32"
    gradient_clip: float | None = None
    micro_batch_divisor: int = 1
    num_correct: Callable[[Any, Any], Tensor] = num_correct
    peaks: list[float] = field(init=False)
    scaler: torch.amp.GradScaler | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        if self.precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type)


def train_epoch(
    steps: Steps,
    batches: Iterable[Batch],
    *,
    first_step: int,
    progress: Progress | None = None,
    after_step: Callable[[Progress], None] | None = None,
) -> Progress:
    """Trains on every batch once and returns the sums over the epoch.

    Args:
        steps: What a step is.
        batches: The epoch's batches, from number `progress.steps` on.
        first_step: Number of batches of the job before this epoch, for the schedule.
        progress: Where to go on within the epoch; default: at its start.
        after_step: Called after every step, for periodic snapshots.

    Raises:
        Diverged: The summed loss is no longer finite.
    """
    progress = progress if progress is not None else Progress.start(steps.device)
    groups = steps.optimizer.param_groups
    several, same_batch = gradients_per_step(steps.optimizer)
    steps.model.train()
    step = _Step(steps)
    for together in _chunks(batches, 1 if same_batch else several):
        scale = steps.schedule(first_step + progress.steps)
        for group, peak in zip(groups, steps.peaks, strict=True):
            group["lr"] = peak * scale
        step(together * several if same_batch else together, progress, once=same_batch)
        checks = progress.steps // CHECK_EVERY
        progress.steps += len(together)
        progress.learning_rate = groups[0]["lr"]
        if progress.steps // CHECK_EVERY > checks:
            _require_finite(progress)
        if after_step is not None:
            after_step(progress)
    _require_finite(progress)
    return progress


def evaluate(
    model: nn.Module,
    batches: Batches,
    device: torch.device | None = None,
    *,
    criterion: Criterion = functional.cross_entropy,
    precision: str = "float32",
    num_correct: Callable[[Any, Any], Tensor] = num_correct,
) -> Evaluation:
    """Mean loss and accuracy of `model` over `batches`, in eval mode; the model is left as it was.

    Args:
        model: The network.
        batches: Each example once; not augmented.
        device: Where the sums are kept; default: that of the model's first parameter.
        criterion: Mean loss of a batch; plain cross-entropy, whatever training used.
        precision: Autocast of the forward passes; losses are taken in float32.
        num_correct: Hits of a batch.
    """
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    progress = Progress.start(device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            for images, target in batches.epoch(0):
                with autocast(device, precision):
                    output = model(images)
                output = output.float() if isinstance(output, Tensor) else output
                progress.loss.add_(criterion(output, target), alpha=len(target))
                progress.correct.add_(num_correct(output, target))
                progress.num_examples += len(target)
    finally:
        for module in training:
            module.training = True
    return Evaluation(progress.mean_loss, progress.accuracy)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of `precision`; nothing at all for float32."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class _Step:
    """Makes optimizer steps: gradients, their scaling and clipping, moves in between."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.optimizer, self.scaler = steps, steps.optimizer, steps.scaler
        self._parameters = [p for group in steps.optimizer.param_groups for p in group["params"]]
        self._batch_norms = batch_norms(steps.model)

    def __call__(self, batches: Sequence[Batch], progress: Progress, *, once: bool) -> None:
        """One step from the gradients of `batches`; with `once` they are all the same batch."""
        if len(batches) == 1:
            self._gradients(*batches[0], progress, counted=True)
            self._apply()
            return
        optimizer: Any = self.optimizer
        try:
            for index, batch in enumerate(batches):
                if index and not self._move():
                    return  # a gradient overflowed: no step, as with a single gradient
                with statistics_frozen(self._batch_norms if index else ()):
                    self._gradients(*batch, progress, counted=index == 0 or not once)
            self._apply()
        finally:
            optimizer.abandon()  # nothing happens after a step

    def _gradients(self, images: Any, target: Any, progress: Progress, *, counted: bool) -> None:
        """The gradients of one batch, in place of those before; loss and hits if it is counted."""
        steps, size = self.steps, len(target)
        self.optimizer.zero_grad(set_to_none=True)
        parts = min(steps.micro_batch_divisor, max(size // 2, 1))
        pairs = (
            [(images, target)]
            if parts == 1
            else list(zip(images.tensor_split(parts), target.tensor_split(parts), strict=True))
        )
        for part_images, part_target in pairs:
            with autocast(steps.device, steps.precision):
                output = steps.model(part_images)
                loss = steps.criterion(output, part_target)
            weighted = loss if parts == 1 else loss * (len(part_target) / size)
            if self.scaler is None:
                weighted.backward()  # type: ignore[no-untyped-call]
            else:
                self.scaler.scale(weighted).backward()  # type: ignore[no-untyped-call]
            if counted:
                progress.loss.add_(loss.detach(), alpha=len(part_target))
                progress.correct.add_(steps.num_correct(output.detach(), part_target))
        progress.samples_seen += size
        if counted:
            progress.num_examples += size

    def _clip(self) -> None:
        if self.steps.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.steps.gradient_clip)

    def _move(self) -> bool:
        """Goes to where the next gradient is wanted; False when this one overflowed."""
        optimizer: Any = self.optimizer
        if self.scaler is None:
            self._clip()
            optimizer.move()
            return True
        self.scaler.unscale_(optimizer)
        self._clip()
        # The only public sign of an overflow is that the scale shrinks.
        before = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() < before:
            return False
        optimizer.move()
        return True

    def _apply(self) -> None:
        if self.scaler is None:
            self._clip()
            self.optimizer.step()
            return
        if self.steps.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def _chunks(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive batches in lists of `size`; the last may be shorter."""
    iterator = iter(batches)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _require_finite(progress: Progress) -> None:
    loss = progress.mean_loss
    if not math.isfinite(loss):
        raise Diverged(f"the training loss is {loss} after {progress.steps} steps of the epoch")
