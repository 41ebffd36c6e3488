"""Where adapters in PEFT's format have their factors, by the same tables as weights.

A row of a table says how a tensor of transformers is rearranged into our parameter, and so how its factors are: A
(r, in) holds the dimensions that its weight has on the side of the inputs, B (out, r) those on the side of the outputs.
Where one of their tensors holds several of ours (GPT-2's c_attn), its A is shared by all of them, and its B is cut.
Source: peft 0.21, `tuners/lora/layer.py` and `utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from einops import rearrange

from jaxmodels.hf import formats
from jaxmodels.hf.load import leaves_of
from jaxmodels.hf.table import Format, Slot
from jaxmodels.models.adapted import sides
from jaxmodels.models.families import create
from jaxmodels.models.parameters import Axes

CONFIG, WEIGHTS, ROOT = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
HASH = "jaxmodels_base"
"""The key, in the metadata of the weights, of the hash of the base that they were trained beside."""
LENGTH = "lora_magnitude_vector"
RENAMED = {
    "vit": (
        ("encoder.layer.", "layers."), (".attention.attention.query", ".attention.q_proj"),
        (".attention.attention.key", ".attention.k_proj"), (".attention.attention.value", ".attention.v_proj"),
        (".attention.output.dense", ".attention.o_proj"), (".intermediate.dense", ".mlp.fc1"),
        (".output.dense", ".mlp.fc2"),
    ),
}  # fmt: skip
"""Names of a family's modules in files of weights, and in transformers 5, by which PEFT names what is in its files."""


def is_peft(directory: Path) -> bool:
    """Whether a directory has an adapter in PEFT's format."""
    return (directory / CONFIG).is_file()


@dataclass(frozen=True)
class Place:
    """One of their modules that can have factors, and where these are in our leaves."""

    module: str
    """Their module as files of weights name it: transformer.h.0.attn.c_attn."""
    live: str
    """The module in transformers, by which adapters name it."""
    slot: Slot
    kind: Literal["linear", "embedding", "output"]
    """output: an output layer, which is a table to us and a linear layer to them, so that its factors change places."""
    inputs: tuple[str, ...]
    """Groups of names of their dimensions on the side of the inputs, as in an einops pattern."""
    outputs: tuple[str, ...]
    a: str
    """The names of our dimensions of a, without the rank."""
    b: str
    several: str
    """The name that counts our leaves in their tensor; empty if it holds one."""
    sizes: Mapping[str, int]
    turned: bool
    """Whether their weight is (in, out), as in the Conv1D of GPT-2."""

    @property
    def parts(self) -> tuple[str, str]:
        """The endings of the names of their two factors."""
        tables = ("lora_embedding_A", "lora_embedding_B")
        return tables if self.kind == "embedding" else ("lora_A.weight", "lora_B.weight")

    def name(self, part: str) -> str:
        """The name of a tensor of its adapter."""
        return f"{ROOT}{self.live}.{part}"

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of its factors, and of the lengths of its outputs."""
        ins, outs = (
            tuple(math.prod(self.sizes[name] for name in re.findall(r"\w+", group)) for group in groups)
            for groups in (self.inputs, self.outputs)
        )
        if self.kind == "output":
            ins, outs = outs, ins
        ones = (1,) * (len(ins) - 1)
        length = (1, *outs, *ones) if ones else outs
        return {self.parts[0]: (rank, *ins), self.parts[1]: (*outs, rank, *ones), LENGTH: length}

    def _moved(self, x: Any, pattern: str) -> np.ndarray:
        sizes = {name: self.sizes[name] for name in re.findall(r"\w+", pattern) if name in self.sizes}
        return rearrange(x, pattern, **sizes)

    def ours(self, a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rearrange their factors into those of each of our leaves."""
        if self.kind == "output":
            return [(b, a)]
        a = self._moved(a, f"rank {' '.join(self.inputs)} -> {self.a} rank")
        b = b.reshape(b.shape[0], b.shape[1])
        b = self._moved(b, f"{' '.join(self.outputs)} rank -> {self.several} rank {self.b}")
        return [(a, each) for each in b] if self.several else [(a, b)]

    def theirs(self, a: np.ndarray, b: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Rearrange factors of our leaves that share their a into theirs."""
        if self.kind == "output":
            return b[0], a
        whole: Any = np.stack(b) if self.several else b[0]
        back = self._moved(whole, f"{self.several} rank {self.b} -> {' '.join(self.outputs)} rank")
        turned = self._moved(a, f"{self.a} rank -> rank {' '.join(self.inputs)}")
        return turned, back.reshape(self.shapes(a.shape[-1])[self.parts[1]])

    def lengths_of(self, length: np.ndarray) -> list[np.ndarray]:
        """Cut the lengths of their outputs into those of our leaves."""
        found = self._moved(length.reshape(-1), f"{' '.join(self.outputs)} -> {self.several} {self.b}")
        return list(found) if self.several else [found]

    def length_of(self, lengths: list[np.ndarray]) -> np.ndarray:
        """Join the lengths of our leaves' outputs."""
        whole: Any = np.stack(lengths) if self.several else lengths[0]
        found = self._moved(whole, f"{self.several} {self.b} -> {' '.join(self.outputs)}")
        return found.reshape(self.shapes(1)[LENGTH])


@dataclass(frozen=True)
class Modules:
    """What of a model PEFT can adapt, and all of its tensors in transformers."""

    form: Format
    places: Mapping[str, Place]
    """By module, in the order of the table."""
    slots: Mapping[str, Slot]
    """By name."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of our leaves, by path."""
    axes: Mapping[str, Axes]

    @staticmethod
    def of(config: Any) -> Modules:
        """Find the modules of a model of ours.

        Raises:
            UserError: transformers has no such model.
        """
        form, model = formats.format_for(config), create(config)
        form.describe(config)
        shapes = {path: leaf.shape for path, leaf in leaves_of(model).items()}
        axes = {
            jax.tree_util.keystr(path, simple=True, separator="/"): each
            for path, each in jax.tree_util.tree_leaves_with_path(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
        }
        slots = {slot.name: slot for row in form.slots(config, shapes) for slot in row}
        found = [
            _place(form, slot, axes[slot.weight.paths[0]], shapes)
            for slot in slots.values()
            if slot.weight.paths[0] in axes
        ]
        twice = set() if form.task(config) == "classification" else {
            # an output layer that repeats a table has no part in the table's factors
            name for copy, name in form.copies.items() if copy not in slots
        }  # fmt: skip
        able = {each.module: each for each in found if each is not None and each.slot.name not in twice}
        return Modules(form, able, slots, shapes, axes)

    def live(self, name: str) -> str:
        """Return the name that transformers has for what files of weights name so."""
        return live(self.form, name)

    def canonical(self, name: str) -> str:
        """Return a tensor's name as the table writes it."""
        for old, new in reversed(RENAMED.get(self.form.family, ())):
            name = name.replace(new, old)
        return self.form.canonical(name, {*self.slots, *self.form.copies})


def live(form: Format, name: str) -> str:
    """Return the name that transformers has for what files of weights name so."""
    for old, new in RENAMED.get(form.family, ()):
        name = name.replace(old, new)
    return name


def _place(form: Format, slot: Slot, axes: Axes, shapes: Mapping[str, tuple[int, ...]]) -> Place | None:
    """Derive from a row's pattern where its factors are; None of what is no layer's weight, and of experts."""
    if axes.kind not in ("matrix", "embedding") or not slot.name.endswith(".weight") or "expert" in axes:
        return None
    first, middle = sides(axes, axes.kind)
    plain = " ".join(f"d{i}" for i in range(len(axes) - first))
    left, right = (slot.weight.pattern or f"{plain} -> {plain}").split("->")
    names, several = right.split(), ""
    if not isinstance(slot.weight.ours, str):
        several, *names = names
    ins, outs = names[: middle - first], names[middle - first :]
    groups = re.findall(r"\([^)]*\)|\w+", left)
    outputs = tuple(group for group in groups if {*re.findall(r"\w+", group)} & {*outs})
    sizes = dict(zip(names, shapes[slot.weight.paths[0]][first:], strict=True))
    kind: Any = "linear" if axes.kind == "matrix" else "embedding"
    if axes.is_output:
        kind = "output"
    if several:
        sizes[several] = len(slot.weight.paths)
    return Place(
        slot.name.removesuffix(".weight"),
        live(form, slot.name.removesuffix(".weight")),
        slot,
        kind,
        tuple(group for group in groups if group not in outputs),
        outputs,
        " ".join(ins),
        " ".join(outs),
        several,
        sizes,
        kind == "linear" and groups[0] not in outputs,
    )
