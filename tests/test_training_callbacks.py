"""Callbacks watch a training: they measure what is true and change no bit of it."""

from __future__ import annotations

import errno
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_resume import JOB, Killed, kill_after
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
from torch.nn import functional

from llp import registry
from llp.errors import EnvironmentProblem, SpecError
from llp.records import CurvePoint, Observation, Rung
from llp.spec import check, digest
from llp.spec.schema import Spec
from llp.training import callbacks, checkpoint
from llp.training.objective import TrainingObjective
from llp.workloads.batches import fixed_batches

ROWS = {
    "curvature": {"name": "curvature", "every": 1, "num_examples": 24, "batch_size": 10},
    "checkpoints": {"name": "checkpoints", "every": 1, "optimizer": True},
    "optimizer_log": {"name": "optimizer_log", "every": 1},
}
ALL = list(ROWS.values())


def noisy(*rows: dict[str, Any]) -> Spec:
    """Batch norm, dropout, augmentation and Adam: everything a callback could disturb."""
    return make_spec(
        model={"name": f"{HERE}:noisy"},
        training={
            "optimizer": "adamw",
            "learning_rate": 0.01,
            "augmentation": ["flip", "crop"],
            "label_smoothing": 0.1,
            "gradient_clip": 1.0,
            "callbacks": list(rows),
        },
    )


def seen(reports: list[Any]) -> list[Observation]:
    return [report for report in reports if isinstance(report, Observation)]


def told(reports: list[Any]) -> list[tuple[str, int, dict[str, float]]]:
    """Observations without their seconds."""
    return [(each.callback, each.epoch, dict(each.values)) for each in seen(reports)]


def test_the_rows_are_all_tested() -> None:
    assert set(ROWS) == set(registry.CALLBACKS)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_training_is_the_same_to_the_bit_with_and_without_a_callback(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    plain, _ = drive(objective(tmp_path / "plain", noisy()), JOB)
    torch.manual_seed(3)  # the caller's generator is somewhere else, too
    watched, end = drive(objective(tmp_path / "watched", noisy(row)), JOB)
    assert end.outcome == "completed"
    assert numbers(watched) == numbers(plain)
    assert equal(weights(tmp_path / "watched"), weights(tmp_path / "plain"))
    assert len(plain) == 4
    assert end.samples_seen == 132


@pytest.mark.parametrize("snapshots", [2, 5, 8])
def test_a_resumed_training_is_the_same_to_the_bit_and_so_are_its_observations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: int
) -> None:
    plain, _ = drive(objective(tmp_path / "plain", noisy()), JOB)
    whole, _ = drive(objective(tmp_path / "whole", noisy(*ALL)), JOB)
    folder = tmp_path / "cut"
    cut = objective(folder, noisy(*ALL), checkpoint_seconds=0.0)
    kill_after(monkeypatch, snapshots, cut, JOB)
    again, _ = drive(objective(folder, noisy(*ALL)), replace(JOB, attempt=1))
    assert numbers(again) == numbers(plain)
    assert told(again) == told(whole)  # eigenvectors to start from are part of the snapshot
    assert equal(weights(folder), weights(tmp_path / "plain"))


@pytest.mark.parametrize(("before", "after"), [((), tuple(ALL)), (tuple(ALL), ())])
def test_callbacks_may_come_and_go_between_two_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Any, after: Any
) -> None:
    plain, _ = drive(objective(tmp_path / "plain", noisy()), JOB)
    folder = tmp_path / "cut"
    kill_after(monkeypatch, 4, objective(folder, noisy(*before), checkpoint_seconds=0.0), JOB)
    assert issubclass(Killed, BaseException)
    again, _ = drive(objective(folder, noisy(*after)), replace(JOB, attempt=1))
    assert numbers(again) == numbers(plain)
    assert equal(weights(folder), weights(tmp_path / "plain"))
    # Killed in epoch 2: what was seen after epoch 1 is told again, the rest depends on `after`.
    assert [each.epoch for each in seen(again)] == ([2, 3, 4] if after else [1])


def test_a_callback_is_called_every_n_epochs_and_after_the_last(tmp_path: Path) -> None:
    row = {**ROWS["curvature"], "every": 3, "num_eigenvalues": 1, "num_probes": 0}
    job = make_job(rung=Rung(1, 0.5, 33, 7))
    reports, _ = drive(objective(tmp_path, noisy(row)), job)
    assert [each.epoch for each in seen(reports)] == [3, 6, 7]
    order = [type(report).__name__ for report in reports]
    assert order[2:4] == ["CurvePoint", "Observation"]  # after the point of its epoch
    observation = seen(reports)[0]
    assert (observation.job_id, observation.trial_id) == ("t000-r1", "t000")
    assert observation.samples_seen == 99
    assert observation.seconds > 0
    assert set(observation.values) == {"gradient_norm", "eigenvalue_1", "residual_1"}


@pytest.mark.parametrize(("jobs", "expected"), [("all", 4), ("probe", 4), ("verify", 0)])
def test_a_callback_looks_only_at_its_kind_of_jobs(
    tmp_path: Path, jobs: str, expected: int
) -> None:
    reports, _ = drive(objective(tmp_path, noisy({**ROWS["curvature"], "jobs": jobs})), JOB)
    assert len(seen(reports)) == expected


# Curvature


def dense(spec: Spec, folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues by size and the gradient norm at the final weights, from the whole Hessian."""
    data = image_data()
    work = TrainingObjective(spec, data, folder, "cpu")
    model = work.prepare(JOB, torch.device("cpu")).model.double().eval()
    model.load_state_dict(weights(folder))
    order = work._order()[:count]
    [(inputs, targets)] = fixed_batches(data.train, order, count, mean=data.mean, std=data.std)
    names = [name for name, _ in model.named_parameters()]
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = torch.split(flat, [p.numel() for p in model.parameters()])
        values = {
            n: part.view(p.shape)
            for n, part, p in zip(names, parts, model.parameters(), strict=True)
        }
        output = torch.func.functional_call(model, values, (inputs.double(),))
        return functional.cross_entropy(output, targets)

    hessian = torch.func.hessian(loss)(start)
    values = torch.linalg.eigvalsh(hessian)
    order_by_size = values.abs().argsort(descending=True)
    return values[order_by_size], torch.func.grad(loss)(start).norm()


def test_tracked_curvature_is_that_of_the_dense_hessian(tmp_path: Path) -> None:
    row = {
        **ROWS["curvature"],
        "num_eigenvalues": 3,
        "tolerance": 1e-4,
        "num_probes": 400,
        "every": 4,
    }
    spec = make_spec(
        model={"name": "mlp", "options": {"width": 6, "depth": 1}}, training={"callbacks": [row]}
    )
    reports, _ = drive(objective(tmp_path, spec), JOB)
    [found] = seen(reports)
    expected, norm = dense(spec, tmp_path, 24)
    for number in (1, 2, 3):
        value = found.values[f"eigenvalue_{number}"]
        assert value == pytest.approx(float(expected[number - 1]), rel=1e-3)
        assert abs(value - float(expected[number - 1])) <= found.values[f"residual_{number}"] + 1e-4
    assert found.values["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    error = found.values["trace_standard_error"]
    assert found.values["trace"] == pytest.approx(float(expected.sum()), abs=4 * error)
    assert 0 < error < 0.1 * abs(float(expected.sum()))


def test_a_warm_start_costs_fewer_products_and_finds_the_same(tmp_path: Path) -> None:
    row = {**ROWS["curvature"], "num_probes": 0, "num_eigenvalues": 2, "tolerance": 1e-3}
    still = {"learning_rate": 1e-5, "schedule": "constant", "callbacks": [row]}
    spec = make_spec(model={"name": "mlp", "options": {"width": 32, "depth": 2}}, training=still)
    reports, _ = drive(objective(tmp_path, spec), JOB)
    first, *later = seen(reports)
    # The products that look for a missed eigenvalue are the same with and without a warm start.
    assert all(each.samples < 0.9 * first.samples for each in later), [
        each.samples for each in seen(reports)
    ]
    for each in later:
        assert each.values["eigenvalue_1"] == pytest.approx(first.values["eigenvalue_1"], rel=1e-2)


def test_a_warm_start_is_not_caught_by_what_used_to_be_sharpest(tmp_path: Path) -> None:
    """Vectors that have nothing to do with the network any more do not hide its eigenvalues."""
    row = {**ROWS["curvature"], "num_probes": 0, "num_eigenvalues": 2, "every": 4}
    spec = make_spec(training={"callbacks": [row]})
    cold, _ = drive(objective(tmp_path / "cold", spec), JOB)
    callback = registry.load("callbacks", "curvature")(
        every=4, num_probes=0, num_eigenvalues=2, num_examples=24, batch_size=10
    )
    work = objective(tmp_path / "warm", spec)
    model = work.prepare(JOB, torch.device("cpu")).model
    size = sum(p.numel() for p in model.parameters())
    strange = torch.linalg.qr(torch.randn(size, 2, generator=torch.Generator().manual_seed(1)))[0]
    callback.restore({"vectors": strange})
    original = callbacks.build
    work_callbacks = {"curvature": callback}
    try:
        callbacks.build = lambda rows, kind="all": work_callbacks  # type: ignore[assignment]
        warm, _ = drive(work, JOB)
    finally:
        callbacks.build = original  # type: ignore[assignment]
    for name in ("eigenvalue_1", "eigenvalue_2"):
        expected = seen(cold)[0].values[name]
        assert seen(warm)[0].values[name] == pytest.approx(expected, rel=0.02)


# Failures


class Broken:
    """A callback that fails."""

    def __init__(self, *, every: int = 1, jobs: str = "all", full: bool = False) -> None:
        self.every, self.jobs, self.full = every, jobs, full

    def __call__(self, moment: callbacks.Moment) -> None:
        moment.model.eval()
        torch.rand(7)
        if self.full:
            raise EnvironmentProblem("the disk is full") from OSError(errno.ENOSPC, "full")
        raise RuntimeError("a bug in\nsomebody's callback")

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        pass


def test_a_callback_that_fails_is_a_note_and_costs_nothing(tmp_path: Path) -> None:
    plain, _ = drive(objective(tmp_path / "plain", noisy()), JOB)
    row = {"name": "test_training_callbacks:Broken"}
    watched, end = drive(objective(tmp_path / "watched", noisy(row)), JOB)
    assert end.outcome == "completed"
    assert numbers(watched) == numbers(plain)
    assert equal(weights(tmp_path / "watched"), weights(tmp_path / "plain"))
    assert {each.note for each in seen(watched)} == {"failed: RuntimeError: a bug in"}
    assert all(math.isnan(value) for each in seen(watched) for value in each.values.values())


def test_a_full_disk_ends_the_training(tmp_path: Path) -> None:
    row = {"name": "test_training_callbacks:Broken", "full": True}
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        drive(objective(tmp_path, noisy(row)), JOB)


def test_checkpoints_hold_weights_and_optimizer_of_their_epoch(tmp_path: Path) -> None:
    reports, _ = drive(objective(tmp_path, noisy({**ROWS["checkpoints"], "every": 2})), JOB)
    assert all(isinstance(report, CurvePoint) for report in reports)  # it tells nothing
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["t000-r1-e002.pt", "t000-r1-e004.pt", "t000-r1.pt"]
    last = checkpoint.load(tmp_path / "checkpoints" / "t000-r1-e004.pt")
    assert equal(last["model"], weights(tmp_path))
    assert last["epoch"] == 4
    steps = {float(state["step"]) for state in last["optimizer"]["state"].values()}
    assert steps == {8.0}
    before = checkpoint.load(tmp_path / "checkpoints" / "t000-r1-e002.pt")
    assert not equal(before["model"], weights(tmp_path))


# The experiment file


def test_callbacks_do_not_change_the_digest_of_an_experiment() -> None:
    assert digest(noisy()) == digest(noisy(*ALL))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"name": "curvatur"}, "did you mean 'curvature'"),
        ({"every": 3}, "missing key 'name'"),
        ({"name": "curvature", "every": 0}, "at least 1"),
        ({"name": "curvature", "evry": 2}, "did you mean 'every'"),
    ],
)
def test_a_wrong_callback_is_told_before_anything_runs(row: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        check(make_spec(training={"callbacks": [row]}))


def test_callbacks_cannot_be_searched() -> None:
    with pytest.raises(SpecError, match="watch and change nothing"):
        check(make_spec(search_space={"callbacks": ["curvature"]}))
