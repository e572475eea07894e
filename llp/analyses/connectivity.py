"""The straight path and a trained curve between the network and an independent training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from llp import landscape
from llp.analyses.subject import Finding, Part, Subject, Work, derived_seed
from llp.landscape import matching
from llp.spec.landscape import LandscapeSpec


def connectivity(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """Both paths, on the measured examples."""
    missing = (
        "no independent training is known: a study needs two verified seeds, a training "
        "`source.num_runs: 2`, a checkpoint `--other FILE`"
    )
    yield Part(
        name="connectivity",
        analysis="connectivity",
        settings={
            **spec.connectivity.model_dump(),
            "seed": spec.seed,
            "other": _fingerprint(subject),
        },
        compute=_compute,
        impossible="" if subject.other else missing,
    )


def _fingerprint(subject: Subject) -> str:
    """Which file the other weights are, by content where it can be read."""
    if subject.other is None:
        return ""
    path = subject.other.path
    found = path.stat()
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"


def _compute(work: Work) -> Finding:
    subject, options = work.subject, work.spec.connectivity
    assert subject.other is not None
    second: nn.Module = copy.deepcopy(subject.model)
    second.load_state_dict(subject.read(subject.other))
    numbers: dict[str, Any] = {"other": subject.other.label}
    if options.align:
        aligned = matching.align(
            subject.model, second, generator=work.generator("connectivity align")
        )
        second = aligned.model
        numbers["align/distance_before"] = aligned.distance_before
        numbers["align/distance_after"] = aligned.distance_after
    data = subject.training(
        options.num_examples, options.batch_size, derived_seed(work.spec.seed, "connectivity data")
    )
    straight = landscape.linear_barrier(
        subject.model,
        second,
        subject.loss_fn,
        subject.batches,
        num_points=options.num_points,
        statistics=subject.batches,
    )
    work.progress(0, options.num_epochs)
    joined = landscape.connect(
        subject.model,
        second,
        subject.loss_fn,
        subject.batches,
        training=data,
        kind=options.kind,
        num_bends=options.num_bends,
        num_epochs=options.num_epochs,
        learning_rate=options.learning_rate,
        generator=work.generator("connectivity"),
        num_points=options.num_points,
        statistics=subject.batches,
        on_epoch=lambda epoch, loss: work.progress(epoch + 1, options.num_epochs),
    )
    arrays: dict[str, Any] = {"curve/training_losses": np.asarray(joined.training_losses)}
    for name, path in (("linear", straight), ("curve", joined.path)):
        numbers.update({f"{name}/{key}": value for key, value in path.summary().items()})
        arrays.update({f"{name}/{key}": value for key, value in path.to_arrays().items()})
    return Finding(numbers=numbers, arrays=arrays)
