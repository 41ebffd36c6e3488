"""Continuous batching: texts begin and end at any time, and all that are under way get their next token together.

`submit` takes a text, `advance` does one turn: it admits texts for which there are pages, reads pieces of their
prompts, continues all others by a token, and returns what the turn before has drawn, so that the device never waits for
the host. Where pages run out, the text that came last gives up its own, and is read again later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.generate.draw import Draw, Drawn, Draws
from jaxmodels.generate.pages import Pages, digests
from jaxmodels.generate.programs import Call, Chunk, Moved, Programs, Shape, cache_bytes, chunked
from jaxmodels.generate.sample import with_cache
from jaxmodels.models.model import Model

CHUNKS = (16, 64, 256)
"""Numbers of tokens of a prompt that are read at once."""
BUDGET = 256
"""The most tokens of prompts that a turn reads before all other texts get their next token."""
PAGE = 16
ROWS = 32
MEMORY = 1 << 30
"""Bytes that the cache may take where its size is not given."""
LONGEST = 4096
"""The most tokens of a text of a model that has no limit of its own."""


class Step(NamedTuple):
    """A token of a text, or its end."""

    text: Text
    token: int | None
    """None: the text ended without one more token that belongs to it."""
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, as many as were asked for."""
    finish: str | None = None
    """`stop` for an end token, `length` for the last token that was asked for; None: it goes on."""


@dataclass(eq=False)
class Text:
    """A text under way."""

    prompt: Sequence[int]
    limit: int
    """The most tokens to add."""
    draw: Draw
    ends: tuple[int, ...] = ()
    """Tokens that end it, and do not belong to it."""
    salt: str = ""
    """Texts of another salt share no pages."""
    owner: Any = None
    """Whatever the caller wants to find at the text."""
    tokens: list[int] = field(default_factory=list)
    """The prompt and what is known of its continuation."""
    slot: int = -1
    """Its row; -1: it has none."""
    pages: list[int] = field(default_factory=list)
    written: int = 0
    """The most tokens that the cache has, or will have after the calls that are under way."""
    reading: bool = True
    """Whether a part of it has to be read before it is continued."""
    ahead: int = 0
    """The most tokens that were drawn and are not known yet."""
    finish: str | None = None
    shared: int = 0
    """Tokens of the prompt that another text had read."""
    names: list[bytes] = field(default_factory=list)

    @property
    def made(self) -> int:
        """Tokens of the continuation, and the most that are not known yet."""
        return len(self.tokens) - len(self.prompt) + self.ahead


@dataclass
class Totals:
    """What an engine has done since it began."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    sought_tokens: int = 0
    """Tokens of prompts that were looked for in pages of other texts."""
    shared_tokens: int = 0
    """Those that were found there."""
    preemptions: int = 0
    steps: int = 0
    guessed: int = 0
    """Tokens that were guessed and checked."""
    right: int = 0
    """Those that were what the model draws."""


def pages_of(model: Model, size: int, page: int = PAGE) -> int:
    """How many pages of the model's cache fit into so many bytes."""
    return size // cache_bytes(model, page)


class Engine:
    """Continues texts with one model; `prepare` compiles all that it will run, and nothing is compiled afterwards.

    Greedy tokens are those of `sample`, whatever other texts there are; with a seed, a text's tokens are those of
    `sample` with that seed for the text alone.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        *,
        rows: int = ROWS,
        length: int | None = None,
        page: int = PAGE,
        pages: int | None = None,
        chunks: Sequence[int] = CHUNKS,
        budget: int = BUDGET,
        drafts: int = 0,
    ) -> None:
        """Make an engine of so many rows, for texts of up to `length` tokens, which guesses `drafts` of them in a step.

        Raises:
            UserError: the model is not one that this engine can run, or a size is out of range.
        """
        longest = model.longest
        if length is None:
            length = longest or min(LONGEST, int(getattr(model.config, "context", LONGEST)))
        if min(rows, length - 1, page) < 1 or (longest is not None and length > longest):
            most = "" if longest is None else f" and at most the model's context of {longest}"
            raise UserError(
                f"got rows {rows}, length {length}, page {page}, expected at least 1 row, 2 tokens{most}, and a page "
                f"of 1 token, try rows 8, length {longest or 1024}, page {PAGE}"
            )
        width = -(-length // page)
        if pages is None:
            pages = min(rows * width, max(width, pages_of(model, MEMORY, page)))
        if pages < width:
            raise UserError(
                f"got room for {pages * page} tokens in the cache, expected at least that of one text, {width * page}, "
                f"try a smaller length than {length}"
            )
        self.shape = Shape(rows, length, page, pages, chunked(sorted(chunks), length), drafts)
        self.programs = Programs(with_cache(model), params, self.shape)
        self.pages = Pages(pages, page)
        self.totals = Totals()
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []
        """In the order in which they came."""
        self._budget = budget
        self._slots = list(range(rows))[::-1]
        self._drawing: tuple[list[Text], int, Any] = ([], 0, None)
        """The options of the last call, which stay on the device while its texts do."""
        self._under_way: deque[tuple[list[Text], int, Moved]] = deque()
        """The texts of each call, the most tokens that it gives to each, and what it did."""

    def prepare(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Compile all programs; `say` is called with the name of each before."""
        for name in self.programs.prepare():
            say(name)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self._under_way)

    def check(self, prompt: Sequence[int], limit: int) -> None:
        """Refuse a text that does not fit.

        Raises:
            UserError: it is empty or too long, or has a token that the model does not know.
        """
        count, length, vocabulary = len(prompt), self.shape.length, self.programs.model.config.vocab_size
        if count < 1 or limit < 1:
            raise UserError(f"got a prompt of {count} tokens and {limit} to add, expected at least 1 of each")
        if count + limit > length:
            room = f"{length - count} tokens to add" if count < length else f"a prompt of less than {length} tokens"
            raise UserError(
                f"got a prompt of {count} tokens and {limit} to add, expected at most {length} in all, try {room}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise UserError(f"got a prompt with token {max(prompt)}, expected those of the model, below {vocabulary}")

    def submit(self, text: Text) -> Text:
        """Take a text, to be continued in the turns to come.

        Raises:
            UserError: it does not fit.
        """
        self.check(text.prompt, text.limit)
        text.tokens = [int(token) for token in text.prompt]
        self.waiting.append(text)
        return text

    def cancel(self, text: Text) -> None:
        """End a text at once: its pages are free for others."""
        if text.finish is None:
            text.finish = "cancel"
            if text in self.running:
                self._leave(text)
            elif text in self.waiting:
                self.waiting.remove(text)

    def advance(self) -> list[Step]:
        """Do one turn; return what was drawn in turns before."""
        self._admit()
        left = self._budget
        for text in [text for text in self.running if text.reading]:
            while text.reading and left > 0:
                left -= self._read(text)
        steps = self._make_room()
        texts = [text for text in self.running if self._continues(text)]
        before = len(self._under_way)
        if texts:
            self._step(texts)
        # what this turn's step draws is read in the next one, after that has given the device its work
        steps += self._collect(before if texts else len(self._under_way))
        return steps

    def drain(self) -> Iterator[Step]:
        """Do turns until no text is left."""
        while not self.idle:
            yield from self.advance()

    def _continues(self, text: Text) -> bool:
        return text.finish is None and not text.reading and text.made < text.limit

    def _admit(self) -> None:
        size, paged = self.shape.page, self.programs.paged
        while self.waiting and self._slots:
            text, found = self.waiting[0], []
            if paged:
                text.names = digests(text.tokens, size, text.salt)
                # at least one token is read, from which the next one is drawn
                found = self.pages.find(text.names[: (len(text.tokens) - 1) // size])
                wanted = -(-(len(text.tokens) + 1) // size) - len(found)
                # a page for each other text keeps those that run from giving way at once
                if self.pages.free - self.pages.unheld(found) < wanted + len(self.running):
                    if self.running or self._under_way:
                        return
                    found, wanted = [], wanted + len(found)
                self.pages.hold(found)
                text.pages = [*found, *self.pages.take(min(wanted, self.shape.width - len(found)))]
                self.totals.sought_tokens += len(text.tokens)
                self.totals.shared_tokens += len(found) * size
            text.slot = self._slots.pop()
            text.written, text.shared = len(found) * size, len(found) * size
            self.running.append(self.waiting.popleft())

    def _read(self, text: Text) -> int:
        """Give the device the next piece of a text; return its size."""
        left = len(text.tokens) - text.written
        size = next((size for size in self.shape.chunks if size >= left), self.shape.chunks[-1])
        room = self._width(-(-(text.written + min(size, left)) // self.shape.page)) * self.shape.page
        size = max((each for each in self.shape.chunks if each <= min(size, room)), default=size)
        count, last = min(size, left), left <= size
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :count] = text.tokens[text.written : text.written + count]
        chunk = Chunk(tokens, np.array([text.written], np.int32), np.array([count], np.int32))
        if last and text.draw.penalizes:
            self._tell(text)
        if last and self.shape.drafts:
            self.programs.remember(text.slot, text.tokens)
        drawn = self.programs.prefill(self._call([text], 1, text.written + count), chunk)
        text.written += count
        self.totals.prompt_tokens += count
        if self.programs.paged:
            for page, name in list(zip(text.pages, text.names, strict=False))[: text.written // self.shape.page]:
                self.pages.name(page, name)
        if last:
            text.reading = False
            text.ahead += 1
            self._under_way.append(([text], 1, drawn))
        return size

    def _tell(self, text: Text) -> None:
        vocabulary, begin = self.programs.model.config.vocab_size, len(text.prompt)
        parts = text.tokens[:begin], text.tokens[begin:]
        counts = [np.bincount(np.asarray(part, np.int64), minlength=vocabulary) for part in parts]
        self.programs.tell(text.slot, np.stack(counts).astype(np.int32))

    def _make_room(self) -> list[Step]:
        """Take a page for each text that needs one for its next token; who came last gives way."""
        steps: list[Step] = []
        if not self.programs.paged:
            return steps
        for text in list(self.running):
            while text in self.running and self._continues(text) and text.written >= len(text.pages) * self.shape.page:
                if self.pages.free:
                    text.pages += self.pages.take(1)
                elif self._under_way:
                    steps += self._collect(len(self._under_way))  # some may have ended
                else:
                    self._give_way(self.running[-1])
        for text in self.running if self.shape.drafts else ():
            most = min(self.shape.width, -(-(text.written + 1 + self.shape.drafts) // self.shape.page))
            if not text.reading and self.pages.free and len(text.pages) < most:
                text.pages += self.pages.take(1)  # without it, fewer tokens are guessed
        return steps

    def _give_way(self, text: Text) -> None:
        self._leave(text)
        text.written, text.reading = 0, True
        self.waiting.appendleft(text)
        self.totals.preemptions += 1

    def _step(self, texts: list[Text]) -> None:
        rows = next(rows for rows in self.shape.batches() if rows >= len(texts))
        most = 1 + self.shape.drafts
        tokens = min(max(text.written for text in texts) + most, self.shape.width * self.shape.page)
        moved = self.programs.step(self._call(texts, rows, tokens))
        for text in texts:
            text.written += most
            text.ahead += most
        self._under_way.append((texts, most, moved))
        self.totals.steps += 1

    def _call(self, texts: list[Text], rows: int, tokens: int) -> Call:
        """The arrays of a call after which these texts have up to so many tokens in the cache."""
        slots = np.full(rows, self.shape.rows, np.int32)
        table = np.zeros((rows, self._width(-(-tokens // self.shape.page))), np.int32)
        room = np.zeros(rows, np.int32)
        for row, text in enumerate(texts):
            slots[row] = text.slot
            pages = text.pages[: table.shape[1]]
            table[row, : len(pages)] = pages
            room[row] = len(pages) * self.shape.page
        if self._drawing[:2] != (texts, rows):
            made = Draws.of([*(text.draw for text in texts), *[None] * (rows - len(texts))])
            self._drawing = texts, rows, jax.device_put(made)
        return Call(slots, table, room, self._drawing[2])

    def _width(self, pages: int) -> int:
        if not self.programs.paged:
            return 1
        return next(width for width in self.shape.widths() if width >= pages)

    def _collect(self, count: int) -> list[Step]:
        """Read the results of the calls that have been under way for longest."""
        steps: list[Step] = []
        for _ in range(count):
            texts, most, moved = self._under_way.popleft()
            told = any(text.draw.told >= 0 for text in texts)
            token, got, guessed = jax.device_get((moved.drawn.token, moved.count, moved.guessed))
            drawn = jax.device_get(moved.drawn) if told else moved.drawn._replace(token=token)
            for row, text in enumerate(texts):
                text.ahead -= most
                text.written -= most - int(got[row])
                if text.finish is None:
                    self.totals.guessed += int(guessed[row])
                    self.totals.right += int(got[row]) - 1
                for at in range(int(got[row])):
                    if text.finish is None:
                        steps.append(self._know(text, drawn, (row, at)))
        return steps

    def _know(self, text: Text, found: Drawn, at: tuple[int, int]) -> Step:
        """Take note of a text's new token."""
        token, more = int(found.token[at]), {}
        if (told := text.draw.told) >= 0:
            pairs = zip(found.likeliest[at][:told].tolist(), found.logprobs[at][:told].tolist(), strict=True)
            more = {"logprob": float(found.logprob[at]), "likeliest": tuple(pairs)}
            if not math.isfinite(more["logprob"]):
                more["logprob"] = -math.inf
        self.totals.new_tokens += 1
        if token in text.ends:
            text.finish = "stop"
        else:
            text.tokens.append(token)
            if len(text.tokens) - len(text.prompt) >= text.limit:
                text.finish = "length"
        if text.finish:
            self._leave(text)
        return Step(text, None if text.finish == "stop" else token, finish=text.finish, **more)

    def _leave(self, text: Text) -> None:
        """Give up a text's row and pages; its full pages stay known, for texts that begin like it."""
        self.running.remove(text)
        self._slots.append(text.slot)
        text.slot = -1
        if self.programs.paged:
            known = min(text.written, len(text.tokens))
            text.names = digests(text.tokens[:known], self.shape.page, text.salt)
            for page, name in zip(text.pages, text.names, strict=False):
                self.pages.name(page, name)
            self.pages.release(text.pages)
            text.pages = []
