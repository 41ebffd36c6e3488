"""Change a matrix input by input, and correct the inputs that are left for what each change does to its outputs.

That is the optimal brain surgeon (Hassibi & Stork 1993) with one order of the inputs for all outputs, as in GPTQ
(Frantar et al. 2022, algorithm 1) and SparseGPT (Frantar & Alistarh 2023, algorithm 1). Dims: O outputs, I inputs, C
inputs of a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
BLOCK = 128
"""Inputs after which the corrections reach all that are left; it changes what is fast, and not the result."""


class Rule(Protocol):
    """What becomes of an input's weights. It is a static argument of compiled functions, so it must be hashable."""

    def begin(self, w: Array, diagonal: Array, given: Any) -> Any:
        """Return what is decided at the beginning of a block w (O, C), by the factor's diagonal (C,).

        `given` are the block's columns of what was given to `sweep`.
        """
        ...

    def column(self, w: Array, state: Any, at: Array, diagonal: Array) -> tuple[Array, Any]:
        """Return the new weights (O,) of the input `at` of the block as it is by now, and the state."""
        ...


class Prune(NamedTuple):
    """SparseGPT's choice: the weights whose removal costs least, w² / diagonal²."""

    sparsity: float
    kept: int = 0
    """With `of`, how many of each group of inputs are kept (2:4: 2 of 4); 0: a share of each block."""
    of: int = 0

    def begin(self, w: Array, diagonal: Array, given: Any) -> Array:
        if self.of:
            return jnp.zeros(w.shape, bool)
        cost = jnp.square(w / diagonal).ravel()
        order = jnp.argsort(cost)
        removed = jnp.zeros(w.size, bool).at[order[: int(w.size * self.sparsity)]].set(True)
        return removed.reshape(w.shape)

    def column(self, w: Array, state: Array, at: Array, diagonal: Array) -> tuple[Array, Array]:
        if self.of:

            def decide(removed: Array) -> Array:
                group = jax.lax.dynamic_slice_in_dim(w, at, self.of, 1)
                cost = jnp.square(group / jax.lax.dynamic_slice_in_dim(diagonal, at, self.of))
                ranks = jnp.argsort(jnp.argsort(cost, 1), 1)
                return jax.lax.dynamic_update_slice_in_dim(removed, ranks < self.of - self.kept, at, 1)

            state = jax.lax.cond(at % self.of == 0, decide, lambda removed: removed, state)
        return jnp.where(state[:, at], 0, w[:, at]), state


def inverse_factor(gram: Array, damping: float) -> Array:
    """Return the upper Cholesky factor of the inverse of a damped Hessian xᵀx (I, I).

    Inputs that are always 0 get a 1 on the diagonal, as in the published code; `damping` is a share of its mean.
    """
    diagonal = jnp.diag(gram)
    gram = gram + jnp.diag(jnp.where(diagonal == 0, 1, 0))
    gram = gram + damping * jnp.mean(jnp.diag(gram)) * jnp.eye(len(gram), dtype=gram.dtype)
    lower = jnp.linalg.cholesky(gram)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(len(gram), dtype=gram.dtype))
    return jnp.linalg.cholesky(inverse).T


@partial(jax.jit, static_argnums=(2, 3, 4))
def sweep(
    w: Array, gram: Array, rule: Any, damping: float = 0.01, block: int = BLOCK, given: Any = None
) -> tuple[Array, list[Any]]:
    """Return a matrix (O, I) changed by a rule, and the states of its blocks; `given` are arrays (O, I) for the rule.

    Weights of inputs that are always 0 become 0 before anything is decided, as in the published code.
    """
    w = jnp.where(jnp.diag(gram) == 0, 0, w)
    factor = inverse_factor(gram, damping)
    states = []
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        own, rest = factor[start:end, start:end], factor[start:end, end:]
        parts = jax.tree.map(lambda x: x[:, start:end], given)  # noqa: B023
        changed, errors, state = _within(w[:, start:end], own, rule, parts)
        w = w.at[:, start:end].set(changed).at[:, end:].add(-errors @ rest)
        states.append(state)
    return w, states


def _within(w: Array, factor: Array, rule: Rule, given: Any) -> tuple[Array, Array, Any]:
    """Change a block (O, C); return it, the errors that the inputs behind it must make up for, and the rule's state."""
    diagonal = jnp.diag(factor)

    def one(at: Array, carry: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        w, changed, errors, state = carry
        column, state = rule.column(w, state, at, diagonal)
        error = (w[:, at] - column) / diagonal[at]
        # the factor is 0 before its diagonal, so that what is done stays
        w = w - error[:, None] * factor[at]
        return w, changed.at[:, at].set(column), errors.at[:, at].set(error), state

    begun: Any = (w, jnp.zeros_like(w), jnp.zeros_like(w), rule.begin(w, diagonal, given))
    _, changed, errors, state = jax.lax.fori_loop(0, w.shape[1], one, begun)
    return changed, errors, state
