"""Convert what is said of how images become inputs, as in preprocessor_config.json, to a run's config and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodels.config import Config
from jaxmodels.data.special import objects
from jaxmodels.data.transforms import CENTER
from jaxmodels.errors import UserError
from jaxmodels.hf.processors import FILE, IMAGES, said_of

# the defaults of transformers' image processor of each family (for ResNet, that of ConvNeXT)
_STANDARD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# what transformers calls ImageNet's standard mean and deviation, 0.5, is the default of both ViT and ConvNeXT
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {**_STANDARD, "resample": 2, "size": 224},
    "resnet": {**_STANDARD, "resample": 3, "size": 384, "crop_pct": CENTER},
    "clip": {**_CLIP, "resample": 3, "size": 224, "do_center_crop": True},
    "segformer": {**_IMAGENET, "resample": 2, "size": 512},
    "detr": {**_IMAGENET, "resample": 2, "size": {"shortest_edge": 800, "longest_edge": 1333}},
    "rt_detr": {"do_normalize": False, "resample": 2, "size": 640},
}
_SQUARE = ("vit", "segformer", "rt_detr")
"""Families for which a size that is one number is that of both sides, and not of the shorter one."""
_PROCESSORS = {
    "segformer": "SegformerImageProcessor",
    "detr": "DetrImageProcessor",
    "rt_detr": "RTDetrImageProcessor",
}
"""transformers' classes that turn outputs into masks or boxes too, by family."""
_BILINEAR = 2
_CROP = 0.08
"""`augment.crop` of a run whose evaluation uses the central 7/8; the value itself matters in training only."""


@dataclass(frozen=True)
class Pixels:
    """How images are turned into a model's inputs."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    central: bool = False
    """Whether the central 7/8 of an image is used instead of all of it."""
    remarks: tuple[str, ...] = ()
    """Differences from what transformers does, a few words each."""

    @property
    def crop(self) -> float | None:
        """The value of the field `augment.crop`."""
        return _CROP if self.central else None


def known(family: str) -> bool:
    """Whether transformers prepares the images of a family's models by such settings."""
    return family in _DEFAULTS


def crops(cfg: Config, family: str) -> bool:
    """Whether a run sees the central 7/8 of an image; a mask is one of all of it, whatever training crops."""
    return cfg.augment.crop is not None and family != "segformer"


def read(directory: Path, family: str, shape: tuple[int, int, int]) -> Pixels:
    """Read how images become inputs of `shape`, from the directory's files or, without any, transformers' defaults.

    Raises:
        UserError: the file is damaged, or its numbers do not fit the model's channels.
    """
    channels, found = shape[-1], said_of(directory, IMAGES)
    path, own = found or (directory / FILE, {})
    # the defaults of a family are for three channels
    unsaid = _DEFAULTS[family] if channels == 3 else {**_DEFAULTS[family], **{k: v[:1] for k, v in _STANDARD.items()}}
    values = {**unsaid, **{name: value for name, value in own.items() if value is not None}}
    factor = 255.0
    if values.get("do_rescale", True):
        factor *= _numbers(path, values, "rescale_factor", 1 / 255, 1, positive=True)[0]
    factor = 1.0 if math.isclose(factor, 1, rel_tol=1e-3) else factor
    mean, std = (0.0,), (1.0,)
    if normal := values.get("do_normalize", True):
        mean = _numbers(path, values, "image_mean", None, channels)
        std = _numbers(path, values, "image_std", None, channels, positive=True)
    if not normal and factor == 1:
        mean, std = (), ()
    size = max(len(mean), len(std))
    mean, std = (tuple(x / factor for x in (row * size if len(row) < size else row)) for row in (mean, std))
    central, remarks = _size(values, found is not None, family, shape)
    if not found:
        message = f"mean {_listed(mean)} and std {_listed(std)} are" if mean else "pixels from 0 to 1 are"
        message += " transformers' defaults"
        return Pixels(mean, std, central, (f"there is no {FILE}: {message}",))
    if values.get("do_resize", True) and values["resample"] != _BILINEAR:
        remarks.append(f"resample {values['resample']} (here images are resized bilinearly, {_BILINEAR})")
    remarks += [f"{name} (not done here)" for name in ("do_pad", "rescale_offset") if values.get(name)]
    return Pixels(mean, std, central, tuple(remarks))


def _size(values: dict[str, Any], there: bool, family: str, shape: tuple[int, int, int]) -> tuple[bool, list[str]]:
    """Return whether the central 7/8 is used, and how resizing and cropping differ from transformers."""
    seen = f"{shape[0]}x{shape[1]}"
    if not there:  # the model determines the size
        return family == "resnet" and shape[0] == shape[1] < 384, []
    if not values.get("do_resize", True):
        return False, [f"do_resize false (here images are resized to {seen})"]
    given = values["size"]
    size = given if isinstance(given, dict) else {"height" if family in _SQUARE else "shortest_edge": given}
    edge = size.get("shortest_edge")
    cut = values.get("crop_size", 224) if values.get("do_center_crop") else None
    cut = cut if isinstance(cut, dict) else {"height": cut, "width": cut}
    whole = {"height": size.get("height"), "width": size.get("width", size.get("height"))}
    warped = edge is None and cut["height"] is None
    if family == "resnet" and edge is not None:
        whole = {"height": edge, "width": edge}
        warped = edge >= 384
        cut = whole
        edge = edge if warped else int(edge / values["crop_pct"])
    final = whole if warped else cut
    if (final["height"], final["width"]) != shape[:2]:
        return False, [f"size {json.dumps(given)}, crop {json.dumps(values.get('crop_size'))} (here {seen})"]
    if warped:
        return False, []
    if family != "segformer" and edge is not None and shape[0] == shape[1] and abs(shape[0] / edge - CENTER) < 0.01:
        return True, []
    of = f"resized to {json.dumps(given)} and its center cut out" if edge != shape[0] else "its central square"
    return False, [f"an image is {of} (here the whole is resized to {seen})"]


def _numbers(
    path: Path, values: dict[str, Any], name: str, default: Any, count: int, *, positive: bool = False
) -> tuple[float, ...]:
    value = values.get(name, default)
    row = value if isinstance(value, list) else [value]
    right = len(row) in (1, count) and all(
        type(x) in (int, float) and math.isfinite(x) and (x > 0 or not positive) for x in row
    )
    if not right:
        raise UserError(
            f"got {path} with {name} {json.dumps(value)[:60]}, expected {'one number' if count == 1 else ''}"
            f"{f'one number or {count}' if count > 1 else ''}{' above 0' if positive else ''}, try a complete copy"
        )
    return tuple(map(float, row))


def _listed(row: tuple[float, ...]) -> str:
    return " ".join(f"{x:.6g}" for x in row)


def flags(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Return the options that set these numbers."""
    if not mean:
        return "no --data.mean and --data.std"
    return f"--data.mean {' '.join(map(str, mean))} --data.std {' '.join(map(str, std))}"


def alike(pixels: Pixels, cfg: Config) -> bool:
    """Whether a run normalizes its pixels in this way."""
    ours, theirs = ((*(x.mean or (0.0,)), *(x.std or (1.0,))) for x in (cfg.data, pixels))
    wide = max(len(ours), len(theirs))
    ours, theirs = (row if len(row) == wide else [x for x in row for _ in range(wide // 2)] for row in (ours, theirs))
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7) for a, b in zip(ours, theirs, strict=True))


def describe(cfg: Config, shape: tuple[int, int, int], family: str = "vit") -> dict[str, Any]:
    """Return the file's settings for a run: what its evaluation does with an image of any size."""
    height, width, channels = shape
    mean, std = (list(x) * (channels if len(x) == 1 else 1) for x in (cfg.data.mean, cfg.data.std))
    settings: dict[str, Any] = {
        "image_processor_type": _PROCESSORS.get(family, "ViTImageProcessor"),
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": bool(mean),
        "image_mean": mean or [0.0] * channels,
        "image_std": std or [1.0] * channels,
    }
    if family in _PROCESSORS:
        settings["do_pad"] = False
    elif channels == 3:
        settings["do_convert_rgb"] = True
    if crops(cfg, family) and height == width:
        settings |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": round(height / CENTER)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    return settings


def names(directory: Path, classes: int) -> tuple[str, ...]:
    """Return the names of classes from config.json's `id2label`, or none if they only number the classes."""
    given = objects(directory / "config.json").get("id2label")
    if not isinstance(given, dict) or {*map(str, given)} != {str(i) for i in range(classes)}:
        return ()
    found = {str(key): str(name) for key, name in given.items()}
    ordered = tuple(found[str(i)] for i in range(classes))
    return () if ordered == tuple(f"LABEL_{i}" for i in range(classes)) else ordered
