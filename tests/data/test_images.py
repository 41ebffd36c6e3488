from __future__ import annotations

import dataclasses
import io
import logging

import numpy as np
import pytest
from PIL import Image

from jaxmodels.config import TFDS, Augment, Classification, Images
from jaxmodels.data import Loader, Opening, Order, images
from jaxmodels.data.balance import Balanced
from jaxmodels.data.images import Pictures
from jaxmodels.data.records import Bad, Field, Records
from jaxmodels.errors import UserError

EVERYTHING = Augment(crop=0.5, flip=True, shift=2, rotate=15, colour=0.3, randaugment=2, cutout=5)
SMALL = Augment(flip=True, shift=2, rotate=15, cutout=5)


class Memory(Records):
    """Records in a list."""

    def __init__(self, rows, fields):
        self.rows, self.fields, self.label, self.fingerprint = rows, fields, "in memory", "f" * 16

    def __len__(self):
        return len(self.rows)

    def read(self, indices, fields):
        found = []
        for i in indices:
            bad = any(self.rows[i][f] is None for f in fields)
            found.append(Bad(self.where(i), "nothing there") if bad else {f: self.rows[i][f] for f in fields})
        return found

    def where(self, index):
        return f"photo {index}.jpg"


def jpeg(seed, size=(40, 30)):
    values = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize(size).save(file, "JPEG", quality=95)
    return file.getvalue()


def photos(n=24, **more):
    names = ("cat", "dog", "owl")
    rows = [{"image": jpeg(i), "label": i % 3, "place": "north" if i % 4 else "south", **more} for i in range(n)]
    fields = {"image": Field("image", shape=(None, None, 3)), "label": Field("label", names), "place": Field("text")}
    return Memory(rows, fields)


def digits(n=50, shape=(16, 16, 1)):
    values = np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)
    rows = [{"image": x, "label": i % 10} for i, x in enumerate(values)]
    return Memory(rows, {"image": Field("image", shape=shape), "label": Field("label")})


def source(records, augment=EVERYTHING, split="train", shape=(20, 24, 3), seed=0, **data):
    cfg = Images(**data)
    opening = Opening(cfg, split, "classification", inputs_shape=shape, augment=augment, seed=seed)
    return Pictures(records, opening, field="image", label="label")


def whole(source, epoch=0):
    n = len(source)
    return source.batch(np.arange(n), np.full(n, epoch))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("records", "augment", "shape"),
    [(photos, EVERYTHING, (20, 24, 3)), (photos, SMALL, (20, 24, 1)), (digits, SMALL, (16, 16, 1))],
)
def test_pixels_are_a_function_of_seed_epoch_and_index(records, augment, shape, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(images, "IN_MEMORY", 0)
    one = source(records(), augment, shape=shape)
    first = whole(one, epoch=3)
    assert first["inputs"].shape == (len(one), *shape) and first["inputs"].dtype == np.uint8
    other = source(records(), augment, shape=shape, threads=1)
    order = np.random.default_rng(0).permutation(len(one))
    for rows in np.array_split(order, 5):
        part = other.batch(rows, np.full(len(rows), 3))
        assert all(np.array_equal(part[name], first[name][rows]) for name in first)
    assert np.array_equal(whole(one, epoch=3)["inputs"], first["inputs"]), "and stay what they were"
    for another in (whole(one, epoch=4), whole(source(records(), augment, shape=shape, seed=1), epoch=3)):
        assert (another["inputs"] != first["inputs"]).any((1, 2, 3)).mean() > 0.9
        assert np.array_equal(another["labels"], first["labels"])


def test_the_library_of_the_pixels_changes_them_and_the_fingerprint():
    pytest.importorskip("cv2")
    pytest.importorskip("simplejpeg")
    pillow, opencv = source(photos()), source(photos(), pixels="opencv")
    assert pillow.fingerprint != opencv.fingerprint
    assert np.array_equal(whole(opencv)["inputs"], whole(source(photos(), pixels="opencv", threads=1))["inputs"])
    assert (whole(pillow)["inputs"] != whole(opencv)["inputs"]).any()


def test_a_resumed_run_and_any_number_of_hosts_see_the_same_pixels():
    order = Order(24, 8, seed=5)
    all_of_them = list(Loader(source(photos()), order).iterate(0, 9))
    resumed = list(Loader(source(photos()), order).iterate(5, 9))
    for a, b in zip(all_of_them[5:], resumed, strict=True):
        assert np.array_equal(a["inputs"], b["inputs"]) and np.array_equal(a["labels"], b["labels"])
    hosts = [Loader(source(photos()), order) for _ in range(2)]
    hosts[0].rows, hosts[1].rows = np.arange(4), np.arange(4, 8)
    halves = [host.local(7)["inputs"] for host in hosts]
    assert np.array_equal(np.concatenate(halves), all_of_them[7]["inputs"])


def test_evaluation_is_not_augmented():
    records = digits()
    held_out = source(records, SMALL, "eval", shape=(16, 16, 1))
    for epoch in (0, 1):
        assert np.array_equal(whole(held_out, epoch)["inputs"], np.stack([row["image"] for row in records.rows]))
    assert np.array_equal(
        whole(source(photos(), split="eval"))["inputs"], whole(source(photos(), split="eval"), 1)["inputs"]
    )
    assert "rotate" not in held_out.describe() and "rotate 15" in source(records, SMALL, shape=(16, 16, 1)).describe()


@pytest.mark.parametrize("kept", [False, True])
def test_images_as_stored_pass_through_with_any_channels(kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(images, "IN_MEMORY", 0)
    records = digits(shape=(6, 7, 5))
    got = whole(source(records, Augment(), shape=None))["inputs"]
    assert np.array_equal(got, np.stack([row["image"] for row in records.rows]))
    got[:] = 0
    assert whole(source(records, Augment(), shape=(6, 7, 5)))["inputs"].any()


def test_kept_images_are_read_once(monkeypatch):
    records = photos()
    asked, read = [], records.read
    monkeypatch.setattr(records, "read", lambda indices, fields: asked.extend(indices) or read(indices, fields))
    one = source(records, SMALL)
    fresh = whole(one, 0)["inputs"]
    fresh[:] = 0
    assert whole(one, 1)["inputs"].any() and sorted(asked) == list(range(24))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("how", ["missing", "cut short", "no image"])
def test_a_bad_image_is_named_and_replaced_by_the_next(how, kept, caplog, monkeypatch):
    if not kept:
        monkeypatch.setattr(images, "IN_MEMORY", 0)
    records = photos()
    good = jpeg(7)
    for i in (7, 8):
        records.rows[i]["image"] = {"missing": None, "cut short": good[: len(good) // 2], "no image": b"hello"}[how]
    train = source(records, Augment())
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        got = train.batch(np.array([6, 7, 8, 9]), np.zeros(4, int))
    assert np.array_equal(got["inputs"][1:3], got["inputs"][[3, 3]]) and got["labels"].tolist() == [0, 0, 0, 0]
    reason = {"missing": "nothing there", "cut short": "runcated", "no image": "no image that Pillow knows"}[how]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "photo 7.jpg" in "".join(said) and all(reason in text for text in said)
    held_out = whole(source(records, split="eval"))["labels"]
    assert np.flatnonzero(held_out < 0).tolist() == [7, 8]
    with pytest.raises(UserError, match="got 2 bad records in in memory"):
        whole(source(records, bad_records=1))


def test_a_record_may_have_several_labels_and_a_group():
    records = photos()
    fields = {**records.fields, "label": Field("labels", ("round", "red", "ripe", "raw"))}
    for i, row in enumerate(records.rows):
        row["label"] = tuple(c for c in range(4) if (i >> c) % 2)
    records = Memory(records.rows, fields)
    records.rows[3]["image"] = b""
    got = whole(source(records, split="eval", group_field="place"))
    bits = (np.arange(24)[:, None] >> np.arange(4)) % 2
    bits[3] = -1
    assert got["labels"].dtype == np.float32 and np.array_equal(got["labels"], bits)
    assert source(records, group_field="place").groups == ("north", "south")
    assert got["group"].dtype == np.int32 and got["group"].tolist() == [1, 0, 0, 1, *[1, 0, 0, 0] * 5]


def test_classes_are_counted_where_they_have_no_names():
    assert source(digits(), SMALL, shape=(16, 16, 1)).num_classes == 10
    assert source(photos()).num_classes == 3 and source(photos()).class_names == ("cat", "dog", "owl")


def test_the_fingerprint_says_what_is_seen():
    one = source(photos())
    same = source(photos(), seed=3, threads=1)
    others = [source(photos(), split="eval"), source(photos(), SMALL), source(photos(), shape=(20, 20, 3))]
    assert one.fingerprint == same.fingerprint
    held_out = [source(photos(), augment, "eval").fingerprint for augment in (Augment(crop=0.5), EVERYTHING)]
    assert held_out[0] == held_out[1] != source(photos(), SMALL, "eval").fingerprint
    assert len({one.fingerprint, *(s.fingerprint for s in others)}) == 4


def test_images_that_cannot_be_given_the_models_shape_are_refused():
    with pytest.raises(UserError, match=r"got images of 6x7x5 in in memory for a model of \(28, 28, 1\)"):
        source(digits(shape=(6, 7, 5)), Augment(), shape=(28, 28, 1))
    with pytest.raises(UserError, match="got a model without an input shape for the images of in memory"):
        source(photos(), shape=None)
    with pytest.raises(UserError, match="got data.label_field 'image', which is an image"):
        Pictures(photos(), Opening(Images(), "train", "vae", inputs_shape=(8, 8, 3)), field="image", label="image")


def unequal():
    """5 cats, 3 dogs, 12 owls, and one image that can't be read."""
    records = photos(21)
    for i, row in enumerate(records.rows):
        row["label"] = 0 if i < 5 else 1 if i < 8 else 2
    records.rows[20]["label"] = None
    return source(records, SMALL)


def test_photos_of_a_folder_are_seen_upright(tmp_path):
    from jaxmodels.data import open_source

    (tmp_path / "cat").mkdir()
    pixels = np.asarray(Image.open(io.BytesIO(jpeg(0))))
    for name, number, stored in (("a", 1, pixels), ("b", 6, np.rot90(pixels)), ("c", 3, pixels[::-1, ::-1])):
        exif = Image.Exif()
        exif[0x0112] = number
        Image.fromarray(stored).save(tmp_path / "cat" / f"{name}.jpg", quality=98, exif=exif)
    cfg = Images(path=(str(tmp_path),), eval_path=(str(tmp_path),))
    seen = whole(open_source(cfg, "eval", Classification(), inputs_shape=(30, 40, 3)))["inputs"].astype(int)
    assert np.abs(seen - pixels).max((1, 2, 3)).max() < 40 and np.abs(seen - pixels).mean() < 3


def test_balanced_classes_come_equally_often_and_examples_of_one_class_too():
    inner = unequal()
    balanced = Balanced(inner, inner.labels())
    assert len(balanced) == 3 * 12
    counts = np.zeros(20, int)
    for epoch in range(5):
        labels = whole(balanced, epoch)["labels"]
        assert np.bincount(labels).tolist() == [12, 12, 12]
    seen = []
    inner.batch = lambda indices, epochs: seen.extend(zip(indices.tolist(), epochs.tolist(), strict=True)) or {}
    for epoch in range(5):
        whole(balanced, epoch)
    assert len(set(seen)) == len(seen) == 180, "none comes twice in the same epoch of its class"
    np.add.at(counts, [index for index, _ in seen], 1)
    assert counts[:5].tolist() == [12] * 5 and counts[5:8].tolist() == [20] * 3 and counts[8:].tolist() == [5] * 12


def test_a_balanced_source_is_a_function_of_the_index():
    inner = unequal()
    balanced = Balanced(inner, inner.labels())
    first = whole(balanced, 2)
    rows = np.random.default_rng(0).permutation(36)
    again = Balanced(unequal(), inner.labels()).batch(rows, np.full(36, 2))
    assert np.array_equal(again["inputs"], first["inputs"][rows])
    assert balanced.num_classes == 3 and "36 examples per epoch, from classes of 3 to 12" in balanced.describe()
    assert balanced.fingerprint not in (inner.fingerprint, Balanced(inner, np.zeros(21, int)).fingerprint)
    with pytest.raises(UserError, match="got several labels per example"):
        Balanced(inner, np.zeros((21, 3)))


def test_real_digits_are_those_that_are_stored(shared_data):
    from jaxmodels.data import open_source

    cfg = TFDS(dir=str(shared_data / "tfds"), name="mnist", eval_split="test")
    train = open_source(cfg, "train", Classification(), inputs_shape=(28, 28, 1), augment=Augment(), num_classes=10)
    assert len(train) == 8500 and train.num_classes == 10
    got = train.batch(np.arange(200), np.zeros(200, int))
    moved = dataclasses.replace(cfg, train_split="train[:200]")
    augmented = open_source(
        moved, "train", Classification(), inputs_shape=(28, 28, 1), augment=Augment(shift=2), num_classes=10
    ).batch(np.arange(200), np.zeros(200, int))
    assert np.array_equal(got["labels"], augmented["labels"])
    ink = [x.astype(int).sum((1, 2, 3)) for x in (got["inputs"], augmented["inputs"])]
    assert (ink[0] == ink[1]).mean() > 0.95 and (got["inputs"] != augmented["inputs"]).any((1, 2, 3)).mean() > 0.9
