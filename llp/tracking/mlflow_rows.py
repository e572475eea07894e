"""What MLflow should hold for a ledger: runs, params, metrics and tags, as plain rows.

A pure translation, without MLflow, of events into one parent row per study and one child row per
trial. The rows depend on the sequence of events only, never on how it was cut into batches, and
carry the ledger's own timestamps: shipping them twice makes no second row.

The part of a metric's name before the first `/` is a section of MLflow's chart page:

- `final/...`: one value per trial, what is compared: validation_accuracy, validation_loss, score,
  score_low, score_high, probability_best, samples_seen, seconds. Failed and diverged trials have
  no accuracy there. The rung it comes from is a tag, to keep the first charts to what counts.
- `tier1/...`: the learning curves. The step is the place on the budget ladder: the epochs of all
  lower rungs plus the epoch within the rung. A rung thus covers the same steps in every trial, and
  the curves of trials that went up can be compared with those that did not. `tier1/data_fraction`
  tells where one rung ends and the next begins.
- `tier2/<metric>` and `tier2_standard_error/<metric>`: the landscape around the checkpoint.
- `score_terms/<term>`: the contributions that sum to `final/score`.
- `verify/..._seed_<seed>`: curves of the full trainings, stepped by epoch.
- `verified/...`: test results of the full trainings, mean and standard deviation over seeds.
- `cost/...` on the parent: training examples by phase.

Params are the searched hyperparameters only, with a `log10_` companion for those drawn on a
logarithmic scale, because MLflow's parallel coordinates have linear axes. Non-finite numbers are
never logged: a missing metric says "not measured", `llp.stop_reason` says why.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llp.records import Trial, TrialResult
from llp.tracking.replay import NOT_FINISHED, Replay

STUDY = ""
"""Key of the parent row; children are keyed by trial id."""

_FAILURES = {"diverged", "failed", "out_of_memory"}
_CURVE_FIELDS = (
    "validation_accuracy",
    "validation_loss",
    "train_accuracy",
    "train_loss",
    "learning_rate",
    "data_fraction",
    "samples_seen",
)
_NOT_CONSTANTS = {"search_space", "resources", "tracking", "output", "version", "name"}
_BAD_CHARACTERS = re.compile(r"[^/\w.\- :]")
_UNSTORABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_MAX_KEY, _MAX_PARAM, _MAX_TAG = 200, 500, 4000

MetricRow = tuple[str, float, int, int]
"""Key, value, Unix time in milliseconds, step."""


@dataclass
class Row:
    """One run as it should be, and the metrics that were not taken yet.

    Attributes:
        name: Run name.
        start: Unix time in milliseconds.
        params: Name -> value; never changed once set.
        tags: Name -> value.
        metrics: New metric rows.
        status: MLflow's run status.
        end: Unix time in milliseconds of the end, when there is one.
    """

    name: str
    start: int
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[MetricRow] = field(default_factory=list)
    status: str = "RUNNING"
    end: int | None = None


class Rows:
    """The rows after the events taken so far; `dirty` names those that changed."""

    def __init__(self) -> None:
        self.replay = Replay(keep_curves=False)
        self.rows: dict[str, Row] = {}
        self.dirty: dict[str, None] = {}
        self.study_key = ""
        self._common_tags: dict[str, str] = {}
        self._log_parameters: set[str] = set()
        self._steps_below: dict[int, int] = {}
        self._scalars: dict[tuple[str, str], float] = {}
        self._in_flight: dict[tuple[str, int], tuple[float, ...]] = {}
        self._seeds: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        self._ended: dict[str, int] = {}

    @property
    def terminal(self) -> bool:
        """Whether the study has ended, well or not."""
        return self.replay.terminal is not None

    def take(self, event: Mapping[str, Any]) -> None:
        """Takes in the next event of the ledger."""
        self.replay.take(event)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event, _milliseconds(event["time"]))

    def forget(self) -> None:
        """Marks everything so far as shipped."""
        self.dirty.clear()
        for row in self.rows.values():
            row.metrics.clear()

    def interrupt(self) -> None:
        """The driver is gone without a last word: what runs will not end by itself."""
        end = _milliseconds(self.replay.last_time)
        for key, row in self.rows.items():
            if row.status == "RUNNING":
                row.status, row.end = "KILLED", end
                self.dirty[key] = None
        if STUDY in self.rows:
            self.rows[STUDY].tags["llp.status"] = "interrupted"

    # -- the study -------------------------------------------------------------------------------

    def _on_study(self, event: Mapping[str, Any], time: int) -> None:
        spec, environment = event.get("spec", {}), event.get("environment", {})
        identity = f"{event['study_id']} {event['spec_digest']} {event['time']!r}"
        self.study_key = hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:16]
        self._common_tags = _texts(
            {
                "llp.study_id": event["study_id"],
                "llp.study_key": self.study_key,
                "llp.spec_sha256": event["spec_digest"],
                "llp.version": event.get("llp_version", ""),
                "llp.git_commit": environment.get("git_commit") or "",
                "mlflow.source.name": "llp",
            },
            _MAX_TAG,
        )
        self._log_parameters = {
            name
            for name, domain in spec.get("search_space", {}).items()
            if domain.get("type") == "loguniform" or domain.get("log")
        }
        steps = 0
        for rung in self.replay.rungs:
            self._steps_below[rung.rung] = steps
            steps += rung.epochs
        constants = {k: v for k, v in spec.items() if k not in _NOT_CONSTANTS}
        row = Row(name=str(event["study_id"]), start=time)
        row.params = {
            safe_key(name): safe_text(value, _MAX_PARAM) for name, value in _flat(constants)
        }
        row.tags = {**self._common_tags, "llp.kind": "study", "llp.status": "running"}
        self._put(STUDY, row)

    def _on_opened(self, event: Mapping[str, Any], time: int) -> None:
        row = self.rows[STUDY]
        row.status, row.end = "RUNNING", None
        row.tags["llp.status"] = "running"
        self.dirty[STUDY] = None

    def _on_phase(self, event: Mapping[str, Any], time: int) -> None:
        if event["status"] != "end":
            return
        self._scalar(STUDY, f"seconds/{event['name']}", event["seconds"], time)
        if event["name"] == "tier1":
            self._end_tier1(time)
        if event["name"] == "verify":
            self._verified(time)

    def _on_finished(self, event: Mapping[str, Any], time: int) -> None:
        self._end_study(event, time, "FINISHED")
        winner = event.get("winner")
        if winner in self.rows:
            self.rows[winner].tags["llp.winner"] = "true"
            self.dirty[winner] = None

    def _on_failed(self, event: Mapping[str, Any], time: int) -> None:
        self._end_study(event, time, "FAILED")

    def _end_study(self, event: Mapping[str, Any], time: int, status: str) -> None:
        self._end_tier1(time)
        self._verified(time)
        reason = event.get("winner_reason") or event.get("reason") or ""
        row = self.rows[STUDY]
        row.status, row.end = status, time
        row.tags |= _texts(
            {
                "llp.status": event["event"],
                "llp.winner": event.get("winner") or "",
                "llp.reason": reason,
                "mlflow.note.content": f"Winner {event['winner']}: {reason}"
                if event.get("winner")
                else str(reason),
            },
            _MAX_TAG,
        )
        cost = self.replay.cost()
        for name in ("tier1", "tier2", "verification", "full_search"):
            self._scalar(STUDY, f"cost/{name}_samples_seen", getattr(cost, name), time)
        if cost.full_search:
            share = (cost.tier1 + cost.tier2 + cost.verification) / cost.full_search
            self._scalar(STUDY, "cost/fraction_of_full_search", share, time)
        self._scalar(STUDY, "cost/num_trials", len(self.replay.trials), time)
        self.dirty[STUDY] = None

    # -- trials ----------------------------------------------------------------------------------

    def _on_trial(self, event: Mapping[str, Any], time: int) -> None:
        trial = self.replay.trials[event["trial"]["trial_id"]].trial
        if trial.trial_id in self.rows:
            return
        row = Row(name=trial.trial_id, start=time, params=self._params(trial))
        row.tags = {
            **self._common_tags,
            "llp.kind": "trial",
            "llp.trial_id": trial.trial_id,
            "llp.seed": str(trial.seed),
            "llp.outcome": "running",
        }
        if trial.bracket:
            row.tags["llp.bracket"] = str(trial.bracket)
        self._put(trial.trial_id, row)

    def _params(self, trial: Trial) -> dict[str, str]:
        params = {}
        for name, value in trial.hyperparameters.items():
            params[safe_key(name)] = safe_text(value, _MAX_PARAM)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in self._log_parameters and number and float(value) > 0:
                params[safe_key(f"log10_{name}")] = f"{math.log10(float(value)):.6g}"
        return params

    def _on_job(self, event: Mapping[str, Any], time: int) -> None:
        job = event["job"]
        trial_id = job["trial"]["trial_id"]
        if job["kind"] == "verify":
            self._seeds[job["job_id"]] = job["seed"]
        if job["kind"] == "probe" and trial_id in self.rows:
            self._attempts[trial_id] = job["attempt"]
            self._refresh(trial_id, time)

    def _on_point(self, event: Mapping[str, Any], time: int) -> None:
        trial_id, job_id, point = event["trial_id"], event["job_id"], event["point"]
        if trial_id not in self.rows:
            return
        epoch = int(point["epoch"])
        # A job that a second driver ran again repeats its points to the same numbers; a second
        # row at the same step would draw every such epoch twice.
        values = tuple(point[name] for name in _CURVE_FIELDS)
        if self._in_flight.get((job_id, epoch)) == values:
            return
        self._in_flight[job_id, epoch] = values
        if event["kind"] == "probe":
            step = self._steps_below.get(int(point["rung"]), 0) + epoch
            for name in _CURVE_FIELDS:
                self._metric(trial_id, f"tier1/{name}", point[name], time, step)
        elif event["kind"] == "verify":
            seed = self._seeds.get(job_id, job_id)
            for name in ("validation_accuracy", "train_loss"):
                self._metric(trial_id, f"verify/{name}_seed_{seed}", point[name], time, epoch)

    def _on_job_end(self, event: Mapping[str, Any], time: int) -> None:
        end = event["end"]
        if end["outcome"] in {"completed", "stopped"}:
            for key in [key for key in self._in_flight if key[0] == end["job_id"]]:
                del self._in_flight[key]
        if event["kind"] == "probe" and end["trial_id"] in self.rows:
            self._attempts[end["trial_id"]] = event["attempt"]
            self._ended[end["trial_id"]] = time
            self._refresh(end["trial_id"], time)

    def _on_decision(self, event: Mapping[str, Any], time: int) -> None:
        decision = event["decision"]
        if decision["kind"] in {"promote", "retry"} and decision["trial_id"] in self.rows:
            self._refresh(decision["trial_id"], time)

    def _refresh(self, trial_id: str, time: int, *, tier1_over: bool = False) -> TrialResult:
        """Outcome, reason and status of a trial, as far as they are known."""
        row, result = self.rows[trial_id], self.replay.trial_result(trial_id)
        tags = {"llp.attempt": str(self._attempts.get(trial_id, 0))}
        if result.curves:
            tags["llp.rung"] = str(result.curves[-1].rung)
        if result.stopped_by == NOT_FINISHED:
            row.status, row.end = "RUNNING", None
            tags |= {"llp.outcome": "running", "llp.stop_reason": "", "llp.failure": ""}
        else:
            waiting = result.stopped_by.startswith("rung ") and not tier1_over
            failed = result.outcome in _FAILURES
            row.status = "FAILED" if failed else "RUNNING" if waiting else "FINISHED"
            ended = self._ended.get(trial_id, time)
            row.end = ended if row.status != "RUNNING" else None
            tags |= {
                "llp.outcome": result.outcome,
                "llp.stop_reason": result.outcome if failed else result.stopped_by,
                "llp.failure": result.failure[-_MAX_TAG:],
            }
        row.tags |= _texts(tags, _MAX_TAG)
        self.dirty[trial_id] = None
        return result

    def _end_tier1(self, time: int) -> None:
        for trial_id in self.replay.trials:
            result = self._refresh(trial_id, time, tier1_over=True)
            last = result.last
            if last is not None and result.outcome not in _FAILURES:
                for name in ("validation_accuracy", "validation_loss"):
                    self._scalar(trial_id, f"final/{name}", getattr(last, name), time)
            self._scalar(trial_id, "final/samples_seen", result.samples_seen, time)
            self._scalar(trial_id, "final/seconds", result.seconds, time)

    def _on_profile(self, event: Mapping[str, Any], time: int) -> None:
        profile = event["profile"]
        if profile["trial_id"] not in self.rows:
            return
        for measurement in profile["measurements"]:
            name, error = measurement["name"], measurement["standard_error"]
            self._scalar(profile["trial_id"], f"tier2/{name}", measurement["value"], time)
            self._scalar(profile["trial_id"], f"tier2_standard_error/{name}", error, time)

    def _on_scores(self, event: Mapping[str, Any], time: int) -> None:
        report = event["score_report"]
        self.rows[STUDY].tags |= _texts(
            {"llp.score_preset": report["preset"], "llp.score_sentence": report["sentence"]},
            _MAX_TAG,
        )
        self.dirty[STUDY] = None
        for score in report["scores"]:
            trial_id = score["trial_id"]
            if trial_id not in self.rows:
                continue
            self._scalar(trial_id, "final/score", score["value"], time)
            self._scalar(trial_id, "final/score_low", score["interval"]["low"], time)
            self._scalar(trial_id, "final/score_high", score["interval"]["high"], time)
            self._scalar(trial_id, "final/probability_best", score["probability_best"], time)
            for term, value in score["contributions"].items():
                self._scalar(trial_id, f"score_terms/{term}", value, time)

    def _on_verification(self, event: Mapping[str, Any], time: int) -> None:
        verification = event["verification"]
        trial_id, seed = verification["trial_id"], verification["seed"]
        if trial_id in self.rows:
            accuracy = verification["test_accuracy"]
            self._scalar(trial_id, f"verified/test_accuracy_seed_{seed}", accuracy, time)

    def _verified(self, time: int) -> None:
        by_trial: dict[str, list[Any]] = {}
        for verification in self.replay.verifications.values():
            by_trial.setdefault(verification.trial_id, []).append(verification)
        for trial_id, found in by_trial.items():
            if trial_id not in self.rows:
                continue
            accuracies = [verification.test_accuracy for verification in found]
            self._scalar(trial_id, "verified/num_seeds", len(found), time)
            self._scalar(trial_id, "verified/test_accuracy", statistics.fmean(accuracies), time)
            for name in ("test_loss", "validation_accuracy"):
                mean = statistics.fmean(getattr(verification, name) for verification in found)
                self._scalar(trial_id, f"verified/{name}", mean, time)
            if len(found) > 1:
                deviation = statistics.stdev(accuracies)
                self._scalar(trial_id, "verified/test_accuracy_standard_deviation", deviation, time)

    # -- rows ------------------------------------------------------------------------------------

    def _put(self, key: str, row: Row) -> None:
        self.rows[key] = row
        self.dirty[key] = None

    def _metric(self, key: str, name: str, value: Any, time: int, step: int) -> None:
        if value is not None and math.isfinite(value):
            self.rows[key].metrics.append((safe_key(name), float(value), time, step))
            self.dirty[key] = None

    def _scalar(self, key: str, name: str, value: Any, time: int) -> None:
        """One value per run, at step 0; said again only when it changed."""
        if value is None or self._scalars.get((key, name)) == value:
            return
        self._scalars[key, name] = value
        self._metric(key, name, value, time, 0)


def safe_key(name: str) -> str:
    """`name` as MLflow accepts it for params and metrics; left alone when it already is.

    What had to change gets a short hash, so that two names cannot become one.

    >>> safe_key("tier1/train_loss")
    'tier1/train_loss'
    >>> safe_key("a@b")
    'a_b-7508d8'
    """
    clean = _BAD_CHARACTERS.sub("_", safe_text(name, 10_000))
    clean = re.sub(r"/+", "/", clean).strip("/ ")
    if posixpath.normpath(clean) != clean or clean.startswith("."):
        clean = clean.replace(".", "_").replace("//", "/")
    clean = clean[:_MAX_KEY]
    if clean and clean == name:
        return clean
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:6]
    return f"{clean}-{digest}"


def safe_text(value: Any, limit: int) -> str:
    """`value` as text any of MLflow's databases can store, at most `limit` characters."""
    text = _UNSTORABLE.sub("\ufffd", value if isinstance(value, str) else str(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    return {name: safe_text(value, limit) for name, value in values.items()}


def _milliseconds(time: float) -> int:
    return round(float(time) * 1000)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under dotted names; lists as JSON, absent values left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield f"{prefix}{name}", json.dumps(value)
        elif value is not None:
            yield f"{prefix}{name}", value
