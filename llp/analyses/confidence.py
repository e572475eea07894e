"""How sure the network is of the measured examples, against how often it is right."""

from __future__ import annotations

from collections.abc import Iterator

from llp import landscape
from llp.analyses.subject import Finding, Part, Subject, Work
from llp.spec.landscape import LandscapeSpec


def confidence(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """One part."""
    yield Part(
        name="confidence",
        analysis="confidence",
        settings={"seed": spec.seed},
        compute=_compute,
    )


def _compute(work: Work) -> Finding:
    subject = work.subject
    found = landscape.confidence(subject.model, subject.batches, seed=work.spec.seed)
    return Finding(numbers=dict(found.summary()), arrays=dict(found.to_arrays()))
