"""Recordings with their transcripts, decoded on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmodels.data import corpus as corpora
from jaxmodels.data import sounds
from jaxmodels.data.contract import IGNORED
from jaxmodels.data.examples import open_records
from jaxmodels.data.fields import input_field, named_field, named_groups
from jaxmodels.data.opening import Opening
from jaxmodels.data.records import Reader, Records, Row
from jaxmodels.data.source import Source, Split, fingerprint
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError

_USED = ("tokenizer", "seq_len", "input_field", "target_field", "group_field", "bad_records", "threads")


class Recordings(Source):
    """Sounds of one length, int16, with their transcripts as tokens.

    One length, because a step is compiled for the shapes of its batch. A recording that cannot be read, or is too long,
    is replaced by the next good one; in evaluation, none of its targets then counts.
    """

    def __init__(
        self, records: Records, opening: Opening, *, field: str, target: str, tokenizer: Tokenizer, blank: int | None
    ) -> None:
        """`field` and `target` name the sound and its transcript; `blank` is the id that no transcript may have."""
        cfg: Any = opening.data
        assert opening.fields is not None
        contract = opening.fields["inputs"]
        assert contract.shape is not None and contract.rate is not None
        (self._samples,), self.rate, self._length = contract.shape, contract.rate, cfg.seq_len
        self._split, self._records, self._blank, self._room = opening.split, records, blank, cfg.seq_len
        self.field, self.kind, self._target, self._group = field, "audio", target, cfg.group_field
        self.tokenizer, self.vocab_size, self._encode = tokenizer, tokenizer.vocab_size, tokenizer.encode
        self._reader = Reader(records, [name for name in dict.fromkeys((field, target, self._group)) if name],
                              cfg.bad_records)  # fmt: skip
        self._pool = ThreadPoolExecutor(cfg.threads, thread_name_prefix="jaxmodels-sounds")
        if self._group:
            self.groups, self._group_of = named_groups(records.fields[self._group], self._groups)
        self.fingerprint = fingerprint(
            [], "recordings", records.fingerprint, field, target, self._group, self._samples, self.rate, cfg.seq_len,
            opening.split, tokenizer.to_json(),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._records)

    def _groups(self) -> list[Any]:
        return [row[self._group] for rows in Reader(self._records, (self._group,), len(self)).all() for row in rows]

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        rows, made = [Row({}, -1)] * len(indices), [(np.zeros(0, np.int16), np.zeros(0, np.int32))] * len(indices)
        replaced, left = np.zeros(len(indices), bool), np.arange(len(indices))
        while left.size:
            read, replaced[left] = self._reader.rows(indices[left])
            again = []
            for place, row, one in zip(left.tolist(), read, self._pool.map(self._make, read), strict=True):
                if isinstance(one, str):
                    self._reader.bad(row.index, one)
                    again.append(place)
                else:
                    rows[place], made[place] = row, one
            left = np.array(again, np.int64)
        heard = np.zeros((len(indices), self._samples), np.int16)
        for place, (samples, _) in enumerate(made):
            heard[place, : len(samples)] = samples
        found = {"inputs": heard, **self._laid([ids for _, ids in made])}
        if self._split == "eval":
            found["targets"][replaced] = IGNORED
        if self.lengths:
            found["lengths"] = np.array([len(samples) for samples, _ in made], np.int32)
        if self._group:
            found["group"] = np.array([self._group_of(row[self._group]) for row in rows], np.int32)
        return found

    lengths = True
    """Whether a batch has the samples of each sound, `lengths` (B,)."""

    def _laid(self, texts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Lay out the tokens of transcripts as arrays of a batch."""
        targets = np.full((len(texts), self._length), IGNORED, np.int32)
        for row, ids in zip(targets, texts, strict=True):
            row[: len(ids)] = ids
        return {"targets": targets}

    def _make(self, row: Row) -> tuple[np.ndarray, np.ndarray] | str:
        """Return the samples and the tokens of a record, or why it has none."""
        try:
            samples = sounds.samples_of(row[self.field], self.rate)
        except sounds.Unreadable as error:
            return f"{self.field} {error}"
        if len(samples) > self._samples:
            most = self._samples / self.rate
            return f"{self.field} lasts {len(samples) / self.rate:.1f} s, expected at most task.seconds, {most:g}"
        try:
            ids = self._encode(row[self._target])
        except UserError as error:  # a character that no training text has
            return str(error)
        if len(ids) > self._room:
            before = "" if self._room == self._length else f", less the {self._length - self._room} that precede a text"
            return f"{self._target} has {len(ids)} tokens, expected at most data.seq_len, {self._length}{before}"
        if self._blank is not None and self._blank in ids:
            return f"{self._target} has the token {self._blank}, which task.blank says is none of a text"
        return samples, ids

    def describe(self) -> str:
        seconds = self._samples / self.rate
        return (
            f"{self._records.label}: {len(self):,} recordings of up to {seconds:g} s at {self.rate:,} Hz "
            f"({self._split}), tokenizer {self.tokenizer}"
        )


class Dictations(Recordings):
    """Recordings whose transcripts are read token by token: `tokens`, what precedes a text and the text, and `targets`,
    the text and its end."""

    lengths = False

    def __init__(self, records: Records, opening: Opening, *, first: Sequence[int], end: int, **named: Any) -> None:
        """`first` are the tokens that precede a text, `end` is the one that closes it."""
        super().__init__(records, opening, blank=None, **named)
        self._first, self._end = np.array(first, np.int32), end
        self._room = self._length - len(first)
        self.fingerprint = fingerprint([self._first], "dictations", self.fingerprint, end)

    def _laid(self, texts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        tokens = np.zeros((len(texts), self._length), np.int32)
        targets = np.full((len(texts), self._length), IGNORED, np.int32)
        for row, target, ids in zip(tokens, targets, texts, strict=True):
            whole = np.concatenate([self._first, ids])
            row[: len(whole)], before = whole, len(self._first) - 1
            # what is given when a text is read is not to be predicted
            target[before : len(whole)] = [*whole[before + 1 :], self._end]
        return {"tokens": tokens, "targets": targets}


def transcribed(opening: Opening, blank: int | None, space: int | None) -> Recordings:
    """Make recordings with transcripts; without the id of a blank, the vocabulary must leave room for it at its end.

    Raises:
        UserError: the records have no sound or no text, or tokenizer, blank and space do not fit together.
    """
    records, found = _opened(opening)
    size = opening.vocab_size or 0
    _check_tokens(found["tokenizer"], size, blank, space)
    return Recordings(records, opening, blank=size - 1 if blank is None else blank, **found)


def dictated(opening: Opening) -> Dictations:
    """Make recordings with transcripts for a decoder, which begins and ends them with the tokenizer's own tokens.

    Raises:
        UserError: the records have no sound or no text, or the tokenizer has no token that ends a text.
    """
    records, found = _opened(opening)
    tokenizer: Tokenizer = found["tokenizer"]
    corpora.check_vocab(tokenizer.vocab_size, opening.vocab_size)
    if tokenizer.end is None:
        raise UserError(
            f"got tokenizer {tokenizer} without a token that ends a text, expected one, try --data.tokenizer bpe:8000"
        )
    return Dictations(records, opening, first=tokenizer.special.opening, end=tokenizer.end, **found)


def _opened(opening: Opening) -> tuple[Records, dict[str, Any]]:
    """Open the records of a split; also return the names of sound and text, and the tokenizer of the texts."""
    cfg: Any = opening.data
    opening.check(_USED, "recordings")
    train = open_records(cfg, "train")
    field = input_field(train, cfg, ("audio",))
    target = cfg.target_field or _only_text(train, cfg.group_field)
    named_field(train, "target_field", target, ("text",), [field])
    if cfg.group_field:
        named_field(train, "group_field", cfg.group_field, ("label", "labels", "text"), [field])
    records = train if opening.split == "train" else open_records(cfg, opening.split)

    def documents(split: Split) -> Iterator[str]:
        found = train if split == "train" else open_records(cfg, split)
        for rows in Reader(found, (target,), len(found)).all():
            yield from (row[target] for row in rows)

    tokenizer = corpora.build_tokenizer(corpora.Corpus(f"{train.label} {target}", documents), cfg, None)
    return records, {"field": field, "target": target, "tokenizer": tokenizer}


def _only_text(train: Records, group: str) -> str:
    """Return the name of the only field that can be a transcript.

    Raises:
        UserError: there is none, or more than one.
    """
    known = sorted(name for name, field in train.fields.items() if field.kind == "text" and name != group)
    if len(known) != 1:
        raise UserError(
            f"got no data.target_field for {train.label}, expected the field of the transcripts, of "
            f"{', '.join(known) or 'which there is none'}, try --data.target-field {known[0] if known else 'text'}"
        )
    return known[0]


def _check_tokens(tokenizer: Tokenizer, vocab_size: int, blank: int | None, space: int | None) -> None:
    """Refuse a vocabulary without room for the blank, and a space that is another character."""
    needed = tokenizer.vocab_size + (blank is None)
    if vocab_size < needed:
        raise UserError(
            f"got model.vocab_size {vocab_size}, expected at least {needed}: the tokens of {tokenizer} and the blank, "
            f"try --model.vocab-size {needed}"
        )
    try:
        own = tokenizer.encode(" ").tolist()
    except UserError:  # none of its texts has one
        own = []
    if space is not None and own != [space] and len(own) < 2:
        own_rate = own[0] if own else None
        raise UserError(
            f"got task.space {space} with tokenizer {tokenizer}, expected the id of the space in it, {own_rate}, "
            f"try --task.space {own_rate}"
        )
