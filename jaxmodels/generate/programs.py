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


class Call(NamedTuple):
    """One call's rows. An entry that stands for no row has the slot R."""

    slots: Any
    """(B,)."""
    table: Any
    """The pages of each row, (B, M)."""
    draws: Draws


class Chunk(NamedTuple):
    """A piece of one row's prompt."""

    tokens: Any
    """(1, T)."""
    start: Any
    """How many tokens come before it, (1,)."""
    count: Any
    """How many of its tokens are real, (1,)."""


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
                self._compile(("step", rows, width), _step, self._call(rows, width))
        yield "penalties"
        self._compile(("tell",), _tell, np.int32(0), np.zeros((2, self._vocabulary), np.int32))
        self.state = jax.jit(self._empty)()

    def prefill(self, call: Call, chunk: Chunk) -> Drawn:
        """Read a piece of a prompt; what is drawn counts if it was the last piece."""
        key = ("prefill", chunk.tokens.shape[1], call.table.shape[1])
        self.state, drawn = self._compiled[key](self.params, self.state, call, chunk)
        return drawn

    def step(self, call: Call) -> Drawn:
        """Continue rows by a token each."""
        key = ("step", len(call.slots), call.table.shape[1])
        self.state, drawn = self._compiled[key](self.params, self.state, call)
        return drawn

    def tell(self, slot: int, counts: np.ndarray) -> None:
        """Say how often each token is in a row's prompt, and behind it: counts (2, V)."""
        self.state = self._compiled[("tell",)](self.state, np.int32(slot), counts)

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
        return State(cache, zeros(R), zeros(R), zeros((2, R, self._vocabulary)))

    def _call(self, rows: int, width: int) -> Call:
        return Call(np.zeros(rows, np.int32), np.zeros((rows, width), np.int32), Draws.of([Draw()] * rows))

    def _compile(self, key: tuple[Any, ...], function: Any, *given: Any) -> None:
        state = jax.eval_shape(self._empty)
        if key[0] == "tell":
            self._compiled[key] = jax.jit(function, donate_argnums=0).lower(state, *given).compile()
            return
        bound = functools.partial(function, self.model, self.paged)
        self._compiled[key] = jax.jit(bound, donate_argnums=1).lower(self.params, state, *given).compile()


def _chunk(size: int) -> Chunk:
    return Chunk(np.zeros((1, size), np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32))


def _tell(state: State, slot: jax.Array, counts: jax.Array) -> State:
    return state._replace(counts=state.counts.at[:, slot].set(counts))


def _apply(
    model: Model, paged: bool, params: Any, state: State, call: Call, tokens: jax.Array, real: jax.Array, start: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Features or logits of the last real token of each row, (B, …), and the cache with all of them."""
    last = 2**31 - 1 if model.longest is None else model.longest - 1
    positions = jnp.minimum(start[:, None] + jnp.arange(tokens.shape[1]), last)  # those of padding have no meaning
    more: dict[str, Any] = {"length": start}
    if paged:
        cache = {**state.cache, "pages": call.table, **more}
    else:
        # a text begins with a state of zeros, whatever the row had before
        fresh = lambda leaf: jnp.where(_along(start == 0, leaf), 0, leaf)  # noqa: E731
        cache = jax.tree.map(lambda leaf: fresh(leaf.at[:, call.slots].get(mode="clip")), state.cache) | more
    whole = tokens.shape[1] == 1 or model.unembedding is None or model.rule is not None
    out, cache = model.apply(
        params, tokens, segment_ids=real.astype(jnp.int32), positions=positions, cache=cache, head=whole
    )
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


def _drawn(state: State, cache: Any, call: Call, logits: jax.Array, length: jax.Array) -> tuple[State, Drawn]:
    """Draw the next tokens behind `length` tokens of each row, (B,)."""
    drawn = draw(logits.astype(jnp.float32), length - 1, state.counts, call.slots, call.draws)
    put = lambda old, new: old.at[call.slots].set(new, mode="drop")  # noqa: E731
    counted = state.counts.at[1, call.slots, drawn.token].add(1, mode="drop")
    return State(cache, put(state.last, drawn.token), put(state.length, length), counted), drawn


def _step(model: Model, paged: bool, params: Any, state: State, call: Call) -> tuple[State, Drawn]:
    there = (call.slots < len(state.last))[:, None]
    take = lambda values: values.at[call.slots].get(mode="clip")  # noqa: E731
    tokens, start = take(state.last)[:, None], take(state.length)
    logits, cache = _apply(model, paged, params, state, call, tokens, there, start)
    return _drawn(state, cache, call, logits, start + 1)


def _prefill(model: Model, paged: bool, params: Any, state: State, call: Call, chunk: Chunk) -> tuple[State, Drawn]:
    real = jnp.arange(chunk.tokens.shape[1]) < chunk.count[:, None]
    logits, cache = _apply(model, paged, params, state, call, chunk.tokens, real, chunk.start)
    return _drawn(state, cache, call, logits, chunk.start + chunk.count)


def chunked(sizes: Sequence[int], length: int) -> tuple[int, ...]:
    """The sizes of chunks that are no longer than a text, at least one of them."""
    return tuple(size for size in sizes if size <= length) or (length,)
