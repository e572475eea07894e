"""The ledger of a batch as one table with a row a training, and the parquet file of it.

Columns:

- `run`, `kind` (candidate, final, ablation, sensitivity, scaling), `label`, `configuration_id`,
  `job_id`, `seed`, `repeat`
- `dataset`, `model`, `optimizer` (with its averaging: `sgd+swa`), `learning_rate`, `batch_size`,
  `data_fraction`, `epochs`, `num_examples`, `num_parameters`
- `outcome` (completed, diverged, failed, out_of_memory; or `missing`: not ended), `failure`
- `test_accuracy`, `test_loss`, `validation_accuracy`, `validation_loss`, `num_test`
- `samples` (examples in all gradients taken), `seconds`, `peak_memory_bytes`, `device`, `worker`
- `asked`, `trained`, `changed`, `own`: JSON; hyperparameters that were asked for, what the worker
  said it trained with, what a study changed, and for a run with studies its own value of that
- `curve_epoch`, `curve_samples`, `curve_seconds`, `curve_train_loss`, `curve_validation_loss`,
  `curve_validation_accuracy`: lists
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llp.errors import EnvironmentProblem

CURVE = (
    ("curve_epoch", "epoch"),
    ("curve_samples", "samples_seen"),
    ("curve_seconds", "seconds"),
    ("curve_train_loss", "train_loss"),
    ("curve_validation_loss", "validation_loss"),
    ("curve_validation_accuracy", "validation_accuracy"),
)
COLUMNS = (
    *("run", "kind", "label", "configuration_id", "job_id", "seed", "repeat"),
    *("dataset", "model", "optimizer", "learning_rate", "batch_size", "data_fraction", "epochs"),
    *("num_examples", "num_parameters", "outcome", "failure"),
    *("test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "num_test"),
    *("samples", "seconds", "peak_memory_bytes", "device", "worker"),
    *("asked", "trained", "changed", "own"),
    *(name for name, _ in CURVE),
)
_REPEAT = re.compile(r"-r(\d+)$")
_RESULTS = (
    ("test_accuracy", "test_accuracy"),
    ("test_loss", "test_loss"),
    ("validation_accuracy", "validation_accuracy"),
    ("validation_loss", "validation_loss"),
    ("num_test", "num_test_examples"),
)


def definition(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The batch as its ledger has it: the last definition, with the runs of the ones before.

    Returns:
        name, title, file, reference, order, runs and studies; empty when there is none.
    """
    found: dict[str, Any] = {}
    for event in events:
        if event["event"] == "batch":
            runs = {**found.get("runs", {}), **event["batch"]["runs"]}
            studies = [*found.get("studies", []), *event["batch"]["studies"]]
            distinct = {json.dumps(study, sort_keys=True): study for study in studies}
            found = {**event["batch"], "runs": runs, "studies": list(distinct.values())}
    if found:
        known = [name for name in found["order"] if name in found["runs"]]
        rest = [name for name in found["runs"] if name not in known]
        found["runs"] = {name: found["runs"][name] for name in (*known, *rest)}
    return found


def chosen(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run -> what was chosen among its candidates and by which results, from the ledger.

    `results` maps configuration id to mean validation accuracy and loss, of the candidates all of
    whose trainings were completed.
    """
    return {event["run"]: dict(event) for event in events if event["event"] == "chosen"}


def runs_table(events: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of a batch: every training that was begun, in the order of the file.

    Args:
        events: The lines of the ledger.
    """
    events = list(events)
    runs = definition(events).get("runs", {})
    configurations: dict[str, Mapping[str, Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    points: dict[str, dict[int, Mapping[str, Any]]] = {}
    for event in events:
        kind = event["event"]
        if kind == "configuration":
            configurations[event["configuration"]["configuration_id"]] = event
        elif kind == "job":
            rows.setdefault(event["job"]["job_id"], {}).update(_begun(event["job"]))
        elif kind == "point":
            of = points.setdefault(event["job_id"], {})
            for epoch in [e for e in of if e >= event["point"]["epoch"]]:
                del of[epoch]  # the job was run again from an earlier epoch
            of[event["point"]["epoch"]] = event["point"]
        elif kind == "observation" and event["observation"]["callback"] == "configuration":
            said = event["observation"]
            rows[said["job_id"]] |= _said(said)
        elif kind == "verification":
            result = event["verification"]
            rows[event["job_id"]] |= {to: result[name] for to, name in _RESULTS}
        elif kind == "job_end":
            rows[event["end"]["job_id"]] |= _ended(event["end"])
    for job_id, row in rows.items():
        row |= _asked(configurations[row["configuration_id"]], runs)
        curve = [points.get(job_id, {})[epoch] for epoch in sorted(points.get(job_id, {}))]
        row |= {name: [_number(point[field]) for point in curve] for name, field in CURVE}
        if curve and row["outcome"] == "completed":
            for name in ("validation_accuracy", "validation_loss"):
                row.setdefault(name, curve[-1][name])  # a full training has said it itself
    order = {name: place for place, name in enumerate(runs)}
    kinds = ("candidate", "final", "ablation", "sensitivity", "scaling")
    listed = sorted(
        rows.values(),
        key=lambda row: (
            order.get(row["run"], len(order)),
            kinds.index(row["kind"]),
            row["configuration_id"],
            row["seed"],
            row["repeat"],
        ),
    )
    table = pd.DataFrame(listed, columns=list(COLUMNS))
    floats = (
        *("learning_rate", "data_fraction", "num_parameters", "samples", "seconds"),
        *("test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "num_test"),
        "peak_memory_bytes",
    )
    for name in floats:
        table[name] = table[name].astype(float)
    return table


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _begun(job: Mapping[str, Any]) -> dict[str, Any]:
    repeat = _REPEAT.search(job["job_id"])
    return {
        "job_id": job["job_id"],
        "configuration_id": job["trial"]["trial_id"],
        "seed": int(job["seed"]),
        "repeat": int(repeat[1]) if repeat else 0,
        "data_fraction": job["rung"]["data_fraction"],
        "num_examples": int(job["rung"]["num_examples"]),
        "epochs": int(job["rung"]["epochs"]),
        "outcome": "missing",
        "failure": "",
    }


def _said(observation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "trained": observation["note"],
        "num_parameters": observation["values"].get("num_parameters"),
    }


def _ended(end: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "outcome": end["outcome"],
        "failure": end["failure"],
        "samples": end["samples_seen"],
        "seconds": end["seconds"],
        "peak_memory_bytes": end["peak_memory_bytes"],
        "device": end["device"],
        "worker": end["worker"],
    }


def _asked(event: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    one, settings = event["configuration"], event["settings"]
    averaging = settings["averaging"]
    return {
        "run": one["run"],
        "kind": one["kind"],
        "label": one["label"],
        "dataset": runs.get(one["run"], {}).get("dataset", ""),
        "model": settings["model"],
        "optimizer": settings["optimizer"] + ("" if averaging == "none" else f"+{averaging}"),
        "learning_rate": settings["learning_rate"],
        "batch_size": settings["batch_size"],
        "asked": json.dumps(one["hyperparameters"], sort_keys=True),
        "changed": json.dumps(one["changed"], sort_keys=True),
        "own": json.dumps(event["own"], sort_keys=True),
    }


def write_parquet(table: pd.DataFrame, path: Path) -> Path:
    """Writes the table to one parquet file, in one step.

    Raises:
        EnvironmentProblem: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(temporary, index=False)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror or error}") from error
    return path


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """The full trainings that were completed and have a test accuracy."""
    keep = (table["kind"] != "candidate") & (table["outcome"] == "completed")
    return table[keep & table["test_accuracy"].notna()]
