"""Which cluster, and what opens it: the address of its job server and its token.

Whoever may talk to a job server may run code on the cluster. The token is looked for where Ray
looks for it, goes into the header of each request and nowhere else.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from llp.errors import EnvironmentProblem, SpecError

ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that name the job server when `--address` does not; the first that is set counts."""
KUBERNETES_TOKEN = Path("/var/run/secrets/ray.io/serviceaccount/token")
HOW_TO_GIVE_IT = (
    "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it, "
    "or write it to ~/.ray/auth_token and chmod 600 that"
)


def find_address(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The job server's address: the one given, else the environment's.

    Raises:
        EnvironmentProblem: There is none.
        SpecError: It is not one of HTTP, or has credentials in it.
    """
    address = given
    for name in ENVIRONMENT:
        value = environment.get(name, "")
        if name == "RAY_ADDRESS" and not value.startswith(("http://", "https://")):
            continue  # that of a cluster's ports, or `auto`
        address = address or value
    if not address:
        raise EnvironmentProblem(
            "which cluster? Give --address http://HOST:8265, the address of its Ray dashboard, "
            f"or set {ENVIRONMENT[0]}"
        )
    if "://" not in address:
        address = f"http://{address}"
    if "@" in address:
        raise SpecError(
            "credentials in an address end up in logs; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError(
            f"'{given or address}' is not the address of a job server; "
            "give that of the cluster's Ray dashboard: http://HOST:8265"
        )
    return address.rstrip("/")


@dataclass(frozen=True)
class Token:
    """What opens a cluster.

    Attributes:
        value: It; kept out of everything that is printed.
        source: Where it was found; empty without one.
    """

    value: str = field(default="", repr=False)
    source: str = ""


NO_TOKEN = Token()


def find_token(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Token:
    """The cluster's token, looked for where Ray looks; an empty one when there is none.

    Raises:
        EnvironmentProblem: A file is named and cannot be read, or a token is wanted by
            `RAY_AUTH_MODE=token` and there is none.
    """
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return NO_TOKEN
    if value := environment.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    named = environment.get("RAY_AUTH_TOKEN_PATH", "")
    if not named and environment.get("RAY_ENABLE_K8S_TOKEN_AUTH", "").lower() in ("1", "true"):
        named = str(KUBERNETES_TOKEN)
    path = Path(named) if named else (home or Path.home()) / ".ray" / "auth_token"
    if named or path.is_file():
        try:
            if value := path.read_text(encoding="utf-8").strip():
                return Token(value, str(path))
            reason = "the file is empty"
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        source = "RAY_AUTH_TOKEN_PATH names" if named else "the cluster's token is in"
        raise EnvironmentProblem(f"cannot read the token: {source} {path}: {reason}")
    if mode == "token":
        raise EnvironmentProblem(f"RAY_AUTH_MODE=token, but there is no token: {HOW_TO_GIVE_IT}")
    return NO_TOKEN


def is_loopback(address: str) -> bool:
    """Whether `address` is this machine itself, which only its own users can reach."""
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
