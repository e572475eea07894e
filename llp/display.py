"""What people and machines see of a search: a live block, plain lines, JSON lines.

`block` turns a `ProgressState` into the live display, `sentence` into one plain line and `facts`
into plain data. `Reporter` is what the pipeline calls: a live block on a terminal, plain lines
elsewhere, JSON lines beside.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from llp.progress import ProgressState, number_of
from llp.records import to_plain
from llp.reporting import formats
from llp.reporting.earlier import about_earlier

PLAIN_SECONDS = 10.0
"""Least time between two ordinary lines where there is no terminal."""

_PHASES = {
    "tier1": "tier 1: probing configurations on small data fractions",
    "tier2": "tier 2: measuring the loss landscape of the survivors",
    "score": "score: combining both tiers",
    "verify": "verify: full training of the best",
    "report": "report: writing the page",
}


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss`.

    >>> clock(3725)
    '1:02:05'
    """
    whole = int(max(seconds, 0))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def printable(text: object) -> str:
    r"""`text` on one line, without what could move the cursor, ring, colour or turn the line.

    >>> printable("88\u00a0%\x1b[2J")
    '88 %�[2J'
    """
    letters = str(text).replace("\u00a0", " ").replace("\u202f", " ")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in letters)


def settings(hyperparameters: Mapping[str, Any]) -> str:
    """Hyperparameters on one line, numbers to three digits.

    >>> settings({"learning_rate": 0.031234, "optimizer": "sgd"})
    'learning_rate=0.0312 optimizer=sgd'
    """
    return " ".join(
        printable(f"{name}={formats.number(value, 3)}") for name, value in hyperparameters.items()
    )


def put(console: Console, renderable: RenderableType) -> None:
    """Prints without the blanks that fill a table up to its width."""
    for line in console.render_lines(renderable, pad=False):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        console.print(Segments([*line, Segment.line()]))


def _endings(state: ProgressState) -> str:
    parts = []
    for outcome, reasons in state.endings().items():
        why = ", ".join(f"{count} {_why(word)}" for word, count in reasons.most_common() if word)
        name = outcome.replace("_", " ")
        parts.append(f"{reasons.total()} {name}" + (f" ({why})" if why else ""))
    return " · ".join(parts)


def _why(word: str) -> str:
    return word if word.startswith("after ") else f"by {word}"


def _spent(state: ProgressState) -> str:
    measuring = sum(job.samples for job in [*state.of("measure"), *state.of("tie")])
    training = formats.amount(state.samples_spent - measuring)
    text = f"{training} of {formats.amount(state.samples_planned)} planned samples"
    return text + (f", {formats.amount(measuring)} more in tier 2" if measuring else "")


def _best(state: ProgressState) -> str:
    best = state.best
    if best is None:
        return ""
    text = f"{best.trial_id} · validation {formats.percent(best.accuracy)}"
    if best.data_fraction < 1:
        text += f" at {100 * best.data_fraction:.3g} % of the data"
    if not math.isnan(best.score):
        text += f" · score {best.score:.4g}"
    tests = state.tests.get(best.trial_id, [])
    if tests:
        text += f" · test {formats.percent(sum(tests) / len(tests))} ({len(tests)} full training"
        text += "s)" if len(tests) > 1 else ")"
    return text


def _first_of_earlier(state: ProgressState) -> str:
    return about_earlier(state.earlier)[0] if state.earlier is not None else ""


def _stopping_off(state: ProgressState) -> str:
    why = state.early_stopping
    return f"early stopping went off, {why}" if why else ""


def _rows(state: ProgressState) -> list[tuple[str, float, str]]:
    """Tier, share done, and the words beside the bar."""
    rows = []
    words = []
    for rung, expected in state.expected_on.items():
        ended, running = state.counts("probe", rung)
        if expected or ended or running:
            words.append(f"rung {rung}: {ended}/{max(expected, ended + running)}")
    if state.of("tie"):
        words.append(f"{state.counts('tie')[0]}/{len(state.of('tie'))} measured for ties")
    for kind, name, what in (
        ("probe", "tier 1", ", ".join(words)),
        ("measure", "tier 2", "measured"),
        ("verify", "verify", "full trainings"),
    ):
        ended, running = state.counts(kind)
        total = max(state.expected(kind), ended + running)
        if total:
            text = what if kind == "probe" else f"{ended}/{total} {what}"
            rows.append((name, ended / total, text + (f", {running} running" * bool(running))))
    return rows


def _clock(state: ProgressState, now: float | None) -> str:
    text = clock(state.elapsed(now))
    return f"{text}  {_left(state) if state.status == 'running' else state.status}"


def _left(state: ProgressState) -> str:
    if state.study_id and not state.jobs:
        return "starting workers"
    remaining = state.remaining()
    if remaining is None or remaining < 1:
        return ""
    word = "about" if state.phases.get("tier1") == "end" else "up to"
    return f"{word} {formats.duration(remaining)} left"


def block(state: ProgressState, *, now: float | None = None) -> RenderableType:
    """The live display: study and clock, a bar per tier, what ended and why, cost, best, MLflow.

    `now` is the Unix time to count from; by default that of the last event.
    """
    head = Text(state.study_id or "starting", style="bold")
    names = [str(state.section(part).get("name", "")) for part in ("dataset", "model")]
    head.append("  " + printable(" / ".join(filter(None, names)))[:60], style="default not bold")
    head.append(printable(f"  {_clock(state, now)}"), style="cyan not bold")
    bars = Table.grid(padding=(0, 1))
    bars.add_column(no_wrap=True)
    bars.add_column(width=16, no_wrap=True)
    bars.add_column(overflow="fold")
    for name, share, words in _rows(state):
        bar = ProgressBar(total=1.0, completed=share, width=16)
        bars.add_row(Text(name), bar, Text(printable(words)))
    facts = Table.grid(padding=(0, 1))
    facts.add_column(no_wrap=True, width=6)
    facts.add_column(overflow="fold")
    best, full = state.best, formats.amount(state.samples_full_search)
    for name, words in (
        ("ended", _endings(state)),
        ("spent", f"{_spent(state)}; training all {state.num_trials} fully: {full}"),
        ("best", _best(state)),
        ("", settings(best.hyperparameters) if best else ""),
        ("warm", _first_of_earlier(state)),
        ("note", _stopping_off(state)),
        ("mlflow", state.mlflow),
    ):
        if words:
            colour = "green" if name == "best" else ""
            facts.add_row(Text(name), Text(printable(words), style=colour))
    return Group(head, bars, facts)


def sentence(state: ProgressState, *, now: float | None = None) -> str:
    """The same as `block` in one plain line."""
    parts = [f"[{clock(state.elapsed(now))}]"]
    active = [phase for phase, status in state.phases.items() if status == "start"]
    shown = {"tier1": "tier 1", "tier2": "tier 2", "verify": "verify"}
    for name, _, words in _rows(state):
        if any(shown.get(phase) == name for phase in active):
            parts.append(f"{name}: {words}")
    ended = _endings(state)
    parts += [ended] if ended else []
    parts += [f"spent {_spent(state)}"]
    parts += [f"best {_best(state)}"] if state.best else []
    parts += [_left(state)] if _left(state) else []
    return printable(parts[0] + " " + " | ".join(parts[1:]))


def facts(state: ProgressState) -> dict[str, Any]:
    """The same as plain data for machines."""
    best = state.best
    return {
        "event": "status",
        "study_id": state.study_id,
        "status": state.status,
        "seconds": state.elapsed(),
        "jobs": {
            kind: {
                "ended": state.counts(kind)[0],
                "running": state.counts(kind)[1],
                "expected": state.expected(kind),
            }
            for kind in ("probe", "measure", "verify")
        },
        "endings": state.endings(),
        "samples_spent": state.samples_spent,
        "samples_planned": state.samples_planned,
        "samples_full_search": state.samples_full_search,
        "best": best,
        "winner": state.winner or None,
        "early_stopping_off": state.early_stopping or None,
        "earlier_studies": state.earlier,
    }


def landmark(state: ProgressState, event: Mapping[str, Any]) -> str:
    """The line an event deserves at once, or an empty string."""
    name = event.get("event")
    if name == "study":
        return f"study {state.study_id}: {state.num_trials} trials on {len(state.rungs)} rungs"
    if name == "opened" and state.jobs:
        return f"going on with study {state.study_id}"
    if name == "warm_start" and state.earlier is not None:
        return printable("warm start: " + "; ".join(about_earlier(state.earlier)))
    if name == "decision" and event["decision"]["kind"] == "stops_off":
        return printable(_stopping_off(state))
    if name == "phase" and event.get("status") == "start":
        return _PHASES.get(str(event.get("name")), str(event.get("name")))
    if name == "job_end" and event["end"]["outcome"] in ("failed", "out_of_memory"):
        end = event["end"]
        reason = (end["failure"].strip().splitlines() or ["no message"])[-1][:200]
        return f"{end['job_id']} {end['outcome'].replace('_', ' ')}: {printable(reason)}"
    if name == "verification":
        result = event["verification"]
        accuracy = formats.percent(number_of(result["test_accuracy"]))
        num, asked = len(state.tests[result["trial_id"]]), state.verification_seeds
        which = f"full training {num} of {max(num, asked)}"
        return printable(f"{result['trial_id']} {which}: test accuracy {accuracy}")
    if name == "finished" and state.mlflow:
        return f"winner {state.winner}; MLflow is {state.mlflow}"
    if name == "failed":
        return f"failed: {printable(event.get('reason', ''))}"
    return ""


class Reporter:
    """Shows a running search; give it to the pipeline as `on_event`.

    Args:
        console: Where people read, normally standard error.
        machine: Where JSON lines go, or None for none.
        quiet: Show people nothing while it runs.
    """

    def __init__(
        self, *, console: Console, machine: IO[str] | None = None, quiet: bool = False
    ) -> None:
        self.state = ProgressState()
        self.console = console
        self._machine = machine
        self._quiet = quiet
        self._lock = threading.Lock()
        self._opened = time.time()
        self._next_line = 0.0
        self._live: Live | None = None
        if console.is_terminal and not quiet:
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def _render(self) -> RenderableType:
        with self._lock:
            return block(self.state, now=time.time())

    def __enter__(self) -> Reporter:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            with self._lock:
                self.state.mlflow = ""
            self._live.transient = not self.state.study_id
            self._live.stop()
            if self.state.study_id:
                self.console.print()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes in and shows one event; those from before this process are taken in silently."""
        with self._lock:
            self.state.update(event)
        if self._machine is not None:
            write_line(self._machine, event)
        old = event.get("time") is not None and float(event["time"]) < self._opened - 1
        if self._quiet or old:
            return
        line = landmark(self.state, event)
        if self._live:
            if event.get("event") in ("job_end", "failed", "warm_start", "decision") and line:
                self.console.print(Text(line), style="yellow")
            return
        now = time.time()
        tier1_over = event.get("name") == "tier1" and event.get("status") == "end"
        if line:
            self._print(f"[{clock(self.state.elapsed(now))}] {line}")
        elif tier1_over or (now >= self._next_line and event.get("event") in ("job", "point")):
            self._print(sentence(self.state, now=now))
            self._next_line = now + PLAIN_SECONDS

    def _print(self, line: str) -> None:
        say(self.console.file, line)


def say(stream: IO[str], line: str) -> None:
    """Writes `line` at once; a reader that has gone away (`| head -1`, a killed `tee`) is no error.

    What follows on that stream goes nowhere: neither a search nor its exit code depends on who
    listens.
    """
    try:
        stream.write(line + "\n")
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def write_line(stream: IO[str], event: Mapping[str, Any]) -> None:
    """Writes one strict JSON object on one line; non-finite numbers become null."""
    say(stream, json.dumps(to_plain(event), allow_nan=False, ensure_ascii=False))
