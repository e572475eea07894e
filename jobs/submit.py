#!/usr/bin/env python3
"""Submits a Ray job that a YAML file describes and prints its id; needs `ray[default]`, not llp.

    export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token
    python jobs/submit.py jobs/search.yaml

The keys of the file are those of Ray's POST /api/jobs/; a local folder in `runtime_env.working_dir`
is sent along.
"""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient


def described(arguments: list[str]) -> dict[str, Any]:
    """The job in the file that the only argument names; ends with code 2 where there is none."""
    if len(arguments) != 1:
        refuse("usage: python jobs/submit.py FILE.yaml")
    path = Path(arguments[0])
    try:
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        refuse(f"{path}: {error.strerror}")
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        refuse(f"{path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(job, dict) or "entrypoint" not in job:
        refuse(f"{path} describes no job: it has no `entrypoint`")
    return job


def refuse(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line."""
    print(message, file=sys.stderr)
    sys.exit(code)


def submitted(job: dict[str, Any]) -> str:
    """The id of the job, once a cluster has taken it; ends with code 2 or 4 where none does."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:  # Ray would take whatever cluster it finds on this machine
        refuse("which cluster? Set RAY_API_SERVER_ADDRESS to http://HOST:8265")
    try:
        return str(JobSubmissionClient().submit_job(**job))
    except (OSError, RuntimeError, ValueError, RayError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        refuse(f"{address} did not take the job: {lines[0]}", code=4)


if __name__ == "__main__":
    print(submitted(described(sys.argv[1:])))
