"""Records as JSON-safe data, and back. `llp.records` passes both functions on."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Record = TypeVar("Record")


def to_plain(value: Any) -> Any:
    """`value` as JSON-safe data: dataclasses become dicts, non-finite floats become None.

    >>> to_plain({"low": 0.0, "high": float("inf")})
    {'low': 0.0, 'high': None}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence | set | frozenset):
        return [to_plain(item) for item in value]
    if hasattr(value, "item"):  # numpy scalars
        return to_plain(value.item())
    raise TypeError(f"{type(value).__name__} cannot be written to the ledger: {value!r}")


def from_plain(cls: type[Record], data: Mapping[str, Any]) -> Record:
    """The record of type `cls` that `to_plain` turned into `data`; None floats become NaN.

    Raises:
        KeyError: A field without a default is missing.
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    values = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name in data:
            values[f.name] = _decode(hints[f.name], data[f.name])
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise KeyError(f"{cls.__name__}.{f.name} is missing")
    return cls(**values)


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(hint: Any, value: Any) -> Any:
    if hint is float:
        return math.nan if value is None else float(value)
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        concrete = [a for a in arguments if a is not type(None)]
        return _decode(concrete[0], value) if len(concrete) == 1 else value
    if origin is tuple:
        return tuple(_decode(arguments[0], item) for item in value)
    if origin is not None and isinstance(value, Mapping):
        return {key: _decode(arguments[1], item) for key, item in value.items()}
    return value
