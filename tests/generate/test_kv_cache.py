"""A key-value cache of int8 codes: what is computed of it, what it takes, and the same tokens however they are read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.generate.beam import decode
from jaxmodels.generate.draw import Draw
from jaxmodels.generate.engine import Engine, Text, pages_of
from jaxmodels.generate.programs import cache_bytes
from jaxmodels.generate.sample import sample, with_cache
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.models.model import with_kv_cache
from jaxmodels.models.transformer import TransformerConfig

V, T = 23, 12
LLAMA = LlamaConfig(layers=2, width=32, heads=4, kv_heads=2, mlp_width=24, vocab_size=V, window=7)


def made(config):
    model, rng = jaxmodels.create(config), np.random.default_rng(0)
    return model, jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), model.shapes())


@pytest.fixture(scope="module")
def llama():
    return made(LLAMA)


def rounded(x):
    """Keys or values (…, K) after a round trip through int8, each head of each token with a scale of its own."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


def test_a_layer_attends_to_keys_and_values_that_were_rounded_to_int8():
    """One layer in NumPy: after it nothing else depends on the cache, so the codes are all that makes a difference."""
    D = 8
    config = GPT2Config(layers=1, width=D, heads=2, vocab_size=V, context=T)
    model, params = made(config)
    tokens = jnp.arange(6)[None]
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["layers"])

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    x = np.asarray(params["embed"]["w"], np.float64)[:6] + np.asarray(params["positions"]["w"], np.float64)[:6]
    y = norm(x, layer["attn_norm"])
    q, k, v = (np.einsum("td,dhk->thk", y, layer["attn"][n]["w"]) + layer["attn"][n]["b"] for n in "qkv")
    k, v = rounded(k), rounded(v)
    scores = np.where(np.tri(6, dtype=bool), np.einsum("thk,shk->hts", q, k) / np.sqrt(D // 2), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("hts,shk->thk", p / p.sum(-1, keepdims=True), v)
    x = x + np.einsum("thk,hkd->td", y, layer["attn"]["o"]["w"]) + layer["attn"]["o"]["b"]
    h = norm(x, layer["mlp_norm"]) @ layer["mlp"]["up"]["w"] + layer["mlp"]["up"]["b"]
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    x = x + h @ layer["mlp"]["down"]["w"] + layer["mlp"]["down"]["b"]
    last = {name: np.asarray(leaf, np.float64) for name, leaf in params["norm"].items()}
    expected = norm(x, last) @ np.asarray(params["embed"]["w"], np.float64).T

    held = with_kv_cache(model, "int8")
    apply = jax.jit(held.apply)
    logits, cache = apply(params, tokens, cache=held.cache(1, T))
    np.testing.assert_allclose(logits[0], expected, atol=2e-4 * np.abs(expected).max())
    codes = cache["layers"]["k"].codes
    assert codes.dtype == jnp.int8 and np.abs(codes[:, :, :6]).max(-1).min() == 127
    exact = np.asarray(jax.jit(model.apply)(params, tokens)[0])
    assert np.abs(exact - expected).max() > 2e-3 * np.abs(expected).max(), "codes make a difference"


def test_a_text_read_in_pieces_has_the_logits_of_the_text_read_at_once(llama):
    model, params = with_kv_cache(llama[0], "int8"), llama[1]
    tokens, apply = jnp.arange(T)[None], jax.jit(model.apply)
    whole, _ = apply(params, tokens, cache=model.cache(1, T))
    cache, pieces = model.cache(1, T), []
    for first, last in ((0, 4), (4, 8), (8, 12)):
        logits, cache = apply(params, tokens[:, first:last], cache=cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize("drafts", [0, 2])
def test_an_engine_whose_pages_hold_codes_draws_what_sample_draws(llama, drafts):
    """Pages that run out, prompts longer than what attends to pages as they lie, and shorter ones."""
    model, params = llama
    engine = Engine(
        with_kv_cache(model, "int8"), params, rows=3, length=24, page=4, pages=9, chunks=(4, 12), drafts=drafts
    )
    engine.prepare()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, V, n).tolist() for n in (1, 3, 11, 12, 5)]
    texts = [engine.submit(Text(prompt, 24 - len(prompt), Draw(temperature=0.0))) for prompt in prompts]
    list(engine.drain())
    for text in texts:
        out = sample(model, params, text.prompt, text.limit, temperature=0, kv_cache="int8")
        assert text.tokens == out[0].tolist()


def test_beams_keep_their_codes():
    """A beam's score is that of its tokens read at once through such a cache, so codes went where their beam went."""
    config = TransformerConfig(layers=2, width=16, heads=2, mlp_width=24, vocab_size=V)
    model, params = made(config)
    held, sources = with_kv_cache(model, "int8"), np.random.default_rng(2).integers(4, V, (2, 5))
    how = {"start": 1, "end": 2, "limit": 6}
    found = decode(held, params, sources, beams=3, **how)
    for row, tokens in enumerate(found.tokens):
        count = int(np.argmax(tokens == 2)) + 1 if (tokens == 2).any() else 6
        given = jnp.asarray([[1, *tokens[: count - 1]]])
        logits, _ = jax.jit(held.apply)(params, jnp.asarray(sources[row : row + 1]), given, cache=held.cache(1, 6))
        scores = jax.nn.log_softmax(logits[0])[np.arange(count), tokens[:count]].sum()
        np.testing.assert_allclose(found.scores[row], scores, atol=1e-3)


def test_a_cache_of_codes_is_counted_to_the_byte(llama):
    model = llama[0]
    c, page = model.config, 16
    vectors = 2 * c.layers * page * c.kv_heads
    assert cache_bytes(model, page) == vectors * c.head_size * 4
    held = with_kv_cache(model, "int8")
    assert cache_bytes(held, page) == vectors * (c.head_size + 4)
    assert sum(x.nbytes for x in jax.tree.leaves(held.cache(1, page)["layers"])) == cache_bytes(held, page)
    assert pages_of(held, 10**6, page) == 10**6 // (vectors * (c.head_size + 4))


def test_a_model_with_another_kernel_keeps_its_codes():
    model = with_kv_cache(jaxmodels.create(LLAMA, attention="ring", window=None), "int8")
    able = with_cache(model)
    assert able.config.attention == "auto" and able.cache is model.cache


def test_what_has_no_keys_and_values_is_refused(llama):
    lstm = jaxmodels.create(LSTMConfig(layers=1, width=8, hidden=8, vocab_size=V))
    with pytest.raises(UserError, match="key-value cache in int8 for LSTMConfig"):
        with_kv_cache(lstm, "int8")
    with pytest.raises(UserError, match="got kv_cache 'int4', expected int8"):
        sample(*llama, [1, 2], 2, kv_cache="int4")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="kv_cache 'int8' with cached=False"):
        sample(*llama, [1, 2], 2, kv_cache="int8", cached=False)
