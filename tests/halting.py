"""Worker processes of Ray, halted while they certainly have a job.

Ray names a worker process after the call that it is at: `ray::JobTrainable.train` while it trains,
`ray::JobTrainable` between two calls. A process that is halted (SIGSTOP) under the first name is at
a job which the driver has written down and cannot see the end of before the process goes on. So to
halt, look and then kill loses a job for sure; to look and then kill would race with its end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

AT_WORK = "Trainable.train"
"""In the name of a process that works on a job."""


def name_of(process: psutil.Process) -> str:
    """What Ray calls a process at the moment; empty when it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def halt(process: psutil.Process, seconds: float = 60) -> bool:
    """Sends SIGSTOP and waits until every thread has stopped; False when the process is gone.

    Raises:
        TimeoutError: It has not stopped in `seconds`; it goes on.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(psutil.Error):
        process.suspend()
    while True:
        states = _thread_states(process.pid)
        if not states or "Z" in states:
            return False
        if set(states) == {"T"}:
            return True
        if time.monotonic() > deadline:
            resume([process])
            raise TimeoutError(f"{process} does not stop: its threads are {states}")
        time.sleep(0.001)


def _thread_states(pid: int) -> list[str]:
    states = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states.append(path.read_text().rsplit(")", 1)[1].split()[0])
    return states


def resume(processes: Sequence[psutil.Process]) -> None:
    """SIGCONT."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.resume()


def halted_at_work(
    find: Callable[[], list[psutil.Process]],
    *,
    going_on: Callable[[], bool] = lambda: True,
    seconds: float = 600,
) -> psutil.Process | None:
    """Halts a process of those that `find` gives, at a moment when it has a job.

    Args:
        find: The processes that train, looked up anew for every try.
        going_on: False once the search is over.
        seconds: Limit.

    Returns:
        The process, halted; None when the search ended before.
    """
    deadline = time.monotonic() + seconds
    while going_on():
        for process in find():
            if AT_WORK not in name_of(process):
                continue
            if halt(process) and AT_WORK in name_of(process):
                return process
            resume([process])
        if time.monotonic() > deadline:
            raise TimeoutError(f"no process at work in {seconds:.0f} s")
        time.sleep(0.01)
    return None
