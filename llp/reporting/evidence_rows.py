"""What an evidence run found, as plain rows: the page and the JSON are made from these alone.

Words: a *ranking* orders the configurations of a study by what its probes know. A *strategy* is a
whole way of spending compute until one configuration is chosen. *Regret* is how many percentage
points the chosen one's test accuracy lies below the best one's, both means over seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llp.records import Interval

TARGETS = {"clean": "test accuracy", "corrupted": "accuracy on corrupted test images"}


@dataclass(frozen=True)
class Ranking:
    """How well one ranking agrees with the fully trained results.

    Attributes:
        name: `validation_accuracy`, `T1`, `T1+h+T2`, ...
        tau: Kendall's tau-b with the target.
        interval: 90 %; over configurations in a study, over studies in the table of all.
        regret_at_1: Of the first-ranked, in points.
        regret_at_5: Of the best among the first five.
        cost: Probes, and metrics where they are used, over full trainings of all configurations.
        learnt_from: Full trainings that the ranking's weights were learnt from, at most.
        num_studies: Studies that this is the mean over.
    """

    name: str
    tau: float
    interval: Interval
    regret_at_1: float
    regret_at_5: float
    cost: float
    learnt_from: int = 0
    num_studies: int = 1


@dataclass(frozen=True)
class MetricRow:
    """What one tier-2 metric says, in one study or in the mean over studies.

    Attributes:
        name: The metric.
        num: Configurations it is judged on: those with a measurement and a result.
        tau: With the target.
        interval: 90 %, over configurations.
        given_t1: Partial tau: both ranks with T1 and the training loss taken out.
        given_t1_interval: Of that.
        given_t1_h: With the hyperparameters taken out as well; NaN with too few configurations.
        given_t1_h_interval: Of that.
        log_learning_rate: Tau of the metric with the logarithm of the learning rate.
        noise: Median standard error over the spread between configurations.
        dropped: Whether that is over a half, so that the score does not use the metric.
        samples: Mean cost when measured with the others, in training examples.
        samples_alone: Mean cost had it been the only one.
    """

    name: str
    num: int
    tau: float
    interval: Interval
    given_t1: float
    given_t1_interval: Interval
    given_t1_h: float
    given_t1_h_interval: Interval
    log_learning_rate: float
    noise: float
    dropped: bool
    samples: float
    samples_alone: float


@dataclass(frozen=True)
class Strategy:
    """What a way of spending compute ends with, in the mean over seeds and draws of configurations.

    Attributes:
        name: In words.
        cost: In full trainings.
        regret: Of what it chooses, in points.
        worse_by: Its regret minus that of the first strategy, on the same draws.
        interval: 90 % of that difference, over draws of configurations.
    """

    name: str
    cost: float
    regret: float
    worse_by: float
    interval: Interval


@dataclass(frozen=True)
class Verdict:
    """Whether adding tier 2 improves a ranking.

    Attributes:
        gain: Cross-validated gain in tau; NaN where it could not be judged.
        interval: 90 %.
        shuffled: Gain of the same metrics shuffled over configurations.
        enters: Whether its lower limit is above 0, so that the score uses tier 2.
        sentence: In words.
    """

    gain: float
    interval: Interval
    shuffled: float
    enters: bool
    sentence: str


@dataclass(frozen=True)
class TargetEvidence:
    """The evidence of one study for one target.

    Attributes:
        target: A key of `TARGETS`.
        num: Configurations with a result.
        rankings: Noise ceiling last.
        metrics: In the order in which they were measured.
        verdict: On tier 2 in this study.
    """

    target: str
    num: int
    rankings: tuple[Ranking, ...]
    metrics: tuple[MetricRow, ...]
    verdict: Verdict


@dataclass(frozen=True)
class StudyEvidence:
    """One study.

    Attributes:
        name: Of the study.
        about: Dataset, network, recipe and probe in one line.
        num_trials: Configurations.
        num_diverged: Of them without a result.
        num_seeds: Full trainings of each.
        probe_share: Samples of the probes over those of one full training each.
        tier2_share: Samples of tier 2 over those of the probes.
        chosen: What the budget chose for the measurements, in words.
        targets: One entry a target.
        strategies: For the clean target.
        page: Link to the study's own page; empty when there is none.
        unfinished: What is missing of it; empty when it is finished.
    """

    name: str
    about: str
    num_trials: int
    num_diverged: int
    num_seeds: int
    probe_share: float
    tier2_share: float
    chosen: str
    targets: tuple[TargetEvidence, ...]
    strategies: tuple[Strategy, ...]
    page: str = ""
    unfinished: str = ""


@dataclass(frozen=True)
class Bar:
    """A promise and what became of it.

    Attributes:
        name: What was promised.
        value: What was measured; NaN where it was not.
        bar: What it was held against.
        met: Whether it was kept; None where nothing was measured.
        study: The study with that value, where it is the worst of all.
    """

    name: str
    value: float
    bar: float
    met: bool | None
    study: str = ""


@dataclass(frozen=True)
class Evidence:
    """A whole evidence run.

    Attributes:
        name: Of the run.
        studies: Those that are finished, or have at least one seed of every configuration.
        missing: Name and state of the others.
        rankings: Target -> rankings in the mean over studies.
        metrics: Target -> metrics in the mean over studies, with Student's intervals.
        verdicts: Target -> verdict from all studies together.
        bars: Promises.
        sentence: What all this says, made from the numbers.
    """

    name: str
    studies: tuple[StudyEvidence, ...]
    missing: tuple[tuple[str, str], ...]
    rankings: dict[str, tuple[Ranking, ...]]
    metrics: dict[str, tuple[MetricRow, ...]]
    verdicts: dict[str, Verdict]
    bars: tuple[Bar, ...]
    sentence: str


NO_INTERVAL = Interval(math.nan, math.nan)
