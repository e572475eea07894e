"""Halting a process: whoever cannot be halted goes on."""

from __future__ import annotations

import subprocess
import sys

import halting
import psutil
import pytest


def test_a_process_that_does_not_stop_in_time_is_named_and_goes_on(monkeypatch):
    waits = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    monkeypatch.setattr(halting, "_thread_states", lambda pid: ["T", "D"])
    with pytest.raises(TimeoutError, match=rf"pid={waits.pid}.* does not stop"):
        halting.halt(psutil.Process(waits.pid), seconds=0)
    waits.communicate("\n", timeout=300)  # a halted one would not read it
    assert waits.returncode == 0
