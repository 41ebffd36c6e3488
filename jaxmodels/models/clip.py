"""CLIP: a vision transformer and a causal text transformer whose outputs meet in one space (Radford et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.fields import Depth, Dim, Natural, Positive, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_patches, check_shape, divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import context_inputs, image_inputs
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Remat
from jaxmodels.models.patches import embed_patches


@dataclass(frozen=True)
class CLIPConfig(ModelConfig):
    """CLIP; the defaults are ViT-B/32."""

    input_shape: Shape = (224, 224, 3)
    """Height, width and channels of an image."""
    patch: Dim = 32
    """Side of a square patch; must divide height and width."""
    image_layers: Depth = 12
    """Blocks of the image tower."""
    image_heads: Depth = 12
    """Attention heads of the image tower (H); must divide `image_width`."""
    image_width: Dim = 768
    """Size of the image tower's residual stream (D)."""
    image_mlp_width: Dim = 3072
    """Hidden units of its MLPs (F)."""
    vocab_size: Dim = 49408
    """Rows of the text tower's embedding (V)."""
    context: Dim = 77
    """Learned positions: the most tokens of a text."""
    text_layers: Depth = 12
    """Blocks of the text tower."""
    text_heads: Depth = 8
    """Attention heads of the text tower; must divide `text_width`."""
    text_width: Dim = 512
    """Size of the text tower's residual stream."""
    text_mlp_width: Dim = 2048
    """Hidden units of its MLPs."""
    end_token: Natural | None = None
    """The id where a text's features are read out, at its first occurrence; None: the highest id of each text, as in
    OpenAI's code."""
    embedding: Dim = 512
    """Size of the space where images and texts meet (E)."""
    norm_eps: Positive = 1e-5
    """Added to the variance in LayerNorm."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of a scan over layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self, "image_width", "image_heads")
        divide(self, "text_width", "text_heads")
        check_patches(self.input_shape, self.patch)


def quick_gelu(x: jax.Array) -> jax.Array:
    """GELU by a logistic function: x · sigmoid(1.702 x) (Hendrycks & Gimpel 2016, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


class Size(NamedTuple):
    """The size of one tower, and the activation of its MLPs."""

    depth: int
    heads: int
    width: int
    mlp_width: int
    activation: Callable[[jax.Array], jax.Array] = quick_gelu


class Block(nn.Module):
    """Source of the initial deviations: `_init_weights` of transformers' CLIP."""

    config: CLIPConfig
    size: Size
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array, carried: None, ctx: Context) -> tuple[jax.Array, None]:
        c, (depth, heads, width, mlp_width, activation) = self.config, self.size
        inner = layers.normal((2 * width * depth) ** -0.5)
        attn = MultiHead(
            heads,
            width // heads,
            causal=self.causal,
            initializers=(inner, inner, inner, layers.normal(width**-0.5)),
            dtype=c.dtype,
            kernel=c.attention,
            name="attn",
        )
        mlp = layers.MLP(
            mlp_width, activation, initializers=(layers.normal((2 * width) ** -0.5), inner), dtype=c.dtype, name="mlp"
        )
        y, _ = attn(layers.LayerNorm(c.norm_eps, name="attn_norm")(x), ctx)
        x = x + y
        x = x + mlp(layers.LayerNorm(c.norm_eps, name="mlp_norm")(x))
        return layers.shard(x, "batch", "seq", None), None


def encode(c: CLIPConfig, size: Size, x: jax.Array, ctx: Context, *, causal: bool, name: str = "layers") -> jax.Array:
    """Run x (B, T, D) through a tower's blocks."""
    blocks = layers.scan_layers(Block, size.depth, c.remat, c.unroll)(c, size, causal, name=name)
    return blocks(x, None, ctx)[0]


def embed_image(c: CLIPConfig, images: jax.Array) -> jax.Array:
    """What the blocks of the image tower take, (B, 1 + N, D), the class token first; call it inside a network."""
    check_shape(images, c.input_shape)
    token = layers.normal(c.image_width**-0.5)
    x = embed_patches(images, c.patch, c.image_width, token=token, bias=False, dtype=c.dtype)
    return layers.LayerNorm(c.norm_eps, before_stack=True, name="embed_norm")(x)


def project(c: CLIPConfig, x: jax.Array) -> jax.Array:
    """Project features (B, D) to unit vectors (B, E) in float32."""
    x = layers.LayerNorm(c.norm_eps, name="norm")(x)
    init = layers.normal(x.shape[-1] ** -0.5)
    linear = layers.Linear((c.embedding,), ("embed", "features"), False, init, c.dtype, name="projection")
    y = linear(x).astype(jnp.float32)
    return y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True))


class Images(nn.Module):
    """Images (B, H, W, C) to unit vectors (B, E)."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        size = Size(c.image_layers, c.image_heads, c.image_width, c.image_mlp_width)
        return project(c, encode(c, size, embed_image(c, images), Context(), causal=False)[:, 0])


class Texts(nn.Module):
    """Tokens (B, T) to unit vectors (B, E), read out at the end of each text."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        c = self.config
        size = Size(c.text_layers, c.text_heads, c.text_width, c.text_mlp_width)
        ctx = Context.of(tokens, None, None, segment_ids, longest=c.context)
        embed = layers.Embed(c.vocab_size, size.width, dtype=c.dtype, before_stack=True, name="embed")
        places = layers.Embed(
            c.context, size.width, ("positions", "embed"), dtype=c.dtype, before_stack=True, name="positions"
        )
        x = layers.shard(embed(tokens) + places(ctx.positions), "batch", "seq", None)
        x = encode(c, size, x, ctx, causal=True)
        end = jnp.argmax(tokens if c.end_token is None else tokens == c.end_token, axis=1)
        return project(c, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


class Scale(nn.Module):
    """The factor of similarities; its logarithm is learned."""

    @nn.compact
    def __call__(self) -> jax.Array:
        # Radford et al. 2021, section 2.5: a temperature of 0.07 at first, as transformers rounds its logarithm
        return jnp.exp(layers.parameter(self, "log", nn.initializers.constant(2.6592), (), (), "norm"))


class CLIP(nn.Module):
    """Images (B, H, W, C) and tokens (B, T) to (unit vectors (B, E), unit vectors (B, E), scale), in float32.

    Either input may be None: its tower is not run, and its output is None. `segment_ids` belong to the tokens.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(
        self,
        images: jax.Array | None,
        tokens: jax.Array | None,
        *,
        segment_ids: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
        c = self.config
        seen = None if images is None else Images(c, name="image")(images)
        read = None if tokens is None else Texts(c, name="text")(tokens, segment_ids)
        return seen, read, Scale(name="scale")()


base = CLIPConfig()

register(
    Family(
        name="clip",
        config=CLIPConfig,
        network=CLIP,
        inputs=lambda c, batch, length: image_inputs(c, batch, length) + context_inputs(c, batch, length),
        longest=lambda c: c.context,
        presets={
            # Radford et al. 2021, table 20
            "clip-vit-b32": base,
            "clip-vit-b16": dataclasses.replace(base, patch=16),
            "clip-vit-l14": dataclasses.replace(
                base,
                patch=14,
                image_layers=24,
                image_heads=16,
                image_width=1024,
                image_mlp_width=4096,
                text_heads=12,
                text_width=768,
                text_mlp_width=3072,
                embedding=768,
            ),
        },
    )
)
