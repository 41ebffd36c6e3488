"""The inputs of matrices, measured: what comes out is what goes in, in any network."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.compress.calibration import Calibration, matrices, stages
from jaxmodels.compress.coding import named
from jaxmodels.config import CausalLM, Classification, Config, Mesh, Synthetic
from jaxmodels.data.contract import IGNORED
from jaxmodels.models.cnn import CNNConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.seq2seq import Seq2Seq
from jaxmodels.tasks.task import Task

GPT = GPT2Config(vocab_size=32, context=8, layers=2, heads=2, width=16)


def task_of(model: Any, task: Any) -> Task:
    cfg = Config(model=model, task=task, data=Synthetic(seq_len=8, batch_size=8))
    return tasks.build(cfg.task, cfg.model, cfg.data, cfg.train, ())


def near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def gpt() -> tuple[Task, Any, dict[str, jax.Array]]:
    task = task_of(GPT, CausalLM())
    params = task.init(jax.random.key(0))
    norm = params["model"]["layers"]["attn_norm"]
    norm["scale"] = norm["scale"] * jnp.linspace(0.5, 2.0, 16)
    tokens = jax.random.randint(jax.random.key(1), (8, 8), 0, 32)
    targets = jnp.where(jnp.arange(8)[:, None] < 6, tokens, IGNORED)  # two rows that do not count
    return task, params, {"tokens": tokens, "targets": targets}


def test_sums_of_a_stack_are_those_of_each_layers_inputs(gpt):
    """The inputs of the second layer's values: the features of a model of one layer that ends in that layer's norm."""
    task, params, batch = gpt
    name = "model/layers/attn/v/w"  # of queries, the first one's does not count, which sees one key
    sums = Calibration(task, make_mesh(Mesh()), [batch, batch]).measure(params, {}, [name], True)[name]
    own = params["model"]
    for layer in (0, 1):
        first = jax.tree.map(lambda w: w[:1], own["layers"])
        norm = jax.tree.map(lambda w: w[layer], own["layers"]["attn_norm"])  # noqa: B023
        if layer == 0:  # a first layer that adds nothing
            first = jax.tree.map(jnp.zeros_like, first)
        one = task_of(dataclasses.replace(GPT, layers=1), CausalLM()).networks["model"]
        x = one.apply({**own, "layers": first, "norm": norm}, batch["tokens"], head=False)[:6].reshape(-1, 16)
        near(sums.gram[layer], 2 * x.T @ x)
        near(sums.square[layer], 2 * (x**2).sum(0))
        near(sums.size[layer], 2 * jnp.abs(x).sum(0))
        near(sums.peak[layer], jnp.abs(x).max(0))
        assert sums.count[layer] == 2 * len(x), "rows that no result depends on do not count"


def test_sums_of_a_convolution_are_those_of_patches_in_the_order_of_its_weights():
    task = task_of(CNNConfig(input_shape=(8, 8, 3), widths=(4,), hidden=(8,)), Classification())
    params = task.init(jax.random.key(0))
    images = np.random.default_rng(0).random((8, 8, 8, 3)).astype(np.float32)
    batch = {"inputs": images, "labels": np.zeros(8, np.int32)}
    names = ["model/conv0/w", "model/hidden0/w"]
    sums = Calibration(task, make_mesh(Mesh()), [batch]).measure(params, {}, names, True)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + 3, j : j + 3].reshape(8, -1) for i in range(8) for j in range(8)]
    x = np.concatenate(windows)
    near(sums["model/conv0/w"].gram, x.T @ x)
    w, b = (np.asarray(params["model"]["conv0"][part]) for part in "wb")
    y = np.maximum(x @ w.reshape(27, 4) + b, 0).reshape(8, 8, 8, 4)  # places, examples
    y = y.transpose(2, 0, 1, 3).reshape(8, 4, 2, 4, 2, 4).max((2, 4)).reshape(8, -1)
    near(sums["model/hidden0/w"].gram, y.T @ y)


def test_matrices_come_in_the_order_in_which_the_network_reads_them():
    """Layer by layer, the encoder before the decoder, whatever they are called."""
    model = TransformerConfig(vocab_size=32, layers=2, decoder_layers=3, heads=2, width=16, mlp_width=32)
    task = task_of(model, Seq2Seq())
    axes = matrices(task)
    tokens = np.zeros((8, 8), np.int32)
    batch = {name: tokens for name in task.batch_spec(8)}
    shapes = {"model": task.networks["model"].shapes()}
    order = Calibration(task, make_mesh(Mesh()), [batch]).in_order(shapes, {}, list(axes))
    assert set(order) == set(axes)
    depths = {name: 3 if "decoder" in name else 2 for name in order}
    found = list(stages(order, named(task.networks), depths))
    assert ["decoder" in stage[0][0] for stage in found] == [False] * 2 + [True] * 3
    assert [stage[0][1] for stage in found] == [0, 1, 0, 1, 2]
    inside = [name.partition("layers/")[2] for name, _ in found[0]]
    assert inside.index("attn/v/w") < inside.index("attn/o/w") < inside.index("mlp/down/w")
