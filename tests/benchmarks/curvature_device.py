"""Curvature and surfaces of ResNet-20 on one device: the whole table of a GPU in one command.

    python tests/benchmarks/curvature_device.py                     needs a GPU; a few minutes
    python tests/benchmarks/curvature_device.py --quick             fewer repeats, 11 x 11 points
    python tests/benchmarks/curvature_device.py --device cpu --examples 32 --resolution 5

On 4,096 examples in batches of 1,024, and in mini-batches of 128: the gradient; a product with each
engine one by one and in blocks of 8, 16 and 32 (mini-batches: 16); what the timed probe of
`engine="auto"` chose; the peers that can be imported; the five largest eigenvalues, a density and a
trace; peak memory of each. Then surfaces of 51 x 51 points by the loop, by vmap and by the probe's
choice, and of 11 x 11 by loss-landscapes.
On a CPU blocks are of 1 and 4, to try the code on few examples.
Times are medians of wall-clock seconds with the device idle before and after (on a CPU: CPU
seconds of this process). Products are checked against float64 first: TF32 would err by 2 %.
"""

from __future__ import annotations

import argparse
import copy
import functools
import operator
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
from harness import Bar

BLOCKS = {"cuda": (1, 8, 16, 32), "cpu": (1, 4)}
BLOCKS_OF_MINI_BATCHES = {"cuda": (1, 16), "cpu": (1, 4)}
ENGINES = ("retained", "rebuild", "forward", "auto")
LONG = 3.0
"""Seconds."""
OUT_OF_MEMORY = None
"""In place of seconds."""


def main(arguments: list[str] | None = None) -> None:
    """Measures both parts, prints the tables and writes the JSON file."""
    if harness.serve_part(sys.argv[1:] if arguments is None else arguments, PARTS):
        return
    options = parse(arguments)
    figures: dict[str, Any] = {
        "command": " ".join(["python", "tests/benchmarks/curvature_device.py", *sys.argv[1:]]),
        "quick": options.quick,
        "machine": harness.machine(),
    }
    common = {"device": options.device, "num_examples": options.examples}
    repeats = 1 if options.quick else 5
    figures["curvature"], usage = harness.run_part(
        __file__, "curvature", {**common, "repeats": repeats}
    )
    figures["curvature"]["peak_main_memory_gb"] = harness.gigabytes(usage.peak_pss_bytes)
    show(figures["curvature"])
    figures["surface"], _ = harness.run_part(
        __file__, "surface", {**common, "resolution": 11 if options.quick else options.resolution}
    )
    import surface

    surface.show_gpu(figures["surface"])
    harness.finish(figures, bars(figures), options.json)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--examples", type=int, default=4096)
    parser.add_argument("--resolution", type=int, default=51)
    return parser.parse_args(arguments)


def bars(figures: dict[str, Any]) -> list[Bar]:
    """Accuracy, and that the probe chose well; speeds are set from what a GPU shows."""
    part = figures["curvature"]
    found = [Bar("product: relative error against float64", part["error"], 1e-3)]
    for name, rows in part["engines"].items():
        chosen = rows["auto"]["per_vector"]
        for block, seconds in chosen.items():
            all_of_them = [rows[engine]["per_vector"][block] for engine in ENGINES]
            fits = [taken for taken in all_of_them if taken is not None]
            label = f"{name}, block of {block}: the probe's choice over the best engine"
            ratio = float("inf") if seconds is None else seconds / min(fits)
            if fits:
                found.append(Bar(label, ratio, 1.3))
    for name, row in figures["surface"]["rows"].items():
        if "centre_is_base" not in row:
            continue
        label = f"surface, {name}: centre is the base loss (1: yes)"
        found.append(Bar(label, float(row["centre_is_base"]), 1.0, at_most=False))
    return found


def show(part: dict[str, Any]) -> None:
    """The tables of the curvature part."""
    for line in part["missing"]:
        print(f"not measured: {line}")
    for name, rows in part["engines"].items():
        gradient = part["gradient_seconds"][name]
        blocks = list(rows["auto"]["per_vector"])
        table = [
            [
                engine,
                *(_milliseconds(row["per_vector"][block]) for block in blocks),
                f"{row['peak_gb']:.2f}",
                row["plan"],
            ]
            for engine, row in rows.items()
        ]
        title = f"{part['name']}: ms a product on {name}; a gradient takes {1e3 * gradient:.1f} ms"
        header = ["engine", *(f"block of {block}" for block in blocks), "peak GB", "plan"]
        harness.print_table(title, header, table)
    rows = [
        [who, _milliseconds(row["seconds"]), f"{row['peak_gb']:.2f}"]
        for who, row in part["peers"].items()
    ]
    harness.print_table("peers, one product", ["", "ms a product", "peak GB"], rows)
    rows = [
        [who, str(row["products"]), f"{row['seconds']:.2f}", f"{row['peak_gb']:.2f}"]
        for who, row in part["algorithms"].items()
    ]
    harness.print_table("algorithms", ["", "products", "seconds", "peak GB"], rows)


def _milliseconds(seconds: float | None) -> str:
    return "out of memory" if seconds is OUT_OF_MEMORY else f"{1e3 * seconds:.1f}"


def measure_curvature(device: str, num_examples: int, repeats: int) -> dict[str, Any]:
    """Products, blocks, peers and algorithms on one device."""
    import curvature_peers
    import surface

    from llp import landscape

    torch, nn = surface._torch()
    model, inputs, targets = surface.resnet(num_examples)
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    loss_fn = nn.functional.cross_entropy
    large = min(1024, max(1, num_examples // 4))
    settings = {
        f"{num_examples} examples in batches of {size}": list(
            zip(inputs.split(size), targets.split(size), strict=True)
        )
        for size in (large, max(1, large // 8))
    }
    engines: dict[str, Any] = {}
    gradients: dict[str, float] = {}
    sizes = (BLOCKS[device], BLOCKS_OF_MINI_BATCHES[device])
    for (name, batches), blocks in zip(settings.items(), sizes, strict=True):
        gradients[name], _ = _timed(
            lambda batches=batches: _gradient(model, loss_fn, batches), device, repeats
        )
        engines[name] = {
            engine: _engine(model, loss_fn, batches, engine, device, repeats, blocks)
            for engine in ENGINES
        }
    whole = next(iter(settings.values()))
    peers, missing = curvature_peers.made(copy.deepcopy(model), loss_fn, inputs, targets)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    measured = {}
    for name, peer in peers.items():
        try:
            seconds, peak = _timed(lambda peer=peer: peer.product(vector), device, repeats)
        except torch.OutOfMemoryError as error:
            missing.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        measured[name] = {"seconds": seconds, "peak_gb": peak}
    calls: dict[str, Callable[[Any], Any]] = {
        "top five at 1e-3": lambda op: landscape.top_eigenpairs(op, k=5),
        "density, 4 probes x 20 steps": lambda op: landscape.spectral_density(op, 4, 20),
        "trace, 32 probes": lambda op: landscape.trace(op, num_probes=32),
    }
    algorithms = {}
    for name, call in calls.items():
        op = landscape.hessian(model, loss_fn, whole)
        found: list[Any] = []
        seconds, peak = _timed(
            lambda call=call, op=op, found=found: found.append(call(op)), device, 1, warm=False
        )
        products = found[-1].num_products
        algorithms[name] = {"seconds": seconds, "peak_gb": peak, "products": products}
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "error": _error(model, loss_fn, whole[0]),
        "gradient_seconds": gradients,
        "engines": engines,
        "peers": measured,
        "algorithms": algorithms,
        "missing": missing,
    }


def _engine(
    model: Any,
    loss_fn: Any,
    batches: Any,
    engine: str,
    device: str,
    repeats: int,
    blocks: tuple[int, ...],
) -> dict[str, Any]:
    """Seconds a vector for every size of block, and what was decided."""
    import torch

    from llp import landscape

    per_vector: dict[str, float | None] = {}
    peak = 0.0
    op = landscape.hessian(model, loss_fn, batches, engine=engine)
    for block in blocks:
        if engine != "auto":
            op = landscape.hessian(model, loss_fn, batches, engine=engine, chunk_size=block)
        vectors = torch.randn(op.shape[0], block, device=device)
        try:
            call = functools.partial(operator.matmul, op, vectors)
            seconds, taken = _timed(call, device, repeats, probes=engine == "auto")
        except torch.OutOfMemoryError:
            per_vector[str(block)] = OUT_OF_MEMORY
            continue
        per_vector[str(block)] = seconds / block
        peak = max(peak, taken)
        if engine != "auto":
            op.release()
    plan = op.plan
    chosen = "" if plan is None else f"{plan.engine}, chunks of {plan.chunk_size or 1}"
    op.release()
    return {
        "per_vector": per_vector,
        "peak_gb": peak,
        "plan": chosen if engine == "auto" else "",
        "probe_seconds": {} if plan is None else dict(plan.seconds),
        "note": "" if plan is None else plan.note,
    }


def measure_surface(device: str, num_examples: int, resolution: int) -> dict[str, Any]:
    """The surfaces of the other benchmark."""
    import surface

    return surface.measure_gpu(resolution, device=device, num_examples=num_examples)


def _gradient(model: Any, loss_fn: Any, batches: Any) -> None:
    import torch

    parameters = list(model.parameters())
    for inputs, targets in batches:
        torch.autograd.grad(loss_fn(model(inputs), targets), parameters)


def _error(model: Any, loss_fn: Any, batch: Any) -> float:
    """Relative error of one product on a few examples against float64."""
    import torch

    from llp import landscape

    inputs, targets = (each[:32] for each in batch)
    op = landscape.hessian(model, loss_fn, [(inputs, targets)])
    twin = copy.deepcopy(model).double()
    exact = landscape.hessian(twin, loss_fn, [(inputs.double(), targets)])
    vector = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0))
    expected = exact @ vector.double()
    return float((op @ vector - expected).norm() / expected.norm())


def _timed(
    call: Callable[[], Any], device: str, repeats: int, *, warm: bool = True, probes: bool = False
) -> tuple[float, float]:
    """Median seconds of a call after one that is not counted, and the device's peak memory.

    A call that takes longer than `LONG` is made once, unless it is the first of its operator that
    counts (`probes`): the start-up is a small part of it, the timed probe of an operator is not.
    """
    import torch

    on_gpu = device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def once() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        started = clock()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - started

    taken = [once()]
    if warm and (probes or taken[0] < LONG):
        taken = [once() for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return statistics.median(taken), peak


PARTS = {"curvature": measure_curvature, "surface": measure_surface}

if __name__ == "__main__":
    main()
