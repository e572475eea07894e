"""Keeps what an optimizer noted while it trained: the events of TALT, for its pictures.

`optimizer/JOB.npz` holds the optimizer's log (`talt.Talt.log`) as arrays: `steps` [U] of the
updates that were noted, `tensors` [T] (numbers of the parameters), `strength`, `cosine`,
`persistence`, `gradient_norm`, `changed_norm`, `alignment` [U, T], `eigenvalues` [U, T, K]; and
`names` [T] of the parameters, `num_steps` and `num_epochs` of the training, and
`bytes_per_parameter` that the optimizer keeps.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from llp.training.callbacks import Moment, checked
from llp.training.checkpoint import write_durably

AT_THE_END = 1_000_000
"""Epochs between two files when only the one after the last epoch is wanted."""


class OptimizerLog:
    """Writes the log of an optimizer that keeps one; nothing for others.

    Args:
        every: Epochs between two writings of the file; there is always one after the last epoch.
        jobs: Which kinds of jobs.

    Raises:
        ValueError: `every` is below 1, or no such kind of jobs.
    """

    def __init__(self, *, every: int = AT_THE_END, jobs: str = "verify") -> None:
        self.every, self.jobs = checked(every, jobs)

    def __call__(self, moment: Moment) -> None:
        """Writes the file durably."""
        log = getattr(moment.optimizer, "log", None)
        if log is None:
            return
        found: dict[str, Any] = log()
        arrays = {key: _array(value) for key, value in found.items()}
        arrays["names"] = np.asarray(_names(moment, found["tensors"]))
        arrays["num_steps"] = np.asarray(getattr(moment.optimizer, "steps_done", 0))
        arrays["num_epochs"] = np.asarray(moment.epoch)
        kept: dict[str, float] = getattr(moment.optimizer, "memory", dict)()
        arrays["bytes_per_parameter"] = np.asarray(kept.get("bytes_per_parameter", np.nan))
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        write_durably(moment.folder / path_of(moment.job.job_id), content.getvalue())

    def state(self) -> dict[str, Any]:
        """Nothing: the log is part of the optimizer's state."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def path_of(job_id: str) -> str:
    """Where the log of a job is kept, relative to the study folder."""
    return f"optimizer/{job_id}.npz"


def _array(value: Any) -> np.ndarray[Any, Any]:
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _names(moment: Moment, numbers: list[int]) -> list[str]:
    """Names of the parameters with these numbers in the order of the optimizer's groups."""
    named = {id(parameter): name for name, parameter in moment.model.named_parameters()}
    parameters = [p for group in moment.optimizer.param_groups for p in group["params"]]
    return [named.get(id(parameters[number]), str(number)) for number in numbers]
