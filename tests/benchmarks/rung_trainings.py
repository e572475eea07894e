"""The trainings behind `rungs.py`: every way to spend a rung's budget, with the project's own loop.

The variants are those of `rung_variants`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rung_variants import Variant

from llp.driver import derived_seed
from llp.records import CheckpointRef, CurvePoint, Job, Rung, Trial, Verification
from llp.spec import RandomSearch, Spec
from llp.training.full import full_job, run_here
from llp.training.jobs import Setup
from llp.training.objective import TrainingObjective
from llp.workloads import ImageData

DECAY = 0.2
"""Share of all steps so far that a judging decay takes."""
Row = dict[str, Any]


@dataclass
class Trunk:
    """Where a constant-rate training stands: what a promotion goes on from."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    samples: int


class KeepTrunk:
    """A callback that copies weights and optimizer after an epoch."""

    jobs = "probe"

    def __init__(self, epoch: int) -> None:
        self.every, self.found = epoch, None

    def __call__(self, moment: Any) -> None:
        """Copies at the first call; the call after the last epoch is another one."""
        if self.found is None:
            self.found = (
                copy.deepcopy(moment.model.state_dict()),
                copy.deepcopy(moment.optimizer.state_dict()["state"]),
            )

    def state(self) -> dict[str, Any]:
        """Nothing: these jobs are not resumed."""
        return {}

    def restore(self, state: Any) -> None:
        """Nothing."""


class RungObjective(TrainingObjective):
    """A `TrainingObjective` that can go on from a trunk and end with a judging decay."""

    trunk: Trunk | None = None
    keep: KeepTrunk | None = None
    decay_from: int | None = None

    def prepare(self, job: Job, device: torch.device) -> Setup:
        """The setup of the product, with what is particular to the variant."""
        setup = super().prepare(job, device)
        if self.trunk is not None:
            setup.model.load_state_dict(self.trunk.model)
            own = setup.optimizer.state_dict()
            setup.optimizer.load_state_dict({**own, "state": self.trunk.optimizer})
        if self.decay_from is not None:
            start, end = (n * len(setup.train) for n in (self.decay_from, setup.rung.epochs))
            setup.schedule = decaying(setup.schedule, start, end)
        if self.keep is not None:
            setup.callbacks = {**setup.callbacks, "trunk": self.keep}
        return setup


def decaying(planned: Callable[[int], float], start: int, end: int) -> Callable[[int], float]:
    """`planned` up to step `start`, then its value there straight down to 0 at `end`.

    >>> [decaying(lambda step: 1.0, 2, 4)(step) for step in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """

    def at(step: int) -> float:
        if step < start:
            return planned(step)
        return planned(start) * max(0.0, (end - step) / max(end - start, 1))

    return at


class Trainer:
    """Trains configurations of one experiment, and says what came out as rows of a table."""

    def __init__(
        self, spec: Spec, data: ImageData, folder: Path, shares: tuple[float, ...]
    ) -> None:
        self.spec, self.data, self.folder, self.shares = spec, data, folder, shares
        self.draws = RandomSearch(spec.search_space, spec.constraints, spec.seed)

    def trial(self, config: int, seed: int) -> Trial:
        """Configuration number `config`; the probe seed is that of a search with this seed."""
        return Trial(f"t{config:03d}", self.draws.suggest(config), derived_seed(seed, 1, config))

    def full(self, config: int, seed: int) -> list[Row]:
        """A full training: a row per epoch, the last with the test accuracy."""
        trial = self.trial(config, seed)
        job = full_job(
            self.spec, trial, seed, seed=derived_seed(seed, 2, config), num_train=self.num_train
        )
        objective = TrainingObjective(self.spec, self.data, self.folder, threads=1)
        return self._run(objective, job, "full", config, seed)

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.data.train)

    def rungs(self, variant: Variant) -> list[Rung]:
        """The rungs of a variant; all variants pay the same on each."""
        epochs = self.spec.training.epochs
        found = []
        for number, share in enumerate(self.shares, start=1):
            if variant.axis == "data":
                found.append(Rung(number, share, round(share * self.num_train), epochs))
            else:
                found.append(Rung(number, 1.0, self.num_train, max(1, round(share * epochs))))
        return found

    def probe(self, variant: Variant, config: int, seed: int) -> list[Row]:
        """One configuration on every rung, in order: a row for the end of each."""
        rows: list[Row] = []
        trunk: Trunk | None = None
        start_from: CheckpointRef | None = None
        for rung in self.rungs(variant):
            schedule = "cosine" if variant.how == "cosine" else "constant"
            training: dict[str, Any] = {"schedule": schedule, "warmup_fraction": variant.warmup}
            if variant.how in ("ema", "swa"):
                training["averaging"] = variant.how
                if variant.how == "swa":
                    training["averaging_options"] = {"swa_learning_rate": 1.0}
            if trunk is not None:
                training["warmup_fraction"] = 0.0
            spec = self.spec.model_copy(
                update={
                    "training": self.spec.training.model_copy(update=training),
                    "tier1": self.spec.tier1.model_copy(update={"report_every": rung.epochs}),
                }
            )
            objective = RungObjective(spec, self.data.without_test(), self.folder, threads=1)
            if variant.how != "cosine":
                objective.trunk = trunk
                new = rung.epochs
                if variant.how == "decay":
                    new = trunk_epochs(rung, trunk)
                    objective.decay_from = new
                objective.keep = KeepTrunk(new)
            trial = self.trial(config, seed)
            job = Job(
                f"{variant.name}-{trial.trial_id}-{seed}-r{rung.rung}", "probe", trial, rung,
                derived_seed(trial.seed, rung.rung) if trunk else trial.seed,
                start_from=start_from if variant.warm else None,
            )  # fmt: skip
            found = self._run(objective, job, variant.name, config, seed)
            rows.append(found[-1])
            start_from = found[-1].pop("checkpoint", None)
            if found[-1]["outcome"] != "completed" or (variant.warm and start_from is None):
                rows += [
                    {**found[-1], "rung": later.rung, "samples_seen": 0}
                    for later in self.rungs(variant)[rung.rung :]
                ]
                break
            if objective.keep is not None:
                assert objective.keep.found is not None
                before = 0 if trunk is None else trunk.samples
                new = objective.keep.every * rung.num_examples
                trunk = Trunk(*objective.keep.found, samples=before + new)
        return rows

    def _run(
        self, objective: TrainingObjective, job: Job, variant: str, config: int, seed: int
    ) -> list[Row]:
        reports: list[Any] = []
        started = time.process_time()
        end = run_here(objective, job, reports.append)
        points = [report for report in reports if isinstance(report, CurvePoint)]
        tests = [report for report in reports if isinstance(report, Verification)]
        if end.outcome not in ("completed", "diverged"):
            raise RuntimeError(f"{job.job_id} ended as {end.outcome}: {end.failure}")
        base = {
            "variant": variant, "config": config, "seed": seed,
            "rung": 0 if variant == "full" else job.rung.rung,
        }  # fmt: skip
        rows = [
            base | {
                "epoch": point.epoch, "samples_seen": point.samples_seen, "outcome": "running",
                "validation_accuracy": point.validation_accuracy,
                "validation_loss": point.validation_loss, "test_accuracy": math.nan,
            }
            for point in points
        ]  # fmt: skip
        if end.outcome == "diverged":  # worse than anything that ended
            rows.append(base | {
                "epoch": len(points) + 1, "samples_seen": end.samples_seen,
                "validation_accuracy": 0.0, "validation_loss": math.inf,
                "test_accuracy": 1 / self.data.num_classes,
            })  # fmt: skip
        rows[-1] |= {"outcome": end.outcome, "cpu_seconds": time.process_time() - started}
        if tests:
            rows[-1]["test_accuracy"] = tests[0].test_accuracy
        if end.checkpoint is not None:
            if variant == "full":
                (self.folder / end.checkpoint.path).unlink()
            else:
                rows[-1]["checkpoint"] = end.checkpoint
        return rows

    def clean(self) -> None:
        """Removes the weights that were kept for promotion."""
        for path in (self.folder / "checkpoints").glob("*.pt"):
            path.unlink()


def trunk_epochs(rung: Rung, trunk: Trunk | None) -> int:
    """Epochs at the constant rate, so that with the decay after them the rung's budget is spent.

    The decay takes `DECAY` of all steps, trunk and decay together.

    >>> trunk_epochs(Rung(1, 0.1, 100, 10), None)
    8
    """
    before = 0.0 if trunk is None else trunk.samples / rung.num_examples
    new = (1 - DECAY) * (before + rung.epochs) - before
    return min(max(1, round(new)), rung.epochs - 1)
