"""Ledgers of batches made up without training, for tests of what is made from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llp.batch import _definition, _job
from llp.records import (
    CurvePoint,
    JobEnd,
    Observation,
    Verification,
    to_plain,
)
from llp.spec.batch import Batch, load_batch
from llp.spec.batch_plan import candidates, finals, in_force, own_value, variants
from llp.tracking.ledger import Ledger

DEFAULT = """\
version: 1
name: made_up
title: "Made up: which helps?"
base: digits
defaults: {seeds: 5, choose: {}, training: {epochs: 4}}
runs:
  sgd: {grid: {learning_rate: [0.03, 0.1, 0.3]}}
  good: {parameters: {optimizer: sam}, grid: {learning_rate: [0.03, 0.1, 0.3]}}
  same: {parameters: {optimizer: talt, learning_rate: 0.1}}
  mlp: {model: {name: mlp, options: {depth: 1}}, parameters: {learning_rate: 0.1, width: 32}}
  mlp_sam: {model: {name: mlp, options: {depth: 1}}, parameters: {optimizer: sam, width: 32}}
ablation: {same: {smoothing_factor: 0, valley_strength: 0}}
sensitivity: {same: {valley_strength: [0.5, 1, 2]}}
scaling: {sgd: {width: [8, 16], data_fraction: [0.25, 0.5]}}
"""
LEVELS = {"a": 0.9, "sgd": 0.9, "good": 0.95, "same": 0.9005, "mlp": 0.85, "mlp_sam": 0.86}


class Images:
    """Stands for a dataset: nothing but its sizes is asked for."""

    name, digest, source, num_classes = "digits", "0" * 64, "made up", 10
    train, validation, test = range(1000), range(200), range(400)


def make_batch(folder: Path, text: str = DEFAULT) -> Batch:
    path = folder / "made_up.yaml"
    path.write_text(text)
    return load_batch(path, [f"defaults.output.root={folder / 'batches'}"])


def make_ledger(
    folder: Path,
    *,
    text: str = DEFAULT,
    levels: Mapping[str, float] = LEVELS,
    bad: Sequence[str] = (),
    finished: bool = True,
    seed: int = 0,
) -> Batch:
    """A batch with its ledger: accuracies around `levels`, with what seeds share and what not.

    Args:
        folder: Where.
        text: The definition.
        levels: Run -> mean accuracy.
        bad: Ids of jobs that diverge.
        finished: Whether the last line is there.
        seed: Of the accuracies.
    """
    batch = make_batch(folder, text)
    data: Any = dict.fromkeys(batch.runs, Images())
    generator = np.random.default_rng(seed)
    shared = generator.normal(0, 0.01, 100)
    with _Lines(batch) as ledger:
        ledger.append("opened", host="h", pid=1)
        ledger.append("batch", batch=_definition(batch, data, list(batch.runs)), command="llp")
        trained = []
        for run in batch.runs.values():
            best = run.points[len(run.points) // 2]
            made = candidates(run)
            for k, one in enumerate(made):
                level = levels[run.name] - 0.02 * abs(k - len(made) // 2)
                _one(ledger, batch, one, _job(one, "probe", 99, 0, 1000), level, 0, bad)
            if made:
                results = {
                    one.configuration_id: [levels[run.name] - 0.02 * abs(k - len(made) // 2), 0.1]
                    for k, one in enumerate(made)
                }
                chosen = made[len(made) // 2].configuration_id
                ledger.append("chosen", run=run.name, configuration_id=chosen, results=results)
            trained += finals(run, best)
        by_run = {one.run: one for one in trained}
        for study in batch.studies:
            trained += variants(study, batch.runs[study.run], by_run[study.run])
        for one in trained:
            run = batch.runs[one.run]
            for place, seed_ in enumerate(run.seeds):
                level = levels[one.run] - (0.03 if one.changed else 0)
                level += shared[place] + generator.normal(0, 0.002)
                _one(ledger, batch, one, _job(one, "verify", seed_, 0, 1000), level, place, bad)
        if finished:
            ledger.append("finished", winner=None, winner_reason="")
    return batch


class _Lines:
    """Collects events and writes them all at once: an fsync a line would take seconds."""

    def __init__(self, batch: Batch) -> None:
        self._folder, self._name = batch.folder, batch.name
        self._spec = next(iter(batch.runs.values())).spec.model_dump(mode="json")
        self._events: list[tuple[str, dict[str, Any]]] = []

    def append(self, event: str, **payload: Any) -> None:
        self._events.append((event, payload))

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        header = {"kind": "batch", "spec": self._spec, "spec_digest": "", "environment": {}}
        with Ledger.create(self._folder, study_id=self._name, **header) as ledger:
            ledger.append_many(self._events)


def _one(
    ledger: _Lines, batch: Batch, one: Any, job: Any, level: float, place: int, bad: Sequence[str]
) -> None:
    run = batch.runs[one.run]
    names = [n for s in batch.studies if s.run == one.run for n in s.parameters]
    if place == 0:
        ledger.append(
            "configuration",
            configuration=one,
            settings={
                key: own_value(run.spec, one.hyperparameters, key)
                for key in ("model", "optimizer", "averaging", "learning_rate", "batch_size")
            },
            own={name: in_force(run, one, name) for name in names},
        )
    ledger.append("job", job=job)
    note = json.dumps({"seed": job.seed})
    said = Observation("configuration", job.job_id, job.trial.trial_id, 0, 0, {}, note=note)
    ledger.append("observation", observation=said)
    outcome = "diverged" if job.job_id in bad else "completed"
    samples = job.rung.num_examples * job.rung.epochs
    if outcome == "completed":
        for epoch in range(1, job.rung.epochs + 1):
            accuracy = level * (1 - 0.5**epoch)
            point = CurvePoint(
                job.rung.rung,
                job.rung.data_fraction,
                epoch,
                epoch * job.rung.num_examples,
                1 - accuracy,
                accuracy,
                1 - accuracy,
                accuracy,
                float(epoch),
            )
            ledger.append(
                "point", job_id=job.job_id, trial_id=job.trial.trial_id, kind=job.kind, point=point
            )
        if job.kind == "verify":
            result = Verification(
                job.trial.trial_id, job.seed, level, 1 - level, level, 1 - level, 400, samples, 4.0
            )
            ledger.append("verification", job_id=job.job_id, verification=result)
    end = JobEnd(
        job.job_id,
        job.trial.trial_id,
        outcome,  # type: ignore[arg-type]
        failure="" if outcome == "completed" else "the loss <b>is</b> nan",
        samples_seen=samples,
        seconds=4.0,
    )
    ledger.append("job_end", kind=job.kind, rung=job.rung.rung, attempt=0, end=to_plain(end))
