from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxmodels.commands.data_inspect import show
from jaxmodels.commands.data_prepare import write
from jaxmodels.commands.data_train_tokenizer import train_tokenizer
from jaxmodels.config import (
    TFDS,
    Augment,
    CausalLM,
    Classification,
    Config,
    Contrastive,
    Seq2Seq,
    Synthetic,
    Text,
    Tokens,
)
from jaxmodels.data import Windows, load_tokenizer, open_source, preview, tokens
from jaxmodels.data.contract import BatchField
from jaxmodels.errors import UserError
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.cnn import CNNConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.tasks.task import numbers


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"the file {i} says hello, \x1b[31mred\n" * 40)
    return tmp_path


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_prepared_tokens_are_what_the_text_itself_gives(folder, tokenizer, capsys):
    if tokenizer == "bpe":
        train_tokenizer((f"{folder}/*.txt",), 280, folder / "bpe.json")
        assert "280 tokens" in capsys.readouterr().out
        tokenizer = str(folder / "bpe.json")
    text = Text(path=(f"{folder}/*.txt",), tokenizer=tokenizer, seq_len=16)
    out = folder / "out"
    write(text, out)
    assert "train.bin" in capsys.readouterr().out and not list(out.glob("*.part"))
    files = (f"{out}/train.bin", f"{out}/val.bin")
    prepared = Tokens(path=files, seq_len=text.seq_len, batch_size=text.batch_size)
    for split in ("train", "eval"):
        a, b = open_source(text, split, CausalLM()), open_source(prepared, split, CausalLM())
        assert isinstance(a, Windows) and isinstance(b, Windows) and a.tokenizer and b.tokenizer
        assert np.array_equal(np.concatenate(a.arrays), np.concatenate(b.arrays))
        assert a.fingerprint == b.fingerprint and b.vocab_size == a.vocab_size
        assert b.tokenizer.to_json() == a.tokenizer.to_json() == load_tokenizer(out).to_json()
    facts = json.loads((out / "train.bin.json").read_text())
    assert facts["tokens"] * np.dtype(facts["dtype"]).itemsize == (out / "train.bin").stat().st_size


def test_a_disk_that_is_full_keeps_what_was_prepared_before_and_nothing_new(folder, monkeypatch):
    text, out = Text(path=(f"{folder}/*.txt",), tokenizer="chars", seq_len=16), folder / "out"
    write(text, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(file, *_):
        (file.parent / "tokenizer.json").read_bytes()  # what was written so far
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(tokens, "write", full)
    for place in (out, folder / "new"):
        with pytest.raises(OSError, match="No space left"):
            write(dataclasses.replace(text, tokenizer="bytes"), place)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and not (folder / "new").exists()


def test_only_texts_can_be_prepared(tmp_path):
    with pytest.raises(UserError, match="got data synthetic, expected a source of texts"):
        write(Synthetic(), tmp_path)


def test_inspect_shows_the_text_that_the_model_sees(folder, capsys):
    data = Text(path=(f"{folder}/*.txt",), seq_len=64, batch_size=2)
    show(Config(GPT2Config(vocab_size=256), data=data))
    shown = capsys.readouterr().out
    assert shown.count("Batch ") == 3 and "Batch 1, row 0" in shown and "says hello" in shown
    assert "train: text, 10 files" in shown and "eval: text, 10 files" in shown and "fingerprint" in shown
    assert "unigram" in shown and "\x1b" not in shown and "\\x1b[31mred" in shown
    with pytest.raises(UserError, match="got --out x.png for a model that reads no images"):
        show(Config(GPT2Config(vocab_size=256), data=data), out=Path("x.png"))


def test_inspect_draws_images_and_names_classes(shared_data, capsys, tmp_path):
    place = str(shared_data / "tfds")
    model = CNNConfig(input_shape=(28, 28, 1), classes=10)
    data = TFDS(dir=place, name="mnist", train_split="train[:50]", eval_split="test[:50]")
    augment = Augment(shift=2, cutout=6)
    picture = tmp_path / "new" / "digits.png"
    show(Config(model, task=Classification(), data=data, augment=augment), n=2, out=picture)
    shown = capsys.readouterr().out
    assert str(picture) in shown and "shift 2, cutout 6" in shown
    assert shown.count("Batch ") == 2 and shown.count("    | ") >= 20 and "@" in shown and "    label " in shown
    data = TFDS(dir=place, name="sst2", train_split="train[:50]")
    show(Config(BERTConfig(head="classification", classes=2), task=Classification(), data=data))
    assert "(positive)" in capsys.readouterr().out


def test_the_picture_shows_each_image_as_several_epochs_change_it(shared_data, tmp_path):
    place = str(shared_data / "tfds")
    data = TFDS(dir=place, name="mnist", train_split="train[:50]")
    shape = {"inputs_shape": (28, 28, 1), "num_classes": 10}
    source = open_source(data, "train", Classification(), augment=Augment(shift=4), **shape)
    assert preview.grid(source, [7, 3, 30], tmp_path / "grid.png", {"inputs": numbers((28, 28, 1))})
    page = np.asarray(Image.open(tmp_path / "grid.png"))
    for row, index in enumerate([7, 3, 30]):
        for epoch in range(6):
            top, left = 20 + row * 136 + 20, 4 + epoch * 116
            tile = page[top : top + 112, left : left + 112]
            image = source.batch(np.array([index]), np.array([epoch]))["inputs"][0]
            assert np.array_equal(tile[::4, ::4, :1], image) and np.array_equal(tile[3::4, 3::4, 2:], image)
    assert (page[20:38, 4:100] < 128).any(), "its label is written above"


def test_inspect_shows_both_sides_of_pairs_and_each_text_of_a_row(shared_data, capsys):
    place = str(shared_data / "tfds")
    data = TFDS(dir=place, name="multi30k", train_split="train[:200]", seq_len=128)
    data = dataclasses.replace(data, tokenizer="bpe:500", input_field="en", target_field="de", pack=True)
    show(Config(TransformerConfig(vocab_size=500), task=Seq2Seq(), data=data), n=1)
    shown = capsys.readouterr().out.split("source:")[1]
    source, target = shown.split("target:")
    assert "  1 | " in source and "  2 | " in source and "  2 | " in target
    assert source.count(" | ") == target.count(" | ") and " ein" in target.lower() and " a " in source.lower()


def test_inspect_shows_captions(shared_data, capsys, tmp_path):
    place = str(shared_data / "tfds")
    data = TFDS(dir=place, name="mnist", train_split="train[:50]", eval_split="test[:50]")
    data = dataclasses.replace(data, captions=("the digit {label}",), tokenizer="bytes", seq_len=16)
    model = CLIPConfig((28, 28, 1), 4, vocab_size=256)
    show(Config(model, task=Contrastive(), data=data), n=1, out=tmp_path / "digits.png")
    assert "    | the digit " in capsys.readouterr().out and (tmp_path / "digits.png").exists()


def test_labels_and_groups_are_shown_by_name():
    source = SimpleNamespace(tokenizer=None, class_names=("round", "red", "ripe"), groups=("north", "south"))
    x, fields = np.zeros((2, 2, 3), np.uint8), {"inputs": numbers((2, 2, 3))}
    example = {"inputs": x, "labels": np.array([1, 0, 1], np.float32), "group": np.array(1)}
    assert preview.show(example, source, fields).endswith("    labels round, ripe, group south")
    assert preview.show({"inputs": x, "labels": np.array([-1.0] * 3)}, source, fields).endswith("    labels ignored")
    assert preview.show({"inputs": x, "labels": np.array(1)}, source, fields).endswith("    label 1 (red)")


def test_fields_of_a_task_from_outside_are_shown_as_what_its_contract_says_they_are():
    ids = BatchField((4,), axes=("seq",), below=9)
    fields = {
        "picture": numbers((2, 2, 3)),
        "question": ids,
        "answer": ids,
        "lengths": BatchField((4,), axes=("seq",)),
        "score": BatchField((3,), np.float32),
    }
    tokenizer = SimpleNamespace(decode=lambda ids: "".join("abcdefghi"[i] for i in ids))
    source = SimpleNamespace(tokenizer=tokenizer, class_names=(), groups=())
    example = {
        "picture": np.zeros((2, 2, 3), np.uint8),
        "question": np.array([2, 0, 1, 1]),
        "answer": np.array([3, 0, 3, 8]),
        "lengths": np.arange(4),
        "score": np.array([0.5, 2, 3], np.float32),
    }
    shown = preview.show(example, source, fields)
    assert "    | cabb" in shown and "    | dadi" in shown and "(2, 2, 3) uint8" in shown
    assert "    score:\n    (3,) float32: 0.5 2 3" in shown and "lengths" not in shown
    unknown = {"question": BatchField((4,), axes=("seq",)), "lengths": fields["lengths"]}
    assert preview.show(example, source, unknown) == "    | cabb", "of a model that names no size of its vocabulary"


def test_inspect_shows_the_numbers_where_there_is_no_text(capsys, tmp_path):
    np.arange(2000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    data = Tokens(path=(f"{tmp_path}/a.bin",), seq_len=64)
    show(Config(GPT2Config(vocab_size=50_257), data=data), n=1)
    assert "(64,) int32: " in capsys.readouterr().out
