"""The LSTM: gates by hand, gradients by autodiff, padding and packing that change nothing, states that go on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import Classification, Stdlib
from jaxmodels.errors import UserError
from jaxmodels.generate.sample import sample
from jaxmodels.models.lstm import LSTMConfig, Marks, State, cell, recur

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, V = 3, 8, 29
LM = LSTMConfig(vocab_size=V, width=6, hidden=5, layers=2)
CLASSIFIER = dataclasses.replace(LM, classes=4, bidirectional=True)


@functools.cache
def prepare(config):
    """A model, its parameters (each of which matters), tokens and its compiled `apply`."""
    model = jaxmodels.create(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.7 * rng.normal(size=leaf.shape), leaf.dtype), model.shapes())
    tokens = jnp.asarray(np.random.default_rng(1).permutation(V)[: B * T].reshape(B, T), jnp.int32)
    return model, params, tokens, jit(model.apply, static_argnames=("train", "head"))


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


def test_a_step_is_the_published_formula():
    rng = np.random.default_rng(0)
    gates, c = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 3))
    i, f, g, o = np.moveaxis(gates, 1, 0)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h, got = cell(jnp.asarray(gates, jnp.float32), jnp.asarray(c, jnp.float32))
    close(got, new, 1e-6)
    close(h, sigmoid(o) * np.tanh(new), 1e-6)


def plain(w, inputs, state, ids):
    """The recurrence in Python, one example and one time step at a time."""
    outputs, last = [], []
    for b in range(B):
        h, c, before = state.h[b], state.c[b], 0
        row = []
        for t in range(T):
            now = 1 if ids is None else int(ids[t, b])
            if now and before not in (0, now):
                h, c = jnp.zeros_like(h), jnp.zeros_like(c)
            if now:
                h, c = (x[0] for x in cell((inputs[t, b] + jnp.einsum("h,hgk->gk", h, w))[None], c[None]))
                before = now
            row.append(h)
        outputs.append(jnp.stack(row))
        last.append((h, c))
    return jnp.stack(outputs, 1), State(*(jnp.stack(x) for x in zip(*last, strict=True)))


IDS = np.array([[0, 0, 1, 1, 0, 1, 2, 0], [3, 3, 0, 2, 2, 2, 2, 1], [0, 0, 0, 0, 0, 0, 0, 0]]).T


@pytest.mark.parametrize("ids", [None, IDS], ids=["plain", "padded-and-packed"])
def test_outputs_and_gradients_are_those_of_a_python_loop(ids):
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4, 3), "inputs": (T, B, 4, 3), "h": (B, 3), "c": (B, 3)}
    given = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((T, B, 3), (B, 3), (B, 3))]
    marks = None if ids is None else Marks.of(jnp.asarray(ids))

    def total(run):
        def loss(g):
            y, last = run(g["w"], g["inputs"], State(g["h"], g["c"]))
            return sum((a * b).sum() for a, b in zip((y, *last), weights, strict=True)), y

        return jit(jax.grad(loss, has_aux=True))(given)

    grads, y = total(lambda w, inputs, state: recur(w, inputs, state, marks, 1))
    expected, reference = total(lambda w, inputs, state: plain(w, inputs, state, ids))
    close(y, reference)
    for name in shapes:
        assert np.abs(expected[name]).max() > 0.1
        close(grads[name], expected[name], 2e-5)


def test_unrolled_time_steps_change_nothing():
    _, params, tokens, apply = prepare(LM)
    close(jit(jaxmodels.create(LM, unroll=3).apply)(params, tokens), apply(params, tokens), 1e-6)


def test_no_feature_has_a_gradient_from_the_future():
    model, params, tokens, _ = prepare(LM)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=LM.hidden), jnp.float32)

    @jit
    @jax.jacrev
    def gradients(table):
        return (model.apply({**params, "embed": {"w": table}}, tokens[:1], head=False) @ direction)[0]

    seen = np.abs(np.asarray(gradients(params["embed"]["w"])[:, tokens[0]])).max(-1) > 0
    np.testing.assert_array_equal(seen, np.tril(np.ones((T, T), bool)))


def test_a_classifier_that_reads_both_ways_sees_every_token():
    model, params, tokens, _ = prepare(CLASSIFIER)

    @jit
    @jax.grad
    def gradient(table):
        return model.apply({**params, "embed": {"w": table}}, tokens).var()

    assert (np.abs(np.asarray(gradient(params["embed"]["w"]))[tokens]).max(-1) > 0).all()


@pytest.mark.parametrize("config", [LM, CLASSIFIER], ids=["language-model", "bidirectional"])
def test_padding_anywhere_changes_nothing(config):
    _, params, tokens, apply = prepare(config)
    expected = apply(params, tokens[:, :5], segment_ids=jnp.ones((B, 5), jnp.int32))
    for places in ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 2, 3, 6, 7]):
        ids = jnp.zeros((B, T), jnp.int32).at[:, jnp.array(places)].set(1)
        padded = tokens[:, ::-1].at[:, jnp.array(places)].set(tokens[:, :5])
        got = apply(params, padded, segment_ids=ids)
        close(got if config.classes else got[:, jnp.array(places)], expected, 1e-6)
    close(apply(params, tokens[:, :5]), expected, 1e-6)


def test_packed_sequences_are_as_each_alone():
    _, params, tokens, apply = prepare(LM)
    ids = jnp.broadcast_to(jnp.array([1, 1, 1, 0, 2, 2, 1, 1]), (B, T))
    got = apply(params, tokens, segment_ids=ids)
    for part in (slice(0, 3), slice(4, 6), slice(6, 8)):
        close(got[:, part], apply(params, tokens[:, part]), 1e-6)
    assert np.abs(got - apply(params, tokens))[:, 4:].max() > 0.05


def test_a_stream_in_pieces_is_the_whole():
    model, params, tokens, apply = prepare(LM)
    cache, pieces = model.cache(B, T), []
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        logits, cache = apply(params, tokens[:, part], cache=cache)
        pieces.append(logits)
    close(jnp.concatenate(pieces, 1), apply(params, tokens), 1e-6)
    assert cache["length"].tolist() == [T] * B


def test_sampling_with_states_gives_the_tokens_of_plain_passes():
    model, params, tokens, _ = prepare(LM)
    params = jax.tree.map(lambda x: 4 * x, params)  # so that a state that went wrong shows
    for length in (1, 5):
        given = np.asarray(tokens[:, :length])
        out = sample(model, params, given, 12, seed=3)
        np.testing.assert_array_equal(out, sample(model, params, given, 12, seed=3, cached=False))
        assert len(set(out[:, length:].flat)) > 3


def test_features_and_output_layer_make_the_logits():
    model, params, tokens, apply = prepare(LM)
    assert model.unembedding is not None
    features = apply(params, tokens, head=False)
    assert features.shape == (B, T, LM.hidden)
    close(features @ model.unembedding(params).T, apply(params, tokens))


def test_dropout_is_between_layers_and_a_function_of_the_key():
    _, params, tokens, apply = prepare(LM)
    config = dataclasses.replace(LM, dropout=0.5)
    drop = prepare(config)[3]
    close(drop(params, tokens), apply(params, tokens), 0)
    one, same, other = (drop(params, tokens, train=True, head=False, rng=jax.random.key(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    # the last outputs are dropped and scaled, and what is 0 is so for its time step alone
    zeros = np.asarray(one == 0)
    assert 0.2 < zeros.mean() < 0.8 and not (zeros.all(1) | (~zeros).all(1)).all()


def test_initial_values_are_uniform_as_in_torch():
    params = jit(jaxmodels.create(LM, hidden=64, width=48, vocab_size=400).init)(jax.random.key(0))
    bound = 64**-0.5
    layer = params["layer1"]["forward"]
    for values in (layer["x"]["w"], layer["h"]["w"], params["head"]["w"], params["embed"]["w"]):
        assert np.std(values) == pytest.approx(bound / 3**0.5, rel=0.03)
        assert 0.98 * bound < np.abs(values).max() <= bound
    # PyTorch has two biases
    assert np.std(layer["x"]["b"]) == pytest.approx(bound * (2 / 3) ** 0.5, rel=0.15)
    assert bound < np.abs(layer["x"]["b"]).max() <= 2 * bound


def test_sizes():
    assert jaxmodels.create("lstm-medium").count() == 2 * 10000 * 650 + 2 * (2 * 650 * 2600 + 2600) == 19_765_200
    assert jaxmodels.create("lstm-large").count() == 2 * 10000 * 1500 + 2 * (2 * 1500 * 6000 + 6000) == 66_012_000
    direction = 2 * 128 * 512 + 512
    assert jaxmodels.create("lstm-sst2").count() == 8192 * 128 + 2 * direction + 2 * 128 * 2 + 2


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="sees the future, expected a classifier, try classes 2"):
        dataclasses.replace(LM, bidirectional=True)
    with pytest.raises(UserError, match="got model.layers 0"):
        dataclasses.replace(LM, layers=0)
    model, params, _, _ = prepare(CLASSIFIER)
    with pytest.raises(UserError, match="classes 4, expected a language model"):
        model.cache(B, T)
    with pytest.raises(UserError, match="classes 4, expected a language model"):
        model.unembedding(params)
    with pytest.raises(UserError, match="task classification with LSTMConfig, expected a classifier"):
        tasks.build(Classification(), LM, Stdlib())
