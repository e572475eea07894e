"""One training as a file or as options: an experiment whose every value is fixed.

The keys are those of an experiment file. A `search_space` may be there when each entry is a single
value; sections that only a search reads are refused. Overrides may be short: `rho=0.1` is
`training.optimizer_options.rho=0.1` where the chosen optimizer takes a `rho`, and `epochs=30` is
`training.epochs=30`. A name that nothing reads is an error with the nearest one that is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llp import registry
from llp.errors import Problem, unknown
from llp.spec import loading, options
from llp.spec.digest import written
from llp.spec.schema import DatasetSpec, Spec, TrainingSpec
from llp.spec.source import OVERRIDE, Parts, Source, as_parts, parse, set_path

SEARCH_ONLY = ("constraints", "searcher", "tier1", "tier2", "score")
"""Sections of an experiment that no training reads."""

_LONG = {
    "dataset": ("dataset", "name"),
    "data_root": ("dataset", "root"),
    "model": ("model", "name"),
    "seeds": ("verification", "num_seeds"),
    "num_seeds": ("verification", "num_seeds"),
    "root": ("output", "root"),
    "mlflow": ("tracking", "mlflow"),
    **{
        name: ("dataset", name)
        for name in DatasetSpec.model_fields
        if name not in ("name", "options", "root")
    },
    **{name: ("training", name) for name in TrainingSpec.model_fields},
}
"""Short name -> where it is written."""

_OPTIONS = (
    ("optimizers", ("training", "optimizer_options")),
    ("averagings", ("training", "averaging_options")),
    ("models", ("model", "options")),
    ("datasets", ("dataset", "options")),
)


def load_training(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Spec:
    """The checked experiment of one training.

    Args:
        source: A file, a name from `search_spaces/`, the content as a mapping, or None for nothing
            but overrides.
        overrides: `path.to.key=VALUE` or `key=VALUE`, VALUE being YAML.

    Returns:
        A spec whose `search_space` is only there for its form: `training` and `model` hold all.

    Raises:
        SpecError: All problems, with file and line where there is one.
    """
    given: str | Path | Mapping[str, Any] = {} if source is None else source
    data, places, found = loading.content(given)
    found += _refused(data, places)
    for name in SEARCH_ONLY:
        data.pop(name, None)
    space = data.pop("search_space", None) or {}
    if not isinstance(space, Mapping):
        found.append(places.problem(("search_space",), "must map names to values"))
        space = {}
    later: list[tuple[str, Any, str]] = []
    for name, domain in space.items():
        value, fault = _single(domain)
        if fault:
            found.append(places.problem(("search_space", name), fault))
        elif name in _LONG:
            _move(data, places, name, value)
        else:
            later.append((name, value, places.file))
    for override in overrides:
        found += _override(data, places, override, later)
    unknown_rows = any(row and options.unusable(t, row) for t, row in _chosen(data).items())
    for name, value, file in later:
        path, fault = _option(data, name)
        if not fault:
            fault = set_path(data, path, value, places) or ""
        elif unknown_rows:
            continue  # an unknown optimizer has no options to judge by, and is reported itself
        if fault and file == OVERRIDE:
            found.append(Problem(fault, path=name, file=OVERRIDE))
        elif fault:
            found.append(places.problem(("search_space", name), fault))
    _fill(data)
    return loading.checked(data, places, (), found)


def to_training_yaml(spec: Spec) -> str:
    """YAML of a training with every value spelled out; `load_training` gives an equal spec of it.

    Args:
        spec: Made by `load_training`.
    """
    plain = spec.model_dump(mode="json", exclude_none=True, exclude={*SEARCH_ONLY, "search_space"})
    plain["verification"] = {"num_seeds": spec.verification.num_seeds}
    return written(plain)


def _refused(data: Mapping[str, Any], places: Source) -> Iterator[Problem]:
    for name in SEARCH_ONLY:
        if data.get(name):
            yield places.problem(
                (name,), "no training reads this section; it belongs to a search", key=True
            )


def _single(domain: Any) -> tuple[Any, str]:
    """The value of a fixed domain, or why it is none."""
    if isinstance(domain, Mapping):
        if domain.get("type") == "fixed" and "value" in domain:
            return domain["value"], ""
        kind = domain.get("type", "a domain")
        return None, f"is {kind}, and a training has one value; give it, or use --from STUDY"
    if isinstance(domain, list):
        if len(domain) == 1:
            return domain[0], ""
        return None, f"is a choice of {len(domain)}, and a training has one value; give it"
    return domain, ""


def _move(data: dict[str, Any], places: Source, name: str, value: Any) -> None:
    """Writes a fixed hyperparameter to where a training reads it, and keeps its place."""
    path: Parts = _LONG[name]
    if name == "augmentation" and isinstance(value, str):
        value = [] if value in ("none", "") else value.split("+")
    node = data
    for part in path[:-1]:
        node = node.setdefault(str(part), {})
    node[str(path[-1])] = value
    for noted in (places.keys, places.values):
        if ("search_space", name) in noted:
            noted[path] = noted["search_space", name]


def _override(
    data: dict[str, Any], places: Source, override: str, later: list[tuple[str, Any, str]]
) -> list[Problem]:
    dotted, sign, text = override.partition("=")
    name = dotted.strip()
    if not sign or not name or "" in as_parts(name):
        return [Problem(f"'{override}' is not of the form key=VALUE", file=OVERRIDE)]
    value, _, wrong = parse(text, OVERRIDE)
    if wrong:
        return [Problem(wrong[0].message, path=name, file=OVERRIDE)]
    if "." in name or (name in Spec.model_fields and name not in _LONG):
        path = as_parts(name)
        if str(path[0]) in SEARCH_ONLY or path[0] == "search_space":
            return [Problem("no training reads this", path=name, file=OVERRIDE)]
    elif name in _LONG:
        path = _LONG[name]
        if name == "augmentation" and isinstance(value, str):
            value = [] if value in ("none", "") else re.split(r"[+,]", value)
    else:
        later.append((name, value, OVERRIDE))
        return []
    fault = set_path(data, path, value, places)
    return [Problem(fault, path=name, file=OVERRIDE)] if fault else []


def _chosen(data: Mapping[str, Any]) -> dict[str, str]:
    """Table -> the row that is chosen so far."""

    def inside(section: str, key: str, default: str) -> str:
        part = data.get(section)
        found = part.get(key, default) if isinstance(part, Mapping) else default
        return found if isinstance(found, str) else default

    fields = TrainingSpec.model_fields
    return {
        "optimizers": inside("training", "optimizer", fields["optimizer"].default),
        "averagings": inside("training", "averaging", fields["averaging"].default),
        "models": inside("model", "name", ""),
        "datasets": inside("dataset", "name", ""),
    }


def _option(data: Mapping[str, Any], name: str) -> tuple[Parts, str]:
    """Where the option `name` of a chosen row is written, or why it is nowhere."""
    chosen = _chosen(data)
    rows = {table: options.known(table, row) for table, row in chosen.items() if row}
    readers = [(table, path) for table, path in _OPTIONS if name in rows.get(table, ())]
    if len(readers) == 1:
        return (*readers[0][1], name), ""
    if readers:
        places = " or ".join(".".join((*path, name)) for _, path in readers)
        return (), f"two of the chosen read '{name}'; write {places}"
    known = {*_LONG, *(set(Spec.model_fields) - set(SEARCH_ONLY) - {"search_space", "version"})}
    for row in rows.values():
        known |= set(row)
    text = unknown("option", name, known)
    owner = [row for row in _owners(name) if row not in chosen.values()]
    if owner and "did you mean" not in text:
        return (), f"'{name}' is an option of {', '.join(owner)}, which is not chosen"
    return (), text


def _owners(name: str) -> Iterator[str]:
    for table, _ in _OPTIONS:
        for row, entry in registry.entries(table).items():
            if name in entry.options:
                yield row


def _fill(data: dict[str, Any]) -> None:
    """What an experiment must have and a training need not say."""
    chosen = _chosen(data)
    if "name" not in data:
        name = f"{chosen['datasets']}-{chosen['models']}-{chosen['optimizers']}"
        data["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64]
    training = data.get("training")
    rate = training.get("learning_rate") if isinstance(training, Mapping) else None
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        rate = TrainingSpec.model_fields["learning_rate"].default
    data["search_space"] = {"learning_rate": rate}
    data["tier2"] = {"top_k": 0}
    verification = data.setdefault("verification", {})
    if isinstance(verification, dict):
        verification.setdefault("num_seeds", 1)


__all__ = ["SEARCH_ONLY", "load_training", "to_training_yaml"]
