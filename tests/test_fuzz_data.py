"""Damage to files of data, or to published weights, ends in one line, or in records that are left out by name."""

import gzip
import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxmodels import data as sets
from jaxmodels.data import given as files
from jaxmodels.data.tokenizer import Bytes
from jaxmodels.hf import beside, load
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.llama import LlamaConfig
from tests.fuzzing import damaged, drawn, taken_or_refused, tree
from tests.hf.small import saved
from tests.sections import data_of, task_of

ROWS = [{"text": f'word {i}, "said"', "label": "ab"[i % 2], "x": [i / 9, 1.0]} for i in range(24)]


def table(folder, suffix):
    path = folder / f"a.{suffix}"
    if suffix == "csv":
        rows = ('"{}",{}'.format(row["text"].replace('"', '""'), row["label"]) for row in ROWS)
        path.write_text("text,label\n" + "\n".join(rows) + "\n")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        arrow = pytest.importorskip("pyarrow")
        arrow.parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    return path


def picture(i, kind):
    out = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), 9 * i, np.uint8)).save(out, kind)
    return out.getvalue()


def read_all(source, path, task, split, **model):
    """Every example of a split, as training takes them."""
    cfg = data_of(source, path=(str(path),), seq_len=8, eval_fraction=0.3)
    made = sets.open_source(cfg, split, task_of(task), **model)
    if len(made):
        made.batch(np.arange(len(made)), np.zeros(len(made), np.int64))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@drawn(40)
@given(data=st.data())
def test_a_damaged_table(tmp_path_factory, suffix, data):
    pytest.importorskip("pyarrow.parquet")
    path = table(tmp_path_factory.mktemp("table"), suffix)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    split = data.draw(st.sampled_from(["train", "eval"]))
    what = data.draw(st.sampled_from([{"vocab_size": 256}, {"inputs_shape": (2,)}]))
    taken_or_refused(read_all, "table", path, "classification", split, num_classes=2, **what)
    taken_or_refused(lambda: list(files.records([str(path)], "text", "", "text")))
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("kind", ["png", "jpeg", "idx", "idx.gz"])
@drawn(20)
@given(data=st.data())
def test_a_damaged_image(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("images")
    if kind.startswith("idx"):
        pack, end = (gzip.compress, ".gz") if kind == "idx.gz" else (bytes, "")
        images = bytes((0, 0, 8, 3)) + np.array([24, 5, 4], ">u4").tobytes() + bytes(range(240)) * 2
        labels = bytes((0, 0, 8, 1)) + np.array([24], ">u4").tobytes() + bytes([0, 1] * 12)
        (folder / f"train-images-idx3-ubyte{end}").write_bytes(pack(images))
        (folder / f"train-labels-idx1-ubyte{end}").write_bytes(pack(labels))
        shape = (5, 4, 1)
    else:
        for i in range(24):
            (folder / "ab"[i % 2]).mkdir(exist_ok=True)
            (folder / "ab"[i % 2] / f"{i}.{kind}").write_bytes(picture(i, kind))
        shape = (6, 5, 3)
    path = data.draw(st.sampled_from(sorted(each for each in folder.rglob("*") if each.is_file())))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    model = {"num_classes": 2, "inputs_shape": shape}
    for split in ("train", "eval"):
        taken_or_refused(read_all, "images", folder, "classification", split, **model)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["a.bin.json", "a.bin", "a.npy", "a.npy.json", "tokenizer.json"])
@drawn(25)
@given(data=st.data())
def test_a_damaged_file_of_tokens(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("tokens")
    stem = name if name.endswith((".bin", ".npy")) else name.removesuffix(".json") if name[0] == "a" else "a.bin"
    if stem == "a.bin":
        np.arange(200, dtype=np.uint8).tofile(folder / stem)
    else:
        np.save(folder / stem, np.arange(200, dtype=np.int32))
    facts = {"dtype": "uint8", "vocab_size": 256, "tokenizer": "tokenizer.json", "tokens": 200, "source": "text"}
    (folder / f"{stem}.json").write_text(json.dumps(facts))
    Bytes().save(folder)
    (folder / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    for split in ("train", "eval"):
        taken_or_refused(read_all, "tokens", folder / stem, "causal_lm", split, vocab_size=256)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Directories of transformers with all that may lie beside weights."""
    from jaxmodels.data import tokenizer

    folder = tmp_path_factory.mktemp("published")
    llama = LlamaConfig(vocab_size=280, layers=1, width=16, heads=2, kv_heads=1, mlp_width=24, context=16)
    bert = BERTConfig(
        vocab_size=280, layers=1, width=16, heads=2, mlp_width=24, context=16, head="classification", classes=2
    )
    for name, model in (("llama", llama), ("bert", bert)):
        saved(model, folder / name)
        words = tokenizer.train_bpe(["one two three four"] * 5, 280, folder / name / tokenizer.FILE)
        assert words.vocab_size <= 280
        for file, values in {
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0},
            "tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}, "model_max_length": 16},
            "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
        }.items():
            (folder / name / file).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "config.json"),
        ("bert", "config.json"),
        ("bert", "model.safetensors"),
        ("llama", "tokenizer.json"),
        ("llama", "beside"),
    ],
)
@drawn(8)
@given(data=st.data())
def test_damaged_weights(published, tmp_path_factory, model, name, data):
    folder = tmp_path_factory.mktemp("damaged") / "in"
    shutil.copytree(published / model, folder)
    if name == "beside":
        name = data.draw(
            st.sampled_from(["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
        )
    whole = (folder / name).read_bytes()
    if name == "model.safetensors":
        end = 8 + int.from_bytes(whole[:8], "little")
        header = data.draw(damaged(whole[8:end]))
        length = data.draw(st.sampled_from([len(header)] * 3 + [0, 2**62, end]))
        (folder / name).write_bytes(length.to_bytes(8, "little") + header + whole[end:])
    else:
        (folder / name).write_bytes(data.draw(damaged(whole)))
    before, out = tree(folder), folder.parent / "out"
    out.mkdir()

    def take():
        load.read(load.open_source(folder))
        beside.keep(folder, out)
        made = sets.load_tokenizer(folder)
        made.decode(made.encode("one two"))

    taken_or_refused(take)
    assert tree(folder) == before
    shutil.rmtree(folder.parent)
