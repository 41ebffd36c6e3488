"""The functional contract: published sizes, plain trees, logical axes, and mistakes that are named."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models import families
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mlp import MLPConfig

# the sizes of the weights as published: GPT-2's and LLaMA's releases, GPT-3's table 2.1 as 175.0B
PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    # as transformers counts the published weights
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "resnet-18": 11_689_512,
    "resnet-34": 21_797_672,
    "resnet-50": 25_557_032,
    "resnet-101": 44_549_160,
    "resnet-152": 60_192_808,
    "vgg-11": 132_863_336,
    "vgg-13": 133_047_848,
    "vgg-16": 138_357_544,
    "vgg-19": 143_667_240,
    "vgg-11-bn": 132_868_840,
    "vgg-13-bn": 133_053_736,
    "vgg-16-bn": 138_365_992,
    "vgg-19-bn": 143_678_248,
}
NAMED = {
    "125m": 125e6,
    "350m": 350e6,
    "760m": 760e6,
    "1.3b": 1.3e9,
    "2.7b": 2.7e9,
    "6.7b": 6.7e9,
    "13b": 13e9,
    "175b": 175e9,
}
QUICK = {"xla_backend_optimization_level": 0}  # LLVM's optimizations take longer than all else here
TINY = {
    "gpt2": GPT2Config(layers=2, width=16, heads=2, vocab_size=31, context=8),
    "llama": LlamaConfig(layers=2, width=16, heads=2, kv_heads=1, mlp_width=24, vocab_size=31),
    "mlp": MLPConfig(input_shape=(3, 3, 1), classes=4, hidden=(5, 6)),
}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_a_preset_has_its_published_number_of_parameters(name, published):
    assert jaxmodels.create(name).count() == published


@pytest.mark.parametrize("name", NAMED)
def test_gpt3_presets_have_the_size_of_their_name(name):
    assert jaxmodels.create(f"gpt3-{name}").count() == pytest.approx(NAMED[name], rel=0.025)


def test_every_preset_is_listed_and_can_be_made():
    listed = jaxmodels.list_models()
    assert set(listed) == set(families.FAMILIES.names())
    assert set(PUBLISHED) <= {name for names in listed.values() for name in names}
    for family, names in listed.items():
        for name in [family, *names]:
            assert families.family_of(jaxmodels.create(name).config).name == family


def test_paths_read_as_what_they_are():
    def paths(name):
        flat = jax.tree_util.tree_leaves_with_path(jaxmodels.create(TINY[name]).shapes())
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}

    block = {f"layers/attn/{name}/{leaf}" for name in "qkvo" for leaf in "wb"}
    block |= {f"layers/mlp/{name}/{leaf}" for name in ("up", "down") for leaf in "wb"}
    norms = {f"{name}/{leaf}" for name in ("layers/attn_norm", "layers/mlp_norm", "norm") for leaf in ("scale", "bias")}
    assert paths("gpt2") == {"embed/w", "positions/w"} | block | norms
    assert paths("llama") == {"embed/w", "head/w", "norm/scale", "layers/attn_norm/scale", "layers/mlp_norm/scale"} | {
        f"layers/attn/{name}/w" for name in "qkvo"
    } | {f"layers/mlp/{name}/w" for name in ("gate", "up", "down")}
    assert paths("mlp") == {f"{name}/{leaf}" for name in ("hidden0", "hidden1", "head") for leaf in "wb"}


def test_parameters_are_float32_whatever_the_compute_dtype():
    for config in TINY.values():
        shapes = jaxmodels.create(dataclasses.replace(config, dtype="bfloat16")).shapes()
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_overrides_change_a_preset():
    model = jaxmodels.create("gpt2-small", layers=2, vocab_size=50304)
    assert model.config == GPT2Config(layers=2, vocab_size=50304)
    assert model.count() == jaxmodels.create("gpt2").count() - 10 * 7_087_872 + 47 * 768


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: jaxmodels.create("gpt2-smal"), ("'gpt2-smal'", "did you mean 'gpt2-small'?")),
        (lambda: jaxmodels.create("lama3-8b"), ("'lama3-8b'", "did you mean 'llama3-8b'?")),
        (lambda: jaxmodels.create("gpt2", layer=2), ("'layer'", "did you mean 'layers'?")),
        (lambda: jaxmodels.create("llama", kv_head=2), ("'kv_head'", "did you mean 'kv_heads'?")),
        (lambda: jaxmodels.create("gpt2", heads=7), ("heads 7", "width 768", "try heads 6")),
        (lambda: jaxmodels.create("llama", heads=12), ("heads 12", "width 4096", "try heads 8")),
        (lambda: jaxmodels.create("llama", kv_heads=5), ("kv_heads 5", "heads 32", "try kv_heads 4")),
        (lambda: jaxmodels.create("llama", kv_heads=0), ("kv_heads 0", "try --model.kv-heads 1")),
        (lambda: jaxmodels.create("llama", heads=32, width=96), ("head size 3", "even")),
        (lambda: families.family("lama"), ("'lama'", "did you mean 'llama'?")),
        (lambda: jaxmodels.create(3), ("got model config 3", "gpt2")),
        (lambda: jaxmodels.create("mlp").cache(1, 8), ("cache for mlp",)),
    ],
)
def test_a_mistake_is_named_with_what_would_do(mistake, words):
    with pytest.raises(UserError) as error:
        mistake()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_model_with_no_state_of_its_own_gives_back_empty_statistics():
    model = jaxmodels.create(TINY["mlp"])
    params, x = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), model.shapes()), jnp.ones((2, 3, 3, 1))
    assert model.stats() == {}
    logits, stats = model.apply(params, x, stats={})
    assert stats == {}
    np.testing.assert_array_equal(logits, model.apply(params, x))


def test_import_loads_jax_and_flax_and_nothing_else():
    code = """
import json, sys
import jax, flax.linen
before = set(sys.modules)
import jaxmodels
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
heavy = {"orbax", "tensorflow_datasets", "matplotlib", "grain", "rich", "tyro", "optax", "tokenizers", "tensorboardX"}
print(json.dumps([sorted(new), sorted(heavy & new)]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    new, heavy = json.loads(out.stdout)
    assert heavy == []
    assert new == ["jaxmodels"]


def test_flax_is_imported_in_the_models_alone(root):
    outside = [path for path in (root / "jaxmodels").rglob("*.py") if path.parts[-2] not in ("models", "kernels")]
    assert outside
    users = [path.name for path in outside if "import flax" in path.read_text() or "from flax" in path.read_text()]
    assert users == []


MADE_OF = {"detr": {"resnet"}, "rt_detr": {"resnet", "detr"}, "multimodal": {"clip", "llama", "whisper"}}
"""Families whose backbone, towers or decoder are networks of other ones."""


def test_a_family_is_one_file_that_knows_no_other_family_but_what_it_is_made_of(root):
    for name in families.FAMILIES.names():
        text = (root / "jaxmodels" / "models" / f"{name}.py").read_text()
        others = {other for other in families.FAMILIES.names() if f"jaxmodels.models.{other} " in text}
        assert others == MADE_OF.get(name, set()), name
