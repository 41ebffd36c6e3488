"""One small config of every family, and examples for it: what the tests of all families share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.cnn import CNNConfig
from jaxmodels.models.detr import DETRConfig
from jaxmodels.models.dit import DiTConfig
from jaxmodels.models.gan import GANConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.multimodal import ImageTower, MultimodalConfig, SoundTower
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.models.rt_detr import RTDETRConfig
from jaxmodels.models.sasrec import SASRecConfig
from jaxmodels.models.segformer import SegFormerConfig
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.models.two_tower import TwoTowerConfig
from jaxmodels.models.unet import UNetConfig
from jaxmodels.models.vae import VAEConfig
from jaxmodels.models.vgg import VGGConfig
from jaxmodels.models.vit import ViTConfig
from jaxmodels.models.wav2vec2 import Wav2Vec2Config
from jaxmodels.models.wavenet import WaveNetConfig
from jaxmodels.models.whisper import WhisperConfig
from jaxmodels.models.yolox import YOLOXConfig

V, B, T = 48, 8, 12
LLAMA = {"vocab_size": V, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48}
IMAGE = {"input_shape": (8, 8, 3), "classes": 5}
BODY = {"layers": 2, "width": 32, "heads": 4, "mlp_width": 48}
TOWERS = {f"{tower}_{name}": size for tower in ("image", "text") for name, size in BODY.items()}
CLIP = {"input_shape": (8, 8, 3), "patch": 4, "vocab_size": V, "context": 16, "embedding": 16, **TOWERS}
SOUND = {
    "vocab_size": V,
    "conv_widths": (8, 16),
    "position_window": 4,
    "position_groups": 2,
    "mask_time_span": 3,
    "mask_time": 0.3,
}
SEEING = ImageTower(1, unread=False, input_shape=(8, 8, 3), patch=2, heads=4, width=16, mlp_width=24, token=2)
HEARING = SoundTower(1, sample_rate=400, mels=8, places=24, heads=4, width=16, mlp_width=24, token=3)
RESNET = {**IMAGE, "stem": "small", "stem_width": 8}
DETR = {"depths": (1,), "widths": (8,), "bottleneck": False, "stem_width": 8, "decoder_layers": 2}
RTDETR = {
    "depths": (1, 1, 1, 1),
    "widths": (8, 8, 16, 16),
    "bottleneck": False,
    "stem_width": 8,
    "decoder_layers": 1,
    "heads": 2,
    "width": 16,
    "mlp_width": 32,
    "expansion": 0.5,
    "points": 2,
}
SEGFORMER = {
    "depths": (2, 1),
    "widths": (8, 16),
    "heads": (2, 4),
    "reductions": (2, 1),
    "windows": (3, 3),
    "strides": (2, 2),
    "decoder_width": 8,
}
ZOO = {
    "mlp": ("classification", MLPConfig(**IMAGE, hidden=(16, 8), dropout=0.1)),
    "cnn": ("classification", CNNConfig(**IMAGE, widths=(8, 16), hidden=(16,), dropout=0.1)),
    "vgg": ("classification", VGGConfig(**IMAGE, depths=(1, 2), widths=(8, 16), hidden=(16,), dropout=0.1)),
    "vgg-bn": ("classification", VGGConfig(**IMAGE, depths=(1, 2), widths=(8, 16), hidden=(16,), batch_norm=True)),
    "resnet": ("classification", ResNetConfig(**RESNET, depths=(1, 2), widths=(8, 16), bottleneck=False)),
    "resnet-bottleneck": ("classification", ResNetConfig(**RESNET, depths=(2, 1), widths=(16, 32))),
    "unet": ("segmentation", UNetConfig(**IMAGE, widths=(8, 12, 16))),
    "segformer": ("segmentation", SegFormerConfig(**IMAGE, **SEGFORMER)),
    "gpt2": ("causal_lm", GPT2Config(vocab_size=V, context=16, layers=2, width=32, heads=4, dropout=0.1)),
    "llama": ("causal_lm", LlamaConfig(**LLAMA)),
    "mistral": ("causal_lm", LlamaConfig(**LLAMA, window=5)),
    "qwen": ("causal_lm", LlamaConfig(**LLAMA, qkv_bias=True, qk_norm=True, tied=True)),
    "mixtral": ("causal_lm", MixtralConfig(**LLAMA, experts=4, z_loss=0.01)),
    "mixtral-capacity": ("causal_lm", MixtralConfig(**LLAMA, experts=4, routing="capacity", capacity_factor=1.0)),
    "lstm": ("causal_lm", LSTMConfig(vocab_size=V, width=16, hidden=16, dropout=0.1)),
    "lstm-both-ways": ("classification", LSTMConfig(V, width=16, hidden=16, bidirectional=True, classes=5)),
    "bert": ("masked_lm", BERTConfig(vocab_size=V, context=16, **BODY)),
    "bert-classifier": ("classification", BERTConfig(V, context=16, head="classification", classes=5, **BODY)),
    "bert-spans": ("question_answering", BERTConfig(vocab_size=V, context=16, head="spans", **BODY)),
    "bert-sentences": ("extraction", BERTConfig(vocab_size=V, context=16, head="sentences", **BODY)),
    "transformer": ("seq2seq", TransformerConfig(vocab_size=V, **BODY)),
    "bart": ("seq2seq", TransformerConfig("bart", V, context=16, activation="exact_gelu", **{**BODY, "layers": 1})),
    "t5": ("seq2seq", TransformerConfig("t5", V, norm="pre", activation="gated_gelu", tied=False, **BODY)),
    "vit": ("classification", ViTConfig(**IMAGE, patch=4, **BODY, dropout=0.1)),
    "clip": ("contrastive", CLIPConfig(**CLIP)),
    "wavenet": ("waveform", WaveNetConfig(stacks=2, depth=2, width=8, skip=8)),
    "sasrec": ("next_item", SASRecConfig(V, context=16, layers=2, heads=4, width=32, mlp_width=48)),
    "dit": ("diffusion", DiTConfig(**IMAGE, patch=4, **BODY)),
    "wav2vec2": (
        "transcription",
        Wav2Vec2Config(sample_rate=40, conv_windows=(5, 3), conv_strides=(4, 2), **SOUND, **BODY),
    ),
    "wav2vec2-mels": (
        "transcription",
        Wav2Vec2Config(
            sample_rate=400,
            mels=8,
            conv_windows=(3, 3),
            conv_strides=(8, 4),
            conv_norm="layer",
            conv_bias=True,
            norm="pre",
            mask_bands=0.2,
            mask_bands_span=2,
            **SOUND,
            **BODY,
        ),
    ),
    # 12 places, as many as tokens
    "whisper": ("seq2seq:seconds=0.24", WhisperConfig(V, context=16, sample_rate=400, mels=8, places=12, **BODY)),
    "multimodal": ("multimodal_lm", MultimodalConfig(**LLAMA, image=SEEING, sound=HEARING)),
    "two-tower": ("retrieval", TwoTowerConfig(V, width=32, users=B, words=64, name_words=3, hidden=(24,))),
    "vae": ("vae", VAEConfig(input_shape=(8, 8, 1), hidden=(16,), latents=4)),
    "vae-conv": ("vae", VAEConfig("conv", input_shape=(8, 8, 1), hidden=(8, 16), latents=4)),
    "dcgan": ("gan", GANConfig(input_shape=(8, 8, 1), latents=6, channels=(8, 16))),
    "dcgan-discriminator": ("gan", GANConfig("discriminator", input_shape=(8, 8, 1), latents=6, channels=(8, 16))),
    "yolox": ("detection", YOLOXConfig((64, 64, 3), 5, depth=0.1, width=0.125)),
    "detr": ("set_detection", DETRConfig((16, 8, 3), 5, 4, **DETR, **BODY)),
    "rt-detr": ("set_detection", RTDETRConfig((64, 32, 3), 5, 4, **RTDETR)),
    "wgan": ("gan", GANConfig(kind="wgan-gp", input_shape=(8, 8, 1), latents=6, channels=(8, 16), hidden=8)),
}
"""Name -> the task it is trained on, and its config."""


def fill(specs, seed=0):
    """Arrays for a tree of `jax.ShapeDtypeStruct`: a few token ids, or numbers in [0, 1)."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        whole = np.issubdtype(leaf.dtype, np.integer)
        return rng.integers(1, 5, leaf.shape).astype(leaf.dtype) if whole else rng.random(leaf.shape, np.float32)

    return jax.tree.map(one, specs)


def example(model):
    """Inputs of a model."""
    return fill(model.inputs(B, T))


def arrays(model, seed=0):
    """Parameters of which each one matters: no biases of 0, no scales of 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = (
            0.2 if leaf.ndim < 2 else 1 / np.sqrt(np.prod(leaf.shape[:-1]) / (leaf.shape[0] if leaf.ndim > 2 else 1))
        )
        drawn = spread * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        # converted before jax sees it, which compiles a conversion for every shape
        return jnp.asarray(drawn.astype(leaf.dtype), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


def outputs(model, params, stats=None, *, inputs=None, **how):
    """What a model computes of its example, without the new batch statistics."""
    inputs = example(model) if inputs is None else inputs
    out = model.apply(params, *inputs, **({} if stats is None else {"stats": stats}), **how)
    return out if stats is None else out[0]
