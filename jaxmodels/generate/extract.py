"""Summarize texts by the sentences that a saved run chooses from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.data.files import shown
from jaxmodels.data.sentences import rows
from jaxmodels.errors import UserError
from jaxmodels.generate import prepare
from jaxmodels.generate.prepare import Answers, text_of, tokenizer_of
from jaxmodels.tasks.extraction import Extraction
from jaxmodels.train.saved import Run


def document(run: Run) -> Callable[[Any], Any]:
    """Return the function that checks a row with the sentences of a text, in the column that the run was trained on."""
    name = run.kept.field or run.config.data.input_field

    def ready(value: Any) -> tuple[str, ...]:
        if not isinstance(value.get(name), list | tuple) or not value[name]:
            raise UserError(f"{name} is {shown(value.get(name))}, expected a list of sentences")
        return tuple(map(text_of, value[name]))

    return ready


def extractor(run: Run) -> Answers:
    """Answer with the likeliest sentences, joined in their order, and the probability of each sentence."""
    task, tokenizer = run.config.task, tokenizer_of(run)
    if not isinstance(task, Extraction):
        raise UserError(
            f"got a run of task {task.kind}, which extracts in a way of its own, expected task extraction, or one that "
            "is derived from it"
        )

    @jax.jit
    def score(params: Any, batch: Any) -> jax.Array:
        named = {name: batch[name] for name in ("types", "segment_ids", "at")}
        return run.apply(batch["tokens"], params=params, **named)

    def answers(ready: Sequence[tuple[str, ...]]) -> list[prepare.Answer]:
        batch, _ = rows(ready, tokenizer, run.config.data.seq_len, task.most)
        there = batch.pop("there")
        logits = np.asarray(score(run.params["model"], batch), np.float64)
        return [one(*each) for each in zip(ready, logits, there, strict=True)]

    def one(texts: tuple[str, ...], logits: np.ndarray, there: np.ndarray) -> prepare.Answer:
        if not there.any():
            return {"error": f"has a first sentence of more than {run.config.data.seq_len} tokens"}
        if not np.isfinite(logits).all():
            return {"error": "the model's logits are no finite numbers"}
        chosen = task.chosen(logits[there])
        shares = [round(float(x), 6) for x in 1 / (1 + np.exp(-logits[there]))]
        summary = " ".join(texts[i] for i in chosen)
        return {"summary": summary, "sentences": chosen, "probabilities": shares}

    return answers
