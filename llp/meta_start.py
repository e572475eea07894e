"""Meta-learned warm start: from a folder of finished studies to the first configurations.

`searcher.warm_start.meta: {collection: FOLDER, count: 5}`. Every finished study in the folder gives
its configurations that the present search space can have, with their order;
`probing.meta_learning` proposes. All is read from the ledgers (JSON lines), nothing is unpickled. A
study that cannot be used is left out with a reason, which is recorded with the proposals. The study
that is being started is not looked at, though its folder is there already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llp.earlier_trials import fit, trials_of
from llp.errors import SpecError, StudyError
from llp.probing.meta_learning import MIN_TRIALS, PastStudy, propose
from llp.records import HyperparameterValue
from llp.spec import Spec
from llp.spec.domains import Choice, Domain, Fixed, LogUniform, Uniform, ordered
from llp.tracking.ledger import LEDGER_NAME, load_study

Floats = NDArray[np.float64]
Configuration = dict[str, HyperparameterValue]
Rows = list[tuple[Configuration, tuple[float, ...]]]
"""Configurations of a study that fit, with their ranks."""


@dataclass(frozen=True)
class Proposals:
    """What a collection says to try first.

    Attributes:
        first: Configurations, in order.
        studies: Names of those that were used.
        left_out: Name of a study that could not be used -> why.
        skipped: Why single configurations were left out -> how many.
    """

    first: tuple[Mapping[str, HyperparameterValue], ...]
    studies: tuple[str, ...]
    left_out: Mapping[str, str]
    skipped: Mapping[str, int]


def proposals(spec: Spec, own: Path | None = None) -> Proposals:
    """The configurations that the collection of `spec` proposes.

    Args:
        spec: The experiment; its `searcher.warm_start.meta` is set.
        own: Folder of the study that asks.

    Raises:
        SpecError: The folder is not there, or no study in it can be used.
    """
    asked = spec.searcher.warm_start
    assert asked is not None
    assert asked.meta is not None
    folder, path = Path(asked.meta.collection), "searcher.warm_start.meta.collection"
    if not folder.is_dir():
        raise SpecError([spec.problem(path, f"there is no folder '{folder}'")])
    ledgers = [
        ledger
        for ledger in sorted(folder.glob(f"*/{LEDGER_NAME}"))
        if own is None or ledger.parent.resolve() != own.resolve()
    ]
    if not ledgers:
        text = f"'{folder}' holds no study, that is no folder with a {LEDGER_NAME}"
        raise SpecError([spec.problem(path, text)])
    skipped: dict[str, int] = {}
    left_out: dict[str, str] = {}
    names: list[str] = []
    found: list[Rows] = []
    for ledger in ledgers:
        try:
            rows = _study(spec, ledger.parent, skipped)
        except _Unusable as why:
            left_out[ledger.parent.name] = str(why)
            continue
        names.append(ledger.parent.name)
        found.append(rows)
    if not names:
        counts = Counter(left_out.values()) + Counter(skipped)
        reasons = "; ".join(f"{why} ({times} times)" for why, times in counts.items())
        text = f"no study in '{folder}' can be used: {reasons}"
        raise SpecError([spec.problem(path, text)])
    pool: list[Configuration] = []
    for rows in found:
        for values, rank in rows:  # what diverged is evidence, and no proposal
            if rank[0] > -math.inf and values not in pool:
                pool.append(values)
    studies = [
        PastStudy(
            encode(spec.search_space, [values for values, _ in rows]),
            _order([rank for _, rank in rows]),
        )
        for rows in found
    ]
    chosen = propose(studies, encode(spec.search_space, pool), asked.meta.count)
    return Proposals(tuple(pool[index] for index in chosen), tuple(names), left_out, skipped)


def encode(
    space: Mapping[str, Domain], configurations: Sequence[Mapping[str, HyperparameterValue]]
) -> Floats:
    """[num_configurations, num_coordinates] in the unit cube.

    A number is at its place in its domain, on the domain's scale; a choice has a coordinate for
    each value, of size 1/sqrt(2), so that different values are 1 apart. A parameter that is not
    active is in the middle, or at no value. Fixed ones have no coordinate.
    """
    columns = []
    for name in ordered(space):
        domain = space[name]
        if isinstance(domain, Fixed):
            continue
        given = [values.get(name) for values in configurations]
        if isinstance(domain, Choice):
            columns += [
                [math.sqrt(0.5) * (value is not None and value == one) for value in given]
                for one in domain.values
            ]
        else:
            columns.append([0.5 if value is None else _place(domain, value) for value in given])
    return np.array(columns, dtype=np.float64).reshape(len(columns), len(configurations)).T


def _place(domain: Domain, value: HyperparameterValue) -> float:
    assert not isinstance(domain, Choice | Fixed)
    low, high, at = float(domain.low), float(domain.high), float(value)
    if isinstance(domain, LogUniform) or (not isinstance(domain, Uniform) and domain.log):
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if high > low else 0.5


class _Unusable(Exception):
    """Why a study is left out."""


def _study(spec: Spec, folder: Path, skipped: dict[str, int]) -> Rows:
    """What fits of a finished study."""
    asked = spec.searcher.warm_start
    assert asked is not None
    try:
        result = load_study(folder)
    except StudyError:
        raise _Unusable("its ledger cannot be read") from None
    if result.status != "finished":
        raise _Unusable("not finished")
    here = set(spec.search_space) | set(asked.ignore)
    rows: Rows = []
    for past in trials_of(result):
        if set(past.hyperparameters) - here:
            values, why = None, "a parameter that this search space does not have"
        else:
            values, why = fit(spec, past.hyperparameters)
        if values is None:
            skipped[why] = skipped.get(why, 0) + 1
        else:
            rows.append((values, past.rank))
    if len(rows) < MIN_TRIALS:
        raise _Unusable(f"fewer than {MIN_TRIALS} configurations that fit")
    return rows


def _order(ranks: Sequence[tuple[float, ...]]) -> Floats:
    """Ranks as numbers of the same order."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    return np.array([places[rank] for rank in ranks], dtype=np.float64)
