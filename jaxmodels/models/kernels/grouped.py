"""Multiply rows, sorted by expert, by the weights of their experts.

Dims: N rows, E experts, D and F widths.
"""

from __future__ import annotations

import math

import jax
import jax.export
import jax.numpy as jnp

from jaxmodels.models.kernels.kernel import loop

Array = jax.Array


BLOCKS = ("cpu", "cuda", "rocm")
"""Platforms whose compilers have no kernel for ragged products."""
RAGGED_OUTER = jax.__version_info__ >= (0, 12)
"""Whether the TPU's compiler has a kernel for `_ragged_outer`: before, it computes all rows with all experts."""


@jax.custom_vjp
def grouped(x: Array, w: Array, sizes: Array) -> Array:
    """Rows sorted by expert, each times its expert's weights.

    A loop over blocks of rows, each of one expert; on TPU `ragged_dot`, where that is a kernel: elsewhere it computes
    all rows with all experts.
    Shapes: x (N, D), w (E, D, F), sizes (E,) rows of each expert, all or fewer; returns (N, F), undefined beyond them.
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
    if jax.export.is_symbolic_dim(x.shape[0]):  # a function to be exported, whose blocks could not be counted
        return jax.lax.ragged_dot(x, w, sizes)
    return jax.lax.platform_dependent(x, w, sizes, **dict.fromkeys(BLOCKS, _blocks), default=jax.lax.ragged_dot)


@jax.custom_batching.sequential_vmap
def _outer_product(x: Array, dy: Array, sizes: Array) -> Array:
    """The sum over each expert's rows of x ⊗ dy: (E, D, F), added up in float32."""
    blocks = BLOCKS if RAGGED_OUTER else (*BLOCKS, "tpu")
    return jax.lax.platform_dependent(x, dy, sizes, **dict.fromkeys(blocks, _block_outer), default=_ragged_outer)


def _cut(rows: int, sizes: Array) -> tuple[int, Array, str, Array, Array, Array]:
    """The blocks of a loop: their size, their number, the loop's name; and of each, its expert, its first row, and
    where the expert's rows end.
    """
    E = len(sizes)
    size = 2 ** max(3, min(9, round(math.log2(max(1, rows / E / 4)))))
    most = (rows + min(E, rows) * (size - 1)) // size
    blocks, ends = (sizes + size - 1) // size, jnp.cumsum(sizes)
    until, index = jnp.cumsum(blocks), jnp.arange(most)
    expert = jnp.minimum((until <= index[:, None]).sum(-1), E - 1)
    first = (ends - sizes)[expert] + (index - (until - blocks)[expert]) * size
    # the last block of each expert is half full, if experts are chosen alike
    expected = loop(min(rows / size + E / 2, most))
    return size, until[-1], expected, expert, first, ends[expert]


def _pad(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, size), (0, 0)))


def _blocks(x: Array, w: Array, sizes: Array) -> Array:
    N = len(x)
    size, count, name, expert, first, _ = _cut(N, sizes)
    x = _pad(x, size)

    def body(i: Array, y: Array) -> Array:
        # rows that a block computes beyond its expert's last one are replaced by the next expert's first block
        part = jax.lax.dynamic_slice_in_dim(x, first[i], size) @ w[expert[i]]
        return jax.lax.dynamic_update_slice_in_dim(y, part, first[i], 0)

    with jax.named_scope(name):
        return jax.lax.fori_loop(0, count, body, jnp.zeros((N + size, w.shape[2]), x.dtype))[:N]


def _ragged_outer(x: Array, dy: Array, sizes: Array) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    # the kernel adds up in float32 and rounds once; rounded outside of it, all experts' gradients would be held twice
    return jax.lax.ragged_dot_general(x, dy, sizes, numbers, preferred_element_type=x.dtype)


def _block_outer(x: Array, dy: Array, sizes: Array) -> Array:
    size, count, name, expert, first, end = _cut(len(x), sizes)
    x, dy = _pad(x, size), _pad(dy, size)

    def body(i: Array, dw: Array) -> Array:
        own = (first[i] + jnp.arange(size) < end[i])[:, None]
        part, gradient = (jax.lax.dynamic_slice_in_dim(z, first[i], size) for z in (x, dy))
        part = jnp.where(own, part, 0)
        own = jax.lax.dynamic_index_in_dim(dw, expert[i], keepdims=False)
        own = own + jnp.matmul(part.T, gradient, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_index_in_dim(dw, own, expert[i], 0)

    with jax.named_scope(name):
        zeros = jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), jnp.float32)
        return jax.lax.fori_loop(0, count, body, zeros).astype(x.dtype)
