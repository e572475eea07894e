"""What every section asks of a `SearchResult`: who got how far, and how well it did.

The *state* of a trial on a rung is one word: `promoted` (finished and went on), `finished` (to the
rung's end, then no further), `stopped` (by a rule, before the end), `diverged`, `failed`,
`out_of_memory`, or `unfinished` (the study ended or still runs). The *common rung* is the one most
trials were trained on: the only place where all of them can be compared at equal budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from llp.records import CurvePoint, Rung, SearchResult, TrialResult
from llp.reporting import formats

STATES = (
    "promoted",
    "finished",
    "stopped",
    "diverged",
    "failed",
    "out_of_memory",
    "unfinished",
)
FAILURES = ("diverged", "failed", "out_of_memory")


def points_on(trial: TrialResult, rung: int) -> tuple[CurvePoint, ...]:
    """The points of `trial` on `rung`, in order of epoch; empty when it has none."""
    found = [point for curve in trial.curves if curve.rung == rung for point in curve.points]
    return tuple(sorted(found, key=lambda point: point.epoch))


def states(result: SearchResult) -> dict[tuple[str, int], str]:
    """`(trial_id, rung)` -> state, for every rung a trial was started on."""
    highest: dict[str, int] = {}
    for decision in result.decisions:
        if decision.kind == "promote":
            highest[decision.trial_id] = max(decision.rung, highest.get(decision.trial_id, 0))
    found = {}
    for trial in result.trials:
        trial_id = trial.trial.trial_id
        started = {curve.rung for curve in trial.curves}
        top = max([*started, highest.get(trial_id, 0)])
        for rung in result.rungs:
            if rung.rung in started:
                found[trial_id, rung.rung] = _state(trial, rung, top)
    return found


def _state(trial: TrialResult, rung: Rung, top: int) -> str:
    if top > rung.rung:
        return "promoted"
    if trial.outcome != "completed":
        return trial.outcome
    points = points_on(trial, rung.rung)
    return "finished" if points and points[-1].epoch >= rung.epochs else "unfinished"


def reached(trial: TrialResult) -> int:
    """The highest rung `trial` reported on; 0 for none."""
    return max((curve.rung for curve in trial.curves if curve.points), default=0)


def final_on(trial: TrialResult, rung: int) -> CurvePoint | None:
    """The last point of `trial` on `rung` with a finite validation accuracy."""
    usable = [p for p in points_on(trial, rung) if math.isfinite(p.validation_accuracy)]
    return usable[-1] if usable else None


def common_rung(result: SearchResult) -> Rung | None:
    """The rung most trials were started on (the higher of two), or None when nothing ran."""
    started = [
        (sum(any(curve.rung == rung.rung for curve in trial.curves) for trial in result.trials), i)
        for i, rung in enumerate(result.rungs)
    ]
    num, index = max(started, default=(0, 0))
    return result.rungs[index] if num else None


def leader(result: SearchResult) -> TrialResult | None:
    """The trial with the best last validation accuracy on the highest rung that has any.

    Diverged and failed trials do not lead; None when no other has a usable point.
    """
    usable = [trial for trial in result.trials if trial.outcome not in FAILURES]
    for rung in sorted(result.rungs, key=lambda rung: rung.rung, reverse=True):
        finals = [(trial, final_on(trial, rung.rung)) for trial in usable]
        known = [(trial, point) for trial, point in finals if point is not None]
        if known:
            return max(known, key=lambda item: item[1].validation_accuracy)[0]
    return None


def find_trial(result: SearchResult, trial_id: str | None) -> TrialResult | None:
    """The trial with this id, or None."""
    return next((t for t in result.trials if t.trial.trial_id == trial_id), None)


@dataclass(frozen=True)
class Verified:
    """The full trainings of one configuration.

    Attributes:
        trial_id: The configuration.
        accuracies: Finite test accuracies in order of seed.
        mean: Their mean in [0, 1].
        standard_error: Sample standard deviation / sqrt(n); NaN for fewer than two seeds.
        num_test_examples: Size of the test split.
    """

    trial_id: str
    accuracies: tuple[float, ...]
    mean: float
    standard_error: float
    num_test_examples: int

    @property
    def sampling_interval(self) -> tuple[float, float]:
        """What the finite test split alone leaves open: `wilson_interval` of the mean."""
        return wilson_interval(self.mean, self.num_test_examples)


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """The 95 % score interval of a share in [0, 1] of `num` cases (Wilson 1927).

    Unlike share ± 1.96 standard errors it has a width where all or none succeed. NaN where there is
    no share or no case.

    >>> [round(end, 4) for end in wilson_interval(1.0, 100)]
    [0.963, 1.0]
    """
    if num <= 0 or not 0 <= share <= 1:
        return math.nan, math.nan
    z = 1.959964
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    spread = share * (1 - share) / num + z * z / (4 * num * num)
    half = z * math.sqrt(spread) / (1 + z * z / num)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def verified(result: SearchResult) -> tuple[Verified, ...]:
    """Every verified configuration, best mean test accuracy first."""
    groups: dict[str, list[tuple[int, float, int]]] = {}
    for v in result.verifications:
        if math.isfinite(v.test_accuracy):
            groups.setdefault(v.trial_id, []).append((v.seed, v.test_accuracy, v.num_test_examples))
    rows = []
    for trial_id, runs in groups.items():
        accuracies = tuple(accuracy for _, accuracy, _ in sorted(runs))
        error = stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else math.nan
        rows.append(Verified(trial_id, accuracies, mean(accuracies), error, runs[0][2]))
    return tuple(sorted(rows, key=lambda row: (-row.mean, row.trial_id)))


@dataclass(frozen=True)
class Axis:
    """One searched hyperparameter as an axis.

    Attributes:
        name: Its name.
        categories: Labels in order for a choice; empty for a number.
        low: Lower end of a number.
        high: Upper end of a number.
        log: Whether the number is searched, and drawn, on a logarithmic scale.
    """

    name: str
    categories: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    def value(self, raw: object) -> float:
        """`raw` on the axis: its number or the index of its category; NaN when inactive."""
        if raw is None:
            return math.nan
        if self.categories:
            label = formats.number(raw)
            return float(self.categories.index(label)) if label in self.categories else math.nan
        return float(raw) if formats.is_number(raw) else math.nan  # type: ignore[arg-type]

    def position(self, raw: object) -> float:
        """`raw` as a position in [0, 1] along the axis; NaN when inactive."""
        value = self.value(raw)
        if self.categories:
            return (value + 0.5) / len(self.categories)
        if self.log:
            span = math.log(self.high) - math.log(self.low)
            return (math.log(value) - math.log(self.low)) / span if value > 0 else math.nan
        return (value - self.low) / (self.high - self.low)


def axes(result: SearchResult) -> tuple[Axis, ...]:
    """The hyperparameters that were searched, in the order of the experiment file.

    Fixed values are left out. A parameter that the spec does not describe takes its range from the
    values tried.
    """
    space = result.spec.get("search_space")
    space = space if isinstance(space, Mapping) else {}
    names = list(space)
    for trial in result.trials:
        names += [name for name in trial.trial.hyperparameters if name not in names]
    made = []
    for name in names:
        tried = [
            trial.trial.hyperparameters[name]
            for trial in result.trials
            if name in trial.trial.hyperparameters
        ]
        axis = _axis(str(name), space.get(name), tried)
        if axis is not None:
            made.append(axis)
    return tuple(made)


def _axis(name: str, domain: object, tried: Sequence[object]) -> Axis | None:
    if isinstance(domain, Mapping):
        kind = domain.get("type")
        if kind == "fixed":
            return None
        if kind == "choice":
            return Axis(name, categories=_labels([*domain.get("values", []), *tried]))
        low, high = domain.get("low"), domain.get("high")
        numbers = [value for value in (low, high, *tried) if formats.is_number(value)]
        log = kind == "loguniform" or bool(domain.get("log"))
    else:
        if any(not formats.is_number(value) for value in tried):
            return Axis(name, categories=_labels(tried))
        numbers, log = list(tried), False
    if len(set(numbers)) < 2:
        return None
    bottom, top = float(min(numbers)), float(max(numbers))  # type: ignore[type-var, arg-type]
    return Axis(name, low=bottom, high=top, log=log and bottom > 0)


def _labels(values: Sequence[object]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(formats.number(value) for value in values if value is not None))
