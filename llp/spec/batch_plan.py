"""A checked batch -> the configurations it trains, and what they cost. Pure, known before it runs.

*Candidates* are the configurations that one is chosen from; *finals* are trained fully with every
seed; *variants* are what a study makes of the final configuration of its run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llp import registry
from llp.records import HyperparameterValue
from llp.spec.batch import BUDGET, Batch, Run, Study
from llp.spec.digest import digest
from llp.spec.schema import Spec

Kind = Literal["candidate", "final", "ablation", "sensitivity", "scaling"]


@dataclass(frozen=True)
class Configuration:
    """One way to train, apart from the seed.

    Attributes:
        configuration_id: Unique in the batch, fit for a file name.
        run: The run it belongs to.
        kind: What it is for.
        label: For people, unique among the configurations of its kind.
        hyperparameters: Spelled as in the file.
        data_fraction: Share of the training images.
        epochs: Of a full training.
        changed: For variants: what differs from the run's own configuration.
    """

    configuration_id: str
    run: str
    kind: Kind
    label: str
    hyperparameters: Mapping[str, HyperparameterValue]
    data_fraction: float
    epochs: int
    changed: Mapping[str, HyperparameterValue] = field(default_factory=dict)


def run_of(configuration_id: str) -> str:
    """The run that a configuration belongs to; names of runs have no dot.

    >>> run_of("talt.ablation-00")
    'talt'
    """
    return configuration_id.partition(".")[0]


def candidates(run: Run) -> list[Configuration]:
    """The configurations of a run, one of which is to be chosen; empty when nothing is chosen."""
    return _points(run, "candidate") if run.choose is not None else []


def finals(
    run: Run, chosen: Mapping[str, HyperparameterValue] | None = None
) -> list[Configuration]:
    """The configurations of a run that are trained fully.

    Args:
        run: The run.
        chosen: Hyperparameters of the chosen candidate, when one is chosen.
    """
    if run.choose is None:
        return _points(run, "final")
    if chosen is None:
        raise ValueError(f"the run {run.name} chooses among its configurations: say which")
    return [
        Configuration(
            run.name, run.name, "final", run.name, dict(chosen), run.data_fraction, _epochs(run)
        )
    ]


def _points(run: Run, kind: Kind) -> list[Configuration]:
    single = len(run.points) == 1
    letter = "k" if kind == "candidate" else "c"
    return [
        Configuration(
            run.name if single else f"{run.name}.{letter}{number:03d}",
            run.name,
            kind,
            run.name if single else f"{run.name}: {told({k: point.get(k) for k in run.varied})}",
            dict(point),
            run.data_fraction,
            _epochs(run),
        )
        for number, point in enumerate(run.points)
    ]


def variants(study: Study, run: Run, final: Configuration) -> list[Configuration]:
    """What `study` makes of the final configuration of its run, without that one itself.

    An ablation switches each part off alone, then all of them together.
    """
    changes: list[tuple[str, dict[str, HyperparameterValue]]] = []
    if study.kind == "ablation":
        off = {name: values[0] for name, values in study.parameters.items()}
        off = {name: value for name, value in off.items() if value != in_force(run, final, name)}
        changes = [(f"without {name}", {name: value}) for name, value in off.items()]
        if len(off) > 1:
            changes.append(("without " + " and ".join(off), off))
    else:
        for name, values in study.parameters.items():
            own = in_force(run, final, name)
            changes += [(told({name: v}), {name: v}) for v in values if v != own]
    made = []
    for number, (label, changed) in enumerate(changes):
        budget = {k: v for k, v in changed.items() if k in BUDGET}
        hyperparameters = {k: v for k, v in changed.items() if k not in BUDGET}
        made.append(
            Configuration(
                f"{run.name}.{study.kind}-{number:02d}",
                run.name,
                study.kind,
                f"{run.name} {label}",
                {**final.hyperparameters, **hyperparameters},
                float(budget.get("data_fraction", final.data_fraction)),
                int(budget.get("epochs", final.epochs)),
                changed,
            )
        )
    return made


def num_variants(study: Study) -> int:
    """How many configurations a study makes at most."""
    count = sum(len(values) for values in study.parameters.values())
    return count + 1 if study.kind == "ablation" and count > 1 else count


def own_value(
    spec: Spec, hyperparameters: Mapping[str, HyperparameterValue], name: str
) -> HyperparameterValue | None:
    """The value of `name` in force: of the configuration, the file, or the option's default."""
    if name in hyperparameters:
        return hyperparameters[name]
    if name == "model":
        return spec.model.name
    plain = spec.training.model_dump()
    if name in plain:
        value: HyperparameterValue | None = plain[name]
        return value
    for table, chosen, given in (
        ("optimizers", "optimizer", spec.training.optimizer_options),
        ("averagings", "averaging", spec.training.averaging_options),
        ("models", "model", spec.model.options),
    ):
        known = registry.options(table, str(own_value(spec, hyperparameters, chosen)))
        if name in known:
            found: HyperparameterValue | None = given.get(name, known[name])
            return found
    return None


def in_force(run: Run, configuration: Configuration, name: str) -> HyperparameterValue | None:
    """The value of a hyperparameter, `data_fraction` or `epochs` of a configuration."""
    if name == "data_fraction":
        return configuration.data_fraction
    if name == "epochs":
        return configuration.epochs
    return own_value(run.spec, configuration.hyperparameters, name)


def told(values: Mapping[str, HyperparameterValue | None]) -> str:
    """`learning_rate 0.1, width 8`.

    >>> told({"learning_rate": 0.1, "optimizer": "sgd"})
    'learning_rate 0.1, optimizer sgd'
    """
    parts = []
    for name, value in values.items():
        number = isinstance(value, float) and not isinstance(value, bool)
        parts.append(f"{name} {value:g}" if number else f"{name} {value}")
    return ", ".join(parts)


def experiment_of(run: Run) -> dict[str, Any]:
    """What of a run's experiment determines results, as plain data for the ledger."""
    return run.spec.model_dump(mode="json", include={"seed", "dataset", "model", "training"})


def fingerprint(experiment: Mapping[str, Any], configuration: Configuration) -> str:
    """sha256 of everything that determines the results of a configuration, apart from the seed.

    Args:
        experiment: Of `experiment_of`, of now or from a ledger. Settings that are newer than the
            ledger count with their defaults.
        configuration: Of that run.

    Returns:
        Empty when this version cannot read the experiment.
    """
    try:
        spec = Spec.model_validate(
            {**experiment, "name": "batch", "search_space": {"learning_rate": 0.1}}
        )
    except ValueError:
        return ""
    plain: list[Any] = [
        digest(spec),
        dict(configuration.hyperparameters),
        configuration.data_fraction,
        configuration.epochs,
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _epochs(run: Run) -> int:
    return run.spec.training.epochs


@dataclass(frozen=True)
class Cost:
    """What a part of a batch will do and spend when nothing fails.

    Attributes:
        name: The run, or the study of a run.
        configurations: Compared to choose one, or trained fully.
        trainings: Of all of them, seeds and repeats included.
        samples: Training examples in all gradients: SAM and ASAM take two of each example.
    """

    name: str
    configurations: int
    trainings: int
    samples: int


def costs(batch: Batch, num_train: Mapping[str, int]) -> list[Cost]:
    """The cost of every part of `batch`, in order.

    Args:
        batch: The batch.
        num_train: Run -> training images of its dataset, validation excluded.
    """
    found = []
    for name, run in batch.runs.items():
        chosen = candidates(run)
        if chosen and run.choose is not None:
            found.append(_cost(f"{name}: choose", run, chosen, run.choose.num_seeds, num_train))
        trained = finals(run, run.points[0]) if chosen else finals(run)
        found.append(_cost(name, run, trained, len(run.seeds) * run.repeats, num_train))
    for study in batch.studies:
        run = batch.runs[study.run]
        final = finals(run, run.points[0])[0]
        made = variants(study, run, final)
        each = len(run.seeds) * run.repeats
        found.append(_cost(f"{study.run}: {study.kind}", run, made, each, num_train))
    return found


def _cost(
    name: str,
    run: Run,
    configurations: Sequence[Configuration],
    each: int,
    num_train: Mapping[str, int],
) -> Cost:
    samples = 0
    for one in configurations:
        optimizer = own_value(run.spec, one.hyperparameters, "optimizer")
        gradients = 2 if optimizer in ("sam", "asam") else 1
        examples = round(one.data_fraction * num_train[run.name])
        samples += gradients * one.epochs * examples * each
    return Cost(name, len(configurations), len(configurations) * each, samples)
