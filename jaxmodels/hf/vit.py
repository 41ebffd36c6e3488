"""ViT with a class token."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight, block, classes, labels, square
from jaxmodels.models.vit import ViTConfig


def config(s: Settings) -> ViTConfig:
    s.only("hidden_act", "gelu")
    s.only("qkv_bias", True)
    size = s.get("image_size", 224)
    fields = {
        "input_shape": (size, size, s.get("num_channels", 3)),
        "patch": s.get("patch_size", 16),
        "classes": classes(s),
        "layers": s.get("num_hidden_layers"),
        "heads": s.get("num_attention_heads"),
        "width": s.get("hidden_size"),
        "mlp_width": s.get("intermediate_size"),
        "norm_eps": s.get("layer_norm_eps", 1e-12),
        "dropout": s.get("hidden_dropout_prob", 0.0),
    }
    s.check()
    return ViTConfig(**fields)


def describe(c: ViTConfig) -> dict[str, Any]:
    if c.pool != "class":
        raise UserError(f"got a ViT with pool {c.pool!r}, which transformers does not have, expected pool class")
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_act": "gelu",
        "qkv_bias": True,
        "image_size": square(c.input_shape),
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
    task=lambda config: "classification",
)
