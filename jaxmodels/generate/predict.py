"""Predictions of a saved run for records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import numpy as np

from jaxmodels.data import given, pixels, sounds
from jaxmodels.data.records import Bad
from jaxmodels.errors import UserError
from jaxmodels.generate.answer import answerer, question
from jaxmodels.generate.classes import captioned, classifier
from jaxmodels.generate.detected import detector
from jaxmodels.generate.extract import document, extractor
from jaxmodels.generate.masks import masker, whole
from jaxmodels.generate.prepare import (
    Answer,
    Answers,
    Options,
    Predictor,
    images,
    kind_of,
    reader,
    tokenizer_of,
)
from jaxmodels.generate.recommend import history, recommender
from jaxmodels.generate.replies import asker, replier
from jaxmodels.generate.speech import listener, recognizer
from jaxmodels.generate.text_answers import filler, gaps, prompt, source, translator, writer
from jaxmodels.train.saved import Run


def answered(
    records: Iterable[given.Given],
    ready: Callable[[Any], Any],
    answers: Answers,
    size: int,
    threads: ThreadPoolExecutor,
) -> Iterator[Answer]:
    """Yield an answer for each record, in order; `answers` always receives `size` records prepared by `ready`."""

    def prepare(value: Any) -> Any:
        try:
            return value if isinstance(value, Bad) else ready(value)
        except (UserError, pixels.Unreadable, sounds.Unreadable) as error:
            return Bad("", str(error))

    rest = iter(records)
    while chunk := list(islice(rest, size)):
        made = list(threads.map(prepare, [value for _, value in chunk]))
        good = [value for value in made if not isinstance(value, Bad)]
        # padded, so that nothing is compiled for another batch size
        found = iter(answers([*good, *[good[0]] * (size - len(good))])[: len(good)] if good else [])
        for (where, value), own in zip(chunk, made, strict=True):
            if isinstance(own, Bad):
                yield {"where": where, "error": own.reason}
            else:
                yield {"where": where, **({"text": value} if isinstance(value, str) else {}), **next(found)}


def predictor(run: Run, how: Options) -> Predictor:
    """Return the function that prepares a value, and the one that answers a batch of them."""
    predicts = run.task.predicts  # refuses a model that no task trains
    answers = run.config.task.answers
    if not answers and predicts is None:
        raise UserError(
            f"got a run of task {run.config.task.kind}, expected one that says something of a record, "
            f"try jaxmodels report {run.directory}, which shows what it makes"
        )
    if kind_of(run) == "text":
        tokenizer_of(run)
    if not answers and predicts is not None:
        return reader(run), _own(run, predicts)
    return PREDICTORS[answers](run, how)


def _own(run: Run, predicts: Callable[..., Any]) -> Answers:
    """Answer with what the run's task itself predicts, by the task's names."""

    @jax.jit
    def outputs(params: Any, stats: Any, batch: Any) -> Any:
        return predicts(params, stats, batch)

    def answers(ready: Sequence[Any]) -> list[Answer]:
        batch = {name: np.stack([each[name] for each in ready]) for name in ready[0]}
        found = {name: np.asarray(x) for name, x in outputs(run.params, run.stats, batch).items()}
        return [one({name: x[i] for name, x in found.items()}) for i in range(len(ready))]

    def one(values: dict[str, np.ndarray]) -> Answer:
        wrong = [name for name, x in values.items() if not np.isfinite(x).all()]
        if wrong:
            return {"error": f"the model's {wrong[0]} is no finite number"}
        return {name: x.tolist() for name, x in values.items()}

    return answers


PREDICTORS: dict[str, Callable[[Run, Options], Predictor]] = {
    "class": lambda run, how: (reader(run), classifier(run)),
    "classes": lambda run, how: (reader(run), classifier(run)),
    "mask": lambda run, how: (whole(run), masker(run)),
    "caption": lambda run, how: (images(run), captioned(run)),
    "continuation": lambda run, how: (prompt(run, how.tokens), writer(run, how.tokens)),
    "translation": lambda run, how: (source(run), translator(run, how.beams)),
    "gaps": lambda run, how: (gaps(run), filler(run)),
    "items": lambda run, how: (history(run), recommender(run)),
    "extract": lambda run, how: (document(run), extractor(run)),
    "answer": lambda run, how: (question(run), answerer(run)),
    "transcript": lambda run, how: (listener(run), recognizer(run)),
    "boxes": lambda run, how: detector(run),
    "reply": lambda run, how: (asker(run, how.tokens), replier(run, how.tokens)),
}
"""What a task answers (`TaskConfig.answers`) -> the function of a run that makes its predictor."""
