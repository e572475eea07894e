"""A real Ray cluster for tests: processes of its own on loopback, with a token, in a short folder.

Every node is a `ray start --block` of its own in its own session; whatever it started is found by
that session and ended by pid, never by name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from halting import name_of
from study_runs import environment


def free_ports(number: int) -> list[int]:
    """Ports nobody uses now, none of them among those that Ray gives to workers by default."""
    sockets: list[socket.socket] = []
    ports: list[int] = []
    while len(ports) < number:
        probe = socket.socket()
        probe.bind(("127.0.0.1", 0))
        sockets.append(probe)
        if not 10002 <= probe.getsockname()[1] <= 19999:
            ports.append(probe.getsockname()[1])
    for probe in sockets:
        probe.close()
    return ports


class RayCluster:
    """A head node with a job server, and workers that can be added and killed."""

    def __init__(self, *, token: str = "", head_cpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))  # socket paths are short
        self.token = token
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.gcs, self.dashboard, self._first_worker_port = *free_ports(2), 20000
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.home = self.folder / "home"
        self.home.mkdir()
        self.environment = environment(
            HOME=str(self.home), RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=str(self.folder)
        )
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
            self.environment.pop(name, None)
        self.environment["RAY_AUTH_MODE"] = "token" if token else "disabled"
        if token:
            path = self.home / "token"
            path.write_text(token)
            path.chmod(0o600)
            self.environment["RAY_AUTH_TOKEN_PATH"] = str(path)
        # What a cluster has on its PATH is not what Ray runs with: no `python` of ours there.
        self.environment["PATH"] = "/usr/bin:/bin"
        self._start(
            "head",
            "--head",
            f"--port={self.gcs}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}",
            num_cpus=head_cpus,
        )
        self._until_up()

    def _start(self, name: str, *options: str, num_cpus: int, num_gpus: int = 0) -> None:
        low, self._first_worker_port = self._first_worker_port, self._first_worker_port + 200
        agent, grpc, metrics, nodes, objects = free_ports(5)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.nodes[name] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options),
                    f"--num-cpus={num_cpus}",
                    f"--num-gpus={num_gpus}",
                    "--node-ip-address=127.0.0.1",
                    f"--temp-dir={self.folder / name}",
                    f"--object-store-memory={100 * 1024**2}",
                    f"--dashboard-agent-listen-port={agent}",
                    f"--dashboard-agent-grpc-port={grpc}",
                    f"--metrics-export-port={metrics}",
                    f"--node-manager-port={nodes}",
                    f"--object-manager-port={objects}",
                    f"--min-worker-port={low}",
                    f"--max-worker-port={low + 199}",
                    "--disable-usage-stats",
                ],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def add_worker(self, name: str, *, num_cpus: int = 1, num_gpus: int = 0) -> None:
        """Starts another node and waits for it: two that start at once get in each other's way."""
        self._start(name, f"--address=127.0.0.1:{self.gcs}", num_cpus=num_cpus, num_gpus=num_gpus)
        self.wait_for_nodes(len(self.nodes))

    def processes(self, name: str) -> list[psutil.Process]:
        """Everything that a node has started and that lives."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self.nodes[name].pid)
            found = [*node.children(recursive=True), node]
        return found

    def trainers(self, name: str) -> list[psutil.Process]:
        """The workers of a node that train."""
        return [process for process in self.processes(name) if "Trainable" in name_of(process)]

    def lose(self, name: str) -> None:
        """Ends a node as a power cut does."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a request with the right token."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.address + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _until_up(self, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.nodes["head"].poll() is not None:
                raise RuntimeError((self.folder / "head.log").read_text())
            with contextlib.suppress(OSError):
                if self.get("/api/version")[0] == 200:
                    return
            time.sleep(0.5)
        raise TimeoutError((self.folder / "head.log").read_text())

    def wait_for_nodes(self, number: int, seconds: float = 400) -> None:
        """Until the cluster has this many living nodes."""
        deadline, body = time.monotonic() + seconds, b""
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                _, body = self.get("/api/v0/nodes?detail=1")
                if body.count(b'"ALIVE"') >= number:
                    return
            time.sleep(0.5)
        logs = "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))
        raise TimeoutError(f"fewer than {number} nodes: {body!r}\n{logs}")

    def client_environment(self, **extra: str) -> dict[str, str]:
        """For commands that talk to the cluster: the right token, unless `extra` says otherwise."""
        chosen = environment(HOME=str(self.home), **extra)
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            chosen.pop(name, None)
        if self.token:
            chosen.setdefault("RAY_AUTH_TOKEN", self.token)
        return chosen

    def stop(self) -> None:
        """Ends every process of the cluster, by pid, and removes its folder."""
        left = [process for name in self.nodes for process in self.processes(name)]
        for node in self.nodes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.pid, signal.SIGTERM)
        psutil.wait_procs(left, timeout=20)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self.nodes.values():
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(*, token: bool = True, head_cpus: int = 2) -> Iterator[RayCluster]:
    """A cluster for the time of the block."""
    cluster = RayCluster(token=secrets.token_hex(16) if token else "", head_cpus=head_cpus)
    try:
        yield cluster
    finally:
        cluster.stop()
