"""THE MAIN PATH of `llp train`: one configuration, trained fully, with one seed or several.

A training is a study with a single configuration and no search: the same folder, ledger, MLflow
runs, checkpoints and pages, so that `llp status`, `export`, `sync` and `landscape` read it as well.
It runs in this process; what runs is the verification job of a search, so the numbers are the same.

A killed training goes on from its last snapshot when it is started again, to the same bits; one
that is finished is only read. Validation data are all that is looked at on the way; the test split
is read once, after the last epoch of each seed, or not at all.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llp.driver import ListedSource, OnEvent, Study, full_training_seeds
from llp.errors import LlpError, NoTrialSucceeded, StudyError
from llp.protocols import Report
from llp.records import CurvePoint, HyperparameterValue, Job, JobEnd, Trial, to_plain
from llp.reporting.runs import Entry, FullTraining, full_trainings, with_predictions
from llp.reporting.talt_sections import talt_sections
from llp.reporting.training_run import write_run
from llp.spec import Spec, digest, load_spec, study_name
from llp.spec.single import load_training, to_training_yaml
from llp.surroundings import describe_environment, interruptible
from llp.tracking.choice import find_trial
from llp.tracking.files import write_atomic
from llp.tracking.ledger import (
    Ledger,
    check_same_spec,
    has_study,
    load_study,
    read_events,
    study_header,
)
from llp.tracking.shipper import start_shipper, wait_shipper
from llp.training.check import check_batch
from llp.training.devices import choose_device
from llp.training.full import configuration, full_job, full_rung, run_here, settled
from llp.training.jobs import best_path, best_point
from llp.training.objective import CHECKPOINT_SECONDS, TrainingObjective
from llp.workloads import ImageData
from llp.workloads import load as load_data

log = logging.getLogger(__name__)

KIND = "training"
"""`kind` in the header of such a study."""
TRIAL = "t000"
RESULTS = "training.json"
EXPERIMENT = "llp/trainings"
"""MLflow's experiment, where the file names none: trainings are there to be compared."""
MLFLOW_SECONDS = 60.0
PATH_FILES, PATH_BYTES = 24, 256_000_000
PATH_RESOLUTION, PATH_SHARE, PATH_LEAST = 13, 0.05, 3
RETRIES = 1
"""Of a seed that failed; from its last snapshot, in smaller parts when memory ran out."""


@dataclass(frozen=True)
class SeedResult:
    """One full training.

    Attributes:
        job_id: Its job, which also names its files.
        seed: Of initialisation, data order and augmentation.
        outcome: See `records.Outcome`; `interrupted` when it has not ended.
        failure: Why it has no result, empty when it has one.
        epoch: Whose weights are judged: the last, or the best with `best_weights: use`.
        validation_accuracy: There, in [0, 1]; NaN when nothing was reported.
        validation_loss: There, mean cross-entropy.
        best_epoch: Of the best validation accuracy.
        best_validation_accuracy: There. Chosen among epochs, so a little too good.
        test_accuracy: Of the judged weights, in [0, 1]; NaN when the test split was not read.
        test_loss: Mean cross-entropy, likewise.
        num_test_examples: 0 when it was not read.
        samples_seen: Training examples processed.
        seconds: Wall-clock.
        peak_memory_bytes: Of the process, or of the GPU.
        device: `cpu`, or the GPU's name.
        checkpoint: Weights that are judged, relative to the folder; empty when there are none.
        best_checkpoint: Weights of the best epoch, where they are kept.
        curve: One point an evaluation.
    """

    job_id: str
    seed: int
    outcome: str
    failure: str = ""
    epoch: int = 0
    validation_accuracy: float = math.nan
    validation_loss: float = math.nan
    best_epoch: int = 0
    best_validation_accuracy: float = math.nan
    test_accuracy: float = math.nan
    test_loss: float = math.nan
    num_test_examples: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    device: str = ""
    checkpoint: str = ""
    best_checkpoint: str = ""
    curve: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True)
class TrainingResult:
    """A training with all its seeds; plain data through `records.to_plain`.

    Attributes:
        study_id: Name of its folder.
        folder: Where it is.
        status: `running`, `interrupted`, `finished` or `failed`.
        spec: The experiment.
        hyperparameters: The configuration, flat.
        seeds: One entry a seed that was begun, in order.
    """

    study_id: str
    folder: str
    status: str
    spec: Mapping[str, Any]
    hyperparameters: Mapping[str, HyperparameterValue]
    seeds: tuple[SeedResult, ...]

    def mean(self, name: str = "test_accuracy") -> tuple[float, float]:
        """Mean of a field over the seeds that have it, and its standard error (NaN for one)."""
        values = [getattr(seed, name) for seed in self.seeds]
        values = [value for value in values if math.isfinite(value)]
        if not values:
            return math.nan, math.nan
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return fmean(values), error


def train(
    source: str | Path | Mapping[str, Any] | Spec | None = None,
    overrides: Sequence[str] = (),
    *,
    study_id: str | None = None,
    test: bool = True,
    device: str | None = None,
    threads: int | None = None,
    snapshot_seconds: float = CHECKPOINT_SECONDS,
    data: ImageData | None = None,
    on_event: OnEvent | None = None,
    command: str = "",
    ship: bool = True,
    tried_first: bool = True,
    pictures: bool = True,
) -> TrainingResult:
    """Trains one configuration fully, or goes on with, or reads, the training of that name.

    Args:
        source: See `spec.single.load_training`; a `Spec` made by it is taken as it is.
        overrides: Likewise; not with a `Spec`.
        study_id: Name of the folder under `output.root`; default: name and digest.
        test: Whether the test split is read at the end.
        device: `cpu`, `cuda`, `cuda:1`; default: a GPU where there is one.
        threads: CPU threads of torch; default: as they are.
        snapshot_seconds: Between two snapshots, from which a killed training goes on.
        data: The dataset of the experiment, where the caller has loaded it already.
        on_event: Called with every ledger event, those of an earlier start first.
        command: What the user typed, for the record.
        ship: Whether MLflow is told (if `tracking.mlflow` says so too); `tracking.shipper.ship`
            can do that later.
        tried_first: Whether one batch goes through the model before anything is written.
        pictures: Whether what the optimizer did is kept and drawn, where it tells (TALT).

    Raises:
        SpecError: The configuration is wrong, or does not fit the data.
        DataError: The dataset cannot be read.
        StudyError: The folder holds something else, or another process is at it.
        EnvironmentProblem: No GPU, or the disk is full.
        NoTrialSucceeded: Every seed diverged or failed.
        KeyboardInterrupt: On Ctrl-C and SIGTERM; the same call goes on from the last snapshot.
    """
    spec = source if isinstance(source, Spec) else load_training(source, overrides)
    if spec.tracking.experiment is None:
        tracking = spec.tracking.model_copy(update={"experiment": EXPERIMENT})
        spec = spec.model_copy(update={"tracking": tracking})
    chosen = choose_device(device or "auto")
    folder = Path(spec.output.root) / study_name(spec, study_id)
    if has_study(folder):
        _check_same(folder, spec, test=test)
        status = load_study(folder).status
        if status == "failed":
            raise NoTrialSucceeded(
                f"the training {folder.name} failed before: {load_study(folder).winner_reason}; "
                "give another one another name with --study"
            )
        if status == "finished":
            return read_training(folder)
        ledger = Ledger.open(folder)
        begun = Spec.model_validate(study_header(folder)["spec"])
        spec = _watched_by(spec, begun.training.callbacks)
    else:
        ledger = None
    environment = describe_environment(command)
    try:
        data = data or load_data(spec.dataset, spec.seed)
        if ledger is None:
            size = int(check_batch(spec, data, chosen)["parameters"]) if tried_first else 0
            if pictures:
                spec = _watched_by(spec, _watchers(spec, size))
            ledger = _begin(spec, data, folder, environment, test=test)
        else:
            _check_data(folder, data)
        objective = TrainingObjective(
            spec,
            data,
            folder.resolve(),
            chosen,
            threads=threads,
            checkpoint_seconds=snapshot_seconds,
            read_test=test and data.test is not None,
        )
        with interruptible():
            _drive(spec, objective, ledger, folder, environment, on_event, ship=ship, draw=pictures)
    finally:
        if ledger is not None:
            ledger.close()
    return read_training(folder)


def from_trial(study: Path, wanted: str = "best", overrides: Sequence[str] = ()) -> Spec:
    """The experiment that trains a trial of a study fully, as its verification would.

    Args:
        study: The study folder.
        wanted: A trial id, `best` or `winner`.
        overrides: See `spec.single.load_training`.

    Raises:
        StudyError: No such trial, or the study was made from Python functions.
        SpecError: An override is wrong.
    """
    header = study_header(study)
    if header.get("kind") == "python":
        raise StudyError(
            f"the study {header['study_id']} was made from Python functions, which are not in its "
            "folder; call `train` of TwoTierProbing"
        )
    result = load_study(study)
    trial_id = find_trial(result, wanted)
    trial = next(t.trial for t in result.trials if t.trial.trial_id == trial_id)
    experiment = Spec.model_validate(header["spec"])
    plain: dict[str, Any] = settled(experiment, trial.hyperparameters)
    plain["name"] = f"{experiment.name[:50]}-{trial_id}"
    plain["training"]["epochs"] = experiment.verification.epochs or experiment.training.epochs
    plain["output"] = {"root": str(study.parent)}
    plain["tracking"] = experiment.tracking.model_dump(mode="json", exclude_none=True)
    return load_training(plain, overrides)


def resume(folder: Path, **options: Any) -> TrainingResult:
    """Goes on with the training in `folder`; `options` are those of `train`.

    Raises:
        StudyError: It is no training, or see `train`.
    """
    header = study_header(folder)
    if header.get("kind") != KIND:
        raise StudyError(f"the study {folder.name} is a search; go on with it by `llp resume`")
    spec = load_spec(header["spec"])
    output = spec.output.model_copy(update={"root": str(folder.parent)})
    spec = spec.model_copy(update={"output": output})
    return train(spec, study_id=folder.name, test=bool(header["read_test"]), **options)


def read_training(folder: Path) -> TrainingResult:
    """The training in `folder` as its ledger tells it; works while it runs.

    Raises:
        StudyError: There is none.
    """
    header, result = study_header(folder), load_study(folder)
    if header.get("kind") != KIND:
        raise StudyError(f"the study {folder.name} is a search, not a training")
    found = full_trainings(read_events(folder))
    hyperparameters = result.trials[0].trial.hyperparameters if result.trials else {}
    return TrainingResult(
        study_id=result.study_id,
        folder=str(folder),
        status=result.status,
        spec=result.spec,
        hyperparameters=hyperparameters,
        seeds=tuple(_seed_result(each, folder, result.spec) for each in found),
    )


def _seed_result(found: FullTraining, folder: Path, spec: Mapping[str, Any]) -> SeedResult:
    end, tested = found.end, found.verification
    values: dict[str, Any] = {}
    if found.points:
        best = best_point(found.points)
        used = spec.get("training", {}).get("best_weights") == "use"
        judged = best if used else found.points[-1]
        values |= {
            "epoch": judged.epoch,
            "validation_accuracy": judged.validation_accuracy,
            "validation_loss": judged.validation_loss,
            "best_epoch": best.epoch,
            "best_validation_accuracy": best.validation_accuracy,
            "samples_seen": found.points[-1].samples_seen,
            "seconds": found.points[-1].seconds,
        }
    if tested:
        values |= {
            "test_accuracy": tested.test_accuracy,
            "test_loss": tested.test_loss,
            "num_test_examples": tested.num_test_examples,
        }
    if end:
        values |= {
            "failure": end.failure,
            "samples_seen": end.samples_seen,
            "seconds": end.seconds,
            "peak_memory_bytes": end.peak_memory_bytes,
            "device": end.device,
            "checkpoint": end.checkpoint.path if end.checkpoint else "",
        }
    kept = best_path(found.job_id)
    return SeedResult(
        job_id=found.job_id,
        seed=found.seed,
        outcome=end.outcome if end else "interrupted",
        best_checkpoint=kept if (folder / kept).is_file() else "",
        curve=found.points,
        **values,
    )


def _begin(
    spec: Spec, data: ImageData, folder: Path, environment: Mapping[str, Any], *, test: bool
) -> Ledger:
    rung = full_rung(spec, len(data.train))
    ledger = Ledger.create(
        folder,
        study_id=folder.name,
        spec=spec.model_dump(mode="json"),
        spec_digest=digest(spec),
        environment=environment,
        llp_version=environment["llp"],
        rungs=[rung],
        num_train=rung.num_examples,
        num_validation=len(data.validation),
        num_test=len(data.test) if data.test is not None else 0,
        num_classes=data.num_classes,
        num_trials=1,
        jobs_per_rung={},
        dataset={"name": data.name, "digest": data.digest, "source": data.source},
        kind=KIND,
        read_test=test,
    )
    write_atomic(folder / "spec.yaml", to_training_yaml(spec))
    return ledger


def _drive(
    spec: Spec,
    objective: TrainingObjective,
    ledger: Ledger,
    folder: Path,
    environment: Mapping[str, Any],
    on_event: OnEvent | None,
    *,
    ship: bool,
    draw: bool,
) -> None:
    """Every seed that is not done yet, then results and pages."""
    study = Study(ledger, on_event)
    study.record("opened", host=environment["host"], pid=os.getpid(), environment=environment)
    shipper = start_shipper(folder) if spec.tracking.mlflow and ship else None
    try:
        _run(spec, objective, study)
        if draw and any(row["name"] == "optimizer_log" for row in spec.training.callbacks):
            _look_at_path(folder, objective.device or "auto")
        _finish(study, folder)
    finally:
        ledger.close()
        if shipper is not None and sys.exc_info()[0] is not KeyboardInterrupt:
            wait_shipper(shipper, MLFLOW_SECONDS)


def _run(spec: Spec, objective: TrainingObjective, study: Study) -> None:
    started = time.monotonic()
    study.record("phase", name="verify", status="start", seconds=0.0)
    if TRIAL not in study.state.trials:
        study.record("trial", trial=Trial(TRIAL, configuration(spec), spec.seed))
    trial = study.state.trials[TRIAL]
    seeds = full_training_seeds(spec.seed, spec.verification.num_seeds)
    num_train = int(study.header["num_train"])
    source = ListedSource(
        study,
        [
            full_job(spec, trial, number, seed=seed, num_train=num_train)
            for number, seed in enumerate(seeds)
        ],
        max_failures=RETRIES,
    )
    while isinstance(job := source.next_job(), Job):
        source.on_end(job, run_here(objective, job, partial(_report, source, job)))
    seconds = time.monotonic() - started
    study.record("phase", name="verify", status="end", seconds=seconds)


def _watched_by(spec: Spec, rows: Sequence[Mapping[str, Any]]) -> Spec:
    training = spec.training.model_copy(update={"callbacks": [dict(row) for row in rows]})
    return spec.model_copy(update={"training": training})


def _watchers(spec: Spec, num_parameters: int) -> list[Mapping[str, Any]]:
    """The callbacks of `spec`, and those that the pictures of its optimizer need.

    The path needs kept weights: up to `PATH_FILES` of them, in `PATH_BYTES` at most.
    """
    rows: list[Mapping[str, Any]] = list(spec.training.callbacks)
    names = {row["name"] for row in rows}
    if spec.training.optimizer != "talt":
        return rows
    if "optimizer_log" not in names:
        rows.append({"name": "optimizer_log"})
    files = min(PATH_FILES, PATH_BYTES // (4 * num_parameters)) if num_parameters else 0
    if "checkpoints" not in names and files >= 4:
        every = math.ceil(spec.training.epochs / files)
        rows.append({"name": "checkpoints", "every": every, "jobs": "verify"})
    return rows


def _look_at_path(folder: Path, device: str) -> None:
    """The loss on the main plane of the first seed; a training is not lost for want of it."""
    if len(list((folder / "checkpoints").glob(f"{TRIAL}-v0-e*.pt"))) < PATH_LEAST:
        return
    from llp.analysis import analyse
    from llp.spec.landscape import load_landscape

    seen = next((each.samples_seen for each in read_training(folder).seeds), 0)
    # A forward pass is a third of a gradient: the picture takes a twentieth of the training.
    examples = max(64, min(512, round(PATH_SHARE * 3 * seen / PATH_RESOLUTION**2)))
    settings = {
        "source": {"study": folder.name, "root": str(folder.parent), "job": f"{TRIAL}-v0"},
        "analyses": ["trajectory", "surfaces"],
        "surfaces": {"directions": ["trajectory"], "resolution": PATH_RESOLUTION},
        "data": {"num_examples": examples},
        "device": device,
        "output": {"pictures": [], "page": False},
    }
    try:
        analyse(load_landscape(settings))
    except LlpError as error:
        log.warning("no picture of the path of %s: %s", folder.name, error)


def _report(source: ListedSource, job: Job, report: Report) -> None:
    source.on_report(job, report)


def _finish(study: Study, folder: Path) -> None:
    """Says how it ended and writes results and pages."""
    found = full_trainings(study.history)
    done = [each for each in found if each.end and each.end.outcome == "completed"]
    if not done:
        reason = _why(found)
        study.record("failed", reason=reason)
        write_results(folder)
        raise NoTrialSucceeded(reason)
    lost = len(found) - len(done)
    reason = "the only configuration: nothing was chosen" + (
        f"; {lost} of {len(found)} seeds have no result" if lost else ""
    )
    study.record("finished", winner=TRIAL, winner_reason=reason, report="report.html")
    write_results(folder)


def write_results(folder: Path) -> None:
    """Writes `training.json`, everything `read_training` tells, and the pages of a training.

    Raises:
        StudyError: There is no training in the folder.
        EnvironmentProblem: The folder cannot be written.
    """
    content = json.dumps(to_plain(read_training(folder)), indent=1, allow_nan=False)
    write_atomic(folder / RESULTS, content + "\n")
    result, events = load_study(folder), tuple(read_events(folder))
    if not result.spec.get("output", {}).get("report", True):
        return
    entry = Entry(
        name=result.study_id,
        status=result.status,
        note="",
        definition=result.spec,
        result=result,
        events=events,
        trainings=tuple(with_predictions(each, folder) for each in full_trainings(events)),
    )
    extra = talt_sections(folder, entry.trainings[0]) if entry.trainings else ()
    write_run(entry, folder, extra=extra, results=RESULTS)


def _why(found: Sequence[FullTraining]) -> str:
    ends: list[JobEnd] = [each.end for each in found if each.end]
    outcomes = ", ".join(sorted({end.outcome.replace("_", " ") for end in ends})) or "no end"
    lines = next((end.failure.strip().splitlines() for end in ends if end.failure.strip()), [])
    return f"no seed has a result ({outcomes})" + (f": {lines[-1]}" if lines else "")


def _check_same(folder: Path, spec: Spec, *, test: bool) -> None:
    header = study_header(folder)
    if header.get("kind") != KIND:
        raise StudyError(f"{folder} holds a search; give the training another name with --study")
    check_same_spec(folder, digest(spec))
    if bool(header["read_test"]) != test:
        was = "with" if header["read_test"] else "without"
        raise StudyError(
            f"the training {folder.name} was begun {was} reading the test split; say the same "
            "again, or give this one another name with --study"
        )


def _check_data(folder: Path, data: ImageData) -> None:
    began_with = study_header(folder)["dataset"]["digest"]
    if data.digest != began_with:
        raise StudyError(
            f"the images of {data.name} are not those this training began with "
            f"({data.source}; digest {data.digest[:12]}, was {began_with[:12]}); "
            "set dataset.root to the same files"
        )
