"""MLflow as the place where people browse. The only file that imports `mlflow`.

`MlflowTracker` turns ledger events (through `mlflow_rows`) into one run per study and one child run
per trial, those of a batch (through `batch_rows`) into one per batch and one per training. It is a
copy of the ledger and never the truth: runs are found again by their tags, rows carry the ledger's
timestamps, and MLflow keeps one row per (key, timestamp, step, value), so everything may be sent
twice. What is left to remember, how far it got, is in `mlflow_sync.json` and may be lost.

All runs of a flush get one `log_batch` each: requests per trial, not points, are what MLflow is
slow at.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by mlflow when it is imported or at each request. Its own defaults block a caller for minutes
# when a server is gone (7 retries of 120 s); waiting is the shipper's job. Set only where the user
# has not.
for _name, _value in {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow.entities import (  # noqa: E402
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunStatus,
    RunTag,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

from llp.errors import StudyError, TrackingError  # noqa: E402
from llp.tracking.batch_rows import BatchRows  # noqa: E402
from llp.tracking.ledger import read_events, study_header  # noqa: E402
from llp.tracking.links import (  # noqa: E402
    SyncState,
    compare_link,
    deep_link,
    is_server,
    quoted,
    read_state,
    write_state,
)
from llp.tracking.lock import FileLock  # noqa: E402
from llp.tracking.mlflow_rows import Rows  # noqa: E402
from llp.tracking.rows import STUDY, Row, RowTable, safe_text  # noqa: E402

__all__ = ["MlflowTracker", "ServerNotAnswering", "compare_link", "deep_link"]

_logger = logging.getLogger(__name__)
_MAX_METRICS, _MAX_PARAMS = 900, 90  # MLflow: 1000 rows a batch, 100 of them params, 100 tags
_ARTIFACTS = ("spec.yaml", "report.html", "runs.parquet")


class ServerNotAnswering(TrackingError):
    """MLflow cannot be reached or is busy; trying again later may help."""


class MlflowTracker:
    """Writes ledger events to MLflow. Satisfies `protocols.Tracker`.

    Args:
        uri: Tracking URI, `sqlite:///...` or `http://...`.
        experiment: Name of the experiment; made when missing.
        study_folder: The study; its ledger is read for what was shipped before.
        rebuild: Send everything again, whatever the sync state says. Makes no duplicates.

    Raises:
        ServerNotAnswering: MLflow cannot be reached.
        TrackingError: MLflow refuses.
        StudyError: There is no readable study in the folder.
    """

    def __init__(
        self, uri: str, experiment: str, study_folder: Path | str, *, rebuild: bool = False
    ) -> None:
        self.uri, self.experiment, self.folder = uri, experiment, Path(study_folder)
        self._header = study_header(self.folder)
        self._rows: RowTable = BatchRows() if self._header.get("kind") == "batch" else Rows()
        self._seen = -1
        self._sent_artifacts: dict[str, str] = {}
        self._told: dict[str, dict[str, str]] = {}
        self._rows.take(self._header)
        with self._answers():
            self._client = _connect(uri)
            self.experiment_id = self._experiment_id()
            self._runs, self._status = self._find_runs()
        self._seen = int(self._header["seq"])
        state = None if rebuild else read_state(self.folder)
        if state is None or not self._still_there(state):
            return  # the `study` event taken above is the first thing to be sent
        if state.last_seq >= self._seen:
            self._catch_up(state.last_seq)

    @property
    def last_seq(self) -> int:
        """Sequence number of the last event taken; shipped once `write` has returned."""
        return self._seen

    @property
    def terminal(self) -> bool:
        """Whether the last event taken ended the study."""
        return self._rows.terminal

    @property
    def num_runs(self) -> int:
        """Runs of this study in MLflow, the parent's included."""
        return len(self._runs)

    def write(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Ships `events`; those already taken are passed over.

        Raises:
            ServerNotAnswering: Nothing is lost: `write([])` sends what is left.
            TrackingError: MLflow refuses.
        """
        for event in events:
            if event["seq"] > self._seen:
                self._rows.take(event)
                self._seen = int(event["seq"])
        with self._answers():
            self._flush()
        self._save(complete=False)

    def finish(self, *, interrupted: bool = False) -> None:
        """Sends last things once there is nothing more to read: artifacts, how runs ended.

        Args:
            interrupted: The driver is gone and the study did not end.
        """
        if interrupted:
            self._rows.interrupt()
        for key, row in self._rows.rows.items():
            if self._status.get(key) != row.status:
                self._rows.dirty[key] = None
        with self._answers():
            self._flush()
            self._send_artifacts()
        self._save(complete=self.terminal)

    def close(self) -> None:
        """Does nothing more: every `write` leaves all of it shipped."""

    # -- connecting ------------------------------------------------------------------------------

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                experiment_id = self._client.create_experiment(
                    self.experiment,
                    artifact_location=_artifact_location(self.uri, self.folder, self.experiment),
                    # Opens its runs in the pages for trainings, not in those for chat traces.
                    tags={"mlflow.experimentKind": "custom_model_development"},
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self._experiment_id()  # another study has just made it
            return str(experiment_id)
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"the MLflow experiment '{self.experiment}' at {self.uri} was deleted; restore it "
                "there or set tracking.experiment to another name"
            )
        return str(found.experiment_id)

    def _find_runs(self) -> tuple[dict[str, str], dict[str, str]]:
        """Run ids and statuses of this study's runs, by their key (`STUDY` for the parent)."""
        runs: dict[str, str] = {}
        status: dict[str, str] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id],
                filter_string=f"tags.`llp.study_key` = {quoted(self._rows.study_key)}",
                max_results=200,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            for run in page:
                key = run.data.tags.get(self._rows.key_tag, STUDY)
                runs.setdefault(key, run.info.run_id)
                status.setdefault(key, run.info.status)
            token = page.token
            if not token:
                return runs, status

    def _still_there(self, state: SyncState) -> bool:
        """Whether MLflow still has what the sync state says was shipped."""
        return (
            (state.uri, state.experiment_id, state.study_key)
            == (self.uri, self.experiment_id, self._rows.study_key)
            and self._runs.get(STUDY) == state.parent_run_id
            and state.runs.items() <= self._runs.items()
        )

    def _catch_up(self, last_seq: int) -> None:
        """Takes in what was shipped before, to know what the rest means."""
        for event in read_events(self.folder):
            if self._seen < event["seq"] <= last_seq:
                self._rows.take(event)
                self._seen = int(event["seq"])
                if self._seen % 1000 == 0:
                    self._rows.forget()
        self._rows.forget()

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        """Turns whatever MLflow and the network raise into a sentence with the URI."""
        folder = shlex.quote(str(self.folder))
        rest = f"the study is safe in its ledger; `llp sync {folder}` ships the rest"
        try:
            yield
        except MlflowException as error:
            reason = _first_line(error)
            status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
            if status in {408, 429} or status >= 500:
                raise ServerNotAnswering(
                    f"MLflow at {self.uri} does not answer: {reason}; {rest}"
                ) from error
            raise TrackingError(f"MLflow at {self.uri} refuses: {reason}; {rest}") from error
        except (OSError, SQLAlchemyError) as error:  # requests' errors are OSErrors too
            raise ServerNotAnswering(
                f"MLflow at {self.uri} does not answer: {_first_line(error)}; {rest}"
            ) from error

    # -- sending ---------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Sends every changed row; one that was sent is clean at once, so a retry goes on there."""
        for key in list(self._rows.dirty):
            self._send(key, self._rows.rows[key])
            self._rows.rows[key].metrics.clear()
            del self._rows.dirty[key]

    def _send(self, key: str, row: Row) -> None:
        new = key not in self._runs
        if new:
            self._create(key, row)
        run_id, wanted = self._runs[key], self._tags(key, row)
        known = self._told.get(key)  # None: not yet by this process, so params and all tags go
        metrics = [Metric(*metric) for metric in row.metrics]
        params = [Param(n, v) for n, v in row.params.items()] if known is None else []
        tags = [RunTag(n, v) for n, v in wanted.items() if (known or {}).get(n) != v]
        for start in range(0, max(len(params), 1), _MAX_PARAMS):
            self._client.log_batch(
                run_id,
                params=params[start : start + _MAX_PARAMS],
                tags=tags if start == 0 else (),
                metrics=metrics[: _MAX_METRICS - _MAX_PARAMS - len(tags)] if start == 0 else (),
            )
        for start in range(_MAX_METRICS - _MAX_PARAMS - len(tags), len(metrics), _MAX_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + _MAX_METRICS])
        self._told[key] = dict(wanted)
        if key == STUDY and new:
            self._send_artifacts()
        if self._status.get(key) != row.status:
            self._set_status(key, row)

    def _create(self, key: str, row: Row) -> None:
        if key != STUDY and STUDY not in self._runs:
            self._create(STUDY, self._rows.rows[STUDY])
        run = self._client.create_run(
            self.experiment_id,
            start_time=row.start,
            tags=self._tags(key, row),
            run_name=row.name,
        )
        self._runs[key], self._status[key] = run.info.run_id, "RUNNING"

    def _tags(self, key: str, row: Row) -> dict[str, str]:
        return row.tags if key == STUDY else {**row.tags, "mlflow.parentRunId": self._runs[STUDY]}

    def _set_status(self, key: str, row: Row) -> None:
        if RunStatus.is_terminated(RunStatus.from_string(row.status)):
            self._client.set_terminated(self._runs[key], row.status, row.end)
        else:
            self._client.update_run(self._runs[key], status=row.status)
        self._status[key] = row.status

    def _send_artifacts(self) -> None:
        """Dataset, spec, report and table of the study, each only when it changed."""
        if STUDY in self._runs and "dataset" not in self._sent_artifacts:
            self._client.log_inputs(self._runs[STUDY], [_dataset(self._header)])
            self._sent_artifacts["dataset"] = "sent"
        for name in _ARTIFACTS:
            path = self.folder / name
            if STUDY in self._runs and path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                if self._sent_artifacts.get(name) != digest:
                    self._client.log_artifact(self._runs[STUDY], str(path))
                    self._sent_artifacts[name] = digest

    def _save(self, *, complete: bool) -> None:
        runs = dict(self._runs)
        parent = runs.pop(STUDY, "")
        state = SyncState(
            uri=self.uri,
            experiment=self.experiment,
            experiment_id=self.experiment_id,
            study_id=str(self._header["study_id"]),
            study_key=self._rows.study_key,
            parent_run_id=parent,
            runs=runs,
            last_seq=self._seen,
            complete=complete,
            batch=self._header.get("kind") == "batch",
        )
        write_state(self.folder, state)


@dataclass(frozen=True)
class TrackedTrial:
    """One trial of a study as MLflow has it; a number it does not have is NaN.

    Attributes:
        trial_id: Its id.
        hyperparameters: Name -> value as text.
        lowest: Validation accuracy at the end of the lowest rung.
        rung: The highest rung.
        accuracy: Validation accuracy at the end of it.
        verified: Mean validation accuracy of the full trainings.
    """

    trial_id: str
    hyperparameters: Mapping[str, str]
    lowest: float
    rung: float
    accuracy: float
    verified: float


def read_trials(uri: str, study: str) -> list[TrackedTrial]:
    """The trials of a study by its name; of several studies of that name, those of the newest.

    Raises:
        StudyError: MLflow cannot be read, or has no such study.
    """
    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        raise StudyError(f"there is no MLflow database at {path}")
    try:
        client = _connect(uri)
        experiments = [found.experiment_id for found in client.search_experiments()]
        wanted = f"tags.`llp.study_id` = {quoted(study)}"
        newest = ["attributes.start_time DESC"]
        parents = client.search_runs(
            experiments, f"{wanted} and tags.`llp.kind` = 'study'", order_by=newest, max_results=1
        )
        if not parents:
            raise StudyError(f"MLflow at {uri} has no study '{study}'")
        key = parents[0].data.tags["llp.study_key"]
        children = f"tags.`llp.study_key` = {quoted(key)} and tags.`llp.kind` = 'trial'"
        runs: list[Run] = []
        token = None
        while True:
            page = client.search_runs(experiments, children, max_results=500, page_token=token)
            runs += page
            token = page.token
            if not token:
                break
        found = [_tracked(client, run) for run in runs]
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise StudyError(f"cannot read MLflow at {uri}: {_first_line(error)}") from error
    return sorted(found, key=lambda trial: trial.trial_id)


def _tracked(client: MlflowClient, run: Run) -> TrackedTrial:
    metrics, params = run.data.metrics, run.data.params
    accuracy = metrics.get("final/validation_accuracy", math.nan)
    rung = float(run.data.tags.get("llp.rung", "nan"))
    lowest = accuracy
    if rung > 1:
        fractions = client.get_metric_history(run.info.run_id, "tier1/data_fraction")
        points = client.get_metric_history(run.info.run_id, "tier1/validation_accuracy")
        least = min((point.value for point in fractions), default=math.nan)
        steps = {point.step for point in fractions if point.value == least}
        on_it = {point.step: point.value for point in points if point.step in steps}
        lowest = on_it[max(on_it)] if on_it else math.nan
    return TrackedTrial(
        trial_id=run.data.tags["llp.trial_id"],
        hyperparameters={
            name: value
            for name, value in params.items()
            if name.removeprefix("log10_") == name or name.removeprefix("log10_") not in params
        },
        lowest=lowest,
        rung=rung,
        accuracy=accuracy,
        verified=metrics.get("verified/validation_accuracy", math.nan),
    )


def _connect(uri: str) -> MlflowClient:
    """A client; makes the SQLite file and its folder when there is none.

    Raises:
        OSError: The folder of the SQLite file cannot be made or written.
    """
    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} cannot be written")
        lock = FileLock.acquire(
            path.with_name(f".{path.name}.lock"), busy=f"{path} is being made by", wait_seconds=60.0
        )
        try:
            if not path.exists():
                _make_database(path)
        finally:
            lock.release()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(path: Path) -> None:
    """Makes the tables in a file beside `path`, which then takes its place.

    MLflow makes them in place, in seconds and many transactions, without a lock. A process killed
    in between leaves a file on which its next start fails (measured on 3.17.2: six of eight kills).
    """
    unfinished, whole = (path.with_name(f".{path.name}.{name}") for name in ("making", "made"))
    unfinished.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{unfinished}", registry_uri=f"sqlite:///{unfinished}")
    # A copy, because MLflow keeps the other file open.
    shutil.copyfile(unfinished, whole)
    whole.replace(path)
    unfinished.unlink()


def _sqlite_path(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).split("?")[0]) if uri.startswith(prefix) else None


def _artifact_location(uri: str, folder: Path, experiment: str) -> str | None:
    """Beside the database, not in whatever folder `llp` happens to run in; servers know theirs."""
    if is_server(uri) or uri.startswith("databricks"):
        return None
    path = _sqlite_path(uri)
    root = path.parent if path is not None else folder.parent
    return (root / "mlflow_artifacts" / experiment.replace("/", "_")).resolve().as_uri()


def _dataset(header: Mapping[str, Any]) -> DatasetInput:
    """The data as MLflow records it: a name, a digest and where it came from; no images."""
    spec = header.get("spec", {}).get("dataset", {})
    found = header.get("dataset") or {}
    plain = json.dumps(spec, sort_keys=True).encode("utf-8", "replace")
    digest = str(found.get("digest") or hashlib.sha256(plain).hexdigest())
    num_train = header.get("num_train")
    profile = {"num_rows": num_train, "num_classes": header.get("num_classes")}
    source = found.get("source") or spec.get("root") or spec.get("name", "")
    dataset = Dataset(
        name=safe_text(found.get("name") or spec.get("name") or "dataset", 500),
        digest=safe_text(digest[:32], 32),
        source_type="local",
        source=json.dumps({"uri": safe_text(source, 2000)}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return safe_text(text.splitlines()[0], 300)
