"""THE MAIN PATH of `llp landscape`: settings -> subject -> parts -> results, pictures, page.

Every part (one surface, one sharpness measure) is stored durably when it is done, with a digest of
what it was computed from: the weights, the examples, its settings and the parts it needs. What is
there with the same digest is not computed again, so an interrupted run goes on, a repeated one is
over at once, and a changed setting redoes exactly what it affects. A part that fails, or that the
subject has nothing for, is named with its reason and does not keep the others from being made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llp import registry
from llp.analyses import results, sources, store
from llp.analyses.store import PartStore, Stored
from llp.analyses.subject import Array, Part, Subject, Work
from llp.errors import EnvironmentProblem, LlpError, NoTrialSucceeded
from llp.landscape import evaluation_state
from llp.records import to_plain
from llp.reporting.landscape_page import write_landscape
from llp.spec.landscape import LandscapeSpec
from llp.surroundings import versions
from llp.tracking.lock import FileLock
from llp.training.checkpoint import write_durably
from llp.training.jobs import is_out_of_memory

OnEvent = Callable[[Mapping[str, Any]], None]
Points = Callable[[Callable[[Array], Array], Sequence[Array]], Iterable[tuple[int, Array]]]


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        folder: Where the results are.
        values: Every number by key.
        missing: Part -> why it is not there.
        computed: Parts that were computed now.
        kept: Parts that were there already.
        page: The page; None when it was not asked for.
    """

    folder: Path
    values: Mapping[str, Any]
    missing: Mapping[str, str]
    computed: tuple[str, ...]
    kept: tuple[str, ...]
    page: Path | None


def analyse(spec: LandscapeSpec, *, on_event: OnEvent | None = None, command: str = "") -> Outcome:
    """Makes all that `spec` asks for and returns what there is.

    Args:
        spec: The settings, checked.
        on_event: Called with `{"event": ..., ...}` as things happen.
        command: What the user typed, for the page.

    Raises:
        LlpError: The subject cannot be opened, or no part could be made.
        KeyboardInterrupt: On Ctrl-C; every finished part is stored.
    """
    tell = on_event or (lambda event: None)
    folder = sources.results_folder(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"cannot make {folder}: {error.strerror or error}") from error
    lock = FileLock.acquire(folder / "lock", busy=f"the results in {folder} are being made by")
    try:
        tell({"event": "folder", "folder": str(folder)})
        with _interruptible(), _Points(spec) as points:
            subject = sources.open_subject(spec, folder, tell)
            tell({"event": "subject", "title": subject.title, "facts": dict(subject.facts)})
            run = _Run(spec, subject, PartStore(folder), tell, points)
            run.all()
        if not run.done:
            reasons = "; ".join(f"{name}: {why}" for name, why in run.missing.items())
            raise NoTrialSucceeded(f"no part of the landscape could be made: {reasons}")
        return _write(spec, subject, run, folder, command)
    finally:
        lock.release()


@dataclass
class _Run:
    """Goes through the parts in the order in which they need each other."""

    spec: LandscapeSpec
    subject: Subject
    kept: PartStore
    tell: OnEvent
    points: Points
    done: dict[str, Stored] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)

    def all(self) -> None:
        """Makes every part that was asked for, and those they need."""
        digest = self.subject.digest()
        parts = {part.name: part for part in planned(self.spec, self.subject)}
        wanted = [name for name, part in parts.items() if part.analysis in self.spec.analyses]
        order: list[str] = []
        for name in wanted:
            _append(name, parts, order)
        self.tell({"event": "plan", "parts": order})
        for number, name in enumerate(order, start=1):
            self._one(parts[name], digest, f"{number}/{len(order)}")

    def _one(self, part: Part, subject: str, place: str) -> None:
        lost = [name for name in part.needs if name not in self.done]
        why = part.impossible or (f"it needs {lost[0]}, which is not there" if lost else "")
        if why:
            self.missing[part.name] = why
            self.tell({"event": "part", "part": part.name, "status": "impossible", "why": why})
            return
        needed = {name: self.done[name].digest for name in part.needs}
        digest = store.digest_of(subject, part.settings, needed)
        stored = self.kept.load(part.name, digest)
        if stored is not None:
            self.done[part.name] = stored
            self.tell({"event": "part", "part": part.name, "status": "kept", "place": place})
            return
        self.tell({"event": "part", "part": part.name, "status": "start", "place": place})
        started = time.perf_counter()
        try:
            stored = self._computed(part, digest)
        except LlpError:
            raise
        except Exception as error:  # noqa: BLE001  one part must not cost the others
            why = _reason(error)
            self.missing[part.name] = why
            self.tell({"event": "part", "part": part.name, "status": "failed", "why": why})
            return
        self.kept.save(stored)
        self.kept.clear(part.name)
        self.done[part.name] = stored
        self.computed.append(part.name)
        seconds = time.perf_counter() - started
        self.tell({"event": "part", "part": part.name, "status": "end", "seconds": seconds})

    def _computed(self, part: Part, digest: str) -> Stored:
        started = time.perf_counter()
        work = Work(
            subject=self.subject,
            spec=self.spec,
            found={name: self.done[name].finding for name in part.needs},
            evaluate_chunks=self._counted(part.name),
            progress=lambda done, total: self._progress(part.name, done, total),
            scratch=self.kept.scratch(part.name),
        )
        with evaluation_state(self.subject.model):
            finding = part.compute(work)
        return Stored(
            name=part.name,
            analysis=part.analysis,
            digest=digest,
            finding=finding,
            settings=to_plain(part.settings),
            seconds=time.perf_counter() - started,
            device=sources.device_name(self.subject.device),
        )

    def _counted(self, name: str) -> Points:
        """Evaluates chunks and tells how many points are done."""

        def evaluate_chunks(
            evaluate: Callable[[Array], Array], chunks: Sequence[Array]
        ) -> Iterator[tuple[int, Array]]:
            total, done = sum(map(len, chunks)), 0
            self._progress(name, 0, total)
            for number, values in self.points(evaluate, chunks):
                done += len(chunks[number])
                self._progress(name, done, total)
                yield number, values

        return evaluate_chunks

    def _progress(self, name: str, done: int, total: int) -> None:
        self.tell({"event": "progress", "part": name, "done": done, "total": total})


def planned(spec: LandscapeSpec, subject: Subject) -> Iterator[Part]:
    """Every part of the analyses that were asked for, and of those that these may need."""
    for analysis in dict.fromkeys(["spectrum", "trajectory", *spec.analyses]):
        yield from registry.load("analyses", analysis)(subject, spec)


def _append(name: str, parts: Mapping[str, Part], order: list[str]) -> None:
    if name in order or name not in parts:
        return
    if not parts[name].impossible:
        for needed in parts[name].needs:
            _append(needed, parts, order)
    order.append(name)


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory; try smaller batches (--batch-size) or fewer examples (--examples)"
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: at once, with everything finished stored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Points:
    """Who evaluates points: this process, or workers on Ray, which starts when it is needed."""

    def __init__(self, spec: LandscapeSpec) -> None:
        self._workers = spec.workers
        self._open = contextlib.ExitStack()
        self._spread: Points | None = None

    def __call__(
        self, evaluate: Callable[[Array], Array], chunks: Sequence[Array]
    ) -> Iterable[tuple[int, Array]]:
        """See `landscape.surface`."""
        if self._workers.num_workers == 0:
            return in_order(evaluate, chunks)
        if self._spread is None:
            self._spread = self._start()
        return self._spread(evaluate, chunks)

    def _start(self) -> Points:
        from llp.cluster.landscape_points import RayPoints
        from llp.cluster.ray_tune import ray_session

        workers, handler = self._workers, signal.getsignal(signal.SIGTERM)
        self._open.enter_context(ray_session(address=workers.address))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set one of its own
        return RayPoints(
            workers.num_workers, cpus=workers.cpus_per_worker, gpus=workers.gpus_per_worker
        )

    def __enter__(self) -> _Points:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def in_order(
    evaluate: Callable[[Array], Array], chunks: Sequence[Array]
) -> Iterator[tuple[int, Array]]:
    """One chunk after the other in this process."""
    for number, chunk in enumerate(chunks):
        yield number, evaluate(chunk)


def _write(spec: LandscapeSpec, subject: Subject, run: _Run, folder: Path, command: str) -> Outcome:
    """Results first, then what is drawn from them."""
    settings = spec.model_dump(mode="json", exclude={"workers", "output", "device"})
    facts = {
        "title": subject.title,
        "facts": dict(subject.facts),
        "curve": [dataclasses.asdict(point) for point in subject.curve],
        "observations": [dataclasses.asdict(seen) for seen in subject.observations],
    }
    plain, arrays = results.content(
        run.done.values(),
        subject=facts,
        settings=settings,
        missing=run.missing,
        environment=_environment(command),
    )
    plain = to_plain(plain)
    write_durably(folder / "landscape.npz", store.as_npz(arrays))
    text = json.dumps(plain, allow_nan=False, indent=1)
    write_durably(folder / "landscape.json", text.encode())
    run.tell({"event": "drawing"})
    page = write_landscape(
        plain, arrays, folder, pictures=spec.output.pictures, page=spec.output.page
    )
    kept = tuple(name for name in run.done if name not in run.computed)
    return Outcome(folder, plain["values"], run.missing, tuple(run.computed), kept, page)


def _environment(command: str) -> dict[str, Any]:
    return {
        **versions("torch", "numpy"),
        "python": platform.python_version(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "command": command,
    }


__all__ = ["Outcome", "analyse"]
