"""T5, the one variant of `models/transformer.py` that transformers has."""

from __future__ import annotations

import json
from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight
from jaxmodels.models.transformer import TransformerConfig

ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gated-gelu": "gated_gelu"}
"""Our activation for each `feed_forward_proj`; both GELUs are the tanh form."""
DENSE = {"relu": "relu", "gelu_new": "gelu_new", "gated-gelu": "gelu_new"}
"""The `dense_act_fn` that transformers derives from each `feed_forward_proj`."""
_FARTHEST = 1_000_000  # a table has an entry for each distance up to this one


def config(s: Settings) -> TransformerConfig:
    activation = s.only("feed_forward_proj", *ACTIVATIONS)
    # transformers derives these two from the activation, but what a file says of them counts
    for name, derived in (("is_gated_act", activation == "gated-gelu"), ("dense_act_fn", DENSE[activation])):
        if name in s.values and s.values[name] != derived:
            s.wrong(name, s.values[name], f"{json.dumps(derived)} with feed_forward_proj {json.dumps(activation)}", ...)
    # version 5 of transformers has a setting for scaled features, and ties all weights; before, one setting meant both
    tied = s.flag("scale_decoder_outputs", s.flag("tie_word_embeddings", True))
    if "scale_decoder_outputs" in s.values and s.values["scale_decoder_outputs"] is None:
        tied = False  # as transformers takes null
    if tied:
        s.only("tie_word_embeddings", True)
    s.only("is_encoder_decoder", True)
    if (distance := s.whole("relative_attention_max_distance", 128)) > _FARTHEST:
        s.refused.append(f"relative_attention_max_distance {distance:,} (computed here: at most {_FARTHEST:,})")
        distance = 128
    fields = {
        "vocab_size": s.whole("vocab_size", 32128),
        "layers": (layers := s.whole("num_layers", 6)),
        "decoder_layers": None if (more := s.whole("num_decoder_layers", None)) == layers else more,
        "heads": s.whole("num_heads", 8),
        "width": s.whole("d_model", 512),
        "head_dim": s.whole("d_kv", 64),
        "mlp_width": s.whole("d_ff", 2048),
        "norm_eps": s.number("layer_norm_epsilon", 1e-6),
        "relative_buckets": s.whole("relative_attention_num_buckets", 32),
        "relative_distance": distance,
        "dropout": s.number("dropout_rate", 0.1),
    }
    s.check()
    return TransformerConfig(variant="t5", norm="pre", activation=ACTIVATIONS[activation], tied=tied, **fields)  # type: ignore


def describe(c: TransformerConfig) -> dict[str, Any]:
    if not c.t5 or c.norm != "pre":
        raise UserError(
            f"got a transformer of variant {c.variant!r} and norm {c.norm!r}, which transformers does not have, "
            "expected variant t5 and norm pre"
        )
    (activation,) = (name for name, ours in ACTIVATIONS.items() if ours == c.activation)
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": c.vocab_size,
        "num_layers": c.layers,
        "num_decoder_layers": c.decoder_layers or c.layers,
        "num_heads": c.heads,
        "d_model": c.width,
        "d_kv": c.head_size,
        "d_ff": c.mlp_width,
        "layer_norm_epsilon": c.norm_eps,
        "relative_attention_num_buckets": c.relative_buckets,
        "relative_attention_max_distance": c.relative_distance,
        "dropout_rate": c.dropout,
        "feed_forward_proj": activation,
        "tie_word_embeddings": c.tied,
        "scale_decoder_outputs": c.tied,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def weights(c: TransformerConfig) -> list[Weight]:
    rows = [Weight("shared.weight", "embed/w")]
    for stack, sublayers in (("encoder", ("attn", "mlp")), ("decoder", ("attn", "cross", "mlp"))):
        theirs = {"attn": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
        for i, ours in enumerate(sublayers):
            h, at = f"{stack}.block.{{layer}}.layer.{i}.", f"{stack}/layers/{ours}"
            name = h + theirs[ours]
            rows.append(Weight(h + "layer_norm.weight", at + "_norm/scale"))
            if ours == "mlp":
                gated = c.activation == "gated_gelu"
                rows += [
                    Weight(name + ".wi_0.weight", at + "/gate/w", "f d -> d f"),
                    Weight(name + (".wi_1.weight" if gated else ".wi.weight"), at + "/up/w", "f d -> d f"),
                    Weight(name + ".wo.weight", at + "/down/w", "d f -> f d"),
                ]
            else:
                rows += [Weight(f"{name}.{x}.weight", f"{at}/{x}/w", "(h k) d -> d h k") for x in "qkv"]
                rows.append(Weight(name + ".o.weight", at + "/o/w", "d (h k) -> h k d"))
        first = f"{stack}.block.0.layer.0.SelfAttention."
        rows += [
            Weight(first + "relative_attention_bias.weight", f"{stack}/relative/w"),
            Weight(f"{stack}.final_layer_norm.weight", f"{stack}/norm/scale"),
        ]
    return [*rows, Weight("lm_head.weight", "head/w")]


FORMAT = Format(
    family="transformer",
    config=config,
    describe=describe,
    weights=weights,
    names={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    spare={"lm_head.weight": "shared.weight"},
    # the first T5 was saved with a cross-attention bias that its code never used
    skipped=(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
    task=lambda config: "seq2seq",
)
