"""A full training: all training images, all epochs, several seeds; what every caller shares.

A search verifies its best configurations with full trainings, `llp train` runs one by itself, and
`llp landscape --train` looks at its landscape. The job and the way it is run are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llp.protocols import Objective, Report
from llp.records import HyperparameterValue, Job, JobEnd, Rung, Trial
from llp.spec.schema import Spec
from llp.training.recipe import NO_AUGMENTATION, Recipe


def full_rung(spec: Spec, num_train: int) -> Rung:
    """The budget of a full training: one above the highest rung of a search."""
    return Rung(
        rung=len(spec.tier1.data_fractions) + 1,
        data_fraction=1.0,
        num_examples=num_train,
        epochs=spec.verification.epochs or spec.training.epochs,
    )


def full_job(spec: Spec, trial: Trial, number: int, *, seed: int, num_train: int) -> Job:
    """Full training number `number` of a configuration, from 0.

    Args:
        spec: The experiment.
        trial: The configuration.
        number: Of the training.
        seed: Of initialisation, data order and augmentation.
        num_train: Training images.
    """
    return Job(
        job_id=f"{trial.trial_id}-v{number}",
        kind="verify",
        trial=trial,
        rung=full_rung(spec, num_train),
        seed=seed,
    )


def run_here(objective: Objective, job: Job, on_report: Callable[[Report], None]) -> JobEnd:
    """Runs `job` in this process, telling every report, and returns how it ended."""
    work = iter(objective(job))
    while True:
        try:
            report = next(work)
        except StopIteration as stop:
            end: JobEnd = stop.value
            return end
        on_report(report)


def settled(spec: Spec, hyperparameters: Mapping[str, HyperparameterValue]) -> dict[str, Any]:
    """The sections of an experiment in which `hyperparameters` are written out.

    Returns:
        `dataset`, `model` and `training` as plain data, and `seed`: what a training reads.

    Raises:
        SpecError: The recipe does not fit together.
    """
    recipe = Recipe.of(spec, hyperparameters)
    training = spec.training.model_dump(mode="json")
    for name in training:
        if hasattr(recipe, name):
            value = getattr(recipe, name)
            training[name] = dict(value) if isinstance(value, Mapping) else value
    training["augmentation"] = list(recipe.augmentation)
    return {
        "seed": spec.seed,
        "dataset": spec.dataset.model_dump(mode="json", exclude_none=True),
        "model": {"name": recipe.model, "options": dict(recipe.model_options)},
        "training": training,
    }


def configuration(spec: Spec) -> dict[str, HyperparameterValue]:
    """The recipe of an experiment as one flat configuration, for tables and MLflow.

    `Recipe.of(spec, configuration(spec))` is the recipe of the file itself.

    Raises:
        SpecError: The recipe does not fit together.
    """
    recipe = Recipe.of(spec, {})
    found: dict[str, HyperparameterValue] = {
        "model": recipe.model,
        "optimizer": recipe.optimizer,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "batch_size": recipe.batch_size,
        "schedule": recipe.schedule,
    }
    if recipe.schedule != "one_cycle":
        found["warmup_fraction"] = recipe.warmup_fraction
    if recipe.augmentation:
        found["augmentation"] = "+".join(recipe.augmentation)
    else:
        found["augmentation"] = NO_AUGMENTATION
    if recipe.label_smoothing:
        found["label_smoothing"] = recipe.label_smoothing
    if recipe.gradient_clip is not None:
        found["gradient_clip"] = recipe.gradient_clip
    found["averaging"] = recipe.averaging
    options = [recipe.optimizer_options, recipe.averaging_options, recipe.model_options]
    names = [name for each in options for name in each]
    for each in options:  # a name that two of them know stays in the file
        found |= {name: value for name, value in each.items() if names.count(name) == 1}
    return found
