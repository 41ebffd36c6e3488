"""Images with boxes from COCO's JSON: what is read, what is refused, and what is left out and told."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmodels.data import open_source
from jaxmodels.data.coco import COCO
from jaxmodels.errors import UserError
from tests.sections import task_of


def written(folder, name="train.json", *, boxes=(), categories=("cat", "dog"), images=6, size=(40, 20), **changes):
    """A file of images of one size, drawn once, with boxes (image, category, box) and what else is to be changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        Image.fromarray(np.full((20, 40, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
    listed = [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(images)]
    marks = [
        {"image_id": i, "category_id": c, "bbox": box, **more} for i, c, box, *rest in boxes for more in rest or [{}]
    ]
    named = [{"id": 10 - k, "name": name} for k, name in enumerate(categories)]
    content = {"images": listed, "annotations": marks, "categories": named, **changes}
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def opened(path, split="train", classes=(), **fields):
    data = COCO(path=(path,), **({"eval_fraction": 0.0} | fields if "eval_path" not in fields else fields))
    return open_source(
        data, split, task_of("detection", objects=4), inputs_shape=(32, 80, 3), num_classes=2, classes=classes
    )


USUAL = [(0, 10, [4, 2, 10, 5]), (0, 9, [20, 10, 8, 8]), (3, 10, [0, 0, 40, 20])]


def test_boxes_are_in_the_pixels_of_the_models_image_and_classes_in_the_order_of_their_ids(tmp_path):
    source = opened(written(tmp_path, boxes=USUAL))
    batch = source.batch(np.arange(6), np.zeros(6, int))
    assert source.class_names == ("dog", "cat") and len(source) == 6, "their ids are 9 and 10"
    assert batch["inputs"].shape == (6, 32, 80, 3) and batch["inputs"][3].max() == 30
    np.testing.assert_array_equal(batch["classes"][0], [1, 0, -1, -1])
    np.testing.assert_allclose(batch["boxes"][0, :2], [[8, 3.2, 20, 8], [40, 16, 16, 12.8]], rtol=1e-6)
    np.testing.assert_array_equal(batch["classes"][1], [-1] * 4)
    assert source.fingerprint != opened(written(tmp_path, boxes=USUAL[:2])).fingerprint


def test_boxes_without_an_area_and_those_around_crowds_are_left_out_and_told(tmp_path, caplog):
    boxes = [
        *USUAL,
        (1, 9, [5, 5, 0, 4]),
        (1, 9, [41, 0, 4, 4]),
        (1, 9, [0, 0, 4, 4], {"iscrowd": 1}),
        (1, 9, [-4, 0, 8, 4]),
    ]
    batch = opened(written(tmp_path, boxes=boxes)).batch(np.array([1]), np.zeros(1, int))
    np.testing.assert_array_equal(batch["classes"], [[0, -1, -1, -1]])
    np.testing.assert_allclose(batch["boxes"][0, 0], [0, 0, 8, 6.4], rtol=1e-6, err_msg="clipped to its image")
    assert "left out 2 boxes without an area" in caplog.text and "left out 1 boxes around crowds" in caplog.text


@pytest.mark.parametrize("crowd", ["no", 2, None, [0]])
def test_a_crowd_that_is_neither_0_nor_1_is_refused(tmp_path, crowd):
    path = written(tmp_path, boxes=[*USUAL, (1, 9, [0, 0, 4, 4], {"iscrowd": crowd})])
    with pytest.raises(UserError, match=rf"as annotations\[{len(USUAL)}\].iscrowd, expected 0 or 1"):
        opened(path)


def test_an_image_whose_boxes_cannot_be_meant_is_left_out_by_name(tmp_path, caplog):
    path = written(tmp_path, boxes=[*USUAL, (2, 9, [1, 2, float("nan"), 3]), (0, 9, [0, 0, 10**400, 1])])
    source = opened(path)
    batch = source.batch(np.array([2, 3]), np.zeros(2, int))
    np.testing.assert_array_equal(batch["classes"][0], batch["classes"][1])
    assert "2.png: has the box [1, 2, nan, 3]" in caplog.text
    held_out = opened(path, "eval", eval_path=(path,)).batch(np.array([1, 2]), np.zeros(2, int))
    np.testing.assert_array_equal(held_out["known"], [1, 0], "of the image that stands in for it nothing is counted")
    wide = opened(written(tmp_path / "wide", boxes=USUAL, size=(50, 20)))
    with pytest.raises(UserError, match="is 40×20, expected 50×20 as its boxes are for"):
        wide.batch(np.arange(6), np.zeros(6, int))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": None}, "without annotations"),
        ({"boxes": [(9, 9, [0, 0, 1, 1])]}, "an annotation of image 9"),
        ({"boxes": [(0, 3, [0, 0, 1, 1])]}, "category 3"),
        ({"categories": ("cat", "cat")}, "two categories 'cat'"),
        ({"images": 0}, "0 records to train on"),
        ({"images": [{"id": 0, "file_name": "a.png", "width": 3, "height": 3}] * 2}, "the id 0 of two images"),
        ({"categories": [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]}, "the id 3 of two categories"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": 3}]}, r"None as images\[0\].height, expected int"),
    ],
)
def test_a_file_that_is_not_cocos_is_refused_by_what_is_wrong(tmp_path, changes, said):
    if any(isinstance(changes.get(part), list) for part in ("images", "categories")):
        path = written(tmp_path)
        content = json.loads((tmp_path / "train.json").read_text())
        (tmp_path / "train.json").write_text(json.dumps({**content, **changes}))
    else:
        path = written(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        opened(path)


def test_held_out_classes_are_numbered_as_those_of_training_by_name(tmp_path):
    train = written(tmp_path, boxes=USUAL)
    other = written(tmp_path / "other", boxes=[(0, 10, [0, 0, 9, 9])], categories=("dog", "cat"), images=1)
    source = opened(train, "eval", eval_path=(other,))
    assert source.batch(np.zeros(1, int), np.zeros(1, int))["classes"][0, 0] == 0, "a dog, whose id is 10 there"
    with pytest.raises(UserError, match="the category 'cow'"):
        opened(train, "eval", eval_path=(written(tmp_path / "cow", categories=("cow",), images=1),))
    run = opened(other, classes=("cat", "dog"))
    assert run.batch(np.zeros(1, int), np.zeros(1, int))["classes"][0, 0] == 1, "the classes of a run"


def test_names_of_classes_are_as_many_as_the_files(tmp_path):
    path = written(tmp_path, boxes=USUAL)
    assert opened(path, class_names=("a", "b")).class_names == ("a", "b")
    with pytest.raises(UserError, match=r"3 data.class_names for the 2 classes of .* \(dog, cat\)"):
        opened(path, class_names=("a", "b", "c"))


def test_more_objects_than_the_task_has_room_for_are_no_silent_loss(tmp_path, caplog):
    source = opened(written(tmp_path, boxes=[*USUAL, *[(0, 9, [k, 0, 3, 3]) for k in range(3)]]))
    source.batch(np.arange(6), np.zeros(6, int))
    assert "0.png: has 5 boxes, expected at most 4" in caplog.text
