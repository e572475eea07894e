"""Ties at the cut of a rung: trials that its metric cannot tell apart, on both sides of the cut.

A rung of N results sends q on. Trials a (kept) and b (passed over) are *tied at the cut* when their
accuracies differ by no more than the standard error of the difference,

    sqrt(p_a (1 - p_a) / n + p_b (1 - p_b) / n),    n validation images, p as (n p + 1/2) / (n + 1),

a against the best that is passed over, b against the worst that is kept. The images are the same
for all trials, so this is an upper bound as long as their errors are not disjoint (see the head of
`scoring.choose`). Trials that are not tied are promoted, or not, exactly as without all of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llp.probing.standings import Place
from llp.records import TieChoice

MIN_TIED = 4
"""Fewer are left to the metric: flatness counts only beside trials that are fitted as well, and a
fit on their training losses needs more points than it has terms."""


@dataclass(frozen=True)
class TieAtCut:
    """Settle a tie before anything of it is promoted.

    Attributes:
        bracket: Number of the bracket.
        rung: Its rung, on which everything is over.
        tied: Trials at the cut, best first.
        num_kept: How many of them go on.
        standard_error: Of the difference between the two sides of the cut.
    """

    bracket: int
    rung: int
    tied: tuple[Place, ...]
    num_kept: int
    standard_error: float


def difference_error(a: float, b: float, num_images: int) -> float:
    """Standard error of the difference of two accuracies in [0, 1], each on `num_images`.

    >>> round(difference_error(0.9, 0.9, 400), 4)
    0.0213
    """
    shares = ((num_images * min(max(p, 0.0), 1.0) + 0.5) / (num_images + 1) for p in (a, b))
    return math.sqrt(sum(p * (1 - p) for p in shares) / num_images)


def clear(better: Place, worse: Place, num_images: int) -> bool:
    """Whether the metric tells two results apart."""
    a, b = -better[0], -worse[0]
    if not math.isfinite(b):
        return True
    return a - b > difference_error(a, b, num_images)


def tie_at_cut(
    ranked: Sequence[Place], quota: int, num_images: int, *, bracket: int = 0, rung: int = 1
) -> TieAtCut | None:
    """The tie at the cut after the first `quota` results; None without one of `MIN_TIED` trials."""
    if not 0 < quota < len(ranked) or clear(ranked[quota - 1], ranked[quota], num_images):
        return None
    last_in, first_out = ranked[quota - 1], ranked[quota]
    low, high = quota - 1, quota + 1
    while low > 0 and not clear(ranked[low - 1], first_out, num_images):
        low -= 1
    while high < len(ranked) and not clear(last_in, ranked[high], num_images):
        high += 1
    if high - low < MIN_TIED:
        return None
    error = difference_error(-last_in[0], -first_out[0], num_images)
    return TieAtCut(bracket, rung, tuple(ranked[low:high]), quota - low, error)


def settle(tie: TieAtCut, values: Mapping[str, float]) -> TieChoice:
    """The `num_kept` largest of the `values` go on; equal ones, and missing ones (0), by metric."""
    names = tuple(place[3] for place in tie.tied)
    found = {name: values.get(name, 0.0) for name in names}
    order = sorted(range(len(names)), key=lambda i: (-round(found[names[i]], 12), i))
    kept = {names[i] for i in order[: tie.num_kept]}
    return TieChoice(
        bracket=tie.bracket,
        rung=tie.rung,
        tied=names,
        accuracies={place[3]: -place[0] for place in tie.tied},
        values=found,
        kept=tuple(name for name in names if name in kept),
        usual=names[: tie.num_kept],
        standard_error=tie.standard_error,
    )
