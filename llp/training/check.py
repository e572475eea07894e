"""Before any worker starts: the images against the file, and one batch through the model."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from llp.errors import SpecError
from llp.records import HyperparameterValue, Rung
from llp.spec.domains import RandomSearch
from llp.spec.schema import Spec
from llp.training import loop
from llp.training.recipe import Recipe
from llp.workloads.batches import Batches
from llp.workloads.images import ImageData

WARM_STEPS = 5
WARM_SECONDS = 0.5


def check_data(spec: Spec, data: ImageData, rungs: Sequence[Rung]) -> None:
    """Refuses what the images, or the ladder made of their number, do not allow.

    Raises:
        SpecError: Too few validation images, corruptions of images that are not uint8, or two rungs
            that are the same.
    """
    problems = []
    if len(data.validation) < data.num_classes:
        text = (
            f"{spec.dataset.validation_fraction:g} leaves {len(data.validation)} validation images "
            f"for {data.num_classes} classes, too few to choose by; use a larger fraction"
        )
        problems.append(spec.problem("dataset.validation_fraction", text))
    if spec.verification.corrupted and not _is_uint8(data):
        text = "corruptions need uint8 images of 1 or 3 channels, and this dataset has others"
        problems.append(spec.problem("verification.corrupted", text))
    for below, above in itertools.pairwise(rungs):
        if (below.num_examples, below.epochs) == (above.num_examples, above.epochs):
            text = (
                f"rungs {below.rung} and {above.rung} are the same {below.num_examples:,} images "
                f"and {below.epochs} epochs; drop one or move them apart"
            )
            problems.append(spec.problem(f"tier1.data_fractions.{above.rung - 1}", text))
    if problems:
        raise SpecError(problems)


def _is_uint8(data: ImageData) -> bool:
    """Whether the images are what `workloads.corruptions` works on; those in files are."""
    kind = getattr(data.train.images, "dtype", np.uint8)
    return bool(kind == np.uint8) and data.channels in (1, 3)


def check_batch(spec: Spec, data: ImageData, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Trains some steps and evaluates a batch, with the file's recipe and with one configuration.

    Args:
        spec: The experiment.
        data: Its images; neither more than one batch nor the test split is read.
        device: Where to try it.

    Returns:
        `parameters` (count), `batch_size` (images), `output_shape`, `loss` (before the first step),
        `seconds` (of a warm step), `evaluation_seconds` (of evaluating the batch) and `device` for
        the file's recipe, and the same under `sampled` for the first random configuration, with its
        `hyperparameters`.

    Raises:
        SpecError: The recipe does not fit together, the model cannot be built, fails on a batch or
            does not give one logit per class, or nothing in it can be trained.
    """
    device = torch.device(device)
    state = torch.get_rng_state()
    try:
        report = _one_step(spec, data, device, {})
        hyperparameters = RandomSearch(spec.search_space, spec.constraints, spec.seed).suggest(0)
        sampled = _one_step(spec, data, device, hyperparameters)
    finally:
        torch.set_rng_state(state)
    return {**report, "sampled": {"hyperparameters": hyperparameters, **sampled}}


def _one_step(
    spec: Spec,
    data: ImageData,
    device: torch.device,
    hyperparameters: Mapping[str, HyperparameterValue],
) -> dict[str, Any]:
    recipe = Recipe.of(spec, hyperparameters)
    torch.default_generator.manual_seed(spec.seed)
    try:
        model = recipe.build_model(
            channels=data.channels, image_size=data.image_size, num_classes=data.num_classes
        ).to(device)
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(
            f"model '{recipe.model}' with {dict(recipe.model_options)} cannot be built for "
            f"{data.channels}x{data.image_size}x{data.image_size} images and "
            f"{data.num_classes} classes: {type(error).__name__}: {error}"
        ) from error
    count = min(recipe.batch_size, len(data.train))
    batches = Batches(
        data.train,
        range(count),
        batch_size=count,
        mean=data.mean,
        std=data.std,
        augmentation=recipe.augmentations(),
        device=device,
    )
    images, labels = next(iter(batches.epoch(0)))
    shape = _output_shape(recipe, model, images, data)
    try:
        optimizer = recipe.build_optimizer(model)
    except SpecError:
        raise
    except Exception as error:
        raise _failed("building its optimizer", recipe, error) from error
    steps = loop.Steps(
        model=model,
        optimizer=optimizer,
        criterion=functional.cross_entropy,
        schedule=lambda step: 1.0,
        device=device,
        precision=recipe.precision,
        gradient_clip=recipe.gradient_clip,
    )
    try:
        progress = loop.train_epoch(steps, [(images, labels)], first_step=0)
        seconds = _warm_seconds(steps, images, labels)
    except loop.Diverged as error:
        raise SpecError(f"model '{recipe.model}' on its first batch: {error}") from error
    except Exception as error:
        raise _failed("a training step", recipe, error) from error
    started = time.perf_counter()
    try:
        loop.evaluate(model, batches, device, precision=recipe.precision)
    except Exception as error:
        raise _failed("an evaluation", recipe, error) from error
    evaluation_seconds = time.perf_counter() - started
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch_size": count,
        "output_shape": list(shape),
        "loss": progress.mean_loss,
        "seconds": seconds,
        "evaluation_seconds": evaluation_seconds,
        "device": str(device),
    }


def _warm_seconds(steps: loop.Steps, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Median of up to `WARM_STEPS` more steps, fewer when they are slow.

    The first step, which allocates and chooses kernels, can take a hundred times as long.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) < WARM_STEPS and sum(seconds) < WARM_SECONDS):
        started = time.perf_counter()
        # A rate under which the loss explodes in the second step is for the search to find out.
        with contextlib.suppress(loop.Diverged):
            loop.train_epoch(steps, [(images, labels)], first_step=0)  # waits for the device
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _output_shape(
    recipe: Recipe, model: nn.Module, images: torch.Tensor, data: ImageData
) -> torch.Size:
    model.eval()
    try:
        with torch.no_grad(), loop.autocast(images.device, recipe.precision):
            output = model(images)
    except Exception as error:
        raise _failed(f"a batch of {list(images.shape)} images", recipe, error) from error
    wanted = (len(images), data.num_classes)
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != wanted:
        raise SpecError(
            f"model '{recipe.model}' must give logits of shape {list(wanted)} (images, classes) "
            f"for images of shape {list(images.shape)}, and gives "
            f"{list(found) if isinstance(found, tuple) else found}"
        )
    return torch.Size(wanted)


def _failed(what: str, recipe: Recipe, error: Exception) -> SpecError:
    return SpecError(f"model '{recipe.model}' fails on {what}: {type(error).__name__}: {error}")
