"""Warm start: what a search takes from earlier studies, `searcher.warm_start` in the file.

Their best configurations are tried first, and their results are told to TPE and GP. Everything is
read once, when the search starts, and written to its ledger: what comes of it later, or on another
machine, does not depend on the earlier studies any more.

Only configurations that the present search space can have are taken: every active parameter with a
value in its domain, constraints satisfied. A parameter of an earlier study that is missing here is
an error, because results at different values of it would look like chance; `ignore` allows it by
name. A whole folder of studies, `meta`, is asked for a portfolio instead (`llp.meta_start`), which
is tried before the best configurations of the studies that are named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llp.driver import ConfigurationSource, Study
from llp.earlier_trials import Past, budget, fit, read_trials
from llp.errors import Problem, SpecError, unknown
from llp.meta_start import proposals
from llp.records import EarlierResult, EarlierStudies, HyperparameterValue, from_plain
from llp.spec import Spec


@dataclass(frozen=True)
class WarmStart:
    """What is taken from earlier studies.

    Attributes:
        first: Configurations to try first, best first.
        earlier: Results to tell the searcher.
        studies: From which studies, and what was left out and why.
    """

    first: tuple[Mapping[str, HyperparameterValue], ...] = ()
    earlier: tuple[EarlierResult, ...] = ()
    studies: EarlierStudies = field(default_factory=EarlierStudies)


class StartsWith:
    """A searcher whose first trials are given; it needs no telling how they did."""

    num_points: int | None = None

    def __init__(
        self,
        searcher: ConfigurationSource,
        first: Sequence[Mapping[str, HyperparameterValue]],
    ) -> None:
        self._searcher, self._first = searcher, [dict(values) for values in first]

    def suggest(self, index: int) -> dict[str, HyperparameterValue]:
        """The configuration of trial `index`."""
        return (
            dict(self._first[index]) if index < len(self._first) else self._searcher.suggest(index)
        )


def warm_start(spec: Spec, study: Study | None = None) -> WarmStart:
    """What `spec` takes from earlier studies; from the ledger of `study` when it is there already.

    Args:
        spec: The experiment.
        study: The present study; what is read is recorded in it once.

    Raises:
        SpecError: A study cannot be found or read, or nothing of it fits the search space.
    """
    asked = spec.searcher.warm_start
    if asked is None:
        return WarmStart()
    for event in study.history if study is not None else ():
        if event["event"] == "warm_start":
            return WarmStart(
                tuple(event["first"]),
                tuple(from_plain(EarlierResult, one) for one in event["earlier"]),
                _studies(event),
            )
    found = _read(spec, study.ledger.path.parent if study is not None else None)
    if study is not None:
        study.record(
            "warm_start",
            first=found.first,
            earlier=found.earlier,
            studies=found.studies,
        )
    return found


def _read(spec: Spec, own: Path | None) -> WarmStart:
    asked = spec.searcher.warm_start
    assert asked is not None
    here = budget(spec.model_dump(mode="json"))
    usable: list[tuple[Past, dict[str, HyperparameterValue]]] = []
    skipped: dict[str, int] = {}
    first: list[dict[str, HyperparameterValue]] = []
    collected: tuple[str, ...] = ()
    left_out: Mapping[str, str] = {}
    if asked.meta is not None:
        proposed = proposals(spec, own)
        first += [dict(values) for values in proposed.first]
        skipped |= proposed.skipped
        collected, left_out = proposed.studies, proposed.left_out
    for number, name in enumerate(asked.studies):
        path = f"searcher.warm_start.studies.{number}"
        trials = list(read_trials(spec, name, path))
        _check_parameters(spec, trials, name, path)
        fitting = []
        for past in trials:
            values, why = fit(spec, past.hyperparameters)
            if values is None:
                skipped[why] = skipped.get(why, 0) + 1
            else:
                fitting.append((past, values))
        if not fitting:
            reasons = "; ".join(f"{why} ({num} times)" for why, num in skipped.items())
            text = f"no configuration of '{name}' fits this search space: {reasons or 'no trials'}"
            raise SpecError([spec.problem(path, text)])
        usable += fitting
    num_first = len(first) + asked.num_configurations
    by_study: dict[str, list[tuple[Past, dict[str, HyperparameterValue]]]] = {}
    for past, values in usable:
        by_study.setdefault(past.study, []).append((past, values))
    queues = [sorted(rows, key=lambda row: row[0].rank, reverse=True) for rows in by_study.values()]
    # In turn: accuracies of different studies do not say which of them is the better one.
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue) and len(first) < num_first:
                values = queue[place][1]
                if values not in first and queue[place][0].rank[0] > -math.inf:
                    first.append(values)
    earlier = [
        EarlierResult(past.study, past.trial_id, values, past.lowest, past.budget == here)
        for past, values in usable
        if asked.observations and math.isfinite(past.lowest)
    ]
    named = tuple(dict.fromkeys(past.study for past, _ in usable))
    used = (*collected, *(name for name in named if name not in collected))
    studies = EarlierStudies(used, left_out, skipped, len(first), len(earlier))
    return WarmStart(tuple(first), tuple(earlier), studies)


def _studies(event: Mapping[str, Any]) -> EarlierStudies:
    """What a `warm_start` line says of the studies; those of older versions tell less."""
    if "studies" in event:
        return from_plain(EarlierStudies, event["studies"])
    collected, skipped = tuple(event.get("collected", ())), event["skipped"]
    return EarlierStudies(collected, {}, skipped, len(event["first"]), len(event["earlier"]))


def _check_parameters(spec: Spec, trials: Sequence[Past], name: str, path: str) -> None:
    asked = spec.searcher.warm_start
    assert asked is not None
    there = {parameter for past in trials for parameter in past.hyperparameters}
    problems: list[Problem] = []
    for parameter in sorted(there - set(spec.search_space) - set(asked.ignore)):
        text = (
            f"'{name}' searched '{parameter}', which this search space does not have: "
            f"{unknown('parameter', parameter, spec.search_space)}; add it to search_space, or to "
            "searcher.warm_start.ignore if its value hardly matters"
        )
        problems.append(spec.problem(path, text))
    if problems:
        raise SpecError(problems)
