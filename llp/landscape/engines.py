"""How products are made: kept graphs, graphs built again, or forward-over-reverse; which, and why.

Words: the *graph* of a batch is what autograd saves to differentiate its gradient again. A *plan*
is what an operator decided before its first product: the engine, how many columns of a block go at
once and how many examples are put together. Plans that were measured are remembered for the rest of
the process, so that equal operators get equal plans and, on a CPU, equal bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Engine = Literal["auto", "retained", "rebuild", "forward"]
ENGINES = ("auto", "retained", "rebuild", "forward")

FUSED_BYTES = 2 * 2**20
"""Small batches are put together on a CPU until their graph has this size: below it the calls of a
small network cost more than its arithmetic."""

DEAR_SECONDS = 0.02
"""A product that takes longer than this on a CPU is arithmetic; its blocks are not worth a
probe."""

BLOCK_STEP = 4
"""Blocks of 1, 4, 16, ... columns are tried until a larger one does not pay."""

CHEAP_COLUMNS = 16
"""Up to this many are tried in any case where a product takes less than `DEAR_SECONDS`."""


@dataclass(frozen=True)
class Plan:
    """What an operator decided.

    Attributes:
        engine: `retained` (graph kept between products), `rebuild` (built for each product) or
            `forward` (forward-over-reverse, no graph of the gradient).
        chunk_size: Columns of a block differentiated at once; 0 while no block was asked for.
        fused_examples: Examples that small batches are put together to; 0 where they are not.
        graph_bytes: What keeping the graphs of all batches takes.
        memory_budget: What could be kept.
        seconds: Measured seconds per product, by engine or by columns (`16 columns`).
        note: Why an engine was ruled out; empty where none was.
    """

    engine: str
    chunk_size: int
    fused_examples: int
    graph_bytes: int
    memory_budget: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass
class Choice:
    """What was measured for one kind of problem in this process."""

    engine: str = ""
    note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    chunks: dict[int, float] = field(default_factory=dict)


CHOICES: dict[Any, Choice] = {}


def graph_bytes(outputs: Sequence[Tensor], exclude: Sequence[Tensor]) -> int:
    """Bytes that the graphs behind `outputs` keep alive, without the storage of `exclude`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages: dict[int, int] = {}
    names: dict[type, list[str]] = {}
    stack: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen: set[Any] = set(stack)
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind not in names:
            names[kind] = [n for n in dir(node) if n.startswith("_saved_") or n == "saved_tensors"]
        for name in names[kind]:
            _count(getattr(node, name), storages, own)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return sum(storages.values())


def _count(value: Any, storages: dict[int, int], own: set[int]) -> None:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, list | tuple):
        for item in value:
            _count(item, storages, own)


def default_budget(device: torch.device) -> int:
    """Bytes that graphs may take when nothing is said: a quarter of the free memory.

    On a CPU at most 4 GiB, because other processes of a search measure at the same time.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) // 4
    return min(free_memory() // 4, 4 * 2**30)


def free_memory() -> int:
    """Bytes of main memory that can be taken without swapping, within the container's limit."""
    available = 8 * 2**30
    information = Path("/proc/meminfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(0, available)


def keep_freed_memory() -> None:
    """Lets the C library of Linux keep what large tensors give back, and not fetch it anew.

    It learns from the first freed block of up to 32 MiB how much that is. Before, a block product
    of a small network waited for 500 new pages, a tenth of its time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def seconds_of(function: Callable[[], Any], device: torch.device, *, repeats: int = 2) -> float:
    """The best of some timed calls, after one that is not counted unless it took long.

    On a CPU the process's CPU time counts: other processes of a search use the same cores.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    best = float("inf")
    for number in range(1 + repeats):
        synchronize(device)
        started = clock()
        function()
        synchronize(device)
        taken = clock() - started
        if number or taken > 1.0:
            best = min(best, taken)
        if number and taken > 1.0:
            break
    return best


def synchronize(device: torch.device) -> None:
    """Waits for the device where calls return early."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
