"""GPT-2."""

from __future__ import annotations

from typing import Any

from jaxmodels.hf.table import Format, Settings, Weight
from jaxmodels.models.gpt2 import GPT2Config


def config(s: Settings) -> GPT2Config:
    s.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    s.only("layer_norm_epsilon", 1e-5)
    s.only("is_causal", True)
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    s.only("tie_word_embeddings", True)
    dropout, embed, attention = (s.number(f"{place}_pdrop", 0.1) for place in ("resid", "embd", "attn"))
    fields = {
        "vocab_size": s.whole("vocab_size", 50257),
        "context": s.whole("n_positions", 1024),
        "layers": s.whole("n_layer", 12),
        "heads": s.whole("n_head", 12),
        "width": s.whole("n_embd", 768),
        "mlp_width": s.whole("n_inner", None),
        "dropout": dropout,
        "embed_dropout": None if embed == dropout else embed,
        "attention_dropout": None if attention == dropout else attention,
    }
    s.check()
    return GPT2Config(**fields)


def describe(c: GPT2Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "vocab_size": c.vocab_size,
        "n_positions": c.context,
        "n_ctx": c.context,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_embd": c.width,
        "n_inner": c.mlp_width,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout if c.embed_dropout is None else c.embed_dropout,
        "attn_pdrop": c.dropout if c.attention_dropout is None else c.attention_dropout,
        "tie_word_embeddings": True,
    }


def weights(c: GPT2Config) -> list[Weight]:
    # linear layers of GPT-2 store weights as (inputs, outputs)
    h, qkv = "transformer.h.{layer}.", ("q", "k", "v")
    return [
        Weight("transformer.wte.weight", "embed/w"),
        Weight("transformer.wpe.weight", "positions/w"),
        Weight(h + "ln_1.weight", "layers/attn_norm/scale"),
        Weight(h + "ln_1.bias", "layers/attn_norm/bias"),
        Weight(h + "attn.c_attn.weight", tuple(f"layers/attn/{x}/w" for x in qkv), "d (n h k) -> n d h k"),
        Weight(h + "attn.c_attn.bias", tuple(f"layers/attn/{x}/b" for x in qkv), "(n h k) -> n h k"),
        Weight(h + "attn.c_proj.weight", "layers/attn/o/w", "(h k) d -> h k d"),
        Weight(h + "attn.c_proj.bias", "layers/attn/o/b"),
        Weight(h + "ln_2.weight", "layers/mlp_norm/scale"),
        Weight(h + "ln_2.bias", "layers/mlp_norm/bias"),
        Weight(h + "mlp.c_fc.weight", "layers/mlp/up/w"),
        Weight(h + "mlp.c_fc.bias", "layers/mlp/up/b"),
        Weight(h + "mlp.c_proj.weight", "layers/mlp/down/w"),
        Weight(h + "mlp.c_proj.bias", "layers/mlp/down/b"),
        Weight("transformer.ln_f.weight", "norm/scale"),
        Weight("transformer.ln_f.bias", "norm/bias"),
    ]


FORMAT = Format(
    family="gpt2",
    config=config,
    describe=describe,
    weights=weights,
    names={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    skipped=(r"\.attn\.(masked_)?bias$",),
)
