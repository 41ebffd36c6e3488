"""Masked language modeling: what is hidden, what counts, and classifiers of the same encoders."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import AdamW, CausalLM, Classification, MaskedLM, Mesh, Stdlib
from jaxmodels.data.contract import check_batch
from jaxmodels.errors import UserError
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.losses import cross_entropy
from jaxmodels.tasks.masked_lm import mask
from jaxmodels.tasks.task import divide
from tests.tasks.encoders import BERT, CLIP, DATA, MLM, PAIRS, VIT, B, T, V, learn, padded, synthetic


@functools.cache
def masks(fraction=0.3, length=40, free=30, rows=4000):
    """Many texts with a share of their first `free` tokens taken out."""
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, V - 1)
    may = jnp.broadcast_to(jnp.arange(length) < free, tokens.shape)
    hide = functools.partial(mask, fraction=fraction, gap=V - 1, vocab_size=V)
    hidden, at, targets = jax.jit(jax.vmap(hide))(jax.random.split(jax.random.key(0), rows), tokens, may)
    return tuple(map(np.asarray, (tokens, hidden, at, targets)))


def test_a_share_of_the_free_tokens_is_taken_and_is_what_was_there():
    tokens, hidden, at, targets = masks()
    assert at.shape == targets.shape == (4000, 12) and ((targets >= 0).sum(1) == 9).all()
    there = np.take_along_axis(tokens, at, 1)
    np.testing.assert_array_equal(targets[targets >= 0], there[targets >= 0])
    assert (at[targets >= 0] < 30).all()
    untouched = np.ones_like(tokens, bool)
    np.put_along_axis(untouched, np.where(targets >= 0, at, at[:, :1]), False, 1)
    np.testing.assert_array_equal(hidden[untouched], tokens[untouched])
    assert (np.sort(at, 1)[:, 1:] > np.sort(at, 1)[:, :-1]).all(), "no place twice"
    share = np.bincount(at[targets >= 0], minlength=40)[:30] / 4000
    np.testing.assert_allclose(share, 0.3, atol=0.035)


def test_eight_of_ten_become_the_gap_one_any_token_one_stays():
    _, hidden, at, targets = masks()
    taken = targets >= 0
    now = np.take_along_axis(hidden, at, 1)[taken]
    assert (now == V - 1).mean() == pytest.approx(0.8 + 0.1 / V, abs=0.01)
    assert (now == targets[taken]).mean() == pytest.approx(0.1 + 0.1 / V, abs=0.01)
    other = now[(now != V - 1) & (now != targets[taken])]
    assert len(other) / taken.sum() == pytest.approx(0.1 * (V - 2) / V, abs=0.01)
    assert np.bincount(other, minlength=V)[: V - 1].min() > 0.5 * len(other) / V


@pytest.mark.parametrize(("free", "taken"), [(0, 0), (1, 1), (2, 1), (10, 3), (40, 12)])
def test_at_least_one_token_is_taken_where_one_is_free(free, taken):
    tokens, hidden, _, targets = masks(free=free, rows=8)
    assert ((targets >= 0).sum(1) == taken).all()
    if not free:
        np.testing.assert_array_equal(hidden, tokens)


@pytest.fixture(scope="module")
def masked():
    """The task, parameters, and its compiled loss and metrics."""
    config = dataclasses.replace(BERT, dropout=0.0)
    task = tasks.build(dataclasses.replace(MLM, keep=(1, 2, 3)), config, DATA)
    params = {"model": jax.jit(task.networks["model"].init)(jax.random.key(0))}
    return task, params, jax.jit(task.losses[0].fn), jax.jit(task.metrics)


def test_padding_ignored_targets_and_kept_ids_are_never_taken(masked):
    _, params, loss, _ = masked
    batch = padded()
    batch["tokens"] = np.where(np.arange(T) % 2, batch["tokens"], 2).astype(np.int32)
    batch["targets"] = np.where(np.arange(T) < 6, 0, -1)[None].repeat(B, 0).astype(np.int32)
    free = (batch["segment_ids"] > 0) & (batch["targets"] >= 0) & ~np.isin(batch["tokens"], (1, 2, 3))
    expected = np.minimum(np.maximum(np.round(0.3 * free.sum(1)), 1), free.sum(1)).sum()
    assert 0 < expected < B * round(0.3 * T)
    assert int(loss(params, {}, batch, jax.random.key(0))[1].weight) == expected
    gone = {**batch, "targets": np.full((B, T), -1, np.int32)}
    total, aux = loss(params, {}, gone, jax.random.key(0))
    assert float(total) == 0 == int(aux.weight)


def test_what_stands_in_padding_has_no_part_in_the_loss(masked):
    _, params, loss, _ = masked
    batch, noise = padded(), padded(seed=1)
    other = {**batch, "tokens": np.where(batch["segment_ids"] == 1, batch["tokens"], noise["tokens"])}
    assert not np.array_equal(other["tokens"], batch["tokens"])
    kept = [{**b, "tokens": np.where(np.isin(b["tokens"], (1, 2, 3)), 4, b["tokens"])} for b in (batch, other)]
    a, b = (float(loss(params, {}, x, jax.random.key(1))[0]) for x in kept)
    assert a == pytest.approx(b, rel=1e-5)


def test_the_loss_is_that_of_the_places_taken(masked):
    task, params, loss, _ = masked
    model, batch = task.networks["model"], padded()
    rng = jax.random.key(5)
    total, aux = loss(params, {}, batch, rng)
    free = (batch["segment_ids"] > 0) & ~np.isin(batch["tokens"], (1, 2, 3))
    keys = jax.random.split(jax.random.split(rng)[1], B)
    hide = functools.partial(mask, fraction=0.3, gap=V - 1, vocab_size=V)
    hidden, at, targets = map(np.asarray, jax.jit(jax.vmap(hide))(keys, batch["tokens"], free))
    logits = jax.jit(model.apply)(params["model"], hidden, segment_ids=batch["segment_ids"])
    everywhere = np.full((B, T), -1)
    for row in range(B):
        for place, target in zip(at[row].tolist(), targets[row].tolist(), strict=True):
            if target >= 0:
                everywhere[row, place] = target
    expected = cross_entropy(logits, everywhere)
    assert float(total) == pytest.approx(float(expected.objective), rel=1e-5)
    assert int(aux.weight) == int(expected.count) > B


def test_training_hides_other_tokens_at_each_step_and_evaluation_always_the_same(masked):
    task, params, loss, metrics = masked
    batch = padded()
    found = {float(loss(params, {}, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1, 2)}
    assert len(found) == 3
    whole = metrics(params, {}, batch)
    order = np.random.default_rng(0).permutation(B)
    mixed = metrics(params, {}, {name: x[order] for name, x in batch.items()})
    halves = [metrics(params, {}, {name: x[part] for name, x in batch.items()}) for part in (order[:4], order[4:])]
    for name, (total, count) in whole.items():
        assert float(mixed[name][0]) == pytest.approx(float(total), rel=1e-5)
        assert sum(float(half[name][0]) for half in halves) == pytest.approx(float(total), rel=1e-5)
        assert sum(int(half[name][1]) for half in halves) == int(count) > B
    assert task.summarize(whole, ())["perplexity"] == pytest.approx(np.exp(divide(whole)["loss"]))


def test_sums_of_texts_of_different_lengths_are_those_of_one_device_on_eight(masked):
    """Devices hold different numbers of places; what is hidden is the same."""
    task, params, loss, _ = masked
    batch, key = padded(), jax.random.key(3)
    total, aux = loss(params, {}, batch, key)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, rules.shardings_of(mesh, task.axes(), jax.eval_shape(lambda: params)))
    with jax.set_mesh(mesh):
        spread = jax.device_put(batch, task.shardings(mesh, batch))
        total8, aux8 = jax.jit(task.losses[0].fn)(placed, {}, spread, key)
    assert float(total8) == pytest.approx(float(total), rel=1e-5) and int(aux8.weight) == int(aux.weight)


def test_a_hidden_token_is_learned_from_the_others():
    """Texts of one token over and over: what is hidden is what stands beside it."""
    config = jaxmodels.create(BERT, layers=1, vocab_size=12, dropout=0.0).config
    task = tasks.build(MaskedLM(), config, DATA)
    optimizer = AdamW(peak_lr=3e-3, weight_decay=0.0).build(120, task.axes()["model"])

    def rows(key):
        return {"tokens": jnp.broadcast_to(jax.random.randint(key, (32, 1), 0, 11), (32, T))}

    params = {"model": jax.jit(task.networks["model"].init)(jax.random.key(0))}
    metrics = jax.jit(task.metrics)
    before = divide(metrics(params, {}, rows(jax.random.key(2))))
    after = divide(metrics(learn(task, params, optimizer, rows, steps=120), {}, rows(jax.random.key(2))))
    assert after["loss"] < 0.5 * np.log(11) < before["loss"] and after["accuracy"] > 0.8, (before, after)


@pytest.mark.parametrize(
    ("task", "config"),
    [
        (MLM, BERT),
        (PAIRS, CLIP),
        (Classification(), VIT),
        (Classification(), dataclasses.replace(BERT, head="classification", classes=5)),
        (Classification(), LSTMConfig(vocab_size=V, width=8, hidden=8, layers=1, classes=5)),
    ],
    ids=["bert", "clip", "vit", "bert-classes", "lstm-classes"],
)
def test_synthetic_examples_are_what_the_task_takes(task, config):
    built = tasks.build(task, config, DATA)
    batch = synthetic(task, config)
    check_batch(built.fields, batch)
    again = synthetic(task, config, rows=1)
    for name, x in again.items():
        np.testing.assert_array_equal(x[0], batch[name][0])
        assert name == "labels" or not np.array_equal(batch[name][0], batch[name][1])


def test_a_classifier_of_texts_sees_segment_ids_and_types():
    config = dataclasses.replace(BERT, head="classification", classes=5, dropout=0.0)
    task = tasks.build(Classification(), config, DATA)
    params = {"model": jax.jit(task.networks["model"].init)(jax.random.key(0))}
    batch = synthetic(Classification(), config)
    ids = padded()["segment_ids"]
    other = {**batch, "inputs": np.where(ids == 1, batch["inputs"], 7)}
    metrics = jax.jit(task.metrics)
    a, b, c = (
        float(metrics(params, {}, {**x, **more})["loss"][0])
        for x, more in ((batch, {"segment_ids": ids}), (other, {"segment_ids": ids}), (other, {}))
    )
    assert a == pytest.approx(b, rel=1e-6) and a != pytest.approx(c, rel=1e-6)
    d = float(metrics(params, {}, {**batch, "segment_ids": ids, "types": ids})["loss"][0])
    assert a != pytest.approx(d, rel=1e-6)


@pytest.mark.parametrize(
    ("task", "config", "data", "message"),
    [
        (MLM, GPT2Config(), DATA, "got task masked_lm with GPT2Config, expected an encoder"),
        (MLM, BERTConfig(head="none"), DATA, "got task masked_lm with BERTConfig with head none"),
        (MLM, BERT, Stdlib(seq_len=17), "got data.seq_len 17, expected at most model.context 16"),
        (MaskedLM(mask_token=V), BERT, DATA, "got task.mask_token 48, .*try --task.mask-token 47"),
        (Classification(), BERT, DATA, "classification with BERTConfig, expected a classifier"),
        (CausalLM(), BERT, DATA, "got task causal_lm with BERTConfig"),
    ],
)
def test_what_does_not_fit_together_is_refused(task, config, data, message):
    with pytest.raises(UserError, match=message):
        tasks.build(task, config, data)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_nothing_or_of_all_is_refused(share):
    with pytest.raises(UserError, match="got task.mask_fraction .*, expected (above 0|below 1)"):
        MaskedLM(mask_fraction=share)
