"""Points of lines and surfaces on Ray workers: an `evaluate_chunks` for `llp.landscape`.

Every worker gets the evaluator once (model, examples and directions, on its own GPU where it has
one) and then chunks of coordinates, the next as soon as it is done. A worker that dies costs the
chunk it had, which another one takes. The chunk that holds the model itself, where all coordinates
are 0, is evaluated here: on another device or with another number of threads its loss could differ
from the base loss in the last bit.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayActorError

from llp.errors import EnvironmentProblem

Array = np.ndarray[Any, Any]
Evaluate = Callable[[Array], Array]
MAX_LOSSES = 3
"""Workers that may die before a chunk is given up on."""


class _Worker:
    """A process with an evaluator; a Ray actor."""

    def __init__(self, content: bytes, cpus: int) -> None:
        torch.set_num_threads(cpus)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        # Sent by this program to itself; it holds a network and a loss, not only tensors.
        self._evaluate = torch.load(io.BytesIO(content), map_location=device, weights_only=False)

    def values(self, chunk: Array) -> Array:
        """The values at the points of a chunk."""
        found: Array = self._evaluate(chunk)
        return found


class RayPoints:
    """Spreads chunks of points over workers of the Ray session that is open.

    Args:
        num_workers: Processes at once, at least 1.
        cpus: CPUs of each, also its number of threads.
        gpus: GPUs of each; a fraction shares one.
    """

    def __init__(self, num_workers: int, *, cpus: float = 1, gpus: float = 0) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}")
        self.num_workers = num_workers
        self.cpus = cpus
        self.gpus = gpus

    def __call__(self, evaluate: Evaluate, chunks: Sequence[Array]) -> Iterator[tuple[int, Array]]:
        """Yields `(number, values)` of every chunk, in the order in which they are done.

        Raises:
            EnvironmentProblem: Ray cannot fit a worker, or workers die again and again.
        """
        here = [i for i, chunk in enumerate(chunks) if bool((~chunk.any(axis=1)).any())]
        waiting = deque(i for i in range(len(chunks)) if i not in here)
        room = self._room()
        workers: list[Any] = []
        try:
            if waiting:
                buffer = io.BytesIO()
                torch.save(evaluate, buffer, pickle_module=cloudpickle)
                content = ray.put(buffer.getvalue())
                count = min(self.num_workers, room, len(waiting))
                workers = [self._start(content) for _ in range(count)]
                yield from self._spread(workers, content, chunks, waiting, evaluate, here)
            else:
                for number in here:
                    yield number, evaluate(chunks[number])
        finally:
            for worker in workers:
                ray.kill(worker)

    def _spread(
        self,
        workers: list[Any],
        content: Any,
        chunks: Sequence[Array],
        waiting: deque[int],
        evaluate: Evaluate,
        here: Sequence[int],
    ) -> Iterator[tuple[int, Array]]:
        running: dict[Any, tuple[int, int]] = {}  # what is awaited -> its chunk and its worker
        losses: dict[int, int] = {}

        def give(place: int) -> None:
            if waiting:
                number = waiting.popleft()
                running[workers[place].values.remote(chunks[number])] = (number, place)

        for place in range(len(workers)):
            give(place)
        for number in here:
            yield number, evaluate(chunks[number])
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            number, place = running.pop(done[0])
            try:
                values: Array = ray.get(done[0])
            except RayActorError as error:
                losses[number] = losses.get(number, 0) + 1
                if losses[number] > MAX_LOSSES:
                    raise EnvironmentProblem(
                        f"{losses[number]} workers died on the same points: {error}; use fewer "
                        "workers, or smaller batches (--batch-size)"
                    ) from error
                waiting.appendleft(number)
                workers[place] = self._start(content)
                give(place)
                continue
            give(place)
            yield number, np.array(values)  # what comes from Ray cannot be written to

    def _start(self, content: Any) -> Any:
        actor = ray.remote(_Worker).options(num_cpus=self.cpus, num_gpus=self.gpus)
        return actor.remote(content, max(1, int(self.cpus)))

    def _room(self) -> int:
        """Workers that fit at once: one that waits for room would keep its chunk to itself."""
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
        if self.cpus > cpus or self.gpus > gpus:
            raise EnvironmentProblem(
                f"a worker asks for {self.cpus:g} CPUs and {self.gpus:g} GPUs, Ray has {cpus:g} "
                f"and {gpus:g}; lower workers.cpus_per_worker or workers.gpus_per_worker"
            )
        fit = int(cpus / self.cpus + 1e-9)
        if self.gpus >= 1:
            fit = min(fit, int(gpus / self.gpus + 1e-9))
        elif self.gpus > 0:
            fit = min(fit, int(gpus) * int(1 / self.gpus + 1e-9))
        return fit
