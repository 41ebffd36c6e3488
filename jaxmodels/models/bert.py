"""BERT: an encoder of text with post-normalization, and the heads it is published with (Devlin et al. 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped, Positive
from jaxmodels.models import layers
from jaxmodels.models.checks import divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context, KeyValues
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import context_inputs
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Remat


@dataclass(frozen=True)
class BERTConfig(ModelConfig):
    """BERT; the defaults are BERT-base uncased (110M)."""

    vocab_size: Dim = 30522
    """Rows of the embedding, which is also the output layer of masked language modeling (V)."""
    context: Dim = 512
    """Learned positions: the most tokens the model sees at once."""
    types: Dim = 2
    """Token types: parts of the input that have an embedding of their own, such as a first and a second sentence."""
    layers: Depth = 12
    """Blocks."""
    heads: Depth = 12
    """Attention heads (H); must divide `width`."""
    width: Dim = 768
    """Size of the residual stream (D)."""
    mlp_width: Dim = 3072
    """Hidden units of a block's MLP (F)."""
    head: Literal["masked_lm", "classification", "pretraining", "spans", "sentences", "none"] = "masked_lm"
    """masked_lm: logits of each token; classification: of `classes`, from the first token; pretraining: logits of each
    token, and of whether the second sentence follows the first (2); spans: of whether an answer begins, and ends, at
    each token (2); sentences: of whether a sentence belongs to a summary, from its first token; none: features, and the
    first token's pooled."""
    classes: Dim | None = None
    """Outputs of the classification head; None for other heads."""
    pool: Literal["first", "mean"] = "first"
    """What pooled features are computed from: the first token, as published, or the mean of all tokens, which
    masked language modeling alone trains better."""
    norm_eps: Positive = 1e-12
    """Added to the variance in LayerNorm."""
    dropout: Dropped = 0.1
    """Share dropped while training of embeddings, attention weights, what each sublayer adds, and pooled features."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of the scan over layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self, "width", "heads")
        if (self.head == "classification") != (self.classes is not None):
            hint = "--model.classes 2" if self.classes is None else "--model.head classification"
            raise UserError(
                f"got head {self.head} with classes {self.classes}, expected classes for head classification and for "
                f"no other, try {hint}"
            )

    def idle(self, parameters: Iterable[str]) -> tuple[str, ...]:
        return () if any("/pooler/" in name for name in parameters) else ("pool",)


class Block(nn.Module):
    config: BERTConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, kv: KeyValues | None, ctx: Context) -> tuple[jax.Array, KeyValues | None]:
        c, drop = self.config, layers.Dropout(self.config.dropout)
        attn = MultiHead(
            c.heads,
            c.width // c.heads,
            dropout=c.dropout,
            train=self.train,
            dtype=c.dtype,
            kernel=c.attention,
            name="attn",
        )
        y, kv = attn(x, ctx, kv)
        x = layers.LayerNorm(c.norm_eps, name="attn_norm")(x + drop(y, self.train))
        y = layers.MLP(c.mlp_width, layers.exact_gelu, dtype=c.dtype, name="mlp")(x)
        x = layers.LayerNorm(c.norm_eps, name="mlp_norm")(x + drop(y, self.train))
        return layers.shard(x, "batch", "seq", None), kv


class Bias(nn.Module):
    """x (…, V) plus a learned bias for each token of the vocabulary, in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + layers.parameter(self, "b", layers.zeros, ("vocab",), x.shape[-1:], "bias")


class BERT(nn.Module):
    """Tokens (B, T) to the head's outputs in float32, or with `head=False` to features (B, T, D).

    masked_lm: logits (B, T, V), or those of the places `at` (B, P) alone, (B, P, V); classification: logits
    (B, classes); pretraining: logits as with masked_lm, and (B, 2); spans: logits (B, T, 2) of the first and the last
    token of an answer; sentences: logits (B, P) of the tokens `at` (B, P), each the first of a sentence; none: features
    (B, T, D) and pooled features (B, D). `types` (B, T) are the token types, 0 when
    not given.
    """

    config: BERTConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        types: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        at: jax.Array | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Any:
        c, drop = self.config, layers.Dropout(self.config.dropout)
        ctx = Context.of(tokens, None, positions, segment_ids, longest=c.context)
        embed = layers.Embed(c.vocab_size, c.width, dtype=c.dtype, before_stack=True, name="embed")
        places = layers.Embed(
            c.context, c.width, ("positions", "embed"), dtype=c.dtype, before_stack=True, name="positions"
        )
        parts = layers.Embed(c.types, c.width, ("positions", "embed"), dtype=c.dtype, before_stack=True, name="types")
        x = embed(tokens) + places(ctx.positions) + parts(jnp.zeros((1, 1), jnp.int32) if types is None else types)
        x = drop(layers.LayerNorm(c.norm_eps, before_stack=True, name="embed_norm")(x), train)
        blocks = layers.scan_layers(Block, c.layers, c.remat, c.unroll)(c, train, name="layers")
        x, _ = blocks(layers.shard(x, "batch", "seq", None), None, ctx)
        if not head:
            return x

        def pooled() -> jax.Array:
            y = x[:, 0]
            if c.pool == "mean":
                real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
                y = jnp.mean(x, axis=1, where=real[..., None])
            y = jnp.tanh(layers.Linear((c.width,), ("embed", "mlp"), dtype=c.dtype, name="pooler")(y))
            return layers.shard(y, "batch", None)

        def classify(name: str, classes: int) -> jax.Array:
            linear = layers.Linear((classes,), ("embed", "classes"), dtype=c.dtype, name=name)
            return linear(drop(pooled(), train) if name == "head" else pooled()).astype(jnp.float32)

        def restore() -> jax.Array:
            y = x if at is None else jnp.take_along_axis(x, at[..., None], axis=1)
            y = layers.Linear((c.width,), ("embed", "mlp"), dtype=c.dtype, name="transform")(y)
            y = layers.LayerNorm(c.norm_eps, name="transform_norm")(layers.exact_gelu(y))
            # pinned: left to itself, XLA's partitioner gets the gradient wrong on a mesh of data, fsdp and tensor
            y = layers.shard(y, "batch", "seq", None)
            return layers.shard(Bias(name="output")(embed.logits(y)), "batch", "seq", "vocab")

        if c.head == "masked_lm":
            return restore()
        if c.head == "classification":
            return classify("head", c.classes or 0)
        if c.head == "pretraining":
            return restore(), classify("next_sentence", 2)
        if c.head == "spans":
            y = layers.Linear((2,), ("embed", "classes"), dtype=c.dtype, name="spans")(x)
            return layers.shard(y, "batch", "seq", None).astype(jnp.float32)
        if c.head == "sentences":
            y = x[:, :1] if at is None else jnp.take_along_axis(x, at[..., None], axis=1)
            y = layers.Linear((1,), ("embed", "classes"), dtype=c.dtype, name="sentences")(y)
            return layers.shard(y[..., 0], "batch", None).astype(jnp.float32)
        return x.astype(jnp.float32), pooled().astype(jnp.float32)


base = BERTConfig()
large = dataclasses.replace(base, layers=24, heads=16, width=1024, mlp_width=4096)

register(
    Family(
        name="bert",
        config=BERTConfig,
        network=BERT,
        inputs=context_inputs,
        longest=lambda c: c.context,
        presets={
            "bert-base": base,
            "bert-large": large,
            "bert-base-cased": dataclasses.replace(base, vocab_size=28996),
            "bert-large-cased": dataclasses.replace(large, vocab_size=28996),
        },
    )
)
