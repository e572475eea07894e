"""The global random generators of a job: seeded, saved with it, and kept out of everybody's way.

Initialisation and dropout draw from torch's global generators. A job is a Python generator that may
be interleaved with others in one process, so it holds the global generators only while it runs:
`JobRandomness` swaps its own states in and puts the caller's back before every report.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """The states of torch's (CPU and `device`), Python's and numpy's global generators.

    Plain tensors, numbers and lists, so that `weights_only` reads them back.
    """
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy_key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "numpy_pos": int(legacy["state"]["pos"]),
        "numpy_has_gauss": int(legacy["has_gauss"]),
        "numpy_gauss": float(legacy["gauss"]),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts the global generators back to what `capture` saw."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {
                "key": state["numpy_key"].numpy().astype(np.uint32),
                "pos": state["numpy_pos"],
            },
            "has_gauss": state["numpy_has_gauss"],
            "gauss": state["numpy_gauss"],
        }
    )
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds the global generators of torch (CPU and `device`), Python and numpy with `seed`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class JobRandomness:
    """Swaps a job's generator states in and out of the global generators."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inside = False
        self._mine: dict[str, Any] | None = None
        self._callers: dict[str, Any] = {}

    def enter(self) -> None:
        """Puts the caller's states aside and the job's in place."""
        if self._inside:
            return
        self._callers = capture(self.device)
        if self._mine is not None:
            restore(self._mine, self.device)
        self._inside = True

    def leave(self) -> None:
        """Puts the job's states aside and the caller's back."""
        if not self._inside:
            return
        self._mine = capture(self.device)
        restore(self._callers, self.device)
        self._inside = False
