"""Result records as plain data: numpy arrays for npz or parquet, and numbers for JSON.

A *record* is a frozen dataclass. Its fields are its keys: a tensor or array becomes an array, a
number or a string a value of the summary, a record inside a record is prefixed with its field's
name and a slash (`interpolation/max_error`), a tuple of records with its index or its `name`.
Older spellings of the keys are added in `keys`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

Arrays = dict[str, np.ndarray[Any, Any]]
Scalars = dict[str, float | int | str | bool | None]


class Plain:
    """What every record of this package that holds more than one number can do."""

    def to_arrays(self) -> Arrays:
        """Every array of the record by key; tensors are copied to the CPU."""
        return {key: _array(value) for key, value in _items(self) if _is_array(value)}

    def summary(self) -> Scalars:
        """Every number and string of the record by key, as JSON takes them."""
        return {key: _scalar(value) for key, value in _items(self) if not _is_array(value)}


def _items(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(record):
        yield from _flat(f"{prefix}{field.name}", getattr(record, field.name))


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        yield from _items(value, f"{key}/")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{key}/{name}", item)
    elif isinstance(value, tuple) and any(is_dataclass(item) for item in value):
        for index, item in enumerate(value):
            yield from _flat(f"{key}/{getattr(item, 'name', index)}", item)
    elif isinstance(value, tuple) and value and all(isinstance(x, int | float) for x in value):
        yield key, np.asarray(value)
    elif isinstance(value, tuple):
        yield key, ", ".join(map(str, value))
    else:
        yield key, value


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().copy()
    return np.asarray(value)


def _scalar(value: Any) -> float | int | str | bool | None:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        number: float | int | str | bool = value.item()
        return number
    return str(value)
