"""The path of the training in its main plane, with the true loss of every checkpoint beside it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llp import landscape
from llp.analyses.planes import NO_PATH
from llp.analyses.subject import Finding, Part, Subject, Work
from llp.spec.landscape import LandscapeSpec


def trajectory(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """The path; a surface on its plane belongs to `surfaces`."""
    short = "at least 3 checkpoints are needed" if len(subject.path) < 3 else ""
    yield Part(
        name="trajectory",
        analysis="trajectory",
        settings={"checkpoints": [weights.label for weights in subject.path]},
        compute=_compute,
        impossible=short if subject.path else NO_PATH,
    )


def _compute(work: Work) -> Finding:
    subject = work.subject
    weights = [subject.read(each) for each in subject.path]
    found = landscape.trajectory(subject.model, subject.loss_fn, subject.batches, weights)
    arrays = dict(found.to_arrays())
    vectors = arrays.pop("directions/vectors")
    (x_low, x_high), (y_low, y_high) = found.extent()
    numbers = {
        **found.summary(),
        "extent/x_low": x_low,
        "extent/x_high": x_high,
        "extent/y_low": y_low,
        "extent/y_high": y_high,
        "label_1": found.directions.labels[0],
        "label_2": found.directions.labels[1],
    }
    epochs = np.asarray([each.epoch for each in subject.path])
    return Finding(
        numbers=numbers, arrays={**arrays, "epoch": epochs}, vectors={"directions": vectors}
    )
