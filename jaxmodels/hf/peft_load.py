"""Read an adapter in PEFT's format: all that does not fit is named before anything is used."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.compress.adapters import AdapterConfig, DoRA, LoRA
from jaxmodels.data import special
from jaxmodels.errors import UserError
from jaxmodels.fields import shown
from jaxmodels.hf import files
from jaxmodels.hf.load import check_finite, listed
from jaxmodels.hf.peft import CONFIG, HASH, LENGTH, ROOT, WEIGHTS, Modules, Place
from jaxmodels.models.adapted import Factors, sides

log = logging.getLogger("jaxmodels")

ENDINGS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", LENGTH)
OFF = {
    "bias": "none", "lora_bias": False, "layer_replication": None, "megatron_config": None, "use_qalora": False,
    "alora_invocation_tokens": None, "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "velora_config": None, "monteclora_config": None,
}  # fmt: skip
"""Settings that change what an adapter computes, and the value of each by which they do not."""
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""What `init_lora_weights` may be: others, such as pissa, change the base too."""


class Source(NamedTuple):
    """An adapter in PEFT's format that fits a model."""

    section: AdapterConfig
    leaves: dict[str, Any]
    """`Factors` and trained parameters of host memory, by the path below the network."""
    base: str
    """Hash of the base that it was trained beside; empty if it does not say."""
    copies: dict[str, np.ndarray]
    """Copies of the base's tables, which peft writes beside their factors, by path; they must be those of the base."""


class Found(NamedTuple):
    """Factors of one of their modules, as those of one of our leaves."""

    a: np.ndarray
    b: np.ndarray
    length: np.ndarray | None
    scale: float


def read(directory: Path, config: Any) -> Source:
    """Read an adapter of a model of ours.

    Raises:
        UserError: a setting is not computed here, or a tensor is missing, unknown, or of another shape; all are named.
    """
    settings = special.objects(directory / CONFIG)
    kind, stabilized = check_settings(directory, settings)
    if not (directory / WEIGHTS).is_file():
        raise UserError(f"got {directory} without {WEIGHTS}, expected it beside {CONFIG}, try a complete copy")
    try:
        tensors, base = files.header(directory / WEIGHTS), files.metadata(directory / WEIGHTS).get(HASH, "")
    except ValueError as error:
        raise UserError(f"got {directory} with {error}, expected a whole file, try another copy") from None
    modules = Modules.of(config)
    given, whole, copies, problems = sorted_out(modules, tensors)
    named = {modules.canonical(name.removeprefix(ROOT) + ".weight").removesuffix(".weight"): name.removeprefix(ROOT)
             for name in {re.sub(r"\.lora_[^/]*$", "", name) for name in tensors}}  # fmt: skip
    for module, parts in given.items():
        problems += misfits(modules.places[module], parts, rank_of(settings, named[module]), kind is DoRA)
    problems += [
        f"{name} is {list(tensor.shape)}, expected {list(modules.slots[name].shape)}"
        for name, tensor in {**whole, **copies}.items()
        if tensor.shape != modules.slots[name].shape
    ]
    if problems or not given:
        raise UserError(
            f"got an adapter in {directory} that does not fit {type(config).__name__}: "
            f"{'; '.join(problems[:8]) or 'no factors'}; expected lora_A (r, in) and lora_B (out, r) of its layers, as "
            "peft saves them, try the model that it was made for"
        )
    factors: dict[str, dict[tuple[int, ...], Found]] = collections.defaultdict(dict)
    for module, parts in given.items():
        place = modules.places[module]
        arrays = {part: loaded(place.name(part), tensor) for part, tensor in parts.items()}
        pairs = place.ours(*(arrays[part] for part in place.parts))
        lengths = place.lengths_of(arrays[LENGTH]) if LENGTH in arrays else [None] * len(pairs)
        for path, (a, b), length in zip(place.slot.weight.paths, pairs, lengths, strict=True):
            factors[path][place.slot.index] = Found(a, b, length, scale_of(settings, named[module], stabilized))
    section = described(settings, kind, stabilized, factors)
    leaves: dict[str, Any] = {path: stacked(directory, section, modules, path, each) for path, each in factors.items()}
    trained = whole_leaves(directory, modules, whole)
    same = whole_leaves(directory, modules, copies)
    return Source(dataclasses.replace(section, full=tuple(trained)), {**leaves, **trained}, base, same)


def check_settings(directory: Path, settings: Mapping[str, Any]) -> tuple[type[AdapterConfig], bool]:
    """Return the kind of an adapter, and whether its scale is stabilized.

    Raises:
        UserError: names all settings that are not computed here.
    """
    wrong = [
        f"{name} {shown(settings[name])}" for name, off in OFF.items() if settings.get(name, off) not in (off, None)
    ]
    if settings.get("peft_type") != "LORA":
        wrong.insert(0, f"peft_type {shown(settings.get('peft_type'))} (computed here: LORA)")
    start = settings.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in STARTS):
        wrong.append(f"init_lora_weights {shown(start)}, which changes the base too")
    flags = [settings.get(name, False) for name in ("use_dora", "use_rslora")]
    wrong += [
        f"{name} {shown(flag)} (expected: true or false)"
        for name, flag in zip(("use_dora", "use_rslora"), flags, strict=True)
        if not isinstance(flag, bool)
    ]
    for name, whole in (("r", True), ("lora_alpha", False)):
        values = {name: settings.get(name), **patterns(settings, name)}
        wrong += [
            f"{at} {shown(value)} (expected: above 0)" for at, value in values.items() if not _positive(value, whole)
        ]
    if wrong:
        raise UserError(
            f"got {directory / CONFIG} with {'; '.join(wrong)}, expected an adapter that is computed here, "
            "try one of PEFT's LoRA or DoRA without these"
        )
    if dropout := settings.get("lora_dropout"):
        log.warning("%s: lora_dropout %s (computed here, in training alone: 0)", directory / CONFIG, shown(dropout))
    return (DoRA if flags[0] else LoRA), flags[1]


def patterns(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the values of a setting for modules that match a pattern."""
    found = settings.get("rank_pattern" if name == "r" else "alpha_pattern") or {}
    return found if isinstance(found, dict) else {"": found}


def _positive(value: Any, whole: bool) -> bool:
    kinds = (int,) if whole else (int, float)
    return type(value) in kinds and 0 < value < 1e9


def _of(settings: Mapping[str, Any], name: str, module: str) -> Any:
    """Return a module's own value of a setting: that of the first pattern that matches, as in PEFT."""
    for pattern, value in patterns(settings, name).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return settings[name]


def rank_of(settings: Mapping[str, Any], module: str) -> int:
    return _of(settings, "r", module)


def scale_of(settings: Mapping[str, Any], module: str, stabilized: bool) -> float:
    rank = rank_of(settings, module)
    return _of(settings, "lora_alpha", module) / (math.sqrt(rank) if stabilized else rank)


def sorted_out(
    modules: Modules, tensors: Mapping[str, files.Tensor]
) -> tuple[dict[str, dict[str, files.Tensor]], dict[str, files.Tensor], dict[str, files.Tensor], list[str]]:
    """Return the factors by module and part, trained tensors and copies of the base's by name, and what is wrong."""
    given: dict[str, dict[str, files.Tensor]] = collections.defaultdict(dict)
    whole: dict[str, files.Tensor] = {}
    copies: dict[str, files.Tensor] = {}
    unknown, kinds = [], []
    for name, tensor in tensors.items():
        inner, copy = name.removeprefix(ROOT).replace(".base_layer.", "."), ".base_layer." in name
        ending = next((each for each in ENDINGS if inner.endswith("." + each)), "")
        plain = modules.canonical(inner.removesuffix(ending) + "weight" if ending else inner)
        place = modules.places.get(plain.removesuffix(".weight"))
        if tensor.dtype not in files.DTYPES:
            kinds.append(f"{name} is {tensor.dtype}, no number with a fraction")
        if (
            not name.startswith(ROOT)
            or (copy and ending)
            or (ending and (place is None or ending not in (*place.parts, LENGTH)))
        ):
            unknown.append(name)
        elif ending and place is not None:
            given[place.module][ending] = tensor
        elif plain in modules.slots:
            (copies if copy else whole)[plain] = tensor
        else:
            unknown.append(name)
    problem = [f"{listed(unknown)} of no layer here that can have factors"] if unknown else []
    return given, whole, copies, problem + kinds


def misfits(place: Place, parts: Mapping[str, files.Tensor], rank: int, lengths: bool) -> list[str]:
    """Say what is wrong with the factors of a module."""
    expected = place.shapes(rank)
    if not lengths:
        del expected[LENGTH]
    wrong = [f"{place.name(part)} is missing" for part in expected if part not in parts]
    wrong += [f"{place.name(part)} without use_dora" for part in parts if part not in expected]
    return wrong + [
        f"{place.name(part)} is {list(parts[part].shape)}, expected {list(shape)}"
        for part, shape in expected.items()
        if part in parts and parts[part].shape != shape
    ]


def loaded(name: str, tensor: files.Tensor) -> np.ndarray:
    found = tensor.read().astype(np.float32)
    check_finite(name, found)
    return found


def described(
    settings: Mapping[str, Any],
    kind: type[AdapterConfig],
    stabilized: bool,
    factors: Mapping[str, Mapping[tuple[int, ...], Found]],
) -> AdapterConfig:
    """Return an adapter's section: ranks are the largest of a stack, and alphas give the scale of its first layer."""
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    ranks, alphas = [], []
    for path, layers in factors.items():
        most, first = max(each.a.shape[-1] for each in layers.values()), next(iter(layers.values()))
        own = first.scale * (math.sqrt(most) if stabilized else most)
        ranks += [f"{path}={most}"] * (most != rank)
        alphas += [f"{path}={own!r}"] * (not math.isclose(own, alpha))
    return kind(
        targets=tuple(factors), rank=rank, alpha=alpha, stabilized=stabilized, ranks=tuple(ranks), alphas=tuple(alphas)
    )


def stacked(
    directory: Path, section: AdapterConfig, modules: Modules, path: str, layers: Mapping[tuple[int, ...], Found]
) -> Factors:
    """Stack the factors of layers; where a rank is smaller, and in layers without factors, the rest is 0.

    Raises:
        UserError: layers lack the lengths of their outputs.
    """
    axes, shape = modules.axes[path], modules.shapes[path]
    first, middle = sides(axes, axes.kind)
    rank, scale = section.rank_of(path), section.scale_of(path)
    a = np.zeros((*shape[:middle], rank), np.float32)
    b = np.zeros((*shape[:first], rank, *shape[middle:]), np.float32)
    length = np.zeros((*shape[:first], *shape[middle:]), np.float32) if section.magnitudes else None
    every = [*itertools.product(*map(range, shape[:first]))]
    if length is not None and len(layers) < len(every):
        raise UserError(
            f"got an adapter in {directory} of {len(layers)} of {len(every)} layers of {path}, expected all of them "
            "with use_dora, try an adapter of all layers"
        )
    for index, found in layers.items():
        own = found.a.shape[-1]
        a[(*index, ..., slice(own))] = found.a
        b[(*index, slice(own))] = found.b * np.float32(found.scale / scale)
        if length is not None:
            length[index] = found.length
    return Factors(a, b, length, scale)


def whole_leaves(directory: Path, modules: Modules, whole: Mapping[str, files.Tensor]) -> dict[str, np.ndarray]:
    """Return parameters that were trained themselves, by path.

    Raises:
        UserError: layers of a stack are missing.
    """
    found: dict[str, np.ndarray] = {}
    for name, tensor in whole.items():
        slot = modules.slots[name]
        for path, view in zip(slot.weight.paths, slot.ours(loaded(name, tensor)), strict=True):
            found.setdefault(path, np.full(modules.shapes[path], np.nan, np.float32))[slot.index] = view
    for path, array in found.items():
        if np.isnan(array).any():
            raise UserError(
                f"got an adapter in {directory} with some layers of {path} alone, expected all, try an adapter of all"
            )
    return found
