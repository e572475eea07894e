"""The four seams of the service. Whatever satisfies one of these can be plugged in.

Everything here is stdlib-only: an implementation lives in its room, and `registry` names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from llp.records import (
    CurvePoint,
    FlatnessProfile,
    Job,
    JobEnd,
    LearningCurve,
    Observation,
    StopDecision,
    Verification,
)

Report = CurvePoint | FlatnessProfile | Verification | Observation
"""What a worker says while it works on a job."""


@runtime_checkable
class Objective(Protocol):
    """What a worker does with a job: yields reports, then returns how the job ended.

    A generator: `end = yield from objective(job)`. It must be picklable, run anywhere, never raise
    for a bad configuration (divergence and out-of-memory are outcomes), and have made the
    checkpoint it names durable before it returns. Closing the generator early must be safe.
    """

    def __call__(self, job: Job) -> Iterator[Report]:
        """Works on `job`; the generator's return value is a `JobEnd`."""
        ...


@runtime_checkable
class StopRule(Protocol):
    """Decides within a rung whether a running job should end. A pure function of its arguments."""

    name: str

    def decide(
        self,
        curve: LearningCurve,
        *,
        num_points: int,
        ended: Sequence[LearningCurve],
        keep_fraction: float,
    ) -> StopDecision:
        """The verdict on `curve`, which will have `num_points` points if it runs to its end.

        `ended` are the curves of the jobs that ended on the same rung, in ledger order; those of
        stopped and diverged jobs are shorter than `num_points`. `keep_fraction` is the share of
        the rung's trials that go on, to the next rung or, from the highest, to verification.
        """
        ...


@runtime_checkable
class FlatnessMetric(Protocol):
    """A tier-2 metric; see `flatness.profile` for the context it is given."""

    def __call__(self, context: Any) -> Sequence[Any]:
        """One or more `Measurement`s of the model in `context`, which is left bit-identical."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """Receives what is already durable in the ledger. Never slows or fails the search."""

    def write(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Ships ledger events; must be idempotent per event sequence number."""
        ...

    def close(self) -> None:
        """Flushes and releases resources."""
        ...


__all__ = ["FlatnessMetric", "JobEnd", "Objective", "Report", "StopRule", "Tracker"]
