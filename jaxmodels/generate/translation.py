"""Translate or sum up texts with a trained encoder-decoder, and compare what it says with references."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError
from jaxmodels.generate import asked
from jaxmodels.generate.beam import EarlyStopping, decode
from jaxmodels.models.model import Model
from jaxmodels.train.saved import Run

MULTIPLE = 8
"""Sources are padded to a multiple of this many tokens, so that few programs are compiled."""
SHORTEST = 16
"""A translation may have this many tokens, however short its source."""
_UNLIMITED = 1 << 30


def translate_texts(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    *,
    beams: int = 4,
    alpha: float = 1.0,
    early_stopping: EarlyStopping | None = None,
    batch_size: int = 64,
    max_ratio: float = 2.0,
    most: int | None = None,
    source_length: int | None = None,
) -> list[str]:
    """Translate texts, in their order; `max_ratio` is the most tokens of a translation for each token of its source.

    `most` is the most tokens of any translation, and `source_length` of a source, which is cut; both are at most the
    model's context.

    Raises:
        UserError: the tokenizer has no end token, or an option is out of range.
    """
    end = tokenizer.end
    if end is None:
        raise UserError(
            f"got tokenizer {tokenizer}, expected one with an end token, try jaxmodels data train-tokenizer"
        )
    if batch_size < 1 or max_ratio <= 0:
        raise UserError(
            f"got batch_size {batch_size}, max_ratio {max_ratio}, expected batch_size >= 1, max_ratio > 0, "
            "try batch_size 64, max_ratio 2"
        )
    ends = tokenizer.special.ends or (end,)
    start, before = tokenizer.special.opening, np.array(tokenizer.special.before, np.int32)
    context = _UNLIMITED if model is None or model.longest is None else model.longest
    most, longest = min(most or _UNLIMITED, context + 1 - len(start)), min(source_length or _UNLIMITED, context)
    room = longest - len(before) - 1
    rows = [np.concatenate([before, ids[:room], [end]]) for ids in tokenizer.encode_many(sources)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    size, texts = min(batch_size, len(rows)), [""] * len(rows)
    for first in range(0, len(order), size or 1):
        chosen = order[first : first + size]
        width = min(-(-len(rows[chosen[0]]) // MULTIPLE) * MULTIPLE, context)
        inputs, segment_ids = np.zeros((2, size, width), np.int32)
        limits = np.ones(size, np.int32)
        for row, i in enumerate(chosen):
            inputs[row, : len(rows[i])] = rows[i]
            segment_ids[row, : len(rows[i])] = 1
            limits[row] = min(limit(len(rows[i]), max_ratio), most)
        how = {"beams": beams, "alpha": alpha, "early_stopping": early_stopping}
        marks = {"segment_ids": segment_ids, "start": start, "end": ends}
        found = decode(model, params, inputs, limit=limits, **marks, **how)
        for row, i in enumerate(chosen):
            texts[i] = tokenizer.decode(upto(found.tokens[row], ends))
    return texts


def translated(run: Run, sources: Sequence[str], beams: int | None = None, **how: Any) -> list[str]:
    """Translate or sum up texts with a run, within the lengths that it was trained with.

    The search is the one that the files of an imported run ask for; `beams` is its width where that is given.

    Raises:
        UserError: as `translate_texts` does, the run has no tokenizer, or its files ask what cannot be.
    """
    if run.tokenizer is None:
        raise UserError(f"got {run.directory} without a tokenizer, expected a run that was trained on texts")
    task, data = run.config.task, run.config.data
    searched = asked.searching(run.directory)
    how = {**searched, "beams": beams or searched["beams"], **how}
    lengths = {"most": getattr(task, "target_len", None)}
    if getattr(task, "target", "") == "summary":
        lengths |= {"source_length": data.seq_len, "max_ratio": 1.0}  # sources were cut in training too
    return translate_texts(run.model, run.params["model"], run.tokenizer, sources, **{**lengths, **how})


def limit(length: int, max_ratio: float) -> int:
    """The most tokens of a translation, its end included, for a source of `length` tokens."""
    return max(ceil(max_ratio * length), SHORTEST)


def upto(tokens: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Tokens (T,) before the first of the tokens that end a text."""
    stops = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: stops[0]] if len(stops) else tokens


def bleu(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """BLEU of a whole set from 0 to 100, with one reference each or several, by sacreBLEU's defaults (13a, mixed case).

    Source: Papineni et al. 2002; Post 2018.

    Raises:
        UserError: the package is not installed, or the two do not match in number.
    """
    if len(hypotheses) != len(references) or not references:
        raise UserError(
            f"got {len(hypotheses)} translations and {len(references)} references, expected as many, at least one"
        )
    try:
        import sacrebleu
    except ModuleNotFoundError as error:
        raise UserError("got no package sacrebleu, expected it for BLEU, try pip install 'jaxmodels[text]'") from error
    several: list[Any] = [[each] if isinstance(each, str) else list(each) for each in references]
    # in sacreBLEU's order, the first ones of all texts, then the second ones
    streams: Any = [[(each + [None] * n)[n] for each in several] for n in range(max(map(len, several)))]
    return sacrebleu.corpus_bleu(list(hypotheses), streams).score
