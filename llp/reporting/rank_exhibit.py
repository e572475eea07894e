"""How rungs ordered the trials they share, as measured while the search ran, and what followed."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pandas as pd

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Section, signed, whole
from llp.reporting.tables import table


def with_ranks(section: Section, result: SearchResult) -> Section:
    """`section` with the correlations behind its other exhibits, where there are two rungs."""
    if len(result.rungs) < 2:
        return section
    return replace(section, exhibits=(*section.exhibits, rank_exhibit(result)))


def rank_exhibit(result: SearchResult) -> Exhibit:
    """Spearman's correlation for each pair of rungs, and whether stopping went off."""
    columns = (
        whole("lower", "rung"),
        whole("higher", "and rung"),
        whole("num_trials", "completed both"),
        whole("num_promoted", "ended on both"),
        whole("num_below", "ended on the lower"),
        signed("value", "Spearman"),
        signed("low", "from"),
        signed("high", "to (90 %)"),
    )
    return Exhibit(
        key="rank-correlation",
        title="Measured while the search ran",
        reading=rank_reading(result),
        data=(Data("Every pair of rungs", table(rank_data(result), columns), shown=True),),
        note="Spearman's rank correlation among the trials that were promoted and completed; all "
        "trials together would agree more. When the upper end between neighbouring rungs is below "
        "0.5, rules that stop by forecast go off for the rest of tier 1.",
    )


def rank_data(result: SearchResult) -> pd.DataFrame:
    """One row a pair of rungs; NaN where nothing was measured.

    Columns: `lower`, `higher`, `num_trials`, `num_promoted`, `num_below`, `value`, `low`, `high`.
    """
    found = {(pair.lower, pair.higher): pair for pair in result.rank_correlations}
    rows = []
    for first, second in itertools.combinations(result.rungs, 2):
        pair = found.get((first.rung, second.rung))
        row: dict[str, float] = {"lower": first.rung, "higher": second.rung, "num_trials": 0}
        if pair is not None:
            row |= {"num_trials": pair.num_trials, "num_promoted": pair.num_promoted}
            row |= {"num_below": pair.num_below}
            row |= {"value": pair.value, "low": pair.interval.low, "high": pair.interval.high}
        rows.append(row)
    counts = ["num_trials", "num_promoted", "num_below"]
    columns = ["lower", "higher", *counts, "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def rank_reading(result: SearchResult) -> str:
    """Whether stopping went off and why, else what neighbouring rungs showed."""
    for decision in result.decisions:
        if decision.kind == "stops_off":
            return f"Early stopping went off, {decision.reason}."
    known = [
        pair
        for pair in result.rank_correlations
        if pair.higher == pair.lower + 1 and math.isfinite(pair.value)
    ]
    if not known:
        return "Nothing was measured: too few trials completed two rungs."
    told = [
        f"rung {pair.lower} and rung {pair.higher}: Spearman {formats.signed(pair.value)}, "
        f"{pair.interval.level:.0%} interval {formats.signed(pair.interval.low)} to "
        f"{formats.signed(pair.interval.high)}, {formats.plural(pair.num_trials, 'trial')}"
        for pair in known
    ]
    return f"Among the trials promoted, {'; '.join(told)}."
