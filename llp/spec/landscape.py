"""What `llp landscape` is asked for: whose landscape, which analyses, and how each is made.

A file of its own, read by the same loader as an experiment: unknown keys, wrong values and unknown
names are errors with file and line. *Source* is where the network comes from: a trial of a study, a
checkpoint, or a training that is run first. The last two need an *experiment*, which is the name of
an experiment file or the sections of one, here with short names: only `dataset` and `model` must be
there.

    source: {train: true}
    experiment: {dataset: {name: digits}, model: {name: mlp}, training: {epochs: 10}}
    surfaces: {directions: [random, trajectory], resolution: 31}
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from llp import registry
from llp.errors import Problem, SpecError, unknown
from llp.spec import loading, options, secrets, wording
from llp.spec.checks import Finding
from llp.spec.domains import Frozen, Number, Value, Whole, wrong
from llp.spec.schema import Spec
from llp.spec.source import OVERRIDE, Position, Source, as_parts

Extent = Number | tuple[Number, Number]
PlaneKind = Literal["random", "hessian", "hessian_signed", "adam", "trajectory", "random_base"]
LineKind = Literal["random", "hessian", "hessian_signed", "adam", "from_start"]
SEARCH_SPACE = {"learning_rate": 0.1}
"""Stands in an experiment that searches nothing."""


class SourceSpec(Frozen):
    """Whose landscape: one of `study`, `checkpoint` and `train`."""

    study: str | None = Field(default=None, description="name or folder of a study")
    root: str = Field(default="llp_studies", description="folder that holds the study folders")
    trial: str = Field(default="best", description="of the study: t007, best or winner")
    job: str | None = Field(
        default=None, description="of the study: exactly this job, t007-v0 or t007-r2"
    )
    checkpoint: str | None = Field(default=None, description="file with the weights")
    train: bool = Field(default=False, description="train first, by the experiment")
    checkpoints: list[str] = Field(
        default_factory=list, description="earlier weights of the same training, in order"
    )
    other: str | None = Field(
        default=None, description="weights of an independent training, for connectivity"
    )
    hyperparameters: dict[str, Value] = Field(
        default_factory=dict, description="in place of the experiment's own values"
    )
    num_runs: Whole = Field(
        default=1, ge=1, le=2, description="with train: 2 trains another seed for connectivity"
    )
    save_every: Whole = Field(default=1, ge=1, description="with train: epochs between checkpoints")

    @model_validator(mode="after")
    def _one(self) -> SourceSpec:
        given = [name for name in ("study", "checkpoint") if getattr(self, name) is not None]
        given += ["train"] if self.train else []
        if len(given) != 1:
            what = " and ".join(given) if given else "none of them is given"
            raise wrong(f"give one of study, checkpoint and train; {what}", *given)
        for name in ("num_runs", "save_every"):
            if name in self.model_fields_set and not self.train:
                raise wrong(f"{name} belongs to train: true", name)
        if self.job is not None and self.study is None:
            raise wrong("job belongs to study", "job")
        return self


class DataSpec(Frozen):
    """Which examples are measured on: fixed, class-balanced, not augmented."""

    split: Literal["train", "validation"] = Field(default="train", description="of the dataset")
    num_examples: Whole = Field(default=1024, ge=1, description="the first of the nested order")
    batch_size: Whole = Field(
        default=256, ge=1, description="examples at once; fewer where 8 batches need that"
    )


class SpectrumSpec(Frozen):
    """The Hessian's spectrum."""

    num_eigenvalues: Whole = Field(default=5, ge=1, description="largest by size")
    tolerance: Number = Field(default=1e-3, gt=0, description="relative residual of each")
    density: bool = Field(default=True, description="the whole density beside its ends")
    num_probes: Whole = Field(default=6, ge=2, description="random starts of density and trace")
    num_steps: Whole = Field(default=80, ge=4, description="Lanczos steps from each start")
    relative_error: Number | None = Field(
        default=0.05, gt=0, description="of the trace: more probes until its interval is so small"
    )
    max_products: Whole = Field(
        default=2000, ge=10, description="Hessian products that one search may take"
    )


class SharpnessSpec(Frozen):
    """How much the loss rises near the weights, by several definitions."""

    measures: list[str | dict[str, Any]] = Field(
        default=[
            "sam",
            "asam",
            "worst_case",
            "noise",
            "gradient_norm",
            "adaptive_trace",
            "relative_flatness",
        ],
        min_length=1,
        description="rows of `llp list sharpness_measures`, with options: {name: sam, rho: 0.1}",
    )

    @field_validator("measures")
    @classmethod
    def _named(cls, measures: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for number, measure in enumerate(measures):
            if isinstance(measure, dict) and not isinstance(measure.get("name"), str):
                raise wrong(
                    "missing key 'name': a row of `llp list sharpness_measures`", str(number)
                )
        return measures

    def named(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of every measure."""
        return [
            (measure, {})
            if isinstance(measure, str)
            else (str(measure["name"]), {k: v for k, v in measure.items() if k != "name"})
            for measure in self.measures
        ]


class DirectionsSpec(Frozen):
    """How random directions are made; the others keep their own lengths."""

    normalization: Literal["none", "weight", "filter", "layer", "model"] = Field(
        default="filter", description="scales that random directions are given"
    )
    order: Literal[1, 2] = Field(default=2, description="norm that is used for it")
    exclude_normalization: bool = Field(
        default=True, description="scales and shifts of normalisation layers stay"
    )
    exclude_bias: bool = Field(default=True, description="biases stay")
    frozen: list[str] = Field(default_factory=list, description="parameters or modules that stay")
    seed: Whole | None = Field(default=None, ge=0, description="default: that of the analysis")


class LinesSpec(Frozen):
    """Losses along lines through the weights."""

    directions: list[LineKind] = Field(
        default=["random", "hessian", "from_start"], min_length=1, description="one line each"
    )
    extent: Extent = Field(default=1.0, description="half-length, or [from, to]")
    resolution: Whole = Field(default=41, ge=2, description="points")
    robust: bool = Field(default=False, description="the loss in the worst point of a ball as well")


class SurfacesSpec(Frozen):
    """Losses on planes through the weights."""

    directions: list[PlaneKind] = Field(
        default=["random", "hessian", "hessian_signed", "trajectory"],
        min_length=1,
        description="one plane each",
    )
    extent: Extent = Field(default=1.0, description="half-width, or [from, to]")
    hessian_extent: Extent | None = Field(
        default=None, description="of the planes along unit eigenvectors; default: extent"
    )
    resolution: Whole = Field(default=25, ge=2, description="points along each direction")
    coarse: Whole | None = Field(
        default=None, ge=4, description="evaluate only so many along each, interpolate the others"
    )
    loss_cap: Number | None = Field(default=None, description="pictures show losses up to here")
    robust: list[PlaneKind] = Field(
        default_factory=list, description="planes with the loss in the worst point of a ball"
    )
    rho: Number = Field(default=0.05, gt=0, description="radius of that ball")
    robust_method: Literal["ascent", "first_order"] = Field(
        default="ascent", description="one SAM step, or loss + rho |gradient|"
    )
    reestimate_batch_norm: bool = Field(
        default=False, description="batch normalisation anew at every point"
    )


class ConnectivitySpec(Frozen):
    """The path between two independent trainings."""

    kind: Literal["bezier", "chain"] = Field(default="bezier", description="of the trained curve")
    num_bends: Whole = Field(default=1, ge=1, description="trained points")
    num_epochs: Whole = Field(default=20, ge=1, description="passes of its training")
    learning_rate: Number = Field(default=0.05, gt=0, description="highest of a cosine")
    num_examples: Whole = Field(default=8192, ge=1, description="training images it is trained on")
    batch_size: Whole = Field(default=128, ge=1, description="images a step")
    num_points: Whole = Field(default=25, ge=2, description="where the loss is measured")
    align: bool = Field(default=False, description="permute the second network to match the first")


class RanksSpec(Frozen):
    """Ranks of weights and features over depth, and units that have stopped working."""

    features: bool = Field(default=True, description="of the layers' outputs beside the weights")
    spatial: Literal["flatten", "channels", "mean"] = Field(
        default="channels", description="what becomes of positions in an image"
    )
    measure: Literal["matrix", "numerical", "effective", "approximate", "l1", "stable"] = Field(
        default="effective", description="the rank that is followed over depth"
    )
    dormant_threshold: Number = Field(default=0.1, ge=0, lt=1, description="of a unit's activity")


class SmoothnessSpec(Frozen):
    """How well the gradient describes the loss some way along it."""

    steps: list[Number] = Field(
        default=[1e-3, 1e-2, 1e-1], min_length=1, description="step sizes, both ways"
    )


class JacobianSpec(Frozen):
    """Rank of the Jacobian of layers with respect to a part of the input."""

    layers: list[str] = Field(
        default_factory=list, description="names of modules; default: the network's output"
    )
    mode: Literal["all", "crop", "zero_padding", "strided_subsample", "interpolate"] = Field(
        default="crop", description="which part of the input"
    )
    side: Whole = Field(default=8, ge=1, description="height and width of that part")
    method: Literal["auto", "forward", "reverse", "sketch"] = Field(
        default="auto", description="how the Jacobian is made"
    )


class WorkersSpec(Frozen):
    """Where points of lines and planes are evaluated. Does not change results."""

    num_workers: Whole = Field(default=0, ge=0, description="processes; 0: this one")
    cpus_per_worker: Number = Field(default=1, gt=0, description="CPUs of each")
    gpus_per_worker: Number = Field(default=0, ge=0, description="GPUs of each")
    address: str | None = Field(default=None, description="Ray cluster; none starts Ray here")


class OutputSpec(Frozen):
    """Where results go, and which pictures are written beside the page."""

    folder: str | None = Field(
        default=None, description="default: landscape/TRIAL in the study folder, or llp_landscapes"
    )
    pictures: list[Literal["png", "svg"]] = Field(
        default=["png", "svg"], description="kinds of picture files"
    )
    page: bool = Field(default=True, description="write index.html")


class LandscapeSpec(Frozen):
    """One run of `llp landscape`."""

    version: Literal[1] = Field(default=1, description="of this format")
    source: SourceSpec = Field(description="whose landscape")
    experiment: dict[str, Any] | None = Field(
        default=None, description="an experiment file, or its sections; for checkpoint and train"
    )
    analyses: list[str] = Field(
        default=[
            "spectrum",
            "sharpness",
            "lines",
            "surfaces",
            "trajectory",
            "connectivity",
            "ranks",
            "smoothness",
            "confidence",
        ],
        min_length=1,
        description="rows of `llp list analyses`; what the source has nothing for is left out",
    )
    data: DataSpec = Field(default=DataSpec(), description="measured on these examples")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1")
    seed: Whole = Field(default=0, ge=0, lt=2**31, description="of directions and probes")
    spectrum: SpectrumSpec = Field(default=SpectrumSpec(), description="the Hessian's spectrum")
    sharpness: SharpnessSpec = Field(default=SharpnessSpec(), description="rises of the loss")
    directions: DirectionsSpec = Field(default=DirectionsSpec(), description="random directions")
    lines: LinesSpec = Field(default=LinesSpec(), description="losses along lines")
    surfaces: SurfacesSpec = Field(default=SurfacesSpec(), description="losses on planes")
    connectivity: ConnectivitySpec = Field(
        default=ConnectivitySpec(), description="path to an independent training"
    )
    ranks: RanksSpec = Field(default=RanksSpec(), description="ranks and units over depth")
    smoothness: SmoothnessSpec = Field(default=SmoothnessSpec(), description="along the gradient")
    jacobian: JacobianSpec = Field(default=JacobianSpec(), description="rank of the Jacobian")
    workers: WorkersSpec = Field(default=WorkersSpec(), description="who evaluates points")
    output: OutputSpec = Field(default=OutputSpec(), description="results")

    _source: Source | None = PrivateAttr(default=None)
    _experiment: Spec | None = PrivateAttr(default=None)

    @property
    def places(self) -> Source:
        """Where its keys were written."""
        return self._source or Source()

    @property
    def training(self) -> Spec | None:
        """The checked experiment; None for a trial of a study."""
        return self._experiment

    def asked_for(self, analysis: str) -> bool:
        """Whether the user named `analysis`, and did not only get it with the others."""
        return "analyses" in self.model_fields_set and analysis in self.analyses


def load_landscape(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> LandscapeSpec:
    """The checked settings of a landscape file, of overrides alone, or of both.

    Args:
        source: A path, the content as a mapping, or None for nothing but overrides.
        overrides: `dotted.path=VALUE`, VALUE being YAML: `surfaces.resolution=31`.

    Raises:
        SpecError: All problems of the file, the overrides and the names in them, ordered by line.
    """
    data, places, found = loading.content({} if source is None else source, search_path=())
    data.setdefault("source", {})
    whole = [text for text in overrides if _names_experiment(text)]
    others = [text for text in overrides if not _names_experiment(text)]
    found += loading.override(data, whole, places)
    found += _expand_experiment(data, places)
    found += loading.override(data, others, places)
    spec: LandscapeSpec | None = None
    try:
        spec = LandscapeSpec.model_validate(data)
    except ValidationError as error:
        found += wording.problems(error, data, places, LandscapeSpec)
    if spec is not None:
        findings = [*_names(spec), *_consistency(spec)]
        findings += secrets.findings(spec.model_dump(mode="json", exclude={"experiment"}))
        found += [places.problem(as_parts(path), text) for path, text in findings]
        if spec.experiment is not None:
            try:
                spec._experiment = _experiment(spec.experiment, places)
            except SpecError as error:
                found += error.problems
    if found or spec is None:
        raise SpecError(
            sorted(dict.fromkeys(found), key=lambda p: (p.file == OVERRIDE, p.line, p.column))
        )
    spec._source = places
    return spec


def _names_experiment(override: str) -> bool:
    return override.partition("=")[0].strip() == "experiment"


def _expand_experiment(data: dict[str, Any], places: Source) -> list[Problem]:
    """Puts the content of a named experiment file in the place of its name."""
    name = data.get("experiment")
    if not isinstance(name, str):
        return []
    try:
        content, inside, found = loading.content(name)
    except SpecError as error:
        if any(problem.line for problem in error.problems):
            return list(error.problems)
        text = error.problems[0].message
        return [places.problem(("experiment",), f"{name}: {text}")]
    data["experiment"] = content
    places.overrides.discard(("experiment",))
    for known, noted in ((inside.keys, places.keys), (inside.values, places.values)):
        for path, place in known.items():
            noted["experiment", *path] = Position(place.line, place.column, inside.file)
    return found


def _experiment(content: Mapping[str, Any], places: Source) -> Spec:
    """The checked experiment, with what a landscape does not need filled in."""
    data = copy.deepcopy(dict(content))
    data.setdefault("name", "landscape")
    training = data.get("training")
    rate = training.get("learning_rate", 0.1) if isinstance(training, Mapping) else 0.1
    if not data.get("search_space"):
        data["search_space"] = {"learning_rate": rate} if rate else dict(SEARCH_SPACE)
    inside = Source(
        places.file,
        {path[1:]: place for path, place in places.keys.items() if path[:1] == ("experiment",)},
        {path[1:]: place for path, place in places.values.items() if path[:1] == ("experiment",)},
        {path[1:] for path in places.overrides if path[:1] == ("experiment",)},
    )
    try:
        return loading.checked(data, inside)
    except SpecError as error:
        raise SpecError(
            replace(problem, path=f"experiment.{problem.path}".rstrip("."))
            for problem in error.problems
        ) from error


def _names(spec: LandscapeSpec) -> Iterator[Finding]:
    known = registry.entries("analyses")
    for number, name in enumerate(spec.analyses):
        if name not in known:
            yield f"analyses.{number}", unknown("analysis", name, known)
        elif name in spec.analyses[:number]:
            yield f"analyses.{number}", f"'{name}' is listed twice"
    for number, (name, given) in enumerate(spec.sharpness.named()):
        path = f"sharpness.measures.{number}"
        if fault := options.unusable("sharpness_measures", name):
            yield path, fault
        else:
            yield from options.faults("sharpness_measures", [name], given, path)


def _consistency(spec: LandscapeSpec) -> Iterator[Finding]:
    source = spec.source
    if source.study is not None and spec.experiment is not None:
        yield "experiment", "a study has its own experiment; leave this one out"
    if source.study is None and spec.experiment is None:
        what = "train" if source.train else "checkpoint"
        yield (
            f"source.{what}",
            "needs an experiment that names dataset and model: experiment: FILE, or "
            "experiment.dataset.name and experiment.model.name",
        )
    for path, extent in (
        ("lines.extent", spec.lines.extent),
        ("surfaces.extent", spec.surfaces.extent),
        ("surfaces.hessian_extent", spec.surfaces.hessian_extent),
    ):
        if isinstance(extent, tuple) and not extent[0] < extent[1]:
            yield path, f"must rise, not [{extent[0]:g}, {extent[1]:g}]"
        elif isinstance(extent, int | float) and extent <= 0:
            yield path, f"must be above 0, not {extent:g}"
    for number, kind in enumerate(spec.surfaces.robust):
        if kind not in spec.surfaces.directions:
            yield (
                f"surfaces.robust.{number}",
                f"'{kind}' is not among surfaces.directions: {', '.join(spec.surfaces.directions)}",
            )
    if 0.0 in spec.smoothness.steps:
        yield "smoothness.steps", "a step of 0 leads nowhere"
    if spec.source.other is None and spec.source.train and spec.source.num_runs == 1:
        if spec.asked_for("connectivity"):
            yield (
                "analyses",
                "connectivity needs a second training: source.num_runs: 2 or source.other: FILE",
            )
    elif spec.source.checkpoint and spec.source.other is None and spec.asked_for("connectivity"):
        yield "analyses", "connectivity needs the weights of another training: source.other: FILE"
    if spec.source.checkpoint and not spec.source.checkpoints and spec.asked_for("trajectory"):
        yield "analyses", "trajectory needs earlier weights of the training: source.checkpoints"


__all__ = ["LandscapeSpec", "load_landscape"]
