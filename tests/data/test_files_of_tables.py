"""Tables whose columns name files, and whose rows name their split."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmodels.data.records import Bad, Field, Sound
from jaxmodels.data.tables import Table
from jaxmodels.data.values import unfit
from jaxmodels.errors import UserError


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


ROWS = [
    {"picture": f"pictures/{i}.png", "marks": f"marks/{i}.png", "sound": f"{i}.WAV", "label": i % 2, "part": part}
    for i, part in enumerate(["train", "test", "train", "dev"])
]
FILES = {"files": ("picture", "sound"), "masks": ("marks",)}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for folder in ("pictures", "marks"):
        (tmp_path / folder).mkdir()
    for i in range(len(ROWS)):
        (tmp_path / f"pictures/{i}.png").write_bytes(png(np.full((2, 3, 3), i, np.uint8)))
        (tmp_path / f"marks/{i}.png").write_bytes(png(np.full((2, 3), i, np.uint8)))
        (tmp_path / f"{i}.WAV").write_bytes(b"RIFF" + bytes([i]))
    path = tmp_path / "index.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_column_of_paths_gives_the_files_from_the_table_s_folder(table, monkeypatch):
    monkeypatch.chdir("/")
    records = Table(path=(str(table),), split_field="part", **FILES).records("train")
    kinds = {name: field.kind for name, field in records.fields.items()}
    assert kinds == {"picture": "image", "marks": "mask", "sound": "audio", "label": "label", "part": "text"}
    first, last = records.read([0, 1], ["picture", "marks", "sound", "label"])
    assert first["sound"][-1] == 0 and last["sound"][-1] == 2
    assert last["picture"] == (table.parent / "pictures/2.png").read_bytes() and last["label"] == 0
    assert last["marks"] == (table.parent / "marks/2.png").read_bytes()
    assert not any(unfit(name, last[name], records.fields[name]) for name in last)


def test_a_split_has_the_rows_that_name_it_and_eval_takes_another(table):
    data = Table(path=(str(table),), split_field="part", eval_split="dev", **FILES)
    assert [len(data.records(split)) for split in ("train", "eval")] == [2, 1]
    other = data.evaluated_on({"eval_split": "test"}).records("eval")
    assert [row["picture"] for row in other.read([0], ["picture"])] == [(table.parent / "pictures/1.png").read_bytes()]
    # another table is taken whole, unless a split of it is asked for
    assert len(data.evaluated_on({"path": (str(table),)}).records("eval")) == 4
    assert len(data.evaluated_on({"path": (str(table),), "eval_split": "train"}).records("eval")) == 2


def test_a_file_that_cannot_be_read_is_a_bad_record_and_its_size_is_in_the_fingerprint(table):
    data = Table(path=(str(table),), split_field="part", **FILES)
    before = data.records("train").fingerprint
    (table.parent / "pictures/0.png").unlink()
    (table.parent / "2.WAV").write_bytes(b"")
    records = replace(data, train_split="train").records("train")
    missing, empty = records.read([0, 1], ["picture", "sound"])
    assert isinstance(missing, Bad) and isinstance(empty, Bad)
    assert missing.where.endswith("index.jsonl:1")
    assert missing.reason == "picture is 'pictures/0.png', which cannot be read (No such file or directory)"
    assert empty.reason == "sound is '2.WAV', which is empty"
    table.touch()
    from jaxmodels.data import tables

    tables._scan.cache_clear()
    assert data.records("train").fingerprint != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"files": ("pictur",)},
            "got data.files 'pictur', expected one of label, marks, part, picture, sound",
        ),
        ({"files": ("part",)}, "most of whose values end in '', expected files of images (.png"),
        ({"files": ("marks",), "masks": ("marks",)}, "got the column 'marks' in data.files and in data.masks"),
        ({"split_field": "prat"}, "got data.split_field 'prat', expected one of"),
        ({"split_field": "part", "eval_split": "tets"}, "names (dev, test, train), did you mean 'test'?"),
        ({"split_field": "part", "train_split": "x"}, "got data.train_split 'x', expected one that part of"),
        ({"eval_split": "test"}, "got data.eval_split 'test' without data.split_field"),
        ({"split_field": "part", "eval_path": ("a.csv",)}, "got data.split_field 'part' and data.eval_path"),
        ({"split_field": "part", "eval_fraction": 0.5}, "got data.eval_fraction 0.5 although the column part names"),
    ],
)
def test_columns_and_splits_that_are_not_there_are_named(table, options, said):
    with pytest.raises(UserError) as error:
        data = Table(path=(str(table),), **options)
        for split in ("train", "eval"):
            data.records(split)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("audio", b"RIFF", ""),
        ("audio", Sound(np.zeros((5, 2), np.int16), 8000), ""),
        ("audio", (np.zeros(5, np.float64), 8000), "float64"),
        ("audio", (np.zeros(5, np.float32), 0), "expected the bytes of a sound file"),
        ("audio", np.zeros(5, np.float32), "expected the bytes of a sound file"),
        ("audio", Sound(np.array([np.nan], np.float32), 8000), "no finite numbers"),
        ("mask", np.zeros((2, 3), np.uint8), ""),
        ("mask", np.zeros((2, 3, 1), np.uint8), "expected uint8 (height, width)"),
        ("mask", "a", "expected the bytes of an image file"),
    ],
)
def test_values_of_sounds_and_masks_are_checked(kind, value, said):
    found = unfit("x", value, Field(kind))
    assert said in found and bool(found) == bool(said)
