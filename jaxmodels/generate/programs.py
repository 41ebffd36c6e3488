"""What an engine runs on the device: programs of fixed shapes, all of them compiled before the first request.

Dims: R rows of the engine, B rows of a call, T tokens of a call, M pages of a row, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.generate.draw import Draw, Drawn, Draws, draw
from jaxmodels.models.decoding import pooled
from jaxmodels.models.model import Model

ROWS = 8
"""Steps are compiled for one row, for powers of this, and for all rows."""
WIDTH = 2
"""Texts of different lengths take programs whose numbers of pages differ by this factor: half of what a step reads may
then be beyond its texts."""

GRAM = 3
"""The most tokens at the end of a text that are looked for in it, to guess what follows."""


class Shape(NamedTuple):
    """The sizes that an engine is made with."""

    rows: int
    """Texts that are continued at once."""
    length: int
    """The most tokens of a text, its continuation included."""
    page: int
    """Tokens of a page."""
    pages: int
    chunks: tuple[int, ...]
    """Numbers of tokens of a prompt that are read at once; one that has fewer is padded."""
    drafts: int = 0
    """The most tokens that a step guesses behind the newest one, and checks."""

    @property
    def history(self) -> int:
        """Places of a row's tokens, from which they are guessed."""
        return self.width * self.page if self.drafts else 0

    @property
    def width(self) -> int:
        """The most pages of a text."""
        return -(-self.length // self.page)

    def widths(self) -> list[int]:
        """The numbers of pages that programs are compiled for."""
        found = [self.width]
        while found[0] > WIDTH and found[0] * self.page > 128:
            found.insert(0, -(-found[0] // WIDTH))
        return found

    def batches(self) -> list[int]:
        """The numbers of rows that steps are compiled for."""
        found = [1]
        while found[-1] * ROWS < self.rows:
            found.append(found[-1] * ROWS)
        return sorted({*found, self.rows})


class State(NamedTuple):
    """What stays on the device between calls."""

    cache: dict[str, Any]
    """Keys and values in pages, or a state for each row (L, R, …)."""
    last: jax.Array
    """The newest token of each row, (R,)."""
    length: jax.Array
    """How many tokens of each row the cache has, (R,)."""
    counts: jax.Array
    """How often each token is in a row's prompt, and behind it; kept for rows with penalties alone, (2, R, V)."""
    history: jax.Array
    """The tokens of each row, the newest one included, (R, shape.history)."""


class Call(NamedTuple):
    """One call's rows. An entry that stands for no row has the slot R."""

    slots: Any
    """(B,)."""
    table: Any
    """The pages of each row, (B, M)."""
    room: Any
    """Tokens for which the pages of each row have places, (B,)."""
    draws: Draws


class Chunk(NamedTuple):
    """A piece of one row's prompt."""

    tokens: Any
    """(1, T)."""
    start: Any
    """How many tokens come before it, (1,)."""
    count: Any
    """How many of its tokens are real, (1,)."""


class Moved(NamedTuple):
    """What a call did, T tokens a row: 1, or with guesses one more than these."""

    drawn: Drawn
    """(B, T, …)."""
    count: jax.Array
    """How many of these tokens each row has got, (B,)."""
    guessed: jax.Array
    """How many were guessed, (B,)."""


def paged(model: Model) -> bool:
    """Whether the model's cache grows with the text, so that it lies in pages; otherwise each row has a state.

    Raises:
        UserError: the model does not decode, or its cache is of another kind.
    """
    short, long = (jax.eval_shape(lambda length=length: model.cache(1, length)) for length in (8, 16))
    short, long = ({name: tree for name, tree in cache.items() if name != "length"} for cache in (short, long))
    sizes = jax.tree.map(lambda a, b: a.shape != b.shape, short, long)
    grows = jax.tree.leaves(sizes)
    if not any(grows):
        return False
    if set(short) != {"layers"} or not all(grows) or len(model.inputs(1)) > 1:
        raise UserError(
            f"got {type(model.config).__name__}, which reads more than one text or has another cache than keys and "
            "values of layers, expected a decoder, or a state for each row, try jaxmodels sample"
        )
    return True


def cache_bytes(model: Model, page: int) -> int:
    """The bytes of one page of the model's cache."""
    shapes = jax.eval_shape(lambda: model.cache(1, page))
    return sum(
        leaf.size * leaf.dtype.itemsize
        for name, leaf in shapes.items()
        if name != "length"
        for leaf in jax.tree.leaves(leaf)
    )


class Programs:
    """The compiled programs of a model, and the state that they change."""

    def __init__(self, model: Model, params: Any, shape: Shape) -> None:
        if reason := model.config.indivisible():
            raise UserError(
                f"got a model with {reason}, whose outputs depend on how a text is read, expected one that can be read "
                "in pieces, try jaxmodels sample"
            )
        self.model, self.shape, self.paged = model, shape, paged(model)
        if shape.drafts and not self.paged:
            raise UserError(
                f"got {type(model.config).__name__} with guesses of {shape.drafts} tokens, which its state cannot take "
                "back, expected a model with keys and values, try --speculate 0"
            )
        self.params = params
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def prepare(self) -> Iterator[str]:
        """Compile all programs, and make the state; yields the name of each program before it is compiled."""
        for width in self.shape.widths() if self.paged else [1]:
            room = width * self.shape.page
            for size in self.shape.chunks:
                if not self.paged or size <= room:
                    yield f"prompts of {size} tokens in {room}"
                    self._compile(("prefill", size, width), _prefill, self._call(1, width), _chunk(size))
            for rows in self.shape.batches():
                yield f"steps of {rows} rows in {room}"
                step = _speculate if self.shape.drafts else _step
                self._compile(("step", rows, width), step, self._call(rows, width))
        yield "penalties"
        self._compile(("tell",), _tell, np.int32(0), np.zeros((2, self._vocabulary), np.int32))
        if self.shape.drafts:
            yield "guesses"
            self._compile(("remember",), _remember, np.int32(0), np.zeros(self.shape.history, np.int32))
        self.state = jax.jit(self._empty)()

    def prefill(self, call: Call, chunk: Chunk) -> Moved:
        """Read a piece of a prompt; what is drawn counts if it was the last piece."""
        key = ("prefill", chunk.tokens.shape[1], call.table.shape[1])
        self.state, moved = self._compiled[key](self.params, self.state, call, chunk)
        return moved

    def step(self, call: Call) -> Moved:
        """Continue rows by a token each, or more where guesses are right."""
        key = ("step", len(call.slots), call.table.shape[1])
        self.state, moved = self._compiled[key](self.params, self.state, call)
        return moved

    def tell(self, slot: int, counts: np.ndarray) -> None:
        """Say how often each token is in a row's prompt, and behind it: counts (2, V)."""
        self.state = self._compiled[("tell",)](self.state, np.int32(slot), counts)

    def remember(self, slot: int, tokens: Sequence[int]) -> None:
        """Say which tokens a row has, from which others are guessed."""
        history = np.zeros(self.shape.history, np.int32)
        history[: len(tokens)] = tokens
        self.state = self._compiled[("remember",)](self.state, np.int32(slot), history)

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    def _empty(self) -> State:
        shape, R = self.shape, self.shape.rows
        cache = self.model.cache(shape.pages, shape.page) if self.paged else self.model.cache(R, shape.length)
        cache = {name: tree for name, tree in cache.items() if name != "length"}
        if self.paged:
            cache = {"layers": pooled(cache["layers"])}
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        return State(cache, zeros(R), zeros(R), zeros((2, R, self._vocabulary)), zeros((R, shape.history)))

    def _call(self, rows: int, width: int) -> Call:
        slots, table = np.zeros(rows, np.int32), np.zeros((rows, width), np.int32)
        return Call(slots, table, np.zeros(rows, np.int32), Draws.of([Draw()] * rows))

    def _compile(self, key: tuple[Any, ...], function: Any, *given: Any) -> None:
        state = jax.eval_shape(self._empty)
        if key[0] in ("tell", "remember"):
            self._compiled[key] = jax.jit(function, donate_argnums=0).lower(state, *given).compile()
            return
        how = self.shape.drafts if function is _speculate else self.paged
        bound = functools.partial(function, self.model, how)
        self._compiled[key] = jax.jit(bound, donate_argnums=1).lower(self.params, state, *given).compile()


def _chunk(size: int) -> Chunk:
    return Chunk(np.zeros((1, size), np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32))


def _tell(state: State, slot: jax.Array, counts: jax.Array) -> State:
    return state._replace(counts=state.counts.at[:, slot].set(counts))


def _remember(state: State, slot: jax.Array, tokens: jax.Array) -> State:
    return state._replace(history=state.history.at[slot].set(tokens))


def _apply(
    model: Model,
    paged: bool,
    params: Any,
    state: State,
    call: Call,
    tokens: jax.Array,
    real: jax.Array,
    start: Any,
    every: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """Logits of the last real token of each row (B, V), or of `every` one (B, T, V), and the cache with all of them."""
    last = 2**31 - 1 if model.longest is None else model.longest - 1
    positions = jnp.minimum(start[:, None] + jnp.arange(tokens.shape[1]), last)  # those of padding have no meaning
    more: dict[str, Any] = {"length": start}
    if paged:
        cache = {**state.cache, "pages": call.table, **more}
    else:
        # a text begins with a state of zeros, whatever the row had before
        fresh = lambda leaf: jnp.where(_along(start == 0, leaf), 0, leaf)  # noqa: E731
        cache = jax.tree.map(lambda leaf: fresh(leaf.at[:, call.slots].get(mode="clip")), state.cache) | more
    whole = every or tokens.shape[1] == 1 or model.unembedding is None or model.rule is not None
    out, cache = model.apply(
        params, tokens, segment_ids=real.astype(jnp.int32), positions=positions, cache=cache, head=whole
    )
    if not every:
        out = jnp.take_along_axis(out, jnp.maximum(real.sum(1) - 1, 0)[:, None, None], axis=1)[:, 0]
    if not whole:
        table: Any = model.unembedding and model.unembedding(params)
        out = jnp.einsum("bd,vd->bv", out, table.astype(out.dtype), preferred_element_type=jnp.float32)
    cache = {name: cache[name] for name in state.cache}
    if not paged:
        put = lambda old, new: old.at[:, call.slots].set(new.astype(old.dtype), mode="drop")  # noqa: E731
        cache = jax.tree.map(put, state.cache, cache)
    return out, cache


def _along(rows: jax.Array, leaf: jax.Array) -> jax.Array:
    """A mask of rows (B,) for a leaf (L, B, …)."""
    return rows.reshape(1, -1, *[1] * (leaf.ndim - 2))


def _drawn(
    state: State, cache: Any, call: Call, logits: jax.Array, length: jax.Array, guess: jax.Array, guessed: jax.Array
) -> tuple[State, Moved]:
    """Draw the tokens that follow `length` tokens of each row (B,), and those behind each of its guesses.

    A token counts if all guesses before it are those that were drawn. What is drawn depends on the logits, the seed and
    the position alone, so tokens are those that would have been drawn one by one, greedily or not.
    Shapes: logits (B, T, V), guess (B, T - 1), of which `guessed` (B,) are real.
    """
    B, T, V = logits.shape
    slots, options = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), (call.slots, call.draws))
    position = length[:, None] - 1 + jnp.arange(T)
    drawn = draw(logits.reshape(-1, V).astype(jnp.float32), position.reshape(-1), state.counts, slots, options)
    drawn = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), drawn)
    right = (drawn.token[:, :-1] == guess) & (jnp.arange(T - 1) < guessed[:, None])
    count = 1 + jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(1)
    there = jnp.arange(T) < count[:, None]
    put = lambda old, new: old.at[call.slots].set(new, mode="drop")  # noqa: E731
    last = jnp.take_along_axis(drawn.token, count[:, None] - 1, axis=1)[:, 0]
    counted = state.counts.at[1, call.slots[:, None], drawn.token].add(there.astype(jnp.int32), mode="drop")
    at = jnp.where(there, position + 1, state.history.shape[1])
    known = state.history.at[call.slots[:, None], at].set(drawn.token, mode="drop")
    new = State(cache, put(state.last, last), put(state.length, length - 1 + count), counted, known)
    return new, Moved(drawn, count, guessed)


def _alone(state: State, cache: Any, call: Call, logits: jax.Array, length: jax.Array) -> tuple[State, Moved]:
    """Draw one token for each row from logits (B, V)."""
    B = len(logits)
    return _drawn(state, cache, call, logits[:, None], length, jnp.zeros((B, 0), jnp.int32), jnp.zeros(B, jnp.int32))


def _step(model: Model, paged: bool, params: Any, state: State, call: Call) -> tuple[State, Moved]:
    there = (call.slots < len(state.last))[:, None]
    take = lambda values: values.at[call.slots].get(mode="clip")  # noqa: E731
    tokens, start = take(state.last)[:, None], take(state.length)
    logits, cache = _apply(model, paged, params, state, call, tokens, there, start)
    return _alone(state, cache, call, logits, start + 1)


def _speculate(model: Model, drafts: int, params: Any, state: State, call: Call) -> tuple[State, Moved]:
    """A step that also checks tokens which are guessed from the row's own text."""
    take = lambda values: values.at[call.slots].get(mode="clip")  # noqa: E731
    start = take(state.length)
    guess, guessed = guesses(take(state.history), start, drafts)
    d = call.draws
    plain = (d.repetition_penalty == 1) & (d.presence_penalty == 0) & (d.frequency_penalty == 0)
    # what a guess adds to the counts of a penalty is not known when those behind it are drawn
    guessed = jnp.where(plain, jnp.clip(call.room - start - 1, 0, guessed), 0)
    tokens = jnp.concatenate([take(state.last)[:, None], guess], axis=1)
    real = (call.slots < len(state.last))[:, None] & (jnp.arange(1 + drafts) <= guessed[:, None])
    logits, cache = _apply(model, True, params, state, call, tokens, real, start, every=True)
    return _drawn(state, cache, call, logits, start + 1, guess, guessed)


def guesses(history: jax.Array, last: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Guess the tokens that follow each row's newest one, which is at the place `last`, and say how many there are.

    They are those that followed the last place before where the text was most like its end, by up to `GRAM` tokens, and
    what lies between the two is taken to go on repeating itself.
    Shapes: history (B, S), last (B,); returns (B, count) and (B,).
    Source: prompt lookup decoding (Saxena 2023).
    """
    S = history.shape[1]
    places = jnp.arange(S)
    alike, length = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
    for back in range(GRAM):
        own = jnp.take_along_axis(history, jnp.maximum(last - back, 0)[:, None], axis=1)
        there = jnp.roll(history, back, axis=1)
        alike &= (there == own) & (places >= back) & (last >= back)[:, None]
        length += alike
    score = jnp.where(places < last[:, None], length * S + places, -1)
    best = score.argmax(1)
    found = jnp.take_along_axis(length, best[:, None], axis=1)[:, 0] > 0
    at = best[:, None] + 1 + jnp.arange(count) % jnp.maximum(last - best, 1)[:, None]
    guess = jnp.take_along_axis(history, at, axis=1, mode="clip")
    return guess, jnp.where(found & (last > 0), count, 0)


def _prefill(model: Model, paged: bool, params: Any, state: State, call: Call, chunk: Chunk) -> tuple[State, Moved]:
    real = jnp.arange(chunk.tokens.shape[1]) < chunk.count[:, None]
    logits, cache = _apply(model, paged, params, state, call, chunk.tokens, real, chunk.start)
    return _alone(state, cache, call, logits, chunk.start + chunk.count)


def chunked(sizes: Sequence[int], length: int) -> tuple[int, ...]:
    """The sizes of chunks that are no longer than a text, at least one of them."""
    return tuple(size for size in sizes if size <= length) or (length,)
