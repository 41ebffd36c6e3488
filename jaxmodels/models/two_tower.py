"""Two towers: vectors of users and of items, whose products are scores (Covington et al. 2016, Yi et al. 2019).

A user is the mean of the items of a history, an item its own embedding and the mean of its name's words. With an
embedding of users and nothing else, this is matrix factorization (Koren et al. 2009; Rendle et al. 2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Dim
from jaxmodels.models import layers
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.model import Dtype, Family, Inputs


@dataclass(frozen=True)
class TwoTowerConfig(ModelConfig):
    """Two towers; the defaults know users by their histories and items by their numbers."""

    vocab_size: Dim = 3145
    """Items (V)."""
    width: Dim = 64
    """Size of the vectors (D)."""
    history: bool = True
    """Whether a user is known by a history."""
    users: Dim | None = None
    """Users with an embedding each. None: none has one."""
    words: Dim | None = None
    """Rows of the table of words, among which words are hashed. None: names are not read."""
    name_words: Dim = 8
    """The most words of a name (W)."""
    hidden: tuple[Dim, ...] = ()
    """Units of each hidden layer behind the mean of a history."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.history and (self.users is None or self.hidden):
            got = f"model.hidden {self.hidden}" if self.hidden else "no model.users"
            raise UserError(f"got {got} without model.history, expected users with a history, try --model.history True")


class TwoTower(nn.Module):
    """Users and items to vectors (B, D + 1) in float32, the last component for the bias of an item.

    `user` (B,); `history` (B, T), below 0 for none; `item` (B,); `words` (B, T + 1, W) of the history and the item,
    below 0 for none. Without a user and a history, or without an item, that vector is None, and words are those of the
    other.
    """

    config: TwoTowerConfig

    @nn.compact
    def __call__(
        self,
        user: jax.Array | None,
        history: jax.Array | None,
        item: jax.Array | None,
        words: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array | None, jax.Array | None]:
        c = self.config

        def table(count: int, name: str) -> layers.Embed:
            return layers.Embed(count, c.width, dtype=c.dtype, before_stack=True, name=name)

        def items(name: str, ids: jax.Array, words: jax.Array | None) -> jax.Array:
            """The embeddings of items (B, T), 0 for none."""
            x = jnp.where((ids >= 0)[..., None], table(c.vocab_size, name)(jnp.maximum(ids, 0)), 0)
            if c.words is None or words is None:
                return x
            B, T, W = words.shape
            each = table(c.words, f"{name}_words")(jnp.maximum(words, 0).reshape(B, T * W)).reshape(B, T, W, c.width)
            return x + mean(each, words >= 0)

        seen = taken = None
        if history is not None:
            x = jnp.zeros((len(history), c.width), c.dtype)
            if c.history:
                inner = None if words is None else words[:, : history.shape[1]]
                x = mean(items("history", history, inner), history >= 0)
                for i, width in enumerate(c.hidden):
                    x = nn.relu(layers.Linear((width,), ("embed", "mlp"), dtype=c.dtype, name=f"hidden{i}")(x))
                if c.hidden:
                    axes = ("mlp", "embed")
                    x = layers.Linear((c.width,), axes, dtype=c.dtype, name="output")(x)
            if c.users is not None and user is not None:
                x = x + table(c.users, "user")(user)
            seen = jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1).astype(jnp.float32)
        if item is not None:
            inner = None if words is None else words[:, -1:]
            x = items("item", item[:, None], inner)[:, 0]
            bias = layers.Embed(c.vocab_size, 1, ("vocab", "features"), layers.zeros, name="bias")(jnp.maximum(item, 0))
            taken = jnp.concatenate([x, bias.astype(c.dtype)], 1).astype(jnp.float32)
        return seen, taken


def mean(x: jax.Array, counts: jax.Array) -> jax.Array:
    """The mean of x (…, N, D) over those that count, (…, N); 0 if none does."""
    total = jnp.where(counts[..., None], x, 0).sum(-2)
    return total / jnp.maximum(counts.sum(-1, keepdims=True), 1).astype(x.dtype)


def _inputs(c: Any, batch: int, length: int) -> Inputs:
    shapes = [(batch,), (batch, length), (batch,)] + [(batch, length + 1, c.name_words)] * (c.words is not None)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)


register(
    Family(
        name="two_tower",
        config=TwoTowerConfig,
        network=TwoTower,
        inputs=_inputs,
        presets={"matrix-factorization": TwoTowerConfig(history=False, users=4074)},
    )
)
