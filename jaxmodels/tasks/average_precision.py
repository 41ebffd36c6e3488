"""Mean average precision of detected boxes over a whole set, as COCO defines it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

OVERLAPS = np.linspace(0.5, 0.95, 10)
"""Least intersections over union at which a box is a hit."""
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100
"""Boxes of a class that count in an image, those of the highest scores."""


def average_precisions(found: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
    """Average the precision over 101 recalls, for each class and each least overlap, (C, 10); NaN without an object.

    Shapes: of N images `boxes` (N, K, 4), their `scores` (N, K) and `classes` (N, K); `truth` (N, G, 4) with `labels`
    (N, G). Boxes are corners; classes and labels below 0 fill up. Source: Lin et al. 2014; COCO's evaluation, without
    crowds, for boxes of any size.
    """
    return np.stack([_of_class(found, each) for each in range(classes)])


def _of_class(found: Mapping[str, np.ndarray], label: int) -> np.ndarray:
    there = found["labels"] == label
    if not there.any():
        return np.full(len(OVERLAPS), np.nan)
    scores, hits = [], []
    mine = found["classes"] == label
    for image in np.flatnonzero(mine.any(1)):
        own = found["scores"][image, mine[image]]
        order = np.argsort(-own, kind="stable")[:MOST]
        scores.append(own[order])
        truth = found["truth"][image, there[image]]
        hits.append(matched(found["boxes"][image, mine[image]][order], truth) >= 0)
    if not scores:
        return np.zeros(len(OVERLAPS))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _averages(np.concatenate(hits)[order], int(there.sum()))


def matched(boxes: np.ndarray, truth: np.ndarray, least: np.ndarray = OVERLAPS) -> np.ndarray:
    """Match boxes (K, 4), by falling score, with objects (G, 4): the index of each one's object or -1, (K, overlaps).

    A box takes the object that it overlaps most among those that no better box has taken, the last of equal ones.
    """
    matches = np.full((len(boxes), len(least)), -1)
    if not len(truth):
        return matches
    free = np.ones((len(least), len(truth)), bool)
    levels = np.arange(len(least))
    for row, overlap in enumerate(overlaps(boxes, truth)):
        left = np.where(free, overlap, -1.0)
        best = len(truth) - 1 - left[:, ::-1].argmax(1)
        good = left[levels, best] >= np.minimum(least, 1 - 1e-10)
        matches[row, good] = best[good]
        free[levels[good], best[good]] = False
    return matches


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of each box of a (K, 4) with each of b (G, 4), in double precision."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = np.maximum(sides, 0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    return np.where(both > 0, both / np.where(union > 0, union, 1), 0.0)


def _averages(hits: np.ndarray, count: int) -> np.ndarray:
    """Average precisions (overlaps,) of boxes by falling score, hits (K, overlaps), of `count` objects."""
    right = np.cumsum(hits, 0, dtype=np.float64)
    recalls, precisions = right / count, right / (np.arange(1, len(hits) + 1)[:, None] + np.spacing(1))
    precisions = np.maximum.accumulate(precisions[::-1])[::-1]  # the best at this recall or a higher one
    found = np.zeros(len(OVERLAPS))
    for level in range(len(OVERLAPS)):
        at = np.searchsorted(recalls[:, level], RECALLS, side="left")
        found[level] = np.where(at < len(hits), precisions[np.minimum(at, len(hits) - 1), level], 0.0).mean()
    return found
