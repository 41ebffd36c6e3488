"""LLaVA with CLIP's image tower, SmolVLM, which is an Idefics3, and Qwen2-Audio."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf import llama, whisper
from jaxmodels.hf.table import Format, Settings, Weight, block, patch, side
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.multimodal import ImageTower, MultimodalConfig, SoundTower

CLIP: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
}
"""The defaults of transformers for the image tower of a LLaVA whose config.json says nothing of it."""
PARTLY: dict[str, Any] = {
    **CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
"""Those of the settings that are left out where it says something."""
SIGLIP: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-6,
}
"""The defaults of transformers for the image tower of an Idefics3, which differ from those for a SigLIP alone."""


def decoder(s: Settings) -> dict[str, Any]:
    """Return the fields of the decoder."""
    kind, text = s.values["model_type"], s.section("text_config")
    unsaid = {"model_type": "qwen2" if kind == "qwen2_audio" else "llama"}
    if kind in ("idefics3", "smolvlm") and not text.values:
        unsaid |= {"rms_norm_eps": 1e-5}
    known = dict.fromkeys((unsaid["model_type"], "llama", "mistral", "qwen2", "qwen3"))
    family = Settings({**unsaid, **text.values}, s.where, s).only("model_type", *known)
    text = Settings({**unsaid, **text.values, "model_type": family}, s.where, s)
    own = llama.config(text)
    tied = own.tied if kind == "qwen2_audio" else s.flag("tie_word_embeddings", False) or (kind == "llava" and own.tied)
    return {field.name: getattr(own, field.name) for field in dataclasses.fields(own)} | {"tied": tied}


def tower(s: Settings, unsaid: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that image towers have in common."""
    seen = Settings({**unsaid, **s.section("vision_config").values}, s.where, s)
    seen.training("attention_dropout", 0.0, 0.0)
    return {
        "layers": seen.whole("num_hidden_layers"),
        "input_shape": (*seen.pair("image_size", 224), seen.whole("num_channels", 3)),
        "patch": patch(seen, 14),
        "heads": seen.whole("num_attention_heads"),
        "width": seen.whole("hidden_size"),
        "mlp_width": seen.whole("intermediate_size"),
        "norm_eps": seen.number("layer_norm_eps"),
    }


def hearing(s: Settings) -> SoundTower:
    """Return the tower of sounds."""
    heard = s.section("audio_config")
    heard.only("model_type", "qwen2_audio_encoder")
    heard.only("activation_function", "gelu")
    heard.only("scale_embedding", False)
    for name in ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"):
        heard.training(name, 0.0, 0.0)
    return SoundTower(
        layers=heard.whole("encoder_layers", 32),
        mels=heard.whole("num_mel_bins", 128),
        places=heard.whole("max_source_positions", 1500),
        heads=heard.whole("encoder_attention_heads", 20),
        width=heard.whole("d_model", 1280),
        mlp_width=heard.whole("encoder_ffn_dim", 5120),
        token=s.whole("audio_token_index", 151646, 0),
    )


def config(s: Settings) -> MultimodalConfig:
    if s.values["model_type"] == "qwen2_audio":
        sound, fields = hearing(s), decoder(s)
        s.check()
        return MultimodalConfig(**fields, image=ImageTower(layers=0), sound=sound)
    seen = s.section("vision_config")
    if s.values["model_type"] == "llava":
        seen.only("model_type", "clip_vision_model")
        seen.only("hidden_act", "quick_gelu")
        s.only("projector_hidden_act", "gelu")
        s.only("multimodal_projector_bias", True)
        s.only("vision_feature_select_strategy", "default")
        unread = s.only("vision_feature_layer", -2, -1) == -2
        image = {
            **tower(s, PARTLY if seen.values else CLIP),
            "kind": "clip",
            "unread": unread,
            "token": s.whole("image_token_index", 32000, 0),
        }
        image["layers"] -= unread
    else:
        seen.only("hidden_act", "gelu_pytorch_tanh")
        image = {**tower(s, SIGLIP), "kind": "siglip", "unread": False, "projector": "linear"}
        image |= {"merge": s.whole("scale_factor", 2), "token": s.whole("image_token_index", 128257, 0)}
    fields = decoder(s)
    s.check()
    return MultimodalConfig(**fields, image=ImageTower(**image))


def describe(c: MultimodalConfig) -> dict[str, Any]:
    t, clip = c.image, c.image.kind == "clip"
    text = LlamaConfig(**{field.name: getattr(c, field.name) for field in dataclasses.fields(LlamaConfig)})
    if c.sound.layers:
        return described(c.sound, llama.describe(text), bool(t.layers))
    if (t.projector, clip and t.merge > 1) != ("mlp" if clip else "linear", False):
        raise UserError(
            f"got a model with an image tower of kind {t.kind}, merge {t.merge} and projector {t.projector}, which "
            "transformers does not have, expected clip with merge 1 and mlp, or siglip with linear"
        )
    seen = {
        "hidden_size": t.width,
        "intermediate_size": t.mlp_width,
        "num_hidden_layers": t.layers + t.unread,
        "num_attention_heads": t.heads,
        "image_size": side(t.input_shape),
        "num_channels": t.input_shape[2],
        "patch_size": t.patch,
        "layer_norm_eps": t.norm_eps,
        "attention_dropout": 0.0,
    }
    found = {"text_config": llama.describe(text), "tie_word_embeddings": c.tied}
    if clip:
        return {
            **found,
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **seen},
            "image_token_index": t.token,
            "image_seq_length": t.places,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2 if t.unread else -1,
        }
    if t.grid[0] != t.grid[1]:
        raise UserError(
            f"got images of {t.input_shape[0]}x{t.input_shape[1]}, expected square ones, which Idefics3 of "
            "transformers takes"
        )
    return {
        **found,
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "vision_config": {"model_type": "idefics3_vision", "hidden_act": "gelu_pytorch_tanh", **seen},
        "image_token_id": t.token,
        "scale_factor": t.merge,
    }


def described(sound: SoundTower, text: dict[str, Any], sees: bool) -> dict[str, Any]:
    """Return the settings of a Qwen2-Audio."""
    if sees or text["model_type"] != "qwen2" or sound.sample_rate != 16000:
        raise UserError(
            "got a model of sounds which transformers does not have, expected one as Qwen2-Audio: 16,000 samples a "
            "second, qkv_bias, and no images"
        )
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "text_config": text,
        "audio_token_index": sound.token,
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "activation_function": "gelu",
            "scale_embedding": False,
            "encoder_layers": sound.layers,
            "encoder_attention_heads": sound.heads,
            "encoder_ffn_dim": sound.mlp_width,
            "d_model": sound.width,
            "num_mel_bins": sound.mels,
            "max_source_positions": sound.places,
        },
    }


def norm(theirs: str, ours: str) -> list[Weight]:
    return [Weight(theirs + ".weight", ours + "/scale"), Weight(theirs + ".bias", ours + "/bias")]


def encoder(theirs: str, ours: str) -> list[Weight]:
    """Return the rows of a tower's blocks."""
    return block(
        ours,
        **{x: f"{theirs}self_attn.{x}_proj" for x in "qkv"},
        o=theirs + "self_attn.out_proj",
        attn_norm=theirs + "layer_norm1",
        up=theirs + "mlp.fc1",
        down=theirs + "mlp.fc2",
        mlp_norm=theirs + "layer_norm2",
    )


def linear(theirs: str, ours: str) -> list[Weight]:
    return [Weight(theirs + ".weight", ours + "/w", "o i -> i o"), Weight(theirs + ".bias", ours + "/b")]


def first(row: Weight) -> Weight:
    """Return the row of a stack of one block, whose number is part of the name."""
    pattern = row.pattern or "d -> d"
    return dataclasses.replace(row, pattern=pattern.replace("-> ", "-> 1 "))


def weights(c: MultimodalConfig) -> list[Weight]:
    merging = c.image.kind == "siglip" and not c.sound.layers
    # as transformers writes them, where its models have other names since
    text, seen = ("model.text_model.", "model.vision_model.") if merging else ("language_model.model.", "vision_tower.")
    head = "lm_head" if merging else "language_model.lm_head"
    rows = [
        dataclasses.replace(row, theirs=re.sub("^lm_head", head, re.sub(r"^model\.", text, row.theirs)))
        for row in llama.weights(c)
    ]
    embeddings = seen + "embeddings."
    rows += [
        Weight(embeddings + "class_embedding", "image/class_token/w", "d -> 1 d"),
        Weight(embeddings + "patch_embedding.weight", "image/patches/w", "d c h w -> h w c d"),
        Weight(embeddings + "patch_embedding.bias", "image/patches/b"),
        Weight(embeddings + "position_embedding.weight", "image/positions/w"),
        *norm(seen + "pre_layrnorm", "image/embed_norm"),
        *encoder(seen + "encoder.layers.{layer}.", "image/layers/"),
        *map(first, encoder(f"{seen}encoder.layers.{c.image.layers}.", "image/unread/")),
        *norm(seen + "post_layernorm", "image/norm"),
        *linear("multi_modal_projector.linear_1", "image/projector_up"),
        *linear("multi_modal_projector.linear_2", "image/projector_down"),
        Weight("model.connector.modality_projection.proj.weight", "image/projector/w", "o i -> i o"),
        *whisper.encoder("audio_tower.", "sound/encoder/"),
        *linear("multi_modal_projector.linear", "sound/projector"),
    ]
    return rows


FORMAT = Format(
    family="multimodal",
    config=config,
    describe=describe,
    weights=weights,
    names={"image_token_id": "image_token_index", "audio_token_id": "audio_token_index"},
    copies={
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight",
        "lm_head.weight": "model.text_model.embed_tokens.weight",
    },
    skipped=(r"rotary_emb\.inv_freq$", r"\.embeddings\.position_ids$", r"^vision_tower\.post_layernorm\."),
    aliases=((r"^vision_tower\.vision_model\.", "vision_tower."),),  # before version 5 of transformers
    sounds=lambda c: whisper.frames(c.sound.mels, c.sound.sample_rate) if c.sound.layers else {},
    task=lambda config: "multimodal_lm",
)
