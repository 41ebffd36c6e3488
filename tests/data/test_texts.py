"""The sources stdlib, text, tokens and synthetic."""

from __future__ import annotations

import json
import os
import pickle
from typing import Any

import numpy as np
import pytest

from jaxmodels.config import CausalLM, Classification, Stdlib
from jaxmodels.data import Windows, corpus, open_source
from jaxmodels.data.tokenizer import Bytes
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from tests.sections import data_of, drawn


def open_lm(split: Any = "train", vocab_size: int | None = None, **fields: Any) -> Any:
    return open_source(data_of(**fields), split, CausalLM(), vocab_size=vocab_size)


def text_of(source: Windows) -> str:
    assert source.tokenizer is not None
    return source.tokenizer.decode(np.concatenate(source.arrays))


def test_stdlib_is_python():
    train = open_lm()
    held_out = open_lm("eval")
    assert train.tokens > 4_000_000 and 0.05 < held_out.tokens / (train.tokens + held_out.tokens) < 0.2
    assert train.vocab_size == 256 and "import " in text_of(held_out)[:5000]
    assert open_lm().fingerprint == train.fingerprint != held_out.fingerprint


def test_no_line_of_a_held_out_file_is_trained_on():
    parts = {split: list(corpus.stdlib(Stdlib()).documents(split)) for split in ("train", "eval")}
    real = {split: {d for d in parts[split] if len(d) > 500} for split in parts}
    assert len(real["eval"]) > 20 and not real["train"] & real["eval"]


def test_a_file_s_split_depends_on_its_name_alone(tmp_path):
    files = [tmp_path / "a" / f"{i}.txt" for i in range(200)]
    before = corpus.split_files(files, tmp_path, 0.2)
    after = corpus.split_files(files[:100], tmp_path, 0.2)
    assert set(after["eval"]) == set(before["eval"]) & set(files[:100])
    assert sorted(before["train"] + before["eval"]) == sorted(files)
    assert 20 <= len(before["eval"]) <= 60


def test_neither_split_of_a_few_files_is_empty(tmp_path):
    for i in range(20):
        files = [tmp_path / f"{i}-{j}" for j in range(2)]
        assert all(len(part) == 1 for part in corpus.split_files(files, tmp_path, 0.1).values())
    assert corpus.split_files(files, tmp_path, 0.0)["eval"] == []


def test_one_file_holds_out_its_end(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    train, held_out = (open_lm(split, source="text", path=(str(file),), seq_len=10) for split in ("train", "eval"))
    assert text_of(train) + text_of(held_out) == file.read_text() and held_out.tokens == 100


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"file {i} says é\n" * 10)
    return tmp_path


def test_several_files_are_split_by_file_and_globs_find_each_once(folder):
    path = (f"{folder}/*.txt", f"{folder}/1*.txt", f"{folder}/3.txt")
    texts = [text_of(open_lm(split, source="text", path=path, seq_len=4)) for split in ("train", "eval")]
    for i in range(12):
        assert sum(text.count(f"file {i} says é\n" * 10) for text in texts) == 1
    assert texts[1].count("says") >= 10


def test_chars_number_the_characters_of_both_splits(folder):
    fields: Any = {"source": "text", "path": (f"{folder}/*.txt",), "tokenizer": "chars", "seq_len": 4}
    train, held_out = open_lm("train", **fields), open_lm("eval", **fields)
    assert train.tokenizer.to_json() == held_out.tokenizer.to_json()
    assert train.vocab_size == len(set("file says é\n0123456789"))
    assert "says é" in text_of(held_out)


@pytest.mark.parametrize(
    "path, message",
    [
        ("{}/3.text", r"which does not exist, expected a file or a glob, try .*/3.txt"),
        ("{}/*.md", "which matches no file"),
        ("{}", r"got the directory .* try --data.path '.*/\*\*/\*.txt'"),
        ("{}/nowhere/x.txt", "does not exist"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(folder, path, message):
    with pytest.raises(UserError, match=message):
        open_lm(source="text", path=(path.format(folder),))


def test_the_glob_that_is_offered_for_a_folder_finds_files_of_the_source(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"which holds no \.csv, \.jsonl, .* try --data.path FILE"):
        corpus.expand([str(tmp_path)], "table")
    (tmp_path / "a" / "b.jsonl").write_text("{}\n")
    for source, ending in (("table", ".jsonl"), ("text", "")):
        with pytest.raises(UserError) as error:
            corpus.expand([str(tmp_path)], source)
        offered = str(error.value).partition("try --data.path ")[2].strip("'")
        assert offered == f"{tmp_path}/**/*{ending}"
        assert corpus.expand([offered], source) == [tmp_path / "a" / "b.jsonl"]


def test_no_path_bad_text_and_bad_fractions_are_refused(folder):
    with pytest.raises(UserError, match="got data text without data.path"):
        open_lm(source="text")
    with pytest.raises(UserError, match="got data.eval_fraction 1.0, expected below 1"):
        open_lm(source="text", path=(f"{folder}/*.txt",), eval_fraction=1.0)
    (folder / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="bad.txt, whose byte 3 is not UTF-8"):
        open_lm(source="text", path=(f"{folder}/bad.txt",))


def test_nothing_held_out_is_nothing_to_evaluate_on(folder):
    assert open_lm(source="text", path=(f"{folder}/*.txt",), eval_fraction=0.0, seq_len=4).tokens > 0
    with pytest.raises(UserError, match="got 0 tokens to eval on .* another --data.eval-fraction"):
        open_lm("eval", source="text", path=(f"{folder}/*.txt",), eval_fraction=0.0, seq_len=4)


def test_a_vocabulary_below_the_tokenizer_s_is_refused():
    with pytest.raises(UserError) as error:
        open_lm(vocab_size=128)
    assert str(error.value) == (
        "got model.vocab_size 128, expected at least the tokenizer's 256, try --model.vocab-size 256"
    )


def test_texts_have_no_classes():
    with pytest.raises(UserError, match="got data stdlib, expected a source of records"):
        open_source(Stdlib(), "train", Classification())


def write_tokens(file: Any, n: int, dtype: str = "uint16", **facts: Any) -> np.ndarray:
    tokens = (np.arange(n) * 7 % 1000).astype(dtype)
    tokens.tofile(file)
    if facts:
        file.with_name(file.name + ".json").write_text(json.dumps({"dtype": dtype, **facts}))
    return tokens


def test_a_token_file_without_a_description_is_nanogpt_s(tmp_path):
    tokens = write_tokens(tmp_path / "train.bin", 5000)
    fields: Any = {"source": "tokens", "path": (f"{tmp_path}/train.bin",), "seq_len": 16}
    train, held_out = open_lm("train", **fields), open_lm("eval", **fields)
    assert np.array_equal(np.concatenate([*train.arrays, *held_out.arrays]), tokens) and held_out.tokens == 500
    row = train.batch(np.array([3]), np.array([0]))
    assert np.array_equal(row["tokens"][0], tokens[48:64]) and np.array_equal(row["targets"][0], tokens[49:65])
    assert train.tokenizer is None and train.vocab_size is None


def test_a_described_token_file_is_read_as_it_says(tmp_path):
    tokens = write_tokens(tmp_path / "a.bin", 5000, "uint32", vocab_size=70_000)
    source = open_lm(source="tokens", path=(f"{tmp_path}/a.bin",), eval_fraction=0.0)
    assert np.array_equal(source.arrays[0], tokens) and source.vocab_size == 70_000
    with pytest.raises(UserError, match="got model.vocab_size 50257, expected at least the tokenizer's 70000"):
        open_lm(source="tokens", path=(f"{tmp_path}/a.bin",), vocab_size=50_257)


def test_a_token_file_named_val_is_the_evaluation_split(tmp_path):
    sizes = {"one": 900, "two": 800, "val_x": 700}
    parts = {name: write_tokens(tmp_path / f"{name}.bin", n) for name, n in sizes.items()}
    train, held_out = (open_lm(s, source="tokens", path=(f"{tmp_path}/*",), seq_len=16) for s in ("train", "eval"))
    assert train.tokens == 1700 and np.array_equal(held_out.arrays[0], parts["val_x"])


def test_token_files_that_cannot_be_right_are_refused(tmp_path):
    file = tmp_path / "train.bin"
    write_tokens(file, 5000)
    with pytest.raises(UserError, match=r"got token 999 in .*, expected all below vocab_size 512, .* 1000"):
        open_lm(source="tokens", path=(str(file),), vocab_size=512)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="which is empty, expected tokens of uint16"):
        open_lm(source="tokens", path=(str(file),))
    file.write_bytes(b"abc")
    with pytest.raises(UserError, match="of 3 bytes, expected a multiple of 2"):
        open_lm(source="tokens", path=(str(file),))
    write_tokens(file, 5000, vocab_size=9)
    (tmp_path / "train.bin.json").write_text('{"dtype": "int7"}')
    with pytest.raises(UserError, match="got dtype 'int7' .* expected one of uint8, uint16, uint32"):
        open_lm(source="tokens", path=(str(file),))


def test_a_token_too_large_that_the_opening_missed_is_caught_in_its_batch(tmp_path, monkeypatch):
    write_tokens(tmp_path / "train.bin", 5000)
    monkeypatch.setattr("jaxmodels.data.tokens.check_tokens", lambda *_: None)
    source = open_lm(source="tokens", path=(f"{tmp_path}/train.bin",), vocab_size=512)
    with pytest.raises(UserError, match="expected all below vocab_size 512"):
        source.batch(np.arange(10), np.zeros(10, np.int64))


def test_synthetic_batches_have_the_shape_and_depend_on_the_index_alone():
    model = GPT2Config(vocab_size=65, context=32, layers=1, heads=1, width=8)
    source = drawn(CausalLM(), model, seq_len=32)
    a, b = source.batch(np.array([5, 9, 5]), np.array([0, 0, 1])), source.batch(np.array([9]), np.array([0]))
    assert a["tokens"].shape == a["targets"].shape == (3, 32) and a["tokens"].dtype == np.int32
    assert np.array_equal(a["tokens"][0], a["tokens"][2]) and np.array_equal(a["tokens"][1], b["tokens"][0])
    many = source.batch(np.arange(500), np.zeros(500))["tokens"]
    assert many.min() == 0 and many.max() == 64 and np.bincount(many.ravel()).std() < 0.1 * many.size / 65
    other = drawn(CausalLM(), model, "eval", seq_len=32).batch(np.array([5]), np.array([0]))
    assert not np.array_equal(other["tokens"][0], a["tokens"][0])
    assert source.describe() == "synthetic: 1,048,576 random examples of tokens 32, targets 32 (train)"


@pytest.mark.parametrize("shape, dtype", [((28, 28, 1), np.uint8), ((7,), np.float32)])
def test_synthetic_examples_have_classes(shape, dtype):
    source = drawn(Classification(), MLPConfig(input_shape=shape, hidden=(4,)), mean=(0.5,), std=(0.5,))
    batch = source.batch(np.arange(200), np.zeros(200, np.int64))
    assert batch["inputs"].shape == (200, *shape) and batch["inputs"].dtype == dtype
    assert batch["labels"].dtype == np.int32 and sorted(set(batch["labels"].tolist())) == list(range(10))
    several = drawn(Classification(multi_label=True), MLPConfig(input_shape=shape, hidden=(4,)))
    labels = several.batch(np.arange(50), np.zeros(50))["labels"]
    assert labels.shape == (50, 10) and labels.dtype == np.float32 and set(labels.ravel().tolist()) == {0.0, 1.0}
    with pytest.raises(UserError, match="got data.seq_len 8, which classification of random examples from synthetic"):
        drawn(Classification(), MLPConfig(input_shape=shape, hidden=(4,)), seq_len=8)


def test_files_of_their_own_are_evaluated_on(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text\n" * 50)
    train, held_out = (
        open_lm(split, source="text", path=(f"{tmp_path}/a.txt",), eval_path=(f"{tmp_path}/b.txt",), seq_len=16)
        for split in ("train", "eval")
    )
    assert text_of(train) == "a text\n" * 50 and text_of(held_out) == "b text\n" * 50
    several = open_lm(
        "eval", source="text", path=(f"{tmp_path}/a.txt",), eval_path=(f"{tmp_path}/[bc].txt",), seq_len=8
    )
    assert text_of(several) == "b text\n" * 50 + "\n" + "c text\n" * 50 + "\n"
    with pytest.raises(UserError, match="got data.eval_path .*nowhere.txt', which does not exist"):
        open_lm("eval", source="text", path=(f"{tmp_path}/a.txt",), eval_path=(f"{tmp_path}/nowhere.txt",))
    first, second = write_tokens(tmp_path / "a.bin", 900), write_tokens(tmp_path / "b.bin", 700)
    fields: Any = {
        "source": "tokens",
        "path": (f"{tmp_path}/a.bin",),
        "eval_path": (f"{tmp_path}/b.bin",),
        "seq_len": 8,
    }
    assert np.array_equal(open_lm("train", **fields).arrays[0], first)
    assert np.array_equal(open_lm("eval", **fields).arrays[0], second)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"a text\n" * 50)
    assert text_of(open_lm(source="text", path=(f"{tmp_path}/a.txt",), seq_len=8)).startswith("a text")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", ">u4"])
def test_a_numpy_file_says_what_it_holds(tmp_path, dtype):
    tokens = (np.arange(900) * 7 % 200).astype(dtype)
    np.save(tmp_path / "a.npy", tokens.reshape(30, 30))
    source = open_lm(source="tokens", path=(f"{tmp_path}/a.npy",), seq_len=8, eval_fraction=0.0, vocab_size=200)
    assert np.array_equal(source.arrays[0], tokens)
    assert source.batch(np.array([2]), np.array([0]))["tokens"].tolist() == [tokens[16:24].tolist()]


@pytest.mark.parametrize(
    "tokens, words",
    [
        (np.arange(900, dtype=np.uint32) % 200, "looks like uint32"),
        (np.arange(900, dtype=np.uint32) * 200, "looks like uint32"),
        (np.arange(900, dtype=np.int64) % 200, "looks like uint32"),
        (np.frombuffer(b"Some text.\n" * 90, np.uint8), "is text"),
        (np.frombuffer(b"[1, 200, 3]" * 9, np.uint8), "is text"),  # an odd number of bytes
        (np.frombuffer(b"PK\3\4" * 90, np.uint8), "is an archive or a pickle"),
        (np.frombuffer(pickle.dumps([7] * 90) + b".", np.uint8), "is an archive or a pickle"),
        (np.zeros(900, np.uint16), "is zeros"),
        (np.array([20240520, 1, 800, *range(253)], np.int32), "begins with the header of llm.c"),
    ],
)
def test_a_token_file_that_is_of_another_kind_is_refused(tmp_path, tokens, words):
    tokens.tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match=f"a.bin, which {words}"):
        open_lm(source="tokens", path=(f"{tmp_path}/a.bin",), seq_len=8, vocab_size=70_000)
    np.savez(tmp_path / "d.npz", tokens=tokens)
    with pytest.raises(UserError, match="d.npz, which is packed"):
        open_lm(source="tokens", path=(f"{tmp_path}/d.npz",))
    np.save(tmp_path / "b.npy", np.array([3.5] * 90))
    with pytest.raises(UserError, match="b.npy of float64"):
        open_lm(source="tokens", path=(f"{tmp_path}/b.npy",))
    np.save(tmp_path / "c.npy", np.array([-1, 3] * 90))
    with pytest.raises(UserError, match="got token -1 in .*c.npy, expected tokens from 0 on, try"):
        open_lm(source="tokens", path=(f"{tmp_path}/c.npy",), vocab_size=9)
    np.save(tmp_path / "e.npy", np.array([2**63, 3] * 90, np.uint64))
    with pytest.raises(UserError, match="expected all below vocab_size 9, try the dtype and vocab_size that the file"):
        open_lm(source="tokens", path=(f"{tmp_path}/e.npy",), vocab_size=9)


@pytest.mark.parametrize(
    "content, words",
    [
        ("[1, 2]", "got .*a.bin.json with .*, expected facts of tokens"),
        ('{"model_type": "gpt2", "vocab_size": "large"}', "got .*a.bin.json with 'large', expected facts of tokens"),
        ('{"dtype": "uint16"', "a.bin.json, which is no JSON"),
        ('{"vocab_size": 100}', "got token 99. .* expected all below vocab_size 100"),
        ('{"tokens": 899}', "got .*a.bin of 900 tokens, expected the 899 that a.bin.json says"),
        ('{"tokenizer": 5}', "got tokenizer 5 in "),
        ('{"tokenizer": "tokenizer.json", "vocab_size": 100}', "got vocab_size 100 .* and a tokenizer of 256"),
    ],
)
def test_a_description_of_something_else_is_refused(tmp_path, content, words):
    write_tokens(tmp_path / "a.bin", 900)
    Bytes().save(tmp_path)
    (tmp_path / "a.bin.json").write_text(content)
    with pytest.raises(UserError, match=words):
        open_lm(source="tokens", path=(f"{tmp_path}/a.bin",), seq_len=8, vocab_size=1000)


def test_a_tokenizer_that_a_token_file_has_already_is_not_given_twice(tmp_path):
    write_tokens(tmp_path / "a.bin", 900, tokenizer="tokenizer.json")
    Bytes().save(tmp_path)
    with pytest.raises(UserError, match="got data.tokenizer 'chars' for .*a.bin, which was made with tokenizer.json"):
        open_lm(source="tokens", path=(f"{tmp_path}/a.bin",), tokenizer="chars")


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="which is a pipe or a device, expected a file"):
        open_lm(source="text", path=(f"{tmp_path}/pipe",))
