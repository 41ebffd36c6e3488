"""Sources of rows held in memory: whole texts, one per row or as many as fit, and arrays."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmodels.data.contract import IGNORED
from jaxmodels.data.source import Source, Split, fingerprint
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError


class Rows(Source):
    """Finished rows, held in memory: arrays of equal length, by their names in a batch."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        *,
        split: Split,
        label: str,
        tokenizer: Tokenizer | None = None,
        classes: Sequence[str] | int = (),
        groups: Sequence[str] = (),
        what: str = "texts",
        originals: Sequence[str] = (),
    ) -> None:
        """`originals`: the text of each row as its record has it."""
        self.arrays, self.split, self.label, self.tokenizer = dict(arrays), split, label, tokenizer
        self.groups, self.texts, self._what = tuple(groups), originals, what
        self.vocab_size = None if tokenizer is None else tokenizer.vocab_size
        self.num_classes = (classes if isinstance(classes, int) else len(classes)) or None
        self.class_names = () if isinstance(classes, int) else tuple(classes)
        if not len(self):
            raise UserError(f"got no {what} to {split} on ({label}), expected some, try another split or eval_fraction")
        facts = ("rows", split, sorted(self.arrays), tokenizer and tokenizer.to_json())
        self.fingerprint = fingerprint(list(self.arrays.values()), *facts)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values()), ()))

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x[indices] for name, x in self.arrays.items()}

    def labels(self) -> np.ndarray:
        """Return the labels of all rows, (N,), or (N, classes) if there may be several.

        Raises: UserError if rows have none.
        """
        if "labels" not in self.arrays:
            raise UserError(f"got {self.label} without a label, expected one class each, try --data.balance False")
        return self.arrays["labels"]

    def describe(self) -> str:
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        tokenizer = f", tokenizer {self.tokenizer}" if self.tokenizer else ""
        return f"{self.label}: {len(self):,} {self._what}{classes} ({self.split}){tokenizer}"


def single(ids: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Lay out texts to classify, one per row, cut or padded: `inputs` and `segment_ids` (N, length)."""
    out = lay([[i] for i in range(len(ids))], length, [(text[:length],) for text in ids], {"inputs": 0}, "segment_ids")
    del out["positions"]
    return out


_PREDICTED = {"tokens": 0, "targets": IGNORED}
"""What a model reads and what it is to predict, with what fills up their rows."""


def plan(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Choose which texts share a row of `room` tokens: best fit, longest first.

    The result is a function of the lengths alone. No text may be longer than `room`.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # by the room left in the row
    left = 0  # bit r is set where a row with room r is open
    for text in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[text])
        fits = left >> size
        if fits:
            space = size + (fits & -fits).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                left &= ~(1 << space)
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(text)
        open_rows[space - size].append(row)
        left |= 1 << (space - size)
    return rows


def packed(
    ids: Sequence[np.ndarray], length: int, follow: int | None, before: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Pack whole texts into rows (N, length), separated by `segment_ids`; longer ones are cut into pieces.

    With `follow`, the token that ends a text, targets are the tokens that follow, and a text is preceded by `before`,
    or by the end token if that is empty. Without it, targets are the tokens themselves, for masked language models.
    """
    if follow is None:
        pairs = [(piece, piece) for text in ids for piece in _pieces(text, length)]
    else:
        first, end = np.array(before or [follow], np.int32), np.array([follow], np.int32)
        pairs = []
        for text in ids:
            whole = np.concatenate([first, text, end])
            pairs += zip(_pieces(whole[:-1], length), _pieces(whole[1:], length), strict=True)
    rows = plan(np.array([len(a) for a, _ in pairs]), length)
    return lay(rows, length, pairs, _PREDICTED, "segment_ids")


def wrapped(ids: Sequence[np.ndarray], length: int, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Cut texts into pieces of at most `length` tokens, each between the tokenizer's special tokens."""
    before, after = (np.array(x, np.int32) for x in (tokenizer.before, tokenizer.after))
    if (room := length - len(before) - len(after)) < 1:
        raise UserError(
            f"got data.seq_len {length}, expected more than the {length - room} special tokens around a text, "
            f"try --data.seq-len {max(8, 2 * (length - room))}"
        )
    return [np.concatenate([before, piece, after]) for text in ids for piece in _pieces(text, room)]


def _pieces(text: np.ndarray, length: int) -> list[np.ndarray]:
    return [text[i : i + length] for i in range(0, len(text), length)]


def translations(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    length: int,
    end: int,
    pack: bool,
    start: Sequence[int] = (),
    *,
    before: Sequence[int] = (),
    target_length: int | None = None,
) -> dict[str, np.ndarray]:
    """Lay out pairs for teacher forcing: `before` + source + end token, `start` + target, and the tokens that follow
    those.

    Without `start`, a target starts with the end token. Longer texts are cut. Packed pairs share a row on both sides;
    those that are not may have rows of another length for targets.
    """
    stop, first, opening = (np.array(x, np.int32) for x in ([end], start or [end], before))
    most = target_length or length
    inputs = [np.concatenate([opening, x[: length - 1 - len(opening)], stop]) for x in sources]
    tokens = [np.concatenate([first, y[: most - len(first)]]) for y in targets]
    follow = [np.concatenate([x[1:], stop]) for x in tokens]
    sizes = np.array([max(len(x), len(y)) for x, y in zip(inputs, tokens, strict=True)])
    rows = plan(sizes, length) if pack else [[i] for i in range(len(inputs))]
    first = lay(rows, length, [(x,) for x in inputs], {"inputs": 0}, "segment_ids")
    second = lay(rows, most, list(zip(tokens, follow, strict=True)), _PREDICTED, "target_segment_ids")
    del first["positions"], second["positions"]  # an encoder-decoder derives them from the segment ids
    return first | second


def lay(
    rows: Sequence[Sequence[int]],
    length: int,
    texts: Sequence[tuple[np.ndarray, ...]],
    names: Mapping[str, int],
    marks: str,
) -> dict[str, np.ndarray]:
    """Lay texts into the rows of a plan; `marks` numbers the texts of a row from 1, and is 0 for padding.

    `names` are the arrays' names, each with what pads its rows.
    """
    fill = {**names, marks: 0, "positions": 0}
    out = {name: np.full((len(rows), length), value, np.int32) for name, value in fill.items()}
    for r, members in enumerate(rows):
        at = 0
        for segment, text in enumerate(members, 1):
            here = slice(at, at + len(texts[text][0]))
            for name, values in zip(names, texts[text], strict=True):
                out[name][r, here] = values
            out[marks][r, here] = segment
            out["positions"][r, here] = np.arange(len(texts[text][0]))
            at = here.stop
    return out


def filled(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Captions of each class, in the order of the classes: the templates with its name for {label}.

    Raises: UserError where one would say the same of every class.
    """
    if len(names) > 1 and not all("{label}" in template for template in templates):
        raise UserError(
            f"got captions {shlex.join(templates)}, expected {{label}} in each, where the name of a class comes, "
            "try 'a photo of a {label}'"
        )
    return [template.replace("{label}", name) for name in names for template in templates]


def encoded(captions: Sequence[str], tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    """Encode captions, one per row: `inputs` and `segment_ids` (N, length).

    Raises: UserError if one is longer.
    """
    ids = tokenizer.encode_many(captions, special=True)
    if tokenizer.end is not None and any(x[-1] != tokenizer.end for x in ids):
        # a text's features are read at its end
        ids = [np.append(x, np.int32(tokenizer.end)) for x in tokenizer.encode_many(captions)]
    longest = max((len(x) for x in ids), default=0)
    if longest > length:
        raise UserError(
            f"got captions of up to {longest} tokens, expected at most data.seq_len {length}, "
            "try shorter ones, or a larger data.seq_len in training"
        )
    return single(ids, length)


class Captioned(Source):
    """Images with captions of their class: each example gets one of them, another one in the next epoch."""

    def __init__(self, images: Source, captions: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> None:
        """`captions` lists those of the first class, then as many of the second, and so on."""
        self._rows = encoded(captions, tokenizer, seq_len)
        self._each, self.images = len(captions) // (images.num_classes or 1), images
        self.tokenizer, self.vocab_size, self.captions = tokenizer, tokenizer.vocab_size, tuple(captions)
        self.num_classes, self.class_names, self.groups = images.num_classes, images.class_names, images.groups
        self.field, self.kind = images.field, images.kind
        self.fingerprint = fingerprint(list(self._rows.values()), "captioned", images.fingerprint)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        batch = self.images.batch(indices, epochs)
        classes = batch["labels"]
        row = np.maximum(classes, 0) * self._each + (indices + epochs) % self._each
        return {
            **{name: x for name, x in batch.items() if name not in ("inputs", "labels")},
            "images": batch["inputs"],
            "tokens": self._rows["inputs"][row],
            "segment_ids": self._rows["segment_ids"][row],
            "labels": classes,
            "classes": classes.copy(),
        }

    def describe(self) -> str:
        return f"{self.images.describe()}, {len(self.captions)} captions, tokenizer {self.tokenizer}"
