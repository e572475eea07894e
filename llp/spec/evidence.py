"""The definition of an evidence run: several studies in which every configuration is trained fully.

A *study* here is a search without selection: every configuration gets the same probe (one rung,
nothing stopped), is measured by tier 2, and is then trained fully with every seed. So each way of
ranking by the probe can be held against what came of all of them. Studies may differ in everything,
the dataset too; each names the experiment that it starts from, and `common` holds for all. A null
takes a hyperparameter or an option of the base out.

The number of configurations measured and verified is always that of `tier1.num_trials`. Overrides
(`--set`) come last and hold for all studies.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from llp.errors import Problem, SpecError
from llp.spec import loading
from llp.spec.domains import Frozen
from llp.spec.matrix import (
    SEARCHERS,
    Matrix,
    merge_into,
    named_base,
    note_places,
    ordered,
    shape_problems,
    twins,
)
from llp.spec.schema import Spec
from llp.spec.source import Source

WITHOUT_SELECTION = {"scheduler": "fifo", "stop_rules": []}
"""Of `tier1`: what an evidence run needs, and has unless the file says otherwise."""

FOLDERS = (Path("reports"), Path(__file__).resolve().parents[2] / "reports")
"""Where a bare name is looked up."""

TAKEN_OUT_BY_NULL = (("search_space",), ("training", "optimizer_options"), ("model", "options"))
"""Where a null takes out what the base has."""


class EvidenceFile(Frozen):
    """What the file of an evidence run may say."""

    version: Literal[1] = Field(default=1, description="of this format")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of the folder of the page"
    )
    title: str = Field(default="", max_length=200, description="heading of the page")
    common: dict[str, Any] = Field(
        default_factory=dict, description="what all studies change of their base"
    )
    studies: dict[str, dict[str, Any]] = Field(
        min_length=1, description="name of the study -> base, and what it changes of that"
    )


def load_evidence(file: str | Path, overrides: Sequence[str] = ()) -> Matrix:
    """The checked studies of a file, as a matrix whose configurations are the studies.

    Args:
        file: Its path, or the name of a file in `reports/` here or in the checkout.
        overrides: `dotted.path=VALUE` as for `load_spec`, put into every study.

    Raises:
        SpecError: All problems of the file, of the bases, of the overrides and of every study, each
            with the file and line it comes from.
    """
    path = loading.find(file, search_path=FOLDERS)
    data, places, found = loading.content(path)
    try:
        shape = EvidenceFile.model_validate(data)
    except ValidationError as error:
        misplaced = "belongs into common, or into one of the studies"
        wrong = shape_problems(error, places, EvidenceFile, misplaced)
        raise SpecError(ordered([*found, *wrong])) from error
    specs: dict[str, Spec] = {}
    found += twins(shape.studies, places, ("studies",), "folders")
    for name, changes in shape.studies.items():
        where = ("studies", name)
        base = changes.get("base")
        if not isinstance(base, str):
            text = "missing key 'base': the experiment file that this study starts from"
            found.append(places.problem(where, text, key=True))
            continue
        try:
            specs[name] = _study(path, shape, name, base, places, overrides)
        except SpecError as error:
            found += error.problems
    for spec in specs.values():
        found += _selecting(spec)
    if found:
        raise SpecError(ordered(found))
    return Matrix(shape.name, shape.title, places.file, specs)


def _study(
    file: Path,
    shape: EvidenceFile,
    name: str,
    base: str,
    places: Source,
    overrides: Sequence[str],
) -> Spec:
    found = named_base(file, base, places, ("studies", name, "base"))
    if found.problems:
        raise SpecError(found.problems)
    merged, where = copy.deepcopy(found.data), Source(places.file)
    note_places(where, (), found.data, found.places, ())
    tier1 = merged.setdefault("tier1", {})
    if isinstance(tier1, dict):
        tier1.update(copy.deepcopy(WITHOUT_SELECTION))
    merge_into(merged, shape.common, where, (), places, ("common",))
    changes = {key: value for key, value in shape.studies[name].items() if key != "base"}
    merge_into(merged, changes, where, (), places, ("studies", name))
    for section in ("tier2", "verification"):
        if isinstance(merged.get(section), dict):
            merged[section].pop("top_k", None)
    for section_path in TAKEN_OUT_BY_NULL:
        _drop_nulls(merged, section_path)
    if isinstance(merged.get("tracking", {}), dict):
        merged.setdefault("tracking", {}).setdefault("experiment", f"llp/{shape.name}")
    merged["name"] = name
    where.keys["name",] = where.values["name",] = places.keys["studies", name]
    spec = loading.checked(merged, where, overrides)
    everyone = {
        section: getattr(spec, section).model_copy(update={"top_k": spec.tier1.num_trials})
        for section in ("tier2", "verification")
    }
    return spec.model_copy(update=everyone)


def _drop_nulls(data: dict[str, Any], path: tuple[str, ...]) -> None:
    node: Any = data
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict):
        for key in [key for key, value in node.items() if value is None]:
            del node[key]


def _selecting(spec: Spec) -> list[Problem]:
    """What would keep some configurations from being probed, or probed alike."""
    found = []
    tier1 = spec.tier1
    if tier1.scheduler != "fifo" or len(tier1.data_fractions) != 1:
        text = "every configuration needs the same probe: scheduler fifo and one data fraction"
        found.append(spec.problem("tier1.data_fractions", text))
    if tier1.stop_rules:
        text = "every configuration needs the same probe: no stop rule ([])"
        found.append(spec.problem("tier1.stop_rules", text))
    if spec.searcher.name not in SEARCHERS:
        text = (
            f"'{spec.searcher.name}' suggests by results, so the configurations would be chosen; "
            f"use one of: {', '.join(SEARCHERS)}"
        )
        found.append(spec.problem("searcher.name", text))
    return found
