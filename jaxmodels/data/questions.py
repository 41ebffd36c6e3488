"""Questions about texts as a model reads them: each with its text in windows, beside the answers in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.data.contract import IGNORED
from jaxmodels.data.examples import Readers, open_records
from jaxmodels.data.fields import named_field, named_groups
from jaxmodels.data.opening import Opening
from jaxmodels.data.source import Source
from jaxmodels.data.texts import Rows
from jaxmodels.data.tokenizer import HuggingFace, Tokenizer
from jaxmodels.data.values import Span
from jaxmodels.errors import UserError

_log = logging.getLogger("jaxmodels")

NOWHERE, WITHIN, FIRST = 0, 1, 2
"""What a token may be of an answer: nothing, since it is none of the context; its inside and its end; its beginning,
too. It begins an answer only in that of the windows with the most context around it (Devlin et al. 2018)."""


@dataclass(frozen=True)
class Windowing:
    """How a question and its context become windows."""

    length: int
    """Tokens of a window (T)."""
    overlap: int
    """Tokens of the context that two windows have in common."""
    question: int
    """The most tokens of a question; what is behind them is cut."""


class Window(NamedTuple):
    """A question and a part of its context, as a model reads them."""

    ids: np.ndarray
    """int32 (T,)."""
    types: np.ndarray
    """0 for the question and 1 for the context, int32 (T,)."""
    places: np.ndarray
    """The characters at which each token begins and ends in the context, int32 (T, 2); -1 for all other tokens."""

    @property
    def inner(self) -> np.ndarray:
        """The tokens of the context."""
        return np.flatnonzero(self.places[:, 0] >= 0)


class Question(NamedTuple):
    """A question with its context and the right answers, as the records have them."""

    question: str
    context: str
    answers: tuple[Span, ...]


class Answer(NamedTuple):
    """An answer that a model gives."""

    window: int
    """The window that it was found in."""
    tokens: tuple[int, int] | None
    """Its first and its last token there; None: the context has no answer."""
    probability: float
    """Its share of all spans in all windows of the question."""


def spanned(window: Window, context: str, answer: Answer) -> Span | None:
    """Return an answer as a part of its context."""
    if answer.tokens is None:
        return None
    start, stop = (int(window.places[token, side]) for side, token in enumerate(answer.tokens))
    return Span(context[start:stop], start)


def windower(tokenizer: Tokenizer, how: Windowing) -> Callable[[Sequence[tuple[str, str]]], list[list[Window]]]:
    """Return the function that makes windows of questions and contexts; thread-safe.

    A window is [CLS] question [SEP] part of the context [SEP], or has what else the tokenizer puts around a pair.

    Raises:
        UserError: the tokenizer does not say what is around a pair, or a window has no room for more context than it
            has in common with the one before.
    """
    from tokenizers import Tokenizer as Rust

    if not isinstance(tokenizer, HuggingFace):
        raise _no_pairs(tokenizer)
    whole, cutting = (Rust.from_str(tokenizer.to_json()) for _ in range(2))
    mask = whole.encode("a", "a").special_tokens_mask
    if sum(mask) < 3 or not mask[0]:
        raise _no_pairs(tokenizer)
    if how.length - sum(mask) - how.question <= how.overlap:
        raise UserError(
            f"got windows of {how.length} tokens with {how.overlap} in common, {how.question} for the question and "
            f"{sum(mask)} special ones, expected room for more of the context, "
            f"try --data.seq-len {sum(mask) + how.question + 2 * how.overlap}"
        )
    cutting.enable_truncation(how.length, stride=how.overlap, strategy="only_second")

    def windows(pairs: Sequence[tuple[str, str]]) -> list[list[Window]]:
        try:
            heads = [found.offsets for found in whole.encode_batch([a for a, _ in pairs], add_special_tokens=False)]
            cut = [a[: at[: how.question][-1][1]] if at else a for (a, _), at in zip(pairs, heads, strict=True)]
            done = cutting.encode_batch([(a, b) for a, (_, b) in zip(cut, pairs, strict=True)])
        except TypeError:  # the library takes only text that UTF-8 can encode
            raise UserError("got a text with half of a surrogate pair, expected characters of UTF-8") from None
        return [[_window(each) for each in (found, *found.overflowing)] for found in done]

    return windows


def _no_pairs(tokenizer: Tokenizer) -> UserError:
    return UserError(
        f"got tokenizer {tokenizer}, expected one that says which tokens are before, between and behind two texts, "
        "try the tokenizer.json of a BERT, or --data.tokenizer words:8000"
    )


def _window(found: Any) -> Window:
    second = np.array([of == 1 for of in found.sequence_ids])
    places = np.where(second[:, None], np.array(found.offsets, np.int32).reshape(-1, 2), np.int32(-1))
    return Window(np.array(found.ids, np.int32), np.array(found.type_ids, np.int32), places)


def beginnings(windows: Sequence[Window]) -> list[np.ndarray]:
    """Say of each token of a question's windows what it may be of an answer: `NOWHERE`, `WITHIN` or `FIRST`."""
    room: dict[tuple[int, int], tuple[float, int]] = {}
    """For a place in the context, the most that a window shows around it, and that window."""
    for number, window in enumerate(windows):
        inner = window.inner
        for order, token in enumerate(inner.tolist()):
            left, right = order, len(inner) - 1 - order
            here = min(left, right) + 0.01 * len(inner), -number  # as published: of equal ones the longer window
            place = tuple(window.places[token].tolist())
            if place not in room or here > room[place]:
                room[place] = here
    found = []
    for number, window in enumerate(windows):
        may = np.zeros(len(window.ids), np.int32)
        for token in window.inner.tolist():
            may[token] = FIRST if room[tuple(window.places[token].tolist())][1] == -number else WITHIN
        found.append(may)
    return found


def locate(window: Window, span: Span) -> tuple[int, int] | None:
    """Return the first and the last token of an answer, None where the window does not have all of it."""
    inner = window.inner
    begins, ends = window.places[inner].T if len(inner) else np.zeros((2, 0), np.int32)
    start, stop = span.start, span.start + len(span.text)
    if not len(inner) or start < begins[0] or stop > ends[-1]:
        return None
    first, last = np.searchsorted(begins, start, "right") - 1, np.searchsorted(ends, stop, "left")
    return int(inner[first]), int(inner[last])


def rows(found: Sequence[Window], length: int) -> dict[str, np.ndarray]:
    """Lay out windows, one a row: `tokens`, `types` and `segment_ids` (N, length)."""
    out = {name: np.zeros((len(found), length), np.int32) for name in ("tokens", "types", "segment_ids")}
    for row, window in enumerate(found):
        here = slice(len(window.ids))
        out["tokens"][row, here], out["types"][row, here] = window.ids, window.types
        out["segment_ids"][row, here] = 1
    return out


class Questions(Rows):
    """Questions in windows, held in memory."""

    def __init__(
        self, questions: Sequence[Question], of: np.ndarray, windows: Sequence[Window], arrays: dict[str, np.ndarray],
        **more: Any,
    ) -> None:  # fmt: skip
        """`of`: the question of each window, (N,)."""
        super().__init__(arrays, what=f"windows of {len(questions):,} questions", **more)
        self.questions, self.of, self.windows = tuple(questions), of, tuple(windows)
        self.field, self.kind = "question", "text"

    def text(self, answer: Answer) -> str:
        """Return the text of an answer."""
        span = spanned(self.windows[answer.window], self.questions[self.of[answer.window]].context, answer)
        return "" if span is None else span.text


def answered(opening: Opening, how: Windowing, unanswerable: bool) -> Source:
    """Make windows of questions, their contexts and the first of their answers, from records that have these fields.

    A window without the answer has the first token for it, as published.

    Raises:
        UserError: the records have no such fields.
    """
    cfg: Any = opening.data
    split = opening.split
    used = ("tokenizer", "seq_len", "bad_records", "group_field")
    opening.check(used, "questions")
    train = open_records(cfg, "train")
    for name, kind in (("question", "text"), ("context", "text"), ("answers", "spans")):
        if name not in train.fields or train.fields[name].kind != kind:
            known = ", ".join(f"{name} ({field.kind})" for name, field in sorted(train.fields.items()))
            raise UserError(
                f"got {train.label} with the fields {known}, expected question (text), context (text) and answers "
                "(spans), try --data squad"
            )
    if cfg.group_field:
        named_field(train, "group_field", cfg.group_field, ("label", "text"), ["question", "context"])
    fields = ["question", "context", "answers", *([cfg.group_field] if cfg.group_field else [])]
    readers = Readers(cfg, train, fields)
    tokenizer = readers.tokenizer(opening.vocab_size, "question", "context")
    kept = []
    for row in readers.rows(split):
        wrong = next((a for a in row["answers"] if row["context"][a.start :][: len(a.text)] != a.text), None)
        if wrong is not None:
            readers.of(split).bad(
                row.index, f"has the answer {wrong.text!r} at {wrong.start}, where its context has not"
            )
        elif not row["answers"] and not unanswerable:
            readers.of(split).bad(row.index, "has no answer, which --task.unanswerable True allows")
        else:
            kept.append(row)
    questions = [Question(row["question"], row["context"], tuple(row["answers"])) for row in kept]
    found = windower(tokenizer, how)([(each.question, each.context) for each in questions])
    of = np.repeat(np.arange(len(questions)), [len(each) for each in found])
    flat = [window for each in found for window in each]
    arrays = rows(flat, how.length)
    label = readers.of(split).records.label
    arrays["starts"], arrays["ends"] = _targets(questions, found, label).T
    if split == "eval":
        arrays["may"] = np.zeros((len(flat), how.length), np.int32)
        for row, may in zip(arrays["may"], (may for each in found for may in beginnings(each)), strict=True):
            row[: len(may)] = may
        arrays["window"] = np.arange(len(flat), dtype=np.int32)
    groups: tuple[str, ...] = ()
    if cfg.group_field:
        values = [row[cfg.group_field] for row in kept]
        groups, place = named_groups(train.fields[cfg.group_field], lambda: values)
        arrays["group"] = np.array([place(values[i]) for i in of], np.int32)
    return Questions(questions, of, flat, arrays, split=split, label=label, tokenizer=tokenizer, groups=groups)


def _targets(questions: Sequence[Question], found: Sequence[Sequence[Window]], label: str) -> np.ndarray:
    """Return the first and the last token of the first answer in each window, (N, 2), 0 where it has none of it.

    An answer that begins or ends within a token is learned with the whole token; one that no window holds in whole is
    IGNORED in all of them.
    """
    targets, widened, lost = [], 0, 0
    for question, each in zip(questions, found, strict=True):
        if not question.answers:
            targets += [(0, 0)] * len(each)
            continue
        span = question.answers[0]
        at = [locate(window, span) for window in each]
        if (held := next((i for i, place in enumerate(at) if place is not None), None)) is None:
            lost += 1
            targets += [(IGNORED, IGNORED)] * len(each)
            continue
        first, last = at[held] or (0, 0)
        places = each[held].places
        widened += (places[first, 0], places[last, 1]) != (span.start, span.start + len(span.text))
        targets += [place or (0, 0) for place in at]
    for count, what in (
        (widened, "begin or end within a token, and are learned with all of it"),
        (lost, "are longer than what two windows have in common, lie in none, and are not learned"),
    ):
        if count:
            _log.warning("%s of %s answers of %s %s", f"{count:,}", f"{len(questions):,}", label, what)
    return np.array(targets, np.int32).reshape(-1, 2)
