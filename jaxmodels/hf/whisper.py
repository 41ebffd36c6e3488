"""Whisper."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight, block
from jaxmodels.models.whisper import WhisperConfig

_DROPOUTS = ("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
"""Shares that differ in transformers, and are one here, or none: that of layers."""


def config(s: Settings) -> WhisperConfig:
    s.only("architectures", ["WhisperForConditionalGeneration"], None)
    s.only("activation_function", "gelu")
    s.only("scale_embedding", False)
    s.only("tie_word_embeddings", True)
    width, layers, heads = s.whole("d_model", 384), s.whole("encoder_layers", 4), s.whole("encoder_attention_heads", 6)
    s.only("decoder_attention_heads", heads)
    mlp_width = s.whole("encoder_ffn_dim", 1536)
    s.only("decoder_ffn_dim", mlp_width)
    dropout = s.number("dropout", 0.0)
    for name in _DROPOUTS:
        s.training(name, 0.0, 0.0 if name.endswith("layerdrop") else dropout)
    if s.flag("apply_spec_augment", False):
        s.remarks.append("apply_spec_augment true (computed here, in training alone: false)")
    fields = {
        "vocab_size": s.whole("vocab_size", 51865),
        "context": s.whole("max_target_positions", 448),
        "mels": s.whole("num_mel_bins", 80),
        "places": s.whole("max_source_positions", 1500),
        "layers": layers,
        "decoder_layers": None if (more := s.whole("decoder_layers", 4)) == layers else more,
        "heads": heads,
        "width": width,
        "mlp_width": None if mlp_width == 4 * width else mlp_width,
        "dropout": dropout,
    }
    s.check()
    return WhisperConfig(**fields)


def describe(c: WhisperConfig) -> dict[str, Any]:
    if c.sample_rate != 16000:
        raise UserError(
            f"got a Whisper with sample_rate {c.sample_rate}, expected 16,000, with which transformers makes its "
            "frames, try --model.sample-rate 16000"
        )
    hidden = c.mlp_width or 4 * c.width
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "vocab_size": c.vocab_size,
        "max_target_positions": c.context,
        "num_mel_bins": c.mels,
        "max_source_positions": c.places,
        "d_model": c.width,
        "encoder_layers": c.layers,
        "decoder_layers": c.decoder_layers or c.layers,
        "encoder_attention_heads": c.heads,
        "decoder_attention_heads": c.heads,
        "encoder_ffn_dim": hidden,
        "decoder_ffn_dim": hidden,
        "dropout": c.dropout,
        **{name: 0.0 if name.endswith("layerdrop") else c.dropout for name in _DROPOUTS},
        # whose defaults are beyond the end of another vocabulary
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def frames(mels: int, rate: int) -> dict[str, Any]:
    """Return the settings with which transformers makes the frames that are made here."""
    return {"feature_size": mels, "sampling_rate": rate, "n_fft": 400, "hop_length": 160, "dither": 0.0}


def encoder(theirs: str, ours: str) -> list[Weight]:
    """Return the rows of the encoder, with what stands before the names of its tensors and the paths of its leaves."""
    rows = []
    for i in (0, 1):
        rows += [
            Weight(f"{theirs}conv{i + 1}.weight", f"{ours}conv{i}/w", "o i k -> k i o"),
            Weight(f"{theirs}conv{i + 1}.bias", f"{ours}conv{i}/b"),
        ]
    return [*rows, Weight(theirs + "embed_positions.weight", ours + "positions"), *_blocks(theirs, ours, "attn")]


def _blocks(theirs: str, ours: str, *attention: str) -> list[Weight]:
    h, names = theirs + "layers.{layer}.", {"attn": "self_attn", "cross": "encoder_attn"}
    rows = []
    for part in attention:
        at = h + names[part]
        projections = block("", **{x: f"{at}.{'out' if x == 'o' else x}_proj" for x in "qkvo"})
        rows += [Weight(r.theirs, f"{ours}layers/{part}{str(r.ours).removeprefix('attn')}", r.pattern)
                 for r in projections if r.ours != "attn/k/b"]  # fmt: skip
        rows += _norm(at + "_layer_norm", f"{ours}layers/{part}_norm")
    mlp = block(f"{ours}layers/", up=h + "fc1", down=h + "fc2", mlp_norm=h + "final_layer_norm")
    return [*rows, *mlp, *_norm(theirs + "layer_norm", ours + "norm")]


def _norm(theirs: str, ours: str) -> list[Weight]:
    return [Weight(theirs + ".weight", ours + "/scale"), Weight(theirs + ".bias", ours + "/bias")]


def weights(c: WhisperConfig) -> list[Weight]:
    return [
        *encoder("model.encoder.", "encoder/"),
        Weight("model.decoder.embed_tokens.weight", "embed/w"),
        Weight("model.decoder.embed_positions.weight", "decoder/positions/w"),
        *_blocks("model.decoder.", "decoder/", "attn", "cross"),
    ]


FORMAT = Format(
    family="whisper",
    config=config,
    describe=describe,
    weights=weights,
    names={
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    },
    prefix="model.",
    copies={"proj_out.weight": "model.decoder.embed_tokens.weight"},
    sounds=lambda config: frames(config.mels, config.sample_rate),
    task=lambda config: "seq2seq",
)
