"""Whisper equals transformers': logits coming in and going out, what it transcribes, and the published sizes."""

import json
from typing import Any

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.cli import main
from jaxmodels.errors import UserError
from jaxmodels.generate.beam import decode
from jaxmodels.generate.speech import decoding
from jaxmodels.hf import save
from jaxmodels.train import load_run
from tests.data.test_sounds import wav
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


END, START, ENGLISH, GERMAN, TRANSCRIBE, TRANSLATE, UNTIMED = range(V - 7, V)
SPOKEN = {
    "decoder_start_token_id": START, "bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "max_length": 20,
    "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN}, "no_timestamps_token_id": UNTIMED, "is_multilingual": True,
    "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE}, "return_timestamps": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def speaker(pair, tmp_path_factory):
    """The folder of `pair` with a tokenizer and tokens that it must not say, its run, and what is said of sounds."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    theirs, folder, _, _ = pair
    letters = {chr(ord("A") + i): i for i in range(V - 7)}
    rust = Tokenizer(models.BPE(vocab=letters, merges=[]))
    names = ("endoftext", "startoftranscript", "en", "de", "transcribe", "translate", "notimestamps")
    rust.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    rust.decoder = decoders.Fuse()
    rust.save(str(folder / "tokenizer.json"))
    seen = frames(x := sounds(3))

    def generate(**more):
        theirs.generation_config = tf.GenerationConfig(**SPOKEN, **more)
        return theirs.generate(seen, language="en", task="transcribe").numpy()

    free = generate()
    never, not_first = [int(free[0, 6]), *range(END + 1, V)], [END, int(free[1, 4])]
    said = generate(suppress_tokens=never, begin_suppress_tokens=not_first)
    assert not np.array_equal(said[0], free[0]) and not np.array_equal(said[1], free[1])
    theirs.generation_config.save_pretrained(folder)
    tf.WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
    run = tmp_path_factory.mktemp("runs") / "whisper"
    assert main(["import", str(folder), "--out", str(run)]) == 0
    return folder, run, x, said


def test_a_run_says_what_transformers_generates(speaker):
    _, run, x, said = speaker
    opened = load_run(run)
    how = decoding(opened)
    assert how["start"] == (START, ENGLISH, TRANSCRIBE, UNTIMED)
    found = decode(opened.model, opened.params["model"], x, **how).tokens
    np.testing.assert_array_equal(found[:, : said.shape[1]], said)


def test_files_are_transcribed_and_the_run_is_exported_with_all_that_came_with_it(speaker, tmp_path, capsys):
    folder, run, x, said = speaker
    opened: Any = load_run(run)
    text = opened.tokenizer.decode(said[0][said[0] < END])
    (tmp_path / "x.wav").write_bytes(wav(x[0], RATE))
    (tmp_path / "silent.wav").write_bytes(wav(np.zeros(RATE), RATE))
    (tmp_path / "long.wav").write_bytes(wav(np.zeros(2 * RATE), RATE))  # in three silent parts
    capsys.readouterr()
    assert main(["predict", str(run), *(str(tmp_path / f"{name}.wav") for name in ("x", "silent", "long"))]) == 0
    first, silent, long = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["transcript"] == text and 0 < first["confidence"] < 1
    assert long["transcript"] == " ".join([silent["transcript"]] * 3).strip()
    assert abs(long["confidence"] - silent["confidence"]) < 1e-5
    assert main(["sample", str(run), "--prompt", str(tmp_path / "x.wav")]) == 0
    assert capsys.readouterr().out.strip() == text
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    for name in ("tokenizer.json", "generation_config.json", "preprocessor_config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    again = tf.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(again.generate(frames(x), language="en", task="transcribe"), said)


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
