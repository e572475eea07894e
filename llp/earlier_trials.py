"""Trials of earlier studies, from a ledger or MLflow, and whether they fit a search space.

*Rank* orders the trials of one study: by mean validation accuracy of the full trainings where there
are any, then by the highest rung reached and the accuracy on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from llp.errors import SpecError, StudyError
from llp.records import HyperparameterValue, SearchResult
from llp.spec import Spec
from llp.spec.constraints import same, satisfied
from llp.spec.domains import Choice, Domain, Fixed, Integer, LogUniform, Uniform, declared, ordered
from llp.tracking.ledger import find_study, load_study

MLFLOW = "mlflow:"


@dataclass(frozen=True)
class Past:
    """One trial of an earlier study.

    Attributes:
        study: Name of the study.
        trial_id: Its trial.
        hyperparameters: As they were there; values of MLflow are text.
        rank: Larger is better, within the study.
        lowest: Validation accuracy at the end of the lowest rung, NaN without one.
        budget: What determines whether `lowest` compares with results here; None: unknown.
    """

    study: str
    trial_id: str
    hyperparameters: Mapping[str, Any]
    rank: tuple[float, ...]
    lowest: float
    budget: tuple[Any, ...] | None


def fit(spec: Spec, there: Mapping[str, Any]) -> tuple[dict[str, HyperparameterValue] | None, str]:
    """An earlier configuration in this search space, or None and why it cannot be there."""
    values: dict[str, HyperparameterValue] = {}
    for name in ordered(spec.search_space):
        domain = spec.search_space[name]
        if not domain.active(values):
            continue
        if name not in there:
            if not isinstance(domain, Fixed):
                return None, f"'{name}' was not searched there"
            values[name] = domain.value
            continue
        value = _within(domain, there[name])
        if value is None:
            return None, f"'{name}' outside its domain"
        values[name] = value
    if not satisfied(spec.constraints, values):
        return None, "a constraint is violated"
    return values, ""


def _within(domain: Domain, value: Any) -> HyperparameterValue | None:
    """`value`, a number or its text, as one of the domain; None when it is not."""
    if isinstance(domain, Choice | Fixed):
        listed = domain.finite()
        return next((v for v in listed if same(v, value) or str(v) == str(value)), None)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if isinstance(value, bool) or not domain.low <= number <= domain.high:
        return None
    if isinstance(domain, Integer) and (
        not number.is_integer() or int(number) not in domain.finite()
    ):
        return None
    if isinstance(domain, Uniform) and domain.step is not None:
        nearest = min(domain.finite(), key=lambda one: abs(one - number))
        return nearest if math.isclose(nearest, number, rel_tol=1e-9) else None
    assert isinstance(domain, Uniform | LogUniform | Integer)
    return declared(domain, number)


def read_trials(spec: Spec, name: str, path: str) -> Iterator[Past]:
    """The trials of an earlier study, from its ledger or from MLflow."""
    try:
        if name.startswith(MLFLOW):
            from llp.tracking.mlflow_tracker import read_trials as read_mlflow

            uri, _, study = name.removeprefix(MLFLOW).rpartition("#")
            if not uri or not study:
                text = f"'{name}' is not of the form mlflow:URI#STUDY"
                raise SpecError([spec.problem(path, text)])
            for row in read_mlflow(uri, study):
                yield Past(
                    study,
                    row.trial_id,
                    row.hyperparameters,
                    _rank(row.verified, row.rung, row.accuracy),
                    row.lowest,
                    None,
                )
            return
        folder = Path(name)
        if not (folder / "ledger.jsonl").is_file():
            folder = find_study(spec.output.root, name)
        yield from trials_of(load_study(folder))
    except StudyError as error:
        raise SpecError([spec.problem(path, str(error))]) from error


def trials_of(result: SearchResult) -> Iterator[Past]:
    """The trials of a study as its ledger tells them."""
    here = budget(result.spec) if "dataset" in result.spec else None
    verified: dict[str, list[float]] = {}
    for run in result.verifications:
        verified.setdefault(run.trial_id, []).append(run.validation_accuracy)
    lowest = min((rung.rung for rung in result.rungs), default=1)
    epochs = {rung.rung: rung.epochs for rung in result.rungs}
    for trial in result.trials:
        trial_id = trial.trial.trial_id
        finals = {
            curve.rung: curve.points[-1].validation_accuracy
            for curve in trial.curves
            if curve.points and curve.points[-1].epoch >= epochs[curve.rung]
        }
        usable = {rung: value for rung, value in finals.items() if math.isfinite(value)}
        top = max(usable, default=0)
        full = verified.get(trial_id, [])
        whole = fmean(full) if full else math.nan
        rank = _rank(whole, float(top), usable.get(top, math.nan))
        yield Past(
            result.study_id,
            trial_id,
            trial.trial.hyperparameters,
            rank,
            usable.get(lowest, math.nan),
            here,
        )


def _rank(verified: float, rung: float, accuracy: float) -> tuple[float, ...]:
    """Sort key of a trial, larger is better; -inf first when it has no usable result."""
    if math.isnan(accuracy):
        return (-math.inf, 0.0, 0.0)
    return (-1.0 if math.isnan(verified) else verified, rung, accuracy)


def budget(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    """What has to be equal for results of the lowest rungs of two studies to be comparable.

    Not the seed: another split into training and validation images moves all results alike.
    """
    tier1, training = spec.get("tier1", {}), dict(spec.get("training", {}))
    dataset = {k: v for k, v in spec["dataset"].items() if k not in ("root", "download")}
    epochs = tier1.get("epochs") or training.get("epochs")
    training.pop("callbacks", None)
    training.pop("epochs", None)
    return (
        dataset,
        spec.get("model"),
        training,
        (tier1.get("data_fractions") or [None])[0],
        epochs[0] if isinstance(epochs, list) else epochs,
    )
