from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jaxmodels.config import Augment, Images
from jaxmodels.data import images, marks, pixels, transforms
from jaxmodels.data.images import Pictures
from jaxmodels.data.marks import Boxes, Marks, Masks, decode_mask, move_boxes, values_of
from jaxmodels.data.opening import Opening
from jaxmodels.data.records import Field, Records
from jaxmodels.errors import UserError

SIZE = (48, 40)
BOX = (30, 20, 24, 18)
"""x, y, width and height of the only bright thing on the photograph."""
HOW = {
    "still": Augment(),
    "crop": Augment(crop=0.4),
    "flip": Augment(flip=True),
    "shift": Augment(shift=9),
    "crop, flip and shift": Augment(crop=0.4, flip=True, shift=5),
    "all with a turn": Augment(crop=0.4, flip=True, shift=5, rotate=20),
}


def photo(width=100, height=70):
    image = np.zeros((height, width, 3), np.uint8)
    x, y, w, h = BOX
    image[y : y + h, x : x + w] = 255
    return image


def darker(image, rng):
    return image // 2


def png(pixels, **how):
    file = io.BytesIO()
    Image.fromarray(pixels, **how).save(file, "PNG")
    return file.getvalue()


class Marked(Records):
    """The photograph, several times, with its mask and its boxes."""

    def __init__(self, count=24, encoded=True, mask=None):
        self.label, self.fingerprint, self.count = "in memory", "f" * 16, count
        self.image = png(photo()) if encoded else photo()
        lit = (photo()[..., 0] > 0).astype(np.uint8)
        self.mask = png(lit) if mask is None else mask
        size = (None, None) if encoded else (70, 100)
        self.fields = {
            "image": Field("image", shape=(*size, 3)),
            "mask": Field("image", shape=(None, None, 1)),
            "boxes": Field("array", shape=(None, 5)),
        }

    def __len__(self):
        return self.count

    def read(self, indices, fields):
        rows = {"image": self.image, "mask": self.mask, "boxes": np.array([[*BOX, 3]], np.float32)}
        return [{name: rows[name] for name in fields} for _ in indices]


class Both(Marks):
    """A mask and boxes at once."""

    field = "boxes"

    def __init__(self):
        self.parts = (Masks("mask", 2), Boxes("boxes", 2))

    def room(self, count, size):
        return self.parts[0].room(count, size) | self.parts[1].room(count, size)

    def read(self, value, full):
        lit = (photo()[..., 0] > 0).astype(np.uint8)
        return self.parts[0].read(lit, full) | self.parts[1].read(value, full)

    def move(self, marked, matrices, size):
        return self.parts[0].move(marked, matrices, size) | self.parts[1].move(marked, matrices, size)


def source(records, augment, split="train", shape=(*SIZE, 3), what=None, **data):
    opening = Opening(Images(**data), split, "segmentation", inputs_shape=shape, augment=augment)
    return Pictures(records, opening, field="image", label=None, marks=what or Both())


def whole(source):
    n = len(source)
    return source.batch(np.arange(n), np.zeros(n, int))


@pytest.mark.parametrize("kept", ["decoded each time", "kept"])
@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("how", HOW)
def test_masks_and_boxes_move_with_the_pixels(how, split, kept, monkeypatch):
    """What is bright is where the mask and the box say, whatever was done to the image by Pillow."""
    if kept != "kept":
        monkeypatch.setattr(images, "IN_MEMORY", 0)
    batch = whole(source(Marked(encoded=kept != "kept"), HOW[how], split))
    turned = "turn" in how and split == "train"
    seen = 0
    if split == "eval":
        assert batch["boxes"][0, 0] == pytest.approx(np.array(BOX) * np.tile([0.4, 48 / 70], 2)), "all of it is seen"
    for image, mask, boxes, classes in zip(
        *(batch[name] for name in ("inputs", "labels", "boxes", "classes")), strict=True
    ):
        lit = image[..., 0] > 127
        assert (lit != (mask == 1))[mask >= 0].mean() < 0.03, "they differ at the rim alone"
        assert ((mask < 0) <= (image[..., 0] < 128)).all(), "outside of the photograph nothing counts"
        assert classes[1] == -1 and not boxes[1].any()
        if classes[0] < 0:
            assert lit.sum() <= 0.4 * (BOX[2] * BOX[3]), "only a box of which little is left does not count"
            continue
        seen += 1
        rows, columns = np.nonzero(lit)
        around = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        x, y, w, h = boxes[0]
        assert classes[0] == 3 and np.abs(np.subtract(around, (x, y, x + w, y + h))).max() < (4 if turned else 1.6)
    assert seen > 12 and len({x.tobytes() for x in batch["labels"]}) > (12 if "crop" in how and split == "train" else 0)


def test_many_masks_at_once_are_those_of_one_at_a_time(monkeypatch):
    cfg = Augment(flip=True, shift=4, rotate=20)
    together = whole(source(Marked(), cfg))
    monkeypatch.setattr(images, "_SMALL", 0)
    single = whole(source(Marked(), cfg))
    for name in ("labels", "boxes", "classes"):
        assert np.array_equal(together[name], single[name])
    assert (together["labels"] < 0).any()


def test_a_box_is_moved_clipped_and_dropped_where_little_of_it_is_left():
    boxes = np.array([[10, 20, 30, 40], [90, 0, 20, 10], [-5, 0, 20, 10]], np.float32)
    half = marks.scaling((100, 100), (50, 50))
    assert move_boxes(boxes, half, (50, 50)).tolist() == [[5, 10, 15, 20], [45, 0, 5, 5], [0, 0, 7.5, 5]]
    part = marks.scaling((100, 100), (50, 50), (20.0, 20.0, 70.0, 70.0))
    assert move_boxes(boxes, part, (50, 50))[0].tolist() == [0, 0, 20, 40]
    assert not move_boxes(boxes, part, (50, 50))[1:].any()
    assert move_boxes(boxes, part, (50, 50), visible=0.7)[0].tolist() == [0, 0, 0, 0], "two thirds are left"
    quarter = np.array([0.0, 1.0, 0.0, -1.0, 0.0, 100.0])  # what is at (x, y) comes from (y, 100 - x)
    assert move_boxes(boxes[:1], quarter, (100, 100)).tolist() == [[40, 10, 40, 30]]


def test_a_matrix_of_a_part_that_is_then_moved_says_where_pixels_of_the_whole_come_from():
    cfg, row = Augment(crop=0.3, flip=True, shift=3, rotate=30), np.full(20, 0.3)
    x, y = 7.5, 11.5
    a, b, c, d, e, f = transforms.matrices(cfg, SIZE, row[None])[0]
    inner = a * x + b * y + c, d * x + e * y + f
    left, top, right, bottom = transforms._crop((100, 70), 0.3, SIZE, row)
    wanted = left + inner[0] * (right - left) / SIZE[1], top + inner[1] * (bottom - top) / SIZE[0]
    a, b, c, d, e, f = transforms.affine(cfg, (100, 70), SIZE, row)
    assert np.allclose((a * x + b * y + c, d * x + e * y + f), wanted)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_a_mask_is_the_numbers_of_its_file_whatever_the_colors(mode):
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4) % (2 if mode == "1" else 12)
    image = Image.fromarray(numbers)
    if mode == "P":
        image.putpalette([255 - i % 256 for i in range(768)])
    if mode == "1":
        image = Image.fromarray(numbers * 255).convert("1")
    file = io.BytesIO()
    image.save(file, "PNG")
    assert Image.open(io.BytesIO(file.getvalue())).mode == mode
    assert np.array_equal(decode_mask(file.getvalue()), numbers)


def test_values_that_do_not_count_are_left_out_of_the_classes():
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    assert Masks("mask", 2, (0, 255)).read(mask, (2, 2))["labels"].tolist() == [[-1, 0], [1, -1]]
    assert values_of(2, (0, 255)) == [1, 2] and values_of(3, ()) == [0, 1, 2]
    with pytest.raises(pixels.Unreadable, match="value 255, expected one of 3 classes or --task.ignored 255"):
        Masks("mask", 3).read(mask, (2, 2))
    with pytest.raises(pixels.Unreadable, match="mask of 2×2 for an image of 3×2"):
        Masks("mask", 3).read(mask, (3, 2))
    with pytest.raises(pixels.Unreadable, match="pixels of the kind RGB"):
        decode_mask(png(np.zeros((2, 2, 3), np.uint8)))
    with pytest.raises(pixels.Unreadable, match="no mask that Pillow knows"):
        decode_mask(b"hello")
    with pytest.raises(pixels.Unreadable, match="has 3 boxes, expected at most 2"):
        Boxes("boxes", 2).read(np.zeros((3, 5)), (9, 9))


@pytest.mark.parametrize("kept", ["decoded each time", "kept"])
def test_a_photograph_with_a_bad_mask_is_named_and_does_not_count(kept, monkeypatch, caplog):
    if kept != "kept":
        monkeypatch.setattr(images, "IN_MEMORY", 0)
    records = Marked(4)
    read = records.read
    bad = png(np.full((70, 100), 9, np.uint8))

    def one_is_bad(indices, fields):
        return [{**row, "mask": bad} if i == 2 else row for i, row in zip(indices, read(indices, fields), strict=True)]

    monkeypatch.setattr(records, "read", one_is_bad)
    with caplog.at_level("WARNING", "jaxmodels"):
        held_out = whole(source(records, Augment(), "eval", what=Masks("mask", 2)))
    assert "record 2: has a mask with the value 9" in caplog.text
    assert [(x >= 0).any() for x in held_out["labels"]] == [True, True, False, True]
    assert held_out["labels"].dtype == np.int16 and "group" not in held_out
    train = whole(source(records, Augment(), what=Masks("mask", 2)))
    assert (train["labels"] >= 0).all() and np.array_equal(train["labels"][2], train["labels"][3])


def test_marks_are_part_of_the_fingerprint_and_what_they_cannot_follow_is_refused():
    records = Marked(2)
    prints = {source(records, Augment(), what=what).fingerprint for what in (Masks("mask", 2), Masks("mask", 3))}
    assert len(prints | {source(records, Augment(), what=Masks("mask", 2)).fingerprint}) == 2
    for wrong in ({"randaugment": 2}, {"transforms": ("tests.data.test_marks:darker",)}):
        with pytest.raises(UserError, match=f"augment {next(iter(wrong))} for images with marks"):
            source(records, dataclasses.replace(Augment(), **wrong))
