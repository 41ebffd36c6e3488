"""Attention as a layer of a network: projections to heads and back, rotary positions and the cache around it.

Dims: B batch, T queries, S keys, H heads, G heads of keys and values, K head size, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmodels.models import inner, layers
from jaxmodels.models.attention import attention
from jaxmodels.models.decoding import FEW, Context, KeyValues, update
from jaxmodels.models.kernels import xla
from jaxmodels.models.rotary import rotate

Array = jax.Array


class MultiHead(nn.Module):
    """Attention between projections of x (B, T, D), with grouped heads, rotary positions and QK-norm where asked for.

    Keys and values come from `memory` (B, S, D'), or from x where there is none. Returns (B, T, D) and the new cache.
    With memory, the new cache is the memory's keys and values; a later call can take them as `memory`, and then does
    not compute them again.
    Source: Vaswani et al. 2017; grouped heads, Ainslie et al. 2023; QK-norm as in Qwen3: before the rotation, over
    each head.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    causal: bool = False
    window: int | None = None
    scale: float | None = None
    bias: bool = True
    """Whether the projections of queries, keys and values have a bias."""
    key_bias: bool = True
    """Whether that of keys has one, which changes none of the weights: it adds the same to all of a query's scores."""
    out_bias: bool = True
    norm_eps: float | None = None
    """The eps of RMSNorm on queries and keys; None: no norm there."""
    dropout: float = 0.0
    train: bool = False
    initializers: tuple[layers.Init, ...] = (layers.normal(0.02),) * 4
    """Initializers of q, k, v and o."""
    dtype: str = "float32"
    kernel: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Array,
        ctx: Context,
        kv: KeyValues | None = None,
        *,
        memory: Array | KeyValues | None = None,
        frequencies: Array | None = None,
        bias: Array | None = None,
        places: tuple[Array, Array] | None = None,
    ) -> tuple[Array, KeyValues | None]:
        """`frequencies` turn on rotary positions; `bias` is added to the scores, (1 or B, H, T, S).

        `places`, of queries (…, T, D) and of keys (…, S, D'), are added to what these are projected from, and not to
        what values are (Carion et al. 2020).
        """

        def project(name: str, source: Array) -> Array:
            heads, axis = (self.heads, "heads") if name == "q" or not self.kv_heads else (self.kv_heads, "kv_heads")
            init = self.initializers["qkv".index(name)]
            bias = self.bias and (name != "k" or self.key_bias)
            linear = layers.Linear(
                (heads, self.head_dim), ("embed", axis, "head_dim"), bias, init, self.dtype, name=name
            )
            return layers.shard(linear(source), "batch", "seq", axis, None)

        def compare(name: str, source: Array) -> Array:
            y = project(name, source)
            if self.norm_eps is not None:
                y = layers.RMSNorm(self.norm_eps, name=f"{name}_norm")(y)
            return y if frequencies is None else rotate(y, ctx.positions, frequencies)

        q = compare("q", x if places is None else x + places[0])
        if isinstance(memory, dict):
            k, v = memory["k"], memory["v"]
        else:
            source = x if memory is None else memory
            k, v = compare("k", source if places is None else source + places[1]), project("v", source)
        kept = inner.wanted(self) and memory is None
        if kv is not None and ctx.pages and ctx.offset is not None and x.shape[1] <= FEW and bias is None and not kept:
            layer, kv = kv["layer"], {"k": k, "v": v}
            scale = self.head_dim**-0.5 if self.scale is None else self.scale
            y = ctx.pages.attend(q, kv, layer, ctx.offset, scale, self.window)
        else:
            k, v, kv = update(kv, k, v, ctx) if memory is None else (k, v, {"k": k, "v": v})
            if kept:
                inner.keep(self, "scores", self.scores(q, k, ctx, bias))
                inner.keep(self, "values", v)
            dropping = self.train and self.dropout > 0
            y = attention(
                q,
                k,
                v,
                causal=self.causal,
                window=self.window,
                bias=bias,
                scale=self.scale,
                dropout=self.dropout if dropping else 0.0,
                rng=self.make_rng("dropout") if dropping else None,
                kernel=self.kernel,
                **ctx.masks(),
            )
        y = layers.shard(y, "batch", "seq", "heads", None)  # which pins its gradient too
        axes, init = ("heads", "head_dim", "embed"), self.initializers[3]
        return layers.Linear(x.shape[-1:], axes, self.out_bias, init, self.dtype, name="o")(y), kv

    def scores(self, q: Array, k: Array, ctx: Context, bias: Array | None) -> Array:
        """The scores (B, H, T, S) in float32 whose softmax are the weights, -inf where a key is not seen."""
        masks = ctx.masks()
        segments = masks["segment_ids"]
        found = xla.scores(
            q,
            k,
            causal=self.causal,
            window=self.window,
            segments=segments if segments is None or isinstance(segments, tuple) else (segments, segments),
            bias=bias,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            softcap=None,
            q_offset=masks.get("q_offset", 0),
            kv_length=masks.get("kv_length"),
        )
        return layers.shard(found.reshape(q.shape[0], q.shape[2], *found.shape[3:]), "batch", "heads", "seq", None)
