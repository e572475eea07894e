"""Plain data as YAML text that a person can copy; strings are quoted whenever in doubt."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llp.reporting import formats

# Plain scalars that YAML 1.1 and 1.2 both read as the same string.
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*\Z")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf"}


def dump(value: Any, indent: int = 0) -> str:
    """`value` (mappings, sequences, scalars) as block-style YAML, ending with a newline.

    >>> print(dump({"a": 0.1, "b": {"c": [1, "x: y"]}}), end="")
    a: 0.1
    b:
      c: [1, "x: y"]
    """
    pad = " " * indent
    if isinstance(value, Mapping) and value:
        lines = []
        for key, item in value.items():
            if isinstance(item, Mapping) and item:
                lines.append(f"{pad}{_scalar(str(key))}:\n{dump(item, indent + 2)}")
            else:
                lines.append(f"{pad}{_scalar(str(key))}: {_flow(item)}\n")
        return "".join(lines)
    return f"{pad}{_flow(value)}\n"


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_scalar(str(k))}: {_flow(item)}" for k, item in value.items())
        return "{" + inside + "}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    text = str(value)
    if _PLAIN.match(text) and text.lower() not in _WORDS:
        return text
    return formats.quoted(text)


def _float(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    text = repr(float(value))
    mantissa, exponent, power = text.partition("e")
    if exponent and "." not in mantissa:  # YAML 1.1 reads 1e-05 as a string
        mantissa += ".0"
    return mantissa + exponent + (power if power[:1] in {"", "-", "+"} else "+" + power)
