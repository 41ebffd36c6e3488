"""Boxes in the report: which are hits, which are false, and what was missed."""

from types import SimpleNamespace

import numpy as np

from jaxmodels.report import boxes
from jaxmodels.report.pieces import grid


def test_boxes_are_sorted_into_hits_false_ones_and_missed_objects():
    example = {
        "inputs": np.zeros((32, 64, 3), np.uint8),
        "boxes": np.array([[0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10], [0, 0, 0, 0.0]]),
        "classes": np.array([0, 1, 1, -1]),
        "found_boxes": np.array([[0, 0, 10, 9], [0, 0, 10, 8], [20, 0, 30, 10], [40, 0, 50, 10.0]]),
        "found_scores": np.array([0.9, 0.8, 0.7, 0.1]),
        "found_classes": np.array([0, 0, 0, 1]),
    }
    found = boxes.judged(example)
    assert [score for _, _, score in found["hits"]] == [0.9]
    assert [score for _, _, score in found["false"]] == [0.8, 0.7], "one again, and one of the wrong class"
    assert [label for _, label, _ in found["missed"]] == [1, 1], "what is found with a low score is not drawn"
    assert found["wrong"] == 4
    figure, axes = grid(1, 1)
    boxes.draw(axes[0, 0], found, SimpleNamespace(class_name=str))
    assert len(axes[0, 0].lines) == 5 and "1 hits, 2 false, 2 missed" in axes[0, 0].get_title()
    assert figure.axes
