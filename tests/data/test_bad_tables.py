"""Rows and files that cannot be read: the row is named and left out, the file refused by what it is."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmodels.data import tables
from jaxmodels.data.files import open_file
from jaxmodels.data.records import Reader
from jaxmodels.errors import UserError
from tests.data.written import KINDS, read, table, values, write

GOOD = [f'{{"text": "text {i}", "label": {i % 2}}}' for i in range(40)]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "a", "label": 1', "invalid JSON (Expecting ',' delimiter"),
        (b'["a", 1]', "['a', 1] is not a JSON object"),
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
        (b"a,", "label is missing"),
        (b"a\0,1", "has a zero byte"),
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
        opened("a.json", '[{"text": "a"}]\n')
    with pytest.raises(UserError, match="a.jsonl, whose lines are JSON arrays, expected an object a line"):
        opened("a.jsonl", '["a", 1]\n["b", 0]\n')
    with pytest.raises(UserError, match="a.xls, expected a table: one of .csv, .tsv, .jsonl, .json, .parquet"):
        opened("a.xls", "x")
    with pytest.raises(UserError, match="which is empty"):
        opened("b.csv", "")
    with pytest.raises(UserError, match="expected the names of the columns, each once, try renaming one .* 'a'"):
        opened("c.csv", "a,a\n1,2\n")
    with pytest.raises(UserError, match="expected the names of the columns, each once, try adding such a row"):
        opened("c.csv", ",\n1,2\n")
    with pytest.raises(UserError, match="which is not a Parquet file"):
        opened("d.parquet", "text")
    with pytest.raises(UserError, match="got 0 records to train on in table e.csv, expected at least 1"):
        opened("e.csv", "text,label\n")
    with pytest.raises(UserError, match="got data.eval_fraction 1.5"):
        opened("f.csv", "text\na\n", eval_fraction=1.5)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_file_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, [{"text": "a", "label": 0}])

    def refused(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)  # root may read everything
    with pytest.raises(PermissionError, match=name):
        open_file(path)


def test_a_column_without_a_name_such_as_row_numbers_of_pandas_is_left_out_with_a_word(tmp_path, caplog):
    lines = [f"{i},text {i},{'ab'[i % 2]}," for i in range(20)]
    records = read(tmp_path / "a.csv", "\n".join([",text,label,", *lines]))
    assert set(records.fields) == {"text", "label"}
    assert values(records, "text", "label") == [(f"text {i}", i % 2) for i in range(20)]
    assert caplog.messages == [f"left out 2 of the 4 columns of {tmp_path / 'a.csv'}, for want of a name"]


@pytest.mark.parametrize("quoted", [[7], [7, 30], [7, 30, 31], [39]])
def test_a_stray_quote_costs_its_own_row_alone(tmp_path, caplog, quoted):
    lines = [f"{chr(34) if i in quoted else ''}text {i},{'ab'[i % 2]}" for i in range(40)]
    lines += ['"a text, with\nlines that go on,\nas in prose, for some time,\nand end",a']
    records = read(tmp_path / "a.csv", "\n".join(["text,label", *lines, ""]))
    found = values(records, "text", "label", limit=len(quoted))
    assert found[:-1] == [(f"text {i}", i % 2) for i in range(40) if i not in quoted] and "\n" in found[-1][0]
    assert caplog.messages == [
        f"left out {tmp_path / 'a.csv'}:{i + 2}: invalid CSV (a quote that is not closed)" for i in quoted
    ]


@pytest.mark.parametrize("second", [11, 12, 13, 14, 20])
def test_two_stray_quotes_do_not_make_one_text_of_what_is_between(tmp_path, caplog, second):
    lines = [f"text {i},{'ab'[i % 2]}" for i in range(40)]
    lines[10], lines[second] = '"text 10,a', f'text {second}",a'
    found = values(read(tmp_path / "a.csv", "\n".join(["text,label", *lines])), "text", "label", limit=2)
    texts = [f"text {i}" + '"' * (i == second) for i in range(40) if i != 10]
    assert [text for text, _ in found] == texts
    assert len(caplog.messages) == 1 and "a.csv:12: invalid CSV" in caplog.messages[0]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "text,label\na,0\n".encode("utf-16"), "text in UTF-16, expected UTF-8, try iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "text,label\na,0\n".encode("utf-16-be"), "try iconv -f UTF-16BE -t UTF-8"),
        ("a.csv", "text,label\na,0\n".encode("utf-32"), "text in UTF-32, expected UTF-8, try iconv -f UTF-32 -t UTF-8"),
        ("a.csv", "text,label\nä,0\n".encode("utf-32-be"), "text in UTF-32, .* try iconv -f UTF-32BE -t UTF-8"),
        ("a.jsonl", '{"text": "日本語の文"}\n'.encode("utf-32-le"), "try iconv -f UTF-32LE -t UTF-8"),
        ("a.csv.gz", b"\x1f\x8b\x08", "compressed, expected text, try gzip -d"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd", "compressed, expected text, try zstd -d"),
        ("a.csv", b"PK\3\4" + b"\0" * 40, "compressed, expected text, try unzip, or saving as CSV what Excel"),
        ("a.csv", b"\0\1\2" * 400, "binary"),
        ("a.csv", "\n\ntext,label\na,0\n", r"with the first row \[\], expected the names of the columns"),
        ("a.json", '{"text": "a",\n"label": 0}\n', "of whose 2 rows none can be read .*a.json:1: invalid JSON"),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "which is not a Parquet file"),
    ],
)
def test_files_in_other_forms_are_refused_by_what_they_are(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path / name, content)


@pytest.mark.parametrize(
    "odd", ["[0.5, NaN]", "[0.5, null]", "[Infinity, 1]", "[1e300, 1]", "[1, 2, 3]", '["a", 1]', "[]"]
)
def test_an_array_of_no_numbers_is_a_bad_record_by_name(tmp_path, caplog, odd):
    lines = [f'{{"x": [{i}, 0.5], "label": {i % 2}}}' for i in range(30)]
    lines[12] = f'{{"x": {odd}, "label": 0}}'
    records = read(tmp_path / "a.jsonl", "\n".join(lines))
    assert records.fields["x"].shape == (2,)
    found = values(records, "x", limit=1)
    assert len(found) == 29 and all(np.isfinite(x).all() for (x,) in found)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"left out {tmp_path / 'a.jsonl'}:13: x ")


def test_empty_texts_are_counted_apart(tmp_path, caplog):
    rows = [{"text": ("", "  \n", f"t{i}")[i % 3], "label": i % 2} for i in range(60)]
    records = tables.records(table(write(tmp_path / "a.jsonl", rows), eval_fraction=0), "train")
    assert len(values(records, "text", "label", limit=0)) == 20
    assert caplog.messages == ["left out 40 empty texts of table a.jsonl"]


def test_half_of_a_surrogate_pair_is_a_bad_record(tmp_path, caplog):
    records = read(tmp_path / "a.jsonl", '{"text": "a \\ud83d"}\n{"text": "b \\ud83d\\ude00"}\n')
    assert values(records, "text", limit=1) == [("b \N{GRINNING FACE}",)]
    assert caplog.messages[0].endswith("a.jsonl:1: text has half of a surrogate pair, which is no character")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_a_column_is_refused_by_name(tmp_path, kind):
    files = [write(tmp_path / f"{n}.{kind}", [{"text": n, n: "x"} for _ in range(3)]) for n in ("label", "body")]
    records = tables.records(table(*files, eval_fraction=0), "train")
    with pytest.raises(
        UserError, match=rf"got .*body.{kind} without label, expected it in every file .* has body, text"
    ):
        Reader(records, ["text", "label"], 10)


def test_a_class_that_only_evaluation_has_is_refused(tmp_path):
    files = [
        write(tmp_path / f"{a}.csv", [{"text": f"{i}", "label": a[i % 2]} for i in range(8)]) for a in ("ab", "ac")
    ]
    with pytest.raises(UserError, match=r"got label 'c' in table ac.csv, expected one of a, b as in table ab.csv"):
        tables.records(table(files[0], eval_path=(str(files[1]),)), "eval")


def test_parquet_with_odd_values_is_read_but_for_those(tmp_path, caplog):
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    parquet.write_table(pa.table({"text": text, "label": [0, 1, 1]}), tmp_path / "a.parquet")
    records = tables.records(table(tmp_path / "a.parquet", eval_fraction=0), "train")
    assert values(records, "text", "label", limit=1) == [("a", 0), ("c", 1)]
    assert "a.parquet:2: cannot be read" in caplog.messages[0]


def test_a_key_that_is_given_twice_makes_a_bad_record(tmp_path, caplog):
    lines = ['{"text": "a", "label": 1, "label": 0}', '{"text": "b", "label": 1}', '{"text": "c", "label": 0}']
    assert values(read(tmp_path / "a.jsonl", "\n".join(lines)), "text", "label", limit=1) == [("b", 1), ("c", 0)]
    assert "a.jsonl:1: invalid JSON ('label' is given twice)" in caplog.text


@pytest.mark.parametrize(
    ("filled", "said"), [("null", "label is missing"), ("-1", "label is -1, expected one of 0, 1")]
)
def test_what_fills_up_a_list_of_classes_is_none_of_them(tmp_path, caplog, filled, said):
    lines = [
        '{"text": "a", "label": [0, ' + filled + "]}",
        '{"text": "b", "label": [1]}',
        '{"text": "c", "label": [0, 1]}',
    ]
    records = read(tmp_path / "a.jsonl", "\n".join(lines))
    assert records.fields["label"].names == ("0", "1")
    assert values(records, "text", "label", limit=1) == [("b", (1,)), ("c", (0, 1))] and said in caplog.text
