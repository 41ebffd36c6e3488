from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmodels.config import DataConfig
from jaxmodels.data import tables, tfds
from jaxmodels.data.records import Reader, Records
from jaxmodels.errors import UserError

KINDS = ("csv", "tsv", "jsonl", "json", "parquet")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(*paths: Path, **fields: Any) -> DataConfig:
    return DataConfig(source="table", path=tuple(map(str, paths)), **fields)


def both(cfg: DataConfig) -> tuple[Records, Records]:
    return tables.records(cfg, "train"), tables.records(cfg, "eval")


def values(records: Records, *fields: str, limit: int = 0) -> list[tuple[Any, ...]]:
    return [tuple(row[f] for f in fields) for rows in Reader(records, fields, limit).all() for row in rows]


@pytest.fixture(scope="module")
def sentences(shared_data) -> list[dict[str, Any]]:
    cfg = DataConfig(source="tfds", dir=str(shared_data / "tfds"), name="sst2", train_split="train[:2000]")
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


GOOD = [f'{{"text": "text {i}", "label": {i % 2}}}' for i in range(40)]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "a", "label": 1', "invalid JSON (Expecting ',' delimiter"),
        (b'["a", 1]', "['a', 1] is no JSON object"),
        (b'{"text": "\xff", "label": 1}', "byte 10 of the row is not UTF-8"),
        (b'{"text": "a"}', "label is missing"),
        (b'{"text": null, "label": 1}', "text is missing"),
        (b'{"text": "a", "label": -1}', "label is -1, expected one of 0, 1"),
        (b'{"text": "a", "label": "dog"}', "label is 'dog', expected one of 0, 1"),
        (b'{"text": 5, "label": 1}', "text is 5, expected text"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_left_out(tmp_path, caplog, line, reason):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([*(x.encode() for x in GOOD[:20]), b"", line, *(x.encode() for x in GOOD[20:])]))
    records = tables.records(table(file, eval_fraction=0), "train")
    assert len(records) == 41
    assert values(records, "text", "label", limit=1) == [(f"text {i}", i % 2) for i in range(40)]
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"left out {file}:22: {reason}")
    with pytest.raises(UserError, match="got 1 bad records .* a.jsonl.* expected at most 0"):
        values(records, "text", "label")


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"a,1,2", "has 3 columns, expected 2"),
        (b"a", "has 1 columns, expected 2"),
        (b"\xff\xfe,1", "byte 0 of the row is not UTF-8"),
        (b'"a"b,1', "invalid CSV"),
        (b",1", "text is missing"),
        (b"a,dog", "label is 'dog', expected one of 0, 1"),
    ],
)
def test_a_csv_row_that_cannot_be_read_is_named_and_left_out(tmp_path, caplog, line, reason):
    file = tmp_path / "a.csv"
    rows = [f'"text\n{i}",{i % 2}'.encode() for i in range(20)]
    file.write_bytes(b"\xef\xbb\xbftext,label\r\n" + b"\n".join([*rows[:10], line, *rows[10:]]))
    records = tables.records(table(file, eval_fraction=0), "train")
    assert values(records, "text", "label", limit=1) == [(f"text\n{i}", i % 2) for i in range(20)]
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"left out {file}:22: {reason}")


def test_a_table_that_is_none_is_refused(tmp_path):
    def opened(name: str, content: str, **fields: Any) -> None:
        (tmp_path / name).write_text(content)
        tables.records(table(tmp_path / name, **fields), "train")

    with pytest.raises(UserError, match="a.json, which is one JSON array, expected JSON lines, try jq -c"):
        opened("a.json", '[{"text": "a"}]')
    with pytest.raises(UserError, match="a.xls, expected a table: one of .csv, .tsv, .jsonl, .json, .parquet"):
        opened("a.xls", "x")
    with pytest.raises(UserError, match="which is empty"):
        opened("b.csv", "")
    with pytest.raises(UserError, match="expected the names of the columns, each once"):
        opened("c.csv", "a,a\n1,2\n")
    with pytest.raises(UserError, match="which is no Parquet file"):
        opened("d.parquet", "text")
    with pytest.raises(UserError, match="got 0 records to train on in table e.csv, expected at least 1"):
        opened("e.csv", "text,label\n")
    with pytest.raises(UserError, match="got data.eval_fraction 1.5"):
        opened("f.csv", "text\na\n", eval_fraction=1.5)


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "old", "label": 0}])
    first = tables.records(table(file, eval_fraction=0), "train").fingerprint
    write(file, [{"text": "new, and longer", "label": 0}])
    second = tables.records(table(file, eval_fraction=0), "train")
    assert second.fingerprint != first and values(second, "text") == [("new, and longer",)]
