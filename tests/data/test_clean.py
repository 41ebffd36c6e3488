from __future__ import annotations

import functools
import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jaxmodels.cli import main
from jaxmodels.config import TFDS
from jaxmodels.data import clean as cleaning
from jaxmodels.data import tfds
from jaxmodels.data.clean import Duplicates, Report, Rules, bands
from jaxmodels.data.records import Reader
from jaxmodels.errors import UserError

pytest.importorskip("datasketch")


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path


def clean(paths: Path | list[Path], **fields: Any) -> tuple[Report, list[dict[str, Any]]]:
    paths = [paths] if isinstance(paths, Path) else paths
    out = paths[0].parent / "out" / "clean.jsonl"
    lines = fields.pop("lines", False)
    report = cleaning.clean([str(p) for p in paths], out, "text", lines, Rules(**fields))
    return report, [json.loads(line) for line in out.read_text().split("\n") if line]


def removed(report: Report) -> dict[int, str]:
    return {int(found["where"].rsplit(":", 1)[1]) - 1: found["reason"] for found in report.left_out}


@pytest.fixture(scope="module")
def sentences(shared_data) -> list[str]:
    cfg = TFDS(dir=str(shared_data / "tfds"), name="multi30k", train_split="train[:400]")
    return [row["en"] for rows in Reader(tfds.records(cfg, "train"), ["en"], 0).all() for row in rows]


@functools.cache
def shingles(text: str) -> set[str]:
    text = text.lower()
    return {text[i : i + 5] for i in range(len(text) - 4)}


def near(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_copies_with_a_word_changed_are_found_among_real_sentences(sentences, tmp_path):
    changed = [s.replace(" a ", " the ", 1) for s in sentences if " a " in s and len(s) > 60]
    expected = {i for i, text in enumerate(changed) if max(near(text, s) for s in sentences) >= 0.8}
    report, kept = clean(write(tmp_path / "a.jsonl", sentences + changed))
    found = removed(report)
    assert {i - len(sentences) for i in found if i >= len(sentences)} == expected and len(expected) > 100
    assert {found[i + len(sentences)] for i in expected} == {"near duplicate"}
    assert report.read == len(sentences) + len(changed) == report.kept + len(report.left_out)
    assert [row["n"] for row in kept] == [i for i in range(report.read) if i not in found]


def test_what_is_near_is_what_comparing_every_pair_gives(sentences, tmp_path):
    texts = [s[: 40 + i % 20] for i, s in enumerate(sentences[:150] + sentences[:150][::-1])]
    kept: list[str] = []
    for text in texts:
        if all(near(text.strip(), other) < 0.7 for other in kept):
            kept.append(text.strip())
    _, found = clean(write(tmp_path / "a.jsonl", texts), near=0.7)
    assert [row["text"] for row in found] == kept and len(kept) < 250


def test_exact_copies_go_and_the_first_stays(sentences, tmp_path):
    a, b = write(tmp_path / "a.jsonl", sentences[:50]), write(tmp_path / "b.jsonl", sentences[40:60])
    report, kept = clean([a, b], near=0.0)
    assert [row["text"] for row in kept] == sentences[:60]
    assert report.removed == {"duplicate": 10}
    assert report.left_out[0]["where"].endswith("b.jsonl:1") and report.left_out[0]["detail"].endswith("a.jsonl:41")


def test_cleaning_again_changes_nothing(sentences, tmp_path):
    texts = [s.replace(" a ", " the ", i % 3) for i, s in enumerate(sentences[:100] * 2)] + NASTY
    source = write(tmp_path / "a.jsonl", texts)
    report, _ = clean(source)
    assert report.kept < report.read and report.changed > 0
    first, out = (tmp_path / "out" / "clean.jsonl").read_bytes(), tmp_path / "again.jsonl"
    again = cleaning.clean([str(tmp_path / "out" / "clean.jsonl")], out, "text", False, Rules())
    assert again.kept == again.read == report.kept and again.changed == 0 and out.read_bytes() == first
    clean(source)
    assert (tmp_path / "out" / "clean.jsonl").read_bytes() == first


NASTY = [
    "e\x00\u0301clair", "ＦＵＬＬ ﬁ", "\ufeffbom \u200bzero", "a\r\nb\rc\u2028d\x85e", "tab\tand\xa0space  two",
    "\ud800 half", "\n\n\n  many \n\n\n\n lines \n", "a \u200b\u200b b", "\u1112\u1161\u11ab", "x\x1b[31mred",
    "\u0301 mark first", "\x1c\x1d",
]  # fmt: skip


@pytest.mark.parametrize("form", ["NFC", "NFKC", "none"])
@pytest.mark.parametrize("collapse", [True, False])
def test_a_normal_text_stays_as_it_is(form, collapse):
    rules = Rules(form=form, collapse=collapse)
    for text in NASTY + ["".join(pair) for pair in pairwise(NASTY)]:
        normal = rules.normalize(text)
        assert rules.normalize(normal) == normal
        assert form == "none" or unicodedata.is_normalized(form, normal)
        assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in normal)


def test_normalizing_does_what_it_says():
    assert Rules().normalize("e\x00\u0301clair") == "éclair"
    assert Rules().normalize(" a\r\n\tb \xa0 c\x0b\n\n\n\nd ") == "a\nb c\n\nd"
    assert Rules(collapse=False).normalize("def f():\r\n\treturn  1 \n\n") == "def f():\n\treturn  1"
    assert Rules(form="NFKC").normalize("ﬁｎｅ") == "fine" and Rules().normalize("ﬁ") == "ﬁ"
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert Rules().normalize(family) == family


@pytest.mark.parametrize(
    "text, fields, reason",
    [
        ("  \n\t", {}, ("empty", "")),
        ("abc", {"min_characters": 4}, ("too short", "3 characters")),
        ("abcd", {"max_characters": 3}, ("too long", "4 characters")),
        ("two words", {"min_words": 3}, ("too short", "2 words")),
        ("two words", {"max_words": 1}, ("too long", "2 words")),
        ("a\nb\na\na", {}, ("repeated lines", "50% of 4 lines")),
        ("12 345 a", {"letters": 0.5}, ("few letters", "17% letters")),
        ("привет abc", {"script": ("latin",)}, ("other script", "33% latin")),
        ("привет", {"script": ("latin", "Greek")}, ("other script", "0% latin or Greek")),
    ],
)
def test_a_text_goes_out_for_the_reason_given(text, fields, reason):
    rules = Rules(**fields)
    assert rules.refuse(rules.normalize(text)) == reason


@pytest.mark.parametrize(
    "text, fields",
    [
        ("abcd", {"min_characters": 4, "max_characters": 4}),
        ("two words", {"min_words": 2, "max_words": 2}),
        ("a\n\nb\n\nc\na", {}),
        ("né à Kraków", {"script": ("latin",), "script_share": 1.0, "letters": 1.0}),
        ("漢字 かな", {"script": ("cjk", "hiragana")}),
    ],
)
def test_a_text_within_the_rules_stays(text, fields):
    assert Rules(**fields).refuse(text) is None


def test_what_cannot_be_read_is_told_and_other_fields_are_kept(tmp_path):
    source = tmp_path / "a.jsonl"
    rows = [b'{"text": "one text", "label": 3}', b'{"text": ', b'{"label": 1}', b'{"text": 5}', b'{"text": "\xff"}']
    source.write_bytes(b"\n".join(rows))
    report, kept = clean(source)
    assert kept == [{"text": "one text", "label": 3}] and report.removed == {"unreadable": 4}
    assert [found["where"].split("/")[-1] for found in report.left_out] == [f"a.jsonl:{i}" for i in (2, 3, 4, 5)]
    assert report.left_out[1]["detail"] == "text is missing" and "5, expected text" in report.left_out[2]["detail"]


def test_files_of_text_are_one_text_or_one_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first line\nsecond line\r\n\n\xff\n")
    (tmp_path / "b.txt").write_text("another text\n")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    report, kept = clean(files)
    assert kept == [{"text": "another text"}] and report.left_out[0]["detail"] == "byte 25 is not UTF-8"
    report, kept = clean(files, lines=True)
    assert [row["text"] for row in kept] == ["first line", "second line", "another text"]
    assert report.left_out[0]["where"].endswith("a.txt:4")


def test_bands_find_what_is_at_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95):
        number, rows = bands(threshold)
        assert number * rows <= 128 and 1 - (1 - threshold**rows) ** number >= 0.99
    assert bands(0.9)[0] < bands(0.8)[0] < bands(0.5)[0]


def test_words_can_be_compared_instead(tmp_path):
    text = " ".join(f"word{i}" for i in range(60))
    copies = [text, text.replace("word30", "other"), text.replace("word3", "x")]
    report, _ = clean(write(tmp_path / "a.jsonl", copies), shingles="words")
    assert removed(report) == {1: "near duplicate"}
    with (tmp_path / "x").open("w+b") as out:
        assert Duplicates(Rules(shingles="words"), out, "text").shingled("A b") == {"a b"}


def test_the_command_tells_what_went_out(sentences, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [
        *sentences[:20],
        sentences[3],
        sentences[5].replace(" a ", " the "),
        "\x1b[31mred alert",
        "\x1b[31m" + "5 " * 40,
    ]
    write(tmp_path / "a.jsonl", texts)
    assert main(["data", "clean", "a.jsonl", "--out", "b.jsonl", "--letters", "0.5", "--near", "0.7"]) == 0
    shown = capsys.readouterr().out
    assert "read             24" in shown and "kept             21" in shown and "\x1b" not in shown
    assert "a.jsonl:21 (of a.jsonl:4)" in shown and f"% of a.jsonl:6)\n        {texts[21][:90]}" in shown
    facts = json.loads((tmp_path / "b.jsonl.report.json").read_text())
    assert facts["removed"] == {"duplicate": 1, "near duplicate": 1, "few letters": 1} and facts["kept"] == 21
    assert [found["where"] for found in facts["left_out"]] == ["a.jsonl:24", "a.jsonl:21", "a.jsonl:22"]
    assert facts["rules"]["near"] == 0.7 and not list(tmp_path.glob("*.part"))


def test_mistakes_are_answered_before_anything_is_written(sentences, tmp_path):
    source = write(tmp_path / "a.jsonl", sentences[:3])
    with pytest.raises(UserError, match="'txt', expected one of n, text in .*, try --text-field text"):
        cleaning.clean([str(source)], tmp_path / "b.jsonl", "txt", False, Rules())
    with pytest.raises(UserError, match="which is one of the files to read"):
        cleaning.clean([str(source)], source, "text", False, Rules())
    with pytest.raises(UserError, match="got near 1.5, expected at most 1, try --near 1.0"):
        Rules(near=1.5)
    with pytest.raises(UserError, match="got --script 'latn', expected a script .*did you mean 'latin'"):
        Rules(script=("latn",))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
