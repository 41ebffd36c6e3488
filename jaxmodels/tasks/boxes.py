"""Boxes on the device: overlaps, the assignment of anchors or queries to objects, and non-maximum suppression.

Boxes are their corners (left, top, right, bottom) in pixels. Dims: A anchors, G objects, C classes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

CANDIDATES = 10
"""How many of the best overlaps with an object say how many anchors it is given (Ge et al. 2021, section 2.2)."""
NEAR = 2.5
"""Distance from an object's center, in strides, up to which an anchor is near it."""
SORTED = 1000
"""How many of an image's boxes, those of the highest scores, are compared with each other."""
_OUTSIDE, _NEVER = 1e5, 1e9


class Found(NamedTuple):
    """The detections of one image, by falling score; places without one have the score 0 and the class -1."""

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array


def areas(boxes: jax.Array) -> jax.Array:
    """Areas (…) of boxes (…, 4); 0 where a corner lies on the wrong side of the other."""
    return jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(-1)


def overlaps(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union (…) of boxes (…, 4); 0 of two boxes without an area."""
    both = _intersection(a, b)
    return both / jnp.maximum(areas(a) + areas(b) - both, 1e-9)


def generalized(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalized intersection over union (…), from -1 to 1 (Rezatofighi et al. 2019, algorithm 1)."""
    both = _intersection(a, b)
    union = areas(a) + areas(b) - both
    hull = areas(jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], -1))
    return both / jnp.maximum(union, 1e-9) - (hull - union) / jnp.maximum(hull, 1e-9)


def _intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    return jnp.maximum(high - low, 0).prod(-1)


def assign(
    boxes: jax.Array, objectness: jax.Array, classes: jax.Array, anchors: jax.Array, truth: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Assign an object, or none, to each anchor of one image by SimOTA; also return their overlap (A,).

    Shapes: boxes (A, 4), logits of objectness (A,) and classes (A, C), anchors (A, 3) of centers and strides, truth
    (G, 4), labels (G,) that are below 0 where there is no object. Returns indices (A,) of objects, -1 for none.

    An object is given as many anchors as its ten best overlaps add up to, those of the lowest cost: the cross-entropy
    of its class and three times -log of the overlap, and much more outside the object or far from its center. An
    anchor that several objects ask for goes to the one of the lowest cost. Source: Ge et al. 2021, section 2.2.
    """
    real = labels >= 0
    near, at, reach = _near(anchors, truth), anchors[None, :, :2], truth[:, None]
    inside = ((at > reach[..., :2]) & (at < reach[..., 2:])).all(-1)
    possible = ((inside | near) & real[:, None]).any(0)
    overlap = jnp.where(real[:, None] & possible, overlaps(truth[:, None], boxes[None]), 0.0)

    # the cross-entropy of the geometric mean of both probabilities, for each class as if it were the right one
    yes = (jax.nn.log_sigmoid(classes) + jax.nn.log_sigmoid(objectness)[:, None]) / 2
    yes, no = jnp.maximum(yes, -100.0), jnp.maximum(jnp.log1p(-jnp.exp(yes)), -100.0)
    entropy = (no - yes - no.sum(-1, keepdims=True)).T[jnp.maximum(labels, 0)]
    cost = entropy - 3 * jnp.log(overlap + 1e-8) + _OUTSIDE * ~(inside & near)
    cost = jnp.where(real[:, None] & possible, cost, _NEVER)

    most = min(CANDIDATES, len(anchors))
    share = jnp.maximum(jax.lax.top_k(overlap, most)[0].sum(-1).astype(int), 1)
    lowest, which = jax.lax.top_k(-cost, most)
    matched = (jnp.arange(most) < share[:, None]) & (lowest > -_NEVER)
    asking = jnp.zeros(cost.shape, bool).at[jnp.arange(len(truth))[:, None], which].set(matched)
    count = asking.sum(0)
    chosen = jnp.where(count > 1, cost.argmin(0), asking.argmax(0))
    return jnp.where(count > 0, chosen, -1), jnp.where(count > 0, overlap[chosen, jnp.arange(len(anchors))], 0.0)


def _near(anchors: jax.Array, truth: jax.Array) -> jax.Array:
    """Whether an anchor lies near an object's center, (G, A)."""
    middle = (truth[:, None, :2] + truth[:, None, 2:]) / 2
    return (jnp.abs(anchors[None, :, :2] - middle) < NEAR * anchors[None, :, 2:]).all(-1)


def pairs(costs: jax.Array, real: jax.Array) -> jax.Array:
    """Match each object of one image with a query of its own at the least total cost, (G,).

    Shapes: costs (Q, G) with G ≤ Q, real (G,). An object that is not there is given Q, which is no query.
    Source: the Hungarian algorithm, as DETR matches (Carion et al. 2020, section 3.1).
    """
    count, objects = costs.shape
    costs = jnp.where(real, jnp.nan_to_num(costs, nan=_NEVER, posinf=_NEVER, neginf=_NEVER), _NEVER)
    # an object that is not there has a place of its own, at once: to find one among queries took ten times as long
    beside = jnp.where(jnp.eye(objects, dtype=bool) & ~real, 0.0, _NEVER)
    chosen, which = optax.assignment.hungarian_algorithm(jnp.concatenate([costs, beside]))
    return jnp.minimum(jnp.zeros(objects, chosen.dtype).at[which].set(chosen), count)


def kept(boxes: jax.Array, classes: jax.Array, overlap: float) -> jax.Array:
    """Which boxes (K, 4), by falling score, overlap no kept box of their class with a higher score, bool (K,).

    Greedy suppression, reached from all boxes at once: when a round changes nothing, each box is kept if and only if no
    better one that is kept covers it, which has a single solution.
    """
    better = jnp.arange(len(boxes))[:, None] < jnp.arange(len(boxes))
    covers = better & (classes[:, None] == classes) & (overlaps(boxes[:, None], boxes[None]) > overlap)

    def again(now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return now[1], ~(covers & now[1][:, None]).any(0)

    every = jnp.ones(len(boxes), bool)
    return jax.lax.while_loop(lambda now: (now[0] != now[1]).any(), again, again((~every, every)))[1]


@functools.partial(jax.vmap, in_axes=(0, None, None, None))
def tell(outputs: jax.Array, overlap: float, least: float, most: int) -> Found:
    """Return each image's detections: boxes with their likeliest class, after non-maximum suppression.

    Shapes: outputs (B, A, 5 + C): boxes, logits of objectness and classes. A score is the product of both
    probabilities; `least` is the lowest that is reported.
    """
    sure = jax.nn.sigmoid(outputs[:, 4]) * jax.nn.sigmoid(outputs[:, 5:].max(-1))
    scores, which = jax.lax.top_k(sure, min(SORTED, len(sure)))
    boxes, classes = outputs[which, :4], outputs[which, 5:].argmax(-1)
    scores = jnp.where(kept(boxes, classes, overlap) & (scores >= least), scores, 0.0)
    scores, order = first(scores, most)
    return Found(boxes[order], scores, jnp.where(scores > 0, classes[order], -1))


def first(scores: jax.Array, most: int) -> Any:
    """The highest `most` scores and their indices, padded with zeros where an image has fewer anchors."""
    scores, order = jax.lax.top_k(scores, min(most, len(scores)))
    lack = (0, most - len(scores))
    return jnp.pad(scores, lack), jnp.pad(order, lack)
