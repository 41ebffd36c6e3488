"""Answer questions about images and sounds with a saved run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import pixels, transforms
from jaxmodels.data.files import shown
from jaxmodels.data.replies import Layout, media_of
from jaxmodels.data.section import Augment
from jaxmodels.errors import UserError
from jaxmodels.generate.prepare import Answer, Answers, text_of, tokenizer_of
from jaxmodels.generate.sample import sample
from jaxmodels.tasks.multimodal_lm import MultimodalLM, media
from jaxmodels.train.saved import Run

_COLUMNS = {"image": ("image",), "sound": ("sound", "audio"), "question": ("question",)}
"""The columns that hold each part of a row."""


def asker(run: Run, tokens: int) -> Callable[[Any], Any]:
    """Return the function that makes the prompt of a row with a question, and the paths or the bytes of its media."""
    task, longest = run.config.task, run.model.longest
    if not isinstance(task, MultimodalLM):
        raise UserError(
            f"got a run of task {task.kind}, which replies in a way of its own, expected task multimodal_lm, or one "
            "that is derived from it"
        )
    layout = Layout.of(run.task.fields, tokenizer_of(run), task.template)
    if "image" in layout.media and not run.config.data.real and not run.config.data.mean:
        raise UserError(
            f"got run {run.directory}, which was imported and does not say how images are normalized, expected one "
            "that was trained on images, try jaxmodels.load_pretrained, and sample with media=(images,)"
        )
    library, crop = run.config.data.pixels, Augment(crop=run.config.augment.crop)

    def image(value: Any, shape: Any) -> np.ndarray:
        return transforms.center(pixels.decode(value, library), crop, shape, library)

    def ready(value: Any) -> dict[str, Any]:
        question = text_of(_part(value, "question"))
        given = {name: _bytes(_part(value, name), name) for name in layout.media}
        found, places = media_of(layout, given, image)
        ids = layout.prompt(question, places)
        if longest is not None and len(ids) + tokens > longest:
            raise UserError(f"has {len(ids)} tokens, expected at most {longest - tokens} with --tokens {tokens}")
        return {"prompt": ids, "question": question, **found}

    return ready


def _part(value: Any, name: str) -> Any:
    found = next((value[column] for column in _COLUMNS[name] if value.get(column) is not None), None)
    if found is None:
        raise UserError(f"has no {name}, expected it in a column {' or '.join(_COLUMNS[name])}")
    return found


def _bytes(value: Any, name: str) -> bytes:
    """Return a file's bytes, from its path or as a table has them."""
    if isinstance(value, dict):  # as datasets stores images and sounds
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UserError(f"has {shown(value)} as {name}, expected the path of a file, or its bytes")
    try:
        return Path(value).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"has the {name} {value}, which cannot be read ({error.strerror})") from error


def replier(run: Run, tokens: int) -> Answers:
    """Answer with the likeliest reply."""
    tokenizer = tokenizer_of(run)

    def answers(ready: Sequence[Any]) -> list[Answer]:
        names = [name for name in ready[0] if name not in ("prompt", "question")]
        arrays: Any = {name: np.stack([each[name] for each in ready]) for name in names}
        given = media(arrays, run.config.data)
        prompts, ends = [each["prompt"] for each in ready], tokenizer.special.ends
        rows = sample(run.model, run.params["model"], prompts, tokens, ends=ends, media=given, temperature=0)
        new = [row[len(ids) :] for row, ids in zip(rows, prompts, strict=True)]
        texts = [tokenizer.decode(row[: np.append(np.isin(row, ends), True).argmax()]).strip() for row in new]
        return [{"question": each["question"], "reply": text} for each, text in zip(ready, texts, strict=True)]

    return answers
