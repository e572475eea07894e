"""Points evaluated in chunks: here or elsewhere, kept as they come, missing ones only.

`evaluate_chunks(evaluate, chunks)` is given a picklable callable on coordinates and a list of them,
and yields `(index, evaluate(chunks[index]))` in any order, as a process pool or a cluster would. A
*store* is a mutable mapping in which every finished chunk is kept under a key made of weights,
directions, what is measured, the base loss and the chunk's coordinates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from llp.landscape.evaluation import (
    Array,
    Metric,
    PointEvaluator,
    Strategy,
    accuracy,
    has_accuracy,
)
from llp.landscape.parameters import evaluation_state, flatten, trainable
from llp.landscape.passes import Batches, LossFunction, iterate

Evaluate = Callable[[Array], Array]
EvaluateChunks = Callable[[Evaluate, Sequence[Array]], Iterable[tuple[int, Array]]]
Store = MutableMapping[str, Array]

CHUNK = 64
ALL = 2**16
"""Points in a chunk: enough that reading the batches once for each chunk costs nothing."""


def chosen_metric(
    model: nn.Module, batches: Batches, metric: Metric | Literal["auto"] | None
) -> Metric | None:
    """The metric asked for; for `auto` accuracy, if the targets are class numbers."""
    if metric != "auto":
        return metric
    with evaluation_state(model), torch.no_grad():
        inputs, targets, _ = next(iterate(batches, trainable(model)[0].device))
        return accuracy if has_accuracy(model(inputs), targets) else None


def in_order(evaluate: Evaluate, chunks: Sequence[Array]) -> Iterable[tuple[int, Array]]:
    """The default `evaluate_chunks`: one chunk after the other in this process."""
    for index, chunk in enumerate(chunks):
        yield index, evaluate(chunk)


class Chunks:
    """One evaluator with the chunks it is asked for."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Batches,
        vectors: Tensor,
        metric: Metric | Literal["auto"] | None,
        rho: float,
        robust: Literal["ascent", "first_order"],
        statistics: Batches | None,
        strategy: Strategy,
        chunk_size: int | None,
        evaluate_chunks: EvaluateChunks | None,
        store: Store | None,
    ) -> None:
        if chunk_size is None:
            chunk_size = ALL if evaluate_chunks is None and store is None else CHUNK
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        self.evaluator = PointEvaluator(
            model,
            loss_fn,
            batches,
            vectors,
            metric=chosen_metric(model, batches, metric),
            strategy=strategy,
            statistics=statistics,
            rho=rho,
            robust=robust,
        )
        self.evaluator.prepare()
        self._chunk_size = chunk_size
        self._evaluate_chunks = evaluate_chunks or in_order
        self._store = store
        self.base_loss, self.base_metric = self.evaluator.at_base()
        self._digest = self._fingerprint() if store is not None else ""

    def values(self, points: Array) -> Array:
        """Rows `[m, 3]` at `points` `[m, d]`, from the store where it has them."""
        chunks = [
            points[start : start + self._chunk_size]
            for start in range(0, len(points), self._chunk_size)
        ]
        found: dict[int, Array] = {}
        keys = [self._key(chunk) for chunk in chunks]
        if self._store is not None:
            found = {i: self._store[key] for i, key in enumerate(keys) if key in self._store}
        missing = [index for index in range(len(chunks)) if index not in found]
        todo = [chunks[index] for index in missing]
        for number, rows in self._evaluate_chunks(self.evaluator, todo) if todo else ():
            index = missing[number]
            values = np.asarray(rows, dtype=np.float64)
            if values.shape != (len(chunks[index]), 3):
                raise ValueError(
                    f"chunk {number} came back with shape {values.shape}, "
                    f"expected {(len(chunks[index]), 3)}"
                )
            found[index] = values
            if self._store is not None:
                self._store[keys[index]] = values
        lost = [index for index in missing if index not in found]
        if lost:
            raise ValueError(f"evaluate_chunks did not return {len(lost)} of {len(todo)} chunks")
        return np.concatenate([found[index] for index in range(len(chunks))])

    def num_forwards(self, num_points: int) -> int:
        """Losses of the whole data: the base, each point, and each point's worst neighbour."""
        again = self.evaluator.rho > 0 and self.evaluator.robust == "ascent"
        return 1 + num_points * (2 if again else 1)

    def _key(self, chunk: Array) -> str:
        if self._store is None:
            return ""
        return hashlib.sha256(self._digest.encode() + chunk.tobytes()).hexdigest()[:24]

    def _fingerprint(self) -> str:
        """Of weights, directions, what is measured, and (by the base loss) the data."""
        evaluator = self.evaluator
        digest = hashlib.sha256()
        for tensor in (flatten(trainable(evaluator.model)), evaluator.vectors):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        told = (
            self.base_loss,
            self.base_metric,
            evaluator.rho,
            evaluator.robust,
            evaluator.statistics is not None,
            evaluator.metric is not None,
        )
        digest.update(repr(told).encode())
        return digest.hexdigest()
