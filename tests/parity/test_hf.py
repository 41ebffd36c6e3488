"""Fresh models of transformers with odd settings come in with their logits, and go out with them."""

import functools
import json

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.hf import save

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
V, B, T = 97, 3, 13  # a vocabulary that nothing divides
EAGER = {"attn_implementation": "eager"}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZES = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6}
DECODER = {**SIZES, **EAGER, **IDS, "vocab_size": V, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"vocab_size": V, "n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 17, **EAGER, **IDS}
BART = {
    "vocab_size": V, "max_position_embeddings": 24, "d_model": 20, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 29, "decoder_ffn_dim": 29,
}  # fmt: skip
T5 = {"vocab_size": V, "d_model": 20, "d_kv": 7, "d_ff": 29, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3}
TEXT = {**SIZES, **EAGER, "vocab_size": V, "max_position_embeddings": 17}
IMAGE = {**SIZES, **EAGER, "image_size": 15, "patch_size": 5}


def decoder(name, **settings):
    return lambda: getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**{**DECODER, **settings}))


def gpt2(**settings):
    return lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**{**GPT2, **settings}))


def t5(**settings):
    return lambda: tf.T5ForConditionalGeneration(tf.T5Config(**{**T5, **settings}))


def bert(head, **settings):
    return lambda: getattr(tf, f"Bert{head}")(tf.BertConfig(**{**TEXT, **settings}))


def resnet(**settings):
    return lambda: tf.ResNetForImageClassification(tf.ResNetConfig(**settings))


def clip(**settings):
    text = {**TEXT, "hidden_size": 24, "bos_token_id": 0, **settings}
    return lambda: tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=14))


SLIDES = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
CASES = {
    "gpt2": gpt2(),
    "gpt2-narrow-mlp": gpt2(n_inner=23, activation_function="gelu_pytorch_tanh"),
    "gpt2-body": lambda: tf.GPT2Model(tf.GPT2Config(**GPT2)),
    "llama-1-kv-head-scaled": decoder("Llama", num_key_value_heads=1, rope_parameters=LLAMA3),
    "llama-all-heads-tied": decoder("Llama", num_key_value_heads=6, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama-head-dim": decoder("Llama", head_dim=10, num_key_value_heads=3),
    "mistral-window": decoder("Mistral", sliding_window=4, head_dim=8),
    "mistral-no-window": decoder("Mistral", sliding_window=None, num_key_value_heads=1),
    "qwen2": decoder("Qwen2"),
    "qwen2-window-tied": decoder("Qwen2", tie_word_embeddings=True, **SLIDES),
    "qwen3": decoder("Qwen3", head_dim=10),
    "qwen3-window": decoder("Qwen3", head_dim=6, num_key_value_heads=1, tie_word_embeddings=True, **SLIDES),
    "mixtral": decoder("Mixtral", intermediate_size=52, num_local_experts=5, num_experts_per_tok=2),
    "mixtral-window-tied": decoder(
        "Mixtral", intermediate_size=52, num_local_experts=3, sliding_window=4, tie_word_embeddings=True
    ),
    "t5": t5(relative_attention_num_buckets=6, relative_attention_max_distance=9),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
    "t5-v1.1": t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bert-masked-lm": bert("ForMaskedLM", type_vocab_size=3),
    "bert-classifier": bert("ForSequenceClassification", num_labels=5),
    "bert-pretraining": bert("ForPreTraining", layer_norm_eps=1e-3),
    "bert-spans": bert("ForQuestionAnswering"),
    "bert-body": bert("Model"),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE, num_channels=2, num_labels=7)),
    "resnet-basic": resnet(embedding_size=9, hidden_sizes=[9, 14], depths=[1, 2], layer_type="basic", num_labels=4),
    "resnet-bottleneck": resnet(embedding_size=5, hidden_sizes=[12, 20], depths=[2, 1], num_channels=2),
    "clip": clip(eos_token_id=1),
    "clip-highest-id": clip(eos_token_id=2),
}


def fill(model):
    """Random numbers in which every parameter matters."""
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if "running_var" in name:
            x.data = torch.rand_like(x) + 0.5
        elif "running_mean" in name or isinstance(x, torch.nn.Parameter):
            x.data = torch.randn_like(x) * 0.2 + float(x.ndim == 1 and name.endswith("weight"))
    return model.float().eval()


def tensor(x):
    return torch.from_numpy(x).long() if x.dtype == np.int32 else torch.from_numpy(x).permute(0, 3, 1, 2)


def inputs_of(model):
    """What both take: ours by position and by name, and theirs by name."""
    rng, config = np.random.default_rng(2), model.config
    ids = rng.integers(2, V, (B, T)).astype(np.int32)
    if config.model_type in ("vit", "resnet", "clip"):
        seen = getattr(config, "vision_config", config)
        size = getattr(seen, "image_size", 32)
        images = rng.normal(size=(B, size, size, seen.num_channels)).astype(np.float32)
        if config.model_type != "clip":
            return (images,), {}, {"pixel_values": tensor(images)}
        ids[range(B), [12, 5, 8]] = V - 1 if config.text_config.eos_token_id == 2 else 1
        return (images, ids), {}, {"pixel_values": tensor(images), "input_ids": tensor(ids)}
    if config.model_type in ("t5", "bart"):
        targets = rng.integers(2, V, (B, 11)).astype(np.int32)
        return (ids, targets), {}, {"input_ids": tensor(ids), "decoder_input_ids": tensor(targets)}
    if config.model_type == "bert":
        types = rng.integers(0, config.type_vocab_size, (B, T)).astype(np.int32)
        return (ids,), {"types": types}, {"input_ids": tensor(ids), "token_type_ids": tensor(types)}
    return (ids,), {}, {"input_ids": tensor(ids)}


def outputs_of(model, given):
    with torch.no_grad():
        out = model(**given)
    if model.config.model_type == "clip":
        return [out.image_embeds.numpy(), out.text_embeds.numpy(), model.logit_scale.exp().detach().numpy()]
    if model.config.model_type == "bert" and hasattr(out, "pooler_output"):
        return [out.last_hidden_state.numpy(), out.pooler_output.numpy()]
    if hasattr(out, "prediction_logits"):
        return [out.prediction_logits.numpy(), out.seq_relationship_logits.numpy()]
    if hasattr(out, "start_logits"):
        return [torch.stack([out.start_logits, out.end_logits], -1).numpy()]
    # a body: times the embedding it is tied to
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state @ model.wte.weight.T
    return [logits.detach().numpy()]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_same_coming_in_and_going_out(name, tmp_path):
    torch.manual_seed(0)
    theirs = fill(CASES[name]())
    theirs.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    args, kwargs, given = inputs_of(theirs)
    expected = outputs_of(theirs, given)
    assert all(np.abs(x).max() > 0.1 for x in expected)

    size = {"input_shape": args[0].shape[1:]} if theirs.config.model_type == "resnet" else {}
    model, params = jaxmodels.load_pretrained(tmp_path / "in", **size)
    stats = model.stats()
    more = {**kwargs, "stats": stats} if stats else kwargs
    out = jit(model.apply)(params, *args, **more)
    for ours, wanted in zip(jax.tree.leaves(out[0] if stats else out), expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)

    (tmp_path / "out").mkdir()
    save.save_pretrained(tmp_path / "out", model, params)
    # a body went in; what goes out has its head
    kind = tf.GPT2LMHeadModel if isinstance(theirs, tf.GPT2Model) else type(theirs)
    again, said = kind.from_pretrained(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    missing = [name for name in said["missing_keys"] if "num_batches_tracked" not in name]
    assert not missing and not said["unexpected_keys"] and not said["mismatched_keys"]
    for found, wanted in zip(outputs_of(again.eval(), given), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    # a Mistral without a window is a LLaMA
    same = {"mistral-no-window": "LlamaForCausalLM"}.get(name, kind.__name__)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [same]


def test_a_tied_weight_stays_tied(tmp_path):
    theirs = fill(CASES["llama-all-heads-tied"]())
    theirs.save_pretrained(tmp_path / "in")
    (tmp_path / "out").mkdir()
    save.save_pretrained(tmp_path / "out", *jaxmodels.load_pretrained(tmp_path / "in"))
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    name = "model.safetensors"
    assert (tmp_path / "in" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_tokenizer_of_ours_is_one_of_transformers(tmp_path):
    from jaxmodels.data.tokenizer import Bytes
    from jaxmodels.hf import tokenizer

    save.save_pretrained(tmp_path, model := jaxmodels.create("gpt2", vocab_size=256, layers=1, width=8, heads=2),
                         jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.shapes()))  # fmt: skip
    tokenizer.save(Bytes(), tmp_path)
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path)
    text = "def naïve(x):\n\treturn  x"
    assert theirs(text)["input_ids"] == list(text.encode())
    assert theirs.decode(list(text.encode())) == text


def test_a_body_without_prefix_and_with_position_ids_as_of_sentence_transformers_gives_the_same(tmp_path):
    from safetensors.numpy import load_file, save_file

    torch.manual_seed(1)
    theirs = fill(bert("Model", layer_norm_eps=1e-12)())
    theirs.save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    assert not any(name.startswith("bert.") for name in tensors)
    positions = np.arange(theirs.config.max_position_embeddings)[None]
    save_file({**tensors, "embeddings.position_ids": positions}, path, {"format": "pt"})
    model, params = jaxmodels.load_pretrained(tmp_path / "in")
    args, kwargs, given = inputs_of(theirs)
    features, pooled = model.apply(params, *args, **kwargs)
    for ours, wanted in zip((features, pooled), outputs_of(theirs, given), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)
