"""Names of classes mean what a reader of them would say, and there is something to tell apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from jaxmodels.config import Classification, Images, Table
from jaxmodels.data import open_source
from jaxmodels.errors import UserError
from tests.data.written import read, table, values, write


def opened(data: Any, split: Any = "train", classes: int = 9, **shape: Any) -> Any:
    return open_source(data, split, Classification(), num_classes=classes, **shape)


def csv(labels):
    return "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_white_space_around_a_class_and_how_accents_are_stored_make_no_other_class(tmp_path, caplog, kind):
    labels = ["caf\u00e9", " caf\u00e9", "cafe\u0301\u00a0", "bad", "bad\t", "  "]
    lines = "".join(json.dumps({"text": f"text {i}", "label": label}) + "\n" for i, label in enumerate(labels))
    records = read(tmp_path / f"a.{kind}", csv(labels) if kind == "csv" else lines, group_field="label")
    assert records.fields["label"].names == ("bad", "caf\u00e9")
    (said,) = caplog.messages
    assert said.startswith("left out white space around 3 of label in table a.")
    assert values(records, "label", limit=1) == [(1,), (1,), (1,), (0,), (0,)]
    assert "label is missing" in caplog.messages[-1], "one that is all spaces names none"


def test_folders_whose_names_differ_by_white_space_are_one_class(tmp_path, caplog):
    for at, name in enumerate(["cat", "cat ", "dog"]):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), at).save(tmp_path / name / f"{at}.png")
    data = Images(path=(str(tmp_path),), eval_fraction=0)
    source = opened(data, inputs_shape=(4, 4, 1))
    assert source.class_names == ("cat", "dog") and source.labels().tolist() == [0, 0, 1]
    assert [line for line in caplog.messages if "'cat '" in line]


def test_classes_that_differ_only_by_case_are_kept_apart_with_a_word(tmp_path, caplog):
    (tmp_path / "a.csv").write_text(csv(["Good", "good", "bad"] * 5))
    assert opened(table(tmp_path / "a.csv")).class_names == ("Good", "bad", "good")
    assert [line for line in caplog.messages if line.endswith("are kept apart: 'Good' and 'good'")]


def test_a_class_that_is_named_as_a_missing_value_is_told(tmp_path, caplog):
    (tmp_path / "a.csv").write_text(csv(["good", "NaN", "nan", "Nancy"] * 5))
    assert opened(table(tmp_path / "a.csv")).num_classes == 4
    assert "label of table a.csv is taken for the name of a class: 'NaN', 'nan'" in caplog.messages


def test_records_that_cannot_be_read_do_not_count_as_those_of_one_class(tmp_path):
    (tmp_path / "a.csv").write_text(csv(["good,", "bad"] * 20))
    with pytest.raises(UserError, match=r"all 20 .* that can be read \(the first of 20 others: .*a.csv:2: has 3 col"):
        opened(table(tmp_path / "a.csv", eval_fraction=0))


@pytest.mark.parametrize("labels", [["good"] * 30, ["good", "good "] * 15, ["1"] * 30, ["0"] * 30, ["-1"] * 30])
def test_one_class_is_nothing_to_learn_from(tmp_path, labels):
    (tmp_path / "a.csv").write_text(csv(labels))
    with pytest.raises(UserError, match=rf"label is '{labels[0]}' in all \d+ records to train on, expected two"):
        opened(table(tmp_path / "a.csv"))


def test_a_split_that_leaves_one_class_to_train_on_is_refused_and_one_to_evaluate_on_is_told(tmp_path, caplog):
    (tmp_path / "train.csv").write_text(csv(["a"] * 20))
    (tmp_path / "both.csv").write_text(csv(["a"] * 2000 + ["b"]))
    known = Table(path=(str(tmp_path / "both.csv"),), eval_path=(str(tmp_path / "train.csv"),))
    opened(known)
    assert not caplog.messages, "the one that differs is found, however late it comes"
    opened(known, "eval")
    assert caplog.messages == ["evaluation has one class alone (label is 'a' throughout table train.csv)"]
    # the hash of the row of b puts it aside
    (tmp_path / "few.csv").write_text(csv(["a"] * 20 + ["b"]))
    with pytest.raises(UserError, match=r"\(there is no record of 'b'\), try another split or more data"):
        opened(Table(path=(str(tmp_path / "few.csv"),), eval_fraction=0.5))


def test_classes_that_are_held_out_alone_are_told_by_name(tmp_path, caplog):
    (tmp_path / "a.csv").write_text(csv(["a", "b"] * 20 + [f"rare {i}" for i in range(10, 30)]))
    data = Table(path=(str(tmp_path / "a.csv"),), eval_fraction=0.5)
    source, learned = opened(data, "eval", 22), set(opened(data, "train", 22).labels().tolist())
    names = [source.class_names[at] for at in sorted(set(source.labels().tolist()) - learned)]
    assert len(names) > 5 and "a" not in names
    told = ", ".join(f"{name} (1)" for name in names[:5])
    assert caplog.messages == [
        "classes of label that are held out to evaluate on, and of which there are none to train on: "
        f"{told}, and {len(names) - 5} more"
    ]


def test_a_class_of_images_or_one_of_several_that_is_held_out_alone_is_told(tmp_path, caplog):
    for at in range(20):
        (tmp_path / f"{at:02}").mkdir()
        Image.new("L", (4, 4), at).save(tmp_path / f"{at:02}" / "0.png")
    rows = [{"text": f"text {at}", "label": ["all", f"only {at}"]} for at in range(20)]
    for data, shape in (
        (Images(path=(str(tmp_path),), eval_fraction=0.5), {"inputs_shape": (4, 4, 1)}),
        (table(write(tmp_path / "a.jsonl", rows), eval_fraction=0.5), {}),
    ):
        source = opened(data, "eval", 21, **shape)
        said = caplog.messages.pop() if caplog.messages else ""
        assert said.endswith(f"(1), and {len(source) - 5} more") and "all" not in said.rpartition(": ")[2]
        caplog.clear()


def test_one_folder_is_one_class(tmp_path):
    (tmp_path / "cat").mkdir()
    for at in range(3):
        Image.new("L", (4, 4), at).save(tmp_path / "cat" / f"{at}.png")
    with pytest.raises(UserError, match="label is 'cat' in all 3 records"):
        opened(Images(path=(str(tmp_path),), eval_fraction=0), inputs_shape=(4, 4, 1))
