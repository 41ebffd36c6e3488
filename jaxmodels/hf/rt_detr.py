"""RT-DETR with the ResNet-D of transformers."""

from __future__ import annotations

from typing import Any

from jaxmodels.hf import resnet
from jaxmodels.hf.detr import attention, linear
from jaxmodels.hf.table import Format, Settings, Weight, block, classes, labels, side
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.models.rt_detr import BLOCKS, STRIDES, RTDETRConfig

SIZES = {"layer_norm_eps": 1e-5, "batch_norm_eps": 1e-5, "positional_encoding_temperature": 10_000}


def config(s: Settings) -> RTDETRConfig:
    for name, value in SIZES.items():
        if s.number(name, value) != value:
            s.refused.append(f"{name} {s.get(name):g} (computed here: {value:g})")
    s.only("encoder_activation_function", "gelu")
    s.only("activation_function", "silu")
    s.only("decoder_activation_function", "relu")
    s.only("normalize_before", False)
    s.only("learn_initial_query", False)
    s.only("with_box_refine", True)
    if (at := [*s.several("encode_proj_layers", int, (2,))]) != [2]:
        s.refused.append(f"encode_proj_layers {at} (computed here: attention on the last features)")
    if (strides := s.several("feat_strides", int, STRIDES)) != STRIDES or s.whole("num_feature_levels", 3) != 3:
        s.refused.append(f"feat_strides {[*strides]} (computed here: {[*STRIDES]})")
    width, mlp, heads = s.whole("d_model", 256), s.whole("encoder_ffn_dim", 1024), s.whole("encoder_attention_heads", 8)
    same = {"encoder_hidden_dim": (256, width), "decoder_ffn_dim": (1024, mlp), "decoder_attention_heads": (8, heads)}
    for name, (default, own) in same.items():
        if s.whole(name, default) != own:
            s.refused.append(f"{name} {s.whole(name, default)} (computed here: {own}, one size of both stacks)")
    dropout = s.number("dropout", 0.0)
    s.training("attention_dropout", 0.0, dropout)
    s.training("activation_dropout", 0.0, dropout)
    inner = s.section("backbone_config")
    inner.only("model_type", "rt_detr_resnet")
    size = s.values.get("image_size")
    fields = {
        **resnet.sizes(inner),
        "input_shape": (*(s.pair("image_size", 640) if size else RTDETRConfig.input_shape[:2]), 3),
        "classes": classes(s),
        "queries": s.whole("num_queries", 300),
        "frozen": s.flag("freeze_backbone_batch_norms", True),
        "layers": s.whole("encoder_layers", 1),
        "decoder_layers": s.whole("decoder_layers", 6),
        "heads": heads,
        "width": width,
        "mlp_width": mlp,
        "expansion": s.number("hidden_expansion", 1.0),
        "points": s.whole("decoder_n_points", 4),
        "dropout": dropout,
    }
    s.check()
    return RTDETRConfig(**fields)


def describe(c: RTDETRConfig) -> dict[str, Any]:
    body = {**resnet.body(c.backbone), "model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}
    return {
        "architectures": ["RTDetrForObjectDetection"],
        "model_type": "rt_detr",
        "backbone_config": body,
        "freeze_backbone_batch_norms": c.frozen,
        "image_size": side(c.input_shape),
        "encoder_in_channels": list(c.widths[1:]),
        "decoder_in_channels": [c.width] * len(STRIDES),
        "encoder_hidden_dim": c.width,
        "d_model": c.width,
        "encoder_layers": c.layers,
        "decoder_layers": c.decoder_layers,
        "encoder_attention_heads": c.heads,
        "decoder_attention_heads": c.heads,
        "encoder_ffn_dim": c.mlp_width,
        "decoder_ffn_dim": c.mlp_width,
        "hidden_expansion": c.expansion,
        "decoder_n_points": c.points,
        "num_queries": c.queries,
        "num_denoising": 0,
        "dropout": c.dropout,
        "attention_dropout": c.dropout,
        "activation_dropout": c.dropout,
        **labels(c.classes),
    }


def unit(convolution: str, norm: str, ours: str) -> list[Weight]:
    """Return the rows of a convolution and its normalization."""
    return [
        Weight(convolution + ".weight", ours + "/conv/w", "o i h w -> h w i o"),
        Weight(norm + ".weight", ours + "/norm/scale"),
        Weight(norm + ".bias", ours + "/norm/bias"),
        Weight(norm + ".running_mean", f"stats/{ours}/norm/mean"),
        Weight(norm + ".running_var", f"stats/{ours}/norm/var"),
    ]


def joint(theirs: str, ours: str) -> list[Weight]:
    """Return the rows of a joint of the pyramid."""
    parts = {"conv1": "through", "conv2": "past", "conv3": "joined"}
    parts |= {f"bottlenecks.{i}.conv1": f"wide{i}" for i in range(BLOCKS)}
    parts |= {f"bottlenecks.{i}.conv2": f"narrow{i}" for i in range(BLOCKS)}
    found = [unit(f"{theirs}.{their}.conv", f"{theirs}.{their}.norm", f"{ours}/{own}") for their, own in parts.items()]
    return [row for rows in found for row in rows]


def hidden(theirs: str, ours: str) -> list[Weight]:
    """Return the rows of an MLP and the norm behind it."""
    return block(ours + "/", up=theirs + "fc1", down=theirs + "fc2", mlp_norm=theirs + "final_layer_norm")


def norm(theirs: str, ours: str) -> list[Weight]:
    return [Weight(theirs + ".weight", ours + "/scale"), Weight(theirs + ".bias", ours + "/bias")]


def deformable(theirs: str, ours: str) -> list[Weight]:
    """Return the rows of attention to places around boxes."""
    parts = {
        "sampling_offsets": ("offsets", "(h n p x) d -> d h n p x", "(h n p x) -> h n p x"),
        "attention_weights": ("weights", "(h n) d -> d h n", "(h n) -> h n"),
        "value_proj": ("values", "(h k) d -> d h k", "(h k) -> h k"),
        "output_proj": ("output", "d (h k) -> h k d", ""),
    }
    rows = []
    for their, (own, w, b) in parts.items():
        rows.append(Weight(f"{theirs}.{their}.weight", f"{ours}/{own}/w", w))
        rows.append(Weight(f"{theirs}.{their}.bias", f"{ours}/{own}/b", b))
    return rows


def boxes(theirs: str, ours: str) -> list[Weight]:
    return [row for i in range(3) for row in linear(f"{theirs}.layers.{i}", f"{ours}/{i}")]


def body(c: ResNetConfig) -> list[Weight]:
    """Return the rows of the ResNet-D, whose stem has three convolutions, and whose shortcuts pool first."""
    theirs, rows = "model.backbone.model.", []
    for row in resnet.stages(c, theirs, "backbone/"):
        if ".embedder." in row.theirs:
            for i in range(3):
                name = row.theirs.replace("embedder.embedder.", f"embedder.embedder.{i}.")
                rows.append(Weight(name, str(row.ours).replace("/stem/", f"/stem/{i}/"), row.pattern))
        else:
            pooled = ".shortcut." in row.theirs and ".stages.0." not in row.theirs
            name = row.theirs.replace(".shortcut.", ".shortcut.1.") if pooled else row.theirs
            rows.append(Weight(name, row.ours, row.pattern))
    return rows


def weights(c: RTDETRConfig) -> list[Weight]:
    rows, encoder, decoder = body(c.backbone), "model.encoder.", "model.decoder."
    for i, s in enumerate(STRIDES):
        for theirs, ours in (("model.encoder_input_proj", "project"), ("model.decoder_input_proj", "memory")):
            rows += unit(f"{theirs}.{i}.0", f"{theirs}.{i}.1", f"{ours}{s}")
    for i in range(c.layers):
        h = f"{encoder}encoder.0.layers.{i}."
        rows += attention(h + "self_attn", f"mixer{i}/within/attn", h + "self_attn_layer_norm")
        rows += hidden(h, f"mixer{i}/hidden")
    for i in range(len(STRIDES) - 1):
        for theirs, ours in (("lateral_convs", "lateral"), ("downsample_convs", "halved")):
            rows += unit(f"{encoder}{theirs}.{i}.conv", f"{encoder}{theirs}.{i}.norm", f"pyramid/{ours}{i}")
        rows += joint(f"{encoder}fpn_blocks.{i}", f"pyramid/down{i}")
        rows += joint(f"{encoder}pan_blocks.{i}", f"pyramid/up{i}")
    rows += [*linear("model.enc_output.0", "candidates"), *norm("model.enc_output.1", "candidates_norm")]
    rows += [*linear("model.enc_score_head", "class"), *boxes("model.enc_bbox_head", "box")]
    for i in range(2):
        rows += linear(f"{decoder}query_pos_head.layers.{i}", f"where/{i}")
    for i in range(c.decoder_layers):
        h = f"{decoder}layers.{i}."
        rows += attention(h + "self_attn", f"block{i}/within/attn", h + "self_attn_layer_norm")
        rows += deformable(h + "encoder_attn", f"block{i}/cross")
        rows += norm(h + "encoder_attn_layer_norm", f"block{i}/cross_norm")
        rows += hidden(h, f"block{i}/hidden")
        rows += linear(f"{decoder}class_embed.{i}", f"class{i}")
        rows += boxes(f"{decoder}bbox_embed.{i}", f"box{i}")
    return rows


FORMAT = Format(
    family="rt_detr",
    config=config,
    describe=describe,
    weights=weights,
    names={"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"},
    prefix="model.",
    # what noisy objects are embedded by in training
    skipped=(r"num_batches_tracked$", r"^model\.denoising_class_embed\.weight$"),
    # not of the ResNet, whose normalizations are frozen
    counters={f"{end}.running_var": f"{end}.num_batches_tracked" for end in (".norm", ".1")},
    task=lambda config: "set_detection",
)
