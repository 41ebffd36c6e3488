"""TensorFlow Datasets, read without TensorFlow (array_record sets)."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmodels.data.fields import input_field, unknown
from jaxmodels.data.records import Bad, Field, Joined, Records, digest
from jaxmodels.data.section import RecordsConfig, SplitsConfig
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError

_SAMPLED = 256


@dataclass(frozen=True)
class TFDS(RecordsConfig, SplitsConfig):
    """Sets of TensorFlow Datasets, read without TensorFlow."""

    evaluated_by: ClassVar[tuple[str, ...]] = ("dir",)

    dir: str | None = None
    """TFDS data directory; TFDS's own default when not given."""

    def records(self, split: Split) -> Records:
        return records(self, split)


def records(cfg: TFDS, split: Split) -> Records:
    """Open the records of a set, or the texts of several, whose names and fields are joined by +.

    Images stay encoded, as the set stores them.

    Raises: UserError if there is no such set, split or field, with the nearest name that exists.
    """
    names = [name.strip() for name in cfg.name.split("+")] if "+" in cfg.name else [cfg.name]
    if len(names) == 1:
        return _Set(cfg, split)
    fields = cfg.input_field.split("+") if cfg.input_field else [""] * len(names)
    if len(fields) != len(names):
        raise UserError(
            f"got data.input_field {cfg.input_field!r} for {len(names)} sets ({cfg.name}), expected a field of each, "
            f"try --data.input-field {'+'.join((fields * len(names))[: len(names)])}"
        )
    each = [replace(cfg, name=name, input_field=field) for name, field in zip(names, fields, strict=True)]
    parts = [_Set(one, split) for one in each]
    return Joined(parts, [input_field(part, one, ("text",)) for part, one in zip(parts, each, strict=True)])


class _Set(Records):
    """One split of a set."""

    def __init__(self, cfg: TFDS, split: Split) -> None:
        import tensorflow_datasets as tfds

        place = prepared(cfg)
        try:
            builder = tfds.builder_from_directory(place)
        except Exception as error:  # TFDS raises different errors for different damaged files
            raise _damaged(place, error) from error
        self.label = f"tfds {builder.info.full_name}"
        self._data = _open(builder, cfg, split)
        self._features: Any = builder.info.features
        # sorted, because TFDS's own order differs between processes
        found = {name: _field(self._features[name]) for name in sorted(self._features)}
        self.fields = {name: field for name, field in found.items() if field}
        self._split = cfg.train_split if split == "train" else cfg.eval_split
        # sets with one text per split (tiny_shakespeare) are a single text in parts
        self.whole = all(info.num_examples == 1 for info in builder.info.splits.values())
        seen = np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).astype(np.int64).tolist()
        try:
            raw = b"".join(bytes(record) for record in self._data.data_source.__getitems__(seen))
        except Exception as error:
            raise _damaged(place, error) from error
        facts = repr((str(builder.info.full_name), len(self), self.fields))
        self.fingerprint = digest(facts.encode() + raw)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        import tensorflow_datasets as tfds

        if not indices or not fields:
            return [{} for _ in indices]
        skip = {name: tfds.decode.SkipDecoding() for name in fields if self.fields[name].kind == "image"}
        features = tfds.features.FeaturesDict({name: self._features[name] for name in fields})
        with _quiet():
            raw = self._data.data_source.__getitems__([int(i) for i in indices])
            return [self._one(i, record, features, skip) for i, record in zip(indices, raw, strict=True)]

    def where(self, index: int) -> str:
        return f"{self.label} {self._split}, record {index}"

    def _one(self, index: int, raw: Any, features: Any, skip: Any) -> dict[str, Any] | Bad:
        try:
            example = features.deserialize_example_np(raw, decoders=skip)
            return {name: _value(example[name], self.fields[name]) for name in features}
        except UnicodeDecodeError as error:
            return Bad(self.where(index), f"byte {error.start} of a text is not UTF-8")
        except Exception as error:  # the error depends on where the record is damaged
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Bad(self.where(index), f"cannot be read ({reason})")


def _field(feature: Any) -> Field | None:
    """Return what a feature holds; None if nothing here can use it."""
    from tensorflow_datasets import features

    # TFDS's type annotations are wider than what it returns
    kinds: Any = features
    if isinstance(feature, kinds.ClassLabel):
        return Field("label", tuple(feature.names))
    if isinstance(feature, kinds.Image) and feature.np_dtype == np.uint8:
        return Field("image", shape=tuple(feature.shape))
    if isinstance(feature, kinds.Sequence):
        inner = _field(feature.feature)
        if inner is None or inner.kind not in ("label", "array"):
            return None
        if inner.kind == "label":
            return Field("labels", inner.names)
        return Field("array", shape=tuple(feature.shape), dtype=inner.dtype)
    if not isinstance(feature, kinds.Tensor | kinds.Image):  # numbers and texts are subclasses of Tensor
        return None
    dtype = np.dtype(feature.np_dtype)
    if dtype.kind in "OSU":
        return Field("text") if feature.shape == () else None
    if dtype.kind in "iub" and feature.shape == ():
        return Field("label", ("False", "True") if dtype.kind == "b" else ())
    return Field("array", shape=tuple(feature.shape), dtype=dtype.name)


def _value(value: Any, field: Field) -> Any:
    if field.kind == "text":
        return bytes(value).decode("utf-8") if not isinstance(value, str) else value
    if field.kind == "label":
        return int(value)
    if field.kind == "labels":
        return tuple(int(v) for v in value)
    return value if field.kind == "image" else np.asarray(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS's advice to install OpenCV out of a run's display; small images do not need it."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _open(builder: Any, cfg: TFDS, split: Split) -> Any:
    field, wanted = f"{split}_split", cfg.train_split if split == "train" else cfg.eval_split
    known = list(builder.info.splits)
    for name in re.findall(r"[^+\[\]]+(?=\[|\+|$)", wanted.replace(" ", "")):
        if name not in known:
            others = [k for k in known if split == "train" or k not in cfg.train_split]
            raise UserError(unknown(f"data.{field}", name, others or known, f"--data.{split}-split"))
    try:
        return builder.as_data_source(split=wanted)
    except NotImplementedError as error:
        raise UserError(
            f"got {builder.data_dir} in the format {builder.info.file_format}, expected array_record, "
            "try preparing it again with file_format='array_record'"
        ) from error
    except OSError as error:
        raise _damaged(builder.data_dir, error) from error
    except (ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"got data.{field} {wanted!r} ({reason}), expected TFDS's notation, try --data.{split}-split 'train[:90%]'"
        ) from error


def _damaged(place: object, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(
        f"got the set in {place}, which cannot be read whole ({reason}), expected all of its files, "
        "try preparing it again"
    )


def prepared(cfg: TFDS) -> Path:
    """Find the directory of the set named by `data.dir` and `data.name`: its newest version if none is given.

    Raises: UserError that lists the sets in the directory.
    """
    root = Path(cfg.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    place = root / cfg.name.replace(":", "/")
    if (place / "features.json").is_file():
        return place
    below = [d for d in _sets(place) if cfg.name] if place.is_dir() else []
    if below:
        configs = {d.parent for d in below}
        if len(configs) > 1:
            names = sorted(str(c.relative_to(root)) for c in configs)
            raise UserError(
                f"got data.name {cfg.name!r}, expected one of {', '.join(names)}, try --data.name {names[0]}"
            )
        return max(below, key=lambda d: [int(n) for n in re.findall(r"\d+", d.name)])
    family = cfg.name.replace(":", "/").split("/")[0]
    there = [d.relative_to(root) for d in _sets(root)]
    versions = [str(d) for d in there if d.parts[0] == family]
    names = versions or sorted({d.parts[0] for d in there})
    if not names:
        raise UserError(
            f"got data.name {cfg.name!r}, expected a prepared set in {root}, which has none, "
            "try --data.dir with the directory that holds the sets"
        )
    raise UserError(unknown("data.name", cfg.name, names, "--data.name", f" in {root}"))


def _sets(root: Path) -> list[Path]:
    patterns = ("*/features.json", "*/*/features.json", "*/*/*/features.json")
    return sorted(file.parent for pattern in patterns for file in root.glob(pattern))
