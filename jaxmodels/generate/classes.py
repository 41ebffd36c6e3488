"""Classify records with a saved run: by a classifier's outputs, or by the captions of classes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import texts
from jaxmodels.data.records import distinct
from jaxmodels.errors import UserError
from jaxmodels.generate.prepare import (
    Answer,
    Answers,
)
from jaxmodels.train.saved import Run

LISTED = 100
"""With more classes than this, only the likeliest are listed."""
LIKELIEST = 5


def class_names(run: Run) -> list[str]:
    """Return the names of a classifier's outputs."""
    return distinct([run.class_name(i) for i in range(run.model.config.classes)])


def class_shares(run: Run) -> Callable[[Any, Any], jax.Array]:
    """Return the function of parameters and a batch that gives each row's probabilities, (B, classes)."""
    several = run.config.task.answers == "classes"

    def shares(params: Any, batch: Any) -> jax.Array:
        inputs, named = run.inputs(batch)
        logits = run.apply(inputs, params=params, **named).astype(jnp.float32)
        return jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits)

    return shares


def classifier(run: Run) -> Answers:
    """Answer with the likeliest class, or with all that are likelier than not."""
    names, several, shares = class_names(run), run.config.task.answers == "classes", jax.jit(class_shares(run))

    def answers(ready: Sequence[Any]) -> list[Answer]:
        batch = {name: np.stack([each[name] for each in ready]) for name in ready[0]}
        return [chosen(row, names, several) for row in np.asarray(shares(run.params["model"], batch))]

    return answers


def captioned(run: Run) -> Answers:
    """Answer with the class whose captions are closest to an image."""
    section, tokenizer = run.config.data, run.tokenizer
    names = section.class_names or run.kept.classes
    if tokenizer is None:
        raise UserError(f"got {run.directory} without a tokenizer, expected one that reads captions, try another run")
    if not section.captions or not names:
        what = " and ".join(["captions"] * (not section.captions) + ["names of classes"] * (not names))
        raise UserError(
            f"got {run.directory} without {what}, expected those that images are matched with, "
            f"try --captions {shlex.join(section.captions or ('a photo of a {label}',))} "
            f"--class-names {shlex.join(names or ('cat', 'dog'))}"
        )
    rows = texts.encoded(texts.filled(section.captions, names), tokenizer, section.seq_len)
    _, read, scale = run.apply(None, rows["inputs"], segment_ids=rows["segment_ids"])
    read = np.asarray(read).reshape(len(names), len(section.captions), -1).mean(1)
    read /= np.linalg.norm(read, axis=-1, keepdims=True)

    @jax.jit
    def shares(params: Any, inputs: jax.Array) -> jax.Array:
        seen, _, _ = run.apply(run.inputs({"inputs": inputs})[0], None, params=params)
        return jax.nn.softmax(jnp.minimum(scale, 100.0) * seen @ read.T)

    def answers(ready: Sequence[Any]) -> list[Answer]:
        found = shares(run.params["model"], np.stack([each["inputs"] for each in ready]))
        return [chosen(row, distinct(names)) for row in np.asarray(found)]

    return answers


def chosen(shares: np.ndarray, names: Sequence[str], several: bool = False) -> Answer:
    """Return the class, or with `several` all classes above 1/2, and all probabilities."""
    if not np.isfinite(shares).all():
        return {"error": "the model's probabilities are no finite numbers"}
    order = np.argsort(-shares, kind="stable")[:LIKELIEST] if len(shares) > LISTED else range(len(shares))
    listed = {names[i]: round(float(shares[i]), 6) for i in order}
    if several:
        return {"labels": [names[i] for i in np.flatnonzero(shares > 0.5).tolist()], "probabilities": listed}
    best = int(shares.argmax())
    return {"label": names[best], "probability": round(float(shares[best]), 6), "probabilities": listed}
