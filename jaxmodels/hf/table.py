"""Building blocks of a family's module: rows that place each tensor, and settings read from config.json.

A row works in both directions: `Weight("h.{layer}.attn.c_proj.weight", "layers/attn/o/w", "(h k) d -> h k d")` says how
their tensor is rearranged into ours on import, and backwards on export. Sizes come from the shapes of our model.
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
"""Shapes by the path of the leaf; batch statistics are under stats/."""
_HIGHEST = 1 << 31  # no size is as large


@dataclass(frozen=True)
class Weight:
    """The place of one of their tensors in our tree."""

    theirs: str
    """Their name; {layer} or {expert} counts along a leading axis of our leaf."""
    ours: str | tuple[str, ...]
    """The path of our leaf, or the paths of several leaves that are parts of one tensor."""
    pattern: str = ""
    """The einops pattern from theirs to ours; with several leaves, the first axis counts them. Empty: unchanged."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of axes that our shape does not determine."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True)
class Slot:
    """One of their tensors, and its place in our leaves."""

    name: str
    weight: Weight
    index: tuple[int, ...]
    """Index along the leading axes that the name counts."""
    shape: tuple[int, ...]
    """Shape of their tensor."""
    sizes: Mapping[str, int]

    def ours(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Rearrange their tensor into parts of our leaves, one per path; these are views."""
        from einops import rearrange

        if not self.weight.pattern:
            return [tensor]
        parts = rearrange(tensor, self.weight.pattern, **self.sizes)
        return [parts] if isinstance(self.weight.ours, str) else list(parts)

    def theirs(self, leaves: Mapping[str, Any]) -> np.ndarray:
        """Rearrange our leaves into their tensor."""
        from einops import rearrange

        parts = [np.asarray(leaves[path])[self.index] for path in self.weight.paths]
        if not self.weight.pattern:
            return parts[0]
        left, right = self.weight.pattern.split("->")
        whole: Any = parts[0] if isinstance(self.weight.ours, str) else parts
        return rearrange(whole, f"{right} -> {left}", **self.sizes)


@dataclass(frozen=True)
class Format:
    """How a family is imported and exported."""

    family: str
    config: Callable[[Settings], Any]
    """Makes our config from the settings of config.json."""
    describe: Callable[[Any], dict[str, Any]]
    """Makes config.json from our config; raises UserError where transformers has no such model."""
    weights: Callable[[Any], Iterable[Weight]]
    """Makes the rows for our config; rows whose leaf the model lacks are dropped."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Other names under which transformers reads a setting (its `attribute_map`), and the name that is read here."""
    prefix: str = ""
    """Prefix of the body's names in a model with a head; files of a body alone lack it."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that repeat another where weights are tied, and that other's name."""
    spare: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that may be missing, and the tensor that is then used in their place."""
    skipped: tuple[str, ...] = ()
    """Patterns of names that hold no weights: masks, counters, computed tables."""
    zeros: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda config: {}
    """The shapes by name of tensors that are no part of our model, because they are zero: they are written as such, and
    read only to see whether they are."""
    counters: Mapping[str, str] = field(default_factory=dict)
    """Endings of tensors' names, and the ending of the counter that is written as 0 beside each."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Patterns of old names, and their replacements."""
    sounds: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    """The settings of preprocessor_config.json with which transformers turns sounds into what is computed here."""
    task: Callable[[Any], str] = lambda config: "causal_lm"
    """Returns the name of the task that trains a model with this config; empty where there is none."""

    def rows(self, config: Any, shapes: Shapes) -> list[Weight]:
        """Return the rows of a model in the order of the table."""
        rows = [row for row in self.weights(config) if row.paths[0] in shapes]
        covered = [path for row in rows for path in row.paths]
        if sorted(covered) != sorted(shapes):
            wrong = sorted(set(covered) ^ set(shapes)) or "some twice"
            raise ValueError(f"got a table of {self.family} that does not cover its parameters once each: {wrong}")
        return rows

    def slots(self, config: Any, shapes: Shapes) -> list[list[Slot]]:
        """Return all tensors of a model in the order of the table, grouped by row."""
        return [list(expand(row, shapes)) for row in self.rows(config, shapes)]

    def counts(self, names: Iterable[str]) -> dict[str, int]:
        """Return the counters beside these tensors, all 0 as in a model that was never trained."""
        pairs = ((name, end) for name in names for end in self.counters if name.endswith(end))
        return {name.removesuffix(end) + self.counters[end]: 0 for name, end in pairs}

    def canonical(self, name: str, known: Iterable[str]) -> str:
        """Return a tensor's name as the table writes it."""
        for old, new in self.aliases:
            name = re.sub(old, new, name)
        return self.prefix + name if name not in known and self.prefix + name in known else name

    def skips(self, name: str) -> bool:
        """Say whether a tensor of that name, with or without the prefix, holds no weights."""
        return any(re.search(pattern, text) for pattern in self.skipped for text in (name, self.prefix + name))


def expand(row: Weight, shapes: Shapes) -> Iterable[Slot]:
    """Yield the tensors of a row."""
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


def moved(slot: Slot, shape: tuple[int, ...]) -> Slot:
    """Return the place of a tensor whose dimensions are those of a parameter, divided: its scales."""
    paths = dict.fromkeys(slot.weight.paths, tuple(shape))
    return next(each for each in expand(slot.weight, paths) if each.index == slot.index)


class Settings:
    """A config.json; settings that are not computed here are collected, and refused together."""

    def __init__(self, values: Mapping[str, Any], where: str, parent: Settings | None = None):
        self.values, self.where = values, where
        self.refused: list[str] = [] if parent is None else parent.refused
        self.remarks: list[str] = [] if parent is None else parent.remarks
        """Settings that are not computed here, but affect training alone."""

    @staticmethod
    def read(directory: Path) -> Settings:
        """Read the config.json of a directory.

        Raises:
            UserError: it is missing, or not a config of transformers.
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

    def renamed(self, names: Mapping[str, str]) -> Settings:
        """Return the settings with those of other names under the names that are read.

        Where both are there, the other one counts, as in transformers, which sets it later.
        """
        found = {own: self.values[other] for other, own in names.items() if self.values.get(other) is not None}
        return Settings({**self.values, **found}, self.where, self)

    def get(self, name: str, default: Any = ...) -> Any:
        """Return a setting; refuse it where it is missing and has no default."""
        value = self.values.get(name)
        if value is None and default is ...:
            self.refused.append(f"no {name}")
            return 0
        return default if value is None else value

    def whole(self, name: str, default: Any = ..., least: int = 1) -> Any:
        """Return a setting that is a whole number; None only where that is the default."""
        value = self.get(name, default)
        if value is None or (type(value) is int and least <= value < _HIGHEST):
            return value
        return self.wrong(name, value, f"a whole number from {least}", default)

    def number(self, name: str, default: Any = ..., least: float = 0.0) -> Any:
        """Return a setting that is a number."""
        value = self.get(name, default)
        if type(value) in (int, float) and least <= value < 1e38:  # what float32 holds
            return float(value)
        return self.wrong(name, value, f"a number from {least:g}", default)

    def flag(self, name: str, default: bool) -> bool:
        """Return a setting that is true or false."""
        value = self.get(name, default)
        return value if isinstance(value, bool) else self.wrong(name, value, "true or false", default)

    def several(self, name: str, kind: type, default: Sequence[Any]) -> tuple[Any, ...]:
        """Return a setting that is a list of at least one value, all of one kind."""
        value = self.get(name, list(default))
        right = isinstance(value, list) and value and all(type(item) is kind for item in value)
        if right and (kind is not int or all(0 < item < _HIGHEST for item in value)):
            return tuple(value)
        return tuple(self.wrong(name, value, f"a list of {'whole numbers' if kind is int else 'names'}", default))

    def pair(self, name: str, default: int) -> tuple[int, int]:
        """Return a setting that is a height and a width, or one number for both."""
        if isinstance(self.get(name, default), list):
            sizes = [*self.several(name, int, (default, default))]
            return (sizes[0], sizes[-1]) if len(sizes) < 3 else self.wrong(name, sizes, "two numbers", (1, 1))
        size = self.whole(name, default)
        return size, size

    def wrong(self, name: str, value: Any, expected: str, default: Any) -> Any:
        """Refuse a setting, and return its default to go on with."""
        text = json.dumps(value)
        self.refused.append(f"{name} {text if len(text) <= 60 else text[:57] + '...'} (expected: {expected})")
        return 1 if default is ... or default is None else default

    def only(self, name: str, *known: Any) -> Any:
        """Return a setting that must be one of `known`; the first of them is its default."""
        value = self.get(name, known[0])
        if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
            text, expected = json.dumps(value), " or ".join(json.dumps(item) for item in known)
            self.refused.append(f"{name} {text if len(text) <= 60 else text[:57] + '...'} (computed here: {expected})")
            return known[0]
        return value

    def training(self, name: str, default: float, computed: float) -> None:
        """Note a setting that affects training alone, where it differs from what is computed here."""
        if (value := self.number(name, default)) != computed:
            self.remarks.append(f"{name} {value:g} (computed here, in training alone: {computed:g})")

    def section(self, name: str) -> Settings:
        """Return the settings nested in a setting."""
        value = self.get(name, {})
        return Settings(
            value if isinstance(value, dict) else self.wrong(name, value, "an object", {}), self.where, self
        )

    def check(self) -> None:
        """Refuse the config if any setting was refused.

        Raises:
            UserError: names all of them.
        """
        if self.refused:
            raise UserError(
                f"got {self.where} with {'; '.join(self.refused)}, expected settings that are computed here, "
                "try another model"
            )


def classes(s: Settings) -> int:
    """Return the number of a classifier's classes: that of the named ones, or two where config.json does not say."""
    count = s.whole("num_labels", 2)
    return len(s.section("id2label").values) or count


def classifies(config: Any) -> str:
    """Return the task of a classifier; none of a single output, which is a score, since its softmax is always 1."""
    return "" if config.classes == 1 else "classification"


def labels(count: int) -> dict[str, Any]:
    """Return default names for `count` classes, as in config.json."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(count)},
        "label2id": {f"LABEL_{i}": i for i in range(count)},
    }


def block(ours: str, **theirs: str) -> list[Weight]:
    """Return the rows of a block with biases, from their name of each part: q, k, v, o, up, down and two norms."""
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
    """Return the side of the square patches."""
    height, width = s.pair("patch_size", default)
    if height != width:
        s.refused.append(f"patch_size {height} by {width} (computed here: square patches)")
    return height


def side(shape: tuple[int, int, int]) -> int | list[int]:
    """Return the size of images as config.json writes it."""
    return shape[0] if shape[0] == shape[1] else list(shape[:2])
