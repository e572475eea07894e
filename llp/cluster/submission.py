"""What a search sends to a cluster: a command, an experiment, and own code only when there is some.

A *study* becomes one submission after another, called *attempts*: the first has the study's id, the
others `ID--2`, `ID--3`. Every attempt runs `llp search --resume`, so a later one goes on where the
one before it ended, and there is never more than one at a time.

What travels is a folder with the experiment, overrides and all, and a script that finds the Python
to run it with. Everyone who has the cluster's token can read it, so nothing secret may be in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from llp import __version__
from llp.cluster.jobs import AlreadyThere, Cluster, Submitted
from llp.errors import EnvironmentProblem, Problem, SpecError, StudyError
from llp.spec import Spec, checked_name, digest, secrets, study_name, to_yaml

FOLDER = ".llp_job"
"""Folder, in the job's working folder, of what we send beside the user's own code."""
LARGEST_BYTES = 400 * 1024**2
"""Of what is sent; Ray refuses a little more than that."""
TRAVELS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TZ", "NO_COLOR")
"""Variables of this process that the driver and its workers get too. No other does."""
STOP_SECONDS = 20
"""How long a job that is stopped may take to end by itself; Ray's own default is 3."""
PRIVATE = [
    *(".env", ".env.*", ".netrc", ".git-credentials", ".aws", ".ssh", ".kube", ".ray"),
    *("*.pem", "*.key", "id_rsa*", "id_ed25519*", "auth_token", "credentials.json", "llp_studies"),
    *("mlruns", "mlflow.db"),
]
"""What is left out of an uploaded folder beside what its .gitignore and Ray leave out."""

START = r"""#!/bin/sh
# Runs `llp ARGUMENTS` with the Python that Ray runs with here; `python` on the PATH is often
# another. Ray's raylet, an ancestor of every job, has it on its command line.
python=@PYTHON@
job=$PWD/@FOLDER@
pid=$$
while [ -z "$python" ] && [ "${pid:-0}" -gt 1 ]; do
    words=$(tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline")
    worker=$(printf '%s\n' "$words" | sed -n 's/^--python_worker_command=//p')
    case "$worker" in
    '"'*) python=${worker#\"} && python=${python%%\"*} ;;
    *) python=${worker%% *} ;;
    esac
    pid=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null)
done
# Without own code nothing here is needed later, and Ray may remove this folder before the job ends.
[ -n "@CODE@" ] || cd /
for word in "$@"; do
    shift
    case "$word" in experiment.yaml) word=$job/$word ;; esac
    set -- "$@" "$word"
done
has() { "$1" -c "import sys, importlib.util as u; sys.exit(not u.find_spec('$2'))" 2>/dev/null; }
for candidate in "$python" python3 python; do
    if [ -n "$candidate" ] && has "$candidate" ray && has "$candidate" llp; then
        exec "$candidate" -m llp.cli "$@"
    fi
done
echo "error: the cluster's Python (${python:-python3}) on $(uname -n) has no llp;" >&2
echo "install llp on every node, or name another interpreter with --python" >&2
exit 4
"""


@dataclass(frozen=True)
class Driver:
    """What the command itself gets; its trials get what the experiment says.

    Attributes:
        cpus: Reserved for it; with nothing reserved it runs on the head node.
        gpus: The same.
        memory: The same, in bytes.
        python: Interpreter; default: the one that Ray runs with there.
    """

    cpus: float | None = None
    gpus: float | None = None
    memory: int | None = None
    python: str | None = None


@dataclass(frozen=True)
class Submission:
    """A study that is ready to be sent.

    Attributes:
        study_id: Its id, also of the first attempt.
        arguments: Of `llp` on the cluster.
        root: Absolute folder of study folders, as the cluster sees it.
        experiment: The experiment file; empty when only its study is named.
        code: Folder with the user's own modules, when there are any.
        digest: Of the experiment; empty when only its study is named.
        notes: What the user should know before it is sent.
    """

    study_id: str
    arguments: tuple[str, ...]
    root: str
    experiment: str = ""
    code: Path | None = None
    digest: str = ""
    notes: tuple[str, ...] = ()

    def entrypoint(self) -> str:
        """The shell command, which replaces the shell: a signal to it reaches the driver."""
        return "exec " + shlex.join(["sh", f"{FOLDER}/start.sh", *self.arguments])


@dataclass(frozen=True)
class Sent:
    """What came of sending a submission.

    Attributes:
        job: The attempt that counts now.
        action: `submitted`, `attached` to one that runs, or `succeeded` long ago.
        before: The attempt before it, when this one goes on with it.
    """

    job: Submitted
    action: Literal["submitted", "attached", "succeeded"]
    before: Submitted | None = None


def of_search(
    spec: Spec, *, study: str | None = None, working_dir: Path | None = None
) -> Submission:
    """The submission of a search.

    Args:
        spec: Checked; overrides are in it already.
        study: Name of the study; default as `llp search` makes it.
        working_dir: Folder to upload; default: the current one, and only when the experiment names
            modules in it.

    Raises:
        SpecError: A path that means nothing on another machine.
        EnvironmentProblem: `working_dir` is no folder.
    """
    found = [spec.problem(path, message) for path, message in _lost_paths(spec)]
    if found:
        raise SpecError(found)
    study_id = study_name(spec, study)
    local, elsewhere = _own_code(spec)
    notes = [
        f"{module} is not in this folder: it must be installed on the cluster, "
        "or give its folder with --working-dir"
        for module in elsewhere
        if working_dir is None
    ]
    uri = spec.tracking.uri or ""
    if re.match(r"https?://(localhost|127\.|\[::1\])", uri) and spec.tracking.mlflow:
        notes.append(f"tracking.uri {uri}: on the cluster that is the node the driver runs on")
    code = working_dir if working_dir is not None else Path.cwd() if local else None
    if code is not None and not code.is_dir():
        raise EnvironmentProblem(f"--working-dir {code}: there is no such folder")
    return Submission(
        study_id=study_id,
        arguments=(
            *("search", "experiment.yaml", "--study", study_id, "--resume"),
            *("--set", "resources.address=auto"),
        ),
        root=spec.output.root,
        experiment=to_yaml(spec),
        code=code,
        digest=digest(spec),
        notes=tuple(notes),
    )


def of_resume(
    study: str,
    root: str,
    *,
    overrides: Sequence[str] = (),
    working_dir: Path | None = None,
) -> Submission:
    """The submission that goes on with a study of which only the name and the root are known.

    Raises:
        SpecError: The name or the root cannot be right on another machine, or a secret would
            travel.
    """
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        found += [
            Problem(message, path=key, file="--set") for _, message in secrets.findings(value, key)
        ]
    if found:
        raise SpecError(found)
    folder = Path(study)
    if folder.is_absolute():
        root, study = str(folder.parent), folder.name
    if not Path(root).is_absolute():
        raise SpecError([Problem(_relative(root), path="--root")])
    study_id = checked_name(study)
    if working_dir is not None and not working_dir.is_dir():
        raise EnvironmentProblem(f"--working-dir {working_dir}: there is no such folder")
    settings = [*overrides, "resources.address=auto"]
    return Submission(
        study_id=study_id,
        arguments=(
            *("resume", study_id, "--root", root),
            *(part for setting in settings for part in ("--set", setting)),
        ),
        root=root,
        code=working_dir,
    )


def send(cluster: Cluster, submission: Submission, driver: Driver, say: Any) -> Sent:
    """Submits the study, unless an attempt of it runs or has succeeded there.

    Args:
        cluster: Where to.
        submission: What.
        driver: What its driver gets.
        say: Told how much is sent.

    Raises:
        StudyError: The cluster has a study of this name with another experiment.
        EnvironmentProblem: The folder is too large, or the cluster does not take it.
    """
    for _ in range(10):  # someone else may submit the same attempt meanwhile
        before = _newest(cluster, submission)
        if before is not None and not before.over:
            return Sent(before, "attached")
        if before is not None and before.state == "SUCCEEDED":
            return Sent(before, "succeeded")
        attempt = 1 if before is None else before.attempt + 1
        name = submission.study_id if attempt == 1 else f"{submission.study_id}--{attempt}"
        metadata = {
            "llp_study": submission.study_id,
            "llp_attempt": str(attempt),
            "llp_root": submission.root,
            "llp_digest": submission.digest,
            "llp_version": __version__,
        }
        with packed(submission, driver.python) as package:
            if submission.code is not None:
                size = package.stat().st_size / 1024**2
                say(f"sending {submission.code} ({size:.1f} MiB packed, .gitignore honoured)")
            try:
                cluster.submit(
                    name,
                    submission.entrypoint(),
                    working_dir=str(package),
                    environment=_environment(),
                    metadata=metadata,
                    cpus=driver.cpus,
                    gpus=driver.gpus,
                    memory=driver.memory,
                )
                return Sent(cluster.job(name), "submitted", before)
            except AlreadyThere:
                if cluster.job(name).study != submission.study_id:
                    raise StudyError(
                        f"the cluster has another job called {name}, which is not of this study; "
                        "give yours another name with --study"
                    ) from None
    raise EnvironmentProblem(f"{submission.study_id} is being submitted by someone else as well")


def _newest(cluster: Cluster, submission: Submission) -> Submitted | None:
    name = submission.study_id
    attempts = [job for job in cluster.jobs() if job.study == name]
    if not attempts:
        return None
    newest = max(attempts, key=lambda job: (job.attempt, job.started or 0.0))
    known = {job.metadata.get("llp_digest", "") for job in attempts} - {""}
    if submission.digest and known and submission.digest not in known:
        raise StudyError(
            f"the cluster has a study {submission.study_id} of another experiment "
            f"(digest {sorted(known)[0][:12]}, yours is {submission.digest[:12]}); "
            "give yours another name with --study"
        )
    return newest


@contextlib.contextmanager
def packed(submission: Submission, python: str | None = None) -> Iterator[Path]:
    """A zip file with what the job finds in its working folder.

    Raises:
        EnvironmentProblem: It is too large to be sent.
    """
    with tempfile.TemporaryDirectory(prefix="llp-job-") as folder:
        package = Path(folder) / "job.zip"
        if submission.code is not None:
            excludes = [*get_runtime_env_default_excludes(), *PRIVATE]
            create_package(str(submission.code), package, include_gitignore=True, excludes=excludes)
        start = START.replace("@PYTHON@", shlex.quote(python or "")).replace("@FOLDER@", FOLDER)
        start = start.replace("@CODE@", "yes" if submission.code else "")
        with zipfile.ZipFile(package, "a") as archive:
            archive.writestr(zipfile.ZipInfo(f"{FOLDER}/start.sh"), start)
            if submission.experiment:
                archive.writestr(
                    zipfile.ZipInfo(f"{FOLDER}/experiment.yaml"), submission.experiment
                )
        size = package.stat().st_size
        if size > LARGEST_BYTES:
            raise EnvironmentProblem(
                f"{submission.code} is {size / 1024**2:.0f} MiB packed, over "
                f"{LARGEST_BYTES // 1024**2}; keep data out of it by .gitignore, "
                "or give a smaller --working-dir"
            )
        yield package


def _environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that travel: a fixed list, of which none can hold a secret."""
    chosen = {name: environment[name] for name in TRAVELS if name in environment}
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **chosen}


def _lost_paths(spec: Spec) -> Iterator[tuple[str, str]]:
    """Paths that would mean the job's temporary folder."""
    if not Path(spec.output.root).is_absolute():
        yield "output.root", _relative(spec.output.root)
    if spec.dataset.root is not None and not Path(spec.dataset.root).is_absolute():
        yield "dataset.root", _relative(spec.dataset.root)
    uri = spec.tracking.uri or ""
    if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        yield (
            "tracking.uri",
            f"'{uri}' is a file in the job's temporary folder, which vanishes with the job; "
            "use sqlite:////ABSOLUTE/PATH on storage that all nodes see, or a server",
        )
    for number, study in enumerate(
        spec.searcher.warm_start.studies if spec.searcher.warm_start else ()
    ):
        where = study.removeprefix("mlflow:")
        lost_file = where.startswith("sqlite:") and not where.startswith("sqlite:////")
        lost_folder = "/" in study and ":" not in study and not Path(study).is_absolute()
        if lost_file or lost_folder:
            yield f"searcher.warm_start.studies.{number}", _relative(study)
    meta = spec.searcher.warm_start.meta if spec.searcher.warm_start else None
    if meta is not None and not Path(meta.collection).is_absolute():
        yield "searcher.warm_start.meta.collection", _relative(meta.collection)
    if spec.tier2.calibration is not None and not Path(spec.tier2.calibration).is_absolute():
        yield "tier2.calibration", _relative(spec.tier2.calibration, "a file")


def _relative(path: str, kind: str = "a folder") -> str:
    return (
        f"'{path}' is relative, and a job's temporary folder vanishes with the job; "
        f"give the absolute path of {kind} that all nodes of the cluster see"
    )


_OWN = re.compile(r"([A-Za-z_]\w*)(\.\w+)*:[A-Za-z_]\w*")


def _own_code(spec: Spec) -> tuple[list[str], list[str]]:
    """Modules the experiment names that are not installed: under the current folder, and not."""
    local: list[str] = []
    elsewhere: list[str] = []
    for module in sorted(set(_modules(spec.model_dump(mode="json")))):
        origin = _origin(module)
        if origin is not None and "site-packages" not in origin.parts:
            (local if origin.is_relative_to(Path.cwd()) else elsewhere).append(module)
    return local, elsewhere


def _modules(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _modules(item)
    elif isinstance(value, str) and (match := _OWN.fullmatch(value)):
        yield match[1]


def _origin(module: str) -> Path | None:
    """Where a module or package lies; None when there is none of this name."""
    if module in sys.stdlib_module_names or module == "llp":
        return None
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return Path(places[0]).resolve() if places else None
