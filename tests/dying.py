"""Runs a module of `llp` which signals itself at a certain point, as if somebody had done it then.

    python dying.py SIGNAL WHERE COUNT MODULE ARGUMENTS...

A test that waits for a moment and kills then races with a program that goes on meanwhile: on a busy
machine the program has ended before. Here the moment is a point of the program, on any machine.
WHERE is `ledger=PATH` (once that ledger has COUNT lines), `chunks=PATH` (once that folder has COUNT
chunks of a surface), `database=PATH` (once that file has COUNT bytes) or `MODULE:CLASS.METHOD`
(after that was called COUNT times).
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lines_of(path: Path) -> int:
    """Whole lines; none when the file is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def chunks_in(path: Path) -> int:
    """Finished chunks."""
    return len(list(path.glob("*.npy")))


def size_of(path: Path) -> int:
    """Bytes; none when the file is not there."""
    return path.stat().st_size if path.exists() else 0


MOMENTS = {
    "ledger": ("llp.tracking.ledger:Ledger.append_many", lines_of),
    "chunks": ("llp.landscape.store:FileStore.__setitem__", chunks_in),
    "database": ("sqlalchemy.engine.base:Connection.execute", size_of),
}
"""Kind of place -> after which calls to look, and how far it is."""


def signal_after(method: str, due: Callable[[], bool], number: int) -> None:
    """Makes `module:Class.method` signal this process, once, after the first call that is `due`."""
    module, _, name = method.partition(":")
    owner, _, attribute = name.partition(".")
    found = getattr(importlib.import_module(module), owner)
    whole = getattr(found, attribute)
    sent = False

    @functools.wraps(whole)
    def signalling(*arguments: Any, **options: Any) -> Any:
        nonlocal sent
        result = whole(*arguments, **options)
        if not sent and due():
            sent = True
            os.kill(os.getpid(), number)
        return result

    setattr(found, attribute, signalling)


def main(sent: str, where: str, count: str, module: str, *arguments: str) -> None:
    """Runs the module as `python -m` does."""
    number, least = signal.Signals[sent], int(count)
    # What is started by tests in the background may ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, _, path = where.partition("=")
    if kind in MOMENTS:
        method, progress = MOMENTS[kind]
        signal_after(method, lambda: progress(Path(path)) >= least, number)
    else:
        calls = itertools.count(1)
        signal_after(where, lambda: next(calls) == least, number)
    sys.path[0] = os.getcwd()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
