"""A job server for tests: Ray's REST interface on loopback, with the moods a real one has.

It runs nothing. What happens to a submitted job is what the test says in `outcome`; everything that
is asked is kept in `requests`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

NO_AGENT = "No available agent to submit job, please try again later."


@dataclass
class FakeJob:
    """One submission as the server keeps it."""

    submission_id: str
    entrypoint: str = "exec true"
    status: str = "RUNNING"
    driver_exit_code: int | None = None
    error_type: str | None = None
    message: str = ""
    log: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    start_time: int = 0
    on_read: Callable[[], object] | None = None  # called once, when a follower has the whole log
    on_poll: Callable[[], object] | None = None  # called whenever its state is asked for

    def become(self, **values: Any) -> None:
        """Changes what the server tells of it."""
        vars(self).update(values)

    def plain(self) -> dict[str, Any]:
        """As the server tells it."""
        hidden = {"log", "request", "on_read", "on_poll"}
        return {"type": "SUBMISSION", **{k: v for k, v in vars(self).items() if k not in hidden}}


class FakeCluster:
    """The server; `address` is where it listens."""

    def __init__(self, token: str = "") -> None:
        self.token = token
        self.jobs: dict[str, FakeJob] = {}
        self.packages: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, Authorization
        self.outcome: dict[str, Any] = {"status": "SUCCEEDED", "driver_exit_code": 0}
        self.no_agent = 0  # submissions that are turned away first
        self.hidden: set[str] = set()  # jobs that a list does not show yet
        self.logs_lost = False  # with the node that had them
        self.broken_tails = 0  # connections that end in the middle of the log
        self.is_ray = True
        self.port = 0

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def elsewhere(self) -> str:
        """The same address, written so that nobody takes it for this machine."""
        return f"http://127.1:{self.port}"

    def posted(self) -> int:
        """Submissions that were asked for."""
        return sum((method, path) == ("POST", "/api/jobs/") for method, path, _ in self.requests)

    def add(self, name: str, **values: Any) -> FakeJob:
        """A job that was there before."""
        study, _, attempt = name.partition("--")
        known = {"llp_study": study, "llp_attempt": attempt or "1", "llp_root": "/shared"}
        self.jobs[name] = FakeJob(name, metadata={**known, **values.pop("metadata", {})}, **values)
        return self.jobs[name]

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self._guard], client_max_size=100 * 1024**2)
        app.add_routes(
            [
                web.get("/api/authentication_mode", self._mode),
                web.get("/api/version", self._version),
                web.get("/api/packages/{protocol}/{name}", self._has_package),
                web.put("/api/packages/{protocol}/{name}", self._put_package),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{id}", self._job),
                web.post("/api/jobs/{id}/stop", self._stop),
                web.get("/api/jobs/{id}/logs", self._logs),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        self.requests.append((request.method, request.path, given))
        if not self.is_ray:
            return web.Response(text="<html>It works!</html>", content_type="text/html")
        if self.token and request.path != "/api/authentication_mode":
            if not given:
                return web.Response(status=401, text="Unauthorized: Missing authentication token")
            if given != f"Bearer {self.token}":
                return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def _mode(self, request: web.Request) -> web.Response:
        return web.json_response({"authentication_mode": "token" if self.token else "disabled"})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})

    async def _has_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _put_package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _list(self, request: web.Request) -> web.Response:
        shown = [job.plain() for name, job in self.jobs.items() if name not in self.hidden]
        driver = {"type": "DRIVER", "job_id": "01000000", "status": "RUNNING", "entrypoint": "x"}
        return web.json_response([*shown, driver])

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.no_agent:
            self.no_agent -= 1
            return web.Response(status=500, text=NO_AGENT)
        name = body["submission_id"]
        if name in self.jobs:
            self.hidden.discard(name)
            text = f"Traceback (most recent call last):\nValueError: Job {name} already exists."
            return web.Response(status=500, text=text)
        self.jobs[name] = FakeJob(
            name,
            entrypoint=body["entrypoint"],
            metadata=body.get("metadata") or {},
            runtime_env=body.get("runtime_env") or {},
            request=body,
            start_time=int(time.time() * 1000),
            **self.outcome,
        )
        return web.json_response({"job_id": name, "submission_id": name})

    def _known(self, request: web.Request) -> FakeJob:
        name = request.match_info["id"]
        if name not in self.jobs:
            raise web.HTTPNotFound(text=f"Job {name} does not exist")
        return self.jobs[name]

    async def _job(self, request: web.Request) -> web.Response:
        job = self._known(request)
        if job.on_poll:
            job.on_poll()
        return web.json_response(job.plain())

    async def _stop(self, request: web.Request) -> web.Response:
        job = self._known(request)
        if job.status == "RUNNING":
            job.status = "STOPPED"  # one that is queued is only stopped when it starts
        return web.json_response({"stopped": True})

    async def _logs(self, request: web.Request) -> web.Response:
        if self.logs_lost:
            return web.Response(status=500, text="Cannot connect to host 10.0.0.7:52365")
        return web.json_response({"logs": self._known(request).log})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        job = self._known(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sent = 0
        while True:
            text = job.log[sent : sent + 20]  # in pieces that do not end with lines
            if text:
                await socket.send_str(text)
                sent += len(text)
                if self.broken_tails and sent > 30:
                    self.broken_tails -= 1
                    request.transport.abort()
                    return socket
            elif job.status not in ("PENDING", "RUNNING"):
                await socket.close()
                return socket
            elif job.on_read:
                then, job.on_read = job.on_read, None
                then()
            else:
                await asyncio.sleep(0.02)


@contextmanager
def serving(cluster: FakeCluster, port: int = 0) -> Iterator[FakeCluster]:
    """The server, listening for the time of the block."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(cluster.app(), shutdown_timeout=0.2)

    async def begin() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        cluster.port = site._server.sockets[0].getsockname()[1]

    loop.run_until_complete(begin())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield cluster
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


def decode(line: str) -> dict[str, Any]:
    """One JSON line."""
    return json.loads(line)
