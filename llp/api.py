"""The search in Python, from functions instead of an experiment file: `TwoTierProbing`.

The jobs are the same as those of `llp search`: they run on Ray Tune, every event goes to a ledger,
and a second call with the same study id goes on where the first was interrupted.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llp.cluster.ray_tune import Resources, hostname, ray_session, run_jobs
from llp.driver import (
    ListedSource,
    PhasedSource,
    ProbeSource,
    Study,
    derived_seed,
    measure_jobs,
)
from llp.errors import NoTrialSucceeded, SpecError, StudyError, unknown
from llp.flatness.profile import CallableFlatnessObjective
from llp.flatness.refinements import averaged
from llp.optim.sam import SharpnessAware
from llp.optim.wrapper import estimate_statistics
from llp.probing.budgets import ladder
from llp.probing.promotion import Asha
from llp.protocols import Objective, Report
from llp.records import (
    CheckpointRef,
    FlatnessProfile,
    HyperparameterValue,
    Job,
    JobEnd,
    Rung,
    Trial,
    TrialResult,
)
from llp.scoring.choose import choose_for_measurement, choose_for_verification
from llp.scoring.score import Scores, score
from llp.scoring.table import study_table
from llp.spec.schema import Tier2Spec, TrainingSpec
from llp.tracking.ledger import Ledger, study_header
from llp.training import checkpoint, jobs, loop
from llp.training.python_objective import CallableObjective, Config, Examples

Criterion = Literal["val_metric", "sharpness", "generalization_score"]
CRITERIA: tuple[Criterion, ...] = ("val_metric", "sharpness", "generalization_score")
SHARPNESS = "noise_sharpness"


@dataclass(frozen=True)
class Trained:
    """A fully trained configuration.

    Attributes:
        config: Its hyperparameters.
        model: The network with its final weights, on the CPU, in eval mode.
        validation_accuracy: In [0, 1], of these weights.
        validation_loss: Mean criterion on the validation split.
        checkpoint: The weights on disk, relative to the study folder.
    """

    config: Config
    model: nn.Module
    validation_accuracy: float
    validation_loss: float
    checkpoint: CheckpointRef


class TwoTierProbing:
    """Finds the best of given configurations by probing, and trains it.

    Args:
        configs: The configurations to try, each a dict of hyperparameters.
        model_fn: `model_fn(config)` makes a freshly initialised network.
        dataset_fn: `dataset_fn()` returns `(train, validation)` or `(train, validation, test)`:
            torch datasets, or pairs `(inputs, targets)`.
        criterion: `criterion(output, target)` is the mean loss of a batch.
        optimizer_fn: `optimizer_fn(model, config)` makes the optimizer.
        max_epochs: Epochs of a full training, and of a probe on a data fraction.
        alpha: Weight of the sharpness in the generalization score,
            `validation_accuracy - alpha * sharpness`.
        device: `cpu`, `cuda`, ...; None takes a GPU when trials get a share of one.
        seed: Of everything.
        batch_size: Unless a configuration has a `batch_size`.
        schedule: Row of `llp list schedules`; a probe finishes its own schedule.
        cpus_per_trial: CPUs of a worker.
        gpus_per_trial: GPUs of a worker, or a share of one.
        tier2: Options of the measurements.
        root: Where study folders go.
        study_id: Name of the study; default: from the configurations and options.

    Raises:
        SpecError: No configurations.

    Example::

        probing = TwoTierProbing(configs, make_model, load_data, nn.CrossEntropyLoss(), make_sgd)
        probing.run_successive_halving(min_resource=0.1)
        best = probing.select_best_configs(n=1)[0]
    """

    def __init__(
        self,
        configs: Sequence[Mapping[str, HyperparameterValue]],
        model_fn: Callable[[Config], nn.Module],
        dataset_fn: Callable[[], Sequence[Examples]],
        criterion: loop.Criterion,
        optimizer_fn: Callable[[nn.Module, Config], torch.optim.Optimizer],
        *,
        max_epochs: int = 20,
        alpha: float = 0.1,
        device: str | None = None,
        seed: int = 0,
        batch_size: int = 128,
        schedule: str = "cosine",
        cpus_per_trial: float = 1,
        gpus_per_trial: float = 0,
        tier2: Tier2Spec | None = None,
        root: str | Path = "llp_studies",
        study_id: str | None = None,
    ) -> None:
        if not configs:
            raise SpecError("TwoTierProbing needs at least one configuration")
        self.configs = [dict(config) for config in configs]
        self.max_epochs, self.alpha, self.seed = max_epochs, alpha, seed
        self.tier2 = tier2 or Tier2Spec(refinements=[])
        self.device = device or ("cuda" if gpus_per_trial > 0 else "cpu")
        self.resources = Resources(cpus_per_trial, gpus_per_trial)
        training = TrainingSpec(batch_size=batch_size, schedule=schedule, epochs=max_epochs)
        self._identity = {
            "configs": self.configs,
            "seed": seed,
            "training": training.model_dump(mode="json"),
            "tier2": self.tier2.model_dump(mode="json"),
        }
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        self.study_id = study_id or f"probing-{digest[:8]}"
        self.folder = Path(root) / self.study_id
        self._objective = CallableObjective(
            model_fn,
            dataset_fn,
            criterion,
            optimizer_fn,
            self.folder.resolve(),
            training=training,
            seed=seed,
            device=self.device,
            threads=max(1, int(cpus_per_trial)),
        )
        self.results: tuple[TrialResult, ...] = ()
        self.profiles: tuple[FlatnessProfile, ...] = ()
        self._ladder: tuple[Rung, ...] = ()

    def run_successive_halving(
        self,
        min_resource: float = 0.1,
        max_resource: float = 1.0,
        reduction_factor: int = 3,
        measure_flatness: bool = True,
        *,
        resource: Literal["data_fraction", "epochs"] = "data_fraction",
        progress_callback: Callable[[str, int, float], None] | None = None,
    ) -> tuple[TrialResult, ...]:
        """Probes all configurations, promotes the best, and measures the survivors.

        A study that was interrupted is gone on with; of a finished one the results are only read.

        Args:
            min_resource: The least data fraction, or epochs, that the lowest rung may have.
            max_resource: Of the highest rung. Each rung below has a `reduction_factor`-th of it, as
                far down as `min_resource` allows: 0.1 to 1 by 3 gives 0.11, 0.33 and 1.
            reduction_factor: One configuration in this many goes up a rung.
            measure_flatness: Measure the loss landscape of the best `tier2.top_k`.
            resource: What grows from rung to rung. Data fractions keep `max_epochs` epochs.
            progress_callback: Called with the phase, the number of jobs that ended in it and the
                resource of the last.

        Returns:
            What each configuration came to, in the order given.

        Raises:
            SpecError: Resources out of range or order.
            StudyError: The study folder holds other options, or another process drives it.
            NoTrialSucceeded: Every configuration failed or diverged.
        """
        rungs = self._rungs(min_resource, max_resource, reduction_factor, resource)
        header = {
            **self._identity,
            "rungs": [str(rung) for rung in rungs],
            "reduction_factor": reduction_factor,
        }
        with self._study(header, rungs) as ledger:
            study = Study(ledger)
            if _is_done(study, measure_flatness):
                return self._take(study)
            study.record("opened", host=hostname(), pid=os.getpid(), environment={})
            if progress_callback is not None:
                study.listen(_Progress(progress_callback, resource))
            phases: list[tuple[str, Callable[[], ProbeSource | ListedSource]]] = [
                ("tier1", partial(self._probes, study, rungs, reduction_factor))
            ]
            if measure_flatness:
                phases.append(("tier2", partial(self._measurements, study)))
            with ray_session():
                run_jobs(
                    PhasedSource(study, phases, time.monotonic),
                    _Work(self._objective, self.tier2),
                    resources=self.resources,
                    folder=self.folder / "ray",
                )
            results = self._take(study)
            usable = choose_for_verification(self._scores("generalization_score"), 1)
            if not usable or not any(trial.checkpoint for trial in results):
                failures = [trial.failure for trial in results if trial.failure]
                why = failures[-1].strip().splitlines()[-1] if failures else "all diverged"
                reason = f"no configuration produced a usable result: {why}"
                study.record("failed", reason=reason)
                raise NoTrialSucceeded(reason)
            self._finish(study, usable[0])
        return results

    def _take(self, study: Study) -> tuple[TrialResult, ...]:
        result = study.result()
        self.results, self.profiles = result.trials, result.profiles
        self._ladder = result.rungs
        return self.results

    def _finish(self, study: Study, winner: str) -> None:
        what = "generalization score" if self.profiles else "validation accuracy"
        study.record(
            "finished",
            winner=winner,
            winner_reason=f"{winner} has the best {what} of {len(self.results)} configurations; "
            "all were only probed, none was verified by full training",
            report=None,
        )
        shutil.rmtree(self.folder / "ray", ignore_errors=True)  # Tune's own files

    def select_best_configs(
        self, n: int = 1, criterion: Criterion = "generalization_score"
    ) -> list[Config]:
        """The `n` best configurations, best first.

        Args:
            n: How many.
            criterion: `val_metric` (validation accuracy), `sharpness` (`noise_sharpness` of the
                measured ones, lowest first, those whose measurement failed last) or
                `generalization_score` (accuracy minus alpha times sharpness; the accuracy alone
                when nothing was measured).

        Raises:
            SpecError: Unknown criterion, nothing was probed yet, or sharpness was not measured.
        """
        if criterion not in CRITERIA:
            raise SpecError(unknown("criterion", criterion, CRITERIA))
        if not self.results:
            raise SpecError("call run_successive_halving first: nothing has been probed yet")
        by_id = {trial.trial.trial_id: dict(trial.trial.hyperparameters) for trial in self.results}
        if criterion == "sharpness":
            measured = sorted(
                (math.isnan(value), value if math.isfinite(value) else math.inf, trial_id)
                for trial_id, value in self._measured().items()
            )
            return [by_id[trial_id] for _, _, trial_id in measured[:n]]
        return [by_id[str(trial_id)] for trial_id in self._scores(criterion).ranking[:n]]

    def _scores(self, criterion: Criterion) -> Scores:
        preset = "validation" if criterion == "val_metric" or not self.profiles else "llp"
        table = study_table(self.results, self.profiles, rungs=self._ladder)
        return score(table, preset=preset, alpha=self.alpha, seed=self.seed)

    def _measured(self) -> dict[str, float]:
        """Trial id -> sharpness."""
        if not self.profiles:
            raise SpecError(
                "sharpness was not measured; use run_successive_halving(measure_flatness=True)"
            )
        found = {
            profile.trial_id: measurement.value
            for profile in self.profiles
            for measurement in profile.measurements
            if measurement.name == SHARPNESS
        }
        if not found:
            raise SpecError(
                f"sharpness was not measured: tier2.metrics lists {self.tier2.metrics} and not "
                f"'{SHARPNESS}'"
            )
        return found

    def train(
        self, config: Mapping[str, HyperparameterValue], epochs: int | None = None
    ) -> Trained:
        """Trains one configuration on all training data."""
        return self._train(dict(config), "plain", self._objective, epochs)[0]

    def train_with_sam(
        self,
        config: Mapping[str, HyperparameterValue],
        rho: float = 0.05,
        epochs: int | None = None,
    ) -> Trained:
        """Trains one configuration with sharpness-aware minimization around its optimizer."""
        sam = copy.copy(self._objective)
        sam.adjust = partial(_with_sam, rho=rho)
        return self._train(dict(config), f"sam{rho:g}", sam, epochs)[0]

    def train_with_swa(
        self,
        config: Mapping[str, HyperparameterValue],
        epochs: int | None = None,
        swa_start: int | None = None,
    ) -> tuple[Trained, Trained]:
        """Trains one configuration, then averages its weights over further epochs.

        Args:
            config: The configuration.
            epochs: All epochs, averaging included; default `max_epochs`.
            swa_start: Epoch after which weights are averaged, at half the peak learning rate;
                default three quarters of the epochs.

        Returns:
            The weights at `swa_start`, with their schedule finished, and the average, with its
            batch-norm statistics estimated on training data.

        Raises:
            SpecError: `swa_start` is not between 1 and `epochs - 1`.
        """
        total = epochs or self.max_epochs
        begin = swa_start if swa_start is not None else max(1, round(0.75 * total))
        if not 1 <= begin < total:
            raise SpecError(f"swa_start ({begin}) must be from 1 to epochs - 1 ({total - 1})")
        objective = _SwaObjective(self._objective, total - begin)
        regular, average = self._train(dict(config), f"swa{total - begin}", objective, begin)
        return regular, average

    # --- how it is done ---------------------------------------------------------------------

    def _rungs(self, low: float, high: float, factor: int, resource: str) -> list[Rung]:
        if not 0 < low <= high or (resource == "data_fraction" and high > 1):
            raise SpecError(
                f"resources must satisfy 0 < min_resource ({low:g}) <= max_resource ({high:g})"
                + (" <= 1, a fraction of the data" if resource == "data_fraction" else "")
            )
        if factor < 2:
            raise SpecError(f"reduction_factor must be a whole number of at least 2, not {factor}")
        least = low if resource == "data_fraction" else max(low, 1)
        levels = [high]
        while levels[0] / factor >= least * (1 - 1e-9):
            levels.insert(0, levels[0] / factor)
        num_train = self._objective.num_train_examples()
        if resource == "epochs":
            return ladder([1.0] * len(levels), [max(1, round(n)) for n in levels], num_train)
        return ladder(levels, [self.max_epochs] * len(levels), num_train)

    def _study(self, header: dict[str, Any], rungs: Sequence[Rung]) -> Ledger:
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
        if (self.folder / "ledger.jsonl").exists():
            if study_header(self.folder).get("spec_digest") != digest:
                raise StudyError(
                    f"the study {self.study_id} in {self.folder.parent} was started with other "
                    "configurations, resources or options; repeat those, or give this one another "
                    "study_id"
                )
            return Ledger.open(self.folder)
        return Ledger.create(
            self.folder,
            study_id=self.study_id,
            spec={"name": self.study_id, "training": {"epochs": self.max_epochs}},
            spec_digest=digest,
            environment={},
            llp_version="",
            rungs=list(rungs),
            num_train=self._objective.num_train_examples(),
            num_trials=len(self.configs),
            kind="python",  # nothing to resume it from but another call
        )

    def _probes(self, study: Study, rungs: Sequence[Rung], factor: int) -> ProbeSource:
        return ProbeSource(
            study,
            scheduler=Asha(len(self.configs), len(rungs), factor),
            searcher=_Given(self.configs),
            rungs=rungs,
            seed=self.seed,
        )

    def _measurements(self, study: Study) -> ListedSource:
        result = study.result()
        chosen = choose_for_measurement(result.trials, self.tier2.top_k, rungs=result.rungs)
        return ListedSource(study, measure_jobs(study, chosen))

    def _train(
        self, config: Config, how: str, objective: Objective, epochs: int | None
    ) -> list[Trained]:
        """Runs one training job on Ray and returns the networks it ended with."""
        num_epochs = epochs or self.max_epochs
        rung = Rung(1, 1.0, self._objective.num_train_examples(), num_epochs)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
        seed = derived_seed(self.seed, 3)
        job = Job(f"{how}-{digest}-e{num_epochs}", "probe", Trial("t000", config, seed), rung, seed)
        source = _Single(job)
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"ray-{job.job_id}"
        with ray_session():
            run_jobs(source, objective, resources=self.resources, folder=scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        end = source.end
        if end is None or end.checkpoint is None:
            raise NoTrialSucceeded(
                f"training ended as {end.outcome if end else 'lost'}: {end.failure if end else ''}"
            )
        return [
            self._load(config, reference)
            for reference in (end.checkpoint, _average_of(end.checkpoint, self.folder))
            if reference is not None
        ]

    def _load(self, config: Config, reference: CheckpointRef) -> Trained:
        model = self._objective.model_fn(config)
        model.load_state_dict(checkpoint.load_ref(reference, root=self.folder)["model"])
        job = Job("load", "probe", Trial("t000", config, 0), Rung(1, 1.0, 1, 1), 0)
        setup = self._objective.prepare(job, torch.device("cpu"))
        found = loop.evaluate(
            model,
            setup.validation,
            criterion=self._objective.criterion,
            num_correct=self._objective.num_correct,
        )
        return Trained(config, model.eval(), found.accuracy, found.loss, reference)


def _is_done(study: Study, measure_flatness: bool) -> bool:
    """Whether the study is finished and lacks nothing that is asked for now."""
    if study.result().status != "finished":
        return False
    return not measure_flatness or any(
        event["event"] == "phase" and (event["name"], event["status"]) == ("tier2", "end")
        for event in study.history
    )


class _Given:
    """A searcher over a fixed list."""

    def __init__(self, configs: Sequence[Config]) -> None:
        self._configs = configs
        self.num_points: int | None = len(configs)

    def suggest(self, index: int) -> Config:
        return dict(self._configs[index])


class _Work:
    """What a worker does with a probe or a measurement."""

    def __init__(self, training: CallableObjective, tier2: Tier2Spec) -> None:
        self._training: Objective = training
        self._flatness: Objective = CallableFlatnessObjective(training, tier2)

    def __call__(self, job: Job) -> Iterator[Report]:
        return self._flatness(job) if job.kind == "measure" else self._training(job)


def _with_sam(setup: jobs.Setup, rho: float) -> jobs.Setup:
    return replace(setup, optimizer=SharpnessAware(setup.optimizer, rho=rho))


class _SwaObjective:
    """A training, and then the average of its weights over further epochs."""

    def __init__(self, training: CallableObjective, epochs: int) -> None:
        self._training, self._epochs = training, epochs

    def __call__(self, job: Job) -> Generator[Report, None, JobEnd]:
        end: JobEnd = yield from self._training(job)
        if end.checkpoint is None:
            return end
        device = torch.device(self._training.device or "cpu")
        setup = self._training.prepare(replace(job, start_from=end.checkpoint), device)
        average = averaged(setup, self._epochs, device)
        estimate_statistics(average, setup.train.epoch(0), device)
        state = {"format": 1, "model": checkpoint.to_cpu(average.module.state_dict())}
        checkpoint.save(_average_path(end.checkpoint), state, root=self._training.folder)
        return replace(end, samples_seen=end.samples_seen + self._epochs * job.rung.num_examples)


def _average_path(reference: CheckpointRef) -> str:
    return reference.path.removesuffix(".pt") + "-average.pt"


def _average_of(reference: CheckpointRef, folder: Path) -> CheckpointRef | None:
    path = folder / _average_path(reference)
    if not path.exists():
        return None
    return CheckpointRef(_average_path(reference), hashlib.sha256(path.read_bytes()).hexdigest())


class _Single:
    """A source of one job, tried up to three times."""

    def __init__(self, job: Job) -> None:
        self._todo: list[Job] = [job]
        self._running = False
        self.end: JobEnd | None = None

    def next_job(self) -> Job | Literal["wait", "done"]:
        if self._todo:
            self._running = True
            return self._todo.pop()
        return "wait" if self._running else "done"

    def on_report(self, job: Job, report: Report) -> None:
        """Nothing to decide."""

    def on_end(self, job: Job, end: JobEnd) -> None:
        self._running, self.end = False, end
        if end.outcome in ("failed", "out_of_memory") and job.attempt < 2:
            divisor = 4 if end.outcome == "out_of_memory" else 1
            again = replace(
                job,
                attempt=job.attempt + 1,
                micro_batch_divisor=job.micro_batch_divisor * divisor,
            )
            self._todo.append(again)


class _Progress:
    """Turns ledger events into calls of `progress_callback(phase, ended, resource)`."""

    def __init__(self, callback: Callable[[str, int, float], None], resource: str) -> None:
        self._callback, self._resource = callback, resource
        self._phase, self._ended = "", 0
        self._rungs: dict[int, Mapping[str, Any]] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "study":
            self._rungs = {rung["rung"]: rung for rung in event["rungs"]}
        elif event["event"] == "phase" and event["status"] == "start":
            self._phase, self._ended = event["name"], 0
        elif event["event"] == "job_end":
            self._ended += 1
            rung = self._rungs[event["rung"]]
            self._callback(self._phase, self._ended, float(rung[self._resource]))
