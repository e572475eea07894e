"""A batch of experiments: many named runs with shared defaults, grids, seeds, repeats, studies.

A *run* is a named experiment: sections of an experiment file (`dataset`, `model`, `training`) and
hyperparameters, as single values (`parameters`) or as a `grid`. Every *configuration* of it is
trained fully with every seed, `repeats` times each; with `choose` the configurations are first
compared by validation results on seeds of their own, and only the best is trained fully. A *study*
is one line that makes configurations out of a run: `ablation` switches parts off one by one,
`sensitivity` and `scaling` change one value at a time.

    version: 1
    name: optimizers
    base: digits
    defaults: {seeds: 5, choose: {}}
    runs:
      sgd: {grid: {learning_rate: [0.03, 0.1, 0.3]}}
      talt: {parameters: {optimizer: talt}, grid: {learning_rate: [0.03, 0.1, 0.3]}}
    ablation: {talt: {smoothing_factor: 0, valley_strength: 0}}
    sensitivity: {talt: {valley_strength: [0.5, 1, 2]}}
    scaling: {sgd: {width: [8, 16, 32], data_fraction: [0.25, 0.5]}}

Every run becomes one checked `Spec`; nothing starts before all of them are good.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from llp.errors import Problem, SpecError, unknown
from llp.records import HyperparameterValue
from llp.spec import loading, wording
from llp.spec.domains import (
    Frozen,
    GridSearch,
    Number,
    RandomSearch,
    Value,
    Whole,
    as_domain,
    wrong,
)
from llp.spec.matrix import Base, merge_into, named_base, ordered, twins
from llp.spec.schema import ResourcesSpec, Spec, TrackingSpec
from llp.spec.source import Parts, Position, Source

StudyKind = Literal["ablation", "sensitivity", "scaling"]
STUDY_KINDS: tuple[StudyKind, ...] = ("ablation", "sensitivity", "scaling")
SECTIONS = ("dataset", "model", "training")
"""Sections of an experiment that a run may change."""
SHARED = ("seed", "resources", "output", "tracking")
"""Sections that all runs of a batch share."""
BUDGET = ("data_fraction", "epochs")
"""What a study may vary beside hyperparameters."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,47}$"
MAX_CONFIGURATIONS = 10_000
ROOT = "llp_batches"
"""Folder of the batch folders, unless `defaults.output.root` says otherwise."""


class ChooseSpec(Frozen):
    """How one configuration of a run is chosen; the test split is not read for it."""

    by: Literal["validation_accuracy", "validation_loss"] = Field(
        default="validation_accuracy", description="mean over the seeds, after the last epoch"
    )
    num_seeds: Whole = Field(
        default=1, ge=1, description="trainings of each; their seeds are not among those compared"
    )


class RunSpec(Frozen):
    """What a run, or the defaults of all runs, may say."""

    dataset: dict[str, Any] = Field(default_factory=dict, description="as in an experiment")
    model: dict[str, Any] = Field(default_factory=dict, description="as in an experiment")
    training: dict[str, Any] = Field(default_factory=dict, description="as in an experiment")
    parameters: dict[str, Value] = Field(
        default_factory=dict, description="hyperparameter -> value"
    )
    grid: dict[str, Any] = Field(
        default_factory=dict,
        description="hyperparameter -> values, or a domain as in a search space",
    )
    samples: Whole | None = Field(
        default=None, ge=1, description="draw so many at random instead of taking the whole grid"
    )
    constraints: list[str] = Field(
        default_factory=list, description="conditions that every configuration satisfies"
    )
    data_fraction: Number = Field(
        default=1.0, gt=0, le=1, description="share of the training images"
    )
    seeds: Whole | list[Whole] = Field(
        default=1, description="trainings with seeds 0, 1, ...; or the seeds themselves"
    )
    repeats: Whole = Field(
        default=1, ge=1, description="trainings with the very same seed, to see what a machine adds"
    )
    choose: ChooseSpec | None = Field(
        default=None, description="choose one configuration of the grid before the full trainings"
    )

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: int | list[int]) -> int | list[int]:
        given = seeds if isinstance(seeds, list) else [seeds - 1]
        if not given or min(given) < 0 or max(given) >= 2**31:
            raise wrong("needs at least one seed, and seeds from 0 to 2^31 - 1")
        if len(set(given)) < len(given):
            raise wrong("a seed is listed twice; repeats trains with the same seed again")
        return seeds


class DefaultsSpec(RunSpec):
    """What all runs share unless they say otherwise, and what none may change."""

    seed: Whole | None = Field(
        default=None, ge=0, lt=2**31, description="of the split into training and validation"
    )
    resources: dict[str, Any] = Field(default_factory=dict, description="as in an experiment")
    output: dict[str, Any] = Field(default_factory=dict, description="as in an experiment")
    tracking: dict[str, Any] = Field(
        default_factory=dict,
        description="as in an experiment; the name of the MLflow experiment is llp/NAME by default",
    )


class BatchFile(Frozen):
    """What the file of a batch may say."""

    version: Literal[1] = Field(default=1, description="of this format")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of the batch and its folder"
    )
    title: str = Field(default="", max_length=200, description="heading of the page")
    base: str | None = Field(
        default=None,
        description="experiment file whose dataset, model, training, seed, resources, output and "
        "tracking come first: relative to this one, or a name in search_spaces/",
    )
    defaults: DefaultsSpec = Field(default=DefaultsSpec(), description="of all runs")
    runs: dict[str, RunSpec] = Field(min_length=1, description="name -> run")
    ablation: dict[str, dict[str, Value]] = Field(
        default_factory=dict, description="run -> hyperparameter -> its value when switched off"
    )
    sensitivity: dict[str, dict[str, list[Value]]] = Field(
        default_factory=dict, description="run -> hyperparameter -> values, one changed at a time"
    )
    scaling: dict[str, dict[str, list[Value]]] = Field(
        default_factory=dict,
        description="run -> hyperparameter, data_fraction or epochs -> values, one at a time",
    )
    reference: str | None = Field(
        default=None, description="the run that the others are compared with; default: the first"
    )


@dataclass(frozen=True)
class Run:
    """A checked run.

    Attributes:
        name: Of the run.
        spec: The experiment; its search space has all hyperparameters of the run.
        points: The configurations' hyperparameters, in a fixed order.
        varied: Hyperparameters that differ between points.
        seeds: Of the full trainings.
        repeats: Full trainings with each seed.
        choose: How one point is chosen; None when all are trained fully.
        data_fraction: Share of the training images.
    """

    name: str
    spec: Spec
    points: tuple[Mapping[str, HyperparameterValue], ...]
    varied: tuple[str, ...]
    seeds: tuple[int, ...]
    repeats: int
    choose: ChooseSpec | None
    data_fraction: float


@dataclass(frozen=True)
class Study:
    """A checked study: the values of each hyperparameter that it tries around a run."""

    kind: StudyKind
    run: str
    parameters: Mapping[str, tuple[HyperparameterValue, ...]]


@dataclass(frozen=True)
class Batch:
    """A batch, all of whose runs and studies were checked.

    Attributes:
        name: Of its folder.
        title: Heading of the page; empty for one made from the name.
        file: As shown to the user.
        runs: Name -> run, in the order of the file.
        studies: In the order of the file.
        reference: Name of the run that the others are compared with.
        root: Folder of the batch folders.
    """

    name: str
    title: str
    file: str
    runs: Mapping[str, Run]
    studies: tuple[Study, ...]
    reference: str
    root: Path

    @property
    def resources(self) -> ResourcesSpec:
        """CPUs and GPUs, the same for all runs."""
        return next(iter(self.runs.values())).spec.resources

    @property
    def tracking(self) -> TrackingSpec:
        """Where MLflow is, the same for all runs."""
        return next(iter(self.runs.values())).spec.tracking

    @property
    def folder(self) -> Path:
        """Where the batch keeps its ledger and results."""
        return self.root / self.name

    def chosen(self, only: Sequence[str]) -> Batch:
        """The batch with the runs in `only` and the studies of those; whole when it is empty.

        Raises:
            SpecError: One is not in the file; the message has the nearest.
        """
        found = [
            Problem(unknown("run", name, self.runs), file="--only")
            for name in only
            if name not in self.runs
        ]
        if found:
            raise SpecError(found)
        if not only:
            return self
        return replace(
            self,
            runs={name: run for name, run in self.runs.items() if name in only},
            studies=tuple(study for study in self.studies if study.run in only),
        )


def load_batch(file: str | Path, overrides: Sequence[str] = ()) -> Batch:
    """The checked batch of a YAML file.

    Args:
        file: Its path.
        overrides: `dotted.path=VALUE`: `defaults.training.epochs=3`, `runs.sgd.seeds=2`.

    Raises:
        SpecError: All problems of the file, its base, the overrides, and every run and study.
    """
    data, places, found = loading.content(loading.find(file, search_path=()))
    return batch_of(data, places, overrides, found, folder=Path(file))


def batch_of(
    data: dict[str, Any],
    places: Source,
    overrides: Sequence[str] = (),
    found: Sequence[Problem] = (),
    *,
    folder: Path,
) -> Batch:
    """The checked batch of content that was read already; see `load_batch`.

    Args:
        data: The content.
        places: Where its parts were written.
        overrides: As for `load_batch`.
        found: What is known to be wrong with it.
        folder: The file, for a base beside it.

    Raises:
        SpecError: All problems, `found` among them.
    """
    problems = [*found, *loading.override(data, overrides, places)]
    shape, faults = _shape(data, places)
    problems += faults
    if shape is None:
        raise SpecError(ordered(problems))
    base = Base({}, places, [])
    if shape.base is not None:
        base = named_base(folder, shape.base, places)
        problems += base.problems
    runs: dict[str, Run] = {}
    for name in shape.runs:
        try:
            runs[name] = _run(name, data, shape, places, base)
        except SpecError as error:
            problems += error.problems
    studies = list(_studies(shape))
    for study in studies:
        problems += _study_problems(study, data, shape, places, base, runs)
    reference = shape.reference or next(iter(shape.runs))
    if reference not in shape.runs:
        problems.append(places.problem(("reference",), unknown("run", reference, shape.runs)))
    if problems:
        raise SpecError(ordered(problems))
    given = [part.get("output", {}) for part in (base.data, data.get("defaults", {}))]
    root = next(iter(runs.values())).spec.output.root
    return Batch(
        shape.name,
        shape.title,
        places.file,
        runs,
        tuple(studies),
        reference,
        Path(root if any("root" in output for output in given) else ROOT),
    )


def _shape(data: dict[str, Any], places: Source) -> tuple[BatchFile | None, list[Problem]]:
    names = data["runs"] if isinstance(data.get("runs"), dict) else ()
    problems = twins(names, places, ("runs",), "files")
    for name in names:
        if not _named(name):
            text = f"'{name}' cannot name a run: letters, digits, '_' and '-', at most 48"
            problems.append(places.problem(("runs", name), text, key=True))
    runs = data.get("runs")
    parts: list[tuple[Parts, Any]] = [(("defaults",), data.get("defaults"))]
    parts += [(("runs", n), part) for n, part in runs.items()] if isinstance(runs, dict) else []
    for prefix, part in parts:
        both = [part.get(key) for key in ("parameters", "grid")] if isinstance(part, dict) else []
        names = [set(kind) for kind in both if isinstance(kind, dict)]
        for name in sorted(names[0] & names[1]) if len(names) == 2 else ():
            text = f"'{name}' is in parameters too; leave one of them out"
            problems.append(places.problem((*prefix, "grid", name), text, key=True))
    try:
        return BatchFile.model_validate(data), problems
    except ValidationError as error:
        extra = {
            tuple(item["loc"])
            for item in error.errors(include_url=False)
            if item["type"] == "extra_forbidden"
        }
        problems += [places.problem(path, _unknown_key(path), key=True) for path in extra]
        known = {".".join(map(str, path)) for path in extra}
        for problem in wording.problems(error, data, places, BatchFile):
            if problem.path in known:
                continue
            listed = ".parameters." in problem.path and problem.message.endswith("not a list")
            hint = "; several values belong into grid" if listed else ""
            problems.append(replace(problem, message=problem.message + hint))
        return None, problems


def _named(name: str) -> bool:
    return re.fullmatch(NAME, name) is not None


def _unknown_key(path: Parts) -> str:
    key = str(path[-1])
    if path[0] == "runs" and len(path) == 3:
        if key in SHARED:
            return f"'{key}' is the same for all runs of a batch; it belongs into defaults"
        if key in (*STUDY_KINDS, "runs", "reference"):
            return f"'{key}' belongs to the top of the file"
        if key in Spec.model_fields:
            return f"a batch has no '{key}'; it trains fully and does not search"
        return unknown("key", key, RunSpec.model_fields) + " (a hyperparameter? see parameters)"
    if path[0] == "defaults" and len(path) == 2:
        return unknown("key", key, DefaultsSpec.model_fields)
    if len(path) == 1:
        if key in (*SECTIONS, *SHARED):
            return f"'{key}' belongs into defaults, or into a run"
        return unknown("key", key, BatchFile.model_fields)
    return f"unknown key '{key}'"


def _settings(name: str, shape: BatchFile) -> dict[str, Any]:
    """What holds for a run beside its sections: its own, or the defaults'."""
    run, found = shape.runs[name], {}
    for key in ("samples", "constraints", "data_fraction", "seeds", "repeats", "choose"):
        own = key in run.model_fields_set
        found[key] = getattr(run if own else shape.defaults, key)
    return found


def _run(name: str, data: dict[str, Any], shape: BatchFile, places: Source, base: Base) -> Run:
    settings = _settings(name, shape)
    spec = _checked(name, data, places, base, constraints=settings["constraints"])
    search = RandomSearch if settings["samples"] else GridSearch
    try:
        maker = search(spec.search_space, spec.constraints, spec.seed)
        num = settings["samples"] or maker.num_points or 0
        points = [maker.suggest(index) for index in range(min(num, MAX_CONFIGURATIONS + 1))]
    except SpecError as error:
        raise SpecError(
            replace(spec.problem(p.path, p.message), path=_dotted(p.path, data, name))
            for p in error.problems
        ) from error
    distinct = list({tuple(sorted(point.items())): point for point in points}.values())
    if not distinct or len(distinct) > MAX_CONFIGURATIONS:
        text = (
            f"has over {MAX_CONFIGURATIONS:,} configurations"
            if distinct
            else "no configuration satisfies the constraints"
        )
        raise SpecError([places.problem(("runs", name), text, key=True)])
    varied = [
        key
        for key in {key: None for point in distinct for key in point}
        if len({repr(point.get(key)) for point in distinct}) > 1
    ]
    seeds = settings["seeds"]
    return Run(
        name,
        spec,
        tuple(distinct),
        tuple(varied),
        tuple(seeds if isinstance(seeds, list) else range(seeds)),
        settings["repeats"],
        settings["choose"] if len(distinct) > 1 else None,
        settings["data_fraction"],
    )


def _checked(
    name: str,
    data: dict[str, Any],
    places: Source,
    base: Base,
    *,
    constraints: Sequence[str] = (),
    values: Mapping[str, Sequence[HyperparameterValue]] | None = None,
    values_at: Parts = (),
) -> Spec:
    """The experiment of a run; with `values` those stand in its search space, to be checked."""
    merged: dict[str, Any] = {}
    where = Source(places.file)
    kept = {key: base.data[key] for key in (*SECTIONS, *SHARED) if key in base.data}
    merge_into(merged, kept, where, (), base.places, ())
    space: dict[str, Any] = {}
    homes: dict[str, Parts] = {}
    for prefix in (("defaults",), ("runs", name)):
        part: Any = data
        for key in prefix:
            part = part.get(key, {})
        sections = {key: part[key] for key in (*SECTIONS, *SHARED) if key in part}
        merge_into(merged, copy.deepcopy(sections), where, (), places, prefix)
        for key in ("parameters", "grid"):
            for parameter, value in part.get(key, {}).items():
                space[parameter] = as_domain(value)
                homes[parameter] = (*prefix, key, parameter)
                _move(where, ("search_space", parameter), places, homes[parameter])
        if "constraints" in part:
            _move(where, ("constraints",), places, (*prefix, "constraints"))
    for parameter, tried in (values or {}).items():
        space[parameter] = as_domain(list(tried))
        homes[parameter] = (*values_at, parameter)
        _move(where, ("search_space", parameter), places, homes[parameter])
    if not space:
        rate = merged.get("training", {}).get("learning_rate", 0.1)
        space["learning_rate"] = as_domain(rate)
        where.keys["search_space",] = places.keys["runs", name]
    merged |= {
        "name": name,
        "search_space": space,
        "constraints": list(constraints),
        "tier1": {"scheduler": "fifo", "data_fractions": [1.0], "num_trials": 1, "stop_rules": []},
    }
    where.keys["name",] = where.values["name",] = places.keys["runs", name]
    try:
        return loading.checked(merged, where)
    except SpecError as error:
        raise SpecError(
            _renamed(problem, name, homes, data) for problem in error.problems
        ) from error


def _dotted(path: str, data: Mapping[str, Any], name: str) -> str:
    """The path in the file of the batch of a `path` in the search space of a run."""
    first, _, rest = path.partition(".")
    if first != "search_space":
        return f"runs.{name}.{path}"
    own = rest.partition(".")[0] in data["runs"][name].get("grid", {})
    return f"runs.{name}.grid.{rest}" if own else f"defaults.grid.{rest}"


def _move(where: Source, to: Parts, places: Source, at: Parts) -> None:
    """Remembers for `to`, and all below, the places of `at` in the file of the batch."""
    for known, noted in ((places.keys, where.keys), (places.values, where.values)):
        for path in [p for p in noted if p[: len(to)] == to]:
            del noted[path]
        for path, position in list(known.items()):
            if path[: len(at)] == at:
                noted[(*to, *path[len(at) :])] = Position(
                    position.line, position.column, position.file or places.file
                )
    if places.overridden(at):
        where.overrides.add(to)


def _renamed(
    problem: Problem, name: str, homes: Mapping[str, Parts], data: Mapping[str, Any]
) -> Problem:
    """`problem` of a run's experiment with its path in the file of the batch."""
    first, *rest = problem.path.split(".")
    if first == "search_space" and rest and rest[0] in homes:
        return replace(problem, path=".".join(map(str, (*homes[rest[0]], *rest[1:]))))
    own = _reach(data["runs"][name], [first, *rest])
    shared = _reach(data.get("defaults", {}), [first, *rest])
    prefix = ("defaults",) if shared > own else ("runs", name)
    return replace(problem, path=".".join(filter(None, (*prefix, problem.path))))


def _reach(node: Any, path: Sequence[str]) -> int:
    """How far `path` can be followed in `node`."""
    for depth, part in enumerate(path):
        if not isinstance(node, Mapping) or part not in node:
            return depth
        node = node[part]
    return len(path)


def _studies(shape: BatchFile) -> Iterator[Study]:
    for name, parts in shape.ablation.items():
        yield Study("ablation", name, {key: (value,) for key, value in parts.items()})
    for kind in STUDY_KINDS[1:]:
        for name, parameters in getattr(shape, kind).items():
            yield Study(kind, name, {key: tuple(values) for key, values in parameters.items()})


def _study_problems(
    study: Study,
    data: dict[str, Any],
    shape: BatchFile,
    places: Source,
    base: Base,
    runs: Mapping[str, Run],
) -> Iterator[Problem]:
    path: Parts = (study.kind, study.run)
    if study.run not in shape.runs:
        yield places.problem(path, unknown("run", study.run, shape.runs), key=True)
        return
    run = runs.get(study.run)
    if run is None:
        return
    if len(run.points) > 1 and run.choose is None:
        text = (
            f"the run '{study.run}' has {len(run.points)} configurations and a study is made "
            "around one; give the run `choose: {}`, or no grid"
        )
        yield places.problem(path, text, key=True)
    if not study.parameters:
        yield places.problem(path, "names no hyperparameter", key=True)
    hyperparameters = {}
    for name, values in study.parameters.items():
        if name not in BUDGET:
            hyperparameters[name] = values
            continue
        for number, value in enumerate(values):
            fault = _budget_fault(name, value)
            if fault:
                at = (*path, name) if study.kind == "ablation" else (*path, name, number)
                yield places.problem(at, fault)
    try:
        _checked(study.run, data, places, base, values=hyperparameters, values_at=path)
    except SpecError as error:
        yield from error.problems


def _budget_fault(name: str, value: HyperparameterValue) -> str | None:
    if isinstance(value, bool | str):
        return f"must be a number, not {wording.shown(value)}"
    if name == "epochs" and (not isinstance(value, int) or value < 1):
        return f"must be a whole number of at least 1, not {wording.shown(value)}"
    if name == "data_fraction" and not 0 < value <= 1:
        return f"must be above 0 and at most 1, not {wording.shown(value)}"
    return None
