"""A submitted job to its end: its log as it is written, and what its end means.

A *follower* only reads: killed, it leaves the job as it is, and another can take over. Exit codes
are those of `llp search`; `128 + n` says that signal n killed the driver.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from llp.cluster.jobs import Cluster, Say, Submitted, Unreachable
from llp.errors import EnvironmentProblem, StudyError

INTERRUPTED = 130
PENDING_SECONDS = 10.0
"""After which a job that has not started is worth a line."""
PAUSE_SECONDS = 1.0
"""Between two questions."""
LOST_SECONDS = 300.0
"""How long a follower without a connection goes on trying."""

_BEFORE_IT_RAN = {
    "RUNTIME_ENV_SETUP_FAILURE": "the cluster could not unpack what was sent",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT": (
        "the cluster gave it up: nothing was free for its driver in all the time that "
        "RAY_JOB_START_TIMEOUT_SECONDS allows (15 minutes, unless the head node says otherwise)"
    ),
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE": "no node can ever give its driver what it asks for",
    "JOB_SUPERVISOR_ACTOR_DIED": "the node its driver ran on died",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE": "the cluster could not start it",
}


@dataclass(frozen=True)
class Verdict:
    """What the end of a job means.

    Attributes:
        exit_code: Ours.
        message: For people; empty when the job's own words say it all.
    """

    exit_code: int
    message: str = ""


def follow(
    cluster: Cluster,
    job_id: str,
    *,
    write: Callable[[str], None],
    say: Say,
    start_timeout: float | None = None,
) -> Submitted:
    """Writes a job's log until the job ends, and returns what the cluster says of it then.

    Args:
        cluster: Where it runs.
        job_id: Which.
        write: Given the log, piece by piece, nothing twice.
        say: Told, once each, that the job waits and that the connection is lost.
        start_timeout: Seconds it may wait to be started.

    Raises:
        EnvironmentProblem: It has not started in time, or the connection is lost for good; the job
            is left as it is.
    """
    shown, silent_since = 0, None
    pending_since, told_pending = time.monotonic(), False
    while True:
        try:
            job = cluster.job(job_id)
            if job.state == "PENDING":
                silent_since = None
                waited = time.monotonic() - pending_since
                if waited > PENDING_SECONDS and not told_pending:
                    told_pending = True
                    say(f"{job_id} waits: {waits_for(job)}")
                if start_timeout is not None and waited > start_timeout:
                    raise EnvironmentProblem(
                        f"{job_id} has not started in {start_timeout:.0f} s and stays queued; look "
                        f"with `{command('status', job_id, cluster)}`, take it back with "
                        f"`{command('stop', job_id, cluster)}`"
                    )
                time.sleep(PAUSE_SECONDS)
                continue
            if not job.over:
                for text in cluster.tail(job_id, skip=shown):
                    silent_since = None
                    if text:
                        shown += len(text)
                        write(text)
                    elif cluster.job(job_id).over:  # silent for long: a dead connection
                        break
                job = cluster.job(job_id)
            if job.over:
                write(_rest(cluster, job_id, shown, say))
                return job
        except Unreachable as error:
            if silent_since is None:
                silent_since = time.monotonic()
                say(f"{error}; the job goes on, trying to reach it again")
            elif time.monotonic() - silent_since > LOST_SECONDS:
                raise EnvironmentProblem(
                    f"{error}; the job goes on, attach to it with:\n  "
                    + command("logs", job_id, cluster, "--follow")
                ) from error
        except StudyError as error:
            if shown == 0:
                raise
            raise EnvironmentProblem(
                f"the cluster no longer knows {job_id}: it was started anew; what was finished is "
                "saved, submit the study again to go on with it"
            ) from error
        time.sleep(PAUSE_SECONDS)


def _rest(cluster: Cluster, job_id: str, shown: int, say: Say) -> str:
    """What has not been shown of the log of a job that is over."""
    try:
        return cluster.logs(job_id)[shown:]
    except EnvironmentProblem as error:  # the log is gone with the node its driver ran on
        say(f"the rest of the log of {job_id} cannot be read: {error}")
        return ""


def waits_for(job: Submitted) -> str:
    """Why a job has not started, as far as the cluster says."""
    if "resources" in job.message:
        return (
            "the cluster has not what its driver asks for free yet, or is unpacking what was sent; "
            "it starts by itself"
        )
    return job.message or "the cluster is about to start it"


def verdict(job: Submitted, cluster: Cluster) -> Verdict:
    """What the end of `job` means, and how to go on."""
    go_on = "what was finished is saved, go on with:\n  " + how_to_resume(job, cluster)
    if job.state == "SUCCEEDED":
        return Verdict(0)
    if job.state == "STOPPED":
        return Verdict(INTERRUPTED, f"{job.job_id} was stopped; {go_on}")
    if job.exit_code is None:
        why = _BEFORE_IT_RAN.get(job.error_type, _first(job.message))
        return Verdict(4, f"{job.job_id} failed: {why}; {go_on}")
    if job.exit_code < 0 or 128 < job.exit_code < 128 + signal.NSIG:
        number = abs(job.exit_code) % 128
        if job.exit_code == INTERRUPTED:
            return Verdict(INTERRUPTED, f"{job.job_id} was interrupted; {go_on}")
        memory = ", as happens when memory runs out" if number == signal.SIGKILL else ""
        return Verdict(
            128 + number,
            f"the driver of {job.job_id} was killed from outside by signal {number} "
            f"({_name(number)}{memory}); nothing is lost: {go_on}",
        )
    if job.exit_code in (4, 5):  # the log has said why
        return Verdict(job.exit_code, f"{job.job_id} ended with exit code {job.exit_code}; {go_on}")
    return Verdict(job.exit_code, f"{job.job_id} ended with exit code {job.exit_code}")


def how_to_resume(job: Submitted, cluster: Cluster) -> str:
    """The command that goes on with the study of `job` on the same cluster."""
    if not job.study:
        return command("logs", job.job_id, cluster)
    root = shlex.quote(job.root)
    return f"llp resume {job.study} --root {root} --address {shlex.quote(cluster.address)}"


def command(verb: str, job_id: str, cluster: Cluster, *options: str) -> str:
    """`llp jobs VERB` for this job."""
    return shlex.join(["llp", "jobs", verb, job_id, *options, "--address", cluster.address])


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _first(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[0][:300] if lines else "the cluster does not say why"
