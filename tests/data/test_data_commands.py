from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmodels.config import Config, DataConfig, TaskConfig
from jaxmodels.data import Windows, commands, load_tokenizer, open_source
from jaxmodels.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"the file {i} says hello, \x1b[31mred\n" * 40)
    return tmp_path


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_prepared_tokens_are_what_the_text_itself_gives(folder, tokenizer, capsys):
    if tokenizer == "bpe":
        commands.train_tokenizer((f"{folder}/*.txt",), 280, folder / "bpe.json")
        assert "280 tokens" in capsys.readouterr().out
        tokenizer = str(folder / "bpe.json")
    text = DataConfig(source="text", path=(f"{folder}/*.txt",), tokenizer=tokenizer, seq_len=16)
    out = folder / "out"
    commands.prepare(text, out)
    assert "train.bin" in capsys.readouterr().out and not list(out.glob("*.part"))
    files = (f"{out}/train.bin", f"{out}/val.bin")
    prepared = dataclasses.replace(text, source="tokens", path=files, tokenizer="bytes")
    for split in ("train", "eval"):
        a, b = open_source(text, split, "causal_lm"), open_source(prepared, split, "causal_lm")
        assert isinstance(a, Windows) and isinstance(b, Windows) and a.tokenizer and b.tokenizer
        assert np.array_equal(np.concatenate(a.arrays), np.concatenate(b.arrays))
        assert a.fingerprint == b.fingerprint and b.vocab_size == a.vocab_size
        assert b.tokenizer.to_json() == a.tokenizer.to_json() == load_tokenizer(out).to_json()
    facts = json.loads((out / "train.bin.json").read_text())
    assert facts["tokens"] * np.dtype(facts["dtype"]).itemsize == (out / "train.bin").stat().st_size


def test_only_texts_can_be_prepared(tmp_path):
    with pytest.raises(UserError, match="got data.source synthetic, expected a source of texts: stdlib, text, tfds"):
        commands.prepare(DataConfig(source="synthetic"), tmp_path)


def test_inspect_shows_the_text_that_the_model_sees(folder, capsys):
    data = DataConfig(source="text", path=(f"{folder}/*.txt",), seq_len=64, batch_size=2)
    commands.inspect(Config(SimpleNamespace(vocab_size=256), data=data))
    shown = capsys.readouterr().out
    assert shown.count("Batch ") == 3 and "Batch 1, row 0" in shown and "says hello" in shown
    assert "train: text, 10 files" in shown and "eval: text, 10 files" in shown and "fingerprint" in shown
    assert "unigram" in shown and "\x1b" not in shown and "\\x1b[31mred" in shown


def test_inspect_draws_images_and_names_classes(shared_data, capsys):
    place = str(shared_data / "tfds")
    model = SimpleNamespace(input_shape=(28, 28, 1), classes=10)
    data = DataConfig(source="tfds", dir=place, name="mnist", train_split="train[:50]", eval_split="test[:50]")
    commands.inspect(Config(model, task=TaskConfig("classification"), data=data), n=2)
    shown = capsys.readouterr().out
    assert shown.count("Batch ") == 2 and shown.count("    | ") >= 20 and "@" in shown and "    label " in shown
    data = DataConfig(source="tfds", dir=place, name="sst2", train_split="train[:50]")
    commands.inspect(Config(SimpleNamespace(), task=TaskConfig("classification"), data=data))
    assert "(positive)" in capsys.readouterr().out


def test_inspect_shows_the_numbers_where_there_is_no_text(capsys, tmp_path):
    np.arange(2000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    data = DataConfig(source="tokens", path=(f"{tmp_path}/a.bin",), seq_len=64)
    commands.inspect(Config(SimpleNamespace(vocab_size=50_257), data=data), n=1)
    assert "(64,) int32: " in capsys.readouterr().out
