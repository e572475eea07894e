"""What a worker process does with a job of a batch: a training, and a word on what it trained.

Before the first point of every training the worker says what it really trains with, read from the
optimizer, the batches and the recipe it has built, as an `Observation` named `configuration`. The
driver holds that against what the file asks for (`batch.BatchSource`), so that a value that got
lost on the way ends the batch and never stands in a table under the wrong name.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch

from llp.protocols import Report
from llp.records import Job, JobEnd, Observation, Rung
from llp.spec.batch_plan import run_of
from llp.spec.schema import Spec
from llp.training import jobs
from llp.training.objective import TrainingObjective
from llp.training.recipe import Recipe
from llp.worker import first_line, require_folder
from llp.workloads.images import ImageData

CONFIGURATION = "configuration"
"""`Observation.callback` of what a worker trains with."""


class RunObjective(TrainingObjective):
    """Trains one configuration of one run; every job has the budget that it says itself."""

    def __init__(self, spec: Spec, data: ImageData, folder: Path, *, threads: int) -> None:
        super().__init__(spec, data, folder, threads=threads)
        self._built: dict[str, Observation] = {}

    def rung(self, job: Job) -> Rung:
        """The budget of `job`, of a full training too: a study may train on less data."""
        return job.rung

    def prepare(self, job: Job, device: torch.device) -> jobs.Setup:
        """See `JobObjective.prepare`; remembers what was built."""
        setup = super().prepare(job, device)
        recipe = Recipe.of(self.spec, job.trial.hyperparameters)
        self._built[job.job_id] = _described(job, setup, recipe)
        return setup

    def __call__(self, job: Job) -> Generator[Report, None, JobEnd]:
        """Yields what is trained, then the reports of the training; returns how it ended."""
        inner = super().__call__(job)
        try:
            while True:
                try:
                    report = next(inner)
                except StopIteration as stop:
                    end: JobEnd = stop.value
                    return end
                built = self._built.pop(job.job_id, None)
                if built is not None:
                    yield built
                yield report
        finally:
            inner.close()


def _described(job: Job, setup: jobs.Setup, recipe: Recipe) -> Observation:
    """What is about to be trained: read off what was built, the rest off the recipe."""
    group = setup.optimizer.param_groups[0]
    found: dict[str, Any] = {
        "model": recipe.model,
        "optimizer": recipe.optimizer,
        "averaging": recipe.averaging,
        "schedule": recipe.schedule,
        "warmup_fraction": recipe.warmup_fraction,
        "label_smoothing": recipe.label_smoothing,
        "gradient_clip": setup.gradient_clip,
        "precision": setup.precision,
        "augmentation": list(recipe.augmentation),
        **recipe.model_options,
        **recipe.averaging_options,
        **recipe.optimizer_options,
    }
    for name in recipe.optimizer_options:
        if name in group:
            found[name] = group[name]
    found |= {
        "learning_rate": group["lr"],
        "weight_decay": group.get("weight_decay", recipe.weight_decay),
        "batch_size": getattr(setup.train, "batch_size", recipe.batch_size),
        "num_examples": setup.train.num_examples,
        "epochs": setup.rung.epochs,
        "seed": job.seed,
    }
    return Observation(
        callback=CONFIGURATION,
        job_id=job.job_id,
        trial_id=job.trial.trial_id,
        epoch=0,
        samples_seen=0,
        values={"num_parameters": float(sum(p.numel() for p in setup.model.parameters()))},
        note=json.dumps(found, sort_keys=True),
    )


class BatchObjective:
    """Works on any job of a batch. Made by the driver, sent to every worker once.

    Args:
        specs: Run -> its experiment.
        data: Run -> its images; runs of the same dataset share them.
        folder: The folder of the batch, with its ledger.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        data: Mapping[str, ImageData],
        folder: Path,
    ) -> None:
        folder = folder.resolve()
        self._folder, self._header, self._looked = folder, first_line(folder), False
        self._objectives = {
            name: RunObjective(
                spec, data[name], folder, threads=max(1, int(spec.resources.cpus_per_trial))
            )
            for name, spec in specs.items()
        }

    def __call__(self, job: Job) -> Generator[Report, None, JobEnd]:
        """Yields reports and returns the end; see `protocols.Objective`.

        Raises:
            EnvironmentProblem: This node does not see the folder of the batch.
        """
        if not self._looked and self._header:
            require_folder(self._folder, self._header)
        self._looked = True
        return (yield from self._objectives[run_of(job.trial.trial_id)](job))
