"""Batched augmentation against a loop over single images, written another way."""

from __future__ import annotations

import pytest
import torch

from llp import registry
from llp.workloads.augment import crop, cutout, flip

ROWS = {name: registry.load("augmentations", name) for name in registry.AUGMENTATIONS}


def images(count=64, channels=3, side=16):
    """Every pixel has a value of its own, none of them zero."""
    return 1 + torch.arange(count * channels * side * side).float().view(
        count, channels, side, side
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_shape_dtype_and_input_are_kept(name, channels, side, dtype):
    before = images(5, channels, side).to(dtype)
    copy = before.clone()
    after = ROWS[name](before, generator())
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert torch.equal(before, copy)


@pytest.mark.parametrize("name", ROWS)
def test_draws_come_from_the_generator_alone(name):
    state = torch.get_rng_state()
    first = ROWS[name](images(), generator(3))
    assert torch.equal(first, ROWS[name](images(), generator(3)))
    assert not torch.equal(first, ROWS[name](images(), generator(4)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ROWS)
def test_images_of_a_batch_get_different_draws(name):
    same = images(1).expand(32, -1, -1, -1)
    assert len({tuple(image.flatten().tolist()) for image in ROWS[name](same, generator())}) > 1


def test_flip_mirrors_about_half_of_the_images_and_keeps_the_others():
    before = images(400, 1, 8)
    mirrored = 0
    for old, new in zip(before, flip(before, generator()), strict=True):
        reverse = torch.stack([old[..., 7 - column] for column in range(8)], dim=-1)
        assert torch.equal(new, old) or torch.equal(new, reverse)
        mirrored += torch.equal(new, reverse)
    assert abs(mirrored - 200) < 4 * 10  # 4 standard deviations of Binomial(400, 1/2)


def shifted(image, dy, dx):
    """`image` with (y, x) taken from (y + dy, x + dx), zero outside, pixel by pixel."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out[:, y, x] = image[:, y + dy, x + dx]
    return out


@pytest.mark.parametrize(("side", "reach"), [(8, 1), (16, 2), (9, 1)])
def test_crop_is_a_shift_by_at_most_an_eighth_with_zeros_moving_in(side, reach):
    before = images(25, 1, side)
    moves = range(-reach, reach + 1)
    seen = set()
    for old, new in zip(before, crop(before, generator()), strict=True):
        matches = [(y, x) for y in moves for x in moves if torch.equal(new, shifted(old, y, x))]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > len(moves)


def test_crop_shifts_are_uniform():
    marked = torch.zeros(9000, 1, 8, 8)
    marked[:, :, 4, 4] = 1
    where = crop(marked, generator()).flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=64)
    counts = counts[counts > 0]
    assert len(counts) == 9
    assert ((counts - 1000).abs() < 5 * 30).all()  # 5 standard deviations


@pytest.mark.parametrize("side", [8, 16, 9])
def test_cutout_zeroes_one_square_around_its_centre_clipped_at_the_border(side):
    before = images(60, 2, side)
    size = side // 4
    holes = {}
    for cy in range(side):
        for cx in range(side):
            mask = torch.zeros(side, side, dtype=torch.bool)
            for y in range(max(0, cy - size // 2), min(side, cy - size // 2 + size)):
                for x in range(max(0, cx - size // 2), min(side, cx - size // 2 + size)):
                    mask[y, x] = True
            holes[tuple(mask.flatten().tolist())] = (cy, cx)
    for old, new in zip(before, cutout(before, generator()), strict=True):
        hole = new[0] == 0
        assert tuple(hole.flatten().tolist()) in holes
        assert torch.equal(new[1] == 0, hole)
        assert torch.equal(new[:, ~hole], old[:, ~hole])


def test_cutout_centres_cover_the_image_uniformly():
    ones = torch.ones(4000, 1, 8, 8)
    share = (cutout(ones, generator()) == 0).float().mean(0)[0]
    # A pixel inside is erased by 4 of the 64 centres.
    inside = share[2:6, 2:6]
    assert ((inside - 4 / 64).abs() < 5 * (4 / 64 * 60 / 64 / 4000) ** 0.5).all()
