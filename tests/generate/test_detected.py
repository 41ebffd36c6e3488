"""What `predict` says of an image: boxes in the image's own pixels."""

import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmodels.config import Augment
from jaxmodels.generate.detected import detector


def run_of(scores, crop=None):
    """A run whose detector finds the same boxes in every image of 32×64, the last of which is none."""
    boxes = jnp.array([[8, 4, 24, 20], [0, 0, 64, 32], [0, 0, 0, 0]], jnp.float32)

    def predicts(params, stats, batch):
        count = len(batch["inputs"])
        found = {"boxes": boxes, "scores": jnp.asarray(scores), "classes": jnp.array([1, 0, -1])}
        return {name: jnp.broadcast_to(x, (count, *x.shape)) for name, x in found.items()}

    model = SimpleNamespace(
        config=SimpleNamespace(classes=2), inputs=lambda rows: (jax.ShapeDtypeStruct((rows, 32, 64, 3), jnp.float32),)
    )
    config = SimpleNamespace(data=SimpleNamespace(pixels="pillow"), augment=Augment(crop=crop))
    return SimpleNamespace(
        task=SimpleNamespace(predicts=predicts), networks={"model": model}, model=model, config=config, params={},
        stats={}, class_name=["cat", "dog"].__getitem__,
    )  # fmt: skip


def image(width, height):
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_boxes_are_in_the_pixels_of_each_image_whatever_its_size():
    ready, answers = detector(run_of([0.75, 0.5, 0.0]))
    same, large = answers([ready(image(64, 32)), ready(image(640, 64))])
    assert same["boxes"] == [
        {"label": "dog", "score": 0.75, "bbox": [8, 4, 16, 16]},
        {"label": "cat", "score": 0.5, "bbox": [0, 0, 64, 32]},
    ]
    assert [each["bbox"] for each in large["boxes"]] == [[80, 8, 160, 32], [0, 0, 640, 64]]


def test_of_a_cropped_image_boxes_are_where_they_are_in_the_whole():
    ready, answers = detector(run_of([0.75, 0.5, 0.0], crop=0.5))
    (found,) = answers([ready(image(64, 32))])
    assert found["boxes"][1]["bbox"] == pytest.approx([4, 2, 56, 28]), "the central 7/8 of each side"


def test_scores_that_are_no_numbers_are_an_error():
    ready, answers = detector(run_of([np.nan, 0.5, 0.0]))
    assert "no finite numbers" in answers([ready(image(64, 32))])[0]["error"]
