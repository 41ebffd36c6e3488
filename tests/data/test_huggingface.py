from __future__ import annotations

import importlib
import io

import numpy as np
import pytest
from PIL import Image

from jaxmodels.config import TFDS, Classification, HuggingFace
from jaxmodels.data import huggingface, open_source
from jaxmodels.errors import UserError


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "picture": datasets.Image(),
            "tags": datasets.List(datasets.ClassLabel(names=["a", "b", "c"])),
            "vector": datasets.List(datasets.Value("float32"), length=2),
            "when": datasets.Value("timestamp[s]"),
        }
    )

    def part(n: int) -> object:
        pictures = [Image.fromarray(np.full((4, 6, 3), i, np.uint8)) for i in range(n)]
        columns = {
            "text": [f"text {i}" if i != 3 else None for i in range(n)],
            "label": [i % 2 for i in range(n)],
            "picture": pictures,
            "tags": [[i % 3, 0] for i in range(n)],
            "vector": [[i, 0.5] for i in range(n)],
            "when": [0] * n,
        }
        return datasets.Dataset.from_dict(columns, features=features)

    datasets.DatasetDict({"train": part(20), "test": part(6)}).save_to_disk(str(tmp_path / "set"))
    part(10).save_to_disk(str(tmp_path / "alone"))
    return tmp_path


def test_features_become_fields_and_values(saved):
    cfg = HuggingFace(name=str(saved / "set"), eval_split="test")
    train, held_out = huggingface.records(cfg, "train"), huggingface.records(cfg, "eval")
    assert (len(train), len(held_out)) == (20, 6) and train.fingerprint != held_out.fingerprint
    assert {name: field.kind for name, field in train.fields.items()} == {
        "text": "text", "label": "label", "picture": "image", "tags": "labels", "vector": "array",
    }  # fmt: skip
    assert train.fields["label"].names == ("no", "yes") and train.fields["vector"].shape == (2,)
    five, bad, four = train.read([5, 3, 4], list(train.fields))
    assert five["text"] == "text 5" and five["label"] == 1 and five["tags"] == (2, 0)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(five["picture"]))), np.full((4, 6, 3), 5))
    assert four["vector"].tolist() == [4, 0.5] and str(bad).endswith("train, record 3: text is missing")
    assert huggingface.records(cfg, "train").fingerprint == train.fingerprint


def test_splits_are_in_the_library_s_notation(saved):
    cfg = TFDS(name=str(saved / "set"), train_split="train[:90%]+test[2:]", eval_split="train[90%:]")
    train, held_out = huggingface.records(cfg, "train"), huggingface.records(cfg, "eval")
    assert (len(train), len(held_out)) == (22, 2)
    assert held_out.read([0], ["text"]) == [{"text": "text 18"}] and train.read([18], ["label"]) == [{"label": 0}]
    alone = TFDS(name=str(saved / "alone"), train_split="train[:8]", eval_split="train[8:]")
    assert [len(huggingface.records(alone, split)) for split in ("train", "eval")] == [8, 2]


def test_a_wrong_split_is_answered_with_those_there_are(saved):
    cfg = TFDS(name=str(saved / "set"), eval_split="tets")
    with pytest.raises(UserError, match="'tets', expected one of train, test, try --data.eval-split test"):
        huggingface.records(cfg, "eval")


def test_without_the_library_the_extra_is_named(monkeypatch):
    real = importlib.import_module

    def without(name: str, *args: object) -> object:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(huggingface, "import_module", without)
    with pytest.raises(UserError, match=r"try pip install 'jaxmodels\[huggingface\]'"):
        huggingface.records(TFDS(name="mnist"), "train")


def test_labels_that_are_not_known_are_ignored_and_those_below_0_without_names_refused(tmp_path, caplog):
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"text {i}" for i in range(8)], "label": [-1, 1, 0, 1, -1, 1, 1, 0]}
    for kind in (datasets.ClassLabel(names=["no", "yes"]), datasets.Value("int64")):
        features = datasets.Features({"text": datasets.Value("string"), "label": kind})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / type(kind).__name__))

    def opened(name: str) -> np.ndarray:
        cfg = HuggingFace(name=str(tmp_path / name), seq_len=8)
        return open_source(cfg, "train", Classification(), vocab_size=256).batch(np.arange(8), np.zeros(8))["labels"]

    assert opened("ClassLabel").tolist() == rows["label"]
    assert "2 of 8 examples of huggingface" in caplog.messages[0] and "have no label (-1)" in caplog.messages[0]
    with pytest.raises(UserError, match="got -1 as label in huggingface .*, expected numbers of classes from 0 on"):
        opened("Value")


@pytest.mark.parametrize("several", [False, True])
def test_texts_that_are_labels_are_classes_of_the_training_split(tmp_path, several, caplog):
    datasets = pytest.importorskip("datasets")
    wrap = (lambda name: [name]) if several else (lambda name: name)

    def part(names: list[str]) -> object:
        return datasets.Dataset.from_dict({"text": [f"t {n}" for n in names], "label": [wrap(n) for n in names]})

    whole = datasets.DatasetDict(
        {"train": part(["pos", "neg", "so so"] * 4), "validation": part(["so so", "new", "neg"])}
    )
    whole.save_to_disk(str(tmp_path / "set"))
    cfg = HuggingFace(name=str(tmp_path / "set"), train_split="train", eval_split="validation")
    train, held_out = (huggingface.records(cfg, split) for split in ("train", "eval"))
    assert train.fields["label"] == held_out.fields["label"]
    assert train.fields["label"].names == ("neg", "pos", "so so")
    first = [(i,) if several else i for i in (1, 0, 2)]
    assert [row["label"] for row in train.read([0, 1, 2], ["label"])] == first
    found = held_out.read([0, 1, 2], ["label"])
    assert [row["label"] for row in (found[0], found[2])] == [first[2], first[1]]
    assert "label is 'new', expected one of neg, pos, so so" in str(found[1])
