"""GPT-2, LLaMA and its kin: causal, equal however they are run, and as published where a formula says so."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models import flops
from jaxmodels.models.decoder import BlockDecoder, Decoder
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.rotary import RopeScaling, rotary_frequencies, rotate

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, V = 2, 12, 53
LLAMA = LlamaConfig(layers=2, width=32, heads=4, mlp_width=40, vocab_size=V)
CONFIGS = {
    "gpt2": GPT2Config(layers=2, width=32, heads=4, vocab_size=V, context=16),
    "llama": LLAMA,
    "llama-grouped-tied": dataclasses.replace(LLAMA, kv_heads=2, tied=True),
    "llama-head-dim-scaled": dataclasses.replace(
        LLAMA,
        kv_heads=1,
        head_dim=6,
        rope_theta=100.0,
        rope_scaling=RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32),
    ),
    "mistral": dataclasses.replace(LLAMA, kv_heads=2, window=5),
    "qwen": dataclasses.replace(LLAMA, kv_heads=2, qkv_bias=True, qk_norm=True),
}


def invent(model, seed=0):
    """Parameters of which each one matters: no biases of 0, no scales of 1, products of the size of their inputs."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        drawn = 0.2 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(drawn.astype(leaf.dtype), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    return prepare(CONFIGS[request.param])


def prepare(config):
    model = jaxmodels.create(config)
    params = invent(model)
    # no token twice, so that a row of the embedding's gradient belongs to one position
    tokens = jnp.asarray(np.random.default_rng(1).permutation(V)[: B * T].reshape(B, T), jnp.int32)
    apply = jit(model.apply, static_argnames=("train", "head"))
    return SimpleNamespace(
        config=config, model=model, params=params, tokens=tokens, apply=apply, logits=np.asarray(apply(params, tokens))
    )


def close(got, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


def loss_of(model, tokens):
    def loss(params):
        scores = jax.nn.log_softmax(model.apply(params, tokens))
        return -jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], -1).mean()

    return loss


def test_logits_are_float32_and_alive(case):
    assert case.logits.shape == (B, T, V) and case.logits.dtype == np.float32
    assert 0.5 < case.logits.std() < 5


@pytest.mark.parametrize("case", ["gpt2", "llama-grouped-tied", "mistral"], indirect=True)
def test_no_feature_has_a_gradient_from_the_future(case):
    direction = jnp.asarray(np.random.default_rng(2).normal(size=case.config.width), jnp.float32)

    @jit
    @jax.jacrev
    def gradients(tables):
        return (case.model.apply({**case.params, **tables}, case.tokens[:1], head=False) @ direction)[0]

    tables = {name: case.params[name] for name in ("embed", "positions") if name in case.params}
    found = gradients(tables)
    reach = {"embed": found["embed"]["w"][:, case.tokens[0]]}
    if "positions" in found:
        reach["positions"] = found["positions"]["w"][:, :T]
        assert not np.any(found["positions"]["w"][:, T:])
    far = case.config.layers * (
        (getattr(case.config, "window", None) or T) - 1
    )  # each layer sees window - 1 tokens back
    for values in reach.values():
        seen = np.abs(np.asarray(values)).max(-1) > 0  # (T of the feature, T of the input)
        np.testing.assert_array_equal(seen, np.tri(T, dtype=bool) & ~np.tri(T, k=-far - 1, dtype=bool))


@pytest.mark.parametrize("case", ["gpt2", "llama"], indirect=True)
def test_a_scan_over_layers_equals_the_unrolled_layers(case):
    unrolled = jaxmodels.create(case.config, unroll=case.config.layers)
    close(jit(unrolled.apply)(case.params, case.tokens), case.logits)


@pytest.mark.parametrize("case", ["gpt2", "llama"], indirect=True)
def test_layers_follow_one_another_and_a_silent_one_is_as_none(case):
    layers = case.params["layers"]
    swapped = case.apply({**case.params, "layers": jax.tree.map(lambda x: x[::-1], layers)}, case.tokens)
    assert np.abs(swapped - case.logits).max() > 0.1

    def silence(path, x):  # the second layer adds nothing to the residual stream
        return x.at[1].set(0) if {"o", "down"} & {key.key for key in path} else x

    silent = {**case.params, "layers": jax.tree_util.tree_map_with_path(silence, layers)}
    alone = {**case.params, "layers": jax.tree.map(lambda x: x[:1], layers)}
    one = jaxmodels.create(case.config, layers=1)
    close(case.apply(silent, case.tokens), jit(one.apply)(alone, case.tokens))


@pytest.fixture(scope="module", params=["gpt2", "llama-head-dim-scaled"])
def gradients(request):
    """Loss and gradients, computed when asked for, and the FLOPs they take, by what is recomputed."""
    config = CONFIGS[request.param]
    params, tokens = invent(jaxmodels.create(config)), jnp.arange(B * T).reshape(B, T)

    @functools.cache
    def compute(remat):
        return jax.value_and_grad(loss_of(jaxmodels.create(config, remat=remat, attention="xla"), tokens))

    return SimpleNamespace(
        config=config,
        run=functools.cache(lambda remat: jit(compute(remat))(params)),
        flops={remat: flops.count(compute(remat), params) for remat in ("none", "dots", "full", "offload")},
        forward=flops.count(jaxmodels.create(config, attention="xla").apply, params, tokens),
    )


@pytest.mark.parametrize(
    ("gradients", "remat"),
    [*(("gpt2", remat) for remat in ("dots", "full", "offload")), ("llama-head-dim-scaled", "full")],
    indirect=["gradients"],
)
def test_recomputation_changes_neither_loss_nor_gradients(gradients, remat):
    (loss, grads), (loss2, grads2) = gradients.run("none"), gradients.run(remat)
    close(loss2, loss, 1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(grads)) > 1e-2
    jax.tree.map(functools.partial(close, atol=1e-6), grads2, grads)


def test_recomputation_costs_what_it_says(gradients):
    none, dots, full, offload = (gradients.flops[remat] for remat in ("none", "dots", "full", "offload"))
    c, forward = gradients.config, gradients.forward
    head = 2 * B * T * c.width * V
    heads, size = c.heads, getattr(c, "head_size", c.width // c.heads)
    scores = 2 * c.layers * 2 * B * heads * T * T * size
    assert none == 3 * forward
    # what the backward pass does not need is not computed again: the product that gives a block's output
    last = c.layers * 2 * B * T * c.width * (getattr(c, "mlp_width", None) or 4 * c.width)
    assert full - none == offload - none == forward - head - last
    # the products of q and k, and of the weights and v, for want of a batch dimension of their own
    assert dots - none == scores


def test_every_parameter_has_a_gradient(gradients):
    _, grads = gradients.run("none")
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = np.abs(np.asarray(leaf)).max()
        # keys' biases add the same to all of a query's scores, so softmax does not see them
        assert size < 1e-6 if name == "layers/attn/k/b" else size > 1e-5, name


def test_bfloat16_is_float32_to_within_its_rounding(case):
    half = jaxmodels.create(case.config, dtype="bfloat16")
    logits = np.asarray(jit(half.apply)(case.params, case.tokens))
    assert logits.dtype == np.float32
    error = np.abs(logits - case.logits).max() / np.abs(case.logits).max()
    assert 2**-12 < error < 2**-4, "some rounding, of a unit in the last of 8 bits, added up over the layers"
    features = jax.eval_shape(lambda p: half.apply(p, case.tokens, head=False), case.params)
    assert features.dtype == jnp.bfloat16


def test_pieces_through_the_cache_equal_the_whole(case):
    cache = case.model.cache(B, T + 3)
    got, start = [], 0
    for n in (5, 1, 1, 5):  # two programs: some tokens and one, to an empty cache and to one that has some
        logits, cache = case.apply(case.params, case.tokens[:, start : start + n], cache=cache)
        got.append(logits)
        start += n
    close(np.concatenate(got, axis=1), case.logits)
    np.testing.assert_array_equal(cache["length"], [T] * B)
    heads = getattr(case.config, "kv_heads", None) or case.config.heads
    assert cache["layers"]["k"].shape[:4] == (case.config.layers, B, T + 3, heads)


def test_rows_of_a_cache_go_on_each_from_its_own_length(case):
    """A row whose length is set back goes on from there; what it had beyond, such as padding, is not attended to."""
    rows, lengths = np.arange(B), np.array([3, 5])
    _, cache = case.apply(case.params, case.tokens[:, :5], cache=case.model.cache(B, T + 3))
    cache = {**cache, "length": jnp.asarray(lengths)}
    for at in (lengths, lengths + 1, lengths + 2):
        logits, cache = case.apply(case.params, case.tokens[rows, at][:, None], cache=cache)
        close(logits[:, 0], case.logits[rows, at])
    np.testing.assert_array_equal(cache["length"], lengths + 3)


def test_the_cache_has_the_compute_dtype(case):
    cache = jaxmodels.create(case.config, dtype="bfloat16").cache(1, 4)
    assert cache["layers"]["k"].dtype == cache["layers"]["v"].dtype == jnp.bfloat16


def test_packed_documents_equal_documents_alone(case):
    first = T // 2
    segments = jnp.where(jnp.arange(T) < first, 1, 2)[None].repeat(B, 0)
    positions = jnp.where(jnp.arange(T) < first, jnp.arange(T), jnp.arange(T) - first)[None].repeat(B, 0)
    packed = case.apply(case.params, case.tokens, segment_ids=segments, positions=positions)
    close(packed[:, :first], case.apply(case.params, case.tokens[:, :first]))
    close(packed[:, first:], case.apply(case.params, case.tokens[:, first:]))
    other = case.tokens.at[:, :first].set(case.tokens[:, :first][:, ::-1])
    again = case.apply(case.params, other, segment_ids=segments, positions=positions)
    np.testing.assert_array_equal(again[:, first:], packed[:, first:])
    assert np.abs(again[:, :first] - packed[:, :first]).max() > 0.1
    assert np.abs(packed[:, first:] - case.logits[:, first:]).max() > 0.1


def test_features_times_the_unembedding_are_the_logits(case):
    features = case.apply(case.params, case.tokens, head=False)
    assert features.shape == (B, T, case.config.width)
    close(features @ case.model.unembedding(case.params).T, case.logits)
    table = case.params["embed" if getattr(case.config, "tied", True) else "head"]["w"]
    assert case.model.unembedding(case.params) is table


def test_evaluation_is_the_same_with_a_key_and_without(case):
    np.testing.assert_array_equal(case.apply(case.params, case.tokens, rng=jax.random.key(0)), case.logits)


def test_dropout_happens_in_training_only_and_is_a_function_of_the_key():
    model = jaxmodels.create(CONFIGS["gpt2"], dropout=0.3)
    params, tokens = invent(model), jnp.ones((1, 8), jnp.int32)
    apply = jit(model.apply, static_argnames="train")
    calm = apply(params, tokens)
    np.testing.assert_array_equal(apply(params, tokens, rng=jax.random.key(0)), calm)
    close(calm, jaxmodels.create(CONFIGS["gpt2"]).apply(params, tokens))
    one, same, other = (apply(params, tokens, train=True, rng=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - calm).max() > 0.1
    silent = {**params, "layers": jax.tree.map(jnp.zeros_like, params["layers"])}  # leaves that of the embeddings alone
    assert np.abs(apply(silent, tokens, train=True, rng=jax.random.key(0)) - apply(silent, tokens)).max() > 0.1


@pytest.mark.parametrize("config", [CONFIGS["gpt2"], LLAMA], ids=["gpt2", "llama"])
def test_initial_deviations_are_as_published(config):
    wide = dataclasses.replace(config, width=96, mlp_width=128, vocab_size=97)
    model = jaxmodels.create(wide)
    params = jit(model.init)(jax.random.key(3))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("w"):
            np.testing.assert_array_equal(leaf, name.endswith("scale"))
            continue
        # GPT-2, section 2.3: 1/sqrt(N) of the 2 residual projections of each of L layers
        residual = name.split("/")[-2] in ("o", "down") and isinstance(config, GPT2Config)
        expected = 0.02 / np.sqrt(2 * wide.layers) if residual else 0.02
        assert np.std(leaf) == pytest.approx(expected, rel=0.06), name
        assert abs(np.mean(leaf)) < 0.1 * expected, name
        if name.startswith("layers"):
            assert not np.array_equal(leaf[0], leaf[1]), f"{name} starts the same in two layers"


def test_gpt2_refuses_more_tokens_than_its_context():
    model = jaxmodels.create(CONFIGS["gpt2"])
    tokens = jax.ShapeDtypeStruct((1, 17), jnp.int32)
    with pytest.raises(UserError, match="got 17 tokens, expected at most the model's context of 16, try"):
        jax.eval_shape(model.apply, model.shapes(), tokens)


def test_llama_takes_more_tokens_than_its_context():
    model = jaxmodels.create(LLAMA, context=4)
    assert model.longest is None
    assert jax.eval_shape(model.apply, model.shapes(), jax.ShapeDtypeStruct((1, 9), jnp.int32)).shape == (1, 9, V)


def published(inverse, scaling):
    """Llama 3.1's scaling of one frequency, case by case as its reference code has it (`apply_scaling`)."""
    wavelength = 2 * np.pi / inverse
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    if wavelength < high:
        return inverse
    if wavelength > low:
        return inverse / scaling.factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


@pytest.mark.parametrize("scaling", [RopeScaling(8.0), RopeScaling(32.0), RopeScaling(2.0, 1.5, 3.0, 512)], ids=str)
def test_rotary_frequencies_are_llama_3_1s(scaling):
    size, theta = 128, 500_000.0
    plain = theta ** (-np.arange(0, size, 2) / size)
    expected = np.array([published(f, scaling) for f in plain])
    kinds = {"kept": plain == expected, "stretched": expected == plain / scaling.factor}
    between = ~(kinds["kept"] | kinds["stretched"])
    assert kinds["kept"].any() and kinds["stretched"].any() and between.any(), "all three cases must occur"
    np.testing.assert_allclose(rotary_frequencies(size, theta, scaling), expected, rtol=2e-5)
    np.testing.assert_allclose(rotary_frequencies(size, theta, RopeScaling()), plain, rtol=2e-5)


def test_rotation_turns_each_pair_by_its_angle_and_scores_see_distances_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    freq = np.array([1.0, 0.5, 0.1, 0.01], np.float32)

    def turned(x, position):
        return np.asarray(rotate(jnp.asarray(x), jnp.full((1, 1), position), jnp.asarray(freq)))[0, 0, 0]

    pairs = q[0, 0, 0, :4] + 1j * q[0, 0, 0, 4:]
    expected = pairs * np.exp(1j * 7 * freq)
    close(turned(q, 7), np.concatenate([expected.real, expected.imag]), 1e-5)
    assert turned(q, 11) @ turned(k, 4) == pytest.approx(turned(q, 107) @ turned(k, 100), abs=1e-4)
    assert turned(q, 11) @ turned(k, 4) != pytest.approx(turned(q, 12) @ turned(k, 4), abs=1e-3)


def test_an_unfinished_decoder_is_refused_with_what_it_lacks():
    class Unfinished(BlockDecoder):
        """A decoder without blocks."""

    class Bare(Decoder):
        """A decoder without a body."""

    with pytest.raises(UserError, match=r"Unfinished, which has no method blocks, .* try def blocks\(self, train\)"):
        Unfinished(None)
    with pytest.raises(UserError, match=r"Bare, which has no method body, .*try def body\(self, x, ctx, "):
        Bare(config=None)
