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
- `<callback>/<name>`: what a training callback measured, such as `curvature/eigenvalue_1`, stepped
  like the curve of the job that was watched; `..._seed_<seed>` for full trainings.
- `score_terms/<term>`: the contributions that sum to `final/score`.
- `verify/..._seed_<seed>`: curves of the full trainings, stepped by epoch.
- `training/...`: of a training by itself, the whole curve of its first seed, so that the curves of
  several trainings have the same names. Its run is named like the training.
- `verified/...`: test results of the full trainings, mean and standard deviation over seeds.
- `objectives/...`, `objectives_verified/...`: values of several objectives; whether a trial is on
  the front is the tag `llp.objectives_front`, the hypervolume is on the parent.
- `race/...`: how far behind the leader of the race over seeds, and the bound on how far ahead,
  stepped by the number of seeds.
- `ranks/rung_1_to_2` on the parent: Spearman's correlation among the trials promoted, `..._low` and
  `..._high` its interval. Once stopping by forecast is off, the tag `llp.early_stopping` says why.
- `cost/...` on the parent: training examples by phase.

Params are the searched hyperparameters only, with a `log10_` companion for those drawn on a
logarithmic scale, because MLflow's parallel coordinates have linear axes. Non-finite numbers are
never logged: a missing metric says "not measured", `llp.stop_reason` says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from llp.records import Trial, TrialResult
from llp.tracking.replay import NOT_FINISHED
from llp.tracking.rows import (
    CURVE_FIELDS,
    MAX_PARAM,
    MAX_TAG,
    STUDY,
    Row,
    RowTable,
    flat,
    safe_key,
    safe_text,
    texts,
)

FAILURES = {"diverged", "failed", "out_of_memory"}
"""Outcomes of runs that MLflow shows as failed."""
_NOT_CONSTANTS = {"search_space", "resources", "tracking", "output", "version", "name"}
_OF_SEARCHES = {"constraints", "searcher", "tier1", "tier2", "score"}


class Rows(RowTable):
    """The rows of a search or of a training by itself."""

    def __init__(self) -> None:
        super().__init__()
        self._alone = False  # a training by itself, without a search
        self._log_parameters: set[str] = set()
        self._steps_below: dict[int, int] = {}
        self._seeds: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        self._ended: dict[str, int] = {}

    # -- the study -------------------------------------------------------------------------------

    def _on_study(self, event: Mapping[str, Any], time: int) -> None:
        self._identify(event)
        self._alone = event.get("kind") == "training"
        spec = event.get("spec", {})
        self._log_parameters = {
            name
            for name, domain in spec.get("search_space", {}).items()
            if domain.get("type") == "loguniform" or domain.get("log")
        }
        steps = 0
        for rung in self.replay.rungs:
            self._steps_below[rung.rung] = steps
            steps += rung.epochs
        hidden = _NOT_CONSTANTS | (_OF_SEARCHES if self._alone else set())
        constants = {k: v for k, v in spec.items() if k not in hidden}
        row = Row(name=str(event["study_id"]), start=time)
        row.params = {
            safe_key(name): safe_text(value, MAX_PARAM) for name, value in flat(constants)
        }
        row.tags = {**self._common_tags, "llp.kind": "study", "llp.status": "running"}
        self._put(STUDY, row)

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
        row.tags |= texts(
            {
                "llp.status": event["event"],
                "llp.winner": event.get("winner") or "",
                "llp.reason": reason,
                "mlflow.note.content": f"Winner {event['winner']}: {reason}"
                if event.get("winner")
                else str(reason),
            },
            MAX_TAG,
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
        name = self.rows[STUDY].name if self._alone else trial.trial_id
        row = Row(name=name, start=time, params=self._params(trial))
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
            params[safe_key(name)] = safe_text(value, MAX_PARAM)
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
        if self._repeats(job_id, point):
            return
        if event["kind"] == "probe":
            step = self._steps_below.get(int(point["rung"]), 0) + epoch
            for name in CURVE_FIELDS:
                self._metric(trial_id, f"tier1/{name}", point[name], time, step)
        elif event["kind"] == "verify":
            seed = self._seeds.get(job_id, job_id)
            if self._alone and next(iter(self._seeds), "") == job_id:
                for name in CURVE_FIELDS:
                    self._metric(trial_id, f"training/{name}", point[name], time, epoch)
            for name in ("validation_accuracy", "train_loss"):
                self._metric(trial_id, f"verify/{name}_seed_{seed}", point[name], time, epoch)

    def _on_observation(self, event: Mapping[str, Any], time: int) -> None:
        found = event["observation"]
        trial_id, job_id, epoch = found["trial_id"], found["job_id"], int(found["epoch"])
        if trial_id not in self.rows or job_id not in self.replay.jobs:
            return
        verified = job_id in self._seeds
        below = 0 if verified else self._steps_below.get(self.replay.jobs[job_id].rung, 0)
        suffix = f"_seed_{self._seeds[job_id]}" if verified else ""
        for name, value in found["values"].items():
            key = f"{found['callback']}/{name}{suffix}"
            self._metric(trial_id, key, value, time, below + epoch)

    def _on_job_end(self, event: Mapping[str, Any], time: int) -> None:
        end = event["end"]
        if end["outcome"] in {"completed", "stopped"}:
            self._landed(end["job_id"])
        if event["kind"] == self.replay.told_by and end["trial_id"] in self.rows:
            self._attempts[end["trial_id"]] = event["attempt"]
            self._ended[end["trial_id"]] = time
            self._refresh(end["trial_id"], time)

    def _on_decision(self, event: Mapping[str, Any], time: int) -> None:
        decision = event["decision"]
        if decision["kind"] in {"promote", "retry"} and decision["trial_id"] in self.rows:
            self._refresh(decision["trial_id"], time)
        elif decision["kind"] == "stops_off":
            self.rows[STUDY].tags["llp.early_stopping"] = safe_text(decision["reason"], MAX_TAG)
            self.dirty[STUDY] = None

    def _on_rank_correlations(self, event: Mapping[str, Any], time: int) -> None:
        for pair in event["rank_correlations"]:
            name = f"ranks/rung_{pair['lower']}_to_{pair['higher']}"
            self._scalar(STUDY, name, pair["value"], time)
            self._scalar(STUDY, f"{name}_low", pair["interval"]["low"], time)
            self._scalar(STUDY, f"{name}_high", pair["interval"]["high"], time)

    def _on_stop_audit(self, event: Mapping[str, Any], time: int) -> None:
        audit = event["stop_audit"]
        for name in ("num_stops", "num_audits", "num_false"):
            self._scalar(STUDY, f"stops/{name}", audit[name], time)
        if audit["num_audits"]:
            rate = audit["num_false"] / audit["num_audits"]
            self._scalar(STUDY, "stops/false_stop_rate", rate, time)
        self._scalar(STUDY, "stops/false_stop_rate_low", audit["rate"]["low"], time)
        self._scalar(STUDY, "stops/false_stop_rate_high", audit["rate"]["high"], time)

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
            failed = result.outcome in FAILURES
            row.status = "FAILED" if failed else "RUNNING" if waiting else "FINISHED"
            ended = self._ended.get(trial_id, time)
            row.end = ended if row.status != "RUNNING" else None
            tags |= {
                "llp.outcome": result.outcome,
                "llp.stop_reason": result.outcome if failed else result.stopped_by,
                "llp.failure": result.failure[-MAX_TAG:],
            }
        row.tags |= texts(tags, MAX_TAG)
        self.dirty[trial_id] = None
        return result

    def _end_tier1(self, time: int) -> None:
        for trial_id in self.replay.trials:
            result = self._refresh(trial_id, time, tier1_over=True)
            last = result.last
            if last is not None and result.outcome not in FAILURES:
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
        self.rows[STUDY].tags |= texts(
            {"llp.score_preset": report["preset"], "llp.score_sentence": report["sentence"]},
            MAX_TAG,
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

    def _on_race(self, event: Mapping[str, Any], time: int) -> None:
        found = event["look"]
        for name, bound in found["ahead_at_most"].items():
            self._metric(name, "race/ahead_at_most", bound, time, found["num_seeds"])
            self._metric(name, "race/behind", found["behind"][name], time, found["num_seeds"])
        for name, why in found["out"].items():
            self.rows[name].tags["llp.race"] = safe_text(why, MAX_TAG)
            self.dirty[name] = None

    def _on_front(self, event: Mapping[str, Any], time: int) -> None:
        found = event["front"]
        section = "objectives" if found["rung"] else "objectives_verified"
        for name, values in found["values"].items():
            for objective, value in values.items():
                self._scalar(name, f"{section}/{objective}", value, time)
            self.rows[name].tags[f"llp.{section}_front"] = str(name in found["front"]).lower()
            self.dirty[name] = None
        self._scalar(STUDY, f"{section}/front_size", len(found["front"]), time)
        self._scalar(STUDY, f"{section}/hypervolume_share", found["covered"], time)

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
            for name in ("corrupted_test_accuracy", "corrupted_validation_accuracy"):
                values = [getattr(verification, name) for verification in found]
                if all(map(math.isfinite, values)):
                    self._scalar(trial_id, f"verified/{name}", statistics.fmean(values), time)
            if len(found) > 1:
                deviation = statistics.stdev(accuracies)
                self._scalar(trial_id, "verified/test_accuracy_standard_deviation", deviation, time)
