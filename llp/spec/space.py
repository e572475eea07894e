"""Checks of the search space: is every parameter read, possible, reachable and satisfiable?

A parameter is read when it is a field of `training` that may be searched, `model`, or an option of
an optimizer, averaging or model that can be chosen. One that only some of these read must say so
with `when`, or it would be drawn for trials that ignore it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import ValidationError

from llp import registry
from llp.errors import SpecError, unknown
from llp.records import HyperparameterValue
from llp.spec import options, wording
from llp.spec.constraints import ConstraintError, parse, same
from llp.spec.domains import (
    Choice,
    Domain,
    Fixed,
    GridSearch,
    Integer,
    LogUniform,
    RandomSearch,
    Uniform,
    as_list,
)
from llp.spec.schema import Spec, TrainingSpec

NUM_DRAWS = 10_000
"""Draws after which constraints that none satisfies are called contradictory."""

_NAMES = {
    "optimizer": "optimizers",
    "averaging": "averagings",
    "schedule": "schedules",
    "model": "models",
}
_NUMBERS = {
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "warmup_fraction": 0.0,
    "batch_size": 128,
    "label_smoothing": 0.0,
    "gradient_clip": 1.0,
}
SEARCHABLE = (*_NAMES, *_NUMBERS, "augmentation")
"""Parameters that are not options of an optimizer, averaging or model."""

_FIXED_FIELDS = {
    "epochs": "the rungs fix the epochs; set training.epochs or tier1.epochs",
    "optimizer_options": "search its entries by name, for example momentum",
    "averaging_options": "search its entries by name, for example ema_decay",
    "precision": "it cannot be searched; set training.precision",
    "compile": "it cannot be searched; set training.compile",
    "callbacks": "they watch and change nothing; set training.callbacks",
}

Finding = tuple[str, str]


def optimizers(spec: Spec) -> list[str]:
    """The optimizers a trial may use."""
    return _choices(spec, "optimizer", spec.training.optimizer)


def averagings(spec: Spec) -> list[str]:
    """The averagings a trial may use."""
    return _choices(spec, "averaging", spec.training.averaging)


def models(spec: Spec) -> list[str]:
    """The models a trial may use."""
    return _choices(spec, "model", spec.model.name)


def findings(spec: Spec) -> list[Finding]:
    """Path and message of everything wrong with `search_space` and `constraints`."""
    conditions = [*_conditions(spec.search_space)]
    found = [*conditions, *_read(spec, skip_conditions=bool(conditions))]
    found += _constraints(spec, found)
    return found


def grid_findings(spec: Spec) -> Iterator[Finding]:
    """What is wrong with a sound space as a grid."""
    try:
        points = GridSearch(spec.search_space, spec.constraints, spec.seed).num_points
    except SpecError as error:
        for problem in error.problems:
            yield problem.path, problem.message
        return
    if points != spec.tier1.num_trials:
        yield (
            "tier1.num_trials",
            f"the grid has {points} configurations and num_trials is {spec.tier1.num_trials}; "
            f"set num_trials: {points}",
        )


def _choices(spec: Spec, parameter: str, otherwise: str) -> list[str]:
    domain = spec.search_space.get(parameter)
    if domain is None:
        return [otherwise]
    values = domain.finite() if isinstance(domain, Choice | Fixed) else []
    here = [value for value in values if isinstance(value, str)]
    return list(dict.fromkeys([*here, otherwise] if domain.when else here))


def _read(spec: Spec, *, skip_conditions: bool) -> Iterator[Finding]:
    """Parameters nobody reads, or not always, or with impossible values."""
    readers: dict[str, dict[str, dict[str, Any]]] = {
        "optimizer": {name: options.known("optimizers", name) for name in optimizers(spec)},
        "averaging": {name: options.known("averagings", name) for name in averagings(spec)},
        "model": {name: options.known("models", name) for name in models(spec)},
    }
    if not all(readers.values()) or any(
        options.unusable(f"{kind}s", name) for kind, names in readers.items() for name in names
    ):
        readers = {}
    for name, domain in spec.search_space.items():
        path = f"search_space.{name}"
        if name in SEARCHABLE:
            yield from _values(path, domain, lambda value, name=name: _field_fault(name, value))
            if name in _NUMBERS:
                yield from _numeric(path, name, domain, _NUMBERS[name])
            if name == "warmup_fraction" and not skip_conditions:
                schedules = _choices(spec, "schedule", spec.training.schedule)
                takes = [schedule for schedule in schedules if schedule != "one_cycle"]
                yield from _always_read(spec, name, "schedule", schedules, takes)
            continue
        if name in _FIXED_FIELDS:
            yield path, f"nothing reads '{name}' here: {_FIXED_FIELDS[name]}"
            continue
        kinds = {
            kind: [owner for owner, taken in owners.items() if name in taken]
            for kind, owners in readers.items()
        }
        reading = [kind for kind, owners in kinds.items() if owners]
        if not readers:
            continue
        if not reading:
            yield path, _unread(name, spec, readers)
        elif len(reading) > 1:
            both = " and of ".join(f"{kind} {kinds[kind][0]}" for kind in reading)
            yield path, f"'{name}' is an option of {both}; rename the option of the model"
        else:
            kind = reading[0]
            default = readers[kind][kinds[kind][0]][name]
            of = partial(options.fault, name, default=default, table=f"{kind}s")
            yield from _values(path, domain, of)
            yield from _numeric(path, name, domain, default)
            if not skip_conditions:
                yield from _always_read(spec, name, kind, [*readers[kind]], kinds[kind])


def _values(path: str, domain: Domain, fault: Any) -> Iterator[Finding]:
    """What `fault` has to say on the listed values or the bounds of a domain."""
    if isinstance(domain, Choice):
        probes = [(f"{path}.values.{k}", value) for k, value in enumerate(domain.values)]
    elif isinstance(domain, Fixed):
        probes = [(f"{path}.value", domain.value)]
    else:
        probes = [(f"{path}.low", domain.low), (f"{path}.high", domain.high)]
    for place, value in probes:
        wrong = fault(value)
        if wrong and not (isinstance(domain, Uniform | LogUniform) and "whole number" in wrong):
            yield place, wrong


def _numeric(path: str, name: str, domain: Domain, default: Any) -> Iterator[Finding]:
    if type(default) is int and isinstance(domain, Uniform | LogUniform):
        log = ", log: true" if isinstance(domain, LogUniform) else ""
        yield (
            f"{path}.type",
            f"{name} needs whole numbers and {domain.type} draws fractions; "
            f"use {{type: integer, low: {domain.low:g}, high: {domain.high:g}{log}}}",
        )


def _field_fault(name: str, value: HyperparameterValue) -> str | None:
    """Why a field of `training`, or `model`, cannot have this value."""
    if name in _NAMES or name == "augmentation":
        if not isinstance(value, str):
            return f"must be a name, not {wording.shown(value)}"
        if name in _NAMES:
            return options.unusable(_NAMES[name], value)
        parts = [] if value in {"none", ""} else [part.strip() for part in value.split("+")]
        wrong = [fault for part in parts if (fault := options.unusable("augmentations", part))]
        return f"{wrong[0]} (join with '+', or none)" if wrong else None
    if name == "gradient_clip" and value == "none":
        return None
    wrong_type = options.fault(name, value, _NUMBERS[name])
    if wrong_type:
        return wrong_type
    try:
        TrainingSpec.model_validate({name: value})
    except ValidationError as error:
        return wording.message(error.errors(include_url=False)[0])
    return None


def _unread(name: str, spec: Spec, readers: Mapping[str, Mapping[str, Any]]) -> str:
    known = {
        *SEARCHABLE,
        *(o for owners in readers.values() for taken in owners.values() for o in taken),
    }
    guess = wording.suggest(name, known)
    if guess:
        return f"nothing reads '{name}'; did you mean '{guess}'?"
    owners = [
        f"{kind.removesuffix('s')} {row}"
        for kind in ("optimizers", "averagings", "models")
        for row, entry in registry.TABLES[kind].items()
        if entry.options.get(name) is not None  # None: only handed on to a base optimizer
    ]
    if owners:
        return (
            f"nothing reads '{name}': it is an option of {' and '.join(owners)}, and this file "
            f"uses {' or '.join(optimizers(spec))} and {' or '.join(models(spec))}"
        )
    return f"nothing reads '{name}'; choose of: {', '.join(sorted(known))}"


def _always_read(
    spec: Spec, name: str, kind: str, possible: Sequence[str], takes: Sequence[str]
) -> Iterator[Finding]:
    """Whether `name` is only active where the optimizer, model or schedule is one that takes it."""
    allowed = _allowed(spec.search_space, name, kind)
    active = [owner for owner in possible if allowed is None or owner in allowed]
    others = [owner for owner in active if owner not in takes]
    if not others:
        return
    path = f"search_space.{name}"
    if not takes:
        yield path, f"nothing reads '{name}': {kind} {' and '.join(others)} does not take it"
        return
    when = takes[0] if len(takes) == 1 else f"[{', '.join(takes)}]"
    yield (
        path,
        f"{kind} {' and '.join(others)} would not read '{name}'; add when: {{{kind}: {when}}}",
    )


def _allowed(space: Mapping[str, Domain], name: str, kind: str) -> set[Any] | None:
    """The values of `kind` for which `name` is active by its conditions; None: all."""
    limits: list[set[Any]] = []
    for parent, values in space[name].when.items():
        if parent == kind:
            limits.append(set(as_list(values)))
        elif parent != name and (above := _allowed(space, parent, kind)) is not None:
            limits.append(above)
    return set.intersection(*limits) if limits else None


def _conditions(space: Mapping[str, Domain]) -> Iterator[Finding]:
    """`when` that names no parameter, a value it never has, or goes round in a circle."""
    for name, domain in space.items():
        for parent, values in domain.when.items():
            path = f"search_space.{name}.when.{parent}"
            if parent not in space:
                yield path, f"{unknown('parameter', parent, set(space) - {name})} (of search_space)"
                continue
            if isinstance(space[parent], Uniform | LogUniform):
                yield (
                    path,
                    f"'{parent}' is a real number and never exactly one value; use constraints",
                )
                continue
            if not as_list(values):
                yield path, "needs at least one value"
            for value in as_list(values):
                if not _can_be(space[parent], value):
                    yield path, f"'{parent}' is never {wording.shown(value)}"
        circle = _circle(space, name)
        if circle and name == min(circle):
            way = " -> ".join([*circle, circle[0]])
            yield f"search_space.{name}.when", f"conditions go round in a circle: {way}"


def _can_be(domain: Domain, value: HyperparameterValue) -> bool:
    if isinstance(domain, Choice | Fixed):
        return any(same(value, one) for one in domain.finite())
    if isinstance(value, bool | str):
        return False
    return isinstance(domain, Integer) and value in domain.finite()


def _circle(space: Mapping[str, Domain], start: str) -> list[str] | None:
    """The parameters on a way from `start` back to it along `when`."""
    ways = [[start]]
    seen = set()
    while ways:
        way = ways.pop()
        for parent in space[way[-1]].when:
            if parent == start:
                return way
            if parent in space and parent not in seen:
                seen.add(parent)
                ways.append([*way, parent])
    return None


def _constraints(spec: Spec, before: Sequence[Finding]) -> list[Finding]:
    """What is wrong with the constraints, less what follows from the findings `before`."""
    misnamed = any("nothing reads" in message for _, message in before)
    found = []
    for k, text in enumerate(spec.constraints):
        path = f"constraints.{k}"
        try:
            names = parse(text).names
        except ConstraintError as error:
            found.append((path, f"'{text[:60]}' {error}"))
            continue
        for name in names:
            if name not in spec.search_space and not misnamed:
                message = f"{unknown('parameter', name, spec.search_space)} (of search_space)"
                if name in SEARCHABLE:
                    message = (
                        f"'{name}' is not in search_space; add it there, a single value will do"
                    )
                found.append((path, message))
        if not names:
            found.append((path, f"'{text[:60]}' names no parameter"))
    if spec.constraints and not found and not before:
        found += _satisfiable(spec)
    return found


def _satisfiable(spec: Spec) -> Iterator[Finding]:
    """Contradictions, found by drawing until one configuration passes or the budget is spent."""
    search = RandomSearch(spec.search_space, (), spec.seed)
    generator = np.random.default_rng([spec.seed, 0])
    constraints = [parse(text) for text in spec.constraints]
    once = [False] * len(constraints)
    num_passed = 0
    for draw in range(NUM_DRAWS):
        values = search.draw(generator)
        holds = []
        for k, constraint in enumerate(constraints):
            try:
                holds.append(constraint.holds(values))
            except ConstraintError as error:
                yield f"constraints.{k}", f"'{constraint.expression[:60]}': {error}"
                return
        once = [before or now for before, now in zip(once, holds, strict=True)]
        num_passed += all(holds)
        if num_passed and draw >= 100:
            return
    never = [k for k, held in enumerate(once) if not held]
    for k in never:
        text = constraints[k].expression[:60]
        yield f"constraints.{k}", f"'{text}' is contradictory: 0 of {NUM_DRAWS:,} draws satisfy it"
    if not never:
        yield "constraints", f"contradictory: 0 of {NUM_DRAWS:,} draws satisfy all of them"
