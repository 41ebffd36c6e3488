"""Each mistake in a directory of Hugging Face's format is named in one line, before anything is read."""

import dataclasses
import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels.config import Mesh
from jaxmodels.errors import UserError
from jaxmodels.hf import beside, files, save
from jaxmodels.models.vit import ViTConfig
from jaxmodels.parallel.mesh import make_mesh
from tests.hf.small import GPT2, LLAMA, change, saved


@pytest.fixture
def folder(tmp_path):
    saved(GPT2, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_full_disk_is_no_fault_of_the_file_that_is_copied(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / "generation_config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        beside.keep(folder, tmp_path / "run")


def test_all_that_is_wrong_is_named_at_once_before_anything_is_read(folder, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.ln_1.bias"]
    del tensors["transformer.wpe.weight"]
    tensors["transformer.h.2.ln_1.bias"] = np.zeros(16, np.float32)
    tensors["score.weight"] = np.zeros((2, 16), np.float32)
    tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T.copy()
    tensors["ln_f.bias"] = tensors["transformer.ln_f.bias"]
    tensors["transformer.h.1.mlp.c_fc.bias"] = np.zeros(64, np.int8)
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(files.Tensor, "read", None)
    monkeypatch.setattr(files.Tensor, "read_into", None)
    with pytest.raises(UserError) as error:
        jaxmodels.load_pretrained(folder)
    message = str(error.value)
    for words in (
        "missing: transformer.wpe.weight, transformer.h.1.ln_1.bias;",
        "unknown: score.weight, transformer.h.2.ln_1.bias;",
        "there twice: ln_f.bias (model.safetensors) and transformer.ln_f.bias (model.safetensors);",
        "of another shape: transformer.h.0.mlp.c_fc.weight is [64, 16], expected [16, 64];",
        "transformer.h.1.mlp.c_fc.bias is I8;",
    ):
        assert words in message, message
    assert "\n" not in message


# ---- several files


@pytest.fixture
def shards(tmp_path):
    saved(GPT2, tmp_path / "s", shard_size=8_000)
    return tmp_path / "s"


def rewrite(folder, change):
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    change(value["weight_map"])
    path.write_text(json.dumps(value))


def test_every_missing_shard_is_named(shards):
    folder = shards
    gone = sorted(folder.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    with pytest.raises(UserError, match=f"no file {gone[0].name}.*, no file {gone[1].name}"):
        jaxmodels.load_pretrained(folder)


def test_a_tensor_in_two_shards_is_named(shards):
    folder = shards
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is in {second.name}, but .*index.json says {first.name}"):
        jaxmodels.load_pretrained(folder)


def test_an_index_that_disagrees_with_its_shards_is_named(shards):
    folder = shards

    def lose(where):
        del where["transformer.ln_f.bias"]
        where["transformer.ln_g.bias"] = next(iter(where.values()))

    rewrite(folder, lose)
    with pytest.raises(UserError) as error:
        jaxmodels.load_pretrained(folder)
    assert "transformer.ln_f.bias is in" in str(error.value)
    assert "does not name it" in str(error.value)
    assert re.search(r"transformer.ln_g.bias is not in model-00001-\S+, where", str(error.value))


# ---- damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-10], "is cut short"),
        (lambda data: data[:5], "no safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "no safetensors file"),
        (lambda data: data[:8] + b"x" + data[9:], "header that cannot be read"),
        (lambda data: data.replace(b'"shape":[16,16]', b'"shape":[16,15]', 1), "are not those of its shape"),
    ],
)
def test_a_damaged_file_is_named(folder, damage, words):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"damaged files: model.safetensors.*{words}") as error:
        jaxmodels.load_pretrained(folder)
    assert "missing" not in str(error.value).replace("is missing", "")


def test_what_is_no_such_directory_is_named(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match=r"got 'openai/gpt2', expected a directory.*try hf download openai/gpt2"):
        jaxmodels.load_pretrained("openai/gpt2")
    with pytest.raises(UserError, match=r"expected a directory with config.json"):
        jaxmodels.load_pretrained(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file model.safetensors \(there is pytorch_model.bin"):
        jaxmodels.load_pretrained(folder)
    change(folder, model_type="gpt3")
    with pytest.raises(UserError, match=r"got model_type 'gpt3', expected one of gpt2"):
        jaxmodels.load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json, expected JSON"):
        jaxmodels.load_pretrained(folder)

    def locked(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", locked)
    with pytest.raises(UserError, match=r"config.json, which cannot be read \(Permission denied\), expected JSON"):
        jaxmodels.load_pretrained(folder)


# ---- settings


def test_settings_that_are_not_computed_are_named_at_once(tmp_path):
    saved(LLAMA, tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    change(tmp_path, rope_parameters=yarn, hidden_act="gelu", attention_bias=True, hidden_size="16")
    with pytest.raises(UserError) as error:
        jaxmodels.load_pretrained(tmp_path)
    for words in ('rope_type "yarn"', 'hidden_act "gelu"', "attention_bias true", 'hidden_size "16"'):
        assert words in str(error.value)


def test_a_number_of_labels_is_one_also_where_the_labels_have_names(tmp_path):
    saved(ViTConfig(classes=3, layers=1, width=16, heads=2, mlp_width=24, patch=16, input_shape=(32, 32, 3)), tmp_path)
    for wrong in (False, 2.5, "3", 0):
        change(tmp_path, num_labels=wrong)
        with pytest.raises(UserError, match="num_labels"):
            jaxmodels.load_pretrained(tmp_path)


def test_a_model_that_transformers_lacks_is_refused_in_one_line(tmp_path):
    for model, words in (
        (jaxmodels.create("mlp-mnist"), "got a model of family mlp, which transformers does not have"),
        (jaxmodels.create("transformer-base"), "variant 'original'"),
        (jaxmodels.create("resnet-18", stem="small"), "stem 'small'"),
        (jaxmodels.create("bert-base", pool="mean"), "pool 'mean'.* expected pool first, try .*--model.pool first"),
        (jaxmodels.create(LLAMA, qkv_bias=True, qk_norm=True), "qkv_bias with qk_norm"),
    ):
        with pytest.raises(UserError, match=words):
            save.save_pretrained(tmp_path, model, {})
    assert list(tmp_path.iterdir()) == []


# ---- meshes


def test_a_mesh_that_does_not_divide_a_parameter_is_refused(tmp_path):
    saved(dataclasses.replace(GPT2, vocab_size=17), tmp_path)
    with pytest.raises(UserError, match="embed/w with dimension vocab=17"):
        jaxmodels.load_pretrained(tmp_path, mesh=make_mesh(Mesh(tensor=2)))
