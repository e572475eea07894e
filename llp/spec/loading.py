"""An experiment file with its overrides -> a checked `Spec`, or everything that is wrong with it.

The steps: find the file, read it as YAML with places (`source`), put the overrides in, check its
shape (`schema`), check its names and its search space (`checks`). The problems of all steps come
together in one `SpecError`, in the order of the file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llp.errors import Problem, SpecError, nearest
from llp.spec import checks, wording
from llp.spec.schema import Spec
from llp.spec.source import OVERRIDE, Parts, Source, as_parts, parse, read, set_path

FOLDER = "search_spaces"
"""Folder in which a bare name is looked up."""
_SUFFIXES = (".yaml", ".yml")


def load_spec(
    source: str | Path | Mapping[str, Any] | Spec,
    overrides: Sequence[str] = (),
    *,
    search_path: Sequence[Path | str] | None = None,
    stored: bool = False,
) -> Spec:
    """The checked spec of an experiment file.

    Args:
        source: A path, a name to be found in `search_path`, or the content as a mapping or `Spec`.
        overrides: `dotted.path=VALUE`, VALUE being YAML: `tier1.num_trials=8`.
        search_path: Folders for bare names; by default `search_spaces/` here, then the shipped one.
        stored: A study began with it, under an older version perhaps; what was legal then still is.

    Raises:
        SpecError: All problems of the file, the overrides and the names in it, ordered by line.
    """
    data, places, found = content(source, search_path)
    return checked(data, places, overrides, found, stored=stored)


def checked(
    data: dict[str, Any],
    places: Source,
    overrides: Sequence[str] = (),
    found: Sequence[Problem] = (),
    *,
    stored: bool = False,
) -> Spec:
    """The checked spec of content that was read already.

    Args:
        data: The content; the overrides are put into it.
        places: Where its parts were written.
        overrides: As for `load_spec`.
        found: What is known to be wrong with it.
        stored: As for `load_spec`.

    Raises:
        SpecError: All problems, `found` among them.
    """
    found = [*found, *override(data, overrides, places)]
    spec, wrong = _validated(data, places)
    found += [problem for problem in wrong if not _explained(problem, found)]
    if spec is None:
        spec = _what_is_left(data, wrong)
        if spec is not None:
            damaged = {problem.path.split(".")[0] for problem in found}
            found += checks.problems(spec, places, damaged=damaged, stored=stored)
    else:
        found += checks.problems(spec, places, stored=stored)
    if found or spec is None:
        raise SpecError(sorted(dict.fromkeys(found), key=_order))
    spec._source = places
    return spec


def shipped_folders() -> list[Path]:
    """Where the files of `search_spaces/` lie: in the checkout, or where the wheel put them."""
    folders = [Path(__file__).resolve().parents[2] / FOLDER]
    try:
        files = metadata.files("llp") or []
    except metadata.PackageNotFoundError:
        files = []
    folders += [
        Path(str(file.locate())).resolve().parent
        for file in files
        if file.parent.name == FOLDER and file.suffix in _SUFFIXES
    ][:1]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def names(search_path: Sequence[Path | str] | None = None) -> dict[str, Path]:
    """Name -> file of everything in the search path; earlier folders win."""
    folders = search_path if search_path is not None else [Path(FOLDER), *shipped_folders()]
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.suffix in _SUFFIXES:
                    found.setdefault(path.stem, path)
    return found


def find(name: str | Path, search_path: Sequence[Path | str] | None = None) -> Path:
    """The file that `name` means: a path, else NAME or NAME.yaml in the search path.

    Raises:
        SpecError: There is none; the message has the nearest name.
    """
    path = Path(name)
    if path.exists():
        return path
    known = names(search_path)
    bare = path.name.removesuffix(".yaml").removesuffix(".yml")
    if path.parent == Path() and bare in known:
        return known[bare]
    beside = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
    local = {str(file): file for file in beside if file.suffix in _SUFFIXES}
    guess = nearest(str(name), local) or nearest(bare, known)
    shipped = f"shipped: {', '.join(sorted(known))}" if known else "give the path of a file"
    hint = f"did you mean '{guess}'?" if guess else shipped
    raise SpecError([Problem(f"no such file; {hint}", file=str(name))])


def content(
    source: str | Path | Mapping[str, Any] | Spec,
    search_path: Sequence[Path | str] | None = None,
) -> tuple[dict[str, Any], Source, list[Problem]]:
    """What `source` holds, where each part was written, and what is wrong with it as YAML.

    Raises:
        SpecError: It cannot be read to its end, or holds no mapping.
    """
    if isinstance(source, Spec):
        given = source.model_dump(exclude_unset=True)
        given["search_space"] = source.model_dump(include={"search_space"})["search_space"]
        return given, Source(), []
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), Source(), []
    path = find(source, search_path)
    shown = _shown(path)
    data, places, found = parse(read(path, shown), shown)
    if not isinstance(data, dict):
        if not found:
            what = "is empty" if data is None else f"holds {wording.shown(data)}"
            found = [Problem(f"{what}; an experiment is a mapping of keys to values", file=shown)]
        raise SpecError(found)
    if any(not problem.path for problem in found):  # not readable to its end
        raise SpecError(sorted(found, key=_order))
    return data, places, found


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def override(data: dict[str, Any], overrides: Sequence[str], places: Source) -> list[Problem]:
    """Puts `overrides` into `data`; what is wrong with them."""
    found = []
    for given in overrides:
        dotted, sign, text = given.partition("=")
        path = as_parts(dotted.strip())
        if not sign or "" in path:
            message = f"'{given}' is not of the form path.to.key=VALUE"
            found.append(Problem(message, file=OVERRIDE))
            continue
        value, _, wrong = parse(text, OVERRIDE)
        fault = wrong[0].message if wrong else set_path(data, path, value, places)
        if fault:
            found.append(Problem(fault, path=dotted.strip(), file=OVERRIDE))
    return found


def _validated(data: dict[str, Any], places: Source) -> tuple[Spec | None, list[Problem]]:
    try:
        return Spec.model_validate(data), []
    except ValidationError as error:
        return None, wording.problems(error, data, places)


def _explained(problem: Problem, found: Iterable[Problem]) -> bool:
    """Whether a problem of the YAML itself already covers `problem`."""
    return any(
        other.path and (problem.path == other.path or problem.path.startswith(other.path + "."))
        for other in found
    )


def _what_is_left(data: dict[str, Any], wrong: Sequence[Problem]) -> Spec | None:
    """The spec without its wrong parts, so that the names in the rest can be checked too."""
    rest = copy.deepcopy(data)
    for problem in wrong:
        path = as_parts(problem.path)
        _drop(rest, path[:2] if path[0] == "search_space" else path)
    rest.setdefault("name", "unnamed")
    if not rest.get("search_space"):
        rest["search_space"] = {"learning_rate": 0.1}  # not looked at: the section is damaged
    try:
        return Spec.model_validate(rest)
    except ValidationError:
        return None


def _drop(data: dict[str, Any], path: Parts) -> None:
    node: Any = data
    for part in path[:-1]:
        if not isinstance(node, dict) or not isinstance(node.get(str(part)), dict):
            break
        node = node[str(part)]
    else:
        node.pop(str(path[-1]), None)
        return
    if isinstance(node, dict):
        node.pop(str(part), None)  # a list with a wrong entry goes as a whole


def _order(problem: Problem) -> tuple[bool, int, int, str]:
    return problem.file == OVERRIDE, problem.line, problem.column, problem.path
