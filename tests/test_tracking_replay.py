"""What a ledger's events mean, on hand-written lists and on made-up studies."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llp.records import (
    CheckpointRef,
    CurvePoint,
    Decision,
    Job,
    JobEnd,
    Rung,
    SearchResult,
    Trial,
    from_plain,
    to_plain,
)
from llp.tracking.replay import NOT_FINISHED, Replay, result_from_events
from tests.make_study import NUM_TRAIN, RUNGS, make_events

LADDER = (Rung(1, 0.1, 100, 3), Rung(2, 1.0, 1000, 3))


class Story:
    """Writes events by hand: one call a line."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        spec = {"training": {"epochs": 20}}
        self("study", study_id="s", spec=spec, spec_digest="d", rungs=LADDER, num_train=1000)
        self("opened", host="h", pid=1, environment={})

    def __call__(self, event: str, **payload: Any) -> None:
        number = len(self.events)
        plain = to_plain(payload)
        self.events.append({"seq": number, "time": 100.0 + number, "event": event, **plain})

    def job(self, name: str, rung: int = 1, attempt: int = 0) -> None:
        trial = Trial(name, {"learning_rate": 0.1}, seed=0)
        if rung == 1 and attempt == 0:
            self("trial", trial=trial)
        self("job", job=Job(f"{name}-r{rung}", "probe", trial, LADDER[rung - 1], 0, attempt))

    def point(self, name: str, epoch: int, accuracy: float, rung: int = 1) -> None:
        step = LADDER[rung - 1]
        point = CurvePoint(
            rung, step.data_fraction, epoch, epoch * step.num_examples, 1, 0.5, 1, accuracy, epoch
        )
        self("point", job_id=f"{name}-r{rung}", trial_id=name, kind="probe", point=point)

    def end(self, name: str, outcome: Any, samples: int, rung: int = 1, **more: Any) -> None:
        attempt = more.pop("attempt", 0)
        end = JobEnd(f"{name}-r{rung}", name, outcome, samples_seen=samples, seconds=1.0, **more)
        self("job_end", kind="probe", rung=rung, attempt=attempt, end=end)

    def run(self, name: str, rung: int = 1) -> None:
        self.job(name, rung)
        for epoch in (1, 2, 3):
            self.point(name, epoch, 0.1 * epoch, rung)
        ref = CheckpointRef(f"checkpoints/{name}-r{rung}.pt", "0")
        self.end(name, "completed", 3 * LADDER[rung - 1].num_examples, rung, checkpoint=ref)

    def result(self) -> SearchResult:
        return result_from_events(self.events)


def test_trials_tell_why_they_got_no_more_budget() -> None:
    story = Story()
    story.run("t000")
    story("decision", decision=Decision("promote", "t000", 2))
    story.run("t000", rung=2)
    story.run("t001")
    story.job("t002")
    story.point("t002", 1, 0.2)
    story.end("t002", "stopped", 100, stopped_by="power_law")
    story.job("t003")
    story.point("t003", 1, math.nan)
    story.end("t003", "diverged", 100, failure="loss is not finite")
    story.job("t004")
    story.point("t004", 1, 0.2)
    story.run("t005")
    story("decision", decision=Decision("promote", "t005", 2))
    found = story.result()
    assert [(t.trial.trial_id, t.outcome, t.stopped_by) for t in found.trials] == [
        ("t000", "completed", ""),
        ("t001", "completed", "rung 1"),
        ("t002", "stopped", "power_law"),
        ("t003", "diverged", ""),
        ("t004", "stopped", NOT_FINISHED),
        ("t005", "completed", NOT_FINISHED),
    ]
    assert found.trials[3].failure == "loss is not finite"
    assert found.trials[0].checkpoint == CheckpointRef("checkpoints/t000-r2.pt", "0")
    assert [len(curve.points) for curve in found.trials[0].curves] == [3, 3]
    assert found.trials[0].last == found.trials[0].curves[1].points[-1]
    assert found.status == "interrupted"
    assert (found.started, found.finished) == (100.0, 100.0 + len(story.events) - 1)


def test_retry_replaces_the_failed_attempt_and_both_are_paid_for() -> None:
    story = Story()
    story.job("t000")
    for epoch, accuracy in ((1, 0.91), (2, 0.92)):
        story.point("t000", epoch, accuracy)
    story.end("t000", "out_of_memory", 250, failure="out of memory")
    story("decision", decision=Decision("retry", "t000", 1))
    assert story.result().trials[0].stopped_by == NOT_FINISHED
    story.job("t000", attempt=1)
    story.point("t000", 1, 0.11)
    story.end("t000", "stopped", 100, stopped_by="plateau", attempt=1)
    (trial,) = story.result().trials
    assert [p.validation_accuracy for p in trial.curves[0].points] == [0.11]
    assert (trial.outcome, trial.stopped_by, trial.failure) == ("stopped", "plateau", "")
    assert trial.samples_seen == 250 + 100
    assert trial.seconds == 2.0


def test_points_repeated_after_a_kill_win_and_are_paid_twice() -> None:
    story = Story()
    story.job("t000")
    for epoch in (1, 2):
        story.point("t000", epoch, 0.5)
    story("opened", host="h", pid=2, environment={})
    story.job("t000")
    for epoch in (2, 3):  # resumed from the checkpoint after epoch 1
        story.point("t000", epoch, 0.6)
    story.end("t000", "completed", 300)
    (trial,) = story.result().trials
    assert [p.validation_accuracy for p in trial.curves[0].points] == [0.5, 0.6, 0.6]
    assert trial.samples_seen == 300 + 100
    assert story.result().cost.tier1 == 400


def test_examples_of_jobs_without_an_end_are_counted() -> None:
    story = Story()
    story.job("t000")
    story.point("t000", 1, 0.5)
    story.point("t000", 2, 0.5)
    assert story.result().cost.tier1 == 200
    story.end("t000", "failed", 0, failure="worker lost")  # it could not say what it spent
    assert story.result().cost.tier1 == 200


def test_cost_of_a_full_search_is_every_trial_on_the_full_recipe() -> None:
    story = Story()
    for name in ("t000", "t001", "t002"):
        story.run(name)
    assert story.result().cost.full_search == 3 * 20 * 1000
    assert story.result().cost.tier1 == 3 * 300
    del story.events[0]["num_train"]  # a ledger without it: from the ladder
    assert story.result().cost.full_search == 3 * 20 * 1000


def test_phase_that_was_killed_counts_until_the_last_sign_of_life() -> None:
    story = Story()
    story("phase", name="tier1", status="start", seconds=0.0)  # at 102
    story.job("t000")  # 103, 104
    story.point("t000", 1, 0.5)  # 105
    story("opened", host="h", pid=2, environment={})
    story("phase", name="tier1", status="start", seconds=0.0)
    story("phase", name="tier1", status="end", seconds=7.0)
    assert story.result().cost.seconds == {"tier1": 3.0 + 7.0}


def test_status_follows_the_last_driver() -> None:
    story = Story()
    assert result_from_events(story.events, running=True).status == "running"
    story("failed", reason="no configuration trained")
    assert story.result().status == "failed"
    assert story.result().winner_reason == "no configuration trained"
    story("opened", host="h", pid=2, environment={})
    assert story.result().status == "interrupted"
    story("finished", winner="t000", winner_reason="best", report="report.html")
    assert result_from_events(story.events, running=True).status == "finished"


def test_events_of_an_unknown_kind_are_passed_over() -> None:
    story = Story()
    story("heartbeat", note="from a later minor version")
    assert story.result().trials == ()
    with pytest.raises(ValueError, match="study"):
        result_from_events([])


def test_made_up_study_is_told_as_it_was_made() -> None:
    events = make_events(12, resumed=True)
    found = result_from_events(events)
    by_kind = {kind: [e for e in events if e["event"] == kind] for kind in ("trial", "decision")}
    assert [t.trial.trial_id for t in found.trials] == [
        e["trial"]["trial_id"] for e in by_kind["trial"]
    ]
    assert found.decisions == tuple(
        from_plain(Decision, e["decision"]) for e in by_kind["decision"]
    )
    ends = [e for e in events if e["event"] == "job_end"]
    repeated = 2 * 2 * RUNGS[1].num_examples  # two jobs had two epochs when the driver died
    spent = {
        kind: sum(e["end"]["samples_seen"] for e in ends if e["kind"] == kind)
        for kind in ("probe", "measure", "verify")
    }
    assert found.cost.tier1 == spent["probe"] + repeated
    assert (found.cost.tier2, found.cost.verification) == (spent["measure"], spent["verify"])
    assert found.cost.full_search == 12 * 8 * NUM_TRAIN
    assert found.winner == events[-1]["winner"]
    assert found.status == "finished"
    assert len(found.profiles) == 4
    assert len(found.verifications) == 4
    assert math.isnan(found.profiles[0]["hessian_eigenvalue_3"].value)
    assert found.score_report is not None
    assert found.score_report.ties == (
        (found.score_report.scores[0].trial_id, found.score_report.scores[1].trial_id),
    )


def test_resumed_study_equals_the_uninterrupted_one_but_for_what_was_spent() -> None:
    plain, resumed = (result_from_events(make_events(12, resumed=flag)) for flag in (False, True))
    # By text, because the NaN of the diverged trial differs from itself.
    assert str([t.curves for t in plain.trials]) == str([t.curves for t in resumed.trials])
    assert plain.winner == resumed.winner
    assert [t.outcome for t in plain.trials] == [t.outcome for t in resumed.trials]
    assert resumed.cost.tier1 > plain.cost.tier1


def test_small_replay_knows_the_same_outcomes() -> None:
    events = make_events(12, resumed=True)
    small = Replay(keep_curves=False)
    for event in events:
        small.take(event)
    full = result_from_events(events)
    assert small.cost() == full.cost
    for trial in full.trials:
        found = small.trial_result(trial.trial.trial_id)
        assert (found.outcome, found.stopped_by) == (trial.outcome, trial.stopped_by)
        assert (found.samples_seen, str(found.last)) == (trial.samples_seen, str(trial.last))
