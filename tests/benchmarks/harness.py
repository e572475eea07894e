"""What the benchmarks share: a process tree under watch, bars, tables and the command line.

A benchmark runs every contender as a child process of its own (`run_part`), one after the other, so
that none inherits another's imports, memory or Ray. This process only watches: it imports neither
torch nor Ray, and looks at the child's whole process tree twice a second.

Memory is counted in two ways. `peak_pss_bytes` shares every page among the processes that map it
and is what the machine really had to hold; `peak_rss_bytes` counts shared libraries and Ray's
object store once per process and is an upper bound. CPU seconds are the last value seen of every
process that ever belonged to the tree, so up to half a second is lost of a process that ends;
contenders that start many short processes look a little cheaper than they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.5
PSS_EVERY = 4
"""Samples between two readings of the proportional set size, which costs some milliseconds each."""

_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


@dataclass(frozen=True)
class Usage:
    """What a process tree took from its start to the end of its first process.

    Attributes:
        seconds: Wall clock.
        cpu_seconds: User and system time of all processes.
        peak_pss_bytes: Largest memory in use at once, shared pages counted once.
        peak_rss_bytes: The same with shared pages counted in every process.
        num_processes: Processes seen.
    """

    seconds: float
    cpu_seconds: float
    peak_pss_bytes: int
    peak_rss_bytes: int
    num_processes: int


class ProcessTree:
    """A process and everything it starts, also what outlives its parent."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._members: dict[tuple[int, float], psutil.Process] = {}
        self._cpu: dict[tuple[int, float], float] = {}
        self._names: dict[tuple[int, float], str] = {}

    def members(self) -> list[psutil.Process]:
        """The processes alive now."""
        found: dict[tuple[int, float], psutil.Process] = {}
        for start in [self._root, *self._members.values()]:
            if (start.pid, start.create_time()) in found:
                continue
            try:
                if not start.is_running():
                    continue
                for process in [start, *start.children(recursive=True)]:
                    found[process.pid, process.create_time()] = process
            except _GONE:
                continue
        self._members = found
        return list(found.values())

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds so far by kind of process (`driver`, `workers`, `ray`, `other`)."""
        for process in self.members():
            key = (process.pid, process.create_time())
            try:
                times = process.cpu_times()
                self._cpu[key] = times.user + times.system
                self._names[key] = self._kind(process)
            except _GONE:
                continue
        total: dict[str, float] = {}
        for key, seconds in self._cpu.items():
            total[self._names[key]] = total.get(self._names[key], 0.0) + seconds
        return total

    def _kind(self, process: psutil.Process) -> str:
        if process.pid == self._root.pid:
            return "driver"
        command = process.cmdline()
        name = os.path.basename(command[0]) if command else ""
        if name.startswith("ray::"):
            return "workers"
        if name in ("raylet", "gcs_server") or any("/ray/" in part for part in command):
            return "ray"
        return "other"

    def memory(self, *, proportional: bool) -> int:
        """Bytes in use now: PSS when `proportional`, else RSS."""
        total = 0
        for process in self._members.values():
            try:
                if proportional:
                    info = process.memory_full_info()
                    total += getattr(info, "pss", info.uss)  # Linux has both, others have USS
                else:
                    total += process.memory_info().rss
            except _GONE:
                continue
        return total

    @property
    def num_seen(self) -> int:
        """Processes that ever belonged to the tree."""
        return len(self._cpu)


class Watch(threading.Thread):
    """Samples a process tree until `finish`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._tree = ProcessTree(pid)
        self._over = threading.Event()
        self._cpu_seconds = 0.0
        self._peak = {True: 0, False: 0}
        self._began = time.monotonic()

    def run(self) -> None:
        """Samples."""
        number = 0
        while True:
            self._cpu_seconds = sum(self._tree.cpu_seconds().values())
            for proportional in (False, True) if number % PSS_EVERY == 0 else (False,):
                memory = self._tree.memory(proportional=proportional)
                self._peak[proportional] = max(self._peak[proportional], memory)
            number += 1
            if self._over.wait(SAMPLE_SECONDS):
                return

    def finish(self) -> Usage:
        """Stops sampling; call it when the first process has ended."""
        seconds = time.monotonic() - self._began
        self._over.set()
        self.join()
        return Usage(
            seconds, self._cpu_seconds, self._peak[True], self._peak[False], self._tree.num_seen
        )


def run_part(
    script: str, part: str, options: dict[str, Any], *, timeout: float = 3600
) -> tuple[dict[str, Any], Usage]:
    """Runs `script --part PART` as a child process; what its function returned, and what it took.

    Raises:
        RuntimeError: The child failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        command = [sys.executable, script, "--part", part, json.dumps(options), str(result)]
        with log.open("wb") as output:
            child = subprocess.Popen(command, env=child_environment(), stdout=output, stderr=output)
            watch = Watch(child.pid)
            watch.start()
            try:
                code = child.wait(timeout=timeout)
            except BaseException:
                for process in psutil.Process(child.pid).children(recursive=True):
                    process.kill()
                child.kill()
                raise
            finally:
                usage = watch.finish()
        if code != 0 or not result.exists():
            raise RuntimeError(
                f"{Path(script).name} --part {part} ended with code {code}:\n"
                + log.read_text(errors="replace")[-4000:]
            )
        return json.loads(result.read_text()), usage


def child_environment() -> dict[str, str]:
    """The environment of every contender: one thread per process, patient Ray, no usage reports."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def serve_part(arguments: Sequence[str], parts: dict[str, Callable[..., dict[str, Any]]]) -> bool:
    """Runs one part when this process is a child of `run_part`; whether it was."""
    if len(arguments) != 4 or arguments[0] != "--part":
        return False
    _, part, options, result = arguments
    Path(result).write_text(json.dumps(parts[part](**json.loads(options))))
    return True


@dataclass(frozen=True)
class Bar:
    """A figure with the limit it has to keep.

    Attributes:
        name: What is measured, with its unit.
        value: The measured value.
        limit: What it has to keep.
        at_most: True when smaller is better.
    """

    name: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the limit is kept."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def plain(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        bar = f"{'<=' if self.at_most else '>='} {self.limit:g}"
        return {"name": self.name, "value": round(self.value, 4), "bar": bar, "met": self.met}


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    built = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    built.add_argument("--json", type=Path, metavar="FILE", help="write figures and bars to FILE")
    built.add_argument("--quick", action="store_true", help="a version of about one minute")
    return built


def finish(figures: dict[str, Any], bars: Sequence[Bar], file: Path | None) -> None:
    """Prints the bars and writes everything to `file`."""
    rows = [
        [bar["name"], f"{bar['value']:g}", bar["bar"], "met" if bar["met"] else "MISSED"]
        for bar in (each.plain() for each in bars)
    ]
    print_table("Bars", ["", "value", "bar", ""], rows)
    if file is not None:
        plain = {"figures": figures, "bars": [bar.plain() for bar in bars]}
        file.write_text(json.dumps(plain, indent=2, default=_plain) + "\n")
        print(f"\nwritten to {file}")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An aligned text table; the first column to the left, the others to the right."""
    widths = [max(len(str(row[k])) for row in [header, *rows]) for k in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            str(cell).ljust(width) if k == 0 else str(cell).rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


def machine() -> dict[str, Any]:
    """Where and with what this was measured; the load tells how quiet the machine was."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    for name in ("llp", "torch", "ray", "mlflow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def wall_seconds(command: Sequence[str], *, repeats: int) -> float:
    """Median wall-clock seconds of a command that must succeed; one run before is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=child_environment())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def gigabytes(count: float) -> float:
    """Bytes as 10^9 bytes, two decimals."""
    return round(count / 1e9, 2)


def _plain(value: Any) -> Any:
    return asdict(value)
