"""Whisper equals transformers': logits coming in and going out, and the sizes of the published models."""

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.hf import save
from tests.hf.small import change

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

V, RATE = 97, 16000
SMALL = {
    "vocab_size": V, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_source_positions": 50,
    "max_target_positions": 20, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
SIZES = {  # of encoder and decoder; the counts are transformers', which has the encoder's positions among them
    "tiny": (4, 4, 6, 384, 37_760_640),
    "base": (6, 6, 8, 512, 72_593_920),
    "small": (12, 12, 12, 768, 241_734_912),
    "medium": (24, 24, 16, 1024, 763_857_920),
    "large-v3": (32, 32, 20, 1280, 1_543_490_560),
    "large-v3-turbo": (32, 4, 20, 1280, 808_878_080),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model of transformers, its folder, and ours with its weights."""
    torch.manual_seed(0)
    theirs = tf.WhisperForConditionalGeneration(tf.WhisperConfig(**SMALL, attn_implementation="eager")).eval()
    for name, x in theirs.named_parameters():  # positions among them, as those of published weights are rounded
        x.data = 0.2 * torch.randn_like(x) + float(x.ndim == 1 and name.endswith("weight"))
    folder = tmp_path_factory.mktemp("whisper")
    theirs.save_pretrained(folder)
    return theirs, folder, *jaxmodels.load_pretrained(folder)


def sounds(rows=2):
    x = (0.3 * np.random.default_rng(0).normal(size=(rows, RATE))).astype(np.float32)
    x[-1, 9000:] = 0
    return x


def frames(x):
    """As transformers sees sounds of a second."""
    extract = tf.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    return extract(list(x), sampling_rate=RATE, return_tensors="pt").input_features


def test_logits_are_the_same_coming_in_and_going_out(pair, tmp_path):
    theirs, folder, model, params = pair
    x, ids = sounds(), np.random.default_rng(1).integers(0, V, (2, 9)).astype(np.int32)

    def logits(model):
        with torch.no_grad():
            return model(input_features=frames(x), decoder_input_ids=torch.from_numpy(ids).long()).logits.numpy()

    wanted = logits(theirs)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(jax.jit(model.apply)(params, x, ids), wanted, rtol=0, atol=1e-4)
    save.save_pretrained(tmp_path, model, params)
    again, said = tf.WhisperForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(logits(again.eval()), wanted, rtol=0, atol=1e-6)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_with_a_cache_it_says_the_same_token_by_token(pair):
    _, _, model, params = pair
    x, ids = sounds(), np.random.default_rng(1).integers(0, V, (2, 9)).astype(np.int32)
    whole = jax.jit(model.apply)(params, x, ids)
    step = jax.jit(lambda ids, cache: model.apply(params, None, ids, cache=cache))
    found, cache = jax.jit(lambda x, ids: model.apply(params, x, ids, cache=model.cache(2, 9)))(x, ids[:, :4])
    for at in range(4, 9):
        np.testing.assert_allclose(found[:, -1], whole[:, at - 1], rtol=0, atol=1e-5)
        found, cache = step(ids[:, at : at + 1], cache)
    np.testing.assert_allclose(found[:, -1], whole[:, 8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_their_parameters(name):
    layers, decoder_layers, heads, width, published = SIZES[name]
    v3 = {"num_mel_bins": 128, "vocab_size": 51866} if "v3" in name else {}
    sizes = {f"{part}_attention_heads": heads for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 4 * width for part in ("encoder", "decoder")}
    with torch.device("meta"):
        theirs = tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(d_model=width, encoder_layers=layers, decoder_layers=decoder_layers, **sizes, **v3)
        )
    assert jaxmodels.create(f"whisper-{name}").count() == sum(x.numel() for x in theirs.parameters()) == published


def test_what_is_not_computed_and_sounds_that_are_too_long_are_refused(pair, tmp_path):
    theirs, _, model, params = pair
    theirs.save_pretrained(tmp_path)
    change(tmp_path, decoder_attention_heads=6, scale_embedding=True)
    with pytest.raises(UserError, match="scale_embedding true .*decoder_attention_heads 6 .computed here: 3"):
        jaxmodels.load_pretrained(tmp_path)
    with pytest.raises(UserError, match="got sounds of 104 frames, expected at most 100, 1 seconds"):
        model.apply(params, np.zeros((1, RATE + 4 * 160), np.float32), None)
    with pytest.raises(UserError, match="got 21 tokens, expected at most the model's context of 20"):
        model.apply(params, sounds(1), np.zeros((1, 21), np.int32))
