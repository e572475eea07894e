"""Small landscapes that take seconds: settings, a study made without Ray, a way to be killed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llp.analyses import sources
from llp.analyses.subject import Subject
from llp.analysis import Outcome, analyse
from llp.driver import ListedSource, ProbeSource, Study
from llp.probing.budgets import ladder
from llp.probing.promotion import DONE, Asha
from llp.records import Job, Rung
from llp.spec import Spec, digest
from llp.spec.domains import RandomSearch
from llp.spec.landscape import LandscapeSpec, load_landscape
from llp.tracking.ledger import Ledger
from llp.training.objective import TrainingObjective
from llp.workloads import load as load_data

EXPERIMENT: dict[str, Any] = {
    "dataset": {"name": "digits", "max_train_examples": 200},
    "model": {"name": "mlp", "options": {"width": 8, "depth": 1}},
    "training": {"epochs": 3, "batch_size": 32, "learning_rate": 0.05},
}
SMALL: dict[str, Any] = {
    "data": {"num_examples": 60},
    "spectrum": {"num_eigenvalues": 2, "num_probes": 4, "num_steps": 12},
    "sharpness": {"measures": ["sam", "noise"]},
    "surfaces": {"resolution": 5},
    "lines": {"resolution": 5},
    "connectivity": {"num_epochs": 2, "num_points": 5, "num_examples": 100},
    "output": {"pictures": [], "page": False},
}


def settings(folder: Path, *overrides: str, **sections: Any) -> LandscapeSpec:
    """A landscape file with small settings, sections merged into it."""
    content = copy.deepcopy({"experiment": EXPERIMENT, **SMALL})
    for name, section in sections.items():
        if isinstance(section, Mapping) and isinstance(content.get(name), dict):
            content[name].update(section)
        elif section is None:
            content.pop(name, None)
        else:
            content[name] = section
    content["output"]["folder"] = str(folder)
    return load_landscape(content, overrides)


def run(folder: Path, *overrides: str, on_event: Any = None, **sections: Any) -> Outcome:
    """The whole main path."""
    return analyse(settings(folder, *overrides, **sections), on_event=on_event)


def subject_of(spec: LandscapeSpec, folder: Path) -> Subject:
    """What `analyse` would look at."""
    return sources.open_subject(spec, folder, lambda event: None)


class KilledError(BaseException):
    """Stands for kill -9: nothing below may catch it."""


class KillAfter:
    """An `on_event` that dies at the `count`-th event of a kind."""

    def __init__(self, count: int, **wanted: Any) -> None:
        self.left, self.wanted = count, wanted
        self.events: list[Mapping[str, Any]] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)
        if all(event.get(key) == value for key, value in self.wanted.items()):
            self.left -= 1
            if self.left == 0:
                raise KilledError


def moved(model: nn.Module, *steps: tuple[float, torch.Tensor]) -> nn.Module:
    """A copy of the network with `sum c d` added to its weights, entry by entry."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        start = 0
        for parameter in twin.parameters():
            size = parameter.numel()
            for c, direction in steps:
                parameter += c * direction[start : start + size].view_as(parameter)
            start += size
    return twin


def mean_loss(model: nn.Module, batches: Any) -> tuple[float, float]:
    """Loss and accuracy over all examples at once, in float64."""
    inputs = torch.cat([x for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    with torch.no_grad():
        output = copy.deepcopy(model).double().eval()(inputs.double())
    loss = nn.functional.cross_entropy(output, targets)
    return float(loss), float((output.argmax(1) == targets).double().mean())


def make_study(root: Path, name: str = "study", **training: Any) -> Path:
    """A finished study of three trials, its jobs worked on in this process."""
    spec = Spec.model_validate(
        {
            "name": name,
            **EXPERIMENT,
            "training": {**EXPERIMENT["training"], **training},
            "search_space": {
                "learning_rate": {"type": "loguniform", "low": 0.01, "high": 0.1},
                "width": {"type": "integer", "low": 4, "high": 8},
            },
            "tier1": {"num_trials": 3, "data_fractions": [0.5, 1.0], "epochs": 2},
            "verification": {"top_k": 1, "num_seeds": 2},
        }
    )
    data = load_data(spec.dataset, spec.seed)
    folder = root / name
    rungs = ladder(spec.tier1.data_fractions, spec.rung_epochs(), len(data.train))
    study = Study(
        Ledger.create(
            folder,
            study_id=name,
            spec=spec.model_dump(mode="json"),
            spec_digest=digest(spec),
            rungs=rungs,
            num_train=len(data.train),
            num_validation=len(data.validation),
            dataset={"name": data.name, "digest": data.digest, "source": data.source},
        )
    )
    study.record("opened", host="here", pid=1, environment={})
    objective = TrainingObjective(spec, data, folder, "cpu")
    searcher = RandomSearch(spec.search_space, (), 0)
    _work(ProbeSource(study, scheduler=Asha(3, 2, 3), searcher=searcher, rungs=rungs), objective)
    full = Rung(3, 1.0, len(data.train), spec.training.epochs)
    trial = study.state.trials["t001"]
    jobs = [Job(f"t001-v{n}", "verify", trial, full, seed=11 + n) for n in range(2)]
    _work(ListedSource(study, jobs), objective)
    study.record("finished", winner="t001", winner_reason="it was told to", report=None)
    study.ledger.close()
    return folder


def _work(source: Any, objective: TrainingObjective) -> None:
    while (job := source.next_job()) != DONE:
        work = objective(job)
        while True:
            try:
                source.on_report(job, next(work))
            except StopIteration as stop:
                source.on_end(job, stop.value)
                break
