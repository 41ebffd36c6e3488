"""The engine: whatever texts are under way together, each gets the tokens that `sample` gives it alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.generate.draw import Draw, Draws, draw
from jaxmodels.generate.engine import Engine, Text
from jaxmodels.generate.pages import Pages, digests
from jaxmodels.generate.sample import sample
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.models.mixtral import MixtralConfig

V, LENGTH = 23, 24
LLAMA = LlamaConfig(layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, vocab_size=V, window=7)
CONFIGS = {
    "gpt2": GPT2Config(layers=2, width=16, heads=2, vocab_size=V, context=LENGTH),
    "llama": LLAMA,
    "mixtral": MixtralConfig(layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, experts=4, vocab_size=V),
    "lstm": LSTMConfig(layers=2, width=16, hidden=16, vocab_size=V, dropout=0.0),
}
GREEDY = Draw(temperature=0.0)


@functools.cache
def load(name):
    model = jaxmodels.create(CONFIGS[name])
    rng = np.random.default_rng(0)
    # large enough that the likeliest token is not always the same, nor always the last one
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), model.shapes())
    return model, params


@functools.cache
def engine(name):
    """An engine whose pages do not suffice for all of its rows."""
    chunks = (4, 8) if name == "llama" else (8,)
    made = Engine(*load(name), rows=3, length=LENGTH, page=4, pages=9, chunks=chunks, budget=8)
    made.prepare()
    return made


def alone(name, text, **how):
    """What `sample` adds to the prompt of a text, up to the token that ends it."""
    row = sample(*load(name), [text.prompt], text.limit, ends=text.ends, **how)[0].tolist()
    new = row[len(text.prompt) :]
    stop = next((i for i, token in enumerate(new) if token in text.ends), len(new))
    return row[: len(text.prompt) + stop]


def random_texts(rng, count):
    """Texts of random lengths, a third of which begin in the same way."""
    begin = rng.integers(0, V, 14).tolist()
    for i in range(count):
        n = int(rng.integers(1, 14))
        prompt = begin[:n] if i % 3 == 0 else rng.integers(0, V, n).tolist()
        # one end for all, so that `sample` compiles one program; the other is no token
        yield Text(prompt, int(rng.integers(1, LENGTH - n + 1)), GREEDY, ends=(3 if i % 4 == 0 else V,))


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_that_come_and_go_get_the_tokens_that_each_gets_alone(name):
    """Random arrivals and lengths, pieces of prompts, shared beginnings, and pages that run out."""
    made, rng = engine(name), np.random.default_rng(1)
    before = dataclasses.replace(made.totals)
    texts, turns = list(random_texts(rng, 20)), 0
    left = list(texts)
    while left or not made.idle:
        if left and rng.random() < 0.5:
            made.submit(left.pop(0))
        made.advance()
        turns += 1
        assert turns < 1000
    for text in texts:
        assert text.tokens == alone(name, text, temperature=0)
        assert text.finish == ("length" if len(text.tokens) == len(text.prompt) + text.limit else "stop")
    assert made.pages.free == made.pages.count and not made.running
    if name != "lstm":  # whose state is no page
        assert made.totals.preemptions > before.preemptions and made.totals.shared_tokens > before.shared_tokens


def test_a_seed_draws_what_sample_draws_alone():
    name = "llama"
    made = engine(name)
    how = {"temperature": 1.3, "top_k": 7, "top_p": 0.9}
    prompt = [3, 1, 4, 1, 5]
    texts = [Text(prompt, 12, Draw(**how, seed=seed), (V,)) for seed in (1, 2)]
    texts += [Text(prompt, 12, Draw(temperature=0.0, repetition_penalty=1.7), (V,)), Text(prompt, 12, GREEDY, (V,))]
    for text in texts:
        made.submit(text)
    list(made.drain())
    for text in texts[:2]:
        assert text.tokens == alone(name, text, **how, seed=text.draw.seed)
    assert texts[2].tokens == alone(name, texts[2], temperature=0, repetition_penalty=1.7)
    assert texts[3].tokens == alone(name, texts[3], temperature=0)
    assert texts[0].tokens != texts[1].tokens and texts[2].tokens != texts[3].tokens


def test_a_text_that_gives_way_keeps_its_penalties_and_its_draws():
    """What is read again has the same tokens behind the prompt as before: their counts and positions go on."""
    made = engine("llama")
    draws = [Draw(seed=i, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2) for i in range(3)]

    def run(together):
        found = []
        for group in [draws] if together else [[each] for each in draws]:
            texts = [made.submit(Text([1, 2, 3], 20, each, (), salt=str(together))) for each in group]
            list(made.drain())
            found += [text.tokens for text in texts]
        return found

    apart, before = run(False), made.totals.preemptions
    assert run(True) == apart and made.totals.preemptions > before


def test_a_text_that_is_cancelled_frees_its_pages_at_once_and_harms_no_other():
    made = engine("llama")
    texts = [made.submit(Text([5, 6, 7], 15, GREEDY, (V,))) for _ in range(4)]
    for _ in range(5):
        made.advance()
    held = made.pages.free
    made.cancel(texts[0])
    made.cancel(texts[3])  # which waits
    assert made.pages.free > held and texts[3] not in made.waiting
    steps = list(made.drain())
    assert {step.text for step in steps} == {texts[1], texts[2]}
    assert texts[1].tokens == texts[2].tokens == alone("llama", texts[1], temperature=0)
    assert made.pages.free == made.pages.count


def test_nothing_is_compiled_after_prepare():
    from jaxmodels.serve.metrics import compilations

    made, rng = engine("gpt2"), np.random.default_rng(3)
    before = compilations()
    for text in random_texts(rng, 10):
        made.submit(dataclasses.replace(text, draw=Draw(seed=4, min_p=0.1, presence_penalty=0.5, told=3)))
    list(made.drain())
    assert compilations() == before


def test_log_probabilities_are_those_of_a_plain_pass():
    made = engine("llama")
    model, params = load("llama")
    text = Text([1, 2, 3], 6, Draw(temperature=0.0, told=4), ())
    made.submit(text)
    steps = [step for step in made.drain() if step.text is text]
    logprobs = np.asarray(jax.nn.log_softmax(model.apply(params, jnp.array([text.tokens]))[0]))
    for i, step in enumerate(steps):
        row = logprobs[len(text.prompt) - 1 + i]
        assert step.logprob == pytest.approx(row[step.token], abs=1e-4)
        assert [token for token, _ in step.likeliest] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([p for _, p in step.likeliest], np.sort(row)[::-1][:4], atol=1e-4)


def test_each_row_is_drawn_by_its_own_options():
    shares = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
    cases = [
        (Draw(), {0, 1, 2, 3, 4}),
        (Draw(temperature=0.0), {1}),
        (Draw(temperature=1e-37), {1}),
        (Draw(top_k=2), {1, 3}),
        (Draw(top_p=0.41), {1, 3}),
        (Draw(top_k=3, top_p=0.45), {1}),
        (Draw(min_p=0.3), {1, 3, 4}),
        (Draw(min_p=1.0), {1}),
        (Draw(presence_penalty=2.0, temperature=0.0), {3}),
        (Draw(frequency_penalty=0.1, temperature=0.0), {3}),
        (Draw(frequency_penalty=-2.0, temperature=0.0), {1}),
    ]
    R, each = len(cases), 300
    counts = np.zeros((2, R, 5), np.int32)
    counts[1, :, 1] = 10  # the likeliest token was generated ten times
    found = [set() for _ in cases]
    drawing = jax.jit(jax.vmap(draw, in_axes=(None, 0, None, None, None)))
    at = np.arange(each)[:, None].repeat(R, 1)
    logits = jnp.log(jnp.asarray(shares))[None].repeat(R, 0)
    tokens = drawing(logits, at, counts, np.arange(R), Draws.of([option for option, _ in cases])).token
    for row in np.asarray(tokens):
        for seen, token in zip(found, row.tolist(), strict=True):
            seen.add(token)
    assert found == [kept for _, kept in cases]


def test_pages_are_shared_until_they_are_needed():
    pages = Pages(4, 2)
    names = digests([1, 2, 3, 4, 5], 2)
    assert len(names) == 2 and digests([1, 2, 9, 9], 2)[0] == names[0] and digests([0, 2, 3, 4], 2)[1] != names[1]
    assert not set(digests([1, 2, 3, 4], 2, "other")) & set(names)
    taken = pages.take(3)
    for page, name in zip(taken, names, strict=False):
        pages.name(page, name)
    assert pages.find(names) == taken[:2]
    pages.hold(taken[:2])
    pages.release(taken)
    assert pages.free == 2 and pages.use == 0.5, "another text holds two of them"
    pages.release(taken[:2])
    assert pages.free == 4 and pages.find(names) == taken[:2], "what nobody holds is still known"
    pages.take(3)
    assert pages.find(names) == taken[:1], "the end of a text is the first to go"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"length": LENGTH + 1}, "at most the model's context of 24"),
        ({"rows": 0}, "got rows 0"),
        ({"pages": 5}, "expected at least that of one text"),
    ],
)
def test_sizes_that_cannot_be_are_refused(made, message):
    with pytest.raises(UserError, match=message):
        Engine(*load("gpt2"), **{"length": LENGTH, "page": 4, **made})


def test_a_model_that_cannot_be_read_in_pieces_is_refused():
    config = dataclasses.replace(CONFIGS["mixtral"], routing="capacity")
    model = jaxmodels.create(config)
    with pytest.raises(UserError, match="routing capacity, whose outputs depend on how a text is read"):
        Engine(model, None, length=LENGTH)
    translator = jaxmodels.create("transformer", layers=1, width=16, heads=2, mlp_width=16, vocab_size=V)
    with pytest.raises(UserError, match="reads more than one text"):
        Engine(translator, None, length=LENGTH)


@pytest.mark.parametrize(
    ("prompt", "limit", "message"),
    [
        ([], 3, "got a prompt of 0 tokens"),
        ([1] * 20, 5, "try 4 tokens to add"),
        ([1] * 30, 5, "a prompt of less than 24 tokens"),
        ([V], 5, "got a prompt with token 23"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(prompt, limit, message):
    with pytest.raises(UserError, match=message):
        engine("gpt2").submit(Text(prompt, limit, GREEDY, ()))
