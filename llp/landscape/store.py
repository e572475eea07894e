"""Finished chunks of a surface on disk, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class FileStore(MutableMapping[str, Array]):
    """A mapping from key to array, one `.npy` file each, in a folder that is made if missing.

    A file appears whole or not at all, so several processes may write to one folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, key: str) -> Array:
        path = self._path(key)
        if not path.exists():
            raise KeyError(key)
        values: Array = np.load(path, allow_pickle=False)
        return values

    def __setitem__(self, key: str, values: Array) -> None:
        path = self._path(key)
        partial = path.with_name(f".{key}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def __delitem__(self, key: str) -> None:
        try:
            self._path(key).unlink()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.npy")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._path(key).exists()

    def _path(self, key: str) -> Path:
        if not key or any(letter in key for letter in "/\\.:"):
            raise ValueError(f"a key names a file: no slashes or dots in {key!r}")
        return self.folder / f"{key}.npy"
