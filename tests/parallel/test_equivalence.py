"""One device and eight compute the same thing, however the mesh divides it."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import CausalLM, Mesh, Stdlib
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks import losses
from jaxmodels.train import state, step
from jaxmodels.train.optim import OPTIMIZERS

GPT2 = GPT2Config(layers=2, width=32, heads=8, vocab_size=64, context=16, attention="xla")
LLAMA = LlamaConfig(layers=2, width=32, heads=8, kv_heads=8, mlp_width=64, vocab_size=64, attention="xla")
STEPS = 20


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(0, 64, (16, 17)).astype(np.int32)
        rows %= 8  # an eighth of the vocabulary, which is soon learned
        targets = rows[:, 1:].copy()
        targets[: rng.integers(0, 8), rng.integers(0, 16) :] = -1  # devices hold different numbers of targets
        yield {"tokens": rows[:, :-1], "targets": targets}


@functools.cache
def first(model, optimizer):
    """The state before the first step without its key, and the key's data: the same on any mesh (test_zoo_steps.py)."""
    task, optimizers = build(model, optimizer)
    made = jax.jit(lambda key: state.init(task, optimizers, key, True))(jax.random.key(0))
    return jax.device_get((dataclasses.replace(made, rng=None), jax.random.key_data(made.rng)))


def build(model, optimizer):
    task = tasks.build(CausalLM(), model, Stdlib(seq_len=16))
    cfg = OPTIMIZERS.find(optimizer)(peak_lr=1e-2, warmup_steps=5)
    return task, {loss.name: cfg.build(STEPS, task.axes()[loss.trains]) for loss in task.losses}


@functools.cache
def train(model, mesh_cfg, devices, strategy="jit", accumulate=1, optimizer="adamw", steps=STEPS):
    """Loss of each step, the state after them and its layout."""
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    task, optimizers = build(model, optimizer)
    layout = state.layout(task, optimizers, mesh, ema=True)
    began, rng = first(model, optimizer)
    began = dataclasses.replace(began, rng=jax.random.wrap_key_data(rng))
    # copies, since the step donates its state
    now = jax.device_put(began, jax.tree.map(lambda leaf: leaf.sharding, layout), may_alias=False)
    rows = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.sharding(mesh, ("batch", "seq")))
        for name, x in task.batch_spec(16).items()
    }
    take = step.build_step(task, optimizers, mesh, layout, rows, strategy=strategy, accumulate=accumulate, ema=0.99)
    found = []
    for batch in itertools.islice(batches(), steps):
        placed = jax.device_put(batch, task.shardings(mesh, batch))
        now, metrics = take(now, placed)
        found.append(float(metrics["loss"]))
    return np.array(found), now, layout


@pytest.fixture(scope="module")
def alone():
    return {name: train(model, Mesh(), 1) for name, model in (("gpt2", GPT2), ("llama", LLAMA))}


@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        (Mesh(data=8), "jit"),
        (Mesh(data=1, fsdp=8), "jit"),
        (Mesh(data=1, fsdp=4, tensor=2), "jit"),
        (Mesh(data=8), "pmap"),
    ],
    ids=["data8", "fsdp8", "fsdp4-tensor2", "pmap"],
)
def test_eight_devices_give_the_loss_of_one(alone, mesh, strategy):
    found, now, _ = train(GPT2, mesh, 8, **({} if strategy == "jit" else {"strategy": strategy}))
    expected, end, _ = alone["gpt2"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert expected[-1] < expected[0] - 0.5, "the model must have learned something for this to mean anything"
    close = jax.tree.map(lambda a, b: np.allclose(np.asarray(a), np.asarray(b), atol=1e-4), now.params, end.params)
    assert all(jax.tree.leaves(close))


def test_llama_on_every_axis_gives_the_loss_of_one_device(alone):
    found, _, _ = train(LLAMA, Mesh(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_allclose(found, alone["llama"][0], rtol=0, atol=1e-5)


def test_a_large_vocabulary_scored_in_pieces_gives_the_loss_of_one_device(monkeypatch):
    monkeypatch.setattr(losses, "FEW", 64)
    large = dataclasses.replace(GPT2, vocab_size=128)
    one, _, _ = train(large, Mesh(), 1, steps=5)
    eight, _, _ = train(large, Mesh(data=2, fsdp=2, tensor=2), 8, steps=5)
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)


def test_microbatches_give_the_loss_of_the_whole_batch(alone):
    found, _, _ = train(GPT2, Mesh(data=1, fsdp=2), 2, accumulate=4)
    np.testing.assert_allclose(found, alone["gpt2"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_parameters_and_optimizer_state_are_sharded_as_the_table_says(optimizer):
    given = {} if optimizer == "adamw" else {"optimizer": optimizer, "steps": 1}
    _, now, layout = train(GPT2, Mesh(data=1, fsdp=4, tensor=2), 8, **given)
    for leaf, planned in zip(jax.tree.leaves(now), jax.tree.leaves(layout), strict=True):
        assert leaf.sharding.is_equivalent_to(planned.sharding, leaf.ndim)
    up = now.params["model"]["layers"]["mlp"]["up"]["w"]  # layers, embed over fsdp, mlp over tensor
    assert up.addressable_shards[0].data.shape == (2, 32 // 4, 128 // 2)
    moments = [leaf for leaf in jax.tree.leaves(now.opt_state) if leaf.shape == up.shape]
    assert moments or optimizer == "adafactor"
    assert all(leaf.addressable_shards[0].data.shape == (2, 8, 64) for leaf in moments)
    assert now.ema["model"]["layers"]["mlp"]["up"]["w"].addressable_shards[0].data.shape == (2, 8, 64)


def test_a_device_holds_its_share_of_the_state_only():
    _, now, _ = train(GPT2, Mesh(data=1, fsdp=8), 8)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(now.params))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(now.params))
    replicated = sum(leaf.nbytes for leaf in jax.tree.leaves(now.params) if leaf.sharding.is_fully_replicated)
    assert held == (whole - replicated) / 8 + replicated
    assert replicated < 0.1 * whole
