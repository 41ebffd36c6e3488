"""Weights that stay 0 while a model is trained, and shares of them that grow (Zhu & Gupta 2017).

The mask is part of the state without an array of its own: what is exactly 0 is removed. So it is cut over a mesh, saved
and averaged as the parameters are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmodels.compress.coding import CompressConfig, leaves_of
from jaxmodels.compress.patterns import matched
from jaxmodels.errors import UserError
from jaxmodels.fields import Count, Dropped, Natural
from jaxmodels.models.adapted import STACKED
from jaxmodels.models.parameters import Axes

Array = jax.Array


@dataclass(frozen=True)
class Sparse(CompressConfig):
    """Weights that are 0 stay so in training; with a sparsity, the smallest ones become 0 on the way."""

    sparsity: Dropped | None = None
    """Share of each matrix that is 0 at the end. None: what is 0 at the beginning, as in a pruned run."""
    begin: Natural = 0
    """Step after which weights are removed for the first time."""
    end: Count | None = None
    """Step after which the whole share is 0. None: three quarters of the run."""
    every: Count = 100
    """Steps between removals; there is a last one at the end."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the matrices, such as */mlp/*."""
    kept: tuple[str, ...] = ()
    """Patterns of the matrices that this leaves alone."""

    def __post_init__(self) -> None:
        if self.end is not None and self.end < self.begin:
            raise UserError(
                f"got compress.end {self.end} before compress.begin {self.begin}, expected it later, "
                f"try --compress.end {self.begin + self.every}"
            )
        if self.sparsity is None and (self.begin or self.end is not None):
            name = "begin" if self.begin else "end"
            raise UserError(
                f"got compress.{name} {getattr(self, name)} without compress.sparsity, expected a share to reach, "
                "try --compress.sparsity 0.8"
            )

    def check(self, adapter: bool, ema: float | None) -> None:
        if adapter:
            raise UserError(
                "got compress sparse with an adapter, which trains none of the weights, expected one of the two"
            )
        if self.sparsity is not None and ema is not None:
            raise UserError(
                f"got compress.sparsity with train.ema {ema}, whose averages are not 0 where weights became so, "
                "expected no averages, try --train.ema None"
            )

    def trained(
        self, optimizer: optax.GradientTransformation, steps: int, axes: Mapping[str, Any], updates: int = 1
    ) -> optax.GradientTransformation:
        names, form = leaves_of(axes)
        able = [name for name, leaf in names.items() if leaf.kind == "matrix"]
        chosen = {*matched("compress.targets", self.targets, list(names), able, "matrix")} - {
            *matched("compress.kept", self.kept, list(names), able, "matrix")
        }
        end = self.end or max(self.begin, 3 * steps // 4)
        if self.sparsity is not None and end > steps:
            raise UserError(
                f"got compress.end {end} with train.steps {steps}, expected it within the run, "
                f"try --compress.end {3 * steps // 4}"
            )

        def init(params: Any) -> Held:
            return Held(jnp.zeros((), jnp.int32), optimizer.init(params))

        def update(grads: Any, state: Held, params: Any = None) -> tuple[Any, Held]:
            moves, inner = optimizer.update(grads, state.inner, params)
            moves, weights = form.flatten_up_to(moves), form.flatten_up_to(params)
            count = state.count + 1
            held = [
                self._held(w, move, leaf, count, end, updates) if name in chosen else move
                for (name, leaf), move, w in zip(names.items(), moves, weights, strict=True)
            ]
            return jax.tree.unflatten(form, held), Held(count, inner)

        return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]

    def _held(self, w: Array, move: Array, axes: Axes, count: Array, end: int, updates: int) -> Array:
        """Return an update of a matrix that leaves its zeros, and removes the smallest weights where that is due."""
        move = jnp.where(w == 0, 0, move).astype(move.dtype)
        if self.sparsity is None:
            return move
        step, rest = count // updates, count % updates
        stack = len(list(itertools.takewhile(STACKED.__contains__, axes)))
        share = share_at(step, self.sparsity, self.begin, end)

        def smaller(w: Array, move: Array) -> Array:
            new = w + move
            size = jnp.abs(new).reshape(*new.shape[:stack], -1)
            removed = jnp.round(share * size.shape[-1]).astype(jnp.int32)
            ordered = jnp.sort(size, -1)
            limit = jax.lax.dynamic_index_in_dim(ordered, jnp.maximum(removed - 1, 0), -1)
            least = (size <= limit) & (removed > 0)
            return jnp.where(least.reshape(new.shape), -w, move)

        often = ((step - self.begin) % self.every == 0) | (step == end)
        due = often & (step >= self.begin) & (step <= end) & (rest == 0)
        return jax.lax.cond(due, smaller, lambda w, move: move, w, move)


class Held(NamedTuple):
    """The state of an optimizer that leaves zeros."""

    count: Array
    """Updates made."""
    inner: Any


def share_at(step: Any, sparsity: float, begin: int, end: int) -> Any:
    """Return the share of weights that are 0 after a step: it grows fast at first and ever more slowly to the end.

    Source: Zhu & Gupta 2017, equation 1, from 0.
    """
    left = jnp.clip((end - step) / max(1, end - begin), 0, 1)
    return sparsity * (1 - left**3)
