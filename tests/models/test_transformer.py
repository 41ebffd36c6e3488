"""The encoder-decoder: what sees what, decoding that encodes once, and T5's bias of the scores."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models import layers
from jaxmodels.models.families import family
from jaxmodels.models.transformer import TransformerConfig, bucket, relative_bias, segment_positions, sinusoids

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, S, T, V = 2, 11, 9, 53
POST = TransformerConfig(vocab_size=V, layers=2, decoder_layers=1, heads=4, width=32, mlp_width=40)
T5 = dataclasses.replace(POST, variant="t5", norm="pre", head_dim=6, relative_buckets=8, relative_distance=7)
CONFIGS = {
    "post": POST,
    "pre": dataclasses.replace(POST, norm="pre", activation="gelu"),
    "t5": T5,
    "t5-v1.1": dataclasses.replace(T5, activation="gated_gelu", tied=False),
}


def invent(model):
    """Parameters of which each one matters."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        drawn = 0.2 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(drawn.astype(leaf.dtype), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


def close(got, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


@pytest.fixture(scope="module", params=["post", "t5"])
def case(request):
    config = CONFIGS[request.param]
    model = jaxmodels.create(config)
    # no token twice, so that a row of the embedding's gradient belongs to one position
    tokens = np.random.default_rng(1).permutation(V)[: B * (S + T)].reshape(B, S + T).astype(np.int32)
    apply = jit(model.apply, static_argnames=("train", "head"))
    inputs, targets = jnp.asarray(tokens[:, :S]), jnp.asarray(tokens[:, S:])
    params = invent(model)
    logits = np.asarray(apply(params, inputs, targets))
    return SimpleNamespace(
        config=config, model=model, params=params, inputs=inputs, targets=targets, apply=apply, logits=logits
    )


def test_logits_are_float32_and_alive(case):
    assert case.logits.shape == (B, T, V) and case.logits.dtype == np.float32
    assert 0.2 * (32**-0.5 if case.config.t5 and case.config.tied else 1) < case.logits.std() < 8


def test_a_target_sees_every_source_and_no_later_target(case):
    direction = jnp.asarray(np.random.default_rng(2).normal(size=case.config.width), jnp.float32)

    @jit
    @jax.jacrev
    def gradients(w):
        params = {**case.params, "embed": {"w": w}}
        return (case.model.apply(params, case.inputs[:1], case.targets[:1], head=False) @ direction)[0]

    found = np.abs(np.asarray(gradients(case.params["embed"]["w"]))).max(-1) > 0
    np.testing.assert_array_equal(found[:, np.asarray(case.targets[0])], np.tril(np.ones((T, T), bool)))
    assert found[:, np.asarray(case.inputs[0])].all()
    assert not found[:, np.asarray(case.targets[1])].any()


def test_a_source_sees_every_source(case):
    direction = jnp.asarray(np.random.default_rng(2).normal(size=case.config.width), jnp.float32)

    @jit
    @jax.jacrev
    def gradients(w):
        return (case.model.apply({**case.params, "embed": {"w": w}}, case.inputs[:1], None) @ direction)[0]

    found = np.abs(np.asarray(gradients(case.params["embed"]["w"]))).max(-1) > 0
    assert found[:, np.asarray(case.inputs[0])].all()


def test_encoding_and_then_decoding_is_the_whole(case):
    memory = case.apply(case.params, case.inputs, None)
    assert memory.shape == (B, S, case.config.width)
    close(case.apply(case.params, None, case.targets, memory=memory), case.logits)


def test_pieces_through_the_cache_equal_the_whole(case):
    ids = jnp.asarray(np.arange(S) < np.array([[S], [4]]), jnp.int32)  # the second source is padded
    whole = case.apply(case.params, case.inputs, case.targets, segment_ids=ids)
    assert np.abs(whole[1] - case.logits[1]).max() > 0.01
    memory = case.apply(case.params, case.inputs, None, segment_ids=ids)
    sources = {"memory": memory, "segment_ids": ids}
    for once in (True, False):  # the sources given with the first piece alone, or with each
        cache, got, start = case.model.cache(B, T + 3), [], 0
        for n in (4, 1, 4):  # some tokens and one, to an empty cache and to one that has some
            now, given = case.targets[:, start : start + n], {} if once and start else sources
            logits, cache = case.apply(case.params, None, now, cache=cache, **given)
            got.append(logits)
            start += n
        close(np.concatenate(got, axis=1), whole)
        assert cache["length"].tolist() == [T] * len(cache["length"])
        assert cache["layers"]["k"].shape == (case.config.decoder_layers, B, T + 3, 4, case.config.head_size)
        assert cache["cross"]["k"].shape == (case.config.decoder_layers, B, S, 4, case.config.head_size)


def test_rows_of_a_cache_go_on_each_from_its_own_length(case):
    """T5's bias by distance too is that of each row's own position."""
    rows, lengths = np.arange(B), np.arange(2, 2 + 2 * B, 2)
    cache = case.model.cache(B, T + 3)
    _, cache = case.apply(case.params, case.inputs, case.targets[:, : lengths.max()], cache=cache)
    cache = {**cache, "length": jnp.asarray(lengths)}
    for at in (lengths, lengths + 1):
        logits, cache = case.apply(case.params, None, case.targets[rows, at][:, None], cache=cache)
        close(logits[:, 0], np.asarray(case.logits)[rows, at])


def test_what_the_decoder_needs_of_the_sources_is_computed_once(case):
    first, cache = case.apply(case.params, case.inputs, case.targets[:, :4], cache=case.model.cache(B, T + 3))
    close(first, case.logits[:, :4])

    def spoil(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.nan * leaf if name.startswith("encoder/") or "/cross/k/" in name or "/cross/v/" in name else leaf

    spoilt = jax.tree_util.tree_map_with_path(spoil, case.params)
    assert np.isnan(case.apply(spoilt, case.inputs, case.targets)).all()
    rest, _ = case.apply(spoilt, None, case.targets[:, 4:8], cache=cache)
    close(rest, case.logits[:, 4:8])


def test_padding_changes_nothing(case):
    short, brief = 6, 4
    alone = case.apply(case.params, case.inputs[:, :short], case.targets[:, :brief])
    mask = jnp.asarray(np.arange(S) < short, jnp.int32)[None].repeat(B, 0)
    target_mask = jnp.asarray(np.arange(T) < brief, jnp.int32)[None].repeat(B, 0)
    both = case.apply(case.params, case.inputs, case.targets, segment_ids=mask, target_segment_ids=target_mask)
    close(both[:, :brief], alone)
    assert np.isfinite(both).all()


def test_padding_of_the_targets_alone_changes_nothing(case):
    mask = jnp.asarray(np.arange(T) < 5, jnp.int32)[None].repeat(B, 0)
    padded = case.apply(case.params, case.inputs, case.targets, target_segment_ids=mask)
    close(padded[:, :5], case.logits[:, :5])


def test_packed_pairs_equal_pairs_alone(case):
    s, t = 6, 4
    ids = jnp.where(jnp.arange(S) < s, 1, 2)[None].repeat(B, 0)
    target_ids = jnp.where(jnp.arange(T) < t, 1, 2)[None].repeat(B, 0)
    packed = case.apply(case.params, case.inputs, case.targets, segment_ids=ids, target_segment_ids=target_ids)
    close(packed[:, :t], case.apply(case.params, case.inputs[:, :s], case.targets[:, :t]))
    close(packed[:, t:], case.apply(case.params, case.inputs[:, s:], case.targets[:, t:]))
    assert np.abs(packed - case.logits).max() > 0.01


@pytest.mark.parametrize("case", CONFIGS, indirect=True)
def test_features_times_the_unembedding_are_the_logits(case):
    features = case.apply(case.params, case.inputs, case.targets, head=False)
    assert features.shape == (B, T, case.config.width)
    close(features @ case.model.unembedding(case.params).T, case.logits)


def test_features_and_the_cache_have_the_compute_dtype_and_logits_are_float32(case):
    half = jaxmodels.create(case.config, dtype="bfloat16")
    for head, dtype in ((True, jnp.float32), (False, jnp.bfloat16)):
        run = functools.partial(half.apply, head=head)
        assert jax.eval_shape(run, case.params, case.inputs, case.targets).dtype == dtype
    assert half.cache(1, 4)["layers"]["k"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["post", "t5"])
def test_dropout_happens_in_training_only_and_is_a_function_of_the_key(name):
    model = jaxmodels.create(CONFIGS[name], dropout=0.3)
    params, inputs = invent(model), (jnp.ones((1, 8), jnp.int32), jnp.ones((1, 7), jnp.int32))
    apply = jit(model.apply, static_argnames="train")
    calm = apply(params, *inputs, rng=jax.random.key(0))
    close(calm, jit(jaxmodels.create(CONFIGS[name], dropout=0.0).apply)(params, *inputs))
    one, same, other = (apply(params, *inputs, train=True, rng=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert min(np.abs(one - other).max(), np.abs(one - calm).max()) > 0.05


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("both", [True, False])
def test_the_relative_bias_and_its_gradient_are_a_lookup_for_each_pair(both, offset):
    rows, columns = 6, 14
    table = layers.Embed(T5.relative_buckets, T5.heads, ("positions", "heads"))
    w, direction = jax.random.normal(jax.random.key(0), (8, 4)), jax.random.normal(jax.random.key(1), (4, 6, 14))
    ahead = np.arange(columns) - (np.arange(rows)[:, None] + offset)
    far = T5.relative_distance
    index = bucket(T5.relative_buckets, far, both)[ahead.clip(-far, far) + far]

    def ours(w):
        bound = table.bind({"params": {"w": w}})
        return relative_bias(T5, bound, rows, columns, jnp.int32(offset), both)[0]

    def lookup(w):
        return jnp.moveaxis(w[index], -1, 0)

    np.testing.assert_array_equal(ours(w), lookup(w))
    close(*(jax.grad(lambda w, f=f: (f(w) * direction).sum())(w) for f in (ours, lookup)), atol=1e-5)


def test_buckets_hold_single_distances_and_then_ranges_by_their_logarithm():
    # Raffel et al. 2020, section 2.1: 32 buckets, up to 128; causal, so that 16 are for one distance each
    table = bucket(32, 128, both=False)
    behind = table[128::-1]
    np.testing.assert_array_equal(behind[:16], np.arange(16))
    assert not table[128:].any(), "no bucket for what comes later"
    starts = [int(np.argmax(behind == k)) for k in range(16, 32)]
    np.testing.assert_array_equal(starts, [int(np.ceil(16 * 8 ** (k / 16) - 1e-9)) for k in range(16)])
    two = bucket(32, 128, both=True)
    np.testing.assert_array_equal(two[129:], two[127::-1] + 16)


def test_t5_sees_distances_and_no_positions():
    model = jaxmodels.create(T5)
    params, tokens = invent(model), jnp.arange(8)[None]
    ids = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1]])
    moved = model.apply(params, tokens, None, segment_ids=ids)[:, 3:]
    close(moved, model.apply(params, tokens[:, 3:], None))


def test_sinusoids_are_the_papers():
    waves = sinusoids(jnp.arange(40)[None], 9)[0]
    for t in (0, 7, 39):
        for i in range(9):
            angle = t / 10000 ** (2 * (i // 2) / 9)
            assert waves[t, i] == pytest.approx(np.cos(angle) if i % 2 else np.sin(angle), abs=1e-5)


def test_positions_start_again_with_each_segment():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [0, 0, 5, 5, 5, 5, 1]])
    np.testing.assert_array_equal(segment_positions(ids), [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 0]])


@pytest.mark.parametrize("name", ["post", "t5-v1.1"])
def test_initial_deviations_are_as_published(name):
    c = dataclasses.replace(CONFIGS[name], decoder_layers=2, width=96, mlp_width=128, vocab_size=97)
    D, F, K, inner = 96, 128, c.head_size, 4 * c.head_size
    model = jaxmodels.create(c)
    params = jit(model.init)(jax.random.key(3))
    # torch.nn.Transformer: Xavier of (3D, D), (D, D) and (F, D); T5: each product keeps its input's size
    xavier = {"o": (2 / (D + inner)) ** 0.5, "up": (2 / (D + F)) ** 0.5, "down": (2 / (D + F)) ** 0.5, "embed": D**-0.5}
    xavier |= dict.fromkeys("qkv", (2 / (D + 3 * inner)) ** 0.5)
    t5 = {"q": (D * K) ** -0.5, "o": inner**-0.5, "down": F**-0.5, "embed": 1.0, "head": 1.0}
    t5 |= dict.fromkeys(("k", "v", "up", "gate", "relative"), D**-0.5)
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind, last = path[-2].key, path[-1].key
        if last != "w":
            np.testing.assert_array_equal(leaf, last == "scale")
            continue
        seen.add(kind)
        expected = (t5 if c.t5 else xavier)[kind]
        assert np.std(leaf) == pytest.approx(expected, rel=0.35 if kind == "relative" else 0.06), kind
        if "layers" in [key.key for key in path]:
            assert not np.array_equal(leaf[0], leaf[1]), "starts the same in two layers"
    assert seen == set(t5 if c.t5 else xavier)


# T5: transformers' own models, with an output layer of its own for version 1.1, as published
COUNTS = {
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
    "bart-large-cnn": 406_290_432,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
}


def test_published_sizes():
    presets = family("transformer").presets
    counts = {name: jaxmodels.create(name).count() for name in presets}
    # Vaswani et al. 2017, table 3: 65 and 213 million; the vocabulary there is "about 37000"
    assert counts.pop("transformer-base") == pytest.approx(65e6, rel=0.03)
    assert counts.pop("transformer-big") == pytest.approx(213e6, rel=0.01)
    assert counts == COUNTS


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="got width 32 with heads 5, expected width to be a multiple"):
        dataclasses.replace(POST, heads=5)
    with pytest.raises(UserError, match="got relative_buckets 32 with relative_distance 16, expected"):
        dataclasses.replace(T5, relative_buckets=32, relative_distance=16)
    model = jaxmodels.create(POST)
    tokens, memory = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.ShapeDtypeStruct((1, 4, 32), jnp.float32)

    def trace(*args, **kwargs):
        jax.eval_shape(model.apply, model.shapes(), *args, **kwargs)

    with pytest.raises(UserError, match="got neither inputs nor memory, expected one of them, try memory="):
        trace(None, tokens)
    with pytest.raises(UserError, match="got inputs and memory, expected one of them"):
        trace(tokens, tokens, memory=memory)
    with pytest.raises(UserError, match="got target_segment_ids with a cache"):
        trace(None, tokens, memory=memory, cache=model.cache(1, 8), target_segment_ids=tokens)
    with pytest.raises(UserError, match="got neither inputs nor memory"):
        trace(None, tokens, cache=model.cache(1, 8))
    _, cache = jax.eval_shape(model.apply, model.shapes(), tokens, tokens, cache=model.cache(1, 8))
    with pytest.raises(UserError, match="got segment_ids and no sources, expected those that came with the sources"):
        trace(None, tokens, cache=cache, segment_ids=tokens)
