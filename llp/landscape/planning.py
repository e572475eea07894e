"""What an operator decides before it multiplies: engine, examples put together, columns at once.

Nothing is assumed that can be measured. The graph of the first batch is built and its bytes
counted; where graphs do not fit, and on a GPU, the engines are timed on that batch; blocks are
timed in growing size until a larger one does not pay. On a CPU a graph that fits is taken without a
race: forward-over-reverse computes the gradient again with every product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llp.landscape.data import (
    Batch,
    NotRepeatableError,
    fuses_exactly,
    random_state,
    same_random_state,
)
from llp.landscape.engines import (
    BLOCK_STEP,
    CHEAP_COLUMNS,
    CHOICES,
    DEAR_SECONDS,
    FUSED_BYTES,
    Choice,
    Plan,
    default_budget,
    graph_bytes,
    keep_freed_memory,
    seconds_of,
)

if TYPE_CHECKING:
    from llp.landscape.products import BatchwiseCurvature


def decided(op: BatchwiseCurvature) -> tuple[Plan, Any]:
    """The plan, and the record of the first batch where it can be kept.

    Raises:
        NotRepeatableError: The network draws random numbers although it is in eval mode.
    """
    budget = default_budget(op.device) if op.asked_budget is None else op.asked_budget
    chunk = op.asked_chunk or 0
    if op.data.num_local == 0:
        return Plan("rebuild", chunk or 1, 0, 0, budget), None
    first = next(iter(op.passed()))
    before = random_state(op.device)
    own = [*op.model.parameters(), *op.model.buffers()]
    record: Any = None
    if op.asked_engine == "forward":  # perhaps because not even one record fits
        with torch.enable_grad():
            loss = op.loss(op.outputs(first), first)
        per_example = 2 * graph_bytes([loss], own) / first.size
        del loss
    else:
        record = op.record(first)
        per_example = graph_bytes(op.recorded(record), own) / first.size
    _check_random(op, before)
    total = int(per_example * op.data.num_local)
    fused = op.data.fused_examples = _fused_examples(op, first, per_example, budget)
    fits = total <= budget
    engine: str = op.asked_engine
    _remember(op, first, fits)
    if engine == "auto":
        engine = "retained" if fits else "rebuild"
        if not fits or op.device.type == "cuda":
            record = None
            engine = _raced(op, engine)
    plan = Plan(
        engine=engine,
        chunk_size=chunk,
        fused_examples=fused,
        graph_bytes=total,
        memory_budget=budget,
        seconds=dict(op.choice.seconds),
        note=op.choice.note,
    )
    keeps = engine == "retained" and not fused and not op.draws
    return plan, record if keeps else None


def with_chunk(
    op: BatchwiseCurvature,
    plan: Plan,
    multiply: Callable[[Any, Tensor, tuple[int, ...]], Tensor],
    sample: Callable[[], Any],
    rows: Tensor,
    slots: tuple[int, ...],
) -> Plan:
    """The plan with a chunk size for a block of this many rows."""
    times = op.choice.chunks
    count = len(rows)
    if not _settled(op, times, count):
        if op.device.type == "cpu":
            keep_freed_memory()
        record = sample()
        while not _settled(op, times, count):
            size = min(max(times) * BLOCK_STEP, count) if times else 1
            block = rows[torch.arange(size, device=rows.device) % count]

            def once(block: Tensor = block, size: int = size) -> None:
                op.in_chunks(multiply, record, block, slots, size)

            times[size] = seconds_of(once, op.device) / size
    return replace(
        plan,
        chunk_size=min(times, key=lambda size: times[size]),
        seconds={**plan.seconds, **{f"{size} columns": each for size, each in times.items()}},
    )


def _settled(op: BatchwiseCurvature, times: dict[int, float], count: int) -> bool:
    """Whether no larger block, up to `count` columns, is worth a try."""
    if not times:
        return False
    largest = max(times)
    if largest >= count or (op.device.type == "cpu" and times[1] > DEAR_SECONDS):
        return True
    cheap = times[1] < DEAR_SECONDS and largest < CHEAP_COLUMNS  # too short to trust one figure
    others = [each for size, each in times.items() if size != largest]
    return bool(others) and not cheap and times[largest] > 0.95 * min(others)


def _check_random(op: BatchwiseCurvature, before: tuple[Any, ...]) -> None:
    if op.check and not same_random_state(before, random_state(op.device)):
        raise NotRepeatableError(
            f"{type(op.model).__name__} draws random numbers in eval mode, so its loss is no "
            "function of the weights; switch that off, or pass check=False to measure one draw"
        )


def _remember(op: BatchwiseCurvature, first: Batch, fits: bool) -> None:
    key = (
        type(op).__name__,
        tuple(tuple(parameter.shape) for parameter in op.parameters),
        str(op.dtype),
        str(op.device),
        torch.get_num_threads(),
        first.size,
        op.data.num_local,
        fits,
        op.asked_engine,
    )
    op.choice = CHOICES.setdefault(key, Choice())


def _fused_examples(op: BatchwiseCurvature, first: Batch, per_example: float, budget: int) -> int:
    """How many examples go together, after a comparison of the first ones with their parts."""
    limit = FUSED_BYTES if op.device.type == "cpu" else min(budget // 8, 16 * 2**30)
    fused = int(limit / max(per_example, 1.0))
    if fused < 2 * first.size or op.data.num_local <= first.size:
        return 0
    parts: list[Batch] = []
    for batch in op.passed():
        if sum(part.size for part in parts) + batch.size > fused:
            break
        parts.append(batch)
    whole = op.data.together(parts)
    if len(parts) < 2 or len(whole) != 1:
        return 0
    exact = fuses_exactly(whole[0], parts, lambda b: op.loss(op.model(b.inputs), b), op.dtype)
    return fused if exact else 0


def _raced(op: BatchwiseCurvature, base: str) -> str:
    """The faster of the graph engine `base` and forward-over-reverse on the first batch.

    They must agree: forward-over-reverse misses a loss function that holds on to parameters.
    """
    if op.choice.engine:
        return op.choice.engine
    batch = next(iter(op.passed()))
    slots = tuple(range(len(op.parameters)))
    row = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0))
    row = row.to(op.parameters[0])
    found: dict[str, Tensor] = {}
    kept: list[Any] = []

    def by_graph() -> None:
        if base == "rebuild" or not kept:
            kept.clear()
            kept.append(op.record(batch))
        found["graph"] = op.multiply_record(kept[0], row, slots)

    def by_forward() -> None:
        found["forward"] = op.multiply_forward(op.prepare(batch), row, slots)

    seconds = op.choice.seconds
    seconds[base] = seconds_of(by_graph, op.device)
    kept.clear()
    try:
        seconds["forward"] = seconds_of(by_forward, op.device)
    except (RuntimeError, NotImplementedError) as error:  # an operation without forward mode
        op.choice.note = f"no forward-over-reverse: {str(error).splitlines()[0]}"
    else:
        difference = (found["forward"] - found["graph"]).norm()
        bound = 1e-8 if op.dtype == torch.float64 else 1e-2
        if not bool(difference <= bound * found["graph"].norm()):
            del seconds["forward"]
            op.choice.note = "no forward-over-reverse: it differs from the graph's product"
    op.choice.engine = min(seconds, key=lambda name: seconds[name])
    return op.choice.engine
