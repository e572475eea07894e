"""What a worker does with a probe or a verification: `TrainingObjective`, made from a `Spec`.

`JobObjective` is the seam: it turns a `Job` into reports and a `JobEnd` (see `jobs`), and asks one
method, `prepare`, for everything that is particular: model, optimizer, loss, batches, schedule.
`TrainingObjective` prepares from the experiment file, `python_objective.CallableObjective` from the
user's functions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llp.errors import CheckpointError, EnvironmentProblem
from llp.protocols import Report
from llp.records import CheckpointRef, Job, JobEnd, Rung
from llp.spec.schema import Spec, TrainingSpec
from llp.training import callbacks, checkpoint, jobs, schedules
from llp.training.check import check_batch
from llp.training.full import full_rung
from llp.training.recipe import Recipe
from llp.workloads.batches import Batch, Batches, fixed_batches
from llp.workloads.corruptions import corrupted_copies
from llp.workloads.images import ImageData, Split
from llp.workloads.subsets import nested_order

CHECKPOINT_SECONDS = 30.0
"""Wall-clock seconds between snapshots of a running job; shorter jobs write none."""


class JobObjective(ABC):
    """Runs jobs; see `protocols.Objective`. Picklable: what was put on a device stays behind.

    Args:
        folder: The study folder; weights go to its `checkpoints/`.
        device: `cpu`, `cuda`, `cuda:1`, ...; None chooses when the first job starts.
        threads: CPU threads torch may use in this process; None leaves that alone.
        checkpoint_seconds: Wall-clock seconds between snapshots of a running job.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        threads: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.folder = Path(folder)
        self.device = None if device is None else str(device)
        self.threads = threads
        self.checkpoint_seconds = checkpoint_seconds
        self._cache: dict[Any, Any] = {}

    @abstractmethod
    def prepare(self, job: Job, device: torch.device) -> jobs.Setup:
        """Everything `job` trains, on `device`; called with the global generators freshly seeded.

        What it raises becomes the outcome of the job.
        """

    def choose_device(self) -> torch.device:
        """The device to train on when none was given: CUDA when there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, job: Job) -> Generator[Report, None, JobEnd]:
        """Trains; yields a `CurvePoint` per evaluation (and a `Verification`), returns the end.

        Closing the generator early is safe and writes nothing: a job that a driver stops has no
        checkpoint. Jobs of one process may be interleaved.

        Raises:
            EnvironmentProblem: The disk is full, or a GPU was asked for and there is none.
        """
        if job.kind not in ("probe", "verify"):
            raise ValueError(f"{type(self).__name__} does not work on '{job.kind}' jobs")
        device = torch.device(self.device) if self.device else self.choose_device()
        if device.type == "cuda" and not torch.cuda.is_available():
            raise EnvironmentProblem(f"training on '{device}' was asked for and CUDA sees no GPU")
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        run = jobs.JobRun(
            job,
            lambda: self.prepare(job, device),
            folder=self.folder,
            device=device,
            checkpoint_seconds=self.checkpoint_seconds,
        )
        return (yield from run.reports())

    def discard_partial(self, job_id: str) -> None:
        """Removes the snapshot of a job that was stopped, or failed for the last time."""
        jobs.discard_partial(self.folder, job_id)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


class TrainingObjective(JobObjective):
    """Trains the network of an experiment file on the job's nested subset.

    A probe sees the first `job.rung.num_examples` of one order of the training split that is fixed
    by the spec's seed, a verification all of it. `job.seed` fixes initialisation, data order and
    augmentation. Validation is evaluated on the whole validation split; the test split is read
    once, after the last epoch of a verification, and dropped from the data of every probe.

    Args:
        spec: The experiment.
        data: Its images.
        folder: The study folder.
        device: None: a GPU when `resources.gpus_per_trial` is above 0, else the CPU.
        threads: See `JobObjective`.
        checkpoint_seconds: See `JobObjective`.
        read_test: False leaves the test split alone: a full training then ends without it.
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        data: ImageData,
        folder: str | Path,
        device: str | torch.device | None = None,
        *,
        threads: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        read_test: bool = True,
    ) -> None:
        super().__init__(
            folder, device=device, threads=threads, checkpoint_seconds=checkpoint_seconds
        )
        self.read_test = read_test
        self.spec = spec if isinstance(spec, Spec) else Spec.model_validate(spec)
        self.data = data

    def choose_device(self) -> torch.device:
        """CUDA exactly when the experiment gives its trials a share of a GPU."""
        return torch.device("cuda" if self.spec.resources.gpus_per_trial > 0 else "cpu")

    def _identity(self) -> str:
        """Data and every section of the experiment that training reads."""
        spec = self.spec.model_dump_json(
            include={
                "seed": True,
                "model": True,
                "training": set(TrainingSpec.model_fields) - {"callbacks"},
                "verification": {"epochs"},
                "tier1": {"report_every", "data_fractions"}
                | ({"warmup_fraction"} if self.spec.tier1.warmup_fraction else set()),
            }
        )
        return f"{self.data.digest} {spec}{'' if self.read_test else ' without test'}"

    def rung(self, job: Job) -> Rung:
        """The budget of `job`: its own, or for a verification the full training's."""
        if job.kind == "probe":
            return job.rung
        return full_rung(self.spec, len(self.data.train))

    def _warmup(self, rung: Rung, recipe: Recipe) -> float:
        """Share of the steps with warm-up: what tier 1 asks of probes shorter than a full training.

        A short probe has few steps: a share that is enough for the full training leaves it one or
        two, and large learning rates look worse than they are (`tests/benchmarks/rungs.py`).
        """
        full = full_rung(self.spec, len(self.data.train))
        asked = self.spec.tier1.warmup_fraction
        if not asked or rung.samples_seen >= full.samples_seen:
            return recipe.warmup_fraction
        return max(asked, recipe.warmup_fraction)

    def prepare(self, job: Job, device: torch.device) -> jobs.Setup:
        """See `JobObjective.prepare`."""
        tests = job.kind == "verify" and self.read_test
        data = self.data if tests else self.data.without_test()
        rung, recipe = self.rung(job), Recipe.of(self.spec, job.trial.hyperparameters)
        if not 1 <= rung.num_examples <= len(data.train):
            raise ValueError(
                f"rung {rung.rung} needs {rung.num_examples} training images "
                f"and there are {len(data.train)}"
            )
        whole = job.kind == "verify" and rung.num_examples == len(data.train)
        model = recipe.build_model(
            channels=data.channels, image_size=data.image_size, num_classes=data.num_classes
        ).to(device)
        channels_last = wants_channels_last(model, device)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        if job.start_from is not None:
            load_weights(model, job.start_from, folder=self.folder)
        train = Batches(
            data.train,
            None if whole else self._order()[: rung.num_examples],
            batch_size=recipe.batch_size,
            mean=data.mean,
            std=data.std,
            shuffle=True,
            seed=job.seed,
            augmentation=recipe.augmentations(),
            device=device,
            channels_last=channels_last,
        )
        size = evaluation_batch_size(recipe.batch_size, job.micro_batch_divisor)
        evaluation = partial(
            Batches,
            batch_size=size,
            mean=data.mean,
            std=data.std,
            device=device,
            channels_last=channels_last,
        )
        key = ("validation", size, device, channels_last)
        if key not in self._cache:
            self._cache = {k: v for k, v in self._cache.items() if k[0] != "validation"}
            self._cache[key] = evaluation(data.validation)
        num_steps = rung.epochs * len(train)
        averaging = recipe.build_averaging(model, num_steps=num_steps)
        schedule = schedules.planned(
            recipe.schedule, num_steps=num_steps, warmup_fraction=self._warmup(rung, recipe)
        )
        return jobs.Setup(
            identity=self._identity(),
            rung=rung,
            model=model,
            optimizer=recipe.build_optimizer(model),
            criterion=partial(functional.cross_entropy, label_smoothing=recipe.label_smoothing),
            schedule=averaging.schedule(schedule) if averaging else schedule,
            averaging=averaging,
            train=train,
            validation=self._cache[key],
            test=None if data.test is None else partial(evaluation, data.test),
            guessing_loss=math.log(data.num_classes) if data.num_classes > 1 else None,
            precision=recipe.precision,
            gradient_clip=recipe.gradient_clip,
            compile=recipe.compile,
            report_every=self.spec.tier1.report_every,
            class_names=data.class_names,
            test_pixels=None if data.test is None else data.test.pixels,
            corrupted=self._corrupted(data, evaluation) if job.kind == "verify" else (),
            callbacks=callbacks.build(self.spec.training.callbacks, job.kind),
            examples=partial(self._examples, rung.num_examples, device),
            best_weights=self.spec.training.best_weights if job.kind == "verify" else "off",
            reads_test=tests,
        )

    def _corrupted(
        self, data: ImageData, evaluation: Callable[[Split], Batches]
    ) -> tuple[Callable[[], Iterator[Batches]], ...]:
        """Makers of the corrupted copies of validation and test, one copy at a time."""
        if not self.spec.verification.corrupted or data.test is None:
            return ()

        def copies(split: Split) -> Iterator[Batches]:
            for _, copy in corrupted_copies(split, seed=self.spec.seed):
                yield evaluation(copy)

        return tuple(partial(copies, split) for split in (data.validation, data.test))

    def _examples(
        self, limit: int, device: torch.device, count: int, batch_size: int
    ) -> list[Batch]:
        """The first `count` training examples of a job, unaugmented; at most `limit`."""
        return fixed_batches(
            self.data.train,
            self._order()[: min(count, limit)],
            batch_size,
            mean=self.data.mean,
            std=self.data.std,
            device=device,
        )

    def _order(self) -> Any:
        if ("order",) not in self._cache:
            self._cache[("order",)] = nested_order(self.data.train.labels, seed=self.spec.seed)
        return self._cache[("order",)]


def load_weights(model: nn.Module, reference: CheckpointRef, *, folder: str | Path) -> None:
    """Puts the weights behind `reference` into `model`.

    Raises:
        CheckpointError: Missing, altered, or of another architecture.
    """
    state = checkpoint.load_ref(reference, root=folder)
    try:
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {reference.path} holds the weights of another network: {error}"
        ) from error


def evaluation_batch_size(batch_size: int, micro_batch_divisor: int = 1) -> int:
    """Examples per evaluation batch: four training batches, within [64, 512].

    Without gradients four times the examples take less memory than a training step.
    """
    return max(min(max(4 * batch_size, 64), 512) // micro_batch_divisor, 1)


def wants_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether to train in channels_last: networks with 2-D convolutions on a GPU.

    An epoch of 45,000 CIFAR-sized images at batch 256 on an H200 (torch 2.11) took 1.1 s instead of
    1.7 (ResNet-20) and 1.5 instead of 2.3 (ResNet-18) in float32; with bf16 both are bound by the
    launching of kernels and the difference is in the noise.
    """
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return device.type == "cuda" and convolutional


__all__ = [
    "CHECKPOINT_SECONDS",
    "JobObjective",
    "TrainingObjective",
    "check_batch",
    "evaluation_batch_size",
    "load_weights",
    "wants_channels_last",
]
