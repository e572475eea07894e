"""YAML text -> plain data, with the line and column of every key.

Reads the YAML 1.2 core schema: `1e-3` is a number, `no` is text, `010` is ten. The parser's events
are consumed one by one, so a hostile file is given up on early: tags, anchors and aliases are
refused, and so are more than 5,000 entries, 30 levels, 256 kB, or a second document. Nothing is
ever constructed but dicts, lists, text, numbers, true/false and null.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

from llp.errors import Problem, SpecError

MAX_BYTES = 256_000
MAX_ENTRIES = 5_000
MAX_DEPTH = 30

OVERRIDE = "--set"
"""`Problem.file` of what is wrong with an override."""

Parts = tuple[str | int, ...]

_DROPPED = "\0"  # starts the key of a duplicate; no YAML file can hold it

_INTEGER = re.compile(r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_WORDS = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"], None),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
}


@dataclass(frozen=True)
class Position:
    """A place in a file, both 1-based; `file` where that is not the one of its `Source`."""

    line: int
    column: int
    file: str = ""


@dataclass
class Source:
    """Where each value of a file, or of an override, was written.

    Attributes:
        file: The file as shown to the user.
        keys: Path -> place of its key (of list entries: of the entry).
        values: Path -> place of its value.
        overrides: Paths that `--set` gave.
    """

    file: str = ""
    keys: dict[Parts, Position] = field(default_factory=dict)
    values: dict[Parts, Position] = field(default_factory=dict)
    overrides: set[Parts] = field(default_factory=set)

    def problem(self, path: Parts, message: str, *, key: bool = False) -> Problem:
        """`message` about `path`, placed at its value, or at its key, or at its nearest parent."""
        path = self.written(path)
        dotted = ".".join(map(str, path))
        if self.overridden(path):
            return Problem(message, path=dotted, file=OVERRIDE)
        place: Position | None = None
        for length in range(len(path), -1, -1):
            if path[:length] in self.keys:
                at_key = key or length < len(path)
                place = (self.keys if at_key else self.values)[path[:length]]
                break
        if place is None:
            return Problem(message, path=dotted, file=self.file)
        return Problem(message, dotted, place.file or self.file, place.line, place.column)

    def given(self, path: Parts) -> int:
        """How `path` was given: 2 by an override, 1 in the file, 0 not at all."""
        path = self.written(path)
        return 2 if self.overridden(path) else int(path in self.keys)

    def overridden(self, path: Parts) -> bool:
        """Whether an override set `path`, a parent of it, or made it by naming what is below."""
        return any(
            path[: len(given)] == given or (path not in self.keys and given[: len(path)] == path)
            for given in self.overrides
            if path
        )

    def written(self, path: Parts) -> Parts:
        """`path` as the file spells it: a choice written as a list has no key `values`."""
        if len(path) > 2 and path[0] == "search_space" and path[2] in ("values", "value"):
            known = self.keys.keys() | self.overrides
            if path[:3] not in known and path[:2] in known:
                return path[:2] + path[3:]
        return path


def read(path: Path, shown: str) -> str:
    """The text of an experiment file.

    Raises:
        SpecError: Missing, not a file, larger than 256 kB, not readable, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SpecError([Problem("is not a regular file", file=shown)])
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise SpecError([Problem("is a folder, not an experiment file", file=shown)]) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SpecError([Problem(f"cannot be read: {reason}", file=shown)]) from None
    if len(content) > MAX_BYTES:
        raise SpecError([Problem(f"is over {MAX_BYTES // 1000} kB; not a spec", file=shown)])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        message = f"is not UTF-8 text: byte 0x{content[error.start]:02x}"
        raise SpecError([Problem(message, "", shown, line, column)]) from None


def parse(text: str, file: str) -> tuple[Any, Source, list[Problem]]:
    """The data in `text`, where each part stood, and what is wrong with it as YAML.

    After a duplicate key, a tag or an alias reading goes on, so that all of them are reported;
    after a syntax error it ends. An empty text gives None.
    """
    builder = _Builder(Source(file))
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.take(event)
    except _GiveUp:
        pass
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = _syntax(str(error.problem or error.context), text, mark.line if mark else -1)
        builder.report(message, mark)
    except YAMLError as error:
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        reason = getattr(error, "reason", "") or "cannot be read as YAML"
        builder.problems.append(Problem(f"yaml: {reason}", "", file, line, column))
    return builder.root, builder.source, builder.problems


class _GiveUp(Exception):
    pass


@dataclass
class _Frame:
    """An open mapping or list: its path, the data, and the key that waits for its value."""

    path: Parts
    data: dict[str, Any] | list[Any]
    key: str | None = None


class _Builder:
    """Takes parser events and builds the data, its places and the problems."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.root: Any = None
        self.problems: list[Problem] = []
        self._stack: list[_Frame] = []
        self._num_documents = self._num_entries = 0

    def report(self, message: str, mark: Any, path: Parts = ()) -> None:
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        dotted = ".".join(map(str, path))
        self.problems.append(Problem(message, dotted, self.source.file, line, column))

    def take(self, event: Event) -> None:
        if isinstance(event, DocumentStartEvent):
            self._num_documents += 1
            if self._num_documents > 1:
                self._give_up("a second document starts here; one file is one experiment", event)
            if event.version or event.tags:
                self.report("YAML directives are not allowed", event.start_mark)
        elif isinstance(event, CollectionEndEvent):
            self._stack.pop()
        elif isinstance(event, NodeEvent):
            self._node(event)

    def _give_up(self, message: str, event: Event) -> None:
        self.report(message, event.start_mark)
        raise _GiveUp

    def _node(self, event: NodeEvent) -> None:
        self._num_entries += 1
        if self._num_entries > 2 * MAX_ENTRIES:  # a key and its value are two nodes
            self._give_up(f"has over {MAX_ENTRIES:,} entries; not a spec", event)
        if len(self._stack) >= MAX_DEPTH:
            self._give_up(f"is nested over {MAX_DEPTH} levels deep", event)
        frame = self._stack[-1] if self._stack else None
        if isinstance(frame, _Frame) and isinstance(frame.data, dict) and frame.key is None:
            self._key(event, frame)
            return
        path = self._path(frame)
        if isinstance(event, AliasEvent) or event.anchor:
            self.report(
                "anchors and aliases are not allowed; write the value out", event.start_mark
            )
        elif tag := getattr(event, "tag", None):
            self.report(f"YAML tags are not allowed: {tag}", event.start_mark, path)
        place = Position(event.start_mark.line + 1, event.start_mark.column + 1)
        self.source.values[path] = place
        if path not in self.source.keys:
            self.source.keys[path] = place
        data: Any = None
        if isinstance(event, ScalarEvent):
            data = _scalar(event)
            if not event.value and event.implicit[0]:  # marked where the next key begins
                self.source.values[path] = self.source.keys[path]
        elif isinstance(event, CollectionStartEvent):
            data = {} if isinstance(event, MappingStartEvent) else []
            if not event.flow_style and path:  # a block starts on a later line than its key
                self.source.values[path] = self.source.keys[path]
        self._place(frame, data)
        if isinstance(event, CollectionStartEvent):
            self._stack.append(_Frame(path, data))

    def _key(self, event: NodeEvent, frame: _Frame) -> None:
        if not isinstance(event, ScalarEvent):
            self._give_up("a key must be plain text", event)
            return
        if event.tag or event.anchor:
            self.report("a key must be plain text", event.start_mark, frame.path)
        key, path = event.value, (*frame.path, event.value)
        if path in self.source.keys:
            first = self.source.keys[path].line
            self.report(f"'{key}' already given at line {first}", event.start_mark, path)
            key = f"{_DROPPED}{len(self.problems)}"
            path = (*frame.path, key)
        self.source.keys[path] = Position(event.start_mark.line + 1, event.start_mark.column + 1)
        frame.key = key

    def _path(self, frame: _Frame | None) -> Parts:
        if frame is None:
            return ()
        return (*frame.path, len(frame.data) if isinstance(frame.data, list) else frame.key or "")

    def _place(self, frame: _Frame | None, data: Any) -> None:
        if frame is None:
            self.root = data
        elif isinstance(frame.data, list):
            frame.data.append(data)
        else:
            if frame.key is not None and not frame.key.startswith(_DROPPED):
                frame.data[frame.key] = data
            frame.key = None


def _scalar(event: ScalarEvent) -> Any:
    text: str = event.value
    if not event.implicit[0]:  # quoted or a block of text
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _syntax(problem: str, text: str, line: int) -> str:
    lines = text.splitlines()
    row = lines[line] if 0 <= line < len(lines) else ""
    if "\\t" in problem or "\t" in row[: len(row) - len(row.lstrip())]:
        return "tab used for indentation; use spaces"
    if problem == "mapping values are not allowed here":
        return "yaml: a second ':' here; quote the text, or check the indentation"
    return f"yaml: {problem}"


def set_path(data: dict[str, Any], path: Parts, value: Any, source: Source) -> str | None:
    """Puts `value` at `path`, making the mappings on the way; what is in the way, if anything."""
    node: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, dict):
            if last:
                node[str(part)] = value
            else:
                node = node.setdefault(str(part), {})
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            if last:
                node[part] = value
            node = node[part]
        else:
            what = f"a list of {len(node)}" if isinstance(node, list) else "a single value"
            return f"'{'.'.join(map(str, path[:depth]))}' is {what} and has no '{part}'"
    source.overrides.add(path)
    return None


def as_parts(dotted: str) -> Parts:
    """`a.0.b` as `("a", 0, "b")`."""
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))
