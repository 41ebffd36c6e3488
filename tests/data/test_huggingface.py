from __future__ import annotations

import importlib
import io

import numpy as np
import pytest
from PIL import Image

from jaxmodels.config import DataConfig
from jaxmodels.data import huggingface
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
    cfg = DataConfig(source="huggingface", name=str(saved / "set"), eval_split="test")
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
    cfg = DataConfig(name=str(saved / "set"), train_split="train[:90%]+test[2:]", eval_split="train[90%:]")
    train, held_out = huggingface.records(cfg, "train"), huggingface.records(cfg, "eval")
    assert (len(train), len(held_out)) == (22, 2)
    assert held_out.read([0], ["text"]) == [{"text": "text 18"}] and train.read([18], ["label"]) == [{"label": 0}]
    alone = DataConfig(name=str(saved / "alone"), train_split="train[:8]", eval_split="train[8:]")
    assert [len(huggingface.records(alone, split)) for split in ("train", "eval")] == [8, 2]


def test_a_wrong_split_is_answered_with_those_there_are(saved):
    cfg = DataConfig(name=str(saved / "set"), eval_split="tets")
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
        huggingface.records(DataConfig(name="mnist"), "train")
