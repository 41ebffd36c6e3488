from __future__ import annotations

import gzip
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmodels.config import TFDS, Classification, DataConfig, Images
from jaxmodels.data import folders, open_source, tfds
from jaxmodels.data.records import Reader, Records
from jaxmodels.errors import UserError


def images(root: Path, **fields: Any) -> DataConfig:
    return Images(path=(str(root),), **fields)


def both(cfg: DataConfig) -> tuple[Records, Records]:
    return folders.records(cfg, "train"), folders.records(cfg, "eval")


def names(records: Records) -> list[str]:
    return [records.where(i) for i in range(len(records))]


@pytest.fixture(scope="module")
def digits(shared_data) -> list[dict[str, Any]]:
    cfg = TFDS(dir=str(shared_data / "tfds"), name="mnist", train_split="train[:300]")
    return [row for rows in Reader(tfds.records(cfg, "train"), ["image", "label"], 0).all() for row in rows]


def fill(root: Path, digits: list[dict[str, Any]]) -> Path:
    for i, row in enumerate(digits):
        folder = root / f"digit {row['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.{'PNG' if i % 2 else 'png'}").write_bytes(row["image"])
    return root


def test_a_folder_gives_the_files_and_the_classes_in_order(digits, tmp_path):
    train, held_out = both(images(fill(tmp_path / "set", digits)))
    assert train.fields["label"].names == tuple(f"digit {i}" for i in range(10)) == held_out.fields["label"].names
    assert len(train) + len(held_out) == 300 and 10 < len(held_out) < 60
    for records in (train, held_out):
        for i, row in enumerate(records.read(range(len(records)), ["image", "label"])):
            original = digits[int(Path(records.where(i)).stem)]
            assert row == {"image": original["image"], "label": original["label"]}
    assert train.read([5], ["label"])[0].keys() == {"label"}


def test_an_image_never_changes_side(digits, tmp_path):
    _, before = both(images(fill(tmp_path / "a", digits)))
    train, after = both(images(fill(tmp_path / "b", digits[:150])))
    kept = set(names(train)) | set(names(after))
    assert set(names(after)) == set(names(before)) & kept and len(after) > 5


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_folders_named_after_splits_are_the_splits(digits, tmp_path, held_out):
    fill(tmp_path / "train", digits[:200])
    fill(tmp_path / held_out, digits[200:])
    train, evaluated = both(images(tmp_path))
    assert (len(train), len(evaluated)) == (200, 100) and train.fields == evaluated.fields
    assert train.fingerprint != evaluated.fingerprint


def test_another_folder_can_be_evaluated_on(digits, tmp_path):
    a, b = fill(tmp_path / "a", digits[:200]), fill(tmp_path / "b", [d for d in digits[200:] if d["label"] != 0])
    train, held_out = both(images(a, eval_path=(str(b),)))
    assert len(train) == 200 and held_out.fields == train.fields
    assert {row["label"] for row in held_out.read(range(len(held_out)), ["label"])} == set(range(1, 10))
    (b / "digit 11").mkdir()
    with pytest.raises(UserError, match="got the class 'digit 11' in .*, expected one of digit 0, "):
        folders.records(images(a, eval_path=(str(b),)), "eval")


def test_files_that_cannot_be_read_are_left_out_by_name(digits, tmp_path, caplog):
    fill(tmp_path, digits[:50])
    (tmp_path / "digit 7" / "x.png").touch()
    (tmp_path / "digit 7" / "y.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "digit 7" / "notes.txt").write_text("no image")
    records = folders.records(images(tmp_path, eval_fraction=0.0), "train")
    assert len(records) == 52
    assert sum(len(rows) for rows in Reader(records, ["image"], 2).all()) == 50
    assert caplog.messages == [
        f"left out files of {tmp_path} that are not images: 1 .txt",
        "left out digit 7/x.png: is empty",
        "left out digit 7/y.jpg: No such file or directory",
    ]


def test_the_fingerprint_knows_names_and_sizes(digits, tmp_path):
    cfg = images(fill(tmp_path, digits[:50]), eval_fraction=0.0)
    first = folders.records(cfg, "train").fingerprint
    assert folders.records(cfg, "train").fingerprint == first
    (tmp_path / "digit 7" / "new.png").write_bytes(digits[0]["image"])
    assert folders.records(cfg, "train").fingerprint != first


def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "1.png").write_bytes(b"x")
    with pytest.raises(UserError, match="without folders in it, expected one folder of images per class"):
        folders.records(images(tmp_path), "train")
    with pytest.raises(UserError, match="which is not a folder, expected one"):
        folders.records(images(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="got 0 folders in data.path, expected one"):
        folders.records(Images(), "train")
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="got no image in .*cats, expected some of every class"):
        folders.records(images(tmp_path), "train")


def paint(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


def test_images_lie_at_any_depth_below_their_class(tmp_path, caplog):
    for name in ("cat/1.png", "cat/2020/march/2.TIFF", "dog/x.v1/3.jpeg", "dog/4.pgm"):
        paint(tmp_path / name)
    (tmp_path / "dog" / "again").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "all").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    for name in ("cat/a.heic", "cat/b.heic", "cat/._1.png", "dog/Thumbs.db", "dog/LICENSE", "readme.md", "5.png"):
        (tmp_path / name).write_bytes(b"x")
    records, again = (folders.records(images(tmp_path, eval_fraction=0.0), "train") for _ in range(2))
    assert names(records) == ["cat/1.png", "cat/2020/march/2.TIFF", "dog/4.pgm", "dog/x.v1/3.jpeg"]
    assert [row["label"] for row in records.read(range(4), ["label"])] == [0, 0, 1, 1]
    assert again.fingerprint == records.fingerprint and caplog.messages == [
        f"left out files of {tmp_path} that are not images: 2 .heic, 1 .md, 1 .png, 2 hidden, 1 not a regular file, "
        "1 without an extension"
    ]


def test_a_class_is_the_same_however_its_accents_are_written(tmp_path):
    paint(tmp_path / "train" / unicodedata.normalize("NFC", "caf\u00e9") / "1.png")
    paint(tmp_path / "val" / unicodedata.normalize("NFD", "caf\u00e9") / "2.png")
    train, held_out = both(images(tmp_path))
    assert train.fields["label"].names == held_out.fields["label"].names == ("caf\u00e9",)
    assert held_out.read([0], ["image", "label"])[0]["label"] == 0
    with pytest.raises(UserError, match="got data.eval_fraction 0.3 although evaluation has the folder .*val"):
        folders.records(images(tmp_path, eval_fraction=0.3), "train")


def idx(path: Path, values: np.ndarray) -> None:
    raw = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def mnist(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for part, n, end in (("train", 40, ""), ("t10k", 10, ".gz")):
        idx(tmp_path / f"{part}-images-idx3-ubyte{end}", rng.integers(0, 256, (n, 6, 5), np.uint8))
        idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", (np.arange(n) % 4).astype(np.uint8))
    return tmp_path


def test_a_folder_of_idx_files_is_a_set(mnist):
    for split, n in (("train", 40), ("eval", 10)):
        source = open_source(images(mnist), split, Classification(), inputs_shape=(6, 5, 1), num_classes=4)
        batch = source.batch(np.arange(n), np.zeros(n, np.int64))
        assert len(source) == n and source.class_names == ("0", "1", "2", "3")
        assert batch["labels"].tolist() == [i % 4 for i in range(n)]
    rng = np.random.default_rng(0)
    rng.integers(0, 256, (40, 6, 5), np.uint8)
    assert (batch["inputs"][..., 0] == rng.integers(0, 256, (10, 6, 5), np.uint8)).all()
    for path in mnist.glob("t10k*"):
        path.unlink()
    train, held_out = both(images(mnist, eval_fraction=0.3))
    assert len(train) + len(held_out) == 40 and len(held_out) > 3


def test_idx_files_that_do_not_fit_are_refused(mnist):
    with pytest.raises(UserError, match="got data.eval_fraction 0.2 although evaluation has t10k"):
        folders.records(images(mnist, eval_fraction=0.2), "train")
    idx(mnist / "t10k-labels-idx1-ubyte.gz", np.zeros(9, np.uint8))
    with pytest.raises(UserError, match="got 10 images in .* and 9 labels"):
        folders.records(images(mnist), "eval")
    file = mnist / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="got .*train-images-idx3-ubyte of 1,215 bytes that begins with 00000803"):
        folders.records(images(mnist), "train")
    (mnist / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="without train-labels-idx1-ubyte beside it"):
        folders.records(images(mnist), "train")
