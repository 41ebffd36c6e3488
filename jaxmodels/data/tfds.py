"""TensorFlow Datasets, read without TensorFlow (array_record sets)."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.config import DataConfig
from jaxmodels.data import corpus as corpora
from jaxmodels.data.source import Examples, Source, Split, fingerprint
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError

IN_MEMORY = 1 << 30

_READ = 1024


class Records(Source):
    """Examples too large to hold in memory: read and decoded as they are asked for."""

    def __init__(
        self, data: Any, fields: tuple[str, str], *, split: Split, label: str, classes: tuple[int, Sequence[str]]
    ) -> None:
        self._data, self._fields, self._split, self._label = data, fields, split, label
        self.num_classes, self.class_names = classes[0], tuple(classes[1])
        seen = np.linspace(0, len(data) - 1, min(len(data), 256)).astype(np.int64).tolist()
        raw = b"".join(bytes(record) for record in data.data_source.__getitems__(seen))
        self.fingerprint = fingerprint([np.frombuffer(raw, np.uint8)], "records", split, fields, len(data))

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        records = self._data.__getitems__(indices.tolist())
        inputs = [record[self._fields[0]] for record in records]
        if len(shapes := {np.shape(x) for x in inputs}) > 1:
            raise UserError(
                f"got {self._fields[0]} of different shapes {sorted(shapes)[:2]}, expected one shape, "
                "try a set whose images have one size"
            )
        return {"inputs": np.stack(inputs), "labels": np.array([r[self._fields[1]] for r in records], np.int32)}

    def describe(self) -> str:
        return f"{self._label}: {len(self):,} records read as needed, {self.num_classes} classes ({self._split})"


def corpus(cfg: DataConfig) -> corpora.Corpus:
    """The texts of a set's one text field."""
    builder = _builder(cfg)
    field = _input_field(builder, cfg, text_only=True)

    def documents(split: Split) -> Iterator[str]:
        for records in _records(_open(builder, cfg, split)):
            yield from (record[field].decode("utf-8") for record in records)

    # Sets of one text a split (tiny_shakespeare) are one text cut up: joined again as it was.
    whole = all(info.num_examples == 1 for info in builder.info.splits.values())
    return corpora.Corpus(f"{_title(builder)} {field}", documents, whole)


def examples(cfg: DataConfig, split: Split, vocab_size: int | None) -> Source:
    """The inputs and labels of a set; texts become tokens, cut or filled up with 0 to seq_len."""
    import tensorflow_datasets as tfds

    builder = _builder(cfg)
    features = builder.info.features
    field = _input_field(builder, cfg, text_only=False)
    if cfg.label_field not in features:
        raise UserError(_unknown("data.label_field", cfg.label_field, sorted(features), "--data.label-field"))
    label = features[cfg.label_field]
    classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else None
    names = label.names if isinstance(label, tfds.features.ClassLabel) else ()
    data = _open(builder, cfg, split)
    title = f"{_title(builder)} {field}"

    if isinstance(features[field], tfds.features.Text):
        tokenizer = corpora.build_tokenizer(corpus(cfg), cfg, vocab_size)
        inputs, labels = _read_texts(data, field, cfg, tokenizer)
        title += f", tokenizer {tokenizer}"
    else:
        tokenizer = None
        shape = features[field].shape
        size = np.dtype(features[field].np_dtype).itemsize * math.prod(shape) if None not in shape else math.inf
        if len(data) * size > IN_MEMORY:
            if classes is None:
                raise UserError(
                    f"got the field {cfg.label_field}, expected a ClassLabel, try another --data.label-field"
                )
            return Records(data, (field, cfg.label_field), split=split, label=title, classes=(classes, names))
        inputs, labels = _read_arrays(data, field, cfg.label_field, shape, features[field].np_dtype)
    if classes is None:
        classes = int(labels.max(initial=-1)) + 1
    return Examples(
        inputs, labels, split=split, label=title, num_classes=classes, class_names=names, tokenizer=tokenizer
    )


def _read_arrays(
    data: Any, field: str, label: str, shape: tuple[int, ...], dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.empty((len(data), *shape), np.float32 if np.dtype(dtype).kind == "f" else dtype)
    labels = np.empty(len(data), np.int32)
    for i, records in enumerate(_records(data)):
        here = slice(i * _READ, i * _READ + len(records))
        inputs[here] = [record[field] for record in records]
        labels[here] = [record[label] for record in records]
    return inputs, labels


def _read_texts(data: Any, field: str, cfg: DataConfig, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.zeros((len(data), cfg.seq_len), np.int32)
    labels = np.empty(len(data), np.int32)
    row = 0
    for records in _records(data):
        for ids in tokenizer.encode_many([record[field].decode("utf-8") for record in records]):
            inputs[row, : len(ids)] = ids[: cfg.seq_len]
            row += 1
        labels[row - len(records) : row] = [record[cfg.label_field] for record in records]
    return inputs, labels


def _records(data: Any) -> Iterator[list[Any]]:
    with _quiet():
        for start in range(0, len(data), _READ):
            yield data.__getitems__(list(range(start, min(start + _READ, len(data)))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's advice to install OpenCV (of no use to small images) out of a run's display."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _builder(cfg: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(prepared(cfg))


def _open(builder: Any, cfg: DataConfig, split: Split) -> Any:
    field, wanted = f"{split}_split", cfg.train_split if split == "train" else cfg.eval_split
    known = list(builder.info.splits)
    for name in re.findall(r"[^+\[\]]+(?=\[|\+|$)", wanted.replace(" ", "")):
        if name not in known:
            others = [k for k in known if split == "train" or k not in cfg.train_split]
            raise UserError(_unknown(f"data.{field}", name, others or known, f"--data.{split}-split"))
    try:
        return builder.as_data_source(split=wanted)
    except NotImplementedError as error:
        raise UserError(
            f"got {builder.data_dir} in the format {builder.info.file_format}, expected array_record, "
            "try preparing it again with file_format='array_record'"
        ) from error
    except (ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"got data.{field} {wanted!r} ({reason}), expected TFDS's notation, try --data.{split}-split 'train[:90%]'"
        ) from error


def _input_field(builder: Any, cfg: DataConfig, text_only: bool) -> str:
    import tensorflow_datasets as tfds

    features = builder.info.features
    fields = [name for name in sorted(features) if text_only or name != cfg.label_field]
    texts = [name for name in fields if isinstance(features[name], tfds.features.Text)]
    if cfg.input_field:
        if cfg.input_field not in features:
            raise UserError(_unknown("data.input_field", cfg.input_field, sorted(features), "--data.input-field"))
        if text_only and cfg.input_field not in texts:
            kind = f"{type(features[cfg.input_field]).__name__}, not a text"
            raise UserError(
                f"got data.input_field {cfg.input_field!r}, which is {kind}, "
                f"expected one of {', '.join(texts) or 'none: the set has no text'}, try --task.name classification"
            )
        return cfg.input_field
    images = [name for name in fields if isinstance(features[name], tfds.features.Image)]
    candidates = texts if text_only else images or texts or fields
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UserError(
            f"got {_title(builder)} with the fields {', '.join(sorted(features))}, expected a text field, "
            "try --task.name classification or another --data.name"
        )
    raise UserError(
        f"got no data.input_field, expected one of {', '.join(candidates)}, try --data.input-field {candidates[0]}"
    )


def prepared(cfg: DataConfig) -> Path:
    """The directory of the set that `data.dir` and `data.name` name: its newest version where none is given.

    Raises: UserError with the sets that lie there.
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
            f"got data.name {cfg.name!r}, expected a prepared set in {root}, where none lies, "
            "try --data.dir with the directory that holds the sets"
        )
    raise UserError(_unknown("data.name", cfg.name, names, "--data.name", f" in {root}"))


def _sets(root: Path) -> list[Path]:
    patterns = ("*/features.json", "*/*/features.json", "*/*/*/features.json")
    return sorted(file.parent for pattern in patterns for file in root.glob(pattern))


def _title(builder: Any) -> str:
    return f"tfds {builder.info.full_name}"


def _unknown(what: str, got: str, known: Sequence[str], flag: str, where: str = "") -> str:
    near = difflib.get_close_matches(got, known, 1, cutoff=0.3) or list(known[:1])
    hint = f"{flag} {near[0]}" if near else flag
    return f"got {what} {got!r}, expected one of {', '.join(known)}{where}, try {hint}"
