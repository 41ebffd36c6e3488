"""The section `model` of an experiment: the config of a family, found by the family's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from jaxmodels.fields import Section
from jaxmodels.registry import Registry

FAMILIES = Registry(
    "model family",
    "jaxmodels.models",
    {
        "gpt2": "jaxmodels.models.gpt2:GPT2Config",
        "llama": "jaxmodels.models.llama:LlamaConfig",
        "mixtral": "jaxmodels.models.mixtral:MixtralConfig",
        "mlp": "jaxmodels.models.mlp:MLPConfig",
        "transformer": "jaxmodels.models.transformer:TransformerConfig",
        "cnn": "jaxmodels.models.cnn:CNNConfig",
        "resnet": "jaxmodels.models.resnet:ResNetConfig",
        "vgg": "jaxmodels.models.vgg:VGGConfig",
        "segformer": "jaxmodels.models.segformer:SegFormerConfig",
        "unet": "jaxmodels.models.unet:UNetConfig",
        "lstm": "jaxmodels.models.lstm:LSTMConfig",
        "vae": "jaxmodels.models.vae:VAEConfig",
        "gan": "jaxmodels.models.gan:GANConfig",
        "bert": "jaxmodels.models.bert:BERTConfig",
        "vit": "jaxmodels.models.vit:ViTConfig",
        "clip": "jaxmodels.models.clip:CLIPConfig",
        "wavenet": "jaxmodels.models.wavenet:WaveNetConfig",
        "sasrec": "jaxmodels.models.sasrec:SASRecConfig",
        "dit": "jaxmodels.models.dit:DiTConfig",
        "wav2vec2": "jaxmodels.models.wav2vec2:Wav2Vec2Config",
        "whisper": "jaxmodels.models.whisper:WhisperConfig",
        "yolox": "jaxmodels.models.yolox:YOLOXConfig",
        "detr": "jaxmodels.models.detr:DETRConfig",
        "rt_detr": "jaxmodels.models.rt_detr:RTDETRConfig",
        "two_tower": "jaxmodels.models.two_tower:TwoTowerConfig",
        "multimodal": "jaxmodels.models.multimodal:MultimodalConfig",
    },
)
"""The config of each family, whose module registers the family when it is imported."""


@dataclass(frozen=True)
class ModelConfig(Section, section="model", kinds=FAMILIES):
    """The sizes and choices of a model; each family has its own."""

    if TYPE_CHECKING:  # the fields of a model whose family is not known

        def __getattr__(self, name: str) -> Any: ...

    stacked: ClassVar[bool] = True
    """Whether a parameter of the layers is one array for all of them, so that their number shows in its shape."""

    def idle(self, parameters: Iterable[str]) -> tuple[str, ...]:
        """The fields that change nothing of what these parameters compute, which are given by their paths."""
        return ()

    def plain(self) -> Self:
        """Return the config with which the model's FLOPs are counted: with attention whose products the jaxpr shows,
        nothing recomputed, and for experts no rows beside those of the tokens that are sent to them."""
        usual, made = {"attention": "xla", "remat": "none"}, cast(Any, self)
        return dataclasses.replace(made, **{name: value for name, value in usual.items() if hasattr(self, name)})

    def indivisible(self) -> str:
        """Return what makes a token's output depend on how many tokens a call has, so that a text cannot be read in
        pieces; nothing if it does not."""
        return ""

    def dispatched(self) -> float:
        """Rows that a block with experts sends to other devices for each token, with unused places in its buffers.

        A plan asks it of a model whose weights have the axis `expert`, to guess how long the exchange takes.
        """
        return 1.0
