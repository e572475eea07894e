"""Values of an experiment that look like passwords or tokens.

An experiment is written into the ledger, the report, MLflow and the description of a cluster job,
where others read it. What is wrong is told without the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

KEYS = frozenset(
    [
        *("password", "passwd", "secret", "credentials", "private_key", "api_key", "apikey"),
        *("token", "auth_token", "access_token", "hf_token"),
        *("access_key", "secret_key", "secret_access_key"),
    ]
)
_NAMES = "|".join(sorted(KEYS))
_IN_URL = re.compile(  # a password may hold slashes; http://host:80/a@b has none
    r"(?<=://)[^/\s@:]*:(?!\d+/)[^\s@]+(?=@)"
    r"|(?<=://)(?<!http://)(?<!https://)[^/\s@:]*:[^\s@]+(?=@)"
)
_IN_QUERY = re.compile(rf"[?&]({_NAMES}|sig|signature)=[^&\s]+", re.IGNORECASE)
_IN_YAML = re.compile(rf"\b({_NAMES})['\"]?\s*[:=]\s*[^\s,}}]+", re.IGNORECASE)
_ISSUED = re.compile(
    r"\b(gh[pousr]_\w{20,}|github_pat_\w{20,}|hf_\w{20,}|AKIA[0-9A-Z]{16}\b|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ)|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def why_secret(value: object, key: str = "") -> str:
    """What makes `value` look like a secret; empty when nothing does.

    >>> why_secret("s3://bucket/data")
    ''
    >>> why_secret("postgresql://me:12/34@host/db")
    'credentials in a URL'
    """
    if not isinstance(value, str) or not value:
        return ""
    if _IN_URL.search(value) or _IN_QUERY.search(value):
        return "credentials in a URL"
    if _ISSUED.search(value):
        return "what looks like an access token"
    return f"a {key.lower().replace('_', ' ')}" if key.lower() in KEYS else ""


def masked(text: str) -> str:
    """`text` with what looks like a secret starred out, character by character.

    >>> masked("uri: postgresql://me:1234@host/db")
    'uri: postgresql://*******@host/db'
    """
    for pattern in (_IN_URL, _IN_QUERY, _ISSUED, _IN_YAML):
        text = pattern.sub(lambda match: "*" * len(match[0]), text)
    return text


def findings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and message of everything in the plain `value` that looks like a secret."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from findings(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from findings(item, f"{path}.{number}")
    elif why := why_secret(value, path.rpartition(".")[2]):
        yield (
            path,
            f"{why} would end up in ledger, report and logs; let the program that needs it read "
            "it from the environment or from a file",
        )
