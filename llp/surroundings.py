"""The process and the machine a driver runs in: signals, and what is noted of them."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llp import __version__


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a search as Ctrl-C does: at once, with everything finished in the ledger."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe_environment(command: str = "") -> dict[str, Any]:
    """Versions, hardware, command and commit, for the ledger."""
    return {
        **versions("torch", "torchvision", "ray", "optuna", "mlflow", "numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpus": _gpu_names(),
        "git_commit": _git_commit(),
        "command": command,
        "folder": str(Path.cwd()),
    }


def versions(*names: str) -> dict[str, str | None]:
    """Of this package and others; None for one that is not installed."""
    found: dict[str, str | None] = {"llp": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _git_commit() -> str | None:
    """Commit of the folder the search is started in, marked when files differ from it."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} (changed)" if changed else commit
