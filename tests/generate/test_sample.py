"""Sampling: the cache changes nothing, the seed decides, and each option keeps what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.generate import sample as public
from jaxmodels.generate.sample import How, _cached, choose, penalize, sample, with_cache
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.kernels.quantized import Rule
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.models.model import quantized
from tests.zoo import arrays

V = 23
CONFIGS = {
    "gpt2": GPT2Config(layers=2, width=16, heads=2, vocab_size=V, context=24),
    "llama": LlamaConfig(layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, vocab_size=V),
    "lstm": LSTMConfig(layers=2, width=16, hidden=16, vocab_size=V, dropout=0.0),
}


@functools.cache
def load(name):
    model = jaxmodels.create(CONFIGS[name])
    rng = np.random.default_rng(0)
    # large enough that the likeliest token is not always the same, nor always the last one
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), model.shapes())
    return model, params


def prompt(length, rows=2):
    return np.random.default_rng(length).integers(0, V, (rows, length)).astype(np.int32)


OPTIONS = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.3, "top_k": 5, "top_p": 0.8}]
CASES = [("gpt2", OPTIONS[0]), ("llama", OPTIONS[0]), ("gpt2", OPTIONS[1]), ("llama", OPTIONS[2])]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_cache_changes_no_token(name, options):
    model, params = load(name)
    for length in (1, 8):
        given = prompt(length)
        out = sample(model, params, given, 14, seed=7, **options)
        assert out.shape == (2, length + 14)
        np.testing.assert_array_equal(out[:, :length], given)
        assert set(out.flat) <= set(range(V)) and len(set(out[:, length:].flat)) > 2
        np.testing.assert_array_equal(out, sample(model, params, given, 14, seed=7, cached=False, **options))


def test_greedy_takes_the_likeliest_token_of_a_plain_pass():
    model, params = load("llama")
    out = sample(model, params, prompt(3), 6, temperature=0)
    logits = np.asarray(jax.jit(model.apply)(params, jnp.asarray(out)))
    np.testing.assert_array_equal(out[:, 3:], logits[:, 2:-1].argmax(-1))


def test_the_seed_decides():
    model, params = load("gpt2")
    one, same, other = (sample(model, params, prompt(3), 14, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    twins = sample(model, params, np.repeat(prompt(3, 1), 2, 0), 14, seed=1)
    assert (twins[0] != twins[1]).any(), "rows of a batch are drawn each for itself"


def test_fewer_tokens_are_the_beginning_of_more():
    model, params = load("gpt2")
    np.testing.assert_array_equal(
        sample(model, params, prompt(3), 14, seed=1)[:, :9], sample(model, params, prompt(3), 6, seed=1)
    )


def test_one_prompt_may_be_a_plain_list():
    model, params = load("gpt2")
    assert public is sample
    np.testing.assert_array_equal(sample(model, params, [1, 2], 3), sample(model, params, np.array([[1, 2]]), 3))


def test_the_likeliest_alone_is_greedy():
    model, params = load("gpt2")
    greedy = sample(model, params, prompt(3), 14, temperature=0)
    np.testing.assert_array_equal(sample(model, params, prompt(3), 14, temperature=1.0, top_k=1, seed=5), greedy)


@pytest.mark.parametrize("name", ["gpt2", "llama", "lstm"])
def test_prompts_of_different_lengths_go_on_as_each_does_alone(name):
    model, params = load(name)
    prompts = [prompt(length, 1)[0] for length in (5, 1, 9)]
    for cached in (True, False):
        together = sample(model, params, prompts, 12, temperature=0, cached=cached)
        assert isinstance(together, list) and [len(row) for row in together] == [17, 13, 21]
        for row, own in zip(together, prompts, strict=True):
            np.testing.assert_array_equal(row, sample(model, params, own, 12, temperature=0)[0])


def test_prompts_of_other_lengths_take_no_other_program_and_no_more_steps():
    """A batch of any lengths up to 64 tokens compiles once, and each row's first token comes from one pass."""
    model, params = load("llama")
    sample(model, params, [prompt(length, 1)[0] for length in (2, 7)], 5, temperature=0)
    before = _cached._cache_size()
    sample(model, params, [prompt(length, 1)[0] for length in (30, 1)], 9, temperature=0)
    assert _cached._cache_size() == before
    steps = []
    watched = dataclasses.replace(
        model, apply=lambda *a, **k: (jax.debug.callback(lambda: steps.append(1)), model.apply(*a, **k))[1]
    )
    sample(watched, params, [prompt(length, 1)[0] for length in (30, 1)], 4, temperature=0)
    jax.effects_barrier()
    assert len(steps) == 4, "the prompts at once, and one more pass for each token but the first"


def test_a_penalty_makes_what_a_row_has_less_likely_and_nothing_else():
    logits = jnp.array([[2.0, -1.0, 0.5, 3.0], [2.0, -1.0, 0.5, 3.0]])
    tokens = jnp.array([[0, 1, 3, 3], [2, 2, 2, 0]])  # what lies behind `at` is no part of the row
    got = penalize(logits, tokens, jnp.array([1, 2]), 2.0)
    np.testing.assert_allclose(got, [[1.0, -2.0, 0.5, 3.0], [2.0, -1.0, 0.25, 3.0]])


@pytest.mark.parametrize("name", ["gpt2", "lstm"])
def test_a_strong_penalty_repeats_no_token(name):
    model, params = load(name)
    prompts = [prompt(length, 1)[0] for length in (3, 1)]
    for cached in (True, False):
        for row, own in zip(
            sample(model, params, prompts, 8, temperature=0, repetition_penalty=1e9, cached=cached),
            prompts,
            strict=True,
        ):
            new = row[len(own) :]
            assert len(set(new)) == len(new) and not set(new) & set(own)


def test_prompts_of_one_length_may_be_a_list_and_give_an_array():
    model, params = load("gpt2")
    given = prompt(4)
    np.testing.assert_array_equal(
        sample(model, params, [*given], 5, temperature=0), sample(model, params, given, 5, temperature=0)
    )


@functools.cache
def drawn(shares, **options):
    """How often each token is chosen from these shares, out of 4000."""
    logits = jnp.log(jnp.array(shares))[None].repeat(4000, 0)
    tokens = choose(logits, jax.random.key(0), How(**options))
    return np.bincount(np.asarray(tokens), minlength=len(shares)) / 4000


SHARES = (0.1, 0.4, 0.05, 0.25, 0.2)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.64}, {1, 3}),
        ({"top_p": 0.66}, {1, 3, 4}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        # of the three that are left the first has 0.4 / 0.85, the first two 0.65 / 0.85
        ({"top_k": 3, "top_p": 0.5}, {1, 3}),
        ({"top_k": 3, "top_p": 0.45}, {1}),
        # shares squared: 0.582 and 0.227 of the whole
        ({"temperature": 0.5, "top_p": 0.58}, {1}),
        ({"temperature": 0.5, "top_p": 0.6}, {1, 3}),
        ({"temperature": 0}, {1}),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_right_set_by_their_shares(options, kept):
    got = drawn(SHARES, **options)
    assert set(np.flatnonzero(got)) == kept
    heat = options.get("temperature", 1.0) or 1.0
    expected = np.array([share ** (1 / heat) if i in kept else 0 for i, share in enumerate(SHARES)])
    np.testing.assert_allclose(got, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("length", "tokens", "options", "message"),
    [
        (20, 5, {}, "20 tokens and 5 to add, expected at most the model's context of 24 in all, try --tokens 4"),
        (3, 0, {}, "3 tokens and 0 to add, expected at least 1 of each, try --tokens 1"),
        (
            24,
            1,
            {},
            "24 tokens and 1 to add, expected at most the model's context of 24 in all, "
            "try a prompt of at most 23 tokens",
        ),
        (30, 50, {}, "try a prompt of at most 23 tokens and --tokens 1"),
        (0, 3, {}, "expected at least 1 of each"),
        (3, 3, {"temperature": -1.0}, "temperature -1.0"),
        (3, 3, {"top_k": 0}, "top_k 0"),
        (3, 3, {"top_p": 0.0}, "top_p 0.0"),
        (3, 3, {"top_p": 1.5}, "top_p 1.5"),
        (3, 3, {"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
    ],
)
def test_a_mistake_is_refused(length, tokens, options, message):
    model, params = load("gpt2")
    with pytest.raises(UserError) as error:
        sample(model, params, np.zeros((1, length), np.int32), tokens, **options)
    assert message in str(error.value)


def test_a_model_whose_kernel_reads_no_cache_samples_with_its_own_products():
    made = jaxmodels.create("gpt2", layers=1, width=32, heads=2, vocab_size=64, context=16, attention="ring")
    model = quantized(made, Rule("int8"))
    cached, plain = with_cache(model), with_cache(made)
    params, tokens = arrays(plain), jnp.arange(8)[None]
    assert cached.config.attention == plain.config.attention == "auto"
    ours, expected, exact = (
        np.asarray(jax.jit(each.apply)(params, tokens)) for each in (cached, quantized(plain, Rule("int8")), plain)
    )
    np.testing.assert_array_equal(ours, expected)
    assert np.abs(expected - exact).max() > 1e-4


def test_the_context_may_be_filled_to_the_last_token():
    model, params = load("gpt2")
    assert sample(model, params, prompt(20), 4, temperature=0).shape == (2, 24)
