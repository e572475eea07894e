"""PASHA: the ladder grows only as far as it has to.

Bohdal et al., "PASHA: Efficient HPO and NAS with Progressive Resource Allocation", ICLR 2023.
Trials first compete on the two lowest rungs. While the trials of the highest rung in use are not
ordered there as they were on the rung below, one more rung is used; once the order holds, nothing
is trained longer. Results that differ by less than `epsilon` are not worth an order: of all pairs
of trials that changed places and changed back between two rungs, epsilon is the 90th percentile of
the differences (the paper's section 4.2 does this along epochs; here between rungs).
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from llp.probing.promotion import DONE, WAIT, Asha, Step
from llp.probing.standings import Standings
from llp.probing.state import SearchState
from llp.records import Decision

LEAST_RUNGS = 2
PERCENTILE = 90


class Pasha(Asha):
    """ASHA whose top rung grows only while the two highest rungs in use disagree."""

    def next_step(self, state: SearchState) -> Step:
        """What a free worker should do next."""
        step = super().next_step(state)
        if isinstance(step, Decision) and step.kind == "promote":
            top = self.top_rung(state)
            if step.rung > top:
                return self._below(state, top)
        return step

    def _below(self, state: SearchState, top: int) -> Step:
        """The next promotion that stays within the rungs in use."""
        standings = state.standings(self.max_failures)
        capped = {rung: size for rung, size in self._sizes[0].items() if rung <= top}
        found = self._within(standings, 0, capped, eager=self.eager)
        if found is not None:
            return found
        return WAIT if state.running else DONE

    def top_rung(self, state: SearchState) -> int:
        """The highest rung in use now."""
        standings = state.standings(self.max_failures)
        tables = [_results(standings, rung) for rung in range(1, self.num_rungs + 1)]
        epsilon = noise(tables)
        top = min(LEAST_RUNGS, self.num_rungs)
        while top < self.num_rungs and not same_order(tables[top - 2], tables[top - 1], epsilon):
            top += 1
        return top


def _results(standings: Standings, rung: int) -> dict[str, float]:
    """Trial -> accuracy on a rung, best first."""
    return {p[3]: -p[0] for p in standings.rung(0, rung).ranked if p[0] < math.inf}


def same_order(lower: dict[str, float], upper: dict[str, float], epsilon: float) -> bool:
    """Whether those on the upper rung were in its order on the lower one, up to `epsilon`.

    With fewer than two trials on the upper rung there is no order to disagree with.

    >>> same_order({"a": 0.9, "b": 0.8}, {"a": 0.91, "b": 0.92}, epsilon=0.0)
    False
    >>> same_order({"a": 0.9, "b": 0.8}, {"a": 0.91, "b": 0.92}, epsilon=0.1)
    True
    """
    both = sorted((t for t in upper if t in lower), key=lambda t: -upper[t])
    below = [lower[t] for t in both]
    return all(later - earlier <= epsilon for earlier, later in itertools.pairwise(below))


def noise(tables: list[dict[str, float]]) -> float:
    """Difference of results that is not worth an order; 0 until some pair changed back.

    Of every pair of trials whose order differs between rungs k and k + 1 and again between k + 1
    and k + 2, the difference on rung k + 2.
    """
    gaps = []
    for first, second, third in zip(tables, tables[1:], tables[2:], strict=False):
        for one, other in itertools.combinations([t for t in third if t in first], 2):
            signs = [np.sign(table[one] - table[other]) for table in (first, second, third)]
            if signs[0] == -signs[1] == signs[2] != 0:
                gaps.append(abs(third[one] - third[other]))
    return float(np.percentile(gaps, PERCENTILE)) if gaps else 0.0
