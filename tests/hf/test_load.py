"""Reading Hugging Face's format: every name, type and layout of files, onto any mesh."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels import hf
from jaxmodels.config import Mesh
from jaxmodels.errors import UserError
from jaxmodels.hf import save
from jaxmodels.hf.load import leaves_of
from jaxmodels.hf.table import Settings, Weight, expand
from jaxmodels.models import families
from jaxmodels.models.llama import RopeScaling
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.parallel.mesh import make_mesh
from tests.hf.small import GPT2, LLAMA, change, filled, same, saved


@pytest.fixture
def folder(tmp_path):
    saved(GPT2, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_row_is_read_both_ways():
    shapes = {"q": (3, 4, 2, 5), "k": (3, 4, 2, 5), "v": (3, 4, 2, 5)}
    slots = list(expand(Weight("h.{layer}.w", ("q", "k", "v"), "d (n h k) -> n d h k"), shapes))
    assert [(slot.name, slot.shape) for slot in slots] == [(f"h.{i}.w", (4, 30)) for i in range(3)]
    theirs = np.arange(120).reshape(4, 30)
    q, k, v = slots[1].ours(theirs)
    assert k.shape == (4, 2, 5)
    assert k[3, 1, 2] == theirs[3, 10 + 5 + 2]
    leaves = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for name, part in zip("qkv", (q, k, v), strict=True):
        leaves[name][1] = part
    np.testing.assert_array_equal(slots[1].theirs(leaves), theirs)


@pytest.mark.parametrize("config", [GPT2, LLAMA, dataclasses.replace(LLAMA, tied=False, qkv_bias=True, window=3)])
def test_what_was_written_is_read_back_bit_for_bit(config, tmp_path):
    _, params = saved(config, tmp_path)
    again, loaded = jaxmodels.load_pretrained(tmp_path)
    assert again.config == config
    same(loaded, params)


def test_the_file_is_that_of_the_safetensors_library(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (16, 48)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(tensors, tmp_path / "again", {"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_parameters_are_float32_whatever_the_type_of_the_file(folder, kind):
    exact = load_file(folder / "model.safetensors")
    rounded = {
        name: np.asarray(jnp.asarray(x, kind) if kind != "float64" else x.astype(kind)) for name, x in exact.items()
    }
    save_file(rounded, folder / "model.safetensors")
    _, params = jaxmodels.load_pretrained(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    wte = np.asarray(params["embed"]["w"])
    np.testing.assert_array_equal(wte, rounded["transformer.wte.weight"].astype(np.float32))
    assert (kind == "float64") == np.array_equal(wte, exact["transformer.wte.weight"])


def test_names_of_a_body_without_its_head_are_known(folder):
    _, expected = jaxmodels.load_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    # what old files hold beside the weights
    tensors |= {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8), "h.1.attn.masked_bias": np.array(-1e4, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    _, params = jaxmodels.load_pretrained(folder)
    same(params, expected)


def test_a_tied_weight_is_written_once_and_may_be_there_twice_if_equal(tmp_path):
    _, expected = saved(LLAMA, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding}, tmp_path / "model.safetensors")
    same(jaxmodels.load_pretrained(tmp_path)[1], expected)
    save_file({**tensors, "lm_head.weight": embedding + np.eye(16, dtype=np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tied to another, but different: lm_head.weight differs from model.embed_tok"):
        jaxmodels.load_pretrained(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    same(jaxmodels.load_pretrained(tmp_path)[1], expected)


def test_an_output_layer_that_is_not_tied_is_another_weight(tmp_path):
    saved(dataclasses.replace(LLAMA, tied=False), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    _, params = jaxmodels.load_pretrained(tmp_path)
    np.testing.assert_array_equal(params["head"]["w"], tensors.pop("lm_head.weight"))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing: lm_head.weight"):
        jaxmodels.load_pretrained(tmp_path)


def test_an_override_may_change_how_but_not_what(folder):
    model, params = jaxmodels.load_pretrained(folder, dtype="bfloat16", remat="full", dropout=0.5)
    assert (model.config.dtype, model.config.remat, model.config.dropout) == ("bfloat16", "full", 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    with pytest.raises(UserError, match=r"missing: transformer.h.2.*of another shape") as error:
        jaxmodels.load_pretrained(folder, layers=3, vocab_size=20)
    assert "transformer.wte.weight is [16, 16], expected [20, 16]" in str(error.value)
    with pytest.raises(UserError, match="did you mean 'layers'"):
        jaxmodels.load_pretrained(folder, layer=3)


# ---- several files


@pytest.fixture
def shards(tmp_path):
    _, params = saved(GPT2, tmp_path / "s", shard_size=8_000)
    return tmp_path / "s", params


def test_shards_are_of_the_size_asked_for_and_read_by_their_index(shards):
    folder, params = shards
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 8_000 + 3_000  # and a header
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    same(jaxmodels.load_pretrained(folder)[1], params)


# ---- settings


def test_layers_that_slide_and_layers_that_do_not_are_refused(tmp_path):
    saved(dataclasses.replace(LLAMA, qkv_bias=True, window=3), tmp_path)
    assert jaxmodels.load_pretrained(tmp_path)[0].config.window == 3
    change(tmp_path, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(UserError, match="layer_types that differ"):
        jaxmodels.load_pretrained(tmp_path)
    change(tmp_path, layer_types=None, max_window_layers=1)
    with pytest.raises(UserError, match="layer_types that differ"):
        jaxmodels.load_pretrained(tmp_path)
    change(tmp_path, max_window_layers=2)
    assert jaxmodels.load_pretrained(tmp_path)[0].config.window is None


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"kv_heads": None, "window": None, "rope_theta": 1e4, "norm_eps": 1e-6}),
        ("mistral", {"kv_heads": 8, "window": 4096, "rope_theta": 1e4, "norm_eps": 1e-6}),
        ("qwen2", {"kv_heads": None, "window": None, "qkv_bias": True}),
        ("qwen3", {"kv_heads": None, "window": None, "qk_norm": True, "head_dim": 128}),
        ("mixtral", {"kv_heads": 8, "window": None, "rope_theta": 1e6, "norm_eps": 1e-5, "experts": 8}),
    ],
)
def test_settings_that_config_json_leaves_out_are_those_of_transformers(kind, fields):
    values = {"model_type": kind, "vocab_size": 16, "num_hidden_layers": 1, "num_attention_heads": 32}
    settings = Settings({**values, "hidden_size": 2048, "intermediate_size": 24}, "config.json")
    config = hf.format_of(hf.family_of(kind), kind).config(settings)
    assert {name: getattr(config, name) for name in fields} == fields


def test_rotary_settings_of_before_version_5_are_read(tmp_path):
    scaling = RopeScaling(8.0, 1.0, 4.0, 32)
    saved(dataclasses.replace(LLAMA, rope_theta=500.0, rope_scaling=scaling), tmp_path)
    for newer in (True, False):
        values = json.loads((tmp_path / "config.json").read_text())
        change(tmp_path, **{"rope_parameters" if newer else "rope_scaling": values["rope_parameters"]})
        if not newer:
            change(tmp_path, rope_parameters=None)
        config = jaxmodels.load_pretrained(tmp_path)[0].config
        assert (config.rope_theta, config.rope_scaling) == (500.0, scaling)


def test_rotary_settings_of_before_count_where_a_file_of_version_5_has_both(tmp_path):
    """As in transformers: cards of models ask to add rope_scaling to config.json, whatever else is there."""
    saved(LLAMA, tmp_path)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    change(tmp_path, rope_theta=500.0, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    assert jaxmodels.load_pretrained(tmp_path)[0].config.rope_theta == 77.0
    change(tmp_path, rope_scaling={**scaling, "original_max_position_embeddings": 32})
    config = jaxmodels.load_pretrained(tmp_path)[0].config
    assert (config.rope_theta, config.rope_scaling) == (500.0, RopeScaling(8.0, 1.0, 4.0, 32))
    change(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(UserError, match='rope_type "yarn"'):
        jaxmodels.load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_a_decoder_that_sees_what_comes_is_refused(kind, root):
    values = json.loads((root / "tests" / "golden" / kind / "config.json").read_text())
    settings = Settings({**values, "is_causal": False}, "config.json")
    with pytest.raises(UserError, match="is_causal false .computed here: true"):
        hf.format_of(hf.family_of(kind), kind).config(settings)


def test_settings_are_read_under_the_other_names_that_transformers_gives_them(tmp_path):
    """Heads above all, since no tensor's shape depends on their number."""
    saved(GPT2, tmp_path)
    change(tmp_path, n_head=None, n_positions=None, num_attention_heads=2, max_position_embeddings=GPT2.context)
    assert jaxmodels.load_pretrained(tmp_path)[0].config == dataclasses.replace(GPT2, heads=2)
    change(tmp_path, n_head=4)  # transformers sets the other name last
    assert jaxmodels.load_pretrained(tmp_path)[0].config.heads == 2


def test_the_context_before_scaling_counts_beside_the_other_rotary_settings(tmp_path):
    saved(dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)), tmp_path)
    change(tmp_path, original_max_position_embeddings=8)
    assert jaxmodels.load_pretrained(tmp_path)[0].config.rope_scaling.original_context == 8


@pytest.mark.parametrize("contradiction", [{"dense_act_fn": "silu"}, {"is_gated_act": True}, {"is_gated_act": "no"}])
def test_what_transformers_derives_from_a_t5_s_activation_must_agree_with_it(root, tmp_path, contradiction):
    """A file that says something else is computed otherwise there."""
    shutil.copytree(root / "tests" / "golden" / "t5", tmp_path / "t5")
    change(tmp_path / "t5", feed_forward_proj="relu", dense_act_fn="relu", is_gated_act=False)
    jaxmodels.load_pretrained(tmp_path / "t5")
    change(tmp_path / "t5", **contradiction)
    with pytest.raises(UserError, match=f'{next(iter(contradiction))} .*expected: .* with feed_forward_proj "relu"'):
        jaxmodels.load_pretrained(tmp_path / "t5")


# ---- meshes


@pytest.mark.parametrize("mesh", [Mesh(fsdp=4, tensor=2, data=1), Mesh(data=2, fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_onto_a_mesh_each_device_gets_its_part(config, mesh, tmp_path):
    from jaxmodels.parallel import rules

    model, params = saved(config, tmp_path)
    where = make_mesh(mesh)
    _, loaded = jaxmodels.load_pretrained(tmp_path, mesh=where)
    same(loaded, params)
    placed = rules.shardings_of(where, model.axes(), model.shapes())
    jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim) or 1 / 0, loaded, placed)
    up = loaded["layers"]["mlp"]["up"]["w"]
    assert {shard.data.size * mesh.fsdp * mesh.tensor for shard in up.addressable_shards} == {up.size}


def test_loaded_parameters_may_be_donated(folder):
    _, params = jaxmodels.load_pretrained(folder)
    expected = jax.tree.map(lambda x: np.array(x) * 2 + 1, params)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x * 2 + 1, p), donate_argnums=0)
    same(step(params), expected)


# ---- statistics


def test_batch_statistics_come_with_the_model(tmp_path):
    config = ResNetConfig(input_shape=(16, 16, 3), classes=3, depths=(1, 2), widths=(8, 16), stem_width=8)
    model = jaxmodels.create(config)
    params, rng = filled(model), np.random.default_rng(1)
    stats = jax.tree.map(lambda x: rng.random(x.shape, np.float32) + 0.5, jax.eval_shape(model.stats))
    save.save_pretrained(tmp_path, model, params, stats)
    for mesh in (None, make_mesh(Mesh(fsdp=2))):
        again, loaded = jaxmodels.load_pretrained(tmp_path, mesh=mesh)
        assert again.config == config
        same(loaded, params)
        same(again.stats(), stats)


# ---- the room


def test_what_can_be_read_is_known_without_loading_anything():
    code = "import sys, jaxmodels; from jaxmodels import hf; hf.supported(); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "'jaxmodels.hf'" in out
    assert "einops" not in out
    assert "safetensors" not in out


# the first published model of each family, and of transformers' other encoder-decoder
PRESETS = {family: next(iter(families.family(family).presets)) for family in hf.supported()}


@pytest.mark.parametrize("name", [*({**PRESETS, "transformer": "t5-small"}).values(), "bart-base"])
def test_a_table_names_every_parameter_once_and_tells_its_own_model_type(name):
    config = families.preset(name)
    family = families.family_of(config).name
    model, form = jaxmodels.create(config), hf.format_for(config)
    shapes = {path: leaf.shape for path, leaf in leaves_of(model).items()}
    slots = [slot for row in form.slots(config, shapes) for slot in row]
    assert sum(math.prod(slot.shape) for slot in slots) == sum(math.prod(shape) for shape in shapes.values())
    assert len({slot.name for slot in slots}) == len(slots)
    assert form.describe(config)["model_type"] in hf.supported()[family]
    assert hf.family_of(form.describe(config)["model_type"]) == family


def test_neither_torch_nor_transformers_is_used(root):
    for path in (root / "jaxmodels").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (torch|transformers)\b", path.read_text(), re.M), path
