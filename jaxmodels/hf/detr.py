"""DETR with a ResNet of transformers, or of timm as in the published files."""

from __future__ import annotations

from typing import Any

from jaxmodels.hf import resnet
from jaxmodels.hf.table import Format, Settings, Weight, block, classes, labels, side
from jaxmodels.models.detr import DETRConfig
from jaxmodels.models.families import preset
from jaxmodels.models.resnet import ResNetConfig

BACKBONE = "model.backbone.conv_encoder.model."
TIMM = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""The names of ResNets in timm that are the same ResNets here."""
_INSIDE = r"(conv_encoder\.model\.)"
_BLOCK = r"(stages\.\d+\.layers\.\d+\.)"
_ALIASES = (
    (_INSIDE + r"conv1\.", r"\1embedder.embedder.convolution."),
    (_INSIDE + r"bn1\.", r"\1embedder.embedder.normalization."),
    *((rf"{_INSIDE}layer{i + 1}\.(\d+)\.", rf"\1encoder.stages.{i}.layers.\2.") for i in range(4)),
    (_BLOCK + r"downsample\.0\.", r"\1shortcut.convolution."),
    (_BLOCK + r"downsample\.1\.", r"\1shortcut.normalization."),
    *((rf"{_BLOCK}conv{i + 1}\.", rf"\1layer.{i}.convolution.") for i in range(3)),
    *((rf"{_BLOCK}bn{i + 1}\.", rf"\1layer.{i}.normalization.") for i in range(3)),
)
"""timm's names of the parts of a ResNet, and those of transformers; they are replaced in this order."""


def config(s: Settings) -> DETRConfig:
    s.only("activation_function", "relu")
    s.only("position_embedding_type", "sine")
    s.only("dilation", False)
    s.only("auxiliary_loss", False)  # with which transformers computes something else than is published
    dropout = s.number("dropout", 0.1)
    s.training("attention_dropout", 0.0, dropout)
    s.training("activation_dropout", 0.0, dropout)
    s.training("encoder_layerdrop", 0.0, 0.0)
    s.training("decoder_layerdrop", 0.0, 0.0)
    mlp, heads = s.whole("encoder_ffn_dim", 2048), s.whole("encoder_attention_heads", 8)
    for name, default, own in (("decoder_ffn_dim", 2048, mlp), ("decoder_attention_heads", 8, heads)):
        if s.whole(name, default) != own:
            s.refused.append(f"{name} {s.get(name, default)} (computed here: {own}, as in the encoder)")
    fields = {
        "input_shape": (*shape(s), s.whole("num_channels", 3)),
        "classes": classes(s),
        "queries": s.whole("num_queries", 100),
        "layers": s.whole("encoder_layers", 6),
        "decoder_layers": s.whole("decoder_layers", 6),
        "heads": heads,
        "width": s.whole("d_model", 256),
        "mlp_width": mlp,
        "dropout": dropout,
        **backbone(s),
    }
    s.check()
    return DETRConfig(**fields)


def shape(s: Settings) -> tuple[int, int]:
    """Return the size of images, which config.json does not say unless it is written here."""
    return s.pair("image_size", 0) if s.values.get("image_size") else DETRConfig.input_shape[:2]


def backbone(s: Settings) -> dict[str, Any]:
    """Return the fields of the ResNet, which has a section of its own, or a name in timm."""
    inner = s.section("backbone_config")
    if inner.values and inner.values.get("model_type") != "timm_backbone":
        inner.only("model_type", "resnet")
        fields = resnet.sizes(inner)
        last = f"stage{len(fields['depths'])}"
        if inner.several("out_features", str, (last,))[-1] != last:
            inner.refused.append(f"out_features {inner.values['out_features']} (computed here: up to {last})")
        return fields
    name = (inner if inner.values else s).get("backbone", "resnet50")
    if name not in TIMM:
        s.refused.append(f"backbone {name!r} (computed here: {', '.join(TIMM)})")
        name = TIMM[0]
    c: ResNetConfig = preset(name.replace("resnet", "resnet-"))
    return {"depths": c.depths, "widths": c.widths, "bottleneck": c.bottleneck, "stem_width": c.stem_width}


def describe(c: DETRConfig) -> dict[str, Any]:
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {**resnet.body(c.backbone), "out_features": [f"stage{len(c.depths)}"]},
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "dilation": False,
        "auxiliary_loss": False,
        "image_size": side(c.input_shape),
        "num_channels": c.input_shape[2],
        "num_queries": c.queries,
        "encoder_layers": c.layers,
        "decoder_layers": c.decoder_layers,
        "encoder_attention_heads": c.heads,
        "decoder_attention_heads": c.heads,
        "encoder_ffn_dim": c.mlp_width,
        "decoder_ffn_dim": c.mlp_width,
        "d_model": c.width,
        "dropout": c.dropout,
        "attention_dropout": c.dropout,
        "activation_dropout": c.dropout,
        **labels(c.classes),
    }


def attention(theirs: str, ours: str, norm: str) -> list[Weight]:
    """Return the rows of attention and of the norm behind it."""
    names = {part: f"{theirs}.{part}_proj" for part in "qkv"}
    rows = block("", **names, o=theirs + ".out_proj", attn_norm=norm)
    return [Weight(row.theirs, f"{row.ours}".replace("attn", ours, 1), row.pattern) for row in rows]


def stack(theirs: str, ours: str, cross: bool) -> list[Weight]:
    """Return the rows of a stack of blocks."""
    h = theirs + "layers.{layer}."
    rows = attention(h + "self_attn", ours + "/attn", h + "self_attn_layer_norm")
    if cross:
        rows += attention(h + "encoder_attn", ours + "/cross", h + "encoder_attn_layer_norm")
    return [*rows, *block(ours + "/", up=h + "fc1", down=h + "fc2", mlp_norm=h + "final_layer_norm")]


def linear(theirs: str, ours: str) -> list[Weight]:
    """Return the rows of a linear layer."""
    return [Weight(theirs + ".weight", ours + "/w", "o i -> i o"), Weight(theirs + ".bias", ours + "/b")]


def weights(c: DETRConfig) -> list[Weight]:
    return [
        *resnet.stages(c.backbone, BACKBONE, "backbone/"),
        Weight("model.input_projection.weight", "project/w", "o i 1 1 -> i o"),
        Weight("model.input_projection.bias", "project/b"),
        Weight("model.query_position_embeddings.weight", "queries"),
        *stack("model.encoder.", "encoder", cross=False),
        *stack("model.decoder.", "decoder", cross=True),
        Weight("model.decoder.layernorm.weight", "norm/scale"),
        Weight("model.decoder.layernorm.bias", "norm/bias"),
        *linear("class_labels_classifier", "class"),
        *(row for i in range(3) for row in linear(f"bbox_predictor.layers.{i}", f"box/{i}")),
    ]


FORMAT = Format(
    family="detr",
    config=config,
    describe=describe,
    weights=weights,
    names={"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"},
    prefix="model.",
    skipped=(r"num_batches_tracked$",),
    aliases=_ALIASES,
    task=lambda config: "set_detection",
)
