from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from jaxmodels import data
from jaxmodels.config import TFDS, CausalLM, Classification, DataConfig
from jaxmodels.data import Loader, Order, tfds
from jaxmodels.data.records import Reader
from jaxmodels.errors import UserError
from tests.sections import task_of


def open_source(cfg: DataConfig, split: Any, task: Any, **kwargs: Any) -> Any:
    if cfg.name.startswith("mn"):
        kwargs["inputs_shape"] = (28, 28, 1)
    return data.open_source(cfg, split, task_of(task) if isinstance(task, str) else task, **kwargs)


@pytest.fixture
def sets(shared_data):
    def make(name: str, **fields: Any) -> DataConfig:
        return TFDS(dir=str(shared_data / "tfds"), name=name, **fields)

    return make


def test_tiny_shakespeare_is_nanogpt_s(sets, shared_data):
    cfg = sets("tiny_shakespeare", eval_split="validation+test", tokenizer="chars", seq_len=64)
    train, held_out = (open_source(cfg, split, CausalLM(), vocab_size=65) for split in ("train", "eval"))
    assert train.vocab_size == held_out.vocab_size == 65
    whole = (shared_data / "raw" / "tinyshakespeare" / "input.txt").read_text()
    cut = int(len(whole) * 0.9)
    assert train.tokenizer.decode(train.arrays[0]) == whole[:cut]
    assert held_out.tokenizer.decode(held_out.arrays[0]) == whole[cut:]
    batches = Loader(held_out, Order(len(held_out), 12, 0)).once()
    targets = [b["targets"][b["weight"] > 0] if "weight" in b else b["targets"] for b in batches]
    assert sum((t >= 0).sum() for t in targets) == len(whole) - cut - 1


def test_mnist_is_the_digits(sets, shared_data):
    train = open_source(sets("mnist"), "train", Classification(), num_classes=10)
    held_out = open_source(sets("mnist/3.0.1", eval_split="test"), "eval", Classification())
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


def test_records_are_what_the_set_holds_in_any_order(sets):
    digits = tfds.records(sets("mnist"), "train")
    assert {name: field.kind for name, field in digits.fields.items()} == {"image": "image", "label": "label"}
    assert digits.fields["image"].shape == (28, 28, 1) and digits.fields["label"].names == tuple("0123456789")
    some = digits.read([8499, 0, 17], ["image", "label"])
    assert digits.read([17, 8499], ["image", "label"]) == [some[2], some[0]]
    assert all(record["image"][:4] == b"\x89PNG" for record in some) and digits.read([0], ["label"]) == [{"label": 7}]

    pairs = tfds.records(sets("multi30k"), "eval")
    assert len(pairs) == 1014 and {field.kind for field in pairs.fields.values()} == {"text"}
    assert pairs.read([0], ["en"]) == [{"en": "A group of men are loading cotton onto a truck"}]
    assert not pairs.whole and tfds.records(sets("tiny_shakespeare"), "train").whole


def test_the_fingerprint_is_the_same_in_another_process(sets, root):
    command = (
        "from jaxmodels.config import TFDS\nfrom jaxmodels.data import tfds\n"
        f"print(tfds.records(TFDS(dir={sets('sst2').dir!r}, name='sst2'), 'train').fingerprint)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", command], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=root, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {tfds.records(sets("sst2"), "train").fingerprint + "\n"}
    assert tfds.records(sets("sst2", train_split="train[1:]"), "train").fingerprint not in found.pop()


def test_several_sets_of_texts_are_joined(sets):
    cfg = sets("sst2+multi30k", input_field="sentence+en")
    train, held_out = (tfds.records(cfg, split) for split in ("train", "eval"))
    assert len(train) == 6920 + 29_000 and len(held_out) == 872 + 1014 and list(train.fields) == ["sentence"]
    second = tfds.records(sets("multi30k"), "train")
    assert train.read([6920 + 5], ["sentence"]) == [{"sentence": second.read([5], ["en"])[0]["en"]}]
    with pytest.raises(UserError, match=r"'sentence' for 2 sets .*, try --data.input-field sentence\+sentence"):
        tfds.records(sets("sst2+multi30k", input_field="sentence"), "train")
    with pytest.raises(UserError, match="got no data.input_field, expected one of de, en"):
        tfds.records(sets("sst2+multi30k"), "train")


def test_a_damaged_record_is_left_out_by_name(sets, caplog):
    texts = tfds.records(sets("sst2"), "eval")
    raw = texts._data.data_source

    class Damaged:
        def __len__(self):
            return len(raw)

        def __getitems__(self, keys):
            wrong = {3: b"\xff torn", 4: raw[4].replace(b"ideas", b"\xff\xff\xff\xff\xff")}
            return [wrong.get(key, raw[key]) for key in keys]

    texts._data.data_source = Damaged()
    assert b"ideas" in raw[4]
    rows, replaced = Reader(texts, ["sentence"], 2).rows([2, 3, 4])
    assert [row.index for row in rows] == [2, 5, 5] and replaced.tolist() == [False, True, True]
    assert "validation, record 3: cannot be read" in caplog.messages[0]
    assert re.search(r"validation, record 4: byte \d+ of a text is not UTF-8", caplog.messages[1])


def test_splits_are_in_tfds_s_notation(sets):
    sizes = {"train[:90%]": 6228, "train[90%:]": 692, "train[:10]+test[-20:]": 30}
    made = [open_source(sets("sst2", seq_len=16, train_split=split), "train", Classification()) for split in sizes]
    assert [len(source) for source in made] == list(sizes.values())
    assert len({source.fingerprint for source in made}) == 3


def test_sentences_become_padded_tokens(sets):
    cfg = sets("sst2", seq_len=64, tokenizer="chars")
    train, held_out = (open_source(cfg, split, Classification()) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (6920, 872) and train.num_classes == 2
    assert train.class_names == ("negative", "positive")
    batch = train.batch(np.array([0]), np.array([0]))
    assert batch["inputs"].dtype == np.int32 and batch["inputs"].shape == (1, 64) and batch["labels"].tolist() == [1]
    text = train.tokenizer.decode(batch["inputs"][0])
    assert text == "a stirring , funny and finally transporting re-imagining of beau"
    short = next(row for row in held_out.batch(np.arange(872), np.zeros(872))["inputs"] if row[-1] == 0)
    assert held_out.tokenizer.decode(np.trim_zeros(short, "b")).endswith(".")


def test_sentences_are_a_text_too(sets):
    train = open_source(sets("sst2", seq_len=64), "train", CausalLM())
    text = train.tokenizer.decode(train.arrays[0])
    assert text.count("\n") == 6920 and text.startswith("a stirring , funny")


def test_reading_needs_no_tensorflow(sets):
    open_source(sets("sst2"), "eval", CausalLM())
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
            "'lable', expected one of label, try --data.label-field label",
        ),
        (CLASSES, "mnist", {"input_field": "imag"}, "expected one of image, try --data.input-field image"),
        (LM, "multi30k", {}, "got no data.input_field, expected one of de, en, try --data.input-field de"),
        (LM, "mnist", {}, r"with the fields image \(image\), label \(label\), expected a text field"),
        (LM, "sst2", {"input_field": "label"}, "which is a label, not a text, expected one of sentence"),
    ],
)
def test_mistakes_are_answered_with_what_is_there(sets, task, name, fields, message):
    with pytest.raises(UserError, match=message):
        open_source(sets(name, **fields), "train", task_of(task))


def test_a_wrong_evaluation_split_names_those_not_trained_on(sets):
    with pytest.raises(UserError, match="'validation', expected one of test, try --data.eval-split test"):
        open_source(sets("mnist"), "eval", Classification())


def test_an_empty_directory_says_so(tmp_path):
    with pytest.raises(UserError, match="expected a prepared set in .*, which has none, try --data.dir"):
        open_source(TFDS(dir=str(tmp_path), name="mnist"), "train", Classification())


def test_a_prepared_directory_can_be_named_itself(sets, shared_data):
    place = shared_data / "tfds" / "sst2" / "1.0.0"
    assert tfds.prepared(TFDS(dir=str(place))) == place
    assert tfds.prepared(TFDS(dir="/elsewhere", name=str(place))) == place
    assert tfds.prepared(sets("sst2:1.0.0")) == tfds.prepared(sets("sst2")) == place


def test_the_newest_version_is_taken(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.0"):
        (tmp_path / "set" / version).mkdir(parents=True)
        (tmp_path / "set" / version / "features.json").write_text("{}")
    assert tfds.prepared(TFDS(dir=str(tmp_path), name="set")).name == "1.10.0"


def test_more_classes_than_the_model_has_are_refused(sets):
    with pytest.raises(UserError, match="got a model of 2 classes, expected .* 10 .*, try --model.classes 10"):
        open_source(sets("mnist", train_split="train[:50]"), "train", Classification(), num_classes=2)


@pytest.mark.parametrize("name", ["train.array_record-00000-of-00001", "dataset_info.json", "features.json"])
@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_set_that_is_half_there_is_refused(shared_data, tmp_path, name, left):
    [place] = (shared_data / "tfds" / "sst2").iterdir()
    here = tmp_path / "sst2" / place.name
    here.mkdir(parents=True)
    for file in place.iterdir():
        raw = file.read_bytes()
        (here / file.name).write_bytes(raw[: int(len(raw) * left)] if file.name.endswith(name) else raw)
    with pytest.raises(UserError, match="got the set in .*, which cannot be read whole"):
        open_source(TFDS(dir=str(tmp_path), name="sst2"), "train", CausalLM(), vocab_size=256)
