"""Recommend items after a history of them, by name, with a saved run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.data.contract import IGNORED
from jaxmodels.data.files import shown
from jaxmodels.data.histories import last_items
from jaxmodels.errors import UserError, nearest
from jaxmodels.generate.prepare import Answer, Answers
from jaxmodels.tasks.ranking import AT, Recommends, unseen
from jaxmodels.train.saved import Run


def names_of(run: Run) -> tuple[str, ...]:
    """Return the names of a run's items.

    Raises: UserError if the run did not keep them.
    """
    if not run.kept.classes:
        raise UserError(
            f"got {run.directory} without the names of its items, expected them in data.json, try another copy"
        )
    return run.kept.classes


def history(run: Run) -> Callable[[Any], Any]:
    """Return the function that turns a history, items by name or number and the last one last, into a model's row."""
    names, length = names_of(run), run.config.data.seq_len
    places = {name: at for at, name in enumerate(names)}

    def item(value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
            return value
        if isinstance(value, str) and value in places:
            return places[value]
        near = nearest(value, names) if isinstance(value, str) else ""
        raise UserError(f"has the item {shown(value)}, expected a name of data.json or its place there{near}")

    def ready(value: Any) -> Any:
        try:
            items = json.loads(value) if isinstance(value, str) else list(value)
        except (ValueError, TypeError, RecursionError):
            items = None
        if not isinstance(items, list) or not items:
            raise UserError(f"is {shown(value)}, expected a list of items, the last one last")
        found = np.array([item(each.item() if isinstance(each, np.generic) else each) for each in items], np.int32)
        tokens, segments = last_items(found, length)
        return {"tokens": tokens, "segment_ids": segments, "seen": found}

    return ready


def recommender(run: Run) -> Answers:
    """Answer with the items of the highest scores that are not in the history, the best first."""
    names, task = names_of(run), run.config.task
    assert isinstance(task, Recommends)
    scorer = task.scorer(run.model, names)

    @jax.jit
    def best(params: Any, stats: Any, batch: Any, seen: Any) -> Any:
        scores = scorer(params, stats, batch)[:, : len(names)]
        return jax.lax.top_k(unseen(scores, seen), min(AT, len(names)))

    def answers(ready: Sequence[Any]) -> list[Answer]:
        width = 1 << max(len(each["seen"]) - 1 for each in ready).bit_length()  # so that few programs are compiled
        seen = np.full((len(ready), width), IGNORED, np.int32)
        for row, each in zip(seen, ready, strict=True):
            row[: len(each["seen"])] = each["seen"]
        batch = {name: np.stack([each[name] for each in ready]) for name in ("tokens", "segment_ids")}
        found = best(run.params, run.stats, batch, seen)
        return [one(*each) for each in zip(*map(np.asarray, found), strict=True)]

    def one(scores: np.ndarray, items: np.ndarray) -> Answer:
        if np.isnan(scores).any():
            return {"error": "the model's scores are no numbers"}
        kept = np.isfinite(scores)  # where the history has nearly all items
        return {
            "items": [names[i] for i in items[kept].tolist()],
            "scores": [round(x, 6) for x in scores[kept].tolist()],
        }

    return answers
