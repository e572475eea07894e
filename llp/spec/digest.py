"""A spec as text: its digest, its YAML, and the JSON Schema of all specs.

The digest names what determines the results. It leaves out what only says where things run and
lie: `resources`, `tracking`, `output`, `name`, `dataset.download`, and `dataset.root` of datasets
that are the same everywhere; and `training.callbacks`, which only watch. It does not depend on the
order of keys in the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from llp import registry
from llp.errors import SpecError
from llp.spec.schema import Spec

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ELSEWHERE = {"resources", "tracking", "output", "name"}


def digest(spec: Spec) -> str:
    """sha256, in hexadecimal, of everything in `spec` that determines results."""
    plain = spec.model_dump(mode="json", exclude=_ELSEWHERE)
    del plain["dataset"]["download"]
    if spec.dataset.max_test_examples is None:  # came later: files without it keep their digest
        del plain["dataset"]["max_test_examples"]
    del plain["training"]["callbacks"]  # they change no result
    if spec.training.best_weights != "use":  # kept beside, they change no result
        del plain["training"]["best_weights"]
    if spec.training.averaging == "none":  # came later: files without it keep their digest
        del plain["training"]["averaging"], plain["training"]["averaging_options"]
    if not spec.tier1.warmup_fraction:  # likewise; 0 is no minimum either
        del plain["tier1"]["warmup_fraction"]
    if spec.tier2.tie_break == "off":  # likewise
        del plain["tier2"]["tie_break"], plain["tier2"]["calibration"]
    if not spec.verification.race:
        for key in ("race", "max_seeds", "error_rate", "margin"):
            del plain["verification"][key]
    if not spec.objectives:
        del plain["objectives"]
    if spec.searcher.proxy is None:
        del plain["searcher"]["proxy"]
    if spec.searcher.warm_start is None:
        del plain["searcher"]["warm_start"]
    elif spec.searcher.warm_start.meta is None:
        del plain["searcher"]["warm_start"]["meta"]
    for domain in plain["search_space"].values():
        if domain["prior"] is None:
            del domain["prior"]
    if spec.dataset.name in registry.DATASETS and spec.dataset.name != "image_folder":
        del plain["dataset"]["root"]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def completed_digest(plain: Mapping[str, Any]) -> str:
    """The digest of a spec that a study has stored, empty when this version cannot read it.

    Settings that are newer than the study count with their defaults, so a study from before an
    upgrade is recognised by the file it was started with.
    """
    try:
        return digest(Spec.model_validate(plain))
    except ValueError:
        return ""


def study_name(spec: Spec, name: str | None = None) -> str:
    """The id of the study that a search of `spec` makes: `name`, by default name and digest.

    Raises:
        SpecError: `name` cannot name a folder.
    """
    return f"{spec.name}-{digest(spec)[:8]}" if name is None else checked_name(name)


def checked_name(name: str) -> str:
    """`name`, which can name a study and its folder.

    Raises:
        SpecError: It cannot.
    """
    if not STUDY_NAME.fullmatch(name):
        raise SpecError(
            f"'{name}' cannot name a study: letters, digits, '.', '_' and '-' only, starting "
            "with a letter or digit; the folder it goes to is output.root"
        )
    return name


def to_yaml(spec: Spec) -> str:
    """YAML with every value of `spec` spelled out; loads back to an equal spec."""
    plain = spec.model_dump(mode="json", exclude_none=True)
    for domain in plain["search_space"].values():
        if not domain["when"]:
            del domain["when"]
    return written(plain)


def written(plain: Mapping[str, Any]) -> str:
    """Plain data as YAML, its sections as blocks with one line a value."""
    out = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    yaml.dump(_laid_out(dict(plain), depth=0), out)
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
        ("TrainingSpec", "averaging", "averagings"),
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
