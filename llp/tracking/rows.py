"""Rows of MLflow in the making: what a translation of a ledger has, whatever the ledger is of.

A translation (`mlflow_rows` for searches and trainings, `batch_rows` for batches) takes the events
of a ledger one by one and keeps one parent row and its child rows, without MLflow. The rows depend
on the sequence of events only, never on how it was cut into batches, and carry the ledger's own
timestamps: shipping them twice makes no second row. Non-finite numbers are never logged.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llp.tracking.replay import Replay

STUDY = ""
"""Key of the parent row; children are keyed by the tag `RowTable.key_tag`."""
CURVE_FIELDS = (
    "validation_accuracy",
    "validation_loss",
    "train_accuracy",
    "train_loss",
    "learning_rate",
    "data_fraction",
    "samples_seen",
)
"""Of a point: what becomes a curve."""
MAX_KEY, MAX_PARAM, MAX_TAG = 200, 500, 4000
_BAD_CHARACTERS = re.compile(r"[^/\w.\- :]")
_UNSTORABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

MetricRow = tuple[str, float, int, int]
"""Key, value, Unix time in milliseconds, step."""


@dataclass
class Row:
    """One run as it should be, and the metrics that were not taken yet.

    Attributes:
        name: Run name.
        start: Unix time in milliseconds.
        params: Name -> value; never changed once set.
        tags: Name -> value.
        metrics: New metric rows.
        status: MLflow's run status.
        end: Unix time in milliseconds of the end, when there is one.
    """

    name: str
    start: int
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[MetricRow] = field(default_factory=list)
    status: str = "RUNNING"
    end: int | None = None


class RowTable:
    """The rows after the events taken so far; `dirty` names those that changed."""

    key_tag: ClassVar[str] = "llp.trial_id"
    """Tag of a child row whose value is its key."""

    def __init__(self) -> None:
        self.replay = Replay(keep_curves=False)
        self.rows: dict[str, Row] = {}
        self.dirty: dict[str, None] = {}
        self.study_key = ""
        self._common_tags: dict[str, str] = {}
        self._scalars: dict[tuple[str, str], float] = {}
        self._in_flight: dict[tuple[str, int], tuple[float, ...]] = {}

    @property
    def terminal(self) -> bool:
        """Whether the study has ended, well or not."""
        return self.replay.terminal is not None

    def take(self, event: Mapping[str, Any]) -> None:
        """Takes in the next event of the ledger."""
        self.replay.take(event)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event, milliseconds(event["time"]))

    def forget(self) -> None:
        """Marks everything so far as shipped."""
        self.dirty.clear()
        for row in self.rows.values():
            row.metrics.clear()

    def interrupt(self) -> None:
        """The driver is gone without a last word: what runs will not end by itself."""
        end = milliseconds(self.replay.last_time)
        for key, row in self.rows.items():
            if row.status == "RUNNING":
                row.status, row.end = "KILLED", end
                self.dirty[key] = None
        if STUDY in self.rows:
            self.rows[STUDY].tags["llp.status"] = "interrupted"

    def _identify(self, event: Mapping[str, Any]) -> None:
        """Takes from the first event of a ledger what all its rows share."""
        environment = event.get("environment", {})
        identity = f"{event['study_id']} {event['spec_digest']} {event['time']!r}"
        self.study_key = hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:16]
        self._common_tags = texts(
            {
                "llp.study_id": event["study_id"],
                "llp.study_key": self.study_key,
                "llp.spec_sha256": event["spec_digest"],
                "llp.version": event.get("llp_version", ""),
                "llp.git_commit": environment.get("git_commit") or "",
                "mlflow.source.name": "llp",
            },
            MAX_TAG,
        )

    def _repeats(self, job_id: str, point: Mapping[str, Any]) -> bool:
        """Whether a point says what an earlier one of that epoch said.

        A job that a second driver ran again repeats its points to the same numbers; a second row at
        the same step would draw every such epoch twice.
        """
        key, values = (job_id, int(point["epoch"])), tuple(point[name] for name in CURVE_FIELDS)
        if self._in_flight.get(key) == values:
            return True
        self._in_flight[key] = values
        return False

    def _landed(self, job_id: str) -> None:
        """Forgets the points of a job that ended well."""
        for key in [key for key in self._in_flight if key[0] == job_id]:
            del self._in_flight[key]

    def _on_opened(self, event: Mapping[str, Any], time: int) -> None:
        row = self.rows[STUDY]
        row.status, row.end = "RUNNING", None
        row.tags["llp.status"] = "running"
        self.dirty[STUDY] = None

    def _put(self, key: str, row: Row) -> None:
        self.rows[key] = row
        self.dirty[key] = None

    def _metric(self, key: str, name: str, value: Any, time: int, step: int) -> None:
        if value is not None and math.isfinite(value):
            self.rows[key].metrics.append((safe_key(name), float(value), time, step))
            self.dirty[key] = None

    def _scalar(self, key: str, name: str, value: Any, time: int) -> None:
        """One value per run, at step 0; said again only when it changed."""
        if value is None or self._scalars.get((key, name)) == value:
            return
        self._scalars[key, name] = value
        self._metric(key, name, value, time, 0)


def safe_key(name: str) -> str:
    """`name` as MLflow accepts it for params and metrics; left alone when it already is.

    What had to change gets a short hash, so that two names cannot become one.

    >>> safe_key("tier1/train_loss")
    'tier1/train_loss'
    >>> safe_key("a@b")
    'a_b-7508d8'
    """
    clean = _BAD_CHARACTERS.sub("_", safe_text(name, 10_000))
    clean = re.sub(r"/+", "/", clean).strip("/ ")
    if posixpath.normpath(clean) != clean or clean.startswith("."):
        clean = clean.replace(".", "_").replace("//", "/")
    clean = clean[:MAX_KEY]
    if clean and clean == name:
        return clean
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:6]
    return f"{clean}-{digest}"


def safe_text(value: Any, limit: int) -> str:
    """`value` as text any of MLflow's databases can store, at most `limit` characters."""
    text = _UNSTORABLE.sub("\ufffd", value if isinstance(value, str) else str(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Every value as `safe_text`."""
    return {name: safe_text(value, limit) for name, value in values.items()}


def milliseconds(time: float) -> int:
    """Unix time in seconds as MLflow has it."""
    return round(float(time) * 1000)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under dotted names; lists as JSON, absent values left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield f"{prefix}{name}", json.dumps(value)
        elif value is not None:
            yield f"{prefix}{name}", value
