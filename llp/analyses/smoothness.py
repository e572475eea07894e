"""How well the gradient describes the loss some way along it, uphill and downhill."""

from __future__ import annotations

from collections.abc import Iterator

from llp import landscape
from llp.analyses.subject import Finding, Part, Subject, Work
from llp.spec.landscape import LandscapeSpec


def smoothness(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """One part."""
    yield Part(
        name="smoothness",
        analysis="smoothness",
        settings=spec.smoothness.model_dump(),
        compute=_compute,
    )


def _compute(work: Work) -> Finding:
    subject = work.subject
    found = landscape.smoothness(
        subject.model, subject.loss_fn, subject.batches, steps=work.spec.smoothness.steps
    )
    return Finding(numbers=dict(found.summary()), arrays=dict(found.to_arrays()))
