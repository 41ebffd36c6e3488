"""Sets of Hugging Face's `datasets` library."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data.classes import spaced, tell_trimmed
from jaxmodels.data.columns import in_order, listed, name_of
from jaxmodels.data.fields import unknown
from jaxmodels.data.files import shown
from jaxmodels.data.records import Bad, Field, Records, digest
from jaxmodels.data.section import RecordsConfig, SplitsConfig
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError

_SAMPLED = 256


@dataclass(frozen=True)
class HuggingFace(RecordsConfig, SplitsConfig):
    """Sets of Hugging Face's `datasets` library."""

    def records(self, split: Split) -> Records:
        return records(self, split)


def records(cfg: HuggingFace, split: Split) -> Records:
    """Open the records of a set on the hub, `name` or `name:config`, or of a folder written by `save_to_disk`.

    Splits use the library's notation, which is TFDS's: train, train[:90%], train+test.

    Raises: UserError if the library is not installed, or there is no such set or split.
    """
    try:
        datasets: Any = import_module("datasets")  # not installed for type checking
    except ImportError:
        raise UserError(
            "got data huggingface without the library datasets, expected it installed, "
            "try pip install 'jaxmodels[huggingface]'"
        ) from None
    wanted, option = (cfg.train_split, "train_split") if split == "train" else (cfg.eval_split, "eval_split")
    if not cfg.name:
        raise UserError("got data huggingface without data.name, expected a set or a folder, try --data.name mnist")
    folder = Path(cfg.name).expanduser()

    def load(wanted: str, option: str) -> Any:
        if folder.is_dir():
            return _part(datasets, datasets.load_from_disk(str(folder)), wanted, option)
        name, _, config = cfg.name.partition(":")
        return datasets.load_dataset(name, config or None, split=wanted)

    try:
        data = load(wanted, option)
        named = _is_text(data.features.get(cfg.label_field))
        train = load(cfg.train_split, "train_split") if named and wanted != cfg.train_split else data
    except UserError:
        raise
    except (ValueError, AssertionError, OSError) as error:  # what the library raises for a wrong name or split
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"got data.name {cfg.name!r}, {wanted} ({reason[:200]}), expected a set and a split that exist, "
            f"try another --data.name or --data.{option.replace('_', '-')}"
        ) from error
    classes: dict[str, tuple[str, ...]] = {}
    if named:
        values = _each(train[cfg.label_field])
        tell_trimmed(spaced(values) if split == "train" else Counter(), cfg.label_field, f"huggingface {cfg.name}")
        classes[cfg.label_field] = _classes(values)
    return _Set(datasets, data, f"huggingface {cfg.name}", wanted, classes)


def _is_text(feature: Any) -> bool:
    """Whether a feature is a text or a list of texts."""
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _each(column: Iterable[Any]) -> list[Any]:
    """Return the values of a column, those of its lists one by one."""
    return [v for value in column for v in (value if isinstance(value, list) else [value])]


def _classes(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the classes that texts name, as in tables."""
    return tuple(sorted({name for v in values if (name := name_of(v)) is not None}, key=in_order))


def _part(datasets: Any, saved: Any, wanted: str, option: str) -> Any:
    """Return a split of a saved set; a set saved without splits is called train."""
    parts = dict(saved) if isinstance(saved, dict) else {"train": saved}
    for name in re.findall(r"[^+\[\]]+(?=\[|\+|$)", wanted.replace(" ", "")):
        if name not in parts:
            raise UserError(unknown(f"data.{option}", name, list(parts), f"--data.{option.replace('_', '-')}"))
    places = datasets.ReadInstruction.from_spec(wanted).to_absolute({name: len(part) for name, part in parts.items()})
    cut = []
    for place in places:
        part = parts[place.splitname]
        cut.append(part.select(range(place.from_ or 0, len(part) if place.to is None else place.to)))
    return cut[0] if len(cut) == 1 else datasets.concatenate_datasets(cut)


class _Set(Records):
    apart = True

    def __init__(
        self, datasets: Any, data: Any, label: str, split: str, classes: Mapping[str, tuple[str, ...]]
    ) -> None:
        """`classes`: the names of the classes in each text column that holds labels."""
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):  # kept encoded
                data = data.cast_column(name, datasets.Image(decode=False))
        self._data, self.label, self._split = data, label, split
        found = {name: _field(datasets, data.features[name]) for name in sorted(data.features)}
        for name, names in classes.items():
            several = getattr(data.features[name], "feature", None) is not None
            found[name] = Field("labels" if several else "label", names)
        self._ids = {name: {key: i for i, key in enumerate(names)} for name, names in classes.items()}
        self.fields = {name: field for name, field in found.items() if field}
        seen = np.linspace(0, len(data) - 1, min(len(data), _SAMPLED)).astype(np.int64).tolist()
        facts = repr((len(data), self.fields, data.select_columns(list(self.fields))[seen] if seen else ()))
        self.fingerprint = digest(facts.encode("utf-8", "surrogatepass"))

    def __len__(self) -> int:
        return len(self._data)

    def where(self, index: int) -> str:
        return f"{self.label} {self._split}, record {index}"

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        if not indices or not fields:
            return [{} for _ in indices]
        columns = self._data.select_columns(list(fields))[[int(i) for i in indices]]
        return [self._one(i, {name: columns[name][k] for name in fields}) for k, i in enumerate(indices)]

    def _one(self, index: int, values: dict[str, Any]) -> dict[str, Any] | Bad:
        try:
            return {
                name: _value(name, self._numbered(name, value), self.fields[name]) for name, value in values.items()
            }
        except (ValueError, TypeError, OverflowError, OSError) as error:
            return Bad(self.where(index), str(error))

    def _numbered(self, name: str, value: Any) -> Any:
        """Replace class names by their numbers; other values are returned unchanged."""
        ids = self._ids.get(name)
        if ids is None or value is None or value == "":
            return value or None if ids else value
        if unknown := [v for v in (value if isinstance(value, list) else [value]) if name_of(v) not in ids]:
            raise ValueError(f"{name} is {shown(unknown[0])}, expected one of {listed(list(ids))}")
        return [ids[name_of(v) or ""] for v in value] if isinstance(value, list) else ids[name_of(value) or ""]


def _field(datasets: Any, feature: Any) -> Field | None:
    """Return what a feature holds; None if nothing here can use it."""
    if isinstance(feature, datasets.Image):
        return Field("image", shape=(None, None, None))
    if isinstance(feature, datasets.ClassLabel):
        return Field("label", tuple(feature.names))
    if isinstance(feature, datasets.Value):
        if feature.dtype in ("string", "large_string"):
            return Field("text")
        if feature.dtype == "bool":
            return Field("label", ("False", "True"))
        if feature.dtype.startswith(("int", "uint")):
            return Field("label")
        return Field("array", dtype=feature.dtype) if feature.dtype.startswith("float") else None
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return Field("array", shape=tuple(feature.shape), dtype=feature.dtype)
    if (inner := getattr(feature, "feature", None)) is not None and not isinstance(inner, dict):  # a list
        field = _field(datasets, inner)
        if field is None or field.kind not in ("label", "array"):
            return None
        if field.kind == "label":
            return Field("labels", field.names)
        length = getattr(feature, "length", -1)
        return Field("array", shape=(None if length < 0 else length, *field.shape), dtype=field.dtype)
    return None


def _value(name: str, value: Any, field: Field) -> Any:
    if value is None:
        raise ValueError(f"{name} is missing")
    if field.kind == "image":
        return value["bytes"] or Path(value["path"]).read_bytes()
    if field.kind == "label":
        return int(value)
    if field.kind == "labels":
        return tuple(int(v) for v in value)
    return np.asarray(value, field.dtype) if field.kind == "array" else value
