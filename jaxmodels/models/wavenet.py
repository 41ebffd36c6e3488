"""WaveNet: causal convolutions with growing gaps over the samples of a sound (van den Oord et al. 2016)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim
from jaxmodels.models import layers
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.model import Dtype, Family, Inputs, Remat

Cache = dict[str, Any]


@dataclass(frozen=True)
class WaveNetConfig(ModelConfig):
    """WaveNet; the defaults are a small one, for sounds of 8,000 samples a second."""

    levels: Dim = 256
    """Values that a sample may have (V)."""
    stacks: Depth = 2
    """Stacks of layers; in each, the gaps begin with 1 again."""
    depth: Depth = 8
    """Layers of a stack; the gap doubles from one to the next."""
    width: Dim = 32
    """Channels of the residual stream (D)."""
    hidden: Dim | None = None
    """Channels of a layer's gates (F); `width` when not given."""
    skip: Dim = 64
    """Channels of what all layers give to the output (K)."""
    conditions: tuple[Dim, ...] = ()
    """What a sound is conditioned on: how many values each condition has, such as 10 digits and 6 speakers."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or stacks; offload: inputs on the host."""
    unroll: Depth = 1
    """Stacks unrolled in each iteration of the scan over them."""

    @property
    def reach(self) -> int:
        """Samples that a prediction depends on."""
        return self.stacks * (2**self.depth - 1) + 2


class Layer(nn.Module):
    """tanh(filter) · sigmoid(gate) of a sample and the one `gap` before it; returns (residual stream, skip, cache)."""

    config: WaveNetConfig
    gap: int

    @nn.compact
    def __call__(self, x: jax.Array, kept: jax.Array | None, ctx: Any) -> tuple[jax.Array, jax.Array, Any]:
        c, (condition, at) = self.config, ctx
        hidden, init = c.hidden or c.width, nn.initializers.lecun_normal()

        def linear(name: str, features: int, axes: tuple[str, str], bias: bool = True) -> layers.Linear:
            return layers.Linear((features,), axes, bias, init, c.dtype, name=name)

        before, kept = earlier(x, self.gap, kept, at)
        # one product of both samples, which a call of one sample with a cache takes as well
        pair = jnp.concatenate([before, x], -1)

        def gate(name: str) -> jax.Array:
            y = linear(name, hidden, ("embed", "mlp"))(pair)
            if condition is not None:
                y = y + linear(f"{name}_condition", hidden, ("embed", "mlp"), bias=False)(condition)[:, None]
            return layers.shard(y, "batch", "seq", "mlp")

        z = jnp.tanh(gate("filter")) * jax.nn.sigmoid(gate("gate"))
        skip = linear("skip", c.skip, ("mlp", "embed"))(z)
        x = x + linear("out", c.width, ("mlp", "embed"))(z)
        return layers.shard(x, "batch", "seq", None), layers.shard(skip, "batch", "seq", None), kept


class Stack(nn.Module):
    """Layers whose gaps are 1, 2, 4, …"""

    config: WaveNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, ctx: Any) -> tuple[jax.Array, Any]:
        total, kept = jnp.zeros((), x.dtype), {}
        for i in range(self.config.depth):
            name = f"layer{i}"
            layer = Layer(self.config, 2**i, name=name)
            x, skip, kept[name] = layer(x, None if cache is None else cache[name], ctx)
            total = total + skip
        return x, (total, kept if cache is not None else None)


class WaveNet(nn.Module):
    """Samples (B, T) as whole numbers, and conditions (B, C), to logits (B, T, V) of the next samples, in float32.

    With `head=False` the outputs are features (B, T, K). With a `cache` a call takes one sample of each row, T = 1, and
    returns (outputs, new cache): the samples before it are those of the calls before. What lies before a sound is 0.
    """

    config: WaveNetConfig

    @nn.compact
    def __call__(
        self,
        samples: jax.Array,
        conditions: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Any:
        c, init = self.config, nn.initializers.lecun_normal()
        if cache is not None and samples.shape[1] != 1:
            raise UserError(f"got {samples.shape[1]} samples of each row with a cache, expected 1")
        given = 0 if conditions is None else conditions.shape[-1]
        if given != len(c.conditions):
            raise UserError(f"got {given} conditions of each sound, expected {len(c.conditions)}, as model.conditions")

        def embed(name: str, count: int, ids: jax.Array, spread: float) -> jax.Array:
            how: Any = {"initializer": layers.normal(spread), "dtype": c.dtype, "before_stack": True}
            return layers.Embed(count, c.width, **how, name=name)(ids)

        condition = None
        if conditions is not None:
            tables = enumerate(c.conditions)
            condition = sum(embed(f"condition{i}", count, conditions[:, i], 1.0) for i, count in tables)
        at = None if cache is None else cache["length"]
        before, kept = earlier(
            embed("embed_before", c.levels, samples, 0.7), 1, None if cache is None else cache["before"], at
        )
        x = layers.shard(embed("embed", c.levels, samples, 0.7) + before, "batch", "seq", None)
        stacks = layers.scan_layers(Stack, c.stacks, c.remat, c.unroll)(c, name="layers")
        _, (skips, inner) = stacks(x, None if cache is None else cache["layers"], (condition, at))
        y = nn.relu(skips.sum(0))
        y = nn.relu(layers.Linear((c.skip,), ("embed", "mlp"), initializer=init, dtype=c.dtype, name="last")(y))
        if head:
            output = layers.Embed(c.levels, c.skip, initializer=layers.normal(c.skip**-0.5), dtype=c.dtype, name="head")
            y = layers.shard(output.logits(y), "batch", "seq", "vocab")
        if cache is None:
            return y
        return y, {"length": cache["length"] + 1, "before": kept, "layers": inner}


def earlier(x: jax.Array, gap: int, kept: jax.Array | None, at: jax.Array | None) -> tuple[jax.Array, Any]:
    """Return the samples `gap` before those of x (B, T, D), zeros before the first, and the new ring of the last ones.

    `kept` (B, gap, D) is a ring of the last samples, and `at` how many there have been.
    """
    if kept is None or at is None:
        return jnp.pad(x, ((0, 0), (gap, 0), (0, 0)))[:, : x.shape[1]], None
    place = at % gap
    old = jax.lax.dynamic_slice_in_dim(kept, place, 1, 1)
    return old.astype(x.dtype), jax.lax.dynamic_update_slice_in_dim(kept, x.astype(kept.dtype), place, 1)


def empty_cache(c: WaveNetConfig, batch: int, length: int) -> Cache:
    """Rings of the last samples of each layer; their size does not depend on the length of a sound."""
    ring = {f"layer{i}": jnp.zeros((c.stacks, batch, 2**i, c.width), c.dtype) for i in range(c.depth)}
    before = jnp.zeros((batch, 1, c.width), c.dtype)
    return {"length": jnp.zeros((), jnp.int32), "before": before, "layers": ring}


def sound_inputs(c: WaveNetConfig, batch: int, length: int) -> Inputs:
    """Samples (B, T), and the conditions of each sound (B, C) where there are any."""
    samples = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    conditions = jax.ShapeDtypeStruct((batch, len(c.conditions)), jnp.int32)
    return (samples, conditions) if c.conditions else (samples,)


register(
    Family(
        name="wavenet",
        config=WaveNetConfig,
        network=WaveNet,
        inputs=sound_inputs,
        cache=empty_cache,
        presets={
            "wavenet-small": WaveNetConfig(),
            # 30 layers in three stacks, as later papers took it (Tacotron 2, section 2.3)
            "wavenet-30": dataclasses.replace(WaveNetConfig(), stacks=3, depth=10, width=64, skip=256),
        },
    )
)
