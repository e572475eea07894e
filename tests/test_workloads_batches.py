"""Batches: the same numbers whichever way images are stored, in an order fixed by (seed, epoch)."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llp.workloads import batches as module
from llp.workloads.augment import crop, cutout, flip
from llp.workloads.batches import Batches, fits, fixed_batches
from llp.workloads.images import FileImages, Split

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def a_split(count=50, side=8, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    labels = generator.integers(0, 4, count)
    images.setflags(write=False)
    labels.setflags(write=False)
    return Split(images, labels)


def make(split, indices=None, **options):
    return Batches(split, indices, **{"batch_size": 16, "mean": MEAN, "std": STD, **options})


def everything(batches, epoch=0, **options):
    pairs = list(batches.epoch(epoch, **options))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def by_loop(split, indices):
    """Normalised images one by one in float64 numpy."""
    out = []
    for index in indices:
        image = split.images[index].astype(np.float64) / 255
        out.append([(image[c] - MEAN[c]) / STD[c] for c in range(3)])
    return torch.tensor(np.array(out))


def test_images_come_out_normalised_in_the_order_of_the_indices():
    split, indices = a_split(), [7, 3, 3, 41, 0]
    images, labels = everything(make(split, indices, batch_size=2))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    torch.testing.assert_close(images.double(), by_loop(split, indices), atol=2e-6, rtol=0)
    assert labels.tolist() == split.labels[indices].tolist()


def test_float_images_are_not_divided_by_255():
    split = a_split()
    floats = Split(split.images.astype(np.float32) / 255, split.labels)
    torch.testing.assert_close(everything(make(floats))[0], everything(make(split))[0])


def test_an_epoch_uses_every_example_once():
    split = a_split(count=53)
    marked = Split(split.images, np.arange(53))
    for epoch in range(3):
        _, labels = everything(make(marked, shuffle=True), epoch)
        assert sorted(labels.tolist()) == list(range(53))


def test_order_and_augmentation_are_functions_of_seed_and_epoch():
    options = {"shuffle": True, "augmentation": (flip, crop, cutout)}
    once = make(a_split(), seed=5, **options)
    for epoch in (0, 1, 2):  # an uninterrupted run
        through = everything(once, epoch)
    resumed = everything(make(a_split(), seed=5, **options), 2)
    assert torch.equal(through[0], resumed[0])
    assert torch.equal(through[1], resumed[1])
    assert not torch.equal(resumed[0], everything(once, 1)[0])
    assert not torch.equal(resumed[0], everything(make(a_split(), seed=6, **options), 2)[0])


def test_an_epoch_can_be_entered_in_the_middle():
    batches = make(a_split(), shuffle=True, augmentation=(flip, crop))
    whole = list(batches.epoch(3))
    for start in range(len(whole) + 1):
        rest = list(batches.epoch(3, start=start))
        assert len(rest) == len(whole) - start
        for (x, y), (u, v) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_augmentation_does_not_depend_on_shuffling_and_changes_with_the_epoch():
    batches = make(a_split(), augmentation=(flip,))
    assert not torch.equal(everything(batches, 0)[0], everything(batches, 1)[0])


def test_torchs_global_generator_is_left_alone(tmp_path):
    state = torch.get_rng_state()
    everything(make(a_split(), shuffle=True, augmentation=(crop,)))
    everything(make(in_files(a_split(), tmp_path), shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


def in_files(split, folder):
    """The same split as PNG files."""
    paths = []
    for index, image in enumerate(split.images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index}.png")
        paths.append(f"{index}.png")
    return Split(FileImages(str(folder), tuple(paths), split.images.shape[2], 3), split.labels)


@pytest.mark.parametrize("augmentation", [(), (flip, crop, cutout)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_way_of_storing_gives_the_same_batches(
    tmp_path, monkeypatch, augmentation, num_workers
):
    split, indices = a_split(), np.arange(5, 45)[::-1]
    options = {"shuffle": True, "seed": 9, "augmentation": augmentation}
    floats = everything(make(split, indices, **options), 1)
    monkeypatch.setattr(module, "FLOAT_BYTES", 0)
    bytes_ = everything(make(split, indices, **options), 1)
    host = make(split, indices, **options)
    normalise = module._Normalise(MEAN, STD, torch.device("cpu"))
    host._source = module._Host(
        split.images[indices], torch.tensor(split.labels[indices]), normalise
    )
    files = make(in_files(split, tmp_path), indices, num_workers=num_workers, **options)
    for other in (bytes_, everything(host, 1), everything(files, 1)):
        assert torch.equal(other[0], floats[0])
        assert torch.equal(other[1], floats[1])


def test_read_only_arrays_are_used_without_warning_copy_or_change(monkeypatch):
    split = pickle.loads(pickle.dumps(a_split()))
    split.images.setflags(write=False)
    before = copy.deepcopy(split.images)
    monkeypatch.setattr(module, "FLOAT_BYTES", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = make(split, augmentation=(flip, crop, cutout), shuffle=True)
        everything(batches)
    assert np.array_equal(split.images, before)
    assert batches._source._images.data_ptr() == split.images.ctypes.data


@given(st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_batch_sizes_add_up_and_no_batch_has_a_single_example_by_accident(count, size, drop_last):
    split = Split(np.zeros((count, 1, 8, 8), dtype=np.uint8), np.zeros(count, dtype=np.int64))
    batches = Batches(split, batch_size=size, mean=(0,), std=(1,), drop_last=drop_last)
    sizes = [len(labels) for _, labels in batches.epoch()]
    assert len(sizes) == len(batches) >= 1
    assert sum(sizes) == batches.samples_per_epoch
    assert all(n == size for n in sizes[:-1])
    if drop_last and count >= size:
        assert sizes[-1] == size
        assert count - sum(sizes) < size
    else:
        assert sum(sizes) == count
        assert sizes[-1] <= size + 1
    if size > 1 and count > 1:
        assert min(sizes) > 1


def test_channels_last_changes_the_layout_and_not_the_values():
    plain, last = make(a_split()), make(a_split(), channels_last=True)
    for (x, _), (y, _) in zip(plain.epoch(), last.epoch(), strict=True):
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, y)


def test_fixed_batches_are_the_unaugmented_examples_in_order():
    split = a_split()
    batches = fixed_batches(split, [4, 2, 9, 9, 30, 1], 4, mean=MEAN, std=STD)
    assert [len(labels) for _, labels in batches] == [4, 2]
    images = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(
        images.double(), by_loop(split, [4, 2, 9, 9, 30, 1]), atol=2e-6, rtol=0
    )
    again = fixed_batches(split, [4, 2, 9, 9, 30, 1], 4, mean=MEAN, std=STD)
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(batches, again, strict=True))


def test_images_fit_when_they_take_a_quarter_of_what_is_free(monkeypatch):
    split = a_split(count=10)  # 10 * 3 * 8 * 8 = 1,920 bytes
    for free, expected in ((4 * 1920, True), (4 * 1920 - 1, False)):
        memory = type("memory", (), {"available": free})
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda memory=memory: memory)
        assert fits(split, "cpu") is expected


@pytest.mark.parametrize(("indices", "size"), [([], 4), ([0], 0)])
def test_impossible_batches_are_refused(indices, size):
    with pytest.raises(ValueError, match=r"no examples|at least 1"):
        make(a_split(), indices, batch_size=size)


@pytest.mark.gpu
def test_the_gpu_gets_the_same_order_and_the_same_normalised_images(monkeypatch):
    split = a_split()
    for free in (module.FLOAT_BYTES, 0):
        monkeypatch.setattr(module, "FLOAT_BYTES", free)
        here = everything(make(split, shuffle=True))
        there = everything(make(split, shuffle=True, device="cuda"))
        assert there[0].device.type == "cuda"
        torch.testing.assert_close(there[0].cpu(), here[0], atol=1e-6, rtol=0)
        assert torch.equal(there[1].cpu(), here[1])


@pytest.mark.gpu
def test_images_that_do_not_fit_on_the_gpu_are_moved_batch_by_batch(monkeypatch):
    split = a_split()
    monkeypatch.setattr(module, "FLOAT_BYTES", 0)
    resident = everything(make(split, shuffle=True, device="cuda", augmentation=(flip, crop)), 2)
    monkeypatch.setattr(module.torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert not fits(split, "cuda")
    moved = everything(make(split, shuffle=True, device="cuda", augmentation=(flip, crop)), 2)
    assert torch.equal(moved[0], resident[0])
