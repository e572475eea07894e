"""How well a rung orders trials as a higher one does, measured while the search runs.

Spearman's rank correlation of the validation accuracies of the trials that completed both rungs.
Those were promoted for being good on the lower one, so the number is *among those promoted* and is
below what all trials would show: of results that are jointly normal with .8 among all, the best
third show .53. Jobs that a rule stopped on the higher rung are missing too, for being poor
there. It is reported as what it is and is not corrected, since a correction rests on normality.

The interval is Fisher's with the variance `(1 + r^2 / 2) / (n - 3)` (Bonett and Wright, "Sample
size requirements for estimating Pearson, Kendall and Spearman correlations", Psychometrika 2000).
No `r` is taken as nearer to 1 than half a swap of neighbours among n trials would be, since 4 of 4
trials in the same order do not prove that all are.

Ranks are called weak when the *upper* end of the 90 % interval between two neighbouring rungs is
below .5 and at least a fifth of the trials that ended on the lower have ended on the higher too:
the first to be promoted are the very best, and hard to tell apart whatever the correlation. The
point estimate will not do: among the promoted it is below .5 for rungs that agree well. In
simulated searches over three rungs (all trials on the first, then the best third promoted, best
first, a look after each) stopping went off in this share of them, by the correlation of
neighbouring rungs among all trials:

    trials  rule                             .2    .38   .5    .7    .8    .9
    27      upper end                        .43   .31   .29   .13   .08   .03
    81      upper end                        .91   .86   .75   .40   .23   .06
    81      point estimate, 12 trials        1     1     .99   .90   .78   .34
    200     upper end                        1     .95   .93   .61   .27   .08

So a search of few trials cannot tell, and is left as it is; nor can one that promotes fewer than a
fifth. Stopping that goes off for nothing costs samples, never a good configuration.

The first rung is not lengthened then: `asha` fills it before any promotion unless eager, Hyperband
begins its next bracket a rung higher in any case. So once the correlation is known, nothing new is
to start there. Who wants it longer changes `tier1.data_fractions` of the next search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from llp.probing.state import SearchState
from llp.records import Interval, RankCorrelation

WEAK = 0.5
"""Rank correlation below which what is seen on a rung is no ground to give a trial up."""
CONFIDENCE = 0.9
"""Of the interval, two-sided."""
LEAST_TRIALS = 4
"""Trials without which the interval is everything."""
LEAST_SHARE = 0.2
"""Of the trials that ended on the lower rung, those that must have ended on the higher."""
EVERY_TRIAL, THEN_EVERY = 50, 10
"""Measured after each of the first trials of a rung, then after every tenth: a look costs O(n)."""


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN when one side is constant.

    >>> spearman([1, 2, 3, 4], [1, 3, 2, 4])
    0.8
    """
    x, y = stats.rankdata(first), stats.rankdata(second)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(x @ y / scale, -1.0, 1.0)) if scale else math.nan


def rank_interval(value: float, num_trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The interval of a rank correlation; [-1, 1] when it is NaN or there are too few trials.

    >>> interval = rank_interval(0.6, 20)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.254, 0.81)
    """
    if math.isnan(value) or num_trials < LEAST_TRIALS:
        return Interval(-1.0, 1.0, confidence)
    most = 1 - 6 / (num_trials**3 - num_trials)
    r = min(max(value, -most), most)
    error = math.sqrt((1 + r * r / 2) / (num_trials - 3))
    reach = float(stats.norm.ppf((1 + confidence) / 2)) * error
    low, high = math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)
    return Interval(min(low, value), max(high, value), confidence)


def is_due(state: SearchState, higher: int) -> bool:
    """Whether the correlations with rung `higher` are to be measured after its newest result."""
    num = len(state.completed.get(higher, ()))
    return 0 < num <= EVERY_TRIAL or (num > 0 and num % THEN_EVERY == 0)


def rank_correlations(state: SearchState, higher: int) -> list[RankCorrelation]:
    """One for each rung below `higher` that shares completed trials with it, lowest first."""
    found = []
    for lower in range(1, higher):
        pairs = [
            (state.result(trial_id, lower)[0], state.result(trial_id, higher)[0])
            for trial_id in state.completed.get(higher, ())
        ]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if pairs:
            value = spearman(*zip(*pairs, strict=True))
            interval = rank_interval(value, len(pairs))
            ended = _ended(state, lower)
            promoted = len(ended & _ended(state, higher))
            found.append(
                RankCorrelation(lower, higher, len(pairs), promoted, len(ended), value, interval)
            )
    return found


def weak_ranks(found: Iterable[RankCorrelation]) -> RankCorrelation | None:
    """The first of neighbouring rungs whose order is surely weak, None without one.

    A rule stops a job because it would miss the next rung; whether that judges it rightly is what
    neighbours tell. Rungs further apart are doubly selected.
    """
    for pair in found:
        enough = pair.num_promoted >= LEAST_SHARE * pair.num_below
        if pair.higher == pair.lower + 1 and enough and pair.interval.high < WEAK:
            return pair
    return None


def why_off(pair: RankCorrelation) -> str:
    """The reason that is recorded when stopping by forecast goes off."""
    return (
        f"rank_correlation: the order on rung {pair.lower} says too little about that on rung "
        f"{pair.higher}, Spearman {pair.value:.2f} among {pair.num_trials} trials promoted and "
        f"completed ({pair.interval.level:.0%} interval {pair.interval.low:.2f} to "
        f"{pair.interval.high:.2f}, all below {WEAK}); rules that stop by forecast are off for the "
        f"rest of tier 1"
    )


def _ended(state: SearchState, rung: int) -> set[str]:
    """Trials whose job on `rung` ended, failures left out."""
    outcomes = ("completed", "stopped", "diverged")
    return {
        name for (name, at), end in state.ends.items() if at == rung and end.outcome in outcomes
    }
