"""What a family's module is made of: rows that say where each tensor goes, and settings read from a config.json.

A row is read both ways: `Weight("h.{layer}.attn.c_proj.weight", "layers/attn/o/w", "(h k) d -> h k d")` says how their
tensor is arranged as ours on the way in, and backwards on the way out. Sizes come from the shapes of our model.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data.special import objects
from jaxmodels.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
"""Path of a leaf -> its shape; batch statistics lie under stats/."""
_HIGHEST = 1 << 31  # numbers from there on are no size


@dataclass(frozen=True)
class Weight:
    """Where a tensor of theirs lies in our tree."""

    theirs: str
    """Its name; {layer} or {expert} counts along a leading axis of our leaf."""
    ours: str | tuple[str, ...]
    """The path of our leaf, or of several that are the parts of one tensor."""
    pattern: str = ""
    """From theirs to ours as einops writes it; the first axis of several leaves counts them. Empty: as it is."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of axes that our shape does not tell."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True)
class Slot:
    """One tensor of theirs, and its place in our leaves."""

    name: str
    weight: Weight
    index: tuple[int, ...]
    """Along the leading axes that the name counts."""
    shape: tuple[int, ...]
    """Of theirs."""
    sizes: Mapping[str, int]

    def ours(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Theirs as parts of our leaves, one a path: views, nothing is copied."""
        from einops import rearrange

        if not self.weight.pattern:
            return [tensor]
        parts = rearrange(tensor, self.weight.pattern, **self.sizes)
        return [parts] if isinstance(self.weight.ours, str) else list(parts)

    def theirs(self, leaves: Mapping[str, Any]) -> np.ndarray:
        """The tensor as they have it, from our whole leaves."""
        from einops import rearrange

        parts = [np.asarray(leaves[path])[self.index] for path in self.weight.paths]
        if not self.weight.pattern:
            return parts[0]
        left, right = self.weight.pattern.split("->")
        whole: Any = parts[0] if isinstance(self.weight.ours, str) else parts
        return rearrange(whole, f"{right} -> {left}", **self.sizes)


@dataclass(frozen=True)
class Format:
    """A family's way in and out."""

    family: str
    config: Callable[[Settings], Any]
    """Our config from the settings of config.json."""
    describe: Callable[[Any], dict[str, Any]]
    """config.json from our config; raises UserError where transformers has no such model."""
    weights: Callable[[Any], Iterable[Weight]]
    """The rows for a config of ours; one whose leaf the model lacks does not count."""
    prefix: str = ""
    """What stands before the names of the body in a model with a head, and is missing in a body alone."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Name of a tensor that repeats another one where weights are tied -> that other one."""
    spare: Mapping[str, str] = field(default_factory=dict)
    """Name of a tensor that may be missing -> the one that is then taken for it too."""
    skipped: tuple[str, ...] = ()
    """Patterns of names that hold no weights: masks, counters, tables that are computed."""
    counters: Mapping[str, str] = field(default_factory=dict)
    """End of a tensor's name -> that of a count beside it, which is written as 0."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Old names: pattern, and what to put there."""
    task: Callable[[Any], str] = lambda config: "causal_lm"
    """What a model with this config is trained to do."""

    def rows(self, config: Any, shapes: Shapes) -> list[Weight]:
        """The rows of a model in the order of the table."""
        rows = [row for row in self.weights(config) if row.paths[0] in shapes]
        covered = [path for row in rows for path in row.paths]
        if sorted(covered) != sorted(shapes):
            wrong = sorted(set(covered) ^ set(shapes)) or "some twice"
            raise ValueError(f"got a table of {self.family} that does not cover its parameters once each: {wrong}")
        return rows

    def slots(self, config: Any, shapes: Shapes) -> list[list[Slot]]:
        """All tensors of a model in the order of the table, those of one row together."""
        return [list(expand(row, shapes)) for row in self.rows(config, shapes)]

    def counts(self, names: Iterable[str]) -> dict[str, int]:
        """The counters beside tensors of these names, all 0 as in a model that was never trained."""
        pairs = ((name, end) for name in names for end in self.counters if name.endswith(end))
        return {name.removesuffix(end) + self.counters[end]: 0 for name, end in pairs}

    def canonical(self, name: str, known: Iterable[str]) -> str:
        """A tensor's name as the table writes it."""
        for old, new in self.aliases:
            name = re.sub(old, new, name)
        return self.prefix + name if name not in known and self.prefix + name in known else name

    def skips(self, name: str) -> bool:
        """Whether a tensor of that name holds no weights, whether or not the name has the prefix."""
        return any(re.search(pattern, text) for pattern in self.skipped for text in (name, self.prefix + name))


def expand(row: Weight, shapes: Shapes) -> Iterable[Slot]:
    """The tensors of a row."""
    whole = shapes[row.paths[0]]
    counted = re.findall(r"\{(\w+)\}", row.theirs)
    shape, sizes = whole[len(counted) :], dict(row.sizes)
    if row.pattern:
        left, right = (re.findall(r"\([^)]*\)|\w+", side) for side in row.pattern.split("->"))
        if not isinstance(row.ours, str):
            sizes[right.pop(0)] = len(row.ours)
        if len(right) != len(shape):
            raise ValueError(f"got pattern {row.pattern!r} for {row.ours} of shape {shape}")
        sizes |= {name: size for name, size in zip(right, shape, strict=True) if name.isidentifier()}
        shape = tuple(int(np.prod([sizes.get(name, 1) for name in re.findall(r"\w+", group)])) for group in left)
    for index in itertools.product(*(range(size) for size in whole[: len(counted)])):
        yield Slot(row.theirs.format(**dict(zip(counted, index, strict=True))), row, index, shape, sizes)


class Settings:
    """A config.json, whose settings that are not computed here are collected and refused at once."""

    def __init__(self, values: Mapping[str, Any], where: str, parent: Settings | None = None):
        self.values, self.where = values, where
        self.refused: list[str] = [] if parent is None else parent.refused
        self.remarks: list[str] = [] if parent is None else parent.remarks
        """What is not computed here either, but changes training alone."""

    @staticmethod
    def read(directory: Path) -> Settings:
        """Those of a directory.

        Raises:
            UserError: there is none, or it is no config.
        """
        path = directory / "config.json"
        if not path.is_file():
            hint = "" if directory.is_dir() else f", try hf download {directory} --local-dir {directory.name}"
            raise UserError(
                f"got {str(directory)!r}, expected a directory with config.json and model.safetensors{hint}"
            )
        values = objects(path)
        if not isinstance(values.get("model_type"), str):
            raise UserError(f"got {path} without model_type, expected a config of transformers, try another directory")
        return Settings(values, str(path))

    def get(self, name: str, default: Any = ...) -> Any:
        """A setting; refused where it is missing and has no default."""
        value = self.values.get(name)
        if value is None and default is ...:
            self.refused.append(f"no {name}")
            return 0
        return default if value is None else value

    def whole(self, name: str, default: Any = ..., least: int = 1) -> Any:
        """A setting that is a whole number; None only where that is the default."""
        value = self.get(name, default)
        if value is None or (type(value) is int and least <= value < _HIGHEST):
            return value
        return self.wrong(name, value, f"a whole number from {least}", default)

    def number(self, name: str, default: Any = ..., least: float = 0.0) -> Any:
        """A setting that is a number."""
        value = self.get(name, default)
        if type(value) in (int, float) and least <= value < 1e38:  # what float32 holds
            return float(value)
        return self.wrong(name, value, f"a number from {least:g}", default)

    def flag(self, name: str, default: bool) -> bool:
        """A setting that is true or false."""
        value = self.get(name, default)
        return value if isinstance(value, bool) else self.wrong(name, value, "true or false", default)

    def several(self, name: str, kind: type, default: Sequence[Any]) -> tuple[Any, ...]:
        """A setting that is a list of one kind of values, at least one."""
        value = self.get(name, list(default))
        right = isinstance(value, list) and value and all(type(item) is kind for item in value)
        if right and (kind is not int or all(0 < item < _HIGHEST for item in value)):
            return tuple(value)
        return tuple(self.wrong(name, value, f"a list of {'whole numbers' if kind is int else 'names'}", default))

    def pair(self, name: str, default: int) -> tuple[int, int]:
        """A setting that is a height and a width, or one number for both."""
        if isinstance(self.get(name, default), list):
            sizes = [*self.several(name, int, (default, default))]
            return (sizes[0], sizes[-1]) if len(sizes) < 3 else self.wrong(name, sizes, "two numbers", (1, 1))
        size = self.whole(name, default)
        return size, size

    def wrong(self, name: str, value: Any, expected: str, default: Any) -> Any:
        """Refuse a setting, and go on with its default."""
        text = json.dumps(value)
        self.refused.append(f"{name} {text if len(text) <= 60 else text[:57] + '...'} (expected: {expected})")
        return 1 if default is ... or default is None else default

    def only(self, name: str, *known: Any) -> Any:
        """A setting that has to be one of `known`, the first of which holds where it is missing."""
        value = self.get(name, known[0])
        if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
            text, expected = json.dumps(value), " or ".join(json.dumps(item) for item in known)
            self.refused.append(f"{name} {text if len(text) <= 60 else text[:57] + '...'} (computed here: {expected})")
            return known[0]
        return value

    def training(self, name: str, default: float, computed: float) -> None:
        """Remark a setting that only training depends on, where it is not what is computed here."""
        if (value := self.number(name, default)) != computed:
            self.remarks.append(f"{name} {value:g} (computed here, in training alone: {computed:g})")

    def section(self, name: str) -> Settings:
        """The settings inside one of them."""
        value = self.get(name, {})
        return Settings(
            value if isinstance(value, dict) else self.wrong(name, value, "an object", {}), self.where, self
        )

    def check(self) -> None:
        """Raises: UserError that names all that was refused."""
        if self.refused:
            raise UserError(
                f"got {self.where} with {'; '.join(self.refused)}, expected settings that are computed here, "
                "try another model"
            )


def classes(s: Settings) -> int:
    """Classes of a classifier: as many as have names, and two where config.json does not say."""
    return len(s.section("id2label").values) or s.whole("num_labels", 2)


def labels(count: int) -> dict[str, Any]:
    """Names of so many classes."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(count)},
        "label2id": {f"LABEL_{i}": i for i in range(count)},
    }


def block(ours: str, **theirs: str) -> list[Weight]:
    """The rows of a block with biases: its parts' names of theirs, by ours (q, k, v, o, up, down and two norms)."""
    rows = []
    for part, name in theirs.items():
        if part.endswith("_norm"):
            rows += [Weight(name + ".weight", f"{ours}{part}/scale"), Weight(name + ".bias", f"{ours}{part}/bias")]
            continue
        heads = {"q": "(h k) d -> d h k", "o": "d (h k) -> h k d"}
        path = f"{ours}{'mlp' if part in ('up', 'down') else 'attn'}/{part}"
        pattern = "o i -> i o" if part in ("up", "down") else heads.get(part, heads["q"])
        rows.append(Weight(name + ".weight", path + "/w", pattern))
        rows.append(Weight(name + ".bias", path + "/b", "(h k) -> h k" if part in ("q", "k", "v") else ""))
    return rows


def patch(s: Settings, default: int) -> int:
    """The side of square patches."""
    height, width = s.pair("patch_size", default)
    if height != width:
        s.refused.append(f"patch_size {height} by {width} (computed here: square patches)")
    return height


def side(shape: tuple[int, int, int]) -> int | list[int]:
    """The size of images as config.json says it."""
    return shape[0] if shape[0] == shape[1] else list(shape[:2])
