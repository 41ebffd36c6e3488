"""The attention that a report draws is what the model computes."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.data.contract import BatchField
from jaxmodels.models.families import create
from jaxmodels.report import attention
from tests.zoo import ZOO, arrays, example


def test_attention_is_a_softmax_over_the_keys():
    """Of a model with one layer and one head, by hand."""
    config = dataclasses.replace(ZOO["gpt2"][1], layers=1, heads=1)
    model = create(config)
    params = arrays(model)
    (tokens,) = example(model)
    (found,) = attention.weights(lambda x: model.apply(params, x), tokens)
    x = params["embed"]["w"][tokens] + params["positions"]["w"][: tokens.shape[1]]
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * layer["attn_norm"]["scale"] + layer["attn_norm"]["bias"]
    q, k = (jnp.einsum("btd,dhk->bhtk", x, layer["attn"][n]["w"]) + layer["attn"][n]["b"][:, None] for n in "qk")
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(config.width)
    expected = jax.nn.softmax(jnp.where(jnp.tri(tokens.shape[1], dtype=bool), scores, -jnp.inf))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "layers"), [("vit", 2), ("bert", 2), ("mistral", 2), ("transformer", 6), ("clip", 4)])
def test_attention_of_every_layer_is_kept_and_adds_up_to_1(name, layers):
    model = create(ZOO[name][1])
    params = arrays(model)
    inputs = example(model)
    before = model.apply(params, *inputs)
    found = attention.weights(lambda *x: model.apply(params, *x), *inputs)
    assert len(found) == layers and not np.allclose(found[0], found[1])
    for each in found:
        np.testing.assert_allclose(each.sum(-1), 1, atol=1e-5)
    after = model.apply(params, *inputs)
    assert len(found) == layers, "what is computed later is not kept"
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_grid_of_patches_follows_from_their_number_with_and_without_a_class_token():
    assert attention.patches((28, 28), 16) == attention.patches((28, 28), 17) == (4, 4)
    assert attention.patches((8, 4), 8) == attention.patches((8, 4), 9) == (4, 2)
    assert attention.patches((8, 4), 11) is None


def test_the_attention_of_a_task_from_outside_is_of_the_texts_in_its_contract():
    model = create(ZOO["gpt2"][1])
    tokens = np.asarray(example(model)[0])
    ids = BatchField(tokens.shape[1:], axes=("seq",), below=9)
    params = arrays(model)
    run = SimpleNamespace(
        networks={"model": model},
        config=SimpleNamespace(task=SimpleNamespace(answers="")),
        task=SimpleNamespace(fields={"score": BatchField(()), "sentence": ids}),
        apply=lambda ids, **named: model.apply(params, ids, **named),
    )
    batch = {"score": np.zeros(len(tokens)), "sentence": tokens}
    evaluation: Any = SimpleNamespace(
        run=run, examples=lambda first, last: batch, source=SimpleNamespace(tokenizer=None)
    )
    assert [each.name for each in attention.pieces(evaluation)] == ["attention-layers", "attention-heads"]


def test_rollout_keeps_rows_of_1_and_the_order_of_layers():
    a, b = np.array([[[0.0, 1], [0, 1]]]), np.array([[[1.0, 0], [1, 0]]])
    found = attention.rollout([a, b])
    np.testing.assert_allclose(found.sum(-1), 1)
    np.testing.assert_allclose(found[0], (b[0] + np.eye(2)) @ (a[0] + np.eye(2)) / 4)
