"""JSON Schemas of all kinds of files: experiments, batches, trainings, landscapes, and so on.

An editor gets completion and checks from them. They judge the form of a file; what its values mean
together (rungs, constraints, options of an optimizer) is judged by the loaders alone. Where a file
changes an experiment, its sections are those of the experiment without anything required.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from llp.errors import SpecError, unknown
from llp.spec.batch import BatchFile
from llp.spec.digest import json_schema
from llp.spec.evidence import EvidenceFile
from llp.spec.landscape import LandscapeSpec
from llp.spec.matrix import MatrixFile
from llp.spec.single import SEARCH_ONLY

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCALAR = {"type": ["number", "string", "boolean"]}


def file_schema(kind: str) -> Schema:
    """The schema of one kind of file: a key of `KINDS`.

    Raises:
        SpecError: There is no such kind; the message has the nearest.
    """
    if kind not in KINDS:
        raise SpecError(unknown("kind of file", kind, KINDS))
    return KINDS[kind]()


def _batch() -> Schema:
    schema, sections = BatchFile.model_json_schema(), _partial()
    for shape in ("RunSpec", "DefaultsSpec"):
        properties = schema["$defs"][shape]["properties"]
        for name in properties.keys() & sections["properties"].keys():
            if name not in ("constraints", "seed"):
                properties[name] = sections["properties"][name]
        values = sections["properties"]["search_space"]["additionalProperties"]
        properties["grid"]["additionalProperties"] = values
    return _joined(schema, sections)


def _train() -> Schema:
    schema = json_schema()
    for name in SEARCH_ONLY:
        del schema["properties"][name]
    one = {"type": "array", "items": SCALAR, "minItems": 1, "maxItems": 1}
    space = schema["properties"]["search_space"]
    space["additionalProperties"] = {"anyOf": [{"$ref": "#/$defs/Fixed"}, one, SCALAR]}
    space["description"] = "hyperparameter -> its one value"
    del space["minProperties"]
    schema["required"] = ["dataset", "model"]
    return schema


def _landscape() -> Schema:
    schema, sections = LandscapeSpec.model_json_schema(), _partial()
    # Both have an OutputSpec and a class of the same name must not take the other's place.
    for name in schema["$defs"].keys() & sections["$defs"].keys():
        sections = _renamed(sections, name, f"Experiment{name}")
    form = {"type": "object", "properties": sections["properties"], "additionalProperties": False}
    field = schema["properties"]["experiment"]
    field["anyOf"] = [{"type": "string"}, form, {"type": "null"}]
    return _joined(schema, sections)


def _report() -> Schema:
    schema, sections = MatrixFile.model_json_schema(), _partial()
    change = {"type": "object", "properties": sections["properties"], "additionalProperties": False}
    schema["properties"]["common"] |= change
    schema["properties"]["configurations"]["additionalProperties"] = change
    return _joined(schema, sections)


def _study() -> Schema:
    schema, sections = EvidenceFile.model_json_schema(), _partial()
    space = sections["properties"]["search_space"]["additionalProperties"]
    options = [
        sections["$defs"][section]["properties"][key]["additionalProperties"]
        for section, key in (("TrainingSpec", "optimizer_options"), ("ModelSpec", "options"))
    ]
    for values in (space, *options):  # a null takes out what the base has
        values["anyOf"] = [*values["anyOf"], {"type": "null"}]
    change = {"type": "object", "properties": sections["properties"], "additionalProperties": False}
    base = {"type": "string", "description": "experiment file that the study starts from"}
    study = {**change, "properties": {"base": base, **change["properties"]}, "required": ["base"]}
    schema["properties"]["common"] |= change
    schema["properties"]["studies"]["additionalProperties"] = study
    return _joined(schema, sections)


KINDS: dict[str, Callable[[], Schema]] = {
    "experiment": json_schema,
    "train": _train,
    "batch": _batch,
    "report": _report,
    "study": _study,
    "landscape": _landscape,
}
"""Kind of file -> its schema; all but `experiment` are named like the command that reads them."""


def _partial() -> Schema:
    """The schema of an experiment in which nothing is required, for files that change one."""
    schema = copy.deepcopy(json_schema())
    del schema["required"], schema["properties"]["search_space"]["minProperties"]
    for name, section in schema["$defs"].items():
        if name.endswith("Spec"):
            section.pop("required", None)
    return schema


def _joined(schema: Schema, sections: Schema) -> Schema:
    """`schema` with the definitions that what it took from `sections` refers to."""
    known = {**sections["$defs"], **schema.get("$defs", {})}
    wanted, seen = _referred(schema), set[str]()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            wanted |= _referred(known[name])
    definitions = {name: known[name] for name in sorted(seen)}
    return {"$schema": DIALECT, **schema, "$defs": definitions}


def _referred(node: Any) -> set[str]:
    """The definitions that a part of a schema names."""
    if isinstance(node, list):
        return set().union(*map(_referred, node)) if node else set()
    if not isinstance(node, dict):
        return {node.removeprefix("#/$defs/")} if _is_reference(node) else set()
    return set().union(*(_referred(part) for key, part in node.items() if key != "$defs"))


def _is_reference(node: Any) -> bool:
    return isinstance(node, str) and node.startswith("#/$defs/")


def _renamed(node: Any, old: str, new: str) -> Any:
    """A schema in which one definition is called otherwise."""
    if isinstance(node, list):
        return [_renamed(part, old, new) for part in node]
    if not isinstance(node, dict):
        return f"#/$defs/{new}" if node == f"#/$defs/{old}" else node
    found = {key: _renamed(part, old, new) for key, part in node.items()}
    if old in found.get("$defs", {}):
        found["$defs"][new] = found["$defs"].pop(old)
    return found
