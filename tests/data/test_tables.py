from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmodels.config import TFDS, DataConfig, Table
from jaxmodels.data import tables, tfds
from jaxmodels.data.fields import named_field
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
    return Table(path=tuple(map(str, paths)), **fields)


def both(cfg: DataConfig) -> tuple[Records, Records]:
    return tables.records(cfg, "train"), tables.records(cfg, "eval")


def values(records: Records, *fields: str, limit: int = 0) -> list[tuple[Any, ...]]:
    return [tuple(row[f] for f in fields) for rows in Reader(records, fields, limit).all() for row in rows]


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
    with pytest.raises(UserError, match="expected the names of the columns, each once"):
        opened("c.csv", "a,a\n1,2\n")
    with pytest.raises(UserError, match="which is not a Parquet file"):
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


def read(path: Path, content: bytes | str, **fields: Any) -> Records:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tables.records(table(path, eval_fraction=0, **fields), "train")


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
    "name, content, words",
    [
        ("a.csv", "text,label\na,0\n".encode("utf-16"), "text in UTF-16, expected UTF-8, try iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "text,label\na,0\n".encode("utf-16-be"), "try iconv -f UTF-16BE -t UTF-8"),
        ("a.csv", "text,label\na,0\n".encode("utf-32"), "text in UTF-32, expected UTF-8, try iconv -f UTF-32 -t UTF-8"),
        ("a.csv", "text,label\nä,0\n".encode("utf-32-be"), "text in UTF-32, .* try iconv -f UTF-32BE -t UTF-8"),
        ("a.jsonl", '{"text": "日本語の文"}\n'.encode("utf-32-le"), "try iconv -f UTF-32LE -t UTF-8"),
        ("a.csv.gz", b"\x1f\x8b\x08", "compressed, expected text, try gzip -d"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd", "compressed, expected text, try zstd -d"),
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


def test_json_of_any_depth_is_a_row(tmp_path):
    deep = "[" * 900 + "]" * 900
    records = read(tmp_path / "a.jsonl", f'{{"text": "a", "label": 0, "x": {deep}}}\n{{"text": "b", "label": 1}}\n')
    assert ("b", 1) in values(records, "text", "label", limit=1)


def test_parquet_with_odd_values_is_read_but_for_those(tmp_path, caplog):
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    parquet.write_table(pa.table({"text": text, "label": [0, 1, 1]}), tmp_path / "a.parquet")
    records = tables.records(table(tmp_path / "a.parquet", eval_fraction=0), "train")
    assert values(records, "text", "label", limit=1) == [("a", 0), ("c", 1)]
    assert "a.parquet:2: cannot be read" in caplog.messages[0]


def test_one_label_among_records_of_several_is_a_label(tmp_path):
    rows = [{"text": f"t{i}", "label": ["a", "b"] if i % 2 else "a"} for i in range(6)]
    records = tables.records(table(write(tmp_path / "a.jsonl", rows), eval_fraction=0), "train")
    assert [label for (label,) in values(records, "label")] == [(0,), (0, 1)] * 3


def test_a_number_is_one_class_however_it_is_written(tmp_path, caplog):
    written = ["1", "01", " 1", "+1", "1.00", "1.000000e+00", "0", "-0", "2"]
    lines = [f"text {i},{label}" for i, label in enumerate(written)]
    found = values(read(tmp_path / "a.csv", "\n".join(["text, label", *lines])), "text", "label")
    assert [label for _, label in found] == [1, 1, 1, 1, 1, 1, 0, 0, 2] and not caplog.messages


def test_a_key_that_is_given_twice_makes_a_bad_record(tmp_path, caplog):
    lines = ['{"text": "a", "label": 1, "label": 0}', '{"text": "b", "label": 1}', '{"text": "c", "label": 0}']
    assert values(read(tmp_path / "a.jsonl", "\n".join(lines)), "text", "label", limit=1) == [("b", 1), ("c", 0)]
    assert "a.jsonl:1: invalid JSON ('label' is given twice)" in caplog.text


def test_a_byte_order_mark_at_the_beginning_of_a_text_is_no_part_of_it(tmp_path):
    lines = ['{"text": "\\ufeffa", "label": 1}', '{"text": "b", "label": 0}']
    assert values(read(tmp_path / "a.jsonl", "\n".join(lines)), "text", "label") == [("a", 1), ("b", 0)]


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
