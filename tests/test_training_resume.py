"""A job that was killed and taken up again ends with the bits of one that was not."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_training_support import (
    HERE,
    drive,
    equal,
    image_data,
    make_job,
    make_spec,
    numbers,
    objective,
    weights,
)

from llp.records import Rung
from llp.training import checkpoint, jobs

NOISY = make_spec(
    model={"name": f"{HERE}:noisy"},
    training={
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "augmentation": ["flip", "crop"],
        "label_smoothing": 0.1,
        "gradient_clip": 1.0,
        "warmup_fraction": 0.2,
    },
)
JOB = make_job(rung=Rung(1, 0.5, 33, 4))  # 33 = 16 + 17: two steps an epoch


class Killed(BaseException):
    """Stands for kill -9: nothing below may catch it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, snapshots: int, work: Any, job: Any) -> list[Any]:
    """Runs until the given number of snapshots is durable, then dies; the reports until then."""
    save, left = checkpoint.save_sealed, [snapshots]

    def dying(path: Any, state: Any) -> None:
        save(path, state)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    reports: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_sealed", dying)
        with pytest.raises(Killed):
            reports.extend(work(job))
    return reports


@pytest.mark.parametrize("snapshots", range(1, 9))
def test_resumed_job_equals_uninterrupted_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: int
) -> None:
    expected, _ = drive(objective(tmp_path / "whole", NOISY), JOB)
    folder = tmp_path / "cut"
    seen = kill_after(monkeypatch, snapshots, objective(folder, NOISY, checkpoint_seconds=0.0), JOB)
    assert len(seen) == (snapshots - 1) // 2
    reports, end = drive(objective(folder, NOISY), replace(JOB, attempt=1))
    assert numbers(reports) == numbers(expected)
    assert reports[: len(seen)] == seen  # to the last field, the seconds included
    assert equal(weights(folder), weights(tmp_path / "whole"))
    assert end.samples_seen == 132
    assert not jobs.partial_path(folder, JOB.job_id).exists()


def test_a_snapshot_from_before_jobs_named_their_metrics_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    to_plain = jobs.to_plain

    def earlier(value: Any) -> Any:
        plain = to_plain(value)
        plain.pop("metrics", None)
        return plain

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "to_plain", earlier)
        patch.setattr(jobs.JobRun, "_identity", _identity_without_exceptions)
        kill_after(monkeypatch, 4, objective(tmp_path, NOISY, checkpoint_seconds=0.0), JOB)
    with caplog.at_level(logging.WARNING):
        _, end = drive(objective(tmp_path, NOISY), replace(JOB, attempt=1))
    assert end.samples_seen == 132
    assert not [record for record in caplog.records if "starts afresh" in record.getMessage()]


def _identity_without_exceptions(self: jobs.JobRun, setup: jobs.Setup) -> str:
    plain = [setup.identity, jobs.to_plain(replace(self.job, attempt=0))]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def test_a_job_may_be_killed_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(JOB, kind="verify")
    expected, _ = drive(objective(tmp_path / "whole", NOISY), job)
    folder = tmp_path / "cut"
    for attempt in range(5):
        work = objective(folder, NOISY, checkpoint_seconds=0.0)
        kill_after(monkeypatch, 2, work, replace(job, attempt=attempt))
    reports, end = drive(objective(folder, NOISY), replace(job, attempt=5))
    assert numbers(reports) == numbers(expected)
    assert reports[-1].test_loss == expected[-1].test_loss
    assert equal(weights(folder), weights(tmp_path / "whole"))
    assert end.outcome == "completed"


def test_short_jobs_write_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(checkpoint, "save_sealed", lambda path, state: written.append(path))
    drive(objective(tmp_path), JOB)
    assert written == []


def test_a_closed_job_leaves_its_snapshot_and_nothing_else(tmp_path: Path) -> None:
    work = objective(tmp_path, NOISY, checkpoint_seconds=0.0)
    generator = work(JOB)
    first = next(generator)
    generator.close()
    path = jobs.partial_path(tmp_path, JOB.job_id)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]
    assert next(work(JOB)).train_loss == first.train_loss
    work.discard_partial(JOB.job_id)
    assert not path.exists()
    work.discard_partial(JOB.job_id)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_snapshot_is_ignored_with_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    expected, _ = drive(objective(tmp_path / "whole", NOISY), JOB)
    folder = tmp_path / "cut"
    kill_after(monkeypatch, 5, objective(folder, NOISY, checkpoint_seconds=0.0), JOB)
    path = jobs.partial_path(folder, JOB.job_id)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "empty": b"",
            "foreign": content,
        }[damage]
    )
    spec = make_spec(seed=1, **NOISY.model_dump(include={"model", "training"}))
    with caplog.at_level(logging.WARNING):
        work = objective(folder, spec if damage == "foreign" else NOISY)
        reports, end = drive(work, JOB)
    assert "job t000-r1 starts afresh" in caplog.text
    assert (len(reports), end.outcome) == (4, "completed")
    if damage != "foreign":
        assert numbers(reports) == numbers(expected)
        assert equal(weights(folder), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"micro_batch_divisor": 2},
        {"rung": Rung(1, 0.5, 32, 4)},
        {"trial": replace(JOB.trial, hyperparameters={"learning_rate": 0.02})},
    ],
)
def test_another_job_of_the_same_name_does_not_take_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    other = replace(JOB, **change)
    expected, _ = drive(objective(tmp_path / "whole", NOISY), other)
    folder = tmp_path / "cut"
    kill_after(monkeypatch, 5, objective(folder, NOISY, checkpoint_seconds=0.0), JOB)
    assert numbers(drive(objective(folder, NOISY), other)[0]) == numbers(expected)


def test_other_data_does_not_take_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kill_after(monkeypatch, 5, objective(tmp_path, NOISY, checkpoint_seconds=0.0), JOB)
    with caplog.at_level(logging.WARNING):
        drive(objective(tmp_path, NOISY, data=image_data(digest="1" * 64)), JOB)
    assert "is of another job" in caplog.text


def test_a_failed_attempt_leaves_its_snapshot_for_the_next(tmp_path: Path) -> None:
    spec = make_spec(model={"name": f"{HERE}:broken", "options": {"after": 5}})
    work = objective(tmp_path, spec, checkpoint_seconds=0.0)
    assert drive(work, JOB)[1].outcome == "failed"
    assert jobs.partial_path(tmp_path, JOB.job_id).exists()
    reports, end = drive(work, replace(JOB, attempt=1))  # the new network survives 5 more steps
    assert [p.epoch for p in reports] == [1, 2, 3, 4]
    assert end.outcome == "completed"


def test_a_full_disk_costs_the_snapshot_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Any, state: Any) -> None:
        raise jobs.EnvironmentProblem("the disk is full")

    monkeypatch.setattr(checkpoint, "save_sealed", full)
    _, end = drive(objective(tmp_path, checkpoint_seconds=0.0), JOB)
    assert end.outcome == "completed"
    assert "goes on without a snapshot: the disk is full" in caplog.text
