"""The definition of a report matrix: one experiment in several configurations, to be compared.

A *matrix* names a base experiment, what all configurations change of it (`common`), and what each
configuration changes on top. A configuration may only change how it probes (`tier1`, `tier2`,
`score`): with the same images, network, recipe, search space and seed, and a searcher that does not
learn, trial number n is the same configuration in all of them, and results can be compared trial by
trial. Every configuration becomes one checked `Spec`; nothing runs before all of them are good.

Overrides (`--set`) come last and hold for all configurations.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from llp import registry
from llp.errors import Problem, SpecError, unknown
from llp.spec import loading, wording
from llp.spec.domains import Frozen
from llp.spec.schema import Spec
from llp.spec.source import OVERRIDE, Parts, Position, Source

PER_CONFIGURATION = ("tier1", "tier2", "score")
"""Sections a configuration may change."""
SEARCHERS = ("random", "grid")
"""Searchers whose trial number n does not depend on the results before it."""
_NAMED_HERE = ("name", "version")
_NOT_RESULTS = ("name", "resources", "tracking", "output")


class MatrixFile(Frozen):
    """What the file of a matrix may say."""

    version: Literal[1] = Field(default=1, description="of this format")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of the folder of the pages"
    )
    title: str = Field(default="", max_length=200, description="heading of the index")
    base: str = Field(
        description="experiment file: relative to this one, or a name in search_spaces/"
    )
    common: dict[str, Any] = Field(
        default_factory=dict, description="what all configurations change of the base"
    )
    configurations: dict[str, dict[str, Any]] = Field(
        min_length=1, description="name of the study -> what it changes: tier1, tier2, score"
    )


@dataclass(frozen=True)
class Matrix:
    """A matrix, all of whose configurations were checked.

    Attributes:
        name: Of the folder of its pages.
        title: Heading of the index; empty for one made from the name.
        file: As shown to the user.
        configurations: Name -> experiment, in the order of the file.
    """

    name: str
    title: str
    file: str
    configurations: Mapping[str, Spec]

    def chosen(self, only: Sequence[str]) -> tuple[str, ...]:
        """The configurations named in `only`, all of them when it is empty, in file order.

        Raises:
            SpecError: One is not in the file; the message has the nearest.
        """
        found = [
            Problem(unknown("configuration", name, self.configurations), file="--only")
            for name in only
            if name not in self.configurations
        ]
        if found:
            raise SpecError(found)
        return tuple(name for name in self.configurations if not only or name in only)


def load_matrix(file: str | Path, overrides: Sequence[str] = ()) -> Matrix:
    """The checked matrix of a file.

    Args:
        file: Its path.
        overrides: `dotted.path=VALUE` as for `load_spec`, put into every configuration.

    Raises:
        SpecError: All problems of the file, of the base, of the overrides and of every
            configuration, each with the file and line it comes from.
    """
    path = loading.find(file, search_path=())
    data, places, found = loading.content(path)
    _refuse_others(data, str(file))
    shape, wrong = _shape(data, places)
    found = [*found, *wrong]
    if shape is None:
        raise SpecError(ordered(found))
    base = named_base(path, shape.base, places)
    found += base.problems
    found += _forbidden(shape, places, overrides)
    specs: dict[str, Spec] = {}
    for name, changes in shape.configurations.items():
        merged, where = copy.deepcopy(base.data), Source(places.file)
        note_places(where, (), base.data, base.places, ())
        merge_into(merged, shape.common, where, (), places, ("common",))
        merge_into(merged, changes, where, (), places, ("configurations", name))
        if isinstance(merged.get("tracking", {}), dict):
            merged.setdefault("tracking", {}).setdefault("experiment", f"llp/{shape.name}")
        merged["name"] = name
        where.keys["name",] = where.values["name",] = places.keys["configurations", name]
        try:
            specs[name] = loading.checked(merged, where, overrides)
        except SpecError as error:
            found += error.problems
            continue
        searcher = specs[name].searcher.name
        if searcher not in SEARCHERS:
            text = (
                f"'{searcher}' suggests by results, so the trials of two configurations would not "
                f"be the same; a matrix needs one of: {', '.join(SEARCHERS)}"
            )
            found.append(specs[name].problem("searcher.name", text))
    if found:
        raise SpecError(ordered(found))
    return Matrix(shape.name, shape.title, places.file, specs)


def _refuse_others(data: Any, file: str) -> None:
    """Says which command a definition of something else belongs to."""
    if not isinstance(data, Mapping) or "configurations" in data:
        return
    for key, what, command in (
        ("studies", "several studies", "llp study"),
        ("runs", "a batch of trainings", "llp batch"),
        ("search_space", "one search", "llp search"),
    ):
        if key in data:
            text = f"this is the definition of {what}, not of a report matrix; run: {command}"
            raise SpecError([Problem(f"{text} {file}", file=file)])


def is_definition(name: str | None) -> bool:
    """Whether the argument of a command means a file, by its suffix, and not a study."""
    return name is not None and Path(name).suffix in (".yaml", ".yml") and not Path(name).is_dir()


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two specs as plain data, among what determines results.

    >>> differences({"seed": 0, "tier1": {"a": 1}}, {"seed": 0, "tier1": {"a": 2}})
    ['tier1.a (1 and 2)']
    """
    found = []
    left, right = _leaves(first), _leaves(second)
    name = right.get(("dataset", "name"))
    anywhere = name in registry.DATASETS and name != "image_folder"
    for path in dict.fromkeys([*left, *right]):
        if left.get(path) == right.get(path) or path[0] in _NOT_RESULTS:
            continue
        if path == ("dataset", "download") or (path == ("dataset", "root") and anywhere):
            continue
        values = (_short(side.get(path)) for side in (left, right))
        found.append(f"{'.'.join(path)} ({' and '.join(values)})")
    return found


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return wording.shown(value)
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]}...]"


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(value, Mapping):
        return {
            key: leaf for k, v in value.items() for key, leaf in _leaves(v, (*path, str(k))).items()
        }
    return {path: value}


@dataclass(frozen=True)
class Base:
    """An experiment to be changed: its content, where each part was written, its faults."""

    data: dict[str, Any]
    places: Source
    problems: list[Problem]


def named_base(file: Path, name: str, places: Source, at: Parts = ("base",)) -> Base:
    """The experiment that `name` means in `file`, where it stands at `at`.

    Raises:
        SpecError: There is none, or it cannot be read; the line that names it is given.
    """
    beside = file.parent / name
    try:
        found = beside if beside.is_file() else loading.find(name)
        return Base(*loading.content(found))
    except SpecError as error:
        if any(problem.line for problem in error.problems):
            raise
        # Not found, or no experiment at all: what is wrong is the line that names it.
        raise SpecError(
            [places.problem(at, f"{p.file}: {p.message}") for p in error.problems]
        ) from error


def _shape(data: dict[str, Any], places: Source) -> tuple[MatrixFile | None, list[Problem]]:
    try:
        return MatrixFile.model_validate(data), []
    except ValidationError as error:
        misplaced = "belongs into common: a matrix changes an experiment"
        return None, shape_problems(error, places, MatrixFile, misplaced)


def shape_problems(
    error: ValidationError, places: Source, shape: type[Frozen], misplaced: str
) -> list[Problem]:
    """What is wrong with the form of a file that changes experiments.

    Args:
        error: Of `shape.model_validate`.
        places: Where the parts of the file stand.
        shape: The form.
        misplaced: What is said of a section of an experiment at the top of the file.
    """
    problems = []
    for item in error.errors(include_url=False):
        path: Parts = tuple(item["loc"])
        if item["type"] == "extra_forbidden":
            text = unknown("key", path[-1], shape.model_fields)
            if path[-1] in Spec.model_fields:
                text = f"'{path[-1]}' {misplaced}"
            problems.append(places.problem(path, text, key=True))
        else:
            missing = item["type"] == "missing"
            problems.append(places.problem(path, wording.message(item), key=missing))
    return problems


def twins(names: Iterable[str], places: Source, at: Parts, what: str) -> list[Problem]:
    """A problem for every name, written under `at`, that differs from another in case only."""
    found, lower = [], dict[str, str]()
    for name in map(str, names):
        twin = lower.setdefault(name.lower(), name)
        if twin != name:
            text = f"'{name}' and '{twin}' differ in case only; their {what} would collide"
            found.append(places.problem((*at, name), text, key=True))
    return found


def _forbidden(shape: MatrixFile, places: Source, overrides: Sequence[str]) -> list[Problem]:
    found = []
    for key in shape.common:
        if key in _NAMED_HERE:
            text = f"'{key}' cannot be common: each configuration is named by its own key"
            found.append(places.problem(("common", key), text, key=True))
    for override in overrides:
        if override.partition("=")[0].strip() in _NAMED_HERE:
            key = override.partition("=")[0].strip()
            text = "each configuration is named by its own key"
            found.append(Problem(text, path=key, file=OVERRIDE))
    found += twins(shape.configurations, places, ("configurations",), "files")
    for name, changes in shape.configurations.items():
        path = ("configurations", name)
        for key in changes:
            if key in Spec.model_fields and key not in PER_CONFIGURATION:
                text = (
                    f"'{key}' belongs into common: configurations are compared trial by trial, so "
                    f"each may change {', '.join(PER_CONFIGURATION)} only"
                )
                found.append(places.problem((*path, key), text, key=True))
    return found


def merge_into(
    data: dict[str, Any],
    changes: Mapping[str, Any],
    where: Source,
    path: Parts,
    places: Source,
    prefix: Parts,
) -> None:
    """Puts `changes` into `data`; mappings are merged, other values and domains replaced."""
    for key, value in changes.items():
        here = (*path, key)
        old = data.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and path != ("search_space",):
            merge_into(old, value, where, here, places, prefix)
            continue
        data[key] = copy.deepcopy(value)
        for positions in (where.keys, where.values):
            for known in [k for k in positions if k[: len(here)] == here]:
                del positions[known]
        note_places(where, here, value, places, prefix)


def note_places(where: Source, path: Parts, value: Any, places: Source, prefix: Parts) -> None:
    """Remembers where `value`, which stood at `prefix + path`, and everything in it came from."""
    for known, noted in ((places.keys, where.keys), (places.values, where.values)):
        position = known.get((*prefix, *path))
        if position is not None:
            noted[path] = Position(position.line, position.column, position.file or places.file)
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        note_places(where, (*path, key), item, places, prefix)


def ordered(problems: Sequence[Problem]) -> list[Problem]:
    """Each problem once, by file and line, overrides last."""
    return sorted(
        dict.fromkeys(problems),
        key=lambda p: (p.file == OVERRIDE, p.file, p.line, p.column, p.path),
    )
