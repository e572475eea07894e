"""The training log of one configuration: its ledger as lines a person can read from top to bottom.

Every phase, trial, job, decision and result is there with its reason; epochs are there for the
winner's full trainings only (`llp export` has all of them).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llp.reporting import formats
from llp.reporting.runs import Entry

MAX_LINES = 6000  # keeps the page of a very long study under 2 MB; the text file has every line
_TITLES = {
    "start": "Start",
    "tier1": "Tier 1: probing",
    "tier2": "Tier 2: the landscape around the survivors",
    "verify": "Verification: full trainings",
    "end": "End",
}


@dataclass(frozen=True)
class Line:
    """One line of the log.

    Attributes:
        seconds: Since the first event.
        phase: `start`, `tier1`, `tier2`, `verify` or `end`.
        kind: One word: `trial`, `job`, `stop`, `promote`, `epoch`, `test`, ...
        text: What happened.
    """

    seconds: float
    phase: str
    kind: str
    text: str

    @property
    def clock(self) -> str:
        """The time since the start as `h:mm:ss`."""
        whole = int(max(self.seconds, 0))
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@dataclass(frozen=True)
class Phase:
    """The lines of one phase, under a heading."""

    key: str
    title: str
    lines: tuple[Line, ...]


def log_phases(entry: Entry) -> tuple[Phase, ...]:
    """The log in parts, in order of time; a phase that was gone through twice is there twice."""
    lines = itertools.islice(log_lines(entry), MAX_LINES)
    return tuple(
        Phase(f"part-{number}", formats.clean(_TITLES.get(name, name)), tuple(group))
        for number, (name, group) in enumerate(
            itertools.groupby(lines, key=lambda line: line.phase), start=1
        )
    )


def log_text(entry: Entry) -> str:
    """The log as plain text, one line an event."""
    lines = [f"{formats.clean(entry.name)}: training log"]
    if not entry.events:
        lines.append(f"there is no log: the study is {entry.status} {entry.note}".rstrip())
    lines += [
        f"{line.clock:>9}  {line.phase:6}  {line.kind:8}  {line.text}" for line in log_lines(entry)
    ]
    return "\n".join(lines).replace(formats.NBSP, " ") + "\n"


def log_lines(entry: Entry) -> Iterator[Line]:
    """Every line of the log, in the order of the ledger."""
    winner = entry.result.winner if entry.result else None
    start, phase = None, "start"
    points: dict[str, Mapping[str, Any]] = {}
    for event in entry.events:
        if event["event"] == "point":
            points[event["job_id"]] = event["point"]
        elif event["event"] == "job_end":
            event = {**event, "last": points.pop(event["end"]["job_id"], None)}
        time = float(event["time"])
        start = time if start is None else start
        if event["event"] == "phase" and event["status"] == "start":
            phase = str(event["name"])
        if event["event"] in ("finished", "failed"):
            phase = "end"
        for kind, text in _told(event, winner):
            yield Line(time - start, phase, kind, " ".join(formats.clean(text).split()))


def _told(event: Mapping[str, Any], winner: str | None) -> Iterable[tuple[str, str]]:
    handler = _HANDLERS.get(str(event["event"]))
    return handler(event, winner) if handler else ()


def _study(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    dataset, spec = event.get("dataset") or {}, event.get("spec") or {}
    yield (
        "study",
        f"{event.get('study_id')}: {event.get('num_trials')} configurations of "
        f"{(spec.get('model') or {}).get('name')} on {dataset.get('name')}; "
        f"{formats.count(event.get('num_train'))} training, "
        f"{formats.count(event.get('num_validation'))} validation and "
        f"{formats.count(event.get('num_test'))} test images, "
        f"{event.get('num_classes')} classes; seed {spec.get('seed')}",
    )
    for rung in event.get("rungs") or ():
        yield (
            "rung",
            f"rung {rung['rung']}: {formats.percent(rung['data_fraction'])} of the training "
            f"images, {formats.count(rung['num_examples'])}, {rung['epochs']} epochs",
        )


def _opened(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    found = event.get("environment") or {}
    devices = found.get("gpus") or [f"{found.get('cpus')} CPUs"]
    yield (
        "driver",
        f"a driver starts on {event.get('host')} ({', '.join(map(str, devices))}; torch "
        f"{found.get('torch')}, Ray {found.get('ray')}, Python {found.get('python')})",
    )


def _phase(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    if event["status"] == "start":
        yield "phase", f"{_TITLES.get(str(event['name']), event['name'])} begins"
    else:
        yield "phase", f"done in {formats.duration(event.get('seconds'))}"


def _trial(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    trial = event["trial"]
    values = ", ".join(
        f"{name} {formats.number(value)}" for name, value in trial["hyperparameters"].items()
    )
    yield "trial", f"{trial['trial_id']}: {values}; seed {trial['seed']}"


def _job(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    job = event["job"]
    rung, again = job["rung"], f", attempt {job['attempt'] + 1}" if job.get("attempt") else ""
    what = {
        "probe": f"on rung {rung['rung']}: {formats.count(rung['num_examples'])} images, "
        f"{rung['epochs']} epochs",
        "measure": f"on the landscape around the weights of rung {rung['rung']}",
        "verify": f"its full training: {formats.count(rung['num_examples'])} images, "
        f"{rung['epochs']} epochs, seed {job['seed']}",
    }.get(job["kind"], str(job["kind"]))
    yield "job", f"{job['job_id']} starts {what}{again}"


def _point(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    if event["kind"] != "verify" or event["trial_id"] != winner:
        return
    point = event["point"]
    yield (
        "epoch",
        f"{event['job_id']} epoch {point['epoch']}: training loss "
        f"{formats.number(point['train_loss'])}, accuracy "
        f"{formats.percent(point['train_accuracy'])}; validation loss "
        f"{formats.number(point['validation_loss'])}, accuracy "
        f"{formats.percent(point['validation_accuracy'])}; learning rate "
        f"{formats.number(point.get('learning_rate'))}",
    )


def _decision(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    decision = event["decision"]
    forecast = decision.get("predicted_final")
    more = ""
    about = f"{decision['trial_id']} rung {decision['rung']}: " if decision["trial_id"] else ""
    if forecast:
        more = (
            f" (forecast {formats.number(forecast['low'])} to {formats.number(forecast['high'])})"
        )
    yield (
        str(decision["kind"]),
        f"{about}{decision['reason']}{more}",
    )


def _job_end(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    end = event["end"]
    why = f" by {end['stopped_by']}" if end.get("stopped_by") else ""
    last, reached = event.get("last"), ""
    if last:
        reached = (
            f": validation accuracy {formats.percent(last['validation_accuracy'], 2)}, loss "
            f"{formats.number(last['validation_loss'])} at epoch {last['epoch']}"
        )
    failure = str(end.get("failure") or "").strip().splitlines()
    yield (
        "end",
        f"{end['job_id']} {str(end['outcome']).replace('_', ' ')}{why} after "
        f"{formats.count(end['samples_seen'])} samples, {formats.duration(end['seconds'])}"
        + (f": {formats.short(failure[-1], 300)}" if failure else reached),
    )


def _profile(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    profile = event["profile"]
    values = ", ".join(f"{m['name']} {formats.number(m['value'])}" for m in profile["measurements"])
    yield "measured", f"{profile['trial_id']} in {formats.duration(profile['seconds'])}: {values}"


def _scores(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    report = event["score_report"]
    first = [
        f"{score['trial_id']} {formats.number(score['value'])}" for score in report["scores"][:5]
    ]
    yield "scores", f"preset {report['preset']}; best: {', '.join(first) or 'none'}"
    if report.get("sentence"):
        yield "scores", str(report["sentence"])


def _verification(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    done = event["verification"]
    yield (
        "test",
        f"{event.get('job_id')} (seed {done['seed']}): test accuracy "
        f"{formats.percent(done['test_accuracy'], 2)}, validation "
        f"{formats.percent(done['validation_accuracy'], 2)}",
    )


def _finished(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    yield "winner", str(event.get("winner_reason") or event.get("winner"))


def _failed(event: Mapping[str, Any], winner: str | None) -> Iterator[tuple[str, str]]:
    yield "failed", str(event.get("reason"))


_HANDLERS = {
    "study": _study,
    "opened": _opened,
    "phase": _phase,
    "trial": _trial,
    "job": _job,
    "point": _point,
    "decision": _decision,
    "job_end": _job_end,
    "profile": _profile,
    "scores": _scores,
    "verification": _verification,
    "finished": _finished,
    "failed": _failed,
}
