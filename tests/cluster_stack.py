"""Starts natively what `docker/compose.yaml` starts in containers, for `test_cluster_stack.py`.

PostgreSQL, an MLflow server with accounts, a Ray head and Ray nodes: separate processes, started
with the very commands of the compose file. Only addresses, ports and sizes are replaced: each Ray
node gets a loopback address of its own (127.0.0.2, .3, ...), as machines have. Secrets are made by
`make-secrets.sh` and read by `entrypoint.sh`.

Everything started here carries a mark in its environment, and is ended by pid.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from halting import name_of

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
MARK = "LLP_STACK_TEST"
PATIENCE = 600.0
"""Seconds for anything to come up: MLflow makes its tables in over a minute on a busy machine."""


def postgres_binaries() -> Path:
    """The folder with `initdb` and `postgres`; skips where there is none."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[4])
    )
    where = shutil.which("initdb")
    if found:
        return found[-1].parent
    if where:
        return Path(where).resolve().parent
    pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on, outside 10002 to 19999, where Ray's workers take theirs."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = int(probe.getsockname()[1])
    return port if not 10002 <= port <= 19999 else free_port(host)


def wait_until(ready: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The first true answer of `ready`."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if answer := ready():
                return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} in {seconds:.0f} s")
        time.sleep(0.25)


class Stack:
    """The running processes, and how to talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.postgres = postgres_binaries()
        self.services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.secrets = self._make_secrets()
        self.seconds: dict[str, float] = {}
        self.address = ""
        self.tracking_uri = ""

    # -- secrets and environment -----------------------------------------------------------------

    def _make_secrets(self) -> dict[str, str]:
        script = shutil.copy(DOCKER / "make-secrets.sh", self.folder)
        subprocess.run([script], check=True, capture_output=True)
        return {path.name: path.read_text() for path in (self.folder / "secrets").iterdir()}

    def environment(self, service: str | None = None) -> dict[str, str]:
        """The variables of a service of the compose file, here; without one, those of a client."""
        told = {
            name: str(value).replace("/run/secrets", str(self.folder / "secrets"))
            for name, value in (self.services[service]["environment"] if service else {}).items()
            if not name.startswith(("AWS_", "MLFLOW_S3_"))  # artifacts go to a folder here
        }
        keep = {"PATH", "LANG", "TMPDIR", "TZ"}
        return {
            **{name: os.environ[name] for name in keep if name in os.environ},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "secrets" / "ray_token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "240",
            # Several nodes on one machine would each kill for what others use of its memory.
            "RAY_memory_monitor_refresh_ms": "0",
            MARK: self.mark,
            **told,
        }

    def start(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        self.processes.append(process)
        return process

    def _wait_for(self, name: str, ready: Callable[[], bool]) -> None:
        """Until the process started last is ready; its last words when it ends instead."""
        process, log = self.processes[-1], self.logs / f"{name}.log"

        def ready_or_dead() -> bool:
            return ready() or process.poll() is not None

        wait_until(ready_or_dead, f"{name} is up")
        assert process.poll() is None, f"{name} ended:\n{log.read_text()[-2000:]}"

    def replaced(self, service: str, changes: dict[str, str | None]) -> list[str]:
        """A command of the compose file with options `--name=...` replaced; None drops one."""
        words, left = [], dict(changes)
        for word in self.services[service]["command"]:
            name = word.split("=")[0]
            if name in left:
                value = left.pop(name)
                words += [f"{name}={value}"] if value is not None else []
            else:
                words.append(word)
        return [*words, *(f"{name}={value}" for name, value in left.items())]

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[what] = round(time.monotonic() - started, 1)

    # -- PostgreSQL ------------------------------------------------------------------------------

    def start_postgres(self) -> int:
        """A fresh server with the database `mlflow` of the user `llp`, by password only."""
        folder = self.folder / "postgres"
        folder.mkdir(mode=0o700)
        password = self.folder / "postgres-password"
        password.write_text(self.secrets["postgres_password"])
        as_user: list[str] = []
        if os.geteuid() == 0:  # the server refuses to run as root
            user = pwd.getpwnam("postgres")
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}"]
            as_user.append("--clear-groups")
            for path in (folder, password):
                os.chown(path, user.pw_uid, user.pw_gid)
        password.chmod(0o600)
        port = free_port()
        subprocess.run(
            [
                *as_user,
                *(self.postgres / "initdb", "--pgdata", folder, "--username=llp"),
                *(f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            cwd="/",
        )
        password.unlink()
        command = [*as_user, self.postgres / "postgres", "-D", folder, "-h", "127.0.0.1"]
        command += ["-p", str(port), "-k", "", "-c", "fsync=off"]
        self.start("postgres", command, cwd="/", env=self.environment())
        check = [self.postgres / "pg_isready", "--host=127.0.0.1", f"--port={port}"]
        self._wait_for(
            "postgres", lambda: subprocess.run(check, capture_output=True).returncode == 0
        )
        subprocess.run(
            [
                *(self.postgres / "createdb", "--host=127.0.0.1", f"--port={port}"),
                *("--username=llp", "--no-password", "mlflow"),
            ],
            check=True,
            capture_output=True,
            env={**self.environment(), "PGPASSWORD": self.secrets["postgres_password"]},
        )
        return port

    # -- MLflow ----------------------------------------------------------------------------------

    def start_mlflow(self, postgres_port: int) -> None:
        """The server of the compose file on that database; artifacts go to a folder."""
        port = free_port()
        here = f"@127.0.0.1:{postgres_port}/"
        accounts = self.folder / "mlflow-auth.ini"
        accounts.write_text(
            (DOCKER / "mlflow-auth.ini").read_text().replace("@postgres:5432/", here)
        )
        words = self.replaced(
            "mlflow",
            {
                "--host": "127.0.0.1",
                "--port": str(port),
                "--workers": "1",
                "--backend-store-uri": f"postgresql+psycopg2://llp{here}mlflow",
                "--artifacts-destination": str(self.folder / "artifacts"),
            },
        )
        environment = {**self.environment("mlflow"), "MLFLOW_AUTH_CONFIG_PATH": str(accounts)}
        self.tracking_uri = f"http://127.0.0.1:{port}"
        with self.timed("MLflow server up"):
            self.start(
                "mlflow", [str(DOCKER / "entrypoint.sh"), *words], env=environment, cwd=self.folder
            )
            self._wait_for("mlflow", lambda: self.mlflow("/health")[0] == 200)

    def mlflow(
        self,
        path: str,
        *,
        body: Any = None,
        user: str = "",
        password: str = "",
        host: str | None = None,
    ) -> tuple[int, Any]:
        """Status and answer of one request."""
        request = urllib.request.Request(f"{self.tracking_uri}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if user:
            login = base64.b64encode(f"{user}:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        if host is not None:
            request.add_header("Host", host)
        return _answer(request)

    # -- Ray -------------------------------------------------------------------------------------

    def start_head(self) -> None:
        """The head of the compose file; it offers no CPU to trials."""
        self.gcs = f"127.0.0.2:{free_port('127.0.0.2')}"
        self.ports = {"agent": str(free_port()), "dashboard": str(free_port())}
        words = self.replaced(
            "head",
            {
                "--port": self.gcs.split(":")[1],
                "--node-ip-address": "127.0.0.2",
                "--dashboard-port": self.ports["dashboard"],
                "--dashboard-agent-listen-port": self.ports["agent"],
                "--ray-client-server-port": str(free_port()),
                "--object-store-memory": "100000000",
                "--temp-dir": str(self.folder / "ray"),
                "--min-worker-port": "0",
                "--max-worker-port": "0",
            },
        )
        self.address = f"http://127.0.0.1:{self.ports['dashboard']}"
        with self.timed("Ray head up"):
            self._start_ray("head", [str(DOCKER / "entrypoint.sh"), *words])
            self._wait_for("head", lambda: self.node_healthy("head") == 0)

    def start_node(self) -> int:
        """One more node with one CPU; returns its number."""
        number = len(self.nodes)
        ip = f"127.0.0.{number + 2}"
        words = self.replaced(
            "worker-cpu",
            {
                "--address": self.gcs,
                "--node-ip-address": ip,
                "--num-cpus": "1",
                "--dashboard-agent-listen-port": str(free_port(ip)),
                "--object-store-memory": "100000000",
                "--min-worker-port": "0",
                "--max-worker-port": "0",
            },
        )
        with self.timed(f"Ray node {number} up"):
            self._start_ray(f"node{number}", words, "worker-cpu")
            self._wait_for(f"node{number}", lambda: ip in self.alive())
        return number

    def _start_ray(self, name: str, words: list[str], service: str = "head") -> None:
        process = self.start(name, words, env=self.environment(service), cwd=self.folder)
        self.nodes.append(process)

    def node_healthy(self, *role: str) -> int:
        """What the health check of the image says about the head."""
        ports = {
            "LLP_AGENT_PORT": self.ports["agent"],
            "LLP_DASHBOARD_PORT": self.ports["dashboard"],
        }
        command = [sys.executable, str(DOCKER / "node_healthy.py"), *role]
        return subprocess.run(command, env={**os.environ, **ports}, capture_output=True).returncode

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head counts as alive, its own included."""
        status, answer = self.ray("/nodes?view=summary")
        if status != 200:
            return set()
        nodes = [node["raylet"] for node in answer["data"]["summary"]]
        return {n["nodeManagerAddress"] for n in nodes if n.get("state") == "ALIVE"}

    def ray(self, path: str, token: str | None = None) -> tuple[int, Any]:
        """Status and answer of one request to the dashboard; `""` for no token."""
        request = urllib.request.Request(f"{self.address}{path}")
        token = self.secrets["ray_token"] if token is None else token
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        return _answer(request)

    def trial_processes(self, *numbers: int) -> list[psutil.Process]:
        """Processes of nodes that train."""
        found = []
        for number in numbers:
            children = _descendants(self.nodes[number].pid)
            found += [child for child in children if "Trainable" in name_of(child)]
        return found

    def kill_node(self, number: int) -> int:
        """SIGKILL for every process of a node at once, as a power cut; how many there were."""
        doomed = [psutil.Process(self.nodes[number].pid), *_descendants(self.nodes[number].pid)]
        for process in doomed:
            with contextlib.suppress(psutil.Error):
                process.suspend()  # so that none sees another die and tidies up
        for process in doomed:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return len(doomed)

    # -- llp and the end ---------------------------------------------------------------------------

    def llp(self, *words: str, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """One command of the command line, as a user with the token and no other secret."""
        return subprocess.run(
            [sys.executable, "-m", "llp.cli", *words],
            cwd=self.folder / "client",
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def start_llp(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        return self.start(
            name,
            [sys.executable, "-m", "llp.cli", *words],
            cwd=self.folder / "client",
            env=self.environment(),
        )

    def stop(self) -> None:
        """Ends what was started here: by pid, descendants and what carries the mark included."""
        alive = {p.pid: p for process in self.processes for p in _tree(process.pid)}
        alive |= {p.pid: p for p in psutil.process_iter() if self._is_ours(p)}
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        psutil.wait_procs(list(alive.values()), timeout=20)
        alive |= {p.pid: p for p in psutil.process_iter() if self._is_ours(p)}
        for each in alive.values():
            with contextlib.suppress(psutil.Error):
                each.kill()  # psutil makes sure that the pid was not given to another
        for process in self.processes:
            process.wait(PATIENCE)
        psutil.wait_procs(list(alive.values()), timeout=PATIENCE)

    def left_behind(self) -> list[str]:
        """Processes of this stack that still live."""
        return [str(p) for p in psutil.process_iter() if self._is_ours(p)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid():
                return False
            if process.environ().get(MARK) == self.mark:
                return True
            return str(self.folder / "ray") in " ".join(process.cmdline())
        return False


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid), *_descendants(pid)]
    return []


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def _answer(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode("utf-8", "replace")
    except (urllib.error.URLError, OSError) as error:
        return 0, str(error)
    with contextlib.suppress(ValueError):
        return status, json.loads(text)
    return status, text
