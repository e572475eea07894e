"""Tables of trials whose results are known, for the benchmark of the score.

Each family gives a table with hyperparameters, signals of a short probe and, apart, the result of
full training. Three kinds:

- *real curves*: the probe is a tenth of a training (TaskSet, AlgoPerf);
- *real response surfaces*: results over seeds from tabular benchmarks; the probe is one seed with
  noise, and with a taste for some hyperparameters that the result does not share;
- *simulated image classifiers* on a grid or at random: an optimum of the learning rate, a cliff
  where training diverges, an interaction with weight decay, probes that like small weight decay and
  no dropout, and sharpness measures that follow the learning rate. `shift` draws another data set.
  File `scoring_networks` has two more.

The first two need `../shared/curves` beside the checkout.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from llp.scoring import Roles
from llp.scoring.ranks import Array, normal_scores
from tests.benchmarks.scoring_networks import networks, unstable

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "curves"
Made = tuple[pd.DataFrame, Roles, Array]
Family = Callable[[int, np.random.Generator], Made]

TASKSET_TENTH = 5
WORKLOADS = {
    "criteo1tb_embed_init": ("val_loss", -1),
    "fastmri": ("val_ssim", 1),
    "imagenet_resnet": ("val_accuracy", 1),
    "librispeech_conformer": ("val_wer", -1),
    "librispeech_deepspeech": ("val_wer", -1),
    "ogbg": ("val_mean_average_precision", 1),
    "wmt_glu_tanh": ("val_bleu", 1),
}
NETWORK = (
    ("alpha", np.logspace(-8, 0, 10)),
    ("batch_size", 2 ** np.linspace(2, 8, 10)),
    ("depth", np.arange(1, 4)),
    ("learning_rate", np.logspace(-5, 0, 10)),
    ("width", 2 ** np.linspace(4, 10, 10)),
)
"""Levels behind the digits of a configuration's key, in alphabetical order of the names."""
UNITS = 2 ** np.arange(4, 10)
FCNET = (
    ("activation_1", np.array(["relu", "tanh"])),
    ("activation_2", np.array(["relu", "tanh"])),
    ("batch_size", np.array([8, 16, 32, 64])),
    ("dropout_1", np.array([0.0, 0.3, 0.6])),
    ("dropout_2", np.array([0.0, 0.3, 0.6])),
    ("init_lr", np.array([5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1])),
    ("schedule", np.array(["constant", "cosine"])),
    ("units_1", UNITS),
    ("units_2", UNITS),
)
CELL = tuple((f"edge_{k}", np.array(list("abcde"))) for k in range(6))
SURFACES: dict[str, Any] = {
    "hpobench/car": NETWORK,
    "hpobench/kc1": NETWORK,
    "hpobench/phoneme": NETWORK,
    "hpobench/vehicle": NETWORK,
    "hpolib/parkinsons_telemonitoring": FCNET,
    "nasbench201/cifar10": CELL,
}


def real() -> bool:
    """Whether the real tables are there."""
    return (SHARED / "taskset_dev.npz").is_file()


def taskset(task: int, num: int, rng: np.random.Generator) -> Made:
    """Text classifiers by Adam with eight hyperparameters; the result is a test loss."""
    arrays = _arrays(str(SHARED / "taskset_dev.npz"))
    names = [str(name) for name in arrays["hp_names"]]
    rows = rng.choice(len(arrays[f"hp_{task}"]), num, replace=False)
    table = pd.DataFrame(arrays[f"hp_{task}"][rows].astype(float), columns=names)
    table["val_loss"] = arrays[f"valid_{task}"][rows, TASKSET_TENTH].astype(float)
    result = -np.nan_to_num(arrays[f"test_{task}"][rows, -1].astype(float), nan=3.0)
    return table, Roles(tuple(names), {"val_loss": "lower"}), np.maximum(result, -3.0)


def algoperf(workload: str, num: int, rng: np.random.Generator) -> Made:
    """Submissions to AlgoPerf with their hyperparameters; the probe is a tenth of the steps."""
    table, result = _algoperf(workload)
    rows = rng.choice(len(table), min(num, len(table)), replace=False)
    hyper = tuple(name for name in table if name != "probe")
    return table.iloc[rows].reset_index(drop=True), Roles(hyper, {"probe": "higher"}), result[rows]


def surface(task: str, num: int, rng: np.random.Generator) -> Made:
    """A real response surface, seen through a noisy and biased probe."""
    keys, runs = _runs(task)
    rows = rng.choice(len(keys), num, replace=False)
    levels = SURFACES[task]
    digits = np.array([[int(digit) for digit in keys[row]] for row in rows])
    table = pd.DataFrame({name: level[digits[:, k]] for k, (name, level) in enumerate(levels)})
    taste = _scaled((digits - digits.mean(axis=0)) @ rng.normal(size=len(levels)))
    quality = normal_scores(runs[rows, 0]) + rng.uniform(0, 0.6) * taste
    quality = quality + rng.uniform(0.3, 1.0) * rng.normal(size=num)
    table["val_acc"] = expit(quality)
    table["val_loss"] = -np.log(table["val_acc"]) + 0.05 * rng.normal(size=num)
    roles = Roles(tuple(n for n, _ in levels), {"val_acc": "higher", "val_loss": "lower"})
    return table, roles, np.nanmean(runs[rows, 1:], axis=1)


def classifiers(
    num: int,
    rng: np.random.Generator,
    *,
    grid: bool = True,
    shift: np.random.Generator | None = None,
) -> Made:
    """Simulated image classifiers; `shift` draws the data set, default: `rng`."""
    task = shift or rng
    if grid:
        rate = rng.choice([0.001, 0.0032, 0.01, 0.032, 0.1, 0.32], num)
        decay = rng.choice([0, 1e-4, 5e-4, 1e-3], num)
        width, depth = rng.choice([32, 64, 128, 160], num), rng.choice([2, 4, 8], num)
        dropout = rng.choice([0, 0.25, 0.5], num)
    else:
        rate, decay = 10 ** rng.uniform(-3.5, 0.3, num), 10 ** rng.uniform(-6, -2, num)
        width, depth = rng.choice([16, 32, 64, 128], num), rng.integers(1, 9, num)
        dropout = rng.uniform(0, 0.6, num)
    batch = rng.choice([32, 64, 128, 256], num)
    optimum = -1.8 + 0.5 * task.normal()
    size = task.uniform(0.5, 1.2, 6) * np.array([0.8, 0.3, 0.3, 0.5, 0.25, 0.3])
    deep, cliff = task.uniform(0, 0.8), optimum + 0.9 + 0.3 * task.normal()
    likes = task.uniform([0.1, 0, 0, 0.3], [0.6, 0.6, 2.0, 0.9])
    images = int(task.choice([1000, 5000]))

    step = np.log10(rate) - 0.5 * np.log10(batch / 64)
    logged = np.log10(decay + 1e-6)
    quality = -size[0] * (step - optimum) ** 2 + size[1] * (logged + 6) / 2
    quality -= size[2] * np.maximum(0, np.log10(rate) + logged + 3.6) ** 2
    quality += size[3] * np.log2(width / 32) / 1.5 + size[4] * np.minimum(1, depth / 4)
    quality -= size[4] * deep * (depth > 6) + size[5] * 8 * (dropout - 0.25) ** 2
    quality += 0.15 * np.log2(width / 32) * (step - optimum)
    risk = expit(8 * (step - cliff + 0.075 * (depth - 4)))
    expected = quality - 2.5 * risk
    quality = quality + 0.12 * rng.normal(size=num)
    diverged = rng.random(num) < risk
    quality = np.where(diverged, quality - rng.exponential(2.5, num), quality)

    seen = quality - likes[0] * np.maximum(0, optimum - step) - likes[1] * (logged + 6) / 2
    seen = seen - likes[2] * dropout + likes[3] * 0.8 * rng.normal(size=num)
    seen = np.where(diverged, seen + rng.exponential(1.0, num), seen)
    chance = 0.1 + 0.8 * expit(seen + 1.2)
    table = pd.DataFrame(
        {
            "lr": rate,
            "weight_decay": decay,
            "batch_size": batch,
            "width": width,
            "depth": depth,
            "dropout": dropout,
            "val_acc": rng.binomial(images, chance) / images,
            "val_loss": -np.log(chance) + 0.1 * rng.normal(size=num),
            "train_loss": np.exp(-seen - 0.5 + 0.2 * rng.normal(size=num)),
            "train_acc": np.clip(chance + 0.05, 0, 1),
            "sharpness": np.exp(-0.8 * np.log10(rate) - 0.3 * quality + 0.5 * rng.normal(size=num)),
            "norm": np.exp(
                0.7 * np.log10(rate) + 0.3 * np.log2(width) + 0.3 * rng.normal(size=num)
            ),
            "noise": rng.normal(size=num),
        }
    )
    roles = Roles(
        ("lr", "weight_decay", "batch_size", "width", "depth", "dropout"),
        {"val_acc": "higher", "val_loss": "lower", "train_loss": "lower", "train_acc": "higher"},
        {"sharpness": "unknown", "norm": "unknown", "noise": "unknown"},
    )
    table.attrs["noise_free"] = expected.tolist()
    return table, roles, 0.1 + 0.85 * expit(quality + 1.8)


def families() -> dict[str, list[Family]]:
    """Family -> its members, each of which draws a table of so many trials."""
    found: dict[str, list[Family]] = {
        "classifiers, grid": [functools.partial(classifiers, grid=True)] * 4,
        "classifiers, random": [functools.partial(classifiers, grid=False)] * 4,
        "networks": [networks] * 4,
        "unstable": [unstable] * 4,
    }
    if real():
        found["TaskSet"] = [functools.partial(taskset, task) for task in range(6)]
        found["AlgoPerf"] = [functools.partial(algoperf, name) for name in WORKLOADS]
        for kind in ("hpobench", "hpolib", "nasbench201"):
            own = [task for task in SURFACES if task.startswith(kind)]
            found[kind] = [functools.partial(surface, task) for task in own] * (4 // len(own))
    return found


def pairs() -> dict[str, list[tuple[Family, Family]]]:
    """Family -> pairs (earlier data set, new data set) with the same hyperparameters."""

    def another(grid: bool, seed: int) -> Family:
        def draw(num: int, rng: np.random.Generator) -> Made:
            return classifiers(num, rng, grid=grid, shift=np.random.default_rng(seed))

        return draw

    def networks_of(seed: int) -> Family:
        def draw(num: int, rng: np.random.Generator) -> Made:
            return networks(num, rng, shift=np.random.default_rng(seed), common=0)

        return draw

    found = {
        "networks": [(networks_of(k), networks_of(k + 50)) for k in range(6)],
        "classifiers, grid": [(another(True, k), another(True, k + 50)) for k in range(6)],
        "classifiers, random": [(another(False, k), another(False, k + 50)) for k in range(6)],
    }
    if real():
        found["TaskSet"] = [
            (functools.partial(taskset, k), functools.partial(taskset, (k + 1) % 6))
            for k in range(6)
        ]
        own = [task for task in SURFACES if task.startswith("hpobench")]
        found["hpobench"] = [
            (functools.partial(surface, a), functools.partial(surface, b))
            for a, b in zip(own, own[1:] + own[:1], strict=True)
        ]
    return found


@functools.cache
def _arrays(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


@functools.cache
def _algoperf(workload: str) -> tuple[pd.DataFrame, Array]:
    runs = pd.read_parquet(SHARED / "algoperf_dev_runs.parquet")
    curves = pd.read_parquet(SHARED / "algoperf_dev_curves.parquet").sort_values("global_step")
    column, sign = WORKLOADS[workload]
    by_run = dict(list(curves.groupby("run_id")))
    rows, results = [], []
    for run in runs[runs["workload"] == workload].itertuples():
        if run.run_id not in by_run:
            continue
        curve = by_run[run.run_id][["global_step", column]].dropna()
        if len(curve) < 5:
            continue
        early = curve[curve["global_step"] <= 0.1 * curve["global_step"].max()]
        probe = sign * (early if len(early) else curve.iloc[:1])[column].iloc[-1]
        rows.append({**json.loads(run.hparams), "submission": run.submission, "probe": probe})
        results.append(sign * curve[column].iloc[-1])
    return pd.DataFrame(rows), np.array(results)


@functools.cache
def _runs(task: str) -> tuple[list[str], Array]:
    table = pd.read_parquet(SHARED / "replicates_dev.parquet")
    table = table[table["task"] == task]
    runs = table.filter(like="seed").dropna(axis=1, how="all").to_numpy(dtype=float)
    if task.startswith("hpolib"):
        runs = -np.log(np.maximum(runs, 1e-6))  # a squared error
    return table["config_key"].astype(str).tolist(), np.where(np.isfinite(runs), runs, np.nan)


def _scaled(values: Array) -> Array:
    return np.asarray((values - values.mean()) / (values.std() or 1.0))
