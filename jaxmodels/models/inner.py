"""What a network computes on the way to its outputs, given beside them where `Model.apply(keep=True)` asks for it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxmodels.models.kernels.product import recomputed

INNER = "inner"
"""The collection of variables that inner states are put into."""


def wanted(module: nn.Module) -> bool:
    """Whether a call is asked for its inner states."""
    return module.is_mutable_collection(INNER) and not module.is_initializing()


def keep(module: nn.Module, name: str, x: jax.Array) -> None:
    """Give an array beside the outputs under the module's path, if that is asked for."""
    if wanted(module):
        last: Any = {"reduce_fn": lambda _, new: new, "init_fn": lambda: None}
        module.sow(INNER, name, x, **last)


def with_hidden(block: Any, again: bool) -> Any:
    """A subclass of a block (a Flax module) that keeps its output, the residual stream, as `hidden`.

    `again`: whether the backward pass computes the block again.
    """
    # the method below flax's own wrapper, which would put its scope twice into names of operations
    call = getattr(block.__call__, "__wrapped__", block.__call__)

    class Keeping(block):
        @nn.compact
        def __call__(self, x: jax.Array, *rest: Any) -> Any:
            with recomputed(again):
                y, outputs = call(self, x, *rest)
            keep(self, "hidden", y)
            return y, outputs

    return Keeping
