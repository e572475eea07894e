"""What a rung of tier 1 should be: data or epochs, cold or warm, annealed, decayed or averaged.

    python tests/benchmarks/rungs.py [--data digits|cifar10] [--cache FILE] [--quick] [--json FILE]

Random configurations are trained fully with several seeds, and on two rungs by every variant of
`rung_variants` with the project's own loop. All variants pay the same on a rung. Trainings are
kept in a parquet file (`--cache`), so a rerun costs nothing and an interrupted run goes on.

Per variant: Kendall's tau of each rung's order (validation accuracy, ties by loss, as in tier 1)
with the mean test accuracy of the full trainings with the other seeds; its ceiling is the tau of a
full training itself. And a halving: all configurations on rung 1, the best third on rung 2, the
best third of those in full, the best on validation wins. Its regret is the distance, in points, to
the best mean test accuracy. Intervals (95 %) are by bootstrap over configurations and seeds;
"against default" is the paired difference in the same draws.

`prefix` is what Tune's ASHA looks at: the full training's own curve after so many epochs. The
default of the service is `cosine cold` on data fractions with 5 % warm-up.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
from harness import Bar
from rung_variants import CIFAR, DEFAULT, SHARED, VARIANTS, Variant
from scipy import stats

sys.path.insert(0, str(harness.ROOT))

DRAWS = 1000
KEPT = 3
"""One of so many goes on."""


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The command line."""
    built = harness.parser(__doc__ or "")
    built.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    built.add_argument("--configurations", type=int, default=0, help="[48, with --quick 9]")
    built.add_argument("--seeds", type=int, default=0, help="trainings of each [3, with --quick 2]")
    built.add_argument("--cache", type=Path, help="parquet file [llp_studies/rungs_DATA.parquet]")
    built.add_argument("--only", action="append", help="variants by name; default: all")
    built.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    found = built.parse_args(arguments)
    found.configurations = found.configurations or (9 if found.quick else 48)
    found.seeds = found.seeds or (2 if found.quick else 3)
    if found.quick:
        found.only = found.only or [DEFAULT, "cosine warm", "decay branch", "constant, EMA"]
        found.overrides = ["training.epochs=6", *found.overrides]
    kind = f"{found.data}{'_quick' if found.quick else ''}"
    found.cache = found.cache or Path("llp_studies") / f"rungs_{kind}.parquet"
    for name in found.only or ():
        if name not in {variant.name for variant in VARIANTS}:
            built.error(f"no variant '{name}'; there are: {', '.join(v.name for v in VARIANTS)}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what the cache lacks, prints the table and writes the JSON file."""
    options = parse(arguments)
    if options.data == "cifar10" and not (SHARED / "cifar10_train.parquet").exists():
        print(f"skipped: cifar10 slice, {SHARED / 'cifar10_train.parquet'} is not there")
        return
    variants = [v for v in VARIANTS if options.only is None or v.name in options.only]
    table = trained(options, variants)
    epochs = int(table.loc[table.variant == "full", "epoch"].max())
    rows = judged(table, [v.name for v in variants], epochs)
    show(rows, options)
    figures = {
        "command": " ".join(["python", "tests/benchmarks/rungs.py", *sys.argv[1:]]),
        "data": options.data, "configurations": options.configurations, "seeds": options.seeds,
        "machine": harness.machine(), "variants": rows,
    }  # fmt: skip
    harness.finish(figures, bars(rows), options.json)


def trained(options: Any, variants: Sequence[Variant]) -> pd.DataFrame:
    """The table of all trainings asked for; what is missing in the cache is trained and added."""
    from rung_trainings import Row, Trainer

    from llp.spec import load_spec
    from llp.workloads import load

    overrides = [*options.overrides, "seed=100"]
    if options.data == "cifar10":
        spec = load_spec("cifar10_small_cnn", [*CIFAR, *overrides])
    else:
        spec = load_spec("digits", overrides)
    data = load(spec.dataset, spec.seed)
    epochs = spec.training.epochs
    table = pd.read_parquet(options.cache) if options.cache.exists() else pd.DataFrame()
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    done = set() if table.empty else set(zip(table.variant, table.config, table.seed, strict=True))
    with tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder:
        trainer = Trainer(spec, data, Path(folder), (1 / epochs, 3 / epochs))
        for variant in [None, *variants]:
            name = "full" if variant is None else variant.name
            for seed in range(options.seeds):
                rows: list[Row] = []
                started = time.process_time()
                for config in range(options.configurations):
                    if (name, config, seed) in done:
                        continue
                    if variant is None:
                        rows += trainer.full(config, seed)
                    else:
                        rows += trainer.probe(variant, config, seed)
                trainer.clean()
                if rows:
                    new = pd.DataFrame(rows).drop(columns="checkpoint", errors="ignore")
                    table = pd.concat([table, new], ignore_index=True)
                    table.to_parquet(options.cache)
                    seconds = time.process_time() - started
                    print(f"{name:<32} seed {seed}  {seconds:6.0f} s of CPU", flush=True)
    wanted = table.config.lt(options.configurations) & table.seed.lt(options.seeds)
    return table[wanted]


def scores(table: pd.DataFrame, num_seeds: int) -> np.ndarray[Any, Any]:
    """[seeds, configurations]: rank by validation accuracy, ties by loss; larger is better."""
    table = table.sort_values(["seed", "config"])
    accuracy = table.validation_accuracy.to_numpy().reshape(num_seeds, -1)
    loss = np.nan_to_num(table.validation_loss.to_numpy().reshape(num_seeds, -1), nan=np.inf)
    order = np.lexsort((-loss, accuracy), axis=-1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None, :], axis=1)
    equal = (np.diff(np.take_along_axis(accuracy, order, 1)) == 0) & (
        np.diff(np.nan_to_num(np.take_along_axis(loss, order, 1), posinf=1e9)) == 0
    )
    for seed, each in enumerate(order):  # what is equal in both has one rank
        for k in np.flatnonzero(equal[seed]) + 1:
            ranks[seed, each[k]] = ranks[seed, each[k - 1]]
    return ranks.astype(float)


def judged(table: pd.DataFrame, names: Sequence[str], epochs: int) -> list[dict[str, Any]]:
    """A row per variant: tau of each rung, regret of the halving, intervals, cost."""
    num_seeds = table.seed.nunique()
    full = table[table.variant == "full"]
    ends = full[full.outcome != "running"].sort_values(["seed", "config"])
    test = ends.test_accuracy.to_numpy().reshape(num_seeds, -1)
    complete = scores(ends, num_seeds)
    cost_full = full.samples_seen.max()
    signals = {"full training": [complete]}
    costs = {"full training": [1.0]}
    for name in names:
        mine = table[table.variant == name]
        signals[name] = [scores(mine[mine.rung == rung], num_seeds) for rung in (1, 2)]
        costs[name] = [mine[mine.rung == r].samples_seen.max() / cost_full for r in (1, 2)]
    signals["prefix"] = [scores(prefix(full, epoch), num_seeds) for epoch in (1, 3)]
    costs["prefix"] = [1 / epochs, 3 / epochs]
    generator = np.random.default_rng(0)
    count = test.shape[1]
    draws = [(np.arange(num_seeds), np.arange(count))] + [
        (generator.integers(num_seeds, size=num_seeds), generator.integers(count, size=count))
        for _ in range(DRAWS)
    ]
    values = {
        name: np.array([figures(found, complete, test, *draw) for draw in draws])
        for name, found in signals.items()
    }
    return [row(name, values[name], values.get(DEFAULT), costs[name], count) for name in signals]


def prefix(full: pd.DataFrame, epoch: int) -> pd.DataFrame:
    """The point of each full training after `epoch` epochs; its last where it ended before."""
    before = full[full.epoch <= epoch].sort_values("epoch")
    return before.groupby(["seed", "config"], as_index=False).last()


def figures(
    signal: Sequence[np.ndarray[Any, Any]],
    complete: np.ndarray[Any, Any],
    test: np.ndarray[Any, Any],
    seeds: np.ndarray[Any, Any],
    configs: np.ndarray[Any, Any],
) -> list[float]:
    """Means over seeds: tau of rung 1, of rung 2, regret of the halving, of verifying 3."""
    found = []
    mean_test = test.mean(0)
    best = mean_test[configs].max()
    for seed in seeds:
        others = np.delete(test, seed, axis=0).mean(0)[configs]
        taus = [stats.kendalltau(rung[seed][configs], others).statistic for rung in signal]
        if len(signal) == 1:
            chosen = configs[np.argmax(complete[seed][configs])]
            regret = 100 * (best - mean_test[chosen])
            found.append([taus[0], taus[0], regret, regret])
            continue
        names = np.unique(configs)
        size = len(configs)
        second = top(names, signal[0][seed], size // KEPT)
        third = top(second, signal[1][seed], max(1, size // KEPT**2))
        halved = third[np.argmax(complete[seed][third])]
        three = top(names, signal[0][seed], 3)
        verified = three[np.argmax(complete[seed][three])]
        found.append([*taus, *(100 * (best - mean_test[k]) for k in (halved, verified))])
    return list(np.mean(found, axis=0))


def top(names: np.ndarray[Any, Any], score: np.ndarray[Any, Any], count: int) -> Any:
    """The `count` names with the best score."""
    return names[np.argsort(-score[names], kind="stable")][:count]


def row(name: str, values: Any, default: Any, costs: Sequence[float], count: int) -> dict[str, Any]:
    """The figures of a variant with their intervals, and the paired difference to the default."""
    made: dict[str, Any] = {"variant": name}
    for k, key in enumerate(("tau_rung1", "tau_rung2", "regret_halving", "regret_verify3")):
        low, high = np.nanquantile(values[1:, k], [0.025, 0.975])
        made[key] = {"value": float(values[0, k]), "low": float(low), "high": float(high)}
        if default is not None and name != DEFAULT:
            gap = values[:, k] - default[:, k]
            low, high = np.nanquantile(gap[1:], [0.025, 0.975])
            made[key]["against_default"] = [float(gap[0]), float(low), float(high)]
    made["cost_of_rungs"] = [float(cost) for cost in costs]
    if len(costs) == 2:
        second, third = count // KEPT, max(1, count // KEPT**2)
        made["cost_halving"] = count * costs[0] + second * costs[1] + third
        made["cost_verify3"] = count * costs[0] + 3
    else:
        made["cost_halving"] = made["cost_verify3"] = float(count)
    return made


def show(rows: Sequence[dict[str, Any]], options: Any) -> None:
    """Prints the table."""

    def cell(found: dict[str, Any], digits: int) -> str:
        return (
            f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
        )

    def against(found: dict[str, Any], digits: int) -> str:
        gap = found.get("against_default")
        return "" if gap is None else "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*gap, d=digits)

    harness.print_table(
        f"{options.data}: {options.configurations} configurations, {options.seeds} seeds",
        ["", "tau rung 1", "against default", "tau rung 2", "against default", "cost, full runs",
         "regret of halving", "against default", "regret of verify 3"],
        [
            [
                found["variant"],
                cell(found["tau_rung1"], 2), against(found["tau_rung1"], 2),
                cell(found["tau_rung2"], 2), against(found["tau_rung2"], 2),
                f"{found['cost_halving']:.1f}",
                cell(found["regret_halving"], 2), against(found["regret_halving"], 2),
                cell(found["regret_verify3"], 2),
            ]
            for found in rows
        ],
    )  # fmt: skip


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The default stays while no variant is surely better on both rungs at no more regret."""
    better = [
        found["variant"]
        for found in rows
        if "against_default" in found["tau_rung1"]
        and found["variant"] != "full training"
        and all(found[key]["against_default"][1] > 0 for key in ("tau_rung1", "tau_rung2"))
        and found["regret_halving"]["against_default"][0] <= 0
    ]
    if better:
        print("\nmeasurably better than the default: " + ", ".join(better))
    return [Bar("variants measurably better than the default", len(better), 0)]


if __name__ == "__main__":
    main()
