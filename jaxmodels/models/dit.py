"""DiT: a transformer of image patches that removes noise, given the time and a class or a text (Peebles & Xie 2022)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Natural, Positive, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_patches, check_shape, divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import image_inputs, token_inputs
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.kernels.normalize import layer_norm
from jaxmodels.models.model import Dtype, Family, Inputs, Remat
from jaxmodels.models.patches import cut, join

FREQUENCIES = 256
"""Sines and cosines that a time is given by."""


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """DiT; the defaults are DiT-S/2 for the latents of 256×256 images."""

    input_shape: Shape = (32, 32, 4)
    """Height, width and channels of an image."""
    patch: Dim = 2
    """Side of a square patch; must divide height and width."""
    classes: Natural = 1000
    """Classes that a picture is conditioned on, beside which there is an embedding for none; 0: no classes."""
    vocab_size: Natural = 0
    """Rows of the embedding of tokens (V) where pictures are conditioned on texts; 0: no texts."""
    layers: Depth = 12
    """Blocks."""
    heads: Depth = 6
    """Attention heads (H); must divide `width`."""
    width: Dim = 384
    """Size of the residual stream (D); a multiple of 4."""
    mlp_width: Dim = 1536
    """Hidden units of a block's MLP (F)."""
    norm_eps: Positive = 1e-6
    """Added to the variance in LayerNorm."""
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
        check_patches(self.input_shape, self.patch)
        if self.width % 4:
            raise UserError(
                f"got width {self.width}, expected a multiple of 4, for the sines and cosines of rows and columns, "
                f"try --model.width {4 * (self.width // 4 + 1)}"
            )
        if self.classes and self.vocab_size:
            raise UserError(
                f"got classes {self.classes} and vocab_size {self.vocab_size}, expected pictures by classes or by "
                "texts, try --model.classes 0"
            )


def xavier(contracted: int) -> layers.Init:
    """Glorot & Bengio's uniform initialization of a weight whose first dimensions are contracted."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        most = math.sqrt(6 / (math.prod(shape[:contracted]) + math.prod(shape[contracted:])))
        return jax.random.uniform(key, shape, jnp.float32, -most, most)

    return init


def modulation(c: DiTConfig, parts: int, condition: jax.Array) -> list[jax.Array]:
    """Scales, shifts and gates of features, each (B, 1, D), of a condition (B, D); call it inside a network.

    They are 0 at first, so that a block begins as the identity ("adaLN-Zero", section 3.2).
    """
    axes = ("embed", "gates", "mlp")
    linear = layers.Linear((parts, c.width), axes, initializer=layers.zeros, dtype=c.dtype, name="modulation")
    return list(jnp.moveaxis(linear(nn.silu(condition)), 1, 0)[:, :, None])


def normalize(c: DiTConfig, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm without parameters of its own, scaled and shifted by the condition."""
    normal: jax.Array = layer_norm(x, jnp.ones(x.shape[-1]), None, c.norm_eps)  # pyright: ignore[reportAssignmentType]
    return normal * (1 + scale) + shift


class Block(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array, carried: None, condition: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        inits = (*(xavier(1),) * 3, xavier(2))
        attn = MultiHead(
            c.heads, c.width // c.heads, initializers=inits, dtype=c.dtype, kernel=c.attention, name="attn"
        )
        mlp = layers.MLP(c.mlp_width, layers.gelu, initializers=(xavier(1), xavier(1)), dtype=c.dtype, name="mlp")
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(c, 6, condition)
        x = x + gate * attn(normalize(c, x, shift, scale), Context())[0]
        x = x + mlp_gate * mlp(normalize(c, x, mlp_shift, mlp_scale))
        return layers.shard(x, "batch", "seq", None), None


class DiT(nn.Module):
    """Noisy images (B, H, W, C), their times (B,) from 0 to 1000 and labels (B,) to what is predicted of the images.

    The output has the images' shape, in float32. With texts, the third input are tokens (B, T), of which those whose
    `segment_ids` are 0 do not count. Without a third input, or with the label `classes`, or with no token that counts,
    the picture is one of anything.
    Source: as in diffusers, frequencies reach 1 / 10000, where the authors' code stops one step before.
    """

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        times: jax.Array,
        given: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        c = self.config
        check_shape(images, c.input_shape)
        condition = Time(c, name="time")(times) + self.what(given, segment_ids, images.shape[0])
        patches = cut(images, c.patch)
        axes = ("window", "window", "features", "embed")
        embed = layers.Linear((c.width,), axes, True, xavier(3), c.dtype, before_stack=True, name="patches")
        rows, columns = (side // c.patch for side in c.input_shape[:2])
        x = layers.shard(embed(patches) + places(rows, columns, c.width).astype(c.dtype), "batch", "seq", None)
        blocks = layers.scan_layers(Block, c.layers, c.remat, c.unroll)(c, name="layers")
        x, _ = blocks(x, None, condition)
        shift, scale = modulation(c, 2, condition)
        shape, axes = patches.shape[2:], ("embed", "window", "window", "features")
        head = layers.Linear(shape, axes, initializer=layers.zeros, dtype=c.dtype, name="head")
        return join(head(normalize(c, x, shift, scale)), rows).astype(jnp.float32)

    def what(self, given: jax.Array | None, segment_ids: jax.Array | None, rows: int) -> jax.Array:
        """The embedding (B, D) of the class or the text that images are conditioned on."""
        c = self.config
        if not c.vocab_size:
            axes = ("classes", "embed")
            table = layers.Embed(c.classes + 1, c.width, axes, dtype=c.dtype, before_stack=True, name="classes")
            return table(jnp.full((rows,), c.classes) if given is None else given)
        table = layers.Embed(c.vocab_size, c.width, dtype=c.dtype, before_stack=True, name="words")
        if given is None:
            given = segment_ids = jnp.zeros((rows, 1), jnp.int32)
        counts = jnp.ones(given.shape, bool) if segment_ids is None else segment_ids > 0
        counts = counts.astype(c.dtype)[..., None]
        return (counts * table(given)).sum(1) / jnp.maximum(counts.sum(1), 1)


class Time(nn.Module):
    """Times (B,) to features (B, D): an MLP of sines and cosines."""

    config: DiTConfig

    @nn.compact
    def __call__(self, times: jax.Array) -> jax.Array:
        c = self.config

        def project(x: jax.Array, axes: tuple[str, str], name: str) -> jax.Array:
            init = layers.normal(0.02)
            return layers.Linear((c.width,), axes, True, init, c.dtype, before_stack=True, name=name)(x)

        half = FREQUENCIES // 2
        angles = times[:, None] * np.asarray(10000.0 ** -(np.arange(half) / (half - 1)), np.float32)
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        return project(nn.silu(project(waves, ("features", "mlp"), "up")), ("mlp", "embed"), "down")


def places(rows: int, columns: int, width: int) -> jax.Array:
    """Sines and cosines of each patch's column, then of its row, (1, N, D)."""
    quarter = width // 4
    rates = 10000.0 ** -(np.arange(quarter) / quarter)
    grid = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in reversed(grid)]
    waves = [wave for each in angles for wave in (np.sin(each), np.cos(each))]
    return jnp.asarray(np.concatenate(waves, -1)[None], jnp.float32)


def inputs(c: DiTConfig, batch: int, length: int) -> Inputs:
    """Images, times, and labels or tokens."""
    times = jax.ShapeDtypeStruct((batch,), jnp.float32)
    given = token_inputs(c, batch, length) if c.vocab_size else (jax.ShapeDtypeStruct((batch,), jnp.int32),)
    return (*image_inputs(c, batch, length), times, *given)


base = DiTConfig()
sizes = {
    # Peebles & Xie 2022, table 1
    "s": base,
    "b": dataclasses.replace(base, heads=12, width=768, mlp_width=3072),
    "l": dataclasses.replace(base, layers=24, heads=16, width=1024, mlp_width=4096),
    "xl": dataclasses.replace(base, layers=28, heads=16, width=1152, mlp_width=4608),
}

register(
    Family(
        name="dit",
        config=DiTConfig,
        network=DiT,
        inputs=inputs,
        presets={
            f"dit-{size}{patch}": dataclasses.replace(config, patch=patch)
            for patch in (2, 4, 8)
            for size, config in sizes.items()
        },
    )
)
