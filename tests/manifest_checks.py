"""What the tests of `jobs/` and `docker/` share: pins, strict schemas, commands found in text."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = ROOT.parent / "shared" / "schemas"
SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY")
A_SECRET_ITSELF = re.compile(
    r"://[^/\s:@]+:[^/\s@]+@|\b[0-9a-f]{32,}\b|password1234|AKIA[0-9A-Z]{16}|-----BEGIN"
)


def pins() -> dict[str, str]:
    """Distribution -> version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def project_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def published_schema(name: str) -> Any:
    """A published schema that lies beside the checkout; skips the test where it does not."""
    path = SCHEMAS / name
    if not path.is_file():
        pytest.skip(f"the published schema {name} is not beside the checkout (../shared/schemas)")
    return _loaded(path)


@cache
def _loaded(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document with its dotted path, the document itself first."""
    yield path, value
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for key, item in inside:
        yield from walk(item, f"{path}.{key}" if path else str(key))


def code_and_comments(path: Path) -> tuple[str, str]:
    """A file's text without its comment lines, and the comment lines without their `#`."""
    code, comments = [], []
    for line in path.read_text().splitlines():
        match = re.match(r"\s*#(?!!)(.*)", line)
        (comments if match else code).append(match[1] if match else line)
    return "\n".join(code), "\n".join(comments)


ENDS = {"&&", "||", "|", ";", "&", ">"}


def examples(path: Path) -> str:
    """The commands in a file's comments: their lines stand three spaces in."""
    _, comments = code_and_comments(path)
    return "\n".join(line for line in comments.splitlines() if line.startswith("   "))


def llp_commands(text: str) -> list[list[str]]:
    """The arguments of every `llp` command in lines of shell."""
    found = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            before = words[place - 1] if place else ""
            starts = not before or before in {*ENDS, "head"} or "=" in before
            if (word == "llp" and starts) or word.endswith("/bin/llp"):
                rest = words[place + 1 :]
                ends = [k for k, w in enumerate(rest) if w in ENDS]
                found.append(rest[: min(ends, default=len(rest))])
                break
    return found


@cache
def commands() -> dict[str, Any]:
    """The commands of the real command line."""
    from typer.main import get_command

    from llp.cli import app

    return dict(get_command(app).commands)  # type: ignore[attr-defined]


def parse(words: list[str]) -> dict[str, Any]:
    """Parses `llp WORDS` with the real command line; an unknown option or command raises."""
    command, name, rest = commands()[words[0]], words[0], words[1:]
    while hasattr(command, "commands"):
        name, rest = rest[0], rest[1:]
        command = command.commands[name]
    context = command.make_context(name, list(rest))
    return dict(context.params)


def options_of(source: Path) -> set[str]:
    """Every `"--name"` in a library's source."""
    return set(re.findall(r"""["'](--[a-z0-9-]+)(?:/--[a-z0-9-]+)?["']""", source.read_text()))
