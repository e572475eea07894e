"""How one device makes the products of a curvature matrix, batch by batch.

A subclass of `BatchwiseCurvature` says how the matrix of one batch is multiplied, in up to two
ways: `record` builds a graph and `multiply_record` differentiates it (engines `retained` and
`rebuild`); `prepare` and `multiply_forward` push the vector forward (engine `forward`). Which is
used, and how many columns go at once, is decided in `planning` before the first product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from llp.landscape import planning
from llp.landscape.data import Batch, Data, Reduction, detected_reduction
from llp.landscape.differentiable import TwiceDifferentiable
from llp.landscape.engines import ENGINES, Choice, Engine, Plan
from llp.landscape.operators import Curvature, row_of, stamp
from llp.landscape.parameters import Selection, evaluation_state, exact_arithmetic
from llp.landscape.passes import Batches, LossFunction, scalar

Multiply = Callable[[Any, Tensor, tuple[int, ...]], Tensor]


class CurvatureOptions(TypedDict, total=False):
    """The options that `hessian` explains and every curvature matrix has."""

    parameters: Selection
    reduction: Reduction
    engine: Engine
    memory_budget: int | None
    chunk_size: int | None
    check: bool
    devices: Sequence[torch.device | str] | None
    process_group: Any


class BatchwiseCurvature(Curvature):
    """A curvature matrix on one device, or on one process of a group.

    Attributes:
        draws: Whether records depend on random numbers, in the order of the batches.
        data: The batches.
        choice: What was measured for this kind of problem.
    """

    draws: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Batches,
        *,
        parameters: Selection = None,
        reduction: Reduction = "auto",
        engine: Engine = "auto",
        memory_budget: int | None = None,
        chunk_size: int | None = None,
        check: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__(model, parameters)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}")
        self._loss_fn = loss_fn
        self.asked_engine: Engine = engine
        self.asked_budget = memory_budget
        self.asked_chunk = chunk_size
        self.check = check
        self.data = Data(
            batches, self.device, reduction=reduction, check=check, group=process_group
        )
        self.choice = Choice()
        self._plan: Plan | None = None
        self._graph: Any = None
        self._first: Any = None
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._inside = False

    @property
    def num_examples(self) -> int:
        """Examples in `batches`, of all processes."""
        return self.data.num_examples

    @property
    def reduction(self) -> str:
        """`mean` or `sum`; `auto` before the first product found out."""
        return self.data.reduction

    @property
    def plan(self) -> Plan | None:
        """What was decided; None before the first product."""
        return self._plan

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Holds the evaluation state over several products, so that it is saved only once."""
        if self._inside:
            yield
            return
        with evaluation_state(self.model), exact_arithmetic(self.device), _eager(self.model):
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def release(self) -> None:
        """Frees the kept graphs; the next product builds them again."""
        self._graph = self._first = None

    def hint(self) -> Tensor:
        """The gradient of the loss over all data `[P]`; free where its graph is kept."""
        with self.session():
            self._begin()
            return self._summed(self.gradient())

    def product(self, rows: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Products `[K, Q]` with the rows `[K, Q]`, summed over batches and processes."""
        self._begin()
        if self.data.num_local == 0:
            return self._summed(torch.zeros_like(rows))
        chunk = self._chunk(rows, slots)
        return self._summed(self._local_product(rows, slots, chunk))

    def _begin(self) -> None:
        """Drops graphs of other weights; decides how to go about it."""
        if self._stamp != (now := stamp(self.model)):
            self.release()
            self._stamp = now
        if self._plan is None:
            self._plan, self._first = planning.decided(self)

    def _summed(self, total: Tensor) -> Tensor:
        """The sum over all processes: one reduction for each product."""
        if self.data.group is not None:
            from torch import distributed

            distributed.all_reduce(total, group=self.data.group)
        return total

    def gradient(self) -> Tensor:
        """The gradient of this process's data `[P]`."""
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for batch in self.passed():
            with torch.enable_grad(), TwiceDifferentiable():
                loss = self.loss(self.outputs(batch), batch)
            total += row_of(
                torch.autograd.grad(loss, self.parameters, allow_unused=True), self.parameters
            )
        self.num_gradients += 1
        return total

    def _chunk(self, rows: Tensor, slots: tuple[int, ...]) -> int:
        assert self._plan is not None
        if len(rows) == 1:
            return 1
        if not self.asked_chunk:
            multiply, record = self._on_first_batch()
            self._plan = planning.with_chunk(self, self._plan, multiply, record, rows, slots)
        return self._plan.chunk_size

    def _local_product(self, rows: Tensor, slots: tuple[int, ...], chunk: int) -> Tensor:
        assert self._plan is not None
        if self._plan.engine == "retained":
            return self.in_chunks(self.multiply_record, self.graph(), rows, slots, chunk)
        total = torch.zeros_like(rows)
        for batch in self.passed():
            if self._plan.engine == "rebuild":
                record = self.record(batch)
                total += self.in_chunks(self.multiply_record, record, rows, slots, chunk)
                del record
            else:
                prepared = self.prepare(batch)
                total += self.in_chunks(self.multiply_forward, prepared, rows, slots, chunk)
        self.num_gradients += -(-len(rows) // chunk) if self._plan.engine == "forward" else 1
        return total

    def graph(self) -> Any:
        """The kept record of all batches; one backward pass then serves every batch."""
        if self._graph is None:
            for number, batch in enumerate(self.passed()):
                known = self._first if number == 0 else None
                record = self.record(batch) if known is None else known
                self._graph = record if number == 0 else self.merge(self._graph, record)
            self._first = None
            self.num_gradients += 1
        return self._graph

    def _on_first_batch(self) -> tuple[Multiply, Callable[[], Any]]:
        """A way to multiply a sample of the data, for the probe of block sizes."""
        assert self._plan is not None
        if self._plan.engine == "retained":
            return self.multiply_record, self.graph
        if self._plan.engine == "rebuild":
            return self.multiply_record, lambda: self.record(next(iter(self.passed())))
        return self.multiply_forward, lambda: self.prepare(next(iter(self.passed())))

    def passed(self) -> Iterator[Batch]:
        """The batches, from the first."""
        self.rewind()
        yield from self.data

    def in_chunks(
        self, multiply: Multiply, record: Any, rows: Tensor, slots: tuple[int, ...], chunk: int
    ) -> Tensor:
        """The products with all rows, `chunk` of them at once; fewer where memory runs out."""
        results: list[Tensor] = []
        done = 0
        while done < len(rows):
            part = rows[done : done + chunk]
            if len(part) == 1:
                results.append(multiply(record, part[0], slots).detach()[None])
                done += 1
                continue
            try:
                blocked = torch.func.vmap(lambda row: multiply(record, row, slots))
                results.append(blocked(part).detach())
                done += len(part)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                chunk = len(part) // 2
                if self._plan is not None:
                    self._plan = replace(self._plan, chunk_size=chunk)
        return results[0] if len(results) == 1 else torch.cat(results)

    def outputs(self, batch: Batch) -> Any:
        """The network's outputs; the first ones also tell what the loss does over a batch."""
        found = self.model(batch.inputs)
        if self.data.reduction == "auto":
            detached = found.detach() if isinstance(found, Tensor) else found
            self.data.reduction = detected_reduction(self._loss_fn, detached, batch.targets)
        return found

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The batch's share of the loss of all data."""
        return scalar(self._loss_fn(outputs, batch.targets)) * self.data.weight(batch.size)

    # What a subclass says

    def record(self, batch: Batch) -> Any:
        """What products with one batch's matrix need, with its graph."""
        raise NotImplementedError

    def merge(self, first: Any, second: Any) -> Any:
        """The record of both batches together."""
        raise NotImplementedError

    def recorded(self, record: Any) -> Sequence[Tensor]:
        """The tensors whose graphs a record keeps alive."""
        raise NotImplementedError

    def multiply_record(self, record: Any, row: Tensor, slots: tuple[int, ...]) -> Tensor:
        """The product with one vector; runs under `torch.func.vmap` for blocks."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Any:
        """What forward-over-reverse products with one batch share."""
        return batch

    def multiply_forward(self, prepared: Any, row: Tensor, slots: tuple[int, ...]) -> Tensor:
        """The product with one vector; runs under `torch.func.vmap` for blocks."""
        raise NotImplementedError

    def rewind(self) -> None:
        """Called before each pass over the batches."""


def _eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compiled modules run as they are: compiled graphs have no second derivative."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()
