"""wav2vec 2.0 with a head for CTC."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight, block
from jaxmodels.models.wav2vec2 import Wav2Vec2Config

_DROPOUTS = ("attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop")
"""Shares that differ in transformers, and are one here; with its defaults."""
_USUAL = (0.1, 0.1, 0.0, 0.1, 0.1)


def config(s: Settings) -> Wav2Vec2Config:
    named = s.several("architectures", str, ["Wav2Vec2ForCTC"])
    # those without a head for CTC are where training begins, with init.fresh head/*
    known = ("Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining", "Wav2Vec2Model")
    Settings({"architectures": named[0]}, s.where, s).only("architectures", *known)
    s.only("hidden_act", "gelu")
    s.only("feat_extract_activation", "gelu")
    s.only("add_adapter", False)
    s.only("adapter_attn_dim", None)
    s.only("position_embeddings_type", "relative_conv", None)
    dropout = s.number("hidden_dropout", 0.1)
    for name, usual in zip(_DROPOUTS, _USUAL, strict=True):
        s.training(name, usual, 0.0 if name == "layerdrop" else dropout)
    masks = s.flag("apply_spec_augment", True)
    fields = {
        "vocab_size": s.whole("vocab_size", 32),
        "conv_widths": s.several("conv_dim", int, (512,) * 7),
        "conv_windows": s.several("conv_kernel", int, (10, 3, 3, 3, 3, 2, 2)),
        "conv_strides": s.several("conv_stride", int, (5, 2, 2, 2, 2, 2, 2)),
        "conv_norm": s.only("feat_extract_norm", "group", "layer"),
        "conv_bias": s.flag("conv_bias", False),
        "layers": s.whole("num_hidden_layers", 12),
        "heads": s.whole("num_attention_heads", 12),
        "width": s.whole("hidden_size", 768),
        "mlp_width": s.whole("intermediate_size", 3072),
        "norm": "pre" if s.flag("do_stable_layer_norm", False) else "post",
        "position_window": s.whole("num_conv_pos_embeddings", 128),
        "position_groups": s.whole("num_conv_pos_embedding_groups", 16),
        "norm_eps": s.number("layer_norm_eps", 1e-5),
        "dropout": dropout,
        "mask_time": s.number("mask_time_prob", 0.05) if masks else 0.0,
        "mask_time_span": s.whole("mask_time_length", 10),
        "mask_bands": s.number("mask_feature_prob", 0.0) if masks else 0.0,
        "mask_bands_span": s.whole("mask_feature_length", 10),
    }
    s.check()
    return Wav2Vec2Config(**fields)


def describe(c: Wav2Vec2Config) -> dict[str, Any]:
    if c.mels or c.sample_rate != 16000:
        raise UserError(
            f"got a wav2vec 2.0 with mels {c.mels} and sample_rate {c.sample_rate}, which transformers does not have, "
            "expected one that reads the waveform at 16,000 Hz, try --model.mels 0 --model.sample-rate 16000"
        )
    return {
        "architectures": ["Wav2Vec2ForCTC"],
        "model_type": "wav2vec2",
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "vocab_size": c.vocab_size,
        "num_feat_extract_layers": len(c.conv_widths),
        "conv_dim": list(c.conv_widths),
        "conv_kernel": list(c.conv_windows),
        "conv_stride": list(c.conv_strides),
        "feat_extract_norm": c.conv_norm,
        "conv_bias": c.conv_bias,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "do_stable_layer_norm": c.norm == "pre",
        "num_conv_pos_embeddings": c.position_window,
        "num_conv_pos_embedding_groups": c.position_groups,
        "layer_norm_eps": c.norm_eps,
        "hidden_dropout": c.dropout,
        **{name: 0.0 if name == "layerdrop" else c.dropout for name in _DROPOUTS},
        # without either there is no vector in the place of what is masked, which is here always
        "apply_spec_augment": bool(c.mask_time or c.mask_bands),
        "mask_time_prob": c.mask_time or 0.05,
        "mask_time_length": c.mask_time_span,
        "mask_feature_prob": c.mask_bands,
        "mask_feature_length": c.mask_bands_span,
    }


def weights(c: Wav2Vec2Config) -> list[Weight]:
    def norm(theirs: str, ours: str) -> list[Weight]:
        return [Weight(theirs + ".weight", ours + "/scale"), Weight(theirs + ".bias", ours + "/bias")]

    encoder, h = "wav2vec2.encoder.", "wav2vec2.encoder.layers.{layer}."
    rows = [Weight("wav2vec2.masked_spec_embed", "masked")]
    for i in range(len(c.conv_widths)):
        theirs = f"wav2vec2.feature_extractor.conv_layers.{i}."
        rows += [
            Weight(theirs + "conv.weight", f"conv{i}/w", "o i k -> k i o"),
            Weight(theirs + "conv.bias", f"conv{i}/b"),
            *norm(theirs + "layer_norm", f"conv{i}_norm"),
        ]
    positions = encoder + "pos_conv_embed.conv."
    return [
        *rows,
        *norm("wav2vec2.feature_projection.layer_norm", "inputs_norm"),
        Weight("wav2vec2.feature_projection.projection.weight", "inputs/w", "d c -> c d"),
        Weight("wav2vec2.feature_projection.projection.bias", "inputs/b"),
        Weight(positions + "parametrizations.weight.original0", "positions/g", "1 1 k -> k"),
        Weight(positions + "parametrizations.weight.original1", "positions/v", "o i k -> k i o"),
        Weight(positions + "bias", "positions/b"),
        *norm(encoder + "layer_norm", "norm"),
        *block(
            "layers/",
            q=h + "attention.q_proj",
            k=h + "attention.k_proj",
            v=h + "attention.v_proj",
            o=h + "attention.out_proj",
            attn_norm=h + "layer_norm",
            up=h + "feed_forward.intermediate_dense",
            down=h + "feed_forward.output_dense",
            mlp_norm=h + "final_layer_norm",
        ),
        Weight("lm_head.weight", "head/w", "v d -> d v"),
        Weight("lm_head.bias", "head/b"),
    ]


FORMAT = Format(
    family="wav2vec2",
    config=config,
    describe=describe,
    weights=weights,
    prefix="wav2vec2.",
    # of pre-training alone
    skipped=(r"^(wav2vec2\.)?(quantizer|project_hid|project_q)\.",),
    # as torch wrote weight normalization until 2.0
    aliases=(
        (r"conv\.weight_g$", "conv.parametrizations.weight.original0"),
        (r"conv\.weight_v$", "conv.parametrizations.weight.original1"),
    ),
    sounds=lambda config: {"sampling_rate": config.sample_rate, "feature_size": 1, "do_normalize": True},
    task=lambda config: "transcription",
)
