from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from jaxmodels.config import Augment
from jaxmodels.data import pixels, transforms
from jaxmodels.errors import UserError

DIGIT = (28, 28, 1)
PHOTO = (24, 32, 3)


def numbers(cfg, count=1, seed=0, epoch=0):
    return transforms.draws(seed, np.full(count, epoch), np.arange(count), transforms.needed(cfg))


def picture(shape, seed=0):
    """Smooth, so that a little motion changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, shape[2]), np.uint8)
    return transforms.center(pixels.decode(small), Augment(), shape)


def changed(image, cfg, row, shape=None):
    return transforms.augment(pixels.decode(image), cfg, shape or image.shape, row)


def test_draws_are_a_function_of_seed_epoch_and_index():
    epochs, indices = np.repeat([0, 1, 5], 1000), np.tile(np.arange(1000), 3)
    whole = transforms.draws(3, epochs, indices, 5)
    order = np.random.default_rng(0).permutation(3000)
    assert np.array_equal(transforms.draws(3, epochs[order], indices[order], 5), whole[order])
    assert np.array_equal(transforms.draws(3, epochs, indices, 2), whole[:, :2])
    assert len(np.unique(whole)) == whole.size and not np.isin(transforms.draws(4, epochs, indices, 5), whole).any()
    assert whole.min() >= 0 and whole.max() < 1 and np.allclose(np.histogram(whole, 10, (0, 1))[0], 1500, atol=150)
    columns = np.corrcoef(np.concatenate([whole[:1000], whole[1000:2000]], 1).T)
    assert np.abs(columns - np.eye(10)).max() < 0.13


def test_nothing_asked_for_leaves_every_byte():
    image = picture(PHOTO)
    cfg = Augment()
    assert np.array_equal(changed(image, cfg, numbers(cfg)[0]), image)
    assert np.array_equal(transforms.augment_all(image[None], cfg, numbers(cfg))[0], image)
    assert np.array_equal(transforms.center(pixels.decode(image), cfg, PHOTO), image)


@pytest.mark.parametrize("together", [False, True])
def test_a_shift_moves_whole_pixels_and_leaves_black_behind(together):
    cfg, image = Augment(shift=3), picture(PHOTO) | 1
    rows = numbers(cfg, 300)
    images = np.repeat(image[None], 300, 0)
    out = transforms.augment_all(images, cfg, rows) if together else np.stack([changed(image, cfg, r) for r in rows])
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
    moved = {
        (dx, dy): padded[3 - dy : 27 - dy, 3 - dx : 35 - dx].tobytes() for dx in range(-3, 4) for dy in range(-3, 4)
    }
    where = {value: key for key, value in moved.items()}
    assert {where[x.tobytes()] for x in out} == set(moved)


@pytest.mark.parametrize("together", [False, True])
def test_a_turn_is_about_the_middle_and_as_far_as_asked(together):
    cfg, image = Augment(rotate=30.0), picture((33, 33, 3))
    rows = numbers(cfg, 50)
    images = np.repeat(image[None], 50, 0)
    out = transforms.augment_all(images, cfg, rows) if together else np.stack([changed(image, cfg, r) for r in rows])
    angles = np.linspace(-30, 30, 121)
    turned = np.stack([np.asarray(Image.fromarray(image).rotate(a, Image.Resampling.BILINEAR)) for a in angles])
    error = np.abs(turned[None, :, 8:25, 8:25].astype(int) - out[:, None, 8:25, 8:25]).mean((2, 3, 4))
    assert error.min(1).max() < 1.5, "each is some turn of at most 30 degrees"
    found = angles[error.argmin(1)]
    assert found.min() < -20 and found.max() > 20 and (np.abs(found) < 10).any()


@pytest.mark.parametrize("together", [False, True])
def test_half_of_the_images_are_mirrored(together):
    cfg, image = Augment(flip=True), picture(PHOTO)
    rows = numbers(cfg, 400)
    images = np.repeat(image[None], 400, 0)
    out = transforms.augment_all(images, cfg, rows) if together else np.stack([changed(image, cfg, r) for r in rows])
    mirrored = (out == image[:, ::-1]).all((1, 2, 3))
    assert (mirrored | (out == image).all((1, 2, 3))).all() and 160 < mirrored.sum() < 240
    assert np.array_equal(images, np.repeat(image[None], 400, 0)), "what was given stays as it was"


def test_flip_comes_before_shift_and_turn():
    image = picture((33, 33, 1))
    both = Augment(flip=True, shift=4, rotate=20.0)
    for row in numbers(both, 20):
        first = changed(image, Augment(flip=True), row)
        assert np.array_equal(changed(image, both, row), changed(first, Augment(shift=4, rotate=20.0), row))


@pytest.mark.parametrize("shape", [DIGIT, PHOTO])
def test_many_at_once_are_as_one_by_one(shape):
    cfg = Augment(flip=True, shift=3, rotate=25.0, cutout=9)
    images = np.stack([picture(shape, seed) for seed in range(64)])
    rows = numbers(cfg, 64)
    single = np.stack([changed(image, cfg, row) for image, row in zip(images, rows, strict=True)])
    assert np.abs(transforms.augment_all(images, cfg, rows).astype(int) - single).max() <= 1


@pytest.mark.parametrize("side", [5, 6])
def test_cutout_blanks_exactly_a_square(side):
    cfg, image = Augment(cutout=side), np.full(PHOTO, 255, np.uint8)
    sizes = set()
    for row in numbers(cfg, 300):
        out = changed(image, cfg, row)
        down, across = np.flatnonzero((out == 0).any((1, 2))), np.flatnonzero((out == 0).any((0, 2)))
        assert (out[down[0] : down[-1] + 1, across[0] : across[-1] + 1] == 0).all() and set(np.unique(out)) <= {0, 255}
        assert (out == 0).sum() == 3 * len(down) * len(across)
        for found, whole in ((down, 24), (across, 32)):
            assert len(found) == side or found[0] == 0 or found[-1] == whole - 1, "smaller at an edge only"
        sizes.add((len(down), len(across)))
    assert (side, side) in sizes and image.min() == 255


def test_a_crop_has_the_area_and_ratio_asked_for():
    ramp = np.stack(np.meshgrid(np.arange(200), np.arange(100)), -1).astype(np.uint8)
    image = np.concatenate([ramp, np.zeros((100, 200, 1), np.uint8)], -1)  # red says the column, green the row
    cfg = Augment(crop=0.25)
    areas, ratios, middles = [], [], []
    for row in numbers(cfg, 500):
        out = changed(image, cfg, row, (50, 50, 3)).astype(float)
        width = (out[25, 45, 0] - out[25, 5, 0]) / 40 * 50
        height = (out[45, 25, 1] - out[5, 25, 1]) / 40 * 50
        areas.append(width * height / 20_000)
        ratios.append(width / height)
        middles.append(out[25, 25, 0])
    assert 0.23 < min(areas) < 0.3 and 0.6 < max(areas) < 0.7, "at 4:3 no more than 2/3 of a 2:1 image fits"
    assert 0.71 < min(ratios) < 0.85 and 1.25 < max(ratios) < 1.4
    assert min(middles) < 50 and max(middles) > 150


def test_evaluation_sees_the_central_seven_eighths_of_what_is_cropped():
    image = np.stack(np.meshgrid(np.arange(160), np.arange(80)), -1).astype(np.uint8)
    image = np.concatenate([image, image[..., :1]], -1)
    out = transforms.center(pixels.decode(image), Augment(crop=0.08), (70, 70, 3))
    assert np.abs(out[35, :, 0].astype(int) - np.arange(45, 115)).max() <= 1
    assert np.abs(out[:, 35, 1].astype(int) - np.arange(5, 75)).max() <= 1


def test_colour_stays_within_its_bounds_and_gray_has_no_saturation():
    cfg = Augment(colour=0.4)
    image = picture(PHOTO) // 2 + 20
    brighter = [changed(image, cfg, row).mean() / image.mean() for row in numbers(cfg, 200)]
    assert 0.55 < min(brighter) < 0.7 and 1.3 < max(brighter) < 1.5
    gray = np.repeat(picture(DIGIT), 3, -1)
    assert np.ptp(changed(gray, cfg, numbers(cfg)[0]).astype(int), -1).max() <= 1
    assert changed(picture(DIGIT), cfg, numbers(cfg)[0]).shape == DIGIT


@pytest.mark.parametrize("operation", transforms.OPERATIONS, ids=lambda operation: operation.name)
def test_an_operation_of_randaugment_grows_with_its_magnitude(operation):
    image = Image.fromarray(picture((32, 32, 3)) // 2 + 40)
    amount = [
        np.abs(np.asarray(operation.apply(image, s)).astype(int) - np.asarray(image)).mean() for s in (0, 0.5, 1, -1)
    ]
    if operation.name in ("autocontrast", "equalize"):
        assert amount[0] == amount[2] > 5
    elif operation.name == "identity":
        assert amount == [0, 0, 0, 0]
    else:
        assert amount[0] == 0 < amount[1] < amount[2] and amount[3] > 0


def test_randaugment_draws_each_operation_as_often_as_another(monkeypatch):
    seen = []

    def watched(operation):
        return transforms.Operation(operation.name, lambda image, s: seen.append((operation.name, s)) or image)

    monkeypatch.setattr(transforms, "OPERATIONS", tuple(map(watched, transforms.OPERATIONS)))
    cfg = Augment(randaugment=2, magnitude=5.0)
    for row in numbers(cfg, 1400):
        changed(np.zeros((4, 4, 3), np.uint8), cfg, row)
    names, counts = np.unique([name for name, _ in seen], return_counts=True)
    assert len(names) == 14 and counts.sum() == 2800 and counts.min() > 140 and counts.max() < 260
    assert {s for _, s in seen} == {0.5, -0.5}


def test_randaugment_takes_gray_images():
    cfg = Augment(randaugment=3, magnitude=10.0)
    out = [changed(picture(DIGIT), cfg, row) for row in numbers(cfg, 100)]
    assert {x.shape for x in out} == {DIGIT} and len({x.tobytes() for x in out}) > 90


def test_what_cannot_be_done_is_refused():
    transforms.check_channels(Augment(), 5)
    with pytest.raises(UserError, match="got a model of images of 5 channels to augment, .* try without flip, colour"):
        transforms.check_channels(Augment(flip=True, colour=0.4), 5)
    with pytest.raises(UserError, match="got augment.magnitude 11"):
        transforms.check_channels(Augment(randaugment=2, magnitude=11), 3)
