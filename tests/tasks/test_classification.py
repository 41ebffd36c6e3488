"""Images blended in training: pixels and labels by the same share, a function of the key, equal on any devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import Classification, Mesh, Stdlib
from jaxmodels.errors import UserError
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.classification import blend
from jaxmodels.tasks.losses import cross_entropy

B, SHAPE, CLASSES = 8, (6, 8, 1), 5
MODEL = MLPConfig(input_shape=SHAPE, classes=CLASSES, hidden=())
KINDS = {"mixup": {"mixup": 0.4}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.4, "cutmix": 1.0}}


@functools.cache
def blended(mixup, cutmix, keys=64):
    """Images whose pixels are all the number of the image, blended under many keys."""
    images = jnp.broadcast_to(jnp.arange(1.0, B + 1)[:, None, None, None], (B, *SHAPE))
    many = jax.jit(jax.vmap(lambda key: blend(key, images, mixup, cutmix)))
    return tuple(map(np.asarray, (images, *many(jax.random.split(jax.random.key(0), keys)))))


def test_mixup_adds_pixels_by_the_share():
    images, mixed, share = blended(0.4, 0.0)
    at = share[:, None, None, None, None]
    np.testing.assert_allclose(mixed, at * images + (1 - at) * images[::-1], rtol=1e-5)
    assert share.min() >= 0 and share.max() <= 1 and share.std() > 0.2


def test_cutmix_s_share_is_the_area_that_is_left_and_the_rest_is_one_rectangle():
    images, mixed, share = blended(0.0, 1.0)
    own = mixed == images
    np.testing.assert_array_equal(mixed, np.where(own, images, images[::-1]))
    np.testing.assert_allclose(own.mean((2, 3, 4)), share[:, None].repeat(B, 1), atol=1e-6)
    for inside in ~own[:, 0, :, :, 0]:
        rows, columns = inside.any(1), inside.any(0)
        np.testing.assert_array_equal(inside, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2, "in one piece"
    assert len(np.unique(share)) > 20 and share.mean() == pytest.approx(0.6, abs=0.2)


def test_with_both_a_coin_decides_for_the_whole_batch():
    images, mixed, _ = blended(0.4, 1.0)
    cut = ((mixed == images) | (mixed == images[::-1])).reshape(len(mixed), -1).all(1)
    assert 0.2 < cut.mean() < 0.8


def batch(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (B, *SHAPE)).astype(np.uint8)
    return {"inputs": images, "labels": rng.integers(0, CLASSES, B).astype(np.int32)}


@functools.cache
def built(kind):
    task = tasks.build(Classification(**KINDS[kind]), MODEL, Stdlib())
    return task, {"model": task.networks["model"].init(jax.random.key(0))}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_weighs_both_labels_by_the_share_and_depends_on_the_key(kind):
    task, params = built(kind)
    rows, key = batch(), jax.random.key(3)
    loss = jax.jit(task.losses[0].fn)
    total, aux = loss(params, {}, rows, key)
    fields = {"mixup": 0.0, "cutmix": 0.0, **KINDS[kind]}
    mixed, share = blend(jax.random.split(key)[1], jnp.asarray(rows["inputs"] / np.float32(255)), **fields)
    logits = task.networks["model"].apply(params["model"], mixed)
    a, b = (cross_entropy(logits, labels).loss for labels in (rows["labels"], rows["labels"][::-1]))
    assert 0.01 < float(share) < 0.99
    assert float(total) == pytest.approx(float(share * a + (1 - share) * b), rel=1e-5)
    assert float(aux.weight) == pytest.approx(B)
    again, other = (float(loss(params, {}, rows, jax.random.key(seed))[0]) for seed in (3, 4))
    assert again == float(total) != other


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_blends_on_eight_devices_are_those_on_one(kind):
    task, params = built(kind)
    found = []
    for devices in (1, 8):
        mesh = make_mesh(Mesh(), jax.devices()[:devices])
        rows = jax.device_put(batch(), task.shardings(mesh, batch()))
        with jax.set_mesh(mesh):
            grad = jax.jit(jax.value_and_grad(task.losses[0].fn, has_aux=True))
            found.append(jax.tree.map(np.asarray, grad(params, {}, rows, jax.random.key(1))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


def test_evaluation_blends_nothing():
    task, params = built("both")
    plain = tasks.build(Classification(), MODEL, Stdlib())
    a, b = (each.metrics(params, {}, batch())["loss"][0] for each in (task, plain))
    assert float(a) == float(b)


@pytest.mark.parametrize(
    ("fields", "config", "message"),
    [
        (
            {"mixup": 0.2},
            BERTConfig(head="classification", classes=2),
            "got task.mixup 0.2 .*BERTConfig, expected a model of im",
        ),
        ({"cutmix": 1.0}, MLPConfig(input_shape=(7,)), "got .* task.cutmix 1.0 for MLPConfig, expected a model of im"),
        ({"multi_label": True, "label_smoothing": 0.1}, MODEL, "got task.multi_label with label smoothing"),
        ({}, MLPConfig(input_shape=SHAPE, classes=1), "got model.classes 1, expected 2 or more"),
    ],
)
def test_what_cannot_be_blended_or_smoothed_or_told_apart_is_refused(fields, config, message):
    with pytest.raises(UserError, match=message):
        tasks.build(Classification(**fields), config, Stdlib(seq_len=8))


def test_several_labels_have_a_loss_of_each_class_by_itself():
    task = tasks.build(Classification(multi_label=True), MODEL, Stdlib())
    params = {"model": task.networks["model"].init(jax.random.key(0))}
    rows = batch()
    rows["labels"] = (np.random.default_rng(2).random((B, CLASSES)) < 0.4).astype(np.float32)
    rows["labels"][5:] = -1
    rows["labels"][0, 0] = -1  # this class alone is not known of it
    total, aux = task.losses[0].fn(params, {}, rows, jax.random.key(0))
    logits = np.asarray(task.networks["model"].apply(params["model"], rows["inputs"] / np.float32(255)), np.float64)
    p = 1 / (1 + np.exp(-logits[:5]))
    y = rows["labels"][:5]
    each = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    assert float(total) == pytest.approx(each[y >= 0].sum(), rel=1e-5)
    assert int(aux.weight) == 5
    assert task.batch_spec(B)["labels"].shape == (B, CLASSES)
