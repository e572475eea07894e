"""What becomes of a stop rule's word: a stop, an audit, or nothing; and the end of a search.

The rules themselves are in `stopping` (one job) and `search_stopping` (the search), audits in
`audits`. Here they are asked in order, and those that go by a forecast no more once the rungs turn
out to order trials differently (`rung_correlation`). Everything is a function of the ledger's
state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llp.probing.audits import is_audited, tally, tightened
from llp.probing.rung_correlation import weak_ranks, why_off
from llp.probing.search_stopping import SearchPlan, SearchRule
from llp.probing.state import SearchState
from llp.probing.stopping import predicted_final
from llp.protocols import StopRule
from llp.records import Decision, Job, RankCorrelation, StopAudit, StopDecision


@dataclass(frozen=True)
class StopPolicy:
    """The rules of a search and how they are audited.

    Attributes:
        rules: Asked about a job after every point of it, in order; the first that stops counts.
        search_rules: Asked about the search.
        audit_share: Share of the samples to spend on jobs that a rule would have stopped.
        seed: Of the study; chooses the audits.
    """

    rules: Sequence[StopRule] = ()
    search_rules: Sequence[SearchRule] = ()
    audit_share: float = 0.0
    seed: int = 0

    def about_job(
        self, state: SearchState, job: Job, plan: SearchPlan, keep_fraction: float
    ) -> tuple[Decision, StopDecision] | None:
        """The decision to stop or to audit a job after its newest point; None to go on.

        Rules that say what a job will miss are not asked again about a job that is an audit, and
        about none once ranks are weak.
        """
        if state.ended is not None:
            verdict = StopDecision(True, state.ended.reason.partition(":")[0], detail="tier 1 ends")
            return self._stop(state, job, plan, verdict)
        if not self.rules:
            return None
        rung = job.rung.rung
        curve = state.curve(job.trial.trial_id, rung)
        ended = state.ended_curves(rung)
        audit = tally(state, delta=0.0)
        for rule in self.rules:
            promised = promise(rule)
            if promised is not None and (job.job_id in state.audits or state.stops_off):
                continue
            asked = rule if promised is None else promising(rule, tightened(promised, audit))
            verdict = asked.decide(
                curve, num_points=plan.num_points(rung), ended=ended, keep_fraction=keep_fraction
            )
            if not verdict.stop:
                continue
            if verdict.needed is not None and is_audited(
                state, job, audit_share=self.audit_share, seed=self.seed
            ):
                return _decision("audit", job, verdict), replace(verdict, stop=False)
            return self._stop(state, job, plan, verdict)
        return None

    def _stop(
        self, state: SearchState, job: Job, plan: SearchPlan, verdict: StopDecision
    ) -> tuple[Decision, StopDecision]:
        if verdict.predicted_final is None:
            rung = job.rung.rung
            forecast = predicted_final(
                state.curve(job.trial.trial_id, rung),
                num_points=plan.num_points(rung),
                ended=state.ended_curves(rung),
            )
            verdict = replace(verdict, predicted_final=forecast)
        return _decision("stop", job, verdict), verdict

    def about_search(self, state: SearchState, plan: SearchPlan) -> Decision | None:
        """The decision to end tier 1; None to go on, or when it has been made."""
        if state.ended is not None:
            return None
        for rule in self.search_rules:
            if state.stops_off is not None and promise(rule) is not None:
                continue
            verdict = rule.decide(state, plan)
            if verdict.stop:
                reason = f"{verdict.reason}: {verdict.detail}"
                return Decision("end", "", 0, reason, verdict.predicted_final)
        return None

    def about_ranks(self, state: SearchState, found: Iterable[RankCorrelation]) -> Decision | None:
        """The decision to stop by forecast no more; None to go on, or without such a rule."""
        promises = [*map(promise, self.rules), *map(promise, self.search_rules)]
        forecasts = any(promised is not None for promised in promises)
        if not forecasts or state.stops_off is not None or state.ended is not None:
            return None
        weak = weak_ranks(found)
        return None if weak is None else Decision("stops_off", "", weak.higher, why_off(weak))

    def audit(self, state: SearchState) -> StopAudit:
        """What the audits have shown, against the strictest promise of the rules."""
        promises = [p for p in map(promise, self.rules) if p is not None]
        return tally(state, delta=min(promises, default=0.05))


def promise(rule: StopRule | SearchRule) -> float | None:
    """The false-stop rate that a rule promises, None where it makes no forecast."""
    delta, confidence = getattr(rule, "delta", None), getattr(rule, "confidence", None)
    if delta is not None:
        return float(delta)
    return None if confidence is None else 1 - float(confidence)


def promising(rule: Any, delta: float) -> StopRule:
    """The rule with another promise; itself where it is the same or cannot be changed."""
    if not dataclasses.is_dataclass(rule) or promise(rule) == delta:  # type: ignore[arg-type]
        return rule  # type: ignore[no-any-return]
    if hasattr(rule, "delta"):
        return replace(rule, delta=delta)  # type: ignore[type-var,return-value]
    return replace(rule, confidence=1 - delta)  # type: ignore[type-var,return-value]


def _decision(kind: Any, job: Job, verdict: StopDecision) -> Decision:
    return Decision(
        kind,
        job.trial.trial_id,
        job.rung.rung,
        f"{verdict.reason}: {verdict.detail}",
        verdict.predicted_final,
        verdict.needed,
    )
