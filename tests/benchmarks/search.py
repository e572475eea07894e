"""The main job against plain Ray Tune: what a winner costs, and how good it is.

    python tests/benchmarks/search.py            three seeds; wants two quiet cores
    python tests/benchmarks/search.py --quick    one seed of a smaller search, under two minutes

Claim: for the same number of training examples, `llp search` ends with a winner at least as
accurate as that of plain Ray Tune, with its accuracy verified, in under 2 minutes and 3 GB on two
cores.

Contenders, each in a process of its own, one after the other, on the same CPUs:

- `llp`: everything `llp search search_spaces/digits.yaml` does: Ray's start, three tiers, the page
  and MLflow included.
- `asha`: Ray Tune's `ASHAScheduler` on a function trainable that trains on all the training data,
  set up as Ray's PyTorch tutorial does (`max_t` = the recipe's epochs, `grace_period=1`,
  `reduction_factor=2`, the last reported validation accuracy chooses), then the best configuration
  trained in full.
- `random`: the same without a scheduler: every configuration gets the full training.

Fair play: model, recipe, splits and training loop are the same code. The peers draw the very
configurations that `llp` draws, in the same order, until starting another would take them beyond
what `llp` spent in all (probes, refinements and verification) less their own final trainings; what
they really saw is in the table. They run with `reuse_actors=True`, which is faster than Tune's
default (`--fresh-actors` gives the default). Everyone's winner is trained in full with the same
seeds, choosing sees training and validation images only, and the test split is read at the end.
Regret is the distance to the best configuration that any contender verified on the same split.
`third.py` gives `llp` a third of the samples that ASHA takes for as many configurations.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
from harness import Bar, Usage, gigabytes

SPEC = harness.ROOT / "search_spaces" / "digits.yaml"
CONTENDERS = ("llp", "asha", "random")
CPUS = 2
QUICK = (
    "training.epochs=8",
    "tier1.num_trials=18",
    "tier2.top_k=1",
    "verification.top_k=2",
    "verification.num_seeds=2",
)


def main(arguments: list[str] | None = None) -> None:
    """Runs every contender on every seed, prints the table and writes the JSON file."""
    options = parse(arguments)
    figures: dict[str, Any] = {
        "command": " ".join(["python", "tests/benchmarks/search.py", *sys.argv[1:]]),
        "quick": options.quick,
        "machine": harness.machine(),
        "runs": [run_seed(options, seed) for seed in range(options.seeds)],
    }
    figures["summary"] = summarise(figures["runs"])
    show(figures["summary"], figures["runs"])
    harness.finish(figures, bars(figures["summary"], figures["runs"]), options.json)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--spec", type=Path, default=SPEC, help="experiment file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seeds", type=int, help="number of seeds [3, with --quick 1]")
    parser.add_argument("--cpus", type=int, default=CPUS, help="CPUs of every contender [2]")
    parser.add_argument("--fresh-actors", action="store_true", help="Tune's default for the peers")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (1 if options.quick else 3)
    if options.quick:
        options.overrides = [*QUICK, *options.overrides]
    return options


def run_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All contenders on one seed: contender -> its row."""
    rows: dict[str, Any] = {}
    budget = 0
    for name in CONTENDERS:
        given = {
            "spec": str(options.spec),
            "overrides": [*options.overrides, f"seed={seed}", f"resources.num_cpus={options.cpus}"],
        }
        if name != "llp":
            given |= {"scheduler": name, "budget": budget, "reuse": not options.fresh_actors}
        found, usage = harness.run_part(__file__, "llp" if name == "llp" else "peer", given)
        rows[name] = found | _usage(usage)
        budget = rows["llp"]["samples_seen"]
        print(
            f"seed {seed}  {name:<7} {usage.seconds:6.0f} s  {found['samples_seen']:>9,} samples  "
            f"{found['num_trials']} configurations  test {100 * found['test_accuracy']:.2f} %",
            flush=True,
        )
    best = max(value for row in rows.values() for value in row["verified"].values())
    for row in rows.values():
        row["regret_points"] = 100 * (best - row["test_accuracy"])
    return rows


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "seconds": round(usage.seconds, 1),
        "cpu_seconds": round(usage.cpu_seconds, 1),
        "peak_memory_gb": gigabytes(usage.peak_pss_bytes),
        "peak_memory_rss_gb": gigabytes(usage.peak_rss_bytes),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Contender -> means over seeds, with the standard error of the accuracy."""
    summary = {}
    for name in CONTENDERS:
        rows = [run[name] for run in runs]
        accuracies = [row["test_accuracy"] for row in rows]
        summary[name] = {
            key: statistics.fmean(row[key] for row in rows)
            for key in (
                "seconds",
                "cpu_seconds",
                "samples_seen",
                "num_trials",
                "test_accuracy",
                "regret_points",
            )
        } | {
            "seconds_max": max(row["seconds"] for row in rows),
            "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
            "peak_memory_rss_gb": max(row["peak_memory_rss_gb"] for row in rows),
            "test_accuracy_standard_error": statistics.stdev(accuracies) / math.sqrt(len(rows))
            if len(rows) > 1
            else None,
        }
        for key in ("seconds", "cpu_seconds", "samples_seen", "peak_memory_gb"):
            summary[name][f"{key}_ratio_to_llp"] = summary[name][key] / summary["llp"][key]
    return summary


def show(summary: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Prints the table of means; ratios are peer over `llp`."""
    rows = []
    for name, row in summary.items():
        error = row["test_accuracy_standard_error"]
        rows.append(
            [
                name,
                f"{row['seconds']:.0f} ({row['seconds_ratio_to_llp']:.2f}x)",
                f"{row['cpu_seconds']:.0f} ({row['cpu_seconds_ratio_to_llp']:.2f}x)",
                f"{row['peak_memory_gb']:.2f} ({row['peak_memory_gb_ratio_to_llp']:.2f}x)",
                f"{row['samples_seen']:,.0f} ({row['samples_seen_ratio_to_llp']:.2f}x)",
                f"{row['num_trials']:.0f}",
                f"{100 * row['test_accuracy']:.2f}" + (f" +- {100 * error:.2f}" if error else ""),
                f"{row['regret_points']:.2f}",
            ]
        )
    header = ["", "seconds", "CPU seconds", "peak GB", "samples seen", "configurations"]
    harness.print_table(
        f"Means over {len(runs)} seed{'s' if len(runs) > 1 else ''} (x: relative to llp)",
        [*header, "test accuracy, %", "regret, points"],
        rows,
    )


def bars(summary: dict[str, Any], runs: list[dict[str, Any]]) -> list[Bar]:
    """The limits: those of the main job, equal budgets, and no less accurate than a peer.

    Accuracies closer than one test image cannot be told apart even on one seed.
    """
    one_image = 100 / min(run["llp"]["num_test_examples"] for run in runs)
    peers = [name for name in CONTENDERS if name != "llp"]
    samples = min(summary[name]["samples_seen_ratio_to_llp"] for name in peers)
    return [
        Bar("seconds of the main job, slowest seed", summary["llp"]["seconds_max"], 120),
        Bar("peak memory of the main job, GB", summary["llp"]["peak_memory_gb"], 3),
        Bar("samples seen by a peer, as a share of ours", samples, 0.9, at_most=False),
        *(
            Bar(
                f"test accuracy of llp minus that of {name}, points",
                100 * (summary["llp"]["test_accuracy"] - summary[name]["test_accuracy"]),
                -round(one_image, 2),
                at_most=False,
            )
            for name in peers
        ),
    ]


# --- in the child processes -------------------------------------------------------------------


def part_llp(spec: str, overrides: list[str]) -> dict[str, Any]:
    """The main job, as `llp search` runs it."""
    from llp import pipeline
    from llp.spec import load_spec

    with tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder:
        result = pipeline.search(load_spec(Path(spec), [*overrides, f"output.root={folder}"]))
    by_trial: dict[str, list[float]] = {}
    for run in result.verifications:
        by_trial.setdefault(run.trial_id, []).append(run.test_accuracy)
    configurations = {t.trial.trial_id: dict(t.trial.hyperparameters) for t in result.trials}
    means = {trial_id: statistics.fmean(values) for trial_id, values in by_trial.items()}
    assert result.winner is not None
    cost = result.cost
    return {
        "test_accuracy": means[result.winner],
        "test_accuracies": by_trial[result.winner],
        "num_test_examples": result.verifications[0].num_test_examples,
        "samples_seen": cost.tier1 + cost.tier2 + cost.verification,
        "samples_by_phase": {
            "tier1": cost.tier1,
            "tier2": cost.tier2,
            "verification": cost.verification,
        },
        "seconds_by_phase": dict(cost.seconds),
        "num_trials": len(result.trials),
        "winner": configurations[result.winner],
        "verified": {_key(configurations[name]): mean for name, mean in means.items()},
    }


def part_peer(
    spec: str, overrides: list[str], scheduler: str, budget: int, reuse: bool
) -> dict[str, Any]:
    """Plain Tune within `budget` samples: choose, then train the choice in full."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    from llp.cluster.ray_tune import ray_session
    from llp.driver import derived_seed
    from llp.records import Rung
    from llp.spec import RandomSearch, load_spec
    from llp.training.objective import TrainingObjective
    from llp.workloads import load

    loaded = load_spec(Path(spec), overrides)
    data = load(loaded.dataset, loaded.seed)
    epochs = loaded.verification.epochs or loaded.training.epochs
    seeds = [derived_seed(loaded.seed, 2, k) for k in range(loaded.verification.num_seeds)]
    final = len(seeds) * epochs * len(data.train)
    rung = Rung(1, 1.0, len(data.train), loaded.training.epochs)
    with (
        tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder,
        ray_session(num_cpus=loaded.resources.num_cpus, num_gpus=0),
    ):
        run_config = {"storage_path": folder, "verbose": 0}
        draws = draws_within(
            budget - final,
            RandomSearch(loaded.search_space, loaded.constraints, loaded.seed),
            full=rung.samples_seen,
            seed=loaded.seed,
        )
        objective = TrainingObjective(loaded, data.without_test(), folder, threads=1)
        results = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(train, objective=objective, rung=rung), {"cpu": 1}
            ),
            tune_config=tune.TuneConfig(
                metric="validation_accuracy",
                mode="max",
                search_alg=draws,
                scheduler=ASHAScheduler(max_t=rung.epochs, grace_period=1, reduction_factor=2)
                if scheduler == "asha"
                else FIFOScheduler(),
                num_samples=-1,
                reuse_actors=reuse,
            ),
            run_config=tune.RunConfig(**run_config),
        ).fit()
        best = results.get_best_result().config
        verifications = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(
                    train_fully, objective=TrainingObjective(loaded, data, folder, threads=1)
                ),
                {"cpu": 1},
            ),
            param_space={"seed": tune.grid_search(seeds), "hyperparameters": best},
            tune_config=tune.TuneConfig(metric="test_accuracy", mode="max", reuse_actors=reuse),
            run_config=tune.RunConfig(**run_config),
        ).fit()
    runs = [result.metrics for result in verifications]
    hyperparameters = {key: value for key, value in best.items() if key != "trial_seed"}
    accuracies = [run["test_accuracy"] for run in runs]
    verification = sum(run["samples_seen"] for run in runs)
    mean = statistics.fmean(accuracies)
    return {
        "test_accuracy": mean,
        "test_accuracies": accuracies,
        "num_test_examples": runs[0]["num_test_examples"],
        "samples_seen": draws.spent() + verification,
        "samples_by_phase": {"search": draws.spent(), "verification": verification},
        "num_trials": len(results),
        "num_errors": results.num_errors + verifications.num_errors,
        "winner": hyperparameters,
        "verified": {_key(hyperparameters): mean},
    }


def train(config: dict[str, Any], objective: Any, rung: Any) -> None:
    """The function trainable: one configuration on all the training data, epoch by epoch."""
    from ray import tune

    from llp.records import Job, Trial

    hyperparameters = {key: value for key, value in config.items() if key != "trial_seed"}
    seed = config["trial_seed"]
    name = tune.get_context().get_trial_id()
    work = objective(Job(name, "probe", Trial(name, hyperparameters, seed), rung, seed))
    while True:
        try:
            point = next(work)
        except StopIteration as stop:
            end = stop.value
            break
        tune.report(
            {
                "validation_accuracy": point.validation_accuracy,
                "samples_seen": point.samples_seen,
            }
        )
    if end.outcome != "completed":  # diverged: the worst result, and what it cost
        tune.report({"validation_accuracy": 0.0, "samples_seen": end.samples_seen})


def train_fully(config: dict[str, Any], objective: Any) -> None:
    """The function trainable of the final trainings: reads the test split, once."""
    from ray import tune

    from llp.records import Job, Rung, Trial, Verification

    name, seed = tune.get_context().get_trial_id(), config["seed"]
    hyperparameters = {k: v for k, v in config["hyperparameters"].items() if k != "trial_seed"}
    job = Job(name, "verify", Trial(name, hyperparameters, seed), Rung(1, 1.0, 1, 1), seed)
    for report in objective(job):
        if isinstance(report, Verification):
            tune.report(
                {
                    "test_accuracy": report.test_accuracy,
                    "num_test_examples": report.num_test_examples,
                    "samples_seen": report.samples_seen,
                }
            )


def draws_within(budget: int, source: Any, *, full: int, seed: int) -> Any:
    """A Tune searcher: the draws of `source` in order, as long as another one fits the budget.

    What a trial will still take is expected to be what finished trials took on average; `full`
    until one has finished. So a scheduler that stops trials early gets more of them.
    """
    from ray.tune.search import Searcher

    from llp.driver import derived_seed

    class DrawsWithin(Searcher):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(metric="validation_accuracy", mode="max")
            self._seen: dict[str, int] = {}
            self._finished: list[int] = []
            self._running: set[str] = set()

        def set_search_properties(self, *_: Any, **__: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            expected = statistics.fmean(self._finished) if self._finished else full
            to_come = sum(max(expected - self._seen[name], 0) for name in self._running)
            if self.spent() + to_come + expected > budget:
                return None if self._running else Searcher.FINISHED
            index = len(self._seen)
            self._seen[trial_id] = 0
            self._running.add(trial_id)
            return source.suggest(index) | {"trial_seed": derived_seed(seed, 1, index)}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            self._seen[trial_id] = max(self._seen[trial_id], result.get("samples_seen", 0))

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            self.on_trial_result(trial_id, result or {})
            self._running.discard(trial_id)
            self._finished.append(self._seen[trial_id])

        def spent(self) -> int:
            return sum(self._seen.values())

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).write_text("{}")

        def restore(self, checkpoint_path: str) -> None:
            raise RuntimeError("a benchmark is not resumed")

    return DrawsWithin()


def _key(hyperparameters: dict[str, Any]) -> str:
    return json.dumps(hyperparameters, sort_keys=True)


if __name__ == "__main__" and not harness.serve_part(
    sys.argv[1:], {"llp": part_llp, "peer": part_peer}
):
    main()
