"""The only client of a cluster's job server: Ray Jobs over HTTP, with clean errors and patience.

A *submission* is one command that the cluster runs, called by an id of our choice. `Cluster`
submits and looks at them; what is submitted for a search is in `submission`, how one is followed to
its end in `following`. Ray's command line is never used: it starts for ten seconds and turns every
exit code into 1.

Whoever may talk to a job server may run code on the cluster. Hence an address that is not this
machine's own is refused when its cluster wants no token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from llp.cluster.access import ENVIRONMENT, HOW_TO_GIVE_IT, NO_TOKEN, Token, is_loopback
from llp.errors import EnvironmentProblem, StudyError, nearest

State = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
Say = Callable[[str], None]
Found = TypeVar("Found")

REFUSED_SECONDS = 15.0
"""How long nothing may listen at the address: a cluster that starts opens its port late."""
NO_AGENT_SECONDS = 60.0
"""How long the server may have nobody to hand a job to, as in the first seconds of its life."""
TIMEOUT_SECONDS = (10.0, 120.0)
"""To connect, and between two bytes of an answer; Ray's own client would wait for ever."""


class Unreachable(EnvironmentProblem):
    """Nobody answers at the address, or nobody who can take a job yet. It may pass."""


class AlreadyThere(EnvironmentProblem):
    """The cluster has a submission of this id."""


@dataclass(frozen=True)
class Submitted:
    """What the cluster says about one submission.

    Attributes:
        job_id: Its id, the one that was asked for.
        state: Where it is.
        exit_code: Of the command; negative for a signal; None while it runs or when it never did.
        message: The server's words, with the last lines of the log when the command failed.
        error_type: The server's name for a failure that is not the command's own.
        entrypoint: The command.
        metadata: What was submitted with it; the `llp_*` keys are ours, see `submission`.
        started: When it was submitted, Unix seconds.
        ended: When it ended, Unix seconds; None before.
    """

    job_id: str
    state: State
    exit_code: int | None = None
    message: str = ""
    error_type: str = ""
    entrypoint: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state not in ("PENDING", "RUNNING")

    @property
    def study(self) -> str:
        """The study it works on; empty for jobs that are not ours."""
        return self.metadata.get("llp_study", "")

    @property
    def attempt(self) -> int:
        """1 for the first submission of a study to this cluster."""
        given = self.metadata.get("llp_attempt", "")
        return int(given) if given.isdecimal() else 1

    @property
    def root(self) -> str:
        """The folder of study folders that it writes to; empty for jobs that are not ours."""
        return self.metadata.get("llp_root", "")


class Cluster:
    """A cluster's job server.

    Args:
        address: `http://HOST:PORT`, see `find_address`.
        token: See `find_token`.
        insecure: Also talk to a cluster elsewhere that wants no token.
        say: Told, in one line, why something takes longer.
        patience: Share of `REFUSED_SECONDS` and `NO_AGENT_SECONDS` that is waited.

    Raises:
        EnvironmentProblem: Nobody there, a wrong token or none, or no token wanted elsewhere.
    """

    def __init__(
        self,
        address: str,
        *,
        token: Token = NO_TOKEN,
        insecure: bool = False,
        say: Say = lambda _: None,
        patience: float = 1.0,
    ) -> None:
        self.address = address
        self._token = token
        self._say = say
        self._patience = patience
        for name in (
            "ray.dashboard.modules.dashboard_sdk",
            "ray.dashboard.modules.job.sdk",
            "ray._private.runtime_env.packaging",
        ):
            logging.getLogger(name).setLevel(logging.ERROR)
        if not is_loopback(address) and not self._wants_token():
            if not insecure:
                raise EnvironmentProblem(
                    f"the cluster at {address} wants no token: anyone who reaches it can run "
                    "code there; start it with RAY_AUTH_MODE=token, or use --insecure"
                )
            say(f"--insecure: {address} wants no token, anyone who reaches it can run code there")
            self._token = token = NO_TOKEN
        self._client = self._patiently(lambda: _Client(address, token.value))

    def _wants_token(self) -> bool:
        """Asked without the token, so that an open cluster never sees it."""

        def ask() -> bool:
            url = f"{self.address}/api/authentication_mode"
            answer = requests.get(url, timeout=TIMEOUT_SECONDS)
            if answer.status_code == 200:
                return str(answer.json().get("authentication_mode")) != "disabled"
            url = f"{self.address}/api/version"
            answer = requests.get(url, timeout=TIMEOUT_SECONDS)
            return answer.status_code in (401, 403)

        return self._patiently(ask)

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        *,
        working_dir: str | None = None,
        environment: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        cpus: float | None = None,
        gpus: float | None = None,
        memory: int | None = None,
    ) -> None:
        """Hands a command to the cluster, which runs it once.

        Args:
            job_id: What it is to be called.
            entrypoint: A shell command.
            working_dir: Folder or zip file that is sent along and is the command's folder.
            environment: Variables of the command and its workers. They can be read by everyone who
                has the token: no secrets.
            metadata: Kept with it, as readable.
            cpus: Reserved for the command itself; with none it runs on the head node.
            gpus: The same.
            memory: The same, in bytes.

        Raises:
            AlreadyThere: There is a submission of this id.
            EnvironmentProblem: The cluster does not take it.
        """
        runtime_env: dict[str, Any] = {"env_vars": dict(environment or {})}
        if working_dir is not None:
            runtime_env["working_dir"] = working_dir
        self._patiently(
            lambda: self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env=runtime_env,
                metadata=dict(metadata or {}),
                entrypoint_num_cpus=cpus,
                entrypoint_num_gpus=gpus,
                entrypoint_memory=memory,
            )
        )

    def jobs(self) -> list[Submitted]:
        """All submissions the cluster knows, oldest first."""
        found = self._patiently(self._client.list_jobs)
        ours = [_submitted(job) for job in found if job.submission_id]
        return sorted(ours, key=lambda job: (job.started or 0.0, job.job_id))

    def job(self, job_id: str) -> Submitted:
        """One submission.

        Raises:
            StudyError: The cluster has none of this id.
        """
        return _submitted(self._patiently(lambda: self._client.get_job_info(job_id)))

    def find(self, name: str) -> Submitted:
        """The submission called `name`, or the newest of the study called so.

        Raises:
            StudyError: There is none; the message has the nearest.
        """
        jobs = self.jobs()
        of_study = [job for job in jobs if job.study == name]
        if of_study:
            return max(of_study, key=lambda job: (job.started or 0.0, job.attempt))
        for job in jobs:
            if job.job_id == name:
                return job
        known = [job.job_id for job in jobs]
        guess = nearest(name, known)
        hint = f"did you mean '{guess}'?" if guess else "see `llp jobs list`"
        raise StudyError(f"no job '{name}' on {self.address}; {hint}")

    def stop(self, job_id: str) -> bool:
        """Asks the command to end, and kills it when it does not; False when it had ended."""
        return bool(self._patiently(lambda: self._client.stop_job(job_id)))

    def logs(self, job_id: str) -> str:
        """All that the command has written so far, on both streams."""
        return str(self._patiently(lambda: self._client.get_job_logs(job_id)))

    def tail(self, job_id: str, *, skip: int = 0, heartbeat: float = 10.0) -> Iterator[str]:
        """What the command writes, as it writes it, until it ends; empty text while it is silent.

        Args:
            job_id: The submission.
            skip: Characters from the beginning that are left out.
            heartbeat: Seconds of silence after which empty text is given.

        Raises:
            Unreachable: The connection broke.
        """
        with asyncio.Runner() as runner, self._as_ours():
            chunks = self._client.tail_job_logs(job_id)
            waiting: asyncio.Future[str | None] | None = None

            async def chunk() -> str | None:
                nonlocal waiting
                if waiting is None:
                    waiting = asyncio.ensure_future(anext(chunks, None))
                done, _ = await asyncio.wait({waiting}, timeout=heartbeat)
                if not done:
                    return ""
                finished, waiting = waiting, None
                return finished.result()

            while (text := runner.run(chunk())) is not None:
                if skip and text:
                    skip, text = max(0, skip - len(text)), text[skip:]
                yield text

    def _patiently(self, call: Callable[[], Found]) -> Found:
        """The answer to `call`, tried again for a while where the reason to fail may pass."""
        started, pause, told = time.monotonic(), 0.5, False
        while True:
            try:
                with self._as_ours():
                    return call()
            except Unreachable as error:
                limit = NO_AGENT_SECONDS if "agent" in str(error) else REFUSED_SECONDS
                left = limit * self._patience - (time.monotonic() - started)
                if left <= 0:
                    raise
                if not told:
                    self._say(f"{error}; trying again for {limit * self._patience:.0f} s")
                    told = True
                time.sleep(min(pause, left))
                pause = min(2 * pause, 5.0)

    @contextlib.contextmanager
    def _as_ours(self) -> Iterator[None]:
        """Turns what Ray's client and HTTP raise into errors with something to do."""
        try:
            yield
        except (AuthenticationError, aiohttp.WSServerHandshakeError) as error:
            raise self._refused(error) from error
        except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
            raise EnvironmentProblem(f"cannot talk to {self.address}: {error}") from error
        except (requests.exceptions.JSONDecodeError, requests.exceptions.HTTPError) as error:
            raise self._no_ray(error) from error
        except (OSError, requests.exceptions.RequestException, aiohttp.ClientError) as error:
            raise Unreachable(f"{self.address} does not answer{_why(error)}") from error
        except RuntimeError as error:
            raise self._failed(str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise self._no_ray(error) from error

    def _refused(self, error: Exception) -> EnvironmentProblem:
        text = str(getattr(error, "message", error))
        if getattr(error, "status", None) == 401 or text.startswith("Authentication required"):
            return EnvironmentProblem(
                f"the cluster at {self.address} wants a token: {HOW_TO_GIVE_IT}"
            )
        if getattr(error, "status", 403) == 403:
            return EnvironmentProblem(
                f"the token is wrong: {self.address} does not take the one from "
                f"{self._token.source or 'here'}; {HOW_TO_GIVE_IT}"
            )
        return Unreachable(f"{self.address} does not answer: {text}")

    def _failed(self, text: str) -> EnvironmentProblem | StudyError:
        """The error for a status code that is not 200."""
        if self._token.value:
            text = text.replace(self._token.value, "[token]")
        if "already exists" in text:
            return AlreadyThere("the cluster has a job of this id")
        if "status code 404" in text and "does not exist" in text:
            return StudyError(f"the cluster at {self.address} has no such job: `llp jobs list`")
        if "returned 404" in text or "status code 404" in text:
            return self._no_ray(text)
        if "No available agent" in text or "node agent" in text:
            return Unreachable(
                f"the cluster at {self.address} has no agent that could take a job yet"
            )
        if any(f"status code {code}" in text for code in (502, 503, 504)):
            return Unreachable(f"{self.address} does not answer: its proxy says {_last(text)}")
        if "WebSocket" in text:
            return Unreachable(f"the connection to {self.address} broke")
        return EnvironmentProblem(f"the cluster at {self.address} says: {_last(text)}")

    def _no_ray(self, error: object) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"{self.address} answers, but not as a Ray job server does ({_last(str(error))}); "
            "give the address of the cluster's dashboard, usually port 8265"
        )


class _Client(JobSubmissionClient):
    """Ray's client with a time limit on every request, our token, and the address it is given."""

    def __init__(self, address: str, token: str) -> None:
        # Ray's own lets RAY_ADDRESS override an address that was given.
        # With a header of this name Ray adds none; one that is None is not sent. Otherwise the
        # token that this process keeps would go out, whoever asks.
        headers: dict[str, Any] = {"Authorization": f"Bearer {token}" if token else None}
        before = os.environ.get(ENVIRONMENT[0])
        os.environ[ENVIRONMENT[0]] = address
        try:
            super().__init__(address, headers=headers)
        finally:
            del os.environ[ENVIRONMENT[0]]
            if before is not None:
                os.environ[ENVIRONMENT[0]] = before
        if not token:
            self._headers = {}

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=TIMEOUT_SECONDS, **options)


def _submitted(job: Any) -> Submitted:
    return Submitted(
        job_id=job.submission_id,
        state=job.status.value,
        exit_code=job.driver_exit_code,
        message=job.message or "",
        error_type=job.error_type or "",
        entrypoint=job.entrypoint,
        metadata=job.metadata or {},
        started=None if job.start_time is None else job.start_time / 1000,
        ended=None if job.end_time is None else job.end_time / 1000,
    )


def _why(error: BaseException) -> str:
    text = f"{error!r} {error.__context__!r}"
    for sign, meaning in (
        ("Name or service not known", ": there is no host of this name"),
        ("NameResolution", ": there is no host of this name"),
        ("refused", ": nothing listens there"),
        ("timed out", " in time"),
        ("Timeout", " in time"),
    ):
        if sign in text:
            return meaning
    return f": {_last(str(error))}"


def _last(text: str) -> str:
    """The last line that says something: of a traceback the error itself."""
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300].rstrip(".") if lines else "nothing"
