"""What `llp landscape` says while it runs: a line a part, on a terminal the points in between."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from llp.display import printable
from llp.reporting import formats
from llp.shell import emit, say

PLAIN_SECONDS = 5.0
"""Least time between two lines about points where there is no terminal."""


class Progress:
    """What is said while it runs: one line a part, on a terminal with the points in between."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self._json = json
        self._quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
        self._started = time.monotonic()
        self._next = 0.0
        self._place = ""
        self._begun = 0.0
        self._open = False

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes in one event of `analysis.analyse`."""
        if self._json:
            emit(event)
        if self._quiet:
            return
        what = event["event"]
        if what == "part":
            self._part(event)
        elif what == "progress":
            self._points(event)
        elif what == "training":
            self._training(event)
        elif what == "subject":
            self._say(
                f"{event['title']}, {event['facts'].get('parameters', '?')} parameters, "
                f"{event['facts'].get('measured on', '')}"
            )
        elif what == "drawing":
            self._say("drawing")

    def _part(self, event: Mapping[str, Any]) -> None:
        name, status = event["part"], event["status"]
        if status == "start":
            self._place, self._begun = f"[{event['place']}] {name}", time.monotonic()
            self._next = self._begun + PLAIN_SECONDS
            self._over(self._place)
        elif status == "end":
            self._say(f"{self._place}: {formats.duration(event['seconds'])}")
        elif status == "kept":
            self._say(f"[{event['place']}] {name}: there already")
        else:
            self._say(f"{name}: {'failed: ' * (status == 'failed')}{event['why']}")

    def _points(self, event: Mapping[str, Any]) -> None:
        done, total, now = event["done"], event["total"], time.monotonic()
        left = ""
        if 0 < done < total:
            seconds = (now - self._begun) / done * (total - done)
            left = f", about {formats.duration(seconds)} left"
        line = f"{self._place}: {done} of {total}{left}"
        if self._live:
            self._over(line)
        elif now >= self._next:
            self._say(line)
            self._next = now + PLAIN_SECONDS

    def _training(self, event: Mapping[str, Any]) -> None:
        run = f"training {event['run'] + 1}"
        if event["status"] == "epoch":
            point = event["point"]
            line = (
                f"{run}: epoch {point.epoch}, training loss {formats.number(point.train_loss, 3)}, "
                f"validation accuracy {formats.percent(point.validation_accuracy)}"
            )
            now = time.monotonic()
            if self._live:
                self._over(line)
            elif now >= self._next:
                self._say(line)
                self._next = now + PLAIN_SECONDS
        elif event["status"] == "end":
            self._say(f"{run}: {formats.duration(event['seconds'])}")
        elif event["status"] == "kept":
            self._say(f"{run}: there already")

    def _over(self, line: str) -> None:
        """Writes over the line that stands there, on a terminal."""
        if self._live:
            sys.stderr.write(f"\r\x1b[K{printable(line)[:110]}")
            sys.stderr.flush()
            self._open = True

    def _say(self, line: str) -> None:
        if self._open:
            sys.stderr.write("\r\x1b[K")
            self._open = False
        say(printable(line))

    def close(self) -> None:
        """Ends a line that is written over."""
        if self._open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._open = False
