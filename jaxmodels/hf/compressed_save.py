"""compressed-tensors, Hugging Face's format of quantized weights, written from our codes; see `compressed`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.hf.compressed import FORMATS, METHOD
from jaxmodels.hf.files import Written
from jaxmodels.hf.peft import Modules
from jaxmodels.hf.table import Slot, moved
from jaxmodels.models.coded import Coded, dequantize, is_coded, unpack


def written(config: Any, leaves: Mapping[str, Any]) -> tuple[dict[str, Written], dict[str, Any]]:
    """Return the tensors of a model with coded parameters, and the `quantization_config` that says so.

    What is no Linear in transformers is written as numbers.

    Raises:
        UserError: the format has no such codes, or none of the coded parameters is a Linear.
    """
    modules = Modules.of(config)
    linear = {
        place.slot.name
        for place in modules.places.values()
        if place.kind == "linear" and not place.turned and not place.several and len(place.slot.shape) == 2
    }
    out: dict[str, Written] = {}
    coded: dict[str, Coded] = {}
    for name, slot in sorted(modules.slots.items()):
        held = [leaves[path] for path in slot.weight.paths]
        if name in linear and is_coded(held[0]):
            coded[name] = held[0]
            out |= _parts(name.removesuffix("weight"), slot, held[0])
        else:
            out[name] = Written(slot.shape, lambda slot=slot: slot.theirs(_numbers(slot, leaves)))
    kinds = {leaf.kind for leaf in leaves.values() if is_coded(leaf)}
    more = any(leaf.factors is not None or leaf.activations for leaf in leaves.values() if is_coded(leaf))
    if not coded or not kinds <= {*FORMATS} or more:
        what = f"codes of {', '.join(sorted(kinds - {*FORMATS}))}" if coded else "no codes in a Linear of transformers"
        what = "factors of inputs, or int8 activations" if coded and more else what
        raise UserError(
            f"got a {type(config).__name__.removesuffix('Config')} with {what}, expected some of "
            f"{', '.join(FORMATS)}, which {METHOD} holds, try --format huggingface"
        )
    rest = sorted(
        name.removesuffix(".weight")
        for name, slot in modules.slots.items()
        if name.endswith(".weight") and len(slot.shape) == 2 and name not in coded
    )
    rest += [copy.removesuffix(".weight") for copy, name in modules.form.copies.items() if name in modules.slots]
    return out, settings(coded, modules, [modules.live(each) for each in rest])


def _numbers(slot: Slot, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        path: np.asarray(dequantize(leaves[path]) if is_coded(leaves[path]) else leaves[path])
        for path in slot.weight.paths
    }


def settings(coded: Mapping[str, Coded], modules: Modules, ignored: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json."""
    leaf = next(iter(coded.values()))
    shapes = [(modules.slots[name].shape[1], moved(modules.slots[name], x.scales.shape).shape[1])
              for name, x in coded.items()]  # fmt: skip
    groups = {inputs // count for inputs, count in shapes if count > 1}  # one size: that of the config
    weights = {
        "num_bits": 4 if leaf.kind == "int4" else 8,
        "type": "float" if leaf.kind == "float8" else "int",
        "symmetric": leaf.zeros is None,
        "strategy": "group" if groups else "channel",
        "group_size": min(groups, default=None),
        "dynamic": False,
        "observer": "minmax",
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMATS[leaf.kind],
    }
    return {
        "quant_method": METHOD,
        "format": FORMATS[leaf.kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(set(ignored)),
        "kv_cache_scheme": None,
    }


def _parts(stem: str, slot: Slot, leaf: Coded) -> dict[str, Written]:
    path, scales = slot.weight.paths[0], moved(slot, leaf.scales.shape)
    one = jax.tree.map(lambda x: np.asarray(x)[slot.index], leaf)  # of its layer
    slot, scales = (dataclasses.replace(each, index=()) for each in (slot, scales))

    def codes() -> np.ndarray:
        return slot.theirs({path: np.asarray(unpack(one))})

    found = {f"{stem}weight_scale": Written(scales.shape, lambda: scales.theirs({path: one.scales}))}
    zeros = None if leaf.zeros is None else (lambda: scales.theirs({path: one.zeros}))
    if leaf.kind != "int4":
        found[f"{stem}weight"] = Written(slot.shape, codes, "I8" if leaf.kind == "int8" else "F8_E4M3")
        if zeros is not None:
            found[f"{stem}weight_zero_point"] = Written(scales.shape, zeros, "I8")
        return found
    rows, columns = slot.shape
    found[f"{stem}weight_packed"] = Written((rows, -(-columns // 8)), lambda: packed(codes()), "I32")
    found[f"{stem}weight_shape"] = Written((2,), lambda: np.array(slot.shape, "<i8"), "I64")
    if zeros is not None:
        shape = (-(-rows // 8), scales.shape[1])
        found[f"{stem}weight_zero_point"] = Written(shape, lambda: packed(zeros().T).T, "I32")
    return found


def packed(codes: np.ndarray) -> np.ndarray:
    """Pack codes from -8 to 7 eight to an int32 along the rows, the first in the lowest bits."""
    codes = np.pad(codes + np.int8(8), ((0, 0), (0, -codes.shape[1] % 8))).astype(np.uint8)
    return np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << 4).view("<i4")
