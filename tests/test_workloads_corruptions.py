"""Corrupted images and wrong labels: every row, its severities, and where accuracies end up."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from llp import registry
from llp.errors import DataError, SpecError
from llp.records import Job, Rung, Trial, Verification
from llp.scoring.choose import choose_winner
from llp.scoring.targets import CORRUPTED, judged
from llp.spec.schema import DatasetSpec, Spec
from llp.training.objective import TrainingObjective
from llp.training.recipe import Recipe
from llp.workloads import load
from llp.workloads.corruptions import SEVERITIES, corrupt, corrupted_copies
from llp.workloads.datasets import with_label_noise
from llp.workloads.images import Split


def photographs(side: int = 32, channels: int = 3, num: int = 48) -> Any:
    """Images with edges and smooth parts, as photographs have: overlapping squares on a slope."""
    rng = np.random.default_rng(0)
    images = np.zeros((num, channels, side, side))
    slope = np.linspace(0, 60, side)
    for image in images:
        image += 60 + slope * rng.random() + slope[:, None] * rng.random()
        for _ in range(5):
            top, left = rng.integers(0, side - side // 4, 2)
            high, wide = rng.integers(side // 8, side // 2, 2)
            image[:, top : top + high, left : left + wide] = rng.integers(30, 190, (channels, 1, 1))
    return images.astype(np.uint8)


def digits_images() -> Any:
    return np.rint(load_digits().images[:60] * (255 / 16)).astype(np.uint8)[:, None]


@pytest.mark.parametrize("name", registry.CORRUPTIONS)
@pytest.mark.parametrize("kind", ["32x32 colour", "8x8 grey", "64x64 grey"])
def test_every_severity_is_further_from_the_image_than_the_one_below(name: str, kind: str) -> None:
    images = {
        "32x32 colour": photographs,
        "8x8 grey": digits_images,
        "64x64 grey": lambda: photographs(64, 1, 16),
    }[kind]()
    before = images.copy()
    errors = []
    for severity in SEVERITIES:
        found = corrupt(images, name, severity, seed=3)
        assert (found.dtype, found.shape) == (np.uint8, images.shape)
        assert np.array_equal(found, corrupt(images, name, severity, seed=3)), "deterministic"
        errors.append(float(((found.astype(float) - images) ** 2).mean()))
    assert errors == sorted(errors), errors
    assert 0 < 1.3 * errors[0] < errors[-1], errors
    assert np.array_equal(images, before), "the images are left alone"


@pytest.mark.parametrize("name", ["gaussian_noise", "shift"])
def test_another_seed_draws_anew(name: str) -> None:
    images = photographs()
    assert not np.array_equal(corrupt(images, name, 2, seed=0), corrupt(images, name, 2, seed=1))


def test_jpeg_is_what_pillow_writes() -> None:
    images = photographs(num=3)
    found = corrupt(images, "jpeg", 5)
    for image, pixels in zip(images, found, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=40)
        assert np.array_equal(pixels, np.asarray(Image.open(buffer)).transpose(2, 0, 1))


def test_copies_hold_every_corruption_with_a_fifth_of_the_images_at_each_severity() -> None:
    images = photographs(num=50)
    split = Split(images, np.arange(50))
    copies = dict(corrupted_copies(split, seed=1))
    assert list(copies) == list(registry.CORRUPTIONS)
    severities = np.zeros((len(copies), 50), dtype=int)
    for number, copy in enumerate(copies.values()):
        assert np.array_equal(copy.labels, split.labels)
        for severity in SEVERITIES:
            name = list(copies)[number]
            if name in ("contrast", "brightness", "jpeg", "pixelate"):  # nothing random in these
                same = (corrupt(images, name, severity) == copy.images).all(axis=(1, 2, 3))
                severities[number, same] = severity
    for number in np.flatnonzero(severities.any(axis=1)):
        assert np.bincount(severities[number], minlength=6).tolist() == [0, 10, 10, 10, 10, 10]
    again = dict(corrupted_copies(split, seed=1))
    assert all(np.array_equal(copies[n].images, again[n].images) for n in copies)


def test_bad_input_is_named() -> None:
    images = photographs(num=2)
    with pytest.raises(SpecError, match="gaussian_noise"):
        corrupt(images, "gausian_noise", 1)
    with pytest.raises(ValueError, match="1 to 5, not 6"):
        corrupt(images, "jpeg", 6)
    with pytest.raises(DataError, match="float64"):
        corrupt(images / 255, "jpeg", 1)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_label_noise_replaces_that_share_of_the_training_labels_and_no_other(share: float) -> None:
    clean, noisy = (
        load(DatasetSpec(name="digits", label_noise=noise), 0) for noise in (0.0, share)
    )
    changed = (clean.train.labels != noisy.train.labels).mean()
    assert changed == pytest.approx(share, abs=1 / len(clean.train))
    assert np.array_equal(clean.validation.labels, noisy.validation.labels)
    assert clean.test is not None
    assert noisy.test is not None
    assert np.array_equal(clean.test.labels, noisy.test.labels)
    assert clean.digest != noisy.digest


def test_more_label_noise_contains_less_and_every_other_class_comes_up() -> None:
    labels = np.repeat(np.arange(4), 500)
    few, many = (with_label_noise(labels, share, 4, seed=2) for share in (0.2, 0.5))
    wrong = few != labels
    assert np.array_equal(few[wrong], many[wrong])
    counts = np.bincount((few - labels)[wrong] % 4, minlength=4)
    assert counts[0] == 0
    assert counts[1:].min() > 0.8 * counts[1:].mean()


def experiment(**verification: Any) -> Spec:
    return Spec(
        name="tiny",
        dataset={"name": "digits", "max_train_examples": 300},
        model={"name": "convnet", "options": {"width": 4}},
        training={"batch_size": 32, "learning_rate": 0.1, "epochs": 3},
        search_space={"weight_decay": [1e-4, 1e-3]},
        verification=verification,
    )


def verified(spec: Spec, folder: Path) -> Verification:
    data = load(spec.dataset, spec.seed)
    rung = Rung(4, 1.0, len(data.train), 3)
    job = Job("t000-v0", "verify", Trial("t000", {"weight_decay": 1e-3}, 5), rung, 5)
    reports = list(TrainingObjective(spec, data, folder, "cpu")(job))
    assert isinstance(reports[-1], Verification)
    return reports[-1]


def test_a_verification_measures_corrupted_accuracy_only_when_asked(tmp_path: Path) -> None:
    spec = experiment(corrupted=True)
    found = verified(spec, tmp_path)
    plain = verified(experiment(), tmp_path / "plain")
    assert math.isnan(plain.corrupted_test_accuracy)
    assert replace(
        found, seconds=0, corrupted_test_accuracy=0, corrupted_validation_accuracy=0
    ) == (replace(plain, seconds=0, corrupted_test_accuracy=0, corrupted_validation_accuracy=0)), (
        "the training is the same"
    )
    data = load(spec.dataset, spec.seed)
    model = Recipe.of(spec, {}).build_model(channels=1, image_size=8, num_classes=10)
    state = torch.load(tmp_path / "checkpoints" / "t000-v0.pt", weights_only=True)
    model.load_state_dict(state["model"])
    model.eval()
    mean, std = data.mean[0], data.std[0]
    for split, value in (
        (data.validation, found.corrupted_validation_accuracy),
        (data.test, found.corrupted_test_accuracy),
    ):
        assert split is not None
        hits = []
        for _, copy in corrupted_copies(split, seed=spec.seed):
            inputs = (torch.as_tensor(np.array(copy.images)).float() / 255 - mean) / std
            with torch.no_grad():
                hits.append((model(inputs).argmax(1).numpy() == copy.labels).mean())
        assert value == pytest.approx(float(np.mean(hits)), abs=1e-9)
    assert found.corrupted_test_accuracy < found.test_accuracy


def test_the_corrupted_target_chooses_the_winner_by_corrupted_validation_accuracy() -> None:
    def run(trial_id: str, clean: float, corrupted: float) -> Verification:
        return Verification(
            trial_id, 0, clean, 0.1, clean, 0.1, 100, 10, 1.0,
            corrupted_validation_accuracy=corrupted, corrupted_test_accuracy=corrupted - 0.01,
        )  # fmt: skip

    runs = [run("t0", 0.9, 0.5), run("t1", 0.8, 0.6)]
    assert choose_winner(judged(runs, corrupted=False))[0] == "t0"
    winner, reason = choose_winner(judged(runs, corrupted=True), judged_by=CORRUPTED)
    assert winner == "t1"
    assert "corrupted validation images" in reason
    assert judged(runs, corrupted=True)[0].test_accuracy == 0.49


def test_corruptions_of_float_images_are_refused_before_anything_starts() -> None:
    from llp import pipeline

    spec = experiment(corrupted=True)
    data = load(spec.dataset, 0)
    floats = Split(data.train.images.astype(np.float32) / 255, data.train.labels)
    with pytest.raises(SpecError, match=r"verification\.corrupted.*uint8"):
        pipeline.plan(spec, replace(data, train=floats))
