"""Train and analyse in one go: one full training with checkpoints along the way, or two.

The training is that of a verification, by the training room: snapshots while it runs, so that a
killed one goes on; weights and optimizer after every few epochs through the `checkpoints` callback,
which changes no bit of it. What it reported is kept beside the weights, and a training of the same
identity is not run again. The weights before the first step are kept as epoch 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llp.analyses.subject import Weights
from llp.errors import CheckpointError, NoTrialSucceeded
from llp.protocols import Report
from llp.records import (
    CheckpointRef,
    CurvePoint,
    HyperparameterValue,
    Job,
    Observation,
    Rung,
    Trial,
    Verification,
    from_plain,
    to_plain,
)
from llp.spec.digest import digest
from llp.spec.landscape import LandscapeSpec
from llp.spec.schema import Spec
from llp.training import checkpoint, rng
from llp.training.callbacks import path_of
from llp.training.full import run_here
from llp.training.jobs import discard_partial
from llp.training.objective import TrainingObjective
from llp.workloads import ImageData

OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class OwnTraining:
    """A training that was run for its landscape.

    Attributes:
        weights: Those at its end.
        path: Those before, from epoch 0 on.
        optimizer: File with the optimizer's state at its end.
        points: One an epoch.
        observations: Of its callbacks.
        test_accuracy: On the test split, None where there is none.
    """

    weights: Weights
    path: tuple[Weights, ...]
    optimizer: Path
    points: tuple[CurvePoint, ...]
    observations: tuple[Observation, ...]
    test_accuracy: float | None


def name_of(spec: LandscapeSpec) -> str:
    """A folder name for the results of a checkpoint or a training, the same for the same source."""
    assert spec.training is not None
    plain = spec.source.model_dump(mode="json", exclude={"save_every", "num_runs", "other"})
    text = json.dumps([digest(spec.training), plain], sort_keys=True)
    short = hashlib.sha256(text.encode()).hexdigest()[:8]
    if spec.source.checkpoint is not None:
        name = Path(spec.source.checkpoint).stem
    else:
        name = f"{spec.training.dataset.name}-{spec.training.model.name}"
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{short}"


def train(
    experiment: Spec,
    data: ImageData,
    hyperparameters: Mapping[str, HyperparameterValue],
    *,
    folder: Path,
    device: torch.device,
    number: int,
    save_every: int,
    on_event: OnEvent,
) -> OwnTraining:
    """Training number `number` (each has a seed of its own), run now unless it is there already.

    Raises:
        SpecError: The recipe does not fit together.
        NoTrialSucceeded: It diverged or failed.
        EnvironmentProblem: The disk is full.
    """
    callbacks = [row for row in experiment.training.callbacks if row["name"] != "checkpoints"]
    callbacks.append({"name": "checkpoints", "every": save_every, "optimizer": True})
    training = experiment.training.model_copy(update={"callbacks": callbacks})
    experiment = experiment.model_copy(update={"training": training})
    seed = experiment.seed + number
    epochs = experiment.training.epochs
    job = Job(
        job_id=f"run-{number}",
        kind="verify",
        trial=Trial("run", dict(hyperparameters), seed),
        rung=Rung(1, 1.0, len(data.train), epochs),
        seed=seed,
    )
    objective = TrainingObjective(experiment, data, folder, device)
    identity = _identity(experiment, data, job, save_every)
    done = _done(folder, job, identity)
    if done is not None:
        on_event({"event": "training", "run": number, "status": "kept"})
        return done
    _keep_start(objective, job, device, folder, identity)
    told: list[Any] = []
    on_event({"event": "training", "run": number, "status": "start", "epochs": epochs})

    def tell(report: Report) -> None:
        told.append(report)
        if isinstance(report, CurvePoint):
            on_event({"event": "training", "run": number, "status": "epoch", "point": report})

    end = run_here(objective, job, tell)
    if end.checkpoint is None:
        lines = end.failure.strip().splitlines()
        raise NoTrialSucceeded(
            f"the training has {end.outcome.replace('_', ' ')}: {lines[-1] if lines else ''}"
        )
    content = {
        "identity": identity,
        "checkpoint": end.checkpoint,
        "points": [report for report in told if isinstance(report, CurvePoint)],
        "observations": [report for report in told if isinstance(report, Observation)],
        "verification": next((r for r in told if isinstance(r, Verification)), None),
    }
    text = json.dumps(to_plain(content), allow_nan=False, indent=1)
    checkpoint.write_durably(folder / f"{job.job_id}.json", text.encode())
    on_event({"event": "training", "run": number, "status": "end", "seconds": end.seconds})
    found = _done(folder, job, identity)
    assert found is not None
    return found


def kept(folder: Path, job_id: str) -> tuple[Weights, ...]:
    """The weights that the `checkpoints` callback kept of a job, in order."""
    found = []
    for path in sorted((folder / "checkpoints").glob(f"{job_id}-e*.pt")):
        match = re.fullmatch(rf"{re.escape(job_id)}-e(\d+)\.pt", path.name)
        if match:
            epoch = int(match[1])
            found.append(Weights(f"epoch {epoch}", path, epoch))
    return tuple(sorted(found, key=lambda weights: weights.epoch))


def _identity(experiment: Spec, data: ImageData, job: Job, save_every: int) -> str:
    text = json.dumps([digest(experiment), data.digest, to_plain(job), save_every], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _done(folder: Path, job: Job, identity: str) -> OwnTraining | None:
    """What an earlier call of the same identity has left, if its weights are whole."""
    try:
        content = json.loads((folder / f"{job.job_id}.json").read_bytes())
        if content["identity"] != identity:
            return None
        reference = from_plain(CheckpointRef, content["checkpoint"])
        checkpoint.load_ref(reference, root=folder)
    except (OSError, ValueError, KeyError, CheckpointError):
        return None
    points = tuple(from_plain(CurvePoint, point) for point in content["points"])
    last = points[-1].epoch
    path = tuple(w for w in kept(folder, job.job_id) if w.epoch < last)
    verification = content["verification"]
    return OwnTraining(
        weights=Weights(f"epoch {last}", folder / reference.path, last),
        path=path,
        optimizer=folder / path_of(job.job_id, last),
        points=points,
        observations=tuple(from_plain(Observation, each) for each in content["observations"]),
        test_accuracy=verification["test_accuracy"] if verification else None,
    )


def _keep_start(
    objective: TrainingObjective, job: Job, device: torch.device, folder: Path, identity: str
) -> None:
    """Writes the weights before the first step, and removes what another training has left."""
    begun = folder / f"{job.job_id}.begun"
    if begun.exists() and begun.read_text() == identity:
        return  # it was interrupted and goes on
    discard_partial(folder, job.job_id)
    for stale in kept(folder, job.job_id):
        stale.path.unlink()
    randomness = rng.JobRandomness(device)
    randomness.enter()
    try:
        rng.seed_all(job.seed, device)
        model = objective.prepare(job, device).model
    finally:
        randomness.leave()
    state = {"format": 1, "job_id": job.job_id, "model": checkpoint.to_cpu(model.state_dict())}
    checkpoint.save(path_of(job.job_id, 0), {**state, "epoch": 0}, root=folder)
    checkpoint.write_durably(begun, identity.encode())
