"""What language models have around their blocks: embedding, stack, last norm, output layer and cache.

Dims: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Positive
from jaxmodels.models import layers
from jaxmodels.models.checks import check_rotary_heads
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Params, Remat
from jaxmodels.registry import incomplete


@dataclass(frozen=True)
class RotaryConfig(ModelConfig):
    """What decoders with RMSNorm, rotary positions and grouped heads have in common; the defaults are LLaMA 7B's."""

    vocab_size: Dim = 32000
    """Rows of the embedding (V)."""
    context: Dim = 2048
    """Tokens that the published model was trained on at once; rotary positions do not limit it."""
    layers: Depth = 32
    """Blocks."""
    heads: Depth = 32
    """Query heads (H)."""
    kv_heads: Depth | None = None
    """Key and value heads (G), shared by groups of query heads; as many as `heads` when not given."""
    width: Dim = 4096
    """Size of the residual stream (D)."""
    head_dim: Dim | None = None
    """Size of a head (K); width / heads when not given."""
    mlp_width: Dim = 11008
    """Hidden units of the gated MLP, or of each expert (F)."""
    window: Dim | None = None
    """Tokens that each one sees, itself included (Mistral); None: all before it."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in RMSNorm."""
    tied: bool = False
    """Whether the output layer is the embedding."""
    dtype: Dtype = "float32"
    """Type of activations and products (not a router's); parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax, ring, ulysses."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of the scan over layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotary_heads(self)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads


class Body(NamedTuple):
    """The outputs of a decoder's blocks."""

    features: jax.Array
    """(B, T, D)."""
    cache: dict[str, Any]
    """The new cache without its length; meaningless in a call without a cache."""
    sums: Any = None
    """What the losses of `auxiliary` are computed from."""


class Decoder(nn.Module, ABC):
    """Tokens (B, T) to logits (B, T, V) in float32, or with `head=False` to features (B, T, D).

    A family implements `body`, and overrides what it does in another way. With `auxiliary`, the call returns
    `(outputs, {name: weighted loss})`.
    """

    config: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if lacking := incomplete(cls):
            raise UserError(f"got network {cls.__module__}:{cls.__qualname__}, {lacking}")
        return super().__new__(cls)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *media: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        train: bool = False,
        head: bool = True,
        auxiliary: bool = False,
    ) -> Any:
        ctx = Context.of(tokens, cache, positions, segment_ids, longest=self.longest())
        embed = self.token_embedding("embed")
        x = self.embedded(embed, tokens, *media, train=train)
        body = self.body(self.enter(x, ctx, train), ctx, cache, train)
        y: Any = self.output(embed).logits(body.features) if head else body.features
        if auxiliary:
            y = (y, self.losses(body.sums))
        if cache is None:
            return y
        added = tokens.shape[1] if ctx.pages is None else ctx.pages.real.sum(1)
        return y, {**cache, **body.cache, "length": cache["length"] + added}

    def longest(self) -> int | None:
        """The most tokens of a call; None: no limit."""
        return None

    def token_embedding(self, name: str) -> layers.Embed:
        """The embedding, or an output layer of its own."""
        c = self.config
        return layers.Embed(c.vocab_size, c.width, dtype=c.dtype, before_stack=name == "embed", name=name)

    @nn.nowrap  # no scope of its own in the names of operations
    def embedded(self, embed: layers.Embed, tokens: jax.Array, *, train: bool) -> jax.Array:
        """The embedded tokens (B, T, D); a family that reads other media too takes them behind the tokens."""
        return embed(tokens)

    def output(self, embed: layers.Embed) -> layers.Embed:
        """The output layer, whose `logits` turn features into logits."""
        return embed if self.config.tied else self.token_embedding("head")

    def enter(self, x: jax.Array, ctx: Context, train: bool) -> jax.Array:
        """The residual stream before the first block, from the embedded tokens (B, T, D)."""
        return layers.shard(x, "batch", "residual", None)

    @abstractmethod
    def body(self, x: jax.Array, ctx: Context, cache: dict[str, Any] | None, train: bool) -> Body:
        """Apply all blocks and the last norm to x (B, T, D)."""

    def losses(self, sums: Any) -> dict[str, jax.Array]:
        """Weighted losses to add to the mean, from what all blocks gave beside the residual stream."""
        return {}


class BlockDecoder(Decoder):
    """A decoder whose blocks are alike: one scan over stacked layers, and a norm behind them.

    A family implements `blocks`, and overrides `norm` where it has another one.
    """

    @abstractmethod
    def blocks(self, train: bool) -> tuple[Any, ...]:
        """Return the class of the blocks, and what it takes beside the config; a block returns (x, (kv, sums))."""

    def norm(self) -> Callable[[jax.Array], jax.Array]:
        """Return the last norm."""
        return layers.RMSNorm(self.config.norm_eps, name="norm")

    def body(self, x: jax.Array, ctx: Context, cache: dict[str, Any] | None, train: bool) -> Body:
        c = self.config
        block, *given = self.blocks(train)
        stack = layers.scan_layers(block, c.layers, c.remat, c.unroll)(c, *given, name="layers")
        x, (kv, sums) = stack(x, ctx.layered(cache), ctx)
        return Body(layers.shard(self.norm()(x), "batch", "seq", None), {"layers": ctx.joined(kv)}, sums)


def output_table(c: Any, params: Params) -> jax.Array:
    """The output layer (V, D) of a model whose output layer may be its embedding."""
    return params["embed" if c.tied else "head"]["w"]
