"""A 25 x 25 loss surface on a CPU, against loss-landscapes.

    python tests/benchmarks/surface.py            a few minutes; wants one quiet core
    python tests/benchmarks/surface.py --quick    fewer examples for the convolutional network
    python tests/benchmarks/surface.py --device cuda    on a GPU: the loop, vmap and the probe

Claim: exact, at least 1.2 times as fast as loss-landscapes on a convolutional network and at least
.95 times on a small multilayer perceptron; with interpolation at least 3 times as fast on both, at
an error of at most 1 % of the range of the losses.

Both draw filter-normalised random planes around the same trained weights and measure the loss on
the same examples with one thread; loss-landscapes gets its own `Loss` metric and `random_plane`.
Its numbers are not compared cell by cell, since its odd columns are shifted by one cell; ours are
compared with weights that were moved by hand. Times are CPU seconds of this process, contenders one
after the other in turn, medians over the repeats.

- `mlp`: 32-40-32-10 tanh, 2,962 weights, 512 examples, trained by gradient descent.
- `conv`: ResNet-20, 269,722 weights, batch normalisation in eval mode, 64 examples (16 when quick).
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

RESOLUTION = 25
COARSE = 11
NUM_HELD_OUT = 16
PEER_RESOLUTION = 11
"""Of loss-landscapes on a GPU, where the time for a point is what is compared."""


def main(arguments: list[str] | None = None) -> None:
    """Measures every part, prints the tables and writes the JSON file."""
    if harness.serve_part(sys.argv[1:] if arguments is None else arguments, PARTS):
        return
    options = parse(arguments)
    figures: dict[str, Any] = {
        "command": " ".join(["python", "tests/benchmarks/surface.py", *sys.argv[1:]]),
        "quick": options.quick,
        "machine": harness.machine(),
    }
    if options.device == "cpu":
        mlp = {"repeats": 5 if options.quick else 15}
        conv = {"repeats": 1, "num_examples": 16 if options.quick else 64}
        for name, settings in (("mlp", mlp), ("conv", conv)):
            figures[name], usage = harness.run_part(__file__, name, settings)
            figures[name]["peak_memory_gb"] = harness.gigabytes(usage.peak_pss_bytes)
            show(name, figures[name])
        harness.finish(figures, bars(figures), options.json)
        return
    resolution = 11 if options.quick else 51
    figures["gpu"], _ = harness.run_part(__file__, "gpu", {"resolution": resolution})
    show_gpu(figures["gpu"])
    harness.finish(figures, [], options.json)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args(arguments)


def bars(figures: dict[str, Any]) -> list[Bar]:
    """The limits of the claim."""
    found = []
    for name, least in (("conv", 1.2), ("mlp", 0.95)):
        part = figures[name]
        exact = f"exact surface, {name}: times as fast as loss-landscapes"
        found.append(Bar(exact, part["speed_exact"], least, at_most=False))
        coarse = f"interpolated surface, {name}: times as fast as loss-landscapes"
        found.append(Bar(coarse, part["speed_interpolated"], 3, at_most=False))
        error = f"interpolated surface, {name}: largest error, % of the range"
        found.append(Bar(error, 100 * part["true_error"], 1.0))
        checked = f"exact surface, {name}: largest relative difference from moved weights"
        found.append(Bar(checked, part["difference_from_moved_weights"], 1e-5))
    return found


def show(name: str, part: dict[str, Any]) -> None:
    """The table of one network."""
    rows = [
        [
            label,
            f"{part['seconds'][key]:.3f}",
            f"{1e3 * part['seconds'][key] / part['num_points']:.3f}",
            f"{part['seconds']['peer'] / part['seconds'][key]:.2f}",
        ]
        for key, label in (
            ("peer", "loss-landscapes, loss"),
            ("exact", "llp, loss"),
            ("metric", "llp, loss and accuracy"),
            ("interpolated", f"llp, loss, {COARSE} x {COARSE} and splines"),
        )
    ]
    title = (
        f"{name}: {RESOLUTION} x {RESOLUTION} points, {part['num_examples']} examples, evaluated "
        f"by {part['strategy']}"
    )
    harness.print_table(title, ["", "CPU s", "ms a point", "times as fast"], rows)
    stated = part["stated_error"]
    print(f"interpolation error, % of the range: {100 * part['true_error']:.3f} over all cells, ")
    print(f"    {100 * stated:.3f} stated from {NUM_HELD_OUT} held-out cells")


def show_gpu(part: dict[str, Any]) -> None:
    """The table of the GPU."""
    for line in part["missing"]:
        print(f"not measured: {line}")
    rows = [
        [
            name,
            f"{row['seconds']:.2f}",
            f"{1e3 * row['seconds'] / row['num_points']:.3f}",
            row["how"],
        ]
        for name, row in part["rows"].items()
    ]
    harness.print_table(part["device"], ["", "seconds", "ms a point", "evaluated by"], rows)


def measure_mlp(repeats: int) -> dict[str, Any]:
    """The small network."""
    torch, nn = _torch()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    targets = torch.arange(512) % 10
    inputs = torch.randn(512, 32) + 2 * torch.randn(10, 32)[targets] / 32**0.25
    _train(model, [(inputs, targets)], num_epochs=60, learning_rate=0.1)
    return measure(model, inputs, targets, repeats)


def measure_conv(num_examples: int, repeats: int) -> dict[str, Any]:
    """The convolutional network."""
    model, inputs, targets = resnet(64)
    return measure(model, inputs[:num_examples], targets[:num_examples], repeats)


def resnet(num_examples: int) -> tuple[Any, Any, Any]:
    """ResNet-20, trained a little on images of ten blurred patterns, and examples."""
    from llp.workloads.resnet import resnet20

    torch, nn = _torch()
    torch.manual_seed(0)
    model = resnet20(channels=3, image_size=32, num_classes=10)
    targets = torch.arange(num_examples) % 10
    patterns = nn.functional.interpolate(torch.randn(10, 3, 6, 6), (32, 32), mode="bilinear")
    inputs = patterns[targets] + 0.7 * torch.randn(num_examples, 3, 32, 32)
    training = [(inputs[:64][k::2], targets[:64][k::2]) for k in range(2)]
    _train(model, training, num_epochs=25, learning_rate=0.05)
    return model, inputs, targets


def measure(model: Any, inputs: Any, targets: Any, repeats: int) -> dict[str, Any]:
    """Seconds of every contender, and what the values are worth."""
    import numpy as np

    from llp import landscape

    torch, nn = _torch()
    loss_fn, batches = nn.functional.cross_entropy, [(inputs, targets)]
    plane = landscape.directions.random(model)
    ours = {"directions": plane, "resolution": RESOLUTION, "metric": None}
    coarse = {"coarse": COARSE, "num_held_out": NUM_HELD_OUT}
    contenders: dict[str, Callable[[], Any]] = {
        "peer": lambda: _peer(model, inputs, targets),
        "exact": lambda: landscape.surface(model, loss_fn, batches, **ours),
        "interpolated": lambda: landscape.surface(model, loss_fn, batches, **ours, **coarse),
        "metric": lambda: landscape.surface(
            model, loss_fn, batches, **{**ours, "metric": landscape.accuracy}
        ),
    }
    with torch.no_grad():  # caches of the libraries below us, for everyone
        model.eval()(inputs)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in contenders.items():
            started = time.process_time()
            found[name] = call()
            seconds[name].append(time.process_time() - started)
    exact = found["exact"]
    error = np.abs(found["interpolated"].loss - exact.loss).max() / np.ptp(exact.loss)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "strategy": exact.strategy,
        "num_points": RESOLUTION**2,
        "num_examples": len(targets),
        "num_weights": sum(p.numel() for p in model.parameters()),
        "base_loss": exact.base_loss,
        "seconds": medians,
        "all_seconds": seconds,
        "speed_exact": medians["peer"] / medians["exact"],
        "speed_interpolated": medians["peer"] / medians["interpolated"],
        "true_error": float(error),
        "stated_error": found["interpolated"].interpolation.max_relative,
        "difference_from_moved_weights": _difference(model, loss_fn, batches, plane, exact),
    }


def measure_gpu(
    resolution: int, *, device: str = "cuda", num_examples: int = 4096
) -> dict[str, Any]:
    """ResNet-20 on many examples, and on few, where launching kernels takes the time."""
    from llp import landscape

    torch, nn = _torch()
    model, inputs, targets = resnet(num_examples)
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    loss_fn = nn.functional.cross_entropy
    on_gpu = device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    rows: dict[str, Any] = {}
    missing: list[str] = []
    for count in sorted({max(1, num_examples // 32), num_examples}):
        batches = [
            (inputs[start : min(start + 1024, count)], targets[start : min(start + 1024, count)])
            for start in range(0, count, 1024)
        ]
        for strategy in ("loop", "vmap", "auto"):
            landscape.surface(model, loss_fn, batches, resolution=3, strategy=strategy, metric=None)
            wait()
            started = clock()
            found = landscape.surface(
                model, loss_fn, batches, resolution=resolution, strategy=strategy, metric=None
            )
            wait()
            middle = resolution // 2
            rows[f"{count} examples, {strategy}"] = {
                "seconds": clock() - started,
                "num_points": resolution**2,
                "how": found.strategy,
                "centre_is_base": bool(found.loss[middle, middle] == found.base_loss),
            }
        try:
            import loss_landscapes  # noqa: F401
        except ImportError:
            continue
        wait()
        started = clock()
        try:
            _peer(model, inputs[:count], targets[:count], steps=PEER_RESOLUTION)
        except RuntimeError as error:  # 3.0.6 makes its directions on the CPU
            missing = [f"loss-landscapes: {error}"]
            continue
        wait()
        rows[f"{count} examples, loss-landscapes"] = {
            "seconds": clock() - started,
            "num_points": PEER_RESOLUTION**2,
            "how": "one batch, point by point",
        }
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    return {"device": name, "rows": rows, "missing": missing}


def _peer(model: Any, inputs: Any, targets: Any, steps: int = RESOLUTION) -> Any:
    import loss_landscapes
    from loss_landscapes.metrics import Loss

    _, nn = _torch()
    twin = copy.deepcopy(model).eval()
    metric = Loss(nn.functional.cross_entropy, inputs, targets)
    return loss_landscapes.random_plane(twin, metric, steps=steps, normalization="filter")


def _difference(model: Any, loss_fn: Any, batches: Any, plane: Any, exact: Any) -> float:
    """Largest relative difference of a few cells from the loss of weights moved by hand."""
    torch, _ = _torch()
    twin = copy.deepcopy(model).eval()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    (inputs, targets), worst = batches[0], 0.0
    last = len(exact.x) - 1
    for i, j in ((0, 0), (0, last), (last, 1), (last // 2, last // 2), (2, last // 3)):
        moved = start + exact.x[i] * plane.vectors[0] + exact.y[j] * plane.vectors[1]
        torch.nn.utils.vector_to_parameters(moved.to(start), twin.parameters())
        with torch.no_grad():
            expected = float(loss_fn(twin(inputs), targets))
        worst = max(worst, abs(float(exact.loss[i, j]) - expected) / expected)
    return worst


def _train(model: Any, batches: Any, *, num_epochs: int, learning_rate: float) -> None:
    torch, nn = _torch()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    model.train()
    for _ in range(num_epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    torch.optim.swa_utils.update_bn(batches, model)
    model.eval()


def _torch() -> tuple[Any, Any]:
    import torch
    from torch import nn

    torch.set_num_threads(1)
    return torch, nn


PARTS = {"mlp": measure_mlp, "conv": measure_conv, "gpu": measure_gpu}

if __name__ == "__main__":
    main()
