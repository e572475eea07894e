"""What the engine adds to the bare training loop, per trial and at start-up.

    python tests/benchmarks/overhead.py            64 trials; wants two quiet cores
    python tests/benchmarks/overhead.py --quick    fewer and shorter trials, under two minutes

Claim: a trial costs at most 0.5 s of CPU on top of its training, trials of 10 s lose at most 3 % of
their wall time, 64 short trials run at least 5 times faster than as plain Ray Tune function
trainables, and `llp --help` answers in under half a second.

Everything is measured on the real path: `pipeline.probes` as the source of jobs (searcher,
scheduler, fsynced ledger), `cluster.ray_tune.run_jobs` as the engine, `TrainingObjective` as the
work. The peers do the same jobs with the same objective:

- `bare`: as many processes as the engine has workers, each looping over its share of the jobs.
- `function`: a Ray Tune function trainable, Tune's defaults: a new process for every trial.
- `function, reused`: the same with `reuse_actors=True`, which Tune's documentation leaves off.

*Steady state* is the time during which every worker had work: from when the last worker starts
its first job to when the first worker finds nothing left to do. A worker's *lost* time is what it
spends outside the objective then: waiting for the driver to take a report, hand out a job, write
the ledger. CPU seconds are those of the whole process tree, Ray's own processes included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from harness import Bar, gigabytes
from timing import Timed, run_to_end, spans_of, steady

WORKERS = 2
LONG_EPOCHS = 20  # as many reports as the default recipe makes
UNCALIBRATED_IMAGES = 2000
LONG_SECONDS = 10.0  # the length the limits are about


def main(arguments: list[str] | None = None) -> None:
    """Measures every part, prints the tables and writes the JSON file."""
    options = parse(arguments)
    figures: dict[str, Any] = {
        "command": " ".join(["python", "tests/benchmarks/overhead.py", *sys.argv[1:]]),
        "quick": options.quick,
        "machine": harness.machine(),
        "start": measure_start(1 if options.quick else 7, peers=not options.quick),
        "short": measure_short(options.trials, options.function_trials, reused=not options.quick),
        "long": measure_long(options.long_trials, options.long_seconds),
    }
    figures["start"]["ray_seconds"] = figures["short"]["engine"]["ray_seconds"]
    show(figures)
    harness.finish(figures, bars(figures), options.json)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--trials", type=int, help="short trials [64, with --quick 32]")
    parser.add_argument(
        "--function-trials", type=int, help="as function trainables [as many, with --quick 8]"
    )
    parser.add_argument("--long-trials", type=int, help="long trials [8, with --quick 4]")
    parser.add_argument(
        "--long-seconds",
        type=float,
        help="length of each [10]; --quick takes a few seconds and does not calibrate",
    )
    options = parser.parse_args(arguments)
    options.trials = options.trials or (32 if options.quick else 64)
    options.function_trials = options.function_trials or (8 if options.quick else options.trials)
    options.long_trials = options.long_trials or (4 if options.quick else 8)
    options.long_seconds = options.long_seconds or (None if options.quick else LONG_SECONDS)
    if min(options.trials, options.long_trials) < 2 * WORKERS:
        parser.error(f"at least {2 * WORKERS} trials are needed for a steady state")
    return options


def measure_start(repeats: int, *, peers: bool) -> dict[str, Any]:
    """Wall-clock seconds of the commands' help and of imports, medians."""
    python = [sys.executable]
    tools = Path(sys.executable).parent
    commands = {
        "python -c pass": [*python, "-c", "pass"],
        "llp --help": [*python, "-m", "llp.cli", "--help"]
        if not (tools / "llp").exists()
        else [str(tools / "llp"), "--help"],
        "import llp.pipeline": [*python, "-c", "import llp.pipeline"],
    }
    for peer in ("tune", "mlflow") if peers else ():
        if (tools / peer).exists():
            commands[f"{peer} --help"] = [str(tools / peer), "--help"]
    return {
        "seconds": {
            name: round(harness.wall_seconds(command, repeats=repeats), 3)
            for name, command in commands.items()
        },
        "repeats": repeats,
    }


def measure_short(num_trials: int, num_function: int, *, reused: bool) -> dict[str, Any]:
    """Trials of a fraction of a second: engine, bare loop, and Tune function trainables."""
    given, to_function = {"spec": short_spec(num_trials)}, {"spec": short_spec(num_function)}
    contenders = {
        "bare": ("bare", given),
        "engine": ("engine", given),
        "function": ("function", to_function | {"reuse": False}),
    }
    if reused:
        contenders["function, reused"] = ("function", to_function | {"reuse": True})
    found: dict[str, Any] = {}
    for name, (part, options) in contenders.items():
        row, usage = harness.run_part(__file__, part, options)
        row["seconds_per_trial"] = row["seconds"] / row["num_jobs"]
        row["tree_cpu_seconds"] = round(usage.cpu_seconds, 2)
        row["tree_peak_memory_gb"] = gigabytes(usage.peak_pss_bytes)
        found[name] = row
        print(f"{row['num_jobs']} short trials, {name}: {row['seconds']:.1f} s", flush=True)
    engine, bare = found["engine"], found["bare"]
    found["cpu_seconds_per_trial"] = engine["cpu_seconds_per_job"] - bare["cpu_seconds_per_job"]
    found["wall_seconds_per_trial"] = (
        engine["worker_seconds_per_job"] - bare["worker_seconds_per_job"]
    )
    found["cpu_seconds_per_trial_with_start"] = (
        engine["tree_cpu_seconds"] / num_trials - bare["cpu_seconds_per_job"]
    )
    found["memory_per_worker_bytes"] = engine["worker_memory_bytes"] - bare["worker_memory_bytes"]
    for row in (found[name] for name in contenders):
        row["ratio_to_engine"] = row["seconds_per_trial"] / engine["seconds_per_trial"]
    return found | {"contenders": list(contenders)}


def measure_long(num_trials: int, seconds: float | None) -> dict[str, Any]:
    """Trials of about `seconds`: the engine, and the bare loop before and after it.

    Without `seconds` the length is what comes of `UNCALIBRATED_IMAGES`, and the second bare run,
    which tells how steady the machine was, is left out.
    """
    num_images = UNCALIBRATED_IMAGES
    if seconds is not None:
        calibration, _ = harness.run_part(
            __file__, "bare", {"spec": long_spec(2 * WORKERS, num_images)}
        )
        num_images = max(100, round(num_images * seconds / calibration["worker_seconds_per_job"]))
    given = {"spec": long_spec(num_trials, num_images)}
    bares = [harness.run_part(__file__, "bare", given)[0]]
    engine, _ = harness.run_part(__file__, "engine", given)
    if seconds is not None:
        bares.append(harness.run_part(__file__, "bare", given)[0])
    for run in (engine, *bares):  # too few jobs after the warm-up to say
        run.pop("cpu_seconds_per_job")
    engine.pop("cpu_seconds_per_job_by_process")
    bare = statistics.fmean(run["worker_seconds_per_job"] for run in bares)
    print(f"{num_trials} long trials, engine: {engine['seconds']:.1f} s", flush=True)
    return {
        "trial_seconds": bare,
        "reports_per_trial": LONG_EPOCHS,
        "engine": engine,
        "bare": bares,
        "lost_share": engine["lost_share"],
        "lost_seconds_per_trial": engine["lost_share"] * engine["worker_seconds_per_job"],
        "extra_share": engine["worker_seconds_per_job"] / bare - 1,
    }


def show(figures: dict[str, Any]) -> None:
    """Prints what was measured."""
    start, short, long = figures["start"], figures["short"], figures["long"]
    floor = start["seconds"]["llp --help"]
    harness.print_table(
        f"Start-up (median of {start['repeats']})",
        ["", "seconds", "relative to llp --help"],
        [[k, f"{v:.2f}", f"{v / floor:.1f}x"] for k, v in start["seconds"].items()]
        + [["ray.init, local", f"{start['ray_seconds']:.2f}", ""]],
    )
    engine, bare = short["engine"], short["bare"]
    rows = []
    for name in short["contenders"]:
        row = short[name]
        rows.append(
            [
                name,
                f"{row['num_jobs']}",
                f"{row['seconds']:.1f}",
                f"{1 / row['seconds_per_trial']:.2f}",
                f"{row['ratio_to_engine']:.2f}x",
                f"{row['tree_cpu_seconds'] / row['num_jobs']:.2f}",
                f"{row['num_processes']}",
                f"{row['tree_peak_memory_gb']:.2f}",
                f"{row['num_failed']}",
            ]
        )
    harness.print_table(
        f"Short trials of {bare['worker_seconds_per_job']:.2f} s on {WORKERS} workers "
        "(Ray is up before, Tune's workers are not)",
        [
            "",
            "trials",
            "seconds",
            "trials/s",
            "time per trial",
            "CPU s/trial with start",
            "processes",
            "GB in all",
            "failed",
        ],
        rows,
    )
    rows = [
        [kind, *(f"{value / unit:.3f}" for value in (bare[key], engine[key], short[added]))]
        for kind, key, added, unit in (
            ("CPU seconds", "cpu_seconds_per_job", "cpu_seconds_per_trial", 1),
            ("worker seconds", "worker_seconds_per_job", "wall_seconds_per_trial", 1),
            ("memory of a worker, GB", "worker_memory_bytes", "memory_per_worker_bytes", 1e9),
        )
    ]
    harness.print_table("Per short trial, steady state", ["", "bare", "engine", "added"], rows)
    split = ", ".join(f"{k} {v:.3f}" for k, v in engine["cpu_seconds_per_job_by_process"].items())
    print(
        f"CPU seconds per trial by process: {split}\n"
        f"first job after {engine['first_job_seconds']:.1f} s, "
        f"end {engine['after_last_job_seconds']:.1f} s after the last job"
    )
    harness.print_table(
        f"Trials of {long['trial_seconds']:.1f} s with {LONG_EPOCHS} reports each, steady state",
        ["", "of wall time"],
        [
            ["workers outside the objective", f"{100 * long['lost_share']:.2f} %"],
            ["the same, seconds a trial", f"{long['lost_seconds_per_trial']:.3f} s"],
            ["slower than bare processes", f"{100 * long['extra_share']:.2f} %"],
        ],
    )


def bars(figures: dict[str, Any]) -> list[Bar]:
    """The limits.

    What a trial loses depends on its number of reports and not on its length, so shorter trials
    say what one of 10 s would lose. What contention costs grows with the length; that is compared
    with bare processes only when these ran before and after, so that a busy machine shows.
    """
    short, long = figures["short"], figures["long"]
    length = long["trial_seconds"]
    found = [
        Bar("CPU seconds added per trial, reused workers", short["cpu_seconds_per_trial"], 0.5),
        Bar(
            f"% of the wall time of a trial of 10 s that is lost (measured on {length:.1f} s)",
            100 * long["lost_seconds_per_trial"] / LONG_SECONDS,
            3,
        ),
    ]
    if len(long["bare"]) > 1:
        name = f"% slower than in bare processes, trials of {length:.1f} s"
        found.append(Bar(name, 100 * long["extra_share"], 3))
    return [
        *found,
        Bar(
            f"times faster than Tune function trainables, {short['function']['num_jobs']} trials",
            short["function"]["ratio_to_engine"],
            5,
            at_most=False,
        ),
        Bar("seconds of llp --help", figures["start"]["seconds"]["llp --help"], 0.5),
    ]


# --- the jobs ---------------------------------------------------------------------------------


def short_spec(num_trials: int) -> dict[str, Any]:
    """Digits, a tenth of the images, one epoch."""
    return _spec(
        num_trials,
        dataset={"name": "digits"},
        tier1={"data_fractions": [0.1], "epochs": 1},
    )


def long_spec(num_trials: int, num_train: int) -> dict[str, Any]:
    """Generated images, all of them, as many epochs as the default recipe has."""
    options = {"num_train": num_train, "num_test": 100, "image_size": 16, "channels": 1}
    return _spec(
        num_trials,
        dataset={"name": "synthetic", "options": options},
        tier1={"data_fractions": [1.0], "epochs": LONG_EPOCHS},
    )


def _spec(num_trials: int, *, dataset: dict[str, Any], tier1: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "overhead",
        "dataset": dataset,
        "model": {"name": "convnet", "options": {"width": 8}},
        "training": {"batch_size": 32},
        "search_space": {"learning_rate": {"type": "loguniform", "low": 0.01, "high": 0.1}},
        "tier1": {"scheduler": "fifo", "num_trials": num_trials, "stop_rules": [], **tier1},
    }


# --- in the child processes -------------------------------------------------------------------


def load_jobs(plain: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """The spec, its data, and the jobs that tier 1 makes of it."""
    from llp.driver import derived_seed
    from llp.pipeline import make_searcher, plan
    from llp.records import Job, Trial
    from llp.spec import Spec
    from llp.workloads import load

    spec = Spec.model_validate(plain)
    data = load(spec.dataset, spec.seed)
    rung, searcher, jobs = plan(spec, data).rungs[-1], make_searcher(spec), []
    for index in range(spec.tier1.num_trials):
        seed = derived_seed(spec.seed, 1, index)
        trial = Trial(f"t{index:03d}", searcher.suggest(index), seed)
        jobs.append(Job(f"t{index:03d}-r1", "probe", trial, rung, seed))
    return spec, data, jobs


class Observed:
    """A source of jobs that notes the process tree's CPU time once all workers are warm."""

    def __init__(self, source: Any, num_jobs: int) -> None:
        self.source, self.ends = source, []
        self._num_jobs = num_jobs
        self._tree = harness.ProcessTree(os.getpid())
        self._before: dict[str, float] = {}
        self._num_before = self._num_warm = 0
        self.cpu_seconds: dict[str, float] = {}

    def next_job(self) -> Any:
        """The source's."""
        return self.source.next_job()

    def on_report(self, job: Any, report: Any) -> Any:
        """The source's."""
        return self.source.on_report(job, report)

    def on_end(self, job: Any, end: Any) -> None:
        """The source's; looks at the CPU time when workers are warm and at the last end."""
        self.source.on_end(job, end)
        self.ends.append(end)
        num_warm = len({span["pid"] for span in spans_of(self.ends)})
        if num_warm > self._num_warm and num_warm <= WORKERS:
            self._num_warm, self._num_before = num_warm, len(self.ends)
            self._before = self._tree.cpu_seconds()
        if len(self.ends) == self._num_jobs:
            after, num = self._tree.cpu_seconds(), max(1, self._num_jobs - self._num_before)
            self.cpu_seconds = {k: (v - self._before.get(k, 0.0)) / num for k, v in after.items()}


def part_engine(spec: dict[str, Any]) -> dict[str, Any]:
    """The jobs through the engine."""
    from llp import pipeline
    from llp.cluster.ray_tune import Resources, ray_session, run_jobs
    from llp.driver import Study
    from llp.spec import digest
    from llp.tracking.ledger import Ledger
    from llp.training.model_cost import ModelCosts
    from llp.training.objective import TrainingObjective

    loaded, data, jobs = load_jobs(spec)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="llp-benchmark-") as name,
        ray_session(num_cpus=WORKERS, num_gpus=0),
        Ledger.create(
            folder := Path(name),
            study_id="overhead",
            spec=loaded.model_dump(mode="json"),
            spec_digest=digest(loaded),
            environment={},
            llp_version="",
            rungs=[jobs[0].rung],
            num_train=len(data.train),
            num_classes=data.num_classes,
        ) as ledger,
    ):
        ray_up = time.monotonic()
        probes = pipeline.probes(loaded, Study(ledger), ModelCosts(loaded, data))
        source = Observed(probes, len(jobs))
        run_jobs(
            source,
            Timed(TrainingObjective(loaded, data, folder, threads=1)),
            resources=Resources(cpus=1),
            folder=folder / "ray",
        )
        done = time.monotonic()
    spans = spans_of(source.ends)
    return {
        "num_jobs": len(spans),
        "num_failed": sum(end.outcome != "completed" for end in source.ends),
        "num_processes": len({span["pid"] for span in spans}),
        "ray_seconds": ray_up - began,
        "first_job_seconds": min(span["began"] for span in spans) - ray_up,
        "after_last_job_seconds": done - max(span["ended"] for span in spans),
        "seconds": done - ray_up,
        "cpu_seconds_per_job": sum(source.cpu_seconds.values()),
        "cpu_seconds_per_job_by_process": source.cpu_seconds,
        "worker_memory_bytes": max(span["memory"] for span in spans),
        **steady(spans, WORKERS),
    }


def part_bare(spec: dict[str, Any]) -> dict[str, Any]:
    """The jobs in plain processes, one per worker, which start together when all are warm."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(WORKERS), context.Queue()
    loaded, data, jobs = load_jobs(spec)  # here, so that the workers import no Ray
    processes = [
        context.Process(
            target=bare_worker, args=(loaded, data, jobs[number::WORKERS], barrier, answers)
        )
        for number in range(WORKERS)
    ]
    for process in processes:
        process.start()
    rows = [answers.get(timeout=1800) for _ in processes]
    for process in processes:
        process.join()
    spans = [span for row in rows for span in row["spans"]]
    return {
        "num_jobs": len(spans),
        "num_failed": sum(row["num_failed"] for row in rows),
        "num_processes": len(rows),
        "seconds": max(row["ended"] for row in rows) - min(row["began"] for row in rows),
        "cpu_seconds_per_job": sum(row["cpu_seconds"] for row in rows) / len(spans),
        "worker_memory_bytes": max(span["memory"] for span in spans),
        **steady(spans, WORKERS),
    }


def bare_worker(spec: Any, data: Any, jobs: list[Any], barrier: Any, answers: Any) -> None:
    """All `jobs` one after the other, after one epoch to warm up."""
    from llp.training.objective import TrainingObjective

    with tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder:
        objective = Timed(TrainingObjective(spec, data, folder, threads=1))
        run_to_end(objective, replace(jobs[0], rung=replace(jobs[0].rung, epochs=1)))
        barrier.wait(timeout=600)
        began, cpu = time.monotonic(), time.process_time()
        ends = [run_to_end(objective, job) for job in jobs]
        answers.put(
            {
                "began": began,
                "ended": time.monotonic(),
                "cpu_seconds": time.process_time() - cpu,
                "num_failed": sum(end.outcome != "completed" for end in ends),
                "spans": spans_of(ends),
            }
        )


def part_function(spec: dict[str, Any], reuse: bool) -> dict[str, Any]:
    """The jobs as Ray Tune function trainables."""
    from ray import tune

    from llp.cluster.ray_tune import ray_session
    from llp.training.objective import TrainingObjective

    loaded, data, jobs = load_jobs(spec)
    with (
        tempfile.TemporaryDirectory(prefix="llp-benchmark-") as folder,
        ray_session(num_cpus=WORKERS, num_gpus=0),
    ):
        ray_up = time.monotonic()
        objective = TrainingObjective(loaded, data, folder, threads=1)
        results = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(train, objective=objective, jobs=jobs), {"cpu": 1}
            ),
            param_space={"index": tune.grid_search(list(range(len(jobs))))},
            tune_config=tune.TuneConfig(
                metric="validation_accuracy", mode="max", reuse_actors=reuse
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        done = time.monotonic()
        metrics = [result.metrics for result in results if result.metrics]
    return {
        "num_jobs": len(jobs),
        "num_failed": results.num_errors,
        "num_processes": len({row["pid"] for row in metrics}),
        "seconds": done - ray_up,
    }


def train(config: dict[str, Any], objective: Any, jobs: list[Any]) -> None:
    """The function trainable: one job, reported epoch by epoch."""
    from ray import tune

    for point in objective(jobs[config["index"]]):
        tune.report({"validation_accuracy": point.validation_accuracy})


PARTS = {"engine": part_engine, "bare": part_bare, "function": part_function}

if __name__ == "__main__" and not harness.serve_part(sys.argv[1:], PARTS):
    main()
