"""A run's replies to questions about media, and where in the images the model looks as it replies."""

from __future__ import annotations

import jax
import numpy as np

from jaxmodels.models.attention import recording
from jaxmodels.report.attention import overlay
from jaxmodels.report.pieces import Picture, Piece, grid, pixels, show
from jaxmodels.tasks.multimodal_lm import media
from jaxmodels.train.saved import Evaluation

LOOKED_AT, PAIRS = 64, 4
SHOWN = 8
"""So many replies that are right, and so many that are not."""


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Show images with questions and replies, beside what the token that comes before the reply attends to."""
    run, tokenizer = evaluation.run, evaluation.source.tokenizer
    if run.config.task.answers != "reply" or "images" not in run.task.fields or tokenizer is None:
        return []
    batch, tower = evaluation.examples(0, LOOKED_AT), run.model.config.image
    tokens, targets = batch["tokens"], batch["targets"]
    # outside of a compiled function, where the weights are numbers
    with recording() as kept:
        logits = jax.block_until_ready(run.apply(tokens, *media(batch, run.config.data)))
    found = np.asarray(logits).argmax(-1)
    # the decoder's layers, and not those of the towers, which come before them
    looks = np.mean([each.mean(1) for each in kept[-run.model.config.layers :]], 0)
    side = tower.merge * tower.patch
    ids_of_media = [each.token for each in run.model.config.towers.values()]
    maps: dict[bool, list[tuple[int, str, np.ndarray]]] = {True: [], False: []}
    for row in range(len(tokens)):
        at = np.flatnonzero(targets[row] >= 0)
        if not at.size:
            continue
        reply, wanted = (tokenizer.decode(ids[:-1]).strip() for ids in (found[row, at], targets[row, at]))
        prompt = tokens[row, : at[0] + 1]
        of_image, of_media = prompt == tower.token, np.isin(prompt, ids_of_media)
        question = tokenizer.decode(prompt[~of_media][len(tokenizer.before) :])
        look = looks[row, at[0], : len(prompt)][of_image]
        heading = f"{question.strip()}\n{reply}" + ("" if reply == wanted else f", not {wanted}")
        heat = look.reshape(-1, tower.input_shape[1] // side)
        maps[reply == wanted].append((row, f"{heading}\n{look.sum():.0%} image", heat))
    chosen = [one for right in (True, False) for one in maps[right][:SHOWN]]
    figure, axes = grid(-(-len(chosen) // PAIRS), 2 * PAIRS, 1.25, 1.9)
    for axis in axes.flat[2 * len(chosen) :]:
        axis.set_axis_off()
    images = pixels(batch["images"])
    for i, (row, heading, heat) in enumerate(chosen):
        left, right = axes.flat[2 * i], axes.flat[2 * i + 1]
        show(left, images[row])
        left.set_title(heading, fontsize=8, loc="left", parse_math=False)
        overlay(right, images[row], heat)
    caption = (
        f"Questions and replies: the first of {len(maps[True])} right and {len(maps[False])} wrong ones of "
        f"{len(maps[True]) + len(maps[False])}, each token by what the right ones before it make likeliest. At the "
        "right: how the token before the reply attends to each region of the image, mean over heads and "
        "layers, from the minimum to the maximum of each map. Above: how much of its attention the image has in all."
    )
    return [Picture("replies", figure, caption)] if chosen else []
