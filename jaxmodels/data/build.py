"""From a config to the examples of a split: records become texts, images or pairs, as the task wants them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from jaxmodels.config import Augment, Config, DataConfig, used
from jaxmodels.data import corpus as corpora
from jaxmodels.data import records as recorded
from jaxmodels.data import texts
from jaxmodels.data.balance import Balanced
from jaxmodels.data.fields import input_field, named_field, named_groups, numbered
from jaxmodels.data.records import Reader, Records, Row
from jaxmodels.data.source import Source, Split, Windows
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError

_log = logging.getLogger("jaxmodels")

_learned: dict[tuple[str, str, tuple[str, ...]], Tokenizer] = {}
"""The last tokenizer learned from texts, by what it was learned from: the splits of a set are opened one by one."""


def open_source(
    cfg: DataConfig,
    split: Split,
    task: str,
    *,
    vocab_size: int | None = None,
    inputs_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    classes: Sequence[str] = (),
) -> Source:
    """The examples of one split.

    `vocab_size`, `inputs_shape` and `num_classes` are the model's: the data is checked against them, and synthetic
    data is made from them. `augment` and the seed say how images of the training split are changed. `classes` are the
    names of those that a model was trained on, where labels are to count them and not the data's own.

    Raises: UserError.
    """
    from jaxmodels.data import synthetic, tokens

    if task not in ("causal_lm", "masked_lm") and cfg.source not in (*used.RECORDS, "synthetic"):
        raise UserError(
            f"got data.source {cfg.source} for {task}, expected one of {', '.join(used.RECORDS)} or synthetic, "
            "try --data.source tfds"
        )
    used.check_data(cfg, augment or Augment(), task, used.kinds(task, bool(inputs_shape)))
    if cfg.source == "synthetic":
        drawn = num_classes if task == "classification" else None
        return synthetic.Synthetic(
            cfg, split, task, vocab_size=vocab_size, inputs_shape=inputs_shape, num_classes=drawn
        )
    if task in ("causal_lm", "masked_lm"):
        if cfg.source == "tokens":
            return tokens.open_tokens(cfg, split, vocab_size)
        return _language(cfg, split, task, vocab_size)
    if task == "seq2seq":
        return _pairs(cfg, split, vocab_size)
    if task == "contrastive":
        return _captioned(cfg, split, vocab_size, inputs_shape, augment, seed, classes)
    source = _examples(cfg, split, task, vocab_size, inputs_shape, num_classes, augment, seed, classes)
    if task == "classification":
        _check_classes(source, num_classes)
    return source


def open_for(cfg: Config, split: Split, classes: Sequence[str] = ()) -> Source:
    """The source of a whole experiment, checked against its model; `classes` as in `open_source`."""
    return open_source(
        cfg.data,
        split,
        cfg.task.name,
        vocab_size=getattr(cfg.model, "vocab_size", None),
        inputs_shape=getattr(cfg.model, "input_shape", None),
        num_classes=getattr(cfg.model, "classes", None),
        augment=cfg.augment,
        seed=cfg.train.seed,
        classes=classes,
    )


def open_records(cfg: DataConfig, split: Split, classes: Sequence[str] = ()) -> Records:
    """The records of a split of a set; `classes` are what its labels count, where not the data's own."""
    if cfg.source == "tfds":
        from jaxmodels.data import tfds as kind
    elif cfg.source == "images":
        from jaxmodels.data import folders as kind
    elif cfg.source == "table":
        from jaxmodels.data import tables as kind
    else:
        from jaxmodels.data import huggingface as kind
    found = kind.records(cfg, split)
    label = found.fields.get(cfg.label_field)
    return recorded.Known(found, cfg.label_field, classes) if classes and label is not None else found


def open_corpus(cfg: DataConfig) -> corpora.Corpus:
    """The texts of a source of texts.

    Raises: UserError where it has none.
    """
    if cfg.source in ("stdlib", "text"):
        return (corpora.stdlib if cfg.source == "stdlib" else corpora.text)(cfg)
    if cfg.source not in used.RECORDS:
        raise UserError(
            f"got data.source {cfg.source}, expected a source of texts: stdlib, text, {', '.join(used.RECORDS)}"
        )
    train = open_records(cfg, "train")
    field = input_field(train, cfg, ("text",))
    return _Readers(cfg, train, (field,)).corpus(field)


class _Readers:
    """A set's reader for each split, opened once, so that a bad record is named once."""

    def __init__(self, cfg: DataConfig, train: Records, fields: Sequence[str], classes: Sequence[str] = ()) -> None:
        self.cfg, self.train, self.fields, self.classes = cfg, train, tuple(dict.fromkeys(fields)), classes
        self._opened: dict[Split, Reader] = {}

    def of(self, split: Split) -> Reader:
        if split not in self._opened:
            records = self.train if split == "train" else open_records(self.cfg, split, self.classes)
            self._opened[split] = Reader(records, self.fields, self.cfg.bad_records)
        return self._opened[split]

    def label(self, split: Split) -> str:
        """What a split and the fields are, in a few words."""
        return f"{self.of(split).records.label} {' and '.join(self.fields)}"

    def rows(self, split: Split) -> list[Row]:
        """Every good record."""
        return [row for rows in self.of(split).all() for row in rows]

    def tokenizer(self, vocab_size: int | None, *texts: str) -> Tokenizer:
        """The tokenizer that the config names; one learned from these fields is learned once for both splits."""
        if ":" not in self.cfg.tokenizer:
            return corpora.build_tokenizer(self.corpus(*texts), self.cfg, vocab_size)
        key = (self.cfg.tokenizer, self.train.fingerprint, texts)
        if key not in _learned:
            _learned.clear()
            _learned[key] = corpora.build_tokenizer(self.corpus(*texts), self.cfg, None)
        corpora.check_vocab(_learned[key].vocab_size, vocab_size)
        return _learned[key]

    def corpus(self, *texts: str) -> corpora.Corpus:
        """The texts of these fields, one field after the other."""

        def documents(split: Split) -> Iterator[str]:
            for field in texts:
                for rows in self.of(split).all():
                    yield from (row[field] for row in rows)

        return corpora.Corpus(f"{self.train.label} {' and '.join(texts)}", documents, self.train.whole)


def _language(cfg: DataConfig, split: Split, task: str, vocab_size: int | None) -> Source:
    corpus = open_corpus(cfg)
    tokenizer = corpora.build_tokenizer(corpus, cfg, vocab_size)
    if cfg.pack:
        masked = task == "masked_lm"
        documents = list(corpus.documents(split))
        ids = [x for x in tokenizer.encode_many(documents) if len(x)]
        parts = texts.wrapped(ids, cfg.seq_len, tokenizer) if masked else ids
        rows = texts.packed(parts, cfg.seq_len, None if masked else _end(tokenizer), tokenizer.before)
        if split == "eval" and not masked and (sizes := tokenizer.sizes()) is not None:
            rows["bytes"] = sizes[np.maximum(rows["targets"], 0)]
        what = f"rows of {cfg.seq_len} tokens with {len(ids):,} texts"
        return texts.Rows(rows, split=split, label=corpus.label, tokenizer=tokenizer, what=what)
    encoded = [*corpora.encode(corpus, split, tokenizer), np.array([], corpora.smallest_dtype(tokenizer.vocab_size))]
    return Windows(
        [np.concatenate(encoded)],
        cfg.seq_len,
        split=split,
        label=corpus.label,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
    )


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.end is None:
        raise UserError(
            f"got tokenizer {tokenizer} without a token that ends a text, expected one, try --data.tokenizer bpe:8000"
        )
    return tokenizer.end


def _pairs(cfg: DataConfig, split: Split, vocab_size: int | None) -> Source:
    train = open_records(cfg, "train")
    if not cfg.input_field or not cfg.target_field:
        known = sorted(name for name, field in train.fields.items() if field.kind == "text")
        a, b = (*(name for name in known if name not in (cfg.input_field, cfg.target_field)), "SOURCE", "TARGET")[:2]
        source = cfg.input_field or a
        raise UserError(
            "got no data.input_field or no data.target_field for seq2seq, expected the fields of the source and of "
            f"the translation, of {', '.join(known)}, "
            f"try --data.input-field {source} --data.target-field {cfg.target_field or (a if cfg.input_field else b)}"
        )
    fields = [
        named_field(train, "input_field", cfg.input_field, ("text",), [cfg.target_field]),
        named_field(train, "target_field", cfg.target_field, ("text",), [cfg.input_field]),
    ]
    if cfg.input_field == cfg.target_field:
        raise UserError(
            f"got {cfg.input_field!r} for data.input_field and for data.target_field, expected two fields, "
            "try another --data.target-field"
        )
    readers = _Readers(cfg, train, fields)
    tokenizer = readers.tokenizer(vocab_size, *fields)
    rows = readers.rows(split)
    sources, targets = (tokenizer.encode_many([row[field] for row in rows]) for field in fields)
    arrays = texts.translations(sources, targets, cfg.seq_len, _end(tokenizer), cfg.pack, tokenizer.special.start)
    what = f"rows with {len(rows):,} pairs" if cfg.pack else "pairs"
    return texts.Rows(arrays, split=split, label=readers.label(split), tokenizer=tokenizer, what=what)


def open_pairs(cfg: DataConfig, split: Split) -> tuple[list[str], list[str]]:
    """The sources and the translations of a split, as texts."""
    fields = (cfg.input_field, cfg.target_field)
    rows = [row for some in Reader(open_records(cfg, split), fields, cfg.bad_records).all() for row in some]
    return [row[cfg.input_field] for row in rows], [row[cfg.target_field] for row in rows]


def _captioned(
    cfg: DataConfig,
    split: Split,
    vocab_size: int | None,
    inputs_shape: tuple[int, ...] | None,
    augment: Augment | None,
    seed: int,
    classes: Sequence[str] = (),
) -> Source:
    images = _examples(cfg, split, "contrastive", None, inputs_shape, None, augment, seed, classes)
    if not cfg.captions:
        raise UserError(
            "got no data.captions for contrastive, expected captions of a class, "
            "try --data.captions 'a photo of a {label}'"
        )
    names = cfg.class_names or images.class_names or tuple(map(str, range(images.num_classes or 0)))
    if len(names) != (images.num_classes or 0):
        raise UserError(f"got {len(names)} data.class_names, expected one for each of {images.num_classes} classes")
    captions = [template.replace("{label}", name) for name in names for template in cfg.captions]
    corpus = corpora.Corpus("captions", lambda split: captions)
    tokenizer = corpora.build_tokenizer(corpus, cfg, vocab_size)
    return texts.Captioned(images, captions, tokenizer, cfg.seq_len)


def _examples(
    cfg: DataConfig,
    split: Split,
    task: str,
    vocab_size: int | None,
    inputs_shape: tuple[int, ...] | None,
    num_classes: int | None,
    augment: Augment | None,
    seed: int,
    classes: Sequence[str] = (),
) -> Source:
    """Images, arrays or texts, with their labels, and in training as balanced as asked for."""
    from jaxmodels.data import images

    train = open_records(cfg, "train", classes)
    field = input_field(train, cfg, ("image", "array") if inputs_shape else ("text",))
    label: str | None = cfg.label_field
    if label not in train.fields and task in ("vae", "gan") and label == DataConfig().label_field:
        label = None
    if label is not None:
        named_field(train, "label_field", label, ("label", "labels"))
    if cfg.group_field:
        named_field(train, "group_field", cfg.group_field, ("label", "labels", "text"), [field])
    kind = train.fields[field].kind
    used.check_data(cfg, augment or Augment(), task, (kind, "text") if task == "contrastive" else (kind,))
    if inputs_shape and len(cfg.mean) not in (0, 1, inputs_shape[-1]):
        raise UserError(
            f"got data.mean {cfg.mean} for a model of inputs {inputs_shape}, expected one number or "
            f"{inputs_shape[-1]}, one for each channel, try --data.mean 0.5 --data.std 0.5"
        )
    if kind == "image":
        source = images.Images(
            train if split == "train" else open_records(cfg, split, classes),
            cfg,
            augment or Augment(),
            split,
            field=field,
            label=label,
            shape=inputs_shape,
            classes=num_classes,
            seed=seed,
        )
    else:
        source = _rows(cfg, split, train, field, label, vocab_size, num_classes, classes)
    source.field, source.kind = field, train.fields[field].kind
    return Balanced(source, source.labels()) if cfg.balance and split == "train" else source


def _rows(
    cfg: DataConfig,
    split: Split,
    train: Records,
    field: str,
    label: str | None,
    vocab_size: int | None,
    num_classes: int | None,
    known: Sequence[str] = (),
) -> texts.Rows:
    """Texts or arrays with their labels, which count the classes `known`, where there are any."""
    readers = _Readers(cfg, train, [name for name in (field, label, cfg.group_field) if name], known)
    tokenizer = readers.tokenizer(vocab_size, field) if train.fields[field].kind == "text" else None
    rows = readers.rows(split)
    values = [row[field] for row in rows]
    arrays: dict[str, np.ndarray]
    if tokenizer is not None:
        ids = tokenizer.encode_many(values, special=True, length=cfg.seq_len)
        if blank := sum(not len(x) for x in ids):  # a mean over no token would be no number
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
    """Labels of records: int32 (N,), or float32 (N, classes) of 0 and 1 where a record may have several."""
    if not several:
        return np.array([row[label] for row in rows], np.int32)
    out = np.zeros((len(rows), classes), np.float32)
    for at, row in zip(out, rows, strict=True):
        at[list(row[label])] = 1
    return out


def _check_classes(source: Source, num_classes: int | None) -> None:
    """Raises UserError where the data has more classes than the model."""
    if num_classes is not None and source.num_classes is not None and source.num_classes > num_classes:
        names = f" ({', '.join(source.class_names[:5])}, ...)" if source.class_names else ""
        raise UserError(
            f"got a model of {num_classes} classes, expected at least the data's {source.num_classes}{names}, "
            f"try --model.classes {source.num_classes}"
        )
