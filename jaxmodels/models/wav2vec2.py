"""wav2vec 2.0: convolutions over sound, and a Transformer encoder with a head for CTC (Baevski et al. 2020).

The convolutions read the waveform, as in the published models, or log-mel frames, which take far less work.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped, Natural, Positive
from jaxmodels.models import layers
from jaxmodels.models.checks import divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.kernels.convolution import along
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Inputs, Remat
from jaxmodels.models.parameters import parameter
from jaxmodels.models.spectrogram import hop, log_mel
from jaxmodels.parallel.rules import constrain, gather

Array = jax.Array
_EPS = 1e-5
_LEAST_VARIANCE = 1e-7  # of a waveform, as transformers' feature extractor adds it


@dataclass(frozen=True)
class Wav2Vec2Config(ModelConfig):
    """wav2vec 2.0 with a head for CTC; the defaults are those of base."""

    vocab_size: Dim = 32
    """Characters and the blank (V)."""
    sample_rate: Dim = 16000
    """Samples a second of the sounds."""
    mels: Natural = 0
    """Bands of the log-mel frames, one every 10 ms, that the convolutions read. 0: they read the waveform."""
    conv_widths: tuple[Dim, ...] = (512,) * 7
    """Channels of each convolution (C)."""
    conv_windows: tuple[Dim, ...] = (10, 3, 3, 3, 3, 2, 2)
    """Window of each convolution."""
    conv_strides: tuple[Dim, ...] = (5, 2, 2, 2, 2, 2, 2)
    """Stride of each convolution."""
    conv_norm: Literal["group", "layer"] = "group"
    """group: each channel of the first convolution is normalized over time; layer: each place of every convolution."""
    conv_bias: bool = False
    """Whether the convolutions have a bias."""
    layers: Depth = 12
    """Blocks."""
    heads: Depth = 12
    """Attention heads (H); must divide `width`."""
    width: Dim = 768
    """Size of the residual stream (D)."""
    mlp_width: Dim = 3072
    """Hidden units of a block's MLP (F)."""
    norm: Literal["post", "pre"] = "post"
    """Whether a block normalizes behind each of its sublayers (base) or before (large)."""
    position_window: Dim = 128
    """Frames of the convolution that tells where a frame is."""
    position_groups: Dim = 16
    """Groups of its channels; must divide `width`."""
    norm_eps: Positive = 1e-5
    """Added to the variance in LayerNorm."""
    dropout: Dropped = 0.1
    """Share dropped while training of frames, attention, hidden units and what each sublayer adds."""
    mask_time: Dropped = 0.05
    """About this share of the frames is masked while training, in spans (SpecAugment; Park et al. 2019)."""
    mask_time_span: Dim = 10
    """Frames of a span."""
    mask_bands: Dropped = 0.0
    """About this share of the mel bands, or of the channels where the waveform is read, is masked in spans."""
    mask_bands_span: Dim = 10
    """Bands or channels of a span."""
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
        divide(self, "width", "position_groups")
        sizes = {len(self.conv_widths), len(self.conv_windows), len(self.conv_strides)}
        if len(sizes) > 1 or 0 in sizes:
            raise UserError(
                f"got conv_widths {self.conv_widths}, conv_windows {self.conv_windows} and conv_strides "
                f"{self.conv_strides}, expected as many of each, at least one, try --model.conv-strides "
                f"{' '.join(['2'] * max(1, len(self.conv_widths)))}"
            )

    def frames(self, samples: Any) -> Any:
        """Return how many frames of logits a sound of this many samples gives: a number, or an array of them."""
        count = samples // hop(self.sample_rate) if self.mels else samples
        for window, stride in zip(self.conv_windows, self.conv_strides, strict=True):
            count = (count - window) // stride + 1
        return count

    def samples(self, frames: int) -> int:
        """Return the fewest samples that give this many frames of logits."""
        for window, stride in zip(reversed(self.conv_windows), reversed(self.conv_strides), strict=True):
            frames = (frames - 1) * stride + window
        return frames * hop(self.sample_rate) if self.mels else frames


class ChannelNorm(nn.Module):
    """Normalization of each channel over the places that count; x (B, T, C), real (B, T)."""

    @nn.compact
    def __call__(self, x: Array, real: Array) -> Array:
        scale, bias = (
            parameter(self, name, init, ("norm",), x.shape[-1:], "norm")
            for name, init in (("scale", layers.ones), ("bias", layers.zeros))
        )
        y, where = x.astype(jnp.float32), real[..., None]
        y = y - y.mean(1, where=where, keepdims=True)
        rate = jax.lax.rsqrt(jnp.square(y).mean(1, where=where, keepdims=True) + _EPS)
        return (y * rate * scale + bias).astype(x.dtype)


class Positions(nn.Module):
    """A convolution over time with a wide window, in groups of channels; (B, T, D) to (B, T, D).

    Its weights are those of each place of the window, scaled to a length of its own (Salimans & Kingma 2016).
    """

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        K, D, G = c.position_window, c.width, c.position_groups
        axes, deviation = ("window", "channels_in", "channels_out"), 2 / math.sqrt(K * D)
        v = parameter(self, "v", layers.normal(deviation), axes, (K, D // G, D), "matrix")
        length = nn.initializers.constant(deviation * math.sqrt(D // G * D))
        g = parameter(self, "g", length, ("window",), (K,), "norm")
        # whole on every device, for the groups are not split
        v = constrain(gather(v, axes), (None, None, None))
        w = constrain(v * (g * jax.lax.rsqrt(jnp.square(v).sum((1, 2))))[:, None, None], (None, None, None))
        y: Any = along(x.astype(c.dtype), w.astype(c.dtype), G)
        y = layers.shard(y, "batch", "seq", None)
        return layers.exact_gelu(y + parameter(self, "b", layers.zeros, axes[-1:], (D,), "bias").astype(c.dtype))


class Block(nn.Module):
    config: Wav2Vec2Config
    train: bool

    @nn.compact
    def __call__(self, x: Array, kv: None, ctx: Context) -> tuple[Array, None]:
        c, drop = self.config, layers.Dropout(self.config.dropout)
        how: dict[str, Any] = {"dropout": c.dropout, "train": self.train, "dtype": c.dtype}
        attn = MultiHead(c.heads, c.width // c.heads, kernel=c.attention, name="attn", **how)
        mlp = layers.MLP(c.mlp_width, layers.exact_gelu, name="mlp", **how)
        norms = [layers.LayerNorm(c.norm_eps, name=name) for name in ("attn_norm", "mlp_norm")]
        for sublayer, norm in zip((lambda x: attn(x, ctx)[0], mlp), norms, strict=True):
            if c.norm == "pre":
                x = x + drop(sublayer(norm(x)), self.train)
            else:
                x = norm(x + drop(sublayer(x), self.train))
            x = layers.shard(x, "batch", "seq", None)
        return x, None


class Wav2Vec2(nn.Module):
    """Sounds (B, N) in [-1, 1] to logits (B, T, V) in float32, or with `head=False` to features (B, T, D).

    `lengths` (B,) are the samples of each sound, all N when not given: padding behind them changes none of a sound's
    own frames, `config.frames(lengths)` of T. Only log-mel frames that overlap it differ.
    """

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, sounds: Array, *, lengths: Array | None = None, train: bool = False, head: bool = True) -> Array:
        c, drop = self.config, layers.Dropout(self.config.dropout)
        lengths = jnp.full(sounds.shape[:1], sounds.shape[1]) if lengths is None else lengths
        if c.mels:
            counts = lengths // hop(c.sample_rate)
            x = log_mel(sounds, c.sample_rate, c.mels)
            hidden, bands = self.spans(x, train)
            x = jnp.where(hidden[..., None] | bands[:, None], 0.0, x)
        else:
            counts, x = lengths, standard(sounds, until(lengths, sounds.shape[1]))[..., None]
        x = layers.shard(x.astype(c.dtype), "batch", None, None)
        for i, (width, window, stride) in enumerate(zip(c.conv_widths, c.conv_windows, c.conv_strides, strict=True)):
            axes = ("channels_in" if i else "features", "channels_out")
            how: dict[str, Any] = {"initializer": nn.initializers.he_normal(), "axes": axes, "dtype": c.dtype}
            x = layers.Conv(width, (window,), (stride,), "VALID", bias=c.conv_bias, name=f"conv{i}", **how)(x)
            counts = (counts - window) // stride + 1
            if c.conv_norm == "layer":
                x = layers.LayerNorm(_EPS, name=f"conv{i}_norm")(x)
            elif i == 0:
                x = ChannelNorm(name=f"conv{i}_norm")(x, until(counts, x.shape[1]))
            x = layers.exact_gelu(x)
        real = until(counts, x.shape[1])
        x = layers.LayerNorm(c.norm_eps, before_stack=True, name="inputs_norm")(x)
        project = layers.Linear((c.width,), ("features", "embed"), dtype=c.dtype, before_stack=True, name="inputs")
        x = drop(project(x), train)
        if not c.mels:
            masked = parameter(self, "masked", nn.initializers.uniform(1.0), ("norm",), (c.width,), "embedding", True)
            hidden, bands = self.spans(x, train)
            x = jnp.where(hidden[..., None], masked.astype(x.dtype), x)
            x = jnp.where(bands[:, None], 0.0, x)
        x = layers.shard(jnp.where(real[..., None], x, 0), "batch", "seq", None)
        x = x + Positions(c, name="positions")(x)
        norm = layers.LayerNorm(c.norm_eps, before_stack=c.norm == "post", name="norm")
        x = drop(norm(x) if c.norm == "post" else x, train)
        blocks = layers.scan_layers(Block, c.layers, c.remat, c.unroll)(c, train, name="layers")
        x, _ = blocks(layers.shard(x, "batch", "seq", None), None, Context(segment_ids=real.astype(jnp.int32)))
        x = norm(x) if c.norm == "pre" else x
        if not head:
            return x
        x = drop(x, train)
        return layers.Linear((c.vocab_size,), ("embed", "vocab"), dtype=c.dtype, name="head")(x).astype(jnp.float32)

    def spans(self, x: Array, train: bool) -> tuple[Array, Array]:
        """Draw which frames (B, T) and which bands or channels (B, C) of x (B, T, C) are masked; none but in training.

        Source: Baevski et al. 2020, section 3.1, without a fixed number of spans.
        """
        c, found = self.config, []
        plans = ((x.shape[1], c.mask_time, c.mask_time_span), (x.shape[2], c.mask_bands, c.mask_bands_span))
        for size, share, span in plans:
            if not train or not share:
                found.append(jnp.zeros((x.shape[0], size), bool))
                continue
            begun = jax.random.uniform(self.make_rng("dropout"), (x.shape[0], size)) < share / span
            count = jnp.cumsum(begun, 1)
            found.append(count > jnp.pad(count, ((0, 0), (span, 0)))[:, :size])
        return found[0], found[1]


def until(lengths: Array, size: int) -> Array:
    """Which of the `size` places of each row come before its length, (B, size)."""
    return jnp.arange(size)[None] < lengths[:, None]


def standard(sounds: Array, real: Array) -> Array:
    """Scale each sound (B, N) to mean 0 and variance 1, and its padding to 0, as the published models are given it."""
    x = jnp.asarray(sounds, jnp.float32)
    x = x - x.mean(1, where=real, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(x).mean(1, where=real, keepdims=True) + _LEAST_VARIANCE)
    return jnp.where(real, x * rate, 0)


def sound_inputs(c: Wav2Vec2Config, batch: int, length: int) -> Inputs:
    """Sounds (B, N) of `length` frames."""
    return (jax.ShapeDtypeStruct((batch, c.samples(length)), jnp.float32),)


base = Wav2Vec2Config()
large = dataclasses.replace(base, layers=24, heads=16, width=1024, mlp_width=4096)

register(
    Family(
        name="wav2vec2",
        config=Wav2Vec2Config,
        network=Wav2Vec2,
        inputs=sound_inputs,
        presets={
            # Baevski et al. 2020, section 4.2; lv60: as published for 60,000 hours of LibriVox
            "wav2vec2-base": base,
            "wav2vec2-large": large,
            "wav2vec2-large-lv60": dataclasses.replace(large, conv_norm="layer", conv_bias=True, norm="pre"),
        },
    )
)
