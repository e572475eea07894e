"""The errors a user can cause or can act on; each carries its own exit code.

Anything else that escapes is a bug in `llp` and ends with a traceback and exit code 1.
A trial that diverges, is stopped or fails is *not* an error: it is a `records.JobEnd`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class LlpError(Exception):
    """Base of the errors that are shown to the user as one clear message, without a traceback."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input file.

    Attributes:
        message: What is wrong, with the value and, where there is one, the nearest valid choice.
        path: Dotted path of the key, for example `tier1.num_trials`; empty for the whole file.
        file: The file as the user named it, or `--set` for an override.
        line: 1-based line, or 0 where there is none.
        column: 1-based column, or 0 where there is none.
    """

    message: str
    path: str = ""
    file: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        where = self.file
        if self.line:
            where += f":{self.line}:{self.column}"
        elif self.file and not self.path:
            where += ":"
        return " ".join(part for part in (where, f"{self.path}:" if self.path else "") if part) + (
            f" {self.message}" if where or self.path else self.message
        )


class SpecError(LlpError):
    """The experiment file, an override or a name in it is wrong. All problems at once."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems: tuple[Problem, ...] = (
            (Problem(problems),) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(LlpError):
    """Data files are missing, truncated or not in a layout `llp` reads."""

    exit_code = 2


class StudyError(LlpError):
    """A study folder is locked, belongs to another spec, does not exist or is damaged."""

    exit_code = 4


class EnvironmentProblem(LlpError):
    """The machine cannot do what was asked: no GPU, disk full, port in use, Ray will not start."""

    exit_code = 4


class NoTrialSucceeded(LlpError):
    """The search ran to its end and no configuration produced a usable result."""

    exit_code = 3


class TrackingError(LlpError):
    """The search is done and safe in its ledger, but MLflow has not received all of it."""

    exit_code = 5


class CheckpointError(LlpError):
    """A checkpoint is missing, truncated, altered (sha256) or holds more than plain tensors."""

    exit_code = 4


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The valid choice closest to `name`, or None when nothing is close.

    >>> nearest("cifar11", ["cifar10", "digits"])
    'cifar10'
    """
    close = difflib.get_close_matches(str(name).lower(), list(choices), n=1, cutoff=0.6)
    return close[0] if close else None


def unknown(kind: str, name: object, choices: Iterable[str]) -> str:
    """The message for an unknown name, with the nearest choice or all of them.

    >>> unknown("dataset", "cifar11", ["cifar10", "digits"])
    "unknown dataset 'cifar11'; did you mean 'cifar10'?"
    """
    known = sorted(choices)
    guess = nearest(str(name), known)
    hint = f"did you mean '{guess}'?" if guess else f"choose one of: {', '.join(known)}"
    return f"unknown {kind} '{name}'; {hint}"
