"""What a model of texts or patches attends to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxmodels.data import contract
from jaxmodels.models.attention import recording
from jaxmodels.report.pieces import Picture, Piece, blank, grid, length, pieces_of, pixels, show
from jaxmodels.tasks.task import normalized
from jaxmodels.train.saved import Evaluation, Run

LOOKED_AT = 64
GOOD_LENGTH, LONGEST = 14, 32
"""The text that is shown has about as many tokens as the first, and at most as many as the second are shown."""
GLOW = (1.0, 0.42, 0.1)
IMAGES, LAYERS, HEADS = 4, 8, 16
"""How many of each are shown at most."""


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Map the attention of each layer (mean over heads) and of the last layer's heads, for one example; empty if
    none."""
    run = evaluation.run
    # items are no pieces of a text, and replies and transcripts have pictures of their own
    if "model" not in run.networks or run.config.task.answers in ("items", "reply", "transcript"):
        return []
    batch, answers, fields = evaluation.examples(0, LOOKED_AT), run.config.task.answers, run.task.fields
    if answers == "translation":
        return cross(evaluation, batch)
    texts, images = contract.texts(fields), contract.images(fields)
    if texts and images:  # a tower for each
        seen = of_images(run, batch[images[0]], lambda x: run.apply(x, None))
        return seen + of_texts(evaluation, batch, texts[0], lambda tokens, **named: run.apply(None, tokens, **named))
    if images:
        return of_images(run, batch[images[0]], run.apply)
    return of_texts(evaluation, batch, texts[0], run.apply) if texts else []


def weights(apply: Callable[..., Any], *args: Any, **named: Any) -> list[np.ndarray]:
    """Return the attention weights (B, H, T, S) of a call, layer by layer."""
    with recording() as kept:
        jax.block_until_ready(apply(*args, **named))
    return kept


def of_images(run: Run, inputs: np.ndarray, apply: Callable[..., Any]) -> list[Piece]:
    """Show which patches the output draws on, overlaid on the images."""
    inputs = inputs[:IMAGES]
    kept = weights(apply, normalized(jnp.asarray(inputs), run.config.data))
    # a detector's queries, or merged patches, are no patches of the image
    kept = [each for each in kept if each.shape[-2:] == (kept[0].shape[-1],) * 2]
    found = patches(inputs.shape[1:3], kept[0].shape[-1]) if kept else None
    if found is None:
        return []
    rows, columns = found
    token = kept[0].shape[-1] > rows * columns

    def looks(matrix: np.ndarray) -> np.ndarray:
        """Return what the output takes from each patch: by the class token, or averaged over all patches."""
        taken = matrix[..., 0, 1:] if token else matrix.mean(-2)
        return taken.reshape(*taken.shape[:-1], rows, columns)

    layers = [each.mean(1) for each in kept]
    spread = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), LAYERS)).round().astype(int))
    images = pixels(inputs)
    figure, axes = grid(len(images), 2 + len(spread), 1.5, 1.6)
    overlays = [rollout(layers), *(layers[i] for i in spread)]
    for line, image, row in zip(axes, images, range(len(images)), strict=True):
        show(line[0], image)
        for axis, matrix in zip(line[1:], overlays, strict=True):
            overlay(axis, image, looks(matrix[row]))
    for axis, title in zip(axes[0], ["image", "rollout", *(f"layer {i + 1}" for i in spread)], strict=True):
        axis.set_title(title, fontsize=9)
    whose = "the class token" if token else "all patches"
    caption = (
        f"Attention of {whose} to each patch: through all layers (rollout: products of the means over heads with half "
        "of the identity; Abnar & Zuidema 2020), and of each layer, mean over heads. "
        "Color ranges from the minimum to the maximum of each map."
    )
    drawn: list[Piece] = [Picture("attention-layers", figure, caption)]
    heads = kept[-1][0, :HEADS]
    figure, axes = grid(-(-len(heads) // 8), min(len(heads), 8), 1.5, 1.7)
    for axis in axes.flat[len(heads) :]:
        axis.set_axis_off()
    for index, (axis, matrix) in enumerate(zip(axes.flat, heads, strict=False)):
        overlay(axis, images[0], looks(matrix))
        axis.set_title(f"head {index + 1}", fontsize=9)
    return [*drawn, Picture("attention-heads", figure, "The heads of the last layer, for the first image.")]


def patches(size: Sequence[int], tokens: int) -> tuple[int, int] | None:
    """Return how many rows and columns of square patches an image has, as `tokens` with or without a class token."""
    height, width = size
    for side in range(1, math.gcd(height, width) + 1):
        rows, columns = height // side, width // side
        if height % side == width % side == 0 and rows * columns in (tokens, tokens - 1):
            return rows, columns
    return None


def rollout(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Propagate attention through all layers (B, T, T), each half residual stream; rows add up to 1."""
    halves = [(each + np.eye(each.shape[-1])) / 2 for each in layers]
    return functools.reduce(lambda below, above: above @ below, halves)


def overlay(axis: Any, image: np.ndarray, heat: np.ndarray) -> None:
    """Draw a map (rows, columns) over its image, which shows through where the map is low."""
    show(axis, 0.6 * image)
    height, width = image.shape[:2]
    color = np.empty((*heat.shape, 4), np.float32)
    color[..., :3] = GLOW
    color[..., 3] = 0.85 * (heat - heat.min()) / max(float(np.ptp(heat)), 1e-12)
    axis.imshow(color, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear")
    blank(axis)


def of_texts(
    evaluation: Evaluation, batch: dict[str, np.ndarray], tokens: str, apply: Callable[..., Any]
) -> list[Piece]:
    """Map tokens against tokens."""
    ids, segments = batch[tokens], batch.get("segment_ids")
    row, count = choose(ids, segments)
    named = {name: batch[name][row : row + 1] for name in ("segment_ids", "types") if name in batch}
    kept = [each[0, :, :count, :count] for each in weights(apply, ids[row : row + 1], **named)]
    if not kept:
        return []
    return maps(kept, [pieces_of(evaluation.source.tokenizer, ids[row, :count])] * 2, "attention", "Attention")


def cross(evaluation: Evaluation, batch: dict[str, np.ndarray]) -> list[Piece]:
    """Map a decoder's tokens against the source's; empty if it does not attend to them."""
    run = evaluation.run
    row, count = choose(batch["inputs"], batch.get("segment_ids"))
    sources, targets, tokens = (batch[name][row] for name in ("inputs", "targets", "tokens"))
    segments = batch["target_segment_ids"][row] if "target_segment_ids" in batch else None
    written = length(segments, np.where(targets < 0, 0, targets), LONGEST)
    # sources and targets of two lengths, by which the calls are told apart
    T, S = written, count + (count == written < len(sources))
    T -= S == T > 1
    lengths = {"segment_ids": S, "target_segment_ids": T}
    named = {name: batch[name][row : row + 1, :size] for name, size in lengths.items() if name in batch}
    kept = weights(run.apply, sources[None, :S], tokens[None, :T], **named)
    kept = [each[0, :, :, :count] for each in kept if each.shape[-2:] == (T, S)]
    if not kept:
        return []
    tokenizer = evaluation.source.tokenizer
    labels = [pieces_of(tokenizer, targets[:T]), pieces_of(tokenizer, sources[:count])]
    return maps(
        kept, labels, "attention", "The decoder's attention to the source, as it predicts each token at the left"
    )


def choose(ids: np.ndarray, segments: np.ndarray | None) -> tuple[int, int]:
    """Choose the row (of B, T) whose first text suits best, and how many of its tokens to show."""
    counts = [length(None if segments is None else segments[i], ids[i], LONGEST) for i in range(len(ids))]
    row = min(range(len(counts)), key=lambda i: abs(counts[i] - GOOD_LENGTH))
    return row, counts[row]


def maps(kept: Sequence[np.ndarray], labels: Sequence[Sequence[str]], name: str, what: str) -> list[Piece]:
    """Draw weights (H, T, S) of each layer: the means over heads, and the heads of the last layer."""
    spread = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), LAYERS)).round().astype(int))
    means = [(f"layer {i + 1}", kept[i].mean(0)) for i in spread]
    heads = [(f"head {i + 1}", matrix) for i, matrix in enumerate(kept[-1][:HEADS])]
    note = " Each row adds up to 1 over the whole text; darkest: the maximum of that map."
    return [
        Picture(f"{name}-layers", heat(means, *labels), f"{what}: mean over the heads of each layer.{note}"),
        Picture(f"{name}-heads", heat(heads, *labels), f"{what}: the heads of the last layer.{note}"),
    ]


def heat(maps: Sequence[tuple[str, np.ndarray]], rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Draw matrices (T, S) with their titles, tokens on the left and below."""
    across = min(len(maps), 2 if len(columns) > 20 else 4)
    cell = 0.19
    width, height = max(cell * len(columns), 1.6) + 0.9, max(cell * len(rows), 1.6) + 1.1
    figure, axes = grid(-(-len(maps) // across), across, width, height)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    for index, (axis, (title, matrix)) in enumerate(zip(axes.flat, maps, strict=False)):
        axis.imshow(matrix, cmap="Blues", vmin=0, aspect="auto")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7.5, parse_math=False)
        beginning = index % across == 0
        axis.set_yticks(range(len(rows)), rows if beginning else [""] * len(rows), fontsize=7.5, parse_math=False)
        axis.tick_params(length=0)
    return figure
