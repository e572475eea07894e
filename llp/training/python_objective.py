"""The same training from Python functions instead of an experiment file: `CallableObjective`.

The user brings `model_fn(config)`, `dataset_fn()`, `criterion(output, target)` and
`optimizer_fn(model, config)`; loop, rungs, snapshots and outcomes are those of `jobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from llp.records import HyperparameterValue, Job, Rung
from llp.spec.schema import TrainingSpec
from llp.training import jobs, loop, schedules
from llp.training.objective import (
    CHECKPOINT_SECONDS,
    JobObjective,
    evaluation_batch_size,
    load_weights,
)
from llp.workloads.subsets import nested_order

Config: TypeAlias = dict[str, HyperparameterValue]
Examples: TypeAlias = "Dataset[Any] | tuple[Any, Any] | list[Any]"
"""A map-style dataset of (input, target) pairs, or a pair (tuple or list) of arrays or tensors."""


class CallableObjective(JobObjective):
    """Runs probes and verifications of a model given as functions.

    Args:
        model_fn: `model_fn(config)` makes a freshly initialised network.
        dataset_fn: `dataset_fn()` returns `(train, validation)` or `(train, validation, test)`,
            each a map-style torch `Dataset` or a pair `(inputs, targets)`; called once per process.
        criterion: `criterion(output, target)` is the mean loss of a batch.
        optimizer_fn: `optimizer_fn(model, config)` makes the optimizer; its learning rate is the
            peak of the schedule.
        folder: Where checkpoints go.
        training: Batch size, schedule, warm-up, clipping, precision and compile are read from here;
            `config["batch_size"]` goes before its batch size.
        seed: Fixes the nested subsets.
        num_correct: Hits of a batch, for accuracies; default: largest logit at the class index.
        device: None: a GPU when there is one.
        threads: See `JobObjective`.
        checkpoint_seconds: See `JobObjective`.

    `adjust`, when it is set, is given every prepared `Setup` and returns the one to train, for
    trainings that differ in more than their recipe.

    Without a test split a verification ends as failed, after its checkpoint is written.
    """

    def __init__(
        self,
        model_fn: Callable[[Config], nn.Module],
        dataset_fn: Callable[[], Sequence[Examples]],
        criterion: loop.Criterion,
        optimizer_fn: Callable[[nn.Module, Config], Optimizer],
        folder: str | Path,
        *,
        training: TrainingSpec | None = None,
        seed: int = 0,
        num_correct: Callable[[Any, Any], Tensor] = loop.num_correct,
        device: str | torch.device | None = None,
        threads: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        super().__init__(
            folder, device=device, threads=threads, checkpoint_seconds=checkpoint_seconds
        )
        self.model_fn, self.dataset_fn = model_fn, dataset_fn
        self.criterion, self.optimizer_fn = criterion, optimizer_fn
        self.training = training if training is not None else TrainingSpec()
        self.seed, self.num_correct = seed, num_correct
        self.adjust: Callable[[jobs.Setup], jobs.Setup] | None = None

    def prepare(self, job: Job, device: torch.device) -> jobs.Setup:
        """See `JobObjective.prepare`."""
        splits, config = self._splits(), dict(job.trial.hyperparameters)
        train, validation = splits[0], splits[1]
        rung = job.rung
        if job.kind == "verify":
            rung = Rung(rung.rung, 1.0, _count(train), rung.epochs)
        if not 1 <= rung.num_examples <= _count(train):
            raise ValueError(
                f"rung {rung.rung} needs {rung.num_examples} training examples "
                f"and there are {_count(train)}"
            )
        model = self.model_fn(config).to(device)
        if job.start_from is not None:
            load_weights(model, job.start_from, folder=self.folder)
        batch_size = int(config.get("batch_size", self.training.batch_size))
        size = evaluation_batch_size(batch_size, job.micro_batch_divisor)
        chosen = None if job.kind == "verify" else self._order()[: rung.num_examples]
        batches = ExampleBatches(
            train, chosen, batch_size=batch_size, device=device, shuffle=True, seed=job.seed
        )
        # Functions cannot be compared: the recipe and the sizes of the splits must do.
        identity = f"{self.training.model_dump_json()} {self.seed} {[_count(s) for s in splits]}"
        setup = jobs.Setup(
            identity=identity,
            rung=rung,
            model=model,
            optimizer=self.optimizer_fn(model, config),
            criterion=self.criterion,
            schedule=schedules.planned(
                self.training.schedule,
                num_steps=rung.epochs * len(batches),
                warmup_fraction=self.training.warmup_fraction,
            ),
            train=batches,
            validation=ExampleBatches(validation, batch_size=size, device=device),
            test=(
                (lambda: ExampleBatches(splits[2], batch_size=size, device=device))
                if len(splits) > 2
                else None
            ),
            validation_criterion=self.criterion,
            num_correct=self.num_correct,
            precision=self.training.precision,
            gradient_clip=self.training.gradient_clip,
            compile=self.training.compile,
        )
        return setup if self.adjust is None else self.adjust(setup)

    def num_train_examples(self) -> int:
        """Size of the training split, which the rungs are fractions of."""
        return _count(self._splits()[0])

    def _splits(self) -> tuple[Examples, ...]:
        if "splits" not in self._cache:
            splits = tuple(self.dataset_fn())
            if len(splits) not in (2, 3):
                raise ValueError(
                    "dataset_fn must return (train, validation) or (train, validation, test), "
                    f"not {len(splits)} parts"
                )
            self._cache["splits"] = splits
        found: tuple[Examples, ...] = self._cache["splits"]
        return found

    def _order(self) -> Any:
        if "order" not in self._cache:
            train = self._splits()[0]
            labels = _class_labels(train)
            self._cache["order"] = (
                np.random.default_rng(self.seed).permutation(_count(train))
                if labels is None
                else nested_order(labels, seed=self.seed)
            )
        return self._cache["order"]


class ExampleBatches:
    """Batches of (input, target) pairs; the counterpart of `workloads.Batches` for any tensors.

    The order is a pure function of (seed, epoch). A last batch of a single example is joined to the
    batch before it.
    """

    def __init__(
        self,
        examples: Examples,
        indices: Any = None,
        *,
        batch_size: int,
        device: torch.device,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self._indices = np.arange(_count(examples)) if indices is None else np.asarray(indices)
        self.num_examples = len(self._indices)
        if self.num_examples < 1 or batch_size < 1:
            raise ValueError(
                f"there must be examples and a batch_size of at least 1, not "
                f"{self.num_examples} and {batch_size}"
            )
        self._device, self._shuffle, self._seed = device, shuffle, seed
        stops = [*range(batch_size, self.num_examples, batch_size), self.num_examples]
        if len(stops) > 1 and batch_size > 1 and stops[-1] - stops[-2] == 1:
            del stops[-2]
        self._bounds = list(zip([0, *stops[:-1]], stops, strict=True))
        tensors = _tensors(examples)
        self._tensors = None if tensors is None else [t.to(device) for t in tensors]
        self._examples = examples

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._bounds)

    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[loop.Batch]:
        """The batches of `epoch`, from batch number `start` on."""
        order = self._indices
        if self._shuffle:
            seeds = np.random.SeedSequence([self._seed, epoch])
            order = order[np.random.default_rng(seeds).permutation(self.num_examples)]
        if self._tensors is not None:
            inputs, targets = self._tensors
            rows = torch.as_tensor(order, device=self._device)
            for low, high in self._bounds[start:]:
                yield inputs[rows[low:high]], targets[rows[low:high]]
            return
        loader: DataLoader[Any] = DataLoader(
            self._examples,  # type: ignore[arg-type]
            batch_sampler=[order[low:high].tolist() for low, high in self._bounds[start:]],
            generator=torch.Generator(),  # else it draws from the global one
        )
        for batch in loader:
            inputs, targets = batch
            yield inputs.to(self._device), targets.to(self._device)


def _count(examples: Examples) -> int:
    pair = _pair(examples)
    return len(examples if pair is None else pair[0])  # type: ignore[arg-type]


def _pair(examples: Examples) -> tuple[Any, Any] | None:
    """Inputs and targets where they are there as a whole: a pair, or a plain `TensorDataset`."""
    parts: Any = examples
    if isinstance(examples, torch.utils.data.TensorDataset):
        parts = examples.tensors
    if not isinstance(parts, tuple | list):
        return None
    if len(parts) != 2 or len(parts[0]) != len(parts[1]):
        raise ValueError("a split must be (inputs, targets) of one length")
    return parts[0], parts[1]


def _tensors(examples: Examples) -> tuple[Tensor, Tensor] | None:
    pair = _pair(examples)
    return None if pair is None else (torch.as_tensor(pair[0]), torch.as_tensor(pair[1]))


def _class_labels(examples: Examples) -> Any:
    """Class index of each example, or None where targets are not class indices."""
    tensors = _tensors(examples)
    targets: Any
    if tensors is not None:
        targets = tensors[1].cpu()
    else:
        targets = getattr(examples, "targets", None)
        if targets is None:
            targets = [examples[i][1] for i in range(_count(examples))]
        try:
            targets = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError):
            return None
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        return None
    return targets.numpy().astype(np.int64)


__all__ = ["CallableObjective", "Config", "ExampleBatches", "Examples"]
