"""The frozen records that flow through every room, and their JSON form.

Words used everywhere: a *trial* is one configuration of hyperparameters. A *rung* is an integer
step of the budget ladder and stands for a data fraction and a number of epochs. A *job* is the unit
of work a worker gets: one trial on one rung (`probe`), the landscape around one checkpoint
(`measure`), or one full training (`verify`). Cost is counted in *samples seen*: training examples
that went through a forward and backward pass, repeats counted.

Only these records cross a process boundary; tensors stay in the worker and weights travel as
`CheckpointRef`. An outcome is a value: a diverged or failed job is a `JobEnd`, not an exception.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llp.plain import from_plain as from_plain
from llp.plain import to_plain as to_plain

HyperparameterValue = bool | int | float | str
JobKind = Literal["probe", "measure", "verify"]
Outcome = Literal["completed", "stopped", "diverged", "failed", "out_of_memory"]
OUTCOMES: tuple[Outcome, ...] = ("completed", "stopped", "diverged", "failed", "out_of_memory")


@dataclass(frozen=True)
class Interval:
    """A closed interval `[low, high]` meant to cover the truth with probability `level`."""

    low: float
    high: float
    level: float = 0.9


@dataclass(frozen=True)
class Trial:
    """One configuration.

    Attributes:
        trial_id: `t000`, `t001`, ... in the order of suggestion.
        hyperparameters: The searched values, spelled as in the YAML; absent when inactive.
        seed: Seed of initialisation and data order for its probes.
        bracket: Hyperband bracket (0 for other schedulers).
    """

    trial_id: str
    hyperparameters: Mapping[str, HyperparameterValue]
    seed: int
    bracket: int = 0


@dataclass(frozen=True)
class Rung:
    """One step of the budget ladder.

    Attributes:
        rung: 1-based number; rung R is the highest.
        data_fraction: Share of the training set, in (0, 1].
        num_examples: Number of training images in the nested subset.
        epochs: Passes over that subset; a rung finishes its own learning-rate schedule.
    """

    rung: int
    data_fraction: float
    num_examples: int
    epochs: int

    @property
    def samples_seen(self) -> int:
        """Training examples processed when the rung runs to its end."""
        return self.num_examples * self.epochs


@dataclass(frozen=True)
class CheckpointRef:
    """Weights on disk: path relative to the study folder, and the sha256 of the file's bytes."""

    path: str
    sha256: str


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation during training, made after `epoch` epochs of the job.

    Attributes:
        rung: Rung being trained (for `verify` jobs: highest rung + 1).
        data_fraction: Share of the training set in use.
        epoch: Completed epochs within this job, 1-based.
        samples_seen: Training examples processed within this job so far.
        train_loss: Mean training loss over the epoch (as optimised, with augmentation).
        train_accuracy: Training accuracy over the epoch, in [0, 1].
        validation_loss: Mean cross-entropy on the validation split.
        validation_accuracy: Accuracy on the validation split, in [0, 1].
        seconds: Wall-clock seconds of the job so far (monotonic clock).
        learning_rate: Learning rate at the end of the epoch.
    """

    rung: int
    data_fraction: float
    epoch: int
    samples_seen: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float
    learning_rate: float = math.nan


@dataclass(frozen=True)
class LearningCurve:
    """The points of one job in order of epoch."""

    trial_id: str
    rung: int
    points: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True)
class Job:
    """A unit of work for one worker.

    Attributes:
        job_id: Unique in the study: `t007-r2`, `t007-m`, `t007-v1`; retries share it.
        kind: `probe`, `measure` or `verify`.
        trial: The configuration.
        rung: Budget of the job; for `measure` the rung whose checkpoint is measured.
        seed: Seed of initialisation and data order.
        attempt: 0 for the first try, then 1, 2, ...
        start_from: Checkpoint whose weights the job starts from (warm promotion, measure).
        micro_batch_divisor: Batches are split into this many accumulated parts (out-of-memory
            retry); the result is the same up to rounding and batch statistics.
        metrics: What a `measure` job measures; empty: all that the experiment names.
    """

    job_id: str
    kind: JobKind
    trial: Trial
    rung: Rung
    seed: int
    attempt: int = 0
    start_from: CheckpointRef | None = None
    micro_batch_divisor: int = 1
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class StopDecision:
    """The verdict of a stop rule on a running job.

    Attributes:
        stop: True to end the job now.
        reason: Short stable word such as `power_law`, `plateau`, `time_limit`; empty when going on.
        predicted_final: Forecast of the rung's final metric, where the rule makes one.
        detail: One sentence with the numbers behind the verdict.
        needed: The final validation accuracy that the rule says will be missed, where it says so.
    """

    stop: bool
    reason: str = ""
    predicted_final: Interval | None = None
    detail: str = ""
    needed: float | None = None


@dataclass(frozen=True)
class JobEnd:
    """How a job ended. The outcome is a value, never an exception.

    Attributes:
        job_id: The job.
        trial_id: Its trial.
        outcome: `completed`, `stopped`, `diverged`, `failed` or `out_of_memory`.
        stopped_by: Reason word of the stop decision; empty unless `stopped`.
        failure: Traceback or message; empty unless the outcome is a failure.
        checkpoint: Final weights, durable before this record is written; None when there are none.
        samples_seen: Training examples the job has behind it, a part resumed from a snapshot
            included, evaluation not counted.
        seconds: Wall-clock seconds on the worker, likewise.
        peak_memory_bytes: Peak resident (CPU) or allocated (CUDA) memory of the worker.
        device: `cpu`, or the GPU's name.
        worker: Which process did it: `host pid 123`, with the GPUs it had of that host.
    """

    job_id: str
    trial_id: str
    outcome: Outcome
    stopped_by: str = ""
    failure: str = ""
    checkpoint: CheckpointRef | None = None
    samples_seen: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    device: str = "cpu"
    worker: str = ""


@dataclass(frozen=True)
class TrialResult:
    """Everything tier 1 knows about one trial.

    Attributes:
        trial: The configuration.
        curves: One curve per rung it was trained on, in order.
        outcome: Outcome of its last job; a trial that ended its last rung but was not promoted
            further is `completed`.
        stopped_by: Why it got no more budget: a stop rule's reason word, `rung N` when it was not
            promoted from rung N, or empty when it reached the top or failed.
        failure: Traceback or message of a failure.
        checkpoint: Weights at the end of its highest finished rung.
        samples_seen: Over all its probe jobs.
        seconds: Over all its probe jobs.
    """

    trial: Trial
    curves: tuple[LearningCurve, ...]
    outcome: Outcome
    stopped_by: str = ""
    failure: str = ""
    checkpoint: CheckpointRef | None = None
    samples_seen: int = 0
    seconds: float = 0.0

    @property
    def last(self) -> CurvePoint | None:
        """The last point of its highest rung, or None when it never reported."""
        for curve in reversed(self.curves):
            if curve.points:
                return curve.points[-1]
        return None


@dataclass(frozen=True)
class Measurement:
    """One number about the loss landscape around a checkpoint.

    Attributes:
        name: A row of `registry.METRICS`, with a suffix for a series, e.g. `hessian_eigenvalue_1`.
        value: The estimate; NaN when it could not be measured (see `note`).
        standard_error: Of the estimate, over probes, examples or perturbations; NaN when unknown.
        higher_is_better: Believed direction for generalization; None when it must be learnt.
        num_examples: Training examples it was computed on.
        seconds: Wall-clock cost.
        note: Residual, convergence or failure in words.
        samples: What it added to the cost of the profile, in training examples; metrics share
            gradients and Hessian products, and the first that needs one pays for it.
        samples_alone: What it would have cost as the only metric.
    """

    name: str
    value: float
    standard_error: float
    higher_is_better: bool | None
    num_examples: int
    seconds: float
    note: str = ""
    samples: float = math.nan
    samples_alone: float = math.nan


@dataclass(frozen=True)
class FlatnessProfile:
    """The tier-2 measurements of one trial, on unaugmented training examples in eval mode.

    `samples` is the cost of all of them, in training examples; `note` what the budget chose.
    """

    trial_id: str
    measurements: tuple[Measurement, ...]
    seconds: float
    device: str = "cpu"
    samples: float = math.nan
    note: str = ""

    def __getitem__(self, name: str) -> Measurement:
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        raise KeyError(name)


@dataclass(frozen=True)
class GeneralizationScore:
    """The combined score of one trial. Higher is better.

    Attributes:
        trial_id: The trial.
        value: The score, in the unit that `preset` defines.
        interval: Uncertainty of the score from the uncertainty of its inputs.
        contributions: Term -> its addend; they sum to `value`.
        probability_best: P(this trial has the highest score), from the same draws.
        preset: Name of the formula.
    """

    trial_id: str
    value: float
    interval: Interval
    contributions: Mapping[str, float]
    probability_best: float
    preset: str


@dataclass(frozen=True)
class Verification:
    """One full training of one configuration with one seed; the only place the test split is read.

    Attributes:
        trial_id: The configuration.
        seed: Seed of this training.
        test_accuracy: Accuracy on the whole test split after the last epoch, in [0, 1].
        test_loss: Mean cross-entropy on the test split.
        validation_accuracy: Accuracy on the validation split, in [0, 1].
        validation_loss: Mean cross-entropy on the validation split.
        num_test_examples: Size of the test split.
        samples_seen: Training examples processed.
        seconds: Wall-clock seconds.
        predictions: What it said about every test image, durable before this record is written:
            path relative to the study folder; empty when it was not kept.
        predictions_sha256: Of the bytes of that file.
        corrupted_validation_accuracy: Mean accuracy over corrupted copies of the validation split;
            NaN where the experiment does not ask for it.
        corrupted_test_accuracy: Likewise of the test split.
    """

    trial_id: str
    seed: int
    test_accuracy: float
    test_loss: float
    validation_accuracy: float
    validation_loss: float
    num_test_examples: int
    samples_seen: int
    seconds: float
    predictions: str = ""
    predictions_sha256: str = ""
    corrupted_validation_accuracy: float = math.nan
    corrupted_test_accuracy: float = math.nan


@dataclass(frozen=True)
class Observation:
    """What a training callback measured; the training itself goes on as if nothing had been.

    Attributes:
        callback: A row of `registry.CALLBACKS`.
        job_id: The job that was watched.
        trial_id: Its trial.
        epoch: Completed epochs of the job, 1-based.
        samples_seen: Training examples processed within the job so far.
        values: Name -> number; NaN for what could not be measured (see `note`).
        samples: What it cost, in training examples: gradient equivalents times the examples
            measured on. Not in the `samples_seen` of any record.
        seconds: Wall-clock cost.
        note: Residual, convergence or failure in words.
    """

    callback: str
    job_id: str
    trial_id: str
    epoch: int
    samples_seen: int
    values: Mapping[str, float]
    samples: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Decision:
    """One recorded choice of tier 1, a pure function of the ledger before it.

    Attributes:
        kind: `promote` (to `rung`), `stop` (within `rung`), `audit` (a stop that is not carried
            out, to see whether it would have been right), `retry`, `new` (a new trial),
            `stops_off` (rules that stop by forecast are not asked any more), or `end` (of tier 1,
            before the scheduler was done).
        trial_id: The trial it is about; empty for `stops_off` and `end`.
        rung: The rung it is about; 0 for `end`.
        reason: Why, in words a user can check against the numbers.
        predicted_final: Forecast behind a stop.
        needed: Final validation accuracy that a stop says will be missed, where it says so.
    """

    kind: Literal["new", "promote", "stop", "audit", "retry", "stops_off", "end"]
    trial_id: str
    rung: int
    reason: str = ""
    predicted_final: Interval | None = None
    needed: float | None = None


@dataclass(frozen=True)
class StopAudit:
    """How often early stops were wrong, as far as audits tell.

    Attributes:
        num_stops: Stops by forecast that were carried out.
        num_audits: Stops that were not carried out, and whose job has ended.
        num_false: Those of them that reached what the rule said they would miss.
        rate: Clopper-Pearson interval of the false-stop rate.
        delta: False-stop rate that the rule promises not to exceed.
    """

    num_stops: int
    num_audits: int
    num_false: int
    rate: Interval
    delta: float


@dataclass(frozen=True)
class RankCorrelation:
    """How a rung orders the trials that a higher one shares with it: those promoted.

    Attributes:
        lower: The lower rung.
        higher: The higher rung.
        num_trials: Trials completed on both.
        num_promoted: Trials that ended on both, failures left out.
        num_below: Trials that ended on the lower rung, failures left out.
        value: Spearman's rank correlation of their validation accuracies, in [-1, 1]; NaN when
            all tie or there is only one.
        interval: Its interval; [-1, 1] for too few trials.
    """

    lower: int
    higher: int
    num_trials: int
    num_promoted: int
    num_below: int
    value: float
    interval: Interval


@dataclass(frozen=True)
class TieBreak:
    """Whether tier 2 breaks ties at promotions, and by what; fixed when tier 1 begins.

    Attributes:
        used: Whether calibration has earned it.
        reason: Why, or why not, with the numbers.
        weights: Tier-2 metric -> calibrated weight of its normal score, higher is better.
        metrics: Rows of `llp list metrics` that measure them.
    """

    used: bool
    reason: str
    weights: Mapping[str, float] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class TieChoice:
    """One cut whose sides could not be told apart by the rung's metric, as tier 2 settled it.

    Attributes:
        bracket: Number of the bracket.
        rung: The rung whose trials are promoted.
        tied: Trials within the standard error of a difference at the cut, best by the metric first.
        accuracies: Their validation accuracies.
        values: Their tie-break values; 0 for those that could not be measured.
        kept: Those of them that go on.
        usual: Those that would go on by the metric alone.
        standard_error: Of the difference in accuracy between the two sides of the cut.
    """

    bracket: int
    rung: int
    tied: tuple[str, ...]
    accuracies: Mapping[str, float]
    values: Mapping[str, float]
    kept: tuple[str, ...]
    usual: tuple[str, ...]
    standard_error: float

    @property
    def passed_over(self) -> tuple[str, ...]:
        """The tied trials that do not go on."""
        return tuple(name for name in self.tied if name not in self.kept)


@dataclass(frozen=True)
class ProxyScore:
    """What a training-free proxy said of a configuration.

    Attributes:
        name: The proxy.
        value: Larger is better; -inf (NaN after the ledger) where it could not be computed.
        filtered: Whether the configuration was the best of several by it, or drawn for comparison.
    """

    name: str
    value: float
    filtered: bool


@dataclass(frozen=True)
class EarlierResult:
    """A configuration of an earlier study and how it did on that study's lowest rung.

    Attributes:
        study: Name of the study.
        trial_id: Its trial there.
        hyperparameters: The configuration in the present search space.
        value: Validation accuracy at the end of the rung, in [0, 1].
        comparable: Whether the rung had the data, network and budget of the first rung here.
    """

    study: str
    trial_id: str
    hyperparameters: Mapping[str, HyperparameterValue]
    value: float
    comparable: bool


@dataclass(frozen=True)
class RaceLook:
    """One look of the race over seeds; the test is in `scoring.racing`.

    Attributes:
        num_seeds: Full trainings of each configuration in the race so far.
        leader: The one with the best mean validation accuracy; empty when none is left.
        racing: Those still in the race after this look, the leader among them.
        out: Those that this look takes out -> why.
        settled: Whether the race is over because its order is settled.
        margin: Difference in accuracy that counts as none.
        behind: Mean accuracy of the leader minus that of each other one.
        ahead_at_most: Upper bound of the true mean of each other one minus the leader's.
    """

    num_seeds: int
    leader: str
    racing: tuple[str, ...]
    out: Mapping[str, str]
    settled: bool
    margin: float
    behind: Mapping[str, float] = field(default_factory=dict)
    ahead_at_most: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ParetoFront:
    """Configurations that no other one beats in several objectives, all minimised.

    Attributes:
        names: The objectives.
        rung: Where they were compared; 0: after full training.
        values: Trial id -> objective -> value; NaN when unknown.
        front: Trial ids that nothing dominates, best in the first objective first.
        covered: Hypervolume of the front as a share of the box of all trials; NaN without one.
    """

    names: tuple[str, ...]
    rung: int
    values: Mapping[str, Mapping[str, float]]
    front: tuple[str, ...]
    covered: float


@dataclass(frozen=True)
class AblationRow:
    """How well one ranking agrees with the verified results (or with a named stand-in).

    Attributes:
        name: `validation_accuracy`, `validation_loss`, `T1`, `T1+T2`, ...
        tau: Kendall's tau-b against the target.
        interval: Bootstrap interval of tau.
        regret_at_1: Best target minus target of the first-ranked, in percentage points.
        regret_at_5: Best target minus best target among the first five, in percentage points.
        samples_seen: Cost of obtaining this ranking, metrics included.
        num_trials: Trials compared.
    """

    name: str
    tau: float
    interval: Interval
    regret_at_1: float
    regret_at_5: float
    samples_seen: int
    num_trials: int


@dataclass(frozen=True)
class ScoreReport:
    """All scores of a study with the evidence for or against tier 2.

    Attributes:
        preset: Formula in force (after any fallback).
        scores: Best first.
        weights: Term -> weight in force.
        sentence: Whether flatness helped here, made from the numbers.
        ablation: One row per way of ranking; empty when there is nothing to compare with.
        ties: Groups of trial ids that cannot be told apart.
        dropped: Tier-2 metrics that are too noisy to be used: their typical standard error exceeds
            half of their spread between configurations.
    """

    preset: str
    scores: tuple[GeneralizationScore, ...]
    weights: Mapping[str, float]
    sentence: str
    ablation: tuple[AblationRow, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What the study spent, in training examples that went through a training step.

    Attributes:
        tier1: By probes.
        tier2: By refinements, and by measurements in gradient equivalents.
        verification: By full trainings.
        full_search: What training every configuration fully once would have taken.
        seconds: Wall-clock seconds by phase.
    """

    tier1: int
    tier2: int
    verification: int
    full_search: int
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EarlierStudies:
    """From which studies so many first configurations and results are taken.

    `left_out` says why a study could not be used, `skipped` how many configurations for which why.
    """

    used: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    num_first: int = 0
    num_results: int = 0


@dataclass(frozen=True)
class SearchResult:
    """A whole study as its ledger tells it; what reports, exports and MLflow are made from.

    Attributes:
        study_id: Name of the study folder.
        spec_digest: sha256 of what determines the results (not resources, tracking, output).
        spec: The validated spec as plain data.
        status: `running`, `interrupted`, `finished` or `failed`.
        rungs: The ladder.
        trials: In order of suggestion.
        decisions: In order.
        profiles: Tier-2 measurements.
        score_report: None until scoring.
        verifications: One per (trial, seed).
        winner: Trial id of the verified best; None until then.
        winner_reason: Why it won, in one sentence.
        cost: What was spent.
        environment: Versions, hardware, command, git commit.
        started: Unix time of the first event.
        finished: Unix time of the last event.
        race: Looks of the race over seeds; empty without one.
        proxies: Trial id -> training-free proxy, with such a filter; and whether it was filtered.
        fronts: Pareto fronts, with several objectives; at a rung, then of the full trainings.
        stop_audit: How often early stops were wrong; None where none was audited.
        rank_correlations: How rungs ordered the trials they share, for pairs that share any.
        earlier: What was taken from earlier studies; None without a warm start.
        tie_break: Whether tier 2 broke ties at promotions; None where it was not asked for.
        tie_choices: The cuts that it settled, in order.
    """

    study_id: str
    spec_digest: str
    spec: Mapping[str, Any]
    status: Literal["running", "interrupted", "finished", "failed"]
    rungs: tuple[Rung, ...]
    trials: tuple[TrialResult, ...]
    decisions: tuple[Decision, ...]
    profiles: tuple[FlatnessProfile, ...]
    score_report: ScoreReport | None
    verifications: tuple[Verification, ...]
    winner: str | None
    winner_reason: str
    cost: Cost
    environment: Mapping[str, Any]
    started: float
    finished: float
    race: tuple[RaceLook, ...] = ()
    fronts: tuple[ParetoFront, ...] = ()
    proxies: Mapping[str, ProxyScore] = field(default_factory=dict)
    stop_audit: StopAudit | None = None
    rank_correlations: tuple[RankCorrelation, ...] = ()
    tie_break: TieBreak | None = None
    tie_choices: tuple[TieChoice, ...] = ()
    earlier: EarlierStudies | None = None
