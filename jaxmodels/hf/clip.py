"""CLIP with a ViT as its image tower."""

from __future__ import annotations

from typing import Any

from jaxmodels.hf.table import Format, Settings, Weight, block, patch, side
from jaxmodels.models.clip import CLIPConfig


def config(s: Settings) -> CLIPConfig:
    """Convert settings to a config; those that are absent have the values of ViT-B/32, as in transformers."""
    # early files use the longer names, which take precedence
    image, text = (
        s.section(f"{kind}_config_dict" if s.get(f"{kind}_config_dict", None) is not None else f"{kind}_config")
        for kind in ("vision", "text")
    )
    eps = text.number("layer_norm_eps", 1e-5)
    for tower in (image, text):
        tower.only("hidden_act", "quick_gelu")
        tower.training("attention_dropout", 0.0, 0.0)
    if (other := image.number("layer_norm_eps", 1e-5)) != eps:
        s.refused.append(f"layer_norm_eps {other:g} of images and {eps:g} of texts (computed here: the same)")
    end = text.whole("eos_token_id", 49407, least=0)
    fields = {
        "input_shape": (*image.pair("image_size", 224), image.whole("num_channels", 3)),
        "patch": patch(image, 32),
        "image_layers": image.whole("num_hidden_layers", 12),
        "image_heads": image.whole("num_attention_heads", 12),
        "image_width": image.whole("hidden_size", 768),
        "image_mlp_width": image.whole("intermediate_size", 3072),
        "vocab_size": text.whole("vocab_size", 49408),
        "context": text.whole("max_position_embeddings", 77),
        "text_layers": text.whole("num_hidden_layers", 12),
        "text_heads": text.whole("num_attention_heads", 8),
        "text_width": text.whole("hidden_size", 512),
        "text_mlp_width": text.whole("intermediate_size", 2048),
        # 2 was written by mistake for years, and means the highest id
        "end_token": None if end == 2 else end,
        "embedding": s.whole("projection_dim", 512),
        "norm_eps": eps,
    }
    s.check()
    return CLIPConfig(**fields)


def describe(c: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": c.embedding,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "image_size": side(c.input_shape),
            "num_channels": c.input_shape[2],
            "patch_size": c.patch,
            "num_hidden_layers": c.image_layers,
            "num_attention_heads": c.image_heads,
            "hidden_size": c.image_width,
            "intermediate_size": c.image_mlp_width,
            "layer_norm_eps": c.norm_eps,
            "projection_dim": c.embedding,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_act": "quick_gelu",
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.context,
            "num_hidden_layers": c.text_layers,
            "num_attention_heads": c.text_heads,
            "hidden_size": c.text_width,
            "intermediate_size": c.text_mlp_width,
            "layer_norm_eps": c.norm_eps,
            "projection_dim": c.embedding,
            "eos_token_id": 2 if c.end_token is None else c.end_token,
        },
    }


def weights(c: CLIPConfig) -> list[Weight]:
    def norm(theirs: str, ours: str) -> list[Weight]:
        return [Weight(theirs + ".weight", ours + "/scale"), Weight(theirs + ".bias", ours + "/bias")]

    def tower(theirs: str, ours: str) -> list[Weight]:
        h = theirs + ".encoder.layers.{layer}."
        return block(
            ours + "/layers/",
            **{x: f"{h}self_attn.{x}_proj" for x in "qkv"},
            o=h + "self_attn.out_proj",
            attn_norm=h + "layer_norm1",
            up=h + "mlp.fc1",
            down=h + "mlp.fc2",
            mlp_norm=h + "layer_norm2",
        )

    image, text = "vision_model.embeddings.", "text_model.embeddings."
    return [
        Weight("logit_scale", "scale/log"),
        Weight(image + "class_embedding", "image/class_token/w", "d -> 1 d"),
        Weight(image + "patch_embedding.weight", "image/patches/w", "d c h w -> h w c d"),
        Weight(image + "position_embedding.weight", "image/positions/w"),
        *norm("vision_model.pre_layrnorm", "image/embed_norm"),
        *tower("vision_model", "image"),
        *norm("vision_model.post_layernorm", "image/norm"),
        Weight("visual_projection.weight", "image/projection/w", "e d -> d e"),
        Weight(text + "token_embedding.weight", "text/embed/w"),
        Weight(text + "position_embedding.weight", "text/positions/w"),
        *tower("text_model", "text"),
        *norm("text_model.final_layer_norm", "text/norm"),
        Weight("text_projection.weight", "text/projection/w", "e d -> d e"),
    ]


FORMAT = Format(
    family="clip",
    config=config,
    describe=describe,
    weights=weights,
    skipped=(r"\.embeddings\.position_ids$",),
    task=lambda config: "contrastive",
)
