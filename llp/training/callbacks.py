"""Callbacks: what looks at a training between two epochs, and leaves it as it was.

Rows of `registry.CALLBACKS`, named in `training.callbacks`. A callback is called after `every`
epochs and after the last one. It may give an `Observation`, which goes to ledger and MLflow, and it
may write files; weights, buffers, optimizer, gradients and random states must be the same
bits afterwards, so that a training is the same with and without it. The random states are put back
by the caller in any case. What a callback keeps between calls is part of the job's snapshots.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llp import registry
from llp.errors import EnvironmentProblem
from llp.records import Job, Observation
from llp.training import checkpoint, rng

JOBS = ("all", "probe", "verify")
Examples = Callable[[int, int], Sequence[tuple[Tensor, Tensor]]]
"""`examples(count, batch_size)`: the first training examples, fixed and unaugmented, in batches."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """Where a job stands when its callbacks are called.

    Attributes:
        job: The job.
        model: The network itself, not its compiled form.
        optimizer: Its optimizer.
        epoch: Completed epochs, 1-based.
        num_epochs: Of the whole job.
        samples_seen: Training examples processed within the job so far.
        folder: The study folder.
        device: Where the model is.
        examples: Makes fixed batches of training examples.
    """

    job: Job
    model: nn.Module
    optimizer: Optimizer
    epoch: int
    num_epochs: int
    samples_seen: int
    folder: Path
    device: torch.device
    examples: Examples

    def observation(
        self, callback: str, values: Mapping[str, float], *, samples: int = 0, note: str = ""
    ) -> Observation:
        """An `Observation` made now; its seconds are filled in by the caller."""
        return Observation(
            callback=callback,
            job_id=self.job.job_id,
            trial_id=self.job.trial.trial_id,
            epoch=self.epoch,
            samples_seen=self.samples_seen,
            values=values,
            samples=samples,
            note=note,
        )


class Callback(Protocol):
    """Looks at a training after some of its epochs.

    Attributes:
        every: Epochs between two calls, at least 1; there is always one after the last epoch.
        jobs: `all`, `probe` or `verify`: which kinds of jobs are looked at.
    """

    every: int
    jobs: str

    def __call__(self, moment: Moment) -> Observation | None:
        """What was measured; None when there is nothing to tell."""
        ...

    def state(self) -> dict[str, Any]:
        """What is needed to go on after a kill: tensors, numbers, text, lists and dicts."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        ...


class Checkpoints:
    """Keeps the weights every few epochs, as `checkpoints/JOB-e003.pt`.

    Args:
        every: Epochs between two files.
        jobs: Which kinds of jobs.
        optimizer: Keep the optimizer's state as well.

    Raises:
        ValueError: `every` is below 1, or no such kind of jobs.
    """

    def __init__(self, *, every: int = 1, jobs: str = "all", optimizer: bool = False) -> None:
        self.every, self.jobs = checked(every, jobs)
        self.optimizer = optimizer

    def __call__(self, moment: Moment) -> None:
        """Writes the file durably."""
        state: dict[str, Any] = {
            "format": 1,
            "job_id": moment.job.job_id,
            "model": checkpoint.to_cpu(moment.model.state_dict()),
            "epoch": moment.epoch,
            "samples_seen": moment.samples_seen,
            "hyperparameters": dict(moment.job.trial.hyperparameters),
            "seed": moment.job.seed,
        }
        if self.optimizer:
            state["optimizer"] = checkpoint.to_cpu(moment.optimizer.state_dict())
        checkpoint.save(path_of(moment.job.job_id, moment.epoch), state, root=moment.folder)

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def path_of(job_id: str, epoch: int) -> str:
    """Where `Checkpoints` keeps the weights after `epoch`, relative to the study folder."""
    return f"checkpoints/{job_id}-e{epoch:03d}.pt"


def checked(every: int, jobs: str) -> tuple[int, str]:
    """The options that all callbacks have.

    Raises:
        ValueError: `every` is below 1, or no such kind of jobs.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}")
    if jobs not in JOBS:
        raise ValueError(f"jobs must be one of {', '.join(JOBS)}, not {jobs!r}")
    return every, jobs


def build(rows: Sequence[Mapping[str, Any]], kind: str = "all") -> dict[str, Callback]:
    """The callbacks of `training.callbacks` that look at jobs of this kind, by name.

    Raises:
        SpecError: An unknown name.
        ValueError: An option is out of its range.
        TypeError: An option that the callback does not take.
    """
    made: dict[str, Callback] = {}
    for row in rows:
        options = {key: value for key, value in row.items() if key != "name"}
        callback: Callback = registry.load("callbacks", row["name"])(**options)
        if kind == "all" or callback.jobs in ("all", kind):
            made[row["name"]] = callback
    return made


def call(callbacks: Mapping[str, Callback], moment: Moment) -> Generator[Observation, None, None]:
    """Yields what the callbacks that are due have to tell.

    A callback that fails is a note and never costs the training; a full disk ends it.

    Raises:
        EnvironmentProblem: The disk is full.
    """
    for name, callback in callbacks.items():
        if moment.epoch % callback.every and moment.epoch != moment.num_epochs:
            continue
        started = time.perf_counter()
        with _untouched(moment):
            found = _called(name, callback, moment)
        if found is not None:
            yield replace(found, seconds=time.perf_counter() - started)


def _called(name: str, callback: Callback, moment: Moment) -> Observation | None:
    try:
        return callback(moment)
    except EnvironmentProblem:
        raise
    except Exception as error:  # whatever it is, the training goes on
        log.warning("callback %s, job %s: %s", name, moment.job.job_id, error, exc_info=True)
        lines = str(error).strip().splitlines()
        note = f"failed: {type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
        return moment.observation(name, {"failed": math.nan}, note=note)


@contextlib.contextmanager
def _untouched(moment: Moment) -> Iterator[None]:
    """Random states and training flags are afterwards what they were."""
    states = rng.capture(moment.device)
    training = [(module, module.training) for module in moment.model.modules()]
    try:
        yield
    finally:
        rng.restore(states, moment.device)
        for module, flag in training:
            module.training = flag
