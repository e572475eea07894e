"""What MLflow should hold for the ledger of a batch: a parent row, and one row for every training.

The parts of metric names are those of `mlflow_rows`:

- `final/...`: one value a training: validation_accuracy and validation_loss after the last epoch,
  test_accuracy and test_loss of full trainings, samples_seen, seconds, num_parameters.
- `training/...`: the curves, stepped by epoch.
- `<callback>/<name>`: what a training callback measured.
- on the parent: `test_accuracy/<configuration>`, the mean over its full trainings;
  `num_trainings/<outcome>`; `cost/samples_seen`.

Params are the run, the seed, the data fraction, the epochs and every hyperparameter in force, with
a `log10_` companion of learning rate and weight decay. The tag `llp.configuration_kind` tells full
trainings (`final`), those that one configuration was chosen by (`candidate`) and those of the
studies apart; `llp.chosen` marks the candidate that was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from llp.tracking.mlflow_rows import FAILURES
from llp.tracking.rows import (
    CURVE_FIELDS,
    MAX_PARAM,
    MAX_TAG,
    STUDY,
    Row,
    RowTable,
    safe_key,
    safe_text,
    texts,
)

CONFIGURATION = "configuration"
"""`callback` of the observation in which a worker says what it trains: no measurement."""
_LOGARITHMIC = ("learning_rate", "weight_decay")


class BatchRows(RowTable):
    """The rows of a batch; children are keyed by job id."""

    key_tag = "llp.job_id"

    def __init__(self) -> None:
        super().__init__()
        self._configurations: dict[str, Mapping[str, Any]] = {}
        self._datasets: dict[str, str] = {}
        self._configuration_of: dict[str, str] = {}
        self._tested: dict[str, dict[str, float]] = {}
        self._ended: dict[str, tuple[str, int]] = {}

    def _on_study(self, event: Mapping[str, Any], time: int) -> None:
        self._identify(event)
        row = Row(name=str(event["study_id"]), start=time)
        row.tags = {**self._common_tags, "llp.kind": "batch", "llp.status": "running"}
        self._put(STUDY, row)

    def _on_batch(self, event: Mapping[str, Any], time: int) -> None:
        found = event["batch"]
        self._datasets |= {name: str(run["dataset"]) for name, run in found["runs"].items()}
        self.rows[STUDY].tags |= texts(
            {
                "llp.title": found["title"],
                "llp.file": found["file"],
                "llp.reference": found["reference"],
                "llp.runs": ", ".join(found["order"]),
            },
            MAX_TAG,
        )
        self.dirty[STUDY] = None

    def _on_configuration(self, event: Mapping[str, Any], time: int) -> None:
        self._configurations[event["configuration"]["configuration_id"]] = event

    def _on_job(self, event: Mapping[str, Any], time: int) -> None:
        job = event["job"]
        job_id, configuration_id = str(job["job_id"]), str(job["trial"]["trial_id"])
        if job_id not in self.rows:
            self._configuration_of[job_id] = configuration_id
            self._put(job_id, self._row(job, self._configurations[configuration_id], time))
        row = self.rows[job_id]
        row.status, row.end = "RUNNING", None
        row.tags |= {
            "llp.outcome": "running",
            "llp.failure": "",
            "llp.stop_reason": "",
            "llp.attempt": str(job.get("attempt", 0)),
        }
        self.dirty[job_id] = None

    def _row(self, job: Mapping[str, Any], said: Mapping[str, Any], time: int) -> Row:
        one = said["configuration"]
        values = {
            "run": one["run"],
            "dataset": self._datasets.get(one["run"], ""),
            **said["settings"],
            **one["hyperparameters"],
            "data_fraction": one["data_fraction"],
            "epochs": one["epochs"],
            "seed": job["seed"],
        }
        row = Row(name=str(job["job_id"]), start=time)
        for name, value in values.items():
            if value is None:
                continue
            row.params[safe_key(name)] = safe_text(value, MAX_PARAM)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in _LOGARITHMIC and number and value > 0:
                row.params[f"log10_{name}"] = f"{math.log10(value):.6g}"
        row.tags = {
            **self._common_tags,
            **texts(
                {
                    "llp.kind": "training",
                    self.key_tag: job["job_id"],
                    "llp.run": one["run"],
                    "llp.configuration": one["configuration_id"],
                    "llp.configuration_kind": one["kind"],
                    "llp.label": one["label"],
                    "llp.seed": job["seed"],
                },
                MAX_TAG,
            ),
        }
        return row

    def _on_point(self, event: Mapping[str, Any], time: int) -> None:
        job_id, point = event["job_id"], event["point"]
        if job_id not in self.rows or self._repeats(job_id, point):
            return
        for name in CURVE_FIELDS:
            self._metric(job_id, f"training/{name}", point[name], time, int(point["epoch"]))

    def _on_observation(self, event: Mapping[str, Any], time: int) -> None:
        found = event["observation"]
        if found["job_id"] not in self.rows:
            return
        for name, value in found["values"].items():
            if found["callback"] == CONFIGURATION:
                self._scalar(found["job_id"], f"final/{name}", value, time)
            else:
                key = f"{found['callback']}/{name}"
                self._metric(found["job_id"], key, value, time, int(found["epoch"]))

    def _on_verification(self, event: Mapping[str, Any], time: int) -> None:
        job_id, found = event["job_id"], event["verification"]
        if job_id not in self.rows:
            return
        for name in ("test_accuracy", "test_loss"):
            self._scalar(job_id, f"final/{name}", found[name], time)
        accuracies = self._tested.setdefault(self._configuration_of[job_id], {})
        accuracies[job_id] = found["test_accuracy"]

    def _on_job_end(self, event: Mapping[str, Any], time: int) -> None:
        end = event["end"]
        job_id = end["job_id"]
        if job_id not in self.rows:
            return
        row, outcome = self.rows[job_id], end["outcome"]
        self._ended[job_id] = outcome, end["samples_seen"]
        row.status, row.end = "FAILED" if outcome in FAILURES else "FINISHED", time
        row.tags |= texts(
            {
                "llp.outcome": outcome,
                "llp.failure": end["failure"][-MAX_TAG:],
                "llp.stop_reason": outcome if outcome in FAILURES else end["stopped_by"],
            },
            MAX_TAG,
        )
        points = self.replay.jobs[job_id].points
        if outcome == "completed" and points:
            _, last = max(points.items())
            for name in ("validation_accuracy", "validation_loss"):
                self._scalar(job_id, f"final/{name}", getattr(last, name), time)
            self._landed(job_id)
        for name in ("samples_seen", "seconds"):
            self._scalar(job_id, f"final/{name}", end[name], time)
        self.dirty[job_id] = None

    def _on_chosen(self, event: Mapping[str, Any], time: int) -> None:
        for job_id, configuration_id in self._configuration_of.items():
            said = self._configurations[configuration_id]["configuration"]
            if (said["run"], said["kind"]) == (event["run"], "candidate"):
                best = configuration_id == event["configuration_id"]
                self.rows[job_id].tags["llp.chosen"] = str(best).lower()
                self.dirty[job_id] = None

    def _on_finished(self, event: Mapping[str, Any], time: int) -> None:
        row = self.rows[STUDY]
        row.status, row.end = "FINISHED", time
        row.tags["llp.status"] = "finished"
        for configuration_id, accuracies in self._tested.items():
            mean = fmean(accuracies.values())
            self._scalar(STUDY, f"test_accuracy/{configuration_id}", mean, time)
        outcomes = [outcome for outcome, _ in self._ended.values()]
        for outcome in dict.fromkeys(outcomes):
            name = f"num_trainings/{outcome}"
            self._scalar(STUDY, name, outcomes.count(outcome), time)
        samples = sum(seen for _, seen in self._ended.values())
        self._scalar(STUDY, "cost/samples_seen", samples, time)
        self.dirty[STUDY] = None
