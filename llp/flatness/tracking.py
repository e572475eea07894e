"""Curvature while a network is trained: a callback, see `training.callbacks`.

Every few epochs the largest Hessian eigenvalues by size (signed), the trace and the gradient norm
of the plain loss on fixed, unaugmented training examples, in eval mode. Cheap, as eigenvectors move
slowly: each time the search starts from the vectors of the time before, together with random ones,
without which a direction that has become the sharpest since could be missed.

The trace uses the same probe vectors every time, so its changes are less noisy than its values.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llp import landscape
from llp.landscape import evaluation_state
from llp.landscape.passes import gradient
from llp.records import Observation
from llp.training.callbacks import Moment, checked


class Curvature:
    """Tracks the top of the Hessian's spectrum, its trace and the gradient norm.

    Args:
        every: Epochs between two looks; there is always one after the last epoch.
        jobs: `all`, `probe` or `verify`.
        num_eigenvalues: Largest by size.
        num_examples: Training examples measured on, the first of the job's subset.
        batch_size: Examples at once.
        tolerance: Relative residual of the eigenvalues.
        num_probes: Random vectors of the trace estimate; 0 leaves the trace out.

    Raises:
        ValueError: An option is out of its range.
    """

    name = "curvature"

    def __init__(
        self,
        *,
        every: int = 5,
        jobs: str = "all",
        num_eigenvalues: int = 2,
        num_examples: int = 256,
        batch_size: int = 256,
        tolerance: float = 0.01,
        num_probes: int = 4,
    ) -> None:
        self.every, self.jobs = checked(every, jobs)
        if min(num_eigenvalues, num_examples, batch_size) < 1 or num_probes < 0:
            raise ValueError(
                "num_eigenvalues, num_examples and batch_size must be at least 1, num_probes 0"
            )
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0, not {tolerance:g}")
        self.num_eigenvalues = num_eigenvalues
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.tolerance = tolerance
        self.num_probes = num_probes
        self._vectors: Tensor | None = None

    def __call__(self, moment: Moment) -> Observation:
        """Eigenvalues `eigenvalue_1` ..., `trace` and `gradient_norm` with their errors.

        `trace_standard_error` is over the probe vectors, `residual_1` belongs to `eigenvalue_1`.
        """
        batches = list(moment.examples(self.num_examples, self.batch_size))
        num_examples = sum(len(targets) for _, targets in batches)
        model = moment.model
        values: dict[str, float] = {}
        with evaluation_state(model):
            values["gradient_norm"] = float(
                gradient(model, functional.cross_entropy, batches).total.norm()
            )
            op = landscape.hessian(model, functional.cross_entropy, batches)
            pairs = landscape.top_eigenpairs(
                op,
                self.num_eigenvalues,
                tolerance=self.tolerance,
                start=None if self._vectors is None else self._vectors.to(moment.device),
                generator=self._generator(moment, f"eigenvalues {moment.epoch}"),
            )
            for number, (value, residual) in enumerate(
                zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True), start=1
            ):
                values[f"eigenvalue_{number}"] = value
                values[f"residual_{number}"] = residual
            if self.num_probes:
                found = landscape.trace(
                    op, num_probes=self.num_probes, generator=self._generator(moment, "trace")
                )
                values["trace"] = found.value
                values["trace_standard_error"] = found.standard_error
        self._vectors = pairs.vectors
        cost = op.gradient_equivalents + 1.0
        op.release()
        return moment.observation(
            self.name,
            values,
            samples=round(cost * num_examples),
            note="" if pairs.converged else "the eigenvalues have not converged",
        )

    def state(self) -> dict[str, Any]:
        """The eigenvectors, from which the next search starts."""
        return {} if self._vectors is None else {"vectors": self._vectors.detach().cpu()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the eigenvectors back."""
        self._vectors = state.get("vectors")

    def _generator(self, moment: Moment, what: str) -> torch.Generator:
        """A generator that depends on the job's seed and on what it is for."""
        return torch.Generator().manual_seed(zlib.crc32(f"{moment.job.seed} {what}".encode()))
