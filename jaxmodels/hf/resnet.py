"""ResNet v1.5."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight, classes, classifies, labels, side
from jaxmodels.models.resnet import ResNetConfig


def config(s: Settings) -> ResNetConfig:
    kind = s.only("layer_type", "bottleneck", "basic")
    s.only("hidden_act", "relu")
    s.only("downsample_in_first_stage", False)
    s.only("downsample_in_bottleneck", False)
    fields = {
        "input_shape": (*s.pair("image_size", 224), s.whole("num_channels", 3)),
        "classes": classes(s),
        "depths": s.several("depths", int, (3, 4, 6, 3)),
        "widths": s.several("hidden_sizes", int, (256, 512, 1024, 2048)),
        "stem_width": s.whole("embedding_size", 64),
    }
    if len(fields["depths"]) != len(fields["widths"]):
        s.refused.append(f"{len(fields['depths'])} depths and {len(fields['widths'])} hidden_sizes (expected: as many)")
    s.check()
    return ResNetConfig(bottleneck=kind == "bottleneck", **fields)


def describe(c: ResNetConfig) -> dict[str, Any]:
    if c.stem != "imagenet":
        raise UserError(f"got a ResNet with stem {c.stem!r}, which transformers does not have, expected stem imagenet")
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "layer_type": "bottleneck" if c.bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "num_channels": c.input_shape[2],
        "image_size": side(c.input_shape),
        "depths": list(c.depths),
        "hidden_sizes": list(c.widths),
        "embedding_size": c.stem_width,
        **labels(c.classes),
    }


def unit(theirs: str, ours: str) -> list[Weight]:
    """Return the rows of a convolution and its normalization."""
    return [
        Weight(theirs + "convolution.weight", ours + "/conv/w", "o i h w -> h w i o"),
        Weight(theirs + "normalization.weight", ours + "/norm/scale"),
        Weight(theirs + "normalization.bias", ours + "/norm/bias"),
        Weight(theirs + "normalization.running_mean", f"stats/{ours}/norm/mean"),
        Weight(theirs + "normalization.running_var", f"stats/{ours}/norm/var"),
    ]


def weights(c: ResNetConfig) -> list[Weight]:
    rows = unit("resnet.embedder.embedder.", "stem")
    for i, depth in enumerate(c.depths):
        for j in range(depth):
            theirs, ours = f"resnet.encoder.stages.{i}.layers.{j}.", f"stages/{i}/{j}/"
            for n in range(3 if c.bottleneck else 2):
                rows += unit(f"{theirs}layer.{n}.", f"{ours}unit{n}")
            rows += unit(theirs + "shortcut.", ours + "shortcut")
    return [*rows, Weight("classifier.1.weight", "head/w", "c d -> d c"), Weight("classifier.1.bias", "head/b")]


FORMAT = Format(
    family="resnet",
    config=config,
    describe=describe,
    weights=weights,
    prefix="resnet.",
    skipped=(r"num_batches_tracked$",),
    counters={"running_var": "num_batches_tracked"},
    task=classifies,
)
