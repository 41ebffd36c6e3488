"""Detection: the loss by hand, what counts, and precisions over a whole set."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.config import Mesh, Synthetic
from jaxmodels.models.families import create
from jaxmodels.models.yolox import YOLOXConfig
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.average_precision import overlaps
from jaxmodels.tasks.boxes import generalized
from jaxmodels.tasks.detection import Detection, summarize
from jaxmodels.train.evaluate import build_evaluate
from tests.tasks.test_boxes import drawn, sigmoid, simota

CONFIG = YOLOXConfig((64, 64, 3), 3, width=0.125)
ANCHORS = CONFIG.anchors()
A, G, B = len(ANCHORS), 5, 4


def build(**fields):
    """The task, of a model that gives its parameters as outputs, and takes an image's first pixel for their row."""

    def apply(params, images, *, stats=None, train=False, rng=None):
        return params["outputs"][images[:, 0, 0, 0].astype(int)]

    model = dataclasses.replace(create(CONFIG), apply=apply, stats=dict)
    return Detection(objects=G, found=20, **fields).build(model, Synthetic())


@pytest.fixture(scope="module")
def data():
    """Outputs that are near the objects, and a batch of them; the last image has none."""
    rng = np.random.default_rng(0)
    truth = drawn(rng, B, G)
    labels = rng.integers(0, 3, (B, G))
    labels[0, 3:], labels[3] = -1, -1
    of = rng.integers(0, G, (B, A, 1))
    near = np.take_along_axis(truth, of, 1) + rng.normal(0, 2, (B, A, 4))
    outputs = np.concatenate([near, rng.normal(size=(B, A, 4))], -1).astype(np.float32)
    images = np.broadcast_to(np.arange(B, dtype=np.float32)[:, None, None, None], (B, 64, 64, 3))
    boxes = np.concatenate([truth[..., :2], truth[..., 2:] - truth[..., :2]], -1)
    batch = {"inputs": images, "boxes": boxes, "classes": labels.astype(np.int32), "known": np.ones(B, np.int32)}
    return {"outputs": outputs}, batch


def of_rows(batch, rows):
    return {name: x[np.asarray(rows)] for name, x in batch.items()}


def by_hand(params, batch, box_loss):
    """The loss of each image and what it is divided by."""
    found = []
    for out, box, labels in zip(params["outputs"], batch["boxes"], batch["classes"], strict=True):
        truth = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], -1)
        chosen = simota(out[:, :4], out[:, 4], out[:, 5:], ANCHORS, truth, labels)
        p, c = sigmoid(out[:, 4]), sigmoid(out[:, 5:])
        total = -np.log(np.where(chosen >= 0, p, 1 - p)).sum()
        for a in np.flatnonzero(chosen >= 0):
            iou = overlaps(out[a : a + 1, :4], truth[chosen[a]][None])[0, 0]
            near = iou**2 if box_loss == "iou" else generalized(out[a, :4], truth[chosen[a]])
            target = iou * (np.arange(3) == labels[chosen[a]])
            total += 5 * (1 - near) - (target * np.log(c[a]) + (1 - target) * np.log(1 - c[a])).sum()
        found.append((total, max((chosen >= 0).sum(), 1)))
    return np.array(found)


@pytest.mark.parametrize("box_loss", ["iou", "giou"])
def test_the_loss_is_that_by_hand_and_divided_by_the_places_that_have_an_object(data, box_loss):
    params, batch = data
    task = build(box_loss=box_loss)
    loss = jax.jit(lambda params, batch: task.losses[0].fn({"model": params}, {}, batch, jax.random.key(0)))
    expected = by_hand(params, batch, box_loss)
    total, aux = loss(params, batch)
    np.testing.assert_allclose(total, expected[:, 0].sum(), rtol=1e-4)
    assert aux.weight == expected[:, 1].sum() and expected[3, 1] == 1, "an image without an object counts as one place"
    for marks in ({"weight": np.array([1, 0, 1, 1], np.float32)}, {"known": np.array([1, 0, 1, 1], np.int32)}):
        total, aux = loss(params, {**batch, **marks})
        np.testing.assert_allclose(total, expected[[0, 2, 3], 0].sum(), rtol=1e-4)
        assert aux.weight == expected[[0, 2, 3], 1].sum(), "a row that does not count has no part in either"


def test_what_is_measured_does_not_depend_on_the_size_of_batches(data):
    params, batch = data
    task = build()
    evaluate = build_evaluate(task, make_mesh(Mesh(), jax.devices()[:1]), classes=("a", "b", "c"))
    params = {"model": jax.tree.map(jnp.asarray, params)}
    whole = evaluate(params, {}, [{**batch, "weight": np.ones(B, np.float32)}])
    padded = {**of_rows(batch, [2, 3, 3, 3]), "weight": np.array([1, 1, 0, 0], np.float32)}
    parts = evaluate(params, {}, [{**of_rows(batch, [0, 1, 0, 0]), "weight": padded["weight"]}, padded])
    assert parts == pytest.approx(whole, rel=1e-5)
    assert 0 < whole["ap"] < whole["ap50"] < 1 and {"ap/a", "ap50/c", "box_loss"} <= whole.keys()
    assert next(iter(whole)) == "loss"


def test_a_detector_that_finds_all_has_a_precision_of_one(data):
    _, batch = data
    outputs = np.full((B, A, 8), -9.0, np.float32)
    corners = np.concatenate([batch["boxes"][..., :2], batch["boxes"][..., :2] + batch["boxes"][..., 2:]], -1)
    outputs[:, :G, :4], outputs[:, :G, 4] = corners, np.where(batch["classes"] >= 0, 9.0, -9.0)
    np.put_along_axis(outputs[:, :G, 5:], np.maximum(batch["classes"], 0)[..., None], 9.0, -1)
    evaluate = build_evaluate(build(overlap=1.0), make_mesh(Mesh(), jax.devices()[:1]))
    found = evaluate({"model": {"outputs": jnp.asarray(outputs)}}, {}, [batch])
    assert found["ap"] == found["ap50"] == found["ap75"] == 1.0


def test_classes_that_do_not_occur_are_left_out_of_the_mean():
    precisions = np.stack([np.full(10, 0.5), np.full(10, np.nan), np.linspace(1, 0.1, 10)])
    found = summarize({"loss": (4.0, 2.0), "precisions": (precisions, 1.0)}, ("a", "b", "c"))
    assert found["loss"] == 2 and found["ap50"] == 0.75 and found["ap"] == pytest.approx((0.5 + 0.55) / 2)
    assert found["ap75"] == pytest.approx((0.5 + 0.5) / 2) and "ap/b" not in found and found["ap50/c"] == 1
    nowhere = {"loss": (4.0, 2.0), "precisions": (np.full((2, 10), np.nan), 1.0)}
    assert summarize(nowhere) == {"loss": 2.0}, "without an object there is no precision, not one of 0"
