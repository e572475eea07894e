"""A spec as text: its digest, its YAML, and the JSON Schema of all specs.

The digest names what determines the results. It leaves out what only says where things run and
lie: `resources`, `tracking`, `output`, `name`, `dataset.download`, and `dataset.root` of datasets
that are the same everywhere. It does not depend on the order of keys in the file.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from llp import registry
from llp.spec.schema import Spec

_ELSEWHERE = {"resources", "tracking", "output", "name"}


def digest(spec: Spec) -> str:
    """sha256, in hexadecimal, of everything in `spec` that determines results."""
    plain = spec.model_dump(mode="json", exclude=_ELSEWHERE)
    del plain["dataset"]["download"]
    if spec.dataset.name in registry.DATASETS and spec.dataset.name != "image_folder":
        del plain["dataset"]["root"]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(spec: Spec) -> str:
    """YAML with every value of `spec` spelled out; loads back to an equal spec."""
    plain = spec.model_dump(mode="json", exclude_none=True)
    for domain in plain["search_space"].values():
        if not domain["when"]:
            del domain["when"]
    out = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    yaml.dump(_laid_out(plain, depth=0), out)
    return out.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON Schema of experiment files, for completion and checks in an editor."""
    schema = Spec.model_json_schema()
    scalar = {"type": ["number", "string", "boolean"]}
    space = schema["properties"]["search_space"]
    space["additionalProperties"] = {
        "anyOf": [
            space["additionalProperties"],
            {"type": "array", "items": scalar, "minItems": 1},
            scalar,
        ]
    }
    sections = schema["$defs"]
    for section, key, table in (
        ("DatasetSpec", "name", "datasets"),
        ("ModelSpec", "name", "models"),
        ("TrainingSpec", "optimizer", "optimizers"),
        ("TrainingSpec", "schedule", "schedules"),
        ("SearcherSpec", "name", "searchers"),
        ("Tier1Spec", "scheduler", "schedulers"),
    ):
        field = sections[section]["properties"][key]
        del field["type"]
        outside = {"type": "string", "pattern": "^[^:]+:[^:]+$"}
        field["anyOf"] = [{"enum": sorted(registry.entries(table))}, outside]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _laid_out(value: Any, depth: int) -> Any:
    """`value` with sections as blocks and everything below on one line."""
    if isinstance(value, dict):
        mapping = CommentedMap((key, _laid_out(item, depth + 1)) for key, item in value.items())
        if depth >= 2 or not value:
            mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, list):
        sequence = CommentedSeq(_laid_out(item, depth + 1) for item in value)
        sequence.fa.set_flow_style()
        return sequence
    return value
