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
import itertools
import json
import logging
import math
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from llp.errors import CheckpointError, EnvironmentProblem
from llp.optim.averaging import WeightAverage
from llp.protocols import Report
from llp.records import (
    CheckpointRef,
    CurvePoint,
    Job,
    JobEnd,
    Observation,
    Outcome,
    Rung,
    Verification,
    from_plain,
    to_plain,
)
from llp.training import callbacks, checkpoint, loop, predictions, rng
from llp.training.callbacks import Callback, Examples

HOPELESS = 100.0
LOST = 3.0

REFRESH_BATCHES = 32
"""For the batch statistics of an average in the evaluations before the last one."""

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
        averaging: Average of the weights that is evaluated and kept instead of the last weights.
        class_names: With these, and `test_pixels`, a `verify` job keeps what it predicted on the
            test split (see `predictions`).
        test_pixels: The test images themselves, for the few that are kept beside the predictions.
        corrupted: Makes corrupted copies of validation and test, in batches; read once, at the end
            of a `verify` job.
        callbacks: Called between epochs, by name; they leave the training as it is.
        examples: Makes the fixed batches that callbacks measure on.
        best_weights: `keep` writes the weights of the epoch with the best validation accuracy to
            `best_path`; `use` makes them the result of the job as well.
        reads_test: Whether a `verify` job reads the test split at its end.
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
    averaging: WeightAverage | None = None
    class_names: tuple[str, ...] = ()
    test_pixels: predictions.Pixels | None = None
    corrupted: tuple[Callable[[], Iterable[loop.Batches]], ...] = ()
    callbacks: Mapping[str, Callback] = field(default_factory=dict)
    examples: Examples | None = None
    best_weights: Literal["off", "keep", "use"] = "off"
    reads_test: bool = True


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
        self._observations: list[Observation] = []
        self._epoch = 0  # epochs done
        self._num_samples = 0  # in those epochs, see `_samples_seen`
        self._num_refreshing = 0  # examples that only served to estimate batch statistics
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
        )
        self._resume(setup, steps)
        yield from self._reported()
        while self._epoch < setup.rung.epochs:
            point = self._one_epoch(setup, steps)
            if point is not None:
                self._points.append(point)
                if setup.best_weights != "off" and best_point(self._points) is point:
                    path = best_path(self.job.job_id)
                    checkpoint.save(path, self._final(setup), root=self.folder)
                yield point
            yield from self._observe(setup)
        judged = self._points[-1]
        if setup.best_weights == "use":
            judged = best_point(self._points)
            best = checkpoint.load(self.folder / best_path(self.job.job_id))
            _judged(setup).load_state_dict(best["model"])
            self._epoch = judged.epoch
        reference = checkpoint.save(
            f"checkpoints/{self.job.job_id}.pt", self._final(setup), root=self.folder
        )
        if self.job.kind == "verify" and setup.reads_test:
            yield self._verify(setup, judged)
        return reference

    def _one_epoch(self, setup: Setup, steps: loop.Steps) -> CurvePoint | None:
        if self._progress is None:
            self._progress = loop.Progress.start(self.device)
        progress = loop.train_epoch(
            steps,
            setup.train.epoch(self._epoch, start=self._progress.steps),
            first_step=self._epoch * len(setup.train),
            progress=self._progress,
            after_step=lambda progress: self._after_step(setup, steps, progress),
        )
        self._require_sane(progress.mean_loss, setup)
        epoch, point = self._epoch + 1, None
        if epoch % setup.report_every == 0 or epoch == setup.rung.epochs:
            self._refresh_average(setup, last=epoch == setup.rung.epochs)
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
        self._num_samples += progress.samples_seen
        self._last_loss = progress.mean_loss
        self._progress = None
        return point

    def _reported(self) -> list[Report]:
        """What was reported before a snapshot, in the same order."""
        reports: list[CurvePoint | Observation] = [*self._points, *self._observations]
        return [*sorted(reports, key=lambda report: report.epoch)]

    def _observe(self, setup: Setup) -> Generator[Report, None, None]:
        if not setup.callbacks or setup.examples is None:
            return
        moment = callbacks.Moment(
            job=self.job,
            model=setup.model,
            optimizer=setup.optimizer,
            epoch=self._epoch,
            num_epochs=setup.rung.epochs,
            samples_seen=self._samples_seen(),
            folder=self.folder,
            device=self.device,
            examples=setup.examples,
        )
        for found in callbacks.call(setup.callbacks, moment):
            self._observations.append(found)
            yield found

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

    def _evaluate(
        self,
        setup: Setup,
        batches: loop.Batches,
        num_correct: Callable[[Any, Any], Tensor] | None = None,
    ) -> loop.Evaluation:
        return loop.evaluate(
            _judged(setup),
            batches,
            self.device,
            criterion=setup.validation_criterion,
            precision=setup.precision,
            num_correct=num_correct or setup.num_correct,
        )

    def _verify(self, setup: Setup, judged: CurvePoint) -> Verification:
        if setup.test is None:
            raise ValueError("verification needs a test split and this data has none")
        batches = setup.test()
        said = predictions.Recorder(setup.num_correct)
        keeps = bool(setup.class_names) and setup.test_pixels is not None
        test = self._evaluate(setup, batches, said if keeps else None)
        path = sha256 = ""
        if keeps and math.isfinite(test.loss):
            assert setup.test_pixels is not None
            path, sha256 = predictions.save(
                f"predictions/{self.job.job_id}.npz",
                said.arrays(),
                class_names=setup.class_names,
                pixels=setup.test_pixels,
                root=self.folder,
            )
        corrupted = [
            statistics.fmean(self._evaluate(setup, copy).accuracy for copy in copies())
            for copies in setup.corrupted
        ]
        return Verification(
            trial_id=self.job.trial.trial_id,
            seed=self.job.seed,
            test_accuracy=test.accuracy,
            test_loss=test.loss,
            validation_accuracy=judged.validation_accuracy,
            validation_loss=judged.validation_loss,
            num_test_examples=batches.num_examples,
            samples_seen=self._samples_seen(),
            seconds=self._seconds(),
            predictions=path,
            predictions_sha256=sha256,
            corrupted_validation_accuracy=corrupted[0] if corrupted else math.nan,
            corrupted_test_accuracy=corrupted[1] if corrupted else math.nan,
        )

    def _identity(self, setup: Setup) -> str:
        job = to_plain(replace(self.job, attempt=0))
        if not job["metrics"]:
            del job["metrics"]  # snapshots from before jobs had the field go on
        plain = [setup.identity, job]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def _samples_seen(self) -> int:
        """Examples in all gradients; a forward pass for batch statistics counts a third."""
        running = self._progress.samples_seen if self._progress else 0
        return self._num_samples + running + round(self._num_refreshing / 3)

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _final(self, setup: Setup) -> dict[str, Any]:
        return {
            "format": 1,
            "job_id": self.job.job_id,
            "model": checkpoint.to_cpu(_judged(setup).state_dict()),
            "epoch": self._epoch,
            "samples_seen": self._samples_seen(),
            "hyperparameters": dict(self.job.trial.hyperparameters),
            "seed": self.job.seed,
        }

    def _after_step(self, setup: Setup, steps: loop.Steps, progress: loop.Progress) -> None:
        if setup.averaging is not None:
            setup.averaging.after_step(self._epoch * len(setup.train) + progress.steps)
        self._snapshot_when_due(setup, steps)

    def _refresh_average(self, setup: Setup, *, last: bool) -> None:
        """Estimates the batch statistics of an average: on few batches until the last evaluation.

        The batches are those of the epoch just trained on, so a resumed job takes the same.
        """
        if setup.averaging is None or setup.averaging.count == 0:
            return
        batches = setup.train.epoch(self._epoch)
        some = batches if last else itertools.islice(batches, REFRESH_BATCHES)
        self._num_refreshing += setup.averaging.refresh(some)

    def _snapshot_when_due(self, setup: Setup, steps: loop.Steps) -> None:
        if time.monotonic() < self._snapshot_due:
            return
        progress = self._progress
        assert progress is not None
        state = {
            **self._final(setup),
            "identity": self._identity(setup),
            "model": checkpoint.to_cpu(setup.model.state_dict()),
            "averaging": checkpoint.to_cpu(setup.averaging.state_dict()) if setup.averaging else {},
            "optimizer": checkpoint.to_cpu(setup.optimizer.state_dict()),
            "scaler": steps.scaler.state_dict() if steps.scaler else None,
            "random": rng.capture(self.device),
            "num_samples": self._num_samples,
            "num_refreshing": self._num_refreshing,
            "last_loss": self._last_loss,
            "progress": checkpoint.to_cpu(vars(progress)),
            "points": [to_plain(point) for point in self._points],
            "observations": [to_plain(found) for found in self._observations],
            "callbacks": {name: each.state() for name, each in setup.callbacks.items()},
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
        if setup.averaging is not None:
            setup.averaging.load_state_dict(state["averaging"])
        if steps.scaler is not None:
            steps.scaler.load_state_dict(state["scaler"])
        rng.restore(state["random"], self.device)
        self._epoch, self._num_samples = state["epoch"], state["num_samples"]
        self._num_refreshing = state["num_refreshing"]
        self._last_loss = state["last_loss"]
        self._points = [from_plain(CurvePoint, point) for point in state["points"]]
        observed = state.get("observations", ())
        self._observations = [from_plain(Observation, found) for found in observed]
        for name, kept in state.get("callbacks", {}).items():
            if name in setup.callbacks:
                setup.callbacks[name].restore(kept)
        self._started -= state["seconds"]
        self._progress = replace(
            loop.Progress(**state["progress"]),
            loss=state["progress"]["loss"].to(self.device),
            correct=state["progress"]["correct"].to(self.device),
        )
        log.info("job %s goes on after epoch %d", self.job.job_id, self._epoch)


def _judged(setup: Setup) -> nn.Module:
    """The network that is evaluated and kept: the average, once there is one."""
    if setup.averaging is not None and setup.averaging.count > 0:
        return setup.averaging.module
    return setup.model


def best_point(points: Sequence[CurvePoint]) -> CurvePoint:
    """The point of the best validation accuracy; of equal ones that of lower loss, then earlier."""
    return max(points, key=lambda p: (p.validation_accuracy, -p.validation_loss))


def best_path(job_id: str) -> str:
    """Where the weights of the best epoch so far are, relative to the study folder."""
    return f"checkpoints/{job_id}-best.pt"


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
