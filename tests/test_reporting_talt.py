"""What TALT noted is kept, counted and drawn; keeping it changes no bit of the training."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch

from llp import optim
from llp.full_training import TrainingResult, train
from llp.optim.talt import Talt
from llp.reporting import optimizer_log
from llp.reporting.figures import talt
from llp.reporting.optimizer_log import OptimizerLog
from llp.reporting.svg import drawing
from llp.training import checkpoint

RUN: dict[str, Any] = {
    "dataset": {"name": "digits"},
    "model": {"name": "convnet", "options": {"width": 8}},
    "training": {
        "optimizer": "talt",
        "epochs": 6,
        "learning_rate": 0.02,
        "optimizer_options": {"update_interval": 4, "min_size": 256},
    },
    "tracking": {"mlflow": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(RUN, [f"output.root={tmp_path_factory.mktemp('studies')}"])


def log_of(result: TrainingResult) -> OptimizerLog:
    found = optimizer_log.load(Path(result.folder), "t000-v0")
    assert found is not None
    return found


def made_up(seed: int = 0, updates: int = 50, tensors: int = 3) -> OptimizerLog:
    generator = np.random.default_rng(seed)
    strength = generator.random((updates, tensors))
    strength[generator.random((updates, tensors)) < 0.6] = 0.0
    return OptimizerLog(
        job_id="t000-v0",
        steps=np.arange(updates) * 10 + 9,
        names=tuple(f"layer{k}.weight" for k in range(tensors)),
        strength=strength,
        cosine=generator.normal(size=(updates, tensors)),
        persistence=generator.random((updates, tensors)),
        gradient_norm=generator.random((updates, tensors)) + 0.1,
        changed_norm=generator.random((updates, tensors)) + 0.1,
        alignment=generator.random((updates, tensors)),
        eigenvalues=generator.random((updates, tensors, 4)),
        num_steps=updates * 10,
        num_epochs=10,
        bytes_per_parameter=0.5,
    )


def test_the_file_holds_what_the_optimizer_says(trained: TrainingResult) -> None:
    # The same training with the optimizer in hand, its log read from it.
    log = log_of(trained)
    names = list(log.names)
    assert len(names) >= 2
    assert all(name.endswith("weight") for name in names)
    assert log.num_epochs == 6
    steps = log.num_steps // 6
    assert log.num_steps == 6 * steps
    assert log.steps.tolist() == [k for k in range(log.num_steps) if (k + 1) % 4 == 0]
    assert log.eigenvalues.shape == (len(log.steps), len(names), 4)
    assert (log.gradient_norm > 0).all()


def test_keeping_and_drawing_changes_no_bit_of_the_training(
    trained: TrainingResult, tmp_path: Path
) -> None:
    plain = train(RUN, [f"output.root={tmp_path}"], pictures=False)
    assert not (Path(plain.folder) / "optimizer").exists()
    assert plain.study_id == trained.study_id
    states = [
        checkpoint.load(Path(result.folder) / result.seeds[0].checkpoint)["model"]
        for result in (plain, trained)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert plain.seeds[0].test_accuracy == trained.seeds[0].test_accuracy


def test_a_killed_training_ends_with_the_log_of_one_that_was_not(
    trained: TrainingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for kill -9."""

    save, left = checkpoint.save_sealed, [31]

    def dying(path: Any, state: Any) -> None:
        save(path, state)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(checkpoint, "save_sealed", dying)
    with pytest.raises(Killed):
        train(RUN, [f"output.root={tmp_path}"], snapshot_seconds=0.0)
    again = train(RUN, [f"output.root={tmp_path}"])
    one, other = log_of(trained), log_of(again)
    for name in ("steps", "strength", "changed_norm", "eigenvalues", "alignment"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_valleys_are_counted_as_by_hand() -> None:
    log = made_up()
    found = talt.valleys(log)
    events = [
        (u, t) for u in range(50) for t in range(3) if log.strength[u, t] > 0
    ]  # one event for each look in a valley
    assert (found.events, found.updates) == (len(events), 150)
    share = {name: sum(t == k for _, t in events) / 50 for k, name in enumerate(log.names)}
    assert dict(zip(found.tensors, found.share, strict=True)) == pytest.approx(share)
    assert list(found.share) == sorted(found.share, reverse=True)
    table = talt.tensor_table(log).set_index("tensor")
    assert table["events"].sum() == len(events)
    ratio = np.median(log.changed_norm[:, 1] / log.gradient_norm[:, 1])
    assert table.loc["layer1.weight", "ratio"] == pytest.approx(ratio)


def test_events_of_the_optimizer_are_the_looks_in_a_valley() -> None:
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.ones(16, 4))
    optimizer = optim.build(
        "talt",
        [weights],
        learning_rate=0.2,
        weight_decay=0.0,
        momentum=0.0,
        update_interval=2,
        min_size=2,
    )
    assert isinstance(optimizer, Talt)
    steep = torch.linspace(0.01, 9.5, 16).unsqueeze(1)
    for _ in range(60):
        optimizer.zero_grad()
        (0.5 * steep * weights.square()).sum().backward()
        optimizer.step()
    raw = optimizer.log()
    log = replace(
        made_up(),
        steps=np.asarray(raw["steps"]),
        names=("w",),
        **{
            key: raw[key].numpy()
            for key in ("strength", "gradient_norm", "changed_norm", "alignment", "eigenvalues")
        },
        cosine=raw["cosine"].numpy(),
    )
    assert talt.valleys(log).events == len(optimizer.events()) > 0


def test_valleys_belong_to_the_checkpoint_after_them() -> None:
    log = made_up(updates=40)
    share = talt.per_checkpoint(log, [2, 5, 10])
    inside = (log.strength > 0).mean(axis=1)
    epochs = log.steps / log.num_steps * 10
    parts = [inside[epochs <= 2], inside[(epochs > 2) & (epochs <= 5)], inside[epochs > 5]]
    assert share.tolist() == pytest.approx([float(part.mean()) for part in parts])


def test_the_animation_walks_the_path_from_its_start_to_its_end() -> None:
    path = pd.DataFrame(
        {"epoch": [1, 2, 3], "x": [0.0, 3.0, 3.0], "y": [0.0, 4.0, 8.0], "loss": [2.0, 1.0, 0.5]}
    )
    root = ElementTree.fromstring(str(talt.animation(path, None)))
    motion = next(element for element in root.iter() if element.tag == "animateMotion")
    times = [float(t) for t in motion.attrib["keyTimes"].split(";")]
    points = [float(t) for t in motion.attrib["keyPoints"].split(";")]
    assert times == sorted(times)
    assert (times[0], times[-1]) == (0.0, 1.0)
    corners = [
        tuple(map(float, part.split()))
        for part in motion.attrib["path"].removeprefix("M").split(" L")
    ]
    legs = [np.hypot(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(corners)]
    assert points == pytest.approx([0.0, legs[0] / sum(legs), 1.0, 1.0], abs=1e-3)
    # Up in the plane is up on the page.
    assert corners[0][1] > corners[1][1] > corners[2][1]
    assert [t.text for t in root.iter() if t.tag == "text"] == [
        "epoch 1: loss 2",
        "epoch 2: loss 1",
        "epoch 3: loss 0.5",
    ]
    assert not any(element.tag == "script" for element in root.iter())


def test_the_report_shows_all_of_it(trained: TrainingResult) -> None:
    page = (Path(trained.folder) / "report.html").read_text()
    for key in ("talt-loss", "talt-valleys", "talt-spectra", "talt-norms", "talt-transform"):
        assert f'id="{key}' in page or f"#{key}" in page, key
    assert "Valleys on the landscape" in page
    assert "animateMotion" in page
    captions = [f">epoch {number}: loss" in page for number in (1, 2, 3, 4, 5, 6)]
    assert all(captions)
    assert "epoch -1" not in page
    assert talt.reading(log_of(trained)).split(" found")[0] in page.replace("\u00a0", " ").replace(
        "&#160;", " "
    )


def test_every_picture_can_be_drawn_without_a_valley_and_with_one_look() -> None:
    quiet = replace(made_up(updates=1), strength=np.zeros((1, 3)))
    with drawing():
        for log in (quiet, made_up(updates=400, tensors=60)):
            for picture in talt.pictures(log, ()):
                assert "<svg" in picture.svg
    assert talt.valleys(quiet).events == 0
    assert "found a valley (0" in talt.reading(quiet).replace("\u00a0", " ")


def test_other_optimizers_leave_no_log(tmp_path: Path) -> None:
    done = train(RUN, [f"output.root={tmp_path}", "optimizer=sgd", "optimizer_options={}",
                       "epochs=1"])  # fmt: skip
    assert optimizer_log.load(Path(done.folder), "t000-v0") is None
    assert "What TALT saw" not in (Path(done.folder) / "report.html").read_text()
