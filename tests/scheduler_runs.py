"""Schedulers against made-up workers: what a search on Ray does, without Ray."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from llp.probing.promotion import DONE, WAIT, NewTrial, Scheduler
from llp.probing.state import SearchState, probe_id
from llp.records import CurvePoint, Decision, Job, JobEnd, Rung, Trial, to_plain


def simulate(
    scheduler: Scheduler,
    *,
    quality: dict[int, float] | None = None,
    workers: int = 1,
    seed: int = 0,
    fails: frozenset[int] = frozenset(),
    kill_every: int = 0,
    diverges: frozenset[int] = frozenset(),
    seconds: Callable[[int, int], float] | None = None,
    operations: dict[int, float] | None = None,
) -> tuple[list[dict], SearchState]:
    """Runs the scheduler against workers that finish in random order; returns the ledger.

    A job of trial i on rung k sees 3^k samples and takes `seconds(i, k)`.
    """
    rng = random.Random(seed)
    state, events = SearchState(), []

    def write(event: str, **payload: object) -> None:
        line = {"event": event, **{k: to_plain(v) for k, v in payload.items()}}
        events.append(line)
        state.apply(line)

    steps = 0
    while True:
        steps += 1
        assert steps < 2_000, "the scheduler does not come to an end"
        step = scheduler.next_step(state)
        if len(state.running) < workers and step not in (WAIT, DONE):
            if isinstance(step, NewTrial):
                index = len(state.trials)
                trial = Trial(f"t{index:03d}", {"x": index}, index, step.bracket)
                write("decision", decision=Decision("new", trial.trial_id, step.rung, step.reason))
                if operations:
                    write("operations", trial_id=trial.trial_id, operations=operations[index])
                write("trial", trial=trial)
                rung = step.rung
            else:
                assert isinstance(step, Decision)
                write("decision", decision=step)
                trial, rung = state.trials[step.trial_id], step.rung
            job_id = probe_id(trial.trial_id, rung)
            attempt = state.failures.get(job_id, 0)
            write("job", job=Job(job_id, "probe", trial, Rung(rung, 1.0, 10, 1), 0, attempt))
            continue
        if step == DONE:
            break
        assert state.running, "waiting for nothing"
        if kill_every and rng.randrange(kill_every) == 0:
            write("opened", host="h", pid=1)
            continue
        job = rng.choice(list(state.running.values()))
        index = int(job.trial.trial_id[1:])
        value = quality[index] if quality else rng.random()
        point = CurvePoint(job.rung.rung, 1.0, 1, 10, 0.1, 0.9, 1 - value, value, 1.0)
        if index in diverges:
            point = CurvePoint(job.rung.rung, 1.0, 1, 10, 0.1, 0.9, float("nan"), float("nan"), 1.0)
            write(
                "point", job_id=job.job_id, trial_id=job.trial.trial_id, kind="probe", point=point
            )
            end = JobEnd(job.job_id, job.trial.trial_id, "diverged")
        elif index in fails:
            end = JobEnd(job.job_id, job.trial.trial_id, "failed", failure="boom")
        else:
            write(
                "point", job_id=job.job_id, trial_id=job.trial.trial_id, kind="probe", point=point
            )
            spent = (3**job.rung.rung, seconds(index, job.rung.rung)) if seconds else (0, 0.0)
            end = JobEnd(
                job.job_id,
                job.trial.trial_id,
                "completed",
                samples_seen=spent[0],
                seconds=spent[1],
            )
        write("job_end", kind="probe", rung=job.rung.rung, attempt=job.attempt, end=end)
    return events, state


def completed_per_rung(state: SearchState) -> dict[int, int]:
    return dict(Counter(rung for (_, rung), e in state.ends.items() if e.outcome == "completed"))
