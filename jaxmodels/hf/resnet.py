"""ResNet v1.5."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight, classes, classifies, labels, side
from jaxmodels.models.resnet import ResNetConfig


def config(s: Settings) -> ResNetConfig:
    fields = sizes(s)
    fields |= {
        "input_shape": (*s.pair("image_size", 224), s.whole("num_channels", 3)),
        "classes": classes(s),
    }
    s.check()
    return ResNetConfig(**fields)


def sizes(s: Settings) -> dict[str, Any]:
    """Return our fields of the stem and the stages."""
    kind = s.only("layer_type", "bottleneck", "basic")
    s.only("hidden_act", "relu")
    s.only("downsample_in_first_stage", False)
    s.only("downsample_in_bottleneck", False)
    fields = {
        "depths": s.several("depths", int, (3, 4, 6, 3)),
        "widths": s.several("hidden_sizes", int, (256, 512, 1024, 2048)),
        "bottleneck": kind == "bottleneck",
        "stem_width": s.whole("embedding_size", 64),
    }
    if len(fields["depths"]) != len(fields["widths"]):
        s.refused.append(f"{len(fields['depths'])} depths and {len(fields['widths'])} hidden_sizes (expected: as many)")
    return fields


def describe(c: ResNetConfig) -> dict[str, Any]:
    if c.stem != "imagenet" or c.variant != "b":
        message = f"stem {c.stem!r} and variant {c.variant!r}"
        raise UserError(
            f"got a ResNet with {message}, which transformers does not have, expected stem imagenet, variant b"
        )
    return {
        "architectures": ["ResNetForImageClassification"],
        **body(c),
        "image_size": side(c.input_shape),
        **labels(c.classes),
    }


def body(c: ResNetConfig) -> dict[str, Any]:
    """Return the settings of the stem and the stages."""
    return {
        "model_type": "resnet",
        "layer_type": "bottleneck" if c.bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "num_channels": c.input_shape[2],
        "depths": list(c.depths),
        "hidden_sizes": list(c.widths),
        "embedding_size": c.stem_width,
    }


def unit(theirs: str, ours: str, frozen: bool = False) -> list[Weight]:
    """Return the rows of a convolution and its normalization, of which all are constants where it is frozen."""
    learned = f"stats/{ours}" if frozen else ours
    return [
        Weight(theirs + "convolution.weight", ours + "/conv/w", "o i h w -> h w i o"),
        Weight(theirs + "normalization.weight", learned + "/norm/scale"),
        Weight(theirs + "normalization.bias", learned + "/norm/bias"),
        Weight(theirs + "normalization.running_mean", f"stats/{ours}/norm/mean"),
        Weight(theirs + "normalization.running_var", f"stats/{ours}/norm/var"),
    ]


def stages(c: ResNetConfig, theirs: str = "resnet.", ours: str = "") -> list[Weight]:
    """Return the rows of the stem and the stages."""
    rows = unit(theirs + "embedder.embedder.", ours + "stem", c.frozen)
    for i, depth in enumerate(c.depths):
        for j in range(depth):
            their, own = f"{theirs}encoder.stages.{i}.layers.{j}.", f"{ours}stages/{i}/{j}/"
            for n in range(3 if c.bottleneck else 2):
                rows += unit(f"{their}layer.{n}.", f"{own}unit{n}", c.frozen)
            rows += unit(their + "shortcut.", own + "shortcut", c.frozen)
    return rows


def weights(c: ResNetConfig) -> list[Weight]:
    return [*stages(c), Weight("classifier.1.weight", "head/w", "c d -> d c"), Weight("classifier.1.bias", "head/b")]


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
