"""Texts of sentences as a model reads them, of which some make a summary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.data.contract import IGNORED
from jaxmodels.data.examples import Readers, open_records
from jaxmodels.data.fields import named_field
from jaxmodels.data.opening import Opening
from jaxmodels.data.source import Source
from jaxmodels.data.texts import Rows
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError

_log = logging.getLogger("jaxmodels")


class Document(NamedTuple):
    """A text's sentences, and summaries of it."""

    sentences: tuple[str, ...]
    summaries: tuple[str, ...]


def rows(texts: Sequence[Sequence[str]], tokenizer: Tokenizer, length: int, most: int) -> tuple[dict[str, Any], int]:
    """Lay out texts, one a row, each sentence as a whole text with its special tokens; also count those cut.

    `tokens`, `segment_ids` and `types` (N, length), which are 0 and 1 by turns; `at` (N, most), the first token of each
    sentence; `there` (N, most), whether there is a sentence. Sentences that do not fit are left out.
    Source: Liu & Lapata 2019, section 3.1.
    """
    if not tokenizer.before:
        raise UserError(
            f"got tokenizer {tokenizer}, expected one that begins a text with a token of its own, from which a "
            "sentence is judged, try the tokenizer.json of a BERT, or --data.tokenizer words:8000"
        )
    out = {name: np.zeros((len(texts), length), np.int32) for name in ("tokens", "types", "segment_ids")}
    out |= {"at": np.zeros((len(texts), most), np.int32), "there": np.zeros((len(texts), most), bool)}
    cut = 0
    ids = iter(tokenizer.encode_many([each for text in texts for each in text], special=True))
    for row, text in enumerate(texts):
        start = 0
        for number, each in enumerate([next(ids) for _ in text]):
            if number == most or start + len(each) > length:
                cut += 1
                break
            here = slice(start, start + len(each))
            out["tokens"][row, here], out["types"][row, here] = each, number % 2
            out["segment_ids"][row, here] = 1
            out["at"][row, number], out["there"][row, number] = start, True
            start = here.stop
    return out, cut


class Documents(Rows):
    """Texts of sentences, held in memory."""

    def __init__(self, documents: Sequence[Document], arrays: dict[str, np.ndarray], **more: Any) -> None:
        super().__init__(arrays, what="texts of sentences", **more)
        self.documents = tuple(documents)


def extracted(opening: Opening, most: int) -> Source:
    """Make rows of texts with a mark for each sentence, from fields of the kinds texts (twice) and labels.

    Raises:
        UserError: the records have no such fields.
    """
    cfg: Any = opening.data
    split = opening.split
    used = ("tokenizer", "seq_len", "bad_records", "input_field", "label_field", "target_field")
    opening.check(used, "texts of sentences")
    train = open_records(cfg, "train")
    for option in ("input_field", "target_field"):
        if not getattr(cfg, option):
            known = ", ".join(name for name, field in sorted(train.fields.items()) if field.kind == "texts")
            raise UserError(
                f"got no data.{option} for {opening.task}, expected the field of a text's sentences and that of its "
                f"summaries, of {known or 'none'}, try --data.input-field source --data.target-field target"
            )
    text = named_field(train, "input_field", cfg.input_field, ("texts",), [cfg.target_field])
    summaries = named_field(train, "target_field", cfg.target_field, ("texts",), [cfg.input_field])
    label = named_field(train, "label_field", cfg.label_field, ("labels",))
    if odd := [name for name in train.fields[label].names if name not in ("0", "1")]:
        raise UserError(
            f"got {label} with the mark {odd[0]!r} in {train.label}, expected 1 for each sentence of the summary and 0 "
            "for the others"
        )
    readers = Readers(cfg, train, [text, summaries, label])
    records, kept = readers.of(split).records, []
    for row in readers.rows(split):
        if len(row[label]) != len(row[text]):
            reason = f"has {len(row[label])} marks in {label} for {len(row[text])} sentences in {text}"
            readers.of(split).bad(row.index, reason)
        else:
            kept.append(row)
    tokenizer = readers.tokenizer(opening.vocab_size, text)
    arrays, cut = rows([row[text] for row in kept], tokenizer, cfg.seq_len, most)
    if cut:
        of = f"{cut:,} of {len(kept):,} texts of {records.label}"
        _log.warning("%s are longer than a row, which has no place for their last sentences", of)
    arrays["labels"] = np.full((len(kept), most), IGNORED, np.int32)
    for row, marks, there in zip(kept, arrays["labels"], arrays.pop("there"), strict=True):
        marks[there] = [int(train.fields[label].names[mark]) for mark in row[label][: int(there.sum())]]
    if split == "eval":
        arrays["document"] = np.arange(len(kept), dtype=np.int32)
    documents = [Document(row[text], row[summaries]) for row in kept]
    return Documents(documents, arrays, split=split, label=f"{records.label} {text}", tokenizer=tokenizer)
