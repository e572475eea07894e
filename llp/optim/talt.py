"""TALT: topology-aware learning trajectory, an optimizer that looks for valleys in its gradients.

Around any optimizer. From the raw gradients of every large enough tensor it keeps, in few
dimensions, a mean and a covariance; from the covariance the directions in which the gradient
varies most (*steep*), and from the mean the direction in which it persists. It then changes the
gradient in these directions only and hands it to the base optimizer:

    g' = g + V (S - I) V^T g,   V orthonormal; the rest of the gradient is kept as it is.

1. *Projection.* A tensor is a matrix `[rows, columns]` (a vector is one column). Rows go through a
   sparse random map P of `projection_dimension` rows, so V is `P^T D^(-1/2) W` with an orthonormal
   W in few dimensions; P is exact where there are no more rows than that. See `talt_parts`.
2. *Steep directions.* The top `num_directions` eigenvectors of the exponentially weighted
   covariance, by power iteration from last time's vectors. One that has not converged is left
   alone. With eigenvalue `l`, mean eigenvalue `m` of the rest and a ridge `d` that keeps the
   condition number below `MAX_CONDITION`, S is `((m + d) / (l + d)) ^ (smoothing_factor / 2)`:
   1 brings the spread of the gradient along it down to that of the rest. The more the gradient
   keeps its sign there from step to step, the less is done: a descent is not steepness.
3. *Valleys.* Where the gradients of a tensor oscillate and yet keep one direction, off the steep
   (`talt_parts.valley`), S along it is `1 + valley_strength * strength`, and an event is logged.

Why rows and not all numbers of a tensor at once: the map keeps `k` of `d` dimensions, so it sees
`k / d` of a gradient's energy. With all 36,864 numbers of a 64 x 64 x 3 x 3 convolution and k = 32
that is .09 %, and `g'` would be `g`; with its 64 rows it is half, and all of it up to 32 rows.

With `smoothing_factor = 0` and `valley_strength = 0` it is the base optimizer, bit by bit. A step
takes one gradient, needs no closure, and waits for no GPU. The raw gradient is what is in `.grad`
when `step` is called: after unscaling (loss scaling) and after clipping. Tensors with fewer than
`min_size` numbers, about what their statistics would take, go to the base optimizer as they are.

After the TALT project's description of its method (sparse projection, incremental covariance, power
iteration, valley detection without parameters of shape); the definitions are our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llp.optim import Parameters, around
from llp.optim.talt_tensors import Options, TensorStatistics
from llp.optim.wrapper import Wrapper

LOG_CAPACITY = 4096
"""Updates kept in the log; when it is full, every other one is dropped."""

LOGGED = ("strength", "cosine", "persistence", "gradient_norm", "changed_norm", "alignment")


@dataclass(frozen=True)
class ValleyEvent:
    """A tensor was in a valley.

    Attributes:
        step: Steps made before.
        tensor: Number of the parameter in the order of the groups.
        strength: In (0, 1].
    """

    step: int
    tensor: int
    strength: float


class Talt(Wrapper):
    """TALT around any optimizer; see the head of this file.

    Args:
        base: Makes the step with the changed gradient.
        smoothing_factor: In [0, 1]; 0 leaves steep directions alone.
        valley_strength: At least 0; 0 leaves valleys alone.
        projection_dimension: Rows that a tensor is reduced to, at least 2.
        num_directions: Steep directions, at least 1.
        decay: Of the statistics, in [0, 1).
        update_interval: Steps between updates of the directions, at least 1.
        min_size: Numbers that a tensor must have.
        seed: Of the projections and the first directions, from a generator of their own.

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        smoothing_factor: float = 0.5,
        valley_strength: float = 1.0,
        projection_dimension: int = 32,
        num_directions: int = 4,
        decay: float = 0.9,
        update_interval: int = 10,
        min_size: int = 1024,
        seed: int = 0,
    ) -> None:
        if not 0 <= smoothing_factor <= 1:
            raise ValueError(f"smoothing_factor must be in [0, 1], not {smoothing_factor!r}")
        if not 0 <= valley_strength < math.inf:
            raise ValueError(
                f"valley_strength must be finite and at least 0, not {valley_strength!r}"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay!r}")
        for name, value, least in (
            ("projection_dimension", projection_dimension, 2),
            ("num_directions", num_directions, 1),
            ("update_interval", update_interval, 1),
            ("min_size", min_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value!r}")
        super().__init__(base)
        self.smoothing_factor, self.valley_strength = smoothing_factor, valley_strength
        self.projection_dimension, self.num_directions = projection_dimension, num_directions
        self.decay, self.update_interval, self.min_size = decay, update_interval, min_size
        self.seed = seed
        self.steps_done = 0
        self._log: list[tuple[int, list[Tensor]]] = []
        self._log_every = 1
        self._statistics: list[TensorStatistics] = []
        self._num_parameters = 0

    def _finish(self) -> None:
        if self.smoothing_factor > 0 or self.valley_strength > 0:
            update = (self.steps_done + 1) % self.update_interval == 0
            rows = [own.change(update=update) for own in self._tensors()]
            self._keep([row.to("cpu", non_blocking=True) for row in rows if row is not None])
        self.base.step()
        self.steps_done += 1

    def _tensors(self) -> list[TensorStatistics]:
        """The statistics of each device, made when they are first needed."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if len(parameters) == self._num_parameters:
            return self._statistics
        # Also where a group was added: all start again, because projections follow the seed.
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for number, parameter in enumerate(parameters):
            if parameter.numel() >= max(self.min_size, 2) and parameter.is_floating_point():
                by_device.setdefault(parameter.device, []).append((number, parameter))
        options = Options(
            smoothing_factor=self.smoothing_factor,
            valley_strength=self.valley_strength,
            projection_dimension=self.projection_dimension,
            num_directions=self.num_directions,
            decay=self.decay,
        )
        generator = torch.Generator().manual_seed(self.seed)
        self._statistics = [
            TensorStatistics(members, options, generator) for members in by_device.values()
        ]
        self._num_parameters = len(parameters)
        self._log = []
        return self._statistics

    def _keep(self, rows: list[Tensor]) -> None:
        number = (self.steps_done + 1) // self.update_interval
        if not rows or number % self._log_every:
            return
        self._log.append((self.steps_done, rows))
        if len(self._log) >= LOG_CAPACITY:
            self._log, self._log_every = self._log[1::2], 2 * self._log_every

    def _table(self) -> Tensor:
        """`[updates, tensors, columns]`; waits for the copies to arrive."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        if not self._log:
            return torch.zeros(0, 0, len(LOGGED) + self.num_directions)
        return torch.stack([torch.cat(rows) for _, rows in self._log])

    def log(self) -> dict[str, Any]:
        """What every update saw; waits for the GPU.

        Returns:
            `steps` (list), `tensors` (list: number of the parameter of each column) and, as tensors
            `[updates, tensors]`, `strength` of the valley, mean pairwise `cosine` of the gradients,
            `persistence` (share of the mean in the
            energy along its direction), `gradient_norm`, `changed_norm`,
            `alignment` (cosine of the gradient before and after), and `eigenvalues`
            `[updates, tensors, num_directions]` of the projected covariance.
        """
        table = self._table()
        return {
            "steps": [step for step, _ in self._log],
            "tensors": [number for own in self._statistics for number in own.numbers],
            **{name: table[:, :, k] for k, name in enumerate(LOGGED)},
            "eigenvalues": table[:, :, len(LOGGED) :],
        }

    def events(self) -> list[ValleyEvent]:
        """The valleys seen at the updates that are still in the log; waits for the GPU."""
        log = self.log()
        return [
            ValleyEvent(log["steps"][k], log["tensors"][t], float(log["strength"][k, t]))
            for k, t in log["strength"].nonzero().tolist()
        ]

    def memory(self) -> dict[str, float]:
        """What TALT keeps beside `base`, the log (on the host) left out.

        Returns:
            `bytes`, `bytes_per_parameter` (over all parameters) and `num_tensors` looked at.
        """
        statistics = self._tensors()
        size = sum(p.numel() for group in self.param_groups for p in group["params"])
        total = sum(own.bytes for own in statistics)
        return {
            "bytes": total,
            "bytes_per_parameter": total / max(size, 1),
            "num_tensors": sum(len(own.numbers) for own in statistics),
        }

    def own_state(self) -> dict[str, Any]:
        """See `Wrapper.own_state`; waits for the GPU."""
        return {
            "seed": self.seed,
            "steps_done": self.steps_done,
            "statistics": [own.state() for own in self._statistics],
            "log": self._table(),
            "log_steps": [step for step, _ in self._log],
            "log_every": self._log_every,
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """See `Wrapper.load_own_state`.

        Raises:
            ValueError: It is of other tensors, or was kept with other options.
        """
        self.seed, self.steps_done = state["seed"], state["steps_done"]
        self._statistics, self._num_parameters = [], 0
        if state["statistics"]:
            found = self._tensors()
            if len(found) != len(state["statistics"]):
                raise ValueError("the state of TALT is of tensors on other devices")
            for own, saved in zip(found, state["statistics"], strict=True):
                own.load(saved)
        rows = [[row.clone()] for row in state["log"].cpu()]
        self._log = list(zip(state["log_steps"], rows, strict=True))
        self._log_every = state["log_every"]


def talt(
    parameters: Parameters,
    *,
    learning_rate: float,
    weight_decay: float,
    base: str = "sgd",
    smoothing_factor: float = 0.5,
    valley_strength: float = 1.0,
    projection_dimension: int = 32,
    num_directions: int = 4,
    decay: float = 0.9,
    update_interval: int = 10,
    min_size: int = 1024,
    **base_options: Any,
) -> Optimizer:
    """TALT around the optimizer `base`, its projections seeded by torch's initial seed.

    Args:
        parameters: See `build`.
        learning_rate: Of `base`.
        weight_decay: Of `base`.
        base: See `around`.
        smoothing_factor: See `Talt`, as the others.
        valley_strength: See `Talt`.
        projection_dimension: See `Talt`.
        num_directions: See `Talt`.
        decay: See `Talt`.
        update_interval: See `Talt`.
        min_size: See `Talt`.
        base_options: See `around`.

    Raises:
        ValueError: A value out of range.
        SpecError: `base` is unknown, or does not take what is given for it.
    """
    inner = around(
        base, parameters, learning_rate=learning_rate, weight_decay=weight_decay, **base_options
    )
    return Talt(
        inner,
        smoothing_factor=smoothing_factor,
        valley_strength=valley_strength,
        projection_dimension=projection_dimension,
        num_directions=num_directions,
        decay=decay,
        update_interval=update_interval,
        min_size=min_size,
        seed=torch.initial_seed() % 2**63,
    )
