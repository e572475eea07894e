"""Runs a batch: definition -> jobs on Ray Tune -> ledger -> table, page and parquet file.

A batch keeps everything in one folder, `llp_batches/NAME`. The ledger is that of a study: one
append-only line for every job, point and end; what has ended there is never run again, so a killed
batch goes on when the same command is given. A run may be added to the file later, or get more
seeds; one whose definition was changed is refused, because its old results would stand under the
new definition. A training that fails or diverges is a row of the table with its reason.

The jobs are those of a search: `probe` jobs, which never see the test split, compare the candidates
of a run; `verify` jobs train fully and read the test split once, after the last epoch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from llp.batch_results import BatchResult, write_results
from llp.batch_worker import CONFIGURATION, BatchObjective
from llp.cluster.ray_tune import Resources, ray_session, run_jobs
from llp.driver import ListedSource, OnEvent, PhasedSource, Study, derived_seed
from llp.errors import DataError, LlpError, NoTrialSucceeded, SpecError, StudyError
from llp.pipeline import (
    MLFLOW_SECONDS,
    NODES_SECONDS,
    describe_environment,
    interruptible,
)
from llp.protocols import Report
from llp.records import Job, JobEnd, Observation, Rung, StopDecision, Trial, from_plain, to_plain
from llp.spec.batch import Batch, Run
from llp.spec.batch_plan import (
    Configuration,
    Cost,
    candidates,
    costs,
    experiment_of,
    finals,
    fingerprint,
    in_force,
    own_value,
    variants,
)
from llp.tracking.ledger import Ledger, has_study
from llp.tracking.shipper import start_shipper, wait_shipper
from llp.workloads import ImageData
from llp.workloads import load as load_data

MAX_FAILURES = 2
"""Retries of a training that fails or is lost."""


def datasets(batch: Batch) -> dict[str, ImageData]:
    """Run -> its images; runs of the same dataset share them.

    Raises:
        SpecError: A run asks for a data fraction with less than an image a class.
        DataError: A dataset cannot be read.
    """
    loaded: dict[str, ImageData] = {}
    found = {}
    for name, run in batch.runs.items():
        key = json.dumps([run.spec.dataset.model_dump(mode="json"), run.spec.seed], sort_keys=True)
        if key not in loaded:
            loaded[key] = load_data(run.spec.dataset, run.spec.seed)
        found[name] = loaded[key]
    return found


def plan(batch: Batch, data: Mapping[str, ImageData] | None = None) -> list[Cost]:
    """What `run` will do and spend when nothing fails; starts nothing.

    Raises:
        SpecError: A data fraction leaves fewer images than classes.
        DataError: A dataset cannot be read.
    """
    data = data or datasets(batch)
    problems = []
    for name, run in batch.runs.items():
        fractions = [run.data_fraction]
        for study in batch.studies:
            if study.run == name:
                fractions += [float(v) for v in study.parameters.get("data_fraction", ())]
        num_train, num_classes = len(data[name].train), data[name].num_classes
        for fraction in fractions:
            if round(fraction * num_train) < num_classes:
                text = (
                    f"runs.{name}: a data fraction of {fraction:g} is "
                    f"{round(fraction * num_train)} of {num_train:,} training images, fewer than "
                    f"one for each of the {num_classes} classes"
                )
                problems.append(text)
        if data[name].test is None:
            raise DataError(f"{data[name].name} has no test split; a batch compares on one")
    if problems:
        raise SpecError("\n".join(problems))
    return costs(batch, {name: len(images.train) for name, images in data.items()})


def run(
    batch: Batch,
    *,
    only: Sequence[str] = (),
    data: Mapping[str, ImageData] | None = None,
    on_event: OnEvent | None = None,
    command: str = "",
) -> BatchResult:
    """Runs what is missing of a batch, then writes its page and its table.

    Args:
        batch: The batch.
        only: Runs to train, with their studies; all of them when empty.
        data: Run -> its images, where the caller has loaded them.
        on_event: Called in this process with every ledger event.
        command: What the user typed, for the page.

    Raises:
        SpecError: A run does not fit the data.
        DataError: A dataset cannot be read.
        StudyError: The folder holds another study, a run with another definition, or another
            driver has it.
        LlpError: A worker trained something else than what was asked for: a bug.
        NoTrialSucceeded: Not one full training was completed.
        EnvironmentProblem: No GPU, disk full, Ray does not start.
        KeyboardInterrupt: On Ctrl-C and SIGTERM; everything finished is in the ledger.
    """
    order, batch = list(batch.runs), batch.chosen(only)
    data = data or datasets(batch)
    plan(batch, data)
    with _ledger(batch, data, command) as ledger:
        study = Study(ledger, on_event)
        _require_same(batch, data, study)
        study.record("opened", host=os.uname().nodename, pid=os.getpid())
        study.record("batch", batch=_definition(batch, data, order), command=command)
        shipper = start_shipper(batch.folder) if batch.tracking.mlflow else None
        try:
            _train(batch, data, study)
            result = write_results(batch.folder, ending=True)
            study.record("finished", winner=None, winner_reason="")  # page and table are there
            shutil.rmtree(batch.folder / "ray", ignore_errors=True)  # Tune's own files
        finally:
            ledger.close()
            if shipper is not None and sys.exc_info()[0] is not KeyboardInterrupt:
                wait_shipper(shipper, MLFLOW_SECONDS)
    if not result.outcomes.get("completed"):
        raise NoTrialSucceeded(
            f"no full training of the batch was completed; see {result.page} for the reasons"
        )
    return result


def _train(batch: Batch, data: Mapping[str, ImageData], study: Study) -> None:
    resources = batch.resources
    with (
        ray_session(
            address=resources.address, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus
        ),
        interruptible(),  # in this order: Ray sets a SIGTERM handler too
    ):
        run_jobs(
            PhasedSource(
                study,
                [
                    ("choose", lambda: _choosing(batch, data, study)),
                    ("train", lambda: _training(batch, data, study)),
                ],
                time.monotonic,
            ),
            BatchObjective(
                {name: run.spec for name, run in batch.runs.items()}, data, batch.folder
            ),
            resources=Resources(
                resources.cpus_per_trial, resources.gpus_per_trial, resources.max_concurrent
            ),
            folder=batch.folder / "ray",
            wait_for_nodes=NODES_SECONDS if resources.address else 0.0,
        )


# --- the ledger of a batch --------------------------------------------------------------------


def _ledger(batch: Batch, data: Mapping[str, ImageData], command: str) -> Ledger:
    if has_study(batch.folder):
        return Ledger.open(batch.folder)
    first = next(iter(batch.runs))
    environment = describe_environment(command)
    return Ledger.create(
        batch.folder,
        study_id=batch.name,
        kind="batch",
        spec=batch.runs[first].spec.model_dump(mode="json"),
        spec_digest="",
        environment=environment,
        llp_version=environment["llp"],
        rungs=[],
        num_train=len(data[first].train),
        num_validation=len(data[first].validation),
        num_classes=data[first].num_classes,
    )


def _definition(
    batch: Batch, data: Mapping[str, ImageData], order: Sequence[str]
) -> dict[str, Any]:
    """The batch as this driver runs it; `order` names all runs of the file."""
    runs = {
        name: {
            "dataset": data[name].name,
            "digest": data[name].digest,
            "source": data[name].source,
            "num_train": len(data[name].train),
            "num_validation": len(data[name].validation),
            "num_classes": data[name].num_classes,
            "experiment": experiment_of(run),
            "seeds": list(run.seeds),
            "repeats": run.repeats,
            "num_configurations": len(run.points),
            "varied": {
                key: sorted({p[key] for p in run.points if key in p}, key=repr)
                for key in run.varied
            },
            "choose": None if run.choose is None else run.choose.model_dump(mode="json"),
        }
        for name, run in batch.runs.items()
    }
    return {
        "name": batch.name,
        "title": batch.title,
        "file": Path(batch.file).name,
        "reference": batch.reference,
        "order": list(order),
        "runs": runs,
        "studies": [to_plain(study) for study in batch.studies],
    }


def _require_same(batch: Batch, data: Mapping[str, ImageData], study: Study) -> None:
    """Refuses a folder with something else than this batch, or with changed runs of it."""
    if study.header.get("kind") != "batch":
        raise StudyError(f"{batch.folder} holds a study that is no batch; name the batch otherwise")
    _require_same_tracking(batch, study)
    images: dict[str, str] = {}
    for event in study.history:
        if event["event"] == "batch":
            images |= {name: run["digest"] for name, run in event["batch"]["runs"].items()}
    for name in batch.runs:
        if name in images and images[name] != data[name].digest:
            raise StudyError(
                f"the images of the run {name} are not those that the batch began with "
                f"({data[name].source}); set dataset.root to the same files"
            )
    known = _fingerprints(study)
    for run in batch.runs.values():
        for one in candidates(run) or finals(run):
            _require_known(batch, one, known)


def _require_same_tracking(batch: Batch, study: Study) -> None:
    """All of a batch is shipped to where its first line says."""
    began = study.header["spec"]["tracking"]
    for key in ("uri", "experiment"):
        now = getattr(batch.tracking, key)
        if batch.tracking.mlflow and now != began[key]:
            raise StudyError(
                f"tracking.{key} was {began[key] or 'not set'} when {batch.folder} began, and is "
                f"{now or 'not set'} now; all runs of a batch go to one place: set it as it was "
                f"(--set defaults.tracking.{key}=...), or name the batch otherwise"
            )


def _fingerprints(study: Study) -> dict[str, str]:
    """Configuration id -> fingerprint, of everything the ledger knows."""
    experiments: dict[str, Mapping[str, Any]] = {}
    found = {}
    for event in study.history:
        if event["event"] == "batch":
            for name, run in event["batch"]["runs"].items():
                experiments.setdefault(name, run["experiment"])
        elif event["event"] == "configuration":
            one = from_plain(Configuration, event["configuration"])
            found[one.configuration_id] = fingerprint(experiments[one.run], one)
    return found


def _require_known(batch: Batch, one: Configuration, known: Mapping[str, str]) -> None:
    now = fingerprint(experiment_of(batch.runs[one.run]), one)
    if known.get(one.configuration_id, now) != now:
        raise _changed(batch, one)


def _changed(batch: Batch, configuration: Configuration) -> StudyError:
    return StudyError(
        f"{configuration.label} was trained with another definition in {batch.folder}; its results "
        f"cannot stand under the new one: rename the run '{configuration.run}', or the batch, or "
        "remove that folder"
    )


def _announce(batch: Batch, study: Study, configurations: Sequence[Configuration]) -> None:
    """Writes every configuration that the ledger does not have; refuses changed ones."""
    known, new = _fingerprints(study), []
    for one in configurations:
        run = batch.runs[one.run]
        _require_known(batch, one, known)
        if one.configuration_id not in known:
            settings = {
                key: own_value(run.spec, one.hyperparameters, key)
                for key in ("model", "optimizer", "averaging", "learning_rate", "batch_size")
            }
            payload = {
                "configuration": one,
                "settings": settings,
                "own": _own(batch, one),
            }
            new.append(("configuration", payload))
    if new:
        study.record_all(new)


def _own(batch: Batch, configuration: Configuration) -> dict[str, Any]:
    """The values that a run itself has of what its studies vary."""
    run = batch.runs[configuration.run]
    names = [n for s in batch.studies if s.run == run.name for n in s.parameters]
    return {name: in_force(run, configuration, name) for name in names}


# --- phases -----------------------------------------------------------------------------------


def _choosing(batch: Batch, data: Mapping[str, ImageData], study: Study) -> BatchSource:
    """Compares the candidates of every run on seeds of their own, without the test split."""
    wanted = []
    for name, run in batch.runs.items():
        for one in candidates(run):
            assert run.choose is not None
            for number in range(run.choose.num_seeds):
                seed = derived_seed(run.spec.seed, 3, number)
                wanted.append((one, _job(one, "probe", seed, number, len(data[name].train))))
    _announce(batch, study, [one for one, _ in wanted])
    return BatchSource(batch, study, wanted)


def _training(batch: Batch, data: Mapping[str, ImageData], study: Study) -> BatchSource:
    """Trains what was chosen, and the variants of the studies, fully; one seed after the other."""
    trained: list[Configuration] = []
    for run in batch.runs.values():
        if not candidates(run):
            trained += finals(run)
        elif (best := _choose(run, study)) is not None:
            trained += finals(run, best.hyperparameters)
    by_id = {one.configuration_id: one for one in trained}
    for part in batch.studies:
        if part.run in by_id:
            trained += variants(part, batch.runs[part.run], by_id[part.run])
    _announce(batch, study, trained)
    wanted = []
    for place in range(max(len(run.seeds) for run in batch.runs.values())):
        for repeat in range(max(run.repeats for run in batch.runs.values())):
            for one in trained:
                run = batch.runs[one.run]
                if place < len(run.seeds) and repeat < run.repeats:
                    seed, num_train = run.seeds[place], len(data[one.run].train)
                    wanted.append((one, _job(one, "verify", seed, repeat, num_train)))
    return BatchSource(batch, study, wanted)


def _job(configuration: Configuration, kind: Any, seed: int, number: int, num_train: int) -> Job:
    """One training; `number` counts seeds of a candidate, and repeats of a full training."""
    name = configuration.configuration_id
    job_id = f"{name}-s{seed}" + (f"-r{number}" if number else "")
    if kind == "probe":
        job_id = f"{name}-t{number}"
    examples = round(configuration.data_fraction * num_train)
    return Job(
        job_id=job_id,
        kind=kind,
        trial=Trial(name, dict(configuration.hyperparameters), seed),
        rung=Rung(
            1 if kind == "probe" else 2,
            configuration.data_fraction,
            examples,
            configuration.epochs,
        ),
        seed=seed,
    )


def _choose(run: Run, study: Study) -> Configuration | None:
    """The candidate with the best mean result, all of whose trainings were completed."""
    assert run.choose is not None
    outcomes = {
        event["end"]["job_id"]: event["end"]["outcome"]
        for event in study.history
        if event["event"] == "job_end"
    }
    results: dict[str, tuple[float, float]] = {}
    for one in candidates(run):
        ids = [f"{one.configuration_id}-t{number}" for number in range(run.choose.num_seeds)]
        if all(outcomes.get(job_id) == "completed" for job_id in ids):
            last = [max(study.state.points[i].items())[1] for i in ids]
            results[one.configuration_id] = (
                # rounded: equal accuracies must be equal, whatever the order of the sum
                round(fmean(point.validation_accuracy for point in last), 12),
                round(fmean(point.validation_loss for point in last), 12),
            )
    accuracy_first = run.choose.by == "validation_accuracy"

    def order(item: tuple[str, tuple[float, float]]) -> tuple[float, float]:
        accuracy, loss = item[1]
        return (accuracy, -loss) if accuracy_first else (-loss, accuracy)

    best = max(results.items(), key=order)[0] if results else None
    payload = {"run": run.name, "configuration_id": best, "results": results}
    said = [e for e in study.history if e["event"] == "chosen" and e["run"] == run.name]
    if not said or said[-1]["configuration_id"] != best:
        study.record("chosen", **payload)
    return next((one for one in candidates(run) if one.configuration_id == best), None)


class BatchSource(ListedSource):
    """Hands out trainings and holds what was trained against what was asked for.

    Args:
        batch: The batch.
        study: Its ledger.
        wanted: Configurations with their jobs, in the order in which they start.
    """

    def __init__(
        self, batch: Batch, study: Study, wanted: Sequence[tuple[Configuration, Job]]
    ) -> None:
        super().__init__(study, [job for _, job in wanted], max_failures=MAX_FAILURES)
        self._asked = {job.job_id: asked_for(batch.runs[one.run], one, job) for one, job in wanted}

    def on_report(self, job: Job, report: Report) -> StopDecision | None:
        """Records a report.

        Raises:
            LlpError: The worker says that it trains something else than what was asked for.
        """
        if isinstance(report, Observation) and report.callback == CONFIGURATION:
            _require_asked(job.job_id, self._asked[job.job_id], json.loads(report.note))
        return super().on_report(job, report)

    def on_end(self, job: Job, end: JobEnd) -> None:
        """Records the end.

        Raises:
            LlpError: A training was completed and never said what it trained.
        """
        if end.outcome == "completed" and (job.job_id, CONFIGURATION, 0) not in self.study.observed:
            raise LlpError(f"{job.job_id} did not say what it trained: a bug in llp")
        super().on_end(job, end)


def asked_for(run: Run, configuration: Configuration, job: Job) -> dict[str, Any]:
    """What a job must train with: from the file and the configuration, not from what was built."""
    training = run.spec.training
    asked: dict[str, Any] = {
        "model": run.spec.model.name,
        **training.model_dump(
            include={
                "optimizer",
                "averaging",
                "schedule",
                "learning_rate",
                "weight_decay",
                "batch_size",
                "warmup_fraction",
                "label_smoothing",
                "gradient_clip",
                "precision",
                "augmentation",
            }
        ),
        **configuration.hyperparameters,
        "epochs": configuration.epochs,
        "num_examples": job.rung.num_examples,
        "seed": job.seed,
    }
    if isinstance(asked["augmentation"], str):
        names = asked["augmentation"].split("+")
        asked["augmentation"] = [n.strip() for n in names if n.strip() not in ("", "none")]
    if asked["gradient_clip"] == "none":
        asked["gradient_clip"] = None
    return asked


def _require_asked(job_id: str, asked: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    wrong = [
        f"{name} {trained.get(name)!r} instead of {value!r}"
        for name, value in asked.items()
        if name not in trained or trained[name] != value
    ]
    if wrong:
        raise LlpError(
            f"{job_id} would be trained with {', '.join(wrong)}: a bug in llp, or in your own "
            "optimizer or model. Nothing of it was kept; please report it"
        )
