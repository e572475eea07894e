"""What a sample of each configuration costs, by that of the average one: its *price*.

A rung says how many samples a job sees; a wide network or a small batch makes each of them dearer.
With `cost: seconds` the price comes from the times of ended jobs on the ledger; whoever may go up a
rung has ended one. Small rungs are dear by the sample whoever is on them (validation, the first
batch), so times are compared within a rung:

    log(seconds / samples) of trial i on rung k  =  log price_i + level_k,

`level_1 = 0`, `level_k` is the mean over the trials known on both rungs of what the higher one adds
to the lowest, and a trial's price is the mean over its rungs. With `cost: operations` it is the
number of multiply-adds of a forward pass, which the driver writes down beside each new trial; that
is the same on every machine, and blind to the batch size. A trial of which nothing is known yet,
a new one above all, has the mean price of those that are, which is 1.

Seconds differ from run to run, and decisions with them; from the same ledger they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from types import MappingProxyType
from typing import Literal, get_args

from llp.probing.state import SearchState

Cost = Literal["samples", "seconds", "operations"]
COSTS: tuple[str, ...] = get_args(Cost)
NO_PRICES: Mapping[str, float] = MappingProxyType({})


def prices(state: SearchState, cost: str) -> Mapping[str, float]:
    """Trial id -> price, of mean 1, for the trials of which it is known.

    Args:
        state: Of the search.
        cost: What is counted: one of `COSTS`. A sample is a sample with `samples`, so there is
            nothing to know.
    """
    if cost == "samples":
        return NO_PRICES
    known = dict(state.operations) if cost == "operations" else _seconds(state)
    known = {trial_id: value for trial_id, value in known.items() if trial_id in state.trials}
    if not known:
        return NO_PRICES
    mean = fmean(known.values())
    return {trial_id: value / mean for trial_id, value in known.items()}


def _seconds(state: SearchState) -> dict[str, float]:
    """Trial id -> seconds a sample on the lowest rung, as far as its ended jobs tell."""
    logs: dict[int, dict[str, float]] = {}
    for (trial_id, rung), end in state.ends.items():
        known = end.outcome in ("completed", "stopped", "diverged") and end.samples_seen > 0
        if known and 0 < end.seconds < math.inf:
            logs.setdefault(rung, {})[trial_id] = math.log(end.seconds / end.samples_seen)
    if not logs:
        return {}
    lowest = logs[min(logs)]
    parts: dict[str, list[float]] = {}
    for _, here in sorted(logs.items()):
        both = [value - lowest[trial_id] for trial_id, value in here.items() if trial_id in lowest]
        level = fmean(both) if both else fmean(here.values()) - fmean(lowest.values())
        for trial_id, value in here.items():
            parts.setdefault(trial_id, []).append(value - level)
    return {trial_id: math.exp(fmean(values)) for trial_id, values in parts.items()}
