"""Whether early stops were right: a few stopped jobs run on, and what comes of them is counted.

A rule stops a job when it gives the result that was *needed* a probability below `delta`. Nobody
sees what a stopped job would have reached, so a few of the stops are *audits*: the verdict is
written down and the job runs on. An audit whose job ends with the needed result or a better one is
a *false stop*. Their share has the exact interval of Clopper and Pearson (Biometrika 1934), and a
share above `delta` makes the rules ask for more certainty (`tightened`).

Which stops are audited is drawn from the hash of the study's seed and the job, with a chance that
lets audits cost about `audit_share` of the samples of tier 1 in the long run. All of it is a
function of the ledger.
"""

from __future__ import annotations

import hashlib

from scipy import stats

from llp.probing.state import SearchState
from llp.records import Interval, Job, StopAudit

CONFIDENCE = 0.95
"""Of the interval of the false-stop rate, two-sided."""
PRIOR_AUDITS = 1.0
"""Audits that weigh as much as the promise `delta` itself when a rule is tightened."""
MOST = 2.0
"""Audits never cost more than this times their share of the samples."""


def clopper_pearson(num_hits: int, num_trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The exact two-sided interval of a binomial share.

    >>> interval = clopper_pearson(0, 10)
    >>> interval.low, round(interval.high, 4)
    (0.0, 0.3085)
    """
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, num_hits, num_trials - num_hits + 1) if num_hits else 0.0
    high = (
        stats.beta.ppf(1 - tail, num_hits + 1, num_trials - num_hits)
        if num_hits < num_trials
        else 1.0
    )
    return Interval(float(low), float(high), confidence)


def tally(state: SearchState, *, delta: float) -> StopAudit:
    """What the audits have shown so far; those whose job still runs are not counted.

    A job counts as a false stop when it was completed with the needed accuracy. One that diverged
    or was ended by another rule was rightly stopped.
    """
    num_over = num_false = 0
    for job_id, (decision, _) in state.audits.items():
        end = state.ends.get((decision.trial_id, decision.rung))
        if end is None or end.job_id in state.running or end.job_id in state.orphans:
            continue
        if end.outcome in ("failed", "out_of_memory"):
            continue
        num_over += 1
        if end.outcome == "completed" and decision.needed is not None:
            points = state.points[job_id]
            num_false += points[max(points)].validation_accuracy >= decision.needed
    return StopAudit(
        num_stops=sum(decision.needed is not None for decision in state.stops.values()),
        num_audits=num_over,
        num_false=num_false,
        rate=clopper_pearson(num_false, num_over),
        delta=delta,
    )


def tightened(delta: float, audit: StopAudit) -> float:
    """The probability below which a rule may stop, given how its stops turned out.

    `delta` while the false-stop rate, shrunk towards `delta`, is not above it; else `delta` divided
    by how many times too high that rate is.

    >>> none = StopAudit(0, 0, 0, Interval(0.0, 1.0, 0.95), 0.05)
    >>> tightened(0.05, none)
    0.05
    >>> bad = StopAudit(9, 4, 2, Interval(0.07, 0.93, 0.95), 0.05)
    >>> round(tightened(0.05, bad), 4)
    0.0061
    """
    rate = (audit.num_false + PRIOR_AUDITS * delta) / (audit.num_audits + PRIOR_AUDITS)
    return delta if rate <= delta else delta * delta / rate


def is_audited(state: SearchState, job: Job, *, audit_share: float, seed: int) -> bool:
    """Whether a job that a rule would stop now runs on as an audit.

    The chance is `audit_share` of the samples spent, over the samples that all stops so far and
    this one save, or would have saved; where they come at a steady rate, audits so cost
    `audit_share` of all samples. They never cost more than twice that.
    """
    if audit_share <= 0:
        return False
    spent = sum(points[max(points)].samples_seen for points in state.points.values() if points)
    here = _left(state, job.job_id, None)
    audited = here + sum(_left(state, j, epoch) for j, (_, epoch) in state.audits.items())
    saved = audited + sum(_left(state, job_id, None) for job_id in state.stops)
    if not here or audited > MOST * audit_share * spent:
        return False
    return _coin(seed, job.job_id) < audit_share * spent / saved


def _left(state: SearchState, job_id: str, epoch: int | None) -> int:
    """Samples that a job had before it, at `epoch` or its last point."""
    points, job = state.points.get(job_id), state.issued.get(job_id)
    if not points or job is None:
        return 0
    rung = job.rung
    return max(0, rung.num_examples * (rung.epochs - (max(points) if epoch is None else epoch)))


def _coin(seed: int, job_id: str) -> float:
    """A number in [0, 1) that only the seed and the job determine."""
    digest = hashlib.sha256(f"audit {seed} {job_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
