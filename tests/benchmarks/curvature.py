"""Curvature on a CPU: products, eigenvalues, density, trace and report against the peers.

    python tests/benchmarks/curvature.py            ten minutes of one core
    python tests/benchmarks/curvature.py --quick    fewer repeats and a smaller product batch
    python tests/benchmarks/curvature.py --large    also the memory of a model of 25 million weights

Peers: PyHessian 0.1, hessian-eigenthings, curvlinops with SciPy's eigsh. One thread, CPU seconds of
this process, contenders in turn, medians over the repeats. Accuracy is looked at first: eigenvalues
against a reference in float64, densities against the exact spectrum, trace intervals against the
exact trace. PyHessian's eigenvalues come from its single-batch mode, where it keeps the graph; its
`dataloader_hv_product` is what the product table has. hessian-eigenthings is given the number of
Lanczos steps that turns out right, which a user cannot know.

- `mlp`: 32-40-32-10 tanh, 2,962 weights, 512 examples, trained; its whole spectrum is computed.
- `resnet`: ResNet-20, 269,722 weights, batch normalisation in eval mode, trained a little; products
  on 128 examples, eigenvalues on 8.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
from harness import Bar

TOLERANCE = 1e-3
BLOCK = 16
NUM_TRACE = 96


def main(arguments: list[str] | None = None) -> None:
    """Measures every part, prints the tables and writes the JSON file."""
    if harness.serve_part(sys.argv[1:] if arguments is None else arguments, PARTS):
        return
    options = parse(arguments)
    figures: dict[str, Any] = {
        "command": " ".join(["python", "tests/benchmarks/curvature.py", *sys.argv[1:]]),
        "quick": options.quick,
        "machine": harness.machine(),
    }
    parts: dict[str, dict[str, Any]] = {
        "products_resnet": {"num_examples": 32 if options.quick else 128, "repeats": 3},
        "products_mlp": {"repeats": 5 if options.quick else 15},
        "eigenvalues": {"repeats": 1 if options.quick else 3},
        "spectrum": {"repeats": 1 if options.quick else 3, "seeds": 20 if options.quick else 200},
    }
    if options.large:
        parts["large"] = {}
    for name, settings in parts.items():
        if options.only and name not in options.only:
            continue
        figures[name], usage = harness.run_part(__file__, name, settings)
        figures[name]["peak_memory_gb"] = harness.gigabytes(usage.peak_pss_bytes)
        show(name, figures[name])
    harness.finish(figures, bars(figures), options.json)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--large", action="store_true", help="also 25 million weights")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of the parts")
    return parser.parse_args(arguments)


def bars(figures: dict[str, Any]) -> list[Bar]:
    """The limits of the claim, for the parts that were measured."""
    found: list[Bar] = []

    def add(name: str, value: float | None, limit: float, *, at_most: bool = True) -> None:
        if value is not None:
            found.append(Bar(name, value, limit, at_most))

    if part := figures.get("products_resnet"):
        add("ResNet-20: product over gradient", part["ratios"]["llp"], 2.1)
    if part := figures.get("products_mlp"):
        add("MLP: product over gradient, block of 16", part["ratios"]["llp, block of 16"], 0.4)
    if part := figures.get("eigenvalues"):
        for k, limits in (("5", (4, 3, 1.5)), ("1", (1.3, 5, 2))):
            own = part["top"][k]["llp"]
            add(f"ResNet-20, top {k}: largest relative error", own["error"], TOLERANCE)
            for peer, limit in zip(ORDER, limits, strict=True):
                if peer in part["top"][k]:
                    ratio = part["top"][k][peer]["seconds"] / own["seconds"]
                    add(f"ResNet-20, top {k}: times as fast as {peer}", ratio, limit, at_most=False)
        add("ResNet-20, top 5: products", part["top"]["5"]["llp"]["products"], 16)
    if part := figures.get("spectrum"):
        density = part["density"]
        for peer, limit in (("hessian-eigenthings", 4), ("PyHessian", 5), ("curvlinops", 10)):
            if peer in density:
                ratio = density[peer]["seconds"] / density["llp"]["seconds"]
                add(f"MLP, density 8 x 80: times as fast as {peer}", ratio, limit, at_most=False)
        peers = [row["distance"] for name, row in density.items() if name != "llp"]
        worst = 1.5 * max(peers) if peers else 0.01
        add("MLP, density: distance to the exact one", density["llp"]["distance"], worst)
        for peer, limit in (("hessian-eigenthings", 4), ("curvlinops", 1)):
            if peer in part["trace"]:
                ratio = part["trace"][peer]["seconds"] / part["trace"]["llp"]["seconds"]
                name = f"MLP, trace, {NUM_TRACE} products: times as fast as {peer}"
                add(name, ratio, limit, at_most=False)
        add("MLP, trace: 95 % intervals that hold it, %", part["coverage"], 92, at_most=False)
        add("MLP, report: products over the sum of the peers'", part["report"]["ratio"], 0.75)
        add("MLP, report: largest relative error, top 5", part["report"]["error"], TOLERANCE)
    if part := figures.get("large"):
        add("25 million weights: peak memory, GB", part["peak_memory_gb"], 12)
    return found


ORDER = ("PyHessian", "curvlinops", "hessian-eigenthings")


def show(name: str, part: dict[str, Any]) -> None:
    """The table of one part."""
    for line in part.get("missing", []):
        print(f"not measured: {line}")
    if "ratios" in part:
        rows = [[who, f"{ratio:.2f}"] for who, ratio in part["ratios"].items()]
        title = f"{name}: CPU time of a product over {1e3 * part['gradient_seconds']:.1f} ms"
        harness.print_table(f"{title} of a gradient, {part['how']}", ["", "ratio"], rows)
    for k, found in part.get("top", {}).items():
        rows = [
            [who, f"{row['products']}", f"{row['seconds']:.2f}", f"{row['error']:.1e}"]
            for who, row in found.items()
        ]
        harness.print_table(f"top {k} at 1e-3", ["", "products", "CPU s", "largest error"], rows)
    if "density" in part:
        rows = [
            [who, str(row["products"]), f"{row['seconds']:.2f}", f"{1e3 * row['distance']:.2f}"]
            for who, row in part["density"].items()
        ]
        header = ["", "products", "CPU s", "distance, 1e-3 of the range"]
        harness.print_table("density, 8 probes x 80 steps", header, rows)
        rows = [
            [who, f"{row['seconds']:.3f}", f"{100 * row['error']:.2f}"]
            for who, row in part["trace"].items()
        ]
        harness.print_table(f"trace, {NUM_TRACE} products", ["", "CPU s", "error, %"], rows)
        rows = [[key, f"{value}"] for key, value in part["report"].items()]
        harness.print_table("report", ["", ""], rows)
    if name == "large":
        rows = [[key, str(value)] for key, value in part.items()]
        harness.print_table("25 million weights", ["", ""], rows)


def measure_products_resnet(num_examples: int, repeats: int) -> dict[str, Any]:
    """One product at a time, after one that is not counted."""
    from surface import resnet

    model, inputs, targets = resnet(num_examples)
    return _products(model, inputs, targets, repeats, calls=1, block=False)


def measure_products_mlp(repeats: int) -> dict[str, Any]:
    """Products one by one and in blocks."""
    return _products(*mlp(), repeats, calls=20, block=True)


def _products(
    model: Any, inputs: Any, targets: Any, repeats: int, *, calls: int, block: bool
) -> dict[str, Any]:
    import curvature_peers

    from llp import landscape

    torch, nn = _torch()
    loss_fn = nn.functional.cross_entropy
    parameters = list(model.parameters())
    op = landscape.hessian(model, loss_fn, [(inputs, targets)])
    vector = torch.randn(op.shape[0])
    many = torch.randn(op.shape[0], BLOCK)
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "gradient": (
            lambda: torch.autograd.grad(loss_fn(model(inputs), targets), parameters),
            1,
        ),
        "llp": (lambda: op @ vector, 1),
    }
    if block:
        contenders["llp, inside a session"] = (lambda: _inside(op, vector, calls), calls)
        contenders["llp, block of 16"] = (lambda: op @ many, BLOCK)
    peers, missing = curvature_peers.made(copy.deepcopy(model), loss_fn, inputs, targets)
    for name, peer in peers.items():
        contenders[name] = (lambda peer=peer: peer.product(vector), 1)
        if block and hasattr(peer, "block"):
            contenders[f"{name}, block of 16"] = (lambda peer=peer: peer.block(many), BLOCK)
    seconds = _timed({name: call for name, (call, _) in contenders.items()}, repeats, calls)
    own = {name: seconds[name] / columns for name, (_, columns) in contenders.items()}
    assert op.plan is not None
    return {
        "gradient_seconds": own["gradient"],
        "ratios": {name: own[name] / own["gradient"] for name in own if name != "gradient"},
        "how": f"{len(targets)} examples, {op.plan.engine}, chunks of {op.plan.chunk_size or 1}",
        "missing": missing,
    }


def _inside(op: Any, vector: Any, calls: int) -> None:
    """Products as the algorithms make them: the model's state is saved once for all."""
    with op.session():
        for _ in range(calls):
            op @ vector


def measure_eigenvalues(repeats: int) -> dict[str, Any]:
    """The largest eigenvalues of ResNet-20 on 8 examples."""
    import curvature_peers
    import numpy as np
    from surface import resnet

    from llp import landscape

    _, nn = _torch()
    loss_fn = nn.functional.cross_entropy
    model, inputs, targets = resnet(64)
    inputs, targets = inputs[:8], targets[:8]
    truth = _reference(model, loss_fn, inputs, targets, 6)
    peers, missing = curvature_peers.made(copy.deepcopy(model), loss_fn, inputs, targets)
    found: dict[str, Any] = {}
    for k in (5, 1):
        steps = 0
        if "hessian-eigenthings" in peers:
            steps = peers["hessian-eigenthings"].steps_needed(
                k, lambda values, k=k: _error(values, truth[:k]) <= TOLERANCE
            )
        rows: dict[str, Any] = {}
        for _ in range(repeats):
            for name, confidence in (("llp", 0.9), ("llp, residuals trusted", 0.0)):
                started = time.process_time()
                op = landscape.hessian(model, loss_fn, [(inputs, targets)])
                pairs = landscape.top_eigenpairs(
                    op, k=k, tolerance=TOLERANCE, confidence=confidence
                )
                row = rows.setdefault(name, {"all_seconds": []})
                row["all_seconds"].append(time.process_time() - started)
                row |= {
                    "products": pairs.num_products,
                    "gradients": pairs.num_gradients,
                    "error": _error(pairs.values.numpy(), truth[:k]),
                    "confidence": pairs.confidence,
                }
            for kind in curvature_peers.PEERS:
                name = kind.name
                if name not in peers:
                    continue
                twin = copy.deepcopy(model)
                started = time.process_time()
                peer = kind(twin, loss_fn, inputs, targets)  # as ours, with its construction
                values = peer.top(k, steps) if name == "hessian-eigenthings" else peer.top(k)
                row = rows.setdefault(name, {"all_seconds": []})
                row["all_seconds"].append(time.process_time() - started)
                row |= {
                    "products": peer.count,
                    "error": _error(np.asarray(values), truth[:k]),
                }
        for row in rows.values():
            row["seconds"] = statistics.median(row["all_seconds"])
        found[str(k)] = rows
    return {"top": found, "reference": truth.tolist(), "missing": missing}


def measure_spectrum(repeats: int, seeds: int) -> dict[str, Any]:
    """Density, trace and report of the small network, whose spectrum is known."""
    import curvature_peers
    import numpy as np

    from llp import landscape

    torch, nn = _torch()
    loss_fn = nn.functional.cross_entropy
    model, inputs, targets = mlp()
    exact = _exact(model, loss_fn, inputs, targets)
    peers, missing = curvature_peers.made(copy.deepcopy(model), loss_fn, inputs, targets)
    op = landscape.hessian(model, loss_fn, [(inputs, targets)])
    op @ torch.zeros(op.shape[0], 64)  # the timed probe of block sizes, once in a process
    density: dict[str, Any] = {}
    trace: dict[str, Any] = {}

    def take(table: dict[str, Any], name: str, seconds: float, row: dict[str, Any]) -> None:
        table.setdefault(name, {"all_seconds": []})["all_seconds"].append(seconds)
        table[name] |= row

    landscape.trace(op, num_probes=NUM_TRACE)  # once each: imports and caches of what is below
    for peer in peers.values():
        if hasattr(peer, "trace"):
            peer.trace(NUM_TRACE)
    for _ in range(repeats):
        started = time.process_time()
        own = landscape.spectral_density(op, num_probes=8, num_steps=80)
        taken = time.process_time() - started
        distance = _distance(own.nodes.numpy(), own.weights.numpy(), exact)
        take(density, "llp", taken, {"products": own.num_products, "distance": distance})
        for name, peer in peers.items():
            before, started = peer.count, time.process_time()
            nodes, weights = peer.density(8, 80)
            taken = time.process_time() - started
            row = {"products": peer.count - before, "distance": _distance(nodes, weights, exact)}
            take(density, name, taken, row)
        total = float(exact.sum())
        started = time.process_time()
        value = landscape.trace(op, num_probes=NUM_TRACE).value
        row = {"error": abs(value / total - 1)}
        take(trace, "llp", time.process_time() - started, row)
        for name, peer in peers.items():
            if hasattr(peer, "trace"):
                started = time.process_time()
                value = peer.trace(NUM_TRACE)
                row = {"error": abs(value / total - 1)}
                take(trace, name, time.process_time() - started, row)
    for row in [*density.values(), *trace.values()]:
        row["seconds"] = statistics.median(row["all_seconds"])
    held = 0
    for seed in range(seeds):
        estimate = landscape.trace(
            op, relative_error=0.03, generator=torch.Generator().manual_seed(seed)
        )
        held += abs(estimate.value - total) <= estimate.half_width
    return {
        "density": density,
        "trace": trace,
        "coverage": 100 * held / seeds,
        "report": _report(model, loss_fn, inputs, targets, exact, peers),
        "exact": {"trace": total, "largest": exact[-1], "smallest": exact[0]},
        "missing": missing,
        "num_seeds": seeds,
        "chunk": op.plan.chunk_size if op.plan is not None else np.nan,
    }


def _report(
    model: Any, loss_fn: Any, inputs: Any, targets: Any, exact: Any, peers: dict[str, Any]
) -> dict[str, Any]:
    """Products of everything at once, and of the calls that give the same with the best peer.

    The peers' sum is that of hessian-eigenthings, which needs the fewest: its density of 8 probes,
    its trace at the interval that the report reached, the five largest, and the other end.
    """
    import numpy as np
    from scipy import stats

    from llp import landscape

    report = landscape.report(model, loss_fn, [(inputs, targets)])
    order = np.argsort(-np.abs(exact))
    truth = exact[order[:5]]
    found = {
        "products": report.num_products,
        "error": _error(report.eigenpairs.values.numpy(), truth),
        "distance": _distance(report.density.nodes.numpy(), report.density.weights.numpy(), exact),
        "trace_error": abs(report.trace.value / float(exact.sum()) - 1),
        "trace_half_width": report.trace.half_width / abs(report.trace.value),
        "smallest_error": abs(report.smallest.value / exact[0] - 1),
        "largest_error": abs(report.largest.value / exact[-1] - 1),
    }
    peer = peers.get("hessian-eigenthings")
    if peer is None:
        return {**found, "ratio": None}
    top = peer.steps_needed(5, lambda values: _error(values, truth) <= TOLERANCE)
    which, end = ("SA", exact[:1]) if abs(exact[-1]) > abs(exact[0]) else ("LA", exact[-1:])
    other = peer.steps_needed(1, lambda values: _error(values, end) <= TOLERANCE, which)
    # Hutchinson probes for the same 95 % interval; the diagonal's share is left out, in its favour
    spread = np.sqrt(2 * (exact**2).sum() * (1 - 1 / len(exact)))
    wanted = found["trace_half_width"] * abs(exact.sum()) / stats.norm.ppf(0.975)
    probes = min(100, int(np.ceil((spread / wanted) ** 2)))
    parts = {"density": 640, "trace": probes, "top five": top, "other end": other}
    return {
        **found,
        **{f"peers, {name}": count for name, count in parts.items()},
        "peers, sum": sum(parts.values()),
        "ratio": report.num_products / sum(parts.values()),
    }


def measure_large() -> dict[str, Any]:
    """ResNet-50 in main memory: no graph is kept."""
    from torchvision.models import resnet50

    from llp import landscape

    torch, nn = _torch()
    torch.manual_seed(0)
    model = resnet50(num_classes=100)
    batches = [(torch.randn(8, 3, 64, 64), torch.arange(8)) for _ in range(2)]
    op = landscape.hessian(model, nn.functional.cross_entropy, batches, memory_budget=0)
    pairs = landscape.top_eigenpairs(op, k=1, max_products=10)
    total = landscape.trace(op, num_probes=2)
    assert op.plan is not None
    return {
        "weights": op.shape[0],
        "engine": op.plan.engine,
        "graph_gb": harness.gigabytes(op.plan.graph_bytes),
        "products": op.num_products,
        "largest": float(pairs.values[0]),
        "converged": pairs.converged,
        "trace": total.value,
        "cpu_seconds": time.process_time(),
    }


def mlp() -> tuple[Any, Any, Any]:
    """The small network, trained, and its examples."""
    import surface

    torch, nn = _torch()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    targets = torch.arange(512) % 10
    inputs = torch.randn(512, 32) + 2 * torch.randn(10, 32)[targets] / 32**0.25
    surface._train(model, [(inputs, targets)], num_epochs=60, learning_rate=0.1)
    return model, inputs, targets


def _exact(model: Any, loss_fn: Any, inputs: Any, targets: Any) -> Any:
    """All eigenvalues, of the dense Hessian by `torch.func` in float64, ascending."""
    torch, _ = _torch()
    twin = copy.deepcopy(model).double()
    shapes = [(name, p.shape, p.numel()) for name, p in twin.named_parameters()]

    def loss(vector: Any) -> Any:
        parts = vector.split([size for *_, size in shapes])
        named = {n: part.reshape(s) for (n, s, _), part in zip(shapes, parts, strict=True)}
        return loss_fn(torch.func.functional_call(twin, named, (inputs.double(),)), targets)

    vector = torch.nn.utils.parameters_to_vector(twin.parameters()).detach()
    slope = torch.func.grad(loss)

    def column(unit: Any) -> Any:
        return torch.func.jvp(slope, (vector,), (unit,))[1]

    matrix = torch.func.vmap(column, chunk_size=64)(torch.eye(len(vector)).double())
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy()


def _reference(model: Any, loss_fn: Any, inputs: Any, targets: Any, k: int) -> Any:
    """The largest eigenvalues by magnitude, by SciPy in float64 on a plain double backward."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    torch, _ = _torch()
    twin = copy.deepcopy(model).double().eval()
    parameters = list(twin.parameters())
    loss = loss_fn(twin(inputs.double()), targets)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    slope = torch.cat([each.reshape(-1) for each in slopes])

    def product(vector: Any) -> Any:
        row = torch.as_tensor(vector).reshape(-1)
        parts = torch.autograd.grad(slope, parameters, row, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts]).numpy()

    op = LinearOperator((len(slope), len(slope)), matvec=product, dtype=np.float64)
    start = np.random.default_rng(1).normal(size=len(slope))
    values = eigsh(op, k=k, which="LM", tol=1e-6, v0=start, return_eigenvectors=False)
    return np.array(sorted(values, key=lambda x: -abs(x)))


def _error(values: Any, truth: Any) -> float:
    """Largest relative error of values in the order of the reference."""
    import numpy as np

    values = np.asarray(values)
    if len(values) < len(truth):
        return float("inf")
    ordered = values[np.argsort(-np.abs(values), kind="stable")][: len(truth)]
    return float(np.abs(ordered / truth - 1).max())


def _distance(nodes: Any, weights: Any, exact: Any) -> float:
    """Wasserstein distance of a density to the exact one, over the range of the spectrum."""
    import numpy as np
    from scipy.stats import wasserstein_distance

    shares = np.abs(weights) / np.abs(weights).sum(-1, keepdims=True)
    distance = wasserstein_distance(nodes.ravel(), exact, shares.ravel(), np.ones(len(exact)))
    return float(distance / np.ptp(exact))


def _timed(contenders: dict[str, Callable[[], Any]], repeats: int, calls: int) -> dict[str, float]:
    """Median CPU seconds of a call, contenders in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1 + repeats):
        for name, call in contenders.items():
            started = time.process_time()
            for _ in range(calls):
                call()
            if number:
                seconds[name].append((time.process_time() - started) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _torch() -> tuple[Any, Any]:
    import warnings

    import torch
    from torch import nn

    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    torch.set_num_threads(1)
    return torch, nn


PARTS = {
    "products_resnet": measure_products_resnet,
    "products_mlp": measure_products_mlp,
    "eigenvalues": measure_eigenvalues,
    "spectrum": measure_spectrum,
    "large": measure_large,
}

if __name__ == "__main__":
    main()
