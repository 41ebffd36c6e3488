"""Images with the boxes that a detector finds in them: hits, false alarms, and what it misses."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxmodels.report.pieces import Picture, Piece, grid, pixels, show
from jaxmodels.tasks.average_precision import matched
from jaxmodels.train.saved import Evaluation

SHOWN = 8
SEEN = 64
"""Images that the worst are chosen from."""
SURE = 0.3
"""Lowest score of a box that is drawn."""
HIT, FALSE, MISSED = "#18e06a", "#ff3b30", "#ffd60a"


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Draw the images with most of a detector's mistakes, and as many of the others."""
    run = evaluation.run
    if run.config.task.answers != "boxes" or run.task.predicts is None:
        return []
    predicts, params, stats = jax.jit(run.task.predicts), run.params, run.stats
    examples = []
    size = min(evaluation.run.config.data.batch_size, SEEN, len(evaluation.source))
    for first in range(0, min(SEEN, len(evaluation.source)) // size * size, size):
        batch = evaluation.examples(first, first + size)
        found = jax.device_get(predicts(params, stats, {"inputs": batch["inputs"]}))
        rows = {**batch, **{f"found_{name}": x for name, x in found.items()}}
        examples += [judged({name: x[i] for name, x in rows.items()}) for i in range(size)]
    order = sorted(range(len(examples)), key=lambda i: -examples[i]["wrong"])
    worst, rest = order[: SHOWN // 2], order[SHOWN // 2 :]
    spread = [rest[i] for i in np.linspace(0, len(rest) - 1, min(SHOWN // 2, len(rest))).astype(int)]
    chosen = [examples[i] for i in (*worst, *spread)]
    columns = min(4, len(chosen))
    height, width = chosen[0]["inputs"].shape[:2]
    whole, axes = grid(-(-len(chosen) // columns), columns, 3.4, 3.4 * height / width + 0.3)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, each in zip(axes.flat, chosen, strict=False):
        draw(axis, each, evaluation)
    hits, false, missed = (sum(len(each[name]) for each in examples) for name in ("hits", "false", "missed"))
    caption = (
        f"Of {len(examples)} images, those with the most mistakes, then others. Green: boxes of the right class that "
        f"overlap an object by half or more ({hits:,}); red: others ({false:,}); yellow, dashed: objects that no box "
        f"finds ({missed:,}). Boxes are drawn from a score of {SURE} up."
    )
    return [Picture("boxes", whole, caption)]


def judged(example: dict[str, np.ndarray]) -> dict[str, Any]:
    """Sort one image's boxes into hits, false ones and missed objects, each (box, class, score)."""
    truth = np.concatenate([example["boxes"][:, :2], example["boxes"][:, :2] + example["boxes"][:, 2:]], -1)
    hits, false, missed = [], [], []
    drawn = example["found_scores"] >= SURE
    boxes, scores, classes = (example[f"found_{name}"][drawn] for name in ("boxes", "scores", "classes"))
    for label in sorted({*classes.tolist(), *example["classes"].tolist()} - {-1}):
        own, there = classes == label, example["classes"] == label
        which = matched(boxes[own], truth[there], np.array([0.5]))[:, 0]
        for box, score, at in zip(boxes[own], scores[own], which, strict=True):
            (hits if at >= 0 else false).append((box, label, float(score)))
        missed += [(box, label, 0.0) for at, box in enumerate(truth[there]) if at not in which]
    return {
        "inputs": example["inputs"], "hits": hits, "false": false, "missed": missed, "wrong": len(false) + len(missed),
    }  # fmt: skip


def draw(axis: Any, example: dict[str, Any], evaluation: Evaluation) -> None:
    """Draw an image with its boxes."""
    show(axis, pixels(example["inputs"]))
    for name, color, style in (("missed", MISSED, "--"), ("hits", HIT, "-"), ("false", FALSE, "-")):
        for (left, top, right, bottom), label, score in example[name]:
            axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], style, color=color, lw=1.1)
            label_text = evaluation.class_name(label) + (f" {score:.2f}" if score else "")
            axis.text(left, top - 1, label_text, color=color, fontsize=5, va="bottom", parse_math=False)
    axis.set_xlim(0, example["inputs"].shape[1])
    axis.set_ylim(example["inputs"].shape[0], 0)
    axis.set_title(", ".join(f"{len(example[name])} {name}" for name in ("hits", "false", "missed")), fontsize=8)
