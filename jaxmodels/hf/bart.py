"""BART, which is `models/transformer.py` with the variant bart."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight, block
from jaxmodels.models.transformer import UNUSED, TransformerConfig


def config(s: Settings) -> TransformerConfig:
    s.only("activation_function", "gelu")
    s.only("is_encoder_decoder", True)
    s.only("scale_embedding", False)
    s.only("tie_word_embeddings", True)
    # of the first files, whose code had more kinds of models
    s.only("normalize_before", False)
    s.only("add_final_layer_norm", False)
    s.only("normalize_embedding", True)
    s.only("static_position_embeddings", False)
    s.only("add_bias_logits", False)
    s.only("extra_pos_embeddings", UNUSED)

    def both(name: str, default: int) -> int:
        one, other = (s.whole(f"{stack}_{name}", default) for stack in ("encoder", "decoder"))
        return one if one == other else s.wrong(f"decoder_{name}", other, f"{one}, as in the encoder", default)

    dropout = s.number("dropout", 0.1)
    s.training("attention_dropout", 0.0, dropout)
    s.training("activation_dropout", 0.0, dropout)
    s.training("encoder_layerdrop", 0.0, 0.0)
    s.training("decoder_layerdrop", 0.0, 0.0)
    fields = {
        "vocab_size": s.whole("vocab_size", 50265),
        "context": s.whole("max_position_embeddings", 1024),
        "layers": (layers := s.whole("encoder_layers", 12)),
        "decoder_layers": None if (more := s.whole("decoder_layers", 12)) == layers else more,
        "heads": both("attention_heads", 16),
        "width": s.whole("d_model", 1024),
        "mlp_width": both("ffn_dim", 4096),
        "dropout": dropout,
    }
    s.check()
    return TransformerConfig(variant="bart", activation="exact_gelu", norm_eps=1e-5, **fields)  # type: ignore[arg-type]


def describe(c: TransformerConfig) -> dict[str, Any]:
    own = {
        "norm": "post", "activation": "exact_gelu", "norm_eps": 1e-5, "tied": True, "head_size": c.width // c.heads,
    }  # fmt: skip
    if wrong := [name for name, value in own.items() if getattr(c, name) != value]:
        name = wrong[0]
        raise UserError(
            f"got a BART with {name} {getattr(c, name)!r}, which transformers does not have, expected {own[name]!r}"
        )
    return {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "encoder_layers": c.layers,
        "decoder_layers": c.decoder_layers or c.layers,
        "encoder_attention_heads": c.heads,
        "decoder_attention_heads": c.heads,
        "encoder_ffn_dim": c.mlp_width,
        "decoder_ffn_dim": c.mlp_width,
        "d_model": c.width,
        "activation_function": "gelu",
        "dropout": c.dropout,
        "attention_dropout": c.dropout,
        "activation_dropout": c.dropout,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
    }


def weights(c: TransformerConfig) -> list[Weight]:
    rows = [Weight("model.shared.weight", "embed/w")]
    for stack in ("encoder", "decoder"):
        at, h = f"model.{stack}.", f"model.{stack}.layers.{{layer}}."
        rows += [
            Weight(at + "embed_positions.weight", f"{stack}/positions/w"),
            Weight(at + "layernorm_embedding.weight", f"{stack}/embed_norm/scale"),
            Weight(at + "layernorm_embedding.bias", f"{stack}/embed_norm/bias"),
            *block(
                f"{stack}/layers/",
                **attention(h + "self_attn"),
                attn_norm=h + "self_attn_layer_norm",
                up=h + "fc1",
                down=h + "fc2",
                mlp_norm=h + "final_layer_norm",
            ),
        ]
    at = "model.decoder.layers.{layer}.encoder_attn"
    cross = block("", **attention(at), attn_norm=at + "_layer_norm")
    return rows + [
        Weight(row.theirs, "decoder/layers/" + row.paths[0].replace("attn", "cross", 1), row.pattern) for row in cross
    ]


def attention(theirs: str) -> dict[str, str]:
    return {name: f"{theirs}.{part}_proj" for name, part in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))}


FORMAT = Format(
    family="transformer",
    config=config,
    describe=describe,
    weights=weights,
    names={
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
    },
    prefix="model.",
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    zeros=lambda c: {"final_logits_bias": (1, c.vocab_size)},
    skipped=(r"^model\.(encoder|decoder)\.version$",),
    task=lambda config: "seq2seq",
)
