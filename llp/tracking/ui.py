"""MLflow's own web page, started for `llp ui` with what nobody here uses turned off."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import IO

from llp.errors import EnvironmentProblem
from llp.tracking.links import is_server

_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def start_ui(
    uri: str, host: str = "127.0.0.1", port: int = 5000, *, timeout: float = 120.0
) -> subprocess.Popen[bytes]:
    """Starts MLflow's page on the database at `uri` and returns when it answers.

    Its default start has a job runner and seven helpers of about 0.6 GB together, and four workers;
    here there is one worker and no helper. On two busy cores it takes up to a minute.

    Args:
        uri: Tracking URI of a database, `sqlite:///...`.
        host: Address to listen on; the page has no password, so 127.0.0.1 unless you know better.
        port: TCP port.
        timeout: Seconds to wait for the first answer.

    Raises:
        EnvironmentProblem: The port is in use, `uri` is a server of its own, or the page does not
            come up.
    """
    if is_server(uri):
        raise EnvironmentProblem(f"{uri} is an MLflow server already: open it in a browser")
    check_port(host, port)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with tempfile.TemporaryFile() as log:  # the server keeps a handle of its own
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            _wait_until_healthy(process, base_url(host, port), timeout, log)
        except BaseException:
            stop_ui(process)
            raise
    return process


def _wait_until_healthy(
    process: subprocess.Popen[bytes], url: str, timeout: float, log: IO[bytes]
) -> None:
    deadline = time.monotonic() + timeout
    while not _healthy(url):
        if process.poll() is not None:
            raise EnvironmentProblem(f"MLflow's page did not start: {_last_line(log)}")
        if time.monotonic() > deadline:
            raise EnvironmentProblem(
                f"MLflow's page at {url} did not answer within {timeout:.0f} s: {_last_line(log)}"
            )
        time.sleep(0.25)


def stop_ui(process: subprocess.Popen[bytes]) -> None:
    """Ends the page and its worker."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def base_url(host: str, port: int) -> str:
    """Where a browser on this machine finds the page."""
    host = _ANY_HOST.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_port(host: str, port: int) -> None:
    """Makes sure that nothing listens on the port yet.

    Raises:
        EnvironmentProblem: It is in use, or cannot be listened on; the message names it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise EnvironmentProblem(
            f"port {port} on {host} cannot be used ({getattr(error, 'strerror', None) or error}); "
            f"choose another with --port, for example {port % 60000 + 1}"
        ) from error


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else "it said nothing"
