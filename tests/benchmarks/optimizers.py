"""What a step of each optimizer costs against a step of its base, and what memory it keeps.

    python tests/benchmarks/optimizers.py                  CPU time; wants a quiet core
    python tests/benchmarks/optimizers.py --device cuda    time on the GPU
    python tests/benchmarks/optimizers.py --quick          fewer rounds

Claim: with ResNet-20 and 128 images a step of SAM costs at most 2.05 steps of its base, one of ASAM
2.15, one of TALT 1.25, one with an average of the weights 1.05; TALT keeps at most 10 % more memory
than parameters and base state; `pytorch_optimizer` (SAM, ASAM, Muon), where it is installed, and
torch's `AveragedModel` (EMA) are not cheaper.

All contenders take turns in one process, one short burst of steps each per round and in another
order every round. A ratio is that of the lower quartiles over rounds, which a machine that is
disturbed now and then leaves alone; the lowest and highest ratio within one round say how disturbed
it was. On the CPU the cost is the CPU time of the process with one thread; on a GPU it is the time
between two events on its stream, *launches* is how many kernels a step takes, and *waits* how often
the host waits for the GPU within one, both by the profiler; no step of ours may wait. An average
takes the weights in at every step, which is what EMA does and SWA never does.

*Agreement* (without a GPU only): how far the weights of ours and the library's are apart after five
steps from the same network on the same batch, by the distance travelled: in float64 on the CPU with
16 images, where it is rounding if both follow one definition. (In float32 five steps of ASAM on
ResNet-20 make several percent of the last bits.) ASAM is compared with `eta = 0`, which the library
has not.

A step of Entropy-SGD is a chain of several gradients, each of a batch of its own: its cost is per
gradient, as its epochs are.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import harness
from harness import Bar

BATCH = 128
BARS = {
    "sam": ("step of SAM by its base's", 2.05),
    "asam": ("step of ASAM by its base's", 2.15),
    "talt": ("step of TALT by its base's", 1.25),
    "swa": ("step with SWA by one without", 1.05),
    "ema": ("step with EMA by one without", 1.05),
}
MEMORY_BAR = 0.10
LIBRARY, TORCH = " (pytorch_optimizer)", " (torch AveragedModel)"
PEERS = {f"sam{LIBRARY}": "sam", f"asam{LIBRARY}": "asam", f"muon{LIBRARY}": "muon"}
PEER_BAR = 1.02
AGREEMENT_BAR, AGREEMENT_BATCH = 1e-6, 16
WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    *("cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
)
"""Calls in which the host waits for the GPU; `item()` and a copy to the host end in one of them."""
BASES = {"talt on adamw": "adamw", "sam on adamw": "adamw"}  # the others: sgd


def main(arguments: list[str] | None = None) -> None:
    """Measures in a child process, prints the table and writes the JSON file."""
    options = parse(arguments)
    found, _ = harness.run_part(
        __file__,
        "costs",
        {"device": options.device, "rounds": options.rounds, "model": options.model},
    )
    figures = {
        "command": " ".join(["python", "tests/benchmarks/optimizers.py", *sys.argv[1:]]),
        "quick": options.quick,
        "machine": harness.machine(),
        **found,
    }
    show(figures)
    harness.finish(figures, bars(figures), options.json)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--rounds", type=int, help="rounds [11, on a GPU 31; --quick 5]")
    parser.add_argument("--model", default="resnet20", help="row of `llp list models` [resnet20]")
    options = parser.parse_args(arguments)
    usual = 31 if options.device.startswith("cuda") else 11
    options.rounds = options.rounds or (5 if options.quick else usual)
    return options


def bars(figures: dict[str, Any]) -> list[Bar]:
    """What has to hold."""
    costs = figures["costs"]
    found = [Bar(text, costs[name]["ratio"], limit) for name, (text, limit) in BARS.items()]
    memory = figures["memory"]["talt"]["share_of_parameters_and_base"]
    found.append(Bar("memory of TALT by parameters and base state", memory, MEMORY_BAR))
    for peer, own in [*PEERS.items(), (f"ema{TORCH}", "ema")]:
        if peer in costs:
            share = costs[own]["ratio"] / costs[peer]["ratio"]
            found.append(Bar(f"step of {own} by that of {peer}", share, PEER_BAR))
    if figures["device"] != "cpu":
        own = [n for n in costs if n not in PEERS and n != f"ema{TORCH}"]
        waits = max(costs[name]["syncs"] for name in own)
        found.append(Bar("host waits for the GPU, per step, at most", waits, 0.0))
    for own, distance in figures["agreement"].items():
        found.append(Bar(f"{own}: distance from the library's", distance, AGREEMENT_BAR))
    return found


def show(figures: dict[str, Any]) -> None:
    """Prints what was measured."""
    on_gpu = figures["device"] != "cpu"
    header = ["", "ms", "by its base", "lowest", "highest"]
    header += ["launches", "waits", "memory MB"] if on_gpu else []
    rows = []
    for name, cost in figures["costs"].items():
        row = [name, f"{1e3 * cost['seconds']:.2f}"]
        row += [f"{cost[key]:.3f}" for key in ("ratio", "lowest", "highest")]
        if on_gpu:
            row += [
                str(cost["launches"]),
                f"{cost['syncs']:.2f}",
                f"{cost['peak_bytes'] / 1e6:.1f}",
            ]
        rows.append(row)
    title = (
        f"A step of {figures['model']} with {BATCH} images on {figures['hardware']}, "
        f"{figures['rounds']} rounds"
    )
    harness.print_table(title, header, rows)
    rows = [
        [
            name,
            f"{memory['bytes'] / 1e3:.0f}",
            f"{memory['bytes_per_parameter']:.3f}",
            f"{100 * memory['share_of_parameters_and_base']:.1f} %",
        ]
        for name, memory in figures["memory"].items()
    ]
    header = ["kept beside the base", "kB", "bytes per parameter", "of parameters and base state"]
    harness.print_table("Memory", header, rows)


def measure_costs(device: str, rounds: int, model: str) -> dict[str, Any]:
    """Costs of all contenders, taking turns."""
    import torch

    from llp.training import jobs

    torch.set_num_threads(1)
    if device != "cpu":
        torch.backends.cudnn.benchmark = True
    place = torch.device(device)
    contenders = {name: Contender(name, place, model) for name in names()}
    burst = 1 if device == "cpu" else 20
    for contender in contenders.values():
        contender.run(2 if device == "cpu" else 30)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    generator = random.Random(0)
    for number in range(rounds):
        generator.shuffle(order)
        for name in order:
            times[name].append(contenders[name].seconds(burst))
        print(f"round {number + 1} of {rounds}", flush=True)
    costs: dict[str, Any] = {}
    for name, seconds in times.items():
        reference = times[BASES.get(name, "sgd")]
        ratios = [own / base for own, base in zip(seconds, reference, strict=True)]
        costs[name] = {
            "seconds": lower_quartile(seconds),
            "ratio": lower_quartile(seconds) / lower_quartile(reference),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
        if device != "cpu":
            costs[name] |= contenders[name].on_the_gpu()
    return {
        "device": device,
        "hardware": jobs.device_name(place),
        "model": model,
        "batch_size": BATCH,
        "rounds": rounds,
        "costs": costs,
        "memory": {name: contenders[name].memory() for name in ("talt", "talt on adamw")},
        "agreement": agreement(model) if device == "cpu" and f"sam{LIBRARY}" in contenders else {},
    }


def agreement(model: str) -> dict[str, float]:
    """Distance of our weights from the library's after five steps, by the distance travelled."""
    import torch

    device, before = torch.device("cpu"), torch.get_default_dtype()

    def flat(contender: Contender) -> Any:
        return torch.cat([p.detach().reshape(-1).double() for p in contender.model.parameters()])

    found = {}
    torch.set_default_dtype(torch.float64)
    try:
        for own in ("sam", "asam"):
            options = {"eta": 0.0} if own == "asam" else {}
            ours = Contender(own, device, model, num_images=AGREEMENT_BATCH, **options)
            theirs = Contender(f"{own}{LIBRARY}", device, model, num_images=AGREEMENT_BATCH)
            start = flat(ours)
            for contender in (ours, theirs):
                contender.run(5)
            travelled = torch.linalg.vector_norm(flat(theirs) - start)
            found[own] = float(torch.linalg.vector_norm(flat(ours) - flat(theirs)) / travelled)
    finally:
        torch.set_default_dtype(before)
    return found


def lower_quartile(values: list[float]) -> float:
    """A quarter of the values are below it."""
    return statistics.quantiles(values, n=4, method="inclusive")[0]


def names() -> list[str]:
    """The contenders that can be made here."""
    found = ["sgd", "sam", "asam", "entropy_sgd", "talt", "swa", "ema", "adamw", "muon", *BASES]
    found.append(f"ema{TORCH}")
    try:
        import pytorch_optimizer  # noqa: F401
    except ImportError:
        return found
    return [*found, *PEERS]


class Contender:
    """A network of its own and what makes its steps."""

    def __init__(
        self, name: str, device: Any, model: str, *, num_images: int = BATCH, **options: Any
    ) -> None:
        import torch
        from torch.nn import functional

        from llp import optim
        from llp.optim.averaging import WeightAverage
        from llp.training import loop
        from llp.workloads import models

        torch.manual_seed(0)
        self.name, self.device = name, device
        self.model = models.build(model, {}, channels=3, image_size=32, num_classes=10).to(device)
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        images = torch.randn(num_images, 3, 32, 32, device=device)
        if device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        self.batch = (images, torch.randint(0, 10, (num_images,), device=device))
        settings: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 5e-4}
        row, _, base = name.partition(" on ")
        parameters = list(self.model.parameters())
        self.library = name in PEERS
        self.after_step: Callable[[Any], None] | None = None
        if self.library:
            self.optimizer: Any = _of_the_library(PEERS[name], parameters)
            return
        after_step: Callable[[Any], None] | None = None
        if name == f"ema{TORCH}":
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            self.optimizer = optim.build("sgd", parameters, **settings)
            torchs = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))

            def after_step(progress: Any) -> None:
                torchs.update_parameters(self.model)
        elif row in ("swa", "ema"):
            self.optimizer = optim.build("sgd", parameters, **settings)
            share = (lambda n: 1 / (n + 1)) if row == "swa" else (lambda n: 0.001)
            average = WeightAverage(self.model, first_step=1, interval=1, share=share)
            taken = [0]

            def after_step(progress: Any) -> None:
                taken[0] += 1
                average.after_step(taken[0])
        else:
            self.optimizer = optim.build(
                row, parameters, **settings, **({"base": base} if base else {}), **options
            )
        self.after_step = after_step
        self.steps = loop.Steps(
            model=self.model,
            optimizer=self.optimizer,
            criterion=functional.cross_entropy,
            schedule=lambda step: 1.0,
            device=device,
        )

    def run(self, num_gradients: int) -> None:
        """Steps over `num_gradients` batches."""
        from llp.training import loop

        if self.library:
            sharp = hasattr(self.optimizer, "first_step")
            for _ in range(num_gradients):
                self._gradients()
                self.optimizer.step(self._gradients if sharp else None)
            return
        batches = [self.batch] * num_gradients
        loop.train_epoch(self.steps, batches, first_step=0, after_step=self.after_step)

    def _gradients(self) -> Any:
        from torch.nn import functional

        images, labels = self.batch
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(images), labels)
        loss.backward()
        return loss

    def seconds(self, num_steps: int) -> float:
        """CPU time, or time on the GPU, of a step; of a gradient where each has its own batch."""
        import torch

        chain = getattr(self.optimizer, "num_gradients", 1)
        per_batch = not getattr(self.optimizer, "same_batch", True)
        count = -(-num_steps // chain) * chain if per_batch else num_steps
        if self.device.type == "cpu":
            started = time.process_time()
            self.run(count)
            return (time.process_time() - started) / count
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.run(count)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / count

    def on_the_gpu(self) -> dict[str, float]:
        """Kernels that a step launches, and how much more memory it takes than there is before."""
        import torch

        chain = getattr(self.optimizer, "num_gradients", 1)
        # As many steps as TALT has from one update of its directions to the next.
        count = getattr(self.optimizer, "update_interval", 3)
        count *= chain if not getattr(self.optimizer, "same_batch", True) else 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run(count)
        peak = torch.cuda.max_memory_allocated() - before
        few, many = self._runtime_calls(count), self._runtime_calls(2 * count)
        per_step = {key: (many[key] - few[key]) / count for key in many}
        return {
            "launches": round(sum(n for key, n in per_step.items() if "LaunchKernel" in key)),
            "syncs": sum(per_step.get(key, 0.0) for key in WAITS),
            "peak_bytes": peak,
        }

    def _runtime_calls(self, count: int) -> Counter[str]:
        """Calls of CUDA's runtime in `count` gradients, by the profiler.

        What an epoch does once (it reads its mean loss at its end) is gone in a difference of two.
        """
        import torch
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            self.run(count)
            torch.cuda.synchronize()
        return Counter({event.key: event.count for event in watched.key_averages()})

    def memory(self) -> dict[str, float]:
        """What TALT keeps, absolutely and by parameters and base state."""
        kept = self.optimizer.memory()
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        state = sum(
            value.numel() * value.element_size()
            for entry in self.optimizer.base.state.values()
            for value in entry.values()
            if hasattr(value, "numel")
        )
        return {**kept, "share_of_parameters_and_base": kept["bytes"] / (size + state)}


def _of_the_library(row: str, parameters: list[Any]) -> Any:
    """The same optimizer of `pytorch_optimizer`, over the same tensors."""
    import pytorch_optimizer
    import torch

    if row == "muon":
        hidden = [p for p in parameters if p.ndim >= 2][:-1]  # as ours: all but the last layer
        rest = [p for p in parameters if all(p is not other for other in hidden)]
        return pytorch_optimizer.Muon(
            [
                {"params": hidden, "lr": 0.01, "weight_decay": 5e-4, "use_muon": True},
                {"params": rest, "lr": 0.01, "weight_decay": 5e-4, "use_muon": False},
            ]
        )
    return pytorch_optimizer.SAM(
        parameters,
        torch.optim.SGD,
        rho=0.5 if row == "asam" else 0.05,
        adaptive=row == "asam",
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
    )


if __name__ == "__main__" and not harness.serve_part(sys.argv[1:], {"costs": measure_costs}):
    main()
