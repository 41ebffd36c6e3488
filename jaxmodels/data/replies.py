"""Questions about images and sounds, with their answers: rows of tokens beside the media that they refer to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodels.data import corpus as corpora
from jaxmodels.data import pixels, sounds, transforms
from jaxmodels.data.contract import IGNORED, BatchField, Contract
from jaxmodels.data.examples import open_records
from jaxmodels.data.fields import input_field, named_field, named_groups
from jaxmodels.data.opening import Opening
from jaxmodels.data.records import Kind, Reader, Records, Row
from jaxmodels.data.section import Augment
from jaxmodels.data.source import Source, Split, fingerprint
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError

KINDS: Mapping[str, Kind] = {"image": "image", "sound": "audio"}
"""Each medium, and the kind of the records' field that holds it."""
_USED = ("tokenizer", "seq_len", "input_field", "target_field", "group_field", "bad_records", "threads")
_NAMES = re.compile(r"\{(image|sound|question)\}")


@dataclass(frozen=True)
class Layout:
    """How a question and its media become the tokens before the answer."""

    tokenizer: Tokenizer
    media: Mapping[str, BatchField]
    """The fields of a batch that hold the media, by the name of each."""
    template: str = ""
    """What is before the answer, with {question} and the name of each medium in braces. Empty: the media, the question
    and a space."""

    @staticmethod
    def of(fields: Contract, tokenizer: Tokenizer, template: str) -> Layout:
        """The layout of a task with these fields."""
        return Layout(tokenizer, {name: fields[f"{name}s"] for name in KINDS if f"{name}s" in fields}, template)

    def __post_init__(self) -> None:
        usual = "".join(f"{{{name}}}" for name in self.media) + "{question} "
        object.__setattr__(self, "template", self.template or usual)
        if sorted(_NAMES.findall(self.template)) != sorted((*self.media, "question")):
            raise UserError(
                f"got task.template {self.template!r}, expected {{question}} and {' and '.join(self.media)} in it once "
                f"each, in braces, try --task.template '{usual}'"
            )

    def prompt(self, question: str, places: Mapping[str, int]) -> np.ndarray:
        """Return the tokens before an answer; `places` are those that each medium takes.

        Raises:
            UserError: a part of the text is a token that stands for a medium.
        """
        parts, text = [np.array(self.tokenizer.before, np.int32)], ""
        for number, part in enumerate(_NAMES.split(self.template)):
            if number % 2 and part != "question":
                parts += [self.words(text), np.full(places[part], self.token(part), np.int32)]
                text = ""
            else:
                text += question if number % 2 else part
        return np.concatenate([*parts, self.words(text)])

    def words(self, text: str) -> np.ndarray:
        """Return the tokens of a text, none of which may stand for a medium."""
        ids = self.tokenizer.encode(text) if text else np.zeros(0, np.int32)
        for name in self.media:
            if self.token(name) in ids:
                raise UserError(
                    f"has token {self.token(name)} in {text[:40]!r}, which model.{name}.token keeps for the {name}"
                )
        return ids

    def token(self, name: str) -> int:
        """Return the token in whose places a medium is."""
        places = self.media[name].places
        assert places is not None
        return places.token


class Replies(Source):
    """Rows of one length, each of the media of a record, a question about them, and its answer.

    Only the tokens of the answer, and the end behind it, are targets. A record that cannot be read, or is too long, is
    replaced by the next good one; in evaluation, nothing of it then counts.
    """

    kind = "text"

    def __init__(
        self, records: Records, opening: Opening, layout: Layout, fields: Mapping[str, str], longest: int
    ) -> None:
        """`fields` name the field of each medium, the question and the answer; `longest` are the most tokens of an
        answer, its end included."""
        cfg: Any = opening.data
        self._records, self._layout, self._fields, self._longest = records, layout, fields, longest
        self._split, self._length, self._seed, self._group = opening.split, cfg.seq_len, opening.seed, cfg.group_field
        self._library: pixels.Library = cfg.pixels
        augment = opening.augment
        if "image" in layout.media:
            pixels.check_library(cfg.pixels)
            transforms.check_channels(augment, (layout.media["image"].shape or (0,))[-1])
        self._augment = augment if opening.split == "train" else Augment(crop=augment.crop)
        self._changed = opening.split == "train" and bool(transforms.describe(augment))
        self.field, self.tokenizer = fields["question"], layout.tokenizer
        self.vocab_size = layout.tokenizer.vocab_size
        read = [name for name in dict.fromkeys((*fields.values(), self._group)) if name]
        self._reader = Reader(records, read, cfg.bad_records)
        self._pool = ThreadPoolExecutor(cfg.threads, thread_name_prefix="jaxmodels-media")
        if self._group:
            self.groups, self._group_of = named_groups(records.fields[self._group], self._groups)
        media = [(name, layout.token(name), each.shape, each.rate) for name, each in layout.media.items()]
        self.fingerprint = fingerprint(
            [], "replies", records.fingerprint, sorted(fields.items()), self._group, media, layout.template, longest,
            cfg.seq_len, opening.split, self._augment, layout.tokenizer.to_json(),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._records)

    def _groups(self) -> list[Any]:
        return [row[self._group] for rows in Reader(self._records, (self._group,), len(self)).all() for row in rows]

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        numbers = transforms.draws(self._seed, epochs, indices, transforms.needed(self._augment))
        made: list[dict[str, Any]] = [{}] * len(indices)
        replaced, left = np.zeros(len(indices), bool), np.arange(len(indices))
        while left.size:
            read, replaced[left] = self._reader.rows(indices[left])
            again = []
            for place, row, one in zip(
                left.tolist(), read, self._pool.map(self._make, read, numbers[left]), strict=True
            ):
                if isinstance(one, str):
                    self._reader.bad(row.index, one)
                    again.append(place)
                else:
                    made[place] = one
            left = np.array(again, np.int64)
        found = {name: np.stack([one[name] for one in made]) for name in made[0]}
        if self._split == "eval":
            found["targets"][replaced] = IGNORED
        if "images" in found:
            found["images"] = transforms.apply_own(found["images"], self._augment, self._seed, epochs, indices)
        return found

    def _make(self, row: Row, numbers: np.ndarray) -> dict[str, Any] | str:
        """Return the arrays of a record, or why it has none."""
        fields, layout = self._fields, self._layout
        try:
            found, places = media_of(layout, {name: row[fields[name]] for name in layout.media}, self._image(numbers))
            prompt, answer = layout.prompt(row[fields["question"]], places), layout.words(row[fields["answer"]])
        except (UserError, pixels.Unreadable, sounds.Unreadable) as error:
            return str(error)
        ids = np.append(np.concatenate([prompt, answer]), np.int32(layout.tokenizer.end or 0))
        if len(answer) >= self._longest:
            return f"{fields['answer']} has {len(answer)} tokens, expected at most {self._longest - 1}"
        if len(ids) > self._length + 1:
            return f"has {len(ids)} tokens in all, expected at most data.seq_len, {self._length}, and one"
        tokens, targets = np.zeros(self._length, np.int32), np.full(self._length, IGNORED, np.int32)
        tokens[: len(ids) - 1] = ids[:-1]
        targets[len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
        if self._group:
            found["group"] = np.int32(self._group_of(row[self._group]))
        return {"tokens": tokens, "targets": targets, **found}

    def _image(self, numbers: np.ndarray) -> Callable[[Any, tuple[int, ...]], np.ndarray]:
        """Return the function that brings an image to a shape, augmented by a row of draws in training."""

        def ready(value: Any, shape: Any) -> np.ndarray:
            opened = pixels.decode(value, self._library)
            if self._changed:
                return transforms.augment(opened, self._augment, shape, numbers, self._library)
            return transforms.center(opened, self._augment, shape, self._library)

        return ready

    def describe(self) -> str:
        changes = "; " + ", ".join(transforms.describe(self._augment)) if self._changed else ""
        return (
            f"{self._records.label}: {len(self):,} questions about {' and '.join(self._layout.media)} ({self._split}), "
            f"tokenizer {self.tokenizer}{changes}"
        )


def media_of(
    layout: Layout, values: Mapping[str, Any], image: Callable[[Any, tuple[int, ...]], np.ndarray]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the arrays of a record's media, and the places that each takes; `image` brings an image to a shape.

    Raises:
        UserError, Unreadable: a medium cannot be decoded, or a sound is too long.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        field = layout.media[name]
        assert field.shape is not None
        if name == "image":
            found["images"] = image(value, field.shape)
            continue
        (most,), rate = field.shape, field.rate or 1
        samples = sounds.samples_of(value, rate)
        if len(samples) > most:
            raise sounds.Unreadable(
                f"lasts {len(samples) / rate:.2f} s, expected at most {most / rate:g}, which model.sound.places holds"
            )
        found["sounds"] = np.pad(samples, (0, most - len(samples)))
        found["lengths"] = np.int32(len(samples))
    counts = {name: field.places.count for name, field in layout.media.items() if field.places is not None}
    return found, {name: count(int(found.get("lengths", 0))) for name, count in counts.items()}


def replied(opening: Opening, template: str, longest: int) -> Replies:
    """Make rows of questions about media, from records with a field for each medium, one of questions and one of
    answers.

    Raises:
        UserError: the records have no such fields, or the tokenizer does not fit.
    """
    cfg: Any = opening.data
    contract = opening.fields or {}
    names = [name for name in KINDS if f"{name}s" in contract]
    seen = (*opening.reads, "pixels", "augment") if "image" in names else ()
    opening.check((*_USED, *seen), "questions about media")
    train = open_records(cfg, "train")
    fields = {name: only_field(train, KINDS[name]) for name in names}
    if not cfg.target_field:
        known = sorted(name for name, each in train.fields.items() if each.kind == "text")
        raise UserError(
            f"got no data.target_field for {opening.task}, expected the field of the answers, of "
            f"{', '.join(known) or 'which there is none'}, try --data.target-field {known[0] if known else 'answer'}"
        )
    fields["question"] = input_field(train, cfg, ("text",))
    fields["answer"] = named_field(train, "target_field", cfg.target_field, ("text",), [fields["question"]])
    if cfg.group_field:
        named_field(train, "group_field", cfg.group_field, ("label", "text"), list(fields.values()))
    records = train if opening.split == "train" else open_records(cfg, opening.split)
    texts = (fields["question"], fields["answer"])

    def documents(split: Split) -> Iterator[str]:
        found = train if split == "train" else open_records(cfg, split)
        for rows in Reader(found, texts, len(found)).all():
            yield from (row[name] for row in rows for name in texts)

    corpus = corpora.Corpus(f"{train.label} {' and '.join(texts)}", documents)
    tokenizer = corpora.build_tokenizer(corpus, cfg, opening.vocab_size)
    if tokenizer.end is None:
        raise UserError(
            f"got tokenizer {tokenizer} without a token that ends a text, expected one, try --data.tokenizer words:8000"
        )
    return Replies(records, opening, Layout.of(contract, tokenizer, template), fields, longest)


def only_field(records: Records, kind: Kind) -> str:
    """Return the name of the only field of a kind.

    Raises:
        UserError: there is none, or more than one.
    """
    known = sorted(name for name, each in records.fields.items() if each.kind == kind)
    if len(known) != 1:
        raise UserError(
            f"got {records.label} with {', '.join(known) or 'no field'} of the kind {kind}, expected one such field, "
            "try a model without this tower, or other data"
        )
    return known[0]
