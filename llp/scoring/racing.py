"""Racing over seeds: who is still in, and when the order is settled.

The last few configurations are trained fully with one more common seed at a time. After `n` seeds
there is a *look*: for two configurations i and j with paired differences of validation accuracy
over the seeds, of mean d and standard deviation s, the bound

    U_ij(n) = d + t(1 - alpha_n, n - 1) * s / sqrt(n),    s^2 at least 1 / (12 num_validation^2)

is above the true mean difference mu_i - mu_j. The error rate alpha is split over the K - 1 rivals
of the true best (Bonferroni) and over the looks, `alpha_n = alpha / (K - 1) * (n - 1) / sum (m -
1)`: looks with more degrees of freedom get more, because with two seeds hardly anything can be told
at any level. All bounds that involve the true best hold at all looks together with probability
1 - alpha, whatever rule stops the race.

i is *out* when some j of the race has U_ij < 0. The race is *settled* when no one left can be
better than the leader by more than `margin`: U_iw <= margin. So, for normal differences,

    P(settled and the true mean of the winner is below the best one by more than margin) <= alpha.

(The seed noise need not be equal between configurations, and its common part cancels.) The margin
may depend on the data, since the bounds hold together; by default it is the standard error that the
validation images leave in a difference, which no number of seeds can resolve:
`sqrt(2 p (1 - p) / num_validation)` at the leader's accuracy p.

Every look is a pure function of the accuracies; a race that was killed takes the same decisions.

Repeated confidence intervals: Jennison and Turnbull, JRSS B 51 (1989). Good selection with an
indifference zone and common random numbers: Kim and Nelson, ACM TOMACS 11 (2001). Against uniform
spending and the normal-mixture sequential t-test (scales 1, 2, 3.2) this spending had the most
power at 8 looks for effects of 1 and 2 standard deviations: 44 % and 97 % (uniform 36 % and 94 %,
mixtures 23 to 27 % and 85 to 88 %; alpha 0.025).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

from llp.records import RaceLook, Verification

MIN_SEEDS = 2
"""Differences over fewer seeds have no standard deviation."""


@dataclass(frozen=True)
class RaceRules:
    """What was agreed on before the race.

    Attributes:
        entrants: Trial ids, best score first; ties in accuracy go to the earlier one.
        seeds: In order; their number is the budget of each configuration.
        first_look: Seeds before the first look, at least `MIN_SEEDS`.
        error_rate: alpha, in (0, 1).
        margin: Difference in accuracy that counts as none, in [0, 1); None: see above.
        num_validation: Validation images behind every accuracy.
    """

    entrants: tuple[str, ...]
    seeds: tuple[int, ...]
    first_look: int = MIN_SEEDS
    error_rate: float = 0.05
    margin: float | None = None
    num_validation: int = 0

    def __post_init__(self) -> None:
        if not MIN_SEEDS <= self.first_look <= len(self.seeds):
            raise ValueError(
                f"the first look at {self.first_look} seeds is not between {MIN_SEEDS} and "
                f"{len(self.seeds)}"
            )

    @property
    def looks(self) -> range:
        """Numbers of seeds at which there is a look."""
        return range(self.first_look, len(self.seeds) + 1)

    def level(self, num_seeds: int) -> float:
        """alpha_n: the error that the look at `num_seeds` may spend on one pair."""
        share = (num_seeds - 1) / sum(n - 1 for n in self.looks)
        return self.error_rate / max(1, len(self.entrants) - 1) * share


Accuracies = Mapping[str, Mapping[int, float]]
"""Trial id -> seed -> validation accuracy; NaN for a full training that failed for good."""


def upper_bound(first: Sequence[float], second: Sequence[float], rules: RaceRules) -> float:
    """U_ij: what mean(first) - mean(second) is below; accuracies of the same seeds, in order."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    num = len(differences)
    rounding = 1 / (12 * rules.num_validation**2) if rules.num_validation else 0.0
    deviation = math.sqrt(max(stdev(differences) ** 2, rounding))
    return fmean(differences) + _quantile(rules.level(num), num - 1) * deviation / math.sqrt(num)


@functools.cache
def _quantile(level: float, degrees: int) -> float:
    return float(student.ppf(1 - level, degrees))


def look(
    accuracies: Accuracies, racing: Sequence[str], num_seeds: int, rules: RaceRules
) -> RaceLook:
    """The look after `num_seeds` seeds of all that are still `racing`.

    Raises:
        KeyError: Some full training that belongs to this look has not ended.
        ValueError: No configuration is left.
    """
    values = {name: [accuracies[name][s] for s in rules.seeds[:num_seeds]] for name in racing}
    failed = [name for name in racing if not all(map(math.isfinite, values[name]))]
    alive = [name for name in racing if name not in failed]
    out = dict.fromkeys(failed, "a full training failed")
    if not alive:
        return RaceLook(num_seeds, "", (), out, settled=True, margin=rules.margin or 0.0)
    means = {name: fmean(values[name]) for name in alive}
    leader = max(alive, key=lambda name: (round(means[name], 12), -rules.entrants.index(name)))
    bounds = {
        (i, j): upper_bound(values[i], values[j], rules) for i in alive for j in alive if i != j
    }
    for name in alive:
        beaten = [(bounds[name, j], j) for j in alive if j != name and bounds[name, j] < 0]
        if beaten:
            bound, by = min(beaten)
            out[name] = f"at least {-100 * bound:.2f} points below {by}"
    margin = rules.margin if rules.margin is not None else image_error(means[leader], rules)
    left = tuple(name for name in alive if name not in out)
    at_most = {name: bounds[name, leader] for name in alive if name != leader}
    return RaceLook(
        num_seeds,
        leader,
        left,
        out,
        settled=all(at_most[name] <= margin for name in left if name != leader),
        margin=margin,
        behind={name: means[leader] - means[name] for name in alive if name != leader},
        ahead_at_most=at_most,
    )


def image_error(accuracy: float, rules: RaceRules) -> float:
    """Standard error of the difference of two accuracies over the validation images."""
    if not rules.num_validation:
        return 0.0
    num = rules.num_validation
    p = (num * min(max(accuracy, 0.0), 1.0) + 0.5) / (num + 1)
    return math.sqrt(2 * p * (1 - p) / num)


def race(accuracies: Accuracies, rules: RaceRules) -> tuple[RaceLook, ...]:
    """All looks that the accuracies allow, in order; ends with the first that settles the race."""
    looks: list[RaceLook] = []
    racing: Sequence[str] = rules.entrants
    for num_seeds in rules.looks:
        needed = rules.seeds[:num_seeds]
        if any(seed not in accuracies.get(name, {}) for name in racing for seed in needed):
            break
        looks.append(look(accuracies, racing, num_seeds, rules))
        if looks[-1].settled:
            break
        racing = looks[-1].racing
    return tuple(looks)


def accuracies_of(verifications: Sequence[Verification]) -> dict[str, dict[int, float]]:
    """Trial id -> seed -> validation accuracy of the full trainings that ended with a result."""
    found: dict[str, dict[int, float]] = {}
    for v in verifications:
        found.setdefault(v.trial_id, {})[v.seed] = v.validation_accuracy
    return found


def race_sentence(
    looks: Sequence[RaceLook],
    accuracies: Accuracies,
    rules: RaceRules,
    *,
    judged_by: str = "validation accuracy",
) -> str:
    """What the race says of its winner, how sure that is, and what it does not say."""
    last = looks[-1]
    mean = fmean(accuracies[last.leader][seed] for seed in rules.seeds[: last.num_seeds])
    others = [name for name in last.racing if name != last.leader]
    parts = [
        f"{last.leader} won the race over seeds: {100 * mean:.2f} % {judged_by} on average "
        f"over {last.num_seeds} seeds"
    ]
    parts += [
        f"{name} was out after {at.num_seeds} seeds ({why})"
        for at in looks
        for name, why in at.out.items()
    ]
    if last.settled:
        sure = f"The chance that another of the {len(rules.entrants)} is better on average"
        sure += f" by more than {100 * last.margin:.2f} points" if last.margin > 0 else ""
        sure += f" is at most {100 * rules.error_rate:g} %"
        if others:
            parts.append(f"{', '.join(others)} cannot be better by more than the margin")
    else:
        most = max(last.ahead_at_most[name] for name in others)
        sure = (
            f"The order of {last.leader} and {', '.join(others)} is not settled: the budget of "
            f"{last.num_seeds} seeds ended first, and a rival may be up to {100 * most:.2f} points "
            f"better (error rate {100 * rules.error_rate:g} %)"
        )
    error = image_error(mean, rules)
    images = ""
    if error > 0:
        images = (
            f" This is about seeds on the same {rules.num_validation:,} validation images; other "
            f"images alone move a difference by about {100 * error:.2f} points."
        )
    return f"{'; '.join(parts)}. {sure}.{images}"
