"""`llp submit` and `llp jobs`: searches on a cluster, from a machine that only talks to it.

As in `cli`, a command parses, calls the cluster room and prints. Standard output has what was asked
for (ids, the log that is followed, JSON lines), standard error what is said along the way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llp.errors import EnvironmentProblem, SpecError
from llp.shell import Commands, File, Json, Set, emit, say

if TYPE_CHECKING:
    from llp.cluster.jobs import Cluster, Submitted
    from llp.cluster.submission import Driver, Submission

jobs = typer.Typer(
    name="jobs",
    cls=Commands,
    help="Searches on a cluster: which there are, how far, their logs; stop one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="the cluster's Ray dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS",
        show_default=False,
    ),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="show the log until the job ends")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="also talk to a cluster elsewhere that wants no token")
]
JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="job id, or study id for its newest attempt")
]
StartTimeout = Annotated[
    float,
    typer.Option(
        "--start-timeout", min=0, metavar="SECONDS", help="a followed job may wait so long"
    ),
]
WorkingDir = Annotated[
    Path | None,
    typer.Option(
        "--working-dir",
        help="folder with your own code; default: this one, when the experiment names code in it",
        show_default=False,
    ),
]
GIB = 1024**3
QUEUED_SECONDS = 3.0


def submit(
    file: File,
    address: Address = None,
    follow: Follow = False,
    override: Set = None,
    study: Annotated[
        str | None, typer.Option("--study", help="name of the study folder", show_default=False)
    ] = None,
    working_dir: WorkingDir = None,
    driver_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs of the driver itself; none: the head node")
    ] = None,
    driver_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of the driver")] = None,
    driver_memory: Annotated[
        float | None, typer.Option(min=0, metavar="GIB", help="memory of the driver")
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="interpreter on the cluster; default: the one Ray runs with"),
    ] = None,
    start_timeout: StartTimeout = 600.0,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Run a search as a job of a Ray cluster; again: attach to it, or go on with it."""
    _require_client()
    from llp.cluster import submission
    from llp.spec import load_spec

    prepared = submission.of_search(
        load_spec(file, override or ()), study=study, working_dir=working_dir
    )
    driver = submission.Driver(
        driver_cpus,
        driver_gpus,
        None if driver_memory is None else int(driver_memory * GIB),
        python,
    )
    send(prepared, driver, address, insecure, follow, start_timeout, json)


def resume_there(
    study: str | None,
    root: str,
    overrides: list[str],
    *,
    address: str,
    working_dir: Path | None,
    follow: bool,
    start_timeout: float,
    insecure: bool,
    json: bool,
) -> None:
    """`llp resume --address`: goes on with a study on the cluster that sees its folder."""
    _require_client()
    from llp.cluster import submission

    if study is None:
        raise SpecError("which study? `llp resume STUDY --root FOLDER --address URL`")
    prepared = submission.of_resume(study, root, overrides=overrides, working_dir=working_dir)
    send(prepared, submission.Driver(), address, insecure, follow, start_timeout, json)


def send(
    prepared: Submission,
    driver: Driver,
    address: str | None,
    insecure: bool,
    follow: bool,
    start_timeout: float,
    json: bool,
) -> None:
    """Submits, says what came of it, and follows when asked to."""
    from llp.cluster import following, submission

    cluster = connect(address, insecure)
    for note in prepared.notes:
        say(note)
    sent = submission.send(cluster, prepared, driver, say)
    job = sent.job
    if json:
        emit({"event": "submission", "action": sent.action, "job": facts(job)})
    else:
        typer.echo(job.job_id)
    if sent.action == "succeeded":
        say(f"{job.job_id} has succeeded already, its study is in {job.root}/{job.study};")
        say(f"its log: {following.command('logs', job.job_id, cluster)}")
        return
    if sent.action == "attached":
        say(f"{job.job_id} is {job.state.lower()} already" + ("; attaching to it" * follow))
    elif sent.before is not None:
        how = "was stopped" if sent.before.state == "STOPPED" else "failed"
        say(f"{sent.before.job_id} {how}; {job.job_id} goes on with the same study")
    if follow:
        end(cluster, job, json=json, start_timeout=start_timeout)
    else:
        say(f"follow it: {following.command('logs', job.job_id, cluster, '--follow')}")
        say(f"stop it:   {following.command('stop', job.job_id, cluster)}")


def end(
    cluster: Cluster, job: Submitted, *, json: bool, start_timeout: float, silent: bool = False
) -> None:
    """Follows a job to its end and takes over its exit code."""
    from llp.cluster import following

    stream = sys.stderr if json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        job = following.follow(
            cluster,
            job.job_id,
            write=(lambda _: None) if silent else write,
            say=say,
            start_timeout=start_timeout,
        )
    except KeyboardInterrupt:
        say(f"{job.job_id} goes on without you; attach again with:")
        say("  " + following.command("logs", job.job_id, cluster, "--follow"))
        raise typer.Exit(following.INTERRUPTED) from None
    found = following.verdict(job, cluster)
    if json:
        emit({"event": "job", "exit_code": found.exit_code, "job": facts(job)})
    if found.message:
        say(found.message)
    raise typer.Exit(found.exit_code)


@jobs.command("list")
def list_(address: Address = None, insecure: Insecure = False, json: Json = False) -> None:
    """The jobs the cluster knows, newest last."""
    cluster = connect(address, insecure)
    found = cluster.jobs()
    if not found and not json:
        say(f"no jobs on {cluster.address} yet; `llp submit` makes one")
    for job in found:
        if json:
            emit({"event": "job", "job": facts(job)})
        else:
            code = "" if job.exit_code is None else f"exit code {_code(job.exit_code)}"
            name = job.job_id.ljust(max(len(each.job_id) for each in found))
            columns = (name, f"{job.state.lower():9}", f"{_when(job.started):16}", code)
            typer.echo("  ".join(columns).rstrip())


@jobs.command()
def status(
    job: JobName,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait", help="until it ends, then its exit code")] = False,
    start_timeout: StartTimeout = 600.0,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """State, exit code and attempt of a job, where its study is, how to go on."""
    from llp.cluster import following

    cluster = connect(address, insecure)
    found = cluster.find(job)
    if wait:
        end(cluster, found, json=json, start_timeout=start_timeout, silent=True)
    if json:
        emit({"event": "job", "job": facts(found)})
        return
    lines = {
        "job": found.job_id,
        "state": found.state.lower(),
        "attempt": str(found.attempt) if found.study else "",
        "exit code": "" if found.exit_code is None else str(_code(found.exit_code)),
        "started": _when(found.started),
        "ended": _when(found.ended),
        "study": f"{found.root}/{found.study}" if found.study else "",
        "command": found.entrypoint,
    }
    for name, value in lines.items():
        if value:
            typer.echo(f"{name:10}{value}")
    if found.state == "PENDING":
        say(f"it waits: {following.waits_for(found)}")
    elif found.over and (message := following.verdict(found, cluster).message):
        say(message)


@jobs.command()
def logs(
    job: JobName,
    address: Address = None,
    follow: Follow = False,
    start_timeout: StartTimeout = 600.0,
    insecure: Insecure = False,
) -> None:
    """What a job has written; with --follow until it ends, with its exit code."""
    cluster = connect(address, insecure)
    found = cluster.find(job)
    if follow:
        end(cluster, found, json=False, start_timeout=start_timeout)
    typer.echo(cluster.logs(found.job_id), nl=False)


@jobs.command()
def stop(
    job: JobName, address: Address = None, insecure: Insecure = False, json: Json = False
) -> None:
    """End a job; everything finished is saved."""
    from llp.cluster import following

    cluster = connect(address, insecure)
    found = cluster.find(job)
    if found.over:
        say(f"{found.job_id} has ended already: {found.state.lower()}")
    else:
        cluster.stop(found.job_id)
        found = _once_over(cluster, found)
        if found.state == "PENDING":
            say(f"{found.job_id} is queued: the cluster ends it the moment its driver could start")
        else:
            say(following.verdict(found, cluster).message or f"{found.job_id} has ended")
    if json:
        emit({"event": "job", "job": facts(found)})


def _once_over(cluster: Cluster, job: Submitted, seconds: float = 60.0) -> Submitted:
    """The job after it was told to stop; Ray keeps one that is queued until it could start."""
    started = time.monotonic()
    while not (job := cluster.job(job.job_id)).over:
        if job.state == "PENDING" and time.monotonic() > started + QUEUED_SECONDS:
            return job
        if time.monotonic() > started + seconds:
            raise EnvironmentProblem(
                f"{job.job_id} was told to stop and is still {job.state.lower()}"
            )
        time.sleep(0.5)
    return job


def connect(address: str | None, insecure: bool) -> Cluster:
    """The cluster at an address, or the one the environment names."""
    _require_client()
    from llp.cluster.access import find_address, find_token
    from llp.cluster.jobs import Cluster

    where = find_address(address)
    return Cluster(where, token=find_token(), insecure=insecure, say=_aloud(insecure))


def _require_client() -> None:
    """Ray's job client is not part of a plain installation of Ray."""
    try:
        import llp.cluster.jobs  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            f"talking to a cluster needs more of Ray: pip install 'llp[cluster]' ({error})"
        ) from error


def _aloud(insecure: bool) -> Callable[[str], None]:
    def tell(line: str) -> None:
        if insecure and line.startswith("--insecure"):
            typer.secho(line, fg="red", err=True)
        else:
            say(line)

    return tell


def facts(job: Submitted) -> dict[str, Any]:
    """A job as a JSON line tells it."""
    return {
        "job_id": job.job_id,
        "state": job.state,
        "exit_code": job.exit_code,
        "study": job.study or None,
        "attempt": job.attempt if job.study else None,
        "root": job.root or None,
        "started": job.started,
        "ended": job.ended,
        "message": job.message,
    }


def _code(number: int) -> int:
    """As shells tell it: 128 + n for signal n."""
    return number if number >= 0 else 128 - number


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
