"""LLaMA, Mistral, Qwen2 and Qwen3, which share one config here."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.rotary import RopeScaling

_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
UNSAID: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {**_MISTRAL, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "mixtral": {**_MISTRAL, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
}
"""The defaults of transformers for each `model_type`, where they differ from LLaMA's."""


def rope(s: Settings) -> dict[str, Any]:
    """Return the base and scaling of rotary wavelengths, as written by transformers before or since version 5."""
    # what is written in the way of before counts, as in transformers: cards ask to add it to files of either kind
    old = s.section("rope_scaling")
    inner = old if old.values else s.section("rope_parameters")
    base = s.number("rope_theta", 1e4)
    found: dict[str, Any] = {"rope_theta": float(inner.number("rope_theta", base))}
    # rope_type was once called type
    scaled = {"rope_type": inner.values.get("type", "default"), **inner.values}
    kind = Settings(scaled, s.where, s).only("rope_type", "default", "llama3")
    if kind == "llama3":
        # beside the others rather than among them, as in files of Phi3, it counts
        original = s.whole("original_max_position_embeddings", None)
        found["rope_scaling"] = RopeScaling(
            float(inner.number("factor")),
            float(inner.number("low_freq_factor")),
            float(inner.number("high_freq_factor")),
            original or inner.whole("original_max_position_embeddings"),
        )
    return found


def window(s: Settings) -> int | None:
    """Return the width of the attention window; refuse layers that differ."""
    layers, kind = s.whole("num_hidden_layers", 32), s.values["model_type"]
    width = s.whole("sliding_window", None)
    if kind == "llama" or width is None:
        return None
    if kind in ("mistral", "mixtral"):
        return width
    if not s.flag("use_sliding_window", False):
        return None
    first = min(s.whole("max_window_layers", 28, least=0), layers)
    kinds = set(["full_attention"] * (first > 0) + ["sliding_attention"] * (first < layers))
    if s.get("layer_types", None) is not None:
        kinds = set(s.several("layer_types", str, sorted(kinds)))
    if len(kinds) > 1:
        s.refused.append("layer_types that differ (computed here: all sliding_attention or all full_attention)")
    return width if "sliding_attention" in kinds else None


def common(s: Settings) -> dict[str, Any]:
    """Return the fields that LLaMA and Mixtral share."""
    s = Settings({**UNSAID[s.values["model_type"]], **s.values}, s.where, s)  # null is not left out
    s.only("hidden_act", "silu")
    s.only("is_causal", True)
    s.training("attention_dropout", 0.0, 0.0)
    heads, width = s.whole("num_attention_heads", 32), s.whole("hidden_size", 4096)
    groups, size = s.whole("num_key_value_heads", None), s.whole("head_dim", None)
    return {
        "vocab_size": s.whole("vocab_size", 32000),
        "context": s.whole("max_position_embeddings", 2048),
        "layers": s.whole("num_hidden_layers", 32),
        "heads": heads,
        "kv_heads": None if groups == heads else groups,
        "width": width,
        "head_dim": None if size and size * heads == width else size,
        "mlp_width": s.whole("intermediate_size", 11008),
        "norm_eps": s.number("rms_norm_eps", 1e-6),
        "tied": s.flag("tie_word_embeddings", False),
        "window": window(s),
        **rope(s),
    }


def config(s: Settings) -> LlamaConfig:
    kind = s.values["model_type"]
    s.only("attention_bias", False)
    s.only("mlp_bias", False)
    fields = common(s)
    s.check()
    return LlamaConfig(**fields, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")


def described(c: Any, kind: str, architecture: str) -> dict[str, Any]:
    """Return the settings that `common` reads; rotary ones in the form of every version of transformers."""
    found = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads,
        "hidden_size": c.width,
        "head_dim": c.head_size,
        "intermediate_size": c.mlp_width,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "attention_dropout": 0.0,
    }
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    scaling = getattr(c, "rope_scaling", RopeScaling())
    if scaling.factor != 1:
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
        parameters |= found["rope_scaling"]
    return {**found, "rope_parameters": parameters}


def describe(c: LlamaConfig) -> dict[str, Any]:
    if c.qkv_bias and c.qk_norm:
        raise UserError("got qkv_bias with qk_norm, which no model of transformers has, expected one of them")
    if c.qkv_bias or c.qk_norm:
        kind = "qwen2" if c.qkv_bias else "qwen3"
        found = described(c, kind, f"{kind.capitalize()}ForCausalLM")
        sliding = c.window is not None
        kinds = ["sliding_attention" if sliding else "full_attention"] * c.layers
        found |= {"use_sliding_window": sliding, "sliding_window": c.window, "layer_types": kinds}
        return {**found, "max_window_layers": 0 if sliding else c.layers, "attention_bias": False}
    if c.window is not None:
        return {**described(c, "mistral", "MistralForCausalLM"), "sliding_window": c.window}
    return {**described(c, "llama", "LlamaForCausalLM"), "attention_bias": False, "mlp_bias": False}


def attention() -> list[Weight]:
    """Return the rows of embedding, norms and attention, which Mixtral shares."""
    h = "model.layers.{layer}."
    rows = [
        Weight("model.embed_tokens.weight", "embed/w"),
        Weight(h + "input_layernorm.weight", "layers/attn_norm/scale"),
    ]
    for x in "qkv":
        rows += [
            Weight(h + f"self_attn.{x}_proj.weight", f"layers/attn/{x}/w", "(h k) d -> d h k"),
            Weight(h + f"self_attn.{x}_proj.bias", f"layers/attn/{x}/b", "(h k) -> h k"),
            Weight(h + f"self_attn.{x}_norm.weight", f"layers/attn/{x}_norm/scale"),
        ]
    return [
        *rows,
        Weight(h + "self_attn.o_proj.weight", "layers/attn/o/w", "d (h k) -> h k d"),
        Weight(h + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        Weight("model.norm.weight", "norm/scale"),
        Weight("lm_head.weight", "head/w"),
    ]


def weights(c: LlamaConfig) -> list[Weight]:
    h = "model.layers.{layer}.mlp."
    return [
        *attention(),
        Weight(h + "gate_proj.weight", "layers/mlp/gate/w", "f d -> d f"),
        Weight(h + "up_proj.weight", "layers/mlp/up/w", "f d -> d f"),
        Weight(h + "down_proj.weight", "layers/mlp/down/w", "d f -> f d"),
    ]


FORMAT = Format(
    family="llama",
    config=config,
    describe=describe,
    weights=weights,
    prefix="model.",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    skipped=(r"rotary_emb\.inv_freq$",),
)
