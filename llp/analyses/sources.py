"""Where a subject comes from: a trial of a study, a checkpoint, or a training that is run now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llp.analyses import checkpoints, own_training
from llp.analyses.subject import Batch, Epochs, Subject, Weights
from llp.errors import CheckpointError, StudyError
from llp.records import (
    CheckpointRef,
    CurvePoint,
    HyperparameterValue,
    JobEnd,
    Observation,
    from_plain,
)
from llp.spec.landscape import LandscapeSpec
from llp.spec.schema import Spec
from llp.tracking.choice import find_trial
from llp.tracking.ledger import find_study, load_study, read_events, study_header
from llp.training import rng
from llp.training.devices import choose_device
from llp.training.recipe import Recipe
from llp.workloads import ImageData
from llp.workloads import load as load_data
from llp.workloads.batches import Batches, fixed_batches
from llp.workloads.images import Indices
from llp.workloads.subsets import nested_order

OnEvent = Callable[[Mapping[str, Any]], None]
MIN_BATCHES = 8
"""Standard errors are over batches: there are at least so many."""


@dataclass
class Known:
    """What a source says, before the network and the data are put together.

    Attributes:
        title: What the subject is.
        spec: The experiment.
        data: Its images.
        hyperparameters: Of the training that made the weights.
        weights: The weights.
        path: Earlier weights of the same training.
        optimizer: File with the optimizer's state at its end.
        other: Weights of an independent training.
        facts: For the reader.
        curve: Points of the training.
        observations: Of its callbacks.
    """

    title: str
    spec: Spec
    data: ImageData
    hyperparameters: Mapping[str, HyperparameterValue]
    weights: Weights
    path: tuple[Weights, ...] = ()
    optimizer: Path | None = None
    other: Weights | None = None
    facts: dict[str, str] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    observations: tuple[Observation, ...] = ()


def open_subject(spec: LandscapeSpec, folder: Path, on_event: OnEvent) -> Subject:
    """The subject of `spec`; a training that it asks for is run, or taken up, in `folder`.

    Raises:
        SpecError: The experiment and the data do not fit together.
        DataError: The dataset cannot be read.
        StudyError: No such study or trial, or one without weights.
        CheckpointError: Weights that are missing, damaged or of another network.
        EnvironmentProblem: No GPU, or the disk is full.
    """
    device = choose_device(spec.device)
    if spec.source.study is not None:
        known = _of_study(spec)
    elif spec.source.checkpoint is not None:
        known = _of_checkpoint(spec)
    else:
        known = _of_training(spec, folder, device, on_event)
    return _subject(spec, known, device)


def results_folder(spec: LandscapeSpec) -> Path:
    """Where results go: what the user said, or a place that the source decides.

    Raises:
        StudyError: No such study or trial.
    """
    source = spec.source
    if spec.output.folder is not None:
        return Path(spec.output.folder)
    if source.study is not None:
        study = find_study(source.root, source.study)
        name = source.job or find_trial(load_study(study), source.trial)
        return study / "landscape" / name
    return Path("llp_landscapes") / own_training.name_of(spec)


def _of_study(spec: LandscapeSpec) -> Known:
    source = spec.source
    assert source.study is not None
    folder = find_study(source.root, source.study)
    header, result = study_header(folder), load_study(folder)
    if header.get("kind") == "python":
        raise StudyError(
            f"the study {header['study_id']} was made from Python functions, which are not in its "
            "folder; call `llp.landscape` from Python on your own model"
        )
    wanted = source.job.split("-")[0] if source.job else source.trial
    trial_id = find_trial(result, wanted)
    trial = next(t.trial for t in result.trials if t.trial.trial_id == trial_id)
    jobs = _finished(folder, trial_id)
    if source.job is not None and source.job not in jobs:
        raise StudyError(
            f"{result.study_id} has no finished job '{source.job}' with weights; {trial_id} has: "
            f"{', '.join(jobs) or 'none'}"
        )
    if not jobs:
        raise StudyError(f"{trial_id} of {result.study_id} has left no weights to look at")
    verified = [job_id for job_id in jobs if "-v" in job_id]
    chosen = source.job or (verified[0] if verified else list(jobs)[-1])
    others = [job_id for job_id in verified if job_id != chosen] if chosen in verified else []
    experiment = Spec.model_validate(header["spec"])
    data = load_data(experiment.dataset, experiment.seed)
    if data.digest != header["dataset"]["digest"]:
        raise StudyError(
            f"the images of {data.name} are not those the study began with ({data.source}); "
            "set dataset.root to the same files"
        )
    points, observations = _told(folder, chosen)
    kept = own_training.kept(folder, chosen)
    last = points[-1].epoch if points else -1
    return Known(
        title=f"{chosen} of {result.study_id}",
        spec=experiment,
        data=data,
        hyperparameters=trial.hyperparameters,
        weights=_weights_of(folder, chosen, jobs[chosen]),
        path=tuple(weights for weights in kept if weights.epoch < last),
        optimizer=next((weights.path for weights in kept if weights.epoch == last), None),
        other=_weights_of(folder, others[0], jobs[others[0]]) if others else None,
        facts={"study": result.study_id, "trial": trial_id, "job": chosen},
        curve=points,
        observations=observations,
    )


def _finished(folder: Path, trial_id: str) -> dict[str, CheckpointRef]:
    """Jobs of a trial that left weights, in the order in which they ended."""
    found: dict[str, CheckpointRef] = {}
    for event in read_events(folder):
        if event["event"] == "job_end" and event["end"]["trial_id"] == trial_id:
            end = from_plain(JobEnd, event["end"])
            if end.checkpoint is not None:
                found[end.job_id] = end.checkpoint
    return found


def _told(folder: Path, job_id: str) -> tuple[tuple[CurvePoint, ...], tuple[Observation, ...]]:
    """What a job reported; what was said again after a kill replaces the old."""
    points: dict[int, CurvePoint] = {}
    observations: dict[tuple[str, int], Observation] = {}
    for event in read_events(folder):
        if event["event"] == "point" and event["job_id"] == job_id:
            point = from_plain(CurvePoint, event["point"])
            points[point.epoch] = point
        elif event["event"] == "observation" and event["observation"]["job_id"] == job_id:
            seen = from_plain(Observation, event["observation"])
            observations[seen.callback, seen.epoch] = seen
    return tuple(points.values()), tuple(observations.values())


def _weights_of(folder: Path, job_id: str, reference: CheckpointRef) -> Weights:
    path = folder / reference.path
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} of {job_id} does not exist any more")
    return Weights(job_id, path)


def _of_checkpoint(spec: LandscapeSpec) -> Known:
    source, experiment = spec.source, spec.training
    assert source.checkpoint is not None
    assert experiment is not None
    path = Path(source.checkpoint)
    state = checkpoints.read(path)
    kept = state.get("hyperparameters")
    hyperparameters = {**(kept if isinstance(kept, Mapping) else {}), **source.hyperparameters}
    return Known(
        title=path.stem,
        spec=experiment,
        data=load_data(experiment.dataset, experiment.seed),
        hyperparameters=hyperparameters,
        weights=Weights(path.stem, path),
        path=tuple(Weights(Path(name).stem, Path(name)) for name in source.checkpoints),
        facts={"checkpoint": str(path)},
    )


def _of_training(
    spec: LandscapeSpec, folder: Path, device: torch.device, on_event: OnEvent
) -> Known:
    experiment = spec.training
    assert experiment is not None
    data = load_data(experiment.dataset, experiment.seed)
    runs = [
        own_training.train(
            experiment,
            data,
            spec.source.hyperparameters,
            folder=folder / "training",
            device=device,
            number=number,
            save_every=spec.source.save_every,
            on_event=on_event,
        )
        for number in range(spec.source.num_runs)
    ]
    first = runs[0]
    facts = {"epochs": str(first.points[-1].epoch if first.points else 0)}
    if first.test_accuracy is not None:
        facts["test accuracy"] = f"{100 * first.test_accuracy:.2f} %"
    return Known(
        title=f"{experiment.model.name} on {data.name}",
        spec=experiment,
        data=data,
        hyperparameters=spec.source.hyperparameters,
        weights=first.weights,
        path=first.path,
        optimizer=first.optimizer,
        other=runs[1].weights if len(runs) > 1 else None,
        facts=facts,
        curve=first.points,
        observations=first.observations,
    )


def _subject(spec: LandscapeSpec, known: Known, device: torch.device) -> Subject:
    data = known.data
    recipe = Recipe.of(known.spec, known.hyperparameters)
    model = _fresh(recipe, data, device, known.spec.seed)

    def read(weights: Weights) -> dict[str, Tensor]:
        state = checkpoints.read(weights.path)
        found = checkpoints.weights_in(state, weights.path)
        return checkpoints.fitted(model, found, weights.path, recipe.model)

    model.load_state_dict(read(known.weights))
    model.eval()
    split = data.train if spec.data.split == "train" else data.validation
    chosen = nested_order(split.labels, seed=known.spec.seed)[: spec.data.num_examples]
    batches = fixed_batches(
        split,
        chosen,
        max(1, min(spec.data.batch_size, len(chosen) // MIN_BATCHES)),
        mean=data.mean,
        std=data.std,
        device=device,
    )
    order = nested_order(data.train.labels, seed=known.spec.seed)
    other = known.other
    if spec.source.other is not None:
        other = Weights(Path(spec.source.other).stem, Path(spec.source.other))
    path = known.path
    if spec.source.checkpoints and spec.source.checkpoint is None:
        path = tuple(Weights(Path(name).stem, Path(name)) for name in spec.source.checkpoints)
    for weights in (*path, *([other] if other else [])):
        if not weights.path.is_file():
            raise CheckpointError(f"checkpoint {weights.path} does not exist")
    subject = Subject(
        title=known.title,
        model=model,
        batches=batches,
        device=device,
        fresh=partial(_fresh, recipe, data, device),
        read=read,
        training=partial(_training_batches, recipe, data, device, order),
        path=(*path, known.weights) if path else (),
        other=other,
        optimizer=partial(_optimizer, recipe, model, known.optimizer) if known.optimizer else None,
        curve=known.curve,
        observations=known.observations,
        identity={"loss": "cross_entropy", "data": data.digest, "split": spec.data.split},
    )
    subject.facts = {
        **known.facts,
        "dataset": data.name,
        "model": f"{recipe.model} {dict(recipe.model_options) or ''}".strip(),
        "parameters": f"{subject.num_parameters:,}",
        "measured on": f"{subject.num_examples:,} {spec.data.split} examples, not augmented",
        "device": device_name(device),
    }
    return subject


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _fresh(recipe: Recipe, data: ImageData, device: torch.device, seed: int) -> nn.Module:
    """A newly initialised network; the global generators are left as they were."""
    kept = rng.capture(torch.device("cpu"))
    try:
        rng.seed_all(seed, torch.device("cpu"))
        model = recipe.build_model(
            channels=data.channels, image_size=data.image_size, num_classes=data.num_classes
        )
    finally:
        rng.restore(kept, torch.device("cpu"))
    return model.float().to(device).eval()


def _training_batches(
    recipe: Recipe,
    data: ImageData,
    device: torch.device,
    order: Indices,
    count: int,
    batch_size: int,
    seed: int,
) -> Epochs:
    batches = Batches(
        data.train,
        order[:count],
        batch_size=batch_size,
        mean=data.mean,
        std=data.std,
        shuffle=True,
        seed=seed,
        augmentation=recipe.augmentations(),
        device=device,
    )

    def epoch(number: int) -> Iterator[Batch]:
        return batches.epoch(number)

    return Epochs(epoch)


def _optimizer(recipe: Recipe, model: nn.Module, path: Path) -> torch.optim.Optimizer:
    """The optimizer with the state that was kept beside weights.

    Raises:
        CheckpointError: None was kept there.
    """
    state = checkpoints.read(path).get("optimizer")
    if state is None:
        raise CheckpointError(f"checkpoint {path} holds no optimizer state")
    optimizer = recipe.build_optimizer(model)
    optimizer.load_state_dict(state)
    return optimizer
