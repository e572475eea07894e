"""What `llp doctor` finds, check by check, on machines that are not this one."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from types import SimpleNamespace

import pytest

from llp import doctor
from llp.doctor import GIB


def test_every_check_that_is_not_ok_says_what_to_do(tmp_path):
    found = list(doctor.examine(tmp_path))
    assert {check.name for check in found} >= {"Python", "PyTorch", "Ray", "MLflow", "Disk", "CPU"}
    assert all(check.todo for check in found if check.status != "ok")
    assert all(check.found for check in found)


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok"), ((3, 14, 0), "warn")],
)
def test_python_versions(version, status):
    assert doctor.python(version).status == status


@pytest.mark.parametrize(
    ("found", "least", "outdated"),
    [
        ("2.10.1", (2, 11), True),
        ("2.11.0+cpu", (2, 11), False),
        ("2.15.0+cu132", (2, 11), False),
        ("3.9", (3, 17), True),
        ("10.0", (9, 1), False),
    ],
)
def test_versions_compare_as_numbers(found, least, outdated):
    assert doctor._outdated(found, least) is outdated


def test_a_missing_package_is_a_failure_with_the_command_that_installs_it():
    check = doctor.package("llp-no-such-package", "Nothing", (1, 2))
    assert (check.status, check.todo) == ("fail", "pip install 'llp-no-such-package>=1.2'")


@pytest.mark.parametrize(("mode", "status"), [(0o644, "warn"), (0o640, "warn"), (0o600, "ok")])
def test_a_ray_token_that_others_can_read_is_a_warning(tmp_path, mode, status):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(mode)
    check = doctor.ray_token({}, tmp_path)
    assert check.status == status
    assert "secret" not in check.found
    assert check.todo == ("" if status == "ok" else f"chmod 600 {token}")


def test_token_mode_without_a_token_cannot_run(tmp_path):
    assert doctor.ray_token({}, tmp_path).status == "ok"
    assert doctor.ray_token({"RAY_AUTH_MODE": "token"}, tmp_path).status == "fail"
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}
    assert doctor.ray_token(given, tmp_path).status == "ok"


@pytest.mark.parametrize(
    ("free", "status"), [(GIB // 4, "fail"), (2 * GIB, "warn"), (50 * GIB, "ok")]
)
def test_disk_space(tmp_path, free, status):
    assert doctor.disk(tmp_path, free).status == status


def test_small_memories_are_warnings():
    assert doctor.memory(1 * GIB).status == "warn"
    assert doctor.memory(8 * GIB).status == "ok"
    assert doctor.shared_memory(64 * 1024**2).status == "warn"
    assert doctor.shared_memory(2 * GIB).status == "ok"


def test_an_output_folder_is_tried_without_being_made(tmp_path):
    wanted = tmp_path / "not" / "yet"
    assert doctor.writable(wanted).status == "ok"
    assert not wanted.exists()
    (tmp_path / "file").write_text("x")
    assert doctor.writable(tmp_path / "file").status == "fail"


def test_a_taken_port_names_another():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        check = doctor.port(number)
        assert (check.status, check.todo) == ("warn", f"llp ui --port {number + 1}")
    assert doctor.port(number).status == "ok"


def test_a_server_that_answers_refuses_or_is_not_there():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/good/health" else 401)
            self.end_headers()

        def log_message(self, *_):
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert doctor.mlflow_server(f"{base}/good").status == "ok"
        refused = doctor.mlflow_server(base)
        assert refused.status == "warn"
        assert "MLFLOW_TRACKING_USERNAME" in refused.todo
        server.shutdown()
    gone = doctor.mlflow_server(base)
    assert gone.status == "warn"
    assert "llp sync" in gone.todo


def test_a_gpu_that_was_asked_for_and_is_not_here_is_a_failure(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    local = SimpleNamespace(gpus_per_trial=0.5, address=None)
    assert doctor.gpus_asked(SimpleNamespace(resources=local)).status == "fail"
    remote = SimpleNamespace(gpus_per_trial=0.5, address="10.0.0.1:6379")
    assert doctor.gpus_asked(SimpleNamespace(resources=remote)).status == "ok"


def test_cores_are_those_this_process_may_use():
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert doctor.processors().found.startswith(f"{usable} core")
