"""Answer questions about texts with a saved run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmodels.data.questions import NOWHERE, Answer, Window, beginnings, rows, spanned, windower
from jaxmodels.errors import UserError
from jaxmodels.generate import prepare
from jaxmodels.generate.prepare import Answers, text_of, tokenizer_of
from jaxmodels.tasks.question_answering import QuestionAnswering, best
from jaxmodels.train.saved import Run


class Question(NamedTuple):
    """A question in windows of its context."""

    id: str
    question: str
    context: str
    windows: list[Window]


def question(run: Run) -> Callable[[Any], Any]:
    """Return the function that makes windows of a row with a question and its context."""
    windows = windower(tokenizer_of(run), _task(run).windowing(run.config.data))

    def ready(value: Any) -> Question:
        texts = []
        for name in ("question", "context"):
            if value.get(name) is None:
                raise UserError(f"has no {name}, expected a question and its context, in columns of these names")
            try:
                texts.append(text_of(value[name]))
            except UserError as error:
                raise UserError(f"{name} {error}") from None
        (made,) = windows([(texts[0], texts[1])])
        return Question(str(value.get("id") or ""), texts[0], texts[1], made)

    return ready


def answerer(run: Run) -> Answers:
    """Answer a question with the part of its context where the model finds the answer, and the probability of it."""
    task, length = _task(run), run.config.data.seq_len

    @jax.jit
    def find(params: Any, batch: Any, may: jax.Array) -> Any:
        named = {name: batch[name] for name in ("types", "segment_ids")}
        return best(run.apply(batch["tokens"], params=params, **named), may, task.longest)

    def answers(ready: Sequence[Question]) -> list[prepare.Answer]:
        flat = [window for each in ready for window in each.windows]
        of = np.repeat(np.arange(len(ready)), [len(each.windows) for each in ready])
        arrays = rows(flat, length)
        arrays["may"] = np.full((len(flat), length), NOWHERE, np.int32)
        for row, may in zip(arrays["may"], (may for each in ready for may in beginnings(each.windows)), strict=True):
            row[: len(may)] = may
        found = []
        for at in range(0, len(flat), len(ready)):  # as many windows at a time as there are questions
            here = np.minimum(np.arange(at, at + len(ready)), len(flat) - 1)
            batch = {name: x[here] for name, x in arrays.items()}
            best_spans = jax.device_get(find(run.params["model"], batch, batch.pop("may")))
            found.append({name: x[: len(flat) - at] for name, x in best_spans._asdict().items()})
        whole = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        joined = task.join({**whole, "window": np.arange(len(flat))}, of)
        return [one(each, flat, joined[number]) for number, each in enumerate(ready)]

    def one(each: Question, flat: Sequence[Window], answer: Answer) -> prepare.Answer:
        named = {**({"id": each.id} if each.id else {}), "question": each.question}
        if not np.isfinite(answer.probability):
            return {**named, "error": "the model's probabilities are no finite numbers"}
        span = spanned(flat[answer.window], each.context, answer)
        text, start, end = ("", None, None) if span is None else (span.text, span.start, span.start + len(span.text))
        return {**named, "answer": text, "probability": round(answer.probability, 6), "start": start, "end": end}

    return answers


def _task(run: Run) -> QuestionAnswering:
    task = run.config.task
    if not isinstance(task, QuestionAnswering):
        raise UserError(
            f"got a run of task {task.kind}, which answers questions in a way of its own, expected task "
            "question_answering, or one that is derived from it"
        )
    return task
