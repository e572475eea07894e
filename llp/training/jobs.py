"""One job from its first step to its `JobEnd`: training, reports, snapshots, outcomes as values.

Divergence. A job ends as `diverged` when a training or validation loss is not finite, when the mean
training loss of an epoch is over `HOPELESS` = 100 times the loss of guessing (ln of the number of
classes), or when it is over `LOST` = 3 times that in two epochs running. Guessing is what a network
that ignores its input can always fall back to, so a mean of three times that over whole epochs
means weights that produce large, confident and wrong logits; one such epoch may still be the spike
of a large learning rate during warm-up, two are not. A run that merely fails to learn sits at the
loss of guessing itself and is never called diverged; comparing it with others is the scheduler's
work. No point is reported for the epoch in which a run diverges.

Snapshots. Every `checkpoint_seconds` a running job writes `checkpoints/<job_id>.partial.pt`:
weights, optimizer, loss scale, random states, position within the epoch and the points so far. A
job with the same identity (job without its attempt, data, recipe) goes on from there; on the CPU to
the same bits as without the interruption. It first yields the points of the snapshot again, equal
in every field: whoever has them already recognises them by (job_id, epoch). A damaged snapshot is
ignored with a warning. The snapshot goes when the job ends as `completed`, `diverged` or
`out_of_memory`; it stays after `failed` and when the generator is closed, for the next attempt (see
`discard_partial`).
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from llp.errors import CheckpointError, EnvironmentProblem
from llp.protocols import Report
from llp.records import (
    CheckpointRef,
    CurvePoint,
    Job,
    JobEnd,
    Outcome,
    Rung,
    Verification,
    from_plain,
    to_plain,
)
from llp.training import checkpoint, loop, rng

HOPELESS = 100.0
LOST = 3.0

log = logging.getLogger(__name__)


@dataclass
class Setup:
    """What one job trains; made by an objective's `prepare`.

    Attributes:
        identity: What determines the result beside the job; guards snapshots.
        rung: Number, data fraction, examples and epochs in force.
        model: On the device.
        optimizer: At its peak learning rates.
        criterion: Training loss (with label smoothing, if any).
        schedule: Step of the job -> multiplier of the learning rates.
        train: Shuffled, augmented batches of the rung's examples.
        validation: Batches of the validation split.
        test: Makes the batches of the test split; called once, after the end of a `verify` job.
        validation_criterion: Loss on validation and test.
        num_correct: Hits of a batch.
        guessing_loss: Loss of an uninformed guess; None turns off the rules that need it.
        precision: See `loop.Steps`.
        gradient_clip: See `loop.Steps`.
        compile: Train through `torch.compile` (evaluation is not compiled).
        report_every: Epochs between evaluations; the last epoch is always evaluated.
        second_pass: See `loop.Steps`.
    """

    identity: str
    rung: Rung
    model: nn.Module
    optimizer: Optimizer
    criterion: loop.Criterion
    schedule: Callable[[int], float]
    train: loop.Batches
    validation: loop.Batches
    test: Callable[[], loop.Batches] | None = None
    validation_criterion: loop.Criterion = functional.cross_entropy
    num_correct: Callable[[Any, Any], Tensor] = loop.num_correct
    guessing_loss: float | None = None
    precision: str = "float32"
    gradient_clip: float | None = None
    compile: bool = False
    report_every: int = 1
    second_pass: loop.SecondPass | None = None


class JobRun:
    """One attempt at one job."""

    def __init__(
        self,
        job: Job,
        prepare: Callable[[], Setup],
        *,
        folder: Path,
        device: torch.device,
        checkpoint_seconds: float,
    ) -> None:
        self.job, self.folder, self.device = job, folder, device
        self._prepare = prepare
        self._checkpoint_seconds = checkpoint_seconds
        self._started = time.monotonic()
        self._snapshot_due = self._started + checkpoint_seconds
        self._points: list[CurvePoint] = []
        self._epoch = 0  # epochs done
        self._num_examples = 0  # in those epochs
        self._progress: loop.Progress | None = None  # of the epoch in progress
        self._last_loss = 0.0  # mean training loss of the last epoch done

    def reports(self) -> Generator[Report, None, JobEnd]:
        """Yields the job's reports and returns its `JobEnd`, drawing from generators of its own.

        Raises:
            EnvironmentProblem: The final checkpoint cannot be written.
        """
        randomness = rng.JobRandomness(self.device)
        inner = self._with_outcome()
        try:
            while True:
                randomness.enter()
                try:
                    report = next(inner)
                except StopIteration as stop:
                    end: JobEnd = stop.value
                    return end
                finally:
                    randomness.leave()
                yield report
        finally:
            inner.close()

    def _with_outcome(self) -> Generator[Report, None, JobEnd]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        rng.seed_all(self.job.seed, self.device)
        reference = None
        outcome: Outcome = "completed"
        failure = ""
        try:
            reference = yield from self._train()
        except loop.Diverged as diverged:
            outcome, failure = "diverged", str(diverged)
        except EnvironmentProblem:
            raise
        except Exception as error:  # noqa: BLE001  whatever user code raises is this job's outcome
            outcome = "out_of_memory" if is_out_of_memory(error) else "failed"
            failure = "".join(traceback.format_exception(error))
        if outcome == "out_of_memory":
            _free_memory()
        if outcome != "failed":
            discard_partial(self.folder, self.job.job_id)
        return JobEnd(
            job_id=self.job.job_id,
            trial_id=self.job.trial.trial_id,
            outcome=outcome,
            failure=failure,
            checkpoint=reference,
            samples_seen=self._samples_seen(),
            seconds=self._seconds(),
            peak_memory_bytes=peak_memory_bytes(self.device),
            device=device_name(self.device),
        )

    def _train(self) -> Generator[Report, None, CheckpointRef]:
        setup = self._prepare()
        steps = loop.Steps(
            model=torch.compile(setup.model) if setup.compile else setup.model,  # type: ignore[arg-type]
            optimizer=setup.optimizer,
            criterion=setup.criterion,
            schedule=setup.schedule,
            device=self.device,
            precision=setup.precision,
            gradient_clip=setup.gradient_clip,
            micro_batch_divisor=self.job.micro_batch_divisor,
            num_correct=setup.num_correct,
            second_pass=setup.second_pass,
        )
        self._resume(setup, steps)
        yield from list(self._points)
        while self._epoch < setup.rung.epochs:
            point = self._one_epoch(setup, steps)
            if point is not None:
                self._points.append(point)
                yield point
        reference = checkpoint.save(
            f"checkpoints/{self.job.job_id}.pt", self._final(setup), root=self.folder
        )
        if self.job.kind == "verify":
            yield self._verify(setup)
        return reference

    def _one_epoch(self, setup: Setup, steps: loop.Steps) -> CurvePoint | None:
        if self._progress is None:
            self._progress = loop.Progress.start(self.device)
        progress = loop.train_epoch(
            steps,
            setup.train.epoch(self._epoch, start=self._progress.steps),
            first_step=self._epoch * len(setup.train),
            progress=self._progress,
            after_step=lambda _: self._snapshot_when_due(setup, steps),
        )
        self._require_sane(progress.mean_loss, setup)
        epoch, point = self._epoch + 1, None
        if epoch % setup.report_every == 0 or epoch == setup.rung.epochs:
            validation = self._evaluate(setup, setup.validation)
            if not math.isfinite(validation.loss):
                raise loop.Diverged(f"the validation loss is {validation.loss} in epoch {epoch}")
            point = CurvePoint(
                rung=setup.rung.rung,
                data_fraction=setup.rung.data_fraction,
                epoch=epoch,
                samples_seen=self._samples_seen(),
                train_loss=progress.mean_loss,
                train_accuracy=progress.accuracy,
                validation_loss=validation.loss,
                validation_accuracy=validation.accuracy,
                seconds=self._seconds(),
                learning_rate=progress.learning_rate,
            )
        self._epoch = epoch
        self._num_examples += progress.num_examples
        self._last_loss = progress.mean_loss
        self._progress = None
        return point

    def _require_sane(self, loss: float, setup: Setup) -> None:
        if setup.guessing_loss is None:
            return
        guess, epoch = setup.guessing_loss, self._epoch + 1
        lost_twice = min(loss, self._last_loss) > LOST * guess
        if loss > HOPELESS * guess or lost_twice:
            raise loop.Diverged(
                f"the mean training loss is {loss:.3g} in epoch {epoch}"
                + (f" after {self._last_loss:.3g}" if lost_twice else "")
                + f"; guessing would give {guess:.3g}"
            )

    def _evaluate(self, setup: Setup, batches: loop.Batches) -> loop.Evaluation:
        return loop.evaluate(
            setup.model,
            batches,
            self.device,
            criterion=setup.validation_criterion,
            precision=setup.precision,
            num_correct=setup.num_correct,
        )

    def _verify(self, setup: Setup) -> Verification:
        if setup.test is None:
            raise ValueError("verification needs a test split and this data has none")
        batches = setup.test()
        test = self._evaluate(setup, batches)
        last = self._points[-1]
        return Verification(
            trial_id=self.job.trial.trial_id,
            seed=self.job.seed,
            test_accuracy=test.accuracy,
            test_loss=test.loss,
            validation_accuracy=last.validation_accuracy,
            validation_loss=last.validation_loss,
            num_test_examples=batches.num_examples,
            samples_seen=self._samples_seen(),
            seconds=self._seconds(),
        )

    def _identity(self, setup: Setup) -> str:
        plain = [setup.identity, to_plain(replace(self.job, attempt=0))]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def _samples_seen(self) -> int:
        return self._num_examples + (self._progress.num_examples if self._progress else 0)

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _final(self, setup: Setup) -> dict[str, Any]:
        return {
            "format": 1,
            "job_id": self.job.job_id,
            "model": checkpoint.to_cpu(setup.model.state_dict()),
            "epoch": self._epoch,
            "samples_seen": self._samples_seen(),
            "hyperparameters": dict(self.job.trial.hyperparameters),
            "seed": self.job.seed,
        }

    def _snapshot_when_due(self, setup: Setup, steps: loop.Steps) -> None:
        if time.monotonic() < self._snapshot_due:
            return
        progress = self._progress
        assert progress is not None
        state = {
            **self._final(setup),
            "identity": self._identity(setup),
            "optimizer": checkpoint.to_cpu(setup.optimizer.state_dict()),
            "scaler": steps.scaler.state_dict() if steps.scaler else None,
            "random": rng.capture(self.device),
            "num_examples": self._num_examples,
            "last_loss": self._last_loss,
            "progress": checkpoint.to_cpu(vars(progress)),
            "points": [to_plain(point) for point in self._points],
            "seconds": self._seconds(),
        }
        try:
            checkpoint.save_sealed(partial_path(self.folder, self.job.job_id), state)
        except EnvironmentProblem as problem:
            log.warning("job %s goes on without a snapshot: %s", self.job.job_id, problem)
        self._snapshot_due = time.monotonic() + self._checkpoint_seconds

    def _resume(self, setup: Setup, steps: loop.Steps) -> None:
        path = partial_path(self.folder, self.job.job_id)
        if not path.exists():
            return
        try:
            state = checkpoint.load_sealed(path)
        except CheckpointError as error:
            log.warning("job %s starts afresh: %s", self.job.job_id, error)
            return
        if state.get("identity") != self._identity(setup):
            log.warning("job %s starts afresh: %s is of another job", self.job.job_id, path)
            return
        setup.model.load_state_dict(state["model"])
        setup.optimizer.load_state_dict(state["optimizer"])
        if steps.scaler is not None:
            steps.scaler.load_state_dict(state["scaler"])
        rng.restore(state["random"], self.device)
        self._epoch, self._num_examples = state["epoch"], state["num_examples"]
        self._last_loss = state["last_loss"]
        self._points = [from_plain(CurvePoint, point) for point in state["points"]]
        self._started -= state["seconds"]
        self._progress = replace(
            loop.Progress(**state["progress"]),
            loss=state["progress"]["loss"].to(self.device),
            correct=state["progress"]["correct"].to(self.device),
        )
        log.info("job %s goes on after epoch %d", self.job.job_id, self._epoch)


def partial_path(folder: Path, job_id: str) -> Path:
    """Where a running job keeps its snapshot."""
    return folder / "checkpoints" / f"{job_id}.partial.pt"


def discard_partial(folder: Path, job_id: str) -> None:
    """Removes the snapshot of a job that will not be tried again; nothing happens without one."""
    partial_path(folder, job_id).unlink(missing_ok=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that host or device memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "_alloc_failed")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated on the GPU by this job, or resident of this process since its start."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
