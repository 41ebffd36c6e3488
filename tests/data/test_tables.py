"""Tables are read alike from every kind of file, and columns are what they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxmodels.config import TFDS, DataConfig
from jaxmodels.data import tables, tfds
from jaxmodels.data.fields import named_field
from jaxmodels.data.records import Records
from jaxmodels.errors import UserError
from tests.data.written import KINDS, read, table, values, write


def both(cfg: DataConfig) -> tuple[Records, Records]:
    return tables.records(cfg, "train"), tables.records(cfg, "eval")


@pytest.fixture(scope="module")
def sentences(shared_data) -> list[dict[str, Any]]:
    cfg = TFDS(dir=str(shared_data / "tfds"), name="sst2", train_split="train[:2000]")
    rows = values(tfds.records(cfg, "train"), "sentence", "label")
    odd = [
        'a "quoted", comma',
        "two\nlines",
        "a separator\u2028inside",
        "  spaces  ",
        "1984",
        'an inch: 5"',
        "né à Kraków",
    ]
    rows += [(text, i % 2) for i, text in enumerate(odd)]
    return [{"sentence": text, "label": ["bad", "good"][label], "year": i % 40} for i, (text, label) in enumerate(rows)]


def test_a_table_reads_the_same_from_every_kind_of_file(sentences, tmp_path):
    made = [both(table(write(tmp_path / f"a.{kind}", sentences))) for kind in KINDS]
    read = [[values(records, "sentence", "label", "year") for records in pair] for pair in made]
    assert all(other == read[0] for other in read[1:])
    assert len({train.fingerprint for train, _ in made}) == 1 and made[0][0].fingerprint != made[0][1].fingerprint
    expected = {(r["sentence"], ("bad", "good").index(r["label"]), r["year"]) for r in sentences}
    assert set(read[0][0]) | set(read[0][1]) == expected and not set(read[0][0]) & set(read[0][1])
    assert made[0][0].fields["label"].names == ("bad", "good")
    assert 0.05 < len(made[0][1]) / len(sentences) < 0.15


def test_a_record_never_changes_side(sentences, tmp_path):
    _, before = both(table(write(tmp_path / "a.jsonl", sentences)))
    held_out = set(values(before, "sentence"))
    fewer = sentences[500:900][::-1]
    more = [{"sentence": f"new {i}", "label": "good", "year": 1} for i in range(300)]
    train, after = both(table(write(tmp_path / "b.csv", more + fewer)))
    kept = {row["sentence"] for row in fewer}
    assert set(values(after, "sentence")) & {(s,) for s in kept} == {s for s in held_out if s[0] in kept} != set()
    twice = write(tmp_path / "c.jsonl", [{"sentence": f"s{i % 50}", "label": "good"} for i in range(500)])
    train, after = both(table(twice))
    assert not set(values(train, "sentence")) & set(values(after, "sentence"))


def test_rows_are_read_in_any_order(sentences, tmp_path):
    files = [write(tmp_path / "a.csv", sentences[:700]), write(tmp_path / "b.parquet", sentences[700:900])]
    records = tables.records(table(*files, eval_fraction=0.0), "train")
    order = np.random.default_rng(0).permutation(900).tolist()
    assert [r["sentence"] for r in records.read(order, ["sentence"])] == [sentences[i]["sentence"] for i in order]
    assert records.read([3, 3], ["label"])[0] == records.read([3], ["label"])[0]


def test_an_evaluation_table_keeps_the_classes_of_training(tmp_path):
    train = write(tmp_path / "train.csv", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(20)])
    held_out = write(tmp_path / "test.jsonl", [{"text": f"e{i}", "label": label} for i, label in enumerate("bbcb")])
    train_records, eval_records = both(table(train, eval_path=(str(held_out),)))
    assert len(train_records) == 20 and eval_records.fields["label"].names == ("a", "b")
    assert values(eval_records, "label", limit=1) == [(1,)] * 3
    assert str(eval_records.read([2], ["label"])[0]) == f"{held_out}:3: label is 'c', expected one of a, b"


def test_columns_are_what_they_hold(tmp_path):
    rows = [
        {
            "text": f"text {i}", "class": i % 3, "score": i / 2, "tags": ["x", "yz"[i % 2]], "vector": [0.5, i],
            "grid": [[i, 1], [2, 3]], "ids": list(range(i % 4)), "group": 2000 + i % 2,
            "nested": {"a": 1}, "none": None,
        }
        for i in range(12)
    ]  # fmt: skip
    for kind in ("jsonl", "parquet"):
        cfg = table(write(tmp_path / f"a.{kind}", rows), label_field="class", group_field="group", eval_fraction=0)
        records = tables.records(cfg, "train")
        assert {name: field.kind for name, field in records.fields.items()} == {
            "text": "text", "class": "label", "score": "array", "tags": "labels", "vector": "array", "grid": "array",
            "ids": "array", "group": "label",
        }  # fmt: skip
        assert records.fields["class"].names == ("0", "1", "2") and records.fields["group"].names == ("2000", "2001")
        assert records.fields["grid"].shape == (2, 2) and records.fields["ids"].shape == (None,)
        row = records.read([5], list(records.fields))[0]
        assert row["tags"] == (0, 2) and row["group"] == 1 and row["class"] == 2 and row["score"] == 2.5
        assert row["grid"].tolist() == [[5, 1], [2, 3]] and row["vector"].dtype == np.float32
    several = table(
        write(tmp_path / "b.jsonl", [{"text": "t", "label": [i % 3, 10]} for i in range(9)]), eval_fraction=0
    )
    records = tables.records(several, "train")
    assert records.fields["label"].names == ("0", "1", "2", "10") and records.read([1], ["label"]) == [
        {"label": (1, 3)}
    ]


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "old", "label": 0}])
    first = tables.records(table(file, eval_fraction=0), "train").fingerprint
    write(file, [{"text": "new, and longer", "label": 0}])
    second = tables.records(table(file, eval_fraction=0), "train")
    assert second.fingerprint != first and values(second, "text") == [("new, and longer",)]


@pytest.mark.parametrize(
    "text", ["Dear all,\nthanks", "one,two\nthree", "first,\nlast,", "1,2\n3,4\n5,6", "see a, b\nand a"]
)
def test_a_text_of_few_lines_with_commas_in_it_is_one_text(tmp_path, text):
    lines = [f"text {i},{'ab'[i % 2]}" for i in range(40)]
    lines[10] = f'"{text}",b'
    found = values(read(tmp_path / "a.csv", "\n".join(["text,label", *lines])), "text", "label")
    assert found[10] == (text, 1) and len(found) == 40


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_the_separator_of_a_csv_is_the_one_that_its_first_row_has(tmp_path, separator):
    lines = [separator.join(row) for row in (("text", "label"), ("a, b", "x"), ("c", "y"))]
    assert values(read(tmp_path / "a.csv", "\n".join(lines)), "text", "label") == [("a, b", 0), ("c", 1)]


def test_line_ends_of_old_macs_end_rows(tmp_path):
    assert values(read(tmp_path / "a.csv", "text,label\ra,0\rb,1\r"), "text", "label") == [("a", 0), ("b", 1)]


@pytest.mark.parametrize(
    "labels, names, classes",
    [
        ([-1, 1, 1, -1], ("-1", "1"), [0, 1, 1, 0]),
        ([-1, 0, 1, -1, 0, 1], ("-1", "0", "1"), [0, 1, 2, 0, 1, 2]),
        ([0.0, 1.0, 1.0], ("0", "1"), [0, 1, 1]),
        (["1.0", "0.0", "1.0"], ("0", "1"), [1, 0, 1]),
        ([True, False, True], ("0", "1"), [1, 0, 1]),
        (["true", "false"], ("false", "true"), [1, 0]),
        ([0, "0", 1, "1"], ("0", "1"), [0, 0, 1, 1]),
        ([1, 3], ("0", "1", "2", "3"), [1, 3]),
        ([str(i) for i in range(12)], tuple(map(str, range(12))), list(range(12))),
        ([10**9, 5, 10**9, 5], ("5", str(10**9)), [1, 0, 1, 0]),
        ([0, 1, "unknown", "unknown"], ("0", "1", "unknown"), [0, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_every_label_that_comes_again_is_a_class(tmp_path, labels, names, classes, kind):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    if kind == "csv" and isinstance(labels[0], bool):
        pytest.skip("a CSV has no booleans")
    records = tables.records(table(write(tmp_path / f"a.{kind}", rows), eval_fraction=0), "train")
    assert records.fields["label"].names == names
    assert [label for (label,) in values(records, "label")] == classes


def test_numbers_that_are_no_classes_are_told(tmp_path, caplog):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(40)] + [{"text": "huge", "label": 10**200}]
    records = tables.records(table(write(tmp_path / "a.jsonl", rows), eval_fraction=0), "train")
    assert len(values(records, "label", limit=1)) == 40 and "a.jsonl:41: label is 1000" in caplog.messages[0]
    scores = write(tmp_path / "b.jsonl", [{"text": f"t{i}", "label": i / 7} for i in range(40)])
    fields = tables.records(table(scores, eval_fraction=0), "train")
    with pytest.raises(UserError, match=r"'label', which is an array \(numbers that are not whole\), not a label"):
        named_field(fields, "label_field", "label", ("label", "labels"))


def test_json_of_any_depth_is_a_row(tmp_path):
    deep = "[" * 900 + "]" * 900
    records = read(tmp_path / "a.jsonl", f'{{"text": "a", "label": 0, "x": {deep}}}\n{{"text": "b", "label": 1}}\n')
    assert ("b", 1) in values(records, "text", "label", limit=1)


def test_one_label_among_records_of_several_is_a_label(tmp_path):
    rows = [{"text": f"t{i}", "label": ["a", "b"] if i % 2 else "a"} for i in range(6)]
    records = tables.records(table(write(tmp_path / "a.jsonl", rows), eval_fraction=0), "train")
    assert [label for (label,) in values(records, "label")] == [(0,), (0, 1)] * 3


def test_a_number_is_one_class_however_it_is_written(tmp_path, caplog):
    written = ["1", "01", " 1", "+1", "1.00", "1.000000e+00", "0", "-0", "2"]
    lines = [f"text {i},{label}" for i, label in enumerate(written)]
    found = values(read(tmp_path / "a.csv", "\n".join(["text, label", *lines])), "text", "label")
    assert [label for _, label in found] == [1, 1, 1, 1, 1, 1, 0, 0, 2] and not caplog.messages


def test_a_byte_order_mark_at_the_beginning_of_a_text_is_no_part_of_it(tmp_path):
    lines = ['{"text": "\\ufeffa", "label": 1}', '{"text": "b", "label": 0}']
    assert values(read(tmp_path / "a.jsonl", "\n".join(lines)), "text", "label") == [("a", 1), ("b", 0)]
