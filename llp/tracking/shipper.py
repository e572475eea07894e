"""Ships a ledger to MLflow: once, or behind a running search in a process of its own.

Training never waits for MLflow. The driver writes its ledger and starts
`python -m llp.tracking.shipper FOLDER --follow`, which tails the ledger, tries again with growing
pauses when MLflow does not answer, and ends with the study or soon after its driver is gone. What
it did not manage, `llp sync` does later. Exit code 0 says all of it arrived, 5 that it did not.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llp.errors import LlpError, StudyError, TrackingError
from llp.tracking.ledger import LedgerTail, is_running, study_header
from llp.tracking.links import default_uri
from llp.tracking.lock import FileLock

if TYPE_CHECKING:
    from llp.tracking.mlflow_tracker import MlflowTracker

LOG_NAME = "mlflow.log"
LOCK_NAME = "mlflow_sync.lock"
_BATCH = 2000
_LONGEST_PAUSE = 30.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shipped:
    """What `ship` did.

    Attributes:
        uri: MLflow's tracking URI.
        experiment: Name of the experiment.
        experiment_id: Its id.
        num_events: Ledger events up to the last one shipped.
        num_runs: Runs of the study in MLflow, the parent's included.
        ended: Whether the study has ended, so that nothing more will follow.
    """

    uri: str
    experiment: str
    experiment_id: str
    num_events: int
    num_runs: int
    ended: bool


def tracking_target(folder: Path | str) -> tuple[str, str]:
    """Tracking URI and experiment of a study, as its spec says or by default."""
    header = study_header(folder)
    spec = header.get("spec", {})
    tracking = spec.get("tracking", {})
    uri = tracking.get("uri") or default_uri(Path(folder).resolve().parent)
    batch = header.get("kind") == "batch"  # its spec is that of a run
    name = header["study_id"] if batch else spec.get("name", "study")
    return uri, tracking.get("experiment") or f"llp/{name}"


def ship(
    folder: Path | str,
    uri: str | None = None,
    experiment: str | None = None,
    *,
    follow: bool = False,
    stop_when: Callable[[], bool] | None = None,
    rebuild: bool = False,
    give_up_after: float = 30.0,
    interval: float = 2.0,
) -> Shipped:
    """Ships everything that MLflow does not have yet. Twice makes no duplicates.

    Args:
        folder: The study folder.
        uri: Tracking URI; default: the spec's.
        experiment: Experiment; default: the spec's.
        follow: Go on until the study ends, no driver has it any more, or `stop_when` says so.
        stop_when: With `follow`: when True, what is there is shipped and that is all.
        rebuild: Send everything, even what was shipped before.
        give_up_after: Seconds without an answer before giving up; no limit while a driver is at
            work on a study that is followed.
        interval: Seconds between looks at the ledger.

    Raises:
        TrackingError: MLflow does not answer or refuses (the message names the URI), or another
            process is shipping this study.
        StudyError: There is no readable study in the folder.
    """
    from llp.tracking.mlflow_tracker import MlflowTracker, ServerNotAnswering

    folder = Path(folder)
    default = tracking_target(folder)
    uri, experiment = uri or default[0], experiment or default[1]
    try:
        lock = FileLock.acquire(
            folder / LOCK_NAME,
            busy=f"the study {folder.name} is already being shipped to MLflow by",
            wait_seconds=give_up_after if follow else 1.0,
        )
    except StudyError as error:
        raise TrackingError(str(error)) from error
    try:
        tail = LedgerTail(folder)
        tracker: MlflowTracker | None = None
        silent_since: float | None = None
        pause = 1.0
        while True:
            # Looked at before reading: what was written until then is read after it.
            last_look = not follow or not is_running(folder)
            last_look = last_look or (stop_when is not None and stop_when())
            try:
                if tracker is None:
                    tracker = MlflowTracker(uri, experiment, folder, rebuild=rebuild)
                _write_all(tracker, tail)
                if last_look or tracker.terminal:
                    tracker.finish(interrupted=not tracker.terminal and not is_running(folder))
                    return Shipped(
                        uri,
                        experiment,
                        tracker.experiment_id,
                        tracker.last_seq + 1,
                        tracker.num_runs,
                        tracker.terminal,
                    )
                silent_since, pause = None, 1.0
                time.sleep(interval)
            except ServerNotAnswering as error:
                now = time.monotonic()
                silent_since = silent_since or now
                if last_look and now - silent_since + pause > give_up_after:
                    raise
                _logger.warning("%s; trying again in %.0f s", error, pause)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
    finally:
        lock.release()


def _write_all(tracker: MlflowTracker, tail: LedgerTail) -> None:
    tracker.write([])  # what an earlier attempt could not send
    while batch := list(itertools.islice(tail, _BATCH)):
        tracker.write(batch)


def start_shipper(folder: Path | str) -> subprocess.Popen[bytes]:
    """Starts a process that follows the study in `folder` until it ends or this process is gone.

    Its messages go to `mlflow.log` in the folder. It is in a session of its own: Ctrl-C in the
    terminal reaches the driver only, and what the driver then writes still gets to MLflow.
    """
    folder = Path(folder)
    command = [sys.executable, "-m", "llp.tracking.shipper", str(folder)]
    log = folder / LOG_NAME
    if not os.access(log if log.exists() else folder, os.W_OK):
        log = Path(os.devnull)  # a search does not fail for want of a log of its copy
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, "--follow", "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_shipper(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Whether all of the study arrived in MLflow within `timeout` seconds.

    When time is up the process is left alone: it goes on shipping and ends by itself.
    """
    try:
        return process.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the background process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m llp.tracking.shipper", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uri")
    parser.add_argument("--experiment")
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--parent", type=int, help="process that has to live for --follow")
    parser.add_argument("--rebuild", action="store_true")
    parser.add_argument("--give-up-after", type=float, default=60.0, metavar="SECONDS")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parent = options.parent or os.getppid()
    if options.follow:
        os.nice(10)  # training comes first
    try:
        shipped = ship(
            options.folder,
            options.uri,
            options.experiment,
            follow=options.follow,
            stop_when=lambda: os.getppid() != parent,
            rebuild=options.rebuild,
            give_up_after=options.give_up_after,
        )
    except LlpError as error:
        _logger.error("%s", error)
        return TrackingError.exit_code
    _logger.info(
        "shipped %d events to %d runs at %s", shipped.num_events, shipped.num_runs, shipped.uri
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
