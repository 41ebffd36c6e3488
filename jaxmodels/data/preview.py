"""Previews of examples for a person: text, and a grid of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import contract
from jaxmodels.data.contract import Contract
from jaxmodels.data.source import Source

_SHADES = " .:-=+*#%@"
_WIDTH = 32
IMAGES = 8
"""Examples of a grid."""
_ALONGSIDE = ("labels", "classes", "group", "weight")
"""Fields that are numbers of an example beside what it shows; its label has a line of its own."""

_EPOCHS, _SIDE, _SMALL = 6, 112, 64
_GAP, _LINE = 4, 20


def show(example: Mapping[str, np.ndarray], source: Source, fields: Contract) -> str:
    """Format one example of a batch as text, where `fields` says what each of its arrays is."""
    texts = [name for name in contract.texts(fields) if name in example]
    images = [name for name in contract.images(fields) if name in example]
    marks, parts = example.get("segment_ids"), list[str]()
    for name in images:
        parts += [*_titled(name, len(images) > 1), _image(example[name])]
    if "inputs" in texts and "targets" in texts:  # what a decoder reads besides is the target, shifted by one
        target = np.maximum(example["targets"], 0)
        parts += ["    source:", _text(example["inputs"], source, marks)]
        parts += ["    target:", _text(target, source, example.get("target_segment_ids"))]
    else:
        read = [name for name in texts if name != "targets"]
        for name in read:
            title = "caption" if images else name
            parts += [*_titled(title, bool(images) or len(read) > 1), _text(example[name], source, marks)]
    for name, field in fields.items():
        if name in example and name not in (*texts, *images, *_ALONGSIDE) and field.axes != ("seq",):
            parts += [*_titled(name, name != "inputs"), _numbers(np.asarray(example[name]))]
    if "targets" in texts:
        parts.append(f"    {int((example['targets'] < 0).sum())} of {len(example['targets'])} targets ignored")
    if "labels" in example:
        parts.append(f"    {_label(example, source)}")
    return "\n".join(parts)


def _titled(name: str, titled: bool) -> list[str]:
    return [f"    {name}:"] if titled else []


def _label(example: Mapping[str, np.ndarray], source: Source) -> str:
    if "labels" not in example:
        return "no label"
    label = example["labels"]
    names = source.class_names
    if label.ndim:
        chosen = [names[c] if c < len(names) else str(c) for c in np.flatnonzero(label > 0).tolist()]
        line = f"labels {', '.join(chosen) or 'none'}" if (label >= 0).all() else "labels ignored"
    else:
        at = int(label)
        line = f"label {at}" + (f" ({names[at]})" if 0 <= at < len(names) and names[at] != str(at) else "")
    return line + (f", group {source.groups[int(example['group'])]}" if "group" in example else "")


def _text(ids: np.ndarray, source: Source, marks: np.ndarray | None = None) -> str:
    """Decode tokens; if a row holds several texts, each begins with its number."""
    if source.tokenizer is None:
        return _numbers(ids)
    if marks is None:
        return _lines(source.tokenizer.decode(ids), "    | ")
    texts = [source.tokenizer.decode(ids[marks == k]) for k in range(1, int(marks.max(initial=0)) + 1)]
    edges = ["    | "] if len(texts) == 1 else [f"{k:3d} | " for k in range(1, len(texts) + 1)]
    return "\n".join(_lines(text, edge) for text, edge in zip(texts, edges, strict=True))


def _lines(text: str, edge: str) -> str:
    # a control character in the data must not reach the terminal
    lines = ["".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line) for line in text.split("\n")]
    return "\n".join((edge if k == 0 else "    | ") + line for k, line in enumerate(lines))


def _numbers(x: np.ndarray) -> str:
    flat: list[Any] = x.reshape(-1)[:_WIDTH].tolist()
    return f"    {x.shape} {x.dtype}: {' '.join(f'{v:.4g}' for v in flat)}{' ...' if x.size > _WIDTH else ''}"


def _image(x: np.ndarray) -> str:
    summary = f"    {x.shape} {x.dtype}, {x.min()} to {x.max()}"
    if max(x.shape) > _SMALL:
        return summary
    gray = x.astype(np.float32).mean(-1)
    step = -(-max(gray.shape) // _WIDTH)
    gray = gray[::step, ::step] - gray.min()
    shade = (gray / max(float(gray.max()), 1e-9) * (len(_SHADES) - 1)).astype(int)
    rows = ("".join(_SHADES[v] * 2 for v in row) for row in shade)
    return "\n".join([summary, *(f"    | {row}".rstrip() for row in rows)])


def grid(source: Source, indices: Sequence[int] | np.ndarray, out: Path, fields: Contract) -> bool:
    """Write a PNG of a source's images, a row per example and a column per epoch; False if it has no images."""
    rows = np.asarray(indices, np.int64)
    batch = source.batch(np.repeat(rows, _EPOCHS), np.tile(np.arange(_EPOCHS), len(rows)))
    shown = [name for name in contract.images(fields) if name in batch]
    if not shown:
        return False
    images = batch[shown[0]]
    if images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        return False
    titles = []
    for k, index in enumerate(rows.tolist()):
        example = {name: x[k * _EPOCHS] for name, x in batch.items()}
        caption, tokenizer = "", source.tokenizer
        for name in contract.texts(fields):
            ids = example[name][example["segment_ids"] > 0] if "segment_ids" in example else example[name]
            caption += f', "{_lines(tokenizer.decode(ids), "")}"' if tokenizer else ""
        titles.append(f"example {index}: {_label(example, source)}{caption}")
    _draw(images.reshape(len(rows), _EPOCHS, *images.shape[1:]), titles, out)
    return True


def _draw(images: np.ndarray, titles: Sequence[str], out: Path) -> None:
    from PIL import Image, ImageDraw, ImageFont

    height, width = images.shape[2:4]
    zoom = max(1, math.ceil(_SIDE / max(height, width)))
    across, down = width * zoom + _GAP, height * zoom + _GAP + _LINE
    page = Image.new("RGB", (_GAP + across * images.shape[1], _LINE + _GAP + down * len(images)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column in range(images.shape[1]):
        pen.text((_GAP + across * column, 2), f"epoch {column}", "black", font)
    for row, title in enumerate(titles):
        top = _LINE + row * down
        pen.text((_GAP, top + 2), title, "black", font)
        for column, image in enumerate(images[row]):
            tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            tile = tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            page.paste(tile, (_GAP + across * column, top + _LINE))
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out, "PNG")
