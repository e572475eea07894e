"""Sharpness: one part for each measure of the list, all with value, standard error and cost."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from llp import registry
from llp.analyses.subject import Finding, Part, Subject, Work
from llp.spec.landscape import LandscapeSpec


def sharpness(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """The measures that the settings name."""
    counts: dict[str, int] = {}
    for name, options in spec.sharpness.named():
        counts[name] = number = counts.get(name, 0) + 1
        called = name.rpartition(":")[2] + ("" if number == 1 else f"_{number}")
        full = {**registry.options("sharpness_measures", name), **options}
        yield Part(
            name=f"sharpness/{called}",
            analysis="sharpness",
            settings={"measure": name, "options": full, "seed": spec.seed},
            compute=partial(_measure, name, full),
        )


def _measure(name: str, options: Mapping[str, Any], work: Work) -> Finding:
    measure = registry.load("sharpness_measures", name)
    subject = work.subject
    given = {key: value for key, value in options.items() if value not in (None, "")}
    if "generator" in inspect.signature(measure).parameters:
        given["generator"] = work.generator(f"sharpness {name}")
    found = measure(subject.model, subject.loss_fn, subject.batches, **given)
    return Finding(
        numbers={
            "measure": name,
            "options": ", ".join(f"{key}={value}" for key, value in options.items()),
            "": found.value,
            "standard_error": found.standard_error,
            "num_examples": found.num_examples,
            "num_products": found.num_products,
            "num_gradients": found.num_gradients,
            "num_forwards": found.num_forwards,
            "gradient_equivalents": found.gradient_equivalents,
            "seconds": found.seconds,
        }
    )
