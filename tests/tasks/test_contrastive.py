"""Pairs of images and texts: the loss by its definition, what counts, and that they are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import AdamW, Contrastive, Stdlib
from jaxmodels.data import open_source
from jaxmodels.errors import UserError
from jaxmodels.tasks.task import divide
from tests.tasks.encoders import CLIP, DATA, PAIRS, VIT, B, learn, synthetic


@pytest.fixture(scope="module")
def paired():
    task = tasks.build(PAIRS, CLIP, DATA)
    params = {"model": jax.jit(task.networks["model"].init)(jax.random.key(0))}
    return task, params, jax.jit(task.losses[0].fn), jax.jit(task.metrics)


def similarities(task, params, batch):
    pixels = batch["images"].astype(np.float32) / 255
    apply = jax.jit(task.networks["model"].apply)
    seen, read, scale = map(np.asarray, apply(params["model"], pixels, batch["tokens"]))
    return scale * seen @ read.T


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_the_contrastive_loss_is_that_of_its_definition(paired):
    task, params, loss, metrics = paired
    batch = synthetic(PAIRS, CLIP)
    logits = similarities(task, params, batch)
    expected = -(np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T))) / 2
    own = {**batch, "classes": np.arange(B, dtype=np.int32)}  # of one pair each: as none
    for rows in (batch, own):
        total, aux = loss(params, {}, rows, jax.random.key(0))
        assert float(total) == pytest.approx(expected.sum(), rel=1e-5) and int(aux.weight) == B
    found = divide(metrics(params, {}, batch))
    assert found["loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found["image_to_text"] == pytest.approx((logits.argmax(1) == np.arange(B)).mean())
    assert found["text_to_image"] == pytest.approx((logits.argmax(0) == np.arange(B)).mean())


def test_pairs_that_fill_up_a_batch_count_neither_as_pairs_nor_against_others(paired):
    _, params, _, metrics = paired
    batch = synthetic(PAIRS, CLIP)
    some = {name: x[:5] for name, x in batch.items()}
    batch["labels"] = np.where(np.arange(B) < 5, 0, -1).astype(np.int32)
    found, expected = metrics(params, {}, batch), metrics(params, {}, some)
    for name, (total, count) in expected.items():
        assert float(found[name][0]) == pytest.approx(float(total), rel=1e-5)
        assert int(found[name][1]) == int(count) == 5


def test_pairs_of_one_class_match_each_other(paired):
    task, params, loss, metrics = paired
    batch, classes = synthetic(PAIRS, CLIP), np.array([0, 1, 0, 2, 2, 3, 0, 4], np.int32)
    batch |= {"classes": classes, "labels": np.where(np.arange(B) < 7, 0, -1).astype(np.int32)}
    logits = similarities(task, params, batch)[:7, :7]
    same = classes[:7, None] == classes[None, :7]
    scores = (log_softmax(logits) + log_softmax(logits.T)) / 2
    total, aux = loss(params, {}, batch, jax.random.key(0))
    assert float(total) == pytest.approx(-(same / same.sum(1, keepdims=True) * scores).sum(), 1e-5) and aux.weight == 7
    found = divide(metrics(params, {}, batch))
    right = [same[np.arange(7), logits.argmax(axis)].mean() for axis in (1, 0)]
    assert [found["image_to_text"], found["text_to_image"]] == pytest.approx(right)


def test_similarities_are_never_multiplied_by_more_than_a_hundred(paired):
    _, params, loss, _ = paired
    batch = synthetic(PAIRS, CLIP)

    def at(log):
        return float(loss({"model": {**params["model"], "scale": {"log": jnp.float32(log)}}}, {}, batch, None)[0])

    assert at(np.log(100)) == pytest.approx(at(9.0), rel=1e-5)
    assert at(np.log(100)) != pytest.approx(at(np.log(50)), rel=1e-2)


def test_pairs_are_learned(paired):
    task, params, _, metrics = paired
    batch = synthetic(PAIRS, CLIP)
    optimizer = AdamW(peak_lr=3e-3, weight_decay=0.0).build(40, task.axes()["model"])
    end = learn(task, params, optimizer, lambda key: batch, steps=40)
    found = divide(metrics(end, {}, batch))
    assert found["loss"] < 0.2 and found["image_to_text"] == found["text_to_image"] == 1, found


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (VIT, DATA, "got task contrastive with ViTConfig, expected a model of images and texts"),
        (CLIP, Stdlib(seq_len=17), "got data.seq_len 17, expected at most model.context 16"),
    ],
)
def test_models_and_lengths_that_do_not_fit_pairs_are_refused(config, data, message):
    with pytest.raises(UserError, match=message):
        tasks.build(PAIRS, config, data)


def test_pairs_do_not_come_from_a_text():
    with pytest.raises(UserError, match="got data stdlib, expected a source of records"):
        open_source(Stdlib(), "train", Contrastive())
