"""`load`: three disjoint splits, statistics of the training split, and messages for bad input."""

from __future__ import annotations

import hashlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from llp.errors import DataError, SpecError
from llp.spec.schema import DatasetSpec
from llp.workloads import load
from llp.workloads.datasets import RawImages, digits, synthetic
from llp.workloads.images import channel_statistics


def spec(name="digits", **fields):
    return DatasetSpec(name=name, **fields)


def hashes(split):
    return {hashlib.sha256(image.tobytes()).hexdigest() for image in split.images}


def test_digits_are_scikit_learns_images_cut_into_three():
    data = load(spec(), seed=0)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert (data.channels, data.image_size, data.num_classes) == (1, 8, 10)
    bunch = load_digits()
    known = {
        (im.astype(int).tobytes(), int(y)) for im, y in zip(bunch.images, bunch.target, strict=True)
    }
    for split in (data.train, data.validation, data.test):
        for image, label in zip(split.images[:50], split.labels[:50], strict=True):
            levels = np.rint(image[0].astype(float) * 16 / 255).astype(int)
            assert (levels.tobytes(), int(label)) in known


def test_the_test_split_of_digits_is_the_same_for_every_seed_and_balanced():
    first, second = load(spec(), seed=0), load(spec(), seed=1)
    assert np.array_equal(first.test.images, second.test.images)
    assert not np.array_equal(first.validation.images, second.validation.images)
    shares = np.bincount(first.test.labels) / np.bincount(load_digits().target)
    assert np.abs(shares - 0.2).max() < 0.01


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_no_image_is_in_two_splits(name):
    data = load(spec(name), seed=3)
    splits = [hashes(split) for split in (data.train, data.validation, data.test)]
    # digits has no duplicates at all, so a shared hash would be a leak
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]
    assert len(data.validation) == round(0.15 * (len(data.train) + len(data.validation)))


def test_mean_and_standard_deviation_are_those_of_the_training_split():
    data = load(spec("synthetic", options={"num_train": 200, "num_test": 50}), seed=0)
    pixels = data.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)


def test_float_images_keep_their_unit_and_a_constant_channel_is_not_divided_by_zero():
    images = np.random.default_rng(0).normal(3, 2, (20, 2, 8, 8)).astype(np.float32)
    images[:, 1] = 5
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, [images[:, 0].mean(dtype=np.float64), 5], rtol=1e-6)
    np.testing.assert_allclose(std, [images[:, 0].std(dtype=np.float64), 1], rtol=1e-6)


def test_the_same_spec_and_seed_give_the_same_digest_and_others_do_not():
    options = {"num_train": 200, "num_test": 50}
    base = load(spec("synthetic", options=options), seed=0)
    assert base.digest == load(spec("synthetic", options=options), seed=0).digest
    others = [
        load(spec("synthetic", options=options), seed=1),
        load(spec("synthetic", options={**options, "noise": 0.7}), seed=0),
        load(spec("synthetic", options=options, validation_fraction=0.2), seed=0),
        load(spec("synthetic", options=options, max_train_examples=100), seed=0),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5


def test_data_survive_pickling_and_are_read_only():
    data = load(spec(), seed=0)
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again.train.images, data.train.images)
    assert again.class_names == data.class_names
    for split in (data.train, data.validation, data.test):
        assert not split.images.flags.writeable
        assert not split.labels.flags.writeable
        assert split.images.flags.c_contiguous


def test_arrays_travel_out_of_band_so_that_workers_share_them():
    buffers = []
    data = load(spec(), seed=0)
    pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    shared = sum(buffer.raw().nbytes for buffer in buffers)
    arrays = [a for s in (data.train, data.validation, data.test) for a in (s.images, s.labels)]
    assert shared == sum(array.nbytes for array in arrays)


def test_workers_can_be_given_the_data_without_the_test_split():
    data = load(spec(), seed=0)
    assert data.without_test().test is None
    assert data.without_test().train is data.train
    assert data.test is not None


def test_max_train_examples_is_balanced_nested_and_shrinks_validation_in_proportion():
    options = {"num_train": 12_000, "num_test": 50, "image_size": 8, "channels": 1}
    small, large = (
        load(spec("synthetic", options=options, max_train_examples=n), seed=0) for n in (500, 1000)
    )
    assert len(small.train) == 500
    assert np.bincount(small.train.labels).tolist() == [50] * 10
    assert hashes(small.train) < hashes(large.train)
    assert len(small.validation) == 1000  # 88 would be the ratio; 1,000 the floor
    bigger = load(spec("synthetic", options=options, max_train_examples=8000), seed=0)
    assert len(bigger.validation) == round(8000 * 0.15 / 0.85)
    assert len(bigger.test) == 50
    assert not hashes(bigger.train) & hashes(bigger.validation)


def test_max_test_examples_is_balanced_and_the_same_for_every_seed():
    options = {"num_train": 200, "num_test": 300, "image_size": 8, "channels": 1}
    full = load(spec("synthetic", options=options), seed=0)
    small, other = (
        load(spec("synthetic", options=options, max_test_examples=100), seed=seed)
        for seed in (0, 1)
    )
    assert np.bincount(small.test.labels).tolist() == [10] * 10
    assert hashes(small.test) == hashes(other.test) < hashes(full.test)
    assert hashes(small.train) == hashes(full.train)


@pytest.mark.parametrize("key", ["max_train_examples", "max_test_examples"])
def test_fewer_images_than_classes_are_refused(key):
    with pytest.raises(SpecError, match=f"{key}: 9 is fewer than one image for each of the 10"):
        load(spec(**{key: 9}), seed=0)


def test_synthetic_images_can_be_learnt_but_not_for_free():
    raw = synthetic()
    train, test = (x.reshape(len(x), -1) / 255 for x in (raw.train_images, raw.test_images))
    accuracies = []
    for count in (100, 2000):
        model = RidgeClassifier(30.0).fit(train[:count], raw.train_labels[:count])
        accuracies.append(model.score(test, raw.test_labels))
    assert 0.25 < accuracies[0] < 0.8  # chance is 0.1
    assert accuracies[0] + 0.1 < accuracies[1] < 0.99  # more data helps, and there is room above


def test_synthetic_noise_makes_it_harder():
    scores = []
    for noise in (0.2, 1.5):
        raw = synthetic(num_train=500, num_test=500, noise=noise)
        train, test = (x.reshape(len(x), -1) / 255 for x in (raw.train_images, raw.test_images))
        model = RidgeClassifier(30.0).fit(train, raw.train_labels)
        scores.append(model.score(test, raw.test_labels))
    assert scores[0] > 0.95
    assert scores[1] < 0.75


@pytest.mark.parametrize(
    "options",
    [
        {"num_train": 40, "num_test": 20, "num_classes": 2, "image_size": 8, "channels": 1},
        {"num_train": 333, "num_test": 111, "num_classes": 7, "image_size": 33, "channels": 2},
    ],
)
def test_synthetic_options_shape_the_data(options):
    raw = synthetic(**options)
    side = options["image_size"]
    assert raw.train_images.shape == (options["num_train"], options["channels"], side, side)
    assert raw.test_images.shape == (options["num_test"], options["channels"], side, side)
    counts = np.bincount(raw.train_labels, minlength=options["num_classes"])
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(raw.train_images, synthetic(**options).train_images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 5}, "num_train must be a whole number of at least 20, not 5"),
        ({"image_size": 4}, "image_size must be a whole number of at least 8"),
        ({"channels": 1.5}, "channels must be a whole number"),
        ({"noise": 0.0}, r"noise must be in \[0.05, 10\], not 0.0"),
        ({"noize": 1}, "unknown option of synthetic 'noize'; did you mean 'noise'"),
    ],
)
def test_bad_options_of_synthetic_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        load(spec("synthetic", options=options), seed=0)


def test_an_unknown_dataset_is_refused_with_the_nearest_name():
    with pytest.raises(SpecError, match="unknown dataset 'cifar11'; did you mean 'cifar10'"):
        load(spec("cifar11"), seed=0)


def test_options_of_a_dataset_without_any_are_refused():
    with pytest.raises(SpecError, match="digits takes no options, so not 'noise'"):
        load(spec(options={"noise": 1}), seed=0)


@pytest.fixture
def user(monkeypatch):
    module = types.ModuleType("my_package_for_data")
    monkeypatch.setitem(sys.modules, "my_package_for_data", module)
    return module


def arrays(count=40, side=8, classes=4, dtype=np.uint8):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 3, side, side)).astype(dtype)
    return images, np.arange(count) % classes


def test_a_loader_from_outside_may_return_four_arrays_or_tensors(user):
    def loader(scale=1, root=None):
        images, labels = arrays()
        return torch.tensor(images // scale), torch.tensor(labels), images[:8] // scale, labels[:8]

    user.load = loader
    data = load(spec("my_package_for_data:load", options={"scale": 2}), seed=0)
    assert data.num_classes == 4
    assert (len(data.train), len(data.validation), len(data.test)) == (34, 6, 8)
    assert data.train.images.max() <= 127
    assert "scale" in data.source
    with pytest.raises(SpecError, match="'scal'; did you mean 'scale'"):
        load(spec("my_package_for_data:load", options={"scal": 2}), seed=0)


def test_a_loader_from_outside_gets_root_when_it_asks_for_it(user, tmp_path):
    seen = {}

    def loader(**keywords):
        seen.update(keywords)
        images, labels = arrays()
        return RawImages(images, labels, images[:4], labels[:4], ("a", "b", "c", "d"), "mine")

    user.load = loader
    data = load(spec("my_package_for_data:load", root=str(tmp_path), options={"x": 1}), seed=0)
    assert seen == {"root": str(tmp_path), "download": False, "x": 1}
    assert data.class_names == ("a", "b", "c", "d")
    assert data.source == "mine"


def test_arrays_from_outside_are_not_made_read_only_behind_the_users_back(user):
    images, labels = arrays()
    user.load = lambda: (images, labels, images, labels)
    load(spec("my_package_for_data:load"), seed=0)
    assert images.flags.writeable


def test_grey_images_may_come_without_a_channel_axis(user):
    images, labels = arrays()
    user.load = lambda: (images[:, 0], labels, images[:4, 0], labels[:4])
    assert load(spec("my_package_for_data:load"), seed=0).channels == 1


GOOD_IMAGES, GOOD_LABELS = arrays()
NAN = GOOD_IMAGES.astype(np.float32)
NAN[3, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((1, 2, 3), r"must return RawImages or \(train_images"),
        ((GOOD_IMAGES, GOOD_LABELS[:-1], *arrays()), r"40 images but labels of shape \(39,\)"),
        ((GOOD_IMAGES, GOOD_LABELS / 2, *arrays()), "labels must be whole numbers, not float64"),
        ((GOOD_IMAGES, GOOD_LABELS - 1, *arrays()), "label -1 is negative; classes count from 0"),
        ((GOOD_IMAGES.transpose(0, 2, 3, 1), GOOD_LABELS, *arrays()), r"transpose\(0, 3, 1, 2\)"),
        ((GOOD_IMAGES[:, :, :4], GOOD_LABELS, *arrays()), "images must be square"),
        ((GOOD_IMAGES.astype(np.int64), GOOD_LABELS, *arrays()), "must be uint8 .* not int64"),
        ((NAN, GOOD_LABELS, *arrays()), "training set: image 3 holds NaN or infinity"),
        ((*arrays(), *arrays(side=16)), r"training images are \[3, 8, 8\], test images"),
        ((*arrays(), GOOD_IMAGES, GOOD_LABELS + 1), "test label 4 of 4 classes"),
        ((GOOD_IMAGES, GOOD_LABELS * 2, *arrays()), r"class 1 has 0 training image\(s\)"),
        ((GOOD_IMAGES, GOOD_LABELS * 0, *arrays(classes=1)), "at least two classes"),
        ((GOOD_IMAGES, GOOD_LABELS, GOOD_IMAGES[:0], GOOD_LABELS[:0]), "test set: no images"),
    ],
)
def test_inconsistent_arrays_are_refused_by_name(user, result, message):
    user.load = lambda: result
    with pytest.raises(DataError, match=message):
        load(spec("my_package_for_data:load"), seed=0)


def test_a_missing_file_of_a_loader_from_outside_is_a_data_error(user):
    user.load = lambda: np.load("/no/such/file.npy")
    with pytest.raises(DataError, match=r"my_package_for_data:load: .*no/such/file\.npy"):
        load(spec("my_package_for_data:load"), seed=0)


def raising(error):
    raise error


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: raising(KeyError("labels")), "my_package_for_data:load: KeyError: 'labels'"),
        (lambda: raising(ZeroDivisionError()), "my_package_for_data:load: ZeroDivisionError"),
        (lambda: 1 / 0, r"ZeroDivisionError: division by zero \(line \d+ of .*datasets.py\)"),
        (lambda needed: None, "TypeError: .*missing 1 required positional argument: 'needed'"),
        (lambda: ([[1], [1, 2]], [0, 1], [], []), "my_package_for_data:load: ValueError: "),
        (lambda: RawImages(*arrays(), *arrays(), class_names=None), "load: TypeError: 'NoneType'"),
    ],
)
def test_whatever_a_loader_from_outside_raises_is_a_data_error_that_names_it(user, loader, message):
    user.load = loader
    with pytest.raises(DataError, match=message) as caught:
        load(spec("my_package_for_data:load"), seed=0)
    assert caught.value.__cause__ is not None


def test_an_error_of_ours_raised_by_a_loader_from_outside_stays_as_it_is(user):
    user.load = lambda: raising(SpecError("mine"))
    with pytest.raises(SpecError, match=r"^mine$"):
        load(spec("my_package_for_data:load"), seed=0)


def test_digits_have_seventeen_levels_spread_over_the_whole_range():
    levels = np.unique(digits().train_images)
    assert levels[0] == 0
    assert levels[-1] == 255
    assert len(levels) == 17
