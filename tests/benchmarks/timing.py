"""When workers work: an objective that notes its own times, and the steady state they add up to.

*Steady state* is the time during which every worker had work: from when the last worker starts
its first job to when the first worker finds nothing left to do.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil


class Timed:
    """An objective that says in `JobEnd.device` which process worked on a job, when, and how long.

    The clock is the machine's monotonic one, the same in every process; `active` is the time inside
    the objective, so without the pauses in which the worker waits for the driver.
    """

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def __call__(self, job: Any) -> Iterator[Any]:
        """Works on `job`."""
        began, active = time.monotonic(), 0.0
        work = self.objective(job)
        while True:
            resumed = time.monotonic()
            try:
                report = next(work)
            except StopIteration as stop:
                now = time.monotonic()
                span = {
                    "pid": os.getpid(),
                    "began": began,
                    "ended": now,
                    "active": active + now - resumed,
                    "memory": peak_memory_bytes(),
                }
                return replace(stop.value, device=json.dumps(span))
            active += time.monotonic() - resumed
            yield report


def run_to_end(objective: Any, job: Any) -> Any:
    """The `JobEnd` of a job whose reports nobody wants."""
    work = objective(job)
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def spans_of(ends: list[Any]) -> list[dict[str, Any]]:
    """What `Timed` noted."""
    return [json.loads(end.device) for end in ends]


def peak_memory_bytes() -> int:
    """Peak resident memory of this process's program.

    Not `ru_maxrss`, which survives `exec`: a process that a large one starts begins with its size.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def steady(spans: list[dict[str, Any]], workers: int) -> dict[str, float]:
    """Worker seconds per job and share of worker time outside the objective, in steady state."""
    firsts: dict[int, float] = {}
    for span in sorted(spans, key=lambda one: one["began"]):
        firsts.setdefault(span["pid"], span["began"])
    begin = sorted(firsts.values())[workers - 1] if len(firsts) >= workers else min(firsts.values())
    end = sorted(span["ended"] for span in spans)[-workers]
    busy = num_jobs = 0.0
    for span in spans:
        length = span["ended"] - span["began"]
        inside = max(0.0, min(span["ended"], end) - max(span["began"], begin)) / length
        busy += inside * span["active"]
        num_jobs += inside
    total = min(workers, len(firsts)) * (end - begin)
    return {
        "worker_seconds_per_job": total / num_jobs,
        "active_seconds_per_job": busy / num_jobs,
        "lost_share": 1 - busy / total,
        "steady_seconds": end - begin,
    }
