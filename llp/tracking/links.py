"""Links into MLflow's web page that show something, and what is known about a synced study.

A bare experiment page folds all trials under one parent row. The page shows them flat, with curves
and bars, only when it is filtered, sorted by a metric and opened in chart view. Nothing here
imports `mlflow`, so a command can print a link without paying for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from llp.errors import TrackingError
from llp.tracking.files import write_atomic

STATE_NAME = "mlflow_sync.json"
SORT_METRIC = "final/score"
"""The metric that trials are sorted by, best first."""
BATCH_SORT_METRIC = "final/test_accuracy"
"""The metric that the trainings of a batch are sorted by, best first."""


@dataclass(frozen=True)
class SyncState:
    """What `mlflow_sync.json` in the study folder remembers; it can be lost without harm.

    Attributes:
        uri: MLflow's tracking URI.
        experiment: Name of the experiment.
        experiment_id: Its id at `uri`.
        study_id: The study.
        study_key: Tag value that tells this study from another of the same name.
        parent_run_id: Run of the study.
        runs: Trial id -> run id.
        last_seq: Sequence number of the last ledger event shipped; -1 for none.
        complete: Everything up to the end of the study was shipped.
        batch: Whether it is a batch, whose children are trainings.
    """

    uri: str
    experiment: str
    experiment_id: str
    study_id: str
    study_key: str
    parent_run_id: str = ""
    runs: dict[str, str] = field(default_factory=dict)
    last_seq: int = -1
    complete: bool = False
    batch: bool = False


def read_state(folder: Path | str) -> SyncState | None:
    """The sync state of a study; None when there is none or it cannot be read."""
    try:
        found = json.loads((Path(folder) / STATE_NAME).read_text(encoding="utf-8"))
        return SyncState(**found)
    except (OSError, ValueError, TypeError):
        return None


def write_state(folder: Path | str, state: SyncState) -> None:
    """Replaces the sync state atomically.

    Raises:
        TrackingError: The study folder cannot be written.
    """
    path = Path(folder) / STATE_NAME
    try:
        write_atomic(path, json.dumps(state.__dict__, indent=1))
    except OSError as error:
        raise TrackingError(f"cannot write {path}: {error.strerror}") from error


def is_server(uri: str) -> bool:
    """Whether `uri` is a web server of its own, which needs no `llp ui` to be looked at."""
    return uri.startswith(("http://", "https://"))


def default_uri(root: Path | str) -> str:
    """The SQLite file `mlflow.db` in the output folder `root`, as a tracking URI."""
    return f"sqlite:///{Path(root).resolve() / 'mlflow.db'}"


def deep_link(
    base_url: str, experiment_id: str, study_id: str, *, study_key: str = "", batch: bool = False
) -> str:
    """The page with all trials of a study: flat, best score first, as charts.

    Args:
        base_url: Of the MLflow server, for example `http://127.0.0.1:5000`.
        experiment_id: MLflow's id of the experiment.
        study_id: The study.
        study_key: When given, tells apart two studies of the same name.
        batch: Of a batch: all its trainings, best test accuracy first.
    """
    wanted = {"llp.study_id": study_id, "llp.kind": "training" if batch else "trial"}
    if study_key:
        wanted["llp.study_key"] = study_key
    metric = BATCH_SORT_METRIC if batch else SORT_METRIC
    clauses = " and ".join(f"tags.`{name}` = {quoted(value)}" for name, value in wanted.items())
    return (
        f"{base_url.rstrip('/')}/#/experiments/{quote(experiment_id, safe='')}/runs"
        f"?searchFilter={quote(clauses, safe='')}"
        f"&orderByKey={quote(f'metrics.`{metric}`', safe='')}&orderByAsc=false"
        "&compareRunsMode=CHART&workflowType=machine_learning"
    )


def compare_link(base_url: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The page that compares the given runs side by side (parallel coordinates, scatter)."""
    runs = quote(json.dumps(list(run_ids)), safe="")
    experiments = quote(json.dumps([experiment_id]), safe="")
    return (
        f"{base_url.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"
        "&workflowType=machine_learning"
    )


def study_link(folder: Path | str, base_url: str = "") -> str | None:
    """The deep link of a synced study; None when nothing was shipped yet.

    Args:
        folder: The study folder.
        base_url: Where MLflow's page is; when empty the tracking URI, if that is a server.
    """
    state = read_state(folder)
    if state is None:
        return None
    base_url = base_url or (state.uri if is_server(state.uri) else "")
    if not base_url:
        return None
    return deep_link(
        base_url, state.experiment_id, state.study_id, study_key=state.study_key, batch=state.batch
    )


def quoted(value: str) -> str:
    """`value` as a string of MLflow's filter language, which knows no escapes."""
    mark = '"' if "'" in value else "'"
    return f"{mark}{value.replace(mark, '')}{mark}"
