"""How tier 1 scales over the GPUs of one host, trials sharing each GPU.

    python tests/benchmarks/scaling.py                  one GPU against two, four trials on each
    python tests/benchmarks/scaling.py --devices cpu    the same with one CPU against two
    python tests/benchmarks/scaling.py --quick          fewer and shorter trials

Claim: with twice the GPUs the same search does at least 1.8 times as many training examples a
second, and every GPU gets its share of the trials.

Every contender runs the same search in a process of its own: ResNet-20 on synthetic 3x32x32 images,
all trials on one rung, no early stopping. Throughput is taken from the study's ledger in the steady
state, while every worker has work: from the first point of the worker that reports last to the last
point of the worker that falls silent first. The whole phase, with Ray's and CUDA's start in it, is
given too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import harness
from harness import Bar


def main(arguments: list[str] | None = None) -> None:
    """Runs the search on every number of devices, prints the table and writes the JSON file."""
    options = parse(arguments)
    figures: dict[str, Any] = {
        "command": " ".join(["python", "tests/benchmarks/scaling.py", *sys.argv[1:]]),
        "quick": options.quick,
        "machine": harness.machine(),
        "runs": [],
    }
    for number in options.numbers:
        found, usage = harness.run_part(__file__, "search", part_options(options, number))
        figures["runs"].append({"num_devices": number, "seconds": usage.seconds, **found})
    runs = figures["runs"]
    base = runs[0]["samples_per_second"]
    harness.print_table(
        f"One search on more {options.devices.upper()}s",
        [options.devices, "workers", "samples/s", "against the first", "tier 1, s", "jobs on each"],
        [
            [
                run["num_devices"],
                run["num_workers"],
                f"{run['samples_per_second']:,.0f}",
                f"{run['samples_per_second'] / base:.2f}x",
                f"{run['tier1_seconds']:.0f}",
                json.dumps(run["jobs_per_device"]),
            ]
            for run in runs
        ],
    )
    factor = runs[-1]["num_devices"] / runs[0]["num_devices"]
    used = len(runs[-1]["jobs_per_device"])
    harness.finish(
        figures,
        [
            Bar(
                f"throughput on {factor:g} times the devices, as a share of {factor:g}",
                runs[-1]["samples_per_second"] / base / factor,
                0.9,
                at_most=False,
            ),
            Bar("devices that got jobs", used, runs[-1]["num_devices"], at_most=False),
        ],
        options.json,
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--devices", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2], help="devices to compare")
    parser.add_argument("--per-device", type=int, default=4, help="trials on one GPU at once [4]")
    return parser.parse_args(arguments)


def part_options(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """The experiment of one contender, the same but for the number of devices."""
    gpu = options.devices == "gpu"
    per_device = options.per_device if gpu else 1
    resources = (
        {"num_gpus": number, "gpus_per_trial": 1 / per_device}
        if gpu
        else {"num_gpus": 0, "num_cpus": number}
    )
    images = {"num_train": 45_000 if gpu else 3_000, "num_test": 1_000, "image_size": 32}
    num_trials = max(options.numbers) * per_device * (2 if options.quick else 4)
    return {
        "num_devices": number,
        "experiment": {
            "name": "scaling",
            "dataset": {"name": "synthetic", "options": images},
            "model": {"name": "resnet20"} if gpu else {"name": "convnet", "options": {"width": 8}},
            "training": {
                "epochs": 3 if options.quick else 6,
                "batch_size": 128,
                "augmentation": ["flip", "crop"],
            },
            "search_space": {"learning_rate": {"type": "loguniform", "low": 0.01, "high": 0.1}},
            "tier1": {
                "scheduler": "fifo",
                "num_trials": num_trials,
                "data_fractions": [1.0],
                "stop_rules": [],
            },
            "tier2": {
                "top_k": 1,
                "metrics": ["gradient_norm"],
                "refinements": [],
                "num_examples": 128,
            },
            "verification": {"top_k": 1, "num_seeds": 1, "epochs": 1},
            "resources": resources,
            "tracking": {"mlflow": False},
            "output": {"report": False},
        },
    }


# --- in the child processes -------------------------------------------------------------------


def part_search(experiment: dict[str, Any], num_devices: int) -> dict[str, Any]:
    """The search as `llp search` runs it, and what its ledger says of tier 1."""
    from llp import pipeline
    from llp.spec import load_spec
    from llp.tracking.ledger import read_events

    with tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder:
        experiment["output"]["root"] = folder
        result = pipeline.search(load_spec(experiment))
        events = list(read_events(Path(folder) / result.study_id))
    worker_of = {
        event["end"]["job_id"]: event["end"]["worker"]
        for event in events
        if event["event"] == "job_end" and event["kind"] == "probe"
    }
    points = [event for event in events if event["event"] == "point" and event["kind"] == "probe"]
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for event in points:
        worker = worker_of[event["job_id"]]
        first.setdefault(worker, event["time"])
        last[worker] = event["time"]
    begin, end = max(first.values()), min(last.values())
    samples, seen = 0, dict.fromkeys(worker_of, 0)
    for event in points:
        more = event["point"]["samples_seen"] - seen[event["job_id"]]
        seen[event["job_id"]] = event["point"]["samples_seen"]
        samples += more if begin < event["time"] <= end else 0
    return {
        "num_workers": len(first),
        "steady_seconds": end - begin,
        "samples_per_second": samples / (end - begin),
        "tier1_seconds": result.cost.seconds["tier1"],
        "tier1_samples": result.cost.tier1,
        "jobs_per_device": dict(sorted(Counter(map(device, worker_of.values())).items())),
    }


def device(worker: str) -> str:
    """`gpu 1` of `host pid 12 gpu 1`; a process is a device of its own where there is no GPU.

    >>> device("node pid 12 gpu 1"), device("node pid 12")
    ('gpu 1', 'pid 12')
    """
    pid, _, gpu = worker.partition(" pid ")[2].partition(" gpu ")
    return f"gpu {gpu}" if gpu else f"pid {pid}"


if __name__ == "__main__" and not harness.serve_part(sys.argv[1:], {"search": part_search}):
    main()
