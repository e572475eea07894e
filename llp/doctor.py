"""`llp doctor`: what this machine has, what is wrong with it, and what to do about each.

A check is a function that returns one `Check` and never raises for what it looks for. `fail` means
that a search cannot run here; `warn` that it can, but slower, or less safely.
Ray, MLflow and Optuna are looked up by version, not imported: a doctor must answer in seconds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import stat
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llp.errors import LlpError

Status = Literal["ok", "warn", "fail"]
GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        status: `ok`, `warn` or `fail`.
        found: What is there.
        todo: What to do; empty when `ok`.
    """

    name: str
    status: Status
    found: str
    todo: str = ""


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """The interpreter: 3.11 to 3.13 are tested."""
    found = ".".join(map(str, version)) + f" at {sys.executable}"
    if version < (3, 11):
        return Check("Python", "fail", found, "install Python 3.11, 3.12 or 3.13")
    if version >= (3, 14):
        return Check("Python", "warn", found, "tested up to 3.13; use that if something breaks")
    return Check("Python", "ok", found)


def torch() -> Check:
    """PyTorch with the GPUs it can use and their memory."""
    try:
        import torch as library
    except (ImportError, OSError) as error:
        return Check("PyTorch", "fail", f"does not import: {error}", "pip install 'torch>=2.11'")
    found = str(library.__version__)
    old = _outdated(found, (2, 11))
    if old:
        return Check("PyTorch", "fail", found, "pip install 'torch>=2.11'")
    if not library.cuda.is_available():
        if shutil.which("nvidia-smi"):
            hint = "install a CUDA build of PyTorch that the driver supports (see `nvidia-smi`)"
            return Check("PyTorch", "warn", f"{found}; an NVIDIA driver but no usable GPU", hint)
        return Check("PyTorch", "ok", f"{found}, no GPU: everything runs on the CPU")
    names = []
    for index in range(library.cuda.device_count()):
        card = library.cuda.get_device_properties(index)
        names.append(f"{card.name} ({card.total_memory / GIB:.0f} GiB)")
    return Check("PyTorch", "ok", f"{found}, CUDA {library.version.cuda}: {', '.join(names)}")


def torchvision() -> Check:
    """torchvision, really imported: one built for another PyTorch fails only then."""
    try:
        import torchvision as library
    except (ImportError, OSError, RuntimeError) as error:
        todo = "install the torchvision release that belongs to this PyTorch"
        return Check("torchvision", "fail", f"does not import: {error}", todo)
    return Check("torchvision", "ok", str(library.__version__))


def package(name: str, title: str, least: tuple[int, ...]) -> Check:
    """An installed distribution that is at least of version `least`."""
    wanted = f"pip install '{name}>={'.'.join(map(str, least))}'"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(title, "fail", "not installed", wanted)
    if _outdated(found, least):
        return Check(title, "fail", found, wanted)
    return Check(title, "ok", found)


def ray_token(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Check:
    """Ray's token: with it anyone can run code on the cluster, and Ray writes it world-readable."""
    name = "Ray token"
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray/auth_token")
    if not path.is_file():
        if environment.get("RAY_AUTH_TOKEN_PATH") and not environment.get("RAY_AUTH_TOKEN"):
            todo = "let RAY_AUTH_TOKEN_PATH name the file with the cluster's token, or unset it"
            return Check(name, "fail", f"RAY_AUTH_TOKEN_PATH names {path}, which is no file", todo)
        if environment.get("RAY_AUTH_MODE") == "token" and not environment.get("RAY_AUTH_TOKEN"):
            todo = "ray get-auth-token --generate, then chmod 600 the file"
            return Check(name, "fail", f"RAY_AUTH_MODE=token but there is no {path}", todo)
        return Check(name, "ok", "no token file; a local Ray needs none")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Check(name, "warn", f"{path} is mode {mode:04o}", f"chmod 600 {path}")
    return Check(name, "ok", f"{path}, mode {mode:04o}")


def writable(root: Path) -> Check:
    """The output folder, by writing a file into it or its nearest existing parent."""
    name = "Output folder"
    folder = _existing(root)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".llp-doctor-"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        return Check(name, "fail", f"{root}: {reason}", "choose another with output.root")
    return Check(name, "ok", f"{root}" + ("" if root.exists() else " (will be created)"))


def disk(root: Path, free: int | None = None) -> Check:
    """Free space for checkpoints, Ray's session files and MLflow; `free` in bytes for tests."""
    if free is None:
        free = shutil.disk_usage(_existing(root)).free
    found = f"{free / GIB:.1f} GiB free for {root}"
    if free < GIB // 2:
        return Check("Disk", "fail", found, "free some space, or choose another output.root")
    if free < 5 * GIB:
        return Check("Disk", "warn", found, "large models write a checkpoint per trial; free some")
    return Check("Disk", "ok", found)


def processors() -> Check:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1
    if usable < 2:
        return Check("CPU", "warn", "1 core", "trials and driver will share it; expect it slow")
    return Check("CPU", "ok", f"{usable} cores, {platform.machine()}")


def memory(available: int | None = None) -> Check:
    """Main memory free now; `available` in bytes for tests."""
    if available is None:
        import psutil

        available = int(psutil.virtual_memory().available)
    found = f"{available / GIB:.1f} GiB available"
    if available < 3 * GIB:
        return Check("Memory", "warn", found, "set resources.max_concurrent: 1 or close programs")
    return Check("Memory", "ok", found)


def shared_memory(size: int | None = None, path: Path = Path("/dev/shm")) -> Check:
    """/dev/shm, where Ray keeps its object store; `size` in bytes for tests."""
    if size is None:
        if not path.exists():
            return Check("Shared memory", "ok", f"no {path} on this system; Ray uses files")
        size = shutil.disk_usage(path).total
    found = f"{size / GIB:.2f} GiB in {path}"
    if size < GIB // 2:
        todo = "in a container: docker run --shm-size=2g; Ray falls back to slow files"
        return Check("Shared memory", "warn", found, todo)
    return Check("Shared memory", "ok", found)


def port(number: int = 5000) -> Check:
    """Whether `llp ui` can take its port on the loopback interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            return Check(
                f"Port {number}",
                "warn",
                f"not free: {error.strerror or error}",
                f"llp ui --port {number + 1}",
            )
    return Check(f"Port {number}", "ok", "free for `llp ui`")


def mlflow_server(uri: str, seconds: float = 5.0) -> Check:
    """Whether the MLflow server named in an experiment answers."""
    name = "MLflow server"
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=seconds) as answer:
            return Check(name, "ok", f"{uri} answers {answer.status}")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            todo = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            return Check(name, "warn", f"{uri} answers {error.code}", todo)
        return Check(name, "warn", f"{uri} answers {error.code}", "is tracking.uri right?")
    except (OSError, ValueError) as error:
        todo = "start it, or search now and `llp sync` later: nothing is lost"
        return Check(name, "warn", f"{uri} does not answer: {error}", todo)


def gpus_asked(spec: Any) -> Check:
    """Whether the GPUs that an experiment asks for are here."""
    asked = spec.resources.gpus_per_trial
    if not asked or spec.resources.address:
        return Check("GPU asked for", "ok", "none on this machine")
    import torch as library

    if library.cuda.is_available():
        return Check("GPU asked for", "ok", f"{asked:g} per trial")
    todo = "resources.gpus_per_trial: 0 to run on the CPU, or use a machine with a GPU"
    return Check("GPU asked for", "fail", f"{asked:g} per trial and there is no usable GPU", todo)


def data(spec: Any) -> Check:
    """The images an experiment needs, really read and split."""
    from llp import pipeline

    name = f"Data ({spec.dataset.name})"
    try:
        plan = pipeline.plan(spec)
    except LlpError as error:
        return Check(name, "fail", str(error), "then try `llp check` on the same file")
    counts = f"{plan.num_train} training, {plan.num_validation} validation, {plan.num_test} test"
    return Check(name, "ok", f"{counts} images, {plan.num_classes} classes")


def examine(root: Path, spec: Any = None) -> Iterator[Check]:
    """All checks in order, as they are made; those of an experiment when `spec` is given."""
    yield python()
    yield torch()
    yield torchvision()
    yield package("ray", "Ray", (2, 60))
    yield ray_token()
    yield package("mlflow", "MLflow", (3, 17))
    yield package("optuna", "Optuna", (5, 0))
    yield writable(root)
    yield disk(root)
    yield processors()
    yield memory()
    yield shared_memory()
    yield port()
    if spec is not None:
        yield gpus_asked(spec)
        if spec.tracking.mlflow and str(spec.tracking.uri or "").startswith("http"):
            yield mlflow_server(spec.tracking.uri)
        yield data(spec)


def _outdated(found: str, least: tuple[int, ...]) -> bool:
    return tuple(int(number) for number in re.findall(r"\d+", found)[: len(least)]) < least


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
