"""SegFormer with its decoder."""

from __future__ import annotations

from typing import Any

from jaxmodels.hf.table import Format, Settings, Weight, block, classes, labels, side
from jaxmodels.models.segformer import SegFormerConfig


def config(s: Settings) -> SegFormerConfig:
    s.only("hidden_act", "gelu")
    s.only("reshape_last_stage", True)
    s.training("hidden_dropout_prob", 0.0, 0.0)
    s.training("attention_probs_dropout_prob", 0.0, 0.0)
    ratios = s.several("mlp_ratios", int, (4, 4, 4, 4))
    if len(set(ratios)) > 1:
        s.refused.append(f"mlp_ratios {list(ratios)} (computed here: all the same)")
    fields = {
        "input_shape": (*s.pair("image_size", 512), s.whole("num_channels", 3)),
        "classes": classes(s),
        "depths": s.several("depths", int, (2, 2, 2, 2)),
        "widths": s.several("hidden_sizes", int, (32, 64, 160, 256)),
        "heads": s.several("num_attention_heads", int, (1, 2, 5, 8)),
        "reductions": s.several("sr_ratios", int, (8, 4, 2, 1)),
        "windows": s.several("patch_sizes", int, (7, 3, 3, 3)),
        "strides": s.several("strides", int, (4, 2, 2, 2)),
        "mlp_ratio": ratios[0],
        "decoder_width": s.whole("decoder_hidden_size", 256),
        "dropout": s.number("classifier_dropout_prob", 0.1),
        "stochastic_depth": s.number("drop_path_rate", 0.1),
    }
    if s.whole("num_encoder_blocks", 4) != len(fields["depths"]):
        s.refused.append(f"num_encoder_blocks {s.values.get('num_encoder_blocks')} with {len(fields['depths'])} depths")
    s.check()
    return SegFormerConfig(**fields)


def describe(c: SegFormerConfig) -> dict[str, Any]:
    return {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "hidden_act": "gelu",
        "reshape_last_stage": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": side(c.input_shape),
        "num_channels": c.input_shape[2],
        "num_encoder_blocks": len(c.depths),
        "depths": list(c.depths),
        "hidden_sizes": list(c.widths),
        "num_attention_heads": list(c.heads),
        "sr_ratios": list(c.reductions),
        "patch_sizes": list(c.windows),
        "strides": list(c.strides),
        "mlp_ratios": [c.mlp_ratio] * len(c.depths),
        "decoder_hidden_size": c.decoder_width,
        "classifier_dropout_prob": c.dropout,
        "drop_path_rate": c.stochastic_depth,
        **labels(c.classes),
    }


def norm(theirs: str, ours: str) -> list[Weight]:
    """Return the rows of a normalization."""
    return [Weight(theirs + ".weight", ours + "/scale"), Weight(theirs + ".bias", ours + "/bias")]


def stage(i: int) -> list[Weight]:
    """Return the rows of a stage."""
    e, h = "segformer.encoder.", f"segformer.encoder.block.{i}.{{layer}}."
    ours, inside = f"stage{i}/", f"stage{i}/layers/"
    merge, mix = h + "attention.self.", h + "mlp.dwconv.dwconv."
    return [
        Weight(f"{e}patch_embeddings.{i}.proj.weight", ours + "patches/w", "o i h w -> h w i o"),
        Weight(f"{e}patch_embeddings.{i}.proj.bias", ours + "patches/b"),
        *norm(f"{e}patch_embeddings.{i}.layer_norm", ours + "patches_norm"),
        *block(
            inside,
            q=h + "attention.self.query",
            k=h + "attention.self.key",
            v=h + "attention.self.value",
            o=h + "attention.output.dense",
            attn_norm=h + "layer_norm_1",
            up=h + "mlp.dense1",
            down=h + "mlp.dense2",
            mlp_norm=h + "layer_norm_2",
        ),
        Weight(merge + "sr.weight", inside + "merge/w", "o i h w -> h w i o"),
        Weight(merge + "sr.bias", inside + "merge/b"),
        *norm(merge + "layer_norm", inside + "merge_norm"),
        Weight(mix + "weight", inside + "mlp/mix/w", "c 1 h w -> h w c"),
        Weight(mix + "bias", inside + "mlp/mix/b"),
        *norm(f"{e}layer_norm.{i}", ours + "norm"),
    ]


def weights(c: SegFormerConfig) -> list[Weight]:
    stages, d = range(len(c.depths)), "decode_head."
    rows = [row for i in stages for row in stage(i)]
    for i in stages:
        rows.append(Weight(f"{d}linear_c.{i}.proj.weight", f"decode{i}/w", "o i -> i o"))
        rows.append(Weight(f"{d}linear_c.{i}.proj.bias", f"decode{i}/b"))
    parts = tuple(f"fuse{i}/w" for i in reversed(stages))  # they join the last stage first
    return [
        *rows,
        Weight(d + "linear_fuse.weight", parts, "o (n i) 1 1 -> n i o"),
        *norm(d + "batch_norm", "fuse_norm"),
        Weight(d + "batch_norm.running_mean", "stats/fuse_norm/mean"),
        Weight(d + "batch_norm.running_var", "stats/fuse_norm/var"),
        Weight(d + "classifier.weight", "head/w", "o i 1 1 -> i o"),
        Weight(d + "classifier.bias", "head/b"),
    ]


FORMAT = Format(
    family="segformer",
    config=config,
    describe=describe,
    weights=weights,
    prefix="segformer.",
    skipped=(r"num_batches_tracked$",),
    counters={"running_var": "num_batches_tracked"},
    task=lambda config: "segmentation",
)
