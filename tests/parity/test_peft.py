"""Adapters of peft come in with its logits, and ours go out with them; what does not fit is refused by name."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.compress.adapters import adaptation
from jaxmodels.config import Config, LoRA, Synthetic
from jaxmodels.errors import UserError
from jaxmodels.hf import peft_load, peft_save
from jaxmodels.models.adapted import Factors, join
from jaxmodels.train.adapters import load_adapters, resolved

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")
peft = pytest.importorskip("peft", reason="needs the parity extra: peft")

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
V, B, T = 31, 2, 7
EAGER = {"attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZES = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    # square matrices everywhere, whose factors could be taken the wrong way round
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=9, n_inner=24, **EAGER)
    ),
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=V, **SIZES, num_key_value_heads=4, max_position_embeddings=9, **EAGER)
    ),
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=V, **SIZES, max_position_embeddings=9, num_labels=3, **EAGER)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=V, d_model=24, d_kv=6, d_ff=24, num_layers=2, num_heads=4)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3, attn_implementation="eager")
    ),
}
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc", "wpe"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
    "bert": ["query", "value", "dense", "word_embeddings"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "vit": r".*(query|value|q_proj|v_proj|dense|fc1|fc2|projection)",
}
WHOLE = {"bert": ["classifier"], "vit": ["classifier"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Directories of the models, made when they are asked for."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def one(name):
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(folder / name)
        return folder / name

    return one


def theirs(name, directory, adapter=None):
    """Their model of a directory, with an adapter."""
    model = type(MODELS[name]()).from_pretrained(directory, attn_implementation="eager")
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)).eval()


def saved(name, directory, where, **settings):
    """An adapter of peft all of whose tensors matter."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=TARGETS[name],
        modules_to_save=WHOLE.get(name),
        init_lora_weights=False,
        **settings,
    )
    model = peft.get_peft_model(theirs(name, directory), config)
    with torch.no_grad():
        for key, x in model.named_parameters():
            if "lora" in key or "modules_to_save" in key:
                x += 0.1 * torch.randn_like(x)
    model.save_pretrained(where)
    return where


def inputs(name):
    rng = np.random.default_rng(0)
    if name == "vit":
        return {"pixel_values": rng.normal(size=(B, 3, 8, 8)).astype(np.float32)}
    ids = rng.integers(2, V, (B, T))
    return {"input_ids": ids, "decoder_input_ids": rng.integers(2, V, (B, T))} if name == "t5" else {"input_ids": ids}


def their_logits(model, given):
    with torch.no_grad():
        return model(**{key: torch.from_numpy(x) for key, x in given.items()}).logits.numpy()


def our_logits(name, model, params, given):
    arrays = list(given.values())
    if name == "vit":
        arrays = [arrays[0].transpose(0, 2, 3, 1)]
    return np.asarray(jit(lambda params, arrays: model.apply(params, *arrays))(params, arrays))


CASES = [
    ("gpt2", {"fan_in_fan_out": True}),
    ("gpt2", {"fan_in_fan_out": True, "use_rslora": True, "rank_pattern": {"c_proj": 4}, "alpha_pattern": {"c_fc": 9}}),
    ("llama", {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5}}),
    ("bert", {}),
    ("t5", {}),
    ("t5", {"use_dora": True}),
    ("vit", {}),
]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{name}-{'-'.join(s) or 'lora'}" for name, s in CASES])
def test_an_adapter_comes_in_and_goes_out_with_its_logits(name, settings, published, tmp_path):
    directory, given = published(name), inputs(name)
    adapter = saved(name, directory, tmp_path / "theirs", **settings)
    expected, plain = (their_logits(theirs(name, directory, each), given) for each in (adapter, None))
    assert np.abs(expected - plain).max() > 0.05
    loaded = load_adapters(directory, {"a": adapter})
    for params in (loaded.params("a"), loaded.merged("a")):
        np.testing.assert_allclose(our_logits(name, loaded.model, params, given), expected, atol=1e-4)
    np.testing.assert_allclose(our_logits(name, loaded.model, loaded.params(), given), plain, atol=1e-4)
    section = peft_load.read(adapter, loaded.model.config).section
    out = written(loaded, section, loaded.trained["a"], tmp_path / "ours", directory)
    np.testing.assert_allclose(their_logits(theirs(name, directory, out), given), expected, atol=1e-4)
    assert sorted(size(adapter).values()) == sorted(size(out).values()), "factors that were shared are so again"


def size(directory):
    from safetensors.numpy import load_file

    return {key: x.shape for key, x in load_file(directory / "adapter_model.safetensors").items() if "lora_A" in key}


def written(loaded, section, trained, where, directory):
    """Write an adapter of ours."""
    leaves, base = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): jax.device_get(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Factors))
        }
        for tree in (trained, loaded.base)
    )
    factors = [path for path, leaf in leaves.items() if isinstance(leaf, Factors)]
    modules = peft_save.check(loaded.model.config, factors, [path for path in leaves if path not in factors])
    where.mkdir()
    peft_save.write(where, modules, section, leaves, base, (str(directory), "0" * 32))
    return where


@pytest.mark.parametrize("targets", [("layers/attn/q", "layers/attn/v"), ("*/attn/*", "layers/mlp/up")])
def test_factors_that_were_trained_apart_go_out_as_those_of_one_matrix(targets, published, tmp_path):
    """Those of q, k and v have no A in common once they have been trained, and q and v alone leave k as it was."""
    directory, given = published("gpt2"), inputs("gpt2")
    model, params = jaxmodels.load_pretrained(directory)
    section = LoRA(rank=2, alpha=3, targets=targets, alphas=("*/v=7",))
    frozen, trained = adaptation(section, {"model": model}, ["model"]).divide({"model": params}, jax.random.key(0))
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), trained)
    expected = our_logits("gpt2", model, join(frozen, trained)["model"], given)
    loaded = load_adapters(directory, {})
    out = written(loaded, section, trained["model"], tmp_path / "ours", directory)
    np.testing.assert_allclose(their_logits(theirs("gpt2", directory, out), given), expected, atol=1e-4)
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def changed(adapter, where, settings=None, tensors=None):
    """A copy of an adapter with other settings or tensors."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(adapter, where)
    found = json.loads((where / "adapter_config.json").read_text())
    (where / "adapter_config.json").write_text(json.dumps({**found, **(settings or {})}))
    if tensors is not None:
        made = tensors(load_file(where / "adapter_model.safetensors"))
        save_file({key: np.ascontiguousarray(x) for key, x in made.items()}, where / "adapter_model.safetensors")
    return where


@pytest.fixture(scope="module")
def adapter(published, tmp_path_factory):
    return saved("gpt2", published("gpt2"), tmp_path_factory.mktemp("adapter") / "a", fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("settings", "tensors", "said"),
    [
        ({}, lambda x: {key: a.T for key, a in x.items()}, r"lora_A.weight is \[24, 3\], expected \[3, 24\]"),
        ({}, lambda x: {key.replace("lora_A", "lora_X"): a for key, a in x.items()}, "of no layer here that can have"),
        ({}, lambda x: {key.replace("lora_B", "lora_B.default"): a for key, a in x.items()}, "of no layer here"),
        ({}, lambda x: {key.removeprefix("base_model.model."): a for key, a in x.items()}, "of no layer here"),
        ({}, lambda x: {key.replace("h.1", "h.7"): a for key, a in x.items()}, "h.7.*of no layer here"),
        ({}, lambda x: {key: a for key, a in x.items() if "lora_B" not in key}, "lora_B.weight is missing"),
        ({"r": 4}, None, r"is \[3, 24\], expected \[4, 24\]"),
        ({"r": 0}, None, r"r 0 \(expected: above 0\)"),
        ({"lora_alpha": 0}, None, r"lora_alpha 0 \(expected: above 0\)"),
        ({"use_dora": True}, None, "lora_magnitude_vector is missing"),
        ({"bias": "all"}, None, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights 'pissa', which changes the base too"),
        ({"peft_type": "IA3"}, None, r"peft_type 'IA3' \(computed here: LORA\)"),
    ],
)  # fmt: skip
def test_an_adapter_that_means_something_else_is_refused(settings, tensors, said, adapter, published, tmp_path):
    other = changed(adapter, tmp_path / "other", settings, tensors)
    with pytest.raises(UserError, match=said) as refused:
        load_adapters(published("gpt2"), {"a": other})
    assert "\n" not in str(refused.value)


def test_an_adapter_that_names_no_base_needs_one(adapter, published):
    config = jaxmodels.load_pretrained(published("gpt2"))[0].config
    with pytest.raises(UserError, match="without init.source, expected the weights that it was trained beside"):
        resolved(Config(model=config, data=Synthetic(seq_len=9, batch_size=8), adapter=LoRA(source=str(adapter))))


def test_a_module_has_factors_or_is_trained_itself(published):
    config = jaxmodels.load_pretrained(published("gpt2"))[0].config
    with pytest.raises(UserError, match="c_attn with factors and with parameters trained themselves"):
        peft_save.check(config, ["layers/attn/q/w"], ["layers/attn/k/b"])


def test_a_table_that_is_an_output_layer_too_has_no_factors_in_their_format(published):
    config = jaxmodels.load_pretrained(published("gpt2"))[0].config
    with pytest.raises(UserError, match="got factors of embed/w, to which PEFT's format gives none"):
        peft_save.check(config, ["embed/w"], [])
