"""A verification keeps what it said about every test image, once, durably and reproducibly."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_resume import kill_after
from test_training_support import (
    CLASSES,
    NUM_TEST,
    NUM_TRAIN,
    drive,
    image_data,
    make_job,
    make_spec,
    objective,
)
from torch.nn import functional

from llp.errors import EnvironmentProblem, StudyError
from llp.records import Rung, Verification, from_plain, to_plain
from llp.reporting import predictions as reading
from llp.training import checkpoint, loop, predictions
from llp.workloads.images import Split

VERIFY = make_job(job_id="t000-v0", kind="verify", rung=Rung(2, 1.0, NUM_TRAIN, 4))


def verified(folder: Path, **options: Any) -> Verification:
    reports, end = drive(objective(folder, **options), VERIFY)
    assert end.outcome == "completed", end.failure
    assert isinstance(reports[-1], Verification)
    return reports[-1]


def load(folder: Path, done: Verification) -> reading.Predictions:
    return reading.load(folder, done.predictions, done.predictions_sha256)


def test_the_file_tells_what_the_saved_weights_say_about_every_test_image(tmp_path: Path) -> None:
    done = verified(tmp_path)
    assert done.predictions == "predictions/t000-v0.npz"
    said = load(tmp_path, done)
    data = image_data()
    saved = checkpoint.load(tmp_path / "checkpoints" / "t000-v0.pt")["model"]
    images = (torch.from_numpy(data.test.images) / 255 - 0.5) / 0.3
    hidden = functional.relu(images.flatten(1) @ saved["1.weight"].T + saved["1.bias"])
    last = sorted(key for key in saved if key.endswith("weight"))[1]
    logits = hidden @ saved[last].T + saved[last.replace("weight", "bias")]
    expected = logits.softmax(1).numpy()
    assert said.labels.tolist() == data.test.labels.tolist()
    assert said.predicted.tolist() == logits.argmax(1).tolist()
    assert np.abs(said.probabilities - expected).max() < 1e-3
    assert np.abs(said.confidence - expected.max(axis=1)).max() < 1e-5
    place = (-expected).argsort(axis=1).tolist()
    assert said.rank.tolist() == [
        order.index(label) for order, label in zip(place, data.test.labels, strict=True)
    ]
    assert said.class_names == ("a", "b", "c")
    assert done.test_accuracy == pytest.approx(float(said.hits.mean()), abs=0)
    loss = -np.log(expected[np.arange(NUM_TEST), data.test.labels]).mean()
    assert done.test_loss == pytest.approx(float(loss), abs=1e-5)


def test_the_ledger_learns_the_digest_of_a_file_that_is_there_already(tmp_path: Path) -> None:
    for report in objective(tmp_path)(VERIFY):
        if isinstance(report, Verification):
            content = (tmp_path / report.predictions).read_bytes()
            assert hashlib.sha256(content).hexdigest() == report.predictions_sha256
            break
    else:
        pytest.fail("no verification was reported")
    again = from_plain(Verification, json.loads(json.dumps(to_plain(report))))
    assert again == report


def test_a_record_of_an_older_ledger_loads_without_predictions(tmp_path: Path) -> None:
    plain = to_plain(verified(tmp_path))
    del plain["predictions"], plain["predictions_sha256"]
    old = from_plain(Verification, plain)
    assert (old.predictions, old.predictions_sha256) == ("", "")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, second = verified(tmp_path / "a"), verified(tmp_path / "b")
    assert first.predictions_sha256 == second.predictions_sha256
    reports, _ = drive(objective(tmp_path / "c"), replace(VERIFY, seed=VERIFY.seed + 1))
    assert reports[-1].predictions_sha256 != first.predictions_sha256


@pytest.mark.parametrize("snapshots", [1, 5, 12])
def test_a_killed_and_resumed_training_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: int
) -> None:
    expected = verified(tmp_path / "whole")
    folder = tmp_path / "cut"
    kill_after(monkeypatch, snapshots, objective(folder, checkpoint_seconds=0.0), VERIFY)
    assert not (folder / "predictions").exists()
    reports, _ = drive(objective(folder), replace(VERIFY, attempt=1))
    assert reports[-1].predictions_sha256 == expected.predictions_sha256


class CountedSplit(Split):
    """A test split that counts how often its pixels are asked for."""

    asked: Counter[str]

    def pixels(self, indices: Any) -> Any:
        CountedSplit.asked["pixels"] += len(indices)
        return super().pixels(indices)


def test_the_test_images_go_through_the_network_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CountedSplit.asked = Counter()
    data = image_data()
    data = replace(data, test=CountedSplit(data.test.images, data.test.labels))
    passes: list[int] = []
    evaluate = loop.evaluate

    def counting(model: Any, batches: Any, *rest: Any, **options: Any) -> Any:
        passes.append(batches.num_examples)
        return evaluate(model, batches, *rest, **options)

    monkeypatch.setattr(loop, "evaluate", counting)
    done = verified(tmp_path, data=data)
    assert passes.count(NUM_TEST) == 1
    assert CountedSplit.asked["pixels"] == len(load(tmp_path, done).images)


def test_a_probe_and_a_training_without_class_names_keep_nothing(tmp_path: Path) -> None:
    drive(objective(tmp_path), make_job())
    assert not (tmp_path / "predictions").exists()


def test_a_disk_that_fails_is_a_problem_of_the_machine_and_not_of_the_configuration(
    tmp_path: Path,
) -> None:
    (tmp_path / "predictions").write_text("in the way")
    with pytest.raises(EnvironmentProblem, match="predictions"):
        drive(objective(tmp_path), VERIFY)


def made_up(num: int = 300, classes: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(0, 2, (num, classes)))
    recorder = predictions.Recorder(loop.num_correct)
    labels = torch.from_numpy(generator.integers(0, classes, num))
    recorder(logits[:100], labels[:100])
    recorder(logits[100:], labels[100:])
    return recorder.arrays()


def test_the_gallery_holds_the_surest_misses_and_the_least_sure_hits() -> None:
    arrays = made_up()
    groups = predictions.gallery(arrays)
    rows = list(enumerate(arrays["confidence"].tolist()))
    wrong = {i for i in range(300) if arrays["predicted"][i] != arrays["labels"][i]}
    by_confidence = sorted(rows, key=lambda row: row[1])
    assert (
        groups["confident_wrong"].tolist() == [i for i, _ in by_confidence[::-1] if i in wrong][:24]
    )
    assert groups["unsure_right"].tolist() == [i for i, _ in by_confidence if i not in wrong][:24]
    drawn = groups["random"].tolist()
    assert len(set(drawn)) == 24
    assert drawn == predictions.gallery(made_up(seed=1))["random"].tolist()


def test_a_perfect_model_has_no_miss_to_show(tmp_path: Path) -> None:
    arrays = made_up(num=120)
    arrays["labels"] = arrays["predicted"].copy()
    path, digest = predictions.save(
        "p.npz",
        arrays,
        class_names="abcde",
        pixels=lambda indices: np.zeros((len(indices), 1, 4, 4), np.uint8),
        root=tmp_path,
    )
    said = reading.load(tmp_path, path, digest)
    assert len(said.confident_wrong) == 0
    assert said.hits.all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 1, 8, 8), (3, 8, 8, 1)),
        ((3, 3, 32, 32), (3, 32, 32, 3)),
        ((2, 3, 96, 48), (2, 48, 24, 3)),
        ((2, 2, 8, 8), (2, 8, 8, 1)),
        ((0, 3, 64, 64), (0, 48, 48, 3)),
    ],
)
def test_thumbnails_are_small_and_have_one_or_three_channels(
    shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    small = predictions.thumbnails(images)
    assert small.shape == expected
    if shape[1:] in ((1, 8, 8), (3, 32, 32)):
        assert (small.transpose(0, 3, 1, 2) == images).all()


def test_thumbnails_of_floats_use_the_whole_range() -> None:
    images = np.linspace(-2, 3, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    small = predictions.thumbnails(images)
    assert (small.min(), small.max()) == (0, 255)
    assert (np.diff(small.ravel().astype(int)) >= 0).all()


def test_the_kept_images_are_those_of_the_test_split(tmp_path: Path) -> None:
    said = load(tmp_path, verified(tmp_path))
    shown = {*said.confident_wrong.tolist(), *said.unsure_right.tolist(), *said.random.tolist()}
    assert set(said.images) == shown
    for index, pixels in said.images.items():
        assert (pixels[:, :, 0] == image_data().test.images[index, 0]).all()


def test_altered_missing_and_foreign_predictions_are_refused(tmp_path: Path) -> None:
    done = verified(tmp_path)
    file = tmp_path / done.predictions
    content = file.read_bytes()
    with pytest.raises(StudyError, match="lie outside"):
        reading.load(tmp_path, "../p.npz", "")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StudyError, match="altered"):
        load(tmp_path, done)
    file.unlink()
    with pytest.raises(StudyError, match="no such file"):
        load(tmp_path, done)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a zip", b"PK\x03\x04 cut short"],
)
def test_a_file_that_is_no_archive_is_told_as_such(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(StudyError, match="not readable"):
        reading.load(tmp_path, "p.npz", hashlib.sha256(content).hexdigest())


def test_pickled_content_and_newer_formats_are_refused(tmp_path: Path) -> None:
    for arrays in ({"format": np.array([print], dtype=object)}, {"format": np.int32(99)}):
        np.savez(tmp_path / "p.npz", **arrays)
        digest = hashlib.sha256((tmp_path / "p.npz").read_bytes()).hexdigest()
        with pytest.raises(StudyError, match="not readable"):
            reading.load(tmp_path, "p.npz", digest)


def test_odd_class_names_survive_the_file(tmp_path: Path) -> None:
    names = ("<b>a</b>", "\ud800 lone", "tab\tand\nline")
    said = load(tmp_path, verified(tmp_path, data=image_data(class_names=names)))
    assert said.class_names == names
    assert [said.name(0), CLASSES] == ["<b>a</b>", 3]


def test_spec_with_another_precision_still_counts_the_same_hits(tmp_path: Path) -> None:
    done = verified(tmp_path, spec=make_spec(training={"precision": "bf16"}))
    assert done.test_accuracy == pytest.approx(float(load(tmp_path, done).hits.mean()), abs=0)
