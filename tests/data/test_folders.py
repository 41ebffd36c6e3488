from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxmodels.config import DataConfig
from jaxmodels.data import folders, tfds
from jaxmodels.data.records import Reader, Records
from jaxmodels.errors import UserError


def images(root: Path, **fields: Any) -> DataConfig:
    return DataConfig(source="images", path=(str(root),), **fields)


def both(cfg: DataConfig) -> tuple[Records, Records]:
    return folders.records(cfg, "train"), folders.records(cfg, "eval")


def names(records: Records) -> list[str]:
    return [records.where(i) for i in range(len(records))]


@pytest.fixture(scope="module")
def digits(shared_data) -> list[dict[str, Any]]:
    cfg = DataConfig(source="tfds", dir=str(shared_data / "tfds"), name="mnist", train_split="train[:300]")
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
    with pytest.raises(UserError, match="got the class 'digit 11' in .*, expected one of digit 0, .*, did you mean"):
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
    with pytest.raises(UserError, match="without folders in it, expected one folder of images a class"):
        folders.records(images(tmp_path), "train")
    with pytest.raises(UserError, match="which is no folder, expected one"):
        folders.records(images(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="got 0 folders in data.path, expected one"):
        folders.records(DataConfig(source="images"), "train")
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="got 0 records to train on in images of"):
        folders.records(images(tmp_path), "train")
