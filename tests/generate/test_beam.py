"""Beam search: what it finds, what its scores are, and what does not matter to it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.generate import decode
from jaxmodels.models.transformer import TransformerConfig

END, V = 2, 11
LENGTHS = np.array([6, 3, 1, 5])
IDS = (np.arange(6) < LENGTHS[:, None]).astype(np.int32)
SOURCES = np.random.default_rng(3).integers(0, V, IDS.shape).astype(np.int32) * IDS


class Toy:
    """Stands for a model: its logits are a table's row for each source and each sequence of tokens so far."""

    config = longest = None

    def __init__(self, vocab, hurry=0.0):
        self.vocab, self.hurry, self.calls = vocab, hurry, []

    def cache(self, batch, length):
        return {"layers": {"past": jnp.zeros((1, batch, length))}, "length": jnp.zeros(batch, jnp.int32)}

    def apply(self, params, sources, targets, *, segment_ids=None, cache=None):
        jax.debug.callback(lambda: self.calls.append(targets.shape))
        if sources is not None:
            codes = (sources * (segment_ids > 0) * 3 ** jnp.arange(sources.shape[1])).sum(1)
            cache = {**cache, "cross": codes[None], "segment_ids": segment_ids}
        past = jax.lax.dynamic_update_slice(cache["layers"]["past"], targets[None] + 1.0, (0, 0, cache["length"][0]))
        code = (past[0] * (self.vocab + 1) ** jnp.arange(past.shape[2])).sum(1).astype(jnp.int32) + cache["cross"][0]
        logits = params[code % len(params)][:, None].at[..., END].add(self.hurry)
        return logits, {**cache, "layers": {"past": past}, "length": cache["length"] + 1}


machine = functools.cache(Toy)
"""One of each kind, so that it is compiled once."""


def toy(vocab=4, hurry=0.0, seed=0):
    return machine(vocab, hurry), jnp.asarray(2 * np.random.default_rng(seed).normal(size=(997, vocab)), jnp.float32)


def slow():
    """A toy whose targets seldom end soon."""
    return toy(9, -2.0, 2)


@functools.cache
def real():
    """A model whose greedy targets of the sources have lengths of their own."""
    config = TransformerConfig("t5", V, 1, 2, heads=2, width=16, mlp_width=24, norm="pre", tied=False)
    model, rng = jaxmodels.create(config), np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: jnp.asarray(0.8 * rng.normal(size=leaf.shape), leaf.dtype), model.shapes())


@functools.cache
def forced(model):
    if not isinstance(model, Toy):
        return jax.jit(model.apply)

    def apply(params, inputs, tokens, segment_ids):
        cache, out = model.cache(*tokens.shape), []
        for t in range(tokens.shape[1]):
            given = {"segment_ids": segment_ids} if t == 0 else {}
            logits, cache = model.apply(params, None if t else inputs, tokens[:, t : t + 1], cache=cache, **given)
            out.append(logits)
        return jnp.concatenate(out, axis=1)

    return jax.jit(apply)


def logprobs(model, params, inputs, ids, targets):
    """Of each token in place of each of targets (N, T), by teacher forcing; (N, T, V)."""
    tokens = np.concatenate([np.full((len(targets), 1), END), targets[:, :-1]], axis=1)
    arrays = [jnp.asarray(x, jnp.int32) for x in (inputs, tokens, ids)]
    return np.asarray(jax.nn.log_softmax(forced(model)(params, *arrays[:2], segment_ids=arrays[2])))


def length(row):
    return int((row == END).argmax()) + 1


def total(model, params, inputs, ids, targets, lengths=None):
    """Log-probability of each target up to its first end."""
    each = np.take_along_axis(logprobs(model, params, inputs, ids, targets), targets[..., None], axis=2)[..., 0]
    lengths = [length(row) for row in targets] if lengths is None else lengths
    return np.array([row[:n].sum() for row, n in zip(each, lengths, strict=True)])


def exhaust(model, params, vocab, limit, alpha, ends=(END,)):
    """The best of all targets of each source, by trying each."""
    words = [token for token in range(vocab) if token not in ends]
    bodies = [(*body, end) for n in range(limit) for body in itertools.product(words, repeat=n) for end in ends]
    targets = np.array([[*body, *[END] * (limit - len(body))] for body in bodies])
    lengths = np.array([len(body) for body in bodies])
    many = [np.repeat(x, len(targets), axis=0) for x in (SOURCES, IDS)]
    many.append(np.tile(targets, (len(SOURCES), 1)))
    scores = total(model, params, *many, np.tile(lengths, len(SOURCES))).reshape(len(SOURCES), -1)
    return targets[(scores / ((5 + lengths) / 6) ** alpha).argmax(1)]


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_targets(seed):
    model, params = toy(seed=seed)
    best = {}
    for alpha in (0.0, 3.0):
        best[alpha] = exhaust(model, params, 4, 5, alpha)
        found = decode(model, params, SOURCES, end=END, limit=5, segment_ids=IDS, beams=128, alpha=alpha)
        np.testing.assert_array_equal(found.tokens[:, :5], best[alpha])
    assert (best[0.0] != best[3.0]).any(), "the penalty decides something"
    greedy = decode(model, params, SOURCES, end=END, limit=5, segment_ids=IDS)
    assert (greedy.tokens[:, :5] != best[0.0]).any(), "and so does the search"


def test_a_target_ends_at_any_of_several_ends():
    model, params = toy(5, seed=1)
    best = exhaust(model, params, 5, 4, 1.0, ends=(END, 4))
    given = {"limit": 4, "segment_ids": IDS, "beams": 128}
    found = decode(model, params, SOURCES, end=(END, 4), **given)
    np.testing.assert_array_equal(found.tokens[:, :4], best)
    assert (best == 4).any() and (decode(model, params, SOURCES, end=END, **given).tokens[:, :4] != best).any()


def test_a_wide_beam_finds_the_best_of_all_targets_of_a_model():
    found = decode(*real(), SOURCES, end=END, limit=3, segment_ids=IDS, beams=111, alpha=1.0)
    np.testing.assert_array_equal(found.tokens[:, :3], exhaust(*real(), V, 3, 1.0))


@pytest.mark.parametrize("make", [real, slow])
def test_one_beam_is_greedy(make):
    model, params = make()
    targets = np.full((len(SOURCES), 12), END)
    for t in range(12):
        now = logprobs(model, params, SOURCES, IDS, targets)[:, t].argmax(-1)
        over = (targets[:, :t] == END).any(1)
        targets[:, t] = np.where(over | (t == 11), END, now)
    # so large an alpha that a row would prefer to go on, were it not done with its first end
    found = decode(model, params, SOURCES, end=END, limit=12, segment_ids=IDS, alpha=3.0)
    np.testing.assert_array_equal(found.tokens[:, :12], targets)
    assert len({length(row) for row in targets}) > 2


@pytest.mark.parametrize("beams", [1, 4])
def test_scores_are_the_models_log_probabilities(beams):
    found = decode(*real(), SOURCES, end=END, limit=12, segment_ids=IDS, beams=beams)
    assert found.scores.dtype == np.float32 and found.tokens.dtype == np.int32
    np.testing.assert_allclose(found.scores, total(*real(), SOURCES, IDS, found.tokens), rtol=1e-5, atol=1e-4)


def test_more_beams_find_likelier_targets():
    scores = [
        decode(*slow(), SOURCES, end=END, limit=12, segment_ids=IDS, beams=n, alpha=0.0).scores.sum()
        for n in (1, 4, 32)
    ]
    assert scores[0] + 1 < scores[1] < scores[2] - 1


def test_padding_and_company_change_nothing():
    limits = np.array([9, 7, 3, 12])
    run = functools.partial(decode, *real(), end=END, beams=4)
    whole = run(SOURCES, limit=limits, segment_ids=IDS)
    assert all(length(row) <= n for row, n in zip(whole.tokens, limits, strict=True))
    alone = run(SOURCES[1:2, : LENGTHS[1]], limit=limits[1])
    np.testing.assert_array_equal(whole.tokens[1], alone.tokens[0])
    np.testing.assert_allclose(whole.scores[1], alone.scores[0], rtol=1e-5)
    # junk under wider padding, and rows that only fill up
    junk, ids = np.full((6, 9), 7), np.zeros((6, 9), np.int32)
    ids[:4, :6], junk[:4, :6] = IDS, np.where(IDS, SOURCES, 5)
    padded = run(junk, limit=[*limits, 12, 12], segment_ids=ids)
    np.testing.assert_array_equal(padded.tokens[:4], whole.tokens)
    np.testing.assert_allclose(padded.scores[:4], whole.scores, rtol=1e-5)
    assert (padded.tokens[4:] == END).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_that_are_done_stay_as_they_are(beams):
    run = functools.partial(decode, *slow(), SOURCES, end=END, segment_ids=IDS, beams=beams)
    short, long = run(limit=3), run(limit=[16, 3, 3, 3])
    assert length(long.tokens[0]) == 16
    np.testing.assert_array_equal(long.tokens[1:], short.tokens[1:])
    np.testing.assert_array_equal(long.scores[1:], short.scores[1:])
    assert all((row[length(row) :] == END).all() for row in long.tokens)


@pytest.mark.parametrize("beams", [1, 4])
def test_the_search_stops_when_all_rows_are_done(beams):
    model, params = toy(hurry=100.0)
    model.calls.clear()
    found = decode(model, params, SOURCES, end=END, limit=16, segment_ids=IDS, beams=beams)
    jax.effects_barrier()
    assert (found.tokens == END).all() and len(model.calls) == 1


@pytest.mark.parametrize("options", [{"beams": 0}, {"alpha": -0.1}, {"limit": 0}, {"limit": [3, 3, 0, 3]}], ids=str)
def test_a_mistake_is_refused(options):
    with pytest.raises(UserError, match="expected beams >= 1, alpha >= 0, limit >= 1"):
        decode(*toy(), SOURCES, **{"end": END, "limit": 3, **options})
