"""The full service on a third of the samples of Ray Tune's ASHA: is the winner as accurate?

    python tests/benchmarks/third.py [--data digits|cifar10] [--curves FILE] [--json FILE]

Side by side on every seed, each contender in a process of its own, one trial at a time:

- `asha`: Ray Tune's `ASHAScheduler` as in Ray's PyTorch tutorial (`grace_period=1`,
  `reduction_factor=2`, `max_t` = the recipe's epochs, the last reported validation accuracy
  chooses) over `tier1.num_trials` configurations, on all training data.
- `third`: `llp search` with `--share` (default 1/3) of the samples that ASHA saw: forecast stops,
  promotion over data fractions, one configuration or more trained in full at the end, whose
  samples are its own. `within` picks the largest search whose plan fits.
- `llp`: the experiment file as it is, at whatever that costs.

All draw the same configurations in the same order, with the same model, recipe, splits and loop.
Verified accuracy is, for everyone, the mean test accuracy of full trainings with fresh seeds that
no contender has used; these samples count for nobody. The curves are the verified accuracy of what
a contender would have answered after so many samples: for ASHA the best last report, for `llp` the
best validation accuracy on the highest rung with a result, later among the verified.
`--curves` writes them as parquet and, beside it, as a picture.

The claim holds on a data set when `third` is, on average over seeds, not below ASHA by more than
one test image, or half the standard error that the test images leave where that is more.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
from harness import Bar
from rung_variants import CIFAR, SHARED
from scipy import stats

SHARES = (1 / 6, 1 / 3, 1 / 2, 1.0, 1.5)
"""Of ASHA's samples: where the curves are read off; a contender's own end comes on top."""
CONTENDERS = ("asha", "third", "llp")
FRACTIONS = "[0.037, 0.111, 0.333]"
CIFAR_SEARCH = ("tier1.num_trials=27",)


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The command line."""
    built = harness.parser(__doc__ or "")
    built.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    built.add_argument("--seeds", type=int, default=0, help="number of seeds [5, with --quick 2]")
    built.add_argument("--fresh", type=int, default=3, help="full trainings that verify [3]")
    built.add_argument("--share", type=float, default=1 / 3, help="of ASHA's samples [1/3]")
    built.add_argument("--without-default", action="store_true", help="leave `llp` itself out")
    built.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    built.add_argument("--curves", type=Path, help="parquet file; the picture goes beside it")
    found = built.parse_args(arguments)
    found.seeds = found.seeds or (2 if found.quick else 5)
    found.contenders = CONTENDERS[: 2 if found.without_default else 3]
    if found.quick:
        found.overrides = ["training.epochs=6", "tier1.num_trials=12", *found.overrides]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every contender on every seed, prints the tables, writes curves and figures."""
    options = parse(arguments)
    if options.data == "cifar10" and not (SHARED / "cifar10_train.parquet").exists():
        print(f"skipped: cifar10 slice, {SHARED / 'cifar10_train.parquet'} is not there")
        return
    runs: list[dict[str, Any]] = [{"seed": seed} for seed in range(options.seeds)]
    for names in (CONTENDERS[:2], options.contenders[2:]):  # the claim first
        for run in runs:
            if names:
                add(run, names, options)
                keep([each for each in runs if "third" in each], options)
    summary = summarise(runs)
    show(summary, runs, options)
    figures = {
        "command": " ".join(["python", "tests/benchmarks/third.py", *sys.argv[1:]]),
        "data": options.data, "machine": harness.machine(), "runs": runs, "summary": summary,
    }  # fmt: skip
    harness.finish(figures, bars(summary, runs), options.json)


def keep(runs: Sequence[dict[str, Any]], options: Any) -> None:
    """Writes what is there so far, which outlives an interruption."""
    if options.curves:
        write_curves(runs, options)
        options.curves.with_suffix(".json").write_text(json.dumps(runs))


def add(run: dict[str, Any], names: Sequence[str], options: Any) -> None:
    """Runs contenders on the seed of `run`, and verifies every answer of theirs."""
    if options.data == "cifar10":
        spec, own = "cifar10_small_cnn", [*CIFAR, *CIFAR_SEARCH]
    else:
        spec, own = "digits", []
    given = {
        "spec": spec,
        "overrides": [
            *own, *options.overrides, f"seed={run['seed']}", "resources.num_cpus=1",
            "tracking.mlflow=false",
        ],
    }  # fmt: skip
    traces: dict[str, Any] = {}
    for name in names:
        part = "asha" if name == "asha" else "llp"
        extra = {"budget": options.share * run["asha"]["samples"]} if name == "third" else {}
        run[name], usage = harness.run_part(__file__, part, given | extra)
        run[name]["cpu_seconds"] = round(usage.cpu_seconds, 1)
        unit = run["asha"]["samples"]
        traces[name] = answers(run[name].pop("trace"), unit)
        run[name]["share"] = run[name]["samples"] / unit
    known = run.setdefault("verified", {})
    wanted = sorted({key for trace in traces.values() for _, key in trace} - known.keys())
    found, _ = harness.run_part(
        __file__, "verify", given | {"configurations": wanted, "count": options.fresh}
    )
    known |= found["accuracies"]
    run["num_test"] = found["num_test"]
    for name, trace in traces.items():
        run[name]["curve"] = [[at, known[key]] for at, key in trace]
        run[name]["accuracy"] = run[name]["curve"][-1][1]
        print(
            f"seed {run['seed']}  {name:<6} {100 * run[name]['accuracy']:.2f} % with "
            f"{run[name]['samples']:,} samples ({run[name]['share']:.2f}), "
            f"{run[name]['num_trials']} configurations",
            flush=True,
        )


def answers(trace: Sequence[Sequence[Any]], unit: float) -> list[tuple[float, str]]:
    """(share of `unit` spent, answer then): at every one of `SHARES` that was reached, and the end.

    Args:
        trace: (samples so far, configuration that would be answered), in order.
        unit: Samples that are a share of 1.

    >>> answers([[1, "a"], [4, "b"]], 12)
    [(0.16666666666666666, 'a'), (0.3333333333333333, 'b')]
    """
    found = []
    for share in SHARES:
        before = [key for samples, key in trace if samples <= share * unit + 1e-9]
        if before and share * unit < trace[-1][0]:
            found.append((share, before[-1]))
    return [*found, (trace[-1][0] / unit, trace[-1][1])]


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the paired differences to ASHA with a t interval."""
    summary: dict[str, Any] = {}
    names = [name for name in CONTENDERS if name in runs[0]]
    for name in names:
        rows = [run[name] for run in runs]
        gaps = [100 * (run[name]["accuracy"] - run["asha"]["accuracy"]) for run in runs]
        summary[name] = {
            key: statistics.fmean(row[key] for row in rows)
            for key in ("accuracy", "samples", "share", "num_trials", "cpu_seconds")
        } | {"difference": statistics.fmean(gaps), "interval": interval(gaps)}
    summary["mean_curves"] = {name: mean_curve([run[name] for run in runs]) for name in names}
    goal = summary["asha"]["accuracy"] - tolerance(runs)
    for name in names[1:]:
        reached = [share for share, value in summary["mean_curves"][name] if value >= goal]
        summary[name]["share_that_reaches_asha"] = reached[0] if reached else None
    return summary


def interval(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Student's interval of the mean; None from one value."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return [statistics.fmean(values) - reach, statistics.fmean(values) + reach]


def mean_curve(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Verified accuracy at each of `SHARES`, a contender that has ended keeping its last answer.

    The mean begins where every seed has an answer; the last point is the mean end.
    """
    found = []
    for share in SHARES:
        values = [[v for at, v in row["curve"] if at <= share + 1e-9] for row in rows]
        if all(values) and any(share < row["share"] for row in rows):
            found.append([share, statistics.fmean(each[-1] for each in values)])
    end = statistics.fmean(row["share"] for row in rows)
    found = [point for point in found if point[0] < end]
    return [*found, [end, statistics.fmean(row["accuracy"] for row in rows)]]


def tolerance(runs: Sequence[dict[str, Any]]) -> float:
    """Accuracies that are no further apart are the same: see the head of this file."""
    num = runs[0]["num_test"]
    level = statistics.fmean(run["asha"]["accuracy"] for run in runs)
    return max(1 / num, 0.5 * math.sqrt(level * (1 - level) / num))


def show(summary: dict[str, Any], runs: Sequence[dict[str, Any]], options: Any) -> None:
    """Prints the table of means and the mean curves."""
    rows = []
    for name in summary["mean_curves"]:
        found = summary[name]
        gap = found["interval"]
        rows.append([
            name, f"{found['num_trials']:.0f}", f"{found['samples']:,.0f}", f"{found['share']:.2f}",
            f"{100 * found['accuracy']:.2f}",
            f"{found['difference']:+.2f}" + (f" [{gap[0]:+.2f}, {gap[1]:+.2f}]" if gap else ""),
        ])  # fmt: skip
    harness.print_table(
        f"{options.data}: means over {len(runs)} seeds",
        ["", "configurations", "samples", "share of ASHA's", "verified, %", "minus ASHA, points"],
        rows,
    )
    harness.print_table(
        "Verified accuracy, %, after a share of ASHA's samples",
        ["", *(f"{share:.2f}" for share in SHARES), "end"],
        [
            [
                name,
                *(
                    next((f"{100 * v:.2f}" for at, v in points[:-1] if at == share), "")
                    for share in SHARES
                ),
                f"{100 * points[-1][1]:.2f}",
            ]
            for name, points in summary["mean_curves"].items()
        ],
    )


def bars(summary: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[Bar]:
    """The claim: as accurate with at most a third of the samples."""
    return [
        Bar("samples of third, as a share of ASHA's, largest of all seeds",
            max(run["third"]["share"] for run in runs), 0.334),
        Bar("verified accuracy of third minus that of ASHA, points",
            summary["third"]["difference"], round(-100 * tolerance(runs), 2), at_most=False),
    ]  # fmt: skip


def write_curves(runs: Sequence[dict[str, Any]], options: Any) -> None:
    """All curves as a parquet file, and a picture of them beside it."""
    from matplotlib.figure import Figure

    table = pd.DataFrame(
        [
            {"data": options.data, "seed": run["seed"], "contender": name,
             "share": at, "samples": at * run["asha"]["samples"], "verified_accuracy": value}
            for run in runs for name in CONTENDERS if name in run
            for at, value in run[name]["curve"]
        ]
    )  # fmt: skip
    options.curves.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(options.curves)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = {"asha": "#888888", "third": "#c0392b", "llp": "#1f5fa8"}
    labels = {"asha": "Ray Tune's ASHA", "third": f"llp, {options.share:.2f} of its samples"}
    for name in [name for name in CONTENDERS if any(name in run for run in runs)]:
        rows = [run[name] for run in runs if name in run]
        for row in rows:
            x, y = np.array(row["curve"]).T
            axes.step(x, 100 * y, where="post", color=colours[name], alpha=0.25, linewidth=1)
        x, y = np.array(mean_curve(rows)).T
        label = labels.get(name, "llp, its default")
        axes.step(x, 100 * y, where="post", color=colours[name], linewidth=2.2, label=label)
        axes.plot(x[-1], 100 * y[-1], "o", color=colours[name])
    axes.axvline(1 / 3, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("samples seen, as a share of ASHA's")
    axes.set_ylabel("verified test accuracy, %")
    every = 100 * table["verified_accuracy"]
    axes.set_ylim(max(every.min(), every.quantile(0.1) - 2), every.max() + 0.3)
    axes.set_title(f"{options.data}, {len(runs)} seeds: mean (thick) and single searches")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(options.curves.with_suffix(".png"), dpi=150)


# --- in the child processes -------------------------------------------------------------------


def within(spec: Any, budget: float) -> Any:
    """The largest search of `spec`'s configurations whose plan fits `budget` samples.

    Raises:
        ValueError: Not even three configurations fit.
    """
    from llp.pipeline import plan
    from llp.spec.schema import Spec
    from llp.workloads import load

    data = load(spec.dataset, spec.seed)
    for num_trials in range(spec.tier1.num_trials, 2, -1):
        plain = spec.model_dump(mode="json")
        plain["tier1"] |= {
            "num_trials": num_trials, "data_fractions": json.loads(FRACTIONS), "epochs": None,
        }  # fmt: skip
        plain["tier2"]["top_k"] = 0
        plain["verification"] |= {"top_k": 1, "num_seeds": 1}
        smaller = Spec.model_validate(plain)
        planned = plan(smaller, data)
        if planned.samples_tier1 + planned.samples_verification <= budget:
            return smaller
    raise ValueError(f"no search fits {budget:,.0f} samples")


def part_llp(spec: str, overrides: list[str], budget: float | None = None) -> dict[str, Any]:
    """`llp search`, as it is or within a budget; what it would have answered on the way."""
    from llp import pipeline
    from llp.spec import load_spec

    events: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder:
        loaded = load_spec(spec, [*overrides, f"output.root={folder}"])
        if budget is not None:
            loaded = within(loaded, budget)
        result = pipeline.search(loaded, on_event=events.append)
    configurations = {t.trial.trial_id: _key(t.trial.hyperparameters) for t in result.trials}
    assert result.winner is not None
    samples = result.cost.tier1 + result.cost.tier2 + result.cost.verification
    trace = [[at, configurations[name]] for at, name in llp_answers(events) if at <= samples]
    return {
        "samples": samples,
        "samples_by_phase": {
            "tier1": result.cost.tier1, "tier2": result.cost.tier2,
            "verification": result.cost.verification,
        },
        "num_trials": len(result.trials),
        "trace": [*trace, [samples, configurations[result.winner]]],
    }  # fmt: skip


def llp_answers(events: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """(samples so far, trial that would be answered) after every job, from a study's events."""
    found: list[tuple[int, str]] = []
    spent, best, verified = 0, (0, -1.0, 0.0), dict[str, list[float]]()
    answer = ""
    last: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "point":
            last[event["job_id"]] = event["point"]
        elif event["event"] == "profile":
            samples = event["profile"].get("samples")
            spent += round(samples) if samples and math.isfinite(samples) else 0
        elif event["event"] == "verification":
            run = event["verification"]
            verified.setdefault(run["trial_id"], []).append(run["validation_accuracy"])
        elif event["event"] == "job_end" and event["kind"] in ("probe", "verify"):
            end = event["end"]
            spent += end["samples_seen"]
            point = last.get(end["job_id"])
            if event["kind"] == "verify":
                if verified:
                    answer = max(verified, key=lambda name: statistics.fmean(verified[name]))
            elif end["outcome"] == "completed" and point is not None:
                place = (event["rung"], point["validation_accuracy"], -point["validation_loss"])
                if place > best:
                    best, answer = place, end["trial_id"]
        if answer and (not found or found[-1][1] != answer):
            found.append((spent, answer))
    return found


def part_asha(spec: str, overrides: list[str]) -> dict[str, Any]:
    """Ray Tune's ASHA over the first configurations of the search space, on all training data."""
    import search
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from llp.cluster.ray_tune import ray_session
    from llp.records import Rung
    from llp.spec import RandomSearch, load_spec
    from llp.training.objective import TrainingObjective
    from llp.workloads import load

    loaded = load_spec(spec, overrides)
    data = load(loaded.dataset, loaded.seed)
    rung = Rung(1, 1.0, len(data.train), loaded.training.epochs)
    source = RandomSearch(loaded.search_space, loaded.constraints, loaded.seed)
    draws = search.draws_within(10**15, source, full=rung.samples_seen, seed=loaded.seed)
    reports: list[tuple[int, str, float]] = []
    told = draws.on_trial_result

    def noted(trial_id: str, result: dict[str, Any]) -> None:
        told(trial_id, result)
        if "validation_accuracy" in result:
            reports.append((draws.spent(), trial_id, result["validation_accuracy"]))

    draws.on_trial_result = noted
    with (
        tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder,
        ray_session(num_cpus=1, num_gpus=0),
    ):
        objective = TrainingObjective(loaded, data.without_test(), folder, threads=1)
        results = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(search.train, objective=objective, rung=rung), {"cpu": 1}
            ),
            tune_config=tune.TuneConfig(
                metric="validation_accuracy", mode="max", search_alg=draws,
                scheduler=ASHAScheduler(max_t=rung.epochs, grace_period=1, reduction_factor=2),
                num_samples=loaded.tier1.num_trials, reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()  # fmt: skip
        chosen = results.get_best_result()
    names = {result.metrics["trial_id"]: result.config for result in results}
    keys = {
        name: _key({k: v for k, v in config.items() if k != "trial_seed"})
        for name, config in names.items()
    }
    now: dict[str, float] = {}
    trace: list[list[Any]] = []
    for spent, name, accuracy in reports:
        now[name] = accuracy
        best = max(now, key=lambda each: now[each])
        if not trace or trace[-1][1] != keys[best]:
            trace.append([spent, keys[best]])
    assert results.num_errors == 0, results.errors
    return {
        "samples": draws.spent(),
        "num_trials": len(results),
        "trace": [*trace, [draws.spent(), keys[chosen.metrics["trial_id"]]]],
    }


def part_verify(
    spec: str, overrides: list[str], configurations: list[str], count: int
) -> dict[str, Any]:
    """Mean test accuracy of each configuration over full trainings with seeds nobody has used."""
    from llp.driver import derived_seed
    from llp.records import Trial, Verification
    from llp.spec import load_spec
    from llp.training.full import full_job, run_here
    from llp.training.objective import TrainingObjective
    from llp.workloads import load

    loaded = load_spec(spec, overrides)
    data = load(loaded.dataset, loaded.seed)
    found = {}
    with tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder:
        objective = TrainingObjective(loaded, data, folder, threads=1)
        for number, key in enumerate(configurations):
            trial = Trial(f"w{number}", json.loads(key), 0)
            accuracies = []
            for k in range(count):
                seed = derived_seed(loaded.seed, 9, k)
                job = full_job(loaded, trial, k, seed=seed, num_train=len(data.train))
                reports: list[Any] = []
                end = run_here(objective, job, reports.append)
                tests = [each for each in reports if isinstance(each, Verification)]
                if end.outcome not in ("completed", "diverged"):
                    raise RuntimeError(end.failure)
                accuracies.append(tests[0].test_accuracy if tests else 1 / data.num_classes)
            found[key] = statistics.fmean(accuracies)
    assert data.test is not None
    return {"accuracies": found, "num_test": len(data.test)}


def _key(hyperparameters: Any) -> str:
    return json.dumps(dict(hyperparameters), sort_keys=True)


if __name__ == "__main__" and not harness.serve_part(
    sys.argv[1:], {"llp": part_llp, "asha": part_asha, "verify": part_verify}
):
    main()
