"""What the backward pass of a block keeps, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.models.kernels.product import PRODUCT

INPUT = "input of a block"
"""The name by which a policy of `jax.checkpoint` knows what a block is given."""


def policy(remat: str) -> Callable[..., Any] | None:
    """The policy of `jax.checkpoint` for a block; None saves only the block's input."""
    policies = jax.checkpoint_policies
    if remat == "dots":
        return policies.save_only_these_names(PRODUCT)
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return None


def with_named_input(block: Any) -> Any:
    """A subclass of a block (a Flax module) that gives its input the name `INPUT`."""

    class Named(block):
        def __call__(self, x: jax.Array, *rest: Any) -> Any:
            return super().__call__(checkpoint_name(x, INPUT), *rest)

    return Named
