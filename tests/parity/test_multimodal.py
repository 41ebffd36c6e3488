"""LLaVA, Idefics3, SmolVLM and Qwen2-Audio equal transformers': logits both ways, and the sizes of published models."""

import json

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.generate import sample
from jaxmodels.hf import save
from jaxmodels.hf.multimodal import FORMAT
from jaxmodels.hf.table import Settings
from jaxmodels.models.multimodal import ImageTower
from tests.hf.small import change, filled

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

V, TOKEN, RATE = 61, 7, 16000
TEXT = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
SEEN = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
HEARD = {"model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_ffn_dim": 20, "encoder_layers": 2,
         "encoder_attention_heads": 2, "num_mel_bins": 80, "max_source_positions": 50}  # fmt: skip


def llava(**more):
    seen = {"model_type": "clip_vision_model", "image_size": 8, **SEEN}
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config={"model_type": "llama", **TEXT}, vision_config=seen, image_token_index=TOKEN, **more)
    )


def merging(name):
    config = getattr(tf, f"{name}Config")(
        text_config={"model_type": "llama", **TEXT}, vision_config={"image_size": 16, **SEEN}, image_token_id=TOKEN,
        scale_factor=2,
    )  # fmt: skip
    return getattr(tf, f"{name}ForConditionalGeneration")(config)


def qwen2_audio():
    text = {"model_type": "qwen2", **TEXT}
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(text_config=text, audio_config=HEARD, audio_token_index=TOKEN)
    )


TOWER = ImageTower(2, input_shape=(8, 8, 3), patch=4, heads=2, width=16, mlp_width=20, token=TOKEN)
SMALL = {"vocab_size": V, "layers": 2, "width": 24, "heads": 4, "mlp_width": 40, "image": TOWER}
CASES = {
    "llava": llava,
    "llava-last-layer": lambda: llava(vision_feature_layer=-1),
    "idefics3": lambda: merging("Idefics3"),
    "smolvlm": lambda: merging("SmolVLM"),
    "qwen2_audio": qwen2_audio,
}


def fill(model):
    torch.manual_seed(0)
    for name, x in model.named_parameters():
        x.data = 0.2 * torch.randn_like(x) + float(x.ndim == 1 and name.endswith("weight"))
    return model.float().eval()


def given(name):
    """What ours takes, and what theirs takes, of two rows with places of the medium between others."""
    rng = np.random.default_rng(0)
    if name == "qwen2_audio":  # the second sound ends after 0.6 of the second that both are padded to
        ids = rng.integers(8, V, (2, 30)).astype(np.int32)
        ids[0, 2:27], ids[1, :15] = TOKEN, TOKEN
        sounds, lengths = (0.3 * rng.normal(size=(2, RATE))).astype(np.float32), np.array([RATE, 9590])
        sounds[1, lengths[1] :] = 0
        extract = tf.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
        parts = [x[:length] for x, length in zip(sounds, lengths, strict=True)]
        seen = extract(parts, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
        theirs = {"input_features": seen.input_features, "feature_attention_mask": seen.attention_mask}
        media = ((sounds, lengths),)
    else:
        ids, size = rng.integers(8, V, (2, 13)).astype(np.int32), 8 if "llava" in name else 16
        ids[0, 2:6], ids[1, [0, 1, 5, 9]] = TOKEN, TOKEN
        images = rng.normal(size=(2, size, size, 3)).astype(np.float32)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        theirs = {"pixel_values": pixels if "llava" in name else pixels[:, None]}
        media = (images,)
    ids_of_theirs = torch.from_numpy(ids).long()
    return (ids, *media), {"input_ids": ids_of_theirs, "attention_mask": torch.ones_like(ids_of_theirs), **theirs}


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_same_coming_in_and_going_out(name, tmp_path):
    theirs = fill(CASES[name]())
    theirs.save_pretrained(tmp_path / "in")
    ours, wanted = given(name)
    expected = logits(theirs, wanted)
    model, params = jaxmodels.load_pretrained(tmp_path / "in")
    found = jax.jit(model.apply)(params, *ours)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 1 and model.count() == sum(
        x.numel() for key, x in theirs.named_parameters() if name != "llava-last-layer" or "post_layernorm" not in key
    )

    (tmp_path / "out").mkdir()
    save.save_pretrained(tmp_path / "out", model, params)
    kind = tf.Idefics3ForConditionalGeneration if name == "smolvlm" else type(theirs)
    again, said = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    # a norm that nothing reads
    assert not [key for key in said["missing_keys"] if name != "llava-last-layer" or "post_layernorm" not in key]
    assert not said["unexpected_keys"] and not said["mismatched_keys"]
    np.testing.assert_allclose(logits(again.eval(), wanted), expected, rtol=0, atol=1e-4)


def test_the_older_names_of_published_files_are_read(tmp_path):
    from safetensors.numpy import load_file, save_file

    model = jaxmodels.create("llava-1.5-7b", **SMALL)
    params = filled(model)
    save.save_pretrained(tmp_path, model, params)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in tensors.items()}
    assert len(set(renamed) - set(tensors)) > 20
    save_file(renamed, path, {"format": "pt"})
    _, again = jaxmodels.load_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_greedy_tokens_about_an_image_are_those_of_transformers(tmp_path):
    theirs = fill(llava())
    theirs.save_pretrained(tmp_path)
    (ids, images), wanted = given("llava")
    with torch.no_grad():
        expected = theirs.generate(**wanted, max_new_tokens=6, do_sample=False, eos_token_id=None).numpy()
    model, params = jaxmodels.load_pretrained(tmp_path)
    found = sample(model, params, ids, 6, temperature=0, media=(images,))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="got media with cached=False"):
        sample(model, params, ids, 6, temperature=0, media=(images,), cached=False)


def test_what_is_not_computed_here_is_refused(tmp_path):
    fill(llava()).save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    change(tmp_path, vision_feature_layer=-3, text_config={**text, "model_type": "gemma"})
    with pytest.raises(UserError, match='vision_feature_layer -3 .*model_type "gemma"'):
        jaxmodels.load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llava", "idefics3", "smolvlm", "qwen2_audio"])
def test_what_is_left_out_is_taken_as_transformers_takes_it(name):
    kind = {"llava": tf.LlavaConfig, "qwen2_audio": tf.Qwen2AudioConfig}.get(name) or (
        tf.SmolVLMConfig if name == "smolvlm" else tf.Idefics3Config
    )

    def converted(values):
        return FORMAT.config(Settings(values, "config.json").renamed(FORMAT.names))

    medium = "audio_config" if name == "qwen2_audio" else "vision_config"
    token = {f"{medium[:5]}_token_index" if name == "qwen2_audio" else "image_token_id": TOKEN, "scale_factor": 1}
    for part in ({}, {"text_config": {"attention_bias": False}}, {medium: {"num_channels": 3}}):
        said = {"model_type": name, **token, **part}
        whole = json.loads(kind.from_dict(said).to_json_string(use_diff=False))
        assert converted(said) == converted(whole), part


def test_published_sizes_are_those_of_transformers():
    text = {"model_type": "llama", "vocab_size": 32064}
    smol = {"vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip
    seen = {
        "image_size": 512,
        "patch_size": 16,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    audio = {"model_type": "qwen2", "vocab_size": 156032, "intermediate_size": 11008}
    with torch.device("meta"):
        published = {
            "llava-1.5-7b": tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text)),
            "smolvlm-256m": tf.Idefics3ForConditionalGeneration(
                tf.Idefics3Config(text_config={"model_type": "llama", **smol}, vision_config=seen, scale_factor=4)
            ),
            "qwen2-audio-7b": tf.Qwen2AudioForConditionalGeneration(tf.Qwen2AudioConfig(text_config=audio)),
        }
    for name, theirs in published.items():
        assert jaxmodels.create(name).count() == sum(x.numel() for x in theirs.parameters()), name
