"""Mixtral: LLaMA's rows, and separate tensors for each expert."""

from __future__ import annotations

from typing import Any

from jaxmodels.hf import llama
from jaxmodels.hf.table import Format, Settings, Weight
from jaxmodels.models.mixtral import MixtralConfig


def config(s: Settings) -> MixtralConfig:
    fields = llama.common(s)
    if fields.pop("rope_scaling", None) is not None:
        s.refused.append('rope_type "llama3" (computed here: "default")')
    fields |= {
        "experts": s.whole("num_local_experts", 8),
        "experts_per_token": s.whole("num_experts_per_tok", 2),
        "balance_loss": s.number("router_aux_loss_coef", 0.001),
    }
    s.training("router_jitter_noise", 0.0, 0.0)
    s.check()
    return MixtralConfig(**fields)


def describe(c: MixtralConfig) -> dict[str, Any]:
    return {
        **llama.described(c, "mixtral", "MixtralForCausalLM"),
        "sliding_window": c.window,
        "num_local_experts": c.experts,
        "num_experts_per_tok": c.experts_per_token,
        "router_aux_loss_coef": c.balance_loss,
    }


def weights(c: MixtralConfig) -> list[Weight]:
    moe = "model.layers.{layer}.block_sparse_moe."
    return [
        *llama.attention(),
        Weight(moe + "gate.weight", "layers/moe/router/w", "e d -> d e"),
        Weight(moe + "experts.{expert}.w1.weight", "layers/moe/gate/w", "f d -> d f"),
        Weight(moe + "experts.{expert}.w3.weight", "layers/moe/up/w", "f d -> d f"),
        Weight(moe + "experts.{expert}.w2.weight", "layers/moe/down/w", "d f -> f d"),
    ]


FORMAT = Format(
    family="mixtral",
    config=config,
    describe=describe,
    weights=weights,
    names={"num_experts": "num_local_experts"},
    prefix="model.",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    skipped=(r"rotary_emb\.inv_freq$",),
)
