from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import pytest

from jaxmodels import data
from jaxmodels.config import DataConfig
from jaxmodels.data import Loader, Order, tfds
from jaxmodels.data.source import Examples
from jaxmodels.errors import UserError


def open_source(*args: Any, **kwargs: Any) -> Any:
    return data.open_source(*args, **kwargs)


@pytest.fixture
def sets(shared_data):
    def make(name: str, **fields: Any) -> DataConfig:
        return DataConfig(source="tfds", dir=str(shared_data / "tfds"), name=name, **fields)

    return make


def test_tiny_shakespeare_is_nanogpt_s(sets, shared_data):
    cfg = sets("tiny_shakespeare", eval_split="validation+test", tokenizer="chars", seq_len=64)
    train, held_out = (open_source(cfg, split, "causal_lm", vocab_size=65) for split in ("train", "eval"))
    assert train.vocab_size == held_out.vocab_size == 65
    whole = (shared_data / "raw" / "tinyshakespeare" / "input.txt").read_text()
    cut = int(len(whole) * 0.9)
    assert train.tokenizer.decode(train.arrays[0]) == whole[:cut]
    assert held_out.tokenizer.decode(held_out.arrays[0]) == whole[cut:]
    targets = [b["targets"] for b in Loader(held_out, Order(len(held_out), 12, 0)).once()]
    assert sum((t >= 0).sum() for t in targets) == len(whole) - cut - 1


def test_mnist_opens_quickly_and_is_the_digits(sets, shared_data):
    begin = time.process_time()
    train = open_source(sets("mnist"), "train", "classification", num_classes=10)
    assert time.process_time() - begin < 3
    held_out = open_source(sets("mnist/3.0.1", eval_split="test"), "eval", "classification")
    assert (len(train), len(held_out)) == (8500, 1500) and train.num_classes == 10
    batch = train.batch(np.arange(8500), np.zeros(8500, np.int64))
    assert batch["inputs"].shape == (8500, 28, 28, 1) and batch["inputs"].dtype == np.uint8
    assert batch["labels"].dtype == np.int32 and np.bincount(batch["labels"]).min() > 700

    import gzip

    raw = np.frombuffer(
        gzip.decompress((shared_data / "raw/mnist/t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
    )
    originals = {image.tobytes() for image in raw.reshape(10_000, 784)}
    ours = {image.tobytes() for image in batch["inputs"]}
    assert ours <= originals and len(ours) == 8500
    assert not ours & {image.tobytes() for image in held_out.batch(np.arange(1500), np.zeros(1500))["inputs"]}


def test_a_large_set_read_record_by_record_is_the_same(sets, monkeypatch):
    cfg = sets("mnist", train_split="train[:500]")
    whole = open_source(cfg, "train", "classification")
    monkeypatch.setattr(tfds, "IN_MEMORY", 1000)
    lazy = open_source(cfg, "train", "classification")
    assert isinstance(whole, Examples) and isinstance(lazy, tfds.Records)
    assert len(lazy) == len(whole) == 500 and lazy.num_classes == 10
    indices = np.array([3, 499, 3, 0])
    a, b = whole.batch(indices, indices), lazy.batch(indices, indices)
    assert all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    other = open_source(sets("mnist", train_split="train[1:501]"), "train", "classification")
    assert len({lazy.fingerprint, other.fingerprint}) == 2


def test_splits_are_in_tfds_s_notation(sets):
    sizes = {"train[:90%]": 6228, "train[90%:]": 692, "train[:10]+test[-20:]": 30}
    made = [open_source(sets("sst2", seq_len=16, train_split=split), "train", "classification") for split in sizes]
    assert [len(source) for source in made] == list(sizes.values())
    assert len({source.fingerprint for source in made}) == 3


def test_sentences_become_padded_tokens(sets):
    cfg = sets("sst2", seq_len=64, tokenizer="chars")
    train, held_out = (open_source(cfg, split, "classification") for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (6920, 872) and train.num_classes == 2
    assert train.class_names == ("negative", "positive")
    batch = train.batch(np.array([0]), np.array([0]))
    assert batch["inputs"].dtype == np.int32 and batch["inputs"].shape == (1, 64) and batch["labels"].tolist() == [1]
    text = train.tokenizer.decode(batch["inputs"][0])
    assert text == "a stirring , funny and finally transporting re-imagining of beau"
    short = next(row for row in held_out.inputs if row[-1] == 0)
    assert held_out.tokenizer.decode(np.trim_zeros(short, "b")).endswith(".")


def test_sentences_are_a_text_too(sets):
    train = open_source(sets("sst2", seq_len=64), "train", "causal_lm")
    text = train.tokenizer.decode(train.arrays[0])
    assert text.count("\n") == 6920 and text.startswith("a stirring , funny")


def test_reading_needs_no_tensorflow(sets):
    open_source(sets("sst2"), "eval", "causal_lm")
    assert "tensorflow" not in sys.modules


LM, CLASSES = "causal_lm", "classification"


@pytest.mark.parametrize(
    "task, name, fields, message",
    [
        (CLASSES, "mnits", {}, "got data.name 'mnits', expected one of mnist, multi30k, .* try --data.name mnist$"),
        (CLASSES, "mnist/4.0.0", {}, "expected one of mnist/3.0.1 in .*, try --data.name mnist/3.0.1"),
        (
            CLASSES,
            "mnist",
            {"train_split": "trian"},
            "'trian', expected one of train, test, try --data.train-split train",
        ),
        (CLASSES, "mnist", {"train_split": "train[:x%]"}, "expected TFDS's notation"),
        (CLASSES, "mnist", {"train_split": "train[:0]"}, "expected TFDS's notation"),
        (
            CLASSES,
            "mnist",
            {"label_field": "lable"},
            "'lable', expected one of image, label, try --data.label-field label",
        ),
        (CLASSES, "mnist", {"input_field": "imag"}, "expected one of image, label, try --data.input-field image"),
        (LM, "multi30k", {}, "got no data.input_field, expected one of de, en, try --data.input-field de"),
        (LM, "mnist", {}, "with the fields image, label, expected a text field"),
        (LM, "sst2", {"input_field": "label"}, "which is ClassLabel, not a text, expected one of sentence"),
    ],
)
def test_mistakes_are_answered_with_what_is_there(sets, task, name, fields, message):
    with pytest.raises(UserError, match=message):
        open_source(sets(name, **fields), "train", task)


def test_a_wrong_evaluation_split_names_those_not_trained_on(sets):
    with pytest.raises(UserError, match="'validation', expected one of test, try --data.eval-split test"):
        open_source(sets("mnist"), "eval", "classification")


def test_an_empty_directory_says_so(tmp_path):
    with pytest.raises(UserError, match="expected a prepared set in .*, where none lies, try --data.dir"):
        open_source(DataConfig(source="tfds", dir=str(tmp_path), name="mnist"), "train", "classification")


def test_a_prepared_directory_can_be_named_itself(sets, shared_data):
    place = shared_data / "tfds" / "sst2" / "1.0.0"
    assert tfds.prepared(DataConfig(dir=str(place))) == place
    assert tfds.prepared(DataConfig(dir="/elsewhere", name=str(place))) == place
    assert tfds.prepared(sets("sst2:1.0.0")) == tfds.prepared(sets("sst2")) == place


def test_the_newest_version_is_taken(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.0"):
        (tmp_path / "set" / version).mkdir(parents=True)
        (tmp_path / "set" / version / "features.json").write_text("{}")
    assert tfds.prepared(DataConfig(dir=str(tmp_path), name="set")).name == "1.10.0"


def test_more_classes_than_the_model_has_are_refused(sets):
    with pytest.raises(UserError, match="got a model of 2 classes, expected .* 10, try --model.classes 10"):
        open_source(sets("mnist", train_split="train[:50]"), "train", "classification", num_classes=2)
