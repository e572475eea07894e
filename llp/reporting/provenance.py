"""What went wrong, and how to get the same study again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llp.records import SearchResult
from llp.reporting import formats, yaml_text
from llp.reporting.study import FAILURES, reached

MAX_TRACEBACK = 4000  # characters kept, from the end: the error is there
_SECRET = re.compile(
    r"(^|[_. ])(token|secret|passw(or)?d|credentials?|(api|private|access)_?key)$", re.IGNORECASE
)


@dataclass(frozen=True)
class FailureGroup:
    """Trials that failed in the same way.

    Attributes:
        outcome: In words.
        trials: `t003 (rung 1)`, ...
        summary: The last line of the message.
        text: The whole message or the end of a long one; empty when it is only one line.
    """

    outcome: str
    trials: tuple[str, ...]
    summary: str
    text: str


def failure_groups(result: SearchResult) -> tuple[FailureGroup, ...]:
    """Failed, diverged and out-of-memory trials by outcome and message, biggest group first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for trial in result.trials:
        if trial.outcome in FAILURES:
            rung = reached(trial)
            place = f"{formats.clean(trial.trial.trial_id)} (rung {rung or 'none'})"
            message = formats.clean(trial.failure).strip()
            groups.setdefault((trial.outcome.replace("_", " "), message), []).append(place)
    made = []
    for (outcome, message), trials in groups.items():
        lines = message.splitlines()
        summary = formats.short(lines[-1], 300) if lines else "no message was recorded"
        long = len(lines) > 1 or len(message) > 300
        if len(message) > MAX_TRACEBACK:
            message = "…" + message[-MAX_TRACEBACK:]
        made.append(FailureGroup(outcome, tuple(trials), summary, message if long else ""))
    return tuple(sorted(made, key=lambda group: -len(group.trials)))


@dataclass(frozen=True)
class Provenance:
    """How to reproduce a study.

    Attributes:
        command: As it was typed; empty when it was not recorded.
        facts: `(label, value)` pairs: digest, seeds, versions, hardware, commit.
        spec_yaml: The whole validated spec.
    """

    command: str
    facts: tuple[tuple[str, str], ...]
    spec_yaml: str


def provenance(result: SearchResult) -> Provenance:
    """Everything recorded about how `result` came about; secrets are hidden."""
    environment = dict(_flat(_hide(result.environment)))
    command = environment.pop("command", "")
    seeds = sorted({v.seed for v in result.verifications})
    facts = [
        ("Study", formats.clean(result.study_id)),
        ("Spec digest (sha256)", formats.clean(result.spec_digest)),
        ("First event", formats.moment(result.started)),
        ("Last event", formats.moment(result.finished)),
        ("Seed of the study", formats.number(result.spec.get("seed"))),
        ("Seeds of the verification", ", ".join(map(str, seeds)) or "none yet"),
        (
            "Devices of tier 2",
            ", ".join(sorted({formats.short(p.device) for p in result.profiles})),
        ),
    ]
    facts += [(_label(key), value) for key, value in environment.items()]
    return Provenance(
        command=command,
        facts=tuple((label, value) for label, value in facts if value),
        spec_yaml=yaml_text.dump(_hide(result.spec)),
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, item in value.items():
        name = f"{prefix}{formats.short(key, 60)}"
        if isinstance(item, Mapping):
            rows += _flat(item, f"{name} ")
        elif isinstance(item, list | tuple):
            rows.append((name, ", ".join(formats.clean(x) for x in item)))
        else:
            rows.append((name, formats.clean(item) if item is not None else ""))
    return rows


def _hide(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: "(hidden)" if _SECRET.search(str(key)) and item else _hide(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    return value


def _label(key: str) -> str:
    names = {"cpu": "CPU", "gpu": "GPU", "cuda": "CUDA", "mlflow": "MLflow", "llp": "llp"}
    words = [names.get(word, word) for word in key.replace("_", " ").split()]
    text = " ".join(words)
    return text if not words or words[0] in names.values() else text[:1].upper() + text[1:]
