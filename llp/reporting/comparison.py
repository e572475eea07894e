"""Configurations of a matrix side by side: winners, costs, and whether they order trials alike.

A *stage* is one rung of one configuration with the validation accuracy of every trial that finished
it. Two stages are compared over the trials they have in common, and only where those trials are the
same hyperparameters. The *reference* is the configuration that probed on most data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llp.records import Rung
from llp.reporting import formats
from llp.reporting.figures.ranks import kendall
from llp.reporting.runs import Entry
from llp.reporting.study import final_on, states
from llp.reporting.uncertainty import Difference, Spread, difference, pooled_spread

CLOSE = 1e-9
NEAR = 0.05
"""Configurations whose mean test accuracy is farther below the best do not enter the spread."""


@dataclass(frozen=True)
class Winner:
    """What one configuration found.

    Attributes:
        entry: The configuration.
        trial_id: Its winner.
        accuracies: Test accuracies of its full trainings, by seed.
        num_images: Test images.
        hits: Share of the trainings that were right on each test image, [N]; None where the
            predictions of one were not kept.
    """

    entry: Entry
    trial_id: str
    accuracies: Mapping[int, float]
    num_images: int
    hits: NDArray[np.float64] | None

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return fmean(self.accuracies.values())


def winners(entries: Sequence[Entry]) -> dict[str, Winner]:
    """The winner of every finished configuration that has one."""
    found = {}
    for entry in entries:
        runs = [t for t in entry.of_winner() if t.verification]
        if entry.status != "finished" or not runs:
            continue
        done = {
            t.seed: t.verification
            for t in runs
            if t.verification and math.isfinite(t.verification.test_accuracy)
        }
        if not done:
            continue
        said = [t.predictions for t in runs]
        known = [p.hits.astype(float) for p in said if p is not None]
        found[entry.name] = Winner(
            entry=entry,
            trial_id=runs[0].trial_id,
            accuracies={seed: v.test_accuracy for seed, v in done.items()},
            num_images=max(v.num_test_examples for v in done.values()),
            hits=np.mean(known, axis=0)
            if len(known) == len(said) and len({len(k) for k in known}) == 1
            else None,
        )
    return found


def top_fraction(entry: Entry) -> float:
    """The largest share of the training images that was probed on."""
    rungs = entry.result.rungs if entry.result else ()
    return max((rung.data_fraction for rung in rungs), default=0.0)


def reference(found: Mapping[str, Winner]) -> Winner | None:
    """The winner of the configuration that probed on most data, and of several the dearest."""

    def dearness(winner: Winner) -> tuple[float, int]:
        result = winner.entry.result
        return top_fraction(winner.entry), result.cost.tier1 if result else 0

    return max(found.values(), key=dearness, default=None)


def cheapest(found: Mapping[str, Winner]) -> Winner | None:
    """The winner of the configuration, other than the reference, whose tier 1 cost least."""
    best = reference(found)
    return min(
        (winner for winner in found.values() if winner is not best),
        key=lambda w: w.entry.result.cost.tier1 if w.entry.result else 0,
        default=None,
    )


def spread(entries: Sequence[Entry]) -> Spread:
    """Between full trainings of the same hyperparameters, pooled over the good ones of the matrix.

    Good is what lies within `NEAR` of the best mean: bad configurations vary much more, and would
    blur differences between good ones. The same trial with the same seed in two studies is one
    training done twice, and counts once.
    """
    groups: dict[str, dict[int, list[float]]] = {}
    for entry in entries:
        known = settings(entry)
        for v in entry.result.verifications if entry.result else ():
            if math.isfinite(v.test_accuracy):
                key = f"{v.trial_id} {known[v.trial_id]}"
                groups.setdefault(key, {}).setdefault(v.seed, []).append(v.test_accuracy)
    runs = [[fmean(again) for again in seeds.values()] for seeds in groups.values()]
    best = max((fmean(values) for values in runs), default=0.0)
    return pooled_spread(values for values in runs if fmean(values) >= best - NEAR)


def settings(entry: Entry) -> dict[str, str]:
    """Trial -> its hyperparameters, as text that is equal exactly when they are."""
    return {
        trial.trial.trial_id: repr(sorted(trial.trial.hyperparameters.items()))
        for trial in (entry.result.trials if entry.result else ())
    }


def same_configuration(first: Winner, second: Winner) -> bool:
    """Whether two winners are the same trial with the same hyperparameters."""
    values = [settings(winner.entry)[winner.trial_id] for winner in (first, second)]
    return first.trial_id == second.trial_id and values[0] == values[1]


def against(first: Winner, second: Winner, between: Spread) -> Difference:
    """Test accuracy of one winner minus that of another."""
    hits = None
    if first.hits is not None and second.hits is not None:
        hits = (first.hits, second.hits)
    return difference(
        list(first.accuracies.values()),
        list(second.accuracies.values()),
        between,
        num_images=min(first.num_images, second.num_images),
        hits=hits,
    )


@dataclass(frozen=True)
class Stage:
    """One rung of one configuration.

    Attributes:
        entry: The configuration.
        rung: The rung.
        label: Name of the configuration, with the fraction where it has several rungs.
        accuracies: Trial -> validation accuracy at the end of the rung.
        settings: Trial -> its hyperparameters, see `settings`.
        budget: What fixes a probe beside its trial: stages of the same budget are the same
            trainings, done again.
        top: Whether it is the highest rung.
    """

    entry: Entry
    rung: Rung
    label: str
    accuracies: Mapping[str, float]
    settings: Mapping[str, str]
    budget: tuple[object, ...]
    top: bool


def stages(entries: Sequence[Entry]) -> list[Stage]:
    """All rungs that at least one trial finished, in the order of the file and of the ladder."""
    found = []
    for entry in entries:
        result = entry.result
        if result is None:
            continue
        where, known = states(result), settings(entry)
        for rung in result.rungs:
            finals = {}
            for trial in result.trials:
                trial_id = trial.trial.trial_id
                point = final_on(trial, rung.rung)
                if point and where.get((trial_id, rung.rung)) in {"promoted", "finished"}:
                    finals[trial_id] = point.validation_accuracy
            label = formats.clean(entry.name)
            if len(result.rungs) > 1:
                label += f", {100 * rung.data_fraction:.3g} %".replace(" %", f"{formats.NBSP}%")
            if finals:
                found.append(
                    Stage(
                        entry,
                        rung,
                        label,
                        finals,
                        known,
                        _budget(entry, rung, result.rungs[0]),
                        rung is result.rungs[-1],
                    )
                )
    return found


def _budget(entry: Entry, rung: Rung, first: Rung) -> tuple[object, ...]:
    tier1 = entry.spec.get("tier1")
    warm = isinstance(tier1, Mapping) and tier1.get("promotion") == "warm"
    own = (entry.name, rung.rung) if warm and rung is not first else ()
    return (rung.num_examples, rung.epochs, *own)


def distinct(found: Sequence[Stage]) -> list[Stage]:
    """The stages without those that repeat the trainings of another one with more trials."""
    kept: dict[tuple[object, ...], Stage] = {}
    for stage in found:
        before = kept.get(stage.budget)
        if before is None or len(stage.accuracies) > len(before.accuracies):
            kept[stage.budget] = stage
    return [stage for stage in found if kept[stage.budget] is stage]


def common_trials(first: Stage, second: Stage) -> list[str]:
    """Trials that finished both and are the same hyperparameters in both."""
    return [
        trial_id
        for trial_id in first.accuracies
        if trial_id in second.accuracies and first.settings[trial_id] == second.settings[trial_id]
    ]


def agreement_data(found: Sequence[Stage]) -> pd.DataFrame:
    """One row a pair of stages of different configurations and different budgets.

    Columns: `first`, `second`, `num_trials`, `tau` (Kendall's tau-b) with its 90 % bootstrap
    interval `low` to `high`, `top` (how many of the best three of the second are among the best
    three of the first, of the common trials), `second_best` (place that the first gives to the best
    of the second).
    """
    rows = []
    for first, second in itertools.combinations(found, 2):
        if first.entry.name == second.entry.name or first.budget == second.budget:
            continue
        shared = common_trials(first, second)
        x = [first.accuracies[t] for t in shared]
        y = [second.accuracies[t] for t in shared]
        tau, low, high = kendall(x, y)
        best, other = order(first, shared), order(second, shared)
        rows.append(
            {
                "first": first.label,
                "second": second.label,
                "num_trials": len(shared),
                "tau": tau,
                "low": low,
                "high": high,
                "top": len(set(best[:3]) & set(other[:3])) if len(shared) > 3 else None,
                "second_best": best.index(other[0]) + 1 if shared else None,
            }
        )
    columns = ["first", "second", "num_trials", "tau", "low", "high", "top", "second_best"]
    return pd.DataFrame(rows, columns=columns)


def order(stage: Stage, trials: Sequence[str] | None = None) -> list[str]:
    """Trials by validation accuracy there, best first; ties by number."""
    chosen = list(stage.accuracies) if trials is None else list(trials)
    return sorted(chosen, key=lambda trial_id: (-stage.accuracies[trial_id], trial_id))


def repeats(entries: Sequence[Entry]) -> tuple[int, int, float]:
    """Trainings that several studies did alike: how many, how many agree, largest difference.

    Those are probes of the same hyperparameters on the same rung (images and epochs), and full
    trainings of the same trial with the same seed. On one CPU they agree to the bit; on a GPU the
    order of additions is not fixed.
    """
    values: dict[tuple[object, ...], list[float]] = {}
    for stage in stages(entries):
        for trial_id, accuracy in stage.accuracies.items():
            key = ("probe", *stage.budget, trial_id, stage.settings[trial_id])
            values.setdefault(key, []).append(accuracy)
    for entry in entries:
        known = settings(entry)
        for v in entry.result.verifications if entry.result else ():
            again = ("full", v.seed, v.trial_id, known[v.trial_id])
            values.setdefault(again, []).append(v.test_accuracy)
    gaps = [max(seen) - min(seen) for seen in values.values() if len(seen) > 1]
    return len(gaps), sum(gap < CLOSE for gap in gaps), max(gaps, default=0.0)


def probed_on(entry: Entry) -> str:
    """What tier 1 probed on, in words: `10 %`, or `10, 20, 30 and 40 % in one search`."""
    tier1 = entry.spec.get("tier1")
    fractions = tier1.get("data_fractions", []) if isinstance(tier1, Mapping) else []
    shares = [f"{100 * fraction:.3g}" for fraction in fractions if formats.is_number(fraction)]
    if len(shares) < 2:
        return f"{''.join(shares) or '?'}{formats.NBSP}%"
    return f"{formats.listed(shares)}{formats.NBSP}% in one search"


def summary_data(entries: Sequence[Entry]) -> pd.DataFrame:
    """One row a configuration, in the order of the file; what it has no number for is missing.

    Columns: `name`, `status`, `probed`, `trials`, `winner`, `accuracy` (mean test accuracy),
    `difference` to the reference with `low` and `high`, `verdict`, `tier1`, `tier2`,
    `verification`, `total` (samples), `tier1_ratio`, `total_ratio` (to the reference),
    `seconds_tier1`, `seconds_total`.
    """
    found = winners(entries)
    best, between = reference(found), spread(entries)
    rows = []
    for entry in entries:
        row: dict[str, object] = {
            "name": entry.name,
            "status": entry.status,
            "probed": probed_on(entry),
        }
        result, won = entry.result, found.get(entry.name)
        if result is not None:
            cost = result.cost
            total = cost.tier1 + cost.tier2 + cost.verification
            row |= {
                "trials": len(result.trials),
                "winner": result.winner,
                "tier1": cost.tier1,
                "tier2": cost.tier2,
                "verification": cost.verification,
                "total": total,
                "seconds_tier1": cost.seconds.get("tier1"),
                "seconds_total": sum(cost.seconds.values()),
            }
            if best is not None and best.entry.result is not None and entry.status == "finished":
                base = best.entry.result.cost
                row["tier1_ratio"] = cost.tier1 / base.tier1 if base.tier1 else None
                whole = base.tier1 + base.tier2 + base.verification
                row["total_ratio"] = total / whole if whole else None
        if won is not None:
            row["accuracy"] = won.mean
            if best is not None:
                row |= _verdict(won, best, between)
        rows.append(row)
    columns = ["name", "status", "probed", "trials", "winner", "accuracy", "difference", "low"]
    columns += ["high", "verdict", "tier1", "tier2", "verification", "total", "tier1_ratio"]
    columns += ["total_ratio", "seconds_tier1", "seconds_total"]
    return pd.DataFrame(rows, columns=columns, dtype=object)


def _verdict(won: Winner, best: Winner, between: Spread) -> dict[str, object]:
    if won is best:
        return {"verdict": "the reference"}
    if same_configuration(won, best):
        return {"verdict": "the same configuration"}
    found = against(won, best, between)
    word = "cannot be told apart" if not found.decided else "better" if found.value > 0 else "worse"
    return {
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "verdict": word,
    }
