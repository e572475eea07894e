"""Results of different rungs on one scale, for searchers that learn from a trial's first rung.

In Hyperband a bracket's trials begin on its own rung, and an accuracy after training on all images
is higher than one on a tenth of them whoever has it: told as they are, results would make a
searcher prefer what happened to be tried in a later bracket. So a result v of rung r is told as

    v - shift(r),    shift(r) = mean over trials that completed both of (v_r - v_lowest)

once two trials have completed both rungs, and before that with the difference of the means of all
results on the two rungs so far. A constant leaves the order within a rung as it is, which is all
that TPE looks at, and the differences that a Gaussian process looks at; ranks would throw those
away. Everything is a function of the ledger so far.
"""

from __future__ import annotations

import math
from statistics import fmean

from llp.probing.state import SearchState

MIN_PAIRS = 2
"""Trials with results on both rungs before the shift is that of pairs."""


def on_lowest_rung(state: SearchState, trial_id: str, rung: int, lowest: int = 1) -> float:
    """The validation accuracy of a trial on `rung` on the scale of the lowest; NaN without one."""
    value = _accuracy(state, trial_id, rung)
    if rung == lowest or math.isnan(value):
        return value
    here = _accuracies(state, rung)
    below = _accuracies(state, lowest)
    both = [here[name] - below[name] for name in here if name in below]
    if len(both) >= MIN_PAIRS:
        return value - fmean(both)
    return value - fmean(here.values()) + fmean(below.values()) if below else value


def _accuracies(state: SearchState, rung: int) -> dict[str, float]:
    found = {name: _accuracy(state, name, rung) for name, at in state.ends if at == rung}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _accuracy(state: SearchState, trial_id: str, rung: int) -> float:
    accuracy, _ = state.result(trial_id, rung)
    return accuracy if math.isfinite(accuracy) else math.nan
