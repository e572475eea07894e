"""A made-up but plausible study as ledger events, without training anything.

`make_events` plays synchronous successive halving over three rungs on an analytic "network" whose
accuracy depends on the hyperparameters, the data fraction and the epoch. Used by the tests of the
ledger, MLflow, export and the report. `python tests/make_study.py FOLDER` writes a study folder.

What each study of at least 8 trials holds, by position: t001 diverges on rung 1 with a NaN loss,
t003 is stopped within a rung by `power_law`, t004 runs out of memory once and is retried with half
the batch, t006 fails twice with a traceback and is retried in vain; the others finish rung 1 and
the best third goes up. With `resumed=True` the driver dies in the middle of rung 2: a second
`opened` event follows and the points of the jobs in flight are repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llp.records import (
    AblationRow,
    CheckpointRef,
    CurvePoint,
    Decision,
    FlatnessProfile,
    GeneralizationScore,
    Interval,
    Job,
    JobEnd,
    Measurement,
    Rung,
    ScoreReport,
    Trial,
    Verification,
    to_plain,
)

START = 1_790_000_000.0
"""Unix time of the first event."""

NUM_TRAIN = 1200
"""Training images at fraction 1.0."""

HOSTILE = '<script>alert(\'x\')</script>"onload="1" // @{{7*7}} \u202e\u2028\x00é'
"""A name nobody should be able to use against a report, a file name or MLflow."""

RUNGS = (
    Rung(rung=1, data_fraction=0.1, num_examples=120, epochs=6),
    Rung(rung=2, data_fraction=0.3, num_examples=360, epochs=6),
    Rung(rung=3, data_fraction=1.0, num_examples=1200, epochs=6),
)
VERIFY = Rung(rung=4, data_fraction=1.0, num_examples=NUM_TRAIN, epochs=8)


def make_spec(num_trials: int = 12, hostile: str | None = None) -> dict[str, Any]:
    """The validated spec of the study as plain data."""
    from llp.spec.schema import Spec

    spec: dict[str, Any] = {
        "name": "made-up",
        "dataset": {"name": "digits"},
        "model": {"name": "simple_cnn"},
        "training": {"epochs": VERIFY.epochs, "batch_size": 64},
        "search_space": {
            "learning_rate": {"type": "loguniform", "low": 1e-3, "high": 1.0},
            "weight_decay": {"type": "loguniform", "low": 1e-6, "high": 1e-2},
            "optimizer": {"type": "choice", "values": ["sgd", "adamw"]},
            "momentum": {
                "type": "uniform",
                "low": 0.0,
                "high": 0.99,
                "when": {"optimizer": "sgd"},
            },
            "width": {"type": "integer", "low": 8, "high": 64, "log": True},
        },
        "tier1": {
            "num_trials": num_trials,
            "data_fractions": [rung.data_fraction for rung in RUNGS],
            "epochs": [rung.epochs for rung in RUNGS],
        },
        "tier2": {"top_k": min(4, num_trials)},
        "verification": {"top_k": min(2, num_trials), "num_seeds": 2},
    }
    if hostile is not None:
        spec["model"]["name"] = hostile
        spec["search_space"][hostile] = {"type": "choice", "values": [hostile, "tame"]}
    return Spec.model_validate(spec).model_dump(mode="json")


def make_trial(number: int, generator: np.random.Generator, hostile: str | None = None) -> Trial:
    """One configuration of the made-up search space."""
    hyperparameters: dict[str, Any] = {
        "learning_rate": float(10 ** generator.uniform(-3, 0)),
        "weight_decay": float(10 ** generator.uniform(-6, -2)),
        "optimizer": str(generator.choice(["sgd", "adamw"])),
        "width": round(8 * 8 ** generator.uniform(0, 1)),
    }
    if hyperparameters["optimizer"] == "sgd":
        hyperparameters["momentum"] = float(generator.uniform(0, 0.99))
    if hostile is not None:
        hyperparameters[hostile] = hostile if number % 2 else "tame"
    return Trial(f"t{number:03d}", hyperparameters, seed=number)


def quality(trial: Trial) -> float:
    """Accuracy the configuration would reach with all data and many epochs, in [0, 1]."""
    learning_rate = float(trial.hyperparameters["learning_rate"])
    decay = float(trial.hyperparameters["weight_decay"])
    width = float(trial.hyperparameters["width"])
    return (
        0.97
        - 0.10 * abs(math.log10(learning_rate) + 1.2)
        - 0.01 * abs(math.log10(decay) + 4)
        - 0.05 / math.sqrt(width)
    )


def curve_points(trial: Trial, rung: Rung, seed: int) -> list[CurvePoint]:
    """All points of one job, the same for the same arguments."""
    generator = np.random.default_rng([seed, rung.rung, int(trial.trial_id[1:])])
    top = quality(trial) - 0.12 * (1 / rung.data_fraction) ** 0.3 + 0.12
    points = []
    for epoch in range(1, rung.epochs + 1):
        accuracy = top * (1 - 0.6 * epoch**-1.2) + generator.normal(0, 0.004)
        accuracy = float(np.clip(accuracy, 0.05, 0.999))
        train_accuracy = min(0.999, accuracy + 0.02 + 0.01 * epoch / rung.epochs)
        points.append(
            CurvePoint(
                rung=rung.rung,
                data_fraction=rung.data_fraction,
                epoch=epoch,
                samples_seen=epoch * rung.num_examples,
                train_loss=-math.log(train_accuracy),
                train_accuracy=train_accuracy,
                validation_loss=-1.2 * math.log(accuracy),
                validation_accuracy=accuracy,
                seconds=0.4 * epoch * (0.2 + rung.data_fraction),
                learning_rate=float(trial.hyperparameters["learning_rate"])
                * (1 + math.cos(math.pi * epoch / rung.epochs))
                / 2,
            )
        )
    return points


class _Recorder:
    """Numbers and dates the events; time moves a little with each."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.events: list[dict[str, Any]] = []
        self._generator = generator
        self._time = START

    def __call__(self, event: str, **payload: Any) -> None:
        self._time = round(self._time + float(self._generator.uniform(0.01, 0.2)), 3)
        plain = to_plain(payload)
        self.events.append({"seq": len(self.events), "time": self._time, "event": event, **plain})


def make_events(
    num_trials: int = 12,
    seed: int = 0,
    *,
    hostile: str | None = None,
    resumed: bool = False,
    study_id: str = "made-up-0123abcd",
    until: str | None = None,
) -> list[dict[str, Any]]:
    """The whole ledger of a made-up study, as `Ledger.events()` would return it.

    Args:
        num_trials: Configurations tried.
        seed: Of everything random.
        hostile: When given (for example `HOSTILE`), used as model name, as name and value of a
            hyperparameter, inside the traceback, the command line and the winner's reason.
        resumed: The driver dies in the middle of rung 2 and a second one goes on.
        study_id: Name of the study.
        until: Cut off just after the `phase` of this name ended, as if interrupted there.
    """
    generator = np.random.default_rng(seed)
    write = _Recorder(generator)
    spec = make_spec(num_trials, hostile)
    environment = {
        "host": "laptop",
        "python": "3.11.9",
        "torch": "2.11.0",
        "ray": "2.60.0",
        "device": "cpu",
        "cpu_count": 2,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "command": f"llp search made-up.yaml{' --set x=' + hostile if hostile else ''}",
    }
    write(
        "study",
        study_id=study_id,
        spec=spec,
        spec_digest=hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest(),
        environment=environment,
        llp_version="0.1.0",
        ledger_version=1,
        rungs=RUNGS,
        num_train=NUM_TRAIN,
        num_classes=10,
    )
    write("opened", host="laptop", pid=4242, environment=environment)

    trials = [make_trial(number, generator, hostile) for number in range(num_trials)]
    last: dict[str, CurvePoint] = {}
    checkpoints: dict[str, CheckpointRef] = {}
    write("phase", name="tier1", status="start", seconds=0.0)
    alive = list(trials)
    for rung in RUNGS:
        finished = []
        for first in range(0, len(alive), 2):
            batch = alive[first : first + 2]
            for trial in batch:
                if rung.rung == 1:
                    write("decision", decision=Decision("new", trial.trial_id, 1, "random search"))
                    write("trial", trial=trial)
                write("job", job=Job(f"{trial.trial_id}-r{rung.rung}", "probe", trial, rung, 0))
            if resumed and rung.rung == 2 and first == 0:
                for trial in batch:  # these points are lost with the driver and come again
                    for point in curve_points(trial, rung, seed)[:2]:
                        _point(write, trial, rung, point)
                write("opened", host="laptop", pid=4343, environment=environment)
                write("phase", name="tier1", status="start", seconds=0.0)
                for trial in batch:
                    write("job", job=Job(f"{trial.trial_id}-r2", "probe", trial, rung, 0))
            for trial in _interleaved(write, batch, rung, seed, hostile, checkpoints, last):
                finished.append(trial)
        finished.sort(key=lambda trial: -last[trial.trial_id].validation_accuracy)
        alive = finished[: max(1, math.ceil(len(finished) / 3))] if rung.rung < 3 else finished
        if rung.rung < 3:
            for place, trial in enumerate(alive, start=1):
                accuracy = last[trial.trial_id].validation_accuracy
                reason = f"accuracy {accuracy:.4f} is number {place} of {len(finished)}"
                write(
                    "decision", decision=Decision("promote", trial.trial_id, rung.rung + 1, reason)
                )
    write("phase", name="tier1", status="end", seconds=42.5)
    if until == "tier1":
        return write.events

    by_accuracy = sorted(
        (trial for trial in trials if trial.trial_id in checkpoints),
        key=lambda trial: (
            -last[trial.trial_id].rung,
            -last[trial.trial_id].validation_accuracy,
        ),
    )
    survivors = by_accuracy[: spec["tier2"]["top_k"]]
    write("phase", name="tier2", status="start", seconds=0.0)
    profiles = []
    for trial in survivors:
        rung = RUNGS[last[trial.trial_id].rung - 1]
        job_id = f"{trial.trial_id}-m"
        ref = checkpoints[trial.trial_id]
        write("job", job=Job(job_id, "measure", trial, rung, 0, start_from=ref))
        profiles.append(_profile(trial, generator))
        write("profile", profile=profiles[-1])
        end = JobEnd(job_id, trial.trial_id, "completed", samples_seen=2048, seconds=1.5)
        write("job_end", kind="measure", rung=rung.rung, attempt=0, end=end)
    write("phase", name="tier2", status="end", seconds=7.25)
    if until == "tier2":
        return write.events

    write("phase", name="score", status="start", seconds=0.0)
    report = _scores(by_accuracy, {p.trial_id: p for p in profiles}, last)
    write("scores", score_report=report)
    write("phase", name="score", status="end", seconds=0.5)
    if until == "score":
        return write.events

    write("phase", name="verify", status="start", seconds=0.0)
    ranked = {trial.trial_id: trial for trial in trials}
    tested: dict[str, list[float]] = {}
    for place, score in enumerate(report.scores[: spec["verification"]["top_k"]]):
        trial = ranked[score.trial_id]
        for number in range(spec["verification"]["num_seeds"]):
            job_id = f"{trial.trial_id}-v{number}"
            write("job", job=Job(job_id, "verify", trial, VERIFY, seed=1000 + number))
            points = curve_points(trial, VERIFY, seed=1000 + number)
            for point in points:
                _point(write, trial, VERIFY, point, job_id=job_id, kind="verify")
            accuracy = points[-1].validation_accuracy - 0.01 - 0.002 * place
            verification = Verification(
                trial_id=trial.trial_id,
                seed=1000 + number,
                test_accuracy=accuracy,
                test_loss=-1.2 * math.log(accuracy),
                validation_accuracy=points[-1].validation_accuracy,
                validation_loss=points[-1].validation_loss,
                num_test_examples=360,
                samples_seen=VERIFY.samples_seen,
                seconds=points[-1].seconds,
            )
            tested.setdefault(trial.trial_id, []).append(accuracy)
            write("verification", job_id=job_id, verification=verification)
            end = JobEnd(
                job_id,
                trial.trial_id,
                "completed",
                checkpoint=_checkpoint(job_id),
                samples_seen=VERIFY.samples_seen,
                seconds=points[-1].seconds,
            )
            write("job_end", kind="verify", rung=VERIFY.rung, attempt=0, end=end)
    write("phase", name="verify", status="end", seconds=20.0)
    if until == "verify":
        return write.events

    winner = max(tested, key=lambda trial_id: float(np.mean(tested[trial_id])))
    reason = f"highest mean test accuracy, {np.mean(tested[winner]):.4f} over 2 seeds"
    write("phase", name="report", status="start", seconds=0.0)
    write("phase", name="report", status="end", seconds=1.0)
    write(
        "finished",
        winner=winner,
        winner_reason=reason + (f" {hostile}" if hostile else ""),
        report="report.html",
    )
    return write.events


def _point(
    write: _Recorder,
    trial: Trial,
    rung: Rung,
    point: CurvePoint,
    *,
    job_id: str = "",
    kind: str = "probe",
) -> None:
    write(
        "point",
        job_id=job_id or f"{trial.trial_id}-r{rung.rung}",
        trial_id=trial.trial_id,
        kind=kind,
        point=point,
    )


def _checkpoint(job_id: str) -> CheckpointRef:
    return CheckpointRef(f"checkpoints/{job_id}.pt", hashlib.sha256(job_id.encode()).hexdigest())


def _interleaved(
    write: _Recorder,
    batch: list[Trial],
    rung: Rung,
    seed: int,
    hostile: str | None,
    checkpoints: dict[str, CheckpointRef],
    last: dict[str, CurvePoint],
) -> Iterator[Trial]:
    """Runs the jobs of `batch` side by side; yields the trials that end the rung."""
    running = [_run(write, trial, rung, seed, hostile, checkpoints, last) for trial in batch]
    done: list[Trial] = []
    while running:
        for job in list(running):
            try:
                next(job)
            except StopIteration as end:
                running.remove(job)
                if end.value is not None:
                    done.append(end.value)
    yield from done


def _run(
    write: _Recorder,
    trial: Trial,
    rung: Rung,
    seed: int,
    hostile: str | None,
    checkpoints: dict[str, CheckpointRef],
    last: dict[str, CurvePoint],
) -> Iterator[None]:
    """One job point by point; its value is the trial when it may go up."""
    job_id, number = f"{trial.trial_id}-r{rung.rung}", int(trial.trial_id[1:])
    points = curve_points(trial, rung, seed)

    def end(outcome: Any, at: int, attempt: int = 0, **more: Any) -> None:
        samples = points[at - 1].samples_seen if at else 0
        seconds = points[at - 1].seconds if at else 0.1
        record = JobEnd(
            job_id, trial.trial_id, outcome, samples_seen=samples, seconds=seconds, **more
        )
        write("job_end", kind="probe", rung=rung.rung, attempt=attempt, end=record)

    if rung.rung == 1 and number == 1:
        _point(write, trial, rung, points[0])
        yield
        bad = CurvePoint(1, 0.1, 2, points[1].samples_seen, math.nan, 0.1, math.nan, 0.1, 0.2)
        _point(write, trial, rung, bad)
        end("diverged", 2, failure="training loss is not finite after epoch 2")
        return None
    if rung.rung == 1 and number == 3:
        for point in points[:4]:
            _point(write, trial, rung, point)
            yield
        forecast = Interval(0.50, 0.58, 0.95)
        reason = "forecast 0.5800 at most, below the 0.7000 that would be promoted"
        write("decision", decision=Decision("stop", trial.trial_id, rung.rung, reason, forecast))
        end("stopped", 4, stopped_by="power_law")
        return None
    attempt = 0
    if rung.rung == 1 and number == 4:
        _point(write, trial, rung, points[0])
        yield
        end("out_of_memory", 1, failure="CUDA out of memory. Tried to allocate 2.00 GiB")
        attempt = 1
        reason = "out of memory; half the micro-batch"
        write("decision", decision=Decision("retry", trial.trial_id, rung.rung, reason))
        job = Job(job_id, "probe", trial, rung, 0, attempt=1, micro_batch_divisor=2)
        write("job", job=job)
        yield
    if rung.rung == 1 and number == 6:
        for attempt in (0, 1):
            for point in points[: 2 + attempt]:
                _point(write, trial, rung, point)
                yield
            end(
                "failed",
                2 + attempt,
                attempt,
                failure="Traceback (most recent call last):\n"
                '  File "model.py", line 12, in forward\n'
                f"RuntimeError: shapes do not match {hostile or ''}",
            )
            if attempt == 0:
                decision = Decision("retry", trial.trial_id, rung.rung, "failed; attempt 1 of 1")
                write("decision", decision=decision)
                write("job", job=Job(job_id, "probe", trial, rung, 0, attempt=1))
        return None
    for point in points:
        _point(write, trial, rung, point)
        yield
    checkpoints[trial.trial_id] = _checkpoint(job_id)
    last[trial.trial_id] = points[-1]
    end("completed", len(points), attempt, checkpoint=checkpoints[trial.trial_id])
    return trial


def _profile(trial: Trial, generator: np.random.Generator) -> FlatnessProfile:
    sharp = 0.3 + 0.5 * abs(math.log10(float(trial.hyperparameters["learning_rate"])) + 1.2)
    rows = {
        "sam_sharpness": (sharp * 0.1, 0.004, False),
        "asam_sharpness": (sharp * 0.2, 0.006, False),
        "noise_sharpness": (sharp * 0.05, 0.003, False),
        "gradient_norm": (sharp * 0.4, math.nan, False),
        "hessian_eigenvalue_1": (sharp * 20, 0.5, False),
        "hessian_eigenvalue_2": (sharp * 11, 0.5, False),
        "hessian_eigenvalue_3": (math.nan, math.nan, False),
        "hessian_trace": (sharp * 150, 12.0, False),
        "swa_gain": (0.004, 0.002, True),
    }
    measurements = tuple(
        Measurement(
            name=name,
            value=value * float(generator.uniform(0.9, 1.1)),
            standard_error=error,
            higher_is_better=better,
            num_examples=256,
            seconds=0.15,
            note="" if math.isfinite(value) else "Lanczos did not converge: residual 0.3",
        )
        for name, (value, error, better) in rows.items()
    )
    return FlatnessProfile(trial.trial_id, measurements, seconds=1.4)


def _scores(
    trials: list[Trial], profiles: Mapping[str, FlatnessProfile], last: Mapping[str, CurvePoint]
) -> ScoreReport:
    scores = []
    for trial in trials:
        accuracy = last[trial.trial_id].validation_accuracy
        contributions = {"validation_accuracy": accuracy}
        if trial.trial_id in profiles:
            profile = profiles[trial.trial_id]
            contributions["sam_sharpness"] = -0.1 * profile["sam_sharpness"].value
        value = sum(contributions.values())
        scores.append(
            GeneralizationScore(
                trial_id=trial.trial_id,
                value=value,
                interval=Interval(value - 0.02, value + 0.02),
                contributions=contributions,
                probability_best=0.0,
                preset="llp",
            )
        )
    scores.sort(key=lambda score: (score.trial_id not in profiles, -score.value))
    total = sum(math.exp(40 * (score.value - scores[0].value)) for score in scores)
    scores = [
        GeneralizationScore(
            **{
                **score.__dict__,
                "probability_best": math.exp(40 * (score.value - scores[0].value)) / total,
            }
        )
        for score in scores
    ]
    ablation = tuple(
        AblationRow(name, tau, Interval(tau - 0.3, min(1.0, tau + 0.3)), regret, 0.0, cost, 4)
        for name, tau, regret, cost in (
            ("validation_accuracy", 0.67, 0.2, 60_000),
            ("T1", 0.67, 0.2, 60_000),
            ("T1+T2", 0.33, 0.5, 68_192),
        )
    )
    return ScoreReport(
        preset="llp",
        scores=tuple(scores),
        weights={"validation_accuracy": 1.0, "sam_sharpness": -0.1},
        sentence="Flatness did not help here: tau 0.33 with it, 0.67 without (4 trials).",
        ablation=ablation,
        ties=((scores[0].trial_id, scores[1].trial_id),) if len(scores) > 1 else (),
    )


def write_study(folder: Path, events: list[dict[str, Any]]) -> Path:
    """Writes `events` as the ledger of the study folder `folder`, with a spec.yaml and a report."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(event, allow_nan=False) + "\n" for event in events]
    (folder / "ledger.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "spec.yaml").write_text(json.dumps(events[0]["spec"], indent=2), encoding="utf-8")
    if events[-1]["event"] == "finished":
        (folder / "report.html").write_text("<!doctype html><title>made up</title>", "utf-8")
    return folder


if __name__ == "__main__":
    import sys

    print(write_study(Path(sys.argv[1]), make_events(resumed=True)))
