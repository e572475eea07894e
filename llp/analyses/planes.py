"""Lines and surfaces: the loss and the accuracy along directions through the weights.

Random directions are normalised as the settings say; eigenvectors and an optimizer's update are
unit vectors, so that a coordinate is a distance and the curvature along an eigenvector at 0 is its
eigenvalue; the main plane of the training has the extent of the path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from llp import landscape
from llp.analyses.spectrum import eigenpairs_of
from llp.analyses.subject import Finding, Part, Subject, Work
from llp.landscape import directions as makers
from llp.landscape.directions import Directions
from llp.landscape.store import FileStore
from llp.spec.landscape import Extent, LandscapeSpec, LinesSpec

CHUNK = 16
"""Points that are evaluated and stored together: a kill costs at most these."""
_HESSIAN = ("hessian", "hessian_signed")


def surfaces(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """One plane for each kind of directions."""
    options = spec.surfaces
    for kind in options.directions:
        extent = options.extent
        if kind in _HESSIAN and options.hessian_extent is not None:
            extent = options.hessian_extent
        settings = {
            **options.model_dump(
                exclude={"directions", "extent", "hessian_extent", "robust", "loss_cap"}
            ),
            "kind": kind,
            "extent": None if kind == "trajectory" else extent,
            "robust": kind in options.robust,
            "directions": _direction_settings(spec, kind),
        }
        if not settings["robust"]:
            del settings["rho"], settings["robust_method"]
        yield Part(
            name=f"surface/{kind}",
            analysis="surfaces",
            settings=settings,
            compute=partial(_surface, kind, extent),
            needs=_needs(kind),
            impossible=_impossible(kind, subject),
        )


def lines(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """One line for each kind of direction."""
    options = spec.lines
    for kind in options.directions:
        settings = {
            **options.model_dump(exclude={"directions", "extent"}),
            "kind": kind,
            "extent": extent_of(kind, options),
            "rho": spec.surfaces.rho if options.robust else None,
            "robust_method": spec.surfaces.robust_method if options.robust else None,
            "directions": _direction_settings(spec, kind),
        }
        yield Part(
            name=f"line/{kind}",
            analysis="lines",
            settings=settings,
            compute=partial(_line, kind),
            needs=_needs(kind),
            impossible=_impossible(kind, subject),
        )


def _surface(kind: str, extent: Extent, work: Work) -> Finding:
    subject, options = work.subject, work.spec.surfaces
    model = subject.model
    if kind == "random_base":
        model = subject.fresh(_seed(work.spec))
    chosen = directions(kind, work, model)
    span: Any = extent
    if kind == "trajectory":
        path = work.found["trajectory"].numbers
        span = (
            (float(path["extent/x_low"] or 0), float(path["extent/x_high"] or 0)),
            (float(path["extent/y_low"] or 0), float(path["extent/y_high"] or 0)),
        )
    found = landscape.surface(
        model,
        subject.loss_fn,
        subject.batches,
        directions=chosen,
        extent=span,
        resolution=options.resolution,
        coarse=options.coarse,
        seed=_seed(work.spec),
        rho=options.rho if kind in options.robust else 0.0,
        robust=options.robust_method,
        statistics=subject.batches if options.reestimate_batch_norm else None,
        chunk_size=CHUNK,
        evaluate_chunks=work.evaluate_chunks,
        store=FileStore(work.scratch),
    )
    return Finding(numbers={**found.summary(), **_about(chosen)}, arrays=found.to_arrays())


def _line(kind: str, work: Work) -> Finding:
    subject, options = work.subject, work.spec.lines
    chosen = directions(kind, work, subject.model, count=1)
    found = landscape.line(
        subject.model,
        subject.loss_fn,
        subject.batches,
        direction=chosen,
        extent=extent_of(kind, options),
        resolution=options.resolution,
        rho=work.spec.surfaces.rho if options.robust else 0.0,
        robust=work.spec.surfaces.robust_method,
        chunk_size=CHUNK,
        evaluate_chunks=work.evaluate_chunks,
        store=FileStore(work.scratch),
    )
    return Finding(numbers={**found.summary(), **_about(chosen)}, arrays=found.to_arrays())


def extent_of(kind: str, options: LinesSpec) -> Extent:
    """Of a line; from the end of a training, at 0, to its start, at 1, and a quarter beyond both.

    Both ends are points of the line, so that it passes through the loss that is marked there.
    """
    if kind != "from_start":
        return options.extent
    between = math.ceil((options.resolution - 1) / 1.5)  # steps from the end to the start
    beyond = round(between / 4)
    return (-beyond / between, (options.resolution - 1 - beyond) / between)


def directions(kind: str, work: Work, model: torch.nn.Module, count: int = 2) -> Directions:
    """The directions of a kind; of a single one the first, or the negative end for a signed one."""
    subject, spec = work.subject, work.spec
    if kind in ("random", "random_base"):
        how = spec.directions.model_dump(exclude={"seed"})
        return makers.random(model, count, seed=_seed(spec), **how)
    if kind in _HESSIAN:
        pairs = eigenpairs_of(work.found["spectrum"], subject.device)
        signed = kind == "hessian_signed"
        made = makers.hessian(model, pairs, signed=signed, count=2 if signed else count)
        return _only(model, made, 1) if signed and count == 1 else made
    if kind == "adam":
        assert subject.optimizer is not None
        axes = ("update",) if count == 1 else ("exp_avg", "exp_avg_sq")
        return makers.adam(model, subject.optimizer(), axes=axes, orthogonal=count > 1)
    if kind == "trajectory":
        path = work.found["trajectory"]
        return makers.make(
            model,
            torch.from_numpy(path.vectors["directions"]).to(subject.device),
            kind="trajectory",
            labels=[str(path.numbers["label_1"]), str(path.numbers["label_2"])],
            values=path.arrays["explained"].tolist(),
        )
    start = subject.path[0]
    made = makers.between(model, _on(subject.read(start), subject.device))
    return makers.make(model, made.vectors, kind="from_start", labels=[f"to {start.label}"])


def _only(model: torch.nn.Module, made: Directions, index: int) -> Directions:
    rows = slice(index, index + 1)
    return makers.make(
        model,
        made.vectors[rows],
        kind=made.kind,
        labels=made.labels[rows],
        values=made.values[rows],
    )


def _on(weights: Any, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in weights.items()}


def _about(chosen: Directions) -> dict[str, Any]:
    """What an axis is, and the number that belongs to it."""
    found: dict[str, Any] = {"direction_kind": chosen.kind}
    for number, label in enumerate(chosen.labels, start=1):
        found[f"label_{number}"] = label
        found[f"norm_{number}"] = chosen.norms[number - 1]
        found[f"value_{number}"] = chosen.values[number - 1] if chosen.values else None
    return found


def _direction_settings(spec: LandscapeSpec, kind: str) -> dict[str, Any]:
    if kind in ("random", "random_base"):
        return {**spec.directions.model_dump(exclude={"seed"}), "seed": _seed(spec)}
    return {}


def _needs(kind: str) -> tuple[str, ...]:
    if kind in _HESSIAN:
        return ("spectrum",)
    return ("trajectory",) if kind == "trajectory" else ()


def _impossible(kind: str, subject: Subject) -> str:
    """Why there is no such direction for this subject; empty when there is."""
    if kind == "adam" and subject.optimizer is None:
        return (
            "the optimizer's state was not kept; `--train` keeps it, and so does the training "
            "callback `checkpoints` with `optimizer: true`"
        )
    if kind == "from_start" and not subject.path:
        return NO_PATH
    if kind == "trajectory" and len(subject.path) < 3:
        return NO_PATH if not subject.path else "at least 3 checkpoints are needed"
    return ""


NO_PATH = (
    "no earlier weights of this training are known; `--train` keeps them, and so does the training "
    "callback `checkpoints`"
)


def _seed(spec: LandscapeSpec) -> int:
    return spec.seed if spec.directions.seed is None else spec.directions.seed
