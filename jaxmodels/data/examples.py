"""How tasks make examples of a source: rows of text, pairs of texts, and images or arrays with labels."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.data import corpus as corpora
from jaxmodels.data import records as recorded
from jaxmodels.data import texts
from jaxmodels.data.balance import Balanced
from jaxmodels.data.classes import check_differ, tell_similar, tell_unlearned
from jaxmodels.data.fields import input_field, named_field, named_groups, numbered
from jaxmodels.data.files import shown
from jaxmodels.data.marks import Marks
from jaxmodels.data.opening import Opening
from jaxmodels.data.records import Field, Kind, Reader, Records, Row
from jaxmodels.data.section import DataConfig, RecordsConfig, default
from jaxmodels.data.source import Source, Split
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError

_log = logging.getLogger("jaxmodels")

_learned: dict[tuple[str, str, tuple[str, ...]], Tokenizer] = {}
"""The last tokenizer trained on texts, by what it was trained on, because splits are opened one at a time."""


_RECORDS = ("input_field", "bad_records")
_TEXT = ("tokenizer", "seq_len")
_LANGUAGE = (*_TEXT, "pack", *_RECORDS)
_LABELLED = (*_RECORDS, "label_field", "group_field", "balance")
_SOME: tuple[Kind, ...] = ("text", "texts")
_IMAGE = ("threads", "pixels", "augment")
"""The shared fields that each sort of example depends on; "augment" stands for that whole section."""


def open_records(data: DataConfig, split: Split, classes: Sequence[str] = ()) -> Records:
    """Open the records of a split; `classes` replace the data's own classes for its labels.

    Raises:
        UserError: the source has none, or gives something else.
    """
    found = data.records(split)
    fields = getattr(found, "fields", None)
    if not isinstance(found, Records) or not isinstance(fields, Mapping) or not fields:
        given = shown(found) if not isinstance(found, Records) else f"records with fields {shown(fields)}"
        raise UserError(
            f"got data {data.kind}, whose records({split!r}) gives {given}, expected a Records with a Field by the "
            "name of each of its fields"
        )
    if wrong := [name for name in fields if not isinstance(fields[name], Field)]:
        raise UserError(
            f"got data {data.kind}, whose records have the field {wrong[0]!r} as {shown(fields[wrong[0]])}, expected a "
            "Field, try Field('array')"
        )
    for name in ("label", "fingerprint"):
        if not isinstance(text := getattr(found, name, None), str):
            raise UserError(f"got data {data.kind}, whose records have the {name} {shown(text)}, expected text")
    try:
        len(found)
    except (TypeError, ValueError) as error:  # of a number that is not whole, or below 0
        raise UserError(
            f"got data {data.kind}, whose records have no length ({error}), expected a whole number from __len__"
        ) from error
    label = getattr(data, "label_field", "")
    return recorded.Known(found, label, classes) if classes and label in found.fields else found


def texts_of(data: DataConfig) -> corpora.Corpus:
    """Open a source's texts: its own, or those of a field of its records.

    Raises:
        UserError: the source has none, or they cannot be read.
    """
    if not isinstance(data, RecordsConfig) or type(data).corpus is not DataConfig.corpus:
        return data.corpus()
    train = open_records(data, "train")
    field = input_field(train, data, ("text",))
    return Readers(data, train, (field,)).corpus(field)


class Readers:
    """One reader for each split of a set, opened once, so that a bad record is reported once."""

    def __init__(self, cfg: Any, train: Records, fields: Sequence[str], classes: Sequence[str] = ()) -> None:
        self.cfg, self.train, self.fields, self.classes = cfg, train, tuple(dict.fromkeys(fields)), classes
        self._opened: dict[Split, Reader] = {}

    def of(self, split: Split) -> Reader:
        if split not in self._opened:
            records = self.train if split == "train" else open_records(self.cfg, split, self.classes)
            self._opened[split] = Reader(records, self.fields, self.cfg.bad_records)
        return self._opened[split]

    def label(self, split: Split) -> str:
        """Describe a split and its fields in a few words."""
        return f"{self.of(split).records.label} {' and '.join(self.fields)}"

    def rows(self, split: Split) -> list[Row]:
        """Read every good record."""
        return [row for rows in self.of(split).all() for row in rows]

    def tokenizer(self, vocab_size: int | None, *texts: str) -> Tokenizer:
        """Load the config's tokenizer; one that is trained on these fields is trained once for both splits."""
        if ":" not in self.cfg.tokenizer:
            return corpora.build_tokenizer(self.corpus(*texts), self.cfg, vocab_size)
        key = (self.cfg.tokenizer, self.train.fingerprint, texts)
        if key not in _learned:
            _learned.clear()
            _learned[key] = corpora.build_tokenizer(self.corpus(*texts), self.cfg, None)
        corpora.check_vocab(_learned[key].vocab_size, vocab_size)
        return _learned[key]

    def corpus(self, *texts: str) -> corpora.Corpus:
        """Return the texts of these fields, one field after another."""

        def documents(split: Split) -> Iterator[str]:
            for field in texts:
                for rows in self.of(split).all():
                    yield from (text for row in rows for text in several(row[field]))

        return corpora.Corpus(f"{self.train.label} {' and '.join(texts)}", documents, self.train.whole)


def language(opening: Opening, masked: bool = False) -> Source:
    """Make examples for a language model: windows over all texts joined, or rows of whole texts.

    With `masked` a row's targets are its own tokens, otherwise the tokens that follow.
    """
    data, split = opening.data, opening.split
    opening.check(_LANGUAGE, "texts")
    if not data.pack:
        own = data.windows(split, opening.vocab_size)
        return corpora.windows(texts_of(data), data, split, opening.vocab_size) if own is None else own
    corpus = texts_of(data)
    tokenizer = corpora.build_tokenizer(corpus, data, opening.vocab_size)
    ids = [x for x in tokenizer.encode_many(list(corpus.documents(split))) if len(x)]
    parts = texts.wrapped(ids, data.seq_len, tokenizer) if masked else ids
    rows = texts.packed(parts, data.seq_len, None if masked else _end(tokenizer), tokenizer.before)
    if split == "eval" and not masked and (sizes := tokenizer.sizes()) is not None:
        rows["bytes"] = sizes[np.maximum(rows["targets"], 0)]
    what = f"rows of {data.seq_len} tokens with {len(ids):,} texts"
    return texts.Rows(rows, split=split, label=corpus.label, tokenizer=tokenizer, what=what)


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.end is None:
        raise UserError(
            f"got tokenizer {tokenizer} without a token that ends a text, expected one, try --data.tokenizer bpe:8000"
        )
    return tokenizer.end


def several(value: str | Sequence[str]) -> Sequence[str]:
    """Return the texts of a field that holds one, or several."""
    return (value,) if isinstance(value, str) else value


def pairs(opening: Opening, target_length: int | None = None) -> Source:
    """Make pairs of texts and their translations, one per row or as many as fit.

    A source may be the list of its sentences, and have several translations, each of which makes a pair.
    """
    cfg: Any = opening.data
    split = opening.split
    opening.check((*_LANGUAGE, "target_field"), "pairs of texts")
    train = open_records(cfg, "train")
    if not cfg.input_field or not cfg.target_field:
        known = sorted(name for name, field in train.fields.items() if field.kind in _SOME)
        a, b = (*(name for name in known if name not in (cfg.input_field, cfg.target_field)), "SOURCE", "TARGET")[:2]
        source = cfg.input_field or a
        raise UserError(
            f"got no data.input_field or no data.target_field for {opening.task}, expected the fields of the source "
            f"and of the translation, of {', '.join(known)}, "
            f"try --data.input-field {source} --data.target-field {cfg.target_field or (a if cfg.input_field else b)}"
        )
    fields = [
        named_field(train, "input_field", cfg.input_field, _SOME, [cfg.target_field]),
        named_field(train, "target_field", cfg.target_field, _SOME, [cfg.input_field]),
    ]
    if cfg.input_field == cfg.target_field:
        raise UserError(
            f"got {cfg.input_field!r} for data.input_field and for data.target_field, expected two fields, "
            "try another --data.target-field"
        )
    readers = Readers(cfg, train, fields)
    tokenizer = readers.tokenizer(opening.vocab_size, *fields)
    rows = readers.rows(split)
    sources = tokenizer.encode_many([" ".join(several(row[fields[0]])) for row in rows])
    own = [(source, text) for source, row in zip(sources, rows, strict=True) for text in several(row[fields[1]])]
    targets, special = tokenizer.encode_many([text for _, text in own]), tokenizer.special
    arrays = texts.translations(
        [source for source, _ in own], targets, cfg.seq_len, _end(tokenizer), cfg.pack, special.start,
        before=special.before, target_length=target_length,
    )  # fmt: skip
    what = f"rows with {len(own):,} pairs" if cfg.pack else "pairs"
    return texts.Rows(arrays, split=split, label=readers.label(split), tokenizer=tokenizer, what=what)


def open_pairs(data: Any, split: Split) -> tuple[list[str], list[Sequence[str]]]:
    """Read the sources of a split, and the translations of each, as text."""
    fields = (data.input_field, data.target_field)
    rows = [row for some in Reader(open_records(data, split), fields, data.bad_records).all() for row in some]
    return [" ".join(several(row[fields[0]])) for row in rows], [several(row[fields[1]]) for row in rows]


def captioned(opening: Opening) -> Source:
    """Make pairs of an image and a caption of its class."""
    cfg: Any = opening.data
    images = labeled(
        dataclasses.replace(opening, num_classes=None), ("image", "array"), more=("captions", "class_names", *_TEXT)
    )
    if not cfg.captions:
        raise UserError(
            f"got no data.captions for {opening.task}, expected captions of a class, "
            "try --data.captions 'a photo of a {label}'"
        )
    names = cfg.class_names or images.class_names or tuple(map(str, range(images.num_classes or 0)))
    if len(names) != (images.num_classes or 0):
        raise UserError(f"got {len(names)} data.class_names, expected one for each of {images.num_classes} classes")
    captions = texts.filled(cfg.captions, names)
    corpus = corpora.Corpus("captions", lambda split: captions)
    tokenizer = corpora.build_tokenizer(corpus, cfg, opening.vocab_size)
    return texts.Captioned(images, captions, tokenizer, cfg.seq_len)


def labeled(opening: Opening, kinds: Sequence[Kind], *, optional: bool = False, more: Sequence[str] = ()) -> Source:
    """Make labeled examples of images, arrays or texts, balanced in training if the config asks for it.

    `kinds` are those that the model reads, most likely first. With `optional` a set may have no labels. `more` are
    fields that the caller reads.
    """
    cfg: Any = opening.data
    split, shape = opening.split, opening.inputs_shape
    opening.check(_used(opening, kinds, more), " or ".join(f"{kind}s" for kind in kinds))
    train = open_records(cfg, "train", opening.classes)
    field = input_field(train, cfg, kinds)
    label: str | None = cfg.label_field
    if label not in train.fields and optional and label == default(cfg, "label_field"):
        label = None
    if label is not None:
        named_field(train, "label_field", label, ("label", "labels"))
    if cfg.group_field:
        named_field(train, "group_field", cfg.group_field, ("label", "labels", "text"), [field])
    kind = train.fields[field].kind
    opening.check(_used(opening, (kind,), more), f"{kind}s")
    if shape and len(cfg.mean) not in (0, 1, shape[-1]):
        raise UserError(
            f"got data.mean {cfg.mean} for a model of inputs {shape}, expected one number or {shape[-1]}, one for each "
            "channel, try --data.mean 0.5 --data.std 0.5"
        )
    if label is not None and split == "train" and not opening.classes:
        tell_similar(train.fields[label].names, label, train.label)
    records = train if split == "train" else open_records(cfg, split, opening.classes)
    if label is not None and not optional:
        check_differ(records, label, split)
        if split == "eval" and not opening.classes and (kind != "image" or records.apart):
            tell_unlearned(train, records, label)
    if kind == "image":
        from jaxmodels.data import images

        source = images.Pictures(records, opening, field=field, label=label)
    else:
        source = _rows(opening, train, field, label)
    source.field, source.kind = field, kind
    return Balanced(source, source.labels()) if cfg.balance and split == "train" else source


def marked(opening: Opening, kind: Kind, marks: Callable[[str], Marks]) -> Source:
    """Make images with what is marked on them: `marks` of the field of this kind.

    It is the field that `data.label_field` names, or the only one.
    """
    cfg: Any = opening.data
    opening.check((*_LABELLED[:-1], "class_names", *opening.reads, *_IMAGE), "images with marks")
    train = open_records(cfg, "train", opening.classes)
    field, named = input_field(train, cfg, ("image",)), cfg.label_field
    known = [name for name, each in train.fields.items() if each.kind == kind]
    if len(known) == 1 and named == default(cfg, "label_field"):
        named = known[0]
    label = named_field(train, "label_field", named, (kind,), [field])
    own = train.fields[label].names
    if own and cfg.class_names and len(cfg.class_names) != len(own):
        raise UserError(
            f"got {len(cfg.class_names)} data.class_names for the {len(own)} classes of {train.label} "
            f"({', '.join(own[:5])}{', ...' * (len(own) > 5)}), expected one each, try without --data.class-names"
        )
    records = train if opening.split == "train" else open_records(cfg, opening.split, opening.classes)
    from jaxmodels.data import images

    source = images.Pictures(records, opening, field=field, label=None, marks=marks(label))
    source.field, source.kind = field, "image"
    source.class_names = tuple(opening.classes) or cfg.class_names or own
    source.num_classes = len(own) or None
    return source


def _used(opening: Opening, kinds: Sequence[Kind], more: Sequence[str]) -> list[str]:
    """The shared fields that labeled examples of these kinds depend on."""
    used = [*_LABELLED, *more]
    for kind in kinds:
        used += _TEXT if kind == "text" else [*opening.reads, *(_IMAGE if kind == "image" else ())]
    return used


def _rows(opening: Opening, train: Records, field: str, label: str | None) -> texts.Rows:
    """Make texts or arrays with labels, which are numbered by `opening.classes` if there are any."""
    cfg: Any = opening.data
    split, num_classes = opening.split, opening.num_classes
    readers = Readers(cfg, train, [name for name in (field, label, cfg.group_field) if name], opening.classes)
    tokenizer = readers.tokenizer(opening.vocab_size, field) if train.fields[field].kind == "text" else None
    rows = readers.rows(split)
    values = [row[field] for row in rows]
    arrays: dict[str, np.ndarray]
    if tokenizer is not None:
        ids = tokenizer.encode_many(values, special=True, length=cfg.seq_len)
        if blank := sum(not len(x) for x in ids):  # a mean over no tokens would be NaN
            _log.warning("left out %s texts of %s without a token", f"{blank:,}", train.label)
            rows = [row for row, x in zip(rows, ids, strict=True) if len(x)]
        arrays = texts.single([x for x in ids if len(x)], cfg.seq_len)
    else:
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise UserError(
                f"got arrays of the shapes {', '.join(map(str, shapes[:3]))} in {train.label} {field}, expected all of "
                "one shape, try filling them up or --data.input-field with another field"
            )
        arrays = {"inputs": np.array(values, np.float32)}
    classes: tuple[str, ...] | int = train.fields[label].names if label else ()
    if label and not classes:
        classes = numbered(train, label, (row[label] for row in rows))
    if label:
        width = max(num_classes or 0, classes if isinstance(classes, int) else len(classes))
        arrays["labels"] = labels_of(rows, label, train.fields[label].kind == "labels", width)
        if missing := int((arrays["labels"] < 0).sum()):
            _log.warning("%s of %s examples of %s have no label (-1)", f"{missing:,}", f"{len(rows):,}", train.label)
    groups: tuple[str, ...] = ()
    if cfg.group_field:
        values = [row[cfg.group_field] for row in rows]
        groups, place = named_groups(train.fields[cfg.group_field], lambda: values)
        arrays["group"] = np.array([place(value) for value in values], np.int32)
    what = "texts" if tokenizer else "arrays"
    return texts.Rows(
        arrays,
        split=split,
        label=f"{readers.of(split).records.label} {field}",
        originals=[row[field] for row in rows] if tokenizer and split == "eval" else (),
        tokenizer=tokenizer,
        classes=classes,
        groups=groups,
        what=what,
    )


def labels_of(rows: Sequence[Row], label: str, several: bool, classes: int) -> np.ndarray:
    """Return the labels of records: int32 (N,), or float32 (N, classes) of 0 and 1 if a record may have several."""
    if not several:
        return np.array([row[label] for row in rows], np.int32)
    out = np.zeros((len(rows), classes), np.float32)
    for at, row in zip(out, rows, strict=True):
        at[list(row[label])] = 1
    return out
