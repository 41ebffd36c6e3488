"""Towers, projector, decoder: a language model that reads images and sounds in the places of some of its tokens.

Source: LLaVA 1.5 (Liu et al. 2023) has CLIP's image tower and an MLP as projector; SmolVLM (Marafioti et al. 2025),
like Idefics3 (Laurençon et al. 2024), SigLIP's (Zhai et al. 2023), squares of whose places are merged, and a linear
projector; Qwen2-Audio (Chu et al. 2024) Whisper's encoder, with means of two places, and a linear projector.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Natural, Positive, Section, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_patches, check_shape, divide
from jaxmodels.models.clip import CLIPConfig, Size, embed_image, encode
from jaxmodels.models.decoder import output_table
from jaxmodels.models.decoding import Context, empty_cache
from jaxmodels.models.families import register
from jaxmodels.models.inputs import token_inputs
from jaxmodels.models.llama import Llama, LlamaConfig
from jaxmodels.models.model import Family, Inputs
from jaxmodels.models.patches import embed_patches
from jaxmodels.models.spectrogram import hop, log_mel
from jaxmodels.models.whisper import Encoder, WhisperConfig

Array = jax.Array


@dataclass(frozen=True)
class ImageTower(Section, section="model.image"):
    """An encoder of images, and its projection to the decoder's width; the defaults are LLaVA 1.5's."""

    layers: Natural = 23
    """Blocks up to the one whose outputs are read. 0: the model reads no images."""
    kind: Literal["clip", "siglip"] = "clip"
    """clip: with a class token, which is not read, and without a last norm; siglip: the other way around."""
    unread: bool = True
    """Whether one more block and a last norm of clip are kept, as in LLaVA's files. They compute nothing."""
    input_shape: Shape = (336, 336, 3)
    """Height, width and channels of an image."""
    patch: Dim = 14
    """Side of a square patch; must divide height and width."""
    heads: Depth = 16
    """Attention heads (H); must divide `width`."""
    width: Dim = 1024
    """Size of the residual stream (D)."""
    mlp_width: Dim = 4096
    """Hidden units of a block's MLP (F)."""
    norm_eps: Positive = 1e-5
    """Added to the variance in LayerNorm."""
    merge: Dim = 1
    """Side of the squares of patches that become one token of the decoder."""
    projector: Literal["mlp", "linear"] = "mlp"
    """What takes a patch to the decoder's width: two layers with biases and GELU between them, or one without bias."""
    token: Natural = 32000
    """The id whose places in a text an image takes, one for each of its patches or squares of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self, "width", "heads")
        check_patches(self.input_shape, self.patch)
        if self.unread and self.kind == "siglip":
            raise UserError(
                "got model.image.unread True with kind siglip, all blocks of which are read, expected False, "
                "try --model.image.unread False"
            )
        if any(side % self.merge for side in self.grid):
            raise UserError(
                f"got model.image.merge {self.merge} with {self.grid[0]}x{self.grid[1]} patches, expected a number "
                "that divides both, try --model.image.merge 1"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row."""
        return self.input_shape[0] // self.patch, self.input_shape[1] // self.patch

    @property
    def places(self) -> int:
        """Tokens of the decoder that an image takes (N)."""
        return self.grid[0] * self.grid[1] // self.merge**2

    def clip(self, c: LlamaConfig) -> CLIPConfig:
        """The tower as CLIP's, computed as the decoder `c` is."""
        return CLIPConfig(
            input_shape=self.input_shape,
            patch=self.patch,
            image_layers=self.layers,
            image_heads=self.heads,
            image_width=self.width,
            image_mlp_width=self.mlp_width,
            norm_eps=self.norm_eps,
            dtype=c.dtype,
            attention=c.attention,
            remat=c.remat,
            unroll=c.unroll,
        )


@dataclass(frozen=True)
class SoundTower(Section, section="model.sound"):
    """An encoder of sounds, and its projection to the decoder's width; the other defaults are Qwen2-Audio's."""

    layers: Natural = 0
    """Blocks. 0: the model hears no sounds."""
    sample_rate: Dim = 16000
    """Samples a second of the sounds."""
    mels: Dim = 128
    """Bands of the log-mel frames, one every 10 ms, that the encoder reads (M)."""
    places: Dim = 1500
    """The most places of an encoded sound, one for two frames: 1500 are 30 seconds."""
    heads: Depth = 20
    """Attention heads (H); must divide `width`."""
    width: Dim = 1280
    """Size of the residual stream (D)."""
    mlp_width: Dim = 5120
    """Hidden units of a block's MLP (F)."""
    token: Natural = 151646
    """The id whose places in a text a sound takes, one for the mean of each two of its places."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self, "width", "heads")

    @property
    def samples(self) -> int:
        """The most samples of a sound, to which shorter ones are padded."""
        return 2 * self.places * hop(self.sample_rate)

    def heard(self, samples: Any) -> Any:
        """The encoder's places that a sound of so many samples takes: a number, or an array of them."""
        frames = (samples + hop(self.sample_rate) - 1) // hop(self.sample_rate)
        return (frames + 1) // 2

    def taken(self, samples: Any) -> Any:
        """The decoder's tokens that such a sound takes."""
        return self.heard(samples) // 2

    def whisper(self, c: LlamaConfig) -> WhisperConfig:
        """The tower as Whisper's encoder, computed as the decoder `c` is."""
        return WhisperConfig(
            sample_rate=self.sample_rate,
            mels=self.mels,
            places=self.places,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            mlp_width=self.mlp_width,
            dtype=c.dtype,
            attention=c.attention,
            remat=c.remat,
            unroll=c.unroll,
        )


@dataclass(frozen=True)
class MultimodalConfig(LlamaConfig):
    """A LLaMA that reads other media through towers; the defaults are LLaVA 1.5 7B's."""

    vocab_size: Dim = 32064
    """Rows of the embedding (V), those of the media's tokens included."""
    context: Dim = 4096
    """Tokens that the published model was trained on at once; rotary positions do not limit it."""
    image: ImageTower = ImageTower()
    """The tower of images."""
    sound: SoundTower = SoundTower()
    """The tower of sounds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.towers:
            raise UserError(
                "got a model without a tower, expected one that reads images or sounds, "
                "try --model.image.layers 1, or --model llama"
            )
        for name, tower in self.towers.items():
            if tower.token >= self.vocab_size:
                raise UserError(
                    f"got model.{name}.token {tower.token}, expected an id below model.vocab_size {self.vocab_size}, "
                    f"try --model.{name}.token {self.vocab_size - 1}"
                )

    @property
    def towers(self) -> dict[str, ImageTower | SoundTower]:
        """The towers that the model has, in the order of its inputs."""
        return {name: tower for name in ("image", "sound") if (tower := getattr(self, name)).layers}


class Images(nn.Module):
    """Images (B, H, W, C), or several a row (B, M, H, W, C), to features of the decoder's width, (B, M · N, D)."""

    config: MultimodalConfig

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        c, tower = self.config, self.config.image
        how, rows = tower.clip(c), len(images)
        size = Size(tower.layers, tower.heads, tower.width, tower.mlp_width)
        images = images.reshape(-1, *images.shape[-3:])
        if tower.kind == "clip":
            x = encode(how, size, embed_image(how, images), Context(), causal=False)
            if self.is_initializing() and tower.unread:  # what published files have and nothing reads
                behind = encode(how, size._replace(depth=1), x, Context(), causal=False, name="unread")
                layers.LayerNorm(tower.norm_eps, before_stack=True, name="norm")(behind)
            x = x[:, 1:]
        else:
            check_shape(images, tower.input_shape)
            x = embed_patches(images, tower.patch, tower.width, token=None, dtype=c.dtype)
            x = encode(how, size._replace(activation=layers.gelu), x, Context(), causal=False)
            x = layers.LayerNorm(tower.norm_eps, before_stack=True, name="norm")(x)
        x = self.project(merged(x, tower.grid, tower.merge))
        return x.reshape(rows, -1, c.width)

    def project(self, x: Array) -> Array:
        """Take features (B, N, D') to the decoder's width."""
        c, tower = self.config, self.config.image
        how: dict[str, Any] = {"dtype": c.dtype, "before_stack": True}
        if tower.projector == "linear":
            return layers.Linear((c.width,), ("features", "embed"), False, name="projector", **how)(x)
        x = layers.Linear((c.width,), ("features", "mlp"), name="projector_up", **how)(x)
        x = layers.shard(layers.exact_gelu(x), "batch", "seq", "mlp")
        return layers.Linear((c.width,), ("mlp", "embed"), name="projector_down", **how)(x)


def merged(x: Array, grid: tuple[int, int], side: int) -> Array:
    """Join the features (B, N, D) of the patches of each square, row by row: (B, N / side², side² · D)."""
    if side == 1:
        return x
    (height, width), D = grid, x.shape[-1]
    x = x.reshape(-1, height // side, side, width // side, side, D).swapaxes(2, 3)
    return x.reshape(len(x), -1, side * side * D)


def placed(x: Array, here: Array, features: Array) -> Array:
    """Put features (B, N, D) in order into the places of x (B, T, D) that `here` (B, T) names.

    A place for which no feature is left is NaN, so that a text with too many of them cannot pass unseen.
    """
    number = jnp.where(here, jnp.cumsum(here, 1) - 1, 0)[..., None]
    found = jnp.take_along_axis(features, number, axis=1, mode="fill", fill_value=jnp.nan)
    return jnp.where(here[..., None], found.astype(x.dtype), x)


class Sounds(nn.Module):
    """Sounds (B, N) in [-1, 1], or a pair of them and their lengths (B,), to features of the decoder's width (B, S, D).

    Padding behind a sound's length is not attended to; nor should what it gives be.
    """

    config: MultimodalConfig

    @nn.compact
    def __call__(self, sounds: Array | tuple[Array, Array], train: bool) -> Array:
        c, tower, real = self.config, self.config.sound, None
        if isinstance(sounds, tuple):
            sounds, lengths = sounds
            real = jnp.arange(tower.heard(sounds.shape[1])) < tower.heard(lengths)[:, None]
        frames = log_mel(sounds, tower.sample_rate, tower.mels)
        x = Encoder(tower.whisper(c), train, pooled=2, name="encoder")(frames, real)
        axes, how = ("features", "embed"), {"dtype": c.dtype, "before_stack": True}
        return layers.Linear((c.width,), axes, name="projector", **how)(x)


TOWERS: dict[str, type[nn.Module]] = {"image": Images, "sound": Sounds}


class Multimodal(Llama):
    """Tokens (B, T), and for each tower its medium, to logits (B, T, V) in float32.

    The media are images (B, H, W, C) or several a row (B, M, H, W, C), and sounds (B, N) in [-1, 1] or a pair of them
    and their lengths (B,). Without any, all tokens are text: so a cached text is continued whose media were read with
    its prompt.
    """

    config: MultimodalConfig

    @nn.nowrap
    def embedded(self, embed: layers.Embed, tokens: Array, *media: Array, train: bool) -> Array:
        x, towers = embed(tokens), self.config.towers
        if media and len(media) != len(towers):
            raise UserError(f"got {len(media)} media, expected {' and '.join(towers)}, in this order, or none")
        for (name, tower), medium in zip(towers.items(), media, strict=False):
            features = TOWERS[name](self.config, name=name)(medium, train)
            x = placed(x, tokens == tower.token, features)
        return x


def media_inputs(c: MultimodalConfig, batch: int, length: int) -> Inputs:
    """Token ids (B, T), and images (B, H, W, C) and sounds (B, N) where the model has towers for them."""
    shapes = {"image": c.image.input_shape, "sound": (c.sound.samples,)}
    media = [jax.ShapeDtypeStruct((batch, *shapes[name]), jnp.float32) for name in c.towers]
    return (*token_inputs(c, batch, length), *media)


llava = MultimodalConfig()
smolvlm = MultimodalConfig(
    vocab_size=49280,
    context=8192,
    layers=30,
    heads=9,
    kv_heads=3,
    width=576,
    mlp_width=1536,
    rope_theta=100_000.0,
    image=ImageTower(
        12, "siglip", False, (512, 512, 3), 16, 12, 768, 3072, 1e-6, merge=4, projector="linear", token=49190
    ),
)

register(
    Family(
        name="multimodal",
        config=MultimodalConfig,
        network=Multimodal,
        inputs=media_inputs,
        cache=lambda c, batch, length: empty_cache(
            c.layers, batch, length, c.kv_heads or c.heads, c.head_size, c.dtype
        ),
        unembedding=output_table,
        presets={
            "llava-1.5-7b": llava,
            "llava-1.5-13b": dataclasses.replace(llava, layers=40, heads=40, width=5120, mlp_width=13824),
            "smolvlm-256m": smolvlm,
            "smolvlm-500m": dataclasses.replace(smolvlm, layers=32, heads=15, kv_heads=5, width=960, mlp_width=2560),
            "qwen2-audio-7b": MultimodalConfig(
                vocab_size=156032,
                context=8192,
                qkv_bias=True,
                image=ImageTower(layers=0),
                sound=SoundTower(layers=32),
            ),
        },
    )
)
