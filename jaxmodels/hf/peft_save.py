"""Write an adapter in PEFT's format."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.compress.adapters import AdapterConfig
from jaxmodels.errors import UserError
from jaxmodels.hf import files
from jaxmodels.hf.load import listed
from jaxmodels.hf.peft import CONFIG, HASH, LENGTH, ROOT, WEIGHTS, Modules, Place
from jaxmodels.models.adapted import Factors, sides
from jaxmodels.models.coded import value

TASKS = {"continuation": "CAUSAL_LM", "class": "SEQ_CLS", "classes": "SEQ_CLS", "translation": "SEQ_2_SEQ_LM"}
"""PEFT's `task_type` for what a task's model answers, of models that read text; others have none."""


class Written(NamedTuple):
    """The factors of one of their modules."""

    a: np.ndarray
    b: np.ndarray
    length: np.ndarray | None
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


def check(config: Any, chosen: Sequence[str], full: Sequence[str]) -> Modules:
    """Return what of a model PEFT can adapt.

    Raises:
        UserError: transformers has no such model, or parameters with factors, or trained ones, are none of its layers.
    """
    modules = Modules.of(config)
    able = {path for place in modules.places.values() for path in place.slot.weight.paths}
    if wrong := [path for path in chosen if path not in able]:
        raise UserError(
            f"got factors of {listed(wrong)}, to which PEFT's format gives none (it has those of layers, and of tables "
            f"that are no output layer too), expected some of {listed(sorted(able))}, "
            "try --format huggingface, which merges them"
        )
    known = {path for slot in modules.slots.values() for path in slot.weight.paths if "." in slot.name}
    if wrong := [path for path in full if path not in known]:
        raise UserError(f"got trained {listed(wrong)}, which transformers does not have, try --format huggingface")
    whole = {slot.name.rpartition(".")[0] for slot in modules.slots.values() if {*full} & {*slot.weight.paths}}
    adapted = [place.module for place in modules.places.values() if {*chosen} & {*place.slot.weight.paths}]
    # peft leaves out the factors of modules that it saves, and of what is below them
    if both := [name for name in adapted if any(f"{name}.".startswith(f"{each}.") for each in whole)]:
        raise UserError(
            f"got {listed(both)} with factors and with parameters trained themselves, of which PEFT's format has one "
            "or the other, try --format huggingface, which merges them"
        )
    return modules


def write(
    directory: Path,
    modules: Modules,
    section: AdapterConfig,
    leaves: Mapping[str, Any],
    base: Mapping[str, np.ndarray],
    named: tuple[str, str],
    answers: str = "",
) -> None:
    """Write an adapter's config and weights.

    `leaves` are its factors and trained parameters by path, `base` all parameters beside and below them, and `named`
    the base's name and hash.
    """
    written = {
        module: found for module, place in modules.places.items() if (found := joined(modules, place, leaves, base))
    }
    tensors: dict[str, np.ndarray] = {}
    for module, found in written.items():
        place = modules.places[module]
        tensors |= {place.name(place.parts[0]): found.a, place.name(place.parts[1]): found.b}
        if found.length is not None:
            tensors[place.name(LENGTH)] = found.length
    whole = trained_modules(modules, leaves)
    every = {**base, **{path: leaf for path, leaf in leaves.items() if not isinstance(leaf, Factors)}}
    for name, slot in modules.slots.items():
        if name.rpartition(".")[0] in whole:
            own = {path: np.asarray(value(every[path])) for path in slot.weight.paths}
            tensors[ROOT + modules.live(name)] = np.ascontiguousarray(slot.theirs(own))
    names = sorted(tensors)
    shapes = {name: tensors[name].shape for name in names}
    for _ in files.write(directory / WEIGHTS, shapes, (tensors[name] for name in names), metadata={HASH: named[1]}):
        pass
    text = json.dumps(settings(modules, section, written, whole, named[0], answers), indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n")


def joined(modules: Modules, place: Place, leaves: Mapping[str, Any], base: Mapping[str, np.ndarray]) -> Written | None:
    """Join the factors of our leaves in one of their modules; None if there are none.

    Leaves of one of their tensors share an A. Where ours differ, A holds all of them one below the other, and B has
    zeros where a leaf does not take part: the same product, of the sum of the ranks.
    """
    index, paths = place.slot.index, place.slot.weight.paths
    found = {path: leaves[path] for path in paths if isinstance(leaves.get(path), Factors)}
    if not found:
        return None
    first = next(iter(found.values()))
    scale = first.scale
    a, b = {}, {}
    for path, each in found.items():
        a[path], b[path] = trimmed(np.asarray(each.a)[index], np.asarray(each.b)[index])
        b[path] = b[path] * np.float32(each.scale / scale)
    length = None
    if first.magnitude is not None:
        own = (
            np.asarray(found[path].magnitude)[index]
            if path in found
            else lengths(modules, path, np.asarray(value(base[path])))[index]
            for path in paths
        )
        length = place.length_of(list(own))
    shared = next(iter(a.values()))
    if len(found) < len(paths) or not all(np.array_equal(shared, each) for each in a.values()):
        shared = np.concatenate([*a.values()], -1)
        ranks = np.cumsum([0, *(each.shape[-1] for each in a.values())])
        wide = {}
        shape = next(iter(b.values())).shape[1:]
        for path in paths:
            wide[path] = np.zeros((shared.shape[-1], *shape), np.float32)
            if path in b:
                at = [*b].index(path)
                wide[path][ranks[at] : ranks[at + 1]] = b[path]
        b = wide
    theirs = place.theirs(shared, [b[path] for path in paths])
    return Written(np.ascontiguousarray(theirs[0]), np.ascontiguousarray(theirs[1]), length, scale)


def trimmed(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out the last ranks that are 0 in both factors, of a layer whose rank is below that of its stack."""
    used = a.reshape(-1, a.shape[-1]).any(0) | b.reshape(len(b), -1).any(1)
    rank = max(1, int(np.max(np.nonzero(used)[0], initial=-1)) + 1)
    return a[..., :rank], b[:rank]


def lengths(modules: Modules, path: str, w: np.ndarray) -> np.ndarray:
    """Return the lengths of the outputs of a parameter that has no factors."""
    axes = modules.axes[path]
    first, middle = sides(axes, axes.kind)
    return np.sqrt(np.square(np.asarray(w, np.float32)).sum(tuple(range(first, middle))))


def trained_modules(modules: Modules, leaves: Mapping[str, Any]) -> list[str]:
    """Return their modules of which a parameter is trained itself."""
    own = {path for path, leaf in leaves.items() if not isinstance(leaf, Factors)}
    found = (slot.name.rpartition(".")[0] for slot in modules.slots.values() if own & {*slot.weight.paths})
    return list(dict.fromkeys(found))


def settings(
    modules: Modules,
    section: AdapterConfig,
    written: Mapping[str, Written],
    whole: Sequence[str],
    name: str,
    answers: str,
) -> dict[str, Any]:
    """Return adapter_config.json: the ranks and alphas of most modules, and those of the others by name."""

    def alpha(each: Written) -> float:
        return each.scale * (math.sqrt(each.rank) if section.stabilized else each.rank)

    live = {modules.live(module): each for module, each in written.items()}
    rank = collections.Counter(each.rank for each in written.values()).most_common(1)[0][0]
    usual = collections.Counter(alpha(each) for each in written.values()).most_common(1)[0][0]
    text = modules.form.family != "vit" and any(each.kind == "embedding" for each in modules.axes.values())
    return {
        "peft_type": "LORA",
        "task_type": TASKS.get(answers) if text else None,
        "base_model_name_or_path": name,
        "bias": "none",
        "fan_in_fan_out": any(modules.places[module].turned for module in written),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(usual) if float(usual).is_integer() else usual,
        "rank_pattern": {module: each.rank for module, each in live.items() if each.rank != rank},
        "alpha_pattern": {
            modules.live(module): alpha(each) for module, each in written.items() if alpha(each) != usual
        },
        "lora_dropout": 0.0,
        "target_modules": suffixes([*live], [*map(modules.live, modules.places)]),
        "modules_to_save": [*map(modules.live, whole)] or None,
        "use_dora": section.magnitudes,
        "use_rslora": section.stabilized,
    }


def suffixes(chosen: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return the shortest ends of modules' names that are of the chosen modules alone."""
    found: list[str] = []
    for module in chosen:
        parts = module.split(".")
        ends = (".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1))
        others = [other for other in every if other not in chosen]
        found.append(next(end for end in ends if not any(f".{other}".endswith("." + end) for other in others)))
    return list(dict.fromkeys(found))
