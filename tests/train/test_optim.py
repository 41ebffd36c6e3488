"""Schedules, decay by kind of parameter, and every update rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels import create
from jaxmodels.config import OptimConfig
from jaxmodels.train import optim

NAMES = ("adamw", "adam", "sgd", "momentum", "rmsprop", "adafactor", "lion", "muon")


@pytest.fixture(scope="module")
def model():
    return create("gpt2", layers=2, width=16, heads=2, vocab_size=11, context=8, attention="xla")


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def test_cosine_rises_to_the_peak_and_ends_at_its_share():
    rate = optim.schedule(OptimConfig(peak_lr=1.0, warmup_steps=10, final_lr_fraction=0.1), 110)
    assert [float(rate(s)) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert float(rate(60)) == pytest.approx(0.1 + 0.9 * 0.5)
    assert float(rate(110)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("linear", {10: 1.0, 60: 0.55, 110: 0.1}),
        ("constant", {10: 1.0, 110: 1.0}),
        ("wsd", {10: 1.0, 87: 1.0, 99: 0.55, 110: 0.1}),
    ],
)
def test_the_other_schedules(shape, values):
    rate = optim.schedule(OptimConfig(peak_lr=1.0, warmup_steps=10, schedule=shape), 110)
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


def test_without_warm_up_the_first_step_has_the_peak():
    assert float(optim.schedule(OptimConfig(peak_lr=0.5), 100)(0)) == pytest.approx(0.5)


def test_a_run_may_end_within_its_warm_up():
    rate = optim.schedule(OptimConfig(peak_lr=1.0, warmup_steps=50), 40)
    assert [float(rate(s)) for s in (0, 24, 39)] == pytest.approx([0.02, 0.5, 0.8])


def test_kinds_come_from_names_and_axes(model):
    kinds = optim.kinds(model.axes())
    assert kinds["embed"]["w"] == kinds["positions"]["w"] == "embedding"
    assert kinds["layers"]["attn"]["q"] == {"b": "bias", "w": "matrix"}
    assert kinds["layers"]["attn_norm"] == {"bias": "norm", "scale": "norm"}


@pytest.mark.parametrize("decayed", [("matrix",), ("matrix", "embedding"), ("bias", "norm")])
def test_weight_decay_touches_the_chosen_kinds_alone(model, params, decayed):
    cfg = OptimConfig(
        name="adamw", peak_lr=1.0, weight_decay=0.5, decay_on=decayed, clip_norm=None, schedule="constant"
    )
    tx = optim.build(cfg, 10, model.axes())
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), ones)
    got = jax.tree.map(lambda u: float(u.max()), updates)
    want = jax.tree.map(lambda kind: -0.5 if kind in decayed else 0.0, optim.kinds(model.axes()))
    assert got == want


def test_adam_never_decays(model, params):
    tx = optim.build(OptimConfig(name="adam", weight_decay=0.5, clip_norm=None), 10, model.axes())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert all(float(jnp.abs(u).max()) == 0 for u in jax.tree.leaves(updates))


def test_adamw_is_the_published_rule(model, params):
    cfg = OptimConfig(
        name="adamw",
        peak_lr=0.1,
        b1=0.8,
        b2=0.9,
        eps=1e-6,
        weight_decay=0.3,
        decay_on=("matrix",),
        clip_norm=1.0,
        schedule="constant",
    )
    tx = optim.build(cfg, 10, model.axes())
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    updates, _ = tx.update(grads, tx.init(params), params)
    g, p = (np.asarray(tree["layers"]["mlp"]["up"]["w"]) for tree in (grads, params))
    g = g / norm  # clipped to norm 1; after one step the corrected moments are g and g²
    np.testing.assert_allclose(
        updates["layers"]["mlp"]["up"]["w"], -0.1 * (g / (np.abs(g) + 1e-6) + 0.3 * p), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_lowers_the_loss(model, params, name):
    rates = {"sgd": 0.5, "momentum": 0.1, "adafactor": 0.05, "lion": 3e-3}
    tx = optim.build(OptimConfig(name=name, peak_lr=rates.get(name, 1e-2), schedule="constant"), 60, model.axes())
    tokens = jnp.arange(32).reshape(4, 8) % 11

    @jax.jit
    def step(carry, _):
        params, opt_state = carry

        def loss(params):
            logits = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    _, losses = jax.lax.scan(step, (params, tx.init(params)), None, length=60)
    assert np.isfinite(losses).all() and float(losses[-1]) < float(losses[0]) - 0.3


def test_muon_makes_updates_of_matrices_orthogonal_and_leaves_the_rest_to_adam(model, params):
    cfg = OptimConfig(name="muon", peak_lr=1.0, weight_decay=0.0, clip_norm=None, schedule="constant")
    tx = optim.build(cfg, 10, model.axes())
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    matrix = np.asarray(updates["layers"]["attn"]["o"]["w"]).reshape(2, 16, 16)  # layers are a batch
    for layer in matrix:
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 3, "Newton-Schulz brings all singular values near one size"
    first = np.asarray(updates["embed"]["w"]) * -np.sign(grads["embed"]["w"])  # Adam's first step: one size, each sign
    np.testing.assert_allclose(first, first[0, 0], rtol=1e-3)
    assert first[0, 0] > 0
