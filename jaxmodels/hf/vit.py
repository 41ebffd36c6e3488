"""ViT with a class token."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight, block, classes, classifies, labels, patch, side
from jaxmodels.models.vit import ViTConfig


def config(s: Settings) -> ViTConfig:
    s.only("hidden_act", "gelu")
    s.only("qkv_bias", True)
    s.training("attention_probs_dropout_prob", 0.0, 0.0)
    fields = {
        "input_shape": (*s.pair("image_size", 224), s.whole("num_channels", 3)),
        "patch": patch(s, 16),
        "classes": classes(s),
        "layers": s.whole("num_hidden_layers", 12),
        "heads": s.whole("num_attention_heads", 12),
        "width": s.whole("hidden_size", 768),
        "mlp_width": s.whole("intermediate_size", 3072),
        "norm_eps": s.number("layer_norm_eps", 1e-12),
        "dropout": s.number("hidden_dropout_prob", 0.0),
    }
    s.check()
    return ViTConfig(**fields)


def describe(c: ViTConfig) -> dict[str, Any]:
    if c.pool != "class":
        raise UserError(
            f"got a ViT with pool {c.pool!r}, which transformers does not have, expected pool class, "
            "try a run that was trained with --model.pool class"
        )
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_act": "gelu",
        "qkv_bias": True,
        "image_size": side(c.input_shape),
        "num_channels": c.input_shape[2],
        "patch_size": c.patch,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "layer_norm_eps": c.norm_eps,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": 0.0,
        **labels(c.classes),
    }


def weights(c: ViTConfig) -> list[Weight]:
    embeddings, h = "vit.embeddings.", "vit.encoder.layer.{layer}."
    return [
        Weight(embeddings + "cls_token", "class_token/w", "1 n d -> n d"),
        Weight(embeddings + "position_embeddings", "positions/w", "1 n d -> n d"),
        Weight(embeddings + "patch_embeddings.projection.weight", "patches/w", "d c h w -> h w c d"),
        Weight(embeddings + "patch_embeddings.projection.bias", "patches/b"),
        *block(
            "layers/",
            q=h + "attention.attention.query",
            k=h + "attention.attention.key",
            v=h + "attention.attention.value",
            o=h + "attention.output.dense",
            attn_norm=h + "layernorm_before",
            up=h + "intermediate.dense",
            down=h + "output.dense",
            mlp_norm=h + "layernorm_after",
        ),
        Weight("vit.layernorm.weight", "norm/scale"),
        Weight("vit.layernorm.bias", "norm/bias"),
        Weight("classifier.weight", "head/w", "c d -> d c"),
        Weight("classifier.bias", "head/b"),
    ]


FORMAT = Format(
    family="vit",
    config=config,
    describe=describe,
    weights=weights,
    prefix="vit.",
    skipped=(r"^vit\.pooler\.",),
    task=classifies,
)
