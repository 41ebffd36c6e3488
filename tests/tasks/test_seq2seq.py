"""Sequence to sequence: the loss of the targets that count, the same on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import AdamW, CausalLM, Mesh, Seq2Seq, Stdlib, Synthetic
from jaxmodels.data import open_source
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.losses import FEW, cross_entropy
from jaxmodels.train import state, step
from tests.sections import drawn

B, T, V = 8, 12, 48
POST = TransformerConfig(vocab_size=V, layers=2, heads=8, width=32, mlp_width=48)
T5 = dataclasses.replace(POST, variant="t5", norm="pre", activation="gated_gelu", head_dim=8)
DATA = Synthetic(seq_len=T, batch_size=B)
TASK = Seq2Seq(label_smoothing=0.1, z_loss=1e-3)


def batch(vocab_size=V, seed=0):
    source = drawn(Seq2Seq(), dataclasses.replace(POST, vocab_size=vocab_size), seq_len=T, batch_size=B)
    rows = source.batch(np.arange(B) + seed * B, np.zeros(B, np.int64))
    lengths = np.random.default_rng(seed).integers(2, T + 1, (B, 1))  # devices hold different numbers of targets
    rows["targets"] = np.where(np.arange(T) < lengths, rows["targets"], -1)
    rows["segment_ids"] = (np.arange(T) < lengths[::-1]).astype(np.int32)
    rows["target_segment_ids"] = (np.arange(T) < lengths).astype(np.int32)
    return rows


def test_synthetic_pairs_have_the_shapes_that_the_task_takes():
    spec = tasks.build(TASK, POST, DATA).batch_spec(B)
    source = drawn(TASK, POST, seq_len=T, batch_size=B)
    rows = source.batch(np.array([3, 7, 3]), np.zeros(3, np.int64))
    assert set(rows) == set(spec) == {"inputs", "tokens", "targets"}
    assert all(x.shape == (3, T) and x.dtype == spec[name].dtype for name, x in rows.items())
    assert not np.array_equal(rows["inputs"], rows["tokens"])
    np.testing.assert_array_equal(rows["inputs"][0], rows["inputs"][2])
    assert f"inputs {T}, tokens {T}, targets {T}" in source.describe()
    with pytest.raises(UserError, match="got data stdlib, expected a source of records"):
        open_source(Stdlib(), "train", Seq2Seq())


@pytest.mark.parametrize("vocab_size", [V, FEW + 8])
@pytest.mark.parametrize("config", [T5, dataclasses.replace(T5, tied=False)], ids=["tied", "untied"])
def test_the_loss_is_the_cross_entropy_of_the_logits(config, vocab_size):
    model = jaxmodels.create(config, vocab_size=vocab_size, dropout=0.0)
    task = tasks.build(TASK, model.config, DATA)
    params, rows = {"model": model.init(jax.random.key(0))}, batch(vocab_size)
    total, aux = task.losses[0].fn(params, {}, rows, jax.random.key(1))
    ids = {name: rows[name] for name in ("segment_ids", "target_segment_ids")}
    logits = model.apply(params["model"], rows["inputs"], rows["tokens"], **ids)
    expected = cross_entropy(logits, rows["targets"], TASK.label_smoothing, TASK.z_loss)
    assert float(total) == pytest.approx(float(expected.objective), rel=1e-5)
    assert int(aux.weight) == (rows["targets"] >= 0).sum()
    found = tasks.task.divide(task.metrics(params, {}, rows))
    assert found["loss"] == pytest.approx(float(expected.loss / expected.count), rel=1e-5)
    found = task.summarize(task.metrics(params, {}, rows), ())
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_what_is_padded_has_no_part_in_the_loss():
    model = jaxmodels.create(POST, dropout=0.0)
    task = tasks.build(TASK, model.config, DATA)
    params, rows = {"model": model.init(jax.random.key(0))}, batch()
    noise = {name: np.random.default_rng(1).integers(0, V, (B, T)) for name in ("inputs", "tokens")}
    other = {**rows}
    for name, ids in (("inputs", "segment_ids"), ("tokens", "target_segment_ids")):
        other[name] = np.where(rows[ids] == 1, rows[name], noise[name])
        assert not np.array_equal(other[name], rows[name])
    a, b = (task.losses[0].fn(params, {}, r, jax.random.key(1))[0] for r in (rows, other))
    assert float(a) == pytest.approx(float(b), rel=1e-6)


@pytest.fixture(scope="module")
def alone():
    return functools.cache(lambda config: train(config, Mesh(), 1))


def train(model, mesh_cfg, devices, steps=2):
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    task = tasks.build(TASK, model, DATA)
    optimizers = {"loss": AdamW(peak_lr=1e-2).build(steps, task.axes()["model"])}
    layout = state.layout(task, optimizers, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    now = jax.jit(lambda key: state.init(task, optimizers, key), out_shardings=shardings)(jax.random.key(0))
    placed = rules.sharding(mesh, ("batch", "seq"))
    rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for name, x in batch().items()}
    take = step.build_step(task, optimizers, mesh, layout, rows)
    found = []
    for seed in range(steps):
        now, metrics = take(now, jax.device_put(batch(seed=seed), placed))
        found.append([float(metrics[name]) for name in ("loss", "accuracy", "grad_norm")])
    return np.array(found), jax.tree.map(np.asarray, now.params)


@pytest.mark.parametrize(
    ("config", "mesh"),
    [(POST, Mesh(data=8)), (POST, Mesh(data=2, fsdp=2, tensor=2)), (T5, Mesh(fsdp=2, tensor=4))],
    ids=["post-data8", "post-every-axis", "t5-fsdp2-tensor4"],
)
def test_steps_on_eight_devices_are_those_of_one(alone, config, mesh):
    expected, end = alone(config)
    found, params = train(config, mesh, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def same(path, a, b):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # keys' biases have a gradient of nothing but rounding, which Adam makes as large as any
        np.testing.assert_allclose(a, b, atol=0.1 if name.endswith("k/b") else 1e-3, err_msg=name)

    jax.tree_util.tree_map_with_path(same, params, end)


def test_a_reversal_is_learned_only_with_the_source():
    """Teacher forcing: targets are the source backwards, so that their loss can fall below the entropy of a token."""
    model = jaxmodels.create(T5, layers=1, heads=4, dropout=0.0, vocab_size=8)
    task = tasks.build(Seq2Seq(), model.config, DATA)
    optimizer = AdamW(peak_lr=1e-2, warmup_steps=10, weight_decay=0.0).build(200, task.axes()["model"])
    params = {"model": jax.jit(model.init)(jax.random.key(0))}

    def rows(key):
        inputs = jax.random.randint(key, (32, 6), 1, 8)
        targets = inputs[:, ::-1]
        return {"inputs": inputs, "tokens": jnp.pad(targets[:, :-1], ((0, 0), (1, 0))), "targets": targets}

    @jax.jit
    def learn(params):
        def body(carry, key):
            params, moments = carry
            gradient = jax.grad(lambda p: task.losses[0].fn({"model": p}, {}, rows(key), key)[0] / 192)(params)
            updates, moments = optimizer.update(gradient, moments, params)
            return (jax.tree.map(jnp.add, params, updates), moments), None

        keys = jax.random.split(jax.random.key(1), 200)
        return jax.lax.scan(body, (params, optimizer.init(params)), keys)[0][0]

    trained = {"model": learn(params["model"])}
    held_out = rows(jax.random.key(2))
    loss = tasks.task.divide(task.metrics(trained, {}, held_out))["loss"]
    blind = {**held_out, "inputs": jnp.ones_like(held_out["inputs"])}
    assert loss < 0.5 * np.log(7) < tasks.task.divide(task.metrics(trained, {}, blind))["loss"]


@pytest.mark.parametrize("config", [MLPConfig(), GPT2Config()], ids=["mlp", "gpt2"])
def test_only_an_encoder_decoder_is_taken(config):
    with pytest.raises(UserError, match="got task seq2seq with .*Config, expected an encoder-decoder, try Transformer"):
        tasks.build(TASK, config, DATA)


def test_an_encoder_decoder_is_no_causal_language_model():
    with pytest.raises(UserError, match="got task causal_lm with TransformerConfig, expected .* of one text"):
        tasks.build(CausalLM(), POST, DATA)
