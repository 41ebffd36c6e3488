"""Products of tokens with the weights of the experts that they are sent to.

Dims: B rows, T tokens, k experts a token, E experts, C places of an expert, N rows sorted by expert, D and F widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.models.layers import shard
from jaxmodels.parallel import rules

Array = jax.Array
Activation = Callable[[Array], Array]
Weights = tuple[Array, Array, Array]
"""Gate and up (E, D, F), and down (E, F, D), of gated MLPs."""


def dropless(x: Array, chosen: Array, share: Array, weights: Weights, activation: Activation) -> Array:
    """Each token through all experts chosen for it, however unevenly they are chosen.

    On a mesh each device sorts its own tokens, which stay where they are; the weights come to it, gathered over all
    axes but the one that cuts F, as FSDP's do. The parts of that one are added up and, where the residual stream is cut
    over it, scattered.
    Shapes: x (B, T, D), chosen and share (B, T, k), returns (B, T, D).
    """
    mesh, split = rules.ambient(), rules.RULES["mlp"]
    k, tokens = chosen.shape[-1], ("batch", "seq")

    def local(x: Array, chosen: Array, share: Array, weights: Weights) -> Array:
        y = _sorted(x.reshape(-1, x.shape[-1]), chosen.reshape(-1, k), share.reshape(-1, k), weights, activation)
        return y.reshape(x.shape)

    if mesh is None or any(x.shape[i] % rules.pieces(name) for i, name in enumerate(tokens)):
        return local(x, chosen, share, weights)
    table = rules.table(mesh.shape)
    scattered = set(split) <= set(table["residual"]) and x.shape[1] % rules.pieces("residual") == 0

    def add(*given: Any) -> Array:
        y = local(*given)
        return jax.lax.psum_scatter(y, split, scatter_dimension=1, tiled=True) if scattered else jax.lax.psum(y, split)

    rows, wide = rules.spec((*tokens, None)), rules.spec((None, None, "mlp"))
    out = rules.spec(("batch", "residual", None), table) if scattered else rows
    specs = (rows, rows, rows, (wide, wide, rules.spec((None, "mlp", None))))
    return jax.shard_map(add, in_specs=specs, out_specs=out, check_vma=False)(x, chosen, share, weights)


def _sorted(x: Array, chosen: Array, share: Array, weights: Weights, activation: Activation) -> Array:
    """`dropless` of one device. Shapes: x (N, D), chosen and share (N, k)."""
    (N, k), (gate, up, down) = chosen.shape, weights
    order = jnp.argsort(chosen.ravel(), stable=True)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(N * k), unique_indices=True)
    sizes = jnp.bincount(chosen.ravel(), length=len(gate)).astype(jnp.int32)
    # a permutation, so that the gradient of each gather has nothing to add up
    take = {"unique_indices": True, "mode": "promise_in_bounds"}
    y = jnp.repeat(x, k, axis=0).at[order].get(**take)
    y = activation(grouped(y, gate, sizes)) * grouped(y, up, sizes)
    y = grouped(y, down, sizes).at[back].get(**take)
    return (y.reshape(N, k, -1) * share.astype(y.dtype)[..., None]).sum(1)


@jax.custom_vjp
def grouped(x: Array, w: Array, sizes: Array) -> Array:
    """Rows sorted by expert, each times its expert's weights.

    A loop over blocks of rows, each of one expert; on TPU `ragged_dot`, which is a kernel there, but elsewhere computes
    all rows with all experts.
    Shapes: x (N, D), w (E, D, F), sizes (E,) rows of each expert, which add up to N; returns (N, F).
    """
    return _product(x, w, sizes)


def _forward(x: Array, w: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(x, w, sizes), (x, w, sizes)


def _backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, sizes = saved
    return _product(dy, jnp.swapaxes(w, 1, 2), sizes), _outer_product(x, dy, sizes).astype(w.dtype), None


grouped.defvjp(_forward, _backward)


@jax.custom_batching.sequential_vmap  # ragged_dot has no rule for most batches
def _product(x: Array, w: Array, sizes: Array) -> Array:
    return jax.lax.platform_dependent(x, w, sizes, tpu=jax.lax.ragged_dot, default=_blocks)


@jax.custom_batching.sequential_vmap
def _outer_product(x: Array, dy: Array, sizes: Array) -> Array:
    """The sum over each expert's rows of x ⊗ dy: (E, D, F) float32."""
    return jax.lax.platform_dependent(x, dy, sizes, tpu=_ragged_outer, default=_block_outer)


def _cut(rows: int, sizes: Array) -> tuple[int, Array, Array, Array, Array]:
    """Rows of a block, how many blocks there are, and each one's expert, first row, and end of the expert's rows."""
    E = len(sizes)
    size = 2 ** max(3, min(9, round(math.log2(max(1, rows / E / 4)))))
    most = (rows + min(E, rows) * (size - 1)) // size
    blocks, ends = (sizes + size - 1) // size, jnp.cumsum(sizes)
    until, index = jnp.cumsum(blocks), jnp.arange(most)
    expert = jnp.minimum((until <= index[:, None]).sum(-1), E - 1)
    first = (ends - sizes)[expert] + (index - (until - blocks)[expert]) * size
    return size, until[-1], expert, first, ends[expert]


def _pad(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, size), (0, 0)))


def _blocks(x: Array, w: Array, sizes: Array) -> Array:
    N = len(x)
    size, count, expert, first, _ = _cut(N, sizes)
    x = _pad(x, size)

    def body(i: Array, y: Array) -> Array:
        # what a block computes behind its expert's last row, the next expert's first block replaces
        part = jax.lax.dynamic_slice_in_dim(x, first[i], size) @ w[expert[i]]
        return jax.lax.dynamic_update_slice_in_dim(y, part, first[i], 0)

    return jax.lax.fori_loop(0, count, body, jnp.zeros((N + size, w.shape[2]), x.dtype))[:N]


def _ragged_outer(x: Array, dy: Array, sizes: Array) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return jax.lax.ragged_dot_general(x, dy, sizes, numbers, preferred_element_type=jnp.float32)


def _block_outer(x: Array, dy: Array, sizes: Array) -> Array:
    size, count, expert, first, end = _cut(len(x), sizes)
    x, dy = _pad(x, size), _pad(dy, size)

    def body(i: Array, dw: Array) -> Array:
        own = (first[i] + jnp.arange(size) < end[i])[:, None]
        part, gradient = (jax.lax.dynamic_slice_in_dim(z, first[i], size) for z in (x, dy))
        part = jnp.where(own, part, 0)
        return dw.at[expert[i]].add(jnp.matmul(part.T, gradient, preferred_element_type=jnp.float32))

    return jax.lax.fori_loop(0, count, body, jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), jnp.float32))


def places(chosen: Array, real: Array | None, experts: int, capacity: int) -> Array:
    """Where each token goes in its experts' buffers, expert · capacity + place, or experts · capacity if it is full.

    Tokens queue in their order, each with all its choices at once: all first choices before any second one, as GShard
    has it, would let a later token take an earlier one's place. Those that are not `real` take none.
    Shapes: chosen (B, T, k), real (B, T), returns (B, T, k).
    """
    asked = jax.nn.one_hot(chosen, experts, dtype=jnp.int32).sum(-2)
    if real is not None:
        asked = jnp.where(real[..., None], asked, 0)
    before = jnp.take_along_axis(jnp.cumsum(asked, 1) - asked, chosen, -1)
    room = before < capacity
    if real is not None:
        room &= real[..., None]
    return jnp.where(room, chosen * capacity + before, experts * capacity)


def limited(x: Array, places: Array, share: Array, weights: Weights, activation: Activation, capacity: int) -> Array:
    """Each token through those of its experts that have a place for it.

    On a mesh the buffers are cut by expert: they go to the experts' devices and back by an all-to-all.
    Shapes: x (B, T, D), places (of `places`) and share (B, T, k), returns (B, T, D).
    """
    (B, T, k), (gate, up, down) = places.shape, weights
    E, D = gate.shape[:2]
    size, flat = E * capacity, places.reshape(B, T * k)
    tokens = jnp.repeat(jnp.arange(T), k)
    source = jax.vmap(lambda at: jnp.full(size, T).at[at].set(tokens, mode="drop"))(flat)
    take = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))

    def move(buffers: Array) -> Array:
        return shard(buffers, "expert", "expert_batch", None, None)

    y = shard(take(x, source), "batch", None, None)
    y = move(jnp.swapaxes(y.reshape(B, E, capacity, D), 0, 1))
    inner = activation(jnp.einsum("ebcd,edf->ebcf", y, gate)) * jnp.einsum("ebcd,edf->ebcf", y, up)
    y = move(jnp.einsum("ebcf,efd->ebcd", shard(inner, "expert", "expert_batch", None, "mlp"), down))
    y = shard(jnp.swapaxes(y, 0, 1).reshape(B, size, D), "batch", None, None)
    return (take(y, flat).reshape(B, T, k, D) * share.astype(y.dtype)[..., None]).sum(2)
