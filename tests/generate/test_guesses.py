"""Tokens that are guessed from the text itself: they change how soon tokens come, and never which ones."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.generate.draw import Draw
from jaxmodels.generate.engine import Engine, Text
from jaxmodels.generate.programs import GRAM, guesses
from jaxmodels.serve.metrics import compilations
from tests.generate.test_engine import GREEDY, LENGTH, V, alone, load, random_texts


@functools.cache
def engine():
    """An engine whose pages do not suffice for all of its rows, in which a text ends where guesses go beyond."""
    made = Engine(*load("llama"), rows=3, length=LENGTH, page=4, pages=9, chunks=(8,), budget=8, drafts=3)
    made.prepare()
    return made


def test_texts_that_come_and_go_get_the_tokens_that_each_gets_alone():
    """Beside others, whose guesses are right and wrong; with pages that run out, ends, and cancelled texts."""
    made, rng = engine(), np.random.default_rng(1)
    texts, turns = list(random_texts(rng, 24)), 0
    for text in texts[::2]:  # what repeats itself is guessed
        text.prompt = (list(text.prompt[:3]) * 5)[: len(text.prompt)]
    left, gone, compiled = list(texts), [], compilations()
    while left or not made.idle:
        if left and rng.random() < 0.5:
            made.submit(left.pop(0))
            if len(left) % 8 == 0:
                gone.append(made.submit(Text([1, 2, 1, 2, 1], 15, GREEDY, ())))
        if gone and rng.random() < 0.2:
            made.cancel(gone.pop())
        made.advance()
        turns += 1
        assert turns < 1000
    assert compilations() == compiled, "nothing is compiled once the engine is prepared"
    for text in texts:
        assert text.tokens == alone("llama", text, temperature=0)
        assert text.finish == ("length" if len(text.tokens) == len(text.prompt) + text.limit else "stop")
    totals = made.totals
    assert made.pages.free == made.pages.count and not made.running and totals.preemptions > 0
    assert 0 < totals.right < totals.guessed


def test_what_is_drawn_with_a_seed_or_penalties_is_the_same_too():
    """A guess counts if it is what the seed draws at its place, so that not even sampled tokens change."""
    made, prompt = engine(), [3, 1, 3, 1, 3, 1]
    how = {"temperature": 0.9, "top_k": 5, "top_p": 0.9}
    texts = [made.submit(Text(prompt, 14, Draw(**how, seed=seed), (V,))) for seed in range(4)]
    penalized = made.submit(Text(prompt, 14, Draw(temperature=0.0, repetition_penalty=1.7), (V,)))
    list(made.drain())
    for text in texts:
        assert text.tokens == alone("llama", text, **how, seed=text.draw.seed)
    assert penalized.tokens == alone("llama", penalized, temperature=0, repetition_penalty=1.7)
    guessed = made.totals.guessed
    made.submit(Text(prompt, 14, penalized.draw, (V,)))
    list(made.drain())
    assert made.totals.guessed == guessed, "nothing is guessed where penalties count tokens"


def test_log_probabilities_are_those_of_tokens_that_come_one_by_one():
    plain = Engine(*load("llama"), rows=1, length=LENGTH, page=4, chunks=(8,))
    plain.prepare()
    found = []
    for each in (engine(), plain):
        text = each.submit(Text([3, 1, 3, 1, 3], 12, Draw(temperature=0.0, told=2), ()))
        found.append([step for step in each.drain() if step.text is text])
    assert [step.token for step in found[0]] == [step.token for step in found[1]]
    for one, other in zip(*found, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _ in one.likeliest] == [token for token, _ in other.likeliest]


def test_guesses_follow_the_last_place_that_is_most_like_the_end():
    rng, S, count = np.random.default_rng(0), 12, 4
    history = rng.integers(0, 3, (200, S))
    last = rng.integers(0, S, 200)
    found, numbers = map(np.asarray, guesses(history, last, count))
    for row, end, guess, number in zip(history.tolist(), last.tolist(), found.tolist(), numbers.tolist(), strict=True):
        text = row[: end + 1]
        best = next(
            (at for size in range(GRAM, 0, -1) for at in range(end - 1, size - 2, -1)
             if size <= end and text[at - size + 1 : at + 1] == text[-size:]), None,
        )  # fmt: skip
        wanted = [] if best is None else (text[best + 1 :] * count)[:count]
        assert guess[:number] == wanted


def test_a_state_that_cannot_be_taken_back_is_refused():
    with pytest.raises(UserError, match="which its state cannot take back"):
        Engine(*load("lstm"), rows=1, length=LENGTH, drafts=2)
