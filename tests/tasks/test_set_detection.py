"""Detection as a set: what counts, what is told, and what is refused; the loss itself is in tests/parity."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmodels import tasks
from jaxmodels.config import COCO, Config, Detection, Mesh, SetDetection, Synthetic
from jaxmodels.data import open_source
from jaxmodels.errors import UserError
from jaxmodels.hf import pixels
from jaxmodels.models.detr import DETRConfig
from jaxmodels.models.families import create
from jaxmodels.models.rt_detr import RTDETRConfig
from jaxmodels.models.yolox import YOLOXConfig
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.report import attention
from jaxmodels.tasks.set_detection import detections
from jaxmodels.train.evaluate import build_evaluate
from tests.zoo import ZOO, example

B, L, Q, G, C = 4, 2, 6, 4, 3
CONFIG = DETRConfig((32, 64, 3), C, Q, depths=(1,), widths=(8,), stem_width=8, bottleneck=False, decoder_layers=L)
EVERY = {name: np.ones(B, np.float32) for name in ("weight", "known")}


def build(**fields):
    """The task, of a model that gives its parameters as outputs, and takes an image's first pixel for their row."""

    def apply(params, images, *, every, stats=None, train=False, rng=None):
        found = params["outputs"][:, images[:, 0, 0, 0].astype(int)]
        return found if every else found[-1]

    model = dataclasses.replace(create(CONFIG), apply=apply, stats=dict)
    return SetDetection(objects=G, **fields).build(model, Synthetic())


@pytest.fixture(scope="module")
def data():
    """Outputs, and a batch; the last image has no objects."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(L, B, Q, 4 + C + 1)).astype(np.float32)
    outputs[..., :4] = 1 / (1 + np.exp(-outputs[..., :4]))
    labels = rng.integers(0, C, (B, G)).astype(np.int32)
    labels[3] = -1
    boxes = np.concatenate([rng.random((B, G, 2)) * 20, rng.random((B, G, 2)) * 10 + 2], -1).astype(np.float32)
    images = np.broadcast_to(np.arange(B, dtype=np.float32)[:, None, None, None], (B, 32, 64, 3))
    return {"outputs": outputs}, {"inputs": images, "boxes": boxes, "classes": labels}


def of_rows(batch, rows):
    return {name: x[np.asarray(rows)] for name, x in batch.items()}


def test_images_of_which_nothing_counts_have_no_part_in_the_loss(data):
    params, batch = data
    task = build()
    loss = jax.jit(lambda params, batch: task.losses[0].fn({"model": params}, {}, batch, jax.random.key(0)))
    rest, aux = loss(params, of_rows(batch, [0, 2, 3]))
    assert aux.weight == 3 and np.isfinite(rest)
    for name, ones in EVERY.items():
        marks = ones.copy()
        marks[1] = 0
        total, aux = loss(params, {**batch, "weight": EVERY["weight"], "known": EVERY["known"], name: marks})
        np.testing.assert_allclose(total, rest, rtol=1e-5)
        assert aux.weight == 3
    nothing, aux = loss(params, {**batch, **EVERY, "weight": np.zeros(B, np.float32)})
    assert nothing == 0 and aux.weight == 0


def test_what_is_measured_does_not_depend_on_the_size_of_batches(data):
    params, batch = data
    evaluate = build_evaluate(build(), make_mesh(Mesh(), jax.devices()[:1]), classes=("a", "b", "c"))
    params = {"model": jax.tree.map(jnp.asarray, params)}
    whole = evaluate(params, {}, [{**batch, "weight": np.ones(B, np.float32)}])
    padding = np.array([1, 1, 0, 0], np.float32)
    parts = [{**of_rows(batch, rows), "weight": padding} for rows in ([0, 1, 0, 0], [2, 3, 3, 3])]
    assert evaluate(params, {}, parts) == pytest.approx(whole, rel=1e-5)
    assert {"ap", "ap50", "ap75", "class_loss", "box_loss", "giou_loss"} <= whole.keys()


def test_a_query_tells_of_its_likeliest_class_or_of_each_that_is_likely_enough():
    boxes, sure = np.arange(12.0).reshape(3, 4), np.array([[0.5, 0.4], [0.1, 0.7], [0.05, 0.02]])
    one = detections(boxes, sure, 0.06, 4, exclusive=True)
    np.testing.assert_allclose(one.scores, [0.7, 0.5, 0, 0])
    np.testing.assert_array_equal(one.classes, [1, 0, -1, -1])
    np.testing.assert_array_equal(one.boxes[:2], boxes[[1, 0]])
    each = detections(boxes, sure, 0.06, 5, exclusive=False)
    np.testing.assert_allclose(each.scores, [0.7, 0.5, 0.4, 0.1, 0], atol=1e-7)
    np.testing.assert_array_equal(each.classes, [1, 0, 1, 0, -1])
    np.testing.assert_array_equal(each.boxes[:4], boxes[[1, 0, 0, 1]])


def test_an_image_has_room_for_as_many_objects_as_there_are_queries(tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    listed = {
        "images": [{"id": 0, "file_name": "a.png", "width": 64, "height": 32}],
        "annotations": [{"image_id": 0, "category_id": i, "bbox": [4 * i, 4, 8, 8]} for i in range(C)],
        "categories": [{"id": i, "name": str(i)} for i in range(C)],
    }
    (tmp_path / "all.json").write_text(json.dumps(listed))
    section = COCO(path=(str(tmp_path / "all.json"),), eval_path=(str(tmp_path / "all.json"),), batch_size=1)
    fields, known = build().fields, {"inputs_shape": CONFIG.input_shape, "num_classes": C}
    for task, most in ((SetDetection(objects=G), G), (SetDetection(), Q)):
        contract = tasks.build(task, CONFIG, section).fields
        found = open_source(section, "train", task, fields=contract, **known).batch(np.array([0]), np.array([0]))
        assert found["boxes"].shape == (1, most, 4) and fields.keys() == contract.keys()
        assert (found["classes"][0] >= 0).sum() == C


def test_models_of_the_other_kind_and_too_many_objects_are_refused():
    yolox = YOLOXConfig((32, 32, 3), 2, depth=0.1, width=0.125)
    with pytest.raises(UserError, match="YOLOXConfig, expected a detector with queries, try --model detr"):
        tasks.build(SetDetection(), yolox, Synthetic())
    with pytest.raises(UserError, match="DETRConfig, expected a detector that has places .* --task set_detection"):
        tasks.build(Detection(), CONFIG, Synthetic())
    with pytest.raises(UserError, match="up to 7 objects of an image for 6 queries, expected no more"):
        tasks.build(SetDetection(objects=7), CONFIG, Synthetic())
    with pytest.raises(UserError, match="got task.found 7 for 6 queries, expected at most the 6 objects"):
        tasks.build(SetDetection(found=7), CONFIG, Synthetic())
    many = RTDETRConfig(queries=10, classes=3)
    tasks.build(SetDetection(found=30), many, Synthetic())  # each class of a query may be an object
    with pytest.raises(UserError, match="got task.found 31 .*, try --task.found 30"):
        tasks.build(SetDetection(found=31), many, Synthetic())
    with pytest.raises(UserError, match="got task.nothing 0.5 with RTDETRConfig.*try --task.nothing 0.1"):
        tasks.build(SetDetection(nothing=0.5), RTDETRConfig(), Synthetic())


def test_the_attention_of_a_detectors_queries_is_no_map_of_the_image(monkeypatch):
    """A model of 2×4 patches of 16 pixels, with a layer of the encoder and two kinds of a decoder's."""
    kept = [np.full((2, 2, *shape), 1 / shape[1]) for shape in ((8, 8), (Q, Q), (Q, 8))]
    monkeypatch.setattr(attention, "weights", lambda *args: kept)
    monkeypatch.setattr(attention, "normalized", lambda x, data: x)
    config = dataclasses.make_dataclass("Config", ["data"])(Synthetic())
    run = dataclasses.make_dataclass("Run", ["config"])(config)
    found = attention.of_images(run, np.zeros((2, 32, 64, 3), np.float32), None)
    assert [piece.name for piece in found] == ["attention-layers", "attention-heads"]


def test_rt_detr_multiplies_in_bfloat16_where_it_is_told_to_and_gives_float32():
    """Boxes of blocks that begin with zeros are those of the places chosen, which rounding may choose otherwise."""
    model = create(dataclasses.replace(ZOO["rt-detr"][1], dtype="bfloat16"))
    stats, inputs = model.stats(), example(model)
    out, _ = jax.eval_shape(lambda params: model.apply(params, *inputs, stats=stats), model.shapes())
    assert out.shape == (8, 4, 4 + 5) and out.dtype == jnp.float32
    text = str(jax.make_jaxpr(lambda params: model.apply(params, *inputs, stats=stats)[0])(model.shapes()))
    assert text.count("bf16") > 100


def test_pixels_are_prepared_as_transformers_prepares_them_for_each_detector(tmp_path):
    seen = pixels.read(tmp_path, "rt_detr", (32, 32, 3))
    assert (seen.mean, seen.std) == ((), ()) and "pixels from 0 to 1 are transformers' defaults" in seen.remarks[0]
    assert pixels.read(tmp_path, "detr", (32, 32, 3)).mean == (0.485, 0.456, 0.406)
    for family, config in (("detr", CONFIG), ("rt_detr", ZOO["rt-detr"][1])):
        cfg = Config(model=config, task=SetDetection(), data=Synthetic())
        made = pixels.describe(cfg, config.input_shape, family)
        assert made["image_processor_type"].lower() == f"{family.replace('_', '')}imageprocessor"
        assert made["do_pad"] is False and "do_convert_rgb" not in made
