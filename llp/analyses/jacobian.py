"""Rank of the Jacobian of layers with respect to a part of the first measured example."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from llp import landscape
from llp.analyses.subject import Finding, Part, Subject, Work
from llp.spec.landscape import LandscapeSpec


def jacobian(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """One part for each layer."""
    modules = dict(subject.model.named_modules())
    for layer in spec.jacobian.layers or [""]:
        known = ", ".join(sorted(modules)[1:9])
        yield Part(
            name=f"jacobian/{layer or 'output'}",
            analysis="jacobian",
            settings={**spec.jacobian.model_dump(exclude={"layers"}), "layer": layer},
            compute=partial(_compute, layer),
            impossible=""
            if layer in modules
            else f"no module is called '{layer}'; such as {known}",
        )


def _compute(layer: str, work: Work) -> Finding:
    options = work.spec.jacobian
    example = work.subject.batches[0][0][0]
    found = landscape.partial_jacobian_rank(
        work.subject.model,
        example,
        layer=layer,
        mode=options.mode,
        side=min(options.side, *example.shape[1:]),
        method=options.method,
        generator=work.generator(f"jacobian {layer}"),
    )
    return Finding(numbers=dict(found.summary()), arrays=dict(found.to_arrays()))
