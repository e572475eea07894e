"""The log of an optimizer as pages read it; `training.optimizer_log` writes and describes it."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class OptimizerLog:
    """What TALT noted in one training.

    Attributes:
        job_id: The training.
        steps: Steps made before each update that was noted `[U]`.
        names: The parameters it looked at `[T]`.
        strength: Of the valley a tensor was in, 0 for none `[U, T]`.
        cosine: Mean pairwise cosine of recent gradients `[U, T]`.
        persistence: Share of the mean in the energy along its direction `[U, T]`.
        gradient_norm: Of the raw gradient, from its projection `[U, T]`.
        changed_norm: Of the gradient that the base optimizer got `[U, T]`.
        alignment: Cosine between the two `[U, T]`.
        eigenvalues: Largest of the projected covariance `[U, T, K]`.
        num_steps: Of the training.
        num_epochs: Of the training.
        bytes_per_parameter: What TALT keeps beside its base.
    """

    job_id: str
    steps: Array
    names: tuple[str, ...]
    strength: Array
    cosine: Array
    persistence: Array
    gradient_norm: Array
    changed_norm: Array
    alignment: Array
    eigenvalues: Array
    num_steps: int
    num_epochs: int
    bytes_per_parameter: float

    @property
    def epochs(self) -> Array:
        """The updates in epochs `[U]`."""
        return self.steps / max(self.num_steps, 1) * self.num_epochs


def load(folder: Path, job_id: str) -> OptimizerLog | None:
    """The log of a job; None where there is none that can be read, or it is empty."""
    path = folder / "optimizer" / f"{job_id}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        log = OptimizerLog(
            job_id=job_id,
            names=tuple(str(name) for name in found["names"]),
            num_steps=int(found["num_steps"]),
            num_epochs=int(found["num_epochs"]),
            bytes_per_parameter=float(found["bytes_per_parameter"]),
            **{
                key: found[key]
                for key in (
                    "steps",
                    "strength",
                    "cosine",
                    "persistence",
                    "gradient_norm",
                    "changed_norm",
                    "alignment",
                    "eigenvalues",
                )
            },
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return log if len(log.steps) and len(log.names) else None
