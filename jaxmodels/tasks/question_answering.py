"""Extractive question answering: the part of a text that answers a question about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import questions
from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.questions import FIRST, NOWHERE, Answer, Questions, Windowing
from jaxmodels.data.section import DataConfig, default
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Count, Natural, Range
from jaxmodels.models.model import Model
from jaxmodels.tasks.losses import Scores, cross_entropy
from jaxmodels.tasks.overlap import judge_answer
from jaxmodels.tasks.task import (
    Answers,
    Batch,
    Loss,
    Params,
    Task,
    TaskConfig,
    Whole,
    counted,
    forward,
    scored,
    tokens,
)

_NEVER = -1e30


@dataclass(frozen=True)
class QuestionAnswering(TaskConfig):
    """Find the first and the last token of the answer to a question in a text.

    A long text is read in windows of `data.seq_len` tokens, each behind the question. The loss is the mean of the
    cross-entropies of both tokens among all tokens of the window; a window without the answer has its first token for
    both. In evaluation, windows of a question are joined: its answer is their best span, and is judged
    by `exact_match` and `f1`, as SQuAD's scripts do.
    Source: Devlin et al. 2018, section 4.2; Rajpurkar et al. 2016.
    """

    overlap: Natural = 128
    """Tokens of the context that two windows have in common."""
    question: Count = 64
    """The most tokens of a question; what is behind them is cut."""
    longest: Count = 30
    """The most tokens of an answer that is given."""
    unanswerable: bool = False
    """Whether a question may have no answer in its text, as in SQuAD 2.0: the answer is empty where the first token
    scores more than every span."""
    margin: Annotated[float, Range(-1e6, 1e6)] = 0.0
    """How much more the first token must score than the best span for an empty answer."""
    answers: ClassVar[Answers] = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin and not self.unanswerable:
            raise UserError(
                f"got task.margin {self.margin} where every question has an answer, expected both or neither, "
                "try --task.unanswerable True"
            )

    def windowing(self, data: DataConfig) -> Windowing:
        """How questions and their contexts become windows."""
        return Windowing(data.seq_len, self.overlap, self.question)

    def examples(self, opening: Opening) -> Source:
        return questions.answered(opening, self.windowing(opening.data), self.unanswerable)

    def build(self, model: Model, data: DataConfig) -> Task:
        config = model.config
        if getattr(config, "head", None) != "spans":
            head = f" with head {config.head}" if hasattr(config, "head") else ""
            raise UserError(
                f"got task question_answering with {type(config).__name__}{head}, expected an encoder that scores "
                "each token as the first and the last of an answer, try BERTConfig with head spans"
            )
        if data.seq_len > config.context:
            raise UserError(
                f"got data.seq_len {data.seq_len}, expected at most model.context {config.context}, "
                f"try --model.context {data.seq_len}"
            )
        if self.longest > data.seq_len and self.longest != default(self, "longest"):
            raise UserError(
                f"got task.longest {self.longest}, expected at most data.seq_len {data.seq_len}, within which an "
                f"answer lies, try --task.longest {data.seq_len}"
            )

        def apply(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Any, Params]:
            given = {name: batch[name] for name in ("types", "segment_ids") if name in batch}
            logits, stats = forward(("model", model), params, stats, batch["tokens"], **given, **how)
            # what fills up a window is no place of an answer, so how much of it there is changes no loss
            real = batch.get("segment_ids", jnp.ones(logits.shape[:2], int)) > 0
            return jnp.where(real[..., None], logits, _NEVER), stats

        def both(logits: jax.Array, starts: jax.Array, ends: jax.Array) -> Scores:
            first, last = cross_entropy(logits[..., 0], starts), cross_entropy(logits[..., 1], ends)
            objective, loss, correct = ((a + b) / 2 for a, b in zip(first[:3], last[:3], strict=True))
            return Scores(objective, loss, correct, first.count)

        def score(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Scores, Params]:
            logits, stats = apply(params, stats, batch, **how)
            return both(logits, *(counted(batch, batch[name]) for name in ("starts", "ends"))), stats

        def keep(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
            logits, _ = apply(params, stats, batch)
            found = jax.vmap(both)(logits, batch["starts"], batch["ends"])._asdict()
            if "may" in batch:  # which synthetic data lack
                found |= {**best(logits, batch["may"], self.longest)._asdict(), "window": batch["window"]}
            return {**found, "weight": batch.get("weight", jnp.ones(len(logits)))}

        def sums(kept: Mapping[str, np.ndarray], source: Source) -> dict[str, tuple[Any, float]]:
            loss, correct, count = (float(kept[name].astype(np.float64).sum()) for name in ("loss", "correct", "count"))
            found = {"loss": (loss, count), "accuracy": (correct, count)}
            if not isinstance(source, Questions):
                return found
            judged = [
                judge_answer(source.text(answer), [each.text for each in source.questions[question].answers])
                for question, answer in self.join(kept, source.of).items()
            ]
            exact, overlap = np.reshape(judged, (-1, 2)).sum(0).tolist()  # of a group there may be none
            return {**found, "exact_match": (exact, float(len(judged))), "f1": (overlap, float(len(judged)))}

        place = BatchField((), below=data.seq_len)
        own = tokens(data, optional=True)
        fields = {
            "tokens": tokens(data, config.vocab_size),
            "types": tokens(data, config.types, optional=True, usual=True),
            "segment_ids": tokens(data, optional=True, usual=True),
            "starts": place,
            "ends": place,
            "may": own,
            "window": BatchField((), optional=True),
        }
        loss, metrics = scored(score)
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            fields,
            needs="a window with an answer",
            whole=Whole(keep, sums, ("exact_match", "f1")),
            better={"accuracy": "max", "exact_match": "max", "f1": "max"},
        )

    def join(self, windows: Mapping[str, np.ndarray], of: np.ndarray) -> dict[int, Answer]:
        """Choose the answer of each question by its windows.

        Shapes: what `best` gives of each window, (N,), and its number `window`, (N,); `of` is the question of each
        number.
        """
        order = np.argsort(of[windows["window"]], kind="stable")
        rows = {name: windows[name][order] for name in (*Best._fields, "window")}
        numbers, begins = np.unique(of[rows["window"]], return_index=True)
        groups = zip(numbers.tolist(), begins.tolist(), [*begins.tolist(), len(order)][1:], strict=True)
        return {question: self._one({name: x[a:b] for name, x in rows.items()}) for question, a, b in groups}

    def _one(self, windows: Mapping[str, np.ndarray]) -> Answer:
        """Choose the answer of one question."""
        row = int(windows["score"].argmax())
        window, first, last = (int(windows[name][row]) for name in ("window", "first", "last"))
        score, total = float(windows["score"][row]), float(np.logaddexp.reduce(windows["total"].astype(np.float64)))
        if self.unanswerable:
            none = float(windows["none"].min())  # a text lacks it only where each window does
            total = float(np.logaddexp(total, none))
            if none > score + self.margin:
                return Answer(window, None, float(np.exp(none - total)))
        return Answer(window, (first, last), float(np.exp(score - total)))


class Best(NamedTuple):
    """The best span of each window, (B,), and what it is compared with."""

    first: jax.Array
    last: jax.Array
    score: jax.Array
    """The sum of both tokens' logits; very low where a window has no span."""
    total: jax.Array
    """Logarithm of the sum of exp(score) over all spans that may be an answer."""
    none: jax.Array
    """The score of no answer: that of the first token."""


def best(logits: jax.Array, may: jax.Array, longest: int) -> Best:
    """Find the span with the highest sum of logits among those of at most `longest` tokens.

    Shapes: logits (B, T, 2); may (B, T), which says where a span may begin and end.
    """
    starts = jnp.where(may == FIRST, logits[..., 0], _NEVER)
    ends = jnp.where(may != NOWHERE, logits[..., 1], _NEVER)
    longest = min(longest, ends.shape[1])
    behind = jnp.pad(ends, [(0, 0), (0, longest - 1)], constant_values=_NEVER)
    # (B, T, longest): the end is so many tokens behind the start
    ends = jnp.stack([behind[:, more : more + starts.shape[1]] for more in range(longest)], -1)
    spans = (starts[..., None] + ends).reshape(len(logits), -1)
    at = spans.argmax(-1)
    first, more = at // longest, at % longest
    none = logits[:, 0].sum(-1)
    return Best(first, first + more, spans.max(-1), jax.nn.logsumexp(spans, -1), none)
