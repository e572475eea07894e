"""THE MAIN PATH, top to bottom: spec -> tier 1 -> tier 2 -> score -> verification -> report.

`search` starts a study, `resume` goes on with one; both end in `_drive`. `plan` and `check` tell
beforehand what a search will do. Everything that is decided or measured on the way is a line in the
study's ledger (`tracking.ledger`), and what is returned is read from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from llp import registry
from llp.cluster.ray_tune import Resources, ray_session, run_jobs
from llp.driver import (
    ListedSource,
    OnEvent,
    PhasedSource,
    ProbeSource,
    Study,
    measure_jobs,
)
from llp.errors import EnvironmentProblem, LlpError, NoTrialSucceeded, SpecError, StudyError
from llp.flatness.budget import plan_measurement
from llp.objectives import SEARCHED, record_fronts
from llp.probing.budgets import ladder
from llp.probing.promotion import Scheduler
from llp.proxy_filter import ProxyFilter
from llp.records import EarlierStudies, Rung, SearchResult, TieBreak
from llp.reporting.html import write_report
from llp.scoring.choose import choose_for_measurement, choose_for_verification
from llp.scoring.report import score_report
from llp.scoring.score import score
from llp.scoring.table import study_table
from llp.scoring.targets import judged
from llp.scoring.tie_break import tie_values
from llp.spec import (
    Spec,
    check_ladder,
    completed_digest,
    digest,
    load_spec,
    study_name,
    to_yaml,
    wording,
)
from llp.spec.source import Source
from llp.surroundings import describe_environment, interruptible
from llp.tie_break import left_out_of_ties, make_tie_break, recorded_tie_break
from llp.tracking.files import write_atomic
from llp.tracking.ledger import Ledger, check_same_spec, has_study, load_study, study_header
from llp.tracking.ledger import find_study as find_in_root
from llp.tracking.links import read_state
from llp.tracking.shipper import start_shipper, wait_shipper
from llp.training.check import check_batch, check_data
from llp.training.model_cost import ModelCosts
from llp.training.proxies import ProxyScores
from llp.verification import RaceSource, choose_verified, verification_source
from llp.warm_start import StartsWith, WarmStart, warm_start
from llp.worker import StudyObjective
from llp.workloads import ImageData
from llp.workloads import load as load_data
from llp.workloads.subsets import nested_order

MLFLOW_SECONDS = 60.0
"""How long the end of a search waits for MLflow to have everything."""
NODES_SECONDS = 60.0
"""How long a cluster may take to have nodes for one trial: they often join after the head."""
TAKEOVER_SECONDS = 60.0
"""How long `search --resume` waits for the driver before it to be gone, which may be on its way."""


# --- what a search will do --------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a search will do and spend when nothing is stopped early and nothing fails.

    Attributes:
        rungs: The ladder.
        jobs_per_rung: Rung -> number of probes on it.
        num_trials: Configurations (a grid may have fewer points than `tier1.num_trials`).
        num_train: Training images.
        num_validation: Validation images.
        num_test: Test images.
        num_classes: Classes.
        samples_tier1: Training examples processed by all probes.
        samples_tier2: About, by the refinements and the gradient equivalents of the metrics.
        samples_verification: By all full trainings of the verification.
        samples_full_search: By training every configuration once with the full recipe.
        left_out: Metrics of tier 2 that do not fit into its budget, after a probe on the top rung.
        earlier: What is taken from earlier studies; None without a warm start.
        ties: Whether tier 2 will settle ties at promotions, and why; None: it was not asked for.
            What measures ties comes beyond `samples_tier2`.
        left_out_of_ties: Rung -> metrics of `ties` that do not fit into the budget on it.
    """

    rungs: tuple[Rung, ...]
    jobs_per_rung: dict[int, int]
    num_trials: int
    num_train: int
    num_validation: int
    num_test: int
    num_classes: int
    samples_tier1: int
    samples_tier2: int
    samples_verification: int
    samples_full_search: int
    left_out: tuple[str, ...] = ()
    earlier: EarlierStudies | None = None
    ties: TieBreak | None = None
    left_out_of_ties: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """A plan, and what one batch of the first configuration did.

    Attributes:
        plan: The plan.
        model_parameters: Trainable and other parameters of the model.
        batch_seconds: Seconds of one training step on this machine.
        batch: Everything `training.check.check_batch` found.
    """

    plan: Plan
    model_parameters: int
    batch_seconds: float
    batch: dict[str, Any]


def plan(spec: Spec, data: ImageData | None = None) -> Plan:
    """What `search(spec)` will do; loads the dataset, starts nothing.

    Raises:
        SpecError: A rung has no image of some class, or the spec contradicts the data.
        DataError: The dataset cannot be read.
    """
    data = data or load_data(spec.dataset, spec.seed)
    rungs = tuple(ladder(spec.tier1.data_fractions, spec.rung_epochs(), len(data.train)))
    order = nested_order(data.train.labels, seed=spec.seed)
    counts = [
        np.bincount(data.train.labels[order[: rung.num_examples]], minlength=data.num_classes)
        for rung in rungs
    ]
    check_ladder(spec, len(data.train), data.num_classes, counts)
    check_data(spec, data, rungs)
    scheduler = make_scheduler(spec)
    make_rules(spec, "stop_rules")
    make_rules(spec, "search_rules")
    ties = make_tie_break(spec)
    earlier = warm_start(spec).studies if spec.searcher.warm_start else None
    jobs: dict[int, int] = {}
    for sizes in scheduler.sizes():
        for rung, size in sizes.items():
            jobs[rung] = jobs.get(rung, 0) + size
    asked = spec.verification
    seeds = asked.max_seeds if asked.race else asked.num_seeds
    verified = min(asked.top_k, scheduler.num_trials) * seeds
    verification_epochs = spec.verification.epochs or spec.training.epochs
    measured = plan_measurement(spec.tier2, rungs[-1])
    return Plan(
        rungs=rungs,
        jobs_per_rung=dict(sorted(jobs.items())),
        num_trials=scheduler.num_trials,
        num_train=len(data.train),
        num_validation=len(data.validation),
        num_test=len(data.test) if data.test is not None else 0,
        num_classes=data.num_classes,
        samples_tier1=sum(n * rungs[rung - 1].samples_seen for rung, n in jobs.items()),
        samples_tier2=spec.tier2.top_k * measured.samples,
        samples_verification=verified * verification_epochs * len(data.train),
        samples_full_search=scheduler.num_trials * spec.training.epochs * len(data.train),
        left_out=measured.left_out if spec.tier2.top_k else (),
        earlier=earlier,
        ties=ties,
        left_out_of_ties=left_out_of_ties(spec, ties, rungs),
    )


def check(spec: Spec) -> CheckReport:
    """`plan`, and one batch through the model, before any worker starts.

    Raises:
        SpecError: The recipe and the model do not fit together.
        DataError: The dataset cannot be read.
        EnvironmentProblem: A GPU was asked for and there is none.
    """
    data = load_data(spec.dataset, spec.seed)
    planned = plan(spec, data)
    batch = check_batch(spec, data, _driver_device(spec))
    return CheckReport(planned, int(batch["parameters"]), float(batch["seconds"]), batch)


# --- running it -------------------------------------------------------------------------------


def search(
    spec: Spec,
    *,
    study_id: str | None = None,
    resume: bool = False,
    data: ImageData | None = None,
    on_event: OnEvent | None = None,
    command: str = "",
) -> SearchResult:
    """Runs the whole search and returns what its ledger says.

    Args:
        spec: The experiment.
        study_id: Name of the study folder under `output.root`; default: name and digest.
        resume: Go on with the study when there is one of this name and spec; a finished one is
            only returned. What starts a search again by itself (a job queue, say) wants this.
        data: The dataset of the spec, where the caller has loaded it already.
        on_event: Called in this process with every ledger event.
        command: What the user typed, for the report.

    Raises:
        SpecError: The spec does not fit the data.
        DataError: The dataset cannot be read.
        StudyError: The folder holds a study already, or another driver has it.
        EnvironmentProblem: No GPU, disk full, Ray does not start.
        NoTrialSucceeded: Every configuration failed or diverged.
        KeyboardInterrupt: On Ctrl-C and SIGTERM; everything finished is in the ledger.
    """
    spec_digest = digest(spec)
    study_id = study_name(spec, study_id)
    folder = Path(spec.output.root) / study_id
    if has_study(folder):
        _check_same_spec(folder, spec_digest)
        if resume:
            if spec.tracking.mlflow and load_study(folder).status == "finished":
                _ship_rest(folder)
            with Ledger.open(folder, wait_seconds=TAKEOVER_SECONDS) as ledger:
                return _go_on(spec, ledger, folder, on_event, command, data)
        status = load_study(folder).status
        raise StudyError(
            f"the study {study_id} exists already and is {status}; "
            + (
                f"see it with `llp status {study_id}`"
                if status == "finished"
                else f"go on with `llp resume {study_id}`"
            )
            + ", or start another with `--study NAME`"
        )
    data = data or load_data(spec.dataset, spec.seed)
    planned = plan(spec, data)
    check_batch(spec, data, _driver_device(spec))
    environment = describe_environment(command)
    with Ledger.create(
        folder,
        study_id=study_id,
        spec=spec.model_dump(mode="json"),
        spec_digest=spec_digest,
        environment=environment,
        llp_version=environment["llp"],
        rungs=planned.rungs,
        num_train=planned.num_train,
        num_validation=planned.num_validation,
        num_test=planned.num_test,
        num_classes=planned.num_classes,
        num_trials=planned.num_trials,
        jobs_per_rung=planned.jobs_per_rung,
        dataset={"name": data.name, "digest": data.digest, "source": data.source},
    ) as ledger:
        write_atomic(folder / "spec.yaml", to_yaml(spec))
        return _drive(spec, data, ledger, folder, environment, on_event)


def resume(
    study: str | Path,
    *,
    root: str | None = None,
    overrides: Sequence[str] = (),
    on_event: OnEvent | None = None,
    command: str = "",
) -> SearchResult:
    """Goes on with a study that was interrupted; a finished one is only returned.

    Args:
        study: Its name or folder.
        root: Where studies are; default `llp_studies`.
        overrides: `key=value` for what does not change results (resources, tracking).
        on_event: Called with every ledger event, those of before first.
        command: What the user typed, for the report.

    Raises:
        StudyError: No such study, another driver has it, this version cannot read it, or an
            override would change results.
        KeyboardInterrupt: On Ctrl-C and SIGTERM; everything finished is in the ledger.
    """
    folder = find_study(study, root)
    with Ledger.open(folder) as ledger:
        header = study_header(folder)
        if header.get("kind") == "python":
            raise StudyError(
                f"the study {header['study_id']} was started from Python; "
                "call run_successive_halving again with the same arguments"
            )
        try:
            spec = Spec.model_validate(header["spec"])
        except ValidationError as error:
            wrong = map(str, wording.problems(error, header["spec"], Source()))
            raise StudyError(
                f"{folder}: this version cannot read the experiment of the study; go on with llp "
                f"{header.get('llp_version', 'of then')}, which began it: {'; '.join(wrong)}"
            ) from error
        if not (folder / "spec.yaml").exists():
            write_atomic(folder / "spec.yaml", to_yaml(spec))
        if overrides:
            spec = load_spec(folder / "spec.yaml", overrides, stored=True)
        spec = spec.model_copy(
            update={"output": spec.output.model_copy(update={"root": str(folder.parent)})}
        )
        _check_same_spec(folder, digest(spec))
        return _go_on(spec, ledger, folder, on_event, command)


def _check_same_spec(folder: Path, spec_digest: str) -> None:
    """As `check_same_spec`, for studies of older versions too."""
    if completed_digest(study_header(folder).get("spec", {})) != spec_digest:
        check_same_spec(folder, spec_digest)


def _ship_rest(folder: Path) -> None:
    """Gives MLflow what it has not received of a study that is over."""
    shipped = read_state(folder)
    if shipped is None or not shipped.complete:
        wait_shipper(start_shipper(folder), MLFLOW_SECONDS)


def _go_on(
    spec: Spec,
    ledger: Ledger,
    folder: Path,
    on_event: OnEvent | None,
    command: str,
    data: ImageData | None = None,
) -> SearchResult:
    """The rest of a study, on the images it began with; nothing when it is finished."""
    so_far = load_study(folder)
    if so_far.status == "finished":
        return so_far
    data = data or load_data(spec.dataset, spec.seed)
    began_with = study_header(folder)["dataset"]["digest"]
    if data.digest != began_with:
        raise StudyError(
            f"the images of {data.name} are not those this study began with "
            f"({data.source}; digest {data.digest[:12]}, was {began_with[:12]}); "
            "set dataset.root to the same files"
        )
    return _drive(spec, data, ledger, folder, describe_environment(command), on_event)


def _drive(
    spec: Spec,
    data: ImageData,
    ledger: Ledger,
    folder: Path,
    environment: dict[str, Any],
    on_event: OnEvent | None,
) -> SearchResult:
    """Tier 1, tier 2, score, verification, report; everything that was done before is skipped."""
    study = Study(ledger, on_event)
    study.record("opened", host=environment["host"], pid=os.getpid(), environment=environment)
    shipper = start_shipper(folder) if spec.tracking.mlflow else None
    costs = ModelCosts(spec, data, _driver_device(spec))
    proxy = ProxyScores(spec, data) if spec.searcher.proxy else None
    try:
        with _ray(spec), interruptible():  # in this order: Ray sets a SIGTERM handler too
            run_jobs(
                PhasedSource(
                    study,
                    [
                        ("tier1", lambda: probes(spec, study, costs, proxy)),
                        ("tier2", lambda: measurements(spec, study)),
                        ("verify", lambda: verifications(spec, study)),
                    ],
                    time.monotonic,
                ),
                StudyObjective(spec, data, folder),
                resources=Resources(
                    spec.resources.cpus_per_trial,
                    spec.resources.gpus_per_trial,
                    spec.resources.max_concurrent,
                ),
                folder=folder / "ray",
                seconds_limit=spec.tier1.trial_seconds,
                wait_for_nodes=NODES_SECONDS if spec.resources.address else 0.0,
            )
        record_fronts(spec, study, costs)
        finish(spec, study, folder)
    except NoTrialSucceeded as error:
        _write_report(
            spec, folder, replace(study.result(), status="failed", winner_reason=str(error))
        )
        study.record("failed", reason=str(error))
        raise
    finally:
        ledger.close()
        if shipper is not None and sys.exc_info()[0] is not KeyboardInterrupt:
            wait_shipper(shipper, MLFLOW_SECONDS)
    return load_study(folder)


def probes(
    spec: Spec, study: Study, costs: ModelCosts, proxy: ProxyScores | None = None
) -> ProbeSource:
    """Tier 1: configurations on nested data fractions."""
    header = study.header
    rungs = ladder(spec.tier1.data_fractions, spec.rung_epochs(), int(header["num_train"]))
    tie_break = recorded_tie_break(spec, study)
    scheduler = make_scheduler(spec)
    if tie_break is not None and tie_break.used:
        scheduler = dataclasses.replace(scheduler, tie_images=int(header["num_validation"]))
    return ProbeSource(
        study,
        scheduler=scheduler,
        searcher=make_searcher(spec, warm_start(spec, study), proxy),
        rungs=rungs,
        stop_rules=make_rules(spec, "stop_rules"),
        search_rules=make_rules(spec, "search_rules"),
        audit_share=spec.tier1.audit_share,
        seed=spec.seed,
        warm=spec.tier1.promotion == "warm",
        report_every=spec.tier1.report_every,
        num_kept=num_kept(spec),
        model_costs=costs,
        operations=costs.operations,
        tie_break=tie_break,
        tie_values=tie_values,
    )


def measurements(spec: Spec, study: Study) -> ListedSource:
    """Tier 2: the landscape around the survivors' checkpoints."""
    result = study.result()
    chosen = choose_for_measurement(result.trials, spec.tier2.top_k, rungs=result.rungs)
    return ListedSource(study, measure_jobs(study, chosen), max_failures=spec.tier1.max_failures)


def verifications(spec: Spec, study: Study) -> ListedSource | RaceSource:
    """Scores both tiers, then trains the best few fully with the same seeds for each."""
    result = study.result()
    _record_scores(spec, study)
    table = study_table(
        result.trials,
        result.profiles,
        num_validation=int(study.header["num_validation"]),
        rungs=result.rungs,
    )
    scores = score(
        table,
        preset=spec.score.preset,
        weights=spec.score.weights or None,
        alpha=spec.score.alpha,
        seed=spec.seed,
    )
    asked = spec.verification
    chosen = choose_for_verification(scores, asked.top_k, probability=asked.probability)
    if not chosen:
        raise NoTrialSucceeded(_why_nothing_worked(result))
    return verification_source(spec, study, chosen)


def finish(spec: Spec, study: Study, folder: Path) -> None:
    """Names the winner and writes the page; the last line of the ledger comes after the page."""
    _record_scores(spec, study)
    result = study.result()
    winner, reason = choose_verified(spec, study)
    _write_report(
        spec, folder, replace(result, status="finished", winner=winner, winner_reason=reason)
    )
    study.record(
        "finished",
        winner=winner,
        winner_reason=reason,
        report="report.html" if spec.output.report else None,
    )
    shutil.rmtree(folder / "ray", ignore_errors=True)  # Tune's own files; the ledger has it all
    for snapshot in (folder / "checkpoints").glob("*.partial.pt"):
        snapshot.unlink(missing_ok=True)  # of jobs that a rule stopped


def _record_scores(spec: Spec, study: Study) -> None:
    result = study.result()
    study.record(
        "scores",
        score_report=score_report(
            result.trials,
            result.profiles,
            judged(result.verifications, corrupted=spec.verification.corrupted),
            preset=spec.score.preset,
            weights=spec.score.weights or None,
            alpha=spec.score.alpha,
            num_validation=int(study.header["num_validation"]),
            seed=spec.seed,
            rungs=result.rungs,
        ),
    )


def _write_report(spec: Spec, folder: Path, result: SearchResult) -> None:
    if spec.output.report:
        write_report(result, folder / "report.html")


def _why_nothing_worked(result: SearchResult) -> str:
    outcomes: dict[str, int] = {}
    for trial in result.trials:
        outcomes[trial.outcome] = outcomes.get(trial.outcome, 0) + 1
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    failures = [trial.failure for trial in result.trials if trial.failure]
    last = failures[-1].strip().splitlines()[-1] if failures else ""
    return (
        f"no configuration produced a usable result ({counts})"
        + (f"; the last failure was: {last}" if last else "; widen or lower the learning rates")
        + f". See `llp show {result.study_id} {result.trials[-1].trial.trial_id}`"
        if result.trials
        else "no configuration was tried"
    )


# --- the pieces a spec names ------------------------------------------------------------------


def make_scheduler(spec: Spec) -> Scheduler:
    """The scheduler that the spec names; a grid has as many trials as points at most."""
    num_trials = spec.tier1.num_trials
    if spec.searcher.name == "grid":
        num_trials = min(num_trials, make_searcher(spec).num_points)
    lengths = zip(spec.tier1.data_fractions, spec.rung_epochs(), strict=True)
    try:
        scheduler: Scheduler = registry.load("schedulers", spec.tier1.scheduler)(
            num_trials=num_trials,
            num_rungs=len(spec.tier1.data_fractions),
            reduction_factor=spec.tier1.reduction_factor,
            max_failures=spec.tier1.max_failures,
            eager=spec.tier1.eager_promotion,
            costs=tuple(fraction * epochs for fraction, epochs in lengths),
            warm=spec.tier1.promotion == "warm",
            **spec.tier1.scheduler_options,
        )
    except (TypeError, ValueError) as error:
        path = "tier1.scheduler_options" if spec.tier1.scheduler_options else "tier1.scheduler"
        raise SpecError([spec.problem(path, str(error))]) from error
    return scheduler


def make_rules(spec: Spec, table: Literal["stop_rules", "search_rules"]) -> list[Any]:
    """The rules that end a job, or tier 1, as the spec names them, with their options.

    Raises:
        SpecError: A rule does not take an option it is given, or lacks one.
    """
    rules = []
    for number, rule in enumerate(getattr(spec.tier1, table)):
        options = {key: value for key, value in rule.items() if key != "name"}
        try:
            rules.append(registry.load(table, rule["name"])(**options))
        except (TypeError, ValueError) as error:
            raise SpecError([spec.problem(f"tier1.{table}.{number}", str(error))]) from error
    return rules


def num_kept(spec: Spec) -> int:
    """Trials that go on from the highest rung: those that are measured or verified."""
    return max(spec.tier2.top_k, spec.verification.top_k)


def make_searcher(
    spec: Spec, earlier: WarmStart | None = None, proxy: ProxyScores | None = None
) -> Any:
    """The searcher that the spec names, with what it takes from earlier studies."""
    build = registry.load("searchers", spec.searcher.name)
    if spec.searcher.name in ("random", "grid"):
        searcher = build(spec.search_space, spec.constraints, spec.seed)
        if proxy is not None and spec.searcher.proxy is not None:
            searcher = ProxyFilter(searcher, proxy, spec.searcher.proxy)
        return StartsWith(searcher, earlier.first) if earlier and earlier.first else searcher
    taken: dict[str, Any] = {}
    if earlier and earlier.first:
        taken |= {"first": earlier.first}
    objectives = [name for name in spec.objectives if name in SEARCHED]
    if len(objectives) > 1:
        taken |= {"objectives": objectives}
    elif earlier and earlier.earlier:
        taken |= {"earlier": earlier.earlier}
    return build(
        spec.search_space,
        spec.constraints,
        seed=spec.seed,
        num_startup_trials=spec.searcher.num_startup_trials,
        **taken,
    )


def _driver_device(spec: Spec) -> str:
    """Where the driver tries one batch: a local GPU when trials get one, else the CPU.

    Raises:
        EnvironmentProblem: Trials on this machine are to get more CPUs than it has, or a GPU and
            CUDA sees none.
    """
    cpus = spec.resources.num_cpus or os.cpu_count() or 1
    if spec.resources.address is None and spec.resources.cpus_per_trial > cpus:
        raise EnvironmentProblem(
            f"resources.cpus_per_trial is {spec.resources.cpus_per_trial:g} and this machine's Ray "
            f"has {cpus}; lower it, or set resources.address to a cluster"
        )
    if spec.resources.gpus_per_trial <= 0:
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if spec.resources.address is not None:
        return "cpu"  # the cluster has the GPUs, not this machine
    raise EnvironmentProblem(
        f"resources.gpus_per_trial is {spec.resources.gpus_per_trial:g} and CUDA sees no GPU on "
        "this machine; run `llp doctor`, or use --set resources.gpus_per_trial=0"
    )


@contextlib.contextmanager
def _ray(spec: Spec) -> Iterator[None]:
    resources = spec.resources
    with ray_session(
        address=resources.address, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus
    ):
        yield


# --- other things people ask of a study -------------------------------------------------------


def find_study(study: str | Path, root: str | None = None) -> Path:
    """The folder of a study, by path or by name under `root` (default `llp_studies`).

    Raises:
        StudyError: There is none; the nearest name is offered.
    """
    if (Path(study) / "ledger.jsonl").is_file():
        return Path(study)
    return find_in_root(root or "llp_studies", str(study))


def report(folder: Path) -> Path:
    """Writes the page of a study anew from its ledger, finished or not."""
    return write_report(load_study(folder), folder / "report.html")


__all__ = [
    "CheckReport",
    "LlpError",
    "Plan",
    "check",
    "describe_environment",
    "interruptible",
    "plan",
    "report",
    "resume",
    "search",
]
