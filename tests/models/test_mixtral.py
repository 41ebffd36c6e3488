"""Mixtral: all its experts or as many as have room, causal, and equal however it is run."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import SGD, CausalLM, Constant, Mesh, Stdlib
from jaxmodels.errors import UserError
from jaxmodels.generate.sample import sample
from jaxmodels.models import mixtral
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.train import state, step

B, T, V = 2, 12, 53
BASE = MixtralConfig(
    layers=2, width=32, heads=4, kv_heads=2, mlp_width=24, vocab_size=V, experts=4, balance_loss=0.1, z_loss=0.01
)
TIGHT = dataclasses.replace(BASE, routing="capacity", capacity_factor=1.0)  # so that some tokens are dropped
CONFIGS = {"dropless": BASE, "capacity": TIGHT, "window": dataclasses.replace(BASE, window=5, experts_per_token=3)}


def invent(model, seed=0):
    """Parameters of which each one matters."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        drawn = 0.3 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(drawn.astype(leaf.dtype), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    config = CONFIGS[request.param]
    model = jaxmodels.create(config)
    params = invent(model)
    tokens = jnp.asarray(np.random.default_rng(1).permutation(V)[: B * T].reshape(B, T), jnp.int32)
    apply = jax.jit(model.apply, static_argnames=("head", "auxiliary"))
    logits, losses = apply(params, tokens, auxiliary=True)
    return SimpleNamespace(
        name=request.param,
        config=config,
        model=model,
        params=params,
        tokens=tokens,
        apply=apply,
        logits=np.asarray(logits),
        losses={name: float(x) for name, x in losses.items()},
    )


def close(got, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


def test_with_room_for_all_capacity_equals_dropless_and_without_it_does_not():
    tokens = jax.random.randint(jax.random.key(0), (B, T), 0, V)
    plain = jaxmodels.create(BASE)
    params = invent(plain)

    def run(model):
        def loss(params):
            logits, losses = model.apply(params, tokens, auxiliary=True)
            return jnp.sin(logits).sum() + sum(losses.values()), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, logits), grads = run(plain)
    (_, roomy), same = run(jaxmodels.create(BASE, routing="capacity", capacity_factor=4.0))
    close(roomy, logits)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-4), same, grads)
    tight = jax.jit(jaxmodels.create(TIGHT).apply)(params, tokens)
    changed = np.abs(tight - logits).max(-1) > 1e-3
    assert changed.any() and not changed[:, 0].any(), "a row's first token always finds room"


@pytest.mark.parametrize("case", ["capacity", "window"], indirect=True)
def test_no_feature_has_a_gradient_from_the_future(case):
    """Of attention over all tokens without places, test_decoders.py says it."""
    direction = jnp.asarray(np.random.default_rng(2).normal(size=case.config.width), jnp.float32)

    @jax.jit
    @jax.jacrev
    def gradients(table):
        return (case.model.apply({**case.params, "embed": {"w": table}}, case.tokens[:1], head=False) @ direction)[0]

    seen = np.abs(np.asarray(gradients(case.params["embed"]["w"])[:, case.tokens[0]])).max(-1) > 0
    far = case.config.layers * ((case.config.window or T) - 1)
    np.testing.assert_array_equal(seen, np.tri(T, dtype=bool) & ~np.tri(T, k=-far - 1, dtype=bool))


def test_a_later_token_takes_no_place_from_an_earlier_one(case):
    """A choice has no gradient, so that this is told by other tokens at the end."""
    for cut in (3, 6, 9):
        other = case.tokens.at[:, cut:].set(case.tokens[:, cut:][:, ::-1] // 2)
        np.testing.assert_array_equal(case.apply(case.params, other)[:, :cut], case.logits[:, :cut])
        assert np.abs(case.apply(case.params, other)[:, cut:] - case.logits[:, cut:]).max() > 0.1


def test_padding_takes_no_place_and_no_part_in_the_losses(case):
    real = jnp.asarray(np.arange(T) >= 5, jnp.int32)[None].repeat(B, 0)
    positions = jnp.maximum(jnp.arange(T) - 5, 0)[None].repeat(B, 0)
    run = functools.partial(case.apply, segment_ids=real, positions=positions, auxiliary=True)
    logits, losses = run(case.params, case.tokens)
    again, losses2 = run(case.params, case.tokens.at[:, :5].set(case.tokens[:, :5] // 2))
    close(again[:, 5:], logits[:, 5:], 1e-6)
    for name, value in losses.items():
        assert float(losses2[name]) == pytest.approx(float(value), rel=1e-6)
        assert abs(float(value) - case.losses[name]) > 1e-6
    if case.name == "dropless":
        short, losses3 = case.apply(case.params, case.tokens[:, 5:], auxiliary=True)
        close(logits[:, 5:], short)
        assert {name: pytest.approx(float(x), rel=1e-5) for name, x in losses3.items()} == losses


def test_losses_are_weighted_and_least_when_all_experts_are_alike(case):
    if case.config.experts_per_token == 2:
        assert case.losses["balance_loss"] > 1.01 * case.config.balance_loss * 2
    double = dataclasses.replace(case.config, balance_loss=0.2, z_loss=0.02)
    _, losses = jax.jit(functools.partial(jaxmodels.create(double).apply, auxiliary=True))(case.params, case.tokens)
    assert {name: float(x) / 2 for name, x in losses.items()} == pytest.approx(case.losses)
    layers = case.params["layers"]
    even = {**layers, "moe": {**layers["moe"], "router": {"w": jnp.zeros_like(layers["moe"]["router"]["w"])}}}
    _, losses = case.apply({**case.params, "layers": even}, case.tokens, auxiliary=True)
    c = case.config
    assert float(losses["balance_loss"]) == pytest.approx(c.balance_loss * c.experts_per_token, rel=1e-5)
    assert float(losses["router_z_loss"]) == pytest.approx(c.z_loss * np.log(c.experts) ** 2, rel=1e-5)


# --- however it is run


@pytest.fixture(scope="module", params=["dropless", "capacity"])
def gradients(request):
    """Logits, losses and gradients, as functions of what is unrolled and recomputed."""
    tokens = jnp.arange(B * T).reshape(B, T)

    def run(**changes):
        model = jaxmodels.create(CONFIGS[request.param], **changes)

        def loss(params):
            logits, losses = model.apply(params, tokens, auxiliary=True)
            return jnp.sin(logits).mean() + sum(losses.values()), (logits, losses)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(invent(model))
        return *out, grads

    return run, run()


@pytest.mark.parametrize("gradients", ["dropless"], indirect=True)
def test_unrolled_and_recomputed_it_is_the_same_losses_too(gradients):
    """Without the losses, test_zoo.py looks at it for both routings."""
    run, (logits, losses, grads) = gradients
    logits2, losses2, grads2 = run(unroll=2, remat="full")
    close(logits2, logits)
    close(list(losses2.values()), list(losses.values()), 1e-6)
    jax.tree.map(close, grads2, grads)


def test_every_parameter_has_a_gradient(gradients):
    _, (_, _, grads) = gradients
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.abs(np.asarray(leaf)).max() > 1e-4, name
        if name.startswith("layers/moe"):
            assert np.abs(np.asarray(leaf)).max((-1, -2)).min() > 1e-4, f"{name}: each layer and expert"


def test_both_losses_reach_the_routers():
    model = jaxmodels.create(BASE)
    tokens = jnp.arange(B * T).reshape(B, T)

    @jax.jit
    def pull(params):
        losses, back = jax.vjp(lambda p: model.apply(p, tokens, head=False, auxiliary=True)[1], params)
        rest = dict.fromkeys(losses, jnp.float32(0))
        return [back({**rest, name: jnp.float32(1)})[0]["layers"]["moe"]["router"]["w"] for name in losses]

    for grads in pull(invent(model)):
        assert np.abs(np.asarray(grads)).max((1, 2)).min() > 1e-5, "of each layer"


def test_bfloat16_is_float32_to_within_its_rounding():
    model, half = jaxmodels.create(BASE), jaxmodels.create(BASE, dtype="bfloat16")
    params, tokens = jax.jit(model.init)(jax.random.key(0)), jnp.arange(B * T).reshape(B, T)
    exact = jax.jit(model.apply)(params, tokens)
    rounded, losses = jax.jit(functools.partial(half.apply, auxiliary=True))(params, tokens)
    assert rounded.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in losses.values())
    assert 0 < np.abs(rounded - exact).max() / np.abs(exact).max() < 2**-4
    grads = jax.eval_shape(jax.grad(lambda p: half.apply(p, tokens).sum()), params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_the_router_is_computed_in_float32(monkeypatch):
    seen, greatest = [], mixtral.greatest
    monkeypatch.setattr(mixtral, "greatest", lambda scores, k: seen.append(scores.dtype) or greatest(scores, k))
    half = jaxmodels.create(BASE, dtype="bfloat16")
    jax.eval_shape(half.apply, half.shapes(), jax.ShapeDtypeStruct((B, T), jnp.int32))
    assert set(seen) == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["dropless", "window"])
def test_tokens_through_the_cache_equal_the_whole(name):
    config = CONFIGS[name]
    model = jaxmodels.create(config)
    params, tokens = invent(model), jax.random.randint(jax.random.key(0), (B, T), 0, V)
    apply, cache, got = jax.jit(model.apply), model.cache(B, T + 2), []
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        logits, cache = apply(params, tokens[:, start:stop], cache=cache)
        got.append(logits)
    close(jnp.concatenate(got, 1), apply(params, tokens), 5e-5)


@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_it_generates(name):
    model = jaxmodels.create(CONFIGS[name])
    params, prompt = invent(model), np.array([[3, 1, 4], [1, 5, 9]])
    made = sample(model, params, prompt, 5, temperature=0)
    assert made.shape == (2, 8) and np.array_equal(made[:, :3], prompt)
    if name == "dropless":
        np.testing.assert_array_equal(sample(model, params, prompt, 5, temperature=0, cached=False), made)


# --- what is published, and what is refused


@pytest.mark.parametrize(
    ("name", "count", "active"),
    [("mixtral-8x7b", 46_702_792_704, 12.9e9), ("mixtral-8x22b", 140_620_634_112, 39.1e9)],
)
def test_presets_count_as_published(name, count, active):
    model = jaxmodels.create(name)
    assert model.count() == count
    c = model.config
    used = count - c.layers * 3 * (c.experts - c.experts_per_token) * c.width * c.mlp_width
    assert used == pytest.approx(active, rel=0.005)


def test_initial_deviations_are_as_published():
    model = jaxmodels.create(BASE, width=96, mlp_width=64)
    params = jax.jit(model.init)(jax.random.key(3))
    moe = params["layers"]["moe"]
    assert {name: x["w"].shape for name, x in moe.items()} == {
        "router": (2, 96, 4),
        "gate": (2, 4, 96, 64),
        "up": (2, 4, 96, 64),
        "down": (2, 4, 64, 96),
    }
    for name, x in moe.items():
        assert np.std(x["w"]) == pytest.approx(0.02, rel=0.06), name
    assert not np.array_equal(moe["up"]["w"][0, 0], moe["up"]["w"][0, 1])
    assert model.axes()["layers"]["moe"] == {
        "router": {"w": ("layers", "embed", "gates")},
        "gate": {"w": ("layers", "expert", "embed", "mlp")},
        "up": {"w": ("layers", "expert", "embed", "mlp")},
        "down": {"w": ("layers", "expert", "mlp", "embed")},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts_per_token": 5},
            "got experts_per_token 5, expected from 1 to all 4 experts, try experts_per_token 4",
        ),
        ({"experts_per_token": 0}, "try --model.experts-per-token 1"),
        ({"capacity_factor": 0.0}, "got model.capacity_factor 0.0, expected above 0, try --model.capacity-factor 1.25"),
        ({"heads": 3}, "got width 32 with heads 3"),
        ({"head_dim": 7}, "got head size 7, expected an even number"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **changes)


# --- training


def test_the_objective_has_the_auxiliary_losses_once_and_evaluation_has_none():
    model = jaxmodels.create(BASE)
    task = tasks.build(CausalLM(), BASE, Stdlib(seq_len=T, batch_size=B))
    params = {"model": invent(model)}
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": np.where(np.arange(T) < 7, tokens[:, 1:], -1)}
    total, aux = jax.jit(task.losses[0].fn)(params, {}, batch, jax.random.key(0))
    logits, losses = jax.jit(functools.partial(model.apply, auxiliary=True))(params["model"], batch["tokens"])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[:, :7]
    expected = float(-picked.mean())
    shown = {name: float(value / count) for name, (value, count) in aux.sums.items()}
    assert set(shown) == {"loss", "accuracy", "balance_loss", "router_z_loss"}
    assert shown["loss"] == pytest.approx(expected + sum(map(float, losses.values())), rel=1e-5)
    assert shown["balance_loss"] == pytest.approx(float(losses["balance_loss"]), rel=1e-5) != 0
    assert float(total / aux.weight) == pytest.approx(shown["loss"])
    measured = jax.jit(task.metrics)(params, {}, batch)
    assert set(measured) == {"loss", "accuracy"}
    assert float(measured["loss"][0] / measured["loss"][1]) == pytest.approx(expected, rel=1e-5)


# --- on a mesh

MESHES = {
    "fsdp4-tensor2": Mesh(data=1, fsdp=4, tensor=2),
    "expert4-data2": Mesh(data=2, expert=4),
}
# plain gradient descent: Adam's first step is the gradient's sign, which rounding decides where it is nearly 0
DESCENT = SGD(peak_lr=0.1, weight_decay=0.0, clip_norm=None, schedule=Constant())


@functools.cache
def one_step(routing, mesh):
    """Parameters after one step, metrics, and the share of each parameter that a device holds."""
    config = dataclasses.replace(TIGHT, vocab_size=64, layers=1, routing=routing)
    devices = make_mesh(MESHES[mesh] if mesh else Mesh(), jax.devices()[: 8 if mesh else 1])
    task = tasks.build(CausalLM(), config, Stdlib(seq_len=T, batch_size=16))
    optimizers = {loss.name: DESCENT.build(1, task.axes()[loss.trains]) for loss in task.losses}
    layout = state.layout(task, optimizers, devices)
    params = {"model": invent(jaxmodels.create(config))}
    moments = {loss.name: optimizers[loss.name].init(params["model"]) for loss in task.losses}
    now = state.State(jnp.zeros((), jnp.int32), params, {}, moments, None, jax.random.key(0))
    now = jax.device_put(now, jax.tree.map(lambda leaf: leaf.sharding, layout))
    tokens = np.random.default_rng(0).integers(0, 64, (16, T + 1)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch = jax.device_put(batch, rules.sharding(devices, ("batch", "seq")))
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    now, metrics = step.build_step(task, optimizers, devices, layout, rows)(now, batch)
    held = jax.tree.map(lambda x: x.addressable_shards[0].data.size / x.size, now.params["model"])
    return jax.tree.map(np.asarray, now.params["model"]), jax.tree.map(float, metrics), held


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_eight_devices_take_the_step_of_one(routing, mesh):
    params, metrics, _ = one_step(routing, None)
    params8, metrics8, _ = one_step(routing, mesh)
    assert metrics8 == pytest.approx(metrics, rel=1e-4, abs=1e-5) and metrics["grad_norm"] > 0.1
    jax.tree.map(close, params8, params)


def test_a_device_holds_its_share_of_the_experts():
    for mesh, share in (("expert4-data2", 1 / 4), ("fsdp4-tensor2", 1 / 8)):
        moe = one_step("capacity", mesh)[2]["layers"]["moe"]
        assert [moe[name]["w"] for name in ("gate", "up", "down")] == [share] * 3


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_greatest_are_those_of_a_sort_in_value_place_and_gradient(k):
    scores = jax.random.normal(jax.random.key(0), (4, 5, 8)).round(1)  # with equals, of which the first comes first
    for got, want in zip(mixtral.greatest(scores, k), jax.lax.top_k(scores, k), strict=True):
        np.testing.assert_array_equal(got, want)

    def slope(function):
        return jax.grad(lambda scores: (function(scores, k)[0] * jnp.arange(1.0, k + 1)).sum())(scores)

    np.testing.assert_array_equal(slope(mixtral.greatest), slope(jax.lax.top_k))
