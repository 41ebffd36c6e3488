"""What a decoder's blocks need beside the residual stream: positions, masks, and the key-value cache.

Dims: B rows, T new tokens, S places of the cache, L layers, H heads of keys and values, K head size; in pages: N
pages of P places, and M pages of a row, Q heads of queries.

A cache holds keys and values as numbers, or as int8 codes (`Coded`) with a scale for each head of each token. What is
new is rounded before anything attends to it, so that a text's tokens are the same however it was cut into calls.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.models.coded import Coded, dequantize
from jaxmodels.models.kernels.quantized import quantize

KeyValues = dict[str, Any]
"""Keys "k" and values "v", each an array or a `Coded`."""
FEW = 8
"""The most new tokens of a row that attend to pages as they lie."""


class Pages(NamedTuple):
    """A cache whose places lie in pages: place s of row b is place s % P of page `table[b, s // P]`.

    The pools go around the scan over layers and not through it, which would copy them: blocks read the places of their
    rows, and give what is new.
    """

    pools: KeyValues
    """Keys and values of all layers and pages, (L, N, H, P, K)."""
    table: jax.Array
    """The pages of each row, in order, (B, M)."""
    real: jax.Array
    """Which of the new tokens are written, (B, T)."""

    def read(self, name: str, layer: jax.Array, new: jax.Array, offset: jax.Array) -> jax.Array:
        """Keys or values of one layer (B, M * P, H, K), with the new ones (B, T, H, K) behind those of each row."""

        def behind(pool: jax.Array, new: jax.Array) -> jax.Array:
            found = pool[layer, self.table].swapaxes(2, 3)
            found = found.reshape(len(found), -1, *found.shape[3:])
            at = jnp.where(self.real, offset[:, None] + jnp.arange(new.shape[1]), found.shape[1])
            return found.at[jnp.arange(len(found))[:, None], at].set(new, mode="drop")

        pool = self.pools[name]
        return numbers(jax.tree.map(behind, pool, stored(pool, new)), new.dtype)

    def attend(
        self, q: jax.Array, new: KeyValues, layer: jax.Array, offset: jax.Array, scale: float, window: int | None
    ) -> jax.Array:
        """Attention of new tokens of each row (B, T, Q, K) to those before and to each other, page by page.

        Pages are multiplied as they lie. Joined to one row of keys, as `read` does, they would be copied three times,
        which on a CPU takes longer than all else that a step computes.
        """
        (B, M), T = self.table.shape, q.shape[1]
        H, P, K = self.pools["k"].shape[2:]
        q = q.reshape(B, T, H, -1, K)
        at = jnp.repeat(jnp.arange(T), q.shape[3])  # which of the new tokens each query is
        q = q.swapaxes(1, 2).reshape(B, H, -1, K)
        here = {name: jax.tree.map(lambda pool: pool[layer, self.table], pool) for name, pool in self.pools.items()}
        keys, values = (numbers(here[name], new[name].dtype) for name in ("k", "v"))
        new = {name: numbers(stored(self.pools[name], x), x.dtype) for name, x in new.items()}
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = scale * dot("bhrk,bmhpk->bmhrp", q, keys)
        place = jnp.arange(M * P).reshape(M, 1, 1, P)
        offset = offset[:, None, None, None, None]
        seen, near = place < offset, at[:, None] >= jnp.arange(T)
        if window is not None:
            seen &= place > offset + at[:, None] - window
            near &= at[:, None] - jnp.arange(T) < window
        scores = jnp.where(seen, scores, -jnp.inf)
        own = jnp.where(near, scale * dot("bhrk,bshk->bhrs", q, new["k"]), -jnp.inf)
        top = jnp.maximum(scores.max((1, 4)), own.max(-1))
        p, mine = jnp.exp(scores - top[:, None, ..., None]), jnp.exp(own - top[..., None])
        total = p.sum((1, 4)) + mine.sum(-1)
        p, mine = (p / total[:, None, ..., None]).astype(values.dtype), mine / total[..., None]
        y = dot("bmhrp,bmhpk->bmhrk", p, values).sum(1) + dot("bhrs,bshk->bhrk", mine, new["v"].astype(mine.dtype))
        return y.reshape(B, H, T, -1, K).swapaxes(1, 2).reshape(B, T, -1, K).astype(q.dtype)

    def write(self, new: KeyValues, offset: jax.Array) -> KeyValues:
        """The pools with the new keys and values of all layers (L, B, T, H, K)."""
        count, size = self.pools["k"].shape[1], self.pools["k"].shape[3]
        at = offset[:, None] + jnp.arange(self.real.shape[1])
        page = jnp.take_along_axis(self.table, at // size, axis=1, mode="clip")
        page = jnp.where(self.real, page, count)

        def put(pool: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.moveaxis(new, 0, 2)  # as indices with a slice between them give it
            return pool.at[:, page, :, at % size].set(new, mode="drop")

        return {name: jax.tree.map(put, pool, stored(pool, new[name])) for name, pool in self.pools.items()}


class Context(NamedTuple):
    """What all blocks of one call share. Shapes: positions (B, T) or (1, T); offset and kv_length (B,)."""

    positions: Any = None
    segment_ids: Any = None
    """(B, T), or a pair of those of queries (B, T) and keys (B, S)."""
    offset: jax.Array | None = None
    """With a cache, the absolute position of each row's first token."""
    kv_length: jax.Array | None = None
    """With a cache, how many keys of each row are valid after this call."""
    pages: Pages | None = None
    """With a cache in pages, where they lie; tokens of the segment 0 are then not written."""

    def masks(self) -> dict[str, Any]:
        """The keyword arguments of `attention` that follow from this call."""
        cached = {} if self.offset is None else {"q_offset": self.offset, "kv_length": self.kv_length}
        return {"segment_ids": None if self.pages else self.segment_ids, **cached}

    def layered(self, cache: dict[str, Any] | None) -> Any:
        """What each layer of a scan is given of the cache."""
        if cache is None or self.pages is None:
            return None if cache is None else cache["layers"]
        return {"layer": jnp.arange(self.pages.pools["k"].shape[0])}

    def joined(self, layered: Any) -> Any:
        """The cache's layers after the scan, from what each of them gave."""
        if self.pages is None or self.offset is None:
            return layered
        return self.pages.write(layered, self.offset)

    @staticmethod
    def of(
        tokens: jax.Array,
        cache: dict[str, Any] | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        longest: int | None = None,
    ) -> Context:
        """The context of a call on tokens (B, T).

        Raises:
            UserError: there are more tokens than the `longest` that the model takes.
        """
        T = tokens.shape[1]
        if longest is not None and longest < T:
            raise UserError(
                f"got {T} tokens, expected at most the model's context of {longest}, "
                "try a shorter --data.seq-len or a larger --model.context"
            )
        offset = None if cache is None else cache["length"]
        if positions is None:
            positions = jnp.arange(T)[None] + (0 if offset is None else offset[:, None])
        pages = None
        if cache is not None and "pages" in cache:
            real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
            pages = Pages(cache["layers"], cache["pages"], real)
        return Context(positions, segment_ids, offset, None if offset is None else offset + T, pages)


def empty_cache(layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: str) -> dict[str, Any]:
    """An empty cache with room for `length` tokens: keys and values (L, B, S, H, K), and each row's length (B,).

    Rows fill up each at its own pace: the next call writes a row's tokens behind the `length` that it has. To take back
    what a row has too much (the padding of a prompt), set its length lower: what lies beyond is never attended to, and
    is overwritten.

    A cache of `batch` pages of `length` places becomes one of any rows when its layers are `pooled` and it is given
    `pages` (B, M), the pages of each row, and a `length` for each row. Segment ids then say which tokens are real (not
    0) and nothing else.
    """
    shape = (layers, batch, length, heads, head_dim)
    empty = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
    return {"layers": empty, "length": jnp.zeros((batch,), jnp.int32)}


def pooled(layers: KeyValues) -> KeyValues:
    """The keys and values of a cache of pages (L, N, P, H, K) as pools, in which those of a head are together."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(2, 3), layers)


def stored(held: Any, new: jax.Array) -> Any:
    """New keys or values (…, K) as a cache that holds such a leaf stores them."""
    return Coded(*quantize(new, "int8", (-1,))) if isinstance(held, Coded) else new.astype(held.dtype)


def numbers(held: Any, dtype: Any) -> jax.Array:
    """Keys or values of a cache as attention takes them; codes become numbers of this type."""
    return dequantize(held, dtype) if isinstance(held, Coded) else held


def update(
    cache: KeyValues | None, k: jax.Array, v: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array, KeyValues | None]:
    """Keys and values to attend to: with a cache, the whole of it after the new ones (B, T, H, K) are written."""
    if cache is None:
        return k, v, None
    if ctx.pages is not None and ctx.offset is not None:
        read = functools.partial(ctx.pages.read, layer=cache["layer"], offset=ctx.offset)
        return read("k", new=k), read("v", new=v), {"k": k, "v": v}

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        row = lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, 0, 0))  # noqa: E731
        return jax.vmap(row)(old, new, ctx.offset)

    written = {name: jax.tree.map(write, cache[name], stored(cache[name], new)) for name, new in (("k", k), ("v", v))}
    return numbers(written["k"], k.dtype), numbers(written["v"], v.dtype), written
